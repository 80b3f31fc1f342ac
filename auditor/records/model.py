"""The model, what it is fed, the machine, and what backends are compared against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
