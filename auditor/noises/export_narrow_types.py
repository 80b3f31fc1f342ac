"""An export in float16 or bfloat16 of a module that computes in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import helper

from auditor.graphs import artefact, surgery
from auditor.noises._cause import Cause
from auditor.ports import Array, Arrays, SegmentGraph, Variant
from auditor.replays import widening

_WIDE = "in float32"
_OWN = "in float32, with the module's own constants"
_KINDS = tuple(helper.tensor_dtype_to_np_dtype(kind) for kind in widening.FORMATS)
_FACTORS = "in float32, with factors as they were before they were rounded"


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


def _fitted(segment: SegmentGraph, inputs: Arrays, observed: Arrays) -> Iterable[Variant]:
    """The segment in float32, with factors that no parameter holds, as the scale of attention.

    Each is read off what it multiplied, and counts where rounding it gives what the file has.
    """
    wide = widening.in_float32(segment)
    if wide is None:
        return
    held = surgery.constants(segment.model)
    copies = {n.output[0]: n.input[0] for _, n in surgery.find(wide, ("Cast", "Identity"))}
    results = {_copied(name, copies): value for name, value in observed.items()} | observed
    factors: Arrays = {}
    for _, node in surgery.find(wide, ("Mul", "Div")):
        turns = node.op_type == "Div"
        for read, by in ((0, 1),) if turns else ((0, 1), (1, 0)):
            read_as, name = (_copied(node.input[i], copies) for i in (read, by))
            x, y, rounded = inputs.get(read_as), results.get(node.output[0]), held.get(name)
            if x is None or y is None or x.shape != y.shape or rounded is None or rounded.size > 1:
                continue
            factor = _factor(y, x) if not turns else _factor(x, y)
            if any(factor.astype(kind) == rounded for kind in _KINDS):
                factors[name] = np.full(rounded.shape, factor)
    if factors and (changed := artefact.replaced(wide, factors)) is not None:
        yield Variant(_FACTORS, changed)


def _copied(name: str, copies: Mapping[str, str]) -> str:
    """The tensor that this one is a copy of."""
    while name in copies:
        name = copies[name]
    return name


def _factor(of: Array, to: Array) -> np.float32:
    """The float32 factor by which ``to`` is nearest to ``of``; not a number where ``to`` is 0."""
    a, b = (v.astype(np.float64).ravel() for v in (of, to))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.float32(a @ b / (b @ b))


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
    forms=(_OWN, _WIDE, _FACTORS),
    variants=_variants,
    fitted=_fitted,
    simulated=False,
)
