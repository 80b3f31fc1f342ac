"""The JSON report: strict, published by a schema, and complete."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import reports as package
from auditor.errors import UsageError
from auditor.records.measured import Distance, OutputDistance
from auditor.records.report import AuditReport
from reports import json_v1
from tests.helpers import closed

_SCHEMA: dict[str, Any] = json.loads(
    (Path(package.__file__).parent / "report_v1.schema.json").read_text(encoding="utf-8")
)
_VALIDATOR = Draft202012Validator(_SCHEMA)

# The keys that readers outside rely on, by where they are; [] is every element of a list.
_PROMISED = {
    "": (
        "schema_version tool model stimulus reference backends findings gaps verdict exit_code "
        "timing"
    ),
    "tool.": "name version",
    "model.": "path sha256 opset nodes",
    "stimulus.": "kind samples seed",
    "reference.": "engine precision",
    "backends[].": (
        "id device status gap provenance fidelity outputs categories unexplained_share segments"
    ),
    "backends[].gap.": "stage reason remedy",
    "backends[].provenance.": "version",
    "backends[].fidelity.": (
        "outputs_bitwise_equal program_unchanged candidates output_proved cone_proved perturbing"
    ),
    "backends[].outputs[].": "name relative_l2 max_abs sqnr_db cosine",
    "backends[].categories[].": "noise stage share",
    "backends[].segments[].": (
        "id nodes op_types outputs kernel precision accumulated introduced inherited "
        "amplification leave_one_in impact_share floor noise explained bit_identical"
    ),
    "findings[].": (
        "rank backend segment nodes noise stage leave_one_in impact_share introduced explained "
        "severity confidence evidence remedy"
    ),
}
_PATHS = [where + key for where, keys in _PROMISED.items() for key in keys.split()]


def _remove(data: Any, path: str) -> None:
    """Delete the key at a path from the first holder that has it."""
    *steps, last = path.split(".")
    holders = [data]
    for step in steps:
        found = [holder[step.removesuffix("[]")] for holder in holders]
        holders = [i for items in found for i in items] if step.endswith("[]") else found
        holders = [holder for holder in holders if holder is not None]
    del holders[0][last]


def test_any_report_survives_writing_and_reading(any_reports: tuple[AuditReport, ...]) -> None:
    for report in any_reports:
        text = json_v1.RENDERER.render(report, width=None, color=False)
        # By representation, in which NaN equals itself; key order of mappings is not kept.
        again = json_v1.load(json.loads(text))
        assert _sorted(again) == _sorted(report)
        assert not list(_VALIDATOR.iter_errors(json.loads(text)))


def _sorted(report: AuditReport) -> str:
    backends = tuple(
        replace(
            b,
            seconds=dict(sorted(b.seconds.items())),
            provenance=b.provenance
            and replace(b.provenance, options=dict(sorted(b.provenance.options.items()))),
            counterfactuals=tuple(
                replace(c, options=dict(sorted(c.options.items()))) for c in b.counterfactuals
            ),
        )
        for b in report.backends
    )
    stimulus = replace(report.stimulus, shapes=dict(sorted(report.stimulus.shapes.items())))
    timing = dict(sorted(report.timing.items()))
    pipeline = report.pipeline and replace(
        report.pipeline,
        training=dict(sorted(report.pipeline.training.items())),
        deployment=dict(sorted(report.pipeline.deployment.items())),
    )
    return repr(
        replace(report, backends=backends, stimulus=stimulus, timing=timing, pipeline=pipeline)
    )


def test_real_figures_survive(report: AuditReport) -> None:
    assert json_v1.load(json.loads(json.dumps(json_v1.dump(report)))) == report


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(_SCHEMA)


def test_every_key_written_is_described(report: AuditReport) -> None:
    strict = Draft202012Validator(closed(_SCHEMA))
    assert [e.message for e in strict.iter_errors(json_v1.dump(report))] == []


def test_the_closed_schema_notices_an_undescribed_key(report: AuditReport) -> None:
    data: dict[str, Any] = json_v1.dump(report)
    data["backends"][0]["segments"][0]["surprise"] = 1
    assert not Draft202012Validator(closed(_SCHEMA)).is_valid(data)
    assert _VALIDATOR.is_valid(data)  # readers must ignore what they do not know


@pytest.mark.parametrize("path", _PATHS)
def test_the_schema_requires_every_promised_key(report: AuditReport, path: str) -> None:
    data = json.loads(json.dumps(json_v1.dump(report)))
    assert _VALIDATOR.is_valid(data)
    _remove(data, path)
    assert not _VALIDATOR.is_valid(data)


def test_infinities_are_null_and_come_back(report: AuditReport) -> None:
    equal = OutputDistance("same", Distance(0.0, 0.0, math.inf, 1.0))
    unlike = OutputDistance(
        "shape", Distance(math.inf, math.inf, -math.inf, 0.0, "shape 1x2 instead of 1x3")
    )
    backend = replace(report.backends[0], outputs=(equal, unlike))
    report = replace(report, backends=(backend,))
    data: Any = json_v1.dump(report)
    first, second = data["backends"][0]["outputs"]
    assert (first["relative_l2"], first["sqnr_db"]) == (0.0, None)
    assert (second["relative_l2"], second["sqnr_db"]) == (None, None)
    assert second["mismatch"] == "shape 1x2 instead of 1x3"
    assert json_v1.load(data).backends[0].outputs == (equal, unlike)


def test_text_is_strict_ascii_json_in_a_stable_order(report: AuditReport) -> None:
    report = replace(report, model=replace(report.model, path="modèle\udc80.onnx"))
    text = json_v1.RENDERER.render(report, width=80, color=True)
    assert text.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    def ordered(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert [k for k, _ in pairs] == sorted(k for k, _ in pairs)
        return dict(pairs)

    json.loads(text, parse_constant=refuse, object_pairs_hook=ordered)
    assert text == json_v1.RENDERER.render(report, width=None, color=False)


def test_unknown_keys_are_ignored_and_keys_with_defaults_may_be_absent(
    report: AuditReport,
) -> None:
    data: Any = json_v1.dump(report)
    data["later"] = {"version": 1}
    del data["backends"][0]["input_control"], data["gaps"][0]["log"]
    assert json_v1.load(data).verdict == report.verdict


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("schema_version"), "no schema_version"),
        (lambda d: d.update(schema_version=2), "schema_version 2"),
        (lambda d: d.update(schema_version=True), "schema_version True"),
        (lambda d: d.pop("model"), "malformed at model"),
        (lambda d: d.update(verdict="maybe"), "verdict: expected one of pass, fail, incomplete"),
        (lambda d: d.update(exit_code=True), "exit_code: expected an integer"),
        (lambda d: d["tool"].pop("version"), "tool.version"),
        (lambda d: d["model"].update(nodes="many"), "model.nodes: expected an integer"),
        (
            lambda d: d["backends"][1].update(segments={}),
            r"backends\[1\].segments: expected a list",
        ),
        (
            lambda d: d["backends"][1]["segments"][3].pop("introduced"),
            r"backends\[1\].segments\[3\].introduced",
        ),
        (
            lambda d: d["backends"][1]["segments"][3].update(introduced="1e-3"),
            r"segments\[3\].introduced: expected a number",
        ),
        (
            lambda d: d["backends"][1]["segments"][0]["tensors"][0].update(
                reference_range=[1, 2, 3]
            ),
            "reference_range: expected two numbers",
        ),
        (
            lambda d: d["backends"][1]["segments"][0]["tensors"][0]["histogram"].append(1),
            "histogram_edges: expected one more than the counts",
        ),
        (lambda d: d["timing"].update(load=10**400), "timing.load: expected a finite number"),
    ],
)
def test_malformed_reports_are_refused_by_path(report: AuditReport, change: Any, said: str) -> None:
    data = json.loads(json.dumps(json_v1.dump(report)))
    change(data)
    with pytest.raises(UsageError, match=said) as caught:
        json_v1.load(data)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"[" * 200_000, "nested too deeply|is not JSON"),
        (b'{"schema_version": NaN}', "NaN is not a JSON number"),
        (b'{"schema_version": ' + b"1" * 5000 + b"}", "is not JSON|schema_version"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "no schema_version"),
        (b'"text"', "no schema_version"),
        (b'{"format": "sysnoise-table/1"}', "report.json is `sysnoise-table/1`"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        json_v1.load(file)
    assert str(file) in caught.value.message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("none.json: No such file")):
        json_v1.load(tmp_path / "none.json")


def test_a_file_is_read(tmp_path: Path, report: AuditReport) -> None:
    file = tmp_path / "report.json"
    file.write_text(json_v1.RENDERER.render(report, width=None, color=False), encoding="utf-8")
    assert json_v1.load(file) == report
