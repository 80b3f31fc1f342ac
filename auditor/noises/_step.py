"""Causes before the network: steps of a pipeline, switched whole instead of replayed in a graph."""

from __future__ import annotations

from collections.abc import Iterable

from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant

_APPLIES = "photographs given with `--images` and `--pipeline`, where the two sides differ in it"


def step(name: str, type: str, title: str, cause: str, advice: str, source: str) -> Cause:
    """The cause ``preprocessing.NAME``; the arguments are those of ``Cause``."""
    return Cause(
        id=f"preprocessing.{name}",
        stage="pre-processing",
        type=type,
        title=title,
        cause=cause,
        applies=_APPLIES,
        source=source,
        advice=advice,
        variants=_none,
        simulated=False,
    )


def _none(segment: SegmentGraph) -> Iterable[Variant]:
    return ()
