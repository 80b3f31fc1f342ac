"""Counterfactuals on the backend: the plain program again, without one factor.

Replaying a cause on the reference says what reproduces a runtime's error; leaving the factor behind
it out of the runtime itself says whether the final divergence goes with it, and what that costs.
A backend lists the factors of a build that it can leave out (``auditor.ports.Switchable``). Those
that speak to a cause that accounts for much of the divergence are tried first, then those that
the user chose or that made the kernels of unexplained findings, then general ones; a few at most.

This comes last: every other result is already here when an engine crashes on an unusual program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from auditor.capture.trace import Tracer
from auditor.comparison.metrics import Moments
from auditor.errors import AuditError, BackendError
from auditor.noises import fp32_rounding
from auditor.ports import Arrays
from auditor.records.backend import Gap, Switch
from auditor.records.measured import Counterfactual, OutputChange
from auditor.records.report import BackendReport, Finding
from auditor.records.terms import Conclusion, Confidence, severity

SAMPLES = 4  # as many as leave-one-in is measured on
_REBUILDS = 3  # of one backend, at most
# A cause that accounts for less of the divergence than this is not tested: what the other program
# rounds otherwise may be as much.
_TESTABLE = 0.05
# Of the share that a cause claims, the part that must go with its factor. The first is the share
# from which replaying a cause names it.
_CONFIRMED = 0.9
_CONTRADICTED = 0.5
_EXACT = 0.99  # share explained from which a finding's confidence can be high
# A replay that gives so many of the very bits is right; then the factor is not where it comes from.
_SAME_BITS = 0.9

_LEVELS: tuple[Confidence, ...] = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Case:
    """One sample: what the backend is fed, and the reference's final outputs."""

    feeds: Arrays
    expected: Arrays


def confirm(
    reports: Sequence[BackendReport],
    findings: Sequence[Finding],
    tracers: Mapping[str, Tracer],
    rename: Mapping[str, str],
    cases: Sequence[Case],
    *,
    own_file: bool,
) -> tuple[tuple[BackendReport, ...], tuple[Finding, ...], tuple[Gap, ...]]:
    """Build what diverged again without single factors, one backend after another.

    Args:
        reports: the measured backends.
        findings: their ranked findings.
        tracers: the live ones, by backend id; no sample can be traced with them after this.
        rename: the compiled model's tensor names → the reference's.
        cases: the samples to run.
        own_file: whether the backends compiled another file than the reference's: a cause may then
            be in that file, so that no factor of the engine speaks against it.

    Returns:
        The reports with their counterfactuals, the findings with what these say of them, and what
        could not be measured.
    """
    gaps: list[Gap] = []
    confirmed = []
    for report in reports:
        tracer = tracers.get(report.id)
        if tracer is None:  # it was recorded elsewhere: there is nothing to build
            confirmed.append(report)
            continue
        own = [f for f in findings if f.backend == report.id]
        asked = tracer.request.options if tracer.request else {}
        planned = _planned(tracer.switches, asked, report, own)
        if not planned:
            confirmed.append(report)
            continue
        confirmed.append(_tried(report, planned, tracer, rename, cases, gaps, own_file))
    by_id = {report.id: report for report in confirmed}
    weighed = tuple(_weighed(f, by_id[f.backend]) for f in findings)
    return tuple(confirmed), weighed, tuple(gaps)


# --- what to try ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """A factor to leave out, and the cause that this tests; None for what nothing explains."""

    switch: Switch
    cause: str | None


def _planned(
    switches: Sequence[Switch],
    asked: Mapping[str, str],
    report: BackendReport,
    findings: Sequence[Finding],
) -> list[_Plan]:
    """What is worth trying on one backend, most telling first; ``asked``: the user's options."""
    if report.status != "audited":
        return []
    seen = [f.severity for f in findings]
    seen += [severity(o.distance.relative_l2) for o in report.outputs]
    if set(seen) <= {"info"}:
        return []
    found = []
    for cause in _causes(report, findings):
        about = [s for s in switches if cause in s.noises]
        # The factor that brings this cause alone says more than one that brings several.
        found += [_Plan(s, cause) for s in sorted(about, key=lambda s: len(s.noises))]
    unexplained = [f for f in findings if f.noise is None and f.severity != "info"]
    if unexplained or (not findings and report.unexplained_share >= _TESTABLE):
        ran = _primitives(report, unexplained)
        made = [s for s in switches if ran.intersection(s.kernels)]
        chosen = [s for s in switches if asked.keys() & s.options.keys()]
        general = [s for s in switches if not (s.noises or s.kernels)]
        found += [_Plan(s, None) for s in (*chosen, *made[:1], *general)]
    return found


