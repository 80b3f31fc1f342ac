"""What changed from one report to another: after an upgrade, another option, another export.

Findings are matched by their fingerprints, final outputs by backend and name. Figures change a
little from run to run and from machine to machine: a finding or an output is worse, or better, when
its divergence has changed by more than ``FACTOR`` and matters in one of the reports (severity
``low``, 1e-4 of relative L2, or more).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from auditor.records.backend import Gap, Kernel, Provenance
from auditor.records.comparison import Comparison, DivergenceChange, FindingChange, Trend
from auditor.records.report import AuditReport, BackendReport, Broken, Finding
from auditor.records.terms import SEVERITIES, severity

FACTOR = 1.5
_MATTERS = SEVERITIES.index("low")
_ORDER: tuple[Trend, ...] = ("new", "worse", "same", "better", "gone")
_REGRESSIONS = ("new", "worse")


def compare(old: AuditReport, new: AuditReport, old_name: str, new_name: str) -> Comparison:
    """Compare two reports.

    Args:
        old: the earlier report.
        new: the later one.
        old_name: how to call the earlier one, such as its path.
        new_name: the same of the later one.
    """
    before = {backend.id: backend for backend in old.backends}
    after = {backend.id: backend for backend in new.backends}
    outputs = tuple(_outputs(before, after))
    findings = tuple(
        sorted(_findings(old, new), key=lambda c: (_ORDER.index(c.trend), -(c.after or 0.0)))
    )
    gaps = tuple(
        backend.gap or Gap(id, "report", "is not in the newer report")
        for id, was in before.items()
        if was.status == "audited"
        for backend in [after.get(id, was)]
        if id not in after or backend.status != "audited"
    )
    return Comparison(
        old=old_name,
        new=new_name,
        incomparable=tuple(_incomparable(old, new)),
        provenance=(*_machines(old, new), *_provenance(before, after)),
        outputs=outputs,
        findings=findings,
        gaps=gaps,
        regressions=tuple(_regressions(outputs, findings, gaps)),
    )


# --- figures -------------------------------------------------------------------------------------


def _findings(old: AuditReport, new: AuditReport) -> Iterator[FindingChange]:
    was = {finding.fingerprint: finding for finding in old.findings}
    for finding in new.findings:
        earlier = was.pop(finding.fingerprint, None)
        effect = finding.effect if earlier is None else earlier.effect
        trend: Trend = "new" if earlier is None else _trend(effect, finding.effect)
        yield FindingChange(trend, finding, earlier.effect if earlier else None, finding.effect)
    for finding in was.values():
        yield FindingChange("gone", finding, finding.effect, None)


def _outputs(
    before: Mapping[str, BackendReport], after: Mapping[str, BackendReport]
) -> Iterator[DivergenceChange]:
    for id, backend in after.items():
        earlier = before.get(id)
        was = {o.name: o.distance.relative_l2 for o in earlier.outputs} if earlier else {}
        for output in backend.outputs:
            error = output.distance.relative_l2
            previous = was.get(output.name)
            trend: Trend = "new" if previous is None else _trend(previous, error)
            yield DivergenceChange(trend, id, output.name, previous, error)


def _trend(before: float | None, after: float | None) -> Trend:
    """How a divergence changed; None, where it could not be measured, counts as infinite."""
    first = math.inf if before is None else before
    second = math.inf if after is None else after
    if max(map(_level, (first, second))) < _MATTERS:
        return "same"
    if second > FACTOR * first:
        return "worse"
    return "better" if first > FACTOR * second else "same"


def _level(effect: float) -> int:
    return SEVERITIES.index(severity(effect))


def _regressions(
    outputs: tuple[DivergenceChange, ...],
    findings: tuple[FindingChange, ...],
    gaps: tuple[Gap, ...],
) -> Iterator[Broken]:
    for gap in gaps:
        yield Broken(f"{gap.subject} is not compared any more: {gap.reason}", gap.subject)
    for output in outputs:
        if output.trend == "worse":
            said = (
                f"output `{output.output}` on {output.backend} diverges by {_said(output.after)} "
                f"instead of {_said(output.before)}"
            )
            yield Broken(said, output.backend, output=output.output)
    for change in findings:
        matters = SEVERITIES.index(change.finding.severity) >= _MATTERS
        if change.trend in _REGRESSIONS and matters:
            finding = change.finding
            said = f"{change.trend}: {_name(finding)}"
            yield Broken(said, finding.backend, fingerprint=finding.fingerprint)


def _name(finding: Finding) -> str:
    return f"{finding.backend}, {finding.nodes[0]}, {finding.noise or 'unexplained'}"


def _said(error: float | None) -> str:
    return "an unknown amount" if error is None else f"{error:.2g}"


# --- circumstances -------------------------------------------------------------------------------


def _incomparable(old: AuditReport, new: AuditReport) -> Iterator[str]:
    if old.model.sha256 != new.model.sha256:
        yield "The model file is another one: findings are matched by the names of their nodes."
    if old.model.candidate != new.model.candidate:
        yield (
            f"The backends compiled {new.model.candidate or 'the model itself'} instead of "
            f"{old.model.candidate or 'the model itself'}."
        )
    for what in ("kind", "source", "samples", "seed", "shapes"):
        was, now = getattr(old.stimulus, what), getattr(new.stimulus, what)
        if was != now:
            yield f"The inputs differ in their {what}: {now} instead of {was}."
    hashes = old.stimulus.sha256, new.stimulus.sha256
    if None not in hashes and hashes[0] != hashes[1]:
        yield "The inputs' values are others."
    if old.reference != new.reference:
        yield (
            f"The reference is {new.reference.engine} {new.reference.version}, "
            f"{new.reference.precision}, instead of {old.reference.engine} "
            f"{old.reference.version}, {old.reference.precision}."
        )


def _provenance(
    before: Mapping[str, BackendReport], after: Mapping[str, BackendReport]
) -> Iterator[str]:
    for id in after.keys() - before.keys():
        yield f"{id} is only in the newer report."
    for id, backend in after.items():
        earlier = before[id].provenance if id in before else None
        if earlier is not None and backend.provenance is not None:
            for sentence in _changes(earlier, backend.provenance):
                yield f"{id}: {sentence}"


def _machines(old: AuditReport, new: AuditReport) -> Iterator[str]:
    """What of the machine differs; nothing where a report does not say."""
    was, now = old.machine, new.machine
    if was is not None and now is not None:
        if lost := sorted(set(was.flags) - set(now.flags)):
            yield f"CPU without {', '.join(lost)}: runtimes choose other kernels"
        if gained := sorted(set(now.flags) - set(was.flags)):
            yield f"CPU with {', '.join(gained)}: runtimes choose other kernels"
        for what in ("cpu", "cores", "system", "python"):
            before, after = getattr(was, what), getattr(now, what)
            if before != after:
                yield f"{what}: {before} → {after}"
    if old.threads != new.threads:
        names = ("the engines' own" if t is None else str(t) for t in (old.threads, new.threads))
        yield f"threads: {' → '.join(names)}"


def _changes(old: Provenance, new: Provenance) -> Iterator[str]:
    if old.version != new.version:
        yield f"{new.engine} {old.version} → {new.version}"
    if old.device != new.device:
        yield f"device {old.device} → {new.device}"
    for key in sorted(old.options.keys() | new.options.keys()):
        was, now = old.options.get(key, "not set"), new.options.get(key, "not set")
        if was != now:
            yield f"{key}: {was} → {now}"
    first, second = _ran(old), _ran(new)
    common = first.keys() & second.keys()
    if changed := sum(first[node] != second[node] for node in common):
        yield f"{changed} of {len(common)} nodes run in another kernel or precision"
    if len(old.kernels) != len(new.kernels):
        yield f"{len(old.kernels)} → {len(new.kernels)} kernels"


def _ran(provenance: Provenance) -> dict[str, tuple[str, str]]:
    """What ran each ONNX node."""

    def key(kernel: Kernel) -> tuple[str, str]:
        return kernel.primitive, kernel.precision

    return {node: key(kernel) for kernel in provenance.kernels for node in kernel.nodes}
