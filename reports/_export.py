"""What ``audit export`` made and chose, in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import _words as words
from reports.terminal import _Column, _detail, _Page, _Row, _Span

if TYPE_CHECKING:
    from auditor.records.export import ExportReport, ExportTrial


def render(report: ExportReport, width: int | None, color: bool) -> str:
    """The comparison as text.

    Args:
        report: what was made.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    report = words.visible(report)
    page = _Page(width, color)
    page.rule(f"{report.source}: relative L2 to PyTorch")
    columns = (
        _Column("export"),
        _Column("opset", right=True),
        _Column("nodes", right=True),
        _Column("file", right=True),
        *(_Column(name, right=True) for name in report.backends),
        _Column("mistakes", right=True),
        _Column("seconds", right=True),
    )
    rows = [_row(number, made, report) for number, made in enumerate(report.trials)]
    page.grid(columns, rows)
    page.say(
        _Span(
            f"file: what the export computes without any runtime's optimisation; "
            f"{words.count(report.samples, 'sample')}",
            "dim",
        )
    )
    page.blank()
    if report.chosen is None:
        page.say(_Span(report.because, "yellow"), label=_Span("use      ", "bold"))
    else:
        label = report.trials[report.chosen].label
        page.say(
            _Span(label, "green"), _Span(f": {report.because}"), label=_Span("use      ", "bold")
        )
    return page.text()


def _row(number: int, made: ExportTrial, report: ExportReport) -> _Row:
    details = [_detail(f"  {who}", _Span(reason, "yellow")) for who, reason in made.gaps.items()]
    if made.failure:
        details.append(_detail("  failed", _Span(made.failure, "yellow")))
    if made.causes:
        details.append(_detail("  mistakes", _Span(", ".join(made.causes), "red")))
    usable = made.failure is None
    cells = (
        _Span(made.label, "bold" if number == report.chosen else ""),
        _Span(str(made.written) if made.written else words.NONE),
        _Span(str(made.nodes) if usable else words.NONE),
        *(
            _Span(words.error(made.distances[who]) if who in made.distances else words.NONE)
            for who in ("reference", *report.backends)
        ),
        _Span(str(made.findings) if usable else words.NONE, "red" if made.findings else ""),
        _Span(f"{sum(made.seconds.values()):.1f}" if made.seconds else words.NONE),
    )
    return _Row(cells, tuple(details))
