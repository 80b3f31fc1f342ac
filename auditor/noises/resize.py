"""The resampling of pixels."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "resize",
    type="resize",
    title="Another library or interpolation for the same change of size",
    cause=(
        "Libraries of the same interpolation's name differ in where they sample, whether they "
        "smooth before making smaller, and in the precision of their weights."
    ),
    advice=(
        "resize in deployment with the library, interpolation and anti-aliasing of training, or "
        "train on several resizers"
    ),
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.1 and Table 7",
)
