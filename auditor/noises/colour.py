"""Through YUV and back."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "colour",
    type="colour space",
    title="A round trip through YUV 4:2:0 as hardware decoders and cameras hand out pixels",
    cause=(
        "Matrix (BT.601, BT.709), range (limited, full), the rounding of its arithmetic and the "
        "halved resolution of the colour channels all change RGB values."
    ),
    advice=(
        "convert with the matrix and range that the pixels were made with, and train with the "
        "same round trip"
    ),
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.1 and eq. 7; ITU-R BT.601 and BT.709",
)
