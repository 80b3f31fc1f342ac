"""What a quantiser did to a model, read from the QuantizeLinear and DequantizeLinear in it.

ONNX Runtime's tool leaves out a Relu or Clip whose result a QuantizeLinear limits anyway, and lets
what is before it write under the name of the result. In that file the name is of a value without
the limit; the value that it names in the model is the one behind the rounding.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.ports import Array, Arrays

_REMOVED = ("Clip", "Relu")
# How near to the points of a grid values lie that are on it, in steps, and how many say so.
_NEAR, _CHANCE = 1e-3, 16
# What ONNX Runtime's tool appends to the names of tensors.
_SUFFIXES = ("_DequantizeLinear_Output", "_QuantizeLinear_Input")


def original_names(quantised: onnx.GraphProto, before: onnx.GraphProto) -> dict[str, str]:
    """Tensors around removed activations → what their values are called in the model before."""
    makers = {name: node for node in before.node for name in node.output}
    rounding = {n.input[0]: n.output[0] for n in quantised.node if n.op_type == "QuantizeLinear"}
    widening = {n.input[0]: n.output[0] for n in quantised.node if n.op_type == "DequantizeLinear"}
    finals = {value.name for value in quantised.output}
    names: dict[str, str] = {}
    for node in quantised.node:
        for name in node.output:
            maker = makers.get(name)
            rounded = widening.get(rounding.get(name, ""))
            if maker is None or rounded is None or {name, rounded} & finals:
                continue
            if maker.op_type in _REMOVED and maker.op_type != node.op_type:
                names |= {name: maker.input[0], rounded: name}
    return names


def grids(quantised: onnx.GraphProto, before: onnx.GraphProto | None = None) -> Arrays:
    """The values that each activation is rounded to, by its name in the model before.

    Args:
        quantised: the graph.
        before: the model before; what it rounds itself no quantiser chose.

    Returns:
        ``[3]`` for each QuantizeLinear with one scale: the smallest and the largest value, and how
        many there are.
    """
    stored = {t.name: t for t in quantised.initializer if math.prod(t.dims) == 1}
    nodes = before.node if before is not None else ()
    own = {n.input[0] for n in nodes if n.op_type == "QuantizeLinear"}
    found: Arrays = {}
    for node in quantised.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in own:
            continue
        if not all(n in stored for n in node.input[1:]):
            continue
        values = [numpy_helper.to_array(stored[name]) for name in node.input[1:]]
        scale, zero = values if len(values) > 1 else (*values, np.zeros((), np.uint8))
        if zero.dtype in (np.uint8, np.int8, np.uint16, np.int16):
            limits = np.iinfo(zero.dtype)
            ends = [(float(e) - zero.item()) * scale.item() for e in (limits.min, limits.max)]
            found[plain(node.input[0])] = np.array([*ends, 2.0 ** (8 * zero.dtype.itemsize)])
    return found


def awaited(graph: onnx.GraphProto) -> Arrays:
    """The grids, as ``grids`` gives them, of tensors that nothing reads but a QuantizeLinear."""
    others = {n for node in graph.node if node.op_type != "QuantizeLinear" for n in node.input}
    others.update(value.name for value in graph.output)
    return {name: grid for name, grid in grids(graph).items() if name not in others}


def lies_on(values: Array, grid: Array) -> bool:
    """Whether values are on a grid; a few could be by chance."""
    low, high, levels = grid
    step = (high - low) / (levels - 1)
    if values.dtype.kind != "f" or values.size < _CHANCE or not step > 0:
        return False
    steps = values / step
    off = max(_NEAR, levels * float(np.finfo(np.float32).eps))  # in float32
    near = np.abs(steps - np.rint(steps)).max() <= off and np.unique(values).size > 1
    return bool(near and values.min() >= low - step / 2 and values.max() <= high + step / 2)


def plain(name: str) -> str:
    """A tensor's name without what the tool appended."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
