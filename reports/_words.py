"""What every report format says alike: figures, the verdict's reason, causes and proofs in words.

Every name in a report comes from a model file or an engine and is untrusted. ``visible`` is the
first step of making it harmless; each format then escapes what its own syntax would interpret.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar, cast

from auditor.records.report import severity_of_output
from auditor.records.terms import PIPELINE, SEVERITIES, reaches

if TYPE_CHECKING:
    from auditor.records.backend import Provenance, Skipped
    from auditor.records.measured import (
        CategoryShare,
        Consequence,
        Counterfactual,
        FidelityProof,
        OutputDistance,
        Spread,
    )
    from auditor.records.model import ReferenceInfo
    from auditor.records.report import AuditReport, BackendReport, Finding
    from auditor.records.terms import Status

NONE = "-"  # in the place of a figure that was not measured

# Nearly all of a large report's values.
_HARMLESS = (float, int, bool, type(None))

T = TypeVar("T")


# --- making names harmless -----------------------------------------------------------------------


def visible(value: T) -> T:
    """A value with every unprintable character of its strings as a visible escape.

    Escapes, line breaks, direction overrides and lone surrogates can rewrite a terminal or make
    one name look like another.
    """
    if isinstance(value, str):
        return value if value.isprintable() else cast(T, "".join(map(_escape, value)))
    if isinstance(value, tuple):
        items = tuple(map(visible, value))
        return value if all(map(is_, items, value)) else cast(T, items)
    if isinstance(value, dict):
        return cast(T, {visible(k): visible(v) for k, v in value.items()})
    changes = {}
    for name in _fields(cast(Hashable, type(value))):
        old = getattr(value, name)
        if type(old) not in _HARMLESS and (new := visible(old)) is not old:
            changes[name] = new
    return dataclasses.replace(cast(Any, value), **changes) if changes else value


@functools.cache
def _fields(kind: Hashable) -> tuple[str, ...]:
    """The fields of a dataclass; none of any other type."""
    return tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def elide(text: str, room: int) -> str:
    """A text of at most ``room`` characters, its middle left out: names differ at their ends."""
    if len(text) <= room:
        return text
    head = (room - 1) * 2 // 5
    return f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}"


# --- figures -------------------------------------------------------------------------------------


def error(value: float | None) -> str:
    """A relative error with two significant digits: ``1.2e-2``."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "n/a"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def plain(value: float) -> str:
    """Any number with three significant digits."""
    if math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    digits, e, exponent = f"{value:.3g}".partition("e")
    return f"{digits}e{int(exponent)}" if e else digits


def percent(share: float | None) -> str:
    """A share in per cent; never rounded up to 100% or down to 0% (tiny ones lose their sign)."""
    if share is None or math.isnan(share):
        return NONE
    value = 100 * share
    size = abs(value)
    if math.isinf(value) or size >= 1e5:
        return f"{plain(value)}%"
    if size == 0 or size >= 100:
        return f"{value:.0f}%"
    if size < 0.01:
        return "<0.01%"
    if size >= 99.95:
        return f"{math.trunc(value * 100) / 100:.2f}%"
    return f"{value:.2f}%" if size < 0.995 else f"{value:.1f}%"


def decibels(value: float) -> str:
    """A ratio in dB with one decimal."""
    return f"{value:.1f}" if math.isfinite(value) else plain(value)


def cosine(value: float) -> str:
    """A cosine similarity with six decimals."""
    return NONE if math.isnan(value) else f"{value:.6f}"


def count(number: int, what: str) -> str:
    """A number of things: ``1 node``, ``2 nodes``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def dims(shape: Iterable[int]) -> str:
    """A shape: ``1x3x224x224``."""
    return "x".join(map(str, shape)) or "scalar"


# --- the story -----------------------------------------------------------------------------------


def headline(report: AuditReport) -> str:
    """The verdict's reason in one sentence."""
    outputs = [(b, o) for b in report.backends for o in b.outputs]
    if not outputs:
        return "no backend could be compared with the reference"
    backend, worst = max(outputs, key=lambda pair: pair[1].distance.relative_l2)
    largest, who = worst.distance.relative_l2, backend.id
    if math.isinf(largest):
        said = f"output {worst.name} of {who}: {distance(worst)}"
    elif largest == 0:
        said = "every backend's outputs equal the reference's"
    else:
        said = f"largest divergence of an output: {error(largest)} relative L2 on {who}"
        level = max((severity_of_output(b, o) for b, o in outputs), key=SEVERITIES.index)
        alone = not any(reaches(f.severity, report.fail_on) for f in report.findings)
        if report.judgement is None and alone and reaches(level, report.fail_on):
            said += f", {level} as a whole though no segment is"
    whole = max((o.distance.relative_l2 for _, o in systems(report)), default=None)
    if whole is not None:
        said += f", with the steps around the network {error(whole)}"
    counts = Counter(finding.severity for finding in report.findings)
    parts = [f"{counts[s]} {s}" for s in reversed(SEVERITIES) if counts[s]]
    found = count(len(report.findings), "finding") + (f" ({', '.join(parts)})" if parts else "")
    without = [b.id for b in report.backends if b.status != "audited"]
    missing = f"; no comparison with {', '.join(without)}" if without else ""
    return f"{said}; {found}{missing}"


