"""Pictures: which part of a tensor is shown, and what becomes of its numbers."""

from __future__ import annotations

import numpy as np
import pytest

from auditor.comparison.pictures import SIDE, picture
from auditor.ports import Array
from auditor.records.measured import Picture


def made(observed: Array, replayed: Array, reference: Array) -> Picture:
    found = picture("t", 2, observed, replayed, reference)
    assert found is not None
    return found


def levels(data: bytes, shape: tuple[int, ...]) -> Array:
    return np.frombuffer(data, np.uint8).reshape(shape)


def test_the_channel_with_the_largest_error_of_its_own_is_shown() -> None:
    reference = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(np.float32)
    replayed = reference.copy()
    replayed[0, 1] += 9  # inherited: farther from the reference, and not this segment's doing
    observed = replayed.copy()
    observed[1, 3, 2, 4] -= 0.5
    observed[0, 0, 0, 0] += 0.1
    found = made(observed, replayed, reference)
    assert (found.tensor, found.sample, found.plane) == ("t", 2, "[1, 3, :, :]")
    assert found.size == found.cells == (6, 7)
    assert found.most_introduced == pytest.approx(0.5)
    introduced = levels(found.introduced, (6, 7))
    assert introduced[2, 4] == 1 and np.count_nonzero(introduced != 128) == 1
    shown = reference[1, 3]
    assert found.range == pytest.approx(
        (min(shown.min(), observed[1, 3].min()), max(shown.max(), observed[1, 3].max()))
    )
    back = found.range[0] + (levels(found.reference, (6, 7)) - 1.0) / 254 * np.ptp(found.range)
    np.testing.assert_allclose(back, shown, atol=0.51 * np.ptp(found.range) / 254)


def test_one_wrong_element_of_a_large_plane_still_shows() -> None:
    reference = np.zeros((1, 3, 301, 203), np.float32)
    observed = reference.copy()
    observed[0, 2, 300, 202] = 1e-3
    observed[0, 2, 0, 0] = -1e-3
    found = made(observed, reference, reference)
    assert found.size == (301, 203) and found.cells == (SIDE, SIDE)
    shown = levels(found.accumulated, found.cells)
    assert (shown[-1, -1], shown[0, 0]) == (255, 1)
    assert np.count_nonzero(shown != 128) == 2


@pytest.mark.parametrize(
    ("shape", "size", "cells", "plane"),
    [
        ((1, 64, 384), (64, 384), (40, 40), "[0, :, :]"),  # tokens and features
        ((8, 256), (8, 256), (8, 160), "[:, :]"),
        ((1, 1280, 1, 1), (1, 1280), (1, 160), "[0, :, 0, 0]"),
        ((1, 100), (1, 100), (1, 100), "[0, :]"),
    ],
)
def test_planes_of_other_tensors(
    shape: tuple[int, ...], size: tuple[int, int], cells: tuple[int, int], plane: str
) -> None:
    reference = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found = made(reference + 1, reference, reference)
    assert (found.size, found.cells, found.plane) == (size, cells, plane)
    for data in (found.reference, found.deployed, found.accumulated, found.introduced):
        assert len(data) == cells[0] * cells[1] <= SIDE * SIDE
    assert set(found.introduced) == {255}


def test_what_is_no_number_has_a_level_of_its_own() -> None:
    reference = np.array([[1, np.inf, 3], [4, 5, 6]], np.float32)
    observed = np.array([[1, np.inf, np.nan], [4, 5, 7]], np.float32)
    found = made(observed, reference, reference)
    assert found.range == (1, 7)
    assert list(found.deployed) == [1, 0, 0, 128, 170, 255]
    assert list(found.introduced) == [128, 0, 0, 128, 128, 255]


def test_integers_and_truth_values_are_numbers_too() -> None:
    found = made(np.array([[0, 255]], np.uint8), np.zeros((1, 2), np.uint8), np.zeros((1, 2)))
    assert found.most_introduced == 255 and list(found.deployed) == [1, 255]
    truth = np.array([True, False])
    assert list(made(truth, ~truth, ~truth).introduced) == [255, 1]


@pytest.mark.parametrize("shape", [(), (1, 1), (0, 3)])
def test_there_is_nothing_to_see_in_one_value(shape: tuple[int, ...]) -> None:
    assert picture("t", 0, np.ones(shape), np.zeros(shape), np.zeros(shape)) is None
    assert picture("t", 0, np.ones((2, 3)), np.zeros((3, 2)), np.zeros((3, 2))) is None
