"""A stream through a model that keeps a state: in a terminal, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import _words as words
from reports._codec import document
from reports._generate import grown, shares
from reports._page import Column, Page, Row, Span, right, tag, unobserved

if TYPE_CHECKING:
    from auditor.records.stream import Streamed, StreamReport, StreamStep

FORMAT = "sysnoise-stream/1"
_STEPS = 8


def render(report: StreamReport, width: int | None, color: bool) -> str:
    """The comparison as text.

    Args:
        report: what was fed and computed.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    report = words.visible(report)
    page = Page(width, color)
    page.rule(f"{report.model.path}: a stream")
    page.say(Span(report.source), label=tag("fed", 11))
    pairs = ", ".join(f"{name} ← {output}" for name, output in report.states)
    page.say(Span(pairs), label=tag("states", 11))
    for part in report.backends:
        page.rule(part.id)
        if part.steps:
            _draw(page, part, report.output)
        else:
            reason = part.gap.reason if part.gap else ""
            page.say(Span(reason, "yellow"), label=tag("gap", 5))
    return page.text()


def render_json(report: StreamReport) -> str:
    """Everything, as JSON."""
    return document(FORMAT, report)


def _draw(page: Page, part: Streamed, output: str) -> None:
    decided = part.steps[0].decision
    turned = [s for s in part.steps if not s.same]
    if turned:
        said = (
            f"{words.count(len(turned), 'step')} of {len(part.steps)}, the first {turned[0].number}"
        )
        page.say(Span(said, "red"), label=tag("turned", 11))
    elif decided:
        nearest = min(part.steps, key=lambda s: s.margin_after or 0.0)
        left = words.plain(nearest.margin_after or 0.0)
        page.say(
            Span(f"{words.count(len(part.steps), 'decision')}, all alike", "green"),
            Span(f"; closest at step {nearest.number}: {left} away"),
        )
    else:
        steps = words.count(len(part.steps), "step")
        page.say(Span(f"{steps}; `{output}` is nothing to decide by"))

    proof = f"; {words.proof(part.fidelity)}" if part.fidelity else ""
    outputs = [step.relative_l2 for step in part.steps]
    page.say(Span(grown(outputs, "step") + proof), label=tag("output", 11))
    page.say(Span(grown([s.states for s in part.steps], "step")), label=tag("states", 11))
    looked = part.steps[part.looked]
    page.say(
        Span(
            f"{words.error(looked.inherited)} of its output's error came with the states, "
            f"{words.error(looked.introduced)} is its own"
        ),
        label=tag(f"step {part.looked}", 11),
    )
    causes = shares(part.categories, part.unexplained_share)
    page.say(Span(f"of its own: {causes}"), label=tag("causes", 11))
    for said in unobserved(part.fidelity, page.width // 2):
        page.say(Span(said), label=tag("gap", 11))
    if part.gap is not None:
        page.say(Span(part.gap.reason, "yellow"), label=tag("gap", 11))
    page.blank()
    columns = (
        Column("step", right=True),
        Column("reference"),
        Column("backend"),
        *right("margin", "becomes", "output", "states", "inherited", "introduced"),
    )
    worst = sorted(part.steps, key=lambda s: (s.same, -s.relative_l2))[:_STEPS]
    page.grid(columns, [_row(s) for s in sorted(worst, key=lambda s: s.number)])


def _row(step: StreamStep) -> Row:
    ours, theirs = (" ".join(map(str, d)) or "–" for d in (step.decision, step.other))
    margins = (step.margin, step.margin_after)
    parts = (step.relative_l2, step.states, step.inherited, step.introduced)
    return Row(
        (
            Span(str(step.number)),
            Span(ours),
            Span(theirs, "" if step.same else "red"),
            *(Span("–" if m is None else words.plain(m)) for m in margins),
            *(Span(words.error(p)) for p in parts),
        ),
    )
