"""TensorFloat-32: sums of products read their operands with 11 significant bits."""

from __future__ import annotations

from collections.abc import Iterable

from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays import rounding
from auditor.replays.rounder import Sites
from auditor.replays.writer import Format

FORMAT = Format("tf32", frozenset({"tf32"}), cast=None, opset=7, bits=11)

SITES = (
    Sites("operands of products in tf32", "operator", inputs=True, weights=True, products=True),
    Sites("weights in tf32", "operator", weights=True, products=True),
    Sites("activations in tf32, weights in FP32", "operator", inputs=True, products=True),
)


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with operands of products rounded at each of ``SITES``."""
    return rounding.variants(segment, FORMAT, SITES)


NOISE = Cause(
    id="precision.tf32",
    type="data precision",
    title="Products read their operands in TensorFloat-32 (11 significant bits)",
    cause=(
        "NVIDIA libraries use TF32 for float32 convolutions and matrix products unless told "
        "otherwise; tensors stay float32, so no type shows it."
    ),
    applies=(
        "float32 operands of convolutions, matrix products and recurrent layers; operator set"
        " 7 or later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; NVIDIA TensorRT "
        "documentation, BuilderFlag.TF32; NVIDIA PTX ISA, cvt.rna.tf32"
    ),
    advice="disable TF32",
    remedies={
        "trt": "clear BuilderFlag.TF32",
        "ort": "set use_tf32=0 on the CUDA execution provider",
        "torch": (
            "torch.set_float32_matmul_precision('highest') and torch.backends.cudnn.allow_tf32 = "
            "False"
        ),
    },
    ablations={"trt": {"tf32": "off"}},
    stated=FORMAT.stated,
    significand=FORMAT.bits,
    forms=tuple(sites.name for sites in SITES),
    variants=_variants,
)
