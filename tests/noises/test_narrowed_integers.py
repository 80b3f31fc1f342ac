"""Narrow integers by numpy's views of the bytes and by its own casts."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.noises import bf16, double_as_float, integer_overflow, narrowed_integers
from auditor.ports import Array, Arrays, SegmentGraph
from tests.segments import explained, make_segment, run

ID = "precision.narrowed_integers"
NOISES = (bf16.NOISE, double_as_float.NOISE, integer_overflow.NOISE, narrowed_integers.NOISE)


explain = partial(explained, NOISES)


def low_half(values: Array) -> Array:
    """The lower 32 bits, as a little-endian machine stores them."""
    return np.ascontiguousarray(values, "<i8").view("<i4")[..., ::2]


@pytest.fixture
def numbers(generator: np.random.Generator) -> Arrays:
    a = generator.integers(-(2**40), 2**40, (4, 50))
    return {"a": a, "b": generator.integers(1, 2**34, (4, 50))}


def binary(op_type: str) -> SegmentGraph:
    made: SegmentGraph = make_segment(f"y = {op_type}(a, b)", kind=TensorProto.INT64)
    return made


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
def test_wrapping(numbers: Arrays, op_type: str) -> None:
    a, b = low_half(numbers["a"]), low_half(numbers["b"])
    with np.errstate(over="ignore"):
        planted = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}[op_type](a, b)
    found = explain(binary(op_type), numbers, planted.astype(np.int64))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_clipping(numbers: Arrays) -> None:
    near = {n: v % 2**33 for n, v in numbers.items()}
    largest = np.maximum(*(np.minimum(near[n], 2**31 - 1) for n in "ab"))
    found = explain(binary("Max"), near, largest)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_unsigned_numbers_with_a_sign(generator: np.random.Generator, kind: Any) -> None:
    feeds = {"a": generator.integers(0, 2**32, (4, 50)).astype(kind)}
    feeds["b"] = generator.integers(1, 9, (4, 50)).astype(kind)
    segment = binary("Mod")
    segment.model.graph.node[0].input[0] = "s"
    shift = helper.make_node("BitShift", ["a", "b"], ["s"], direction="RIGHT")
    segment.model.graph.node.insert(0, shift)
    for value in (*segment.model.graph.input, *segment.model.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    a, b = (v.astype(np.uint32).view(np.int32) for v in feeds.values())
    found = explain(segment, feeds, np.mod(a >> b, b).astype(kind))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_division_in_float(numbers: Arrays) -> None:
    a, b = (low_half(numbers[n]).astype(np.float32) for n in "ab")
    planted = np.trunc(a / b).astype(np.int64)
    found = explain(binary("Div"), numbers, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_a_divisor_that_narrows_to_zero_ends_no_process() -> None:
    feeds = {"a": np.array([7, 2**40]), "b": np.array([2**32, 2**32])}
    found = explain(binary("Div"), feeds, np.array([5, 5]))
    assert found.hypotheses


@pytest.mark.parametrize("most", [-(2**31), 2**31 - 1])
def test_casts_that_do_not_fit(most: int) -> None:
    """What is too large becomes x86's indefinite integer, or the largest one."""
    x = np.array([[3e9, -3e9, 7.7, -1.5, 2.5e9, -2.5e9]], np.float32)
    segment = make_segment("y = Cast <to = 7> (x)")
    planted = np.array([[most, -(2**31), 7, -1, most, -(2**31)]])
    found = explain(segment, {"x": x}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


@pytest.mark.parametrize("op_type", ["Sub", "Mod"])
def test_integers_in_float32(generator: np.random.Generator, op_type: str) -> None:
    feeds = {n: generator.integers(2**26, 2**30, (4, 50)).astype(np.int32) for n in "ab"}
    feeds["b"] //= 2**20 if op_type == "Mod" else 1
    segment = make_segment(f"y = {op_type}(a, b)", kind=TensorProto.INT32)
    a, b = (feeds[n].astype(np.float32) for n in "ab")
    planted = a - b if op_type == "Sub" else a - np.floor(a / b) * b
    found = explain(segment, feeds, planted.astype(np.int32))
    assert (found.noise, found.bit_identical) == (ID, 1.0)
    if op_type == "Mod":  # behind arithmetic that wraps
        segment.model.graph.node.insert(0, helper.make_node("Mul", ["x", "x"], ["a"]))
        segment.model.graph.input[0].name = "x"
        feeds["x"] = feeds.pop("a")
        a = (feeds["x"] * feeds["x"]).astype(np.float32)
        found = explain(segment, feeds, (a - np.floor(a / b) * b).astype(np.int32))
        assert (found.variant, found.bit_identical) == ("divided in float32", 1.0)


@pytest.mark.parametrize("reduction", ["none", "add", "max"])
def test_scattered_numbers(numbers: Arrays, reduction: str) -> None:
    node = helper.make_node("ScatterElements", ["a", "at", "b"], ["y"], axis=1, reduction=reduction)
    at = np.tile(np.arange(50) // 2 if reduction != "none" else np.arange(50), (4, 1))
    segment = make_segment([node], {"at": at}, ["a", "b"], ["y"], opset=18, kind=TensorProto.INT64)
    narrow = {n: low_half(v).astype(np.int64) for n, v in numbers.items()}
    planted = run(segment.model, narrow)["y"]
    found = explain(segment, numbers, low_half(planted).astype(np.int64))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_padding_that_does_not_fit() -> None:
    """A value that passes a float on its way to 32 bits becomes x86's indefinite integer."""
    constants = {"amounts": np.array([0, 1, 0, 2]), "value": np.array(2**40)}
    segment = make_segment("y = Pad(a, amounts, value)", constants, kind=TensorProto.INT64)
    a = np.arange(60).reshape(2, 30)
    planted = np.pad(a, ((0, 0), (1, 2)), constant_values=-(2**31))
    found = explain(segment, {"a": a}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_limits_of_narrow_numbers(generator: np.random.Generator) -> None:
    """Of unsigned numbers those from 2³¹ on are below every limit."""
    constants = {"low": np.array(2, np.uint32), "high": np.array(50, np.uint32)}
    segment = make_segment("y = Clip(a, low, high)", constants, kind=TensorProto.UINT32)
    a = generator.integers(0, 2**32, (4, 50)).astype(np.uint32)
    planted = np.clip(a.view(np.int32), 2, 50).astype(np.uint32)
    found = explain(segment, {"a": a}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_powers_that_do_not_fit() -> None:
    a = np.arange(1, 41).reshape(2, 20)
    segment = make_segment("y = Pow(a, b)", {"b": np.array(9)}, kind=TensorProto.INT64)
    power = np.power(a.astype(np.float32), np.float32(9))
    planted = np.where(power < 2**31, power, -(2**31)).astype(np.int64)
    found = explain(segment, {"a": a}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_real_numbers_to_the_power_of_integers_are_no_integers() -> None:
    nodes = "n = Cast <to = 7> (i) y = Pow(x, n)"
    segment = make_segment(nodes, inputs=["x", "i"], outputs=["y"])
    feeds = {"x": np.array([2, 3], np.float32), "i": np.array([2, -1], np.float32)}
    for variant in narrowed_integers.NOISE.variants(segment):
        np.testing.assert_allclose(run(variant.model, feeds)["y"], [4, 1 / 3], rtol=1e-6)


def test_ends_that_are_computed() -> None:
    """The largest int64, "to the end", is -1 in 32 bits; a constant means what it says."""
    a, end = np.arange(200, dtype=np.float32).reshape(2, 100), np.array([2**63 - 1])
    node = "y = Slice(a, start, end, axes)"
    fixed = {"start": np.array([1]), "axes": np.array([1])}
    segment = make_segment(node, fixed, inputs=["a", "end"])
    segment.model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    found = explain(segment, {"a": a, "end": end}, a[:, 1:-1])
    assert (found.noise, found.bit_identical) == (ID, 1.0)
    constant = make_segment(node, fixed | {"end": end})
    assert not list(narrowed_integers.NOISE.variants(constant))


def test_defects_are_not_named(generator: np.random.Generator) -> None:
    """Numbers that fit: whatever is wrong with them, it is not their width."""
    feeds = {n: generator.integers(1, 2**15, (4, 50)) for n in "ab"}
    for op_type, wrong in (
        ("Add", feeds["a"] - feeds["b"]),
        ("Mul", feeds["a"] * np.roll(feeds["b"], 1)),
        ("Div", -(-feeds["a"] // feeds["b"])),
    ):
        assert explain(binary(op_type), feeds, wrong).noise is None


def test_shapes_are_left_alone() -> None:
    segment = make_segment(
        "s = Shape(x) t = Mul(s, two) y = Expand(x, t)", {"two": np.array([2, 2])}
    )
    assert not list(narrowed_integers.NOISE.variants(segment))


@pytest.mark.parametrize("divided", [False, True])
def test_constants_that_are_joined_and_clipped(divided: bool) -> None:
    """OpenVINO joins 9 · 2³⁰ in 64 bits and holds 2³¹ − 1; the product then wraps around."""
    x = np.arange(-25, 25)
    constants = {"a": np.array(2**30), "b": np.array(-1), "c": np.array(9), "d": np.array(7)}
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("Mul", ["s", "c"], ["m" if divided else "y"]),
    ]
    planted = low_half(np.stack([x * (2**31 - 1) - 9]))[0].astype(np.int64)
    if divided:
        nodes.append(helper.make_node("Div", ["m", "d"], ["y"]))
        planted = np.trunc(planted.astype(np.float32) / np.float32(7)).astype(np.int64)
    else:
        del constants["d"]
    segment = make_segment(nodes, constants, ["x"], ["y"], kind=TensorProto.INT64)
    found = explain(segment, {"x": x}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)
    assert "joined" in (found.variant or "")


def test_remainders_in_float(generator: np.random.Generator) -> None:
    """A remainder with the dividend's sign is a − trunc(a / b) · b."""
    a = generator.integers(-(2**30), 2**30, 60).astype(np.int32)
    nodes = [helper.make_node("Mod", ["a", "b"], ["y"], fmod=1)]
    constants = {"b": np.array(7, np.int32)}
    segment = make_segment(nodes, constants, ["a"], ["y"], kind=TensorProto.INT32)
    real = a.astype(np.float32)
    planted = real - np.trunc(real / np.float32(7)) * np.float32(7)
    found = explain(segment, {"a": a}, planted.astype(np.int32))
    assert (found.noise, found.bit_identical) == (ID, 1.0)
