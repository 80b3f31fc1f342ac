"""A fingerprint depends on the backend, the nodes and the cause, and on nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditor.verdict.fingerprint import fingerprint

_KEYS = st.lists(st.text(max_size=4), max_size=4)


@given(st.text(max_size=4), _KEYS, st.none() | st.text(max_size=4))
def test_it_does_not_depend_on_the_order_of_nodes(
    backend: str, keys: list[str], noise: str | None
) -> None:
    found = fingerprint(backend, keys, noise)
    assert re.fullmatch("[0-9a-f]{32}", found)
    assert found == fingerprint(backend, [*reversed(keys), *keys], noise)


@given(*[st.tuples(st.text(max_size=2), _KEYS, st.none() | st.text(max_size=2))] * 2)
def test_what_differs_has_another_fingerprint(
    one: tuple[str, list[str], str | None], other: tuple[str, list[str], str | None]
) -> None:
    same = (one[0], set(one[1]), one[2]) == (other[0], set(other[1]), other[2])
    assert (fingerprint(*one) == fingerprint(*other)) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ov", ["a,b"], None), ("ov", ["a", "b"], None)),
        (("ov", ["a"], None), ("ov", ["a"], "unexplained")),
        (("ov", ["a"], None), ("ov:GPU", ["a"], None)),
        (("ov", ["\ud800"], None), ("ov", ["\\ud800"], None)),
    ],
)
def test_parts_are_kept_apart(
    one: tuple[str, list[str], str | None], other: tuple[str, list[str], str | None]
) -> None:
    assert fingerprint(*one) != fingerprint(*other)


def test_it_stays_what_it_was() -> None:
    # Baselines and lists of accepted findings hold fingerprints: a change breaks them.
    assert fingerprint("ov", ["y", "x"], "precision.bf16") == "2a023c38175b764e72828b1e7ba69f49"
