"""Subnormal numbers flushed by the processor itself, and with integer arithmetic on the bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from auditor.noises import denormals
from auditor.ports import Array
from tests.segments import diagnose, make_segment, run

ID = "implementation.denormals"


def flushed(values: Array) -> Array:
    """Values whose exponent bits are all zero lose their significand."""
    single = values.dtype == np.float32
    bits: Any = values.view(np.uint32 if single else np.uint16)
    exponent = bits & (0x7F800000 if single else 0x7C00)
    return np.where(exponent != 0, values, values.dtype.type(0))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_products_that_vanish(generator: np.random.Generator, kind: Any) -> None:
    half = kind is np.float16
    x = (generator.standard_normal((8, 32)) * (1e-3 if half else 1e-19)).astype(kind)
    w = np.array(1e-2 if half else 1e-19, kind)
    element = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    segment = make_segment("y = Mul(x, w)", {"w": w}, kind=element)
    exact = (x.astype(np.float64) * float(w)).astype(kind)
    planted = flushed(exact)
    assert 0.1 < np.mean(planted == exact) < 0.9 or half
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0
    assert diagnose(segment, {"x": x}, {"y": exact * kind(1.25)}).noise is None


def test_the_processor_itself(generator: np.random.Generator) -> None:
    """PyTorch with flush-to-zero and denormals-are-zero switched on."""
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    x = (generator.standard_normal((64, 64)) * 1e-38).astype(np.float32)
    w = (generator.standard_normal((64, 64)) * 2).astype(np.float32)
    b = (generator.standard_normal((64, 64)) * 1e-38).astype(np.float32)
    segment = make_segment("m = Mul(x, w) y = Add(m, b)", {"w": w, "b": b})
    operands = [torch.from_numpy(v) for v in (x, w, b)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        planted = (operands[0] * operands[1] + operands[2]).numpy()
    finally:
        torch.set_flush_denormal(False)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.bit_identical > 0.99


@pytest.mark.parametrize("version", [7, 17])
def test_normal_numbers_are_left_alone(generator: np.random.Generator, version: int) -> None:
    x = generator.standard_normal((4, 8)).astype(np.float32)
    x[0, :3] = np.nan, np.inf, -np.inf
    segment = make_segment("y = Exp(x)", opset=version)
    plain = run(segment.model, {"x": x})["y"]
    for variant in denormals.NOISE.variants(segment):
        np.testing.assert_array_equal(run(variant.model, {"x": x})["y"], plain)


def test_moving_values_flushes_nothing() -> None:
    assert list(denormals.NOISE.variants(make_segment("y = Transpose(x)"))) == []
    assert "CPU_DENORMALS_OPTIMIZATION" in denormals.NOISE.remedy("ov")


def test_the_roundings_to_float16_of_a_model_stay(generator: np.random.Generator) -> None:
    """ONNX Runtime leaves them out where it casts for operators that it has for float32 only."""
    x = generator.uniform(1, 2, 64).astype(np.float32)
    segment = make_segment(
        "half = Cast <to = 10> (x) wide = Cast <to = 1> (half) y = Mul(wide, wide)"
    )
    rounded = x.astype(np.float16).astype(np.float32)
    made = [run(variant.model, {"x": x})["y"] for variant in denormals.NOISE.variants(segment)]
    assert len(made) == 4 and all(np.array_equal(y, rounded * rounded) for y in made)
