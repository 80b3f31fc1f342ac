"""Weights that the compiled file holds in 4 bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from auditor.graphs import artefact
from auditor.noises import int8_dynamic
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant

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
    ),
    variants=_variants,
)
