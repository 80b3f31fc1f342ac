"""Distances: the mathematics, and what may not be compared."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from auditor.comparison import metrics

floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=6),
    elements=st.floats(-1e3, 1e3, width=32),
)


@given(floats, st.randoms(use_true_random=False))
def test_distance_is_the_textbook_formula(reference, random):
    noise = np.asarray([random.uniform(-1, 1) for _ in range(reference.size)], np.float32)
    observed = reference + noise.reshape(reference.shape)
    found = metrics.distance(observed, reference)
    error = observed.astype(np.float64) - reference.astype(np.float64)
    norm = np.linalg.norm(reference.astype(np.float64))
    norm = norm or np.linalg.norm(observed.astype(np.float64))
    expected = np.linalg.norm(error) / norm if norm else 0.0
    assert found.relative_l2 == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert found.max_abs == pytest.approx(np.max(np.abs(error)), rel=1e-3, abs=1e-4)
    if 0 < found.relative_l2 < math.inf:
        assert found.sqnr_db == pytest.approx(-20 * math.log10(found.relative_l2))


@given(floats)
def test_equal_tensors_have_no_distance(values):
    found = metrics.distance(values.copy(), values)
    assert (found.relative_l2, found.max_abs, found.cosine) == (0.0, 0.0, 1.0)
    assert found.sqnr_db == math.inf


@given(st.lists(floats, min_size=1, max_size=4))
def test_moments_over_samples_equal_moments_of_the_concatenation(samples):
    running = metrics.Moments()
    for values in samples:
        running.add(values + np.float32(0.5), values)
    whole = np.concatenate([v.ravel() for v in samples])
    once = metrics.distance(whole + np.float32(0.5), whole)
    assert running.distance().relative_l2 == pytest.approx(once.relative_l2, rel=1e-3)


def test_a_different_shape_is_infinitely_far_and_says_so():
    found = metrics.distance(np.zeros((1, 10), np.float32), np.zeros((1, 9), np.float32))
    assert found.relative_l2 == math.inf
    assert found.mismatch == "shape 1x10 instead of 1x9"


def test_values_that_are_not_finite_on_both_sides_agree():
    a = np.asarray([np.nan, np.inf, 1.0], np.float32)
    assert metrics.distance(a, a.copy()).relative_l2 == 0.0


def test_values_that_are_not_finite_on_one_side_are_a_mismatch():
    found = metrics.distance(
        np.asarray([np.nan, 1.0], np.float32), np.asarray([0.0, 1.0], np.float32)
    )
    assert found.relative_l2 == math.inf
    assert "1 of 2 values" in (found.mismatch or "")


def test_huge_and_tiny_values_do_not_overflow():
    for scale in (3e38, 1e-40):
        values = np.full(4, scale, np.float32)
        found = metrics.distance(values * np.float32(0.5), values)
        assert found.relative_l2 == pytest.approx(0.5, rel=1e-3)


def test_integers_and_booleans_compare_exactly():
    big = np.asarray([2**53 + 1, 0], np.int64)
    assert metrics.distance(big, big).relative_l2 == 0.0
    assert metrics.distance(np.asarray([True, False]), np.asarray([True, True])).relative_l2 > 0


def test_every_output_counts_by_its_own_scale():
    reference = {"boxes": np.full(4, 300.0, np.float32), "scores": np.full(4, 0.5, np.float32)}
    observed = reference | {"scores": np.full(4, 0.55, np.float32)}
    found = metrics.relative_l2(observed, reference, ("boxes", "scores"))
    assert found == pytest.approx(0.1 / math.sqrt(2), rel=1e-3)


@given(floats.filter(lambda v: float(np.abs(v).max()) > 1e-2))
def test_projections_of_parts_sum_to_one(whole):
    reference = {"y": np.ones_like(whole)}
    first = {"y": whole * np.float32(0.3)}
    second = {"y": whole - first["y"]}
    shares = [metrics.projection(p, {"y": whole}, reference, ("y",)) for p in (first, second)]
    assert sum(shares) == pytest.approx(1.0, rel=1e-4)


def test_bit_identity_counts_elements():
    a = np.asarray([1.0, 2.0, np.nan, 4.0], np.float32)
    assert metrics.bit_identical(a, np.asarray([1.0, 2.5, np.nan, 4.0], np.float32)) == 0.75


def test_bitwise_equality_sees_the_sign_of_zero_and_the_type():
    zero = {"y": np.asarray([0.0], np.float32)}
    assert metrics.bitwise_equal(zero, {"y": np.asarray([0.0], np.float32)})
    assert not metrics.bitwise_equal(zero, {"y": np.asarray([-0.0], np.float32)})
    assert not metrics.bitwise_equal(zero, {"y": np.asarray([0.0], np.float64)})


@given(floats)
def test_the_histogram_counts_every_element_once(values):
    assert sum(metrics.histogram(values + np.float32(1e-3), values)) == values.size


def test_the_histogram_puts_an_error_into_its_bin():
    reference = np.ones(10, np.float32)
    counts = metrics.histogram(reference * np.float32(1.01), reference)
    at = counts.index(10)
    assert metrics.HISTOGRAM_EDGES[at] <= math.log10(0.01) < metrics.HISTOGRAM_EDGES[at + 1]


def test_a_tensor_larger_than_a_block_is_compared_as_a_whole():
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((3, 5, 7001)).astype(np.float32)  # not a whole number
    observed = reference.copy()
    observed[2, 4, 6000:] += np.float32(0.5)  # in the last block only
    error = np.linalg.norm((observed - reference).astype(np.float64).ravel())
    expected = error / np.linalg.norm(reference.astype(np.float64).ravel())
    assert metrics.distance(observed, reference).relative_l2 == pytest.approx(expected, rel=1e-5)
    assert metrics.distance(observed, reference).max_abs == pytest.approx(0.5, rel=1e-5)
    assert metrics.bit_identical(observed, reference) == 1 - 1001 / reference.size
    assert not metrics.bitwise_equal({"y": observed}, {"y": reference})
    assert metrics.bitwise_equal({"y": reference.T.copy().T}, {"y": reference})  # another order
    counts = metrics.histogram(observed, reference)
    assert (sum(counts), counts[0]) == (reference.size, reference.size - 1001)


def test_values_that_are_not_finite_are_counted_over_all_blocks():
    reference = np.ones(100_000, np.float32)
    observed = reference.copy()
    observed[[0, 50_000, 99_999]] = (np.nan, np.inf, -np.inf)
    found = metrics.distance(observed, reference)
    assert found.mismatch == "3 of 100000 values are NaN or infinite on one side only"
    assert metrics.distance(observed, observed.copy()).relative_l2 == 0.0
    assert metrics.bit_identical(observed, observed.copy()) == 1.0


def test_concentration_finds_the_one_bad_token():
    reference = np.ones((1, 64, 16), np.float32)
    observed = reference + np.float32(1e-3)
    observed[0, 17] += 1
    found = metrics.concentration(observed, reference)
    assert found is not None
    assert (found.axis, found.index) == (1, 17)
    assert found.share > 0.9


def test_concentration_is_silent_on_an_even_error():
    reference = np.ones((1, 64, 16), np.float32)
    assert metrics.concentration(reference + np.float32(1e-3), reference) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_a_running_mean_is_the_mean(values):
    running = metrics.Running()
    for sample, value in enumerate(values):
        running.add(value, sample)
    spread = running.spread()
    assert spread.samples == len(values)
    assert spread.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert spread.deviation == pytest.approx(np.std(values), rel=1e-6, abs=1e-5)
    assert (spread.low, spread.low_at) == (min(values), values.index(min(values)))
    assert (spread.high, spread.high_at) == (max(values), values.index(max(values)))


def test_an_infinite_value_makes_the_mean_infinite_and_keeps_the_smallest():
    running = metrics.Running()
    for sample, value in enumerate([1.0, math.inf, 2.0]):
        running.add(value, sample)
    spread = running.spread()
    assert (spread.mean, spread.low, spread.high, spread.high_at) == (math.inf, 1.0, math.inf, 1)
    assert metrics.Running().spread() is None
    with pytest.raises(ValueError, match="numbers"):
        running.add(math.nan, 3)


@given(st.lists(floats, min_size=2, max_size=4))
def test_merged_moments_are_those_of_all_samples(samples):
    together, merged = metrics.Moments(), metrics.Moments()
    for values in samples:
        together.add(values * np.float32(1.5), values)
        one = metrics.Moments()
        one.add(values * np.float32(1.5), values)
        merged.merge(one)
    assert merged.distance() == together.distance()


def test_steps_count_what_is_off_by_exactly_one():
    steps = metrics.Steps()
    steps.add(np.asarray([0, 1, 255, 3], np.uint8), np.asarray([1, 1, 0, 5], np.uint8))
    steps.add(np.asarray([-128, 127], np.int8), np.asarray([127, 126], np.int8))
    assert steps.fraction == pytest.approx(2 / 6)
    steps.add(np.ones(9, np.float32), np.zeros(9, np.float32))  # no integers
    steps.add(np.ones(9, np.int8), np.zeros(8, np.int8))  # another shape
    assert steps.fraction == pytest.approx(2 / 6)
    assert metrics.Steps().fraction is None


@pytest.mark.filterwarnings("error")
def test_scalars_at_both_ends_of_a_type_are_more_than_a_step_apart():
    steps = metrics.Steps()
    steps.add(np.array(2**31 - 1, np.int32), np.array(-(2**31), np.int32))
    assert steps.fraction == 0


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_steps_apart_are_representable_numbers(kind):
    one = np.array([1, -0.0, -2, np.nan], kind)
    assert metrics.steps_apart(one, one) == 0
    moved = np.array([np.nextafter(kind(1), kind(2)), 0, np.nextafter(kind(-2), kind(0)), np.nan])
    assert metrics.steps_apart(moved.astype(kind), one) == 1
    tiny = np.finfo(kind).smallest_subnormal
    assert metrics.steps_apart(np.array([tiny], kind), np.array([-tiny], kind)) == 2
    assert metrics.steps_apart(one[:2], one) == np.inf
    assert metrics.steps_apart(np.zeros(4, kind), one) == np.inf
    assert metrics.steps_apart(np.zeros(4), np.zeros(4, np.int32)) is None
