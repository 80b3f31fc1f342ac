"""The words of the domain as frozen records.

Records hold no arrays: a tensor appears by its ONNX name. An ONNX node is identified by its
*key*, the name of its first non-empty output, because node names may be empty or repeated
while tensor names are unique within a graph (ONNX IR specification, "Names Within a Graph").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Fidelity = Literal["output-proved", "cone-proved", "perturbing"]
Status = Literal["audited", "built", "gap"]
Severity = Literal["info", "low", "medium", "high", "critical"]
Confidence = Literal["low", "medium", "high"]
Verdict = Literal["pass", "fail", "incomplete"]
Stage = Literal["pre-processing", "inference", "post-processing"]
Conclusion = Literal["confirmed", "contradicted", "partial", "unchanged", "measured", "failed"]
OutputKind = Literal["scores", "boxes", "mask", "embedding", "none"]
Reading = OutputKind | Literal["text"]  # of a result, after the network

PIPELINE = "pipeline"  # stands for a backend's id where a step before the network is meant

SEVERITIES: tuple[Severity, ...] = ("info", "low", "medium", "high", "critical")

# Relative L2 of the final outputs. 1e-3 is the level at which the runtimes' own conformance suites
# start to fail a float32 model.
_SEVERITY_FROM: tuple[tuple[float, Severity], ...] = (
    (1e-1, "critical"),
    (1e-2, "high"),
    (1e-3, "medium"),
    (1e-4, "low"),
)


def severity(effect: float) -> Severity:
    """Severity of a relative L2 change of the final outputs."""
    return next((name for limit, name in _SEVERITY_FROM if effect >= limit), "info")


def severity_of_output(backend: BackendReport, output: OutputDistance) -> Severity:
    """How much a final output's divergence matters as a whole.

    Nothing where it is no more than rounding can do in the output's own segment: what a sigmoid
    makes of −14 has two digits in float32.
    """
    made_by = next((s for s in backend.segments if output.name in s.outputs), None)
    if made_by is not None and made_by.accumulated <= made_by.floor:
        return "info"
    return severity(output.distance.relative_l2)


# --- what is asked of a backend, and what it answers -------------------------------------


@dataclass(frozen=True, slots=True)
class Device:
    """One piece of hardware, or one way to use it, as ``audit backends`` lists it.

    Attributes:
        id: what follows the colon in ``--backends ov:GPU``; "" for the default device.
        name: its own full name.
        reason: why it cannot be used here; None where it can. ``remedy``: how to get it.
    """

    id: str
    name: str
    reason: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can be used here, or why not and how to get it.

    Attributes:
        unlimited: limits that could not be put on its process here, in words.
    """

    available: bool
    engine: str  # "OpenVINO"
    version: str | None = None
    devices: tuple[Device, ...] = ()
    reason: str | None = None
    remedy: str | None = None
    unlimited: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One compilation to make.

    Attributes:
        model_path: the ONNX file exactly as the user gave it (external data beside it).
        shapes: concrete shape of every graph input; differs from the model's own declaration
            only where that is symbolic.
        dynamic: whether any input of the model has a symbolic dimension.
        calibration: folder of ``.npz`` files to quantise by, one a sample, with an array for each
            of ``shapes``; None where nothing is to be quantised.
        open: whether symbolic dimensions stay open in the program, which then runs at any sizes;
            else it is made for ``shapes``.
        device: the engine's device id, or None for its default.
        threads: worker threads of the engine, or None for the engine's own default.
        options: engine options as given on the command line (``ov.KEY=VALUE`` → KEY: VALUE).
        workdir: private folder for temporary files of this build.
        artifact: the engine's own file to load instead of compiling ``model_path``, which then
            only says what its tensors are called.
        custom_ops: libraries of operators for ONNX Runtime.
        kept: keys of nodes; where there are any, ``artifact`` is first written from the model, with
            these in float32 whatever the rest is computed in.
        source: what ``model_path`` was exported from, as after ``--source``; only the training
            side is given it.
        trusted: whether the user allowed to load a source that can run code of its own.
    """

    model_path: Path
    shapes: dict[str, tuple[int, ...]]
    dynamic: bool
    device: str | None
    threads: int | None
    options: dict[str, str]
    workdir: Path
    artifact: Path | None = None
    source: str | None = None
    trusted: bool = False
    kept: tuple[str, ...] = ()
    custom_ops: tuple[Path, ...] = ()
    open: bool = False
    calibration: Path | None = None


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """One export to make of what a model is made from.

    Attributes:
        source: as after ``--source``; ``trusted``: whether it may run code of its own.
        exporter: one of the training side's exporters.
        opset: operator set of the file; the exporter's own choice when None.
        dynamic: open dimensions: by input, the symbol of an axis, whose number is a string.
        path: the file to write.
    """

    source: str
    trusted: bool
    exporter: str
    opset: int | None
    dynamic: dict[str, dict[str, str]]
    path: Path


@dataclass(frozen=True, slots=True)
class Kernel:
    """One executed primitive of a compiled program, as the engine itself states it.

    Attributes:
        name: the engine's own name for it.
        type: the engine's layer type (``Convolution``, ``FullyConnected`` …).
        nodes: keys of the ONNX nodes fused into it; empty when the engine does not say.
        outputs: ONNX names of the tensors it produces, where known.
        primitive: the implementation chosen (``brgconv_avx512_amx``); "" when not stated.
        precision: the precision it computes in (``f32``, ``bf16``, ``f16``, ``i8``, ``tf32``);
            "" when not stated.
        output_precision: the precision it writes; "" when not stated.
    """

    name: str
    type: str
    nodes: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    primitive: str = ""
    precision: str = ""
    output_precision: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in the training code an ONNX node comes from.

    Attributes:
        node: the node's key.
        module: path of the module (``layer3.2.conv2``); "" for the model itself or where unknown.
        place: file and line that called it (``resnet.py:104``), None where unknown.
    """

    node: str
    module: str
    place: str | None = None

    def __str__(self) -> str:
        """``layer3.2.conv2 (resnet.py:104)``; empty where neither is known."""
        if self.place is None:
            return self.module
        return f"{self.module} ({self.place})" if self.module else self.place