def _causes(report: BackendReport, findings: Sequence[Finding]) -> list[str]:
    """The causes to test, the largest share first.

    Where the divergence is not finite there are no shares: then every cause of a finding.
    """
    if math.isfinite(report.unexplained_share):
        claims = _claims(report)
        return sorted(claims, key=claims.__getitem__, reverse=True)
    return list(dict.fromkeys(f.noise for f in findings if f.noise and f.severity != "info"))


def _claims(report: BackendReport) -> dict[str, float]:
    """The causes that account for a share of the final divergence worth testing."""
    return {c.noise: c.share for c in report.categories if c.share >= _TESTABLE}


def _primitives(report: BackendReport, findings: Sequence[Finding]) -> set[str]:
    """What ran in the findings' segments, as the engine states it."""
    ids = {id for f in findings for id in f.segments}
    keys = {key for s in report.segments if s.id in ids for key in s.node_keys}
    return {kernel.primitive for kernel in report.kernels_of(keys)}


# --- trying it -----------------------------------------------------------------------------------


def _tried(
    report: BackendReport,
    planned: Sequence[_Plan],
    tracer: Tracer,
    rename: Mapping[str, str],
    samples: Sequence[Case],
    gaps: list[Gap],
    own_file: bool,
) -> BackendReport:
    """The report with a counterfactual for each plan that was still open when its turn came."""
    done: dict[str, Counterfactual] = {}
    settled: set[str | None] = set()
    left: dict[str, None] = {}
    for plan in planned:
        factor = plan.switch.factor
        if plan.cause in settled or factor in done:
            continue
        if len(done) == _REBUILDS:
            left.setdefault(factor)
            continue
        made = _counterfactual(plan.switch, report, tracer, rename, samples, gaps, own_file)
        done[factor] = replace(made, sentence=_sentence(made))
        if made.conclusion == "confirmed":
            settled |= set(made.noises)
        elif plan.cause is None and (made.removed or 0.0) >= _CONFIRMED:
            settled.add(None)
    warnings = report.warnings
    if left:
        warnings += (
            f"Not built again without {', '.join(left)}: {_REBUILDS} counterfactuals are made of "
            "one backend at most.",
        )
    return replace(
        report,
        counterfactuals=tuple(done.values()),
        warnings=warnings,
        seconds=dict(tracer.seconds),
    )


def _counterfactual(
    switch: Switch,
    report: BackendReport,
    tracer: Tracer,
    rename: Mapping[str, str],
    samples: Sequence[Case],
    gaps: list[Gap],
    own_file: bool,
) -> Counterfactual:
    claims = _claims(report)
    tested = [claims[noise] for noise in switch.noises if noise in claims]
    blank = Counterfactual(
        factor=switch.factor,
        options=dict(switch.options),
        noises=switch.noises,
        conclusion="failed",
        claimed=sum(tested) if tested else None,
    )
    if not tracer.worker.alive:
        return replace(blank, failure="the backend's process had ended before")
    try:
        tracer.ablate(switch)
        before, after = _Outputs(report), _Outputs(report)
        unchanged = True
        for case in samples:
            plain, ablated, equal = tracer.contrast(case.feeds)
            before.add({rename[n]: v for n, v in plain.items() if n in rename}, case.expected)
            after.add({rename[n]: v for n, v in ablated.items() if n in rename}, case.expected)
            unchanged &= equal
        latency = tracer.race(samples[0].feeds)
    except AuditError as error:
        gap = Gap(report.id, "ablate", f"without {switch.factor}: {error.message}", error.hint)
        if isinstance(error, BackendError):
            gap = replace(gap, stage=error.stage, log=error.log)
        gaps.append(gap)
        return replace(blank, failure=error.message)
    removed = _removed(before.error, after.error)
    return replace(
        blank,
        conclusion="unchanged"
        if unchanged
        else _conclusion(
            removed, blank.claimed, elsewhere=own_file or _rounds_anyhow(switch, claims)
        ),
        samples=len(samples),
        before=_finite(before.error),
        after=_finite(after.error),
        removed=removed,
        latency_before=latency[0],
        latency_after=latency[1],
        outputs=tuple(
            OutputChange(name, _finite(b), _finite(a))
            for (name, b), (_, a) in zip(before.each(), after.each(), strict=True)
        ),
    )


