"""Walks through a network in step, for networks of which not every session can be kept.

One after another, each walk would compile the whole network for itself.
"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError


class Turns:
    """Lets one of several threads run at a time: one that is nowhere ahead of the others."""

    def __init__(self, walks: int) -> None:
        """``walks``: how many threads there are; none goes on before each waits or has left."""
        self._walking = walks
        self._waiting: list[int] = []  # where
        self._ended = False
        self._changed = threading.Condition()

    def wait(self, place: int) -> None:
        """Stop in front of a place until every other walk has come as far, or is ahead.

        Raises:
            CancelledError: nobody wants the walks any more.
        """

        def mine() -> bool:
            return self._ended or (not self._walking and place == min(self._waiting))

        with self._changed:
            self._waiting.append(place)
            self._stop()
            self._changed.wait_for(mine)
            self._waiting.remove(place)
            self._walking += 1
            if self._ended:
                raise CancelledError

    def end(self) -> None:
        """Stop every walk where it is."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Say that this thread's walk has ended."""
        with self._changed:
            self._stop()

    def _stop(self) -> None:
        self._walking -= 1
        self._changed.notify_all()
