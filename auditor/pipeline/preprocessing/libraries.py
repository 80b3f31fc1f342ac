"""The libraries that decode, resize and convert colours: one file each, found by listing.

A file of ``decoders/``, ``resizers/`` or ``colours/`` exports ``LIBRARY``, which satisfies the
Protocol of its kind. Its stem is its name in a pipeline description. Libraries are imported
inside the functions that need them, so that a missing one is an answer, not a failure.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

from auditor.errors import AuditError, UsageError
from auditor.ports import Array

Matrix = Literal["bt601", "bt709"]
Range = Literal["limited", "full"]
Arithmetic = Literal["rounded", "integer"]


class PhotoError(AuditError):
    """One photograph cannot be used: it is left out, and named as a gap."""


class Library(Protocol):
    """What every kind of library says of itself."""

    @property
    def package(self) -> str:
        """The distribution to install."""

    def version(self) -> str:
        """The library's name and version, with those of the codec inside where it tells.

        Raises:
            ImportError: it is not installed.
        """


class Decoder(Library, Protocol):
    """Turns the bytes of a photograph into pixels."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Ways it can decode; the first is its own default."""

    @property
    def turns(self) -> bool:
        """Whether it applies the EXIF orientation unless told otherwise."""

    def decode(self, data: bytes, variant: str) -> Array:
        """Pixels as stored, orientation not applied: uint8, height x width x RGB.

        Raises:
            PhotoError: the library refuses the file.
        """


class Resizer(Library, Protocol):
    """Changes the size of an image."""

    @property
    def interpolations(self) -> dict[str, tuple[bool, ...]]:
        """The interpolations, and whether each can filter before it samples; the default first."""

    def resize(
        self, image: Array, size: tuple[int, int], interpolation: str, antialias: bool
    ) -> Array:
        """The image (uint8, height x width x 3) at ``size`` (height, width), in uint8."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """How RGB becomes YUV and back: ITU-R BT.601 or BT.709, in one of two ranges.

    Attributes:
        arithmetic: ``rounded`` results of real arithmetic, or the 8-bit fixed point that
            hardware has for the way back (SysNoise, eq. 7).
    """

    matrix: Matrix
    range: Range
    arithmetic: Arithmetic


class Converter(Library, Protocol):
    """Takes an image to YUV with 4:2:0 chroma and back."""

    @property
    def conversions(self) -> tuple[Conversion, ...]:
        """What it can do."""

    def convert(self, image: Array, conversion: Conversion) -> Array:
        """RGB to YUV 4:2:0 to RGB: uint8, height x width x 3; both sizes are even."""


def decoder(name: str) -> Decoder:
    """The decoder with this name.

    Raises:
        UsageError: there is none, or it is not installed.
    """
    found: Decoder = _find("decoders", name)
    return found


def resizer(name: str) -> Resizer:
    """The resizer with this name; raises as ``decoder`` does."""
    found: Resizer = _find("resizers", name)
    return found


def converter(name: str) -> Converter:
    """The colour converter with this name; raises as ``decoder`` does."""
    found: Converter = _find("colours", name)
    return found


def missing(library: Library) -> str | None:
    """Why a library cannot be used here, or None."""
    try:
        library.version()
    except ImportError as error:
        return f"{library.package} is not installed ({error})"
    return None


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of all libraries of a kind: ``decoders``, ``resizers`` or ``colours``."""
    package = importlib.import_module(f"auditor.pipeline.preprocessing.{kind}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def load(kind: str, name: str) -> Any:  # typed by its callers
    """The library of a kind, whether it is installed or not; ``name`` is one of ``names``."""
    return importlib.import_module(f"auditor.pipeline.preprocessing.{kind}.{name}").LIBRARY


@cache
def _find(kind: str, name: str) -> Any:  # typed by its callers
    library = load(kind, name)
    if (reason := missing(library)) is not None:
        raise UsageError(
            f"the pipeline needs `{name}`, but {reason}",
            f"Install it: pip install {library.package}, or 'sysnoise-auditor[pipeline]'.",
        )
    return library