def systems(report: AuditReport) -> list[tuple[BackendReport, OutputDistance]]:
    """Every output of the deployed systems: pipeline and backend together."""
    return [(b, o) for b in report.backends if b.end_to_end for o in b.end_to_end.outputs]


def end_to_end(backend: BackendReport) -> list[str]:
    """What the deployed system changes as a whole, a sentence for each output and the causes."""
    whole = backend.end_to_end
    if whole is None:
        return []
    lines = [
        f"end to end, {output.name}: {distance(output)}"
        + (f"; {output.consequence.sentence}" if output.consequence else "")
        for output in sorted(whole.outputs, key=lambda o: -o.distance.relative_l2)
    ]
    if all(o.distance.relative_l2 == 0 for o in whole.outputs):
        return [*lines, "end to end, nothing to explain"]
    of = f"shares over {count(whole.samples, 'sample')}: " if whole.samples else ""
    return [*lines, f"end to end, {of}{_shares(whole.shares, whole.unexplained_share)}"]


def of_step(found: Finding) -> bool:
    """Whether a finding is a step before or after the network."""
    return found.backend == PIPELINE


def fails(finding: Finding, report: AuditReport) -> bool:
    """Whether a finding fails the audit: by the policy or baseline if there is one."""
    if report.judgement is not None:
        return any(b.fingerprint == finding.fingerprint for b in report.judgement.broken)
    return reaches(finding.severity, report.fail_on)


def diverges(backend: BackendReport, output: OutputDistance, report: AuditReport) -> bool:
    """Whether a final output's divergence fails the audit, by the same rule."""
    if report.judgement is not None:
        broken = {(b.backend, b.output) for b in report.judgement.broken}
        return (backend.id, output.name) in broken
    return reaches(severity_of_output(backend, output), report.fail_on)


def rules(backend: BackendReport, report: AuditReport) -> list[str]:
    """Broken rules about a backend as a whole, such as its latency."""
    broken = report.judgement.broken if report.judgement else ()
    mine = [b for b in broken if b.backend == backend.id]
    return [b.sentence for b in mine if b.output is None and b.fingerprint is None]


def remedies(findings: Iterable[Finding]) -> list[tuple[str, str, str, int]]:
    """Backend, cause, what to do about it, and of how many findings it is a cause, in their order.

    Causes that stand beside the first one count like it.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    for finding in findings:
        first, *others = re.split(r"; against ([\w.]+): ", finding.remedy or "")
        causes = [(finding.noise or "unexplained", first)] if first else []
        causes += zip(others[::2], others[1::2], strict=True)
        found.update((finding.backend, *cause) for cause in causes)
    return [(*key, number) for key, number in found.items()]


def waived(finding: Finding, report: AuditReport) -> str | None:
    """Why a finding does not count; None where it does."""
    waivers = report.judgement.waived if report.judgement else ()
    return next((w.reason for w in waivers if w.fingerprint == finding.fingerprint), None)


def blocks(backend: BackendReport, report: AuditReport) -> bool:
    """Whether the audit is incomplete without this backend, which was not compared.

    Only a backend that was asked for by name counts; when none was, all of them did where no
    comparison was left.
    """
    needed = report.requested or (b.id for b in report.backends if report.exit_code == 3)
    return not backend.complete and backend.id in needed


def distance(output: OutputDistance) -> str:
    """How far an output is from the reference's, or why that cannot be said."""
    d = output.distance
    if math.isinf(d.relative_l2):
        return d.mismatch or "values cannot be compared"
    return (
        f"relative L2 {error(d.relative_l2)}, max abs {plain(d.max_abs)}, "
        f"SQNR {decibels(d.sqnr_db)} dB, cosine {cosine(d.cosine)}"
        + (f", top-1 {percent(output.top1_agreement)}" if output.top1_agreement is not None else "")
    )


