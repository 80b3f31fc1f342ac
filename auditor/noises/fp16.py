"""IEEE half precision: 11 significant bits and a largest value of 65504."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import TensorProto

from auditor import rounding
from auditor.ports import SegmentGraph, Variant
from auditor.records import Kernel, Stage
from auditor.rounding import Format, Sites

FORMAT = Format(
    "fp16", frozenset({"f16", "fp16", "float16", "half"}), TensorProto.FLOAT16, opset=6, bits=11
)

# Operands in fp16 with results in FP32 have TF32's bits and are left to that noise.
SITES = (
    Sites(
        "operands, bias and results of each kernel in fp16, FP32 accumulation",
        "kernel",
        inputs=True,
        weights=True,
        bias="all",
        outputs=True,
    ),
    Sites(
        "operands and results of each kernel in fp16, FP32 accumulation and convolution bias",
        "kernel",
        inputs=True,
        weights=True,
        bias="fully-connected",
        outputs=True,
    ),
    Sites(
        "operands, constants and result of every operator in fp16, FP32 accumulation",
        "operator",
        inputs=True,
        weights=True,
        bias="all",
        constants=True,
        outputs=True,
    ),
    Sites("every constant in fp16", "operator", weights=True, bias="all", constants=True),
    Sites(
        "inputs, weights, bias and outputs in fp16, FP32 in between",
        "segment",
        inputs=True,
        weights=True,
        bias="all",
        outputs=True,
    ),
    Sites("weights in fp16", "operator", weights=True, products=True),
    Sites(
        "operands, constants, running sums and result of every operator in fp16",
        "operator",
        inputs=True,
        weights=True,
        bias="all",
        constants=True,
        outputs=True,
        sums=True,
    ),
)


class Fp16:
    """``precision.fp16``."""

    id = "precision.fp16"
    stage: Stage = "inference"
    type = "data precision"
    title = "Values are rounded to half precision (11 significant bits, at most 65504)"
    cause = (
        "Deployments store or compute in half precision to halve memory and double speed; some "
        "converters do so by default."
    )
    source = (
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; IEEE 754-2019, binary16; "
        "OpenVINO documentation, save_model (compress_to_fp16)"
    )

    def remedy(self, backend: str) -> str:
        """The switch that keeps this backend in FP32."""
        switches = {
            "ov": "set INFERENCE_PRECISION_HINT to f32, and save models with "
            "compress_to_fp16=False",
            "trt": "keep the listed layers' tensors FLOAT in the model: TensorRT is strongly typed",
            "tvm": "leave ToMixedPrecision out, or exclude the listed operators from it",
            "ort": "exclude the listed operators from the float16 conversion (op_block_list)",
        }
        return switches.get(backend, "run the listed layers in float32")

    def stated_by(self, kernels: tuple[Kernel, ...]) -> bool:
        """Whether the engine reports half precision for any of these kernels."""
        return rounding.stated(kernels, FORMAT.stated)

    def variants(self, segment: SegmentGraph) -> Iterable[Variant]:
        """The segment with fp16 roundings at each of ``SITES``; overflow becomes infinite."""
        return rounding.variants(segment, FORMAT, SITES)


NOISE = Fp16()
