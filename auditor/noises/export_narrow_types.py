"""An export in float16 or bfloat16 of a module that computes in float32."""

from __future__ import annotations

from collections.abc import Iterable

from auditor.graphs import artefact
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays import widening

_WIDE = "in float32"
_OWN = "in float32, with the module's own constants"


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment in float32, and with the constants as they were before they were rounded."""
    wide = widening.in_float32(segment)
    if wide is None:
        return
    values = {name: constant.values for name, constant in segment.trained.items()}
    own = artefact.replaced(wide, values) if values else None
    if own is not None:
        yield Variant(_OWN, own)
    yield Variant(_WIDE, wide)


NOISE = Cause(
    id="export.narrow_types",
    type="data precision",
    title="The export computes in float16 or bfloat16 where the module computes in float32",
    cause=(
        "A module that was put under autocast or half() for the export, and converters that turn a "
        "model into float16 afterwards, write casts and narrow weights into the file, so every "
        "runtime rounds there."
    ),
    applies="segments with float16 or bfloat16 tensors, where --source names the module",
    source=(
        "PyTorch, torch.amp.autocast; onnxconverter-common and ONNX Runtime, "
        "float16.convert_float_to_float16"
    ),
    advice=(
        "export outside of autocast and in float32, and let the runtime narrow what it may; or "
        "train and validate in that type"
    ),
    forms=(_OWN, _WIDE),
    variants=_variants,
    simulated=False,
)
