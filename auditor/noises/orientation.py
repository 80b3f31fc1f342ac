"""Whether a photograph is turned upright."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "orientation",
    type="decoder",
    title="The orientation that a camera wrote into the file is applied on one side only",
    cause=(
        "Most decoders hand out pixels as they are stored; some libraries and every viewer turn "
        "them upright first."
    ),
    advice="apply the EXIF orientation on both sides, or on neither",
    source="CIPA DC-008 (EXIF), tag 0x0112",
)
