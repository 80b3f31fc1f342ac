"""Planted TensorFloat-32, rounded with integer arithmetic on the bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from auditor.noises import tf32
from auditor.ports import Array, Arrays
from auditor.records.backend import Kernel
from tests.segments import explain, make_segment

ID = "precision.tf32"


def r(values: Array) -> Array:
    """cvt.rna.tf32: to nearest, ties away from zero, 10 stored bits of significand."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.fixture
def product(generator: np.random.Generator) -> tuple[Any, Arrays]:
    x = generator.standard_normal((6, 64)).astype(np.float32)
    w = generator.standard_normal((64, 32)).astype(np.float32) / 8
    b = generator.standard_normal(32).astype(np.float32)
    return make_segment("y = Gemm(x, w, b)", {"w": w, "b": b}), {"x": x, "w": w, "b": b}


def test_operands_are_rounded_and_nothing_else(product: tuple[Any, Arrays]) -> None:
    segment, t = product
    planted = (r(t["x"]).astype(np.float64) @ r(t["w"]) + t["b"]).astype(np.float32)
    found = explain(segment, {"x": t["x"]}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999
    assert found.variant == tf32.SITES[0].name


def test_statement_breaks_the_tie_with_half_precision_weights(product: tuple[Any, Arrays]) -> None:
    segment, t = product
    planted = (t["x"].astype(np.float64) @ r(t["w"]) + t["b"]).astype(np.float32)
    stated = (Kernel("k", "Gemm", ("y",), ("y",), "", "tf32", "f32"),)
    spoken = type(segment)(segment.model, stated)
    found = explain(spoken, {"x": t["x"]}, {"y": planted})
    assert (found.noise, found.variant) == (ID, "weights in tf32")
    assert found.explained > 0.9999


def test_segments_without_products_are_not_touched() -> None:
    segment = make_segment("y = Exp(x)")
    assert list(tf32.NOISE.variants(segment)) == []
