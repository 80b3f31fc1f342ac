"""Planted half precision, computed with numpy: no code is shared with the surgery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper

from auditor.noises import fp16
from auditor.ports import Array
from auditor.records import Kernel

ID = "precision.fp16"


def r(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def conv_segment(
    make_segment: Any, generator: np.random.Generator, kernels: tuple[Kernel, ...]
) -> Any:
    w = generator.standard_normal((8, 6, 3, 3)).astype(np.float32)
    b = generator.standard_normal(8).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return make_segment(nodes, {"w": w, "b": b}, ["x"], ["y"], kernels), w, b[:, None, None]


def test_half_precision_hint_rounds_the_bias_too(
    make_segment: Any, explain: Any, conv: Callable[..., Array], generator: np.random.Generator
) -> None:
    stated = Kernel("conv", "Convolution", ("c", "y"), ("y",), "", "f16", "f16")
    segment, w, b = conv_segment(make_segment, generator, (stated,))
    x = r(generator.standard_normal((1, 6, 9, 9)))
    found = explain(segment, {"x": x}, {"y": r(np.maximum(conv(x, r(w)) + r(b), 0))})
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical > 0.99
    assert max(h.explained for h in found.hypotheses if h.noise == "precision.bf16") < 0


def test_model_saved_with_half_precision_constants(
    make_segment: Any, explain: Any, conv: Callable[..., Array], generator: np.random.Generator
) -> None:
    stated = Kernel("conv", "Convolution", ("c", "y"), ("y",), "", "f32", "f32")
    segment, w, b = conv_segment(make_segment, generator, (stated,))
    x = generator.standard_normal((1, 6, 9, 9)).astype(np.float32)
    found = explain(segment, {"x": x}, {"y": np.maximum(conv(x, r(w)) + r(b), 0)})
    assert (found.noise, found.variant) == (ID, "every constant in fp16")
    assert found.explained > 0.9999


def test_overflow_is_faithful(make_segment: Any, explain: Any) -> None:
    x = np.linspace(-300, 300, 601, dtype=np.float32)[None]
    segment = make_segment([helper.make_node("Mul", ["x", "x"], ["y"])], {}, ["x"], ["y"])
    planted = r(r(x) * r(x))
    assert np.isinf(planted).any()
    found = explain(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical == 1.0
    saturated = np.where(np.isinf(planted), np.float32(65504), planted)
    assert explain(segment, {"x": x}, {"y": saturated}).noise is None


def test_remedies_name_the_switch() -> None:
    assert "compress_to_fp16=False" in fp16.NOISE.remedy("ov")
    assert fp16.NOISE.remedy("somewhere else")
