"""Causes before and after the network: steps of a pipeline, switched instead of replayed."""

from __future__ import annotations

from auditor.noises._cause import Cause
from auditor.records.terms import Stage

_APPLIES = "photographs given with `--images` and `--pipeline`, where the two sides differ in it"


def step(
    name: str,
    type: str,
    title: str,
    cause: str,
    advice: str,
    source: str,
    stage: Stage = "pre-processing",
) -> Cause:
    """The cause ``preprocessing.NAME`` or ``postprocessing.NAME``; arguments as of ``Cause``."""
    return Cause(
        id=f"{stage.replace('-', '')}.{name}",
        stage=stage,
        type=type,
        title=title,
        cause=cause,
        applies=_APPLIES,
        source=source,
        advice=advice,
        simulated=False,
    )
