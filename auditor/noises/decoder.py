"""How a file becomes pixels."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "decoder",
    type="decoder",
    title="Another JPEG decoder, or another of its ways to decode",
    cause=(
        "Decoders differ in the inverse DCT (exact, fast, floating point), in how they enlarge "
        "the colour channels, and in the rounding of the conversion to RGB."
    ),
    advice=(
        "decode in deployment with the library and the settings of training, or train on several "
        "decoders"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), sec. 3.1; ITU-T T.81, annex A.3.3, which leaves the "
        "accuracy of the inverse DCT open"
    ),
)
