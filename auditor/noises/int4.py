"""Weights that the compiled file holds in 4 bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from auditor.graphs import artefact, surgery
from auditor.graphs.storage import in_blocks
from auditor.noises import int8_dynamic
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays.layout import Layout

# What is simulated where no file tells, by the size of blocks.
BLOCKS = {n: f"weights of matrix products, in blocks of {n}" for n in (32, 128)}
RUNNING = "; what products read in 8 bits, too, "


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with the file's constants, and with what these products read in 8 bits.

    No grid is looked for: which of many 4-bit quantisers was used only the file tells.
    """
    stored = {n for n, c in segment.compiled.items() if c.storage == "4 bits"}
    for variant in artefact.variants(segment, "4 bits"):
        yield variant
        around = replace(segment, model=variant.model)
        for read in int8_dynamic.reading(around, stored.__contains__):
            yield Variant(variant.name + RUNNING + read.name, read.model)


def _simulated(segment: SegmentGraph) -> Iterable[Variant]:
    """The model with the weights of its matrix products rounded to 4 bits in blocks."""
    layout = Layout(segment.model, segment.weights)
    weights: dict[str, tuple[Array, int]] = {}  # and the axis that products add up along
    for _, node in surgery.find(segment.model, ("MatMul", "Gemm")):
        values = layout.constant(node.input[1])
        if values is not None and values.dtype == np.float32 and values.ndim == 2:
            weights[node.input[1]] = values, surgery.attributes(node).get("transB", 0)
    for block, name in BLOCKS.items():
        rounded = {n: _rounded(values, axis, block) for n, (values, axis) in weights.items()}
        changed = artefact.replaced(segment.model, rounded)
        if changed is not None:
            yield Variant(name, changed)


def _rounded(values: Array, axis: int, block: int) -> Array:
    """The nearest of 16 steps; the value of a block farthest from 0 is the first of them."""
    rows = in_blocks(values, axis, block)
    ends = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], 1)
    scale = np.where(ends == 0, 1, ends / -8)
    steps = np.clip(np.rint(rows / scale), -8, 7) * scale
    turned = np.moveaxis(values, axis, -1)
    back = steps.reshape(*turned.shape[:-1], -1)[..., : turned.shape[-1]]
    return np.ascontiguousarray(np.moveaxis(back, -1, axis), np.float32)


NOISE = Cause(
    id="precision.int4",
    type="data precision",
    title="Weights are stored in 4 bits",
    cause=(
        "Decoders are deployed with weights of 4 bits, one scale for each block of 16 to 256, as "
        "reading weights is what takes the time; engines may quantise what products read as well."
    ),
    applies=(
        "constant float32 weights that the compiled file (--candidate) or the engine's own "
        "(--artifact) holds in 4 bits"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; ONNX operator "
        "DequantizeLinear (int4, block_size); ONNX Runtime, ContribOperators.md, MatMulNBits"
    ),
    advice="use smaller blocks, or leave the listed layers in 8 bits or more",
    remedies={
        "ort": (
            "use a smaller block_size, another algorithm (GPTQ, HQQ) or leave the listed layers "
            "out (nodes_to_exclude); accuracy_level=0 leaves what they read as it is"
        ),
        "ov": (
            "use a smaller group_size, or keep the listed layers in 8 bits (NNCF: ratio, "
            "ignored_scope), and set DYNAMIC_QUANTIZATION_GROUP_SIZE to 0"
        ),
    },
    ablations={"ov": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}},
    stated=frozenset(("i4", "u4")),
    forms=(
        artefact.form("4 bits"),
        *(artefact.form("4 bits") + RUNNING + name for name in int8_dynamic.NOISE.forms),
        *(f"{name} (audit sensitivity)" for name in BLOCKS.values()),
    ),
    variants=_variants,
    simulation=_simulated,
)
