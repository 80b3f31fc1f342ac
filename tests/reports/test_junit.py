"""JUnit XML: what test pages accept, and failures exactly where the exit code says so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import junitparser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auditor.records.backend import Gap
from auditor.records.report import AuditReport
from auditor.records.terms import SEVERITIES, Severity
from auditor.verdict import ranking
from reports import _words as words
from reports.junit import RENDERER


def _root(report: AuditReport) -> Element:
    text = RENDERER.render(report, width=None, color=False)
    assert text.isascii() and text.startswith('<?xml version="1.0" encoding="UTF-8"?>')
    return ElementTree.fromstring(text)


def _outcomes(root: Element) -> dict[str, list[str]]:
    """Names of the test cases by outcome."""
    found: dict[str, list[str]] = {"failure": [], "error": [], "skipped": [], "passed": []}
    for case in root.iter("testcase"):
        kind = case[0].tag if len(case) else "passed"
        found[kind].append(f"{case.get('classname')} {case.get('name')}")
    return found


# --- the story -----------------------------------------------------------------------------------


def test_what_fails_the_audit_fails_a_test(report: AuditReport) -> None:
    found = _outcomes(_root(report))
    first = report.findings[0]
    assert found == {
        "failure": [
            "audit.ov final divergence",
            f"audit.ov precision.bf16 at {first.nodes[0]} and 2 more nodes {first.fingerprint[:8]}",
        ],
        "error": ["audit.tvm final divergence"],
        "skipped": ["audit.trt final divergence"],  # not asked for by name
        "passed": [
            "audit.ort final divergence",
            "audit.ort capture proved",
            "audit.ov capture proved",
        ],
    }


def test_figures_evidence_and_remedy_are_there(report: AuditReport) -> None:
    root = _root(report)
    failures = list(root.iter("failure"))
    assert "1.2e-2" in (failures[0].get("message") or "")
    assert "precision.bf16 99.8%" in (failures[0].text or "")
    finding = report.findings[0]
    assert (failures[1].get("message") or "").startswith("medium, rank 1: precision.bf16 explains")
    assert finding.evidence[0] in (failures[1].text or "")
    assert finding.remedy and finding.remedy in (failures[1].text or "")
    (error,) = root.iter("error")
    assert error.get("message") == "start: TVM is not installed"
    ov = root[1]
    assert ov.find("properties/property[@name='sha256']").get("value") == report.model.sha256  # type: ignore[union-attr]
    said = ov.findtext("system-out") or ""
    assert "Softmax:0: relative L2 1.2e-2" in said and "proved: 50/51 tensors" in said
    assert said.count("does not fail the audit:") == len(report.findings) - 1, (
        "every finding is told"
    )
    assert report.backends[1].warnings[0] in (ov.findtext("system-err") or "")


def test_what_is_not_proved_is_skipped_not_failed(report: AuditReport) -> None:
    ov = report.backends[1]
    assert ov.fidelity
    changed = replace(ov, fidelity=replace(ov.fidelity, program_unchanged=False))
    root = _root(replace(report, backends=(changed,)))
    (skipped, *_) = root.iter("skipped")
    assert "program changed" in (skipped.get("message") or "")


def test_other_gaps_are_skipped(report: AuditReport) -> None:
    gap = Gap("ov", "compare", "segment s3 cannot be replayed")
    root = _root(replace(report, gaps=(*report.gaps, gap)))
    assert "audit.ov compare: segment s3 cannot be replayed" in _outcomes(root)["skipped"]
    assert root[-1].get("name") == "gaps"


@pytest.mark.parametrize("fail_on", SEVERITIES)
@pytest.mark.parametrize("requested", [(), ("ov",), ("ort", "tvm"), ("trt",)])
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_failures_and_errors_say_what_the_exit_code_says(
    report: AuditReport, fail_on: Severity, requested: Sequence[str], kept: int
) -> None:
    backends = (report.backends[:1], report.backends, report.backends[2:])[kept]
    names = {backend.id for backend in backends}
    requested = [id for id in requested if id in names]
    findings = tuple(f for f in report.findings if f.backend in names)
    verdict, code = ranking.verdict(backends, findings, requested, fail_on)
    root = _root(
        replace(
            report,
            backends=backends,
            findings=findings,
            requested=tuple(requested),
            fail_on=fail_on,
            verdict=verdict,
            exit_code=code,
        )
    )
    found = _outcomes(root)
    assert bool(found["failure"]) == (code == 1)
    if code != 1:
        assert bool(found["error"]) == (code == 3)


# --- what test pages accept ----------------------------------------------------------------------


def _assert_schema(root: Element) -> None:
    """The rules of the Windy Road schema, but for ``timestamp``."""
    decimal = re.compile(r"\d+\.\d+")
    assert root.tag == "testsuites" and not root.attrib
    assert [suite.get("id") for suite in root] == [str(i) for i in range(len(root))]
    for suite in root:
        assert suite.tag == "testsuite" and suite.get("name") and suite.get("hostname")
        assert suite.get("package") is not None and decimal.fullmatch(suite.get("time", ""))
        children = [child.tag for child in suite]
        cases = children.count("testcase")
        assert children == ["properties", *["testcase"] * cases, "system-out", "system-err"]
        assert all(p.get("name") and p.get("value") is not None for p in suite[0])
        kinds = [child.tag for case in suite.iter("testcase") for child in case]
        for key, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(key, "-1")) == kinds.count(kind)
        assert int(suite.get("tests", "-1")) == cases
        for case in suite.iter("testcase"):
            assert set(case.attrib) == {"name", "classname", "time"} and len(case) <= 1
            assert decimal.fullmatch(case.get("time", ""))
            for child in case:
                assert child.tag == "skipped" or child.get("type") is not None


def test_junitparser_reads_it(report: AuditReport) -> None:
    text = RENDERER.render(report, width=None, color=False)
    suites = junitparser.JUnitXml.fromstring(text.encode())
    assert [suite.name for suite in suites] == [b.id for b in report.backends]
    assert [(s.tests, s.failures, s.errors, s.skipped) for s in suites] == [
        (2, 0, 0, 0),
        (3, 2, 0, 0),
        (1, 0, 1, 0),
        (1, 0, 0, 1),
    ]
    case = next(c for c in next(s for s in suites if s.name == "ov") if "bf16" in c.name)
    assert isinstance(case.result[0], junitparser.Failure)
    assert next(iter(suites)).time == pytest.approx(1.35)  # seconds of its worker


def test_any_report_is_well_formed(any_reports: tuple[AuditReport, ...]) -> None:
    for report in any_reports:
        root = _root(report)
        _assert_schema(root)
        for element in root.iter():
            for text in (element.text or "", *element.attrib.values()):
                assert all(line.isprintable() for line in text.split("\n"))


@given(
    st.text(max_size=50)
    | st.sampled_from(
        ["a]]>b", "<x/>&amp;", "\x00\x1f\ufffe\uffff", "\ud800", "\r\n\t", "\"'", "é\u3042"]
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_come_back_as_they_were(report: AuditReport, name: str) -> None:
    finding = replace(report.findings[0], nodes=(name,), kernel=name, evidence=(name,))
    root = _root(replace(report, findings=(finding,)))
    _assert_schema(root)
    failure = list(root.iter("failure"))[1]
    shown = words.visible(name)
    (case,) = [c for c in root.iter("testcase") if "precision.bf16 at" in (c.get("name") or "")]
    assert case.get("name") == f"precision.bf16 at {shown} {finding.fingerprint[:8]}"
    assert (failure.text or "").split("\n")[: 2 if name else 1] == [shown] * (2 if name else 1)


def test_huge_names_are_shortened(report: AuditReport) -> None:
    name = "x" * 2**20
    finding = replace(report.findings[0], nodes=(name,), kernel=name, evidence=(name,), remedy=name)
    gap = Gap(name, name, name, name, (name,))
    text = RENDERER.render(
        replace(report, findings=(finding,), gaps=(gap,)), width=None, color=False
    )
    assert len(text) < 50_000
