"""What was measured: distances, proofs, segments, hypotheses and counterfactuals."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from auditor.records.backend import Skipped
from auditor.records.terms import Conclusion, Fidelity, OutputKind, Stage


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
    """What a change of one output does to what is read off it (``auditor.comparison.tasks``).

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
            changed (``auditor.comparison.retrieval``).
        texts, texts_changed: how many texts there are, and how many of them are read differently;
            None, as all the following, for other kinds.
        edits, characters: insertions, deletions and replacements that turn these into the
            reference's, and how many characters (classes that are not blank) all of those have.
        blank: the class that was taken for no character.
        example: the reference's first text that changes, and what it becomes.
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
    texts: int | None = None
    texts_changed: int | None = None
    edits: int | None = None
    characters: int | None = None
    blank: int | None = None
    example: tuple[str, str] | None = None


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
    """One plane of a segment's output on one sample, small (``auditor.comparison.pictures``).

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

    @property
    def beside(self) -> tuple[str, ...]:
        """Ids of the causes that it has beside ``noise``, in the form's words: ``…, and ID: …``."""
        return tuple(re.findall(r", and ([\w.]+):", self.variant))

    @property
    def form(self) -> str:
        """The form of ``noise`` alone."""
        return re.split(r", and [\w.]+:", self.variant)[0]


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
    """What building the plain program again without one factor did (``auditor.verdict.confirm``).

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
    """How long the deployed program takes, beside ONNX Runtime (``auditor.verdict.latency``).

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
