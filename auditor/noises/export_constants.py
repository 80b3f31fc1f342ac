"""Constants of the file that are not the module's: another checkpoint, rounded weights."""

from __future__ import annotations

from collections.abc import Iterable

from auditor.graphs import artefact
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant

_FORM = "the module's own constants"


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with the constants of the module that it was exported from."""
    values = {name: constant.values for name, constant in segment.trained.items()}
    changed = artefact.replaced(segment.model, values) if values else None
    if changed is not None:
        yield Variant(_FORM, changed)


NOISE = Cause(
    id="export.constants",
    type="constants",
    title="The file holds other constants than the module that it was exported from",
    cause=(
        "Exports of an earlier checkpoint, weights that a tool rounded, quantised or pruned, and "
        "constant folding in another precision leave a file that no longer holds what was trained."
    ),
    applies=(
        "any operator with constants, where --source names the module and its parameters are found "
        "in the file by name or by value"
    ),
    source="PyTorch, torch.nn.Module.state_dict; ONNX IR specification, initializer",
    advice=(
        "export again from the checkpoint that was validated, and compare before any tool changes "
        "the file"
    ),
    forms=(_FORM,),
    variants=_variants,
    simulated=False,
)
