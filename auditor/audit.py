"""One audit, from a model file to a report: the straight line through the domain."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from auditor import subject as subjects
from auditor.options import AuditOptions, BackendSpec
from auditor.processes.worker import Worker, workers
from auditor.records.backend import BuildRequest, Gap
from auditor.records.report import AuditReport

if TYPE_CHECKING:
    from auditor.analysis import Analysis
    from auditor.capture.recording import Source
    from auditor.capture.trace import SampleTrace, Tracer
    from auditor.comparison.agreement import Agreements
    from auditor.conclusion import Conclusion
    from auditor.pipeline.upstream import Upstream
    from auditor.ports import Arrays, Noise, Progress
    from auditor.subject import References, Samples, Subject

__all__ = ["AuditOptions", "BackendSpec", "audit", "record"]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What is left of the samples beside each backend's analysis.

    Attributes:
        digest: the SHA-256 of the inputs.
        agreements: how far outputs are from each other.
        expected: the reference's outputs on the samples that causes are confirmed on.
    """

    digest: str
    agreements: Agreements
    expected: list[Arrays]


def audit(
    model_path: Path,
    options: AuditOptions,
    *,
    noises: Sequence[Noise],
    progress: Progress,
) -> AuditReport:
    """Audit one exported model on several backends.

    Raises:
        UsageError: the model, the data or an option is unusable.
    """
    clock = _Clock()
    # The workers import their engines while this process loads the model.
    with (
        TemporaryDirectory(prefix="audit-", ignore_cleanup_errors=True) as scratch,
        workers([spec.id for spec in options.backends], options.limits) as started,
        ThreadPoolExecutor(max(1, len(started) + len(options.traces))) as pool,
    ):
        try:
            running = _Audit(options, noises, progress, pool, Path(scratch), clock)
            return running.report(model_path, started)
        except BaseException:
            for worker in started:  # or leaving the pool would wait for their answers
                worker.kill()
            raise


