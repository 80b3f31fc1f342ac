"""From measured segments to ranked findings, a verdict and an exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType

from auditor.attribution.hypotheses import NAMED
from auditor.ports import Noise
from auditor.records.measured import Segment
from auditor.records.report import (
    Agreement,
    BackendReport,
    Finding,
    PipelineReport,
    PipelineStep,
    severity_of_output,
)
from auditor.records.terms import PIPELINE, Confidence, Severity, Verdict, reaches, severity
from auditor.verdict.fingerprint import fingerprint

# What a person looks for first in a segment, and what last.
_CONTRACTIONS = frozenset(
    {
        *("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "Gemm", "MatMul", "Einsum"),
        *("MatMulInteger", "QLinearMatMul", "Attention", "LSTM", "GRU", "RNN"),
    }
)
_PLUMBING = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Reshape", "Flatten"),
        *("Squeeze", "Unsqueeze", "Transpose", "Shape", "Concat", "Split", "Slice", "Gather"),
        *("Expand", "Pad", "Constant"),
    }
)

_VAIN = ("unchanged", "contradicted")  # conclusions of a counterfactual that did not help

_MAKE_ANEW = (
    "make the compiled file again from this model's weights, or audit it against the model that "
    "it was made from: with its values the reference has this error too"
)


def findings(
    backends: Sequence[BackendReport],
    effects: Mapping[tuple[str, str], float],
    noises: Mapping[str, Noise],
    files: Set[tuple[str, str]] = frozenset(),
) -> tuple[Finding, ...]:
    """Every segment above its floor, worst first; overlapping segments are one finding.

    Args:
        backends: the measured backends.
        effects: by (backend, segment id): relative L2 that the segment's error alone causes in
            the final outputs.
        noises: the catalogue by id.
        files: (backend, segment id) whose error other values in the compiled file make.
    """
    unranked = [
        _finding(backend, group, effects, noises, files)
        for backend in backends
        for group in _merged([s for s in backend.segments if s.introduced > s.floor])
    ]
    unranked.sort(key=_order)
    return tuple(_ranked(finding, rank) for rank, finding in enumerate(unranked, 1))


def with_steps(
    found: Sequence[Finding], pipeline: PipelineReport, noises: Mapping[str, Noise]
) -> tuple[Finding, ...]:
    """The steps around the network that change a bit, ranked among the findings."""
    steps = [_step(s, noises[s.noise]) for s in pipeline.steps if s.bit_identical < 1]
    return with_more(found, steps)


def with_more(found: Sequence[Finding], others: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings made elsewhere, ranked among those there are."""
    both = sorted((*found, *others), key=_order)
    return tuple(_ranked(finding, rank) for rank, finding in enumerate(both, 1))


def tried(
    found: Sequence[Finding], backends: Sequence[BackendReport], noises: Mapping[str, Noise]
) -> tuple[Finding, ...]:
    """The findings, whose remedies no longer name options that a counterfactual set in vain."""
    by_id = {backend.id: backend for backend in backends}
    return tuple(
        _reconsidered(f, by_id[f.backend], noises) if f.backend in by_id else f for f in found
    )


def _reconsidered(found: Finding, backend: BackendReport, noises: Mapping[str, Noise]) -> Finding:
    causes = [n for id in (found.noise or "", *found.beside) if (n := noises.get(id))]
    vain = {
        key: value
        for made in backend.counterfactuals
        if made.conclusion in _VAIN and {*made.noises} & {noise.id for noise in causes}
        for key, value in made.options.items()
    }
    if not vain or found.remedy != _remedy(backend, causes, other_file=False):
        return found
    return replace(found, remedy=_remedy(backend, causes, other_file=False, vain=vain))


def verdict(
    backends: Sequence[BackendReport],
    found: Sequence[Finding],
    requested: Sequence[str],
    fail_on: Severity,
) -> tuple[Verdict, int]:
    """The verdict and the exit code: findings win over gaps.

    A backend's final divergence counts by the same scale as a finding, since many small errors
    can add up to what none of them does alone (``severity_of_output``).
    """
    worst = [f.severity for f in found]
    worst += [severity_of_output(b, o) for b in backends for o in b.outputs]
    worst += [
        severity(o.distance.relative_l2)
        for b in backends
        if b.end_to_end
        for o in b.end_to_end.outputs
    ]
    if any(reaches(level, fail_on) for level in worst):
        return "fail", 1
    if any(not b.complete for b in backends if b.id in requested):
        return "incomplete", 3
    if not any(b.status == "audited" for b in backends):
        return "incomplete", 3
    return "pass", 0


