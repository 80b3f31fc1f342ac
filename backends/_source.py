"""Loads what a model was exported from, as ``--source`` names it.

Naming a factory is asking for its code to be run, as ``python -m`` does. A file that holds a whole
module or program is another matter: reading one can run code that nobody looked at (pickles, and
the expressions of ``.pt2`` archives, which ``torch.export.load`` evaluates), so that is done only
with ``--trust-source``.

Sources: https://docs.pytorch.org/docs/stable/notes/serialization.html and
``torch/export/pt2_archive/_package.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from auditor.errors import BackendError, UsageError
from backends._shared import first_line

FORMS: Final = (
    "package.module:factory",
    "path/to/file.py:factory",
    "model.pt2 (an ExportedProgram)",
    "model.pt (a pickled module)",
)
_HINT: Final = f"Write one of: {'; '.join(FORMS)}."
_ARCHIVES: Final = (".pt2", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Source:
    """A module in its trained state.

    Attributes:
        module: ``torch.nn.Module``.
        exported: whether it is the graph of an ExportedProgram, which knows its own modules.
        notes: what a reader must know, as sentences.
        keywords: the arguments that an ExportedProgram takes by name; all others only by order.
    """

    module: Any
    exported: bool
    notes: tuple[str, ...]
    keywords: tuple[str, ...] = ()


def load(text: str, *, trusted: bool) -> Source:
    """Load a source.

    Args:
        text: what the user named.
        trusted: whether files that can run code may be loaded.

    Raises:
        UsageError: there is no such thing, or it may not be loaded.
        BackendError: the user's own code failed.
    """
    if text.endswith(_ARCHIVES):
        return _archive(Path(text), trusted)
    where, colon, name = text.rpartition(":")
    if Path(text).is_dir():
        raise UsageError(
            f"--source {text} is a folder, which does not say what to build of it",
            "Name a factory that loads it, such as load.py:make with `def make(): return "
            f"transformers.AutoModel.from_pretrained({text!r})`.",
        )
    if not colon or not where or not name:
        raise UsageError(f"--source `{text}` names no factory", _HINT)
    found = _attribute(_file(Path(where)) if where.endswith(".py") else _module(where), name, text)
    made = found if _is_module(found) else _call(found, text)
    if not _is_module(made):
        raise UsageError(
            f"--source `{text}` gives a {type(made).__name__}, not a torch.nn.Module",
            "Name a callable without arguments that returns the module with its trained weights.",
        )
    return Source(made, False, _ready(made))


def _archive(path: Path, trusted: bool) -> Source:
    import torch

    if not path.is_file():
        raise UsageError(f"--source {path} does not exist", _HINT)
    if not trusted:
        raise UsageError(
            f"--source {path}: loading such a file can run code that is in it",
            "If you made it yourself or trust who did, add --trust-source; or name the factory "
            "that builds the module.",
        )
    try:
        if path.suffix == ".pt2":
            program = torch.export.load(path)
            _, keywords = program.call_spec.in_spec.children()  # as saved: ((…), {…})
            return Source(program.module(), True, (), tuple(keywords.context))
        made = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # pickle and torch raise what they like
        raise UsageError(f"--source {path} cannot be loaded: {first_line(error)}", _HINT) from error
    if isinstance(made, torch.jit.ScriptModule) or not _is_module(made):
        raise UsageError(
            f"--source {path} holds a {type(made).__name__}, not a torch.nn.Module",
            "Weights alone do not say what is computed: name the factory that loads them.",
        )
    return Source(made, False, _ready(made))


def _ready(module: Any) -> tuple[str, ...]:
    """Put a module into its state for inference, and say so where it was in another."""
    training = sorted(name or "the module" for name, m in module.named_modules() if m.training)
    module.eval()
    if not training:
        return ()
    count = len(training)
    return (
        f"The source was handed over in training mode ({training[0]}"
        f"{f' and {count - 1} more' if count > 1 else ''}); it is run in evaluation mode.",
    )


def _module(name: str) -> Any:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"--source: there is no module `{name}`",
                "It is looked for in the current folder and among the installed packages.",
            ) from error
        raise _failed(f"importing {name}", error) from error
    except Exception as error:  # the user's own code
        raise _failed(f"importing {name}", error) from error


def _file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--source {path} does not exist", _HINT)
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE` does
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise _failed(f"running {path}", error) from error
    return module


def _attribute(module: Any, name: str, text: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = sorted(n for n, v in vars(module).items() if callable(v) and n[0] != "_")
            raise UsageError(
                f"--source `{text}`: there is no `{name}`",
                f"It has: {', '.join(own[:10])}." if own else _HINT,
            )
        found = getattr(found, part)
    return found


def _call(factory: Any, text: str) -> Any:
    if not callable(factory):
        raise UsageError(f"--source `{text}` cannot be called", _HINT)
    try:
        return factory()
    except Exception as error:  # the user's own code
        raise _failed(f"{text}()", error) from error


def _is_module(value: Any) -> bool:
    import torch

    return isinstance(value, torch.nn.Module)


def _failed(what: str, error: Exception) -> BackendError:
    import traceback

    with contextlib.suppress(Exception):
        traceback.print_exception(error)  # into the worker's log
    return BackendError(f"{what} failed: {type(error).__name__}: {first_line(error)}")