@dataclass(frozen=True, slots=True)
class Provenance:
    """What was built, by what, for what: enough to build it again.

    Attributes:
        notes: compile-time facts a deployment engineer must know (narrowed types, specialised
            shapes, folded graphs); each a full sentence.
    """

    engine: str
    version: str
    device: str
    options: dict[str, str] = field(default_factory=dict)
    kernels: tuple[Kernel, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Switch:
    """A factor of a build that its engine can leave out, for a counterfactual.

    Attributes:
        factor: what is left out, in words ("fusion of quantised operators").
        options: the engine options, as in ``--option``, that leave it out and nothing else.
        noises: ids of the causes that the factor can bring; empty when it may bring any.
        kernels: primitives (``Kernel.primitive``) that exist because of it; empty when it concerns
            the whole program.
    """

    factor: str
    options: dict[str, str]
    noises: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """A tensor observed in a build, by the ONNX name it was mapped to.

    Attributes:
        inferred: the name was not given by the engine but derived (fused node names, order);
            the auditor confirms such mappings by value and drops those that fail.
    """

    tensor: str
    fidelity: Fidelity = "output-proved"
    inferred: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor of the compiled program that is not observed, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Anything that was not audited, with the reason."""

    subject: str  # a backend id, a tensor, a segment, "stimulus" …
    stage: str
    reason: str
    remedy: str | None = None
    log: tuple[str, ...] = ()


# --- the model and what it is fed ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model file under audit."""

    path: str
    sha256: str
    opset: int
    nodes: int
    parameters: int  # number of scalar weights
    producer: str = ""
    candidate: str | None = None  # path of the file the backends compiled, when another


@dataclass(frozen=True, slots=True)
class StimulusInfo:
    """Where the inputs came from.

    Attributes:
        kind: ``recorded`` (given by the user) or ``synthetic`` (seeded random).
        shapes: the concrete shape of each input.
        notes: choices made for the user, as sentences (defaults for symbolic dimensions …).
        sha256: of all samples' bytes, in order.
    """

    kind: Literal["recorded", "synthetic"]
    samples: int
    seed: int | None
    source: str
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the audit ran.

    Attributes:
        flags: of the CPU, those by which runtimes choose kernels or a default precision.
        cores: logical ones.
    """

    cpu: str
    flags: tuple[str, ...]
    cores: int
    system: str
    python: str


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """What the backends are compared against."""

    engine: str
    version: str
    precision: str


# --- what was measured -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a tensor is from its reference, aggregated over samples.

    Attributes:
        relative_l2: ‖b − r‖ / ‖r‖; infinite where shapes or non-finite values disagree.
        max_abs: max |b − r|.
        sqnr_db: signal to quantisation noise, 20 log10(‖r‖/‖b − r‖); infinite when equal.
        cosine: cosine similarity.
        mismatch: None, or why the two cannot be compared value by value
            ("shape 1x64x10x10 instead of 1x64x9x9", "3 of 100 values are NaN on one side").
    """

    relative_l2: float
    max_abs: float
    sqnr_db: float
    cosine: float
    mismatch: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """One number over several samples; infinite where it was infinite on one of them.

    Attributes:
        samples: how many samples it rests on.
        deviation: population standard deviation.
        low_at, high_at: index of the first sample with the smallest and the largest value.
    """

    samples: int
    mean: float
    deviation: float
    low: float
    high: float
    low_at: int
    high_at: int


@dataclass(frozen=True, slots=True)
class Consequence:
    """What a change of one output does to what is read off it (``auditor.tasks``).

    Attributes:
        kind: as what the output is read.
        samples: how many samples it was measured on.
        items: rows of scores, boxes, pixels or vectors compared.
        changed: how many of them read differently: another arg max, no box left with an IoU of
            0.5, the other side of the mask's threshold; None for embeddings.
        first_changed: index of the first sample with such a change.
        margin, margin_after: mean lead of the reference's best class over its next, in the
            output's own unit, in the reference and after the change.
        kl: mean Kullback-Leibler divergence of the scores from the reference's, in nats.
        iou: intersection over union: of the whole mask, or the mean over boxes.
        cosine: mean cosine similarity of the vectors.
        added: boxes that only the other side has; None for other kinds.
        searched: vectors, at least three, each of which was searched for among the others; None for
            other kinds and fewer vectors.
        nearest_changed, ranks_changed: of how many of them the nearest other one, or any rank,
            changed (``auditor.sequences.retrieval``).
        lowest: the smallest IoU of a box or of one sample's mask, or cosine of a vector.
        sentence: the same in words.
    """

    output: str
    kind: OutputKind
    samples: int
    items: int
    changed: int | None
    first_changed: int | None
    margin: float | None = None
    margin_after: float | None = None
    kl: float | None = None
    iou: float | None = None
    cosine: float | None = None
    lowest: float | None = None
    sentence: str = ""
    added: int | None = None
    searched: int | None = None
    nearest_changed: int | None = None
    ranks_changed: int | None = None


@dataclass(frozen=True, slots=True)
class OutputDistance:
    """The final divergence of one model output.

    Attributes:
        top1_agreement: fraction of rows whose arg max agrees, None where the output is not read
            as scores.
        kind: as what the output is read; ``kind_stated`` whether the user said so.
        consequence: what the divergence does to that reading; None for kind ``none``.
        spread: relative L2 by sample; its ``high_at`` is the worst sample.
        nonfinite: samples with NaN or infinity on one side only, of which ``first_nonfinite`` is
            the first.
        one_step: fraction of an integer output's elements that are off by exactly one.
        max_ulp: representable numbers of the output's type between the two sides, at most; None
            for types that are not floating point.
    """

    name: str
    distance: Distance
    top1_agreement: float | None = None
    kind: OutputKind = "none"
    kind_stated: bool = False
    consequence: Consequence | None = None
    spread: Spread | None = None
    nonfinite: int = 0
    first_nonfinite: int | None = None
    one_step: float | None = None
    max_ulp: float | None = None


@dataclass(frozen=True, slots=True)
class FidelityProof:
    """The proof that observing did not change the program (promise 1).

    Attributes:
        outputs_bitwise_equal: the instrumented run's final outputs equalled the plain run's on
            every sample, bit for bit.
        program_unchanged: the instrumented program has the same kernels, precisions and fusion
            groups as the plain one.
        candidates: tensors that survive in the compiled program and can be compared.
        run_to_run: largest relative L2 between repeated plain runs on the same input.
        rebuild: the same between two builds; None where no second build was made.
        skipped: candidates that were not observed, each with its reason.
        cached: samples whose tensors and proof come from the cache.
    """

    outputs_bitwise_equal: bool
    program_unchanged: bool
    candidates: int
    output_proved: int
    cone_proved: int
    perturbing: int
    run_to_run: float
    rebuild: float | None = None
    skipped: tuple[Skipped, ...] = ()
    cached: int = 0


@dataclass(frozen=True, slots=True)
class TensorStats:
    """Value ranges and the error histogram of one boundary tensor.

    Attributes:
        histogram: counts of |b − r| / rms(r) on the first sample, in bins a factor of 8 wide;
            ``histogram_edges`` are their edges (log10), one more than counts; the first bin also
            holds everything smaller, the last everything larger.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Literal["input", "output"]
    reference_range: tuple[float, float]
    backend_range: tuple[float, float]
    distance: Distance
    histogram: tuple[int, ...] = ()
    histogram_edges: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """One plane of a segment's output on one sample, small (``auditor.pictures``).

    Levels are bytes, row by row; 0 stands for what is no finite number. Values run from
    ``range[0]`` (level 1) to ``range[1]`` (255), differences from -most (1) over none (128) to
    +most (255).

    Attributes:
        tensor: the output; ``plane``: its part that is shown, as an index (``[0, 37, :, :]``).
        size: rows and columns of that part; ``cells``: of the picture.
        reference, deployed: levels of the values: means over each cell.
        accumulated, introduced: levels of the differences, whose largest in each cell counts:
            from the reference, and from the reference segment on the backend's own inputs.
    """

    tensor: str
    sample: int
    plane: str
    size: tuple[int, int]
    cells: tuple[int, int]
    range: tuple[float, float]
    most_accumulated: float
    most_introduced: float
    reference: bytes
    deployed: bytes
    accumulated: bytes
    introduced: bytes


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one form of a cause does to the outputs when the whole model has it.

    Attributes:
        relative_l2: of all outputs together, a mean over samples; infinite where a shape changes
            or values become non-finite; None where it could not be run.
        outputs: the same by output, with what it does to its reading.
        failure: why it could not be run.
    """

    noise: str
    variant: str
    relative_l2: float | None
    outputs: tuple[OutputDistance, ...]
    failure: str | None


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What replaying one cause on one segment did.

    Attributes:
        noise: id of the noise.
        variant: which form of it ("inputs+weights bf16, f32 bias, output rounded").
        explained: 1 − ‖b − h_n‖² / ‖b − h‖²; 1 reproduces the error, ≤ 0 does not.
        bit_identical: fraction of elements of the replay with the backend's exact bits.
    """

    noise: str
    variant: str
    explained: float
    bit_identical: float


@dataclass(frozen=True, slots=True)
class Concentration:
    """Where in a tensor the error sits: the slice that holds most of ‖error‖²."""

    axis: int
    index: int
    axis_size: int
    share: float  # of ‖error‖²


@dataclass(frozen=True, slots=True)
class Segment:
    """The ONNX nodes between probes, and everything measured on them.

    Attributes:
        id: ``s`` and its position in topological order.
        nodes: labels a person recognises; ``node_keys`` the unique keys in the same order.
        accumulated, introduced, inherited: relative L2, see docs/method.md.
        amplification: accumulated error out / in; None when the inputs carry none.
        leave_one_in: ‖o(reference + only this segment's error) − y‖ / ‖y_backend − y‖; None
            where it was not measured because the introduced error is at its floor.
        impact_share: share of the final difference by telescoping (sums to 1 over segments of
            one backend); None where the segment was booked together with its neighbours.
        floor: introduced error below which nothing is blamed here.
        noise: id of the cause named, or None (unexplained, or nothing to explain).
        explained: share of the introduced error that replaying ``noise`` reproduces.
        residual: introduced error left after the named cause, relative L2.
        unmeasured: why introduced could not be measured, or None.
        leave_one_in_spread, impact_share_spread, explained_spread: the same by sample.
        explained_on: index of the sample on which the cause was looked for, the first one on
            which the introduced error was above its floor.
        contradicted: samples on which the cause found there does not fit.
        one_step: of integer outputs, the fraction of elements that this segment alone moved by
            exactly one; None where it has none.
        consequences: what its error alone does to what is read off the final outputs.
        constants: where the compiled file's constants differ from the model's here, as sentences.
        modules: where its nodes come from in the training code, as far as known.
        picture: of the output with the largest introduced error, for the segments of a backend
            that matter most.
    """

    id: str
    nodes: tuple[str, ...]
    node_keys: tuple[str, ...]
    op_types: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kernel: str
    precision: str
    fidelity: Fidelity
    accumulated: float
    introduced: float
    inherited: float
    amplification: float | None
    leave_one_in: float | None
    impact_share: float | None
    floor: float
    noise: str | None
    explained: float | None
    bit_identical: float
    residual: float
    hypotheses: tuple[Hypothesis, ...] = ()
    tensors: tuple[TensorStats, ...] = ()
    concentration: Concentration | None = None
    unmeasured: str | None = None
    leave_one_in_spread: Spread | None = None
    impact_share_spread: Spread | None = None
    explained_spread: Spread | None = None
    explained_on: int | None = None
    contradicted: int = 0
    one_step: float | None = None
    consequences: tuple[Consequence, ...] = ()
    constants: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    picture: Picture | None = None


@dataclass(frozen=True, slots=True)
class CategoryShare:
    """Share of a backend's final divergence that one noise accounts for, a mean over samples."""

    noise: str
    stage: Stage
    share: float
    spread: Spread | None = None


@dataclass(frozen=True, slots=True)
class OutputChange:
    """One output's relative L2 to the reference before and after; None where not comparable."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """What building the plain program again without one factor did (``auditor.confirm``).

    Errors are relative L2 of the final outputs to the reference, over ``samples`` samples and, of
    all outputs together, their root mean square. A number is None where it was not measured or
    where shapes or non-finite values disagree.

    Attributes:
        factor, options, noises: of the ``Switch``; ``noises`` are the causes that it speaks to.
        conclusion: ``confirmed``, ``contradicted`` or ``partial``: what it says of these causes;
            ``unchanged``: the outputs kept every bit; ``measured``: no cause that it speaks to
            claims a share large enough to test; ``failed``: see ``failure``.
        removed: 1 − (after / before)², the share of the squared divergence that went with the
            factor.
        claimed: share of the final divergence that these causes account for (``CategoryShare``,
            summed); None when the factor speaks to no cause in particular.
        latency_before, latency_after: median wall seconds of one run, both programs timed in turn.
        failure: why it could not be built or run.
        sentence: the same in words.
    """

    factor: str
    options: dict[str, str]
    noises: tuple[str, ...]
    conclusion: Conclusion
    samples: int = 0
    before: float | None = None
    after: float | None = None
    removed: float | None = None
    claimed: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    outputs: tuple[OutputChange, ...] = ()
    failure: str | None = None
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a run of the deployed program takes, beside ONNX Runtime (``auditor.latency``).

    Attributes:
        seconds: median wall seconds of one run; ``reference_seconds``: of ONNX Runtime on the CPU
            with its default options on the same file and inputs, in the same process.
    """

    seconds: float
    reference_seconds: float

    @property
    def ratio(self) -> float:
        """The one over the other; infinite where the clock saw nothing of the other."""
        return self.seconds / self.reference_seconds if self.reference_seconds > 0 else math.inf


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """The deployed system, pipeline and backend, against the training pipeline and the reference.

    Attributes:
        outputs: the final outputs' divergence between the two systems.
        shares: what each step around the network and each cause in it accounts for; with
            ``unexplained_share`` they sum to 1. Over ``samples`` samples, each weighted by its
            squared relative L2: where a threshold hides all of a sample there is nothing to share.
    """

    outputs: tuple[OutputDistance, ...]
    shares: tuple[CategoryShare, ...]
    unexplained_share: float
    samples: int


@dataclass(frozen=True, slots=True)
class BackendReport:
    """Everything known about one backend after the audit.

    Attributes:
        booked: label and share of each telescoping group, in order; shares sum to 1. Means over
            ``booked_samples`` samples; the categories' spreads say on how many those rest.
        additivity: Σ leave_one_in²; far from 1 means contributions do not add. None when not
            measured.
        warnings: sentences the reader must not miss.
        seconds: wall time per stage of this backend's worker.
    """

    id: str
    device: str
    status: Status
    gap: Gap | None
    provenance: Provenance | None = None
    fidelity: FidelityProof | None = None
    outputs: tuple[OutputDistance, ...] = ()
    categories: tuple[CategoryShare, ...] = ()
    unexplained_share: float = 0.0
    segments: tuple[Segment, ...] = ()
    booked: tuple[tuple[str, float], ...] = ()
    additivity: float | None = None
    input_control: float | None = None  # amplification of 0.1 % input noise by the reference
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    unexplained_spread: Spread | None = None
    booked_samples: int = 0
    counterfactuals: tuple[Counterfactual, ...] = ()
    latency: Latency | None = None  # where it was asked for
    end_to_end: EndToEnd | None = None  # where photographs were fed through a pipeline


@dataclass(frozen=True, slots=True)
class PipelineStep:
    """One step before or after the network that differs between training and deployment.

    Attributes:
        noise: id of the cause; ``name`` is the step's, as in a pipeline description.
        training, deployment: what each side does, in words.
        introduced: relative L2 of the network's input, or after it of the result, when this step
            alone is as deployed.
        bit_identical: fraction of its elements that this leaves as they were.
        effect: relative L2 of the reference's final outputs under the same change, of the result
            where a post-processing is described; None where it could not be measured on any
            photograph.
        leave_one_in: that effect relative to what all steps together do.
        share: of what all steps together do to the outputs, each switched in the order of
            execution; they sum to 1.
        consequences: what the step alone does to what is read off the outputs.
    """

    noise: str
    name: str
    training: str
    deployment: str
    introduced: float
    bit_identical: float
    effect: float | None
    leave_one_in: float | None
    share: float | None
    leave_one_in_spread: Spread | None = None
    consequences: tuple[Consequence, ...] = ()


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """What the deployment's pipeline changes before and after the network, on the reference.

    Attributes:
        source: where the description is from.
        photos: how many photographs were measured.
        training, deployment: every step of each side in words, by its key in a description.
        steps: those that differ, in the order of execution.
        outputs: the reference's outputs, or the result, in the deployment's pipeline against
            those in the training pipeline.
    """

    source: str
    photos: int
    training: dict[str, str]
    deployment: dict[str, str]
    steps: tuple[PipelineStep, ...]
    outputs: tuple[OutputDistance, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """A ranked offender.

    A step before the network is on the backend ``pipeline``, with the step's name for its segment
    and node.

    Attributes:
        segments: ids of the segments merged into it (they share nodes).
        nodes: labels, those a person looks for first before plumbing (casts, reshapes …).
        effect: relative L2 this segment's error alone causes in the final outputs.
        severity: from ``effect``. confidence: from the evidence. The two are independent.
        evidence: the experiments behind it, as sentences, strongest first.
        fingerprint: names it across runs (``auditor.fingerprint``).
        consequences: what its error alone does to what is read off the final outputs.
        modules: where its nodes come from in the training code, such as
            ``layer3.2.conv2 (resnet.py:104)``.
    """

    rank: int
    backend: str
    segment: str
    segments: tuple[str, ...]
    nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    kernel: str
    noise: str | None
    stage: Stage
    leave_one_in: float | None
    impact_share: float | None
    introduced: float
    effect: float | None
    explained: float | None
    bit_identical: float
    severity: Severity
    confidence: Confidence
    evidence: tuple[str, ...]
    remedy: str | None
    fingerprint: str = ""
    leave_one_in_spread: Spread | None = None
    explained_spread: Spread | None = None
    consequences: tuple[Consequence, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoiseInfo:
    """What the catalogue says of a cause that this report names."""

    id: str
    stage: Stage
    type: str  # SysNoise type (paper, Table 1)
    title: str
    cause: str
    source: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """Relative L2 between the final outputs of two participants (backends or ``reference``)."""

    a: str
    b: str
    relative_l2: float


@dataclass(frozen=True, slots=True)
class Waiver:
    """A finding that does not count, by its fingerprint, and why."""

    fingerprint: str
    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A rule that does not hold.

    Attributes:
        sentence: which one, and what was measured.
        backend: the backend it is about.
        output: the final output it is about, if any.
        fingerprint: the finding it is about, if any.
    """

    sentence: str
    backend: str
    output: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """By what the verdict was reached, where it is not ``--fail-on`` alone.

    Attributes:
        source: the policy file, or the report that is the baseline.
        broken: the rules that do not hold; empty when all do.
        waived: findings that do not count.
        notes: what else to know of it, as sentences.
    """

    source: str
    broken: tuple[Broken, ...] = ()
    waived: tuple[Waiver, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The whole result of one audit; every renderer starts from this.

    Attributes:
        outlier: the participant that stands apart from the others, or None.
        gaps: everything not audited, the backends' own gaps included.
        timing: wall seconds per stage of the audit.
        fail_on: lowest severity, of a finding or of an output's divergence, that fails the audit.
        machine: where the audit ran; ``threads`` of each engine, None for the engines' own default.
        command: the arguments of the audit, to run it again; empty where there was no command line.
        requested: ids of the backends that the user named: without one of them the audit is
            incomplete.
        noises: the causes that this report names.
    """

    tool_version: str
    model: ModelInfo
    stimulus: StimulusInfo
    reference: ReferenceInfo
    backends: tuple[BackendReport, ...]
    findings: tuple[Finding, ...]
    agreement: tuple[Agreement, ...]
    outlier: str | None
    gaps: tuple[Gap, ...]
    verdict: Verdict
    exit_code: int
    timing: dict[str, float]
    fail_on: Severity = "medium"
    requested: tuple[str, ...] = ()
    noises: tuple[NoiseInfo, ...] = ()
    judgement: Judgement | None = None
    pipeline: PipelineReport | None = None
    command: tuple[str, ...] = ()
    machine: Machine | None = None
    threads: int | None = None


# --- two reports side by side (``audit diff``) ----------------------------------------------------


Trend = Literal["new", "worse", "same", "better", "gone"]


@dataclass(frozen=True, slots=True)
class FindingChange:
    """A finding in two reports, matched by its fingerprint.

    Attributes:
        finding: as the newer report has it, or the older one where it is gone.
        before, after: its effect in each; None where that was not measured or it is not there.
    """

    trend: Trend
    finding: Finding
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class DivergenceChange:
    """A final output's relative L2 in two reports; None where a report lacks it."""

    trend: Trend
    backend: str
    output: str
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed from one report to another.

    Attributes:
        incomparable: why figures of the two cannot be held against each other, as sentences.
        provenance: what else differs: versions, devices, options, kernels; as sentences.
        gaps: what the older report compared and the newer one does not.
        regressions: what is new or worse; empty when nothing is.
    """

    old: str
    new: str
    incomparable: tuple[str, ...]
    provenance: tuple[str, ...]
    outputs: tuple[DivergenceChange, ...]
    findings: tuple[FindingChange, ...]
    gaps: tuple[Gap, ...]
    regressions: tuple[Broken, ...]


# --- the SysNoise table of one model (``audit sysnoise``) ---------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over photographs with its 95 % bootstrap interval; unit as that of its name."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SysnoiseEffect:
    """What a change of the system does to the model, over photographs.

    Attributes:
        drop: of the task's metric against the labels, as a fraction; None without labels.
        changed: how differently the output reads than after the training pipeline: the fraction of
            top-1 flips, of boxes lost or of texts that differ, 1 − IoU of the mask, 1 − cosine of
            the embedding; None where the output is read as nothing.
        relative_l2: of all outputs together; infinite where a shape or finiteness changed.
    """

    drop: Interval | None
    changed: Interval | None
    relative_l2: Interval


@dataclass(frozen=True, slots=True)
class SysnoiseOption:
    """One option of a type, switched alone.

    Attributes:
        name: as in a pipeline description, or the form of a cause.
        tool: the library that did it and its version, or ``simulated``.
        photos: on how many photographs it was measured.
        refused: how many it could not process.
        same: on how many all outputs, or the result where one is described, had the same bits.
    """

    name: str
    tool: str
    photos: int
    refused: int
    same: int
    effect: SysnoiseEffect


@dataclass(frozen=True, slots=True)
class SysnoiseType:
    """All options of one type of SysNoise (paper, Table 1).

    Attributes:
        id: ``preprocessing.resize``, or that of a cause.
        title: the word for it.
        mean, max: over the options.
        worst: the option with the largest effect.
    """

    id: str
    title: str
    options: tuple[SysnoiseOption, ...]
    mean: SysnoiseEffect
    max: SysnoiseEffect
    worst: str


@dataclass(frozen=True, slots=True)
class SysnoiseStep:
    """Several types at once, each with its worst option.

    Attributes:
        types: their ids, in the order of execution.
        options: what was switched, by type.
        effect: of all of them together.
        surplus: that minus the sum of what each does alone; None for the steps of an accumulation.
    """

    types: tuple[str, ...]
    options: tuple[str, ...]
    effect: SysnoiseEffect
    surplus: SysnoiseEffect | None = None


@dataclass(frozen=True, slots=True)
class SysnoiseFlip:
    """A photograph whose top-1, or whose text, an option changes.

    Attributes:
        option: type and name of the option.
        before, after: the class or the text after the training pipeline, and with the option.
        label: the true one, where known.
    """

    photo: str
    option: str
    before: int | str
    after: int | str
    label: int | str | None


@dataclass(frozen=True, slots=True)
class SysnoiseReport:
    """The paper's table for one model, on the ONNX Runtime reference.

    Attributes:
        pipeline: where the description is from; ``steps`` are its training side, in words.
        photos: how many were measured; ``labelled`` how many of them have a label.
        output: the output that is read, and ``kind`` as what.
        metric: what labels are judged by (``top-1``, ``mAP`` …), and ``accuracy`` its value after
            the training pipeline, as a fraction; None without labels.
        deployment: the deployment side as a whole, where it differs from the training side.
        types: the largest effect first.
        accumulation: types added one at a time in the order of execution (paper, Fig. 3); the
            last one is the combined noise.
        pairs: each two types together (paper, sec. 4.2: noises combine non-linearly).
        flips: all of them, by photograph.
        left_out: photographs that could not be used, each with the reason.
        oddities: what is unusual about photographs, and how many are so.
        gaps: what was not measured, and why.
        notes: what a reader must know, as sentences.
        network_runs: how often the network ran, by the forms in it ("" for none).
        seconds: wall time by stage; of all threads together where it says so.
    """

    tool_version: str
    model: str
    pipeline: str
    steps: dict[str, str]
    photos: int
    labelled: int
    output: str
    kind: Reading
    metric: str | None
    accuracy: Interval | None
    deployment: SysnoiseOption | None
    types: tuple[SysnoiseType, ...]
    accumulation: tuple[SysnoiseStep, ...]
    pairs: tuple[SysnoiseStep, ...]
    flips: tuple[SysnoiseFlip, ...]
    left_out: tuple[Gap, ...]
    oddities: dict[str, int]
    gaps: tuple[Gap, ...]
    notes: tuple[str, ...]
    network_runs: dict[str, int]
    seconds: dict[str, float]


# --- which pipeline made a tensor (``audit forensics``) -------------------------------------------


@dataclass(frozen=True, slots=True)
class ForensicsCandidate:
    """One combination of decoder, colour and resizer.

    Attributes:
        name: its steps in words.
        residual: root mean square distance from the tensor, in 8-bit pixel levels.
    """

    name: str
    residual: float


@dataclass(frozen=True, slots=True)
class ForensicsReport:
    """What made a tensor of a photograph, as far as can be told.

    Attributes:
        best: the combination closest to the tensor; ``residual`` is its distance in pixel levels.
        exact: whether it reproduces every pixel.
        indistinguishable: others that give the very same pixels of this photograph.
        runners_up: the closest of those that give other pixels.
        margin: how much farther the first of them is, in pixel levels; None without any.
        channels, layout: order and place of the channels in the tensor.
        normalisation: its name where it is a usual one; the tensor is
            ``slope · pixel + offset`` by channel.
        whole_levels: whether the tensor's pixels are whole numbers, as 8-bit pipelines make them.
        tried: combinations compared; ``skipped`` were farther than the second best by a bound.
        gaps: what could not be tried, and why.
    """

    best: str
    residual: float
    exact: bool
    indistinguishable: tuple[str, ...]
    runners_up: tuple[ForensicsCandidate, ...]
    margin: float | None
    channels: str
    layout: str
    normalisation: str | None
    slope: tuple[float, ...]
    offset: tuple[float, ...]
    whole_levels: bool
    tried: int
    skipped: int
    gaps: tuple[Gap, ...]


@dataclass(frozen=True, slots=True)
class ResultVariant:
    """One way from the network's outputs to a result.

    Attributes:
        name: its steps in words.
        residual: how far its result is from the recorded one; unit as of the report.
        mismatched: detections that only one of the two has; None where there are none to count.
    """

    name: str
    residual: float
    mismatched: int | None


@dataclass(frozen=True, slots=True)
class ResultForensics:
    """What made a recorded result of the network's outputs, as far as can be told.

    Attributes:
        kind: of the result.
        best: the closest way.
        unit: of residuals.
        exact: whether it reproduces the record.
        differs: by step in which it is not as described: what the description says, what it does.
        indistinguishable: others with the same result.
        runners_up: the closest of the others.
        threshold, overlap: lowest and highest value of the score threshold and of the limit of
            suppression that reproduce the record, as far as they were tried; None where they do
            not matter.
        tried: ways compared; ``skipped`` were ruled out by an earlier step.
        gaps: what could not be tried, and why.
    """

    kind: str
    best: ResultVariant
    unit: str
    exact: bool
    differs: dict[str, tuple[str, str]]
    indistinguishable: tuple[str, ...]
    runners_up: tuple[ResultVariant, ...]
    threshold: tuple[float, float] | None
    overlap: tuple[float, float] | None
    tried: int
    skipped: int
    gaps: tuple[Gap, ...]


# --- a change that brings a backend within its limit (``audit fix``) ------------------------------


@dataclass(frozen=True, slots=True)
class FixAttempt:
    """A change that was built and run.

    Attributes:
        name: what is changed, in words.
        findings: ranks of the findings that it is meant for.
        options: engine options, as after ``--option ID.``.
        nodes: labels of the nodes that are written otherwise.
        rewritten: whether the model's file is another one.
        kept: how many layers of the program stay in float32, in a file of the engine's own; None
            for other changes.
        after: largest relative L2 of any output on any sample; None when it failed.
        latency_before, latency_after: median seconds of one run, both programs timed in turn.
        failure: why it could not be built or run.
    """

    name: str
    findings: tuple[int, ...]
    options: dict[str, str]
    nodes: tuple[str, ...]
    rewritten: bool
    after: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    failure: str | None = None
    kept: int | None = None


@dataclass(frozen=True, slots=True)
class FixReport:
    """The result of a search.

    Attributes:
        backend: the one to fix; ``before`` its divergence, ``limit`` what was asked for.
        attempts: everything that was built, in order.
        chosen: position of what to do among them; None where nothing is within the limit.
        best: position of the one closest to the reference; None where none is closer.
        notes: what was not tried, and why.
    """

    backend: str
    before: float
    limit: float
    attempts: tuple[FixAttempt, ...]
    chosen: int | None
    best: int | None
    notes: tuple[str, ...]


# --- which export is the most faithful (``audit export``) -----------------------------------------


@dataclass(frozen=True, slots=True)
class ExportTrial:
    """One exporter at one operator set.

    Attributes:
        exporter: its name; ``opset``: what was asked of it, None for its own choice.
        written: operator set of the file; ``nodes``: how many it has.
        distances: relative L2 of the worst output to PyTorch's, by backend; ``reference`` is the
            file itself without any runtime's optimisation.
        findings: how many there are on the training side, the export's own mistakes.
        causes: ids of the causes named among these.
        gaps: why a backend gave no comparison, by backend.
        failure: why there is no usable file; the other fields are empty then.
        seconds: wall time of the export, and of the audit.
    """

    exporter: str
    opset: int | None
    written: int | None = None
    nodes: int = 0
    distances: dict[str, float] = field(default_factory=dict)
    findings: int = 0
    causes: tuple[str, ...] = ()
    gaps: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """``dynamo@18``."""
        return self.exporter if self.opset is None else f"{self.exporter}@{self.opset}"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Which export keeps a module most faithful.

    Attributes:
        source: what was exported; ``backends``: the runtimes to be faithful on.
        trials: in the order they were made.
        chosen: position of the most faithful; None where no export is usable.
        because: why that one, in a sentence.
        samples: how many the figures rest on.
    """

    source: str
    backends: tuple[str, ...]
    trials: tuple[ExportTrial, ...]
    chosen: int | None
    because: str
    samples: int


# --- the greedy text of a decoder (``audit generate``) --------------------------------------------


@dataclass(frozen=True, slots=True)
class GenerationStep:
    """One token of the reference's greedy text, and what a backend makes of the same beginning.

    Attributes:
        number: from 0; ``token``: the reference's; ``other``: the backend's most likely one.
        margin: lead of the token over the next in the reference's logits; ``margin_after`` over all
            others in the backend's, negative where that decides otherwise.
        kl: Kullback-Leibler divergence from the reference's distribution, in nats.
        relative_l2: of the logits of this step.
        caches: relative L2 of the caches that the step leaves; None where the model keeps none.
    """

    number: int
    token: int
    other: int
    margin: float
    margin_after: float
    kl: float
    relative_l2: float = 0.0
    caches: float | None = None

    @property
    def same(self) -> bool:
        """Whether the backend decides alike."""
        return self.token == self.other


@dataclass(frozen=True, slots=True)
class LayerEffect:
    """What the own error of a layer, alone, does to the decisions that a backend turned.

    Attributes:
        layer: its module, or the beginning of its nodes' names.
        segments: how many segments it has.
        change: of the margin between both tokens at the first turned step, in the logits' unit.
        harm: the largest part of a turned step's margin that it takes; negative where it adds.
    """

    layer: str
    segments: int
    change: float
    harm: float


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """The layers to compute in full precision so that no decision turns.

    Attributes:
        layers: chosen on the reference with all other layers' errors, or by building where there
            are caches; ``among`` how many there are.
        options: what the kept layers were built with; ``pieces``: in how many pieces.
        turned: decisions that the model so built still turns; None where it was not built.
        kl: largest divergence of a step of it, in nats.
        failure: why it was not built.
    """

    layers: tuple[str, ...]
    among: int
    options: dict[str, str] = field(default_factory=dict)
    pieces: int = 0
    turned: int | None = None
    kl: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Carried:
    """What a step's difference owes to the caches written before it, and what to the step itself.

    The reference runs the step on the backend's caches: what differs from its own run came with
    them, what then remains is the step's own. Both parts add up to the whole.

    Attributes:
        number: of the step; ``other``: the backend's token, or the reference's second where that
            decides alike.
        lead: of the reference's token over ``other`` in the reference's logits.
        by_caches, by_step: what either part changes it by.
        inherited, introduced: relative L2 of either part of the logits.
        categories, unexplained_share: what causes the error of the caches that the prompt leaves.
    """

    number: int
    other: int
    lead: float
    by_caches: float
    by_step: float
    inherited: float
    introduced: float
    categories: tuple[CategoryShare, ...] = ()
    unexplained_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """One backend's part.

    Attributes:
        text: what it writes by itself, as long as the reference's.
        steps: the reference's text, step by step.
        first: number of the first diverging token; None where there is none.
        relative_l2: of the logits of the whole text.
        categories, unexplained_share: what causes the logits' divergence, as in an audit.
        effects: layers, the most harmful first; empty where nothing turned.
        carried: where one step's difference came from; None where the model keeps no caches. The
            causes are then those of that step, and layers are also caches by themselves.
        gap: what could not be done.
    """

    id: str
    text: tuple[int, ...] = ()
    steps: tuple[GenerationStep, ...] = ()
    first: int | None = None
    relative_l2: float | None = None
    categories: tuple[CategoryShare, ...] = ()
    unexplained_share: float = 0.0
    fidelity: FidelityProof | None = None
    provenance: Provenance | None = None
    effects: tuple[LayerEffect, ...] = ()
    kept: KeptLayers | None = None
    carried: Carried | None = None
    gap: Gap | None = None


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """Greedy texts of one decoder.

    Attributes:
        prompt, text: token ids; the text is the reference's.
        length: tokens that each run takes, padding included; with caches, all there are in the end.
        caches: how many caches the model keeps.
    """

    model: ModelInfo
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    length: int
    backends: tuple[Generation, ...]
    caches: int = 0


# --- models that keep a state between runs (``audit stream``) ------------------------------------


@dataclass(frozen=True, slots=True)
class StreamStep:
    """One step of a stream, each side with the states of its own.

    Attributes:
        number: from 0.
        decision, other: what the reference and the backend decide, as numbers (a class per row, or
            1 and 0 for yes and no); empty where the output is none to decide by.
        margin, margin_after: how far the reference is from deciding otherwise, and the backend, in
            the output's unit; negative where it decides otherwise. None where nothing is decided.
        relative_l2, states: of the output, and of the states that the step leaves.
        inherited, introduced: parts of the output's error, relative to its norm: what the reference
            makes of the backend's states, and what the backend adds to that.
    """

    number: int
    decision: tuple[int, ...]
    other: tuple[int, ...]
    margin: float | None
    margin_after: float | None
    relative_l2: float
    states: float
    inherited: float
    introduced: float

    @property
    def same(self) -> bool:
        """Whether the backend decides alike."""
        return self.decision == self.other


@dataclass(frozen=True, slots=True)
class Streamed:
    """One backend's part.

    Attributes:
        steps: all of them.
        looked: number of the step whose causes follow: the first with another decision, else the
            one with the largest error of the output.
        categories, unexplained_share: what makes the error of output and states in that step.
        gap: what could not be done.
    """

    id: str
    steps: tuple[StreamStep, ...] = ()
    looked: int = 0
    categories: tuple[CategoryShare, ...] = ()
    unexplained_share: float = 0.0
    fidelity: FidelityProof | None = None
    provenance: Provenance | None = None
    gap: Gap | None = None


@dataclass(frozen=True, slots=True)
class StreamReport:
    """A stream through one model.

    Attributes:
        states: outputs by the inputs that they are fed back to.
        output: what is compared and decided by.
        source: what was fed, as a sentence.
    """

    model: ModelInfo
    states: tuple[tuple[str, str], ...]
    output: str
    source: str
    backends: tuple[Streamed, ...]


# --- many models on many machines (``audit fleet``) ----------------------------------------------


@dataclass(frozen=True, slots=True)
class FleetNode:
    """A machine that audits ran on, or could have.

    Attributes:
        resources: what it declares that it has, by name: ``CPU``, ``backend_ov``, ``device_gpu`` …
        alive: whether it was still there at the end.
    """

    name: str
    resources: dict[str, float]
    alive: bool = True


@dataclass(frozen=True, slots=True)
class FleetAttempt:
    """One try at a cell.

    Attributes:
        node: where it ran; empty where that is not known.
        seconds: wall time from its start to its end, or to its loss.
        lost: why nothing came of it; None where the audit came to an end.
    """

    node: str
    seconds: float
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class FleetCell:
    """One model on one backend, as the work list asks for it.

    Attributes:
        model, column: its row and its column in the matrix.
        backend: with its device, such as ``ov:GPU``; ``options`` are the engine's.
        exit_code: of its audit; None where there was none.
        verdict: of its report; None where there is none.
        report: file of its report, relative to the fleet's own; None where there is none.
        sha256: of the model that was audited.
        relative_l2: of the output that diverges most; None where nothing was compared.
        mismatch: why that output cannot be compared value by value; its ``relative_l2`` is then
            infinite.
        findings: how many of each severity.
        noise: the cause with the largest share of the divergence, which is ``share``.
        offender: the first node of the first finding.
        gaps: how many gaps its report names.
        gap: why there is no report, or no comparison in it.
    """

    model: str
    column: str
    backend: str
    options: dict[str, str]
    exit_code: int | None = None
    verdict: Verdict | None = None
    report: str | None = None
    sha256: str | None = None
    relative_l2: float | None = None
    mismatch: str | None = None
    findings: dict[str, int] = field(default_factory=dict)
    noise: str | None = None
    share: float | None = None
    offender: str | None = None
    gaps: int = 0
    gap: Gap | None = None
    attempts: tuple[FleetAttempt, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetReport:
    """Every cell of a work list, once each, in the order of the list.

    Attributes:
        source: the work list.
        cluster: address of the cluster; None for this machine alone.
        seconds: wall time of the whole.
    """

    tool_version: str
    source: str
    cluster: str | None
    nodes: tuple[FleetNode, ...]
    cells: tuple[FleetCell, ...]
    verdict: Verdict
    exit_code: int
    seconds: float
