"""Reads the steps of an 8-bit quantisation off what a backend computed.

Calibration clips values before it rounds them, and where it clips follows from data or rules that
the auditor does not know. But a sum of products is linear in its weights: with the operand that
the backend had and the result that it gave, each step is one unknown in many equations. It is
searched for on half of them and must hold on the other half; whether it is the cause is then
decided by a replay of the whole segment, as for every hypothesis.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx

from auditor.comparison import metrics
from auditor.graphs import surgery
from auditor.ports import Array, Arrays
from auditor.replays import replay

# Operators that only move values, and those that compute each value from one of their operand's.
_MOVES = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_ELEMENTWISE = frozenset(
    ("Add", "BatchNormalization", "Cast", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid")
) | {"HardSwish", "LeakyRelu", "Mul", "PRelu", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh"}
# … and of these, those that read it at any place.
_SYMMETRIC = frozenset(("Add", "Mul", "Sub", "Div"))
# Errors of a product that 8 bits can make, relative L2.
_SMALLEST, _LARGEST = 3e-4, 1.5
# Rows of equations looked at; fewer where products of all of them would cost more than that.
_ROWS, _WORK = 256, 3e8
# A step needs that many equations.
_EQUATIONS = 3
# Steps are looked for down to this part of the one that clips nothing; those of an operand, whose
# range comes from other inputs, up to this multiple. No more steps than these are tried first.
_LEAST, _MOST, _TRIED = 0.02, 3.0, 400
# The distance of two steps tried: it moves a typical value by this part of a step.
_SPACING = 0.25
# Two grids fit alike within this.
_ALIKE = 1.02
# Between two of them so many are tried at last.
_FINE = 40
# That many of the steps tried are refined.
_LIKELY = 8
# Weights of a channel within this have no steps: those would not be numbers.
_NOTHING = 1e-30
# Calibration clips at most this fraction of the values.
_CLIPPED = 0.05
# What the part not fitted must explain to be worth a replay, and from where on nothing is left.
_WORTH, _ENOUGH = 0.2, 0.99
# An operand is sought with that many channels of the product, where there are ``_ROWS`` of each.
_CHANNELS = 32
# Squares of numbers up to here are finite.
_HUGE = 1e15
# How many times the typical error is how far it may reach.
_REACH = 4.0
# Below this part of the typical value, errors of sums count as well as the last rounding.
_SMALL = 0.1
# Positions are exact in float32 up to here.
_COUNTED = 2**24

_WEIGHTS = ("weights per channel, fitted", "weights per tensor, fitted")
_INPUTS = "inputs fitted"
FORMS = (*_WEIGHTS, *(f"{weights}, {_INPUTS}" for weights in _WEIGHTS), _INPUTS)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where an operand lies: step × clip(round(x / step), low, high)."""

    step: float
    low: int
    high: int

    def __call__(self, x: Array) -> Array:
        """Values on it, float32."""
        step = np.float32(self.step)
        return np.asarray(np.clip(np.rint(x / step), self.low, self.high) * step, np.float32)


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


