"""Copies what a virtual machine's kernels write, while it runs them in the order that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from auditor.ports import Array, Arrays


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel as the virtual machine's instrument reports it.

    Attributes:
        symbol: the function's name.
        written: which of its arguments are its results; none when it returns them.
        tensors: the ONNX tensor that each result is, or None.
    """

    symbol: str
    written: tuple[int, ...]
    tensors: tuple[str | None, ...]


class Observer:
    """An instrument that keeps the results which have ONNX names."""

    def __init__(self, steps: Sequence[Step]) -> None:
        """``steps``: all that will report, in order."""
        self._steps = steps
        self._position = 0
        self._tensors: Arrays = {}

    def names(self) -> tuple[str, ...]:
        """The ONNX tensors that can be observed."""
        named = (tensor for step in self._steps for tensor in step.tensors)
        return tuple(dict.fromkeys(tensor for tensor in named if tensor is not None))

    def start(self) -> Arrays:
        """Forget the last run; what the next one writes goes into the dictionary returned."""
        self._position, self._tensors = 0, {}
        return self._tensors

    def missing(self) -> int | None:
        """The first step that did not report in the run; None when all did."""
        return self._position if self._position < len(self._steps) else None

    def observe(self, function: Any, symbol: str, before: bool, result: Any, *args: Any) -> int:
        """Copy a kernel's results as soon as it has run: its storage is used again.

        Source: ``relax.VirtualMachine.set_instrument`` of apache/tvm.
        """
        steps = self._steps
        if before or self._position == len(steps) or symbol != steps[self._position].symbol:
            return 0
        step = steps[self._position]
        self._position += 1
        results = [args[i] for i in step.written]
        if not results:
            results = [result] if len(step.tensors) == 1 else list(result)
        for tensor, value in zip(step.tensors, results, strict=True):
            if tensor is not None:
                self._tensors[tensor] = as_array(value)
        return 0


def as_array(value: Any) -> Array:
    """A copy of a TVM value; bfloat16 widened to float32."""
    import tvm

    if not isinstance(value, tvm.runtime.Tensor):
        return np.array(list(value), dtype=np.int64)  # a shape
    array: Array = value.numpy()
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
