"""A saved report in a terminal to move about in: the ranking, a backend's segments, one in full.

The only user of Textual. Names in a report are untrusted: they are made visible as everywhere, and
handed over as plain text, never as markup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import DataTable, Footer, Input, Static

from auditor.records.report import Finding
from reports import _words as words
from reports._page import COLORS, Page
from reports._segment import cause_of, draw_segment, draw_step

if TYPE_CHECKING:
    from auditor.records.measured import Segment
    from auditor.records.report import AuditReport, BackendReport

_FINDINGS = ("#", "severity", "backend", "impact", "cause", "where")
_SEGMENTS = ("segment", "introduced", "accumulated", "impact", "cause", "where")
_NAME = 60


class Browser(App[None]):
    """The report's findings on the left, what is under the cursor on the right."""

    TITLE = "audit browse"
    CSS = """
    #head { height: auto; padding: 0 1; }
    #list { width: 3fr; }
    #side { width: 4fr; border-left: solid $primary; padding: 0 1; }
    #filter { display: none; height: 3; }
    #filter.shown { display: block; }
    """
    BINDINGS: ClassVar = [
        Binding("f", "findings", "Findings"),
        Binding("s", "segments", "Segments"),
        Binding("b", "backend", "Next backend"),
        Binding("slash", "filter", "Filter"),
        Binding("escape", "clear", "Clear", show=False),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, report: AuditReport) -> None:
        """Show ``report``."""
        super().__init__()
        self._report = words.visible(report)
        self._backends = [b for b in self._report.backends if b.segments]
        self._backend = 0
        self._segments = not self._report.findings and bool(self._backends)
        self._rows: list[Finding | Segment] = []
        self._sought = ""

    def compose(self) -> ComposeResult:
        """The widgets."""
        yield Static(self._head(), id="head", markup=False)
        yield Input(placeholder="backend, node, operator, cause", id="filter")
        with Horizontal():
            yield DataTable(id="list", cursor_type="row", zebra_stripes=True)
            with VerticalScroll(id="side"):
                yield Static("", id="detail", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Fill the list."""
        self._fill()
        self.query_one(DataTable).focus()

    # --- what is shown ---------------------------------------------------------------------------

    def action_findings(self) -> None:
        """The ranking."""
        self._segments = False
        self._fill()

    def action_segments(self) -> None:
        """Every segment of a backend, in the order of execution."""
        if self._backends:
            self._segments = True
            self._fill()

    def action_backend(self) -> None:
        """The segments of the next backend."""
        if self._backends:
            if self._segments:
                self._backend = (self._backend + 1) % len(self._backends)
            self.action_segments()

    def action_filter(self) -> None:
        """Ask for words to look for."""
        field = self.query_one(Input)
        field.add_class("shown")
        field.focus()

    def action_clear(self) -> None:
        """Show everything again."""
        field = self.query_one(Input)
        field.value = ""
        field.remove_class("shown")
        self.query_one(DataTable).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show what has the words."""
        self._sought = event.value.strip().lower()
        self._fill()

    def on_input_submitted(self, _: Input.Submitted) -> None:
        """Go on in the list."""
        self.query_one(DataTable).focus()

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the row under the cursor in full."""
        if 0 <= event.cursor_row < len(self._rows):
            self._detail(self._rows[event.cursor_row])

    def on_resize(self) -> None:
        """Draw the detail anew at its new width."""
        table = self.query_one(DataTable)
        if 0 <= table.cursor_row < len(self._rows):
            self._detail(self._rows[table.cursor_row])

    # --- drawing ---------------------------------------------------------------------------------

    def _head(self) -> Text:
        report = self._report
        return Text.assemble(
            (f" {report.verdict.upper()} ", COLORS[report.verdict]),
            f"  {report.model.path}: {words.headline(report)}",
        )

    def _fill(self) -> None:
        table = self.query_one(DataTable)
        table.clear(columns=True)
        if self._segments:
            backend = self._backends[self._backend]
            self.sub_title = f"segments of {backend.id}"
            table.add_columns(*_SEGMENTS)
            found: list[tuple[Any, tuple[Text, ...]]] = [
                (s, _segment_cells(s)) for s in backend.segments
            ]
        else:
            self.sub_title = "findings"
            table.add_columns(*_FINDINGS)
            found = [(f, _finding_cells(f)) for f in self._report.findings]
        kept = [(r, c) for r, c in found if self._sought in _text(r)]
        self._rows = [row for row, _ in kept]
        for _, cells in kept:
            table.add_row(*cells)
        if not kept:
            self.query_one("#detail", Static).update(Text("Nothing to show."))
        else:
            self._detail(self._rows[0])

    def _detail(self, row: Finding | Segment) -> None:
        side = self.query_one("#side")
        width = side.content_size.width - 2  # the scroll bar may come
        page = Page(width if width > 0 else None, color=True)
        pipeline = self._report.pipeline
        segment, backend = self._of(row)
        if segment is not None and backend is not None:
            draw_segment(page, self._report, backend, segment)
        elif pipeline is not None:
            for step in (s for s in pipeline.steps if s.noise == getattr(row, "noise", None)):
                draw_step(page, self._report, step)
        self.query_one("#detail", Static).update(Text.from_ansi(page.text()))
        side.scroll_home(animate=False)

    def _of(self, row: Finding | Segment) -> tuple[Segment | None, BackendReport | None]:
        """The segment that a row is about, and its backend."""
        if isinstance(row, Finding):
            id, who = row.segment, row.backend
        else:
            id, who = row.id, self._backends[self._backend].id
        backend = next((b for b in self._backends if b.id == who), None)
        segments = backend.segments if backend else ()
        return next((s for s in segments if s.id == id), None), backend


def _text(row: Finding | Segment) -> str:
    """What a filter looks in."""
    own = [*row.nodes, *row.op_types, row.kernel, row.noise or "unexplained"]
    about = [row.backend, row.severity, row.segment] if isinstance(row, Finding) else [row.id]
    return "\n".join([*own, *about]).lower()


def _finding_cells(finding: Finding) -> tuple[Text, ...]:
    return (
        Text(str(finding.rank)),
        Text(finding.severity, COLORS[finding.severity]),
        Text(words.elide(finding.backend, _NAME)),
        Text(words.percent(finding.leave_one_in)),
        Text(words.elide(finding.noise or "unexplained", _NAME)),
        Text(words.place(finding, _NAME)),
    )


def _segment_cells(segment: Segment) -> tuple[Text, ...]:
    return (
        Text(words.elide(segment.id, _NAME)),
        Text(words.error(segment.introduced)),
        Text(words.error(segment.accumulated)),
        Text(words.percent(segment.leave_one_in)),
        Text(words.elide(cause_of(segment), _NAME)),
        Text(words.elide(" + ".join(segment.nodes) or words.NONE, _NAME)),
    )
