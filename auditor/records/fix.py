"""A change that brings a backend within its limit (``audit fix``)."""

from __future__ import annotations

from dataclasses import dataclass


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
