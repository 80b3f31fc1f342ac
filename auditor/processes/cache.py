"""Files on disk that spare a second build of the same thing, and never change a result.

An entry is one safetensors file, ``KEY-DIGEST.safetensors``: the key says what it is of, the digest
is the SHA-256 of the very file. It appears under its name by one rename when it is complete, so a
process that is killed leaves at most a draft, and two that write the same thing don't meet. A file
whose digest does not fit is removed and counts as absent. Whatever fails here is a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.ports import Arrays

FOLDER = "SYSNOISE_CACHE"  # environment variable: a folder, or "off"
LIMIT = 4 << 30  # bytes, where no other limit was set
_OFF = "off"
_ENTRY = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})\.safetensors")
_DRAFT = ".draft"
_ABANDONED = 3600.0  # seconds after which a draft's writer is taken to be dead
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_HEADER = "entry"


@dataclass(frozen=True, slots=True)
class Usage:
    """What the cache holds; sizes in bytes."""

    folder: Path
    entries: int
    size: int
    limit: int


def folder() -> Path | None:
    """Where the cache is; None where it is switched off by ``SYSNOISE_CACHE=off``."""
    chosen = os.environ.get(FOLDER, "")
    if chosen.lower() == _OFF:
        return None
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "sysnoise-auditor"
    except RuntimeError:  # no home folder
        return None


def parse_size(text: str) -> int:
    """``8G``, ``500M`` or a number of bytes.

    Raises:
        UsageError: it is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"`{text}` is no size", "Write it as 8G, 500M, or in bytes.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class Store:
    """The entries in one folder."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when something is first put into it."""
        self.folder = folder

    def get(self, key: str) -> tuple[dict[str, Any], Arrays] | None:
        """The entry of ``key``: what was said of it, and its tensors; None where there is none."""
        from safetensors import SafetensorError, safe_open
        from safetensors.numpy import load_file

        for path, digest in self._of(key):
            try:
                with path.open("rb") as stream:
                    actual = hashlib.file_digest(stream, "sha256").hexdigest()
                if actual != digest:
                    path.unlink(missing_ok=True)
                    continue
                with safe_open(path, "numpy") as opened:
                    said = json.loads((opened.metadata() or {})[_HEADER])
                stored = load_file(path)
                os.utime(path)  # the least recently used goes first
                return said["about"], {n: stored[str(i)] for i, n in enumerate(said["names"])}
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, MemoryError):
                continue
        return None

    def put(self, key: str, about: Mapping[str, Any], tensors: Arrays) -> bool:
        """Store an entry; False where it cannot be, which is no error."""
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        draft = self._place(key) / f"{key}.{os.getpid()}.{time.monotonic_ns()}{_DRAFT}"
        said = json.dumps({"about": about, "names": list(tensors)})
        arrays = {str(i): np.asarray(v, order="C") for i, v in enumerate(tensors.values())}
        if sum(a.nbytes for a in arrays.values()) > self.limit:
            return False
        try:
            draft.parent.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # it holds what the user's models make of their inputs
            save_file(arrays, draft, {_HEADER: said})
            with draft.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            draft.rename(draft.with_name(f"{key}-{digest}.safetensors"))
        except (OSError, SafetensorError, ValueError):
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            return False
        self.shrink(self.limit)
        return True

    def forget(self, key: str) -> None:
        """Remove the entries of ``key``."""
        for path, _ in self._of(key):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @property
    def limit(self) -> int:
        """Bytes that it may hold."""
        try:
            return int((self.folder / "limit").read_text("ascii"))
        except (OSError, ValueError):
            return LIMIT

    def set_limit(self, limit: int) -> None:
        """Set the limit for all later audits, and keep to it now.

        Raises:
            UsageError: the folder cannot be written.
        """
        draft = self.folder / f"limit.{os.getpid()}{_DRAFT}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(str(limit), "ascii")
            draft.rename(self.folder / "limit")
        except OSError as error:
            raise UsageError(
                f"cannot write {self.folder}: {error.strerror}", f"Set {FOLDER} to another folder."
            ) from error
        self.shrink(limit)

    def usage(self) -> Usage:
        """What it holds now."""
        found = [size for _, size, _ in self._entries()]
        return Usage(self.folder, len(found), sum(found), self.limit)

    def shrink(self, limit: int) -> None:
        """Remove what was not used for longest until ``limit`` bytes are left, and old drafts.

        Another process may do the same at the same time: then some more is removed.
        """
        found = sorted(self._entries(), key=lambda entry: entry[2])
        left = sum(size for _, size, _ in found)
        for path, size, _ in found:
            if left <= limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            left -= size
        with contextlib.suppress(OSError):
            for draft in self.folder.glob(f"*/*{_DRAFT}"):
                with contextlib.suppress(OSError):
                    if time.time() - draft.stat().st_mtime > _ABANDONED:
                        draft.unlink()

    def clear(self) -> int:
        """Remove every entry and draft; returns the bytes freed."""
        freed = 0
        for path, size, _ in list(self._entries()):
            with contextlib.suppress(OSError):
                path.unlink()
                freed += size
        with contextlib.suppress(OSError):
            for draft in self.folder.glob(f"*/*{_DRAFT}"):
                draft.unlink(missing_ok=True)
        return freed

    def _place(self, key: str) -> Path:
        return self.folder / key[:2]

    def _of(self, key: str) -> Iterator[tuple[Path, str]]:
        """The files of one key, with the digests in their names."""
        with contextlib.suppress(OSError):
            for path in sorted(self._place(key).glob(f"{key}-*")):
                if (named := _ENTRY.fullmatch(path.name)) is not None:
                    yield path, named[2]

    def _entries(self) -> Iterator[tuple[Path, int, float]]:
        """Every entry with its size and when it was last used."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*/*.safetensors"):
                with contextlib.suppress(OSError):
                    found = path.stat()
                    if _ENTRY.fullmatch(path.name):
                        yield path, found.st_size, found.st_mtime
