"""What is audited, and what it is compared with, from what the user asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from auditor.errors import UsageError
from auditor.processes.limits import GIB
from auditor.records.backend import BuildRequest

if TYPE_CHECKING:
    from auditor.capture.recording import Recording, Source
    from auditor.capture.trace import SampleTrace, Tracer
    from auditor.graphs.model import Model, TensorSpec
    from auditor.options import AuditOptions, BackendSpec
    from auditor.pipeline.upstream import Photographs
    from auditor.ports import Arrays, Progress
    from auditor.records.report import AuditReport
    from auditor.replays.reference import Reference
    from auditor.stimulus import Stimulus


# The engine option that quantises after training, on the backends that have it.
_QUANTIZE = "quantize"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is audited: models and inputs.

    Attributes:
        model: as written; ``compiled`` is what backends compile, another one with a candidate.
        rename: the compiled model's tensor names → the reference model's.
        recordings: what was recorded elsewhere.
        photographs: what the inputs are made of, where they are.
        stimulus: the inputs; ``samples`` has them under the compiled model's names.
        training: labels of the backends that run what the model was exported from.
        quantised: labels of the backends that quantise.
    """

    model: Model
    compiled: Model
    rename: dict[str, str]
    recordings: tuple[Recording, ...]
    photographs: Photographs | None
    stimulus: Stimulus
    samples: Samples
    training: Set[str]
    quantised: Set[str]


@dataclass(frozen=True, slots=True)
class References:
    """What backends are compared with.

    Attributes:
        reference: for every backend but the training side, which ``exported`` is for.
        truth: the model that the reference runs: in float32 where it can be.
    """

    reference: Reference
    exported: Reference
    truth: Model


def load(model_path: Path, options: AuditOptions, progress: Progress) -> Subject:
    """Read the models and the inputs.

    Raises:
        UsageError: the model, the data or an option is unusable.
    """
    from auditor.graphs import custom_ops
    from auditor.graphs import model as models

    custom_ops.use(options.custom_ops)
    model = models.load(model_path)
    compiled = models.load(options.candidate) if options.candidate else model
    rename = _correspondence(model, compiled)
    recordings = _recordings(options, compiled, progress)
    photographs = _photographs(model, options) if options.images else None
    stimulus = (
        photographs.stimulus if photographs else _stimulus(model, options, recordings, rename)
    )
    return Subject(
        model=model,
        compiled=compiled,
        rename=rename,
        recordings=recordings,
        photographs=photographs,
        stimulus=stimulus,
        samples=Samples(stimulus, {rename[spec.name]: spec for spec in compiled.inputs}),
        training={spec.label for spec in options.backends if trains(spec)},
        quantised={spec.label for spec in options.backends if quantises(spec, options)},
    )


def references(subject: Subject, options: AuditOptions, scratch: Path) -> References:
    """Build what the backends are compared with; ``scratch``: a folder for what it writes.

    Raises:
        UsageError: the model cannot be run, or an option names an output that it does not have.
    """
    from auditor.replays import widening
    from auditor.replays.reference import Reference

    threads = options.threads or os.cpu_count() or 1
    reference, truth = reference_of(subject.model, threads, scratch, options.memory)
    for name in options.output_kinds:
        if name not in reference.graph.outputs:
            raise UsageError(
                f"--output-kind names `{name}`, which is no output of the model",
                f"Its outputs: {', '.join(reference.graph.outputs)}.",
            )
    exported = reference
    if subject.training and reference.narrow:
        # Runtimes may keep a narrow float wide, so their reference does; but that an export
        # narrowed what was trained in float32 is the export's doing, and must show.
        rounded = widening.rounded(subject.model, truth)
        exported = Reference(rounded, threads)
    return References(reference, exported, truth)


class Samples:
    """The stimulus under the compiled model's input names, in its types."""

    def __init__(self, stimulus: Stimulus, inputs: dict[str, TensorSpec]) -> None:
        self._stimulus = stimulus
        self._inputs = inputs

    def of(self, stimulus: Stimulus) -> Samples:
        """Other samples under these names."""
        return Samples(stimulus, self._inputs)

    def feeds(self, index: int) -> Arrays:
        """One sample, as the compiled model takes it; what it does not take is left out."""
        sample = self._stimulus.sample(index)
        return {
            spec.name: sample[name].astype(spec.dtype, copy=False)
            for name, spec in self._inputs.items()
        }

    def trace(self, tracer: Source, index: int) -> SampleTrace | None:
        """What a backend did with one sample; None where it has a gap."""
        from auditor.capture.recording import Recording

        if isinstance(tracer, Recording):
            return tracer.sample(self.feeds(index), index, self._stimulus.available)
        return tracer.sample(self.feeds(index), last=index + 1 == len(self._stimulus))


def model_of(report: AuditReport, options: AuditOptions) -> Model:
    """The model that a report is about; ``options`` are those of the report's audit.

    Raises:
        UsageError: it cannot be loaded, or is another one by now.
    """
    from auditor.graphs import custom_ops
    from auditor.graphs import model as models

    custom_ops.use(options.custom_ops)
    model = models.load(Path(report.model.path))
    if model.info.sha256 != report.model.sha256:
        raise UsageError(
            f"{report.model.path} has changed since the report was made", "Run the audit again."
        )
    return model


def _correspondence(model: Model, compiled: Model) -> dict[str, str]:
    """The compiled model's tensor names → the reference model's.

    Raises:
        UsageError: the model's inputs cannot be fed to it.
    """
    from auditor.capture.matching import match
    from auditor.graphs.segments import Graph

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
    """Whether what is fed to one input can be handed to the other.

    Converters to half precision narrow inputs as well, and some exporters narrow integers.
    """
    import numpy as np

    if not np.can_cast(ours.dtype, theirs.dtype, "same_kind"):
        return False
    return len(ours.shape) == len(theirs.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(ours.shape, theirs.shape, strict=True)
    )


