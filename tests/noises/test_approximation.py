"""Functions replaced by cheaper ones, computed with numpy and PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper

from auditor.noises import approximation
from auditor.ports import Array, SegmentGraph, Variant
from tests.segments import diagnose, explain, make_segment

ID = "implementation.approximation"
erf = np.vectorize(math.erf)


def tanh_gelu(x: Array) -> Array:
    wide = x.astype(np.float64)
    inner = 0.7978845608028654 * (wide + 0.044715 * wide**3)
    return np.asarray(0.5 * wide * (1 + np.tanh(inner)), np.float32)


def erf_gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + erf(x.astype(np.float64) / math.sqrt(2))), np.float32)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x.astype(np.float64))), np.float32)


def hard(x: Array, slope: float) -> Array:
    return np.asarray(np.clip(x * np.float32(slope) + np.float32(0.5), 0, 1))


def schraudolph(x: Array) -> Array:
    """exp by writing into the exponent bits of a float32 (Schraudolph 1999, without his c)."""
    bits = np.floor((x.astype(np.float64) * math.log2(math.e) + 127) * 2**23)
    return np.maximum(bits, 0).astype(np.int64).astype(np.uint32).view(np.float32).reshape(x.shape)


def written_erf() -> Any:
    values = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
    constants = {k: np.array(v, np.float32) for k, v in values.items()}
    return make_segment(
        "z = Div(x, root) e = Erf(z) s = Add(e, one) p = Mul(x, s) y = Mul(p, half)", constants
    )


def written_tanh() -> Any:
    values = {"three": 3, "small": 0.044715, "root": math.sqrt(2 / math.pi), "one": 1, "half": 0.5}
    constants = {k: np.array(v, np.float32) for k, v in values.items()}
    return make_segment(
        "c = Pow(x, three) d = Mul(c, small) i = Add(x, d) u = Mul(i, root) t = Tanh(u) "
        "s = Add(t, one) h = Mul(x, half) y = Mul(h, s)",
        constants,
    )


def single(op_type: str, version: int = 20, **attributes: Any) -> Any:
    node = helper.make_node(op_type, ["x"], ["y"], **attributes)
    return make_segment([node], {}, ["x"], ["y"], opset=version)


@pytest.fixture
def x(generator: np.random.Generator) -> Array:
    return np.asarray(generator.standard_normal((8, 64)) * 2, np.float32)


def test_gelu_in_every_form(x: Array) -> None:
    quick = (x * sigmoid(np.float32(1.702) * x)).astype(np.float32)
    for segment, planted in (
        (written_erf(), tanh_gelu(x)),
        (written_erf(), quick),
        (written_tanh(), erf_gelu(x)),
        (single("Gelu"), tanh_gelu(x)),
        (single("Gelu"), quick),
        (single("Gelu", approximate="tanh"), erf_gelu(x)),
    ):
        found = diagnose(segment, {"x": x}, {"y": planted})
        assert found.noise == ID and found.explained > 0.999


def test_pytorch_gelu(x: Array) -> None:
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    observed = torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    assert diagnose(written_erf(), {"x": x}, {"y": observed}).noise == ID


@pytest.mark.parametrize(
    ("op_type", "attributes", "planted"),
    [
        ("Sigmoid", {}, lambda x: hard(x, 1 / 6)),
        ("Sigmoid", {}, lambda x: hard(x, 0.2)),
        ("Tanh", {}, lambda x: np.clip(x, -1, 1)),
        ("HardSigmoid", {}, lambda x: hard(x, 1 / 6)),
        ("HardSigmoid", {"alpha": 1 / 6}, sigmoid),
        ("HardSwish", {}, lambda x: x * hard(x, 0.2)),
        ("HardSwish", {}, lambda x: x * sigmoid(x)),
        ("Tanh", {}, lambda x: np.clip(x, -3, 3) * (27 + np.clip(x, -3, 3) ** 2)
         / (27 + 9 * np.clip(x, -3, 3) ** 2)),
        ("Exp", {}, schraudolph),
        ("Softmax", {}, lambda x: schraudolph(x - x.max(-1, keepdims=True))
         / schraudolph(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)),
    ],
)  # fmt: skip
def test_other_functions(x: Array, op_type: str, attributes: Any, planted: Any) -> None:
    segment = single(op_type, **attributes)
    if op_type == "Softmax":
        x = np.where(np.arange(x.shape[-1]) == 1, np.finfo(np.float32).min, x)  # a mask
    found = diagnose(segment, {"x": x}, {"y": np.asarray(planted(x), np.float32)})
    assert found.noise == ID and found.explained > 0.99


def test_a_tanh_that_cancels_near_0(x: Array) -> None:
    """As TVM computes it: of 1 − e⁻²ˣ a few steps are left."""
    small = x * np.float32(1e-7)
    power = np.exp(np.abs(small).astype(float) * -2).astype(np.float32)
    planted = np.sign(small) * ((1 - power) / (1 + power))
    found = diagnose(single("Tanh"), {"x": small}, {"y": planted})
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_wrong_functions_are_no_approximation(x: Array) -> None:
    for op_type, planted in (
        ("Sigmoid", sigmoid(x * np.float32(1.05))),
        ("Tanh", np.tanh(x) * np.float32(0.99)),
        ("Gelu", np.roll(erf_gelu(x), 1, axis=-1)),
    ):
        found = diagnose(single(op_type), {"x": x}, {"y": planted})
        assert found.noise is None


def test_a_tanh_that_is_no_gelu_is_not_rewritten() -> None:
    names = [v.name for v in approximation.NOISE.variants(single("Tanh"))]
    assert names and not any("GELU" in name for name in names)
    assert list(approximation.NOISE.variants(single("Relu"))) == []
    assert "FastMath" in approximation.NOISE.remedy("tvm")


def test_softmax_without_the_shift() -> None:
    """Rows whose largest value is beyond 88.7 become NaN, or zeros beside it."""
    x = np.random.default_rng(5).standard_normal((8, 20)).astype(np.float32) * 40
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp(x)
        planted = powers / powers.sum(1, keepdims=True, dtype=np.float32)
    assert 0 < np.isnan(planted).sum() < planted.size
    found = diagnose(single("Softmax"), {"x": x}, {"y": planted})
    assert found.noise == ID and "not shifted" in found.variant and found.explained > 0.99
    planted[0, :] = np.nan  # a row that does not overflow
    lost = np.where(np.isnan(planted).any(1, keepdims=True), np.nan, planted)[::-1].copy()
    assert diagnose(single("Softmax"), {"x": x}, {"y": lost}).noise != ID


def test_infinity_is_no_evidence_where_the_other_values_are_right() -> None:
    """ONNX Runtime's sigmoid never is 0, where others are and their logarithm is infinite."""
    segment = make_segment("s = Sigmoid(x) y = Log(s)")
    x = np.concatenate([np.linspace(-120, -90, 9), np.linspace(-15, 10, 99)])[None]
    x = x.astype(np.float32)
    with np.errstate(over="ignore", divide="ignore"):
        planted = np.log(np.float32(1) / (np.float32(1) + np.exp(-x)))
    fast = replace(approximation.NOISE, variants=_fast)
    for noise, named in ((approximation.NOISE, ID), (fast, None)):
        found = explain(segment, {"x": x}, {"y": planted}, [noise], thorough=False, floor=1e-5)
        assert found.noise == named


def _fast(segment: SegmentGraph) -> list[Variant]:
    return [v for v in approximation.NOISE.variants(segment) if "bits" in v.name]
