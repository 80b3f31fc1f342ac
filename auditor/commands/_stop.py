"""Ending on a signal, at any moment, with nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from auditor.processes.guard import guard

if TYPE_CHECKING:
    from types import FrameType

    from auditor.ports import Progress


class Stop:
    """Ends the program on a signal by unwinding it, so that nothing is left behind.

    The exception is not enough: an extension module that is being imported may swallow it or
    replace it by its own. So the signal is remembered and looked for again at later steps.
    """

    def __init__(self) -> None:
        self.code: int | None = None  # exit code, once a signal has come

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; Python runs it in the main thread."""
        if self.code is not None:
            return  # what is being cleaned up must not be left half
        self.code = 128 + number
        raise SystemExit(self.code)

    def check(self) -> None:
        """Unwind if a signal has come before."""
        if self.code is not None and threading.current_thread() is threading.main_thread():
            raise SystemExit(self.code)


class StoppableProgress:
    """A progress display, each update of which is also a chance to stop."""

    def __init__(self, display: Progress) -> None:
        self._display = display

    def update(self, who: str, stage: str) -> None:
        """Show it, unless the program was asked to stop."""
        stop.check()
        if who == "reference":
            guard.note(f"{who}: {stage}")
        self._display.update(who, stage)

    def close(self) -> None:
        """Remove the display and restore the terminal."""
        self._display.close()


@contextmanager
def displayed_progress() -> Iterator[StoppableProgress]:
    """A display on standard error, which is removed whatever happens."""
    from reports._progress import LiveProgress

    progress = StoppableProgress(LiveProgress())
    try:
        yield progress
    finally:
        progress.close()


stop = Stop()
