"""bfloat16 arithmetic: 8 significant bits instead of float32's 24, the same range."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import TensorProto

from auditor import rounding
from auditor.ports import SegmentGraph, Variant
from auditor.records import Kernel, Stage
from auditor.rounding import Format, Sites

FORMAT = Format("bf16", frozenset({"bf16", "bfloat16"}), TensorProto.BFLOAT16, opset=13, bits=8)

SITES = (
    Sites(
        "operands and results of each kernel in bf16, FP32 accumulation and convolution bias",
        "kernel",
        inputs=True,
        weights=True,
        bias="fully-connected",
        outputs=True,
    ),
    Sites(
        "operands of products and results of each kernel in bf16, elementwise kernels read FP32",
        "kernel",
        inputs=True,
        elementwise=False,
        weights=True,
        bias="fully-connected",
        outputs=True,
    ),
    Sites(
        "operands, bias and results of each kernel in bf16, FP32 accumulation",
        "kernel",
        inputs=True,
        weights=True,
        bias="all",
        outputs=True,
    ),
    Sites(
        "operands, constants and results of each kernel in bf16, FP32 accumulation",
        "kernel",
        inputs=True,
        weights=True,
        bias="all",
        constants=True,
        outputs=True,
    ),
    Sites(
        "operands, constants and result of every operator in bf16, FP32 accumulation",
        "operator",
        inputs=True,
        weights=True,
        bias="all",
        constants=True,
        outputs=True,
    ),
    Sites(
        "inputs, weights and outputs in bf16, FP32 in between",
        "segment",
        inputs=True,
        weights=True,
        bias="fully-connected",
        outputs=True,
    ),
    Sites(
        "operands of products in bf16, results in FP32",
        "operator",
        inputs=True,
        weights=True,
        products=True,
    ),
    Sites("weights in bf16", "operator", weights=True, products=True),
)


class Bf16:
    """``precision.bf16``."""

    id = "precision.bf16"
    stage: Stage = "inference"
    type = "data precision"
    title = "Values are rounded to bfloat16 (8 significant bits)"
    cause = (
        "Runtimes switch to bfloat16 by themselves where the processor multiplies it faster; "
        "the exported model says float32 and nothing warns."
    )
    source = (
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; OpenVINO documentation, "
        "CPU device, inference precision; Intel SDM vol. 1, ch. 3 (bfloat16)"
    )

    def remedy(self, backend: str) -> str:
        """The switch that keeps this backend in FP32."""
        switches = {
            "ov": "set INFERENCE_PRECISION_HINT to f32 (audit with --option "
            "ov.INFERENCE_PRECISION_HINT=f32), or keep the listed layers in FP32",
            "trt": "keep the listed layers' tensors FLOAT in the model: TensorRT is strongly typed",
            "tvm": "leave ToMixedPrecision out, or exclude the listed operators from it",
        }
        return switches.get(backend, "run the listed layers in float32")

    def stated_by(self, kernels: tuple[Kernel, ...]) -> bool:
        """Whether the engine reports bf16 for any of these kernels."""
        return rounding.stated(kernels, FORMAT.stated)

    def variants(self, segment: SegmentGraph) -> Iterable[Variant]:
        """The segment with bf16 roundings at each of ``SITES``."""
        return rounding.variants(segment, FORMAT, SITES)


NOISE = Bf16()
