"""The report for people, in a terminal.

Every name in a report comes from a model file or an engine and is untrusted. Records are made
harmless as a whole before anything is drawn (``words.visible``), and text is never parsed as
markup.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from reports import _words as words
from reports._page import (
    COLORS,
    NARROWEST_NAME,
    Column,
    Page,
    Row,
    Span,
    detail,
    elide,
    folder_of,
    join,
    name_nodes,
    right,
    tag,
    unobserved,
    width_of,
)

if TYPE_CHECKING:
    from auditor.records.backend import Gap
    from auditor.records.measured import Counterfactual
    from auditor.records.report import (
        AuditReport,
        BackendReport,
        Finding,
        Judgement,
        PipelineReport,
    )


TOP = 10  # offenders shown; the JSON report has all of them
_MEDIUM = 110  # from here an offender's figures, cause and segment share one line
_MOST_OUTPUTS = 4

_MOST_RULES = 8
_REASON = 600  # characters of an engine's message or note shown; the JSON report has all of it
_CONCLUSIONS = {"confirmed": "green", "contradicted": "yellow", "failed": "yellow"}


class _Terminal:
    """Report format ``terminal``."""

    name = "terminal"
    suffixes = (".txt",)

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report: verdict, backends, offenders, agreement, gaps."""
        report = words.visible(report)
        page = Page(width, color)
        _draw_verdict(page, report)
        if report.pipeline:
            _draw_pipeline(page, report.pipeline)
        _draw_backends(page, report)
        _draw_findings(page, report)
        _draw_counterfactuals(page, report)
        _draw_agreement(page, report)
        _draw_gaps(page, report)
        _draw_footer(page, report)
        return page.text()


RENDERER = _Terminal()


def _draw_verdict(page: Page, report: AuditReport) -> None:
    model, stimulus, reference = report.model, report.stimulus, report.reference
    page.say(
        Span(f" {report.verdict.upper()} ", COLORS[report.verdict]),
        Span(f"  {os.path.basename(model.path)}", "bold"),
        Span(f"  exit code {report.exit_code}", "dim"),
    )
    page.say(Span(words.headline(report)), label=tag("verdict", 11))
    if report.judgement is not None:
        _draw_judgement(page, report.judgement)
    _draw_remedies(page, report.findings)
    producer = f", from {model.producer}" if model.producer else ""
    page.say(
        Span(
            f"{model.path}, sha256 {model.sha256[:12]}, opset {model.opset}, "
            f"{words.count(model.nodes, 'node')}, {model.parameters:,} parameters{producer}",
            "dim",
        ),
        label=tag("model", 11),
    )
    if model.candidate:
        page.say(Span(f"{model.candidate}, compiled by the backends"), label=tag("candidate", 11))
    shapes = ", ".join(f"{name} {words.dims(shape)}" for name, shape in stimulus.shapes.items())
    seed = f", seed {stimulus.seed}" if stimulus.seed is not None else ""
    source = f" from {stimulus.source}" if stimulus.source else ""
    page.say(
        Span(
            f"{words.count(stimulus.samples, stimulus.kind + ' sample')}{source}{seed}: {shapes}",
            "yellow" if stimulus.kind == "synthetic" else "dim",
        ),
        label=tag("inputs", 11),
    )
    for note in stimulus.notes:
        page.say(Span(note, "yellow"), label=tag("", 11))
    page.say(
        Span(words.reference(reference), "dim"),
        label=tag("reference", 11),
    )


def _draw_judgement(page: Page, judgement: Judgement) -> None:
    """Draw what the verdict rests on: the rules broken, or that all hold."""
    broken = judgement.broken
    held = words.count(len(broken), "broken rule") if broken else "every rule holds"
    waived = f"; {words.count(len(judgement.waived), 'finding')} waived" if judgement.waived else ""
    style = "red" if broken else "green"
    page.say(Span(f"{held}{waived} ({judgement.source})", style), label=tag("judged by", 11))
    for rule in broken[:_MOST_RULES]:
        page.say(Span(rule.sentence, "red"), label=tag("", 11))
    if len(broken) > _MOST_RULES:
        more = (
            f"and {len(broken) - _MOST_RULES} more: the JSON report has them all (-o report.json)"
        )
        page.say(Span(more, "dim"), label=tag("", 11))
    for note in judgement.notes:
        page.say(Span(note, "dim"), label=tag("", 11))


def _draw_remedies(page: Page, findings: Sequence[Finding]) -> None:
    for who, noise, remedy, number in words.remedies(findings):
        page.say(
            Span(f"{who}, {noise} ({words.count(number, 'finding')}): ", "bold"),
            Span(remedy),
            label=Span(f"{'remedy':<11}", "green"),
        )


