"""One audit, from a model file to a report: the straight line through the domain."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from auditor import __version__
from auditor.errors import UsageError
from auditor.processes.limits import GIB, Limits
from auditor.processes.worker import Worker, workers
from auditor.records.backend import BuildRequest, Gap
from auditor.records.report import AuditReport, BackendReport, Finding, NoiseInfo, PipelineReport
from auditor.records.terms import OutputKind, Severity

if TYPE_CHECKING:
    from auditor.agreement import Agreements
    from auditor.analysis import Analysis
    from auditor.model import Model, TensorSpec
    from auditor.pipeline.upstream import Photographs
    from auditor.ports import Arrays, Noise, Progress
    from auditor.recording import Recording, Source
    from auditor.replays.replay import Reference
    from auditor.stimulus import Stimulus
    from auditor.trace import SampleTrace, Tracer


# The engine option that quantises after training, on the backends that have it.
_QUANTIZE = "quantize"


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A backend as named in ``--backends``: ``ov`` or ``ov:GPU``."""

    id: str
    device: str | None = None

    @property
    def label(self) -> str:
        """The name under which the report speaks of it."""
        return f"{self.id}:{self.device}" if self.device else self.id


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What the user asked for.

    Attributes:
        requested: whether the backends were named; unnamed ones that are missing do not make
            the audit incomplete.
        candidate: another export that the backends compile while the model stays the reference.
        images, pipeline: folder of photographs, and what turns them into the input (a file or a
            preset); instead of ``data``.
        shapes: input shapes from ``--shape``.
        nonfinite: accept recorded inputs with NaN and infinities.
        timeout: seconds that one step of one backend may take.
        threads: threads of every engine and of the reference; None for the engines' defaults.
        options: engine options by backend id.
        output_kinds: as what outputs are read, by name; assumed for the others.
        tokens: what the classes of those that are read as text stand for.
        fail_on: lowest severity that fails the audit.
        confirm: whether to build what diverged again without single factors.
        calibration: what backends with the option ``quantize`` are calibrated on; the audit's own
            inputs when not given.
        artifacts: by a backend's label, the engine's own file that it audits.
        source: what the model was exported from, for the backends that run that;
        custom_ops: libraries of operators for ONNX Runtime, which is also the reference.
        trust_source: allows one whose loading can run code that is in a file.
        traces: what was recorded elsewhere: the name to report it under, and its file.
        trace_names: names in a dump of another runtime → ONNX tensor names, where they differ.
        cache: folder in which builds and traces are remembered; None to make everything anew.
        memory: bytes of weights that the reference holds; a model with more is run in pieces.
        latency: whether to time what is deployed beside ONNX Runtime's defaults.
        pictures: whether the report keeps small pictures of the tensors that diverge.
        limits: what each backend's process may use; as much memory as the machine has, and no
            network, when not given.
    """

    backends: tuple[BackendSpec, ...]
    requested: bool = True
    candidate: Path | None = None
    data: Path | None = None
    images: Path | None = None
    pipeline: str | None = None
    seed: int = 0
    samples: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nonfinite: bool = False
    timeout: float = 600.0
    threads: int | None = None
    options: dict[str, dict[str, str]] = field(default_factory=dict)
    fail_on: Severity = "medium"
    output_kinds: dict[str, OutputKind] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    confirm: bool = True
    calibration: Path | None = None
    artifacts: dict[str, Path] = field(default_factory=dict)
    source: str | None = None
    trust_source: bool = False
    custom_ops: tuple[Path, ...] = ()
    traces: tuple[tuple[str, Path], ...] = ()
    trace_names: dict[str, str] = field(default_factory=dict)
    cache: Path | None = None
    memory: int = 2 * GIB
    latency: bool = False
    pictures: bool = True
    limits: Limits | None = None


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


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is audited, and what it is compared with.

    Attributes:
        model: as written; ``compiled`` is what backends compile, another one with a candidate.
        rename: the compiled model's tensor names → the reference model's.
        stimulus: the inputs; ``samples`` has them under the compiled model's names.
        photographs: what the inputs are made of, where they are.
        reference: what backends are compared with; ``exported`` is for the training side.
        truth: the model that the reference runs: in float32 where it can be.
        training: labels of the backends that run what the model was exported from.
        quantised: labels of the backends that quantise.
    """

    model: Model
    compiled: Model
    rename: dict[str, str]
    stimulus: Stimulus
    samples: _Samples
    photographs: Photographs | None
    reference: Reference
    exported: Reference
    truth: Model
    training: Set[str]
    quantised: Set[str]


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

    # Imported here: the workers are starting meanwhile.
    from auditor import artefact, custom_ops
    from auditor import model as models
    from auditor.analysis import Analysis
    from auditor.replays import qdq

    custom_ops.use(options.custom_ops)
    model = models.load(model_path)
    compiled = models.load(options.candidate) if options.candidate else model
    rename = _correspondence(model, compiled)
    recordings = _recordings(options, compiled, progress)
    photographs = _photographs(model, options) if options.images else None
    stimulus = (
        photographs.stimulus if photographs else _stimulus(model, options, recordings, rename)
    )
    clock.lap("load")

    for tracer in tracers:
        tracer.sha256 = compiled.info.sha256
    samples = _Samples(stimulus, {ours: theirs for theirs, ours in rename.items()})
    calibration = _calibration(model, options, stimulus, samples, scratch)
    held: dict[str, Arrays] = {}
    grids: dict[str, Arrays] = {}
    jobs = {
        tracer.id: pool.submit(
            _begin,
            tracer,
            start,
            replace(
                request_for(spec, options, compiled, samples.feeds(0), tracer.worker.workdir),
                calibration=calibration if _quantises(spec, options) else None,
            ),
            samples,
            held,
            grids,
        )
        for tracer, spec, start in zip(tracers, options.backends, ready, strict=True)
    }
    jobs |= {r.id: pool.submit(samples.trace, r, 0) for r in recordings}
    progress.update("reference", "run")
    threads = options.threads or os.cpu_count() or 1
    reference, truth = reference_of(model, threads, scratch, options.memory)
    _check_outputs(options.output_kinds, reference.graph.outputs)
    sources: tuple[Source, ...] = (*tracers, *recordings)
    training = {spec.label for spec in options.backends if _trains(spec)}
    quantised = {spec.label for spec in options.backends if _quantises(spec, options)}
    exported = _exported(model, reference, truth) if training else reference
    subject = _Subject(
        model=model,
        compiled=compiled,
        rename=rename,
        stimulus=stimulus,
        samples=samples,
        photographs=photographs,
        reference=reference,
        exported=exported,
        truth=truth,
        training=training,
        quantised=quantised,
    )
    # Only PyTorch, before the export, can show what the export did.
    deployed = [noise for noise in noises if not noise.id.startswith("export.")]
    analyses = {
        s.id: Analysis(
            s,
            exported if s.id in training else reference,
            rename,
            noises if s.id in training else deployed,
            options.output_kinds,
            len(stimulus),
            tokens=options.tokens,
            pictured=options.pictures,
        )
        for s in sources
    }
    if compiled is not model:
        constants = artefact.changed(truth, compiled, rename)
        rounded = qdq.grids(compiled.proto.graph, compiled.weights, model.proto.graph)
        for analysis in analyses.values():
            analysis.hold(constants, rounded, other_file=True)

    def hold(who: str) -> None:
        if who in options.artifacts or who in quantised:
            there = artefact.held(truth, held[who], quantised=who in quantised)
            analyses[who].hold(there, grids[who])
        if who in training:
            analyses[who].hold_trained(artefact.trained(truth, held[who]))

    digest, agreements = _measure(subject, analyses, jobs, hold, pool, progress)
    clock.lap("measure")
    return _conclude(
        subject, options, noises, tracers, recordings, analyses, digest, agreements, clock
    )


