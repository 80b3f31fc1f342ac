"""The 256 values of equal distance that a backend rounded a tensor to, read off its outputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.noises._equations import before
from auditor.ports import Array, Arrays
from auditor.replays import sessions

_SOME = 4096
_MANY = 100  # elements that say what grid they lie on
# Steps that a product with a scale, rounded, may be off, and what is computed back from others.
_OFF, _BACK = 1e-3, 3e-2
# Of what is computed back, elements that move the output by this part of what the others do.
_SURE = 0.02
# Steps that no tensor reaches.
_FAR = 1e6
# Tensors inside a segment that are looked at.
_TRIED = 24


def grid(values: Array, plain: Array, off: float = _OFF) -> str | None:
    """The function that rounds to the at most 256 values of equal distance that a tensor holds.

    Args:
        values: float32 of any shape.
        plain: what they are where nothing was rounded.
        off: how many steps a value may be off.

    Returns:
        An ONNX function body; None where it holds others, or so few that any grid would do, and
        where no two plain values became one, as a rounding makes them.
    """
    if values.dtype != np.float32 or values.size < _MANY or not np.isfinite(values).all():
        return None
    if _levels(values.reshape(-1)[:_SOME], off) is None:  # most tensors tell at once
        return None
    levels = _levels(values, off)
    if levels is None or levels.size < 3 or np.unique(plain).size <= levels.size:
        return None
    distances = np.diff(levels)
    numbers = np.append(0, np.cumsum(np.rint(distances / distances.min())))
    step, first = np.polyfit(numbers, levels, 1)
    numbers = numbers + np.rint(first / step)  # zero is one of the values
    step = float(levels @ numbers / (numbers @ numbers))
    if np.ptp(numbers) > 255 or abs(levels / step - numbers).max() > off:
        return None
    # It ends where values were cut off; others may be where nothing is known.
    low = float(numbers[0]) if plain.min() < (numbers[0] - 1) * step else -_FAR
    high = float(numbers[-1]) if plain.max() > (numbers[-1] + 1) * step else _FAR
    return f"""(x) => (y) {{
        s = Constant <value = float {{{step!r}}}> () q = Div(x, s) r = Round(q)
        l = Constant <value = float {{{low!r}}}> () u = Max(r, l)
        h = Constant <value = float {{{high!r}}}> () v = Min(u, h) y = Mul(v, s) }}"""


def _levels(values: Array, off: float) -> Array | None:
    """The at most 256 values, float64 and ascending, that all others are near; None if more."""
    ascending = np.sort(values, axis=None).astype(np.float64)
    near = 2 * off * (ascending[-1] - ascending[0]) / 255
    starts = np.append(0, np.flatnonzero(np.diff(ascending) > near) + 1)
    ends = np.append(starts[1:], ascending.size) - 1
    if starts.size > 256 or (ascending[ends] - ascending[starts]).max() > near:
        return None
    return np.asarray(np.add.reduceat(ascending, starts) / (ends - starts + 1))


def inside(
    model: onnx.ModelProto, inputs: Arrays, observed: Arrays
) -> Iterator[tuple[onnx.ModelProto, dict[str, str]]]:
    """Tensors in front of the outputs that must have been on such a grid for these to be observed.

    Args:
        model: the segment.
        inputs: in_b, the segment's inputs.
        observed: out_b, its outputs.

    Yields:
        The segment, its inputs passed on by nodes, and the rounding function by the tensor.
    """
    passed = _passed_on(model, inputs)
    values = sessions.inside(passed, 1, inputs)
    tried = 0
    for index, node in enumerate(passed.graph.node):
        plain = values.get(node.output[0])
        if plain is None or node.output[0] in observed or plain.dtype != np.float32:
            continue
        if plain.size < _MANY:
            continue
        known = before(passed, index, values, observed, narrow=False)
        if known is None:
            continue
        tried += 1
        result, sure = known
        some = sure > _SURE * sure.max(initial=0)
        if (body := grid(result[some].astype(np.float32), plain[some], _BACK)) is not None:
            yield passed, {node.output[0]: body}
        if tried == _TRIED:
            return


def _passed_on(model: onnx.ModelProto, inputs: Arrays) -> onnx.ModelProto:
    """A copy in which each input is read by one node only."""
    result = surgery.copied(model)
    names = {name: f"{name}~" for name, value in inputs.items() if value.dtype == np.float32}
    for node in result.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    for name, target in names.items():
        result.graph.node.insert(0, onnx.helper.make_node("Identity", [name], [target]))
    return result
