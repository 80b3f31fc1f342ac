"""Double models computed in float32 by numpy."""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import TensorProto, helper

from auditor.noises import bf16, double_as_float, fp16, integer_overflow, narrowed_integers, tf32
from auditor.ports import SegmentGraph
from tests.segments import explained, make_segment

ID = "precision.double_as_float"
NOISES = (bf16.NOISE, double_as_float.NOISE, fp16.NOISE, integer_overflow.NOISE)
NOISES += (narrowed_integers.NOISE, tf32.NOISE)  # type: ignore[assignment]


explain = partial(explained, NOISES)


def cancelling(kind: int) -> SegmentGraph:
    """(x · k + c) − c, which loses digits to c."""
    constants = {"k": np.array([0.1]), "c": np.array([1e5])}
    made: SegmentGraph = make_segment(
        "a = Mul(x, k) b = Add(a, c) y = Sub(b, c)", constants, kind=kind
    )
    return made


def test_arithmetic(generator: np.random.Generator) -> None:
    x = generator.standard_normal((4, 64))
    single = x.astype(np.float32) * np.float32(0.1) + np.float32(1e5) - np.float32(1e5)
    segment = cancelling(TensorProto.DOUBLE)
    found = explain(segment, {"x": x}, single.astype(np.float64))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_conversions_inside(generator: np.random.Generator) -> None:
    x = generator.standard_normal((4, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 11, [1], [3e6])),
        helper.make_node("Add", ["d", "c"], ["e"]),
        helper.make_node("Sub", ["e", "c"], ["f"]),
        helper.make_node("Cast", ["f"], ["y"], to=TensorProto.FLOAT),
    ]
    segment = make_segment(nodes, {}, ["x"], ["y"])
    found = explain(segment, {"x": x}, (x + np.float32(3e6)) - np.float32(3e6))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_branches_are_narrowed_too() -> None:
    branch = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", 11, [1], [0.1])),
            helper.make_node("Mul", ["x", "k"], ["r"]),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("r", TensorProto.DOUBLE, None)],
    )
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    segment = make_segment([node], {"yes": np.array(True)}, ["x"], ["y"], kind=TensorProto.DOUBLE)
    x = np.linspace(1, 2, 40)
    planted = (x.astype(np.float32) * np.float32(0.1)).astype(np.float64)
    found = explain(segment, {"x": x}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_defects_are_not_named(generator: np.random.Generator) -> None:
    x = generator.standard_normal((4, 64))
    segment = cancelling(TensorProto.DOUBLE)
    for wrong in (x * 0.1001, np.roll(x, 1, axis=1) * 0.1, x * 0.1 + 1e-3):
        assert explain(segment, {"x": x}, wrong).noise is None


def test_float_segments_are_left_alone() -> None:
    segment = make_segment("y = Exp(x)")
    assert not list(double_as_float.NOISE.variants(segment))


def test_what_is_beyond_float32_becomes_its_largest_number() -> None:
    """OpenVINO converts so; the square of a number within its range may also be beyond it."""
    x = np.array([1e200, 1e30, 1e-30, 3.0, -1e60])
    largest = float(np.finfo(np.float32).max)
    planted = np.array([largest, largest, 0.0, 9.0, largest])
    segment = make_segment("y = Mul(x, x)", kind=TensorProto.DOUBLE)
    found = explain(segment, {"x": x}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)
