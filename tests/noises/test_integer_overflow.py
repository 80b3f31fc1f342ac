"""Overflow by numpy: its integers wrap, and clipping is done in Python integers or float."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.noises import bf16, double_as_float, integer_overflow, narrowed_integers
from auditor.ports import Array
from tests.helpers import nodes_of
from tests.segments import explained, make_segment

ID = "precision.integer_overflow"
NOISES = (bf16.NOISE, double_as_float.NOISE, integer_overflow.NOISE, narrowed_integers.NOISE)
KINDS = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "int32": TensorProto.INT32}
OPERATIONS = {"Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b}


explain = partial(explained, NOISES)


def saturated(values: Any, kind: str) -> Array:
    limits = np.iinfo(kind)
    exact = [max(limits.min, min(limits.max, int(v))) for v in np.asarray(values).ravel()]
    return np.array(exact, kind).reshape(np.shape(values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op_type", OPERATIONS)
def test_saturating_arithmetic(generator: np.random.Generator, op_type: str, kind: str) -> None:
    limits = np.iinfo(kind)
    a, b = generator.integers(limits.min, limits.max, (2, 4, 40), kind, endpoint=True)
    segment = make_segment(f"y = {op_type}(a, b)", kind=KINDS[kind])
    exact = OPERATIONS[op_type](a.astype(object), b.astype(object))
    found = explain(segment, {"a": a, "b": b}, saturated(exact, kind))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_saturating_shifts(generator: np.random.Generator) -> None:
    a, b = generator.integers(0, 256, (4, 40), np.uint8), generator.integers(0, 8, 40, np.uint8)
    segment = make_segment('y = BitShift <direction = "LEFT"> (a, b)', kind=TensorProto.UINT8)
    exact = a.astype(object) << b.astype(object)
    found = explain(segment, {"a": a, "b": b}, saturated(exact, "uint8"))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_saturating_casts(generator: np.random.Generator) -> None:
    x = generator.integers(-1000, 1000, (4, 40)).astype(np.int32)
    segment = make_segment("y = Cast <to = 3> (x)", kind=TensorProto.INT32)
    found = explain(segment, {"x": x}, saturated(x, "int8"))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_16_bits_kept_in_32(generator: np.random.Generator) -> None:
    a, b = generator.integers(-3000, 3000, (2, 4, 40), np.int16)
    nodes = nodes_of("product = Mul(a, b) y = Cast <to = 1> (product)")
    segment = make_segment(nodes, {}, ["a", "b"], ["y"], kind=TensorProto.INT16)
    found = explain(segment, {"a": a, "b": b}, (a.astype(int) * b).astype(np.float32))
    assert (found.noise, found.bit_identical) == (ID, 1.0)
    nodes[0] = helper.make_node("Cast", ["x"], ["product"], to=TensorProto.INT16)
    segment = make_segment(nodes, {}, ["x"], ["y"])
    x = np.linspace(-1e5, 1e5, 77, dtype=np.float32)
    found = explain(segment, {"x": x}, np.trunc(x))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_quantised_values_that_wrap(generator: np.random.Generator) -> None:
    x = generator.standard_normal((4, 64)).astype(np.float32) * 4
    constants = {"s": np.asarray(0.03, np.float32), "z": np.asarray(3, np.int8)}
    segment = make_segment("y = QuantizeLinear(x, s, z)", constants)
    wrapped = (np.round(x / np.float32(0.03)).astype(np.int64) + 3).astype(np.int8)
    found = explain(segment, {"x": x}, wrapped)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_another_operand_is_another_cause(generator: np.random.Generator) -> None:
    a, b = generator.integers(0, 256, (2, 4, 40), np.uint8)
    segment = make_segment("y = Add(a, b)", kind=TensorProto.UINT8)
    for wrong in (a + np.roll(b, 1), a + b + np.uint8(1), a - b):
        assert explain(segment, {"a": a, "b": b}, wrong).noise is None


def test_float_segments_are_left_alone() -> None:
    segment = make_segment("y = Add(x, x)")
    assert not list(integer_overflow.NOISE.variants(segment))
