from __future__ import annotations

import numpy as np
import pytest

from auditor.noises import fp32_rounding


def test_jitter_moves_each_value_by_at_most_one_unit() -> None:
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    moved = fp32_rounding.jitter(x, np.random.default_rng(1))
    assert moved.dtype == np.float32
    step = np.abs(moved - x) / np.spacing(np.abs(x))
    assert 0.4 < np.mean(step > 0) < 1 and step.max() <= 3


def test_jitter_leaves_integers_and_non_finite_values() -> None:
    generator = np.random.default_rng(0)
    ids = np.arange(5)
    assert fp32_rounding.jitter(ids, generator) is ids
    odd = np.array([np.inf, -np.inf, np.nan, 0], np.float32)
    np.testing.assert_array_equal(fp32_rounding.jitter(odd, generator), odd)


@pytest.mark.parametrize(("moved", "expected"), [(0.0, 3e-6), (1e-6, 2e-5), (1e-3, 2e-2)])
def test_floor(moved: float, expected: float) -> None:
    assert fp32_rounding.floor(moved) == pytest.approx(expected)


def test_has_nothing_to_replay() -> None:
    assert fp32_rounding.NOISE.id == "implementation.fp32_rounding"
    assert not fp32_rounding.NOISE.stated_by(())


def test_scaling_moves_float32_by_its_last_bit_and_leaves_float16_alone() -> None:
    """One unit of float16, twenty times over, would hide sums kept in half precision."""
    wide = np.linspace(1, 2, 7, dtype=np.float32)
    moved = fp32_rounding.scaled(wide)
    assert 0 < np.max(np.abs(moved / wide - 1)) <= 2 * np.finfo(np.float32).eps
    half = wide.astype(np.float16)
    np.testing.assert_array_equal(fp32_rounding.scaled(half), half)


def test_masks_are_exact() -> None:
    mask = np.array([0, 1, 1, 0], np.float32)
    generator = np.random.default_rng(0)
    assert np.array_equal(fp32_rounding.jitter(mask, generator), mask)
    assert np.array_equal(fp32_rounding.scaled(mask), mask)
    assert not np.array_equal(fp32_rounding.scaled(mask + 1), mask + 1)
