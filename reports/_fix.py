"""What ``audit fix`` tried, and what to do, in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import _words as words
from reports.terminal import _Column, _detail, _Page, _Row, _Span

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
    page = _Page(width, color)
    page.rule(f"{report.backend}: from {words.error(report.before)} to {words.error(report.limit)}")
    columns = (
        _Column("build"),
        _Column("rel. L2", right=True),
        _Column("latency", right=True),
        _Column("layers", right=True),
        _Column("change"),
    )
    rows = [_row(number, made, report) for number, made in enumerate(report.attempts)]
    if rows:
        page.grid(columns, rows)
    for note in report.notes:
        page.say(_Span(note, "dim"))
    page.blank()
    page.say(*_verdict(report), label=_Span("do       ", "bold"))
    return page.text()


def _row(number: int, made: FixAttempt, report: FixReport) -> _Row:
    after = "failed" if made.after is None else words.error(made.after)
    within = made.after is not None and made.after <= report.limit
    latency = words.NONE
    if made.latency_before and made.latency_after is not None:
        latency = f"{words.plain(made.latency_after / made.latency_before)}x"
    details = [_detail("  with", _Span(_options(made, report.backend)))] if made.options else []
    if made.nodes:
        more = f" and {len(made.nodes) - _NODES} more" if len(made.nodes) > _NODES else ""
        details.append(_detail("  nodes", _Span(", ".join(made.nodes[:_NODES]) + more)))
    if made.failure:
        details.append(_detail("  failed", _Span(made.failure, "yellow")))
    cells = (
        _Span(str(number + 1), "bold" if number == report.chosen else ""),
        _Span(after, "green" if within else "yellow"),
        _Span(latency),
        _Span(str(made.kept or len(made.nodes) or words.NONE)),
        _Span(made.name),
    )
    return _Row(cells, tuple(details))


def _options(made: FixAttempt, backend: str) -> str:
    id = backend.partition(":")[0]
    return " ".join(f"--option {id}.{key}={value}" for key, value in made.options.items())


def _verdict(report: FixReport) -> tuple[_Span, ...]:
    if report.chosen is not None:
        made = report.attempts[report.chosen]
        said = [f"build {report.chosen + 1}: {made.name}"]
        if made.options:
            said.append(f"compile with {_options(made, report.backend)}")
        if made.kept is not None:
            said.append("ship the file that has it (-o FILE.xml writes it)")
        elif made.rewritten:
            said.append("ship the changed model (-o FILE.onnx writes it)")
        return (_Span("; ".join(said), "green"),)
    if report.before <= report.limit:
        return (_Span("nothing: it is within the limit as it is", "green"),)
    if report.best is None:
        return (_Span("nothing that was tried brings it nearer to the reference", "yellow"),)
    best = report.attempts[report.best]
    near = words.error(best.after)
    return (
        _Span(f"nothing is within the limit; nearest is build {report.best + 1}, {near}", "yellow"),
    )
