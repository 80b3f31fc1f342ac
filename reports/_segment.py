"""The drill-down: everything about one segment, or one step around the network."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from auditor.errors import UsageError
from reports import _words as words
from reports._page import (
    COLORS,
    NARROWEST_NAME,
    TAG,
    Column,
    Page,
    Row,
    Span,
    elide,
    folder_of,
    name_nodes,
    right,
    tag,
    width_of,
)

if TYPE_CHECKING:
    from auditor.records.measured import Distance, Segment, TensorStats
    from auditor.records.report import AuditReport, BackendReport, Finding, PipelineStep


_MOST_MATCHES = 4


def render_segment(report: AuditReport, name: str, width: int | None, color: bool) -> str:
    """Everything about the segments that ``name`` means, on every backend that has them.

    Args:
        report: the audit.
        name: a segment id, node label, node key, tensor or operator.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.

    Raises:
        UsageError: nothing in the report has that name.
    """
    report = words.visible(report)
    page = Page(width, color)
    steps = report.pipeline.steps if report.pipeline else ()
    step = next((s for s in steps if name.lower() in (s.name, s.noise)), None)
    if step is not None:
        draw_step(page, report, step)
        return page.text()
    # What diverges comes first: a segment's number means another one on every backend.
    found = sorted(_find(report, words.visible(name)), key=lambda match: -match[1].introduced)
    crowd = Counter(backend.id for backend, _ in found)
    if max(crowd.values()) > _MOST_MATCHES:
        _draw_matches(page, words.visible(name), found)
    else:
        for backend, segment in found:
            draw_segment(page, report, backend, segment)
    return page.text()


def _score(explained: float) -> str:
    """Share explained as a score: 1 reproduces the error; never rounded up to 1."""
    if not math.isfinite(explained) or abs(explained) >= 10:
        return words.plain(explained)
    return f"{math.floor(explained * 1e4) / 1e4:.4f}"


def _range(pair: tuple[float, float]) -> str:
    return f"{words.plain(pair[0])} to {words.plain(pair[1])}"


def _find(report: AuditReport, name: str) -> list[tuple[BackendReport, Segment]]:
    """Segments meant by ``name``: by the first kind of name that fits any.

    A name shortened in the report (``model/blo…/Conv2D``) means all that it could stand for.
    """
    segments = [(b, s) for b in report.backends for s in b.segments]
    if not segments:
        raise UsageError("the report has no segments: no backend was audited", "Its gaps say why.")
    head, dots, tail = name.partition("…")
    kinds: tuple[Callable[[Segment], tuple[str, ...]], ...] = (
        lambda s: (s.id,),
        lambda s: (*s.nodes, *s.node_keys),
        lambda s: s.outputs,
        lambda s: s.inputs,
        lambda s: s.op_types,
        lambda s: (*s.modules, *(m.partition(" (")[0] for m in s.modules)),
    )
    for names_of in kinds:
        for same in (
            lambda known: known == name,
            lambda known: known.lower() == name.lower(),
            lambda known: bool(dots) and known.startswith(head) and known.endswith(tail),
        ):
            if found := [(b, s) for b, s in segments if any(map(same, names_of(s)))]:
                return found
    known = {n for _, s in segments for names_of in kinds for n in names_of(s)}
    inside = sorted((n for n in known if name and name.lower() in n.lower()), key=len)
    close = list(dict.fromkeys(inside[:3] + difflib.get_close_matches(name, known, 3, 0.5)))[:3]
    raise UsageError(
        f"no segment, node, tensor or operator is called `{name}`",
        f"Did you mean {' or '.join(f'`{n}`' for n in close)}?"
        if close
        else "Take a name from the report, such as a segment's id.",
    )


def _draw_matches(page: Page, name: str, found: Sequence[tuple[BackendReport, Segment]]) -> None:
    page.rule(f"{len(found)} segments match {name}")
    columns = (
        Column("backend"),
        Column("segment"),
        Column("accumulated", right=True, drop=1),
        *right("introduced", "impact"),
        Column("cause", drop=2),
        Column("ONNX nodes"),
    )
    root = folder_of([label for _, segment in found for label in segment.nodes])
    rows = [
        Row(
            (
                Span(backend.id),
                Span(segment.id, "bold"),
                Span(words.error(segment.accumulated)),
                Span(words.error(segment.introduced)),
                Span(words.percent(segment.leave_one_in)),
                Span(cause_of(segment)),
                Span(name_nodes(segment.nodes, page.width // 2, root)),
            )
        )
        for backend, segment in found
    ]
    page.grid(columns, rows)
    page.say(Span("Give a segment's id or a node's name to see one in full.", "dim"))


def _offender(finding: Finding) -> Span:
    return Span(
        f"offender {finding.rank}: {finding.severity} severity, {finding.confidence} confidence",
        COLORS[finding.severity],
    )


def draw_step(page: Page, report: AuditReport, step: PipelineStep) -> None:
    finding = next((f for f in report.findings if f.noise == step.noise), None)
    page.rule(f"pipeline, step {step.name}")
    if finding:
        page.say(_offender(finding), label=tag("rank"))
    page.say(Span(step.training), label=tag("training"))
    page.say(Span(step.deployment), label=tag("deployment"))
    page.say(
        Span(f"relative L2 {words.error(step.introduced)} when this step alone is as deployed"),
        Span(f"; {words.percent(step.bit_identical)} of elements bit-identical"),
        label=tag("hands on"),
    )
    alone = "not measured"
    if step.effect is not None:
        alone = (
            f"relative L2 {words.error(step.effect)}, {words.percent(step.leave_one_in)} of what "
            "all steps do together"
        )
    page.say(Span(alone, "bold"), label=tag("effect"))
    if varied := words.ranged(step.leave_one_in_spread, words.percent):
        page.say(Span(varied), label=tag(""))
    for consequence in step.consequences:
        said = f"{consequence.output}: {consequence.sentence}"
        page.say(Span(said), label=tag("it alone"))
    page.say(Span(words.percent(step.share)), label=tag("share"))
    for backend in report.backends:
        parts = backend.end_to_end.shares if backend.end_to_end else ()
        for part in (p for p in parts if p.noise == step.noise):
            said = f"{words.percent(part.share)} of the whole difference on {backend.id}"
            page.say(Span(said), label=tag("end to end"))
    if finding and finding.remedy:
        page.say(Span(finding.remedy), label=tag("remedy"))


def cause_of(segment: Segment) -> str:
    if segment.unmeasured:
        return "not measured"
    if segment.introduced <= segment.floor:  # what rounding may make needs no cause
        return "below its floor"
    return segment.noise or "unexplained"


def draw_segment(page: Page, report: AuditReport, backend: BackendReport, segment: Segment) -> None:
    finding = next(
        (f for f in report.findings if f.backend == backend.id and segment.id in f.segments), None
    )
    page.rule(f"{backend.id}, segment {segment.id}")
    nodes = [
        Row((Span(op, "bold"), Span(label), Span("" if key.startswith(label) else key, "dim")))
        for label, key, op in zip(segment.nodes, segment.node_keys, segment.op_types, strict=False)
    ]
    page.grid((Column(""), Column(""), Column("")), nodes)
    page.blank()
    page.say(_offender(finding) if finding else Span("not an offender"), label=tag("rank"))
    if segment.modules:
        page.say(Span(", ".join(segment.modules)), label=tag("from"))
    page.say(*_spans_of_kernels(backend, segment), label=tag("ran"))
    page.say(Span(segment.fidelity), label=tag("captured"))
    _draw_errors(page, segment)
    _draw_cause(page, segment)
    for made in words.about(backend, finding):
        page.say(Span(made.sentence), label=tag("without it"))
    if finding and finding.remedy:
        page.say(Span(finding.remedy), label=tag("remedy"))
    for tensor in segment.tensors:
        page.blank()
        _draw_tensor(page, tensor)


def _spans_of_kernels(backend: BackendReport, segment: Segment) -> list[Span]:
    spans: list[Span] = []
    for kernel in backend.kernels_of(segment.node_keys):
        facts = [kernel.type, kernel.primitive]
        if kernel.precision:
            facts.append(f"computes {kernel.precision}")
        if kernel.output_precision:
            facts.append(f"writes {kernel.output_precision}")
        spans.append(Span("\n" if spans else ""))
        spans += (Span(", ".join(f for f in facts if f)), Span(f"  {kernel.name}", "dim"))
    if spans:
        return spans
    stated = ", ".join(part for part in (segment.kernel, segment.precision) if part)
    return [Span(stated or "the engine does not say")]


def _draw_errors(page: Page, segment: Segment) -> None:
    if segment.unmeasured:
        page.say(Span(segment.unmeasured, "yellow"), label=tag("not measured"))
    ratio = segment.introduced / segment.floor if segment.floor > 0 else math.inf
    above = "below its floor" if ratio <= 1 else f"{words.times(ratio)} its floor"
    if math.isinf(segment.introduced):
        above = "not finite on one side; its floor"
    page.say(
        Span(f"introduced {words.error(segment.introduced)}", "bold"),
        Span(f" ({above} {words.error(segment.floor)})"),
        Span(
            f", inherited {words.error(segment.inherited)}, "
            f"accumulated {words.error(segment.accumulated)}"
        ),
        label=tag("relative L2"),
    )
    if segment.amplification is not None:
        page.say(
            Span(
                f"the accumulated error leaves {words.times(segment.amplification)} as large "
                "as it entered"
            ),
            label=tag("amplification"),
        )
    impact = "not measured"
    if segment.leave_one_in is not None:
        impact = (
            f"its error alone makes {words.percent(segment.leave_one_in)} of the final divergence"
        )
    if segment.impact_share is not None:
        impact += f"; share in the exact book-keeping {words.percent(segment.impact_share)}"
    page.say(Span(impact), label=tag("impact"))
    for what, spread in (
        ("its error alone", segment.leave_one_in_spread),
        ("share", segment.impact_share_spread),
    ):
        if varied := words.ranged(spread, words.percent):
            page.say(Span(f"{what}: {varied}"), label=tag(""))
    for consequence in segment.consequences:
        page.say(Span(words.alone([consequence])), label=tag("it alone"))
    if segment.one_step:
        page.say(
            Span(f"{words.percent(segment.one_step)} of the integers it writes are one step off"),
            label=tag("rounding"),
        )
    if place := segment.concentration:
        page.say(
            Span(
                f"{words.percent(place.share)} of the squared error is at index {place.index} of "
                f"axis {place.axis} (size {place.axis_size})",
                "yellow",
            ),
            label=tag("concentrated"),
        )


def _draw_cause(page: Page, segment: Segment) -> None:
    spans = [Span(cause_of(segment), "bold")]
    if segment.explained is not None:
        spans.append(
            Span(
                f" explains {words.percent(segment.explained)} of the introduced error; left over "
                f"{words.error(segment.residual)}"
            )
        )
    spans.append(Span(f"; {words.percent(segment.bit_identical)} of elements bit-identical"))
    page.say(*spans, label=tag("cause"))
    if segment.explained_on:
        first = f"looked for on sample {segment.explained_on}, the first above the floor"
        page.say(Span(first), label=tag(""))
    if varied := words.ranged(segment.explained_spread, _score):
        fits = f", which contradicts it on {segment.contradicted}" if segment.contradicted else ""
        page.say(Span(f"score {varied}{fits}"), label=tag(""))
    if not segment.hypotheses:
        return
    page.say(Span("scores: 1 reproduces the error, 0 or less does not", "dim"), label=tag("tried"))
    columns: tuple[Column, ...] = (
        Column("score", right=True),
        Column("", drop=1),
        Column("bits", right=True),
        Column("cause"),
        Column("form"),
    )
    rows = [
        Row(
            (
                Span(_score(h.explained), "bold" if h.explained == segment.explained else ""),
                Span(_bar(h.explained, 10), "green"),
                Span(words.percent(h.bit_identical)),
                Span(h.noise),
                Span(h.variant, "dim"),
            )
        )
        for h in sorted(segment.hypotheses, key=lambda h: -h.explained)
    ]
    if not page.fits(columns, rows, indent=2):  # forms differ in their middles
        beneath = [Row(row.cells[:-1], ((Span("  "), row.cells[-1]),)) for row in rows]
        columns, rows = columns[:-1], beneath
    page.grid(columns, rows, indent=2)


def _draw_tensor(page: Page, tensor: TensorStats) -> None:
    kind = f"  {tensor.dtype} {words.dims(tensor.shape)}"
    name = elide(tensor.name, max(page.width - TAG - width_of(kind), NARROWEST_NAME))
    page.say(Span(name, "bold"), Span(kind), label=tag(tensor.role))
    page.say(Span(_far(tensor.distance)), label=tag(""))
    ranges = f"{_range(tensor.reference_range)} in the reference, {_range(tensor.backend_range)}"
    page.say(Span(f"values {ranges} here", "dim"), label=tag(""))
    if tensor.role == "output" and any(tensor.histogram) and tensor.distance.relative_l2:
        _draw_histogram(page, tensor)


def _far(distance: Distance) -> str:
    if distance.relative_l2 == 0:
        return "equal to the reference"
    if math.isinf(distance.relative_l2):
        return f"not comparable: {distance.mismatch or 'values are not finite'}"
    return (
        f"relative L2 {words.error(distance.relative_l2)}, "
        f"max abs {words.plain(distance.max_abs)}, "
        f"SQNR {words.decibels(distance.sqnr_db)} dB, cosine {words.cosine(distance.cosine)}"
    )


def _draw_histogram(page: Page, tensor: TensorStats) -> None:
    """Elements by the size of their error, one bar per bin."""
    counts, edges = tensor.histogram, tensor.histogram_edges
    filled = [i for i, count in enumerate(counts) if count]
    total = sum(counts)
    page.say(
        Span("elements by |difference| over the reference's root mean square", "dim"),
        label=tag("errors"),
    )
    rows = []
    for i in range(filled[0], filled[-1] + 1):
        low, high = _power(edges[i]), _power(edges[i + 1])
        bin_ = f"below {high}" if i == 0 else f"{low} to {high}"
        bin_ = f"above {low}" if i == len(counts) - 1 else bin_
        share = counts[i] / total
        longest = max(counts) / total
        bar = _bar(share / longest, min(50, page.width - 40))
        rows.append(Row((Span(bin_), Span(words.percent(share)), Span(bar or " ", "cyan"))))
    page.grid((Column("", right=True), Column("", right=True), Column("")), rows, indent=2)


def _power(exponent: float) -> str:
    """Ten to that power, which itself may be too large for a float."""
    whole = math.floor(exponent)
    return f"{10 ** (exponent - whole):.1f}e{whole}"


def _bar(share: float, width: int) -> str:
    """A bar of eighths of a character; anything above zero shows."""
    if not share > 0:
        return ""
    eighths = max(1, round(min(share, 1.0) * width * 8))
    return "█" * (eighths // 8) + ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]
