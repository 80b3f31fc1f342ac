"""NaN and infinity laundered, with numpy's comparisons and by real runtimes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.noises import nonfinite
from auditor.ports import Array
from tests.segments import diagnose, make_segment, run

ID = "implementation.nonfinite"
NAN, INF = np.nan, np.inf


def wrapped(op_type: str, **attributes: Any) -> Any:
    return make_segment(
        [helper.make_node(op_type, ["x"], ["y"], **attributes)], {}, ["x"], ["y"], opset=18
    )


def floats(*values: float) -> Array:
    return np.array([values], np.float32)


@pytest.mark.parametrize(
    ("op_type", "x", "planted"),
    [
        ("Relu", (NAN, -1, 5), (0, 0, 5)),
        ("Exp", (NAN, 0, -2), (INF, 1, np.exp(-2))),
        ("HardSigmoid", (NAN, 1, -9), (1, 0.7, 0)),
        ("Tanh", (NAN, 0.5, 2), (-1, np.tanh(0.5), np.tanh(2))),
        ("Sign", (NAN, 3, -2), (0, 1, -1)),
        ("Elu", (NAN, 3, 2), (0, 3, 2)),
        ("ThresholdedRelu", (-INF, 0.5, 2), (NAN, 0, 2)),
        ("ThresholdedRelu", (NAN, 0.5, 2), (NAN, 0, 2)),
        ("Relu", (-INF, 3, -2), (NAN, 3, 0)),
        ("Shrink", (-INF, 3, -0.2), (NAN, 3, 0)),
        ("Softsign", (-INF, 3, 1), (-1, 0.75, 0.5)),
        ("HardSwish", (-INF, 4, 3), (0, 4, 3)),
    ],
)
def test_elementwise(op_type: str, x: Any, planted: Any) -> None:
    segment = wrapped(op_type)
    found = diagnose(segment, {"x": floats(*x)}, {"y": floats(*planted)})
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical > 0.3


def test_limits_and_maxima() -> None:
    x = floats(NAN, -2, 9)
    limits = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    segment = make_segment("c = Clip(x, low, high) m = Max(x, low)", limits)
    observed = {"c": floats(0, 0, 6), "m": floats(0, 0, 9)}
    found = diagnose(segment, {"x": x}, observed)
    assert found.noise == ID and found.bit_identical == 1.0


def test_propagation_where_the_reference_drops_a_nan() -> None:
    x = floats(3, NAN, 2)
    segment = wrapped("ReduceMax", keepdims=0)
    assert diagnose(segment, {"x": x}, {"y": np.max(x)}).noise == ID


def test_comparison_that_forgets_what_came_before() -> None:
    """``best > new ? best : new`` in a loop, as a scalar kernel does it."""
    x = np.array([[2, NAN, 1, 0.5], [1, 3, 0, NAN], [5, NAN, 1, 4]], np.float32)
    planted = []
    for row in x:
        best = 0
        for i in range(1, len(row)):
            best = best if row[best] > row[i] else i
        planted.append(best)
    segment = wrapped("ArgMax", axis=1, keepdims=0)
    found = diagnose(segment, {"x": x}, {"y": np.array(planted)})
    assert found.noise == ID and "later" in (found.variant or "")


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMin", "GlobalMaxPool"])
def test_a_reduction_that_forgets_what_came_before(op_type: str) -> None:
    """MAXPS with the new value as its second operand: a NaN makes it begin again."""
    x = np.array([[[9, NAN, 1, 3], [4, 2, 5, 1], [7, 1, 8, NAN]]], np.float32)
    if op_type == "ReduceMin":
        x = -x
    best = x[..., 0]
    for i in range(1, x.shape[-1]):
        new = x[..., i]
        best = np.where(best < new if op_type == "ReduceMin" else best > new, best, new)
    planted = best[..., None]
    assert planted.ravel()[:2].tolist() == ([-3, -5] if op_type == "ReduceMin" else [3, 5])
    assert np.isnan(planted.ravel()[2])
    nodes = f"y = {op_type}(x)" if op_type == "GlobalMaxPool" else f"y = {op_type}(x, axes)"
    segment = make_segment(nodes, {"axes": np.array([-1])}, ["x"], ["y"], opset=18)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and "later" in (found.variant or "") and found.bit_identical == 1.0


def test_a_maximum_begins_at_the_lowest_finite_number() -> None:
    x = np.array([[1, NAN, 3, 4], [2, 3, 1, 0], [-INF, -INF, 5, NAN], [-INF, -INF, 7, 1]])
    x = x[None, None].astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), (2, 3))
    planted = np.fmax.reduce(windows, (4, 5), initial=np.finfo(np.float32).min)
    found = diagnose(wrapped("MaxPool", kernel_shape=[2, 2]), {"x": x}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0


def test_a_global_maximum_without_its_nan() -> None:
    x = np.array([[[9, NAN, 1, 3], [NAN, 2, 5, 1]]], np.float32)
    segment = wrapped("GlobalMaxPool")
    for planted in (np.nanmax(x, -1, keepdims=True), np.max(x, -1, keepdims=True)):
        measured = nonfinite.NOISE.variants(segment)
        assert any(
            np.array_equal(run(variant.model, {"x": x})["y"], planted, equal_nan=True)
            for variant in measured
        )


def test_the_largest_step_of_8_bits() -> None:
    constants = {"s": np.array(0.5, np.float32), "z": np.array(1, np.uint8)}
    segment = make_segment("y = QuantizeLinear(x, s, z)", constants)
    planted = np.array([[255, 3, 5]], np.uint8)
    found = diagnose(segment, {"x": floats(NAN, 1, 2)}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0


@pytest.mark.parametrize("op_type", ["Max", "Min"])
@pytest.mark.parametrize("last", [True, False])
def test_one_of_two_operands_wins(op_type: str, last: bool) -> None:
    """MAXPS gives its second operand where either is NaN."""
    a, b = floats(NAN, 1, 4, 2), floats(1, NAN, 3, 5)
    better = np.greater if op_type == "Max" else np.less
    planted = np.where(better(a, b), a, b) if last else np.where(better(b, a), b, a)
    segment = make_segment(f"y = {op_type}(a, b)")
    found = diagnose(segment, {"a": a, "b": b}, {"y": planted})
    assert found.noise == ID and ("later" if last else "earlier") in (found.variant or "")


def test_masked_attention_row() -> None:
    """A row of −∞ has no softmax; with the lowest finite number instead it is uniform."""
    x = np.array([[0, 1, -INF, -INF], [-INF] * 4], np.float32)
    e = np.exp(np.array([0.0, 1.0]))
    planted = np.array([[*(e / e.sum()), 0, 0], [0.25] * 4], np.float32)
    found = diagnose(wrapped("Softmax", axis=-1), {"x": x}, {"y": planted})
    assert found.noise == ID and "operands" in (found.variant or "")


def test_an_infinite_score_has_no_name() -> None:
    """Two ways lead there: e^∞ over itself, or ∞ − ∞, of which a clamped e^x makes ∞."""
    planted = np.array([[NAN, 0, 0]], np.float32)
    found = diagnose(wrapped("Softmax"), {"x": floats(INF, 1, 2)}, {"y": planted})
    assert found.noise is None


def test_infinity_saturates_in_a_conversion() -> None:
    segment = wrapped("Cast", to=TensorProto.DOUBLE)
    planted = np.array([[3.4028234663852886e38, -3.4028234663852886e38, 2.0]])
    assert diagnose(segment, {"x": floats(INF, -INF, 2)}, {"y": planted}).noise == ID


def test_a_lost_nan_in_the_wrong_place_is_unexplained() -> None:
    x = floats(NAN, -1, 5, 7)
    segment = wrapped("Relu")
    assert diagnose(segment, {"x": x}, {"y": floats(NAN, NAN, 5, 7)}).noise is None
    assert diagnose(segment, {"x": x}, {"y": floats(4, 0, 5, 7)}).noise is None


def test_finite_values_are_never_explained(generator: np.random.Generator) -> None:
    x = generator.standard_normal((4, 8)).astype(np.float32)
    for op_type in ("Relu", "Tanh", "Softmax", "ReduceMax"):
        segment = wrapped(op_type)
        observed = {
            "Relu": np.maximum(x, 0),
            "Tanh": np.tanh(x),
            "Softmax": np.exp(x) / np.exp(x).sum(-1, keepdims=True),
            "ReduceMax": x.max(keepdims=True),
        }[op_type]
        found = diagnose(segment, {"x": x}, {"y": observed * np.float32(1.02)})
        assert found.noise is None


@pytest.mark.parametrize("op_type", ["Relu", "HardSigmoid", "ThresholdedRelu"])
def test_tvm(op_type: str) -> None:
    tvm = pytest.importorskip("tvm", reason="needs the [tvm] extra")
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    x = floats(-INF if op_type == "ThresholdedRelu" else NAN, 0.5, 2)
    segment = wrapped(op_type)
    shaped = type(segment.model)()
    shaped.CopyFrom(segment.model)
    del shaped.graph.input[:], shaped.graph.output[:]
    for name, into in (("x", shaped.graph.input), ("y", shaped.graph.output)):
        into.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape))
    machine = relax.VirtualMachine(tvm.compile(from_onnx(shaped), "llvm"), tvm.cpu())
    observed = machine["main"](tvm.runtime.tensor(x)).numpy()
    found = diagnose(segment, {"x": x}, {"y": observed})
    assert found.noise == ID and found.bit_identical == 1.0


def test_segments_without_such_operators_are_not_touched() -> None:
    segment = make_segment("y = MatMul(x, x)")
    assert list(nonfinite.NOISE.variants(segment)) == []
    assert "STRICT_NANS" in nonfinite.NOISE.remedy("trt")


def test_a_choice_as_a_product() -> None:
    """Zero times infinity is no number."""
    limits = {"limit": np.array(0, np.float32), "low": np.array(-INF, np.float32)}
    limits["one"] = np.array(1, np.int64)
    segment = make_segment(
        "c = Greater(x, limit) y = Where(c, x, low) whole = Where(c, one, one)",
        limits,
        outputs=["y"],
    )
    found = diagnose(segment, {"x": floats(1, -2, 3)}, {"y": floats(NAN, -INF, NAN)})
    assert found.noise == ID and found.bit_identical == 1.0
    assert not found.failures


@pytest.mark.parametrize("limits", [("least",), ("least", ""), ("", "most")])
def test_infinity_behind_a_clip_without_a_limit(limits: tuple[str, ...]) -> None:
    """A norm that overflowed is the largest number in ONNX Runtime, and stays infinite in TVM."""
    x = np.linspace(-3e19, 3e19, 24, dtype=np.float32).reshape(4, 6)
    sign = np.float32(-1 if "most" in limits else 1)
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["s"]),
        helper.make_node("Mul", ["s", "sign"], ["signed"]),
        helper.make_node("Clip", ["signed", *limits], ["c"]),
        helper.make_node("Div", ["x", "c"], ["y"]),
    ]
    constants = {"least": np.float32(1e-12), "most": np.float32(-1e-12), "sign": sign}
    segment = make_segment(nodes, {k: np.array(v) for k, v in constants.items()}, ["x"], ["y"])
    with np.errstate(over="ignore"):
        found = diagnose(segment, {"x": x}, {"y": x / (x * x * sign)})
    assert not found.failures
    assert found.noise == ID and found.bit_identical == 1.0 and "Clip" in found.variant
