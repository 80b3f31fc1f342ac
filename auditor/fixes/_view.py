"""What a rewrite may know of the model around a node, and what it may add to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from auditor.graphs import surgery
from auditor.ports import Array

MARK = "/fixed"  # in the names of tensors that rewrites add


class View:
    """A model whose nodes are being replaced.

    Attributes:
        opset: of the default domain.
        initializers: those added so far.
    """

    def __init__(self, model: onnx.ModelProto, values: Mapping[str, Array]) -> None:
        """Look at ``model``; ``values`` are tensors of one run of it, by name."""
        self.opset = surgery.opset(model)
        self.initializers: list[onnx.TensorProto] = []
        self._constants = surgery.constants(model)
        self._types = surgery.types(model)
        self._shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
        self._values = values
        self._added = 0

    def constant(self, name: str) -> Array | None:
        """The value of a constant; None where it is computed."""
        return self._constants.get(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a tensor has in this model at the audited inputs; None where unknown."""
        if name in self._shapes:
            return self._shapes[name]
        value = self._values.get(name)
        return None if value is None else tuple(value.shape)

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """The type of a tensor; None where unknown."""
        if name in self._values:
            return self._values[name].dtype
        kind = self._types.get(name)
        return helper.tensor_dtype_to_np_dtype(kind) if kind else None

    def fresh(self, name: str) -> str:
        """A tensor name that the model does not have."""
        self._added += 1
        return f"{name}{MARK}{self._added}"

    def add(self, name: str, value: Array) -> str:
        """A constant; returns the tensor's name."""
        made = self.fresh(name)
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), made))
        return made
