"""The greedy texts of a decoder: in a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reports import _words as words
from reports._codec import document
from reports._page import Column, Page, Row, Span, right, tag, unobserved

if TYPE_CHECKING:
    from auditor.records.generation import (
        Carried,
        Generation,
        GenerationReport,
        KeptLayers,
    )
    from auditor.records.measured import CategoryShare

FORMAT = "sysnoise-generation/1"
_STEPS, _LAYERS = 6, 8


def render(
    report: GenerationReport,
    width: int | None,
    color: bool,
    decode: Callable[[int], str] | None = None,
) -> str:
    """The comparison as text.

    Args:
        report: what was written.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
        decode: a token as text.
    """
    report = words.visible(report)
    page = Page(width, color)

    def told(token: int) -> str:
        return str(token) if decode is None else f"{token} {words.visible(decode(token))!r}"

    caches = f", with {words.count(report.caches, 'cache')}" if report.caches else ""
    page.rule(
        f"{report.model.path}: {words.count(len(report.text), 'token')} of greedy text{caches}"
    )
    page.say(Span(_text(report.text, decode)), label=tag("reference", 11))
    for part in report.backends:
        _draw(page, part, report, decode, told)
    return page.text()


def render_json(report: GenerationReport) -> str:
    """Everything, as JSON."""
    return document(FORMAT, report)


def _draw(
    page: Page,
    part: Generation,
    report: GenerationReport,
    decode: Callable[[int], str] | None,
    told: Callable[[int], str],
) -> None:
    page.rule(part.id)
    if not part.steps:
        page.say(Span(part.gap.reason if part.gap else "", "yellow"), label=tag("gap", 5))
        return
    same = sum(a == b for a, b in zip(part.text, report.text, strict=True))
    if part.first is None:
        nearest = min(part.steps, key=lambda s: s.margin_after / max(s.margin, 1e-12))
        page.say(
            Span("the same text", "green"),
            Span(
                f"; closest call at token {nearest.number}: a lead of "
                f"{words.plain(nearest.margin)} becomes {words.plain(nearest.margin_after)}"
            ),
        )
    else:
        step = part.steps[part.first]
        page.say(Span(_text(part.text, decode)), label=tag("text", 11))
        page.say(
            Span(f"token {step.number}: {told(step.other)} instead of {told(step.token)}", "red"),
            Span(f", whose lead was {words.plain(step.margin)}"),
            label=tag("diverges", 11),
        )
        turned = sum(not s.same for s in part.steps)
        page.say(
            Span(
                f"{same} of {len(report.text)} tokens of its own text; on the reference's text "
                f"{len(part.steps) - turned} of {len(part.steps)} decisions"
            ),
            label=tag("agrees", 11),
        )
    kl = [s.kl for s in part.steps]
    proof = f"; {words.proof(part.fidelity)}" if part.fidelity else ""
    page.say(
        Span(
            f"{words.error(sum(kl) / len(kl))} nats a step on average, {words.error(max(kl))} at "
            f"most; logits {words.error(part.relative_l2)} relative L2{proof}"
        ),
        label=tag("KL", 11),
    )
    if part.carried is not None:
        _draw_carried(page, part, part.carried, told)
    causes = shares(part.categories, part.unexplained_share)
    page.say(Span(causes), label=tag("causes", 11))
    for said in unobserved(part.fidelity, page.width // 2):
        page.say(Span(said), label=tag("gap", 11))
    if part.gap is not None:
        page.say(Span(part.gap.reason, "yellow"), label=tag("gap", 11))
    _draw_steps(page, part, told)
    if part.effects:
        _draw_layers(page, part)
    if part.kept is not None:
        _draw_kept(page, part, part.kept)


def shares(categories: Sequence[CategoryShare], unexplained: float) -> str:
    """Causes and their shares in one line."""
    if not categories and not unexplained:
        return "nothing to explain"
    known = [f"{c.noise} {words.percent(c.share)}" for c in categories]
    return ", ".join([*known, f"unexplained {words.percent(unexplained)}"])


def grown(errors: Sequence[float], step: str) -> str:
    """An error at the first and the last step, and where it is largest."""
    most = max(range(len(errors)), key=errors.__getitem__)
    first, last, highest = map(words.error, (errors[0], errors[-1], errors[most]))
    return (
        f"{first} at {step} 0, {last} at {step} {len(errors) - 1}, at most {highest} at {step} "
        f"{most}"
    )


def _draw_carried(
    page: Page, part: Generation, carried: Carried, told: Callable[[int], str]
) -> None:
    """How errors grow along the text, and what one step owes to the caches before it."""
    logits, caches = ([s.relative_l2 for s in part.steps], [s.caches or 0.0 for s in part.steps])
    page.say(Span(grown(logits, "token")), label=tag("logits", 11))
    page.say(Span(grown(caches, "token")), label=tag("caches", 11))
    page.say(
        Span(
            f"{words.error(carried.inherited)} of its logits' error came with the caches, "
            f"{words.error(carried.introduced)} is its own; the lead over {told(carried.other)} "
            f"of {words.plain(carried.lead)} changes by {words.plain(carried.by_caches)} and "
            f"{words.plain(carried.by_step)}"
        ),
        label=tag(f"token {carried.number}", 11),
    )
    if carried.categories:
        causes = shares(carried.categories, carried.unexplained_share)
        page.say(Span(f"of the prompt's caches: {causes}"), label=tag("", 11))


def _draw_steps(page: Page, part: Generation, told: Callable[[int], str]) -> None:
    """The turned steps, then those with the largest divergence."""
    chosen = sorted(part.steps, key=lambda s: (s.same, -s.kl))[:_STEPS]
    columns = (
        Column("token", right=True),
        Column("reference"),
        Column("backend"),
        *right("lead", "becomes", "KL, nats"),
    )
    rows = [
        Row(
            (
                Span(str(s.number)),
                Span(told(s.token)),
                Span(told(s.other), "" if s.same else "red"),
                Span(words.plain(s.margin)),
                Span(words.plain(s.margin_after)),
                Span(words.error(s.kl)),
            ),
        )
        for s in sorted(chosen, key=lambda s: s.number)
    ]
    page.blank()
    page.grid(columns, rows)


def _draw_layers(page: Page, part: Generation) -> None:
    columns = (
        Column("layer, its error alone"),
        *right("segments", "changes the lead by", "of it"),
    )
    rows = [
        Row(
            (
                Span(e.layer),
                Span(str(e.segments)),
                Span(words.plain(e.change)),
                Span(words.percent(e.harm)),
            ),
        )
        for e in part.effects[:_LAYERS]
    ]
    page.blank()
    page.grid(columns, rows)


def _draw_kept(page: Page, part: Generation, kept: KeptLayers) -> None:
    page.blank()
    page.say(
        Span(f"{len(kept.layers)} of {kept.among} layers: {', '.join(kept.layers)}"),
        label=Span("keep exact ", "bold"),
    )
    if kept.turned is None:
        page.say(Span(kept.failure or "", "yellow"), label=Span("not built  ", "dim"))
        return
    id = part.id.partition(":")[0]
    options = " ".join(f"--option {id}.{k}={v}" for k, v in kept.options.items())
    page.say(
        Span(
            f"in {words.count(kept.pieces, 'piece')}, those layers with {options}: "
            f"{words.count(kept.turned, 'decision')} of {len(part.steps)} turned, "
            f"{words.error(kept.kl)} nats at most",
            "green" if kept.turned == 0 else "yellow",
        ),
        label=tag("built", 11),
    )


def _text(tokens: Sequence[int], decode: Callable[[int], str] | None) -> str:
    if decode is None:
        return " ".join(map(str, tokens))
    return words.visible("".join(map(decode, tokens)))
