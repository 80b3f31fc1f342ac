"""The JSON report: strict, published by a schema, and complete."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import reports as package
from auditor.errors import UsageError
from auditor.records import AuditReport, Distance, OutputDistance
from reports import json_v1

_SCHEMA: dict[str, Any] = json.loads(
    (Path(package.__file__).parent / "report_v1.schema.json").read_text(encoding="utf-8")
)
_VALIDATOR = Draft202012Validator(_SCHEMA)

# The keys that issue-level readers rely on, as paths; [] is every element of a list.
_PROMISED = """
schema_version tool.name tool.version model.path model.sha256 model.opset model.nodes
stimulus.kind stimulus.samples stimulus.seed reference.engine reference.precision
backends[].id backends[].device backends[].status backends[].gap backends[].provenance
backends[].fidelity backends[].outputs backends[].categories backends[].unexplained_share
backends[].segments backends[].outputs[].name backends[].outputs[].relative_l2
backends[].outputs[].max_abs backends[].outputs[].sqnr_db backends[].outputs[].cosine
backends[].categories[].noise backends[].categories[].stage backends[].categories[].share
backends[].segments[].id backends[].segments[].nodes backends[].segments[].op_types
backends[].segments[].outputs backends[].segments[].kernel backends[].segments[].precision
backends[].segments[].accumulated backends[].segments[].introduced
backends[].segments[].inherited backends[].segments[].amplification
backends[].segments[].leave_one_in backends[].segments[].impact_share
backends[].segments[].floor backends[].segments[].noise backends[].segments[].explained
backends[].segments[].bit_identical findings[].rank findings[].backend findings[].segment
findings[].nodes findings[].noise findings[].stage findings[].leave_one_in
findings[].impact_share findings[].introduced findings[].explained findings[].severity
findings[].confidence findings[].evidence findings[].remedy gaps verdict exit_code timing
""".split()


def _closed(schema: Any) -> Any:
    """The schema with every object closed, to find keys that it does not describe."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed["additionalProperties"] = False
    return closed


def _remove(data: Any, steps: list[str]) -> None:
    """Delete the key at a path from its first holder."""
    for step in steps[:-1]:
        name = step.removesuffix("[]")
        data = data[name]
        if step.endswith("[]"):
            data = next(item for item in data if _holds(item, steps[steps.index(step) + 1]))
    del data[steps[-1]]


def _holds(item: dict[str, Any], step: str) -> bool:
    return bool(item[step.removesuffix("[]")]) if step.endswith("[]") else step in item


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_report_survives_writing_and_reading(
    reports: st.SearchStrategy[AuditReport], data: st.DataObject
) -> None:
    report = data.draw(reports)
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
        )
        for b in report.backends
    )
    stimulus = replace(report.stimulus, shapes=dict(sorted(report.stimulus.shapes.items())))
    timing = dict(sorted(report.timing.items()))
    return repr(replace(report, backends=backends, stimulus=stimulus, timing=timing))


def test_real_figures_survive(report: AuditReport) -> None:
    assert json_v1.load(json.loads(json.dumps(json_v1.dump(report)))) == report


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(_SCHEMA)


def test_every_key_written_is_described(report: AuditReport) -> None:
    strict = Draft202012Validator(_closed(_SCHEMA))
    assert [e.message for e in strict.iter_errors(json_v1.dump(report))] == []


def test_the_closed_schema_notices_an_undescribed_key(report: AuditReport) -> None:
    data: dict[str, Any] = json_v1.dump(report)
    data["backends"][0]["segments"][0]["surprise"] = 1
    assert not Draft202012Validator(_closed(_SCHEMA)).is_valid(data)
    assert _VALIDATOR.is_valid(data)  # readers must ignore what they do not know


@pytest.mark.parametrize("path", _PROMISED)
def test_the_schema_requires_every_promised_key(report: AuditReport, path: str) -> None:
    data = json.loads(json.dumps(json_v1.dump(report)))
    assert _VALIDATOR.is_valid(data)
    _remove(data, path.split("."))
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
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        json_v1.load(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("none.json: No such file")):
        json_v1.load(tmp_path / "none.json")


def test_a_file_is_read(tmp_path: Path, report: AuditReport) -> None:
    file = tmp_path / "report.json"
    file.write_text(json_v1.RENDERER.render(report, width=None, color=False), encoding="utf-8")
    assert json_v1.load(file) == report
