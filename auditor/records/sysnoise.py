"""The SysNoise table of one model (``audit sysnoise``)."""

from __future__ import annotations

from dataclasses import dataclass

from auditor.records.backend import Gap
from auditor.records.terms import OutputKind


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
    kind: OutputKind
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
