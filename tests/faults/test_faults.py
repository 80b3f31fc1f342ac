"""A short, seeded part of ``run.py``: every kind of fault, at drawn stages of two engines."""

from __future__ import annotations

import random

import pytest

from tests.faults import run

SEED = 8
# As long as --timeout, much memory, or like others here: `run.py` has them all.
LEFT_OUT = (
    "hang",
    "flood",
    "SIGILL",
    "SIGFPE",
    "SIGBUS",
    "memory",
    "wrong answer",
    "exit",
    "SIGTERM",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> run.Bench:
    return run.Bench(tmp_path_factory.mktemp("faults"))


def drawn() -> list[run.Case]:
    """One case of each kind."""
    draw = random.Random(SEED)
    found = run.cases(draw, ("ort", "ov"))
    kinds = [kind for kind in (*run.KINDS, *run.OUTSIDE) if kind not in LEFT_OUT]
    return [draw.choice([case for case in found if case.kind == kind]) for kind in kinds]


@pytest.fixture(scope="module")
def missing() -> dict[str, str]:
    return run.possible()


@pytest.mark.parametrize("case", drawn(), ids=str)
def test_a_fault_costs_its_backend_only(
    bench: run.Bench, case: run.Case, missing: dict[str, str]
) -> None:
    if case.kind in missing:
        pytest.skip(missing[case.kind])
    assert run.wrong(case, bench.sound(case), bench.audit(case, case)) == []
