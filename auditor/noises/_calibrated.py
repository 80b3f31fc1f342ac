"""Reads the steps of an 8-bit quantisation off what a backend computed.

Calibration clips values before it rounds them, and where it clips follows from data or rules that
the auditor does not know. But a sum of products is linear in its weights: with the operand that
the backend had and the result that it gave, each step is one unknown in many equations. It is
searched for on half of them and must hold on the other half; whether it is the cause is then
decided by a replay of the whole segment, as for every hypothesis.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from auditor.graphs import surgery
from auditor.noises._equations import (
    NOTHING,
    ROWS,
    Equations,
    Grid,
    equations_of,
    grouped,
    squares,
    ungrouped,
)
from auditor.noises._grids import Steps, grid_of
from auditor.ports import Array, Arrays
from auditor.replays import sessions

# What the part not fitted must explain to be worth a replay, and from where on nothing is left.
_WORTH, _ENOUGH = 0.2, 0.99
# Errors and what a rough search changes, as vectors, have at least this cosine where it is near:
# what explains a share of them has its square root, and steps beside the right one half of that.
_RELATED = 0.15
# What rounding an operand leaves, of what cutting it off at the same ends leaves.
_ROUNDS = 0.5
# An operand is sought with that many channels of the product, where there are ``ROWS`` of each.
_CHANNELS = 32

# Where calibration by percentiles cuts weights off (NVIDIA's pytorch-quantization documents them).
_PERCENTILES = (99.9, 99.99, 99.999)

_WEIGHTS = ("weights per channel, fitted", "weights per tensor, fitted")
_INPUTS = "inputs fitted"
FORMS = (*_WEIGHTS, *(f"{weights}, {_INPUTS}" for weights in _WEIGHTS), _INPUTS)


@dataclass(frozen=True, slots=True)
class Fit:
    """What one product was found to compute with.

    Attributes:
        index: position of its node in the segment.
        name: what was fitted, in words.
        weights: float32, as the node has them.
        operand: the grid of its first operand; None leaves that alone.
    """

    index: int
    name: str
    weights: Array
    operand: Grid | None


def fits(
    model: onnx.ModelProto,
    weighted: Mapping[int, Array],
    inputs: Arrays,
    observed: Arrays,
    *,
    narrow: onnx.ModelProto | None = None,
) -> Iterator[Fit]:
    """Grids with which one product explains what a backend computed.

    Args:
        model: the segment.
        weighted: constant float32 weights by the position of their node.
        inputs: in_b, the segment's inputs.
        observed: out_b, its outputs.
        narrow: the segment in bfloat16, where the backend says that it multiplies in that.
    """
    values = sessions.inside(model, 1, inputs)
    reads: dict[str, str] = {}
    factors: dict[str, str] = {}
    rounded: Arrays = {}
    if narrow is not None:
        reads = _unrounded(narrow, values)
        factors = _factors(narrow, {model.graph.node[index].input[1] for index in weighted})
        rounded = sessions.inside(narrow, 1, inputs, {*reads.values(), *factors.values()})
    for index, weights in weighted.items():
        node = model.graph.node[index]
        w = grouped(node, weights)
        if w is None:
            continue
        read, at, known = node.input[0], model, values
        if reads.get(read, "") in rounded and read not in inputs:
            at = _given(model, read)
            known = sessions.inside(at, 1, {**inputs, read: rounded[reads[read]]})
        if not {read, node.output[0]} <= known.keys():  # of random lengths it may not run again
            continue
        equations = equations_of(at, index, weights, w, known, observed, narrow=narrow is not None)
        if equations is None:
            continue
        if narrow is not None:
            factor = rounded.get(factors.get(node.input[1], ""), np.float32(1))
            channels = np.broadcast_to(np.ravel(factor), (len(w) * w.shape[2],))
            channels = np.where(channels == 0, np.float32(1), channels).reshape(len(w), 1, -1)
            equations = replace(equations, factor=channels)
        for name, fitted, operand in _Fitting(equations, w, known[read]).found():
            yield Fit(index, name, ungrouped(node, fitted, weights), operand)


def _given(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """A segment that is told one of its tensors; nodes keep their positions."""
    told = surgery.copied(model)
    for node in told.graph.node:
        for position, name in enumerate(node.output):
            if name == tensor:
                node.output[position] = f"{tensor}~"
    told.graph.input.append(
        onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)
    )
    return told


def _factors(model: onnx.ModelProto, weights: Set[str]) -> dict[str, str]:
    """What weights are multiplied by before they are rounded, by their names."""
    products = (n for n in model.graph.node if n.op_type == "Mul" and n.input[0] in weights)
    return {n.input[0]: n.input[1] for n in products}


def _unrounded(model: onnx.ModelProto, tensors: Iterable[str]) -> dict[str, str]:
    """The tensor that each one was before Casts rounded it, which is what is rounded to 8 bits."""
    producer = {o: n for n in model.graph.node for o in n.output}
    found = {}
    for tensor in tensors:
        name = tensor
        while name in producer and producer[name].op_type == "Cast":
            name = producer[name].input[0]
        found[tensor] = name
    return found


# Which steps weights can have, and those that some channels were fitted with.
_Form = tuple[Steps, Array | None]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """On a busy machine such small products take ten times as long with more than one thread."""
    with threadpool_limits(1, user_api="blas"):
        yield


class _Fitting:
    """Fits one product: everything is decided on some of its channels, half of what is known.

    Args:
        equations: what is known of the product.
        w: its weights [g, k, c].
        operand: its first operand.
    """

    def __init__(self, equations: Equations, w: Array, operand: Array) -> None:
        self._equations, self._w, self._operand = equations, w, operand
        self._some = _some(w, equations.x.shape[1])
        self._every = equations.of(self._some)
        self._fitted, self._held = (self._every.half(which) for which in (0, 1))
        whole, around = (
            float(squares(self._held.rest(w[self._some], about=about)).sum())
            for about in (False, True)
        )
        self._whole, self._around = whole, around

    def found(self) -> Iterator[tuple[str, Array, Grid | None]]:
        """What was fitted, the weights, and the grid of the operand, likeliest first."""
        if not self._whole > 0:
            return
        explained, weights, form = self._best(None)
        if explained >= _WORTH:
            yield _name(form), self._all_of(form, None), None
        if explained >= _ENOUGH:
            return
        plain = self._w[self._some]
        found: list[tuple[float, Grid, _Form | None]] = []
        first = self._grid(plain)
        if first is not None:
            found.append((self._share(plain, first), first, None))
        grid = self._grid(weights) if found or explained > 0 else None
        if first is not None and (grid is None or found[0][0] > self._share(weights, grid)):
            grid = first
        if grid is not None:
            if grid is first or self._share(weights, grid) < _ENOUGH:
                _, weights, form = self._best(grid)
                grid = self._grid(weights) or grid
            found.append((self._share(weights, grid), grid, form))
        if not found:
            return
        now, grid, chosen = max(found, key=lambda f: f[0])
        if now < max(_WORTH, explained):
            return
        read = plain if chosen is None else weights
        left, limited = (self._left(read, way) for way in (grid, grid.limits))
        if np.median(left / np.maximum(limited, NOTHING)) > _ROUNDS:
            return  # cut off, but not rounded
        if chosen is None:
            yield _INPUTS, self._w, grid
        else:
            yield f"{_name(chosen)}, {_INPUTS}", self._all_of(chosen, grid), grid

    def _share(self, weights: Array, grid: Grid | None = None) -> float:
        """The part of what was not fitted that these operands explain."""
        explained = 1 - float(squares(self._held.rest(weights, grid)).sum()) / self._whole
        if self._around == 0:
            return explained
        # One number for each channel can give its mean error, whatever that comes from.
        around = 1 - float(squares(self._held.rest(weights, grid, about=True)).sum()) / self._around
        return min(explained, around)

    def _left(self, weights: Array, operand: Callable[[Array], Array]) -> Array:
        """What these operands leave of what was not fitted, for each channel that says anything.

        Some channels may say something wrong, behind curves that go both ways for instance.
        """
        left = squares(self._held.rest(weights, operand))
        return np.asarray(left[self._held.known() > 0])

    @_alone()
    def _grid(self, weights: Array) -> Grid | None:
        def related(grid: Grid) -> bool:
            return self._related(self._rest(weights), self._rest(weights, grid))

        return grid_of(self._fitted, self._every, weights, self._operand, related)

    def _rest(self, weights: Array, grid: Grid | None = None) -> Array:
        """The errors that these operands leave of what was not fitted, around their mean."""
        return self._held.rest(weights, grid, about=self._around > 0)

    @staticmethod
    def _related(before: Array, after: Array) -> bool:
        """Whether what changes errors has something in common with them."""
        moved = before - after
        size = math.sqrt(float(np.square(before).sum()) * float(np.square(moved).sum()))
        return float((before * moved).sum()) > _RELATED * size

    @_alone()
    def _best(self, grid: Grid | None) -> tuple[float, Array, _Form]:
        """The form of weights that explains most of what was not fitted."""
        known = self._fitted if grid is None else self._fitted.on(grid)
        found: list[tuple[float, Array, _Form]] = []
        plain = self._rest(self._w[self._some], grid)

        def related(weights: Array) -> bool:
            return self._related(plain, self._rest(weights, grid))

        for symmetric, per_channel in itertools.product((True, False), (True, False)):
            steps = Steps(self._w, per_channel=per_channel, symmetric=symmetric)
            part = steps.of(self._some)
            for step in (None, part.fitted(known, related)):
                weights = part.rounded(part.largest if step is None else step)
                found.append((self._share(weights, grid), weights, (steps, step)))
            if found[-1][0] >= _ENOUGH:
                return found[-1]
        # With these no step is left to fit, and an equation for each channel will do.
        for per_channel, percentile in itertools.product((True, False), _PERCENTILES):
            steps = Steps(self._w, per_channel=per_channel, symmetric=True, percentile=percentile)
            part = steps.of(self._some)
            weights = part.rounded(part.largest)
            found.append((self._share(weights, grid), weights, (steps, None)))
        return max(found, key=lambda f: f[0])

    @_alone()
    def _all_of(self, form: _Form, grid: Grid | None) -> Array:
        """The weights of all channels in a form."""
        steps, step = form
        if step is None:
            return steps.rounded(steps.largest)
        known = self._equations.half(0)
        known = known if grid is None else known.on(grid)
        return steps.rounded(steps.refined(known, step) if steps.single else steps.fitted(known))


def _name(form: _Form) -> str:
    return _WEIGHTS[1 if form[0].single else 0]


def _some(w: Array, rows: int) -> tuple[slice, slice, slice]:
    """Choose channels of weights [g, k, c]: more where there are few rows of equations."""
    every, most = slice(None), _CHANNELS * max(1, ROWS // rows)
    if len(w) > 1:
        return slice(None, None, -(-len(w) // most)), every, every
    return every, every, slice(None, None, -(-w.shape[2] // most))
