"""Sums kept in float16, added up by numpy one value after another, and by TVM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.noises import accumulation
from auditor.ports import Array
from auditor.records.backend import Kernel
from tests.segments import diagnose, make_segment, run

ID = "implementation.accumulation"
HALF = np.float16


def running(values: Array, axis: int) -> Array:
    """A loop in numpy's own float16."""
    total = np.zeros(np.delete(values.shape, axis), HALF)
    with np.errstate(over="ignore"):
        for i in range(values.shape[axis]):
            total = total + values.take(i, axis)
    return total


@pytest.mark.parametrize("kind", ["Sum", "Mean", "L1", "L2", "SumSquare", "LogSum"])
@pytest.mark.parametrize("axes", [[1], [1, 2], [-1], [2, 3], [1, 2, 3], None])
def test_reductions(generator: np.random.Generator, kind: str, axes: Any) -> None:
    shape = (2, 3, 16, 24) if axes in ([2, 3], None) else (4, 320, 3) if axes == [1] else (4, 8, 80)
    x = np.abs(generator.standard_normal(shape) * 2 + 3).astype(HALF)
    if axes == [1, 2]:
        axes = [-2, -1]
    if axes == [1, 2, 3]:  # channels last
        x = x.reshape(2, 5, 4, 32, 2)
    over = tuple(range(x.ndim)) if axes is None else tuple(a % x.ndim for a in axes)
    summands = {"L1": np.abs(x), "L2": x * x, "SumSquare": x * x}.get(kind, x)
    flat = np.moveaxis(summands, over, range(-len(over), 0))
    flat = flat.reshape(*flat.shape[: x.ndim - len(over)], -1)
    total = np.expand_dims(running(flat, -1), over)
    planted = {
        "Mean": total / HALF(flat.shape[-1]),
        "L2": np.sqrt(total),
        "LogSum": np.log(total.astype(np.float32)).astype(HALF),
    }.get(kind, total)
    given = {} if axes is None else {"axes": axes}
    constants = {}
    inputs = ["x"]
    if kind == "Sum" and axes is not None:
        constants, given, inputs = {"axes": np.array(axes)}, {}, ["x", "axes"]
    node = helper.make_node(f"Reduce{kind}", inputs, ["y"], **given)
    segment = make_segment([node], constants, ["x"], ["y"], kind=TensorProto.FLOAT16)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and "partial" in (found.variant or "")
    assert found.explained > 0.999 and found.bit_identical > 0.99


@pytest.mark.parametrize("include", [0, 1])
def test_pooling(generator: np.random.Generator, include: int) -> None:
    x = (np.abs(generator.standard_normal((2, 3, 18, 18))) * 40 + 300).astype(HALF)
    node = helper.make_node(
        "AveragePool", ["x"], ["y"],
        kernel_shape=[9, 7], strides=[3, 2], pads=[1, 2, 1, 2], count_include_pad=include,
    )  # fmt: skip
    segment = make_segment([node], {}, ["x"], ["y"], kind=TensorProto.FLOAT16)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (2, 2)))
    inside = np.pad(np.ones((18, 18)), ((1, 1), (2, 2)))
    planted = np.zeros((2, 3, 4, 8), HALF)
    for i, j in np.ndindex(4, 8):
        rows, columns = slice(3 * i, 3 * i + 9), slice(2 * j, 2 * j + 7)
        total = running(padded[:, :, rows, columns].reshape(2, 3, -1), -1)
        planted[:, :, i, j] = total / HALF(63 if include else inside[rows, columns].sum())
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical > 0.99


def test_overflow_before_the_division() -> None:
    x = np.full((1, 2, 64, 64), 20, HALF)
    x[:, 1] = 0
    x[:, 1, 5, 5] = 64
    segment = make_segment("y = GlobalAveragePool(x)", kind=TensorProto.FLOAT16)
    planted = np.array([np.inf, 64 / 4096], HALF).reshape(1, 2, 1, 1)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0


def test_intermediate_results() -> None:
    """The reference computes float16 neighbours in float32, which hides the overflow."""
    x = np.array([300, 200, 65000, 1], HALF)
    segment = make_segment("s = Mul(x, x) y = Div(s, x)", kind=TensorProto.FLOAT16)
    with np.errstate(over="ignore"):
        planted = (x * x) / x
    assert np.isinf(planted).any()
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and "intermediate" in (found.variant or "")


def test_float32_models_run_in_half_precision(generator: np.random.Generator) -> None:
    """Only where the engine says so: the replay is long."""
    x = (generator.standard_normal((2, 400)) + 4).astype(np.float32)
    node = "y = ReduceSum <keepdims = 0> (x, axes)"
    constants = {"axes": np.array([1])}
    silent = make_segment(node, constants)
    assert list(accumulation.NOISE.variants(silent)) == []
    stated = (Kernel("k", "Reduce", ("y",), ("y",), "", "f16", "f16"),)
    spoken = make_segment(node, constants, kernels=stated)
    (variant,) = accumulation.NOISE.variants(spoken)
    planted = running(x.astype(HALF), 1).astype(np.float32)
    np.testing.assert_array_equal(run(variant.model, {"x": x})["y"], planted)


def test_a_scaled_mean_is_no_accumulation(generator: np.random.Generator) -> None:
    x = (generator.standard_normal((8, 512)) + 2).astype(HALF)
    segment = make_segment("y = ReduceMean <axes = [1]> (x)", kind=TensorProto.FLOAT16)
    wrong = (x.astype(np.float64).mean(1, keepdims=True) * 1.02).astype(HALF)
    assert diagnose(segment, {"x": x}, {"y": wrong}).noise is None


def test_tvm_sums_in_half_precision() -> None:
    tvm = pytest.importorskip("tvm", reason="needs the [tvm] extra")
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    x = (np.random.default_rng(4).standard_normal((2, 3, 48, 48)) + 5).astype(HALF)
    segment = make_segment("y = GlobalAveragePool(x)", kind=TensorProto.FLOAT16)
    shaped = type(segment.model)()
    shaped.CopyFrom(segment.model)
    del shaped.graph.input[:], shaped.graph.output[:]
    info = helper.make_tensor_value_info
    shaped.graph.input.append(info("x", TensorProto.FLOAT16, x.shape))
    shaped.graph.output.append(info("y", TensorProto.FLOAT16, (2, 3, 1, 1)))
    machine = relax.VirtualMachine(tvm.compile(from_onnx(shaped), "llvm"), tvm.cpu())
    observed = machine["main"](tvm.runtime.tensor(x)).numpy()
    found = diagnose(segment, {"x": x}, {"y": observed})
    assert found.noise == ID and found.explained > 0.99
