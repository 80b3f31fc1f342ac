"""Searches for the steps of an 8-bit quantisation that explain what a backend computed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import numpy as np

from auditor.noises._equations import EQUATIONS, NOTHING, Equations, Grid, squares
from auditor.ports import Array

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
# Calibration clips at most this fraction of weights, and of an operand, whose range may come from
# inputs that are nothing like it.
_CLIPPED, _BEYOND = 0.05, 0.3


class Steps:
    """Weights [g, k, c] on 8-bit grids: which steps they can have."""

    def __init__(
        self, w: Array, *, per_channel: bool, symmetric: bool, percentile: float = 100
    ) -> None:
        self.w = w
        self.single = not per_channel  # one step for all
        axes: tuple[int, ...] = (1,) if per_channel else (0, 1, 2)
        if symmetric:
            size = np.abs(w)
            most = size.max(axis=axes, keepdims=True)
            if percentile < 100:
                most = np.percentile(size.astype(np.float64), percentile, axis=axes, keepdims=True)
            span = most / np.float32(127)
        else:
            least = np.minimum(w.min(axis=axes, keepdims=True), 0)
            most = np.maximum(w.max(axis=axes, keepdims=True), 0)
            span = (most - least) / np.float32(255)
        # Of the step that clips nothing, and the integers' limits: [g, 1, c] or one for all.
        self.largest = np.asarray(np.where(span > NOTHING, span, 1), np.float32)
        self.low = np.full_like(span, -127) if symmetric else np.rint(least / self.largest)
        self.high = self.low + (254 if symmetric else 255)
        size = np.sort(np.abs(w), axis=1) if per_channel else np.sort(np.abs(w), axis=None)[None]
        size = size if per_channel else size[..., None]
        kept = size.shape[1] - 1 - max(1, int(_CLIPPED * size.shape[1]))
        # The step that clips as many as there may be, and that moves a typical weight a little.
        self.least = size[:, [max(kept, 0)]] / np.float32(127) if symmetric else self.largest / 2
        self.least = np.clip(self.least, _LEAST * self.largest, self.largest)
        self.typical = np.maximum(size[:, [size.shape[1] * 9 // 10]] / 2, self.largest)

    def of(self, some: tuple[slice, slice, slice]) -> Steps:
        """The steps of some of the weights."""
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

    def fitted(self, known: Equations, related: Callable[[Array], bool] | None = None) -> Array:
        """The steps that explain most of what is known.

        Where weights that do so roughly are not ``related`` to it, those that clip nothing.
        """
        enough = known.known() >= EQUATIONS
        if not self.single and not enough.any():
            return self.largest
        tried = [self.largest * np.float32(1.02)]
        while len(tried) < _TRIED and (tried[-1] > self.least).any():
            tried.append(tried[-1] * (1 - self._apart(tried[-1])))
        some = known.thinned() if self.single else known
        lefts = np.stack([self._left(some, step) for step in tried])
        likely = np.argsort(lefts, axis=0)[:_LIKELY]
        starts = np.take_along_axis(np.stack(tried), likely, axis=0)
        if related is not None and not any(related(self.rounded(start)) for start in starts):
            return self.largest
        best, left = self.largest, self._left(known, self.largest)
        for start in starts:
            refined = self.refined(known, start)
            best, left = self._better(known, best, left, refined)
        if self.single:
            return best
        return np.where(enough, best, self.largest)

    def _apart(self, step: Array) -> Array:
        """How far steps to try are from each other, in steps."""
        spacing = _SPACING / 2 if self.single else _SPACING
        return np.asarray(np.minimum(spacing * step / self.typical, 0.05))

    def refined(self, known: Equations, best: Array) -> Array:
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
        self, known: Equations, best: Array, left: Array, step: Array
    ) -> tuple[Array, Array]:
        step = np.asarray(step, np.float32)
        now = self._left(known, step)
        allowed = (step >= 0.99 * self.least) & (step <= 1.05 * self.largest)
        take = allowed & (now < left)
        return np.where(take, step, best), np.where(take, now, left)

    def _left(self, known: Equations, step: Array) -> Array:
        left = squares(known.rest(self.rounded(step)))
        return left.sum(keepdims=True) if self.single else left


def grid_of(
    known: Equations,
    every: Equations,
    weights: Array,
    operand: Array,
    related: Callable[[Grid], bool],
) -> Grid | None:
    """The 8-bit grid of an operand that explains most of what is known, with these weights.

    ``every`` is asked where the range ends, since few values are beyond it; ``related``, whether a
    grid that does so roughly is worth more.
    """
    search = _Search(known.thinned(), weights, operand)
    if not (0 < search.span < math.inf) or known.known().sum() < 2 * EQUATIONS:
        return None
    search.everywhere()
    if search.left == math.inf or not related(search.best):
        return None
    search.asks(known)
    search.less_at_both_ends()
    search.one_end_apart()
    search.nearby()
    search.solved()
    # Where few values are beyond it, the end of the range that the operand itself has does as well.
    best = search.best
    ends = (*search.lows(best.step), best.low)
    ranges = [Grid(best.step, low, low + 255) for low in ends]
    lefts = [float(squares(every.rest(weights, grid)).sum()) for grid in ranges]
    return ranges[next(i for i, left in enumerate(lefts) if left <= _ALIKE * min(lefts))]


class _Search:
    """The best grid of an operand so far, and ways to look for a better one.

    Attributes:
        least, most: the operand's range, with zero in it.
        span: the step of 8 bits that clips nothing.
        best: the grid that leaves least.
        left: what it leaves; infinite as long as there is none.
    """

    def __init__(self, known: Equations, weights: Array, operand: Array) -> None:
        self._known, self._weights = known, weights
        self._multiplied = known.multiplied(weights)
        self.least, self.most = min(float(operand.min()), 0.0), max(float(operand.max()), 0.0)
        self.span = (self.most - self.least) / 255
        self.best, self.left = Grid(self.span, 0, 0), math.inf
        self._inner = np.quantile(operand, (_BEYOND / 2, 1 - _BEYOND / 2))
        inside = np.clip(known.x, *self._inner)
        self._sorted = np.sort(known.x, axis=None)
        self._typical = float(np.sqrt(np.square(inside).mean())) or self.span

    def _attempt(self, step: float, lows: Iterable[int]) -> None:
        for low in lows:
            grid = Grid(float(np.float32(step)), low, low + 255)
            if self._outside((grid.low - 1) * step, (grid.high + 1) * step) > _BEYOND:
                continue
            now = float(squares(self._known.rest(self._multiplied, grid, ready=True)).sum())
            if now < self.left:
                self.best, self.left = grid, now

    def _outside(self, low: float, high: float) -> float:
        """The part of the operand's values that is beyond a range."""
        values = self._sorted  # which makes it two look-ups
        first = int(values.searchsorted(values.dtype.type(low), "left"))
        last = int(values.searchsorted(values.dtype.type(high), "right"))
        return (first + len(values) - last) / len(values)

    def asks(self, known: Equations) -> None:
        """Goes on with other equations."""
        self._known, self._sorted = known, np.sort(known.x, axis=None)
        self.left = float(squares(known.rest(self._weights, self.best)).sum())

    def _apart(self, step: float) -> float:
        """How far a step to try is from the next, in steps."""
        return min(_SPACING * step / self._typical, 0.05)

    def lows(self, step: float) -> list[int]:
        """Where likely ranges begin: with or at the operand's ends, within them, or symmetric."""
        first, last = round(self.least / step), round(self.most / step)
        found = [max(first, -255)]
        if last - first > 255:
            found += (min(last - 255, 0), round(first * 255 / (last - first)))
        if self.least < 0 or last > 127:
            found.append(-128)
        return [low for low in found if -255 <= low <= 0]

    def everywhere(self) -> None:
        """All steps, with the likely ranges."""
        step = max(_LEAST * self.span, float(np.ptp(np.append(self._inner, 0))) / 255)
        while step < _MOST * self.span:
            self._attempt(step, self.lows(step))
            step *= 1 + self._apart(step)

    def less_at_both_ends(self) -> None:
        """One end of the range anywhere within the operand's."""
        for part in np.tile(np.linspace(0, 1, _FINE + 1), 2):
            low, high = self.best.step * self.best.low, self.best.step * self.best.high
            for first, last in ((part * self.least, high), (low, part * self.most)):
                if last > first:
                    step = float(last - first) / 255
                    self._attempt(step, (_low(float(first) / step),))

    def one_end_apart(self) -> None:
        """One end of the range stays where it is, the other one moves a little."""
        for _ in range(2):
            around = self.best
            for way in np.arange(-0.15, 0.15, self._apart(around.step)):
                ends = (around.low / (1 + way), round(around.high / (1 + way)) - 255)
                self._attempt(around.step * (1 + way), {_low(end) for end in ends})

    def nearby(self) -> None:
        """Steps near the best, then all ranges."""
        for part in (1.0, 0.15, 0.02):
            around, apart = self.best, part * self._apart(self.best.step)
            for way in np.linspace(-apart, apart, _FINE):
                self._attempt(around.step * (1 + way), (around.low,))
            self._attempt(self.best.step, range(-255, 1, 8))
            low = self.best.low
            self._attempt(self.best.step, range(max(low - 8, -255), min(low + 9, 1)))

    def solved(self) -> None:
        """The step for which the integers of the best grid give the result."""
        known = self._known
        for _ in range(4):
            best = self.best
            integers = np.clip(np.rint(known.x / np.float32(best.step)), best.low, best.high)
            given = known.weight * (integers @ self._weights)
            square = float(np.square(given).sum())
            if square:
                product = float((given * known.weight * known.result).sum())
                self._attempt(product / square, (best.low,))


def _low(value: float) -> int:
    """The nearest beginning of a range of 8 bits with zero in it."""
    return min(max(round(value), -255), 0)
