"""The greedy texts of a decoder: in a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reports import _words as words
from reports._page import Column, Page, Row, Span

if TYPE_CHECKING:
    from auditor.records.generation import (
        Carried,
        Generation,
        GenerationReport,
        GenerationStep,
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
    page.say(Span(_text(report.text, decode)), label=Span("reference  ", "dim"))
    for part in report.backends:
        _draw(page, part, report, decode, told)
    return page.text()


def render_json(report: GenerationReport) -> str:
    """Everything, as JSON."""
    return json.dumps({"format": FORMAT} | dataclasses.asdict(report), indent=2) + "\n"


def _draw(
    page: Page,
    part: Generation,
    report: GenerationReport,
    decode: Callable[[int], str] | None,
    told: Callable[[int], str],
) -> None:
    page.rule(part.id)
    if not part.steps:
        page.say(Span(part.gap.reason if part.gap else "", "yellow"), label=Span("gap  ", "dim"))
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
        page.say(Span(_text(part.text, decode)), label=Span("text       ", "dim"))
        page.say(
            Span(f"token {step.number}: {told(step.other)} instead of {told(step.token)}", "red"),
            Span(f", whose lead was {words.plain(step.margin)}"),
            label=Span("diverges   ", "dim"),
        )
        turned = sum(not s.same for s in part.steps)
        page.say(
            Span(
                f"{same} of {len(report.text)} tokens of its own text; on the reference's text "
                f"{len(part.steps) - turned} of {len(part.steps)} decisions"
            ),
            label=Span("agrees     ", "dim"),
        )
    kl = [s.kl for s in part.steps]
    proof = f"; {words.proof(part.fidelity)}" if part.fidelity else ""
    page.say(
        Span(
            f"{words.error(sum(kl) / len(kl))} nats a step on average, {words.error(max(kl))} at "
            f"most; logits {words.error(part.relative_l2)} relative L2{proof}"
        ),
        label=Span("KL         ", "dim"),
    )
    if part.carried is not None:
        _draw_carried(page, part, part.carried, told)
    causes = shares(part.categories, part.unexplained_share)
    page.say(Span(causes), label=Span("causes     ", "dim"))
    if part.gap is not None:
        page.say(Span(part.gap.reason, "yellow"), label=Span("gap        ", "dim"))
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


def _draw_carried(
    page: Page, part: Generation, carried: Carried, told: Callable[[int], str]
) -> None:
    """How errors grow along the text, and what one step owes to the caches before it."""
    first, last = part.steps[0], part.steps[-1]

    def grown(of: Callable[[GenerationStep], float]) -> str:
        most = max(part.steps, key=of)
        return (
            f"{words.error(of(first))} at token {first.number}, {words.error(of(last))} at token "
            f"{last.number}, at most {words.error(of(most))} at token {most.number}"
        )

    page.say(Span(grown(lambda s: s.relative_l2)), label=Span("logits     ", "dim"))
    page.say(Span(grown(lambda s: s.caches or 0.0)), label=Span("caches     ", "dim"))
    page.say(
        Span(
            f"{words.error(carried.inherited)} of its logits' error came with the caches, "
            f"{words.error(carried.introduced)} is its own; the lead over {told(carried.other)} "
            f"of {words.plain(carried.lead)} changes by {words.plain(carried.by_caches)} and "
            f"{words.plain(carried.by_step)}"
        ),
        label=Span(f"token {carried.number:<4} ", "dim"),
    )
    if carried.categories:
        causes = shares(carried.categories, carried.unexplained_share)
        page.say(Span(f"of the prompt's caches: {causes}"), label=Span("           ", "dim"))


def _draw_steps(page: Page, part: Generation, told: Callable[[int], str]) -> None:
    """The turned steps, then those with the largest divergence."""
    chosen = sorted(part.steps, key=lambda s: (s.same, -s.kl))[:_STEPS]
    columns = (
        Column("token", right=True),
        Column("reference"),
        Column("backend"),
        Column("lead", right=True),
        Column("becomes", right=True),
        Column("KL, nats", right=True),
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
            (),
        )
        for s in sorted(chosen, key=lambda s: s.number)
    ]
    page.blank()
    page.grid(columns, rows)


def _draw_layers(page: Page, part: Generation) -> None:
    columns = (
        Column("layer, its error alone"),
        Column("segments", right=True),
        Column("changes the lead by", right=True),
        Column("of it", right=True),
    )
    rows = [
        Row(
            (
                Span(e.layer),
                Span(str(e.segments)),
                Span(words.plain(e.change)),
                Span(words.percent(e.harm)),
            ),
            (),
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
        label=Span("built      ", "dim"),
    )


def _text(tokens: Sequence[int], decode: Callable[[int], str] | None) -> str:
    if decode is None:
        return " ".join(map(str, tokens))
    return words.visible("".join(map(decode, tokens)))
