"""Models that keep a state between runs (``audit stream``)."""

from __future__ import annotations

from dataclasses import dataclass

from auditor.records.backend import Gap, Provenance
from auditor.records.measured import CategoryShare, FidelityProof
from auditor.records.model import ModelInfo


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

    @property
    def complete(self) -> bool:
        """Whether it was compared as it was asked for."""
        return bool(self.steps) and self.gap is None


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
