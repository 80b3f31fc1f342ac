"""Planted half precision, computed with numpy: no code is shared with the surgery."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from onnx import TensorProto, helper

from auditor.noises import fp16
from auditor.ports import Array
from auditor.records.backend import Kernel
from tests.segments import conv, explain, make_segment

ID = "precision.fp16"


def r(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def conv_segment(generator: np.random.Generator, kernels: tuple[Kernel, ...]) -> Any:
    w = generator.standard_normal((8, 6, 3, 3)).astype(np.float32)
    b = generator.standard_normal(8).astype(np.float32)
    return (
        make_segment("c = Conv(x, w, b) y = Relu(c)", {"w": w, "b": b}, kernels=kernels),
        w,
        b[:, None, None],
    )


def test_constants_that_describe_a_shape_are_not_rounded(generator: np.random.Generator) -> None:
    """In half precision 1.1 is less than that, and would make one row fewer of ten."""
    x = generator.standard_normal((1, 1, 10, 10)).astype(np.float32)
    factor = np.array(0.3, np.float32)
    segment = make_segment(
        [
            helper.make_node("Mul", ["x", "factor"], ["m"]),
            helper.make_node(
                *("Resize", ["m", "", "scales"], ["y"]),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
        ],
        {"factor": factor, "scales": np.array([1, 1, 1.1, 1], np.float32)},
        ["x"],
        ["y"],
    )
    rows = [0, 0, *range(1, 10)]
    found = explain(segment, {"x": x}, {"y": (x * r(factor))[:, :, rows]})
    assert (found.noise, found.variant) == (ID, "every constant in fp16")
    assert found.explained > 0.9999


def test_half_precision_hint_rounds_the_bias_too(generator: np.random.Generator) -> None:
    stated = Kernel("conv", "Convolution", ("c", "y"), ("y",), "", "f16", "f16")
    segment, w, b = conv_segment(generator, (stated,))
    x = r(generator.standard_normal((1, 6, 9, 9)))
    found = explain(segment, {"x": x}, {"y": r(np.maximum(conv(x, r(w)) + r(b), 0))})
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical > 0.99
    assert max(h.explained for h in found.hypotheses if h.noise == "precision.bf16") < 0


def test_model_saved_with_half_precision_constants(generator: np.random.Generator) -> None:
    stated = Kernel("conv", "Convolution", ("c", "y"), ("y",), "", "f32", "f32")
    segment, w, b = conv_segment(generator, (stated,))
    x = generator.standard_normal((1, 6, 9, 9)).astype(np.float32)
    found = explain(segment, {"x": x}, {"y": np.maximum(conv(x, r(w)) + r(b), 0)})
    assert (found.noise, found.variant) == (ID, "every constant in fp16")
    assert found.explained > 0.9999


@pytest.mark.parametrize(("dtype", "noise"), [(np.float16, ID), (bfloat16, "precision.bf16")])
def test_only_a_result_is_stored_narrowly(
    generator: np.random.Generator, dtype: Any, noise: str
) -> None:
    segment, w, b = conv_segment(generator, ())
    x = generator.standard_normal((1, 6, 9, 9)).astype(np.float32)
    stored = np.maximum(conv(x, w) + b, 0).astype(dtype).astype(np.float32)
    found = explain(segment, {"x": x}, {"y": stored})
    assert found.noise == noise and found.bit_identical > 0.99


def test_converters_store_what_is_too_large_as_the_largest(generator: np.random.Generator) -> None:
    variance = np.array([3.0, 2e5, 9.8e7], np.float32)
    ones = {n: np.full(3, v, np.float32) for n, v in (("s", 1), ("b", 0.5), ("m", 0.25))}
    segment = make_segment("y = BatchNormalization(x, s, b, m, v)", {**ones, "v": variance})
    x = generator.standard_normal((1, 3, 5, 5)).astype(np.float32) * 1e4
    stored = np.minimum(variance, np.float32(65504)).astype(np.float16).astype(np.float32)
    y = (x - 0.25) / np.sqrt(stored + np.float32(1e-5))[None, :, None, None] + 0.5
    found = explain(segment, {"x": x}, {"y": y})
    assert (found.noise, found.variant) == (ID, "every constant in fp16, at most 65504")
    assert found.explained > 0.9999
    without = {h.variant: h.explained for h in found.hypotheses if h.noise == ID}
    assert "every constant in fp16" not in without or without["every constant in fp16"] < 0.9


def test_overflow_is_faithful() -> None:
    x = np.linspace(-300, 300, 601, dtype=np.float32)[None]
    segment = make_segment("y = Mul(x, x)")
    planted = r(r(x) * r(x))
    assert np.isinf(planted).any()
    found = explain(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical == 1.0
    saturated = np.where(np.isinf(planted), np.float32(65504), planted)
    assert explain(segment, {"x": x}, {"y": saturated}).noise is None


def test_what_is_infinite_tells_no_format_from_the_one_that_the_engine_states() -> None:
    nodes = "y = Mul(x, c)"
    x = np.arange(-8, 8, dtype=np.float32)[None]  # exact in every format
    weights = {"c": np.float32(1 << 20)}
    with np.errstate(invalid="ignore"):
        planted = x * np.float32(np.inf)
    stated = Kernel("y", "Subgraph", ("y",), ("y",), "", "bf16", "bf16")
    for kernels, noise in (((), ID), ((stated,), None)):
        segment = make_segment(nodes, weights, kernels=kernels)
        assert explain(segment, {"x": x}, {"y": planted}).noise == noise
    few = {"x": x[:, 7:12]}  # four values that became infinite tell nothing
    segment = make_segment(nodes, weights)
    assert explain(segment, few, {"y": planted[:, 7:12]}).noise is None


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Conv", "grouped Conv"])
@pytest.mark.parametrize("typed", [np.float16, np.float32])
def test_running_sums(generator: np.random.Generator, kind: str, typed: Any) -> None:
    """Every product and every partial sum is rounded, in order, as TVM does in float16."""
    element = TensorProto.FLOAT16 if typed is np.float16 else TensorProto.FLOAT
    b = r(generator.standard_normal(12))
    if kind in ("MatMul", "Gemm"):
        x, w = r(generator.standard_normal((9, 64))), r(generator.standard_normal((64, 12)) / 8)
        total = np.zeros((9, 12), np.float32)
        for k in range(64):
            total = r(total + r(x[:, k, None] * w[None, k]))
        planted = r(total + b) if kind == "Gemm" else total
        node = helper.make_node(kind, ["x", "w", "b"] if kind == "Gemm" else ["x", "w"], ["y"])
    else:
        groups = 4 if kind == "grouped Conv" else 1
        x = r(generator.standard_normal((2, 8, 7, 7)))
        w = r(generator.standard_normal((12, 8 // groups, 3, 3)) / 6)
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        total = np.zeros((2, 12, 4, 4), np.float32)
        for o in range(12):
            first = o // (12 // groups) * (8 // groups)
            for c, i, j in np.ndindex(w.shape[1:]):
                seen = padded[:, first + c, i : i + 7 : 2, j : j + 7 : 2]
                total[:, o] = r(total[:, o] + r(seen * w[o, c, i, j]))
        planted = r(total + b[:, None, None])
        node = helper.make_node(
            "Conv", ["x", "w", "b"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1], group=groups
        )
    constants = {"w": w.astype(typed), "b": b.astype(typed)}
    segment = make_segment([node], constants, ["x"], ["y"], kind=element)
    found = explain(segment, {"x": x.astype(typed)}, {"y": planted.astype(typed)})
    assert found.noise == ID and "running sums" in found.variant
    assert found.explained > 0.999 and found.bit_identical > 0.999


def _exp(x: Array) -> Array:
    return np.exp(x.astype(np.float32)).astype(np.float16)


def _log(x: Array) -> Array:
    return np.log(x.astype(np.float32)).astype(np.float16)


def _in_order(x: Array, axis: int) -> Array:
    """A sum along an axis of which every running sum is rounded; the axis stays."""
    total = np.zeros_like(np.take(x, 0, axis))
    for index in range(x.shape[axis]):
        total = total + np.take(x, index, axis)
    return np.expand_dims(total, axis)


def _planted(kind: str, x: Array, *constants: Array) -> Array:
    """What TVM makes of float16: numpy's own arithmetic rounds every step too."""
    one, three, six = map(np.float16, (1, 3, 6))
    across = [c.reshape(-1, 1, 1) for c in constants]
    if kind == "Sigmoid":
        return one / (one + _exp(-x))
    if kind == "HardSigmoid":
        return np.clip(x * np.float16(0.2) + np.float16(0.5), 0, one)
    if kind == "HardSwish":
        return x * (np.clip(x + three, 0, six) / six)
    if kind == "Softplus":
        return np.maximum(x, 0) + _log(one + _exp(-np.abs(x)))
    if kind == "Tanh":
        power = _exp(-2 * np.abs(x))
        return np.sign(x) * ((one - power) / (one + power))
    if kind in ("Softmax", "LogSoftmax"):
        below = x - x.max(1, keepdims=True)
        power = _exp(below)
        total = _in_order(power, 1)
        return power / total if kind == "Softmax" else below - _log(total)
    if kind == "BatchNormalization":
        gamma, beta, mean, variance = across
        width = np.sqrt(variance.astype(np.float32) + np.float32(1e-5))
        return (x - mean).astype(np.float32) / width * gamma + beta
    if kind == "LayerNormalization":
        wide = x.astype(np.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        width = np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(1e-5))
        return (centred / width).astype(np.float16) * constants[0] + constants[1]

    def mean_of(values: Array) -> Array:
        rows = values.reshape(*values.shape[:2], -1)
        return (_in_order(rows, 2) / np.float16(rows.shape[2]))[..., None]

    assert kind == "InstanceNormalization"
    centred = x - mean_of(x)
    normal = centred / np.sqrt(mean_of(centred * centred) + np.float16(1e-5))
    return normal * across[0] + across[1]


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [
        ("Tanh", [], {}),
        ("Sigmoid", [], {}),
        ("HardSigmoid", [], {}),
        ("HardSwish", [], {}),
        ("Softplus", [], {}),
        ("Softmax", [], {"axis": 1}),
        ("LogSoftmax", [], {"axis": 1}),
        ("InstanceNormalization", [5, 5], {}),
        ("BatchNormalization", [5, 5, 5, 5], {}),
        ("LayerNormalization", [9, 9], {}),
    ],
)
def test_operators_written_out_in_float16(
    generator: np.random.Generator, kind: str, sizes: list[int], options: dict[str, int]
) -> None:
    x = generator.standard_normal((2, 5, 8, 9)).astype(np.float16)
    values = [np.abs(generator.standard_normal(size)).astype(np.float16) for size in sizes]
    constants = {f"c{i}": value.astype(np.float32) for i, value in enumerate(values)}
    planted = _planted(kind, x, *values)
    assert planted.dtype == (np.float32 if kind == "BatchNormalization" else np.float16)
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["h"]),
        helper.make_node(kind, ["h", *constants], ["y"], **options),
    ]
    segment = make_segment(nodes, {**constants, "shape": np.array(x.shape)})
    given = {"x": x.reshape(10, -1).astype(np.float32)}
    found = explain(segment, given, {"y": planted.astype(np.float32)})
    assert found.noise == ID and "running sums" in (found.variant or "")
    assert found.explained > 0.999 and found.bit_identical > 0.999


