"""The SysNoise table of one model: in a terminal, and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reports import _words as words
from reports._codec import document
from reports._page import Column, Page, Row, Span, tag

if TYPE_CHECKING:
    from auditor.records.sysnoise import (
        Interval,
        SysnoiseEffect,
        SysnoiseOption,
        SysnoiseReport,
        SysnoiseStep,
        SysnoiseType,
    )

FORMAT = "sysnoise-table/1"
_READINGS = {
    "scores": "top-1 flips",
    "boxes": "boxes lost",
    "mask": "1 − mask IoU",
    "embedding": "1 − cosine",
    "text": "texts that differ",
    "none": "",
}
_OPTIONS = 6  # of a type, in the terminal; the JSON has all of them
_MOST = 8  # of reasons why photographs or options are left out, and of those that share one
_MOST_PAIRS = 6
_MOVED = 3  # types named where none changes a reading
_NEGLIGIBLE = 1e-3  # of a reading
_SMALL = 1e-3  # relative L2, where an output is read as nothing


# --- terminal ------------------------------------------------------------------------------------


def render(report: SysnoiseReport, width: int | None, color: bool) -> str:
    """The table as text.

    Args:
        report: what was measured.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    report = words.visible(report)
    page = Page(width, color)
    page.rule(f"SysNoise of {report.model}")
    for label, text in _head(report):
        page.say(Span(text), label=tag(f"{label}  ", 13), begin=13)
    page.rule("Each type, its options switched alone")
    columns = _columns(report)
    page.grid(columns, [row for t in report.types for row in _type_rows(t, report)])
    if report.deployment is not None:
        page.blank()
        page.grid(
            columns, [_row("deployment side, as described", report.deployment.effect, report)]
        )
    if len(report.accumulation) > 1:
        page.rule("Added one at a time, each with its worst option")
        titles = {t.id: t.title for t in report.types}
        page.grid(
            columns,
            [
                _row(f"{'+ ' if i else ''}{titles[s.types[-1]]}: {s.options[-1]}", s.effect, report)
                for i, s in enumerate(report.accumulation)
            ],
        )
    _draw_pairs(page, report)
    page.rule("What to do")
    for sentence in _advice(report):
        page.say(Span(sentence))
    _draw_gaps(page, report)
    return page.text()


def _head(report: SysnoiseReport) -> list[tuple[str, str]]:
    photos = f"{report.photos} measured"
    if report.labelled:
        photos += f", {report.labelled} with labels"
    if report.left_out:
        photos += f", {len(report.left_out)} left out"
    reading = f"`{report.output}` as {report.kind}" if report.kind != "none" else report.output
    head = [
        ("photographs", photos),
        ("pipeline", f"{report.pipeline}: {report.steps['decoder']}; {report.steps['resize']}"),
        ("output", reading),
    ]
    if report.accuracy is not None:
        metric = report.metric or "accuracy"
        head.append((metric, f"{_figure(report.accuracy)} after the training pipeline"))
    told = "95 %, bootstrap over photographs"
    if report.kind == "scores":
        unseen = words.percent(1 - 0.05 ** (1 / report.photos))
        told += f"; where nothing flips, a rate of up to {unseen} may have gone unseen"
    head.append(("intervals", told))
    return head


def _columns(report: SysnoiseReport) -> tuple[Column, ...]:
    found = [Column("")]
    if report.accuracy is not None:
        found.append(Column(f"drop of {report.metric}, points", right=True))
    if report.kind != "none":
        found.append(Column(_READINGS[report.kind] + ", %", right=True))
    return (*found, Column("relative L2", right=True))


def _row(name: str, effect: SysnoiseEffect, report: SysnoiseReport, style: str = "") -> Row:
    cells = [Span(name, style)]
    if report.accuracy is not None:
        cells.append(Span(_figure(effect.drop)))
    if report.kind != "none":
        cells.append(Span(_figure(effect.changed)))
    cells.append(Span(words.error(effect.relative_l2.value)))
    return Row(tuple(cells), ())


def _type_rows(type: SysnoiseType, report: SysnoiseReport) -> list[Row]:
    """The type's own lines, then its options, the worst first."""
    if len(type.options) == 1:
        return [_row(f"{type.title}: {_named(type.options[0], report)}", type.max, report, "bold")]
    rows = [
        _row(f"{type.title}, mean of {len(type.options)}", type.mean, report, "bold"),
        _row(f"{type.title}, max", type.max, report, "bold"),
    ]
    for option in type.options[:_OPTIONS]:
        rows.append(_row(f"  {_named(option, report)}", option.effect, report, "dim"))
    if (rest := len(type.options) - _OPTIONS) > 0:
        rows.append(Row((Span(f"  and {rest} with less effect", "dim"),), ()))
    return rows


def _named(option: SysnoiseOption, report: SysnoiseReport) -> str:
    said = ""
    if option.same == option.photos:
        said = " (same result)" if "result" in report.steps else " (same bits)"
    elif option.refused:
        said = f" (on {option.photos})"
    return option.name + said


def _figure(value: Interval | None) -> str:
    """A fraction in per cent with its interval."""
    if value is None or not math.isfinite(value.value):
        return words.NONE
    low, high = (f"{100 * v:.1f}" for v in (value.low, value.high))
    return f"{100 * value.value:.1f} ({low} … {high})"