_FIGURES = (
    Column("backend"),
    Column("output"),
    *right("rel. L2", "max abs", "SQNR dB"),
    Column("cosine", right=True, drop=2),
    Column("top-1", right=True, drop=1),
    Column("causes"),
    Column("proof"),
)


def _draw_pipeline(page: Page, pipeline: PipelineReport) -> None:
    """The steps that differ, in the order of execution; as ranked they are among the offenders."""
    page.rule("Around the network: what deployment changes")
    columns = (
        Column("step"),
        *right("introduced", "effect", "share", "bits"),
    )
    rows = [
        Row(
            (
                Span(step.name, "bold"),
                Span(words.error(step.introduced)),
                Span("not measured" if step.effect is None else words.error(step.effect)),
                Span(words.percent(step.share)),
                Span(words.percent(step.bit_identical)),
            ),
            (
                detail("  training", Span(f" {step.training}")),
                detail("  deployed", Span(f" {step.deployment}")),
                *(
                    detail("  alone", Span(f" {consequence.output}: {consequence.sentence}"))
                    for consequence in step.consequences
                ),
            ),
        )
        for step in pipeline.steps
    ]
    page.grid(columns, rows)
    for output in pipeline.outputs:
        said = f"{output.name}: {words.distance(output)}"
        if output.consequence:
            said += f"; {output.consequence.sentence}"
        page.say(Span(said), label=Span("together", "bold"), begin=12)


def _draw_backends(page: Page, report: AuditReport) -> None:
    page.rule("Backends: final divergence from the reference")
    for columns in (_FIGURES, _FIGURES[:-1], _FIGURES[:-2]):
        beside = len(columns) - len(_FIGURES) + 2
        rows = [row for backend in report.backends for row in _backend_rows(backend, beside)]
        if page.fits(columns, rows):
            break
    page.grid(columns, rows)
    told = [(backend, tuple(_backend_facts(backend))) for backend in report.backends]
    if any(facts for _, facts in told):
        page.blank()
    for backend, facts in told:
        for number, fact in enumerate(facts):
            page.say(fact, label=Span("" if number else backend.id, "bold"), begin=9)


def _backend_rows(backend: BackendReport, beside: int) -> list[Row]:
    """One line per output, worst first; causes and proof in the columns beside, or beneath."""
    who = Span(backend.id, "bold")
    if not backend.outputs:
        reason = backend.gap.reason if backend.gap else "no output was compared"
        style = "yellow" if backend.status == "built" else "red"
        return [Row((who, Span(elide(reason, _REASON), style)))]
    proof = Span("not proved: nothing was captured", "yellow")
    if backend.fidelity:
        good = words.proved(backend.fidelity)
        proof = Span(words.proof(backend.fidelity), "green" if good else "yellow")
    said = (Span(words.causes(backend)), proof)
    rows: list[Row] = []
    worst = sorted(backend.outputs, key=lambda o: -o.distance.relative_l2)
    for output in worst[:_MOST_OUTPUTS]:
        first = Span("") if rows else who
        d = output.distance
        if math.isinf(d.relative_l2):
            why = d.mismatch or "values cannot be compared"
            rows.append(Row((first, Span(f"{output.name}: {why}", "red"))))
            continue
        cells = (
            first,
            Span(output.name),
            Span(words.error(d.relative_l2), "bold"),
            Span(words.plain(d.max_abs)),
            Span(words.decibels(d.sqnr_db)),
            Span(words.cosine(d.cosine)),
            Span(words.percent(output.top1_agreement)),
        )
        rows.append(Row(cells + (((Span(""),) * beside) if rows else said[:beside])))
    if len(worst) > _MOST_OUTPUTS:
        more = f"and {len(worst) - _MOST_OUTPUTS} more outputs, closer than these"
        rows.append(Row((Span(""), Span(more, "dim"))))
    # A line that says why nothing can be compared has no columns beside it.
    left = said if math.isinf(worst[0].distance.relative_l2) else said[beside:]
    beneath = tuple((Span(" " * 7), span) for span in left)
    rows[-1] = Row(rows[-1].cells, beneath)
    return rows


def _backend_facts(backend: BackendReport) -> Iterable[Span]:
    """What ran, and what the reader must know about it."""
    if backend.provenance:
        yield Span(words.ran(backend.provenance, backend.status), "dim")
    if backend.input_control is not None:
        times = words.plain(backend.input_control)
        yield Span(f"control: the reference amplifies noise on its input {times} times", "dim")
    for output in sorted(backend.outputs, key=lambda o: -o.distance.relative_l2)[:_MOST_OUTPUTS]:
        if told := words.told(output):
            yield Span(told)
    if books := words.books(backend):
        yield Span(books, "dim")
    for line in words.end_to_end(backend):
        yield Span(line)
    if latency := words.latency(backend):
        yield Span(latency)
    for note in backend.provenance.notes if backend.provenance else ():
        yield Span(f"note: {elide(note, _REASON)}")
    for warning in backend.warnings:
        yield Span(f"warning: {warning}", "yellow")


