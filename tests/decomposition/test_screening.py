"""Of many segments, those whose errors matter most are followed, at the price of few."""

from __future__ import annotations

import numpy as np

from auditor.decomposition.screening import Screening


def followed(kinds: list[str], sizes: list[float], effects: list[float], most: int) -> list[int]:
    screening, found = Screening(kinds, sizes, most), list[int]()
    while chosen := screening.more():
        found += chosen
        for position in chosen:
            screening.add(position, effects[position])
    return found


def test_the_largest_effects_are_among_those_followed() -> None:
    rng = np.random.default_rng(0)
    place = np.linspace(0, 3, 900)
    for _ in range(5):
        sizes = np.exp(rng.normal(0, 0.6, 900))
        kinds = ["a", "b", "b"] * 300  # of which less arrives the deeper they lie
        gains = np.where([k == "a" for k in kinds], 1e-2, 3e-4) * np.exp(-place)
        effects = sizes * gains * np.exp(rng.normal(0, 0.1, 900))
        found = followed(kinds, sizes.tolist(), effects.tolist(), 64)
        assert len(found) == len(set(found)) == 64
        assert set(np.argsort(-effects)[:10].tolist()) <= set(found)
        assert not set(np.argsort(-effects)[:10].tolist()) <= set(np.argsort(-sizes)[:64].tolist())


def test_what_is_not_finite_is_followed_first_and_nothing_twice() -> None:
    sizes = [1.0, np.nan, 1.0, np.inf, 0.0, 1.0]
    found = followed(["a"] * 6, sizes, [np.inf, np.inf, 0.0, np.inf, 0.0, 1.0], 10)
    assert found[:2] == [1, 3]
    assert sorted(found) == list(range(6))
