"""From pixel levels to numbers."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "normalise",
    type="normalisation",
    title="Other constants turn pixels into the network's numbers",
    cause=(
        "Scale, mean and deviation are copied by hand between training code, converter options "
        "and application code."
    ),
    advice="use the scale, mean and deviation of training",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.1",
)
