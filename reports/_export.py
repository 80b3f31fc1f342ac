"""What ``audit export`` made and chose, in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import _words as words
from reports._page import Column, Page, Row, Span, detail, right

if TYPE_CHECKING:
    from auditor.records.export import ExportReport, ExportTrial


_MOST = 5  # lines of code that are listed


def render(report: ExportReport, width: int | None, color: bool) -> str:
    """The comparison as text.

    Args:
        report: what was made.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    report = words.visible(report)
    page = Page(width, color)
    page.rule(f"{report.source}: relative L2 to PyTorch")
    columns = (
        Column("export"),
        *right("opset", "nodes", "file"),
        *(Column(name, right=True) for name in report.backends),
        *right("mistakes", "seconds"),
    )
    rows = [_row(number, made, report) for number, made in enumerate(report.trials)]
    page.grid(columns, rows)
    page.say(
        Span(
            f"file: what the export computes without any runtime's optimisation; "
            f"{words.count(report.samples, 'sample')}",
            "dim",
        )
    )
    page.blank()
    if report.chosen is None:
        page.say(Span(report.because, "yellow"), label=Span("use      ", "bold"))
    else:
        label = report.trials[report.chosen].label
        page.say(Span(label, "green"), Span(f": {report.because}"), label=Span("use      ", "bold"))
    return page.text()


def _row(number: int, made: ExportTrial, report: ExportReport) -> Row:
    details = [detail(f"  {who}", Span(reason, "yellow")) for who, reason in made.gaps.items()]
    if made.failure:
        details.append(detail("  failed", Span(made.failure, "yellow")))
    if made.frozen:
        more = f" and {n} more" if (n := len(made.frozen) - _MOST) > 0 else ""
        said = f"as in this run whatever the inputs are: {', '.join(made.frozen[:_MOST])}{more}"
        details.append(detail("  frozen", Span(said, "yellow")))
    if made.causes:
        details.append(detail("  mistakes", Span(", ".join(made.causes), "red")))
    usable = made.failure is None
    cells = (
        Span(made.label, "bold" if number == report.chosen else ""),
        Span(str(made.written) if made.written else words.NONE),
        Span(str(made.nodes) if usable else words.NONE),
        *(
            Span(words.error(made.distances[who]) if who in made.distances else words.NONE)
            for who in ("reference", *report.backends)
        ),
        Span(str(made.findings) if usable else words.NONE, "red" if made.findings else ""),
        Span(f"{sum(made.seconds.values()):.1f}" if made.seconds else words.NONE),
    )
    return Row(cells, tuple(details))
