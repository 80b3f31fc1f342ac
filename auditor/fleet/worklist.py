"""A work list: which models are audited on which backends, and with which options.

``fleet.toml``::

    [audit]                        # for every cell: options of `audit`, dashes as underscores
    samples = 2
    [[model]]                      # a row of the matrix
    path = "detector.onnx"         # relative to this file, as all paths
    data = "detector.npz"
    backends = ["ort", "ov f32"]   # its columns; all of them when not given
    [[backend]]                    # a column
    id = "ov"                      # or with a device: "ov:GPU"
    name = "ov f32"                # the id when not given
    options = { INFERENCE_PRECISION_HINT = "f32" }
    needs = ["amx"]                # besides backend_ov: what a node must declare

Every model of every column is a cell: one audit, of one backend.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auditor.errors import UsageError, reason, suggestion
from auditor.lines import Lines

_HINT = "See docs/fleet.md."


@dataclass(frozen=True, slots=True)
class Cell:
    """One audit.

    Attributes:
        model, column: its row and its column.
        backend: with its device: ``ov:GPU``.
        options: of the engine.
        arguments: of ``audit``; paths are absolute.
        files: those among the arguments; folders too.
        needs: resources that the node must declare, by name.
        threads: of the audit; None for all that a node has.
        report: where its report goes, relative to the fleet's own.
    """

    model: str
    column: str
    backend: str
    options: tuple[tuple[str, str], ...]
    arguments: tuple[str, ...]
    files: tuple[Path, ...]
    needs: tuple[str, ...]
    threads: int | None
    report: str


def load(path: Path) -> tuple[Cell, ...]:
    """The cells of a work list, model by model.

    Raises:
        UsageError: it cannot be read, says something impossible or names a file that is not
            there; names the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read: {reason(error)}", f"It is TOML. {_HINT}"
        ) from error
    reader = _Reader(Lines(text, str(path)), path.resolve().parent)
    reader.known("", tables, ("audit", "model", "backend"))
    shared = reader.table("audit", tables.get("audit", {}))
    reader.known("audit", shared, _SHARED)
    models, backends = (reader.entries(name, tables.get(name)) for name in ("model", "backend"))
    columns = [reader.column(f"backend.{i}", entry) for i, entry in enumerate(backends)]
    reader.distinct("backend", [column.name for column in columns])
    rows = [reader.row(f"model.{i}", entry, shared) for i, entry in enumerate(models)]
    reader.distinct("model", [row.name for row in rows])
    cells = []
    for number, row in enumerate(rows):
        names = row.columns if row.columns is not None else [column.name for column in columns]
        for name in names:
            found = [column for column in columns if column.name == name]
            if not found:
                where = f"model.{number}.backends"
                raise reader.wrong(where, name, "names no [[backend]]", (c.name for c in columns))
            cells.append(_cell(row, found[0]))
    return tuple(cells)


# --- rows and columns ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    backend: str
    options: dict[str, str]
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    words: tuple[str | Path, ...]
    threads: int | None
    columns: Sequence[str] | None


def _cell(row: _Row, column: _Column) -> Cell:
    id, _, device = column.backend.partition(":")
    words = [*row.words, "--backends", column.backend]
    for key, value in column.options.items():
        words += ["--option", f"{id}.{key}={value}"]
    needs = [f"backend_{id}", *([f"device_{device.lower()}"] if device else []), *column.needs]
    return Cell(
        model=row.name,
        column=column.name,
        backend=column.backend,
        options=tuple(column.options.items()),
        arguments=tuple(map(str, words)),
        files=tuple(word for word in words if isinstance(word, Path)),
        needs=tuple(dict.fromkeys(needs)),
        threads=row.threads,
        report=f"{_plain(row.name)}/{_plain(column.name)}.json",
    )


def _plain(name: str) -> str:
    """A name as part of a path, on any system."""
    return re.sub(r"[^\w.+-]+", "-", name).strip(".-") or "-"


