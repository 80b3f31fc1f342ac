"""Attention with a mask that the export dropped, or added."""

from __future__ import annotations

import numpy as np
import pytest

from auditor.noises import export_attention_mask
from auditor.ports import Array, Arrays
from tests.segments import diagnose, make_segment, run

ATTENTION = "s = MatMul (q, k) t = Add (s, m) p = Softmax <axis = -1> (t) y = MatMul (p, v)"
BARE = ATTENTION.replace("t = Add (s, m) ", "").replace("(t)", "(s)")
SIZES = {"q": (2, 3, 4, 8), "k": (2, 3, 8, 6), "v": (2, 3, 6, 8)}  # two tokens are in caches


@pytest.fixture
def feeds() -> Arrays:
    drawn = np.random.default_rng(0)
    return {n: drawn.standard_normal(size, np.float32) for n, size in SIZES.items()}


def mask(seen: Array) -> Array:
    return np.where(seen, np.float32(0), np.float32(-1e30))


CAUSAL = mask(np.tri(4, 6, 2, dtype=bool))
PADDED = mask(np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)[:, None, None])


@pytest.mark.parametrize(
    ("exported", "theirs", "made", "form"),
    [
        (None, CAUSAL, ["y"], "no position sees a later one"),
        (None, PADDED, ["p", "y"], "keys to which the module gives no weight are masked"),
        (CAUSAL, np.zeros_like(CAUSAL), ["y"], "without the mask that the file adds"),
    ],
)
def test_another_mask_is_named(
    exported: Array | None, theirs: Array, made: list[str], form: str, feeds: Arrays
) -> None:
    shown = make_segment(ATTENTION, {"m": theirs}, outputs=made)
    observed = run(shown.model, feeds)
    held = {} if exported is None else {"m": exported}
    segment = make_segment(BARE if exported is None else ATTENTION, held, outputs=made)
    found = diagnose(segment, feeds, observed)
    assert found.noise == export_attention_mask.NOISE.id and (found.explained or 0) > 0.9999
    assert found.hypotheses[0].variant == form


def test_other_weights_than_a_mask_leaves_are_unexplained(feeds: Arrays) -> None:
    """Zeros as a mask makes them, but what is left was not shared out anew."""
    segment = make_segment(BARE, outputs=["p"])
    weights = run(segment.model, feeds)["p"] * (PADDED == 0)
    assert diagnose(segment, feeds, {"p": weights}).noise is None
