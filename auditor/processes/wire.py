"""Records as JSON and arrays as safetensors, for the pipe between auditor and worker.

Nothing is pickled: a worker runs native code that may have been corrupted by a hostile model.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from auditor.ports import Array, Arrays


def encode(value: object) -> Any:
    """A record (or a container of records) as JSON-compatible data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def decode(kind: Any, data: Any) -> Any:
    """``data`` as the annotated type ``kind``: the inverse of ``encode``.

    Raises:
        TypeError, ValueError, AttributeError: the data are of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return decode(kind, data)
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(Any, kind))
        return typing.cast(Any, kind)(**{k: decode(hints[k], v) for k, v in data.items()})
    if origin is tuple:
        items = [arguments[0]] * len(data) if arguments[1:] == (...,) else arguments
        return tuple(decode(item, v) for item, v in zip(items, data, strict=True))
    if origin is dict:
        return {k: decode(arguments[1], v) for k, v in data.items()}
    if origin is typing.Literal and data not in arguments:
        raise ValueError(f"{data!r} is none of {', '.join(map(str, arguments))}")
    if kind in (str, bool, int) and type(data) is not kind:
        raise TypeError(f"{data!r} is no {kind.__name__}")
    if kind is float and (isinstance(data, bool) or not isinstance(data, int | float)):
        raise TypeError(f"{data!r} is no number")
    return kind(data) if kind is Path else data


_hints = functools.cache(typing.get_type_hints)  # it evaluates every annotation


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A file of tensors: ``names`` in its order."""

    path: str
    names: tuple[str, ...]


def save(path: Path, tensors: Arrays) -> list[str]:
    """Write tensors to a safetensors file and return their names, in the file's order.

    The file knows them by position, so a tensor's name may hold anything.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    stored: Arrays = {}
    for i, value in enumerate(tensors.values()):
        # Not np.ascontiguousarray: that would turn a scalar into a vector.
        array = np.asarray(value, order="C")
        if array.dtype.kind == "U":  # the format has no texts: their code points, by letter
            width = max(array.dtype.itemsize // 4, 1)
            points = array.astype(f"U{width}").reshape(-1).view(np.uint32)
            stored[f"{i}/text"] = points.reshape(*array.shape, width)
        else:
            stored[str(i)] = array
    try:
        save_file(stored, str(path))
    except SafetensorError as error:  # it knows no other error; the system's number is in words
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    return list(tensors)


def load(path: Path, names: Sequence[str]) -> Arrays:
    """Read back what ``save`` wrote, and remove the file.

    Raises:
        ValueError: it is damaged, or not a file of its own (a link, a pipe).
        OSError, KeyError: it is missing, or holds fewer tensors than there are names.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path.name} is no file")
    try:
        stored = load_file(str(path), backend="pread")  # mapped it is in memory twice
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    path.unlink()
    return named(stored, names)


def named(stored: Arrays, names: Sequence[str]) -> Arrays:
    """What a file of ``save`` holds, by the names that it returned.

    Raises:
        KeyError, ValueError: as ``load``.
    """
    return {
        name: _texts(stored[f"{i}/text"]) if f"{i}/text" in stored else stored[str(i)]
        for i, name in enumerate(names)
    }


def _texts(points: Array) -> Array:
    """Texts of their code points.

    Raises:
        ValueError: they are none.
    """
    if points.dtype != np.uint32 or points.ndim == 0 or points.max(initial=0) > sys.maxunicode:
        raise ValueError("texts are damaged")
    width = points.shape[-1]
    return np.ascontiguousarray(points).view(f"<U{width}").reshape(points.shape[:-1])
