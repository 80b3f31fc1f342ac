"""bfloat16 arithmetic: 8 significant bits instead of float32's 24, the same range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from onnx import TensorProto

from auditor.graphs import artefact, surgery
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays import blockwise, dynamic, folded, loops, recurrent, reorder, rounding
from auditor.replays.rounder import KERNEL, OPERATOR, Sites
from auditor.replays.writer import BF16

FORMAT = BF16

RECURRENT = "recurrent layers: sequence, hidden state and weights in bf16, all else in FP32"
# Recurrent layers beside other kernels in one segment: joined with each of ``SITES``.
AROUND = f"{RECURRENT}; around them "
# … and for the bodies of loops and what is around them.
INSIDE = "inside the bodies of loops, too: "
# … and where the model is of half precision, and constants are folded in that.
FOLDED = "constants folded in fp16; "
INVERTED = "constants folded and divisors inverted in fp16; "
# Of a few rounded values, the order of a sum decides on which side of a step its last digit falls.
ORDERED = "plain sums one value after another; "
# Dynamic quantisation, alone and joined with each of ``SITES``.
DYNAMIC = "dynamic quantisation with its range in bf16, sums of integers to bf16"
# … and where weights are compressed, which kernels multiply by their scales in bf16.
SCALED = "scales of compressed weights in bf16, too: "
_KERNEL = replace(
    KERNEL,
    name="operands and results of each kernel in bf16, FP32 accumulation and convolution bias",
    bias="fully-connected",
)
_OPERATOR = replace(
    OPERATOR, name="operands, constants and result of every operator in bf16, FP32 accumulation"
)
_PRODUCTS = Sites(
    "operands of products in bf16, results in FP32",
    "operator",
    inputs=True,
    weights=True,
    products=True,
)
SITES = (
    _KERNEL,
    replace(
        _KERNEL,
        name="operands of products and results of each kernel in bf16, all else that enters in "
        "FP32",
        entering=False,
    ),
    replace(
        _KERNEL,
        name="operands, bias and results of each kernel in bf16, FP32 accumulation",
        bias="all",
    ),
    replace(
        _OPERATOR,
        name="operands, constants and results of each kernel in bf16, FP32 accumulation",
        scope="kernel",
    ),
    replace(
        _KERNEL,
        name="operands and results of each kernel in bf16, layer normalisation in three kernels",
        steps=True,
    ),
    replace(
        _KERNEL,
        name="operands and results of each kernel in bf16, attention's scale in FP32 on its "
        "products",
        scales="product",
    ),
    replace(
        _KERNEL,
        name="operands and results of each kernel in bf16, attention's scale in FP32 on its keys",
        scales="keys",
    ),
    Sites("results of each kernel in bf16, operands as they are", "kernel", outputs=True),
    replace(
        _PRODUCTS,
        name="operands and results of products in bf16, FP32 accumulation, bias and all else",
        outputs=True,
    ),
    _OPERATOR,
    replace(_KERNEL, name="inputs, weights and outputs in bf16, FP32 in between", scope="segment"),
    _PRODUCTS,
    replace(_PRODUCTS, name="weights in bf16", inputs=False),
    replace(_PRODUCTS, name="activations in bf16, weights in FP32", weights=False),
    replace(
        _KERNEL,
        name="operands and results of each kernel in bf16, factors of sums multiplied in by others",
        distributed=True,
    ),
    Sites(
        "results of every operator in bf16, factors of sums multiplied in beforehand",
        "operator",
        inputs=True,
        weights=True,
        outputs=True,
        distributed=True,
    ),
    replace(
        _KERNEL,
        name="operands and results of each kernel in bf16, reductions cut the ends of their rows "
        "off",
        cuts=True,
    ),
    replace(
        _KERNEL,
        name="operands and results of each kernel in bf16, constants too where a kernel computes "
        "them",
        computed=True,
    ),
    replace(
        _KERNEL,
        name="operands, computed constants and results of each kernel in bf16, attention's scale "
        "on its keys",
        computed=True,
        scales="keys",
    ),
    Sites("results of every operator in bf16, operands as they are", "operator", outputs=True),
)


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment, and ways in which engines write it otherwise, with roundings at ``SITES``."""
    yield from artefact.variants(segment, "bfloat16")
    if (layers := recurrent.in_bfloat16(segment)) is not None:
        yield Variant(RECURRENT, layers)
        yield from _rounded(replace(segment, model=layers), AROUND)
    for variant in loops.inside(segment, _rounded):
        yield Variant(INSIDE + variant.name, variant.model)
    for name, divisors in ((FOLDED, False), (INVERTED, True)):
        if (halved := folded.in_half(segment, divisors=divisors)) is not None:
            yield from _rounded(halved, name)
    if (quantised := dynamic.in_bfloat16(segment)) is not None:
        yield Variant(DYNAMIC, quantised)
        yield from _rounded(replace(segment, model=quantised), f"{DYNAMIC}; ")
    if (scaled := blockwise.with_narrow_scales(segment, TensorProto.BFLOAT16)) is not None:
        yield from _rounded(scaled, SCALED)
    yield from _rounded(segment)
    if surgery.opset(segment.model) >= reorder.OPSET:
        ordered = reorder.reordered(segment.model, plain=True)
        if ordered is not None:
            yield from _rounded(replace(segment, model=ordered), ORDERED, SITES[:2])


def _rounded(
    segment: SegmentGraph, prefix: str = "", sites: Sequence[Sites] = SITES
) -> Iterator[Variant]:
    for variant in rounding.variants(segment, FORMAT, sites):
        yield Variant(prefix + variant.name, variant.model)


NOISE = Cause(
    id="precision.bf16",
    type="data precision",
    title="Values are rounded to bfloat16 (8 significant bits)",
    cause=(
        "Runtimes switch to bfloat16 by themselves where the processor multiplies it faster; "
        "the exported model says float32 and nothing warns."
    ),
    applies=(
        "float32 tensors: operands, weights, biases, other constants and results, of the "
        "engine's kernels where it names them"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; OpenVINO documentation, "
        "CPU device, inference precision; Intel SDM vol. 1, ch. 3 (bfloat16)"
    ),
    advice="run the listed layers in float32",
    remedies={
        "ov": (
            "set INFERENCE_PRECISION_HINT to f32 (audit with --option "
            "ov.INFERENCE_PRECISION_HINT=f32), and DYNAMIC_QUANTIZATION_GROUP_SIZE to 0 where "
            "weights are compressed, or keep the listed layers in FP32"
        ),
        "trt": "keep the listed layers' tensors FLOAT in the model: TensorRT is strongly typed",
        "tvm": "leave ToMixedPrecision out, or exclude the listed operators from it",
    },
    ablations={
        "ov": {"INFERENCE_PRECISION_HINT": "f32"},
        "ort": {"mlas.enable_gemm_fastmath_arm64_bfloat16": "0"},
    },
    otherwise={"ov": "keep the listed layers' weights and tensors in float32 in the model"},
    stated=FORMAT.stated,
    significand=FORMAT.bits,
    forms=(
        artefact.form("bfloat16"),
        RECURRENT,
        f"{AROUND}FORM",
        f"{INSIDE}FORM",
        f"{SCALED}FORM",
        f"{FOLDED}FORM",
        f"{INVERTED}FORM",
        DYNAMIC,
        f"{DYNAMIC}; FORM",
        f"{ORDERED}FORM",
        *(sites.name for sites in SITES),
    ),
    variants=_variants,
)
