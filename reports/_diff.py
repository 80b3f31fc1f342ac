"""A comparison of two reports: in a terminal, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import _words as words
from reports._codec import document
from reports._page import Column, Page, Row, Span, right

if TYPE_CHECKING:
    from auditor.records.comparison import Comparison, FindingChange, Trend

FORMAT = "audit-diff/1"
_COLORS: dict[Trend, str] = {"new": "red", "worse": "red", "better": "green", "gone": "green"}
_MOST = 20  # findings; the JSON has all of them


def render(comparison: Comparison, width: int | None, color: bool) -> str:
    """The comparison as text.

    Args:
        comparison: what changed.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    comparison = words.visible(comparison)
    page = Page(width, color)
    page.rule(f"From {comparison.old} to {comparison.new}")
    count = len(comparison.regressions)
    said = words.count(count, "regression") if count else "nothing is new or worse"
    page.say(Span(said, "bold red" if count else "bold green"))
    for broken in comparison.regressions[:_MOST]:
        page.say(Span(broken.sentence), label=Span("  • "))
    if count > _MOST:
        page.say(Span(f"  and {count - _MOST} more; --format json has all of them", "dim"))
    for title, sentences in (
        ("Not comparable", comparison.incomparable),
        ("What else differs", comparison.provenance),
    ):
        if sentences:
            page.rule(title)
            for sentence in sentences:
                page.say(Span(sentence))
    page.rule("Final divergence: relative L2")
    columns = (
        Column("backend"),
        Column("output"),
        *right("before", "after"),
        Column(""),
    )
    rows = [
        Row(
            (
                Span(change.backend, "bold"),
                Span(change.output),
                Span(words.error(change.before)),
                Span(words.error(change.after)),
                Span(change.trend, _COLORS.get(change.trend, "dim")),
            )
        )
        for change in comparison.outputs
    ]
    page.grid(columns, rows)
    page.rule("Findings: what each alone makes of the final divergence")
    _draw_findings(page, comparison.findings)
    return page.text()


def _draw_findings(page: Page, changes: tuple[FindingChange, ...]) -> None:
    if not changes:
        page.say(Span("Neither report has any."))
        return
    columns = (
        Column(""),
        Column("backend"),
        *right("before", "after"),
        Column("cause"),
        Column("nodes"),
    )
    told = [change for change in changes if change.trend != "same"]
    rows = [
        Row(
            (
                Span(change.trend, _COLORS.get(change.trend, "dim")),
                Span(change.finding.backend, "bold"),
                Span(words.error(change.before)),
                Span(words.error(change.after)),
                Span(change.finding.noise or "unexplained"),
                Span(change.finding.nodes[0] if change.finding.nodes else words.NONE),
            )
        )
        for change in told[:_MOST]
    ]
    if rows:
        page.grid(columns, rows)
    if len(told) > _MOST:
        page.say(Span(f"and {len(told) - _MOST} more; --format json has all of them", "dim"))
    if same := len(changes) - len(told):
        page.say(Span(f"{same} unchanged", "dim"))


def dump(comparison: Comparison) -> str:
    """The whole comparison as JSON; numbers that are not finite are null."""
    return document(FORMAT, comparison)
