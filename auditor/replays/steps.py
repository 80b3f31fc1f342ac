"""Operators that runtimes compute in several steps, each of which rounds what it writes.

OpenVINO takes some apart into kernels; TVM writes every one out in the model's own type
(``half_steps``).
"""

from __future__ import annotations

import math

import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.graphs.model import key
from auditor.replays import half_steps
from auditor.replays.kernel_layout import INTEGERS, Group
from auditor.replays.rounder import Rounder
from auditor.replays.writer import OPSET_OF_SUMS

# Operators whose result of integers OpenVINO scales, rather than their operand.
_MEANS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
# LogSoftmax works along one axis from here on; before, on two dimensions.
_SOFTMAX_ALONG = 13
# ReduceMean and ReduceMax take their axes as an input from here on.
_AXES_OPSET = 18


def written(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Write a node in the steps of its kernels, if it has several; returns whether it has."""
    if rounder.sites.sums and rounder.to.cast == TensorProto.FLOAT16:
        return half_steps.written(rounder, node, group)
    if node.op_type in _MEANS:
        return _average(rounder, node, group)
    steps = _STEPS.get(node.op_type)
    openvinos = rounder.sites.scope == "kernel" and not rounder.sites.constants
    if steps is None or not openvinos or not rounder.reads_narrow(group):
        return False
    return steps(rounder, node, group)


def _layer_normalization(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Round the normalised value before gamma and beta are applied to it."""
    gamma, *beta = node.input[1:]
    shape = rounder.constants.get(gamma)
    if shape is None or len([o for o in node.output if o]) > 1:
        return False
    options = surgery.attributes(node)
    axes = list(range(options.get("axis", -1), 0))  # a positive one says no number of axes
    if rounder.sites.steps and axes:
        x = rounder.input(node, 0, node.input[0], group)
        mean = rounder.round(_reduce(rounder, "ReduceMean", x, axes))
        centred = rounder.round(rounder.new("Sub", x, mean))
        square = _reduce(rounder, "ReduceMean", rounder.new("Mul", centred, centred), axes)
        epsilon = rounder.scalar(options.get("epsilon", 1e-5))
        width = rounder.new("Sqrt", rounder.new("Add", square, epsilon))
        scaled = rounder.new("Mul", rounder.new("Div", centred, width), gamma)
        scaled = rounder.round(scaled)
    elif rounder.at.filled(gamma, 1) and all(rounder.at.filled(name, 0) for name in beta):
        return False  # an engine leaves both out, and fuses what comes next
    else:
        mark = f"{rounder.mark}{node.output[0]}"
        ones = rounder.initializer(
            f"{mark}/ones", TensorProto.FLOAT, shape, [1.0] * math.prod(shape)
        )
        x = rounder.input(node, 0, node.input[0], group)
        plain = surgery.copied(node)
        del plain.input[:]
        plain.input.extend([x, ones])
        plain.output[0] = f"{mark}/normalized"
        rounder.nodes.append(plain)
        scaled = rounder.new("Mul", rounder.round(plain.output[0]), gamma)
    last = helper.make_node("Add" if beta else "Identity", [scaled, *beta], node.output[:1])
    rounder.write(last, group)
    return True


def _group_normalization(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Like a layer normalisation; gamma and beta are one number for each channel."""
    x, gamma, beta = node.input
    shape, rank = rounder.constants.get(gamma), len(rounder.at.shapes.get(x, ()))
    if shape is None or not rank:
        return False
    ones, zeros = (
        rounder.initializer(
            f"{rounder.mark}{value} {shape}", TensorProto.FLOAT, shape, [value] * shape[0]
        )
        for value in (1.0, 0.0)
    )
    across = rounder.integers([-1, *[1] * (rank - 2)])
    x = rounder.input(node, 0, x, group)
    plain = rounder.new("GroupNormalization", x, ones, zeros, **surgery.attributes(node))
    scaled = rounder.new("Mul", rounder.round(plain), rounder.new("Reshape", gamma, across))
    shift = rounder.new("Reshape", beta, across)
    rounder.write(helper.make_node("Add", [scaled, shift], node.output), group)
    return True


def _log_softmax(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Write OpenVINO's six kernels: the exponentials are summed as they were rounded."""
    version, given = surgery.opset(rounder.at.model), surgery.attributes(node)
    axes = [given.get("axis", -1)]
    if version < _SOFTMAX_ALONG:
        rank = len(rounder.at.shapes.get(node.input[0], ()))
        axes = list(range(given.get("axis", 1) % max(rank, 1), rank))
    if not (axes and rounder.sites.outputs and rounder.writes(group)):
        return False
    x = rounder.input(node, 0, node.input[0], group)
    below = rounder.new("Sub", x, _reduce(rounder, "ReduceMax", rounder.round(x), axes))
    total = _reduce(rounder, "ReduceSum", rounder.round(rounder.new("Exp", below)), axes)
    last = rounder.round(rounder.new("Log", total))
    result = helper.make_node("Sub", [rounder.round(below), last], node.output)
    rounder.write(result, group)
    return True


def _sum_of_squares(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Write the multiplication and the sum that OpenVINO's frontend makes of it: two kernels.

    The first squares what it computed itself as it is; without axes there is no second.
    """
    x, kernel = node.input[0], group.kernel
    squares = (k for k in rounder.at.kernels if k is not kernel and key(node) in k.nodes)
    within = any(x in k.nodes for k in squares)
    x = rounder.raw.get(x, x) if within else rounder.input(node, 0, x, group)
    square = rounder.new("Mul", x, x)
    node.op_type = "ReduceSum"
    apart = rounder.sites.outputs and (kernel is None or kernel.type == "Reduce")
    node.input[0] = rounder.round(square) if apart else square
    axes = surgery.attributes(node).get("axes")
    if axes is not None and surgery.opset(rounder.at.model) >= OPSET_OF_SUMS:
        node.input.append(rounder.integers(axes))
        surgery.set_attributes(node, axes=None)
    rounder.write(node, group)
    return True


def _columns(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Add up overlapping blocks in the type written, one element of all at once, as OpenVINO."""
    shape = rounder.at.shapes.get(node.input[0])
    block = rounder.at.values.get(node.input[2])
    if not (shape and block is not None and rounder.sites.outputs and rounder.writes(group)):
        return False
    count, rows = math.prod(block.tolist()), shape[-2]
    columns = rounder.input(node, 0, node.input[0], group)
    total = ""
    for element in range(count):
        chosen = [float(row % count == element) for row in range(rows)]
        mask = rounder.initializer(
            f"{rounder.mark}element {element} of {count} in {rows}",
            TensorProto.FLOAT,
            (rows, 1),
            chosen,
        )
        part = rounder.new(
            "Col2Im",
            rounder.new("Mul", columns, mask),
            *node.input[1:],
            **surgery.attributes(node),
        )
        if total:
            added = rounder.new("Add", total, part)
            part = f"{added}/{rounder.to.name}"
            rounder.nodes.extend(rounder.biased(added, part))
        total = part
    rounder.nodes.append(helper.make_node("Identity", [total], node.output))
    rounder.exact.add(node.output[0])
    return True


def _average(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Average 8-bit integers as they are, as OpenVINO does; what widens them comes behind that.

    Where it is a kernel of its own, it reads the average of the integers rounded.
    """
    kernel, grid = group.kernel, rounder.at.grid(node.input[0])
    if kernel is None or kernel.precision not in INTEGERS or kernel.nodes != (key(node),):
        return False
    if grid is None or grid.zero is None or grid.scale.size != 1:
        return False
    if not (rounder.at.reduced and rounder.sites.inputs and rounder.sites.outputs):
        return False
    scale, zero = rounder.scalar(grid.scale.item()), rounder.scalar(grid.zero.item())
    x, *others = node.input
    counted = rounder.new("Add", rounder.new("Div", x, scale), rounder.scalar(0.5))
    mean = rounder.new(
        node.op_type, rounder.new("Floor", counted), *others, **surgery.attributes(node)
    )
    steps = rounder.round(rounder.new("Add", mean, zero))
    real = rounder.new("Mul", rounder.new("Sub", steps, zero), scale)
    rounder.nodes.extend(rounder.rounding(real, node.output[0]))
    rounder.exact.add(node.output[0])
    return True


def _reduce(rounder: Rounder, op_type: str, tensor: str, axes: list[int]) -> str:
    since = OPSET_OF_SUMS if op_type == "ReduceSum" else _AXES_OPSET
    if surgery.opset(rounder.at.model) < since:
        return rounder.new(op_type, tensor, axes=axes)
    return rounder.new(op_type, tensor, rounder.integers(axes))


_STEPS = {
    "Col2Im": _columns,
    "GroupNormalization": _group_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _log_softmax,
    "ReduceSumSquare": _sum_of_squares,
}