def finding(found: Finding) -> str:
    """What was measured of a finding, in one sentence without its place."""
    if of_step(found):
        alone = "unknown" if found.effect is None else f"{error(found.effect)} relative L2"
        return (
            f"{found.noise}: this step alone changes what it hands on by "
            f"{error(found.introduced)} and what the system gives by {alone}, "
            f"{found.confidence} confidence"
        )
    impact = (
        f"{error(found.introduced)} relative L2 introduced"
        if found.leave_one_in is None
        else f"its error alone makes {percent(found.leave_one_in)} of the final divergence"
    )
    if found.noise is None:
        return f"unexplained, {impact}, {found.confidence} confidence"
    beside = f", with {', '.join(found.beside)} beside it," if found.beside else ""
    return (
        f"{found.noise}{beside} explains {percent(found.explained)} of the error introduced here, "
        f"{impact}, {found.confidence} confidence"
    )


def place(found: Finding, room: int) -> str:
    """The nodes of a finding, in at most ``room`` characters or a little more."""
    if not found.nodes:
        return found.segment
    more = f" and {count(len(found.nodes) - 1, 'more node')}" if len(found.nodes) > 1 else ""
    source = f", from {modules(found.modules, room)}" if found.modules else ""
    return elide(found.nodes[0], room) + more + source


def modules(names: tuple[str, ...], room: int) -> str:
    """Where nodes come from in the training code: the first, and how many more."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return elide(names[0], room) + more if names else ""


def causes(backend: BackendReport) -> str:
    """Where the final divergence comes from."""
    if all(o.distance.relative_l2 == 0 for o in backend.outputs):
        return "nothing to explain"
    return _shares(backend.categories, backend.unexplained_share)


def _shares(categories: Iterable[CategoryShare], unexplained: float) -> str:
    parts = [
        f"{c.noise}{'' if c.stage == 'inference' else f' ({c.stage})'} {percent(c.share)}"
        for c in sorted(categories, key=lambda c: -c.share)
    ]
    if math.isnan(unexplained):
        parts.append("no shares of a divergence that is not finite")
    elif unexplained or not parts:
        parts.append(f"unexplained {percent(unexplained)}")
    return ", ".join(parts)


def times(ratio: float) -> str:
    """How many times: ``3.91 times``, ``1,270 times``."""
    return f"{f'{ratio:,.0f}' if 1e3 <= ratio < 1e6 else plain(ratio)} times"


def ranged(spread: Spread | None, figure: Callable[[float], str]) -> str:
    """How far a number varied: ``12% to 98% over 4 samples``; empty where it rests on one."""
    if spread is None or spread.samples < 2:
        return ""
    low, high = figure(spread.low), figure(spread.high)
    return f"{low if low == high else f'{low} to {high}'} over {spread.samples} samples"


def books(backend: BackendReport) -> str:
    """What the shares rest on, and how far they varied; empty where no cause was looked for."""
    samples = backend.unexplained_spread.samples if backend.unexplained_spread else 0
    if samples < 2 or not any(s.explained_on is not None for s in backend.segments):
        return ""
    varied = [
        f"{c.noise} {percent(c.spread.low)} to {percent(c.spread.high)}"
        for c in backend.categories
        if c.spread is not None and c.spread.deviation >= 0.005
    ]
    told = f" ({', '.join(varied)})" if varied else ""
    return (
        f"means over samples: causes over {samples}{told}, segments' shares over "
        f"{backend.booked_samples}"
    )


def told(output: OutputDistance) -> str:
    """What a diverging output's reader must know of it and of its samples; empty where equal."""
    facts: list[str] = []
    if output.distance.relative_l2 == 0:
        return ""
    how = ""
    if output.consequence is not None:
        how = f", read as {output.kind}{'' if output.kind_stated else ' (assumed)'}"
        facts.append(output.consequence.sentence)
    finite = math.isfinite(output.distance.relative_l2)
    if finite and output.spread is not None and (samples := ranged(output.spread, error)):
        facts.append(f"relative L2 {samples}, worst on sample {output.spread.high_at}")
    if output.one_step:
        facts.append(f"{percent(output.one_step)} of its elements are one step off")
    if output.nonfinite:
        where = f"{count(output.nonfinite, 'sample')}, first on sample {output.first_nonfinite}"
        facts.append(f"NaN or infinity on one side only on {where}")
    return f"{output.name}{how}: {'; '.join(facts)}" if facts else ""


