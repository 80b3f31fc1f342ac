"""The backend with the plain program, and the changes that are built beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from auditor import discovery
from auditor.audit import audit
from auditor.capture.trace import Tracer
from auditor.comparison import metrics
from auditor.errors import BackendError, UsageError
from auditor.graphs import model as models
from auditor.graphs import surgery, weights
from auditor.ports import Keeping
from auditor.records.backend import Provenance
from auditor.records.fix import FixAttempt
from auditor.replays import sessions
from auditor.subject import built, reference_of, stimulus_of

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.options import AuditOptions, BackendSpec
    from auditor.ports import Arrays, Progress
    from auditor.records.measured import Segment
    from auditor.records.report import AuditReport, Finding
    from auditor.replays.reference import Reference

SAMPLES = 4
SAME = 1e-5  # a rewrite must keep the reference's outputs within this relative L2


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to the model or to its build.

    Attributes:
        name: in words.
        options: engine options, as after ``--option ID.``.
        nodes: labels of the nodes that are written otherwise.
        findings: ranks of the findings that it is meant for.
        model: the changed model; None where the file stays.
        kept: the segments that stay in float32.
    """

    name: str
    findings: tuple[int, ...]
    options: dict[str, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    model: onnx.ModelProto | None = None
    kept: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """A change, and what came of it; fields as in ``FixAttempt``."""

    change: Change
    after: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    failure: str | None = None
    artifact: Path | None = None  # the engine's own file that was built

    @property
    def form(self) -> str | None:
        """The ending of the file that the change makes."""
        if self.artifact is not None:
            return self.artifact.suffix
        return None if self.change.model is None else ".onnx"

    @property
    def slower(self) -> float:
        """How many times as long a run takes."""
        if not self.latency_before or self.latency_after is None:
            return math.inf
        return self.latency_after / self.latency_before

    def report(self) -> FixAttempt:
        """Without the model."""
        c = self.change
        return FixAttempt(
            c.name,
            c.findings,
            c.options,
            c.nodes,
            c.model is not None,
            self.after,
            self.latency_before,
            self.latency_after,
            self.failure,
            len(c.kept) or None,
        )


class Bench:
    """The backend with the plain program, beside which changed ones are built."""

    def __init__(
        self,
        model: Model,
        spec: BackendSpec,
        options: AuditOptions,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self.spec = spec
        self._model = model
        self._options = options
        self._scratch = scratch
        self._progress = progress
        self._files = 0
        self._stack = ExitStack()
        self._tracer: Tracer | None = None
        stimulus = stimulus_of(model, options)
        self._feeds = [stimulus.sample(i) for i in range(min(len(stimulus), SAMPLES))]
        self._threads = options.threads or os.cpu_count() or 1
        self._reference, _ = reference_of(model, self._threads, scratch)
        self._expected = [self._reference.run(feeds) for feeds in self._feeds]
        self.whole = _together(model)
        self.values: Arrays = {}
        if self.whole is not None:
            self.values = sessions.inside(self.whole, self._threads, self._feeds[0])
        self.before = math.nan

    def __enter__(self) -> Bench:
        """Build the plain program and measure it."""
        self._build()
        self.before = self._apart([self._plainly(feeds) for feeds in self._feeds])
        return self

    def __exit__(self, *_: object) -> None:
        """End the backend's process."""
        self._stack.close()

    @property
    def built(self) -> Provenance | None:
        """What the plain program is."""
        return self._tracer.provenance if self._tracer else None

    def label(self, node: onnx.NodeProto) -> str:
        """What a person calls a node."""
        return self._model.labels.get(models.key(node), node.name)

    def keys_of(self, finding: Finding) -> tuple[str, ...]:
        """Keys of the nodes that a finding is about."""
        by_label = {label: key for key, label in self._model.labels.items()}
        return tuple(by_label[label] for label in finding.nodes if label in by_label)

    def disagrees(self, changed: onnx.ModelProto) -> str | None:
        """Why a changed model is not the same to the reference; None where it is."""
        try:
            reference = self._as_reference(changed)
            values = [reference.run(feeds) for feeds in self._feeds]
        except UsageError as error:
            return f"the reference refuses it: {error.message}"
        distance = self._apart(values)
        return None if distance <= SAME else f"the reference itself differs by {distance:.1e}"

    def attempt(self, change: Change) -> Attempt:
        """Build a change beside the plain program; its divergence and latency, or why not."""
        try:
            after, artifact = self.distance(change)
            tracer = self._tracer
            assert tracer is not None
            before, latency = tracer.race(self._feeds[0])
        except (BackendError, UsageError) as error:
            self._end()  # its process may be gone
            return Attempt(change, failure=error.message)
        return Attempt(change, after, before, latency, artifact=artifact)

    def distance(self, change: Change) -> tuple[float, Path | None]:
        """Build a change beside the plain program; its divergence, and the file it was built of.

        Raises:
            BackendError, UsageError: it could not be built or run.
        """
        path = self._model.path if change.model is None else self._saved(change.model)
        tracer = self._tracer or self._build()
        assert tracer.request is not None
        options = tracer.request.options | change.options
        request = replace(tracer.request, model_path=path, options=options)
        artifact = None
        if change.kept:
            backend = discovery.backend(self.spec.id)
            assert isinstance(backend, Keeping)
            self._files += 1
            artifact = self._scratch / f"{self._files}{backend.keeps}"
            keys = tuple(key for segment in change.kept for key in segment.node_keys)
            request = replace(request, artifact=artifact, kept=keys)
        tracer.beside(request)
        return self._apart([tracer.contrast(feeds)[1] for feeds in self._feeds]), artifact

    def audited(self, change: Change) -> AuditReport:
        """An audit of the changed model on this backend, with the changed model's own reference.

        Raises:
            UsageError: it cannot be loaded.
        """
        assert change.model is not None
        asked = replace(
            self._options, backends=(self.spec,), confirm=False, latency=False, pictures=False
        )
        noises = discovery.noises()
        return audit(self._saved(change.model), asked, noises=noises, progress=self._progress)

    def _build(self) -> Tracer:
        tracer = self._stack.enter_context(
            built(self.spec, self._options, self._model, self._feeds[0], self._progress)
        )
        if tracer.gap is not None:
            raise UsageError(
                f"{self.spec.label} no longer builds the model: {tracer.gap.reason}",
                "Audit it again.",
            )
        self._tracer = tracer
        return tracer

    def _end(self) -> None:
        self._stack.close()
        self._stack = ExitStack()
        self._tracer = None

    def _plainly(self, feeds: Arrays) -> Arrays:
        assert self._tracer is not None
        found = self._tracer.plain(feeds)
        if found is None:
            assert self._tracer.gap is not None
            raise UsageError(
                f"{self.spec.label} no longer runs the model: {self._tracer.gap.reason}",
                "Audit it again.",
            )
        return found

    def _apart(self, outputs: Sequence[Arrays]) -> float:
        """The largest relative L2 of any output on any sample."""
        return max(
            metrics.relative_l2(self._reference.wide(found), expected, (name,))
            for found, expected in zip(outputs, self._expected, strict=True)
            for name in expected
        )

    def _as_reference(self, changed: onnx.ModelProto) -> Reference:
        loaded = models.load(self._saved(changed))
        return reference_of(loaded, self._threads, self._scratch)[0]

    def _saved(self, model: onnx.ModelProto) -> Path:
        self._files += 1
        path = self._scratch / f"{self._files}.onnx"
        onnx.save(model, path)
        return path


def _together(model: Model) -> onnx.ModelProto | None:
    """The model with its weights inside; None where they are too large for one file."""
    whole = surgery.copied(model.proto)
    if sum(value.nbytes for value in model.weights.values()) >= onnx.checker.MAXIMUM_PROTOBUF:
        return None
    for tensor in whole.graph.initializer:
        tensor.CopyFrom(weights.attach(tensor, model.weights))
    return whole
