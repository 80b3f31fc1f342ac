"""What made a tensor of a photograph: in a terminal, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports import _words as words
from reports._codec import document
from reports._page import Column, Page, Row, Span, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from auditor.records.backend import Gap
    from auditor.records.forensics import ForensicsReport, ResultForensics, ResultVariant

FORMAT = "sysnoise-forensics/1"
RESULT_FORMAT = "sysnoise-result-forensics/1"
_ALIKE = 8
_OTHERS = 5


def render(report: ForensicsReport, width: int | None, color: bool) -> str:
    """The answer as text.

    Args:
        report: what was found.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    report = words.visible(report)
    page = Page(width, color)
    page.rule("What made this tensor")
    page.say(Span(report.best, "bold"), label=tag("pixels", 12))
    page.say(Span(_certainty(report)), label=tag("certainty", 12))
    scale = ", ".join(words.plain(v) for v in report.slope)
    shift = ", ".join(words.plain(v) for v in report.offset)
    page.say(
        Span(f"{report.normalisation or 'none of the usual ones'}: "),
        Span(f"slope {scale}; offset {shift}", "dim"),
        label=tag("normalised", 12),
    )
    page.say(Span(f"{report.layout}, {report.channels}"), label=tag("layout", 12))
    page.say(
        Span(f"{report.tried} combinations compared, {report.skipped} too far by a bound"),
        label=tag("search", 12),
    )
    _draw_alike(page, "pixels of this photograph", report.indistinguishable)
    if report.runners_up:
        page.rule("Next")
        page.grid(
            (Column("decoder → colour → resizer"), Column("off by, levels", right=True)),
            [
                Row((Span(c.name), Span(words.plain(c.residual))), ())
                for c in report.runners_up[:_OTHERS]
            ],
        )
    _draw_gaps(page, report.gaps)
    return page.text()


def _certainty(report: ForensicsReport) -> str:
    if report.exact:
        margin = "" if report.margin is None else f"; the next is {words.plain(report.margin)} off"
        return f"reproduces every pixel{margin}"
    whole = "" if report.whole_levels else ", whose pixels are no whole numbers"
    return (
        f"the nearest of the catalogue, {words.plain(report.residual)} pixel levels (root mean "
        f"square) from the tensor{whole}: what made it is not in the catalogue"
    )


def render_result(report: ResultForensics, width: int | None, color: bool) -> str:
    """What made a result, as text; arguments as of ``render``."""
    report = words.visible(report)
    page = Page(width, color)
    page.rule(f"What made this result ({report.kind})")
    page.say(Span(report.best.name, "bold"), label=tag("steps", 12))
    page.say(Span(_proof(report)), label=tag("certainty", 12))
    for label, limits in (("threshold", report.threshold), ("overlap", report.overlap)):
        if limits is not None:
            low, high = map(words.plain, limits)
            page.say(
                Span(f"from {low} to {high} the result is the same"),
                label=tag(label, 12),
            )
    page.say(
        Span(f"{report.tried} ways compared, {report.skipped} ruled out by an earlier step"),
        label=tag("search", 12),
    )
    page.rule("Against the description")
    if not report.differs:
        nearest = "Nothing differs." if report.exact else "The nearest way is the one described."
        page.say(Span(nearest))
    for step, (wanted, made) in report.differs.items():
        page.say(Span(f"{step}: ", "bold"), Span(f"described {wanted}; made by {made}"))
    alike = [_unlike(name, report.best.name) for name in report.indistinguishable]
    _draw_alike(page, "result", alike)
    if report.runners_up:
        page.rule("Next")
        for other in report.runners_up[:_OTHERS]:
            said = _unlike(other.name, report.best.name)
            page.say(Span(said), Span(f" ({_off(other, report.unit)})", "dim"))
    _draw_gaps(page, report.gaps)
    return page.text()


def _draw_alike(page: Page, what: str, names: Sequence[str]) -> None:
    if names:
        page.rule(f"Gives the same {what}")
        for name in names[:_ALIKE]:
            page.say(Span(name))
        if (rest := len(names) - _ALIKE) > 0:
            page.say(Span(f"and {rest} more; --format json has all of them", "dim"))


def _draw_gaps(page: Page, gaps: Sequence[Gap]) -> None:
    if gaps:
        page.rule("Not tried")
        for gap in gaps:
            page.say(Span(f"{gap.subject}: ", "bold"), Span(gap.reason, "dim"))


def _unlike(name: str, best: str) -> str:
    """The steps of a way that are not those of the best."""
    steps = best.split("; ")
    return "; ".join(part for part in name.split("; ") if part not in steps) or name


def _proof(report: ResultForensics) -> str:
    if report.exact:
        return "reproduces the record"
    return f"the nearest way, {_off(report.best, report.unit)}: what made it was not tried"


def _off(variant: ResultVariant, unit: str) -> str:
    said = f"{words.plain(variant.residual)} {unit} off"
    if variant.mismatched is not None:
        said += f", {variant.mismatched} detections on one side only"
    return said


def result_to_json(report: ResultForensics) -> str:
    """The whole answer."""
    return document(RESULT_FORMAT, report)


def to_json(report: ForensicsReport) -> str:
    """The whole answer."""
    return document(FORMAT, report)
