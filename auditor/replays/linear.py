"""Chains of sums and products with constants, joined into one factor and one shift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from auditor.ports import Array
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

_OPERATORS = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True, slots=True)
class _Line:
    """What a chain makes of a tensor: ``factor`` · base + ``shift``, in the constants' type."""

    base: str
    factor: Array
    shift: Array
    steps: int

    def after(self, other: _Line) -> _Line:
        """This step behind another chain."""
        with np.errstate(all="ignore"):
            factor = self.factor * other.factor
            shift = self.factor * other.shift
            # What a factor of 0 or infinity makes of no shift at all is no shift.
            shift = np.where(other.shift == 0, other.shift, shift) + self.shift
        return _Line(other.base, factor, shift, self.steps + other.steps)


def collapsed(layout: Layout, kind: type[np.generic]) -> onnx.ModelProto | None:
    """The segment with every chain of constants as one product and one sum; None without any.

    Args:
        layout: of the segment.
        kind: element type of the chains: float32, or an integer, whose chains hold no Div. Each
            joined constant is computed in it, as an optimiser does that folds constants.
    """
    editor, lines = Editor(layout.model), dict[str, _Line]()
    for node in layout.nodes:
        step = _step(layout, node, np.dtype(kind))
        if step is None:
            editor.copy(node)
            continue
        before = lines.get(step.base)
        if before is not None and layout.reader(step.base) is not None:
            step = step.after(before)
        lines[node.output[0]] = step
        if step.steps == 1:
            editor.copy(node)
            continue
        moved, plain = np.any(step.shift != 0), bool(np.all(step.factor == 1))
        value, end = step.base, str(node.output[0])
        if not plain:
            factor = editor.constant(step.factor, kind)
            value = editor.add("Mul", value, factor, to="" if moved else end)
        if moved:
            editor.add("Add", value, editor.constant(step.shift, kind), to=end)
        elif plain:
            editor.add("Identity", value, to=end)
    return editor.changed


def _step(layout: Layout, node: onnx.NodeProto, kind: np.dtype[np.generic]) -> _Line | None:
    """What one operator makes of its one tensor that is not constant."""
    if node.op_type not in _OPERATORS:
        return None
    one, none = np.ones((), kind), np.zeros((), kind)
    values = [layout.constant(name) for name in node.input]
    known = [i for i, v in enumerate(values) if v is not None]
    value = values[known[0]] if len(known) == 1 else None
    if value is None or value.dtype != kind:
        return None
    position = known[0]
    base = str(node.input[1 - position])
    if node.op_type in ("Add", "Sub"):
        first = node.op_type == "Add" or position == 0
        factor = -one if node.op_type == "Sub" and position == 0 else one
        return _Line(base, factor, value if first else -value, 1)
    if node.op_type == "Mul":
        return _Line(base, value, none, 1)
    if position == 0 or kind.kind != "f":
        return None
    with np.errstate(all="ignore"):
        return _Line(base, one / value, none, 1)
