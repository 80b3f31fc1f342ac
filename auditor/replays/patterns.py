"""Patterns that nearly are those of a known function, with what they nearly are in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery
from auditor.ports import Array
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

# The numbers that GELU in its three forms, hard sigmoid, swish and mish are written with.
_KNOWN = (
    *(math.sqrt(2 / math.pi), 0.044715, math.sqrt(2), math.sqrt(0.5), 1.702),
    *(1 / 6, 0.5, 1.0, 2.0, 3.0, 6.0),
)
# How far, relative, a constant is from one of them that it is taken for; nearer it is the same.
_NEAR, _SAME = 3e-2, 1e-7
_END = np.iinfo(np.int64).max
_SLICE = 10  # the operator set from which on a Slice has inputs


def snapped(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The segment with constants of one element that are near known ones; None without any."""
    changed = surgery.copied(model)
    tensors = list(changed.graph.initializer)
    for _, node in surgery.find(changed, ("Constant",)):
        tensors.extend(a.t for a in node.attribute if a.name == "value")
    moved = False
    for tensor in tensors:
        if math.prod(tensor.dims) != 1:
            continue
        value = numpy_helper.to_array(tensor)
        known = _nearest(value) if value.dtype.kind == "f" else None
        if known is not None:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(value, known), tensor.name))
            moved = True
    return changed if moved else None


def _nearest(value: Array) -> float | None:
    number = float(value.reshape(()))
    nearest = min(_KNOWN, key=lambda known: abs(known - number))
    return nearest if _SAME < abs(nearest - number) / nearest <= _NEAR else None


def halved(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The segment with rotations of halves in place of those of uneven parts; None without any.

    A rotary embedding is ``x · c + concat(−b, a) · s`` with x = (a, b). Where a has n elements and
    b has more, the operator for it rotates the first 2n, and hands on the rest.
    """
    if surgery.opset(model) < _SLICE:
        return None
    layout, editor = Layout(model), Editor(model)
    start, end, axis = (editor.constant([n], np.int64) for n in (0, _END, -1))
    turned: dict[str, tuple[str, str]] = {}  # by result: what is rotated, and twice n
    for node in layout.nodes:
        if (parts := _rotated(layout, node)) is not None:
            x, first = parts
            size = editor.add("Gather", editor.add("Shape", first), editor.constant([-1], np.int64))
            twice = editor.add("Add", size, size)
            ahead = editor.add("Slice", x, start, size, axis)
            behind = editor.add("Neg", editor.add("Slice", x, size, twice, axis))
            rest = editor.add("Slice", x, twice, end, axis)
            editor.add("Concat", behind, ahead, rest, to=node.output[0], axis=-1)
            turned[node.output[0]] = x, twice
        elif (found := _embedding(layout, node, turned)) is not None:
            x, twice = turned[found]
            total = editor.add("Add", *node.input)
            inside = editor.add("Slice", total, start, twice, axis)
            rest = editor.add("Slice", x, twice, end, axis)
            editor.add("Concat", inside, rest, to=node.output[0], axis=-1)
        else:
            editor.copy(node)
    return editor.changed


def _rotated(layout: Layout, node: onnx.NodeProto) -> tuple[str, str] | None:
    """What is rotated, x, and a, where a node is ``concat(−b, a)`` of two of its parts."""
    if node.op_type != "Concat" or len(node.input) != 2:
        return None
    negative, first = (layout.source(name) for name in node.input)
    second = layout.source(negative.input[0]) if negative and negative.op_type == "Neg" else None
    if first is None or second is None or {first.op_type, second.op_type} - {"Slice", "Split"}:
        return None
    if first.input[0] != second.input[0]:
        return None
    return str(first.input[0]), str(node.input[1])


def _embedding(
    layout: Layout, node: onnx.NodeProto, turned: Mapping[str, tuple[str, str]]
) -> str | None:
    """The rotation in ``x · c + rotation · s``."""
    if node.op_type != "Add":
        return None
    products = [layout.source(name) for name in node.input]
    factors = [list(p.input) for p in products if p is not None and p.op_type == "Mul"]
    for a, b in (factors, factors[::-1]) if len(factors) == 2 else ():
        for name in turned.keys() & b:
            if turned[name][0] in a:
                return name
    return None
