"""The report for people, in a terminal; the only user of Rich.

Every name in a report comes from a model file or an engine and is untrusted. Records are made
harmless as a whole before anything is drawn (``words.visible``), and text is never parsed as
markup. Rich is imported when something is drawn, so that ``audit --help`` does not wait for it.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from auditor.errors import UsageError
from reports import _words as words

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from auditor.ports import Noise
    from auditor.records.backend import Availability, Gap
    from auditor.records.measured import Counterfactual, Distance, Segment, Sensitivity, TensorStats
    from auditor.records.report import (
        AuditReport,
        BackendReport,
        Finding,
        Judgement,
        PipelineReport,
        PipelineStep,
    )

DEFAULT_WIDTH = 100
TOP = 10  # offenders shown; the JSON report has all of them

_NARROWEST = 40
_MEDIUM = 110  # from here an offender's figures, cause and segment share one line
_WIDE = 180  # from here everything about an offender or a backend's output is one line
_MOST_OUTPUTS = 4
_MOST_MATCHES = 4
_MOST_NAMES = 3
_MOST_RULES = 8
_REASON = 600  # characters of an engine's message shown; the JSON report has all of it

_NARROWEST_NAME = 8
_TAG = 15

_COLORS: dict[str, str] = {
    "critical": "bold red",
    "high": "red",
    "medium": "yellow",
    "low": "cyan",
    "info": "dim",
    "pass": "bold reverse green",
    "fail": "bold reverse red",
    "incomplete": "bold reverse yellow",
}
_CONCLUSIONS = {"confirmed": "green", "contradicted": "yellow", "failed": "yellow"}


# --- the interface -------------------------------------------------------------------------------


class _Terminal:
    """Report format ``terminal``."""

    @property
    def name(self) -> str:
        """The name in ``--format``."""
        return "terminal"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings of a file's name that mean this format."""
        return (".txt",)

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report: verdict, backends, offenders, agreement, gaps."""
        report = words.visible(report)
        page = _Page(width, color)
        _draw_verdict(page, report)
        if report.pipeline:
            _draw_pipeline(page, report.pipeline)
        _draw_backends(page, report)
        _draw_findings(page, report)
        _draw_counterfactuals(page, report)
        _draw_agreement(page, report)
        _draw_gaps(page, report)
        _draw_footer(page, report)
        return page.text()


RENDERER = _Terminal()


def render_segment(report: AuditReport, name: str, width: int | None, color: bool) -> str:
    """Everything about the segments that ``name`` means, on every backend that has them.

    Args:
        report: the audit.
        name: a segment id, node label, node key, tensor or operator.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.

    Raises:
        UsageError: nothing in the report has that name.
    """
    report = words.visible(report)
    page = _Page(width, color)
    steps = report.pipeline.steps if report.pipeline else ()
    step = next((s for s in steps if name.lower() in (s.name, s.noise)), None)
    if step is not None:
        _draw_step(page, report, step)
        return page.text()
    found = _find(report, words.visible(name))
    crowd = Counter(backend.id for backend, _ in found)
    if max(crowd.values()) > _MOST_MATCHES:
        _draw_matches(page, words.visible(name), found)
    else:
        for backend, segment in found:
            _draw_segment(page, report, backend, segment)
    return page.text()


def render_backends(
    rows: Sequence[tuple[str, Availability]], width: int | None, color: bool
) -> str:
    """What ``audit backends`` lists: id, engine, version and devices, or how to get it."""
    page = _Page(width, color)
    columns = (_Column("backend"), _Column("engine"), _Column("version"), _Column("devices"))
    table: list[_Row] = []
    for id, answer in words.visible(tuple(rows)):
        if not answer.available:
            details = [_detail("reason", _Span(answer.reason or "not available", "yellow"))]
            if answer.remedy:
                details.append(_detail("remedy", _Span(answer.remedy)))
            cells = (_Span(id, "bold"), _Span(answer.engine), _Span("not available", "yellow"))
            table.append(_Row(cells, tuple(details)))
            continue
        here = [d for d in answer.devices if d.reason is None]
        devices = [_Span(f"{id}:{d.id}  {d.name}" if d.id else d.name) for d in here] or [
            _Span(words.NONE)
        ]
        head = (_Span(id, "bold"), _Span(answer.engine), _Span(answer.version or words.NONE))
        table.append(_Row((*head, devices[0])))
        table += [_Row((_Span(""), _Span(""), _Span(""), device)) for device in devices[1:]]
        absent = [d for d in answer.devices if d.reason is not None]
        for device in absent:
            said = f"{device.reason}; {device.remedy}" if device.remedy else device.reason or ""
            table[-1] = table[-1]._replace(
                details=(*table[-1].details, _detail(f"{id}:{device.id} ", _Span(said, "dim")))
            )
    page.rule("Backends on this machine")
    page.grid(columns, table)
    for note in dict.fromkeys(note for _, answer in rows for note in answer.unlimited):
        page.say(_Span(f"Backends run in processes of their own; {note}.", "dim"))
    return page.text()


def render_noises(rows: Sequence[Noise], width: int | None, color: bool) -> str:
    """What ``audit noises`` lists: each cause that can be replayed, and where it is looked for."""
    page = _Page(width, color)
    page.rule("Causes that can be replayed")
    for noise in rows:
        page.say(_Span(noise.id, "bold"), _Span(f"  {noise.stage}, {noise.type}", "dim"))
        page.say(_Span(noise.title), indent=2)
    page.blank()
    page.say(_Span("`audit explain ID` shows one of them in full.", "dim"))
    return page.text()


def render_noise(noise: Noise, width: int | None, color: bool) -> str:
    """What ``audit explain ID`` shows: one cause in full."""
    page = _Page(width, color)
    page.rule(noise.id)
    page.say(_Span(noise.title, "bold"))
    page.say(_Span(noise.cause))
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
    begin = 2 + max(_cells(label) for label, _ in facts)
    for label, text in facts:
        page.say(_Span(text), label=_Span(label, "dim"), begin=begin)
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
    page = _Page(width, color)
    page.rule("What each cause would do to the outputs, in the whole model")
    ran: dict[tuple[str, ...], list[Sensitivity]] = {}
    for row in rows:
        if row.relative_l2 is not None:
            ran.setdefault((row.noise, row.variant) if every else (row.noise,), []).append(row)
    groups = [sorted(g, key=_moved, reverse=True) for g in ran.values()]
    groups.sort(key=lambda group: _moved(group[0]), reverse=True)
    columns = (_Column("cause"), _Column("forms", right=True), _Column("mean", right=True))
    table = [_sensitivity_row(group, every=every) for group in groups]
    page.grid((*columns, _Column("worst", right=True), _Column("")), table)
    if not table:
        page.say(_Span("No cause applies to this model.", "dim"))
    failed = [row for row in rows if row.failure is not None]
    if failed or notes:
        page.rule("Not simulated")
    for row in failed:
        page.say(
            _Span(f"{row.variant}: " if row.variant else ""),
            _Span(row.failure or "", "dim"),
            label=_Span(f"{row.noise}  ", "bold"),
        )
    for note in notes:
        page.say(_Span(note, "dim"))
    return page.text()


def _moved(row: Sensitivity) -> float:
    return -1.0 if row.relative_l2 is None else row.relative_l2


def _sensitivity_row(group: Sequence[Sensitivity], *, every: bool) -> _Row:
    worst = group[0]
    finite = [_moved(row) for row in group if math.isfinite(_moved(row))]
    cells = (
        _Span(worst.noise, "bold"),
        _Span(str(len(group))),
        _Span(words.error(sum(finite) / len(finite) if finite else math.inf)),
        _Span(words.error(worst.relative_l2)),
    )
    label = "form" if every else "worst"
    said = [_detail(label, _Span(worst.variant))]
    for output in worst.outputs:
        if math.isinf(output.distance.relative_l2):
            said.append(_detail(output.name, _Span(words.distance(output))))
        elif output.consequence is not None and output.distance.relative_l2 > 0:
            said.append(_detail(output.name, _Span(output.consequence.sentence)))
    return _Row(cells, tuple(said))


def print_error(message: str, hint: str) -> None:
    """Say on standard error what is wrong and what to do about it; ``hint`` may be empty."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    for label, style, text in (("error: ", "bold red", message), ("hint: ", "bold cyan", hint)):
        if text:
            first, *rest = text.splitlines()
            lines = [
                words.visible(first),
                *(f"  {words.visible(line)}" for line in rest if line.strip()),
            ]
            console.print(Text.assemble((label, style), "\n".join(lines)), soft_wrap=True)


