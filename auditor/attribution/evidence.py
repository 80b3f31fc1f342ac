"""What the constants of the file that was compiled, or of the module, say of a segment's error.

It is evidence and no name: a cause that is none of the catalogue stays unexplained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx

from auditor.attribution import explainer
from auditor.decomposition.divergence import Local
from auditor.graphs import artefact
from auditor.ports import CompiledConstant, SegmentGraph

# Constants that are named where many are others.
_MOST = 3


def of_another_file(
    compiled: Mapping[str, CompiledConstant], reproduced: int, segments: int
) -> str | None:
    """A sentence on the compiled file's other weights; None where they make no segment's error.

    Args:
        compiled: constants that it has otherwise.
        reproduced: segments whose error replaying with them explains.
        segments: above their floor.
    """
    if not reproduced:
        return None
    others = artefact.others(compiled)
    largest = sorted(others, key=lambda n: -compiled[n].relative_l2)
    named = ", ".join(f"`{n}` {compiled[n].relative_l2:.1e}" for n in largest[:_MOST])
    words = "1 constant" if len(others) == 1 else f"{len(others)} constants"
    return (
        f"The compiled file holds other values, and no rounded ones, for {words} of the model "
        f"(relative L2 of {named}"
        f"{', …' if len(others) > _MOST else ''}), and with them the reference itself makes the "
        f"error of {reproduced} of {segments} segments above their floor. Another checkpoint, or "
        "weights pruned, exchanged, turned, rescaled?"
    )


def of_constants(segment: SegmentGraph, local: Local, threads: int) -> tuple[str, ...]:
    """Sentences on how a segment's constants were changed, and what that alone explains.

    Args:
        segment: the reference segment, with the constants that are otherwise.
        local: its divergence.
        threads: intra-op threads of each replay.
    """
    if segment.trained:
        return artefact.sentences_of_trained(segment)
    said = list[str]()

    def explained(changed: onnx.ModelProto) -> float | None:
        return explainer.measured(replace(segment, model=changed), local, threads)

    if segment.grids:
        shares = {what: explained(made) for what, made in artefact.quantised(segment).items()}
        parts = [f"{what} {share:.4f}" for what, share in shares.items() if share is not None]
        if parts:
            said.append(
                f"of the error, replaying what the quantiser chose explains: {', '.join(parts)}"
            )
    # What a quantiser chose is said above.
    other = {n: c for n, c in segment.compiled.items() if not (c.quantised and segment.grids)}
    changed = artefact.replaced(segment.model, {n: c.values for n, c in other.items()})
    if changed is not None:
        held = artefact.held_by(segment.model)
        said += (artefact.sentence(n, c) for n, c in other.items() if n in held)
        if (share := explained(changed)) is not None:
            said.append(
                f"replaying this segment with the compiled file's constants explains "
                f"{share:.4f} of the error"
            )
    return tuple(said)