class _Reader:
    """Checks values, and says where a wrong one stands."""

    def __init__(self, lines: Lines, folder: Path) -> None:
        self._lines = lines
        self._folder = folder

    def row(self, where: str, entry: Mapping[str, Any], shared: Mapping[str, Any]) -> _Row:
        self.known(where, entry, ("path", "name", "backends", *_KEYS))
        path = self._file(f"{where}.path", entry.get("path"))
        if not isinstance(path, Path):
            raise self._expected(f"{where}.path", path, "the path of an ONNX file")
        columns = entry.get("backends")
        if columns is not None and not _are_texts(columns):
            raise self._expected(f"{where}.backends", columns, "a list of names of [[backend]]")
        if columns is not None:
            self.distinct(f"{where}.backends", columns)
        words: list[str | Path] = [path]
        for key in _KEYS:
            origin = where if key in entry else "audit"
            value = entry.get(key, shared.get(key))
            if value is not None:
                words += self._words(f"{origin}.{key}", key, value)
        threads = entry.get("threads", shared.get("threads"))
        name = self._name(where, entry.get("name", path.stem))
        return _Row(name, tuple(words), threads, columns)

    def column(self, where: str, entry: Mapping[str, Any]) -> _Column:
        from auditor import discovery

        self.known(where, entry, ("id", "name", "options", "needs"))
        backend = entry.get("id")
        if not isinstance(backend, str):
            raise self._expected(f"{where}.id", backend, 'a backend, such as "ov" or "ov:GPU"')
        if backend.partition(":")[0] not in discovery.backend_ids():
            raise self.wrong(f"{where}.id", backend, "is no backend", discovery.backend_ids())
        options = entry.get("options", {})
        if not isinstance(options, dict) or not all(
            isinstance(value, str | int | float) for value in options.values()
        ):
            raise self._expected(f"{where}.options", options, "a table of engine options")
        needs = entry.get("needs", [])
        if not _are_texts(needs) or not all(re.fullmatch(r"[A-Za-z]\w*", n) for n in needs):
            raise self._expected(f"{where}.needs", needs, 'a list of resources, such as ["amx"]')
        return _Column(
            self._name(where, entry.get("name", backend)),
            backend,
            {key: _written(value) for key, value in options.items()},
            tuple(needs),
        )

    def entries(self, name: str, value: object) -> list[Mapping[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise UsageError(
                f"{self._lines.where(name)} has no [[{name}]] entries", f"Write one. {_HINT}"
            )
        return value

    def table(self, key: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._expected(key, value, f"a table: [{key}]")
        return value

    def known(self, where: str, table: Mapping[str, Any], keys: Sequence[str]) -> None:
        for key in table:
            if key not in keys:
                raise self.wrong(f"{where}.{key}".lstrip("."), key, "is no key here", keys)

    def distinct(self, where: str, names: Sequence[str]) -> None:
        """Refuse two names that are one, or whose reports would be one file."""
        seen: set[str] = set()
        for number, name in enumerate(names):
            if _plain(name).casefold() in seen:
                raise UsageError(
                    f"{self._lines.where(f'{where}.{number}.name')}: `{name}` is there twice",
                    "Give each a `name` of its own.",
                )
            seen.add(_plain(name).casefold())

    def wrong(self, where: str, name: str, what: str, known: Iterable[str]) -> UsageError:
        choices = tuple(known)
        said = f"{self._lines.where(where)}: `{name}` {what}"
        return UsageError(said, f"{suggestion(name, choices)}Known: {', '.join(choices)}.")

    def _expected(self, where: str, value: object, what: str) -> UsageError:
        key = where.rpartition(".")[2]
        if value is None:
            return UsageError(f"{self._lines.where(where)}: `{key}` is missing", f"It is {what}.")
        return UsageError(
            f"{self._lines.where(where)}: `{key}` is {value!r}", f"It must be {what}."
        )

    def _name(self, where: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise self._expected(f"{where}.name", value, "a text")
        return value

    def _words(self, where: str, key: str, value: object) -> Sequence[str | Path]:
        what, words = _KEYS[key]
        try:
            found = words(value)
        except (AttributeError, TypeError, ValueError) as error:
            raise self._expected(where, value, what) from error
        return [self._file(where, w.name) if isinstance(w, _Named) else w for w in found]

    def _file(self, where: str, value: object) -> Path | str:
        """A file or folder that is there, as an absolute path; the name of a preset as it is."""
        from auditor.pipeline import description

        if not isinstance(value, str) or not value:
            raise self._expected(where, value, "the path of a file")
        key = where.rpartition(".")[2]
        if key == "pipeline" and value in description.presets():
            return value
        path = self._folder / value
        if key == "images" and path.is_dir():
            return path.resolve()
        if not path.is_file():
            kind = "folder" if key == "images" else "file"
            raise UsageError(
                f"{self._lines.where(where)}: `{key}` names {path}, which is no {kind}",
                "Paths are relative to the work list.",
            )
        return path.absolute()  # a link stays one: data files lie beside it


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _written(value: object) -> str:
    """An engine option's value as the command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- options of an audit -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Named:
    """A word that is a path."""

    name: object


_Words = Callable[[Any], Sequence[str | _Named]]


def _number(flag: str, kind: type[int] | type[float], least: float) -> _Words:
    def words(value: Any) -> Sequence[str]:
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value >= least:
            raise ValueError(value)
        return flag, str(value)

    return words


def _path(flag: str) -> _Words:
    return lambda value: (flag, _Named(value))


def _switch(on: str, off: str) -> _Words:
    def words(value: Any) -> Sequence[str]:
        chosen = {True: on, False: off}[value] if isinstance(value, bool) else None
        if chosen is None:
            raise ValueError(value)
        return (chosen,) if chosen else ()

    return words


def _severity(value: Any) -> Sequence[str]:
    from auditor.records.terms import SEVERITIES

    if value not in SEVERITIES:
        raise ValueError(value)
    return "--fail-on", value


def _shapes(value: Any) -> Sequence[str]:
    words: list[str] = []
    for name, sizes in value.items():
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(sizes)
        words += ["--shape", f"{name}:{'x'.join(map(str, sizes))}"]
    return words


def _kinds(value: Any) -> Sequence[str]:
    from typing import get_args

    from auditor.records.terms import OutputKind

    words: list[str] = []
    for name, kind in value.items():
        if kind not in get_args(OutputKind):
            raise ValueError(kind)
        words += ["--output-kind", f"{name}:{kind}"]
    return words


# What each key must be, and the words of the command line that it becomes.
_KEYS: dict[str, tuple[str, _Words]] = {
    "data": ("the path of a file", _path("--data")),
    "images": ("the path of a folder", _path("--images")),
    "pipeline": ("the path of a file, or a preset", _path("--pipeline")),
    "candidate": ("the path of a file", _path("--candidate")),
    "policy": ("the path of a file", _path("--policy")),
    "shapes": ("a table such as { x = [1, 3, 224, 224] }", _shapes),
    "tokens": ("the path of a file", _path("--tokens")),
    "output_kinds": ('a table such as { logits = "scores" }', _kinds),
    "samples": ("a whole number from 1 on", _number("--samples", int, 1)),
    "seed": ("a whole number from 0 on", _number("--seed", int, 0)),
    "threads": ("a whole number from 1 on", _number("--threads", int, 1)),
    "timeout": ("seconds from 1 on", _number("--timeout", float, 1)),
    "memory": ("GiB", _number("--memory", float, 0)),
    "worker_memory": ("GiB", _number("--worker-memory", float, 0)),
    "fail_on": ("info, low, medium, high or critical", _severity),
    "confirm": ("true or false", _switch("--confirm", "--no-confirm")),
    "cache": ("true or false", _switch("--cache", "--no-cache")),
    "allow_nonfinite": ("true or false", _switch("--allow-nonfinite", "")),
}
_OF_ONE_MODEL = ("data", "candidate", "shapes", "output_kinds", "tokens")
_SHARED = tuple(key for key in _KEYS if key not in _OF_ONE_MODEL)
