"""Intervals: how often they hold the truth, and what they do with holes and infinities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from auditor.pipeline.sysnoise.statistics import Means


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Of 300 draws of 200 photographs that flip with a chance of 0.2: a 95 % interval."""
    rng = np.random.default_rng(1)
    flips = (rng.random((200, 300)) < 0.2).astype(float)
    means = Means(flips)
    held = sum(i.low <= 0.2 <= i.high for i in map(means.interval, range(300)))
    assert 0.90 <= held / 300 <= 0.99


def test_the_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(2).standard_normal((400, 1))
    found = Means(values).interval(0)
    assert found.value == pytest.approx(values.mean())
    expected = 2 * 1.96 * values.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def test_what_was_not_measured_does_not_count() -> None:
    values = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, np.nan], [np.nan, np.nan]])
    means = Means(values)
    assert means.interval(0).value == 3 and means.interval(1).value == 2
    assert means.mean([0, 1]).value == 2.5 and means.max([0, 1]).value == 3
    assert math.isnan(Means(np.full((3, 1), np.nan)).interval(0).value)


def test_a_difference_of_columns_is_taken_photograph_by_photograph() -> None:
    """Two options that flip the very same photographs differ by nothing, and surely so."""
    rng = np.random.default_rng(3)
    one = (rng.random(100) < 0.3).astype(float)
    means = Means(np.stack([one, one, np.zeros(100)], axis=1))
    surplus = means.surplus(0, [1, 2])
    assert (surplus.value, surplus.low, surplus.high) == (0, 0, 0)
    assert means.max([0, 1]).low >= means.mean([0, 2]).low


def test_infinity_stays_infinite_and_spares_the_other_columns() -> None:
    values = np.array([[1.0, 1.0], [math.inf, 2.0], [1.0, 3.0]])
    means = Means(values)
    assert math.isinf(means.interval(0).value)
    assert means.interval(1).value == 2 and math.isfinite(means.interval(1).high)


def test_many_photographs_are_drawn_in_parts() -> None:
    values = np.random.default_rng(4).random((5000, 3))
    found = Means(values)
    assert found.draws.shape == (1000, 3)
    assert found.interval(0).low < values[:, 0].mean() < found.interval(0).high
