"""ONNX Runtime's operators on quantised tensors, whose results are cut off to 8 bits.

``QLinearAdd``, ``QLinearSigmoid`` and others of the domain ``com.microsoft`` (ContribOperators.md)
are what ``quantize_static`` writes in the integer format. OpenVINO computes them on dequantised
values, and its conversion to integers cuts the fraction off and wraps around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
from onnx import TensorProto

from auditor.graphs import surgery

_DOMAIN = "com.microsoft"
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul"}
_UNARY = {
    "QLinearAveragePool": "AveragePool",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearSigmoid": "Sigmoid",
    "QLinearSoftmax": "Softmax",
}
_CONCAT = "QLinearConcat"
_PER_AXIS = 13  # softmaxes work along one axis from this operator set on
_LIMITS: dict[int, tuple[int, int]] = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127)}


def cut_off(model: onnx.ModelProto) -> dict[int, str]:
    """Function bodies for such operators that cut results off, by the nodes' positions."""
    known = {*_BINARY, *_UNARY, _CONCAT}
    found = {
        index: node
        for index, node in enumerate(model.graph.node)
        if node.domain == _DOMAIN and node.op_type in known
    }
    types = surgery.types(model) if found else {}
    bodies = {index: _body(node, types) for index, node in found.items()}
    return {index: body for index, body in bodies.items() if body is not None}


def _body(node: onnx.NodeProto, types: dict[str, int]) -> str | None:
    """The function body of an operator; None where it has no such body."""
    given = surgery.attributes(node)
    names = [f"a{i}" if name else "" for i, name in enumerate(node.input)]
    if node.op_type == _CONCAT:
        (scale, zero), read = _padded(names[:2]), names[2:]
        step = f"Concat <axis = {given['axis']}>"
    elif node.op_type in _BINARY:
        (scale, zero), read = _padded(names[6:]), names[:6]
        step = _BINARY[node.op_type]
    elif given.get("channels_last") or given.get("opset", _PER_AXIS) < _PER_AXIS:
        return None
    else:
        (scale, zero), read = _padded(names[3:]), names[:3]
        step = f"{_UNARY[node.op_type]} {surgery.options(node, channels_last=None, opset=None)}"
    kind = next((types[n] for n in node.input if types.get(n) in _LIMITS), None)
    if kind is None:
        return None
    operands = [_padded(read[i : i + 3], 3) for i in range(0, len(read), 3)]
    mean = step if node.op_type == "QLinearAveragePool" else ""
    result = f"{'Identity' if mean else step} ({', '.join(f'r{i}' for i in range(len(operands)))})"
    wrapped = "over = Sub(i, low) rest = Mod(over, all) j = Add(rest, low)"
    if node.op_type in _UNARY:  # the zero point is added to what is 8 bits already
        end = f"i = Cast <to = 6> (q) {wrapped} k = Add(j, z) c = Clip(k, low, high)"
    else:
        end = f"f = Cast <to = 1> (z) p = Add(q, f) i = Cast <to = 6> (p) {wrapped} c = Identity(j)"
    low, high = _LIMITS[kind]
    return (
        f"({', '.join(names)}) => (y) {{ low = Constant <value = int32 {{{low}}}> () "
        f"high = Constant <value = int32 {{{high}}}> () all = Constant <value = int32 {{256}}> () "
        f"none = Constant <value = int32 {{0}}> () {' '.join(_dequantised(operands, mean))} "
        f"r = {result} factor = Reciprocal({scale}) q = Mul(r, factor) "
        f"z = Cast <to = 6> ({zero or 'none'}) {end} y = Cast <to = {kind}> (c) }}"
    )


def _dequantised(operands: Sequence[Sequence[str]], mean: str) -> Iterator[str]:
    """Steps to real numbers r0, r1 … from tensors, each with its scale and its zero point.

    ``mean`` is one of integers, which is rounded to an integer.
    """
    for i, (tensor, scale, zero) in enumerate(operands):
        yield f"w{i} = Cast <to = 1> ({tensor}) z{i} = Cast <to = 1> ({zero or 'none'})"
        yield f"m{i} = {mean} (w{i}) h{i} = Round(m{i})" if mean else f"h{i} = Identity(w{i})"
        yield f"d{i} = Sub(h{i}, z{i}) r{i} = Mul(d{i}, {scale})"


def _padded(names: Sequence[str], count: int = 2) -> Sequence[str]:
    """Names, with empty ones for optional inputs that are not given."""
    return (*names, "", "")[:count]