@dataclass(frozen=True, slots=True)
class _Equations:
    """Rows of products, by groups of channels: result [g, p, c] = Σₖ x [g, p, k] · w [g, k, c].

    ``result`` is what the backend must have had, and ``weight`` how sure that is: 0 where it is not
    known. Where it rounded both operands to bfloat16, ``factor`` [g, 1, c] is what it multiplied
    the weights by before; with enough rows, each channel's mean then says nothing, since its bias
    was rounded as well.
    """

    x: Array
    result: Array
    weight: Array
    factor: Array | None = None

    def half(self, which: int) -> _Equations:
        """Every second row; where there are few, those of every second channel."""
        if self.x.shape[1] >= 2 * _EQUATIONS:
            x, result, weight = (a[:, which::2] for a in (self.x, self.result, self.weight))
            return replace(self, x=x, result=result, weight=weight)
        groups, _, channels = self.weight.shape
        mine = np.arange(groups * channels).reshape(groups, 1, channels) % 2 == which
        return replace(self, weight=self.weight * mine)

    def left(self, weights: Array, operand: Grid | None = None, *, about: bool = False) -> Array:
        """By channel [g, 1, c], the squared error that these operands leave, or its variance."""
        x = self.x if operand is None else operand(self.x)
        if self.factor is not None:
            x, weights = _bfloat16(x), _bfloat16(weights * self.factor) / self.factor
        rest, square = self.result - x @ weights, np.square(self.weight)
        if about or (self.factor is not None and x.shape[1] >= _EQUATIONS):
            total = np.maximum(square.sum(axis=1, keepdims=True), _NOTHING)
            rest = rest - (square * rest).sum(axis=1, keepdims=True) / total
        return np.asarray((square * np.square(rest)).sum(axis=1, keepdims=True))

    def known(self) -> Array:
        """By channel [g, 1, c], how many results are known."""
        return np.asarray(np.count_nonzero(self.weight, axis=1, keepdims=True))

    def of(self, some: tuple[slice, slice, slice]) -> _Equations:
        """Those of some channels."""
        groups, _, channels = some
        x = self.x[groups] if len(self.x) > 1 else self.x
        result, weight = (a[groups, :, channels] for a in (self.result, self.weight))
        factor = None if self.factor is None else self.factor[groups, :, channels]
        return _Equations(x, result, weight, factor)

    def on(self, operand: Grid) -> _Equations:
        """The same with an operand on a grid."""
        return replace(self, x=operand(self.x))


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
    values = replay.inside(model, 1, inputs)
    reads: dict[str, str] = {}
    factors: dict[str, str] = {}
    rounded: Arrays = {}
    if narrow is not None:
        reads = _unrounded(narrow, values)
        factors = _factors(narrow, {model.graph.node[index].input[1] for index in weighted})
        rounded = replay.inside(narrow, 1, inputs, {*reads.values(), *factors.values()})
    for index, weights in weighted.items():
        node = model.graph.node[index]
        if not {node.input[0], node.output[0]} <= values.keys():
            continue
        w = _grouped(node, weights)
        if w is None:
            continue
        read, at, known = node.input[0], model, values
        if reads.get(read, "") in rounded and read not in inputs:
            at = _given(model, read)
            known = replay.inside(at, 1, {**inputs, read: rounded[reads[read]]})
        equations = _equations(at, index, weights, w, known, observed, narrow=narrow is not None)
        if equations is None:
            continue
        if narrow is not None:
            factor = rounded.get(factors.get(node.input[1], ""), np.float32(1))
            channels = np.broadcast_to(np.ravel(factor), (len(w) * w.shape[2],))
            channels = np.where(channels == 0, np.float32(1), channels).reshape(len(w), 1, -1)
            equations = replace(equations, factor=channels)
        for name, fitted, operand in _found(equations, w, known[read]):
            yield Fit(index, name, _ungrouped(node, fitted, weights), operand)


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
    """By name of weights, what they are multiplied by before they are rounded."""
    products = (n for n in model.graph.node if n.op_type == "Mul" and n.input[0] in weights)
    return {n.input[0]: n.input[1] for n in products}


def _unrounded(model: onnx.ModelProto, tensors: Iterable[str]) -> dict[str, str]:
    """By tensor, what it is before it is rounded: that is what is rounded to 8 bits."""
    producer = {o: n for n in model.graph.node for o in n.output}
    found = {}
    for tensor in tensors:
        name = tensor
        while name in producer and producer[name].op_type == "Cast":
            name = producer[name].input[0]
        found[tensor] = name
    return found


def _bfloat16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


# Which steps weights can have, and those that some channels were fitted with.
_Form = tuple["_Steps", Array | None]


