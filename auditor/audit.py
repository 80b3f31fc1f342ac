"""One audit, from a model file to a report: the straight line through the domain."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

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
    from auditor.ports import Arrays, Noise, Progress
    from auditor.subject import References, Samples, Subject

__all__ = ["AuditOptions", "BackendSpec", "audit", "record"]


@dataclass(frozen=True, slots=True)
class _Held:
    """What backends hold once they have built, by their labels.

    Attributes:
        constants: of the artefact that was loaded, or the module.
        grids: what the activations of a quantised model are rounded to.
    """

    constants: dict[str, Arrays]
    grids: dict[str, Arrays]


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
            return _run(model_path, options, noises, progress, started, pool, clock, Path(scratch))
        except BaseException:
            for worker in started:  # or leaving the pool would wait for their answers
                worker.kill()
            raise


def _run(
    model_path: Path,
    options: AuditOptions,
    noises: Sequence[Noise],
    progress: Progress,
    started: Sequence[Worker],
    pool: ThreadPoolExecutor,
    clock: _Clock,
    scratch: Path,
) -> AuditReport:
    tracers = [
        _tracer(spec, worker, options, progress)
        for spec, worker in zip(options.backends, started, strict=True)
    ]
    ready = [pool.submit(tracer.start) for tracer in tracers]
    progress.update("reference", "load")
    subject = subjects.load(model_path, options, progress)
    clock.lap("load")
    own = _Held({}, {})
    jobs = _build(subject, options, tracers, ready, own, pool, scratch)
    progress.update("reference", "run")
    against = subjects.references(subject, options, scratch)
    analyses = _analyses(subject, against, options, noises, tracers)

    def hold(who: str) -> None:
        from auditor.graphs import artefact

        quantised = who in subject.quantised
        if who in options.artifacts or quantised:
            there = artefact.held(against.truth, own.constants[who], quantised=quantised)
            analyses[who].hold(there, own.grids[who])
        if who in subject.training:
            analyses[who].hold_trained(artefact.trained(against.truth, own.constants[who]))

    measured = _measure(subject, against, analyses, jobs, hold, pool, progress)
    clock.lap("measure")
    from auditor.conclusion import Conclusion  # here: the workers had the processor until now

    conclusion = Conclusion(subject, options, noises, tracers, analyses)
    return _conclude(conclusion, against, options, measured, clock)


def _build(
    subject: Subject,
    options: AuditOptions,
    tracers: Sequence[Tracer],
    ready: Sequence[Future[bool]],
    own: _Held,
    pool: ThreadPoolExecutor,
    scratch: Path,
) -> dict[str, Future[SampleTrace | None]]:
    """Set every backend to build and to run the first sample, by its label.

    ``own`` is filled as backends have built.
    """
    calibration = subjects.calibration(subject, options, scratch)
    feeds = subject.samples.feeds(0)
    jobs: dict[str, Future[SampleTrace | None]] = {}
    for tracer, spec, start in zip(tracers, options.backends, ready, strict=True):
        tracer.sha256 = subject.compiled.info.sha256
        request = subjects.request_for(
            spec, options, subject.compiled, feeds, tracer.worker.workdir
        )
        if tracer.id in subject.quantised:
            request = replace(request, calibration=calibration)
        jobs[tracer.id] = pool.submit(_begin, tracer, start, request, subject.samples, own)
    return jobs | {r.id: pool.submit(subject.samples.trace, r, 0) for r in subject.recordings}


def _analyses(
    subject: Subject,
    against: References,
    options: AuditOptions,
    noises: Sequence[Noise],
    tracers: Sequence[Tracer],
) -> dict[str, Analysis]:
    """What will be measured on each backend, by its label; nothing is yet."""
    # Imported here: the workers are starting meanwhile.
    from auditor.analysis import Analysis
    from auditor.graphs import artefact
    from auditor.replays import qdq

    # Only PyTorch, before the export, can show what the export did.
    deployed = [noise for noise in noises if not noise.id.startswith("export.")]
    sources: tuple[Source, ...] = (*tracers, *subject.recordings)
    analyses = {
        source.id: Analysis(
            source,
            against.exported if source.id in subject.training else against.reference,
            subject.rename,
            noises if source.id in subject.training else deployed,
            options.output_kinds,
            len(subject.stimulus),
            tokens=options.tokens,
            pictured=options.pictures,
            threads=options.threads,
        )
        for source in sources
    }
    model, compiled = subject.model, subject.compiled
    if compiled is not model:
        constants = artefact.changed(against.truth, compiled, subject.rename)
        rounded = qdq.grids(compiled.proto.graph, compiled.weights, model.proto.graph)
        for analysis in analyses.values():
            analysis.hold(constants, rounded, other_file=True)
    return analyses


def _measure(
    subject: Subject,
    against: References,
    analyses: Mapping[str, Analysis],
    jobs: dict[str, Future[SampleTrace | None]],
    hold: Callable[[str], None],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> _Measured:
    """Compare sample by sample; a backend runs the next one while this one is analysed.

    Args:
        subject: what is audited.
        against: what it is compared with.
        analyses: by backend; each sample is added.
        jobs: by backend, its first sample to come.
        hold: called with a backend's label once it has built, before its first sample is added.
        pool: where backends run.
        progress: told which backend is compared.
    """
    import numpy as np

    from auditor.comparison.agreement import Agreements
    from auditor.processes import memory
    from auditor.verdict import confirm

    reference, exported = against.reference, against.exported
    stimulus, photographs = subject.stimulus, subject.photographs
    agreements = Agreements()
    digest = hashlib.sha256()
    first: list[Arrays] = []
    for index in range(len(stimulus)):
        sample = stimulus.sample(index)
        for name in sorted(sample):
            digest.update(np.ascontiguousarray(sample[name]).tobytes())
        feeds = reference.wide(sample)
        expected = reference.run(feeds)
        written = expected if exported is reference else exported.run(feeds)
        upstream = photographs.measure(index, reference, expected) if photographs else None
        if index + 1 == len(stimulus):
            reference.release()
        outputs = {"reference": expected}
        if index < confirm.SAMPLES:
            first.append(expected)
        # A trace that was analysed is let go before the next one is: nothing else may hold it.
        by_job = {job: who for who, job in jobs.items()}
        jobs.clear()
        for job in as_completed(by_job):
            who = by_job.pop(job)
            trace = job.result()
            del job
            if trace is None:
                continue
            if index + 1 < len(stimulus):  # the backend goes on while this sample is analysed
                source = analyses[who].tracer
                jobs[who] = pool.submit(subject.samples.trace, source, index + 1)
            if index == 0:
                hold(who)
            progress.update("reference", f"compare {who}")
            right = written if who in subject.training else expected
            analyses[who].add(index, feeds, right, trace, upstream)
            outputs[who] = {
                subject.rename[n]: v for n, v in trace.outputs.items() if n in subject.rename
            }
            del trace
            memory.give_back()
        # In the order asked for, not in that of arrival: the report is the same every time.
        agreements.add({who: outputs[who] for who in ("reference", *analyses) if who in outputs})
    reference.release_all()  # or it would be held beside what is built to confirm
    return _Measured(digest.hexdigest(), agreements, first)


def _conclude(
    conclusion: Conclusion,
    against: References,
    options: AuditOptions,
    totals: _Measured,
    clock: _Clock,
) -> AuditReport:
    """Confirm on the backends what was found, and come to a verdict."""
    clock.lap("report")
    if conclusion.try_other_shapes(against):
        clock.lap("shapes")
    if options.confirm:
        conclusion.confirm(totals.expected)
        clock.lap("confirm")
    if options.latency:
        conclusion.time()
        clock.lap("latency")
    return conclusion.report(against, totals.digest, totals.agreements, clock.laps)


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


def _begin(
    tracer: Tracer,
    start: Future[bool],
    request: BuildRequest,
    samples: Samples,
    own: _Held,
) -> SampleTrace | None:
    """Build and run the first sample; None when the backend has a gap instead."""
    if not start.result():
        return None
    tracer.build(request)
    own.constants[tracer.id] = tracer.constants()
    own.grids[tracer.id] = tracer.grids()
    if tracer.gap is not None:
        return None
    return samples.trace(tracer, 0)


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
