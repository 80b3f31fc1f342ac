"""How a mask gets the size of the photograph."""

from __future__ import annotations

from auditor.noises._step import step

NOISE = step(
    "mask_resize",
    stage="post-processing",
    type="upsample",
    title="A mask is enlarged in another way",
    cause=(
        "The network's mask is smaller than the photograph. Libraries place its pixels differently "
        "under the same interpolation's name, and applications enlarge before or after they "
        "decide what belongs to it."
    ),
    advice="enlarge as the evaluation did: same library, interpolation and order",
    source="SysNoise (Wang et al., MLSys 2023), sec. 3.2 and 3.3",
)
