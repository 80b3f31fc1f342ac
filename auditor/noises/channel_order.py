"""The order of the colour channels."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "channels",
    type="colour space",
    title="Red and blue are exchanged",
    cause="OpenCV hands out BGR, most other libraries RGB.",
    advice="give the network the order that it was trained with",
    source="OpenCV documentation, imread",
)
