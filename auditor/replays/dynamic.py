"""Dynamic quantisation as OpenVINO's bfloat16 programs compute it.

Measured on OpenVINO 2026.4 with AMX, bit for bit: least and largest are rounded to bfloat16, and so
is x · 255 before the inverse of the range multiplies it; integers that are multiplied stay exact,
and their sums become bfloat16 by OpenVINO's own conversion, which rounds to nearest only where the
last bit that is kept is odd, and truncates where it is even.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.ports import SegmentGraph

_OPSET = 13  # Cast knows bfloat16 from here on
_RANGE = """(x) => (y, s, z) {
    keep = Constant <value = float {255.0}> () zero = Constant <value = float {0.0}> ()
    most = ReduceMax <keepdims = 0> (x) least = ReduceMin <keepdims = 0> (x)
    most16 = Cast <to = 16> (most) most32 = Cast <to = 1> (most16)
    least16 = Cast <to = 16> (least) least32 = Cast <to = 1> (least16)
    high = Max(most32, zero) low = Min(least32, zero) span = Sub(high, low) s = Div(span, keep)
    down = Neg(low) offset = Div(down, s) near = Round(offset) held = Clip(near, zero, keep)
    z = Cast <to = 2> (held)
    wide = Mul(x, keep) wide16 = Cast <to = 16> (wide) wide32 = Cast <to = 1> (wide16)
    inverse = Reciprocal(span) q = Mul(wide32, inverse) r = Round(q)
    t = Add(r, held) c = Clip(t, zero, keep) y = Cast <to = 2> (c) }"""
# What was rounded up goes back one step; it stays there where its last bit, which seven bits
# have no room for, is even.
_SUM = """(x) => (y) {
    real = Cast <to = 1> (x) near16 = Cast <to = 16> (real) near = Cast <to = 1> (near16)
    less = Constant <value = float {0.99609375}> () smaller = Mul(near, less)
    below16 = Cast <to = 16> (smaller) below = Cast <to = 1> (below16)
    size = Abs(near) whole = Abs(real) up = Greater(size, whole) cut = Where(up, below, near)
    factor = Constant <value = float {131073.0}> () scaled = Mul(cut, factor)
    rest = Sub(scaled, cut) seven = Sub(scaled, rest) even = Equal(seven, cut)
    y = Where(even, cut, near) }"""


def in_bfloat16(segment: SegmentGraph) -> onnx.ModelProto | None:
    """A segment with its dynamic quantisation in bfloat16; None where it has none."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return None
    bodies = {index: _RANGE for index, _ in surgery.find(model, ("DynamicQuantizeLinear",))}
    types = surgery.types(model)
    for index, node in surgery.find(model, ("Cast",)):
        to = surgery.attributes(node)["to"]
        if types.get(node.input[0]) == TensorProto.INT32 and to == TensorProto.FLOAT:
            bodies[index] = _SUM
    return surgery.substituted(model, bodies) if bodies else None
