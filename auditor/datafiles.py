"""Files of arrays (``.npz``, ``.npy``, ``.safetensors``), read one sample at a time.

Nothing is unpickled, and what is stored uncompressed is mapped, not loaded.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.ports import Array

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One array of a data file; ``read(i)`` gets ``array[i]``, ``read(None)`` all of it."""

    shape: Shape
    dtype: np.dtype[np.generic]
    read: Callable[[int | None], Array]


def read(data: Path, option: str) -> dict[str, Stored]:
    """The arrays of a file by name; the one array of a ``.npy`` file has the name ``""``.

    Args:
        data: the file.
        option: the command line's option that named it, for messages.

    Raises:
        UsageError: it is missing, empty, damaged, of another format, or holds pickled objects.
    """
    if not data.exists():
        raise UsageError(f"{data} does not exist", f"Check the path given to {option}.")
    if not data.is_file():
        raise UsageError(f"{data} is not a file", "Give a .npz, .npy or .safetensors file.")
    if data.stat().st_size == 0:
        raise UsageError(f"{data} is empty", "Record it again.")
    readers = {".npz": _read_npz, ".npy": _read_npy, ".safetensors": _read_safetensors}
    reader = readers.get(data.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{data} is not a .npz, .npy or .safetensors file",
            "Save arrays with numpy.savez or safetensors, keyed by the tensors' names.",
        )
    try:
        stored = reader(data)
    except PermissionError as error:
        raise UsageError(f"{data} cannot be read", "Check its permissions.") from error
    if not stored:
        raise UsageError(f"{data} holds no array", "Record it again.")
    return stored


def _read_npy(data: Path) -> dict[str, Stored]:
    with _reading(data), data.open("rb") as stream:
        shape, fortran, dtype = _npy_header(data, stream)
        return {"": _mapped(_map(data, dtype, stream.tell(), shape, fortran))}


def _read_npz(data: Path) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    with _reading(data), zipfile.ZipFile(data) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream:
                shape, fortran, dtype = _npy_header(data, stream, name)
                header = stream.tell()
            if member.file_size < header + dtype.itemsize * math.prod(shape):
                _end_of_file()
            if member.compress_type == zipfile.ZIP_STORED:
                start = _member_start(data, member) + header
                stored[name] = _mapped(_map(data, dtype, start, shape, fortran))
            else:
                stored[name] = _compressed(data, member, header, shape, fortran, dtype)
    return stored


def _read_safetensors(data: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    with _reading(data, SafetensorError):
        file: Any = safe_open(str(data), "numpy")
        return {name: _slice(file, name) for name in file.keys()}  # noqa: SIM118


# What zipfile, zlib and numpy raise on damaged, encrypted or foreign files.
_DAMAGED: tuple[type[Exception], ...] = (
    ValueError,
    EOFError,
    RuntimeError,
    OSError,  # an offset before the file's start
    OverflowError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextmanager
def _reading(data: Path, *extra: type[Exception]) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise
    except (*_DAMAGED, *extra) as error:
        raise UsageError(
            f"{data} is not a valid {data.suffix} file: {error}",
            "It was cut off or is another format: record it again.",
        ) from error


def _npy_header(
    data: Path, stream: Any, name: str | None = None
) -> tuple[Shape, bool, np.dtype[Any]]:
    """Shape, column-major flag and type of an array in NumPy's format (NEP 1)."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        what = f"array `{name}` of {data}" if name else str(data)
        raise UsageError(
            f"{what} holds pickled Python objects, which can run any code when read: refused",
            "Save plain numeric arrays, for example numpy.stack(list_of_arrays).",
        )
    return shape, fortran, dtype


def _map(data: Path, dtype: np.dtype[Any], offset: int, shape: Shape, fortran: bool) -> Array:
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    array: Array = np.memmap(data, dtype, "r", offset, shape, "F" if fortran else "C")
    return array


def _mapped(array: Array) -> Stored:
    def read(index: int | None) -> Array:
        return np.array(array if index is None else array[index])

    return Stored(array.shape, array.dtype, read)


def _member_start(data: Path, member: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes: after its local header (APPNOTE.TXT, section 4.3.7)."""
    with data.open("rb") as stream:
        stream.seek(member.header_offset + 26)
        name, extra = np.frombuffer(stream.read(4), "<u2")
    return member.header_offset + 30 + int(name) + int(extra)


def _compressed(
    data: Path,
    member: zipfile.ZipInfo,
    header: int,
    shape: Shape,
    fortran: bool,
    dtype: np.dtype[Any],
) -> Stored:
    """An array that can only be read front to back, one sample in memory at a time."""
    size = dtype.itemsize * math.prod(shape)

    def read(index: int | None) -> Array:
        whole = index is None or fortran
        step = size if whole else size // shape[0]
        with _reading(data), zipfile.ZipFile(data) as archive, archive.open(member) as stream:
            skip = header + (0 if whole or index is None else index * step)
            while skip > 0:  # not seek(), which holds 16 MiB
                skip -= len(stream.read(min(skip, 1 << 20)) or _end_of_file())
            flat = np.frombuffer(stream.read(step), dtype)
        if not whole:
            return flat.reshape(shape[1:])
        array = flat.reshape(shape, order="F" if fortran else "C")
        return array if index is None else array[index]

    return Stored(shape, dtype, read)


def _end_of_file() -> NoReturn:
    raise EOFError("it ends before its last value")


def _slice(file: Any, name: str) -> Stored:
    part = file.get_slice(name)
    shape = tuple(part.get_shape())
    first = part[:0] if shape else file.get_tensor(name)

    def read(index: int | None) -> Array:
        array: Array = file.get_tensor(name) if index is None else part[index : index + 1][0]
        return array

    return Stored(shape, first.dtype, read)