def _found(
    equations: _Equations, w: Array, operand: Array
) -> Iterator[tuple[str, Array, Grid | None]]:
    """What was fitted, the weights, and the grid of the operand, likeliest first.

    Everything is decided on some of the channels; then the others' steps are fitted too.
    """
    some = _some(w, equations.x.shape[1])
    every = equations.of(some)
    fitted, held = (every.half(which) for which in (0, 1))
    whole, around = (float(held.left(w[some], about=a).sum()) for a in (False, True))
    if not whole > 0:
        return

    def share(weights: Array, grid: Grid | None = None) -> float:
        explained = 1 - float(held.left(weights, grid).sum()) / whole
        if around == 0:
            return explained
        # One number for each channel can give its mean error, whatever that comes from.
        return min(explained, 1 - float(held.left(weights, grid, about=True).sum()) / around)

    def best(grid: Grid | None) -> tuple[float, Array, _Form]:
        """The form of weights that explains most of what was not fitted."""
        known = fitted if grid is None else fitted.on(grid)
        found: list[tuple[float, Array, _Form]] = []
        for symmetric, per_channel in itertools.product((True, False), (True, False)):
            steps = _Steps(w, per_channel=per_channel, symmetric=symmetric)
            part = steps.of(some)
            for step in (None, part.fitted(known)):
                weights = part.rounded(part.largest if step is None else step)
                found.append((share(weights, grid), weights, (steps, step)))
            if found[-1][0] >= _ENOUGH:
                break
        return max(found, key=lambda f: f[0])

    def all_of(form: _Form, grid: Grid | None) -> Array:
        steps, step = form
        if step is None:
            return steps.rounded(steps.largest)
        known = equations.half(0)
        known = known if grid is None else known.on(grid)
        return steps.rounded(steps.refined(known, step) if steps.single else steps.fitted(known))

    explained, weights, form = best(None)
    if explained >= _WORTH:
        yield form[0].name, all_of(form, None), None
    if explained >= _ENOUGH:
        return
    found: list[tuple[float, Grid, _Form | None]] = []
    if (grid := _grid(fitted, every, w[some], operand)) is not None:
        found.append((share(w[some], grid), grid, None))
    if (grid := _grid(fitted, every, weights, operand)) is not None:
        if share(weights, grid) < _ENOUGH:
            _, weights, form = best(grid)
            grid = _grid(fitted, every, weights, operand) or grid
        found.append((share(weights, grid), grid, form))
    if not found:
        return
    now, grid, chosen = max(found, key=lambda f: f[0])
    if now < max(_WORTH, explained):
        return
    if chosen is None:
        yield _INPUTS, w, grid
    else:
        yield f"{chosen[0].name}, {_INPUTS}", all_of(chosen, grid), grid