def outlier(agreement: Sequence[Agreement]) -> str | None:
    """The one participant that all others agree against, if there is one.

    It must be at least ten times as far from its nearest neighbour as the others are from
    theirs; with fewer than three participants nobody can be outvoted.
    """
    distances: dict[str, list[float]] = {}
    for pair in agreement:
        distances.setdefault(pair.a, []).append(pair.relative_l2)
        distances.setdefault(pair.b, []).append(pair.relative_l2)
    if len(distances) < 3:
        return None
    nearest = {who: min(values) for who, values in distances.items()}
    worst = max(nearest, key=nearest.__getitem__)
    rest = max(d for who, d in nearest.items() if who != worst)
    return worst if nearest[worst] > 10 * rest and nearest[worst] > 1e-5 else None


def _merged(flagged: list[Segment]) -> list[list[Segment]]:
    """Groups of segments that share a node and a cause: one fault seen through each of them."""
    groups: list[list[Segment]] = []
    for segment in flagged:
        nodes = set(segment.node_keys)
        home = next(
            (
                g
                for g in groups
                if g[0].noise == segment.noise and any(nodes & set(s.node_keys) for s in g)
            ),
            None,
        )
        if home is None:
            groups.append([segment])
        else:
            home.append(segment)
    return groups


def _finding(
    backend: BackendReport,
    group: list[Segment],
    effects: Mapping[tuple[str, str], float],
    noises: Mapping[str, Noise],
    files: Set[tuple[str, str]],
) -> Finding:
    def effect_of(segment: Segment) -> float:
        return effects.get((backend.id, segment.id), -1.0)

    lead = max(group, key=lambda s: (effect_of(s), s.introduced))
    effect = effects.get((backend.id, lead.id))
    noise = noises.get(lead.noise or "")
    beside = next((h.beside for h in lead.hypotheses if h.noise == lead.noise), ())
    involved = [n for id in (lead.noise or "", *beside) if (n := noises.get(id))]
    shares = [s.impact_share for s in group if s.impact_share is not None]
    named = [pair for s in group for pair in zip(s.nodes, s.op_types, strict=True)]
    named.sort(key=lambda pair: (pair[1] in _PLUMBING) - (pair[1] in _CONTRACTIONS))
    return Finding(
        rank=0,
        backend=backend.id,
        segment=lead.id,
        segments=tuple(s.id for s in group),
        nodes=tuple(dict.fromkeys(node for node, _ in named)),
        op_types=tuple(dict.fromkeys(op for _, op in named)),
        kernel=lead.kernel,
        noise=lead.noise,
        stage=noise.stage if noise else "inference",
        leave_one_in=lead.leave_one_in,
        impact_share=sum(shares) if shares else None,
        introduced=lead.introduced,
        effect=effect,
        explained=lead.explained,
        bit_identical=lead.bit_identical,
        # Without a measured effect the error itself is the only thing known: judge it by that.
        severity=severity(effect if effect is not None else lead.introduced),
        confidence=_confidence(backend, lead, noise),
        evidence=_evidence(backend, lead, noise),
        remedy=_remedy(backend, involved, (backend.id, lead.id) in files),
        fingerprint=fingerprint(backend.id, (k for s in group for k in s.node_keys), lead.noise),
        leave_one_in_spread=lead.leave_one_in_spread,
        explained_spread=lead.explained_spread,
        consequences=lead.consequences,
        modules=tuple(dict.fromkeys(m for s in (lead, *group) for m in s.modules)),
        beside=beside,
    )


def _remedy(
    backend: BackendReport,
    noises: Sequence[Noise],
    other_file: bool,
    vain: Mapping[str, str] = MappingProxyType({}),
) -> str | None:
    """What to do about a cause and those beside it.

    At the file, where that makes the error by more than its roundings. ``vain``: options that
    do not help.
    """
    if other_file and (not noises or noises[0].type != "data precision"):
        return _MAKE_ANEW
    made = backend.provenance
    id = (made.backend if made else "") or backend.id  # a trace bears the name that it was given
    options = {**(made.options if made else {}), **vain}
    said = [
        f"{f'against {noise.id}: ' if position else ''}{text}"
        for position, noise in enumerate(noises)
        if (text := noise.remedy(id.partition(":")[0], options))
    ]
    return "; ".join(said) or None


