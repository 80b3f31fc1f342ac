"""Whole numbers as corners."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "box_rounding",
    stage="post-processing",
    type="detection proposal",
    title="Corners are rounded or cut at the border on one side only",
    cause=(
        "Applications that crop what was detected turn corners into whole numbers, down or to "
        "the nearest."
    ),
    advice="keep corners in floating point until pixels are cut out",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.3 and appendix",
)
