"""The same segment with its sums added up in another order.

Perturbed inputs miss what rounding does *inside* a long sum: averaging 25,600 values one after
another loses digits that jitter on the values averages away. Replaying the segment with every
contraction reversed, and every plain sum or mean added up one value after another (the least
exact order in use), shows it: mathematically nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from auditor.graphs.surgery import EXACT, types

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
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    surgery = _Surgery(result.graph)
    constants = {t.name: t for t in model.graph.initializer}
    kinds = types(model)
    changed = False
    for node in model.graph.node:
        new = onnx.NodeProto()
        new.CopyFrom(node)
        if kinds.get(node.output[0]) in EXACT:  # a sum that overflows is no matter of rounding
            result.graph.node.append(new)
            continue
        if (axis := _plain_sum(node, constants)) is not None:
            surgery.sequential(new, axis)
        elif not plain and node.op_type == "Softmax":
            surgery.softmax(new)
        elif not plain and (axes := list(_axes(node))):
            surgery.reversed(new, axes, back=node.op_type in _EQUIVARIANT)
        else:
            result.graph.node.append(new)
            continue
        changed = True
    return result if changed else None


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
        flipped = any(a.name == "transB" and a.i for a in node.attribute)
        return dims[1] if flipped else dims[0]
    return 1


class _Surgery:
    """Adds nodes and constants under names of their own."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._count = 0
        self._constants: set[str] = set()

    def reversed(self, node: onnx.NodeProto, axes: list[tuple[int, int]], *, back: bool) -> None:
        """Add ``node`` with inputs reversed along their axes, and its output turned back."""
        for index, axis in axes:
            if index < len(node.input) and node.input[index]:
                reverse = [self._constant(v) for v in (-1, -(2**62), axis, -1)]
                node.input[index] = self._node("Slice", [node.input[index], *reverse])
        output = node.output[0]
        if back:
            node.output[0] = self._fresh()
        self._graph.node.append(node)
        if back:
            reverse = [self._constant(v) for v in (-1, -(2**62), axes[0][1], -1)]
            self._node("Slice", [node.output[0], *reverse], output)

    def sequential(self, node: onnx.NodeProto, axis: int) -> None:
        """Add ``node`` computed as the last of its running sums.

        Args:
            node: a sum or mean.
            axis: the axis it sums over; ``_SPATIAL`` for everything behind the channels.
        """
        values, output = node.input[0], node.output[0]
        node.output[0] = self._fresh()
        self._graph.node.append(node)  # its own result still gives the output's shape
        shape = self._node("Shape", [node.output[0]])
        if axis == _SPATIAL:
            values = self._node("Reshape", [values, self._constant(0, 0, -1)])
            axis = 2
        running = self._node("CumSum", [values, self._constant(axis, scalar=True)])
        last = [self._constant(v) for v in (-1, 2**62, axis)]
        total = self._node("Slice", [running, *last])
        if node.op_type != "ReduceSum":
            count = self._node("Size", [node.input[0]])
            results = self._node("Size", [node.output[0]])
            number = self._node("Div", [count, results])
            number = self._node("Cast", [number], to=onnx.TensorProto.FLOAT)
            total = self._node("Div", [total, number])
        self._node("Reshape", [total, shape], output)

    def softmax(self, node: onnx.NodeProto) -> None:
        """Add ``node`` written out, with its exponentials added up one after another."""
        axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
        values = node.input[0]
        # Instead of ReduceMax, whose axes are an attribute or an input depending on the opset.
        where = self._node("ArgMax", [values], axis=axis, keepdims=1)
        largest = self._node("GatherElements", [values, where], axis=axis)
        powers = self._node("Exp", [self._node("Sub", [values, largest])])
        running = self._node("CumSum", [powers, self._constant(axis, scalar=True)])
        last = [self._constant(v) for v in (-1, 2**62, axis)]
        self._node("Div", [powers, self._node("Slice", [running, *last])], node.output[0])

    def _node(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or self._fresh()
        self._graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _fresh(self) -> str:
        self._count += 1
        return f"reordered/{self._count}"

    def _constant(self, *values: int, scalar: bool = False) -> str:
        name = f"reordered/{'scalar' if scalar else 'constant'}{values}"
        if name not in self._constants:
            self._constants.add(name)
            array = np.asarray(values[0] if scalar else values, np.int64)
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def _plain_sum(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int | None:
    """The axis a plain sum or mean runs over, None for any other node."""
    if node.op_type == "GlobalAveragePool":
        return _SPATIAL
    if node.op_type not in ("ReduceMean", "ReduceSum"):
        return None
    axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
    if axes is None and len(node.input) > 1 and node.input[1] in constants:
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
    if axes is None:
        return None
    if len(axes) == 1:
        return int(axes[0])
    return _SPATIAL if sorted(axes) in ([2, 3], [-2, -1]) else None


def _axes(node: onnx.NodeProto) -> Iterator[tuple[int, int]]:
    """(input, axis) pairs to reverse in one node."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
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