def _draw_pairs(page: Page, report: SysnoiseReport) -> None:
    """Pairs that do more, or less, together than alone."""
    titles = {t.id: t.title for t in report.types}
    reading = _READINGS[report.kind]
    decided = [(p, s) for p in report.pairs if (s := _surplus(p)) and (s.low > 0 or s.high < 0)]
    if not report.pairs:
        return
    page.rule("Interaction of two types")
    if not decided:
        page.say(
            Span(
                f"Of {len(report.pairs)} pairs none differs from the sum of its parts by more than "
                "chance on these photographs."
            )
        )
    decided.sort(key=lambda pair: abs(pair[1].value), reverse=True)
    for pair, surplus in decided[:_MOST_PAIRS]:
        names = " and ".join(titles[t] for t in pair.types)
        unit = f"of {report.metric}" if pair.surplus and pair.surplus.drop else f"of {reading}"
        page.say(
            Span(names, "bold"),
            Span(f": {_figure(surplus)} points {unit} beyond the sum of what each does alone"),
        )


def _surplus(step: SysnoiseStep) -> Interval | None:
    if step.surplus is None:
        return None
    return step.surplus.drop or step.surplus.changed


def _advice(report: SysnoiseReport) -> list[str]:
    """What the table means for a deployment, in words."""
    if not report.types:
        return ["No type of SysNoise can be switched in this pipeline and network."]
    said = []
    mattering = [t for t in report.types if _matters(t)]
    if mattering:
        said.append(
            f"What matters for this model: {', '.join(t.title for t in mattering)}. Fix these in "
            "the deployment first."
        )
    else:
        moved = sorted(report.types, key=lambda t: t.max.relative_l2.value, reverse=True)[:_MOVED]
        most = ", ".join(f"{t.title} ({words.error(t.max.relative_l2.value)})" for t in moved)
        said.append(
            "No type changes a reading by more than chance on these photographs. What moves the "
            f"outputs most, by relative L2: {most}. More photographs show rarer changes."
        )
    for type in mattering:
        title = type.title[0].upper() + type.title[1:]
        mild = [o.name for o in reversed(type.options) if not _reads_differently(o.effect)]
        if mild:
            said.append(f"{title}: no reading differs beyond chance with {', '.join(mild[:4])}.")
        elif len(type.options) > 1 and report.kind != "none":
            least = type.options[-1]
            said.append(
                f"{title}: every option changes readings, {least.name} least: "
                f"{_figure(least.effect.changed)} % {_READINGS[report.kind]}."
            )
    if any(t.id in ("preprocessing.decoder", "preprocessing.resize") for t in mattering):
        said.append(
            "Where the deployment's decoder or resizer cannot be chosen, train on a mix of them: "
            "of the remedies that the paper tried (augmentation, adversarial training, test-time "
            "adaptation) only that one worked (sec. 4.4)."
        )
    return said


def _matters(type: SysnoiseType) -> bool:
    return any(_reads_differently(option.effect) for option in type.options)


def _reads_differently(effect: SysnoiseEffect) -> bool:
    value = effect.changed
    return value.low > _NEGLIGIBLE if value is not None else effect.relative_l2.value > _SMALL


def _draw_gaps(page: Page, report: SysnoiseReport) -> None:
    if not (report.gaps or report.left_out or report.notes or report.oddities):
        return
    page.rule("Not measured, and what to know")
    for title, gaps in (("left out", report.left_out), ("gap", report.gaps)):
        alike: dict[str, list[str]] = {}
        for gap in gaps:
            remedy = f" ({gap.remedy})" if gap.remedy else ""
            alike.setdefault(f"{gap.reason}{remedy}", []).append(gap.subject)
        for reason, subjects in list(alike.items())[:_MOST]:
            page.say(
                Span(f"{_listed(subjects)}: ", "bold"),
                Span(reason, "dim"),
                label=Span(f"{title}  ", "dim"),
            )
        if rest := sum(map(len, list(alike.values())[_MOST:])):
            page.say(Span(f"and {rest} more; --format json has all of them", "dim"))
    if report.oddities:
        counted = ", ".join(f"{name}: {n}" for name, n in report.oddities.items())
        page.say(Span(f"Unusual photographs: {counted}.", "dim"))
    for note in report.notes:
        page.say(Span(note, "dim"))


def _listed(subjects: list[str]) -> str:
    """``decoder: a, b and 2 more``: what stands before the colon is said once."""
    kind, colon, _ = subjects[0].partition(": ")
    rest = [s.removeprefix(kind + colon) if colon else s for s in subjects[1:_MOST]]
    more = f" and {len(subjects) - _MOST} more" if len(subjects) > _MOST else ""
    return ", ".join((subjects[0], *rest)) + more


# --- JSON ----------------------------------------------------------------------------------------


def to_json(report: SysnoiseReport) -> str:
    """The whole table; numbers that are not finite are null."""
    table = {
        "tool_version": report.tool_version,
        "model": report.model,
        "pipeline": {"source": report.pipeline, "training": report.steps},
        "photos": {
            "measured": report.photos,
            "labelled": report.labelled,
            "left_out": report.left_out,
            "unusual": report.oddities,
        },
        "output": {"name": report.output, "kind": report.kind},
        "advice": _advice(report),
    }
    same = (
        *("metric", "accuracy", "deployment", "types", "accumulation", "pairs", "flips"),
        *("gaps", "notes", "network_runs", "seconds"),
    )
    return document(FORMAT, table | {key: getattr(report, key) for key in same})
