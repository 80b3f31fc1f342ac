"""What a backend's outputs say of one product: linear equations in its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import ml_dtypes
import numpy as np
import onnx

from auditor.comparison import metrics
from auditor.graphs import surgery
from auditor.ports import Array, Arrays
from auditor.replays import sessions

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
ROWS, _WORK = 256, 3e8
# A step needs that many equations.
EQUATIONS = 3
# One number needs no more than that many to be looked for roughly.
_ENOUGH = 1024
# Numbers within this are none: what is divided by them would not be one.
NOTHING = 1e-30
# Squares of numbers up to here are finite.
_HUGE = 1e15
# How many times the typical error is how far it may reach.
_REACH = 4.0
# Below this part of the typical value, errors of sums count as well as the last rounding.
_SMALL = 0.1
# Positions are exact in float32 up to here.
_COUNTED = 2**24


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

    def limits(self, x: Array) -> Array:
        """Values cut off where it ends, and not rounded, float32."""
        step = np.float32(self.step)
        return np.asarray(np.clip(x, self.low * step, self.high * step), np.float32)


def squares(rest: Array) -> Array:
    """The sum of squared errors [g, p, c] of each channel, [g, 1, c]."""
    return np.asarray(np.square(rest).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Equations:
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

    def half(self, which: int) -> Equations:
        """Every second row; where there are few, those of every second channel."""
        if self.x.shape[1] >= 2 * EQUATIONS:
            x, result, weight = (a[:, which::2] for a in (self.x, self.result, self.weight))
            return replace(self, x=x, result=result, weight=weight)
        groups, _, channels = self.weight.shape
        mine = np.arange(groups * channels).reshape(groups, 1, channels) % 2 == which
        return replace(self, weight=self.weight * mine)

    def rest(
        self,
        weights: Array,
        operand: Callable[[Array], Array] | None = None,
        *,
        about: bool = False,
        ready: bool = False,
    ) -> Array:
        """The errors [g, p, c] that these operands leave, or what is around their mean.

        ``ready``: the weights come from ``multiplied``, once for all operands that are tried.
        """
        x = self._read if operand is None else self._narrow(operand(self.x))
        rest = self.result - x @ (weights if ready else self.multiplied(weights))
        if about or (self.factor is not None and x.shape[1] >= EQUATIONS):
            total = np.maximum(self._square.sum(axis=1, keepdims=True), NOTHING)
            rest = rest - (self._square * rest).sum(axis=1, keepdims=True) / total
        return np.asarray(self.weight * rest)

    def multiplied(self, weights: Array) -> Array:
        """The weights that the backend multiplied with: rounded where it rounds them."""
        if self.factor is None:
            return weights
        return np.asarray(_bfloat16(weights * self.factor) / self.factor)

    @cached_property
    def _square(self) -> Array:
        return np.asarray(np.square(self.weight))

    @cached_property
    def _read(self) -> Array:
        return self._narrow(self.x)  # once for all weights that are tried

    def _narrow(self, x: Array) -> Array:
        return x if self.factor is None else _bfloat16(x)

    def known(self) -> Array:
        """How many results of each channel are known, [g, 1, c]."""
        return np.asarray(np.count_nonzero(self.weight, axis=1, keepdims=True))

    def thinned(self) -> Equations:
        """The equations with no more rows than the search for one number needs."""
        every = max(1, np.count_nonzero(self.weight) // _ENOUGH)
        x, result, weight = (a[:, ::every] for a in (self.x, self.result, self.weight))
        return replace(self, x=x, result=result, weight=weight)

    def of(self, some: tuple[slice, slice, slice]) -> Equations:
        """The equations of some channels."""
        groups, _, channels = some
        x = self.x[groups] if len(self.x) > 1 else self.x
        result, weight = (a[groups, :, channels] for a in (self.result, self.weight))
        factor = None if self.factor is None else self.factor[groups, :, channels]
        return Equations(x, result, weight, factor)

    def on(self, operand: Grid) -> Equations:
        """The equations with the operand on a grid."""
        return replace(self, x=operand(self.x))


def _bfloat16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def grouped(node: onnx.NodeProto, weights: Array) -> Array | None:
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


def ungrouped(node: onnx.NodeProto, w: Array, like: Array) -> Array:
    """A product's weights in their own shape, from [group, inputs, outputs]."""
    if node.op_type == "Conv":
        return np.ascontiguousarray(w.transpose(0, 2, 1)).reshape(like.shape)
    transposed = surgery.attributes(node).get("transB", 0)
    return np.ascontiguousarray(w[0].T if transposed else w[0])


def equations_of(
    model: onnx.ModelProto,
    index: int,
    weights: Array,
    w: Array,
    values: Arrays,
    observed: Arrays,
    *,
    narrow: bool,
) -> Equations | None:
    """What the backend's outputs say of one product."""
    node = model.graph.node[index]
    x, z = values[node.input[0]], values[node.output[0]]
    if z.dtype != np.float32 or x.dtype != np.float32 or z.size > _COUNTED:
        return None
    if not (np.abs(x).max(initial=0) < _HUGE and np.abs(z).max(initial=0) < _HUGE):
        return None
    known = before(model, index, values, observed, narrow=narrow)
    if known is None or known[0].shape != z.shape:
        return None
    groups, size, channels = w.shape
    rows = int(min(ROWS, max(16, _WORK / w.size)))
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
    equations = Equations(patches, own_result, weight)
    error = math.sqrt(float(squares(equations.rest(w)).sum()))
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


