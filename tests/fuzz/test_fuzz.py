"""A short run of the fuzzer: ``run.py`` beside this file has the long one."""

import pytest

from tests.fuzz import run

COUNT = {"audit": 60, "trace": 40, "report": 40}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "made"
    run.prepare(folder)
    return folder


@pytest.mark.parametrize("target", run.TARGETS)
def test_damaged_files_are_refused_in_one_message(target, made):
    results = run.trial(target, 0, COUNT.get(target, 150), made)
    wrong = {s: r for s, r in results.items() if r not in ("loaded", "refused")}
    assert wrong == {}
    assert set(results.values()) == {"loaded", "refused"}  # or it damages too much, or nothing