def _step(step: PipelineStep, noise: Noise) -> Finding:
    effect = step.effect
    handed = "network's input" if noise.stage == "pre-processing" else "result"
    seen = [f"its change alone: {c.output}: {c.sentence}" for c in step.consequences]
    return Finding(
        rank=0,
        backend=PIPELINE,
        segment=step.name,
        segments=(step.name,),
        nodes=(step.name,),
        op_types=(),
        kernel=step.deployment,
        noise=step.noise,
        stage=noise.stage,
        leave_one_in=step.leave_one_in,
        impact_share=step.share,
        introduced=step.introduced,
        effect=effect,
        explained=None,
        bit_identical=step.bit_identical,
        severity=severity(effect if effect is not None else step.introduced),
        confidence="high" if effect is not None else "medium",  # the step itself was switched
        evidence=(
            f"training: {step.training}; deployment: {step.deployment}",
            f"switched alone it changes the {handed} by relative L2 {step.introduced:.2e}, "
            f"{step.bit_identical:.1%} of elements bit-identical",
            *seen,
        ),
        remedy=noise.remedy(PIPELINE),
        fingerprint=fingerprint(PIPELINE, [step.name], step.noise),
        leave_one_in_spread=step.leave_one_in_spread,
        consequences=step.consequences,
    )


def _confidence(backend: BackendReport, segment: Segment, noise: Noise | None) -> Confidence:
    proved = segment.fidelity != "perturbing"
    if noise is None:
        # The place is sure, the cause is not.
        return "medium" if proved else "low"
    explained = segment.explained or 0.0
    left = math.sqrt(max(0.0, 1 - explained)) * segment.introduced
    strong = explained >= 0.99 and (
        segment.bit_identical >= 0.9  # or what is left is rounding
        or left <= segment.floor
        or noise.stated_by(backend.kernels_of(segment.node_keys))
    )
    if segment.contradicted:  # one step less than on samples that all agree
        return "medium" if strong and proved else "low"
    return "high" if strong and proved else "medium"


def _evidence(backend: BackendReport, segment: Segment, noise: Noise | None) -> tuple[str, ...]:
    lines: list[str] = []
    for tried in segment.hypotheses:
        lines.append(
            f"replaying {tried.noise} ({tried.variant}) explains {tried.explained:.4f} of the "
            f"error, {tried.bit_identical:.1%} of elements bit-identical"
        )
    if noise is None and any(t.explained >= NAMED for t in segment.hypotheses[:1]):
        lines.append(
            "none of these is named: several fit, or too little differs to tell a cause from chance"
        )
    lines[1:1] = _over_samples(segment)  # beside the best hypothesis, which they are about
    lines += segment.constants
    lines += [f"its error alone: {c.output}: {c.sentence}" for c in segment.consequences]
    ratio = segment.introduced / segment.floor if segment.floor > 0 else math.inf
    lines.append(
        f"introduced error {segment.introduced:.2e} is {ratio:.3g} times the floor "
        f"{segment.floor:.2e}"
    )
    if noise and noise.stated_by(backend.kernels_of(segment.node_keys)):
        lines.append(f"the engine itself states {segment.precision or noise.id} here")
    return tuple(lines)


def _over_samples(segment: Segment) -> list[str]:
    """What the samples after the one on which the cause was looked for say of it."""
    lines: list[str] = []
    if segment.explained_on:
        lines.append(f"first above its floor on sample {segment.explained_on}")
    shares = segment.explained_spread
    if shares is None or shares.samples < 2:
        return lines
    lines.append(
        f"over {shares.samples} samples that cause explains {shares.low:.4f} to {shares.high:.4f}"
    )
    if segment.contradicted:
        lines.append(
            f"it does not fit {segment.contradicted} of these samples, worst sample "
            f"{shares.low_at} ({shares.low:.4f}): another cause is at work there"
        )
    if segment.noise is None:
        lines.append("over all samples it explains too little to be named")
    return lines


def _order(finding: Finding) -> tuple[float, float]:
    effect = finding.effect if finding.effect is not None else -1.0
    return (-effect, -finding.introduced)


def _ranked(finding: Finding, rank: int) -> Finding:
    return replace(finding, rank=rank)
