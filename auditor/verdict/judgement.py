"""A report held against a team's rules, or against an earlier report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

from auditor.records.comparison import Comparison
from auditor.records.measured import OutputDistance
from auditor.records.report import AuditReport, BackendReport, Broken, Finding, Judgement, Waiver
from auditor.records.terms import Severity, Verdict, reaches, severity
from auditor.verdict.policy import EVERY, LATENCY, METRICS, Acceptance, Policy


def judged(report: AuditReport, policy: Policy, today: date) -> AuditReport:
    """The report with the policy's verdict."""
    waivers = tuple(_waivers(report, policy, today))
    waived = {waiver.fingerprint for waiver in waivers}
    broken = [
        rule
        for backend in report.backends
        for output in backend.outputs
        for rule in _outputs(backend, output, report.fail_on, policy)
    ]
    broken += [rule for backend in report.backends for rule in _slow(backend, policy)]
    broken += [
        rule
        for finding in report.findings
        if finding.fingerprint not in waived
        for rule in _finding(finding, report.fail_on, policy)
    ]
    judgement = Judgement(
        policy.source, tuple(broken), waivers, tuple(_notes(report, policy, today))
    )
    return _decided(report, judgement)


def held_against(report: AuditReport, comparison: Comparison) -> AuditReport:
    """The report with the verdict that only what is new or worse than a baseline fails."""
    known = tuple(
        Waiver(change.finding.fingerprint, f"known from {comparison.old}: {change.trend}")
        for change in comparison.findings
        if change.trend in ("same", "better")
    )
    notes = comparison.incomparable + comparison.provenance
    return _decided(report, Judgement(comparison.old, comparison.regressions, known, notes))


def _decided(report: AuditReport, judgement: Judgement) -> AuditReport:
    audited = {backend.id for backend in report.backends if backend.status == "audited"}
    complete = {backend.id for backend in report.backends if backend.complete}
    verdict: Verdict = "pass"
    if judgement.broken:
        verdict = "fail"
    elif not audited or not complete.issuperset(report.requested):
        verdict = "incomplete"
    code = {"pass": 0, "fail": 1, "incomplete": 3}[verdict]
    return replace(report, judgement=judgement, verdict=verdict, exit_code=code)


def _waivers(report: AuditReport, policy: Policy, today: date) -> Iterator[Waiver]:
    accepted = {a.fingerprint: a for a in policy.accepted if not _expired(a, today)}
    for finding in report.findings:
        if finding.noise in policy.allowed:
            yield Waiver(finding.fingerprint, f"{finding.noise} is allowed")
        elif acceptance := accepted.get(finding.fingerprint):
            yield Waiver(finding.fingerprint, f"accepted: {acceptance.reason}")


def _expired(acceptance: Acceptance, today: date) -> bool:
    return acceptance.expires is not None and acceptance.expires < today


def _outputs(
    backend: BackendReport, output: OutputDistance, fail_on: Severity, policy: Policy
) -> Iterator[Broken]:
    def broken(what: str) -> Broken:
        said = f"output `{output.name}` on {backend.id}: {what}"
        return Broken(said, backend.id, output=output.name)

    limits = policy.limits(backend.id, output.name)
    for metric, limit in limits.items():
        if metric == LATENCY:
            continue
        measured = _measured(output, metric)
        if measured is None:
            yield broken(f"{metric} has a tolerance, and was not measured there")
        elif not (measured <= limit if METRICS[metric] else measured >= limit):
            yield broken(f"{metric} is {measured:.3g}, and its tolerance {limit:g}")
    if "relative_l2" not in limits:
        share = sum(c.share for c in backend.categories if c.noise in policy.allowed)
        left = output.distance.relative_l2
        if share > 0:
            left *= math.sqrt(max(0.0, 1.0 - share))  # shares are of its square
        if reaches(severity(left), fail_on):
            rest = " without the allowed categories" if share > 0 else ""
            yield broken(f"relative_l2 is {left:.3g}{rest}, severity {severity(left)}")


def _slow(backend: BackendReport, policy: Policy) -> Iterator[Broken]:
    limit = policy.limits(backend.id).get(LATENCY)
    if limit is None or backend.status != "audited":
        return
    measured = backend.latency.ratio if backend.latency else None
    if measured is None:
        why = f"{LATENCY} has a tolerance, and was not measured there"
    elif measured > limit:
        why = f"{LATENCY} is {measured:.3g}, and its tolerance {limit:g}"
    else:
        return
    yield Broken(f"{backend.id}: {why}", backend.id)


def _finding(finding: Finding, fail_on: Severity, policy: Policy) -> Iterator[Broken]:
    def broken(what: str) -> Broken:
        said = f"finding {finding.rank} on {finding.backend}, {finding.nodes[0]}: {what}"
        return Broken(said, finding.backend, fingerprint=finding.fingerprint)

    limits = [
        limits["relative_l2"]
        for (backend, _), limits in policy.tolerances.items()
        if backend in (EVERY, finding.backend) and "relative_l2" in limits
    ]
    if limits and finding.effect is not None:
        if finding.effect > max(limits):
            yield broken(f"its error alone makes {finding.effect:.3g} of relative_l2")
    elif reaches(finding.severity, fail_on):
        yield broken(f"severity {finding.severity}")


def _measured(output: OutputDistance, metric: str) -> float | None:
    if metric == "top1_flips":
        return None if output.top1_agreement is None else 1.0 - output.top1_agreement
    if metric == "iou":
        return output.consequence.iou if output.consequence else None
    if metric == "max_ulp":
        return output.max_ulp
    value: float = getattr(output.distance, metric)
    return value


def _notes(report: AuditReport, policy: Policy, today: date) -> Iterator[str]:
    found = {finding.fingerprint for finding in report.findings}
    for acceptance in policy.accepted:
        if _expired(acceptance, today):
            yield f"The acceptance of {acceptance.fingerprint} ended on {acceptance.expires}."
        elif acceptance.fingerprint not in found:
            yield f"Nothing here has the accepted fingerprint {acceptance.fingerprint}."
    outputs = {(b.id, o.name) for b in report.backends for o in b.outputs}
    for backend, output in policy.tolerances:
        if output and (backend, output) not in outputs:
            yield f"There is no output `{output}` on {backend}, for which there is a tolerance."
