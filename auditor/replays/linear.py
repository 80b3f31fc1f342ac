"""Sums and products with constants, and chains of them joined into one factor and one shift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from auditor.ports import Array
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

_OPERATORS = ("Add", "Sub", "Mul", "Div")


@dataclass(frozen=True, slots=True)
class Line:
    """What operators make of a tensor: ``factor`` · base + ``shift``, in the constants' type."""

    base: str
    factor: Array
    shift: Array
    steps: int = 1

    @property
    def scales(self) -> bool:
        """Whether it only multiplies."""
        return not np.any(self.shift != 0)

    @property
    def moves(self) -> bool:
        """Whether it only adds."""
        return bool(np.all(self.factor == 1))

    def after(self, other: Line) -> Line:
        """This step behind another chain."""
        with np.errstate(all="ignore"):
            factor = self.factor * other.factor
            shift = self.factor * other.shift
            # What a factor of 0 or infinity makes of no shift at all is no shift.
            shift = np.where(other.shift == 0, other.shift, shift) + self.shift
        return Line(other.base, factor, shift, self.steps + other.steps)


def collapsed(
    layout: Layout, kind: type[np.generic], *, mixed: bool = True
) -> onnx.ModelProto | None:
    """The segment with every chain of constants as one product and one sum; None without any.

    What is subtracted is added with the other sign, and what divides multiplies as its inverse.

    Args:
        layout: of the segment.
        kind: element type of the chains: float32, or an integer, whose chains hold no Div. Each
            joined constant is computed in it, as an optimiser does that folds constants.
        mixed: whether a chain may hold sums and products.
    """
    editor, lines = Editor(layout.model), dict[str, Line]()
    for node in layout.nodes:
        step = line(layout, node, kind)
        if step is None:
            editor.copy(node)
            continue
        before = lines.get(step.base)
        if before is not None and layout.reader(step.base) is not None:
            both = (before, step)
            if mixed or all(s.scales for s in both) or all(s.moves for s in both):
                step = step.after(before)
        lines[node.output[0]] = step
        if step.steps == 1:
            editor.copy(node)
            continue
        value, end = step.base, str(node.output[0])
        if not step.moves:
            factor = editor.constant(step.factor, kind)
            value = editor.add("Mul", value, factor, to=end if step.scales else "")
        if not step.scales:
            editor.add("Add", value, editor.constant(step.shift, kind), to=end)
        elif step.moves:
            editor.add("Identity", value, to=end)
    return editor.changed


def line(layout: Layout, node: onnx.NodeProto, kind: type[np.generic] = np.float32) -> Line | None:
    """What one operator and its constant, of this type, make of its other operand."""
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
        return Line(base, factor, value if first else -value)
    if node.op_type == "Mul":
        return Line(base, value, none)
    if position == 0 or value.dtype.kind != "f":
        return None
    with np.errstate(all="ignore"):
        return Line(base, one / value, none)
