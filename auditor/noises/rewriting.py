"""Algebra that holds for real numbers: constants joined, taken into layers, or cancelled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import onnx

from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays import algebra, linear
from auditor.replays.layout import Layout


def _collapsed(segment: SegmentGraph, *, mixed: bool = True) -> onnx.ModelProto | None:
    """The segment with every chain of constants as one product and one sum; None without any."""
    return linear.collapsed(Layout(segment.model, segment.weights), np.float32, mixed=mixed)


# Forms, most likely first; each gives None where it changes nothing.
_FORMS: dict[str, Callable[[SegmentGraph], onnx.ModelProto | None]] = {
    "constants added or multiplied one after another are joined first": partial(
        _collapsed, mixed=False
    ),
    "constant factors and shifts are taken into the layer before them": algebra.taken_in,
    "what cancels for real numbers is left out": algebra.cancelled,
    "chains of constant factors and shifts are joined into one of each": _collapsed,
    "constant factors of an operand are taken out of the product": algebra.taken_out,
    "exponentials divided by their sum are a softmax, which overflows nowhere": algebra.softened,
    "what divides multiplies as its inverse": algebra.inverted,
}


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment as optimisers rewrite it."""
    for name, rewrite in _FORMS.items():
        if (model := rewrite(segment)) is not None:
            yield Variant(name, model)


NOISE = Cause(
    id="implementation.rewriting",
    type="operator implementation",
    title="An optimiser rewrote arithmetic by rules that hold for real numbers only",
    cause=(
        "Graph optimisers join constants, fold factors into weights, and drop what cancels. Floats "
        "round, overflow and have NaN, infinity and −0: (x + 1e8) − 1e8 is not x, and neither is "
        "log(exp(x))."
    ),
    applies=(
        "Add, Sub, Mul and Div with float32 constants, one after another or around Conv, Gemm and "
        "MatMul; exponentials over their sum; x − x, x / x, x · 0, x + 0, (1 / a) · b, Log of Exp, "
        "Not of a comparison, and casts to half precision or 8 bits and back"
    ),
    source=(
        "ONNX Runtime, graph optimizations (basic level: constant folding, Conv Mul and Conv Add "
        "fusion); OpenVINO, LinOpSequenceFusion; Goldberg, *What every computer scientist should "
        "know about floating-point arithmetic* (1991), on optimisers"
    ),
    advice=(
        "write the listed operators the way the runtime computes them, with constants that do not "
        "overflow or swallow digits"
    ),
    remedies={
        "ort": (
            "build with `--option ort.level=disable`, or write the listed operators the way the "
            "runtime computes them"
        ),
    },
    forms=tuple(_FORMS),
    variants=_variants,
    simulated=False,
)
