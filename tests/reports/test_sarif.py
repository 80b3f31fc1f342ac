"""SARIF: valid, within what code scanning takes, and the same story as the report."""

from __future__ import annotations

import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from auditor.records.backend import Skipped
from auditor.records.measured import Distance, OutputDistance
from auditor.records.report import AuditReport
from reports import _words as words
from reports.sarif import RENDERER

_DATA = Path(__file__).parent.parent / "data" / "sarif"
_VALIDATOR = Draft202012Validator(
    json.loads((_DATA / "sarif-2.1.0.json").read_text(encoding="utf-8")),
    format_checker=Draft202012Validator.FORMAT_CHECKER,
)


def _log(report: AuditReport) -> dict[str, Any]:
    text = RENDERER.render(report, width=None, color=False)
    assert text.isascii()
    log: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    _VALIDATOR.validate(log)
    return log


def _run(report: AuditReport) -> dict[str, Any]:
    (run,) = _log(report)["runs"]
    return dict(run)


def _findings(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in run["results"] if result["ruleId"] != "divergence"]


def _messages(value: Any) -> list[str]:
    """Every plain text message of a log."""
    if isinstance(value, list):
        return [text for item in value for text in _messages(item)]
    if not isinstance(value, dict):
        return []
    own = [value["text"]] if set(value) == {"text"} else []
    return own + [text for item in value.values() for text in _messages(item)]


# --- the story -----------------------------------------------------------------------------------


def test_findings_are_results_in_their_order(report: AuditReport) -> None:
    run = _run(report)
    results = _findings(run)
    assert len(results) == len(report.findings)
    assert [r["rank"] for r in results] == sorted((r["rank"] for r in results), reverse=True)
    for result, finding in zip(results, report.findings, strict=True):
        rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
        assert rule["id"] == result["ruleId"] == (finding.noise or "unexplained")
        facts = result["properties"]
        assert (facts["rank"], facts["backend"]) == (finding.rank, finding.backend)
        assert facts["impact"] == pytest.approx(finding.leave_one_in)
        assert result["level"] == {"medium": "warning", "low": "note"}[finding.severity]
        names = [n["name"] for n in result["locations"][0]["logicalLocations"]]
        assert names == list(finding.nodes)
        assert finding.nodes[0] in result["message"]["text"]
        assert result["partialFingerprints"]["primaryLocationLineHash"] == finding.fingerprint


def test_the_run_tells_the_verdict_and_every_backend(report: AuditReport) -> None:
    run = _run(report)
    (invocation,) = run["invocations"]
    assert invocation["exitCode"] == 1
    assert invocation["exitCodeDescription"] == f"fail: {words.headline(report)}"
    assert invocation["executionSuccessful"]
    backends = {b["id"]: b for b in run["properties"]["backends"]}
    assert list(backends) == [b.id for b in report.backends]
    assert backends["ov"]["proved"] and not backends["trt"]["proved"]
    assert backends["ov"]["outputs"][0]["relativeL2"] == 1.2e-2
    (model,) = run["artifacts"]
    assert model["location"]["uri"] == report.model.path
    assert model["hashes"]["sha-256"] == report.model.sha256


def test_gaps_are_notifications(report: AuditReport) -> None:
    (invocation,) = _run(report)["invocations"]
    told = [
        (note["level"], note["message"]["text"])
        for note in invocation["toolExecutionNotifications"]
        if note["descriptor"]["id"] == "gap"
    ]
    assert (
        "error",
        "tvm, start: TVM is not installed. pip install 'sysnoise-auditor[tvm]'",
    ) in told
    assert any(level == "warning" and "built, not run" in text for level, text in told)
    assert any("1 of 51 tensors not observed" in text for _, text in told)


def test_what_was_not_proved_is_said(report: AuditReport) -> None:
    ov = report.backends[1]
    assert ov.fidelity
    changed = replace(ov, fidelity=replace(ov.fidelity, program_unchanged=False))
    (invocation,) = _run(replace(report, backends=(changed,)))["invocations"]
    (note,) = [
        n for n in invocation["toolExecutionNotifications"] if n["descriptor"]["id"] == "unproved"
    ]
    assert "program changed" in note["message"]["text"]


def test_a_divergence_that_no_finding_shows_is_a_result(report: AuditReport) -> None:
    alone = replace(report, findings=())
    (result,) = _run(alone)["results"]
    assert (result["ruleId"], result["level"]) == ("divergence", "error")
    assert (
        "1.2e-2" in result["message"]["text"]
        and "precision.bf16 99.8%" in result["message"]["text"]
    )
    assert not _run(replace(alone, fail_on="critical"))["results"]


