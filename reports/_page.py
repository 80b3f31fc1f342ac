"""Lines, grids and paragraphs of a given width: what everything shown in a terminal is drawn with.

Text is never parsed as markup. Rich is imported when something is drawn, so that ``audit --help``
does not wait for it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from reports import _words as words

if TYPE_CHECKING:
    from rich.text import Text

    from auditor.records.measured import FidelityProof


DEFAULT_WIDTH = 100
_NARROWEST = 40
NARROWEST_NAME = 8
TAG = 15
_MOST_NAMES = 3
_LONGEST_WORD = 200

COLORS: dict[str, str] = {
    "critical": "bold red",
    "high": "red",
    "medium": "yellow",
    "low": "cyan",
    "info": "dim",
    "pass": "bold reverse green",
    "fail": "bold reverse red",
    "incomplete": "bold reverse yellow",
}


class Span(NamedTuple):
    """A piece of a line in one style."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """A column of a grid; of several that do not fit, the highest ``drop`` goes first."""

    title: str
    right: bool = False
    drop: int = 0


def right(*titles: str) -> tuple[Column, ...]:
    """Columns of figures."""
    return tuple(Column(title, right=True) for title in titles)


class Row(NamedTuple):
    """A line of a grid, and what is said beneath it.

    Fewer cells than columns: the last one takes the rest of the line.
    """

    cells: tuple[Span, ...]
    details: tuple[tuple[Span, ...], ...] = ()


class Page:
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
        title = elide(title, self.width - 8)
        line = "─" * (self.width - width_of(title) - 4)
        self._put(Span("── ", "dim"), Span(title, "bold"), Span(f" {line}", "dim"))

    def say(self, *spans: Span, indent: int = 0, label: Span | None = None, begin: int = 0) -> None:
        """A paragraph beside its label.

        Args:
            spans: the text; its lines begin one below the other.
            indent: columns before the label.
            label: what stands before the first line.
            begin: the column at which the text begins if the label leaves it free.
        """
        from rich.text import Text

        label = label or Span("")
        label = Span(_fitted(label.text, self.width // 3), label.style)
        end = indent + width_of(label.text)
        gap = Span(" " * max(begin - end, 0))
        begin = max(begin, end)
        room = max(self.width - begin, 10)
        text = Text.assemble(*(Span(_shortened(span.text, room), span.style) for span in spans))
        for number, line in enumerate(text.wrap(self._console, room)):
            before = (Span(" " * begin),) if number else (Span(" " * indent), label, gap)
            self._print(Text.assemble(*before, line))

    def blank(self) -> None:
        """An empty line."""
        self._put()

    def grid(self, columns: Sequence[Column], rows: Sequence[Row], indent: int = 0) -> None:
        """Aligned cells; drops columns that do not fit, then shortens names."""
        widths = _widths(columns, rows)

        def excess() -> int:
            return _total(widths) + indent - self.width

        while excess() > 0 and any(columns[i].drop for i in widths):
            del widths[max(widths, key=lambda i: columns[i].drop)]
        while excess() > 0:
            longest = max(widths, key=lambda i: 0 if columns[i].right else widths[i])
            if widths[longest] <= NARROWEST_NAME:
                break
            widths[longest] -= 1
        if any(column.title for column in columns):
            titles = tuple(Span(column.title, "dim") for column in columns)
            self._row(titles, columns, widths, indent)
        for row in rows:
            self._row(row.cells, columns, widths, indent)
            for label, *spans in row.details:
                self.say(*spans, indent=indent + 2, label=label)

    def fits(self, columns: Sequence[Column], rows: Sequence[Row], indent: int = 0) -> bool:
        """Whether a grid has room for all of its cells in full."""
        return _total(_widths(columns, rows)) + indent <= self.width

    def _row(
        self,
        cells: tuple[Span, ...],
        columns: Sequence[Column],
        widths: Mapping[int, int],
        indent: int,
    ) -> None:
        spans = [Span(" " * indent)]
        used = indent
        for i, width in widths.items():
            if i >= len(cells):
                break
            rest = i + 1 == len(cells) < len(columns)
            text = _begun(cells[i].text, self.width - used) if rest else elide(cells[i].text, width)
            blank = Span(" " * (width - width_of(text)))
            cell = Span(text, cells[i].style)
            spans += (blank, cell) if columns[i].right and not rest else (cell, blank)
            spans.append(Span("  "))
            used += width + 2
        self._put(*spans)

    def _put(self, *spans: Span) -> None:
        from rich.text import Text

        self._print(Text.assemble(*spans))

    def _print(self, line: Text) -> None:
        line.rstrip()
        self._console.print(line, soft_wrap=True)


def width_of(text: str) -> int:
    """Columns that a text takes: wide characters take two."""
    from rich.cells import cell_len

    return cell_len(text)


def _widths(columns: Sequence[Column], rows: Sequence[Row]) -> dict[int, int]:
    """Width that each column needs; a last cell that takes the rest of its line needs none."""
    widths = {i: width_of(column.title) for i, column in enumerate(columns)}
    for row in rows:
        aligned = row.cells if len(row.cells) == len(columns) else row.cells[:-1]
        for i, cell in enumerate(aligned):
            widths[i] = max(widths[i], width_of(cell.text))
    return widths


def _total(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + 2 * (len(widths) - 1)


def unobserved(proof: FidelityProof | None, room: int) -> list[str]:
    """What was not observed: a sentence for each reason, with some names of so many columns."""
    said = []
    for reason, tensors in words.by_reason(proof.skipped).items() if proof else ():
        names = ", ".join(elide(tensor, room) for tensor in tensors[:_MOST_NAMES])
        more = f" and {len(tensors) - _MOST_NAMES} more" if len(tensors) > _MOST_NAMES else ""
        of = f"{len(tensors)} of {proof.candidates if proof else 0} tensors not observed"
        said.append(f"{of} ({names}{more}): {reason}")
    return said


def elide(text: str, room: int) -> str:
    """A text no wider than ``room``, its middle left out: names differ at their ends."""
    from rich.cells import set_cell_size

    if width_of(text) <= room:
        return text
    head = max(room - 1, 0) * 2 // 5
    tail = max(room - 1 - head, 0)
    start = set_cell_size(text, head).rstrip()
    end = set_cell_size(text[::-1], tail)[::-1].lstrip()
    return f"{start}…{end}"


def _begun(text: str, room: int) -> str:
    """A sentence no wider than ``room``, its end left out."""
    from rich.cells import set_cell_size

    if width_of(text) <= room:
        return text
    return set_cell_size(text, max(room - 1, 0)).rstrip() + "…"


def _shortened(text: str, room: int) -> str:
    """A text in which names that would fill lines and lines take one: paths stay as they are."""
    if len(text) <= _LONGEST_WORD:
        return text
    return re.sub(
        r"\S+", lambda word: elide(word[0], room) if len(word[0]) > _LONGEST_WORD else word[0], text
    )


def _fitted(label: str, room: int) -> str:
    """A label in that many columns: of the spaces behind it, then of itself, some are left out."""
    bare = label.rstrip()
    if width_of(bare) < room < width_of(label):
        return bare + " " * (room - width_of(bare))
    return elide(label, room)


def detail(name: str, *spans: Span) -> tuple[Span, ...]:
    return (Span(f"{name:<8} ", "dim"), *spans)


def folder_of(labels: Sequence[str]) -> str:
    """The folder that all of these node names begin with: ``model/blocks_1/``."""
    folders = [label.split("/")[:-1] for label in labels]
    shared = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return "/".join([*folders[0][:shared], ""]) if shared else ""


def name_nodes(labels: Sequence[str], room: int, root: str = "") -> str:
    """Node names joined; what they share is said once, what does not fit is counted.

    Args:
        labels: the nodes.
        room: columns there are.
        root: a folder that every name nearby begins with, shortened to ``…/``.
    """
    if not labels:
        return words.NONE
    folder = folder_of(labels)
    first = labels[0].removeprefix(root) if root else labels[0]
    first = f"…/{first}" if root else first
    return join([first, *(label.removeprefix(folder) for label in labels[1:])], " + ", room)


def join(words: Sequence[str], between: str, room: int) -> str:
    """Join as many words as fit, and say how many more there are; the first is always there."""
    text = between.join(words)
    for left in range(1, len(words)):
        if width_of(text) <= room:
            break
        text = between.join(words[:-left]) + f" + {left} more"
    if width_of(text) <= room:
        return text
    more = f" + {len(words) - 1} more" if len(words) > 1 else ""
    return elide(words[0], room - width_of(more)) + more


def tag(name: str, width: int = TAG) -> Span:
    return Span(f"{name:<{width}}", "dim")
