"""What ``audit fix`` tried, and what to do, in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import _words as words
from reports._page import Column, Page, Row, Span, detail, right

if TYPE_CHECKING:
    from auditor.records.fix import FixAttempt, FixReport

_NODES = 4


def render(report: FixReport, width: int | None, color: bool) -> str:
    """The search as text.

    Args:
        report: what was tried.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    report = words.visible(report)
    page = Page(width, color)
    page.rule(f"{report.backend}: from {words.error(report.before)} to {words.error(report.limit)}")
    columns = (
        Column("build"),
        *right("rel. L2", "latency", "layers"),
        Column("change"),
    )
    rows = [_row(number, made, report) for number, made in enumerate(report.attempts)]
    if rows:
        page.grid(columns, rows)
    for note in report.notes:
        page.say(Span(note, "dim"))
    page.blank()
    page.say(*_verdict(report), label=Span("do       ", "bold"))
    return page.text()


def _row(number: int, made: FixAttempt, report: FixReport) -> Row:
    after = "failed" if made.after is None else words.error(made.after)
    within = made.after is not None and made.after <= report.limit
    latency = words.NONE
    if made.latency_before and made.latency_after is not None:
        latency = f"{words.plain(made.latency_after / made.latency_before)}x"
    details = [detail("  with", Span(_options(made, report.backend)))] if made.options else []
    if made.nodes:
        more = f" and {len(made.nodes) - _NODES} more" if len(made.nodes) > _NODES else ""
        details.append(detail("  nodes", Span(", ".join(made.nodes[:_NODES]) + more)))
    if made.failure:
        details.append(detail("  failed", Span(made.failure, "yellow")))
    cells = (
        Span(str(number + 1), "bold" if number == report.chosen else ""),
        Span(after, "green" if within else "yellow"),
        Span(latency),
        Span(str(made.kept or len(made.nodes) or words.NONE)),
        Span(made.name),
    )
    return Row(cells, tuple(details))


def _options(made: FixAttempt, backend: str) -> str:
    id = backend.partition(":")[0]
    return " ".join(f"--option {id}.{key}={value}" for key, value in made.options.items())


def _verdict(report: FixReport) -> tuple[Span, ...]:
    if report.chosen is not None:
        made = report.attempts[report.chosen]
        said = [f"build {report.chosen + 1}: {made.name}"]
        if made.options:
            said.append(f"compile with {_options(made, report.backend)}")
        if made.kept is not None:
            said.append("ship the file that has it (-o FILE.xml writes it)")
        elif made.rewritten:
            said.append("ship the changed model (-o FILE.onnx writes it)")
        return (Span("; ".join(said), "green"),)
    if report.before <= report.limit:
        return (Span("nothing: it is within the limit as it is", "green"),)
    if report.best is None:
        return (Span("nothing that was tried brings it nearer to the reference", "yellow"),)
    best = report.attempts[report.best]
    near = words.error(best.after)
    return (
        Span(f"nothing is within the limit; nearest is build {report.best + 1}, {near}", "yellow"),
    )