def _draw_findings(page: Page, report: AuditReport) -> None:
    page.rule("Ranked offenders")
    if not report.findings:
        page.say(Span("No segment introduced an error above its floor."))
        return
    page.say(
        Span(
            "ranked by what each error alone changes in the outputs; impact: that, as part of the "
            "final divergence; share: its part in the exact book-keeping, which sums to 100%; "
            "introduced: relative L2 made here; explained, bits: how much of it, and how many "
            "elements exactly, replaying the cause reproduces",
            "dim",
        )
    )
    columns = [
        Column("#", right=True),
        Column("severity"),
        Column("backend"),
        Column("impact", right=True),
        Column("share", right=True, drop=2),
        Column("introduced", right=True),
        Column("explained", right=True, drop=1),
        Column("bits", right=True, drop=3),
    ]
    if page.width >= _MEDIUM:
        columns += [Column("confidence"), Column("segment"), Column("cause")]
    shown, more = report.findings[:TOP], report.findings[TOP:]
    root = folder_of([n for finding in shown if not words.of_step(finding) for n in finding.nodes])
    page.grid(columns, [_finding_row(page, finding, root) for finding in shown])
    page.blank()
    if more:
        page.say(
            Span(f"and {len(more)} more", "bold"),
            Span(f", {more[0].severity} at most: the JSON report has them all (-o report.json)"),
        )
    page.say(
        Span("One in full: "),
        Span(f"audit show report.json --layer {shown[0].segment}", "bold"),
    )


def _operators(finding: Finding, room: int) -> str:
    return finding.stage if words.of_step(finding) else join(finding.op_types, ", ", room)


def _finding_row(page: Page, finding: Finding, root: str) -> Row:
    cause = Span(finding.noise or "unexplained", "" if finding.noise else "yellow")
    cells = (
        Span(str(finding.rank), "bold"),
        Span(finding.severity, COLORS[finding.severity]),
        Span(finding.backend),
        Span(words.percent(finding.leave_one_in), "bold"),
        Span(words.percent(finding.impact_share)),
        Span(words.error(finding.introduced)),
        Span(words.percent(finding.explained)),
        Span(words.percent(finding.bit_identical)),
    )
    beside = (Span(finding.confidence), Span(finding.segment), cause)
    room = page.width - 4
    known = "\n".join(finding.nodes).replace("/", ".")
    source = words.modules(tuple(m for m in finding.modules if m not in known), room - 20)
    effects = tuple(
        (Span("  "), Span(text, "dim"))
        for text in (
            _varied("beside it:", ", ".join(finding.beside)),
            _varied("from", source),
            _varied("alone:", words.alone(finding.consequences)),
            _varied("impact", words.ranged(finding.leave_one_in_spread, words.percent)),
        )
        if text
    )
    kernel = finding.kernel or "kernel not stated"
    if page.width >= _MEDIUM:
        ran = f"  {elide(kernel, room // 3)}"
        operators = Span(f"  {_operators(finding, room // 3)}", "dim")
        names = Span(
            name_nodes(finding.nodes, room - width_of(operators.text) - width_of(ran), root)
        )
        named = (Span("  "), names, operators, Span(ran, "dim"))
        return Row((*cells, *beside), (named, *effects))
    operators = Span(f" ({_operators(finding, room // 3)})", "dim")
    names = Span(name_nodes(finding.nodes, room - width_of(operators.text), root))
    start = f"{finding.segment}: "
    told = f", {finding.confidence} confidence; "
    left = room - width_of(start + cause.text + told)
    ran = elide(kernel, left if left >= NARROWEST_NAME else room)
    return Row(
        cells,
        (
            (Span("  "), names, operators),
            (Span("  "), Span(start), cause, Span(told), Span(ran, "dim")),
            *effects,
        ),
    )


def _varied(what: str, told: str) -> str:
    return f"{what} {told}" if told else ""


