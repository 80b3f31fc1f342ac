"""What changed from one report to another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from jsonschema import Draft202012Validator

from auditor.diff import compare
from auditor.records.backend import Gap
from auditor.records.model import Machine
from auditor.records.report import AuditReport
from reports import json_v1
from tests.helpers import ROOT, closed, scaled
from tests.helpers import audit_in as audit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two other exports of it, and a report of each."""
    folder = tmp_path_factory.mktemp("reports")
    onnx.save(scaled(1.0), folder / "m.onnx")
    plain = audit(folder, "m.onnx", "--backends", "ort", "-o", "clean.json")
    assert plain.returncode == 0, plain.stderr
    for name, weight in (("off", 1.01), ("far", 1.1)):
        onnx.save(scaled(weight), folder / f"{name}.onnx")
        done = audit(
            folder,
            *("m.onnx", "--candidate", f"{name}.onnx", "--backends", "ort"),
            *("-o", f"{name}.json", "--no-confirm"),
        )
        assert done.returncode == 1, done.stderr
    return folder


def loaded(folder: Path, name: str) -> AuditReport:
    return json_v1.load(folder / f"{name}.json")


@pytest.mark.parametrize(
    ("old", "new", "trend", "regressed"),
    [
        ("clean", "off", "new", True),
        ("off", "far", "worse", True),
        ("far", "off", "better", False),
        ("off", "clean", "gone", False),
        ("off", "off", "same", False),
    ],
)
def test_trends(folder: Path, old: str, new: str, trend: str, regressed: bool) -> None:
    found = compare(loaded(folder, old), loaded(folder, new), old, new)
    assert [change.trend for change in found.findings] == [trend]
    assert bool(found.regressions) == regressed
    assert any("compiled" in sentence for sentence in found.incomparable) == (old != new)


def test_what_does_not_matter_is_no_change(folder: Path) -> None:
    report = loaded(folder, "clean")
    (backend,) = report.backends
    (output,) = backend.outputs
    moved = replace(output, distance=replace(output.distance, relative_l2=9e-5))
    other = replace(report, backends=(replace(backend, outputs=(moved,)),))
    assert compare(report, other, "a", "b").regressions == ()
    moved = replace(output, distance=replace(output.distance, relative_l2=2e-4))
    other = replace(report, backends=(replace(backend, outputs=(moved,)),))
    assert len(compare(report, other, "a", "b").regressions) == 1


def test_a_lost_backend_is_a_regression(folder: Path) -> None:
    report = loaded(folder, "clean")
    (backend,) = report.backends
    gone = replace(report, backends=())
    failed = replace(backend, status="gap", gap=Gap("ort", "build", "crashed"), outputs=())
    for other in (gone, replace(report, backends=(failed,))):
        (broken,) = compare(report, other, "a", "b").regressions
        assert "not compared any more" in broken.sentence


def test_versions_options_and_kernels_are_named(folder: Path) -> None:
    report = loaded(folder, "clean")
    (backend,) = report.backends
    assert backend.provenance
    kernels = tuple(replace(k, primitive="another") for k in backend.provenance.kernels)
    upgraded = replace(
        backend.provenance, version="9.9", options={"level": "basic"}, kernels=kernels
    )
    other = replace(report, backends=(replace(backend, provenance=upgraded),))
    said = " ".join(compare(report, other, "a", "b").provenance)
    assert "→ 9.9" in said
    assert "level: all → basic" in said
    assert "nodes run in another kernel" in said


def test_the_command(folder: Path) -> None:
    worse = audit(folder, "diff", "clean.json", "off.json")
    assert (worse.returncode, worse.stderr) == (1, "")
    assert "1 regression" in worse.stdout or "2 regressions" in worse.stdout
    assert "first" in worse.stdout
    better = audit(folder, "diff", "off.json", "clean.json", "--format", "json", "-o", "diff.json")
    assert (better.returncode, better.stdout) == (0, "")
    document = json.loads((folder / "diff.json").read_text())
    assert document["format"] == "audit-diff/1"
    assert document["findings"][0]["trend"] == "gone"
    assert audit(folder, "diff", "clean.json", "off.json", "--format", "json", "-o", "worse.json")
    schema = json.loads((ROOT / "reports" / "diff_v1.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    for text in ("diff.json", "worse.json"):
        document = json.loads((folder / text).read_text())
        Draft202012Validator(closed(schema)).validate(document)
        for key in document:
            without = {name: value for name, value in document.items() if name != key}
            assert not Draft202012Validator(schema).is_valid(without)


def test_bad_input(folder: Path) -> None:
    done = audit(folder, "diff", "clean.json", "none.json")
    assert done.returncode == 2
    assert "none.json" in done.stderr and "Traceback" not in done.stderr


def test_another_machine_and_other_inputs_are_named(folder: Path) -> None:
    report = json_v1.load(folder / "clean.json")
    old = Machine("one", ("avx2", "fma"), 2, "Linux", "3.11")
    new = Machine("two", ("avx2", "amx_bf16", "fma"), 2, "Linux", "3.11")
    before = replace(report, machine=old, stimulus=replace(report.stimulus, sha256="a"))
    after = replace(report, machine=new, threads=4, stimulus=replace(report.stimulus, sha256="b"))
    found = compare(before, after, "a", "b")
    said = " ".join(found.provenance)
    assert "CPU with amx_bf16" in said and "cpu: one → two" in said
    assert "threads: the engines' own → 4" in said
    assert "The inputs' values are others." in found.incomparable
    assert not compare(before, before, "a", "b").provenance
