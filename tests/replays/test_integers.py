"""Integer products of the reference, on processors whose kernels saturate and on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import weights
from auditor.ports import Array, Arrays
from auditor.replays import integers, sessions
from tests.helpers import nodes_of

OWN = "com.microsoft"
ONE, ZERO, SIGNED = np.float32(1), np.uint8(3), np.int8(2)


@pytest.fixture
def operands() -> Arrays:
    """Activations and weights so large that pairs of products leave 16 bits."""
    generator = np.random.default_rng(5)
    return {
        "x": generator.integers(128, 256, (6, 38)).astype(np.uint8),
        "w": generator.integers(60, 128, (38, 16)).astype(np.int8),
    }


def made(nodes: list[onnx.NodeProto], x: Array, constants: Arrays, kind: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid(OWN, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


def run(model: onnx.ModelProto, x: Array, folder: Path | None = None) -> Array:
    found: Array = sessions.session(model, 1, folder).run(None, {"x": x})[0]
    return found


def product(x: Array, w: Array) -> Array:
    return (x.astype(np.int64) - int(ZERO)) @ (w.astype(np.int64) - int(SIGNED))


MATMULS: dict[str, tuple[list[str], str, int]] = {
    "MatMulInteger": (["x", "w", "xz", "wz"], "", TensorProto.INT32),
    "MatMulIntegerToFloat": (["x", "w", "one", "one", "xz", "wz"], OWN, TensorProto.FLOAT),
    "QGemm": (["x", "one", "xz", "w", "one", "wz"], OWN, TensorProto.FLOAT),
}


@pytest.mark.parametrize("op_type", MATMULS)
def test_sums_are_exact(operands: Arrays, op_type: str) -> None:
    inputs, domain, kind = MATMULS[op_type]
    constants = {"w": operands["w"], "xz": ZERO, "wz": SIGNED, "one": ONE}
    node = helper.make_node(op_type, inputs, ["y"], domain=domain)
    model = made([node], operands["x"], constants, kind)  # type: ignore[arg-type]
    assert np.array_equal(run(model, operands["x"]), product(operands["x"], operands["w"]))


def test_weights_that_are_computed(operands: Arrays) -> None:
    nodes = nodes_of("w = Transpose(t) y = MatMulInteger(x, w)")
    model = made(nodes, operands["x"], {"t": operands["w"].T}, TensorProto.INT32)
    exact = operands["x"].astype(np.int64) @ operands["w"].astype(np.int64)
    assert np.array_equal(run(model, operands["x"]), exact)


def test_weights_in_a_file(operands: Arrays, tmp_path: Path) -> None:
    w = np.tile(operands["w"], (1, 4))  # large enough to stay there
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    model = made([node], operands["x"], {"w": w}, TensorProto.INT32)
    onnx.save(model, tmp_path / "m.onnx")
    read = weights.read(tmp_path / "m.onnx")
    assert weights.is_detached(read.graph.initializer[0])
    exact = operands["x"].astype(np.int64) @ w.astype(np.int64)
    assert np.array_equal(run(read, operands["x"], tmp_path), exact)


def test_a_branch_that_sees_the_weights_outside(operands: Arrays) -> None:
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["p"])]
    value = helper.make_tensor_value_info("p", TensorProto.INT32, None)
    then = helper.make_graph(nodes, "then", [], [value])
    other = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["q"])],
        "else",
        [],
        [helper.make_tensor_value_info("q", TensorProto.INT32, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    constants = {"w": operands["w"], "c": np.asarray(True)}
    model = made([node], operands["x"], constants, TensorProto.INT32)
    exact = operands["x"].astype(np.int64) @ operands["w"].astype(np.int64)
    assert np.array_equal(run(model, operands["x"]), exact)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_requantised_products(operands: Arrays, signed: bool, per_channel: bool) -> None:
    """int8 × int8 is left alone: QLinearConv has no kernel for int8 × uint8."""
    generator = np.random.default_rng(6)
    kind = np.int8 if signed else np.uint8
    x = generator.integers(60, 128, (1, 6, 7, 7)).astype(kind)
    w = generator.integers(60, 128, (8, 6, 3, 3)).astype(np.int8)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64), (3, 3), (2, 3))
    total = np.einsum("nchwij,ocij->nohw", windows, w.astype(np.int64))
    count = 8 if per_channel else 1
    constants: dict[str, Any] = {
        **{"xs": ONE, "xz": kind(0), "w": w, "ys": np.float32(8192), "yz": kind(0)},
        **{"ws": np.ones(count, np.float32), "wz": np.zeros(count, np.int8)},
    }
    inputs = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    node = helper.make_node("QLinearConv", inputs, ["y"])
    model = made([node], x, constants, TensorProto.INT8 if signed else TensorProto.UINT8)
    limits = np.iinfo(kind)
    assert np.array_equal(run(model, x), np.clip(np.rint(total / 8192), limits.min, limits.max))


def test_what_is_left_to_the_kernels(operands: Arrays) -> None:
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    model = made([node], operands["x"], {"w": operands["w"]}, TensorProto.INT32)
    kept = integers.kernels(model)
    if not integers.saturates():
        assert kept is None and integers.exact(model) is model
        return
    assert kept is not None and integers.exact(kept) is kept
    assert not np.array_equal(run(kept, operands["x"]), run(model, operands["x"]))


def test_models_without_integer_products_are_left_alone() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, w = np.ones((2, 3), np.float32), np.ones((3, 2), np.float32)
    model = made([node], x, {"w": w}, TensorProto.FLOAT)
    assert integers.exact(model) is model and integers.kernels(model) is None