# --- inputs ---------------------------------------------------------------------------------------


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


def _photographs(model: Model, options: AuditOptions) -> Photographs:
    """The samples made of photographs, and both sides of what makes them."""
    from auditor.pipeline import description, photos, upstream

    assert options.images is not None and options.pipeline is not None
    described = description.load(options.pipeline)
    found = photos.find(options.images, None, options.samples or upstream.SAMPLES)
    return upstream.Photographs(model, described, found, options.output_kinds)


def _recordings(
    options: AuditOptions, compiled: Model, progress: Progress
) -> tuple[Recording, ...]:
    if not options.traces:
        return ()
    from auditor.capture import recording

    opened = tuple(
        recording.load(id, path, options.trace_names, progress) for id, path in options.traces
    )
    for one in opened:
        one.bind(compiled)
    return opened


def calibration(subject: Subject, options: AuditOptions, scratch: Path) -> Path | None:
    """A folder with the calibration samples, one a file; None where nothing is quantised.

    Raises:
        UsageError: data that don't fit the model, or that nobody needs.
    """
    import numpy as np

    from auditor import stimulus as stimuli

    if not subject.quantised:
        if options.calibration:
            raise UsageError(
                "--calibration is there, but no backend quantises",
                "Add --option ort.quantize=int8 or --option ov.quantize=int8.",
            )
        return None
    stimulus, samples = subject.stimulus, subject.samples
    if options.calibration:
        model, path, shapes = subject.model, options.calibration, options.shapes
        first = stimuli.load(model, path, 0, 1, shapes)
        stimulus = stimuli.load(model, path, 0, first.available, shapes)
        samples = samples.of(stimulus)
    folder = scratch / "calibration"
    folder.mkdir()
    for index in range(len(stimulus)):
        np.savez(folder / f"{index:06}.npz", *samples.feeds(index).values())
    return folder


def handed(subject: Subject, options: AuditOptions) -> tuple[str, ...]:
    """What becomes of the stimulus, as sentences: its types, and what takes statistics of it."""
    from auditor.noises import export_training_mode

    types = {spec.name: spec.dtype for spec in subject.model.inputs}
    said = tuple(
        f"`{spec.name}` is handed over as {spec.dtype.name}, as the candidate takes it"
        for spec in subject.compiled.inputs
        if spec.dtype != types[subject.rename[spec.name]]
    )
    if training := export_training_mode.in_training(subject.compiled.proto):
        said += (
            f"{subject.compiled.path} is in training mode in {len(training)} nodes, the first of "
            f"which makes `{training[0].output[0]}`: its answers depend on the batch at hand or on "
            "chance. Call eval() and export again",
        )
    if not subject.quantised:
        return said
    on = f"all samples of {options.calibration}"
    if options.calibration is None:
        on = f"the {len(subject.stimulus)} audited samples themselves, which flatters them"
    who = ", ".join(sorted(subject.quantised))
    return (*said, f"quantised to 8 bits on {who}: calibrated on {on}")


# --- reference ------------------------------------------------------------------------------------


def reference_of(
    model: Model, threads: int, scratch: Path, memory: int = 2 * GIB
) -> tuple[Reference, Model]:
    """The reference, and the model that it runs: in float32 where that can be had.

    It holds ``memory`` bytes of weights at most.
    """
    from auditor.replays import blockwise, widening
    from auditor.replays.reference import Reference

    model = blockwise.exact(model)
    if widening.is_narrow(model):
        wide = widening.widened(model, scratch)
        with contextlib.suppress(UsageError):  # an operator that exists for narrow types only
            return Reference(wide, threads, widening.declared(model), memory), wide
    return Reference(model, threads, budget=memory), model


# --- backends -------------------------------------------------------------------------------------


def quantises(spec: BackendSpec, options: AuditOptions) -> bool:
    """Whether a backend quantises the model as it compiles it."""
    return _QUANTIZE in options.options.get(spec.id, {})


def trains(spec: BackendSpec) -> bool:
    """Whether a backend runs what the model was exported from."""
    from auditor import discovery
    from auditor.ports import Training

    return isinstance(discovery.backend(spec.id), Training)


def request_for(
    spec: BackendSpec, options: AuditOptions, model: Model, feeds: Arrays, workdir: Path
) -> BuildRequest:
    """What an audit with these options asks of a backend; ``feeds`` give the shapes.

    Raises:
        UsageError: the backend runs what the model was exported from, and that is not given.
    """
    training = trains(spec)
    if training and options.source is None:
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
        source=options.source if training else None,
        trusted=options.trust_source,
        custom_ops=tuple(library.resolve() for library in options.custom_ops),
    )


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
    """A model built by one backend in a process of its own; the tracer says so where it has a gap.

    Args:
        spec: the backend.
        options: of an audit.
        model: what to build.
        feeds: inputs by name.
        progress: told what is being done.
        open: whether the program shall run at other shapes too.

    Raises:
        UsageError: as ``request_for``, or the engine has no such option or device.
    """
    from auditor.capture.trace import Tracer
    from auditor.processes.worker import workers

    with workers([spec.id], options.limits) as (worker,):
        tracer = Tracer(spec.label, worker, options.timeout, progress)
        if tracer.start():
            request = request_for(spec, options, model, feeds, worker.workdir)
            tracer.build(replace(request, open=open))
        yield tracer
