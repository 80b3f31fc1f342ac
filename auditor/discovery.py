"""Finds backends, report formats and noises by listing their packages: no registry to edit."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

from auditor.errors import UsageError, suggestion

if TYPE_CHECKING:
    from collections.abc import Iterable

    from auditor.ports import Backend, Fix, Noise, Renderer

_FEW = 12  # names that a hint lists beside the one that was meant


def backend_ids() -> tuple[str, ...]:
    """Ids of all backends, without importing any engine."""
    return _modules("backends")


def backend(id: str) -> Backend:
    """The backend with this id; imports its module but not its engine.

    Raises:
        UsageError: there is none.
    """
    require(id, backend_ids(), "backend", "Backends")
    found: Backend = importlib.import_module(f"backends.{id}").BACKEND
    return found


def renderers() -> dict[str, Renderer]:
    """All report formats by name."""
    found = [importlib.import_module(f"reports.{m}").RENDERER for m in _modules("reports")]
    return {renderer.name: renderer for renderer in found}


def terminal() -> Renderer:
    """The format in which a report is printed, without importing the others."""
    _modules("reports")  # says so where they are not ours
    found: Renderer = importlib.import_module("reports.terminal").RENDERER
    return found


def fixes() -> tuple[Fix, ...]:
    """All equivalent ways to write operators, ordered by id."""
    package = "auditor.fixes"
    found = [importlib.import_module(f"{package}.{m}").FIX for m in _modules(package)]
    return tuple(sorted(found, key=lambda fix: fix.id))


class _Noises(Sequence["Noise"]):
    """All noises, imported when first looked at: they need onnx, which takes 0.3 s to import."""

    @cached_property
    def _found(self) -> tuple[Noise, ...]:
        found = [_load(module) for module in _modules("auditor.noises")]
        return tuple(sorted(found, key=lambda noise: noise.id))

    @overload
    def __getitem__(self, index: int) -> Noise: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Noise]: ...
    def __getitem__(self, index: int | slice) -> Noise | Sequence[Noise]:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)


def noises() -> Sequence[Noise]:
    """All noises, ordered by id; their modules are imported when the sequence is first used."""
    return _Noises()


def noise(id: str) -> Noise:
    """The noise with this id.

    Raises:
        UsageError: there is none.
    """
    found = {noise.id: noise for noise in noises()}
    require(id, found, "cause", "Causes")
    return found[id]


def require(name: str, known: Iterable[str], what: str, whats: str) -> None:
    """Check that ``name`` is one of ``known``.

    Args:
        name: what the user wrote.
        known: what there is.
        what: the word for one of them.
        whats: the word that introduces the list of all.

    Raises:
        UsageError: it is not; says the likeliest one meant, and which there are unless many.
    """
    choices = sorted(known)
    if name in choices:
        return
    close = [choice for choice in choices if name in choice.split(".")]  # a family, or without it
    if len(close) > 1:
        raise UsageError(f"there is no {what} `{name}`", f"{whats}: {', '.join(close)}.")
    hint = f"Did you mean `{close[0]}`? " if close else suggestion(name, choices)
    listed = f"{whats}: {', '.join(choices)}."
    if not hint or len(choices) <= _FEW:  # a page of names would hide the one meant
        hint += listed
    raise UsageError(f"there is no {what} `{name}`", hint.strip())


def _load(module: str) -> Noise:
    """One file of the catalogue.

    An audit without one of its causes could call something unexplained that it can explain, so a
    file that cannot be imported ends it, and is named.

    Raises:
        RuntimeError: the file cannot be imported or has no ``NOISE``.
    """
    try:
        found: Noise = importlib.import_module(f"auditor.noises.{module}").NOISE
    except Exception as error:
        raise RuntimeError(
            f"the noise auditor/noises/{module}.py cannot be used: {error}"
        ) from error
    return found


@cache
def _modules(package: str) -> tuple[str, ...]:
    """Names of a package's public modules, once it is known to be ours."""
    spec = importlib.util.find_spec(package)
    ours = Path(__file__).resolve().parent.parent.joinpath(*package.split("."))
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"the package `{package}` of the auditor is missing from {ours.parent}",
            "Install sysnoise-auditor again.",
        )
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    if folder != ours:
        raise UsageError(
            f"the package `{package}` of the auditor is shadowed by {folder}",
            f"Another distribution or folder uses that name: uninstall it, or run the auditor "
            f"in an environment of its own; it expects {ours}.",
        )
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules([str(ours)]) if not m.name.startswith("_"))
    )
