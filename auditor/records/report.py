"""The report of one audit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from auditor.records.backend import Gap, Kernel, Provenance
from auditor.records.measured import (
    CategoryShare,
    Consequence,
    Counterfactual,
    EndToEnd,
    FidelityProof,
    Latency,
    OutputDistance,
    Segment,
    Spread,
)
from auditor.records.model import Machine, ModelInfo, ReferenceInfo, StimulusInfo
from auditor.records.terms import Confidence, Severity, Stage, Status, Verdict, severity


@dataclass(frozen=True, slots=True)
class BackendReport:
    """Everything known about one backend after the audit.

    Attributes:
        gap: why it was not compared; of an audited one, why at its outputs only.
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

    @property
    def complete(self) -> bool:
        """Whether it was compared, at its outputs and between its layers."""
        return self.status == "audited" and self.gap is None

    def kernels_of(self, nodes: Iterable[str]) -> tuple[Kernel, ...]:
        """What the engine says it ran for some nodes, by their keys, in execution order."""
        keys = set(nodes)
        kernels = self.provenance.kernels if self.provenance else ()
        return tuple(kernel for kernel in kernels if keys.intersection(kernel.nodes))


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
        fingerprint: names it across runs (``auditor.verdict.fingerprint``).
        consequences: what its error alone does to what is read off the final outputs.
        modules: where its nodes come from in the training code, such as
            ``layer3.2.conv2 (resnet.py:104)``.
        beside: ids of the causes that the form found has beside ``noise``.
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
    beside: tuple[str, ...] = ()


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
    """What the verdict rests on, where it is not ``--fail-on`` alone.

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


def severity_of_output(backend: BackendReport, output: OutputDistance) -> Severity:
    """How much a final output's divergence matters as a whole.

    Nothing where it is no more than rounding can do in the output's own segment: what a sigmoid
    makes of −14 has two digits in float32.
    """
    made_by = next((s for s in backend.segments if output.name in s.outputs), None)
    if made_by is not None and made_by.accumulated <= made_by.floor:
        return "info"
    return severity(output.distance.relative_l2)
