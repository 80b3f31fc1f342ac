"""Many models on many machines (``audit fleet``)."""

from __future__ import annotations

from dataclasses import dataclass, field

from auditor.records.backend import Gap
from auditor.records.terms import Verdict


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