class LiveProgress:
    """One line per backend on standard error: what it is doing, and for how long.

    Silent where standard error is not a terminal. Safe to call from several threads.
    """

    def __init__(self) -> None:
        """Show nothing until the first update."""
        self._shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._display: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def update(self, who: str, stage: str) -> None:
        """``who`` (a backend id or ``reference``) has entered ``stage``."""
        with self._lock:
            if not self._shown:
                return
            display = self._display or self._start()
            if who in self._tasks:
                display.reset(self._tasks[who], description=words.visible(stage))
            else:
                self._tasks[who] = display.add_task(words.visible(stage), who=words.visible(who))

    def close(self) -> None:
        """Remove the display and restore the terminal; later updates show nothing."""
        with self._lock:
            self._shown = False
            if self._display is not None:
                self._display.stop()

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._display = Progress(
            SpinnerColumn("line"),
            TextColumn("{task.fields[who]}", style="bold", markup=False),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=5,
        )
        self._display.start()
        return self._display


# --- figures -------------------------------------------------------------------------------------


def _score(explained: float) -> str:
    """Share explained as a score: 1 reproduces the error; never rounded up to 1."""
    if not math.isfinite(explained) or abs(explained) >= 10:
        return words.plain(explained)
    return f"{math.floor(explained * 1e4) / 1e4:.4f}"


def _range(pair: tuple[float, float]) -> str:
    return f"{words.plain(pair[0])} to {words.plain(pair[1])}"


# --- the page ------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """A piece of a line in one style."""

    text: str
    style: str = ""


class _Column(NamedTuple):
    """A column of a grid; of several that do not fit, the highest ``drop`` goes first."""

    title: str
    right: bool = False
    drop: int = 0


class _Row(NamedTuple):
    """A line of a grid, and what is said beneath it.

    Fewer cells than columns: the last one takes the rest of the line.
    """

    cells: tuple[_Span, ...]
    details: tuple[tuple[_Span, ...], ...] = ()