def before(
    model: onnx.ModelProto, index: int, values: Arrays, observed: Arrays, *, narrow: bool
) -> tuple[Array, Array] | None:
    """What a product must have given for the segment's output to be what was observed.

    Returns:
        The results and how sure they are, in the product's shape: what they move in the output,
        where that was rounded to bfloat16 relative to its size; 0 where they are not known. None
        where operators lie in between that do not compute each element by itself.
    """
    z = model.graph.node[index].output[0]
    plain = values[z]
    if z in observed:
        sure = np.isfinite(observed[z]) / _rounding(observed[z], narrow=narrow)
        return observed[z], np.asarray(sure, np.float32)
    path = _elementwise(model, z)
    target = next((n for n in observed if n in path and observed[n].size == plain.size), None)
    if target is None:
        return None
    try:
        tail = _Tail(model, index, target, path, values)
        wanted = tail.placed(metrics.to_float(observed[target]))
        result, slope = _inverted(tail, plain, wanted)
    except Exception:  # what ORT refuses says nothing; its errors share no base
        return None
    return result, np.asarray(slope / _rounding(wanted, narrow=narrow), np.float32)


def _elementwise(model: onnx.ModelProto, tensor: str) -> dict[str, str]:
    """By tensor, the operand on the way to ``tensor``, of which each element is computed."""
    path = {tensor: ""}
    for node in model.graph.node:
        on = [name for name in node.input if name in path]
        known = _ELEMENTWISE if node.input[:1] == on[:1] else _SYMMETRIC
        if on and node.op_type in _MOVES | known:
            path[node.output[0]] = on[0]
    return path


class _Tail:
    """The operators behind a product, as a function of its result."""

    def __init__(
        self,
        model: onnx.ModelProto,
        index: int,
        target: str,
        path: dict[str, str],
        values: Arrays,
    ) -> None:
        self._target, self._z = target, model.graph.node[index].output[0]
        self._feeds = {i.name: values[i.name] for i in model.graph.input if i.name != self._z}
        self._shape = values[self._z].shape
        tail = surgery.copied(model)
        del tail.graph.node[index], tail.graph.output[:]
        tail.graph.output.append(onnx.ValueInfoProto(name=target))
        tail.graph.input.append(
            onnx.helper.make_tensor_value_info(self._z, onnx.TensorProto.FLOAT, None)
        )
        self._session = sessions.session(tail, 1)
        # Where each element goes: the same nodes, of which those that compute only pass it on.
        moves = surgery.copied(tail)
        for node in moves.graph.node:
            on = path.get(node.output[0])
            if on and node.op_type in _ELEMENTWISE:
                node.CopyFrom(onnx.helper.make_node("Identity", [on], [node.output[0]]))
        places = np.arange(math.prod(self._shape), dtype=np.float32).reshape(self._shape)
        (order,) = sessions.session(moves, 1).run([target], {**self._feeds, self._z: places})
        self._order = order.astype(np.int64).ravel()

    def __call__(self, result: Array) -> Array:
        """The observed output, float64, each element in the place of the result it is made of."""
        (found,) = self._session.run([self._target], {**self._feeds, self._z: result})
        return self.placed(found)

    def placed(self, output: Array) -> Array:
        """An output in the product's shape, float64."""
        result = np.empty(len(self._order), np.float64)
        result[self._order] = output.ravel()
        return result.reshape(self._shape)


def _inverted(behind: Callable[[Array], Array], plain: Array, wanted: Array) -> tuple[Array, Array]:
    """Where an elementwise function is ``wanted``, by Newton's method from ``plain``.

    Returns:
        The argument and the function's slope there; 0 where the argument is not sure.
    """
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
        reach = _REACH * math.sqrt(np.square((now - plain)[smooth]).sum() / max(1, smooth.sum()))
        for there in (now - np.float32(reach), now + np.float32(reach)):
            smooth &= (behind(there + width) - behind(there)) * slope >= 0
        missed, off = np.abs(behind(now) - wanted), np.abs(wanted - behind(plain))
    # Exact but for what rounds to the same value behind an activation.
    found = smooth & np.isfinite(now) & (missed <= 0.05 * off + 1e-6 * np.abs(wanted))
    return now, np.where(found, np.abs(slope), 0)


def _rounding(values: Array, *, narrow: bool) -> Array:
    """How far each value was rounded as it was written, in a unit of its own."""
    size = np.abs(np.where(np.isfinite(values), values, 0)).astype(np.float64)
    least = _SMALL * (math.sqrt(float(np.square(size).mean())) or 1)
    return np.maximum(size, least) / least if narrow else np.ones_like(size)
