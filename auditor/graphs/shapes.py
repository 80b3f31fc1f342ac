"""The shapes that a model is run at: declared, given, recorded, or chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping

from auditor.errors import UsageError, suggestion
from auditor.graphs.model import Model, Shape, TensorSpec, shown

_BATCH, _CHANNELS, _IMAGE_SIDE, _SEQUENCE = 1, 3, 224, 16
_SEQUENCE_NAME = re.compile(r"seq|len|token|time|frame|past|step", re.IGNORECASE)
BATCH_NAME = re.compile(r"batch|^n$|^b$", re.IGNORECASE)
_SIDE_NAME = re.compile(r"height|width|^h$|^w$", re.IGNORECASE)


def resolve_shapes(
    model: Model, given: Mapping[str, Shape], recorded: Mapping[str, Shape]
) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """Fix every dimension of every input.

    A dimension is what the model declares, else what ``given`` says, else what ``recorded``
    has, else a default; defaults give a symbol one value in the whole model.

    Args:
        model: the model whose inputs are to be fed.
        given: shapes from the user, by input.
        recorded: shapes of one recorded sample, by input.

    Returns:
        The shape of every input, and a sentence per default chosen or oddity met.

    Raises:
        UsageError: an unknown input, or a shape that contradicts the model or the recorded one.
    """
    names = [spec.name for spec in model.inputs]
    for name in given:
        if name not in names:
            raise UsageError(
                f"--shape names `{name}`, which is not an input of the model",
                suggestion(name, names) + _inputs_hint(model),
            )
    symbols: dict[str, int] = {}
    known: dict[str, Shape] = {}
    notes: list[str] = []
    for origin, shapes in (("--shape", given), ("the data", recorded)):
        for spec in model.inputs:
            if spec.name in shapes:
                shape = tuple(shapes[spec.name])
                _bind(spec, shape, symbols, origin, notes)
                if known.setdefault(spec.name, shape) != shape:
                    raise UsageError(
                        f"input `{spec.name}` is {shown(known[spec.name])} in --shape but "
                        f"{shown(shape)} in the data",
                        "Drop --shape: recorded data already fix the shape.",
                    )
    resolved = {
        spec.name: known.get(spec.name) or _default_shape(spec, symbols, notes)
        for spec in model.inputs
    }
    return resolved, tuple(notes)


def _bind(
    spec: TensorSpec, shape: Shape, symbols: dict[str, int], origin: str, notes: list[str]
) -> None:
    """Check a shape against the declaration and note what it makes each symbol."""
    declared = spec.shape
    if len(shape) != len(declared):
        raise UsageError(
            f"{origin} gives {shown(shape)} for input {spec}: {len(declared)} dimensions needed",
            "Write one number per dimension, such as 1x3x224x224.",
        )
    for axis, (wanted, got) in enumerate(zip(declared, shape, strict=True)):
        if isinstance(wanted, int) and wanted != got:
            raise UsageError(
                f"{origin} gives {shown(shape)} for input {spec}: dimension {axis} is fixed at "
                f"{wanted}",
                _turned(shape, declared)
                or "Only dimensions that the model leaves open (symbolic) can be chosen.",
            )
        if isinstance(wanted, str) and symbols.setdefault(wanted, got) != got:
            # Engines do not mind, and some exporters give unrelated dimensions one name.
            notes.append(
                f"input `{spec.name}`: dimension `{wanted}` is {got} here and "
                f"{symbols[wanted]} elsewhere, though one name should mean one size"
            )


def _turned(shape: Shape, declared: tuple[int | str | None, ...]) -> str:
    """The hint for a shape that fits once its channels go to the other end; empty for others."""
    if len(shape) < 3:
        return ""
    axes = tuple(range(len(shape)))
    for order in ((0, axes[-1], *axes[1:-1]), (0, *axes[2:], 1)):
        wants = zip(order, declared, strict=True)
        if all(shape[axis] == wanted for axis, wanted in wants if isinstance(wanted, int)):
            return f"The channels are at the other end: it fits with its axes as {order}."
    return ""


def _default_shape(spec: TensorSpec, symbols: dict[str, int], notes: list[str]) -> Shape:
    shape: list[int] = []
    for axis, declared in enumerate(spec.shape):
        if isinstance(declared, int):
            shape.append(declared)
        elif declared in symbols:
            shape.append(symbols[declared])
        else:
            shape.append(_sum_of(declared, symbols) or _default(spec, axis))
            if declared:
                symbols[declared] = shape[-1]
            name = f"`{declared}`" if declared else f"{axis} (unnamed)"
            notes.append(f"input `{spec.name}`: dimension {name} set to {shape[-1]}")
    return tuple(shape)


def _sum_of(expression: str | None, symbols: Mapping[str, int]) -> int | None:
    """Value of ``past + 1`` and the like, which exporters write, once the terms are known."""
    terms = [term.strip() for term in (expression or "").split("+")]
    if not all(term.isdecimal() or term in symbols for term in terms):
        return None
    return sum(int(t) if t.isdecimal() else symbols[t] for t in terms)


def _default(spec: TensorSpec, axis: int) -> int:
    shape = spec.shape
    name = str(shape[axis] or "")
    for pattern, value in (
        (BATCH_NAME, _BATCH),
        (_SIDE_NAME, _IMAGE_SIDE),
        (_SEQUENCE_NAME, _SEQUENCE),
    ):
        if pattern.search(name):
            return value
    if axis == 0 and len(shape) > 1:
        return _BATCH
    if len(shape) == 4:
        channels_last = shape[3] in (1, 3, 4) and not isinstance(shape[1], int)
        return _CHANNELS if axis == (3 if channels_last else 1) else _IMAGE_SIDE
    return _SEQUENCE


def _inputs_hint(model: Model) -> str:
    return "The inputs are " + ", ".join(str(spec) for spec in model.inputs) + "."