class _Outputs:
    """How far one program's final outputs are from the reference's, over samples."""

    def __init__(self, report: BackendReport) -> None:
        self._moments = {output.name: Moments() for output in report.outputs}

    def add(self, observed: Arrays, expected: Arrays) -> None:
        for name, moments in self._moments.items():
            moments.add(observed[name], expected[name])

    def each(self) -> Iterator[tuple[str, float]]:
        """Relative L2 of each output, infinite where it cannot be compared."""
        for name, moments in self._moments.items():
            yield name, moments.distance().relative_l2

    @property
    def error(self) -> float:
        """Root mean square of the outputs' relative L2, as in ``metrics.relative_l2``."""
        squares = [error**2 for _, error in self.each()]
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _removed(before: float, after: float) -> float | None:
    """The share of the squared divergence that is gone; None where neither can be compared."""
    if math.isinf(after) or before == 0.0:
        return None
    return 1.0 - (after / before) ** 2  # 1 where only ``before`` is infinite


def _rounds_anyhow(switch: Switch, claims: Mapping[str, float]) -> bool:
    """Whether the factor is tested for rounding only: the other program rounds too, elsewhere."""
    return claims.keys() & set(switch.noises) == {fp32_rounding.NOISE.id}


def _conclusion(removed: float | None, claimed: float | None, *, elsewhere: bool) -> Conclusion:
    """What the change says of the causes that claim a share of the divergence.

    Shares are projections onto the divergence. Were the claimed part gone and all else the same,
    the square of the divergence would fall by just that share when the parts are orthogonal, by
    more when they point the same way, and by less only where parts cancel each other; or where the
    cause may be ``elsewhere`` than in what was left out, as in a file of the backend's own.
    """
    if removed is None or claimed is None:
        return "measured"
    part = removed / min(claimed, 1.0)
    if part >= _CONFIRMED:
        return "confirmed"
    if part >= _CONTRADICTED:
        return "partial"
    return "measured" if elsewhere else "contradicted"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- what it says of the findings ----------------------------------------------------------------


def _weighed(finding: Finding, report: BackendReport) -> Finding:
    """The finding with the counterfactuals that speak to it as evidence, and their weight."""
    about = [c for c in report.counterfactuals if _speaks(c, finding, report)]
    if not about:
        return finding
    confidence = finding.confidence
    conclusions = {c.conclusion for c in about}
    if "confirmed" in conclusions:
        # As good as the engine's own statement that it does this; the replay must be as good.
        exact = (finding.explained or 0.0) >= _EXACT
        if exact and confidence == "medium" and _proved(finding, report):
            confidence = "high"
    elif "contradicted" in conclusions and finding.bit_identical < _SAME_BITS:
        confidence = _LEVELS[max(_LEVELS.index(confidence) - 1, 0)]
    told = tuple(c.sentence for c in about)
    first = "confirmed" in conclusions
    evidence = told + finding.evidence if first else finding.evidence + told
    return replace(finding, confidence=confidence, evidence=evidence)


def _speaks(made: Counterfactual, finding: Finding, report: BackendReport) -> bool:
    if finding.noise is None:
        return made.claimed is None and made.conclusion != "failed"
    tested = made.claimed is None or finding.noise in _claims(report)
    return finding.noise in made.noises and tested


def _proved(finding: Finding, report: BackendReport) -> bool:
    """Whether the finding rests on proved captures, and no sample contradicts its cause."""
    lead = next(s for s in report.segments if s.id == finding.segment)
    return lead.fidelity != "perturbing" and not lead.contradicted


def _sentence(made: Counterfactual) -> str:
    """What a counterfactual showed, in words."""
    options = ", ".join(f"{key}={value}" for key, value in made.options.items())
    start = f"built again without {made.factor} ({options})"
    if made.failure is not None:
        return f"{start}: not measured, {made.failure}"
    if made.conclusion == "unchanged":
        return f"{start}, the outputs keep every bit: it is not this, or the engine ignored it"
    said = f"{start}, the final divergence is {_said(made.after)} instead of {_said(made.before)}"
    if made.removed is None:
        return said
    said += f": {_percent(made.removed)} of its square is gone"
    if made.claimed is None or made.conclusion == "measured":
        return said
    return f"{said}, the causes behind it claim {_percent(made.claimed)}: {made.conclusion}"


def _said(error: float | None) -> str:
    return "not comparable" if error is None else f"{error:.2e}"


def _percent(share: float) -> str:
    """A share in per cent, never rounded up to 100."""
    return f"{math.floor(share * 1e4) / 1e4:.2%}"
