"""The report as JUnit XML, for the test pages of continuous integration servers.

One suite per backend: the divergence of its outputs, the proof of its capture, and every finding
that fails the audit are test cases. By the rule of the exit code, what reaches ``--fail-on`` is a
failure; a backend that was asked for and gave no comparison is an error; what is missing otherwise
is skipped. So a failure stands for exit code 1, and an error alone for 3.

JUnit XML has no standard. The elements, their order and their attributes are those of the Windy
Road schema for Apache Ant's reports, which Jenkins's also accepts, except that there is no
``timestamp``: a report does not say when it was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from auditor.records.terms import PIPELINE, SEVERITIES, severity
from reports import _words as words

if TYPE_CHECKING:
    from auditor.records.backend import Gap
    from auditor.records.report import AuditReport, BackendReport, Finding, PipelineReport

_NAME = 200  # characters of a name
_TEXT = 2000  # characters of a message


class _Junit:
    """Report format ``junit``."""

    name = "junit"
    suffixes = (".xml",)

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report as ASCII XML text."""
        # Every character that XML 1.0 forbids is unprintable, so what is visible is allowed.
        report = words.visible(report)
        root = Element("testsuites")
        for number, backend in enumerate(report.backends):
            _suite(root, report, backend, number)
        number = len(report.backends)
        if report.pipeline:
            _pipeline(root, report, report.pipeline, number)
            number += 1
        absent = {b.gap for b in report.backends if b.status != "audited"}
        others = [gap for gap in report.gaps if gap not in absent]
        if others:
            _gaps(root, others, number)
        ElementTree.indent(root)
        text: str = ElementTree.tostring(root, encoding="us-ascii").decode("ascii")
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'  # ASCII is a part of UTF-8


RENDERER = _Junit()


def _suite(root: Element, report: AuditReport, backend: BackendReport, number: int) -> None:
    cases: list[Element] = []
    if backend.status == "audited":
        cases += (_divergence(report, backend), _proof(backend))
    else:
        cases.append(_absent(report, backend))
    if rules := words.rules(backend, report):
        case = _case(backend.id, "rules")
        _outcome(case, "failure", "rule", rules[0], "\n".join(rules))
        cases.append(case)
    cases += [
        _finding(finding)
        for finding in report.findings
        if finding.backend == backend.id and words.fails(finding, report)
    ]
    seconds = sum(value for value in backend.seconds.values() if 0 <= value < math.inf)
    cases[0].set("time", _decimal(seconds))  # the cases after it are read off the same run
    out = _distances(backend)
    if backend.fidelity:
        out.append(words.proof(backend.fidelity))
    out += [
        f"{words.waived(finding, report) or 'does not fail the audit'}: "
        f"{finding.severity}, {words.place(finding, _NAME)}: "
        f"{words.finding(finding)}"
        for finding in report.findings
        if finding.backend == backend.id and not words.fails(finding, report)
    ]
    made = backend.provenance
    properties = {
        "model": report.model.path,
        "sha256": report.model.sha256,
        "reference": words.reference(report.reference),
        "verdict": f"{report.verdict}, exit code {report.exit_code}",
        "fail-on": report.fail_on,
        "ran": words.ran(made, backend.status) if made else "",
    }
    _append(root, backend.id, number, cases, properties, out, words.notes(backend))


def _pipeline(root: Element, report: AuditReport, pipeline: PipelineReport, number: int) -> None:
    """What the deployment's pipeline changes before the network, a case for each step."""
    of_steps = {f.noise: f for f in report.findings if words.of_step(f)}
    cases, out = [], []
    for step in pipeline.steps:
        finding = of_steps.get(step.noise)
        if finding is not None and words.fails(finding, report):
            cases.append(_finding(finding))
            continue
        cases.append(_case(PIPELINE, step.name))
        if finding is not None:
            why = words.waived(finding, report) or "does not fail the audit"
            out.append(f"{why}: {finding.severity}, {words.finding(finding)}")
    properties = {"source": pipeline.source, "photographs": str(pipeline.photos)}
    _append(root, PIPELINE, number, cases, properties, out, ())


