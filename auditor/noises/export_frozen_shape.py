"""An export that holds one shape fast where its inputs are declared open.

It shows at no single shape, so it is not replayed on segments: ``auditor.training.second_shape``
runs the module and the file at another size of every open dimension, and then the file with the
constants changed that hold the traced size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import Array

FORM = "constants that hold the traced size hold the other one"
# Constants that say sizes have few elements; ranges and masks have as many as the size says.
_FEW = 16


@dataclass(frozen=True, slots=True)
class Frozen:
    """A constant of the main graph that may hold a traced size, and what it would be else."""

    name: str
    value: Array


def frozen(model: onnx.ModelProto, axis: int, old: int, new: int) -> Iterator[Frozen]:
    """Constants that would be others, had the model been traced at another size.

    Args:
        model: the model; constants that lie in files are left alone.
        axis: the axis of the input whose size it is.
        old: the size that was traced, ``new`` another.
        new: the other size.
    """
    for name, value in surgery.constants(model).items():
        if value.dtype.kind not in "iu" or value.ndim > 1:
            continue
        flat = value.reshape(-1)
        if old > 1 and flat.size == old and np.array_equal(flat, np.arange(old)):
            yield Frozen(name, np.arange(new, dtype=value.dtype))
        elif 0 < flat.size <= _FEW:
            at = flat == old
            if old == 1:  # ones are everywhere: only the one at the size's own place
                at &= (np.arange(flat.size) == axis) & (flat.size > 1)
            if at.any():
                yield Frozen(name, np.where(at, new, flat).astype(value.dtype).reshape(value.shape))


def thawed(model: onnx.ModelProto, changed: Iterable[Frozen]) -> onnx.ModelProto:
    """The model with other constants; shapes that were inferred before are forgotten."""
    values = {one.name: one.value for one in changed}
    result = surgery.copied(model)
    del result.graph.value_info[:]
    for tensor in result.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    for node in result.graph.node:
        if node.op_type == "Constant" and node.output[0] in values:
            del node.attribute[:]
            surgery.set_attributes(node, value=numpy_helper.from_array(values[node.output[0]]))
    return result


NOISE = Cause(
    id="export.frozen_shape",
    type="traced shape",
    title="The file computes what the module does at the traced shape only",
    cause=(
        "Tracing records what happened at one shape: sizes that went through Python numbers become "
        "constants, and a branch or loop that depends on a size is taken as it was taken then, "
        "though the file declares that dimension open."
    ),
    applies="models with open dimensions, where --source names the module: each at another size",
    source=(
        'PyTorch, torch.onnx.export: argument dynamic_axes or dynamic_shapes, and "Limitations" '
        "(tracing versus scripting)"
    ),
    advice=(
        "take sizes from tensors without int() and .item(), give every example dimension a size of "
        "its own, and export with dynamo=True and dynamic_shapes, which checks what it assumes; or "
        "declare the dimension fixed"
    ),
    forms=(FORM,),
    simulated=False,
)
