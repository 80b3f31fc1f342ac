"""IEEE half precision: 11 significant bits and a largest value of 65504."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from auditor.graphs import artefact
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays import folded, rounding
from auditor.replays.rounder import KERNEL, OPERATOR, Sites
from auditor.replays.writer import FP16

FORMAT = FP16

FOLDED = "constants of a half-precision model folded in fp16"
_KERNEL = replace(
    KERNEL,
    name="operands, bias and results of each kernel in fp16, FP32 accumulation",
    bias="all",
)
_WHOLE = replace(
    _KERNEL,
    name="operands, constants and results of each kernel in fp16, FP32 in between",
    constants=True,
)
_OPERATOR = replace(
    OPERATOR, name="operands, constants and result of every operator in fp16, FP32 accumulation"
)
_CONSTANTS = replace(_OPERATOR, name="every constant in fp16", inputs=False, outputs=False)
# Operands in fp16 with results in FP32 have TF32's bits and are left to that noise.
SITES = (
    _KERNEL,
    replace(
        _KERNEL,
        name="operands and results of each kernel in fp16, FP32 accumulation and convolution bias",
        bias="fully-connected",
    ),
    _WHOLE,
    Sites(
        "operands and results of products in fp16, FP32 accumulation, bias and all else",
        "operator",
        inputs=True,
        weights=True,
        outputs=True,
        products=True,
    ),
    _OPERATOR,
    _CONSTANTS,
    replace(_CONSTANTS, name="every constant in fp16, at most 65504", saturates=True),
    replace(_WHOLE, name="inputs, constants and outputs in fp16, FP32 in between", scope="segment"),
    Sites("weights in fp16", "operator", weights=True, products=True),
    replace(
        _OPERATOR,
        name="operands, constants, running sums and result of every operator in fp16",
        sums=True,
    ),
    Sites("results of every operator in fp16, operands as they are", "operator", outputs=True),
    Sites("results of each kernel in fp16, operands as they are", "kernel", outputs=True),
)


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with fp16 roundings at each of ``SITES``; overflow becomes infinite."""
    yield from artefact.variants(segment, "float16")
    halved = folded.in_half(segment)
    if halved is not None:
        yield Variant(FOLDED, halved.model)
    yield from rounding.variants(segment, FORMAT, SITES)


NOISE = Cause(
    id="precision.fp16",
    type="data precision",
    title="Values are rounded to half precision (11 significant bits, at most 65504)",
    cause=(
        "Deployments store or compute in half precision to halve memory and double speed; some "
        "converters do so by default."
    ),
    applies=(
        "float32 tensors: operands, weights, biases, other constants, running sums and "
        "results, of the engine's kernels where it names them"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; IEEE 754-2019, binary16; "
        "OpenVINO documentation, save_model (compress_to_fp16)"
    ),
    advice="run the listed layers in float32",
    remedies={
        "ov": "set INFERENCE_PRECISION_HINT to f32, and save models with compress_to_fp16=False",
        "trt": "keep the listed layers' tensors FLOAT in the model: TensorRT is strongly typed",
        "tvm": "leave ToMixedPrecision out, or exclude the listed operators from it",
        "ort": "exclude the listed operators from the float16 conversion (op_block_list)",
    },
    ablations={"ov": {"INFERENCE_PRECISION_HINT": "f32"}},
    otherwise={"ov": "save models with compress_to_fp16=False"},
    stated=FORMAT.stated,
    significand=FORMAT.bits,
    forms=(artefact.form("float16"), FOLDED, *(sites.name for sites in SITES)),
    variants=_variants,
)
