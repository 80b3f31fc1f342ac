"""One backend's program, run again and again, and one of its runs looked at closely."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from auditor import subject
from auditor.analysis import Analysis
from auditor.capture.trace import Tracer
from auditor.errors import BackendError
from auditor.options import AuditOptions, BackendSpec
from auditor.pieces import Piece
from auditor.subject import reference_of, request_for

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.graphs.segments import Cut
    from auditor.ports import Arrays, Noise, Progress
    from auditor.replays.reference import Reference


@dataclass(frozen=True, slots=True)
class Harness:
    """What all runs of one command share.

    Attributes:
        options: of an audit: backends, their options, threads, timeout.
        noises: the catalogue.
        progress: told what is being done.
        scratch: a folder for temporary files.
    """

    options: AuditOptions
    noises: Sequence[Noise]
    progress: Progress
    scratch: Path

    def reference(self, model: Model) -> Reference:
        """The reference of a model."""
        threads = self.options.threads or os.cpu_count() or 1
        return reference_of(model, threads, self.scratch)[0]


@dataclass(frozen=True, slots=True)
class Program:
    """A model built by one backend.

    Attributes:
        spec: the backend, as it was asked for.
        tracer: the backend, which says so where it has a gap.
        model: what was built.
        harness: what it was built with.
        open: whether it runs at other shapes too.
    """

    spec: BackendSpec
    tracer: Tracer
    model: Model
    harness: Harness
    open: bool

    def run(self, feeds: Arrays) -> Arrays:
        """Run the plain program.

        Raises:
            BackendError: the backend has a gap.
        """
        outputs = None if self.tracer.gap else self.tracer.plain(feeds)
        if outputs is None:
            raise self._failed()
        return outputs

    def analysed(
        self, reference: Reference, feeds: Arrays, expected: Arrays, *, last: bool
    ) -> tuple[Analysis, Arrays]:
        """Capture one run, and find what makes the error of its outputs.

        Args:
            reference: the reference.
            feeds: the inputs of that run.
            expected: the reference's outputs that are looked at.
            last: that no other run follows.

        Returns:
            The analysis, and the backend's tensors by name.

        Raises:
            BackendError: the backend has a gap.
        """
        trace = self.tracer.sample(feeds, last=last)
        if trace is None:
            raise self._failed()
        same = {name: name for name in reference.graph.producer}
        analysis = Analysis(self.tracer, reference, same, self.harness.noises, self.harness.options)
        analysis.add(0, reference.wide(feeds), expected, trace)
        return analysis, trace.tensors

    def in_pieces(
        self,
        reference: Reference,
        made: Sequence[Piece],
        shapes: Mapping[str, tuple[int | None, ...]],
        options: Mapping[str, str],
        values: Sequence[Arrays],
        reads: Callable[[Cut, int], Arrays],
    ) -> str | None:
        """Build the model in pieces beside the program, and run them.

        One piece after the other takes all steps: each is compiled once, and only it is loaded.

        Args:
            reference: the reference.
            made: the pieces, in the order to run them.
            shapes: of what they read, by name; None where a size is open.
            options: more options of the engine for those that are chosen.
            values: by step, what is known by name; what pieces compute is added.
            reads: what a piece reads in a step of some number.

        Returns:
            Why they cannot be built or run; None where they were.

        Raises:
            UsageError: the engine has no such option.
            ReplayError: a piece cannot be cut out of the reference.
        """
        path = self.harness.scratch / f"{self.spec.id}-piece.onnx"
        types, weights = reference.replayer.types, self.model.weights
        for cut, chosen in ((piece.cut, piece.chosen) for piece in made):
            onnx.save(reference.graph.extract(cut, types, shapes, weights), path)
            tracer: Tracer | None = None
            for number, known in enumerate(values):
                try:
                    feeds = reads(cut, number)
                except KeyError as error:  # a cache that a later piece writes
                    return f"{error} is written by a later piece than reads it"
                tracer = tracer or self._built(path, feeds, options if chosen else {})
                outputs = None if tracer.gap else tracer.plain(feeds)
                if outputs is None:
                    reason = tracer.gap.reason if tracer.gap else ""
                    return f"piece {cut.id} of {len(made)}: {reason}"
                known.update(reference.wide(outputs))
        return None

    def _built(self, path: Path, feeds: Arrays, more: Mapping[str, str]) -> Tracer:
        """A piece of the model, built in the backend's process beside what is there."""
        mine, open = self.tracer, self.open
        request = request_for(
            self.spec, self.harness.options, self.model, feeds, mine.worker.workdir
        )
        given = {**request.options, **more}
        piece = Tracer(mine.id, mine.worker, mine.timeout, mine.progress)
        piece.build(replace(request, model_path=path, dynamic=open, open=open, options=given))
        return piece

    def _failed(self) -> BackendError:
        gap = self.tracer.gap
        return BackendError(gap.reason if gap else "", stage="run")


@contextmanager
def built(
    spec: BackendSpec, harness: Harness, model: Model, feeds: Arrays, *, open: bool = False
) -> Iterator[Program]:
    """A model built by a backend for some inputs; arguments as of ``auditor.subject.built``."""
    with subject.built(spec, harness.options, model, feeds, harness.progress, open=open) as tracer:
        yield Program(spec, tracer, model, harness, open)
