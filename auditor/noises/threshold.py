"""What counts as an object or as part of a mask."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "threshold",
    stage="post-processing",
    type="threshold",
    title="Another threshold decides what counts",
    cause=(
        "Detections and masks are cut at a score that evaluation and application choose for "
        "themselves."
    ),
    advice="use the threshold that the model was evaluated with",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.3",
)
