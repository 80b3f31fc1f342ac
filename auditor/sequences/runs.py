"""One backend's program, run again and again, and one of its runs looked at closely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from auditor.analysis import Analysis
from auditor.capture.trace import Tracer
from auditor.errors import BackendError
from auditor.options import AuditOptions, BackendSpec
from auditor.processes.worker import workers
from auditor.subject import request_for

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.ports import Arrays, Noise, Progress
    from auditor.replays.reference import Reference


@contextmanager
def built(
    spec: BackendSpec,
    options: AuditOptions,
    model: Model,
    feeds: Arrays,
    progress: Progress,
    *,
    open: bool = False,
) -> Iterator[Tracer]:
    """A backend with a model built for some inputs; the tracer says so where it has a gap.

    Args:
        spec: the backend.
        options: of an audit.
        model: what to build.
        feeds: inputs by name.
        progress: told what is being done.
        open: whether the program shall run at other shapes too.
    """
    with workers([spec.id], options.limits) as (worker,):
        tracer = Tracer(spec.label, worker, options.timeout, progress)
        if tracer.start():
            request = request_for(spec, options, model, feeds, worker.workdir)
            tracer.build(replace(request, open=open))
        yield tracer


def built_beside(
    tracer: Tracer,
    spec: BackendSpec,
    options: AuditOptions,
    model: Model,
    path: Path,
    feeds: Arrays,
    more: dict[str, str],
    *,
    open: bool = False,
) -> Tracer:
    """A piece of a model, built in a backend's process beside what is there.

    Args:
        tracer: the backend.
        spec: the same, as it was asked for.
        options: of an audit.
        model: the whole model.
        path: the piece's file.
        feeds: the piece's inputs by name.
        more: options of the engine for it.
        open: whether it shall run at other shapes too.

    Returns:
        The piece's own tracer, which says so where it has a gap.

    Raises:
        UsageError: the engine has no such option.
    """
    request = request_for(spec, options, model, feeds, tracer.worker.workdir)
    piece = Tracer(tracer.id, tracer.worker, tracer.timeout, tracer.progress)
    given = request.options | more
    piece.build(replace(request, model_path=path, dynamic=open, open=open, options=given))
    return piece


def plain_runs(tracer: Tracer) -> Callable[[Arrays], Arrays]:
    """Runs of a backend's plain program; they raise ``BackendError`` once the backend has a gap."""

    def run(feeds: Arrays) -> Arrays:
        outputs = None if tracer.gap else tracer.plain(feeds)
        if outputs is None:
            raise BackendError(tracer.gap.reason if tracer.gap else "", stage="run")
        return outputs

    return run


def analysed(
    tracer: Tracer,
    reference: Reference,
    noises: Sequence[Noise],
    feeds: Arrays,
    expected: Arrays,
    *,
    last: bool,
) -> tuple[Analysis, Arrays]:
    """Capture one run of a backend, and find what makes the error of its outputs.

    Args:
        tracer: the backend.
        reference: the reference.
        noises: the catalogue.
        feeds: the inputs of that run.
        expected: the reference's outputs that are looked at.
        last: that no other run follows.

    Returns:
        The analysis, and the backend's tensors by name.

    Raises:
        BackendError: the backend has a gap.
    """
    trace = tracer.sample(feeds, last=last)
    if trace is None:
        raise BackendError(tracer.gap.reason if tracer.gap else "", stage="run")
    same = {name: name for name in reference.graph.producer}
    analysis = Analysis(tracer, reference, same, noises)
    analysis.add(0, reference.wide(feeds), expected, trace)
    return analysis, trace.tensors
