"""Patterns that an optimiser takes for a function that they nearly are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx

from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays import patterns

# Forms, most likely first; each gives None where it changes nothing.
_FORMS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto | None]] = {
    "constants near those of a known function are taken for them": patterns.snapped,
    "a rotation of uneven parts is taken for one of halves": patterns.halved,
}


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment as the function that it nearly is."""
    for name, taken in _FORMS.items():
        if (model := taken(segment.model)) is not None:
            yield Variant(name, model)


NOISE = Cause(
    id="implementation.near_match",
    type="operator implementation",
    title="A pattern is taken for a known function that it only nearly is",
    cause=(
        "Optimisers put one operator in place of a function that is written out, and look for it "
        "by its operators and constants within a tolerance: a GELU with 0.8 for √(2/π) becomes "
        "GELU."
    ),
    applies=(
        "constants of one element within 3 % of those that GELU, hard sigmoid, swish and mish are "
        "written with; Concat of −b and a, two parts of one tensor"
    ),
    source=(
        "OpenVINO, GeluFusion (constants are compared with a tolerance) and RoPEFusion (parts of "
        "the rotation); Hendrycks and Gimpel, GELU (2016); Su et al., RoFormer (2021)"
    ),
    advice=(
        "train and export with the function's own constants, or write it so that it does not look "
        "like it (an Identity that is an output between its operators)"
    ),
    forms=tuple(_FORMS),
    variants=_variants,
    simulated=False,
)
