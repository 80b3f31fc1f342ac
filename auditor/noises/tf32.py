"""TensorFloat-32: sums of products read their operands with 11 significant bits."""

from __future__ import annotations

from collections.abc import Iterable

from auditor import rounding
from auditor.ports import SegmentGraph, Variant
from auditor.records import Kernel, Stage
from auditor.rounding import Format, Sites

FORMAT = Format("tf32", frozenset({"tf32"}), cast=None, opset=7, bits=11)

SITES = (
    Sites("operands of products in tf32", "operator", inputs=True, weights=True, products=True),
    Sites("weights in tf32", "operator", weights=True, products=True),
    Sites("activations in tf32, weights in FP32", "operator", inputs=True, products=True),
)


class Tf32:
    """``precision.tf32``."""

    id = "precision.tf32"
    stage: Stage = "inference"
    type = "data precision"
    title = "Products read their operands in TensorFloat-32 (11 significant bits)"
    cause = (
        "NVIDIA libraries use TF32 for float32 convolutions and matrix products unless told "
        "otherwise; tensors stay float32, so no type shows it."
    )
    source = (
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; NVIDIA TensorRT "
        "documentation, BuilderFlag.TF32; NVIDIA PTX ISA, cvt.rna.tf32"
    )

    def remedy(self, backend: str) -> str:
        """The switch that keeps this backend in FP32."""
        switches = {
            "trt": "clear BuilderFlag.TF32",
            "ort": "set use_tf32=0 on the CUDA execution provider",
            "torch": "torch.set_float32_matmul_precision('highest') and "
            "torch.backends.cudnn.allow_tf32 = False",
        }
        return switches.get(backend, "disable TF32")

    def stated_by(self, kernels: tuple[Kernel, ...]) -> bool:
        """Whether the engine reports TF32 for any of these kernels."""
        return rounding.stated(kernels, FORMAT.stated)

    def variants(self, segment: SegmentGraph) -> Iterable[Variant]:
        """The segment with operands of products rounded at each of ``SITES``."""
        return rounding.variants(segment, FORMAT, SITES)


NOISE = Tf32()
