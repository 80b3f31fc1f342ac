"""Which pipeline made a tensor or a result (``audit forensics``)."""

from __future__ import annotations

from dataclasses import dataclass

from auditor.records.backend import Gap


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
