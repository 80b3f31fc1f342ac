"""What verbs list: backends, causes, and what each cause would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reports import _words as words
from reports._page import Column, Page, Row, Span, detail, width_of

if TYPE_CHECKING:
    from auditor.ports import Noise
    from auditor.records.backend import Availability, Device
    from auditor.records.measured import Sensitivity


def render_backends(
    rows: Sequence[tuple[str, Availability]], width: int | None, color: bool
) -> str:
    """What ``audit backends`` lists: id, engine, version and devices, or how to get it.

    Devices are listed with the precisions that they compute in, where the engine states them.
    """
    page = Page(width, color)
    columns = (Column("backend"), Column("engine"), Column("version"), Column("devices"))
    table: list[Row] = []
    for id, answer in words.visible(tuple(rows)):
        # One that is available may have a reason too, why it cannot do all.
        reason = answer.reason or ("" if answer.available else "not available")
        details = (
            *([detail("reason", Span(reason, "yellow"))] if reason else []),
            *([detail("remedy", Span(answer.remedy))] if answer.remedy else []),
        )
        if not answer.available:
            cells = (Span(id, "bold"), Span(answer.engine), Span("not available", "yellow"))
            table.append(Row(cells, details))
            continue
        here = [d for d in answer.devices if d.reason is None]
        devices = [Span(_device(id, device)) for device in here] or [Span(words.NONE)]
        head = (Span(id, "bold"), Span(answer.engine), Span(answer.version or words.NONE))
        table.append(Row((*head, devices[0])))
        table += [Row((Span(""), Span(""), Span(""), device)) for device in devices[1:]]
        table[-1] = table[-1]._replace(details=details)
        absent = [d for d in answer.devices if d.reason is not None]
        for device in absent:
            said = f"{device.reason}; {device.remedy}" if device.remedy else device.reason or ""
            table[-1] = table[-1]._replace(
                details=(*table[-1].details, detail(f"{id}:{device.id} ", Span(said, "dim")))
            )
    page.rule("Backends on this machine")
    page.grid(columns, table)
    for note in dict.fromkeys(note for _, answer in rows for note in answer.unlimited):
        page.say(Span(f"Backends run in processes of their own; {note}.", "dim"))
    return page.text()


def _device(backend: str, device: Device) -> str:
    """``ov:GPU  Intel(R) Arc(TM) (f32, f16, int8)``; the default device without what selects it."""
    name = f"{backend}:{device.id}  {device.name}" if device.id else device.name
    return f"{name} ({', '.join(device.precisions)})" if device.precisions else name


def render_noises(rows: Sequence[Noise], width: int | None, color: bool) -> str:
    """What ``audit noises`` lists: each cause that can be replayed, and where it is looked for."""
    page = Page(width, color)
    page.rule("Causes that can be replayed")
    for noise in rows:
        page.say(Span(noise.id, "bold"), Span(f"  {noise.stage}, {noise.type}", "dim"))
        page.say(Span(noise.title), indent=2)
    page.blank()
    page.say(Span("`audit explain ID` shows one of them in full.", "dim"))
    return page.text()


def render_noise(noise: Noise, width: int | None, color: bool) -> str:
    """What ``audit explain ID`` shows: one cause in full."""
    page = Page(width, color)
    page.rule(noise.id)
    page.say(Span(noise.title, "bold"))
    page.say(Span(noise.cause))
    page.blank()
    facts = [
        ("stage", noise.stage),
        ("type", noise.type),
        ("applies to", noise.applies),
        *(("" if i else "forms tested", form) for i, form in enumerate(noise.forms)),
        ("remedy", noise.advice),
        *((f"  on {backend}", text) for backend, text in noise.remedies.items()),
        *(
            ("" if i else "switched off by", f"--option {backend}.{key}={value}")
            for i, (backend, key, value) in enumerate(
                (b, *item) for b, options in noise.ablations.items() for item in options.items()
            )
        ),
        ("source", noise.source),
    ]
    begin = 2 + max(width_of(label) for label, _ in facts)
    for label, text in facts:
        page.say(Span(text), label=Span(label, "dim"), begin=begin)
    return page.text()


def render_sensitivities(
    rows: Sequence[Sensitivity],
    notes: Sequence[str],
    width: int | None,
    color: bool,
    *,
    every: bool,
) -> str:
    """What ``audit sensitivity`` shows: causes by what they would do to the outputs, worst first.

    Args:
        rows: what was simulated.
        notes: what the reader must know of the simulation, as sentences.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
        every: a line for each form instead of one for each cause.
    """
    rows, notes = words.visible((tuple(rows), tuple(notes)))
    page = Page(width, color)
    page.rule("What each cause would do to the outputs, in the whole model")
    ran: dict[tuple[str, ...], list[Sensitivity]] = {}
    for row in rows:
        if row.relative_l2 is not None:
            ran.setdefault((row.noise, row.variant) if every else (row.noise,), []).append(row)
    groups = [sorted(g, key=_moved, reverse=True) for g in ran.values()]
    groups.sort(key=lambda group: _moved(group[0]), reverse=True)
    columns = (Column("cause"), Column("forms", right=True), Column("mean", right=True))
    table = [_sensitivity_row(group, every=every) for group in groups]
    page.grid((*columns, Column("worst", right=True), Column("")), table)
    if not table:
        page.say(Span("No cause applies to this model.", "dim"))
    failed = [row for row in rows if row.failure is not None]
    if failed or notes:
        page.rule("Not simulated")
    for row in failed:
        page.say(
            Span(f"{row.variant}: " if row.variant else ""),
            Span(row.failure or "", "dim"),
            label=Span(f"{row.noise}  ", "bold"),
        )
    for note in notes:
        page.say(Span(note, "dim"))
    return page.text()


def _moved(row: Sensitivity) -> float:
    return -1.0 if row.relative_l2 is None else row.relative_l2


def _sensitivity_row(group: Sequence[Sensitivity], *, every: bool) -> Row:
    worst = group[0]
    finite = [_moved(row) for row in group if math.isfinite(_moved(row))]
    cells = (
        Span(worst.noise, "bold"),
        Span(str(len(group))),
        Span(words.error(sum(finite) / len(finite) if finite else math.inf)),
        Span(words.error(worst.relative_l2)),
    )
    label = "form" if every else "worst"
    said = [detail(label, Span(worst.variant))]
    for output in worst.outputs:
        if math.isinf(output.distance.relative_l2):
            said.append(detail(output.name, Span(words.distance(output))))
        elif output.consequence is not None and output.distance.relative_l2 > 0:
            said.append(detail(output.name, Span(output.consequence.sentence)))
    return Row(cells, tuple(said))