@dataclass(slots=True)
class _Audit:
    """One audit while it runs.

    Attributes:
        options, noises, progress: as of ``audit``.
        pool: where backends run.
        scratch: a folder for temporary files.
        clock: of its stages.
        constants: by backend that has built, those of the artefact that was loaded, or the module.
        grids: by backend that has built, what the activations of a quantised model are rounded to.
    """

    options: AuditOptions
    noises: Sequence[Noise]
    progress: Progress
    pool: ThreadPoolExecutor
    scratch: Path
    clock: _Clock
    constants: dict[str, Arrays] = field(default_factory=dict)
    grids: dict[str, Arrays] = field(default_factory=dict)

    def report(self, model_path: Path, started: Sequence[Worker]) -> AuditReport:
        """Everything, from the model file on; ``started`` are the backends' processes."""
        options = self.options
        tracers = [
            _tracer(spec, worker, options, self.progress)
            for spec, worker in zip(options.backends, started, strict=True)
        ]
        ready = [self.pool.submit(tracer.start) for tracer in tracers]
        self.progress.update("reference", "load")
        subject = subjects.load(model_path, options, self.progress)
        self.clock.lap("load")
        jobs = self._build(subject, tracers, ready)
        self.progress.update("reference", "run")
        against = subjects.references(subject, options, self.scratch)
        analyses = self._analyses(subject, against, tracers)
        measured = self._measure(subject, against, analyses, jobs)
        self.clock.lap("measure")
        from auditor.conclusion import Conclusion  # here: the workers had the processor until now

        conclusion = Conclusion(subject, options, self.noises, tracers, analyses)
        return self._conclude(conclusion, against, measured)

    def _build(
        self, subject: Subject, tracers: Sequence[Tracer], ready: Sequence[Future[bool]]
    ) -> dict[str, Future[SampleTrace | None]]:
        """Set every backend to build and to run the first sample, by its label."""
        calibration = subjects.calibration(subject, self.options, self.scratch)
        feeds = subject.samples.feeds(0)
        jobs: dict[str, Future[SampleTrace | None]] = {}
        for tracer, spec, start in zip(tracers, self.options.backends, ready, strict=True):
            tracer.sha256 = subject.compiled.info.sha256
            request = subjects.request_for(
                spec, self.options, subject.compiled, feeds, tracer.worker.workdir
            )
            if tracer.id in subject.quantised:
                request = replace(request, calibration=calibration)
            jobs[tracer.id] = self.pool.submit(self._begin, tracer, start, request, subject.samples)
        recordings = subject.recordings
        return jobs | {r.id: self.pool.submit(subject.samples.trace, r, 0) for r in recordings}

    def _begin(
        self, tracer: Tracer, start: Future[bool], request: BuildRequest, samples: Samples
    ) -> SampleTrace | None:
        """Build and run the first sample; None when the backend has a gap instead."""
        if not start.result():
            return None
        tracer.build(request)
        self.constants[tracer.id] = tracer.constants()
        self.grids[tracer.id] = tracer.grids()
        if tracer.gap is not None:
            return None
        return samples.trace(tracer, 0)

    def _analyses(
        self, subject: Subject, against: References, tracers: Sequence[Tracer]
    ) -> dict[str, Analysis]:
        """What will be measured on each backend, by its label; nothing is yet."""
        # Imported here: the workers are starting meanwhile.
        from auditor.analysis import Analysis
        from auditor.graphs import artefact
        from auditor.replays import qdq

        # Only PyTorch, before the export, can show what the export did.
        deployed = [noise for noise in self.noises if not noise.id.startswith("export.")]
        sources: tuple[Source, ...] = (*tracers, *subject.recordings)
        analyses = {
            source.id: Analysis(
                source,
                against.exported if source.id in subject.training else against.reference,
                subject.rename,
                self.noises if source.id in subject.training else deployed,
                self.options,
                len(subject.stimulus),
            )
            for source in sources
        }
        model, compiled = subject.model, subject.compiled
        if compiled is not model:
            constants = artefact.changed(against.truth, compiled, subject.rename)
            rounded = qdq.grids(compiled.proto.graph, model.proto.graph)
            for analysis in analyses.values():
                analysis.hold(constants, rounded, other_file=True)
        return analyses

    def _hold(self, who: str, analysis: Analysis, subject: Subject, against: References) -> None:
        """Tell an analysis what its backend holds, which has built."""
        from auditor.graphs import artefact

        quantised = who in subject.quantised
        if who in self.options.artifacts or quantised:
            there = artefact.held(against.truth, self.constants[who], quantised=quantised)
            analysis.hold(there, self.grids[who])
        if who in subject.training:
            analysis.hold_trained(artefact.trained(against.truth, self.constants[who]))

    def _measure(
        self,
        subject: Subject,
        against: References,
        analyses: Mapping[str, Analysis],
        jobs: dict[str, Future[SampleTrace | None]],
    ) -> _Measured:
        """Compare sample by sample; a backend runs the next one while this one is analysed.

        Args:
            subject: what is audited.
            against: what it is compared with.
            analyses: by backend; each sample is added.
            jobs: by backend, its first sample to come.
        """
        from auditor.comparison.agreement import Agreements
        from auditor.verdict import confirm

        agreements = Agreements()
        digest = hashlib.sha256()
        first: list[Arrays] = []
        samples = len(subject.stimulus)
        for index in range(samples):
            sample = subject.stimulus.sample(index)
            _hash(digest, sample)
            expected = _expected(index, sample, subject, against)
            if index + 1 == samples:
                against.reference.release()
            if index < confirm.SAMPLES:
                first.append(expected.outputs)
            outputs = {"reference": expected.outputs}
            for who, trace in self._traces(index, jobs, subject, analyses):
                if index == 0:
                    self._hold(who, analyses[who], subject, against)
                self.progress.update("reference", f"compare {who}")
                right = expected.exported if who in subject.training else expected.outputs
                analyses[who].add(index, expected.feeds, right, trace, expected.upstream)
                outputs[who] = {
                    subject.rename[n]: v for n, v in trace.outputs.items() if n in subject.rename
                }
                del trace  # the next one is awaited: nothing may hold this one
            # In the order asked for, not in that of arrival: the report is the same every time.
            agreements.add(
                {who: outputs[who] for who in ("reference", *analyses) if who in outputs}
            )
        against.reference.release_all()  # or it would be held beside what is built to confirm
        return _Measured(digest.hexdigest(), agreements, first)

    def _traces(
        self,
        index: int,
        jobs: dict[str, Future[SampleTrace | None]],
        subject: Subject,
        analyses: Mapping[str, Analysis],
    ) -> Iterator[tuple[str, SampleTrace]]:
        """The backends' traces of one sample, as they come; each backend goes on to the next.

        Args:
            index: the sample's number.
            jobs: by backend, the sample to come; replaced by the next one's.
            subject: what is audited.
            analyses: by backend.
        """
        from auditor.processes import memory

        who_does = {job: who for who, job in jobs.items()}
        jobs.clear()
        for job in as_completed(who_does):
            who, trace = who_does.pop(job), job.result()
            del job
            if trace is None:
                continue
            if index + 1 < len(subject.stimulus):  # it runs while this sample is analysed
                source = analyses[who].tracer
                jobs[who] = self.pool.submit(subject.samples.trace, source, index + 1)
            yield who, trace
            del trace  # or it would be held while the next one is awaited
            memory.give_back()

    def _conclude(
        self, conclusion: Conclusion, against: References, totals: _Measured
    ) -> AuditReport:
        """Confirm on the backends what was found, and come to a verdict."""
        clock = self.clock
        clock.lap("report")
        if conclusion.try_other_shapes(against):
            clock.lap("shapes")
        if self.options.confirm:
            conclusion.confirm(totals.expected)
            clock.lap("confirm")
        if self.options.latency:
            conclusion.time()
            clock.lap("latency")
        return conclusion.report(against, totals.digest, totals.agreements, clock.laps)