def _append(
    root: Element,
    name: str,
    number: int,
    cases: list[Element],
    properties: dict[str, str],
    out: Iterable[str],
    err: Iterable[str],
) -> None:
    """One suite, its elements in the order that the schema wants."""
    kinds = [child.tag for case in cases for child in case]
    seconds = sum(float(case.get("time", "0")) for case in cases)
    suite = SubElement(
        root,
        "testsuite",
        {
            "package": "audit",
            "id": str(number),
            "name": words.elide(name, _NAME) or "audit",
            "hostname": "localhost",
            "tests": str(len(cases)),
            "failures": str(kinds.count("failure")),
            "errors": str(kinds.count("error")),
            "skipped": str(kinds.count("skipped")),
            "time": _decimal(seconds),
        },
    )
    told = SubElement(suite, "properties")
    for key, value in properties.items():
        SubElement(told, "property", {"name": key, "value": words.elide(value, _TEXT)})
    suite.extend(cases)
    SubElement(suite, "system-out").text = "\n".join(out)
    SubElement(suite, "system-err").text = "\n".join(words.elide(line, _TEXT) for line in err)


# --- test cases ----------------------------------------------------------------------------------


def _divergence(report: AuditReport, backend: BackendReport) -> Element:
    """Whether an output is so far from the reference's that the audit fails."""
    case = _case(backend.id, "final divergence")
    if any(words.diverges(backend, output, report) for output in backend.outputs):
        levels = [severity(output.distance.relative_l2) for output in backend.outputs]
        worst = max(levels, key=SEVERITIES.index)
        rules = report.judgement.broken if report.judgement else ()
        lines = _distances(backend)
        told = [rule.sentence for rule in rules if rule.backend == backend.id and rule.output]
        text = "\n".join([*lines, f"causes: {words.causes(backend)}", *told])
        _outcome(case, "failure", "divergence", f"{worst}: {lines[0]}", text)
    return case


def _distances(backend: BackendReport) -> list[str]:
    """How far each output is from the reference's, the farthest first."""
    worst = sorted(backend.outputs, key=lambda output: -output.distance.relative_l2)
    return [
        f"{words.elide(output.name, _NAME)}: {words.elide(words.distance(output), _TEXT)}"
        for output in worst
    ]


def _proof(backend: BackendReport) -> Element:
    """Whether observing changed the program: not proved is not known, and so skipped."""
    case = _case(backend.id, "capture proved")
    proof = backend.fidelity
    if proof is None:
        _outcome(case, "skipped", "", "not proved: nothing was captured", "")
    elif not words.proved(proof):
        _outcome(case, "skipped", "", words.proof(proof), "")
    return case


def _finding(finding: Finding) -> Element:
    """A finding that fails the audit; its name has no figures, so that it is the same next time."""
    cause = finding.noise or "unexplained"
    name = f"{words.elide(cause, _NAME)} at {words.place(finding, _NAME)}"
    case = _case(finding.backend, f"{name} {finding.fingerprint[:8]}".rstrip())
    lines = [*finding.evidence, *filter(None, [finding.kernel, finding.remedy])]
    text = "\n".join(words.elide(line, _TEXT) for line in lines)
    message = f"{finding.severity}, rank {finding.rank}: {words.finding(finding)}"
    _outcome(case, "failure", cause, message, text)
    return case


def _absent(report: AuditReport, backend: BackendReport) -> Element:
    """A backend that gave no comparison."""
    case = _case(backend.id, "final divergence")
    gap = backend.gap
    reason = f"{gap.stage}: {gap.reason}" if gap else "no output was compared"
    lines = [gap.remedy or "", *gap.log] if gap else []
    text = "\n".join(words.elide(line, _TEXT) for line in lines)
    kind = "error" if words.blocks(backend, report) else "skipped"
    _outcome(case, kind, gap.stage if gap else "compare", reason, text)
    return case


def _gaps(root: Element, gaps: list[Gap], number: int) -> None:
    """Gaps other than a backend's whole absence."""
    cases = []
    for gap in gaps:
        case = _case(gap.subject, words.elide(f"{gap.stage}: {gap.reason}", _NAME))
        _outcome(case, "skipped", "", f"{gap.reason}. {gap.remedy or ''}".rstrip(), "")
        cases.append(case)
    _append(root, "gaps", number, cases, {}, (), ())


def _case(backend: str, name: str) -> Element:
    classname = f"audit.{words.elide(backend, _NAME)}"
    return Element("testcase", {"classname": classname, "name": name, "time": _decimal(0.0)})


def _outcome(case: Element, kind: str, type: str, message: str, text: str) -> None:
    found = SubElement(case, kind, {"message": words.elide(message, _TEXT)})
    if kind != "skipped":
        found.set("type", words.elide(type, _NAME))
    found.text = text or None


def _decimal(seconds: float) -> str:
    return f"{seconds:.3f}"