def _measure(
    subject: _Subject,
    analyses: Mapping[str, Analysis],
    jobs: dict[str, Future[SampleTrace | None]],
    hold: Callable[[str], None],
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> tuple[str, Agreements]:
    """Compare sample by sample; a backend runs the next one while this one is analysed.

    Args:
        subject: what is audited.
        analyses: by backend; each sample is added.
        jobs: by backend, its first sample to come.
        hold: called with a backend's label once it has built, before its first sample is added.
        pool: where backends run.
        progress: told which backend is compared.

    Returns:
        The SHA-256 of the inputs, and how far outputs are from each other.
    """
    import numpy as np

    from auditor.agreement import Agreements

    reference, exported, stimulus = subject.reference, subject.exported, subject.stimulus
    photographs = subject.photographs
    agreements = Agreements()
    digest = hashlib.sha256()
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
        by_job = {job: who for who, job in jobs.items()}
        for job in as_completed(by_job):
            who = by_job[job]
            trace = job.result()
            if trace is None:
                del jobs[who]
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
        # In the order asked for, not in that of arrival: the report is the same every time.
        agreements.add({who: outputs[who] for who in ("reference", *analyses) if who in outputs})
    return digest.hexdigest(), agreements


def _conclude(
    subject: _Subject,
    options: AuditOptions,
    noises: Sequence[Noise],
    tracers: Sequence[Tracer],
    recordings: Sequence[Recording],
    analyses: Mapping[str, Analysis],
    digest: str,
    agreements: Agreements,
    clock: _Clock,
) -> AuditReport:
    """Rank what was measured, confirm it on the backends, and come to a verdict."""
    from auditor import confirm, latency, ranking, summary
    from auditor.processes import machine
    from auditor.training import origins, second_shape

    model, stimulus, samples = subject.model, subject.stimulus, subject.samples
    reference, photographs = subject.reference, subject.photographs
    devices = {spec.label: spec.device or "" for spec in options.backends}
    reports = tuple(summary.report(a, devices.get(who, "")) for who, a in analyses.items())
    measured = [origin for tracer in tracers for origin in tracer.origins]
    where = origins.merged(origins.of(model), measured)
    reports = origins.attached(reports, where)
    catalogue = {noise.id: noise for noise in noises}
    effects = {(who, s): e for who, a in analyses.items() for s, e in a.effects.items()}
    found = ranking.findings(reports, effects, catalogue)
    pairs = agreements.pairs()
    clock.lap("report")
    shapes: list[Gap] = []
    for tracer in (t for t in tracers if t.id in subject.training and t.gap is None):
        report = next(r for r in reports if r.id == tracer.id)
        more, gaps = second_shape.tried(
            tracer, report, subject.exported, subject.truth, stimulus.sample(0), where
        )
        found, shapes = ranking.with_more(found, more), shapes + gaps
        clock.lap("shapes")
    unconfirmed: tuple[Gap, ...] = ()
    if options.confirm:

        def cases() -> list[confirm.Case]:
            feeds = [samples.feeds(i) for i in range(min(len(stimulus), confirm.SAMPLES))]
            expected = [reference.run(stimulus.sample(i)) for i in range(len(feeds))]
            return [confirm.Case(f, e) for f, e in zip(feeds, expected, strict=True)]

        reports, found, unconfirmed = confirm.confirm(
            reports,
            found,
            {t.id: t for t in tracers},
            subject.rename,
            cases,
            own_file=subject.compiled is not model,
        )
        clock.lap("confirm")
    untimed: tuple[Gap, ...] = ()
    if options.latency:
        reports, untimed = latency.timed(reports, {t.id: t for t in tracers}, samples.feeds(0))
        clock.lap("latency")
    pipeline = photographs.report() if photographs else None
    if pipeline is not None:
        found = ranking.with_steps(found, pipeline, catalogue)
    requested = [t.id for t in tracers] if options.requested else []
    requested += [r.id for r in recordings]
    decision, exit_code = ranking.verdict(reports, found, requested, options.fail_on)
    return AuditReport(
        tool_version=__version__,
        model=replace(model.info, candidate=str(options.candidate) if options.candidate else None),
        stimulus=replace(
            stimulus.info,
            sha256=digest,
            notes=(*stimulus.info.notes, *_calibrated(options, subject.quantised, len(stimulus))),
        ),
        reference=reference.info,
        backends=reports,
        findings=found,
        agreement=pairs,
        outlier=ranking.outlier(pairs),
        gaps=(
            *(Gap("model", "outputs", f"{why}.") for why in model.unread),
            *(photographs.gaps if photographs else ()),
            *(gap for analysis in analyses.values() for gap in analysis.gaps()),
            *shapes,
            *unconfirmed,
            *untimed,
        ),
        verdict=decision,
        exit_code=exit_code,
        timing=clock.laps,
        fail_on=options.fail_on,
        requested=tuple(requested),
        noises=_named(reports, found, pipeline, catalogue),
        pipeline=pipeline,
        machine=machine.here(),
        threads=options.threads,
    )


def _tracer(spec: BackendSpec, worker: Worker, options: AuditOptions, progress: Progress) -> Tracer:
    """A backend's tracer, with a memory where there is a cache.

    The training side has none: what the user's code computes rests on more than its name. What is
    quantised rests on its calibration too.
    """
    from auditor.trace import Tracer

    if options.cache is None or _trains(spec) or _quantises(spec, options):
        return Tracer(spec.label, worker, options.timeout, progress)
    from auditor.processes.cache import Store
    from auditor.processes.remembered import Remembered

    return Remembered(spec.label, worker, options.timeout, progress, Store(options.cache))


def _quantises(spec: BackendSpec, options: AuditOptions) -> bool:
    return _QUANTIZE in options.options.get(spec.id, {})


def _calibration(
    model: Model, options: AuditOptions, stimulus: Stimulus, samples: _Samples, scratch: Path
) -> Path | None:
    """A folder with the calibration samples, one a file; None where nothing is quantised.

    Raises:
        UsageError: data that don't fit the model, or that nobody needs.
    """
    import numpy as np

    from auditor import stimulus as stimuli

    if not any(_quantises(spec, options) for spec in options.backends):
        if options.calibration:
            raise UsageError(
                "--calibration is there, but no backend quantises",
                "Add --option ort.quantize=int8 or --option ov.quantize=int8.",
            )
        return None
    if options.calibration:
        first = stimuli.load(model, options.calibration, 0, 1, options.shapes)
        stimulus = stimuli.load(model, options.calibration, 0, first.available, options.shapes)
        samples = samples.of(stimulus)
    folder = scratch / "calibration"
    folder.mkdir()
    for index in range(len(stimulus)):
        np.savez(folder / f"{index:06}.npz", *samples.feeds(index).values())
    return folder


def _calibrated(options: AuditOptions, quantised: Set[str], samples: int) -> tuple[str, ...]:
    """What quantised backends were calibrated on, as a sentence."""
    if not quantised:
        return ()
    on = f"all samples of {options.calibration}"
    if options.calibration is None:
        on = f"the {samples} audited samples themselves, which flatters them"
    return (f"quantised to 8 bits on {', '.join(sorted(quantised))}: calibrated on {on}",)


def _trains(spec: BackendSpec) -> bool:
    """Whether a backend runs what the model was exported from."""
    from auditor import discovery
    from auditor.ports import Training

    return isinstance(discovery.backend(spec.id), Training)


def record(model_path: Path, options: AuditOptions, path: Path, progress: Progress) -> Gap | None:
    """Write to ``path`` what the one backend of ``options`` computes; a gap when it fails.

    Raises:
        UsageError: the model, the data or an option is unusable.
        OSError: ``path`` cannot be written.
    """
    from auditor import model as models
    from auditor import recording
    from auditor.trace import Tracer

    (spec,) = options.backends
    with workers([spec.id], options.limits) as (worker,):
        tracer = Tracer(spec.label, worker, options.timeout, progress)
        model = models.load(model_path)
        stimulus = _stimulus(model, options, (), {})
        if tracer.start():
            tracer.build(request_for(spec, options, model, stimulus.sample(0), worker.workdir))
        if tracer.gap is None:
            recording.write(path, model, stimulus, tracer)
        return tracer.gap


def _recordings(
    options: AuditOptions, compiled: Model, progress: Progress
) -> tuple[Recording, ...]:
    if not options.traces:
        return ()
    from auditor import recording

    opened = tuple(
        recording.load(id, path, options.trace_names, progress) for id, path in options.traces
    )
    for one in opened:
        one.bind(compiled)
    return opened


def _photographs(model: Model, options: AuditOptions) -> Photographs:
    """The samples made of photographs, and both sides of what makes them."""
    from auditor.pipeline import description, photos, upstream

    assert options.images is not None and options.pipeline is not None
    described = description.load(options.pipeline)
    found = photos.find(options.images, None, options.samples or upstream.SAMPLES)
    return upstream.Photographs(model, described, found, options.output_kinds)


def model_of(report: AuditReport, options: AuditOptions) -> Model:
    """The model that a report is about; ``options`` are those of the report's audit.

    Raises:
        UsageError: it cannot be loaded, or is another one by now.
    """
    from auditor import custom_ops
    from auditor import model as models

    custom_ops.use(options.custom_ops)
    model = models.load(Path(report.model.path))
    if model.info.sha256 != report.model.sha256:
        raise UsageError(
            f"{report.model.path} has changed since the report was made", "Run the audit again."
        )
    return model


def request_for(
    spec: BackendSpec, options: AuditOptions, model: Model, feeds: Arrays, workdir: Path
) -> BuildRequest:
    """What an audit with these options asks of a backend; ``feeds`` give the shapes.

    Raises:
        UsageError: the backend runs what the model was exported from, and that is not given.
    """
    trains = _trains(spec)
    if trains and options.source is None:
        raise UsageError(
            f"the backend `{spec.id}` runs what the model was exported from",
            "Say what that is: --source package.module:factory.",
        )
    return BuildRequest(
        model_path=model.path,
        shapes={name: tuple(value.shape) for name, value in feeds.items()},
        dynamic=model.dynamic,
        device=spec.device,
        threads=options.threads,
        options=options.options.get(spec.id, {}),
        workdir=workdir,
        artifact=options.artifacts.get(spec.label),
        source=options.source if trains else None,
        trusted=options.trust_source,
        custom_ops=tuple(library.resolve() for library in options.custom_ops),
    )


def stimulus_of(model: Model, options: AuditOptions) -> Stimulus:
    """The samples of an audit without traces.

    Raises:
        UsageError: the data, the photographs or the shapes don't fit the model.
    """
    if options.images:
        return _photographs(model, options).stimulus
    return _stimulus(model, options, (), {})


def _stimulus(
    model: Model,
    options: AuditOptions,
    recordings: Sequence[Recording],
    rename: Mapping[str, str],
) -> Stimulus:
    """The samples: from ``--data``, else from the first recording that holds its inputs."""
    from auditor import stimulus as stimuli

    names = {ours: theirs for theirs, ours in rename.items()}
    for one in recordings if options.data is None else ():
        found = one.stimulus(
            model, options.samples, options.shapes, names, nonfinite=options.nonfinite
        )
        if found is not None:
            return found
    if recordings and options.data is None:
        raise UsageError(
            f"{recordings[0].path} does not hold the inputs that it was made with",
            "Give them with --data, or add them to the file under the input's names.",
        )
    return stimuli.load(
        model,
        options.data,
        options.seed,
        options.samples,
        options.shapes,
        nonfinite=options.nonfinite,
    )


def _named(
    reports: Sequence[BackendReport],
    found: Sequence[Finding],
    pipeline: PipelineReport | None,
    catalogue: Mapping[str, Noise],
) -> tuple[NoiseInfo, ...]:
    """What the catalogue says of the causes named, ordered by id."""
    ids = {s.noise for b in reports for s in b.segments if s.noise}
    ids |= {c.noise for b in reports for c in b.categories}
    ids |= {f.noise for f in found if f.noise}
    ids |= {step.noise for step in pipeline.steps} if pipeline else set()
    return tuple(
        NoiseInfo(n.id, n.stage, n.type, n.title, n.cause, n.source)
        for id, n in sorted(catalogue.items())
        if id in ids
    )


def reference_of(
    model: Model, threads: int, scratch: Path, memory: int = 2 * GIB
) -> tuple[Reference, Model]:
    """The reference, and the model that it runs: in float32 where that can be had.

    It holds ``memory`` bytes of weights at most.
    """
    from auditor.replays import blockwise, widening
    from auditor.replays.replay import Reference

    model = blockwise.exact(model)
    if widening.is_narrow(model):
        wide = widening.widened(model, scratch)
        with contextlib.suppress(UsageError):  # an operator that exists for narrow types only
            return Reference(wide, threads, widening.declared(model), memory), wide
    return Reference(model, threads, budget=memory), model


def _exported(model: Model, reference: Reference, wide: Model) -> Reference:
    """What the training side is compared with: results rounded to the types that the file gives.

    Runtimes may keep a narrow float wide, so their reference does; but that an export narrowed
    what was trained in float32 is the export's doing, and must show.
    """
    from auditor.replays import widening
    from auditor.replays.replay import Reference

    if not reference.narrow:
        return reference
    return Reference(widening.rounded(model, wide), reference.replayer.threads)


def _check_outputs(named: Iterable[str], outputs: Sequence[str]) -> None:
    for name in named:
        if name not in outputs:
            raise UsageError(
                f"--output-kind names `{name}`, which is no output of the model",
                f"Its outputs: {', '.join(outputs)}.",
            )


def _begin(
    tracer: Tracer,
    start: Future[bool],
    request: BuildRequest,
    samples: _Samples,
    held: dict[str, Arrays],
    grids: dict[str, Arrays],
) -> SampleTrace | None:
    """Build and run the first sample; None when the backend has a gap instead.

    ``held`` gets the constants of the artefact that was loaded, by the backend's id; ``grids`` what
    the activations of a quantised one are rounded to.
    """
    if not start.result():
        return None
    tracer.build(request)
    held[tracer.id] = tracer.constants()
    grids[tracer.id] = tracer.grids()
    if tracer.gap is not None:
        return None
    return samples.trace(tracer, 0)


def _correspondence(model: Model, compiled: Model) -> dict[str, str]:
    """The compiled model's tensor names → the reference model's.

    Raises:
        UsageError: the model's inputs cannot be fed to it.
    """
    from auditor.matching import match
    from auditor.segments import Graph

    ours = Graph(model.proto)
    found = match(ours, ours if compiled is model else Graph(compiled.proto))
    known = {spec.name: spec for spec in model.inputs}
    for theirs in compiled.inputs:
        spec = known.get(found.get(theirs.name, ""))
        if spec is None or not _fits(spec, theirs):
            raise UsageError(
                f"--candidate {compiled.path} takes {theirs}, which no input of {model.path} fits",
                f"Give another export of the same network. The model takes "
                f"{', '.join(map(str, model.inputs))}.",
            )
    return found


def _fits(ours: TensorSpec, theirs: TensorSpec) -> bool:
    """Whether what is fed to one input can have the other's shape."""
    return len(ours.shape) == len(theirs.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(ours.shape, theirs.shape, strict=True)
    )


class _Samples:
    """The stimulus under the compiled model's input names."""

    def __init__(self, stimulus: Stimulus, names: dict[str, str]) -> None:
        self._stimulus = stimulus
        self._names = names

    def of(self, stimulus: Stimulus) -> _Samples:
        """Other samples under these names."""
        return _Samples(stimulus, self._names)

    def feeds(self, index: int) -> Arrays:
        return {self._names.get(n, n): v for n, v in self._stimulus.sample(index).items()}

    def trace(self, tracer: Source, index: int) -> SampleTrace | None:
        from auditor.recording import Recording

        if isinstance(tracer, Recording):
            return tracer.sample(self.feeds(index), index, self._stimulus.available)
        return tracer.sample(self.feeds(index), last=index + 1 == len(self._stimulus))


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
