"""Which of overlapping boxes is left."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "nms",
    stage="post-processing",
    type="detection proposal",
    title="Overlapping boxes are suppressed by another rule",
    cause=(
        "Implementations differ in the offset with which overlaps are measured, in whether "
        "classes compete, in the limit and in the order of ties."
    ),
    advice="use the suppression of training, with its limit and its offset",
    source=(
        "SysNoise (Wang et al., MLSys 2023), appendix; ONNX operator specification, "
        "NonMaxSuppression"
    ),
)
