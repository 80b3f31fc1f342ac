"""What was measured survives: a cut line, another model, a changed photograph."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from auditor.errors import UsageError
from auditor.pipeline.sysnoise.checkpoint import Checkpoint

CELLS = {"training": (0.0, 0.0, 3, [1.0]), "a": (1.0, math.inf, 4, None), "b": "refused"}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.jsonl"
    checkpoint = Checkpoint(path, {"model": "x"})
    checkpoint.add("1.jpg", b"one", CELLS)
    checkpoint.add("2.jpg", b"two", CELLS)
    checkpoint.close(finished=False)
    return path


def test_what_was_measured_is_found_again(written: Path) -> None:
    found = Checkpoint(written, {"model": "x"})
    assert found.reused == 2
    assert found.known("1.jpg", b"one") == CELLS
    assert found.known("1.jpg", b"another photograph") == {}
    found.close(finished=True)
    assert not written.exists()


def test_a_line_that_was_cut_is_measured_again(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-20])
    found = Checkpoint(written, {"model": "x"})
    assert found.reused == 1 and found.known("2.jpg", b"two") == {}
    found.add("2.jpg", b"two", CELLS)
    found.close(finished=False)
    assert Checkpoint(written, {"model": "x"}).known("2.jpg", b"two") == CELLS


def test_another_model_begins_anew(written: Path) -> None:
    assert Checkpoint(written, {"model": "y"}).reused == 0
    assert Checkpoint(written, {"model": "x"}).reused == 0


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        Checkpoint(tmp_path / "file" / "sweep.jsonl", {})
