"""Operators that TVM writes out in float16, each step of which rounds, running sums included.

What TVM computes in float32 in spite of the type is not rounded: the statistics of a layer
normalisation, and what a batch normalisation divides. Sources: ``tvm/topi/nn`` and
``tvm/relax/frontend/onnx/onnx_frontend.py``.
"""

from __future__ import annotations

import math

import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.replays.kernel_layout import Group
from auditor.replays.rounder import Rounder
from auditor.replays.writer import OPSET_OF_SUMS

# ReduceMax and ReduceMean take their axes as an input from here on.
_AXES_OPSET = 18


def written(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Write a node in its steps, if it has several; returns whether it has."""
    write = _STEPS.get(node.op_type)
    if write is None or rounder.at.halves.intersection(node.input):
        return False  # in float16 already: ONNX Runtime rounds as it likes
    return surgery.opset(rounder.at.model) >= OPSET_OF_SUMS and write(rounder, node, group)


def _tanh(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """(1 − e⁻²ᵃ) / (1 + e⁻²ᵃ) of the absolute value, which is the same for either sign."""
    x = rounder.input(node, 0, node.input[0], group)
    one, twice = rounder.scalar(1.0), rounder.new("Mul", rounder.new("Abs", x), rounder.scalar(-2))
    power = _step(rounder, "Exp", rounder.round(twice))
    top, low = (_step(rounder, kind, one, power) for kind in ("Sub", "Add"))
    size = _step(rounder, "Div", top, low)
    return _last(rounder, "Mul", [size, rounder.new("Sign", x)], node, group)


def _sigmoid(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """1 / (1 + e⁻ˣ)."""
    x = rounder.input(node, 0, node.input[0], group)
    one = rounder.scalar(1.0)
    power = _step(rounder, "Exp", rounder.new("Neg", x))
    return _last(rounder, "Div", [one, _step(rounder, "Add", one, power)], node, group)


def _hard_sigmoid(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """α·x + β, kept between 0 and 1."""
    options = surgery.attributes(node)
    alpha, beta = (
        rounder.round(rounder.scalar(options.get(name, default)))
        for name, default in (("alpha", 0.2), ("beta", 0.5))
    )
    x = rounder.input(node, 0, node.input[0], group)
    line = _step(rounder, "Add", _step(rounder, "Mul", x, alpha), beta)
    ends = [rounder.scalar(0.0), rounder.scalar(1.0)]
    return _last(rounder, "Clip", [line, *ends], node, group)


def _hard_swish(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Multiply by x + 3, kept between 0 and 6, over 6."""
    x = rounder.input(node, 0, node.input[0], group)
    three, zero, six = map(rounder.scalar, (3.0, 0.0, 6.0))
    kept = rounder.new("Clip", _step(rounder, "Add", x, three), zero, six)
    return _last(rounder, "Mul", [x, _step(rounder, "Div", kept, six)], node, group)


def _softplus(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """max(x, 0) + log(1 + e⁻ᵃ) of the absolute value a."""
    x = rounder.input(node, 0, node.input[0], group)
    power = _step(rounder, "Exp", rounder.new("Neg", rounder.new("Abs", x)))
    bend = _step(rounder, "Log", _step(rounder, "Add", rounder.scalar(1.0), power))
    return _last(rounder, "Add", [rounder.new("Relu", x), bend], node, group)


def _softmax(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Powers of what is left of the largest value, over their sum."""
    return _along_axis(rounder, node, group, logarithm=False)


def _log_softmax(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """What is left of the largest value, less the logarithm of the powers' sum."""
    return _along_axis(rounder, node, group, logarithm=True)


def _along_axis(rounder: Rounder, node: onnx.NodeProto, group: Group, *, logarithm: bool) -> bool:
    shape = rounder.at.shapes.get(node.input[0], ())
    if not shape or not all(shape):
        return False
    axis = surgery.attributes(node).get("axis", -1) % len(shape)
    order = [i for i in range(len(shape)) if i != axis] + [axis]
    moved, back = [shape[i] for i in order], [order.index(i) for i in range(len(shape))]
    rows, count = math.prod(moved[:-1]), moved[-1]
    x = rounder.new("Transpose", rounder.input(node, 0, node.input[0], group), perm=order)
    x = rounder.new("Reshape", x, rounder.integers([rows, 1, count]))
    below = _step(rounder, "Sub", x, _reduce(rounder, "ReduceMax", x))
    power = _step(rounder, "Exp", below)
    total = _sum_in_order(rounder, power, rows, count)
    if logarithm:
        result = _step(rounder, "Sub", below, _step(rounder, "Log", total))
    else:
        result = _step(rounder, "Div", power, total)
    result = rounder.new("Reshape", result, rounder.integers(moved))
    return _last(rounder, "Transpose", [result], node, group, perm=back)


def _batch_normalization(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Subtract the mean; epsilon is a float32 to TVM, and makes one of all that follows."""
    options, rank = surgery.attributes(node), len(rounder.at.shapes.get(node.input[0], ()))
    if rank < 2 or options.get("training_mode"):
        return False
    across = rounder.integers([-1, *[1] * (rank - 2)])
    x, *rest = (rounder.input(node, i, name, group) for i, name in enumerate(node.input))
    scale, shift, mean, variance = (rounder.new("Reshape", rounder.round(n), across) for n in rest)
    epsilon = rounder.scalar(options.get("epsilon", 1e-5))
    width = rounder.new("Sqrt", rounder.new("Add", variance, epsilon))
    normal = rounder.new("Div", _step(rounder, "Sub", x, mean), width)
    scaled = rounder.new("Mul", normal, scale)
    rounder.nodes.append(helper.make_node("Add", [scaled, shift], node.output))
    return True


def _instance_normalization(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Add up mean and variance one value after another, and round every result."""
    shape = rounder.at.shapes.get(node.input[0], ())
    if len(shape) < 3:
        return False
    x, scale, bias = (rounder.input(node, i, name, group) for i, name in enumerate(node.input))
    rows, count = shape[0] * shape[1], math.prod(shape[2:])
    flat = rounder.new("Reshape", x, rounder.integers([rows, 1, count]))
    centred = _step(rounder, "Sub", flat, _mean_in_order(rounder, flat, rows, count))
    square = _step(rounder, "Mul", centred, centred)
    variance = _mean_in_order(rounder, square, rows, count)
    epsilon = rounder.round(rounder.scalar(surgery.attributes(node).get("epsilon", 1e-5)))
    width = _step(rounder, "Sqrt", _step(rounder, "Add", variance, epsilon))
    normal = _step(rounder, "Div", centred, width)
    normal = rounder.new("Reshape", normal, rounder.integers(shape))
    across = rounder.integers([-1, *[1] * (len(shape) - 2)])
    scaled = _step(rounder, "Mul", normal, rounder.new("Reshape", scale, across))
    shift = rounder.new("Reshape", bias, across)
    return _last(rounder, "Add", [scaled, shift], node, group)


def _layer_normalization(rounder: Rounder, node: onnx.NodeProto, group: Group) -> bool:
    """Normalise in float32, and round before and after the scale."""
    x, gamma, *beta = (rounder.input(node, i, name, group) for i, name in enumerate(node.input))
    shape = rounder.constants.get(node.input[1])
    if shape is None or len([o for o in node.output if o]) > 1:
        return False
    ones = rounder.initializer(
        f"{rounder.mark}ones {shape}", TensorProto.FLOAT, shape, [1.0] * math.prod(shape)
    )
    normal = _step(rounder, "LayerNormalization", x, ones, **surgery.attributes(node))
    scaled = _step(rounder, "Mul", normal, gamma)
    return _last(rounder, "Add" if beta else "Identity", [scaled, *beta], node, group)


def _step(rounder: Rounder, op_type: str, *inputs: str, **attributes: object) -> str:
    """The rounded result of one more operator."""
    return rounder.round(rounder.new(op_type, *inputs, **attributes))


def _last(
    rounder: Rounder,
    op_type: str,
    inputs: list[str],
    node: onnx.NodeProto,
    group: Group,
    **attributes: object,
) -> bool:
    """Write the operator that ends the steps of ``node``."""
    last = helper.make_node(op_type, inputs, node.output)
    surgery.set_attributes(last, **attributes)
    rounder.write(last, group)
    return True


def _mean_in_order(rounder: Rounder, matrix: str, rows: int, count: int) -> str:
    """Means of the last axis of [rows, 1, count], every running sum rounded; [rows, 1, 1]."""
    total = _sum_in_order(rounder, matrix, rows, count)
    return _step(rounder, "Div", total, rounder.scalar(float(count)))


def _sum_in_order(rounder: Rounder, matrix: str, rows: int, count: int) -> str:
    """Sums over the last axis of [rows, 1, count], every running sum rounded; [rows, 1, 1]."""
    ones = rounder.initializer(
        f"{rounder.mark}{count} ones", TensorProto.FLOAT, (1, count, 1), [1.0] * count
    )
    largest = _reduce(rounder, "ReduceMax", matrix)
    like = rounder.new("Reshape", largest, rounder.integers([rows, 1, 1]))
    return rounder.in_order(matrix, ones, like, rank=3)


def _reduce(rounder: Rounder, op_type: str, matrix: str) -> str:
    if surgery.opset(rounder.at.model) < _AXES_OPSET:
        return rounder.new(op_type, matrix, axes=[2])
    return rounder.new(op_type, matrix, rounder.integers([2]))


_STEPS = {
    "BatchNormalization": _batch_normalization,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _log_softmax,
    "Sigmoid": _sigmoid,
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Tanh": _tanh,
}
