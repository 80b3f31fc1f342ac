"""Two reports side by side (``audit diff``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from auditor.records.backend import Gap
from auditor.records.report import Broken, Finding

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
