"""What is said on standard error: how far the work is, and what went wrong."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

from reports import _words as words
from reports._page import Page, Span

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def print_error(message: str, hint: str) -> None:
    """Say on standard error what is wrong and what to do about it; ``hint`` may be empty.

    In a terminal as wide as that is, elsewhere in lines of any length.
    """
    from rich.console import Console

    console = Console(stderr=True)
    shown = console.is_terminal
    page = Page(console.width if shown else sys.maxsize, color=shown and not console.no_color)
    for label, style, text in (("error: ", "bold red", message), ("hint: ", "bold cyan", hint)):
        said = [words.visible(line) for line in text.splitlines() if line.strip()]
        for number, line in enumerate(said):
            page.say(Span(line), label=Span("  " if number else label, style))
    console.file.write(page.text())


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
