"""A short run of the fuzzer: ``run.py`` beside this file has the long one."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fuzz import run

COUNT = {"audit": 40, "graph": 16, "trace": 30, "report": 30}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "made"
    run.prepare(folder)
    return folder


@pytest.mark.parametrize("target", run.TARGETS)
def test_damaged_files_are_refused_in_one_message(target, made):
    half = COUNT.get(target, 150) // 2
    with ThreadPoolExecutor(2) as pool:  # one child's analysis beside the other's engines
        both = pool.map(lambda first: run.trial(target, first, half, made), (0, half))
        results = {seed: result for part in both for seed, result in part.items()}
    wrong = {s: r for s, r in results.items() if r not in ("loaded", "refused")}
    assert wrong == {}
    assert set(results.values()) == {"loaded", "refused"}  # or it damages too much, or nothing