@dataclass(frozen=True, slots=True)
class _Expected:
    """What the reference makes of one sample.

    Attributes:
        feeds: the sample in the reference's types.
        outputs: of the model.
        exported: of the model as it was exported, before anything was changed in it.
        upstream: the sample in the pipeline around the network, where there is one.
    """

    feeds: Arrays
    outputs: Arrays
    exported: Arrays
    upstream: Upstream | None


def _expected(index: int, sample: Arrays, subject: Subject, against: References) -> _Expected:
    """Run the reference on one sample."""
    reference, exported = against.reference, against.exported
    feeds = reference.wide(sample)
    outputs = reference.run(feeds)
    written = outputs if exported is reference else exported.run(feeds)
    photographs = subject.photographs
    upstream = photographs.measure(index, reference, outputs) if photographs else None
    return _Expected(feeds, outputs, written, upstream)


def _hash(digest: Any, sample: Arrays) -> None:
    """Add a sample to the SHA-256 of the inputs."""
    import numpy as np

    for name in sorted(sample):
        digest.update(np.ascontiguousarray(sample[name]).tobytes())


def _tracer(spec: BackendSpec, worker: Worker, options: AuditOptions, progress: Progress) -> Tracer:
    """A backend's tracer, with a memory where there is a cache.

    The training side has none: what the user's code computes rests on more than its name. What is
    quantised rests on its calibration too.
    """
    from auditor.capture.trace import Tracer

    if options.cache is None or subjects.trains(spec) or subjects.quantises(spec, options):
        return Tracer(spec.label, worker, options.timeout, progress)
    from auditor.processes.cache import Store
    from auditor.processes.remembered import Remembered

    return Remembered(spec.label, worker, options.timeout, progress, Store(options.cache))


def record(model_path: Path, options: AuditOptions, path: Path, progress: Progress) -> Gap | None:
    """Write to ``path`` what the one backend of ``options`` computes; a gap when it fails.

    Raises:
        UsageError: the model, the data or an option is unusable.
        OSError: ``path`` cannot be written.
    """
    from auditor.capture import recording
    from auditor.capture.trace import Tracer
    from auditor.graphs import model as models

    (spec,) = options.backends
    with workers([spec.id], options.limits) as (worker,):
        tracer = Tracer(spec.label, worker, options.timeout, progress)
        model = models.load(model_path)
        stimulus = subjects.stimulus_of(model, options)
        if tracer.start():
            tracer.build(
                subjects.request_for(spec, options, model, stimulus.sample(0), worker.workdir)
            )
        if tracer.gap is None:
            recording.write(path, model, stimulus, tracer)
        return tracer.gap


class _Clock:
    """Wall seconds per stage of the audit."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._last
        self.laps["total"] = now - self._begun
        self._last = now
