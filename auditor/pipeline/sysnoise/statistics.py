"""Means over photographs with bootstrap intervals.

Photographs are drawn with replacement (Efron, "Bootstrap methods: another look at the jackknife",
1979), the same draw for every option, so that differences between options and the maximum over
them have intervals of their own. Intervals are the 2.5 % and 97.5 % percentiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from auditor.ports import Array
from auditor.records.sysnoise import Interval

DRAWS = 1000
_LEVELS = (2.5, 97.5)
_AT_ONCE = 2_000_000  # weights drawn at a time


class Drawn:
    """Figures by column, and the same on every draw of photographs.

    Attributes:
        value: ``[columns]``; NaN where nothing was measured.
        draws: ``[draws, columns]``.
    """

    def __init__(self, value: Array, draws: Array) -> None:
        """Hold them."""
        self.value = value
        self.draws = draws

    def interval(self, column: int) -> Interval:
        """One column's mean."""
        return interval(self.value[column], self.draws[:, column])

    def mean(self, columns: list[int]) -> Interval:
        """The mean over columns; NaN ones are left out."""
        return interval(_mean(self.value[columns]), _mean(self.draws[:, columns]))

    def max(self, columns: list[int]) -> Interval:
        """The maximum over columns, chosen anew on every draw."""
        return interval(_max(self.value[columns]), _max(self.draws[:, columns]))

    def surplus(self, whole: int, parts: list[int]) -> Interval:
        """One column minus the sum of others."""
        with np.errstate(invalid="ignore"):
            value = self.value[whole] - self.value[parts].sum()
            draws = self.draws[:, whole] - self.draws[:, parts].sum(axis=1)
        return interval(value, draws)


class Means(Drawn):
    """The mean of each column, and the same on every draw."""

    def __init__(self, values: Array) -> None:
        """Draw.

        Args:
            values: float, ``[photographs, columns]``; NaN where a column was not measured.
        """
        measured = np.isfinite(values) | np.isinf(values)
        filled = np.where(measured, values, 0.0)
        counts = measured.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinities that a draw leaves out
            parts = [
                _ratio(_product(drawn, filled), drawn @ counts) for drawn in weights(len(values))
            ]
        super().__init__(_ratio(filled.sum(axis=0), counts.sum(axis=0)), np.concatenate(parts))


def weights(photos: int, draws: int = DRAWS) -> Iterator[Array]:
    """How often each photograph is in each draw, ``[some draws, photographs]`` at a time.

    Equal numbers of photographs give the same draws.
    """
    rng = np.random.default_rng(0)
    step = max(1, _AT_ONCE // max(photos, 1))
    for begin in range(0, draws, step):
        size = min(step, draws - begin)
        yield rng.multinomial(photos, np.full(photos, 1 / photos), size).astype(float)


def interval(value: Array | float, draws: Array) -> Interval:
    """The interval that draws give; the value itself where there is nothing finite to draw."""
    value = float(value)
    finite = draws[np.isfinite(draws)]
    if not np.isfinite(value) or finite.size == 0:
        return Interval(value, value, value)
    low, high = np.percentile(finite, _LEVELS)
    return Interval(value, float(low), float(high))


def _product(weights: Array, values: Array) -> Array:
    """``weights @ values`` where 0 · ∞ is 0."""
    finite = np.isfinite(values)
    result: Array = weights @ np.where(finite, values, 0.0)
    if not finite.all():
        result[(weights @ ~finite) > 0] = np.inf
    return result


def _ratio(above: Array, below: Array) -> Array:
    result = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result


def _mean(values: Array) -> Array:
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def _max(values: Array) -> Array:
    highest: Array = np.where(np.isnan(values), -np.inf, values).max(axis=-1)
    return np.where(np.isneginf(highest), np.nan, highest)