def _some(w: Array, rows: int) -> tuple[slice, slice, slice]:
    """Some of the channels of weights [g, k, c]: more where there are few rows of equations."""
    every, most = slice(None), _CHANNELS * max(1, _ROWS // rows)
    if len(w) > 1:
        return slice(None, None, -(-len(w) // most)), every, every
    return every, every, slice(None, None, -(-w.shape[2] // most))


class _Steps:
    """Weights [g, k, c] on 8-bit grids: which steps they can have."""

    def __init__(self, w: Array, *, per_channel: bool, symmetric: bool) -> None:
        self.w = w
        self.name = _WEIGHTS[0 if per_channel else 1]
        self.single = not per_channel  # one step for all
        axes: tuple[int, ...] = (1,) if per_channel else (0, 1, 2)
        if symmetric:
            span = np.abs(w).max(axis=axes, keepdims=True) / np.float32(127)
        else:
            least = np.minimum(w.min(axis=axes, keepdims=True), 0)
            most = np.maximum(w.max(axis=axes, keepdims=True), 0)
            span = (most - least) / np.float32(255)
        # Of the step that clips nothing, and the integers' limits: [g, 1, c] or one for all.
        self.largest = np.asarray(np.where(span > _NOTHING, span, 1), np.float32)
        self.low = np.full_like(span, -127) if symmetric else np.rint(least / self.largest)
        self.high = self.low + (254 if symmetric else 255)
        size = np.sort(np.abs(w), axis=1) if per_channel else np.sort(np.abs(w), axis=None)[None]
        size = size if per_channel else size[..., None]
        kept = size.shape[1] - 1 - max(1, int(_CLIPPED * size.shape[1]))
        # The step that clips as many as there may be, and that moves a typical weight a little.
        self.least = size[:, [max(kept, 0)]] / np.float32(127) if symmetric else self.largest / 2
        self.least = np.clip(self.least, _LEAST * self.largest, self.largest)
        self.typical = np.maximum(size[:, [size.shape[1] * 9 // 10]] / 2, self.largest)

    def of(self, some: tuple[slice, slice, slice]) -> _Steps:
        """The same steps for some of the weights."""
        part = copy.copy(self)
        part.w = self.w[some]
        if not self.single:
            part.largest, part.low, part.high = (
                a[some] for a in (self.largest, self.low, self.high)
            )
            part.least, part.typical = self.least[some], self.typical[some]
        return part

    def rounded(self, step: Array) -> Array:
        """The weights on grids with these steps."""
        return np.asarray(self._integers(step) * step, np.float32)

    def _integers(self, step: Array) -> Array:
        return np.asarray(np.clip(np.rint(self.w / step), self.low, self.high))

    def fitted(self, known: _Equations) -> Array:
        """The steps that explain most of what is known."""
        tried = [self.largest * np.float32(1.02)]
        while len(tried) < _TRIED and (tried[-1] > self.least).any():
            tried.append(tried[-1] * (1 - self._apart(tried[-1])))
        lefts = np.stack([self._left(known, step) for step in tried])
        likely = np.argsort(lefts, axis=0)[:_LIKELY]
        best, left = self.largest, self._left(known, self.largest)
        for start in np.take_along_axis(np.stack(tried), likely, axis=0):
            refined = self.refined(known, start)
            best, left = self._better(known, best, left, refined)
        if self.single:
            return best
        return np.where(known.known() >= _EQUATIONS, best, self.largest)

    def _apart(self, step: Array) -> Array:
        """How far steps to try are from each other, in steps."""
        spacing = _SPACING / 2 if self.single else _SPACING
        return np.asarray(np.minimum(spacing * step / self.typical, 0.05))

    def refined(self, known: _Equations, best: Array) -> Array:
        """The best step near one."""
        left = self._left(known, best)
        for part in (1.0, 0.15):
            around, apart = best, self._apart(best)
            for way in np.linspace(-part, part, 14):
                best, left = self._better(known, best, left, around * np.exp(way * apart))
        for _ in range(4):
            # The step for which these integers give the result is nearer to the one looked for.
            given = known.weight * (known.x @ self._integers(best))
            square = np.square(given).sum(axis=1, keepdims=True)
            product = (given * known.weight * known.result).sum(axis=1, keepdims=True)
            if self.single:
                square, product = square.sum(), product.sum()
            with np.errstate(invalid="ignore", divide="ignore"):
                nearer = np.where((square > 0) & (product > 0), product / square, best)
            best, left = self._better(known, best, left, np.asarray(nearer, np.float32))
        return best

    def _better(
        self, known: _Equations, best: Array, left: Array, step: Array
    ) -> tuple[Array, Array]:
        step = np.asarray(step, np.float32)
        now = self._left(known, step)
        allowed = (step >= 0.99 * self.least) & (step <= 1.05 * self.largest)
        take = allowed & (now < left)
        return np.where(take, step, best), np.where(take, now, left)

    def _left(self, known: _Equations, step: Array) -> Array:
        left = known.left(self.rounded(step))
        return left.sum(keepdims=True) if self.single else left


def _grid(known: _Equations, every: _Equations, weights: Array, operand: Array) -> Grid | None:
    """The 8-bit grid of the operand that explains most of what is known, with these weights.

    ``every`` is asked where the range ends, since few values are beyond it.
    """
    least, most = min(float(operand.min()), 0.0), max(float(operand.max()), 0.0)
    span = (most - least) / 255
    if not (0 < span < math.inf) or known.known().sum() < 2 * _EQUATIONS:
        return None
    inner = np.quantile(operand, (_CLIPPED / 2, 1 - _CLIPPED / 2))
    typical = float(np.sqrt(np.square(np.clip(known.x, *inner)).mean())) or span
    best, left = Grid(span, 0, 0), math.inf

    def attempt(step: float, lows: Iterable[int]) -> None:
        nonlocal best, left
        for low in lows:
            grid = Grid(float(np.float32(step)), low, low + 255)
            outside = (known.x < (grid.low - 1) * step) | (known.x > (grid.high + 1) * step)
            if outside.mean() > _CLIPPED:
                continue
            now = float(known.left(weights, grid).sum())
            if now < left:
                best, left = grid, now

    def lows(step: float) -> list[int]:
        """Its range begins or ends where the operand does, is less at both ends, or symmetric."""
        first, last = round(least / step), round(most / step)
        found = [max(first, -255)]
        if last - first > 255:
            found += (min(last - 255, 0), round(first * 255 / (last - first)))
        if least < 0 or last > 127:
            found.append(-128)
        return [low for low in found if -255 <= low <= 0]

    step = max(_LEAST * span, float(np.ptp(np.append(inner, 0))) / 255)
    while step < _MOST * span:
        attempt(step, lows(step))
        step *= 1 + min(_SPACING * step / typical, 0.05)
    if left == math.inf:
        return None
    for part in np.tile(np.linspace(0, 1, _FINE + 1), 2):  # a range that is less at both ends
        low, high = best.step * best.low, best.step * best.high
        for first, last in ((part * least, high), (low, part * most)):
            if last > first:
                step = float(last - first) / 255
                attempt(step, (min(max(round(float(first) / step), -255), 0),))
    for _ in range(2):  # one end of the range stays where it is, the other one moves
        around, apart = best, min(_SPACING * best.step / typical, 0.05)
        for way in np.arange(-0.15, 0.15, apart):
            step = around.step * (1 + way)
            ends = round(around.low / (1 + way)), round(around.high / (1 + way)) - 255
            attempt(step, {min(max(low, -255), 0) for low in ends})
    for part in (1.0, 0.15, 0.02):
        around, apart = best, part * min(_SPACING * best.step / typical, 0.05)
        for way in np.linspace(-apart, apart, _FINE):
            attempt(around.step * (1 + way), (around.low,))
        attempt(best.step, range(-255, 1, 8))
        attempt(best.step, range(max(best.low - 8, -255), min(best.low + 9, 1)))
    for _ in range(4):
        integers = np.clip(np.rint(known.x / np.float32(best.step)), best.low, best.high)
        given = known.weight * (integers @ weights)
        square = float(np.square(given).sum())
        if square:
            attempt(float((given * known.weight * known.result).sum()) / square, (best.low,))
    # Where few values are beyond it, the end of the range that the operand itself has does as well.
    ranges = [Grid(best.step, low, low + 255) for low in (*lows(best.step), best.low)]
    lefts = [float(every.left(weights, grid).sum()) for grid in ranges]
    return ranges[next(i for i, end in enumerate(lefts) if end <= _ALIKE * min(lefts))]


# ------------------------------------------------------------------------------ equations


def _grouped(node: onnx.NodeProto, weights: Array) -> Array | None:
    """A product's weights as [group, inputs, outputs]; None where it is none of this form."""
    given = surgery.attributes(node)
    if node.op_type == "Conv":
        groups = given.get("group", 1)
        if given.get("auto_pad", "NOTSET") != "NOTSET":
            return None
        parts = weights.reshape(groups, weights.shape[0] // groups, -1)
        return np.ascontiguousarray(parts.transpose(0, 2, 1))
    if weights.ndim != 2 or node.op_type not in ("Gemm", "MatMul"):
        return None
    if given.get("transA", 0) or given.get("alpha", 1) != 1:
        return None
    return np.ascontiguousarray(weights.T if given.get("transB", 0) else weights)[None]


def _ungrouped(node: onnx.NodeProto, w: Array, like: Array) -> Array:
    """The other way round."""
    if node.op_type == "Conv":
        return np.ascontiguousarray(w.transpose(0, 2, 1)).reshape(like.shape)
    transposed = surgery.attributes(node).get("transB", 0)
    return np.ascontiguousarray(w[0].T if transposed else w[0])


def _equations(
    model: onnx.ModelProto,
    index: int,
    weights: Array,
    w: Array,
    values: Arrays,
    observed: Arrays,
    *,
    narrow: bool,
) -> _Equations | None:
    """What the backend's outputs say of one product."""
    node = model.graph.node[index]
    x, z = values[node.input[0]], values[node.output[0]]
    if z.dtype != np.float32 or x.dtype != np.float32 or z.size > _COUNTED:
        return None
    if not (np.abs(x).max(initial=0) < _HUGE and np.abs(z).max(initial=0) < _HUGE):
        return None
    known = _before(model, index, values, observed, narrow=narrow)
    if known is None or known[0].shape != z.shape:
        return None
    groups, size, channels = w.shape
    rows = int(min(_ROWS, max(16, _WORK / w.size)))
    result, weight, plain = (
        np.moveaxis(a.reshape(len(a), groups, channels, -1), -1, 1).reshape(-1, groups, channels)
        if node.op_type == "Conv"
        else a.reshape(-1, 1, channels)
        for a in (*known, z)
    )
    # At random, since neighbours say the same, and those first that know of rarely known channels.
    order = np.random.default_rng(0).permutation(len(result))
    said = weight > 0
    says = (said / np.maximum(said.sum(axis=0), 1)).sum(axis=(1, 2))
    order = np.sort(order[np.argsort(-says[order], kind="stable")][:rows])
    patches = _patches(node, x, z.shape, order, weights) if node.op_type == "Conv" else None
    if patches is None:
        patches = x.reshape(-1, size)[order][None]
    result, weight, plain = (a[order].transpose(1, 0, 2) for a in (result, weight, plain))
    own = patches @ w
    bias = plain - own
    shift = bias.mean(axis=1, keepdims=True)
    if np.abs(bias - shift).max(initial=0) > 1e-3 * np.abs(plain).max(initial=0):
        return None  # not the product that it was taken for
    own_result = np.where(weight > 0, result - bias, 0).astype(np.float32)
    equations = _Equations(patches, own_result, weight)
    error = math.sqrt(float(equations.left(w).sum()))
    norm = math.sqrt(float(np.square(weight * own).sum()))
    fits_8_bits = _SMALLEST * norm <= error <= _LARGEST * norm and error > 0
    return equations if fits_8_bits else None


def _patches(
    node: onnx.NodeProto, x: Array, shape: tuple[int, ...], order: Array, like: Array
) -> Array:
    """What a convolution reads for some of its results, [group, row, channel and tap]."""
    given = surgery.attributes(node)
    rank, groups, size = x.ndim - 2, given.get("group", 1), like.shape[2:]
    pads = given.get("pads", [0] * (2 * rank))
    strides, dilations = (given.get(k, [1] * rank) for k in ("strides", "dilations"))
    around = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
    padded = np.pad(x, around)
    rows = []
    for position in order:
        sample, *at = np.unravel_index(position, (shape[0], *shape[2:]))
        window = tuple(
            slice(a * s, a * s + (k - 1) * d + 1, d)
            for a, s, k, d in zip(at, strides, size, dilations, strict=True)
        )
        rows.append(padded[(sample, slice(None), *window)].reshape(groups, -1))
    return np.stack(rows, axis=1)


def _before(
    model: onnx.ModelProto, index: int, values: Arrays, observed: Arrays, *, narrow: bool
) -> tuple[Array, Array] | None:
    """What a product must have given for the segment's output to be what was observed.

    Behind it, operators that compute each element by itself are inverted by Newton's method.

    Returns:
        The results and how sure they are, in the product's shape: what they move in the output,
        where that was rounded to bfloat16 relative to its size; 0 where they are not known. None
        where other operators lie in between.
    """
    z = model.graph.node[index].output[0]
    plain = values[z]
    if z in observed:
        sure = np.isfinite(observed[z]) / _rounding(observed[z], narrow=narrow)
        return observed[z], np.asarray(sure, np.float32)
    path, main = {z}, {}
    for position, node in enumerate(model.graph.node):
        on = [i for i in node.input if i in path]
        if on and node.op_type in _MOVES | (
            _SYMMETRIC if node.input[0] not in path else _ELEMENTWISE
        ):
            main[position] = on[0]
            path.add(node.output[0])
    target = next((n for n in observed if n in path and observed[n].size == plain.size), None)
    if target is None:
        return None
    tail = surgery.copied(model)
    del tail.graph.node[:], tail.graph.output[:]
    tail.graph.node.extend(n for i, n in enumerate(model.graph.node) if i != index)
    tail.graph.output.append(onnx.ValueInfoProto(name=target))
    tail.graph.input.append(onnx.helper.make_tensor_value_info(z, onnx.TensorProto.FLOAT, None))
    moved = surgery.copied(tail)
    for node in moved.graph.node:
        position = next(i for i, n in enumerate(model.graph.node) if n.output == node.output)
        if position in main and node.op_type in _ELEMENTWISE:
            node.CopyFrom(onnx.helper.make_node("Identity", [main[position]], [node.output[0]]))
    feeds = {i.name: values[i.name] for i in model.graph.input if i.name != z}
    places = np.arange(plain.size, dtype=np.float32).reshape(plain.shape)
    try:
        (order,) = replay.session(moved, 1).run([target], {**feeds, z: places})
        run = replay.session(tail, 1)

        def behind(value: Array) -> Array:
            (found,) = run.run([target], {**feeds, z: value})
            result = np.empty(plain.size, np.float64)
            result[order.astype(np.int64).ravel()] = found.ravel()
            return result.reshape(plain.shape)

        flat = np.empty(plain.size, np.float64)
        flat[order.astype(np.int64).ravel()] = metrics.to_float(observed[target]).ravel()
        wanted = flat.reshape(plain.shape)
        width = np.float32(1e-3 * (float(plain.std()) or 1))
        now = plain
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            for _ in range(2):
                here = behind(now)
                slope = (behind(now + width) - here) / width
                other = (here - behind(now - width)) / width
                steep = np.abs(slope) > 0.02 * np.abs(slope).max(initial=0)
                smooth = steep & (np.abs(slope - other) <= 0.1 * np.abs(slope))
                now = np.where(smooth, now + (wanted - here) / slope, now).astype(np.float32)
            # Where the curve goes both ways, only one of its branches is sure to be the right one,
            # and that only where the error reaches no other.
            smooth &= (slope > 0) == ((slope > 0).sum() >= (slope < 0).sum())
            reach = _REACH * math.sqrt(
                np.square((now - plain)[smooth]).sum() / max(1, smooth.sum())
            )
            for there in (now - np.float32(reach), now + np.float32(reach)):
                smooth &= (behind(there + width) - behind(there)) * slope >= 0
            missed = np.abs(behind(now) - wanted)
            off = np.abs(wanted - behind(plain))
    except Exception:  # what ORT refuses says nothing; its errors share no base
        return None
    # Exact but for what rounds to the same value behind an activation.
    found = smooth & np.isfinite(now) & (missed <= 0.05 * off + 1e-6 * np.abs(wanted))
    sure = np.where(found, np.abs(slope), 0) / _rounding(wanted, narrow=narrow)
    return now, np.asarray(sure, np.float32)


def _rounding(values: Array, *, narrow: bool) -> Array:
    """By how much values were rounded as they were written, in a unit of its own."""
    size = np.abs(np.where(np.isfinite(values), values, 0)).astype(np.float64)
    least = _SMALL * (math.sqrt(float(np.square(size).mean())) or 1)
    return np.maximum(size, least) / least if narrow else np.ones_like(size)
