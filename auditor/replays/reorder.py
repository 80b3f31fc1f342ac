"""The same segment with its sums added up in another order.

Perturbed inputs miss what rounding does *inside* a long sum: averaging 25,600 values one after
another loses digits that jitter on the values averages away. Replaying the segment with every
contraction reversed, and every plain sum or mean added up one value after another (the least
exact order in use), shows it: mathematically nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery
from auditor.replays.editor import Editor

# Which axis of which input is summed over: reversing all of them leaves the result's meaning.
_SUMMED: dict[str, tuple[tuple[int, int], ...]] = {
    "MatMul": ((0, -1), (1, -2)),
}
_SPATIAL = 1 << 30  # stands for all axes behind the channels
# Reversed outputs of these are the outputs of reversed inputs, along their own axis.
_EQUIVARIANT = {"InstanceNormalization": (0,), "LayerNormalization": (0, 1, 2)}
OPSET = 13  # what the surgery below is written for


def reordered(model: onnx.ModelProto, *, plain: bool = False) -> onnx.ModelProto | None:
    """A copy of a segment (of opset 13 or later) with its sums in another order, None without any.

    ``plain`` leaves all but plain sums and means as they are.

    Conv and ConvTranspose (over channels), Gemm, MatMul, LayerNormalization and
    InstanceNormalization run backwards; Softmax, GlobalAveragePool, and ReduceMean and ReduceSum
    over one axis or all spatial ones, add one value after another.
    """
    editor = Editor(model)
    constants = {t.name: t for t in model.graph.initializer}
    kinds = surgery.types(model)
    for node in surgery.copied(model).graph.node:
        if kinds.get(node.output[0]) in surgery.EXACT:  # overflow is no matter of rounding
            editor.copy(node)
        elif (axis := _plain_sum(node, constants)) is not None:
            _sequential(editor, node, axis)
        elif not plain and node.op_type == "Softmax":
            _softmax(editor, node)
        elif not plain and (axes := list(_axes(node))):
            _reversed(editor, node, axes, back=node.op_type in _EQUIVARIANT)
        else:
            editor.copy(node)
    return editor.changed


def longest_sum(nodes: Iterable[onnx.NodeProto], shapes: Mapping[str, Sequence[int]]) -> int:
    """Number of terms in the longest sum that contractions add up.

    Args:
        nodes: the nodes of a segment.
        shapes: of their tensors, by name, where known.
    """
    return max((_terms(node, shapes) for node in nodes), default=1)


def _terms(node: onnx.NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    dims = shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
    if len(dims) < 2:
        return 1
    if node.op_type == "Conv":  # M × C/group × kernel
        return math.prod(dims[1:])
    if node.op_type == "ConvTranspose":  # C × M/group × kernel
        return math.prod((dims[0], *dims[2:]))
    if node.op_type == "MatMul":
        return dims[-2]
    if node.op_type == "Gemm":
        return dims[1] if surgery.attributes(node).get("transB") else dims[0]
    return 1


def _reversed(
    editor: Editor, node: onnx.NodeProto, axes: list[tuple[int, int]], *, back: bool
) -> None:
    """Add ``node`` with inputs reversed along their axes, and its output turned back."""
    for index, axis in axes:
        if index < len(node.input) and node.input[index]:
            node.input[index] = _turned(editor, node.input[index], axis)
    output = node.output[0]
    if back:
        node.output[0] = editor.fresh()
    editor.copy(node)
    if back:
        _turned(editor, node.output[0], axes[0][1], to=output)


def _turned(editor: Editor, values: str, axis: int, to: str = "") -> str:
    ends = (editor.constant([v], np.int64) for v in (-1, -(2**62), axis, -1))
    return editor.add("Slice", values, *ends, to=to)


def _last(editor: Editor, values: str, axis: int) -> str:
    """The last of the running sums of values along an axis."""
    running = editor.add("CumSum", values, editor.constant(axis, np.int64))
    ends = (editor.constant([v], np.int64) for v in (-1, 2**62, axis))
    return editor.add("Slice", running, *ends)


def _sequential(editor: Editor, node: onnx.NodeProto, axis: int) -> None:
    """Add ``node`` computed as the last of its running sums.

    Args:
        editor: what it is added to.
        node: a sum or mean.
        axis: the axis it sums over; ``_SPATIAL`` for everything behind the channels.
    """
    values, output = node.input[0], node.output[0]
    plain = node.output[0] = editor.fresh()
    editor.copy(node)  # its own result still gives the output's shape
    shape = editor.add("Shape", plain)
    if axis == _SPATIAL:
        values = editor.add("Reshape", values, editor.constant([0, 0, -1], np.int64))
        axis = 2
    total = _last(editor, values, axis)
    if node.op_type != "ReduceSum":
        number = editor.add("Div", editor.add("Size", node.input[0]), editor.add("Size", plain))
        total = editor.add("Div", total, editor.cast(number, onnx.TensorProto.FLOAT))
    editor.add("Reshape", total, shape, to=output)


def _softmax(editor: Editor, node: onnx.NodeProto) -> None:
    """Add ``node`` written out, with its exponentials added up one after another."""
    axis = surgery.attributes(node).get("axis", -1)
    values = node.input[0]
    # Instead of ReduceMax, whose axes are an attribute or an input depending on the opset.
    where = editor.add("ArgMax", values, axis=axis, keepdims=1)
    largest = editor.add("GatherElements", values, where, axis=axis)
    powers = editor.add("Exp", editor.add("Sub", values, largest))
    editor.add("Div", powers, _last(editor, powers, axis), to=node.output[0])


def _plain_sum(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int | None:
    """The axis a plain sum or mean runs over, None for any other node."""
    if node.op_type == "GlobalAveragePool":
        return _SPATIAL
    if node.op_type not in ("ReduceMean", "ReduceSum"):
        return None
    axes = surgery.attributes(node).get("axes")
    if axes is None and len(node.input) > 1 and node.input[1] in constants:
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
    if axes is None:
        return None
    if len(axes) == 1:
        return int(axes[0])
    return _SPATIAL if sorted(axes) in ([2, 3], [-2, -1]) else None


def _axes(node: onnx.NodeProto) -> Iterator[tuple[int, int]]:
    """(input, axis) pairs to reverse in one node."""
    given = surgery.attributes(node)
    if node.op_type in ("Conv", "ConvTranspose") and given.get("group", 1) == 1:
        yield from ((0, 1), (1, 1 if node.op_type == "Conv" else 0))
    elif node.op_type == "Gemm":
        yield from ((0, 0 if given.get("transA") else 1), (1, 1 if given.get("transB") else 0))
    elif node.op_type in _EQUIVARIANT:
        axis = given.get("axis", -1)
        if axis == -1:
            yield from ((index, -1) for index in _EQUIVARIANT[node.op_type])
    else:
        yield from _SUMMED.get(node.op_type, ())
