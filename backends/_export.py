"""Exports a module to ONNX with one of PyTorch's two exporters.

The newer one (``dynamo=True``) writes what ``torch.export`` captured, the older one what
TorchScript saw in one run. Sources: ``torch/onnx/__init__.py`` (``export``) and
https://docs.pytorch.org/docs/stable/onnx.html.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from auditor.errors import BackendError
from auditor.ports import Array
from auditor.records.backend import ExportRequest
from backends._shared import first_line

EXPORTERS: Final = ("dynamo", "torchscript")
# A line of code as the newer exporter's messages name it.
_PLACE: Final = re.compile(r'(?:File "|Caused by: \()[^"\n]*?([^/"\s]+\.py)(?:", line |:)(\d+)')
# How torch.jit's warning begins that a tensor became a Python value.
_CONSTANT: Final = "Converting a tensor to a "
_INSIDE: Final = 1 << 30  # bytes of weights that go into the file itself


def export(module: Any, request: ExportRequest, feeds: Mapping[str, Array]) -> tuple[str, ...]:
    """Write ``request.path``, and its weights beside it where they are large.

    Args:
        module: ``torch.nn.Module`` in evaluation mode.
        request: how, and where to.
        feeds: the arguments that it is captured or traced with, by name.

    Returns:
        Lines of code that made Python values of tensors, which tracing turned into constants.

    Raises:
        BackendError: the module fails on them, or the exporter on the module.
    """
    import torch

    given = {name: torch.from_numpy(value.copy()) for name, value in feeds.items()}
    known = _parameters(module)
    by_name = set(given) <= set(known)
    if by_name:  # exporters take the inputs in the order of the signature
        given = {name: given[name] for name in known if name in given}
    args, kwargs = ((), given) if by_name else (tuple(given.values()), {})
    axes = {n: {int(a): s for a, s in request.dynamic.get(n, {}).items()} for n in given}
    newer = request.exporter == "dynamo"
    how: dict[str, Any] = {
        "opset_version": request.opset,
        "input_names": list(given),
        "dynamo": newer,
        "external_data": sum(t.nbytes for t in module.state_dict().values()) > _INSIDE,
        "verbose": False,
    }
    if request.dynamic:
        shapes = axes if by_name else tuple(axes.values())
        how |= {"dynamic_shapes": shapes} if newer else {"dynamic_axes": axes}
    try:
        with warnings.catch_warnings(record=True) as warned, torch.no_grad():
            warnings.simplefilter("ignore")  # the older exporter announces its successor each time
            warnings.filterwarnings("always", _CONSTANT)
            how["output_names"] = _outputs(module(*args, **kwargs))
            if newer:
                torch.onnx.export(module, args, str(request.path), kwargs=kwargs or None, **how)
            else:
                with _of_tensors(module, tuple(given) if by_name else ()):
                    torch.onnx.export(module, tuple(given.values()), str(request.path), **how)
    except Exception as error:  # exporters and the user's own code raise what they like
        import traceback

        traceback.print_exception(error)  # into the worker's log
        raise BackendError(_said(error), stage="export") from error
    return _frozen(warned)


def _frozen(warned: Iterable[warnings.WarningMessage]) -> tuple[str, ...]:
    """The user's own lines in which a tensor became a Python value, in the order of execution."""
    import torch

    own = str(Path(torch.__file__).parent)
    lines = (f"{Path(w.filename).name}:{w.lineno}" for w in warned if own not in w.filename)
    return tuple(dict.fromkeys(lines))


def _said(error: BaseException) -> str:
    """What went wrong, and in which line of the module's code where that is known.

    The newer exporter's own errors say at length whom to write to; the reason is behind them. The
    older one's end with its whole graph.
    """
    if type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    said = f"{type(error).__name__}: {first_line(error).partition('  [Caused by')[0]}"
    places = _PLACE.findall(str(error))
    return said + (" ({}:{})".format(*places[-1]) if places else "")


@contextlib.contextmanager
def _of_tensors(module: Any, names: tuple[str, ...]) -> Iterator[None]:
    """A module that takes and returns tensors alone, which is all that the older exporter traces.

    It would give every argument by its position, those left out as None, and a mapping that is
    returned ends it. ``names`` are the arguments', none where they go by position.
    """
    own, forward = module.__dict__.get("forward"), module.forward

    def plain(*values: Any) -> tuple[Any, ...]:
        named = dict(zip(names, values, strict=True)) if names else {}
        return tuple(tensors(forward(**named) if names else forward(*values)))

    module.forward = plain
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def tensors(results: Any) -> Iterator[Any]:
    """All tensors in what a module returns, in order."""
    import torch

    if isinstance(results, torch.Tensor):
        yield results
    elif isinstance(results, Mapping):
        for value in results.values():
            yield from tensors(value)
    elif isinstance(results, (list, tuple)):
        for value in results:
            yield from tensors(value)


def _outputs(results: Any) -> list[str]:
    """What to call the outputs: as a module that returns a mapping does, else by number."""
    count = sum(1 for _ in tensors(results))
    if isinstance(results, Mapping) and len(results) == count:
        return [str(name) for name in results]
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]


def _parameters(module: Any) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (ValueError, TypeError):
        return []
