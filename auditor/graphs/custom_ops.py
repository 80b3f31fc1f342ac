"""Libraries of custom operators (``--custom-ops``) that this process runs models with.

Loading one runs its code, so none is loaded unless it was named. They hold for the whole process,
as the operating system keeps a library loaded anyway: the reference and every replay of a piece of
it need them alike. Workers are told of them in their request.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auditor.errors import UsageError

_HINT = (
    "It must be a library for ONNX Runtime on this machine that exports RegisterCustomOps, such as "
    "that of onnxruntime-extensions."
)
_libraries: list[Path] = []


def use(libraries: Sequence[Path]) -> None:
    """Run models with these libraries from now on, and with no others.

    Raises:
        UsageError: one is no file, or ONNX Runtime cannot load it.
    """
    _libraries.clear()
    for library in libraries:
        import onnxruntime as ort

        if not library.is_file():
            raise UsageError(f"--custom-ops {library} is no file", _HINT)
        try:
            ort.SessionOptions().register_custom_ops_library(str(library.resolve()))
        except Exception as error:  # ORT raises a family of classes that share no base
            raise UsageError(f"--custom-ops {library} cannot be loaded: {error}", _HINT) from error
        _libraries.append(library.resolve())


def used() -> tuple[Path, ...]:
    """The libraries in use."""
    return tuple(_libraries)


def register(options: Any) -> None:
    """Add the libraries in use to an ``onnxruntime.SessionOptions``."""
    for library in _libraries:
        options.register_custom_ops_library(str(library))
