"""The words that reports are written in, and the scale of severity."""

from __future__ import annotations

from typing import Literal

Fidelity = Literal["output-proved", "cone-proved", "perturbing"]
Status = Literal["audited", "built", "gap"]
Severity = Literal["info", "low", "medium", "high", "critical"]
Confidence = Literal["low", "medium", "high"]
Verdict = Literal["pass", "fail", "incomplete"]
Stage = Literal["pre-processing", "inference", "post-processing"]
Conclusion = Literal["confirmed", "contradicted", "partial", "unchanged", "measured", "failed"]
OutputKind = Literal["scores", "boxes", "mask", "embedding", "text", "none"]

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


def reaches(level: Severity, limit: Severity) -> bool:
    """Whether a severity is at or above a limit."""
    return SEVERITIES.index(level) >= SEVERITIES.index(limit)


def severity(effect: float) -> Severity:
    """Severity of a relative L2 change of the final outputs."""
    return next((name for limit, name in _SEVERITY_FROM if effect >= limit), "info")
