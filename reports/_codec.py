"""How values of records are written as JSON and read back, each with where it stands in the file.

Every codec is a pair of functions; a record's is made of those of its fields.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from auditor.errors import UsageError

_MAX_BYTES = 256 * 2**20  # a hundred times the largest report seen
MISSING_KEY = "a value, but the key is missing"
T = TypeVar("T")


class MalformedError(Exception):
    """The JSON does not say what it should; the message begins with the path in the file."""

    def __init__(self, path: str, expected: str) -> None:
        super().__init__(f"{path.removeprefix('.') or 'the report'}: expected {expected}")


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How one kind of value is written, and read back from the JSON found at a path."""

    dump: Callable[[T], object]
    load: Callable[[object, str], T]


def only(kind: type[T], name: str) -> Codec[T]:
    """Values of one type; ``name`` is what it is called."""

    def load(data: object, path: str) -> T:
        # bool is a subclass of int, yet true is no number.
        if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
            raise MalformedError(path, name)
        return data

    return Codec(kind, load)


def number(null: float) -> Codec[float]:
    """A number; ``null`` is the non-finite value that null stands for."""

    def dump(value: float) -> object:
        return float(value) if math.isfinite(value) else None

    def load(data: object, path: str) -> float:
        if data is None:
            return null
        if isinstance(data, bool) or not isinstance(data, int | float):
            raise MalformedError(path, "a number or null")
        try:
            value = float(data)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise MalformedError(path, "a finite number or null")
        return value

    return Codec(dump, load)


def _dump_bytes(value: bytes) -> object:
    return base64.b64encode(value).decode("ascii")


def _load_bytes(data: object, path: str) -> bytes:
    try:
        return base64.b64decode(TEXT.load(data, path), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedError(path, "base64 (RFC 4648)") from error


def choice(known: tuple[str, ...]) -> Codec[Any]:
    """One of these words."""

    def load(data: object, path: str) -> object:
        if data not in known:
            raise MalformedError(path, f"one of {', '.join(known)}")
        return data

    return Codec(str, load)


def optional(codec: Codec[T]) -> Codec[T | None]:
    """A value, or null for None."""

    def dump(value: T | None) -> object:
        return None if value is None else codec.dump(value)

    def load(data: object, path: str) -> T | None:
        return None if data is None else codec.load(data, path)

    return Codec(dump, load)


def many(codec: Codec[T]) -> Codec[tuple[T, ...]]:
    """A list of like values."""

    def dump(values: tuple[T, ...]) -> object:
        return [codec.dump(value) for value in values]

    def load(data: object, path: str) -> tuple[T, ...]:
        if not isinstance(data, list):
            raise MalformedError(path, "a list")
        return tuple(codec.load(item, f"{path}[{i}]") for i, item in enumerate(data))

    return Codec(dump, load)


def keyed(codec: Codec[T]) -> Codec[dict[str, T]]:
    """An object with like values."""

    def dump(values: dict[str, T]) -> object:
        return {str(key): codec.dump(value) for key, value in values.items()}

    def load(data: object, path: str) -> dict[str, T]:
        return {k: codec.load(v, f"{path}.{k}") for k, v in as_object(data, path).items()}

    return Codec(dump, load)


def pair(codec: Codec[T]) -> Codec[tuple[T, T]]:
    """A list of two."""
    several = many(codec)

    def load(data: object, path: str) -> tuple[T, T]:
        try:
            low, high = several.load(data, path)
        except ValueError as error:
            raise MalformedError(path, "two numbers") from error
        return low, high

    return Codec(several.dump, load)


def as_object(data: object, path: str) -> Mapping[str, object]:
    """A JSON object; raises ``MalformedError``."""
    if not isinstance(data, Mapping):
        raise MalformedError(path, "an object")
    return data


class Records:
    """Codecs of records: their JSON keys are their fields, and the fields' types say the rest.

    A number may be null where it is not finite, and reads as NaN then; in a mapping, as infinity.
    """

    def __init__(
        self,
        special: Mapping[tuple[type[Any], str], Codec[Any]],
        inline: Mapping[type[Any], str] | None = None,
        loaded: Mapping[type[Any], Callable[[Any, str], Any]] | None = None,
    ) -> None:
        """Say what the types do not.

        Args:
            special: codecs of single fields, by record and name.
            inline: by record, the field whose own keys take its place.
            loaded: by record, what makes one that was read, found at a path, the one to return;
                raises ``MalformedError`` where its fields do not fit together.
        """
        self._special, self._inline, self._loaded = special, inline or {}, loaded or {}

    def of(self, kind: Any) -> Codec[Any]:
        """The codec of a type that fields have: a record, a plain type, or several of one.

        Raises:
            TypeError: JSON has nothing for it.
        """
        if is_dataclass(kind):
            return self._record(kind)
        if kind in _PLAIN:
            return _PLAIN[kind]
        origin, parts = get_origin(kind), get_args(kind)
        if origin is Literal:
            return choice(parts)
        if origin in (Union, UnionType) and parts[1:] == (NoneType,):
            return optional(self.of(parts[0]))
        if origin is dict and parts[0] is str:
            return keyed(ERROR if parts[1] is float else self.of(parts[1]))
        if origin is tuple and parts[1:] == (...,):
            return many(self.of(parts[0]))
        if origin is tuple and parts in ((int, int), (float, float)):
            return pair(self.of(parts[0]))
        if origin is tuple and parts == (str, str):
            return many(TEXT)
        raise TypeError(f"no JSON for {kind}")

    def _record(self, kind: Any) -> Codec[Any]:
        types = get_type_hints(kind)
        codecs = {
            field.name: self._special.get((kind, field.name)) or self.of(types[field.name])
            for field in fields(kind)
        }
        required = {
            f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
        }
        inline, loaded = self._inline.get(kind, ""), self._loaded.get(kind)

        def dump(record: Any) -> object:
            data: dict[str, Any] = {}
            for key, codec in codecs.items():
                value: Any = codec.dump(getattr(record, key))
                data |= value if key == inline else {key: value}
            return data

        def load(data: object, path: str) -> Any:
            found = as_object(data, path)
            values: dict[str, object] = {}
            for key, codec in codecs.items():
                if key == inline:
                    values[key] = codec.load(found, path)
                elif key in found:
                    values[key] = codec.load(found[key], f"{path}.{key}")
                elif key in required:
                    raise MalformedError(f"{path}.{key}", MISSING_KEY)
            made = kind(**values)
            return made if loaded is None else loaded(made, path)

        return Codec(dump, load)


def document(form: str, report: Any) -> str:
    """A record as a JSON document of its own; numbers that are not finite are null.

    Args:
        form: what the document says that it is.
        report: a record, whose fields become keys, or what they are.
    """
    return json.dumps({"format": form, **plain(report)}, indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value of records as what JSON has: an object for a record, null for what is not finite."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


TEXT = only(str, "text")
ERROR = number(math.inf)
SHARE = number(math.nan)
_PLAIN: dict[type[Any], Codec[Any]] = {
    str: TEXT,
    bytes: Codec(_dump_bytes, _load_bytes),
    bool: only(bool, "true or false"),
    int: only(int, "an integer"),
    float: SHARE,
}


def parse(path: Path) -> object:
    """What a report's file holds; raises ``UsageError``."""
    hint = "Give the file that `audit MODEL -o report.json` wrote."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 20} MiB", hint)
        return json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"{path} is not JSON: {reason}", hint) from error


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not a JSON number")