class _Page:
    """Lines of text of a given width."""

    def __init__(self, width: int | None, color: bool) -> None:
        from rich.console import Console

        self.width = max(width or DEFAULT_WIDTH, _NARROWEST)
        self._file = io.StringIO()
        self._console = Console(
            file=self._file,
            width=self.width,
            force_terminal=color,
            color_system="standard" if color else None,
            no_color=not color,
            legacy_windows=False,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def text(self) -> str:
        """Everything drawn so far."""
        return self._file.getvalue()

    def rule(self, title: str) -> None:
        """A section's heading."""
        if self._file.tell():
            self.blank()
        title = _elide(title, self.width - 8)
        line = "─" * (self.width - _cells(title) - 4)
        self._put(_Span("── ", "dim"), _Span(title, "bold"), _Span(f" {line}", "dim"))

    def say(
        self, *spans: _Span, indent: int = 0, label: _Span | None = None, begin: int = 0
    ) -> None:
        """A paragraph beside its label.

        Args:
            spans: the text; its lines begin one below the other.
            indent: columns before the label.
            label: what stands before the first line.
            begin: the column at which the text begins if the label leaves it free.
        """
        from rich.text import Text

        label = label or _Span("")
        label = _Span(_elide(label.text, self.width // 3), label.style)
        end = indent + _cells(label.text)
        gap = _Span(" " * max(begin - end, 0))
        begin = max(begin, end)
        text = Text.assemble(*spans)
        for number, line in enumerate(text.wrap(self._console, max(self.width - begin, 10))):
            before = (_Span(" " * begin),) if number else (_Span(" " * indent), label, gap)
            self._print(Text.assemble(*before, line))

    def blank(self) -> None:
        """An empty line."""
        self._put()

    def grid(self, columns: Sequence[_Column], rows: Sequence[_Row], indent: int = 0) -> None:
        """Aligned cells; drops columns that do not fit, then shortens names."""
        widths = _widths(columns, rows)

        def excess() -> int:
            return _total(widths) + indent - self.width

        while excess() > 0 and any(columns[i].drop for i in widths):
            del widths[max(widths, key=lambda i: columns[i].drop)]
        while excess() > 0:
            longest = max(widths, key=lambda i: 0 if columns[i].right else widths[i])
            if widths[longest] <= _NARROWEST_NAME:
                break
            widths[longest] -= 1
        if any(column.title for column in columns):
            titles = tuple(_Span(column.title, "dim") for column in columns)
            self._row(titles, columns, widths, indent)
        for row in rows:
            self._row(row.cells, columns, widths, indent)
            for label, *spans in row.details:
                self.say(*spans, indent=indent + 2, label=label)

    def fits(self, columns: Sequence[_Column], rows: Sequence[_Row]) -> bool:
        """Whether a grid has room for all of its cells in full."""
        return _total(_widths(columns, rows)) <= self.width

    def _row(
        self,
        cells: tuple[_Span, ...],
        columns: Sequence[_Column],
        widths: Mapping[int, int],
        indent: int,
    ) -> None:
        spans = [_Span(" " * indent)]
        used = indent
        for i, width in widths.items():
            if i >= len(cells):
                break
            rest = i + 1 == len(cells) < len(columns)
            text = _elide(cells[i].text, self.width - used if rest else width)
            blank = _Span(" " * (width - _cells(text)))
            cell = _Span(text, cells[i].style)
            spans += (blank, cell) if columns[i].right and not rest else (cell, blank)
            spans.append(_Span("  "))
            used += width + 2
        self._put(*spans)

    def _put(self, *spans: _Span) -> None:
        from rich.text import Text

        self._print(Text.assemble(*spans))

    def _print(self, line: Text) -> None:
        line.rstrip()
        self._console.print(line, soft_wrap=True)


def _cells(text: str) -> int:
    """Columns that a text takes: wide characters take two."""
    from rich.cells import cell_len

    return cell_len(text)


def _widths(columns: Sequence[_Column], rows: Sequence[_Row]) -> dict[int, int]:
    """Width that each column needs; a last cell that takes the rest of its line needs none."""
    widths = {i: _cells(column.title) for i, column in enumerate(columns)}
    for row in rows:
        aligned = row.cells if len(row.cells) == len(columns) else row.cells[:-1]
        for i, cell in enumerate(aligned):
            widths[i] = max(widths[i], _cells(cell.text))
    return widths


def _total(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _elide(text: str, room: int) -> str:
    """A text no wider than ``room``, its middle left out: names differ at their ends."""
    from rich.cells import set_cell_size

    if _cells(text) <= room:
        return text
    head = max(room - 1, 0) * 2 // 5
    tail = max(room - 1 - head, 0)
    start = set_cell_size(text, head).rstrip()
    end = set_cell_size(text[::-1], tail)[::-1].lstrip()
    return f"{start}…{end}"


def _detail(name: str, *spans: _Span, style: str = "dim") -> tuple[_Span, ...]:
    return (_Span(f"{name:<9}", style), *spans)


def _folder(labels: Sequence[str]) -> str:
    """The folder that all of these node names begin with: ``model/blocks_1/``."""
    folders = [label.split("/")[:-1] for label in labels]
    shared = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return "/".join([*folders[0][:shared], ""]) if shared else ""


def _name_nodes(labels: Sequence[str], room: int, root: str = "") -> str:
    """Node names joined; what they share is said once, what does not fit is counted.

    Args:
        labels: the nodes.
        room: columns there are.
        root: a folder that every name nearby begins with, shortened to ``…/``.
    """
    if not labels:
        return words.NONE
    folder = _folder(labels)
    first = labels[0].removeprefix(root) if root else labels[0]
    first = f"…/{first}" if root else first
    return _join([first, *(label.removeprefix(folder) for label in labels[1:])], " + ", room)


def _join(words: Sequence[str], between: str, room: int) -> str:
    """As many words as fit, and how many more there are; the first is always there."""
    text = between.join(words)
    for left in range(1, len(words)):
        if _cells(text) <= room:
            break
        text = between.join(words[:-left]) + f" + {left} more"
    if _cells(text) <= room:
        return text
    more = f" + {len(words) - 1} more" if len(words) > 1 else ""
    return _elide(words[0], room - _cells(more)) + more


# --- the sections of the report ------------------------------------------------------------------


def _draw_verdict(page: _Page, report: AuditReport) -> None:
    model, stimulus, reference = report.model, report.stimulus, report.reference
    page.say(
        _Span(f" {report.verdict.upper()} ", _COLORS[report.verdict]),
        _Span(f"  {os.path.basename(model.path)}", "bold"),
        _Span(f"  exit code {report.exit_code}", "dim"),
    )
    page.say(_Span(words.headline(report)), label=_tag("verdict", 11))
    if report.judgement is not None:
        _draw_judgement(page, report.judgement)
    producer = f", from {model.producer}" if model.producer else ""
    page.say(
        _Span(
            f"{model.path}, sha256 {model.sha256[:12]}, opset {model.opset}, "
            f"{words.count(model.nodes, 'node')}, {model.parameters:,} parameters{producer}",
            "dim",
        ),
        label=_tag("model", 11),
    )
    if model.candidate:
        page.say(_Span(f"{model.candidate}, compiled by the backends"), label=_tag("candidate", 11))
    shapes = ", ".join(f"{name} {words.dims(shape)}" for name, shape in stimulus.shapes.items())
    seed = f", seed {stimulus.seed}" if stimulus.seed is not None else ""
    source = f" from {stimulus.source}" if stimulus.source else ""
    page.say(
        _Span(
            f"{words.count(stimulus.samples, stimulus.kind + ' sample')}{source}{seed}: {shapes}",
            "yellow" if stimulus.kind == "synthetic" else "dim",
        ),
        label=_tag("inputs", 11),
    )
    for note in stimulus.notes:
        page.say(_Span(note, "yellow"), label=_tag("", 11))
    page.say(
        _Span(f"{reference.engine} {reference.version}, {reference.precision}", "dim"),
        label=_tag("reference", 11),
    )


def _draw_judgement(page: _Page, judgement: Judgement) -> None:
    """By what the verdict was reached: the rules broken, or that all hold."""
    broken = judgement.broken
    held = words.count(len(broken), "broken rule") if broken else "every rule holds"
    waived = f"; {words.count(len(judgement.waived), 'finding')} waived" if judgement.waived else ""
    style = "red" if broken else "green"
    page.say(_Span(f"{held}{waived} ({judgement.source})", style), label=_tag("judged by", 11))
    for rule in broken[:_MOST_RULES]:
        page.say(_Span(rule.sentence, "red"), label=_tag("", 11))
    if len(broken) > _MOST_RULES:
        more = (
            f"and {len(broken) - _MOST_RULES} more: the JSON report has them all (-o report.json)"
        )
        page.say(_Span(more, "dim"), label=_tag("", 11))
    for note in judgement.notes:
        page.say(_Span(note, "dim"), label=_tag("", 11))


_FIGURES = (
    _Column("backend"),
    _Column("output"),
    _Column("rel. L2", right=True),
    _Column("max abs", right=True),
    _Column("SQNR dB", right=True),
    _Column("cosine", right=True, drop=2),
    _Column("top-1", right=True, drop=1),
    _Column("causes"),
    _Column("proof"),
)


def _draw_pipeline(page: _Page, pipeline: PipelineReport) -> None:
    """The steps that differ, in the order of execution; as ranked they are among the offenders."""
    page.rule("Around the network: what deployment changes")
    columns = (
        _Column("step"),
        _Column("introduced", right=True),
        _Column("effect", right=True),
        _Column("share", right=True),
        _Column("bits", right=True),
    )
    rows = [
        _Row(
            (
                _Span(step.name, "bold"),
                _Span(words.error(step.introduced)),
                _Span("not measured" if step.effect is None else words.error(step.effect)),
                _Span(words.percent(step.share)),
                _Span(words.percent(step.bit_identical)),
            ),
            (
                _detail("  training", _Span(f" {step.training}")),
                _detail("  deployed", _Span(f" {step.deployment}")),
                *(
                    _detail("  alone", _Span(f" {consequence.output}: {consequence.sentence}"))
                    for consequence in step.consequences
                ),
            ),
        )
        for step in pipeline.steps
    ]
    page.grid(columns, rows)
    for output in pipeline.outputs:
        said = f"{output.name}: {words.distance(output)}"
        if output.consequence:
            said += f"; {output.consequence.sentence}"
        page.say(_Span(said), label=_Span("together", "bold"), begin=12)


def _draw_backends(page: _Page, report: AuditReport) -> None:
    page.rule("Backends: final divergence from the reference")
    for columns in (_FIGURES, _FIGURES[:-1], _FIGURES[:-2]):
        beside = len(columns) - len(_FIGURES) + 2
        rows = [row for backend in report.backends for row in _backend_rows(backend, beside)]
        if page.fits(columns, rows):
            break
    page.grid(columns, rows)
    told = [(backend, tuple(_backend_facts(backend))) for backend in report.backends]
    if any(facts for _, facts in told):
        page.blank()
    for backend, facts in told:
        for number, fact in enumerate(facts):
            page.say(fact, label=_Span("" if number else backend.id, "bold"), begin=9)


def _backend_rows(backend: BackendReport, beside: int) -> list[_Row]:
    """One line per output, worst first; causes and proof in the columns beside, or beneath."""
    who = _Span(backend.id, "bold")
    if backend.gap is not None or not backend.outputs:
        reason = backend.gap.reason if backend.gap else "no output was compared"
        style = "yellow" if backend.status == "built" else "red"
        return [_Row((who, _Span(_elide(reason, _REASON), style)))]
    proof = _Span("not proved: nothing was captured", "yellow")
    if backend.fidelity:
        good = words.proved(backend.fidelity)
        proof = _Span(words.proof(backend.fidelity), "green" if good else "yellow")
    said = (_Span(words.causes(backend)), proof)
    rows: list[_Row] = []
    worst = sorted(backend.outputs, key=lambda o: -o.distance.relative_l2)
    for output in worst[:_MOST_OUTPUTS]:
        first = _Span("") if rows else who
        d = output.distance
        if math.isinf(d.relative_l2):
            why = d.mismatch or "values cannot be compared"
            rows.append(_Row((first, _Span(f"{output.name}: {why}", "red"))))
            continue
        cells = (
            first,
            _Span(output.name),
            _Span(words.error(d.relative_l2), "bold"),
            _Span(words.plain(d.max_abs)),
            _Span(words.decibels(d.sqnr_db)),
            _Span(words.cosine(d.cosine)),
            _Span(words.percent(output.top1_agreement)),
        )
        rows.append(_Row(cells + (((_Span(""),) * beside) if rows else said[:beside])))
    if len(worst) > _MOST_OUTPUTS:
        more = f"and {len(worst) - _MOST_OUTPUTS} more outputs, closer than these"
        rows.append(_Row((_Span(""), _Span(more, "dim"))))
    beneath = tuple((_Span(" " * 7), span) for span in said[beside:])
    rows[-1] = _Row(rows[-1].cells, beneath)
    return rows


def _backend_facts(backend: BackendReport) -> Iterable[_Span]:
    """What ran, and what the reader must know about it."""
    if backend.provenance:
        yield _Span(words.ran(backend.provenance, backend.status), "dim")
    if backend.input_control is not None:
        times = words.plain(backend.input_control)
        yield _Span(f"control: the reference amplifies noise on its input {times} times", "dim")
    for output in sorted(backend.outputs, key=lambda o: -o.distance.relative_l2)[:_MOST_OUTPUTS]:
        if told := words.told(output):
            yield _Span(told)
    if books := words.books(backend):
        yield _Span(books, "dim")
    for line in words.end_to_end(backend):
        yield _Span(line)
    if latency := words.latency(backend):
        yield _Span(latency)
    for note in backend.provenance.notes if backend.provenance else ():
        yield _Span(f"note: {note}")
    for warning in backend.warnings:
        yield _Span(f"warning: {warning}", "yellow")


def _draw_findings(page: _Page, report: AuditReport) -> None:
    page.rule("Ranked offenders")
    if not report.findings:
        page.say(_Span("No segment introduced an error above its floor."))
        return
    page.say(
        _Span(
            "impact: part of the final divergence that this error alone makes; share: its part "
            "in the exact book-keeping, which sums to 100%; introduced: relative L2 made here; "
            "explained, bits: how much of it, and how many elements exactly, replaying the cause "
            "reproduces",
            "dim",
        )
    )
    columns = [
        _Column("#", right=True),
        _Column("severity"),
        _Column("backend"),
        _Column("impact", right=True),
        _Column("share", right=True, drop=2),
        _Column("introduced", right=True),
        _Column("explained", right=True, drop=1),
        _Column("bits", right=True, drop=3),
    ]
    if page.width >= _MEDIUM:
        columns += [_Column("confidence"), _Column("segment"), _Column("cause")]
    if page.width >= _WIDE:
        columns += [_Column("ONNX nodes"), _Column("operators"), _Column("kernel")]
    shown, more = report.findings[:TOP], report.findings[TOP:]
    root = _folder([n for finding in shown if not words.of_step(finding) for n in finding.nodes])
    page.grid(columns, [_finding_row(page, finding, root) for finding in shown])
    page.blank()
    if more:
        page.say(
            _Span(f"and {len(more)} more", "bold"),
            _Span(f", {more[0].severity} at most: the JSON report has them all (-o report.json)"),
        )
    page.say(
        _Span("One in full: "),
        _Span(f"audit show report.json --layer {shown[0].segment}", "bold"),
    )
    remedies = Counter(
        (f.backend, f.noise or "unexplained", f.remedy) for f in report.findings if f.remedy
    )
    for (who, noise, remedy), number in remedies.items():
        page.say(
            _Span(f"{who}, {noise} ({words.count(number, 'finding')}): ", "bold"),
            _Span(remedy),
            label=_Span("remedy   ", "green"),
        )


def _operators(finding: Finding, room: int) -> str:
    return finding.stage if words.of_step(finding) else _join(finding.op_types, ", ", room)


def _finding_row(page: _Page, finding: Finding, root: str) -> _Row:
    cause = _Span(finding.noise or "unexplained", "" if finding.noise else "yellow")
    cells = (
        _Span(str(finding.rank), "bold"),
        _Span(finding.severity, _COLORS[finding.severity]),
        _Span(finding.backend),
        _Span(words.percent(finding.leave_one_in), "bold"),
        _Span(words.percent(finding.impact_share)),
        _Span(words.error(finding.introduced)),
        _Span(words.percent(finding.explained)),
        _Span(words.percent(finding.bit_identical)),
    )
    beside = (_Span(finding.confidence), _Span(finding.segment), cause)
    room = page.width - 4
    source = words.modules(finding.modules, room - 20)
    effects = tuple(
        (_Span("  "), _Span(text, "dim"))
        for text in (
            _varied("from", source),
            _varied("alone:", words.alone(finding.consequences)),
            _varied("impact", words.ranged(finding.leave_one_in_spread, words.percent)),
        )
        if text
    )
    kernel = finding.kernel or "kernel not stated"
    if page.width >= _WIDE:
        names = _Span(_name_nodes(finding.nodes, page.width * 3 // 10, root))
        operators = _Span(_operators(finding, page.width // 8))
        ran = _elide(kernel, page.width // 4)
        return _Row((*cells, *beside, names, operators, _Span(ran)), effects)
    if page.width >= _MEDIUM:
        ran = f"  {_elide(kernel, room // 3)}"
        operators = _Span(f"  {_operators(finding, room // 3)}", "dim")
        names = _Span(_name_nodes(finding.nodes, room - _cells(operators.text) - _cells(ran), root))
        named = (_Span("  "), names, operators, _Span(ran, "dim"))
        return _Row((*cells, *beside), (named, *effects))
    operators = _Span(f" ({_operators(finding, room // 3)})", "dim")
    names = _Span(_name_nodes(finding.nodes, room - _cells(operators.text), root))
    start = f"{finding.segment}: "
    told = f", {finding.confidence} confidence; "
    left = room - _cells(start + cause.text + told)
    ran = _elide(kernel, left if left >= _NARROWEST_NAME else room)
    return _Row(
        cells,
        (
            (_Span("  "), names, operators),
            (_Span("  "), _Span(start), cause, _Span(told), _Span(ran, "dim")),
            *effects,
        ),
    )


def _varied(what: str, told: str) -> str:
    return f"{what} {told}" if told else ""


def _draw_counterfactuals(page: _Page, report: AuditReport) -> None:
    """What building a backend's program again without one factor did, and what it costs."""
    made = [(backend, c) for backend in report.backends for c in backend.counterfactuals]
    if not made:
        return
    page.rule("Counterfactuals: the same program without one factor")
    page.say(
        _Span(
            "before, after: relative L2 of the final outputs; removed: share of its square that "
            "went with the factor; claimed: share that the causes it can bring account for; time: "
            "median of a run with and without the factor, in turn",
            "dim",
        )
    )
    columns = (
        _Column("backend"),
        _Column("before", right=True),
        _Column("after", right=True),
        _Column("removed", right=True),
        _Column("claimed", right=True, drop=2),
        _Column("time, ms", right=True, drop=1),
        _Column("conclusion"),
    )
    page.grid(columns, [_counterfactual_row(backend.id, c) for backend, c in made])


def _counterfactual_row(who: str, made: Counterfactual) -> _Row:
    conclusion = _Span(made.conclusion, _CONCLUSIONS.get(made.conclusion, ""))
    without = (_Span("  without "), _Span(made.factor, "bold"), _Span(f": {words.causes_of(made)}"))
    backend = who.partition(":")[0]
    options = " ".join(f"--option {backend}.{key}={value}" for key, value in made.options.items())
    details = (without, (_Span("  "), _Span(options, "dim")))
    if made.failure is not None:
        why = _Span(_elide(made.failure, _REASON), "yellow")
        return _Row((_Span(who), conclusion), (*details, (_Span("  "), why)))
    cells = (
        _Span(who),
        _Span(words.compared(made.before), "bold"),
        _Span(words.compared(made.after), "bold"),
        _Span(words.percent(made.removed)),
        _Span(words.percent(made.claimed)),
        _Span(words.latencies(made)),
        conclusion,
    )
    return _Row(cells, details)


def _draw_agreement(page: _Page, report: AuditReport) -> None:
    if not report.agreement:
        return
    page.rule("Agreement: relative L2 between final outputs")
    names = list(dict.fromkeys(n for pair in report.agreement for n in (pair.a, pair.b)))
    between = {frozenset((p.a, p.b)): p.relative_l2 for p in report.agreement}
    columns = [_Column(""), *(_Column(name, right=True) for name in names[1:])]
    rows = []
    for i, a in enumerate(names[:-1]):
        cells = [_Span(a, "bold" if a == report.outlier else "")]
        for j, b in enumerate(names[1:], 1):
            text = words.error(between.get(frozenset((a, b)))) if j > i else ""
            cells.append(_Span(text, "bold" if report.outlier in (a, b) else ""))
        rows.append(_Row(tuple(cells)))
    if not page.fits(columns, rows):
        columns = [_Column(""), _Column(""), _Column("", right=True)]
        pairs = sorted(report.agreement, key=lambda p: -p.relative_l2)
        rows = [_Row((_Span(p.a), _Span(p.b), _Span(words.error(p.relative_l2)))) for p in pairs]
    page.grid(columns, rows)
    page.say(_outlier(report, names))


def _outlier(report: AuditReport, names: Sequence[str]) -> _Span:
    if report.outlier is None:
        few = len(names) < 3
        why = "two participants cannot outvote each other" if few else "nobody stands apart"
        return _Span(f"No outlier: {why}.", "dim")
    others = [p.relative_l2 for p in report.agreement if report.outlier not in (p.a, p.b)]
    within = words.error(max(others, default=0.0))
    return _Span(f"Outlier: {report.outlier}; the others agree within {within}.", "yellow")


def _draw_gaps(page: _Page, report: AuditReport) -> None:
    skipped = [(b.id, b.fidelity) for b in report.backends if b.fidelity and b.fidelity.skipped]
    page.rule("Not audited")
    if not report.gaps and not skipped:
        page.say(_Span("No gaps: everything asked for was compared.", "dim"))
    for gap in report.gaps:
        _draw_gap(page, gap)
    for who, proof in skipped:
        for reason, tensors in words.by_reason(proof.skipped).items():
            names = ", ".join(_elide(t, page.width // 2) for t in tensors[:_MOST_NAMES])
            more = f" and {len(tensors) - _MOST_NAMES} more" if len(tensors) > _MOST_NAMES else ""
            page.say(
                _Span(f"{len(tensors)} of {proof.candidates} tensors not observed"),
                _Span(f" ({names}{more}): {reason}"),
                label=_Span(f"{who}  ", "bold"),
                begin=9,
            )


def _draw_gap(page: _Page, gap: Gap) -> None:
    page.say(
        _Span(f"{gap.stage}: ", "dim"),
        _Span(_elide(gap.reason, _REASON), "yellow"),
        label=_Span(f"{_elide(gap.subject, page.width // 3)}  ", "bold"),
        begin=9,
    )
    if gap.remedy:
        page.say(_Span(gap.remedy), indent=9, label=_Span("remedy: ", "green"))
    for line in gap.log[-3:]:
        said = _Span(_elide(line, 2 * page.width), "dim")
        page.say(said, indent=9, label=_Span("log: ", "dim"))


def _draw_footer(page: _Page, report: AuditReport) -> None:
    laps = sorted(report.timing.items(), key=lambda lap: -lap[1])
    stages = ", ".join(f"{n} {s:.1f}" for n, s in laps if n != "total")
    total = report.timing.get("total", sum(report.timing.values()))
    page.blank()
    page.say(_Span(f"audit {report.tool_version}: {total:.1f} s ({stages})", "dim"))


# --- one segment ---------------------------------------------------------------------------------


def _find(report: AuditReport, name: str) -> list[tuple[BackendReport, Segment]]:
    """Segments meant by ``name``: by the first kind of name that fits any.

    A name shortened in the report (``model/blo…/Conv2D``) means all that it could stand for.
    """
    segments = [(b, s) for b in report.backends for s in b.segments]
    if not segments:
        raise UsageError("the report has no segments: no backend was audited", "Its gaps say why.")
    head, dots, tail = name.partition("…")
    kinds: tuple[Callable[[Segment], tuple[str, ...]], ...] = (
        lambda s: (s.id,),
        lambda s: (*s.nodes, *s.node_keys),
        lambda s: s.outputs,
        lambda s: s.inputs,
        lambda s: s.op_types,
        lambda s: (*s.modules, *(m.partition(" (")[0] for m in s.modules)),
    )
    for names_of in kinds:
        for same in (
            lambda known: known == name,
            lambda known: known.lower() == name.lower(),
            lambda known: bool(dots) and known.startswith(head) and known.endswith(tail),
        ):
            if found := [(b, s) for b, s in segments if any(map(same, names_of(s)))]:
                return found
    known = {n for _, s in segments for names_of in kinds for n in names_of(s)}
    inside = sorted((n for n in known if name and name.lower() in n.lower()), key=len)
    close = list(dict.fromkeys(inside[:3] + difflib.get_close_matches(name, known, 3, 0.5)))[:3]
    raise UsageError(
        f"no segment, node, tensor or operator is called `{name}`",
        f"Did you mean {' or '.join(f'`{n}`' for n in close)}?"
        if close
        else "Take a name from the report, such as a segment's id.",
    )


def _draw_matches(page: _Page, name: str, found: Sequence[tuple[BackendReport, Segment]]) -> None:
    page.rule(f"{len(found)} segments match {name}")
    columns = (
        _Column("backend"),
        _Column("segment"),
        _Column("accumulated", right=True, drop=1),
        _Column("introduced", right=True),
        _Column("impact", right=True),
        _Column("cause", drop=2),
        _Column("ONNX nodes"),
    )
    order = sorted(found, key=lambda match: -match[1].introduced)
    root = _folder([label for _, segment in found for label in segment.nodes])
    rows = [
        _Row(
            (
                _Span(backend.id),
                _Span(segment.id, "bold"),
                _Span(words.error(segment.accumulated)),
                _Span(words.error(segment.introduced)),
                _Span(words.percent(segment.leave_one_in)),
                _Span(_cause(segment)),
                _Span(_name_nodes(segment.nodes, page.width // 2, root)),
            )
        )
        for backend, segment in order
    ]
    page.grid(columns, rows)
    page.say(_Span("Give a segment's id or a node's name to see one in full.", "dim"))


def _draw_step(page: _Page, report: AuditReport, step: PipelineStep) -> None:
    finding = next((f for f in report.findings if f.noise == step.noise), None)
    page.rule(f"pipeline, step {step.name}")
    if finding:
        page.say(
            _Span(
                f"offender {finding.rank}, {finding.severity}, {finding.confidence} confidence",
                _COLORS[finding.severity],
            ),
            label=_tag("rank"),
        )
    page.say(_Span(step.training), label=_tag("training"))
    page.say(_Span(step.deployment), label=_tag("deployment"))
    page.say(
        _Span(f"relative L2 {words.error(step.introduced)} when this step alone is as deployed"),
        _Span(f"; {words.percent(step.bit_identical)} of elements bit-identical"),
        label=_tag("hands on"),
    )
    alone = "not measured"
    if step.effect is not None:
        alone = (
            f"relative L2 {words.error(step.effect)}, {words.percent(step.leave_one_in)} of what "
            "all steps do together"
        )
    page.say(_Span(alone, "bold"), label=_tag("effect"))
    if varied := words.ranged(step.leave_one_in_spread, words.percent):
        page.say(_Span(varied), label=_tag(""))
    for consequence in step.consequences:
        said = f"{consequence.output}: {consequence.sentence}"
        page.say(_Span(said), label=_tag("it alone"))
    page.say(_Span(words.percent(step.share)), label=_tag("share"))
    for backend in report.backends:
        parts = backend.end_to_end.shares if backend.end_to_end else ()
        for part in (p for p in parts if p.noise == step.noise):
            said = f"{words.percent(part.share)} of the whole difference on {backend.id}"
            page.say(_Span(said), label=_tag("end to end"))
    if finding and finding.remedy:
        page.say(_Span(finding.remedy), label=_tag("remedy"))


def _cause(segment: Segment) -> str:
    if segment.unmeasured:
        return "not measured"
    return segment.noise or ("unexplained" if segment.introduced > segment.floor else words.NONE)


def _draw_segment(
    page: _Page, report: AuditReport, backend: BackendReport, segment: Segment
) -> None:
    finding = next(
        (f for f in report.findings if f.backend == backend.id and segment.id in f.segments), None
    )
    page.rule(f"{backend.id}, segment {segment.id}")
    nodes = [
        _Row((_Span(op, "bold"), _Span(label), _Span("" if key.startswith(label) else key, "dim")))
        for label, key, op in zip(segment.nodes, segment.node_keys, segment.op_types, strict=False)
    ]
    page.grid((_Column(""), _Column(""), _Column("")), nodes)
    page.blank()
    ranked = _Span("not an offender")
    if finding:
        ranked = _Span(
            f"offender {finding.rank}, {finding.severity}, {finding.confidence} confidence",
            _COLORS[finding.severity],
        )
    page.say(ranked, label=_tag("rank"))
    if segment.modules:
        page.say(_Span(", ".join(segment.modules)), label=_tag("from"))
    page.say(*_spans_of_kernels(backend, segment), label=_tag("ran"))
    page.say(_Span(segment.fidelity), label=_tag("captured"))
    _draw_errors(page, segment)
    _draw_cause(page, segment)
    for made in words.about(backend, finding):
        page.say(_Span(made.sentence), label=_tag("without it"))
    if finding and finding.remedy:
        page.say(_Span(finding.remedy), label=_tag("remedy"))
    for tensor in segment.tensors:
        page.blank()
        _draw_tensor(page, tensor)


def _tag(name: str, width: int = _TAG) -> _Span:
    return _Span(f"{name:<{width}}", "dim")


def _spans_of_kernels(backend: BackendReport, segment: Segment) -> list[_Span]:
    keys = set(segment.node_keys)
    kernels = backend.provenance.kernels if backend.provenance else ()
    spans: list[_Span] = []
    for kernel in (k for k in kernels if keys & set(k.nodes)):
        facts = [kernel.type, kernel.primitive]
        if kernel.precision:
            facts.append(f"computes {kernel.precision}")
        if kernel.output_precision:
            facts.append(f"writes {kernel.output_precision}")
        spans.append(_Span("\n" if spans else ""))
        spans += (_Span(", ".join(f for f in facts if f)), _Span(f"  {kernel.name}", "dim"))
    if spans:
        return spans
    stated = ", ".join(part for part in (segment.kernel, segment.precision) if part)
    return [_Span(stated or "the engine does not say")]


def _draw_errors(page: _Page, segment: Segment) -> None:
    if segment.unmeasured:
        page.say(_Span(segment.unmeasured, "yellow"), label=_tag("not measured"))
    ratio = segment.introduced / segment.floor if segment.floor > 0 else math.inf
    above = "below its floor" if ratio <= 1 else f"{words.plain(ratio)} times its floor"
    page.say(
        _Span(f"introduced {words.error(segment.introduced)}", "bold"),
        _Span(f" ({above} {words.error(segment.floor)})"),
        _Span(
            f", inherited {words.error(segment.inherited)}, "
            f"accumulated {words.error(segment.accumulated)}"
        ),
        label=_tag("relative L2"),
    )
    if segment.amplification is not None:
        page.say(
            _Span(
                f"accumulated error leaves {words.plain(segment.amplification)} times as it entered"
            ),
            label=_tag("amplification"),
        )
    impact = "not measured"
    if segment.leave_one_in is not None:
        impact = (
            f"its error alone makes {words.percent(segment.leave_one_in)} of the final divergence"
        )
    if segment.impact_share is not None:
        impact += f"; share in the exact book-keeping {words.percent(segment.impact_share)}"
    page.say(_Span(impact), label=_tag("impact"))
    for what, spread in (
        ("its error alone", segment.leave_one_in_spread),
        ("share", segment.impact_share_spread),
    ):
        if varied := words.ranged(spread, words.percent):
            page.say(_Span(f"{what}: {varied}"), label=_tag(""))
    for consequence in segment.consequences:
        page.say(_Span(words.alone([consequence])), label=_tag("it alone"))
    if segment.one_step:
        page.say(
            _Span(f"{words.percent(segment.one_step)} of the integers it writes are one step off"),
            label=_tag("rounding"),
        )
    if place := segment.concentration:
        page.say(
            _Span(
                f"{words.percent(place.share)} of the squared error is at index {place.index} of "
                f"axis {place.axis} (size {place.axis_size})",
                "yellow",
            ),
            label=_tag("concentrated"),
        )


def _draw_cause(page: _Page, segment: Segment) -> None:
    spans = [_Span(_cause(segment), "bold")]
    if segment.explained is not None:
        spans.append(
            _Span(
                f" explains {words.percent(segment.explained)} of the introduced error; left over "
                f"{words.error(segment.residual)}"
            )
        )
    spans.append(_Span(f"; {words.percent(segment.bit_identical)} of elements bit-identical"))
    page.say(*spans, label=_tag("cause"))
    if segment.explained_on:
        first = f"looked for on sample {segment.explained_on}, the first above the floor"
        page.say(_Span(first), label=_tag(""))
    if varied := words.ranged(segment.explained_spread, _score):
        fits = f", which contradicts it on {segment.contradicted}" if segment.contradicted else ""
        page.say(_Span(f"score {varied}{fits}"), label=_tag(""))
    if not segment.hypotheses:
        return
    page.say(
        _Span("scores: 1 reproduces the error, 0 or less does not", "dim"), label=_tag("tried")
    )
    columns = (
        _Column("score", right=True),
        _Column("", drop=1),
        _Column("bits", right=True),
        _Column("cause"),
        _Column("form"),
    )
    rows = [
        _Row(
            (
                _Span(_score(h.explained), "bold" if h.explained == segment.explained else ""),
                _Span(_bar(h.explained, 10), "green"),
                _Span(words.percent(h.bit_identical)),
                _Span(h.noise),
                _Span(h.variant, "dim"),
            )
        )
        for h in sorted(segment.hypotheses, key=lambda h: -h.explained)
    ]
    page.grid(columns, rows, indent=2)


def _draw_tensor(page: _Page, tensor: TensorStats) -> None:
    kind = f"  {tensor.dtype} {words.dims(tensor.shape)}"
    name = _elide(tensor.name, max(page.width - _TAG - _cells(kind), _NARROWEST_NAME))
    page.say(_Span(name, "bold"), _Span(kind), label=_tag(tensor.role))
    page.say(_Span(_far(tensor.distance)), label=_tag(""))
    ranges = f"{_range(tensor.reference_range)} in the reference, {_range(tensor.backend_range)}"
    page.say(_Span(f"values {ranges} here", "dim"), label=_tag(""))
    if tensor.role == "output" and any(tensor.histogram) and tensor.distance.relative_l2:
        _draw_histogram(page, tensor)


def _far(distance: Distance) -> str:
    if distance.relative_l2 == 0:
        return "equal to the reference"
    if math.isinf(distance.relative_l2):
        return f"not comparable: {distance.mismatch or 'values are not finite'}"
    return (
        f"relative L2 {words.error(distance.relative_l2)}, "
        f"max abs {words.plain(distance.max_abs)}, "
        f"SQNR {words.decibels(distance.sqnr_db)} dB, cosine {words.cosine(distance.cosine)}"
    )


def _draw_histogram(page: _Page, tensor: TensorStats) -> None:
    """Elements by the size of their error, one bar per bin."""
    counts, edges = tensor.histogram, tensor.histogram_edges
    filled = [i for i, count in enumerate(counts) if count]
    total = sum(counts)
    page.say(
        _Span("elements by |difference| over the reference's root mean square", "dim"),
        label=_tag("errors"),
    )
    rows = []
    for i in range(filled[0], filled[-1] + 1):
        low, high = _power(edges[i]), _power(edges[i + 1])
        bin_ = f"below {high}" if i == 0 else f"{low} to {high}"
        bin_ = f"above {low}" if i == len(counts) - 1 else bin_
        share = counts[i] / total
        longest = max(counts) / total
        bar = _bar(share / longest, min(50, page.width - 40))
        rows.append(_Row((_Span(bin_), _Span(words.percent(share)), _Span(bar or " ", "cyan"))))
    page.grid((_Column("", right=True), _Column("", right=True), _Column("")), rows, indent=2)


def _power(exponent: float) -> str:
    """Ten to that power, which itself may be too large for a float."""
    whole = math.floor(exponent)
    return f"{10 ** (exponent - whole):.1f}e{whole}"


def _bar(share: float, width: int) -> str:
    """A bar of eighths of a character; anything above zero shows."""
    if not share > 0:
        return ""
    eighths = max(1, round(min(share, 1.0) * width * 8))
    return "█" * (eighths // 8) + ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]
