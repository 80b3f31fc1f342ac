"""How wide a box is."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "box_offset",
    stage="post-processing",
    type="detection proposal",
    title="A box from x1 to x2 is taken for x2 - x1 or x2 - x1 + 1 wide",
    cause=(
        "The offset differs between detection libraries and their versions, and between "
        "training and exported decoders."
    ),
    advice="use the offset of training when boxes are decoded",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.3 (ALIGNED_FLAG.offset)",
)