@pytest.mark.parametrize("named", [True, False])
def test_a_kernel_of_several_operators_reads_every_constant_in_half(
    generator: np.random.Generator, named: bool
) -> None:
    """As ONNX Runtime adds what skips a layer and normalises: in float32 between float16."""
    x, skipped = (r(generator.standard_normal((6, 64))) for _ in range(2))
    bias, gamma, beta = (generator.standard_normal(64).astype(np.float32) for _ in range(3))
    total = x + skipped + r(bias)
    centred = total - total.mean(-1, keepdims=True)
    width = np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(1e-5))
    planted = r(centred / width * r(gamma) + r(beta))
    kernel = Kernel("k", "SkipLayerNormalization", ("b", "t", "y"), ("y",), "", "f16", "f16")
    segment = make_segment(
        "b = Add(x, bias) t = Add(b, skipped) y = LayerNormalization(t, gamma, beta)",
        {"bias": bias, "gamma": gamma, "beta": beta},
        ["x", "skipped"],
        kernels=[kernel] if named else [],
    )
    found = explain(segment, {"x": x, "skipped": skipped}, {"y": planted})
    assert found.noise == ID and found.explained > 0.99


def test_running_sums_are_not_tried_where_the_engine_reports_float32() -> None:
    node = "y = MatMul(x, w)"
    stated = (Kernel("k", "FullyConnected", ("y",), ("y",), "", "f32", "f32"),)
    constants = {"w": np.eye(3, dtype=np.float32)}
    spoken = make_segment(node, constants, kernels=stated)
    silent = make_segment(node, constants)
    assert not any("sums" in v.name for v in fp16.NOISE.variants(spoken))
    assert any("sums" in v.name for v in fp16.NOISE.variants(silent))


def test_remedies_name_the_switch() -> None:
    assert "compress_to_fp16=False" in fp16.NOISE.remedy("ov")
    assert fp16.NOISE.remedy("somewhere else")


def test_running_sums_of_several_products(generator: np.random.Generator) -> None:
    """Two loops of other sizes in one segment."""
    x, v, w = (
        r(generator.standard_normal(shape) / 4).astype(np.float32)
        for shape in ((5, 32), (32, 48), (48, 7))
    )
    value = x
    for weights in (v, w):
        total = np.zeros((5, weights.shape[1]), np.float32)
        for k in range(len(weights)):
            total = r(total + r(value[:, k, None] * weights[None, k]))
        value = total
    segment = make_segment("h = MatMul(x, v) y = MatMul(h, w)", {"v": v, "w": w})
    found = explain(segment, {"x": x}, {"y": value})
    assert found.noise == ID and "running sums" in found.variant
    assert found.explained > 0.999 and not found.failures
