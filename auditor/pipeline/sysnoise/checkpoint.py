"""What was measured so far, in a file of JSON lines: an interrupted sweep goes on where it was.

The first line says what is measured (model, training pipeline, versions); a file with another one
is begun anew. Every other line is one photograph: ``[name, digest of the file, cells, failure]``,
where cells are ``{option: [changed, relative L2, answer, verdict] or a reason}``. A line that was
not written to its end is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from auditor.errors import UsageError

# What one option did to one photograph, or why it could not: changed, relative L2, the answer (a
# class or a text), and what the label says of it in the task's own numbers.
Measured = tuple[float | None, float | None, int | str | None, list[float] | None]
Cell = Measured | str
Cells = dict[str, Cell]


class Checkpoint:
    """A file of measurements; written a photograph at a time.

    Attributes:
        path: the file.
        reused: how many photographs were found in it.
    """

    def __init__(self, path: Path, key: Mapping[str, object]) -> None:
        """Open it, and keep what it holds if it was written for the same ``key``.

        Raises:
            UsageError: it cannot be written.
        """
        self.path = path
        self._known: dict[tuple[str, str], Cells] = {}
        head = json.dumps(key, sort_keys=True, default=str)
        try:
            if path.is_file():
                self._read(path, head)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("a" if self._known else "w", encoding="utf-8")
            if not self._known:
                self._put(head)
            else:
                self._file.write("\n")  # the last line may not have been written to its end
        except OSError as error:
            raise UsageError(
                f"cannot write {path}: {error.strerror}", "Give -o a file in another folder."
            ) from error
        self.reused = len(self._known)

    def known(self, name: str, data: bytes) -> Cells:
        """What is known of a photograph with these very bytes."""
        return self._known.get((name, _digest(data)), {})

    def add(self, name: str, data: bytes, cells: Cells) -> None:
        """Keep what was measured of one photograph."""
        self._put(json.dumps([name, _digest(data), cells]))

    def close(self, *, finished: bool) -> None:
        """Close the file; a finished sweep needs it no longer."""
        self._file.close()
        if finished:
            self.path.unlink(missing_ok=True)

    def _put(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def _read(self, path: Path, head: str) -> None:
        with path.open(encoding="utf-8", errors="replace") as lines:
            if lines.readline().rstrip("\n") != head:
                return
            for line in lines:
                try:
                    name, digest, cells = json.loads(line)
                    read = {k: v if isinstance(v, str) else tuple(v) for k, v in cells.items()}
                except (ValueError, TypeError, AttributeError):
                    continue
                self._known.setdefault((name, digest), {}).update(read)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
