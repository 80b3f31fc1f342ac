"""Which part of a photograph is used, at which size."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "framing",
    type="resize",
    title="Another part of the photograph, or another size, reaches the network",
    cause="Squashing, cropping and letterboxing are chosen anew by whoever writes the deployment.",
    advice="use the sizes, crop and padding of training",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.1",
)