def test_an_incomplete_audit_is_no_success(report: AuditReport) -> None:
    incomplete = replace(report, findings=(), verdict="incomplete", exit_code=3)
    (invocation,) = _run(incomplete)["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (False, 3)


# --- what code scanning takes --------------------------------------------------------------------


def test_what_github_requires_is_there(report: AuditReport) -> None:
    log = _log(replace(report, fail_on="medium"))
    assert log["$schema"] and log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"]
    for rule in (*driver["rules"], *driver["notifications"]):
        for key in ("shortDescription", "fullDescription", "help"):
            assert 0 < len(rule[key]["text"]) <= 1024
        assert rule["id"] and rule["defaultConfiguration"]["level"] in ("note", "warning", "error")
    assert run["results"]
    for result in run["results"]:
        assert result["message"]["text"]
        assert result["partialFingerprints"]["primaryLocationLineHash"]
        (location,) = result["locations"]
        place = location["physicalLocation"]
        assert place["artifactLocation"]["uri"]
        # The OASIS schema: a region has a start. GitHub: all four.
        assert set(place["region"]) == {"startLine", "startColumn", "endLine", "endColumn"}


def test_too_many_results_are_cut_and_counted(report: AuditReport) -> None:
    # GitHub rejects 25,000 and shows 5,000.
    many = replace(report, findings=report.findings[:1] * 6000)
    (run,) = json.loads(RENDERER.render(many, width=None, color=False))["runs"]
    assert len(run["results"]) == 5000
    (note,) = [
        n["message"]["text"]
        for n in run["invocations"][0]["toolExecutionNotifications"]
        if "more findings" in n["message"]["text"]
    ]
    assert note == "1001 more findings are in the JSON report."  # with one divergence


def test_huge_names_do_not_make_a_huge_file(report: AuditReport) -> None:
    name = os.urandom(2**19).hex()  # nothing that could be compressed
    first = replace(report.findings[0], nodes=(name,) * 3, op_types=(name,), kernel=name)
    ov = report.backends[1]
    assert ov.fidelity
    nodes = tuple(f"{number}{name}" for number in range(20))
    segments = (replace(ov.segments[0], nodes=nodes, node_keys=nodes),)
    proof = replace(ov.fidelity, skipped=(Skipped(name, name),))
    long = replace(
        report,
        findings=(first,) * 50,
        backends=(replace(ov, segments=segments, fidelity=proof, warnings=(name,)),),
        gaps=(replace(report.gaps[0], subject=name, reason=name),),
    )
    text = RENDERER.render(long, width=None, color=False)
    _VALIDATOR.validate(json.loads(text))
    assert len(gzip.compress(text.encode())) < 10 * 2**20  # the largest file that GitHub takes


# --- names are only names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("models/m.onnx", "models/m.onnx"),
        ("a b/ü#?.onnx", "a%20b/%C3%BC%23%3F.onnx"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
        ("/srv/m.onnx", "file:///srv/m.onnx"),
        ("\udcff.onnx", "%FF.onnx"),  # a file name that is not UTF-8
        ("\ud800", "%5Cud800"),
    ],
)
def test_the_model_is_a_uri(report: AuditReport, path: str, uri: str) -> None:
    run = _run(replace(report, model=replace(report.model, path=path)))
    places = {
        r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]
    }
    assert places == {run["artifacts"][0]["location"]["uri"]} == {uri}


def test_names_in_messages_are_neither_links_nor_placeholders(report: AuditReport) -> None:
    name = "{0} [click](https://example.org) \x1b[2J"
    finding = replace(report.findings[0], nodes=(name,), segments=())
    result = _findings(_run(replace(report, findings=(finding,))))[0]
    assert "{{0}} [click]\\(https://example.org) \\x1b[2J" in result["message"]["text"]
    (node,) = result["locations"][0]["logicalLocations"]
    assert node["name"] == words.visible(name)


def test_any_report_is_valid(any_reports: tuple[AuditReport, ...]) -> None:
    for report in any_reports:
        log = _log(report)
        (run,) = log["runs"]
        ranks = [r["properties"]["rank"] for r in run["results"] if "rank" in r["properties"]]
        assert ranks == [finding.rank for finding in report.findings]
        for text in _messages(log):
            assert text.isprintable()
            assert not re.search(r"(?<!\{)(\{\{)*\{[0-9]+\}", text), "a placeholder"
            assert "](" not in text, "an embedded link"


def test_infinite_figures_are_null(report: AuditReport) -> None:
    apart = Distance(float("inf"), float("inf"), float("-inf"), float("nan"), "shape 1x2 not 2x1")
    ov = replace(report.backends[1], outputs=(OutputDistance("y", apart),))
    run = _run(replace(report, backends=(ov,)))
    result = run["results"][0]
    assert (result["ruleId"], result["rank"]) == ("divergence", 100)
    assert result["properties"]["relativeL2"] is None
    assert "shape 1x2 not 2x1" in result["message"]["text"]
