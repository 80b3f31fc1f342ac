"""From deltas to boxes."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "box_decode",
    stage="post-processing",
    type="detection proposal",
    title="Boxes are read off the outputs in another way",
    cause=(
        "Anchors, variances and the order of the columns are written down in the training code "
        "only."
    ),
    advice="decode with the anchors and the coding of training",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.3",
)