def alone(consequences: Iterable[Consequence]) -> str:
    """What one segment's error alone does to what is read off the outputs; empty where nothing."""
    return "; ".join(f"{c.output}: {c.sentence}" for c in consequences)


def causes_of(made: Counterfactual) -> str:
    """The causes that a counterfactual speaks to."""
    return ", ".join(made.noises) or "no cause in particular"


def compared(value: float | None) -> str:
    """A divergence, or that there is none to give: shapes or non-finite values disagree."""
    return "n/a" if value is None else error(value)


def latencies(made: Counterfactual) -> str:
    """The time of one run before and after, in milliseconds."""
    if made.latency_before is None or made.latency_after is None:
        return NONE
    return f"{plain(1e3 * made.latency_before)} → {plain(1e3 * made.latency_after)}"


def latency(backend: BackendReport) -> str:
    """How long a run takes, beside ONNX Runtime; empty where that was not measured."""
    made = backend.latency
    if made is None:
        return ""
    return (
        f"latency {plain(1e3 * made.seconds)} ms, {plain(made.ratio)} times the "
        f"{plain(1e3 * made.reference_seconds)} ms of ONNX Runtime's defaults"
    )


def about(backend: BackendReport, finding: Finding | None) -> tuple[Counterfactual, ...]:
    """The counterfactuals that speak to a finding's cause; of an unexplained one, the others."""
    if finding is None:
        return ()
    return tuple(
        c
        for c in backend.counterfactuals
        if (finding.noise in c.noises if finding.noise else c.claimed is None)
    )


def proved(proof: FidelityProof) -> bool:
    """Whether observing left the program alone, for every tensor observed."""
    return proof.outputs_bitwise_equal and proof.program_unchanged and not proof.perturbing


def proof(found: FidelityProof) -> str:
    """Whether observing changed the program, in words."""
    seen = found.output_proved + found.cone_proved
    outputs = "outputs bitwise equal" if found.outputs_bitwise_equal else "outputs differ"
    program = "program unchanged" if found.program_unchanged else "program changed"
    facts = [f"{seen}/{found.candidates} tensors", outputs, program]
    if found.cone_proved:
        facts[0] += f" ({found.cone_proved} by cone)"
    if found.perturbing:
        facts.insert(1, f"{found.perturbing} perturbing")
    if found.run_to_run > 0:
        facts.append(f"run-to-run noise {error(found.run_to_run)}")
    if found.rebuild:
        facts.append(f"rebuild noise {error(found.rebuild)}")
    if found.cached:
        facts.append("from the cache")
    return f"{'proved' if proved(found) else 'not proved'}: {', '.join(facts)}"


def notes(backend: BackendReport) -> tuple[str, ...]:
    """What the reader must know about a backend: its outputs, compile-time facts, warnings."""
    read = (*map(told, backend.outputs), books(backend), *end_to_end(backend), latency(backend))
    made = backend.provenance.notes if backend.provenance else ()
    return (*filter(None, read), *made, *backend.warnings)


def ran(made: Provenance, status: Status) -> str:
    """Engine, device, and the precisions that the engine says it computes in."""
    counts = Counter(k.precision for k in made.kernels if k.precision)
    kinds = ", ".join(f"{number} {precision}" for precision, number in counts.most_common())
    said = "built by " if status == "built" else ""
    said += f"{made.engine} {made.version}{f' on {made.device}' if made.device else ''}"
    if made.kernels:
        said += f", {count(len(made.kernels), 'kernel')}{f' ({kinds})' if kinds else ''}"
    return said + "".join(f", {key}={value}" for key, value in sorted(made.options.items()))


def reference(info: ReferenceInfo) -> str:
    """What the backends are compared with."""
    return f"{info.engine}, version {info.version}, {info.precision}"


def by_reason(skipped: Iterable[Skipped]) -> dict[str, list[str]]:
    """Names of the tensors that were not observed, by the reason."""
    found: dict[str, list[str]] = {}
    for skip in skipped:
        found.setdefault(skip.reason, []).append(skip.tensor)
    return found
