"""From numbers to scores."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "activation",
    stage="post-processing",
    type="activation",
    title="Another function makes scores of the network's numbers",
    cause=(
        "Softmax or sigmoid is left to the application, or done twice when the model already "
        "has it."
    ),
    advice="apply the activation of training exactly once",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.3",
)