def _draw_counterfactuals(page: Page, report: AuditReport) -> None:
    """What building a backend's program again without one factor did, and what it costs."""
    made = [(backend, c) for backend in report.backends for c in backend.counterfactuals]
    if not made:
        return
    page.rule("Counterfactuals: the same program without one factor")
    page.say(
        Span(
            "before, after: relative L2 of the final outputs; removed: share of its square that "
            "went with the factor; claimed: share that the causes it can bring account for; time: "
            "median of a run with and without the factor, in turn",
            "dim",
        )
    )
    columns = (
        Column("backend"),
        *right("before", "after", "removed"),
        Column("claimed", right=True, drop=2),
        Column("time, ms", right=True, drop=1),
        Column("conclusion"),
    )
    page.grid(columns, [_counterfactual_row(backend.id, c) for backend, c in made])


def _counterfactual_row(who: str, made: Counterfactual) -> Row:
    conclusion = Span(made.conclusion, _CONCLUSIONS.get(made.conclusion, ""))
    without = (Span("  without "), Span(made.factor, "bold"), Span(f": {words.causes_of(made)}"))
    backend = who.partition(":")[0]
    options = " ".join(f"--option {backend}.{key}={value}" for key, value in made.options.items())
    details = (without, (Span("  "), Span(options, "dim")))
    if made.failure is not None:
        why = Span(elide(made.failure, _REASON), "yellow")
        return Row((Span(who), conclusion), (*details, (Span("  "), why)))
    cells = (
        Span(who),
        Span(words.compared(made.before), "bold"),
        Span(words.compared(made.after), "bold"),
        Span(words.percent(made.removed)),
        Span(words.percent(made.claimed)),
        Span(words.latencies(made)),
        conclusion,
    )
    return Row(cells, details)


def _draw_agreement(page: Page, report: AuditReport) -> None:
    if not report.agreement:
        return
    page.rule("Agreement: relative L2 between final outputs")
    names = list(dict.fromkeys(n for pair in report.agreement for n in (pair.a, pair.b)))
    between = {frozenset((p.a, p.b)): p.relative_l2 for p in report.agreement}
    columns = [Column(""), *(Column(name, right=True) for name in names[1:])]
    rows = []
    for i, a in enumerate(names[:-1]):
        cells = [Span(a, "bold" if a == report.outlier else "")]
        for j, b in enumerate(names[1:], 1):
            text = words.error(between.get(frozenset((a, b)))) if j > i else ""
            cells.append(Span(text, "bold" if report.outlier in (a, b) else ""))
        rows.append(Row(tuple(cells)))
    if not page.fits(columns, rows):
        columns = [Column(""), Column(""), Column("", right=True)]
        pairs = sorted(report.agreement, key=lambda p: -p.relative_l2)
        rows = [Row((Span(p.a), Span(p.b), Span(words.error(p.relative_l2)))) for p in pairs]
    page.grid(columns, rows)
    page.say(_outlier(report, names))


def _outlier(report: AuditReport, names: Sequence[str]) -> Span:
    if report.outlier is None:
        few = len(names) < 3
        why = "two participants cannot outvote each other" if few else "nobody stands apart"
        return Span(f"No outlier: {why}.", "dim")
    others = [p.relative_l2 for p in report.agreement if report.outlier not in (p.a, p.b)]
    within = words.error(max(others, default=0.0))
    return Span(f"Outlier: {report.outlier}; the others agree within {within}.", "yellow")


def _draw_gaps(page: Page, report: AuditReport) -> None:
    skipped = [(b.id, b.fidelity) for b in report.backends if b.fidelity and b.fidelity.skipped]
    page.rule("Not audited")
    if not report.gaps and not skipped:
        page.say(Span("No gaps: everything asked for was compared.", "dim"))
    for gap in report.gaps:
        _draw_gap(page, gap)
    for who, proof in skipped:
        for said in unobserved(proof, page.width // 2):
            page.say(Span(said), label=Span(f"{who}  ", "bold"), begin=9)


def _draw_gap(page: Page, gap: Gap) -> None:
    page.say(
        Span(f"{gap.stage}: ", "dim"),
        Span(elide(gap.reason, _REASON), "yellow"),
        label=Span(f"{elide(gap.subject, page.width // 3)}  ", "bold"),
        begin=9,
    )
    if gap.remedy:
        page.say(Span(gap.remedy), indent=9, label=Span("remedy: ", "green"))
    for line in gap.log[-3:]:
        said = Span(elide(line, 2 * page.width), "dim")
        page.say(said, indent=9, label=Span("log: ", "dim"))


def _draw_footer(page: Page, report: AuditReport) -> None:
    laps = sorted(report.timing.items(), key=lambda lap: -lap[1])
    stages = ", ".join(f"{n} {s:.1f}" for n, s in laps if n != "total")
    total = report.timing.get("total", sum(report.timing.values()))
    page.blank()
    page.say(Span(f"audit {report.tool_version}: {total:.1f} s ({stages})", "dim"))
