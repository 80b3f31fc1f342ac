"""The OpenVINO backend: which ONNX nodes its kernels compute."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.backends.openvino_models import (
    F32,
    X,
    build,
    info,
    precision_of,
    reference,
    save,
)
from tests.helpers import nodes_of

if TYPE_CHECKING:
    pass

pytest.importorskip("openvino")


def test_kernels_name_the_onnx_nodes_fused_into_them(residual: Path) -> None:
    built = build(residual, options=F32)
    kernels = built.provenance.kernels
    assert [n for k in kernels for n in k.nodes] == [
        n.output[0] for n in onnx.load(residual).graph.node
    ]
    assert {k.precision for k in kernels} == {"f32"}
    assert all(k.primitive and k.type not in ("Const", "Reorder") for k in kernels)


def test_hardswish_is_one_kernel_with_its_convolution(tmp_path: Path) -> None:
    """OpenVINO renames both parts of the fused operation, so names alone do not tell."""
    rng = np.random.default_rng(0)
    weights = tuple(
        numpy_helper.from_array((rng.standard_normal((16, c, 3, 3)) / 6).astype(np.float32), n)
        for c, n in ((3, "w"), (16, "v"))
    )
    six, three = (
        numpy_helper.from_array(np.array(v, np.float32), n) for v, n in ((6, "six"), (3, "three"))
    )
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    nodes = nodes_of(
        "c = Conv(x, w) p = Add(c, three) q = Clip(p, zero, six) r = Mul(c, q) "
        "h = Div(r, six) y = Conv(h, v)"
    )
    path = save(
        tmp_path / "m.onnx",
        nodes,
        [info("x", 1, 3, 32, 32)],
        [info("y", 1, 16, 28, 28)],
        (*weights, zero, six, three),
    )
    built = build(path, options=F32)
    assert built.provenance.kernels[0].nodes == ("c", "p", "q", "r", "h")
    made = built.instrument(X)
    assert [p.tensor for p in made.probes] == ["h"] and made.program_unchanged


def test_weights_of_4_bits_are_multiplied_in_bfloat16(tmp_path: Path) -> None:
    """The engine states the type in which they are compressed."""
    draw = np.random.default_rng(0)
    packed = draw.integers(0, 256, (32, 2, 16), np.uint8)
    scales = draw.uniform(0.01, 0.02, 64).astype(np.float32)
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], "y", domain="com.microsoft",
            K=64, N=32, bits=4, block_size=32,
        )
    ]  # fmt: skip
    weights = [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")]
    path = save(tmp_path / "m.onnx", nodes, [info("x", 4, 64)], [info("y", 4, 32)], weights)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    built = build(path)
    (kernel,) = (k for k in built.provenance.kernels if k.type == "FullyConnected")
    assert kernel.precision == precision_of(built)


def test_a_factor_behind_moved_values_is_one_kernel_with_its_product(tmp_path: Path) -> None:
    """A bias of zeros is dropped, so that two tensors seem to end what was fused."""
    recorded = Path(__file__).parents[1] / "data" / "openvino_bf16" / "scales.onnx"
    path = Path(shutil.copy(recorded, tmp_path))
    nodes = {k.nodes for k in build(path).provenance.kernels}
    assert {("qm", "q", "qs"), ("k", "ks")} <= nodes


def test_a_transposition_put_before_a_product_does_not_compute_it(tmp_path: Path) -> None:
    """OpenVINO names it after the product."""
    w = numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    nodes = nodes_of("s = Softmax(x) t = Transpose <perm = [0, 2, 1]> (s) y = MatMul(t, w)")
    path = save(tmp_path / "m.onnx", nodes, [info("x", 2, 8, 3)], [info("y", 2, 3, 4)], (w,))
    found = {k.type: k.nodes for k in build(path).provenance.kernels}
    assert found["FullyConnected"] == ("y",) and "y" not in found["Transpose"]


@pytest.mark.parametrize("options", [{}, F32], ids=["default", "f32"])
def test_activations_moved_before_a_reshape_are_observed(
    tmp_path: Path, options: dict[str, str]
) -> None:
    """Squeeze and excite with channels last: what lies between two transposes moves before them."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["t1"], perm=[0, 3, 1, 2]),
        node("Conv", ["t1", "w1"], ["c1"]),
        node("Transpose", ["c1"], ["t2"], perm=[0, 2, 3, 1]),
        node("Relu", ["t2"], ["r"]),
        node("Transpose", ["r"], ["t3"], perm=[0, 3, 1, 2]),
        node("Conv", ["t3", "w2"], ["c2"]),
        node("Transpose", ["c2"], ["t4"], perm=[0, 2, 3, 1]),
        node("HardSigmoid", ["t4"], ["h"], alpha=1 / 6),
        node("Mul", ["z", "h"], ["y"]),
    ]
    weights = tuple(
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in {"w1": (8, 16, 1, 1), "w2": (16, 8, 1, 1)}.items()
    )
    inputs = [info("x", 1, 1, 1, 16), info("z", 1, 6, 6, 16)]
    path = save(tmp_path / "gate.onnx", nodes, inputs, [info("y", 1, 6, 6, 16)], weights)
    shapes = {"x": (1, 1, 1, 16), "z": (1, 6, 6, 16)}
    feeds = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    built = build(path, options=options)
    instrumented = built.instrument(feeds)
    captured = instrumented.run(feeds)
    assert instrumented.program_unchanged
    assert captured.outputs["y"].tobytes() == built.run(feeds)["y"].tobytes()
    assert instrumented.skipped == ()
    assert {"t3", "h"} <= captured.tensors.keys()
    truth = reference(path, ("t3", "h"), feeds)
    for name, value in truth.items():
        off = np.linalg.norm(captured.tensors[name] - value) / np.linalg.norm(value)
        assert off < (1e-5 if options else 0.02), name


def test_nameless_kernels_that_read_the_same_are_told_apart(tmp_path: Path) -> None:
    """Adaptive normalisation's 1 + scale is moved ahead of a reshape, and named anew."""
    nodes = nodes_of("c1, c2 = Split <axis = 1> (c) h0 = Softmax(x)")
    for i in "12":
        nodes += [
            helper.make_node("Unsqueeze", [f"c{i}", "axis"], [f"u{i}"]),
            helper.make_node("Add", [f"u{i}", "one"], [f"a{i}"]),
            helper.make_node("Mul", [f"h{int(i) - 1}", f"a{i}"], [f"m{i}"]),
            helper.make_node("Softmax", [f"m{i}"], [f"h{i}"]),
        ]
    weights = (
        numpy_helper.from_array(np.array([1]), "axis"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
    )
    inputs = [info("x", 1, 4, 8), info("c", 1, 16)]
    path = save(tmp_path / "m.onnx", nodes, inputs, [info("h2", 1, 4, 8)], weights)
    named = {k.nodes for k in build(path).provenance.kernels}
    assert {("a1",), ("a2",)} <= named


def test_a_normalisation_that_is_taken_apart_is_told_by_the_types_of_its_kernels(
    tmp_path: Path,
) -> None:
    """OpenVINO knows it as one operation, has no kernel for its axis, and names its parts anew."""
    nodes = nodes_of(
        "h = Softmax(x) mean = ReduceMean <axes = [1]> (h) centred = Sub(h, mean) "
        "square = Pow(centred, two) variance = ReduceMean <axes = [1]> (square) "
        "above = Add(variance, epsilon) deviation = Sqrt(above) y = Div(centred, deviation)"
    )
    constants = {"two": 2, "epsilon": 1e-6}
    weights = tuple(numpy_helper.from_array(np.float32(v), n) for n, v in constants.items())
    shape = ("x", 1, 8, 4, 4), ("y", 1, 8, 4, 4)
    path = save(tmp_path / "m.onnx", nodes, [info(*shape[0])], [info(*shape[1])], weights)
    named = {k.nodes for k in build(path).provenance.kernels}
    assert {("mean",), ("centred", "square"), ("variance", "above", "deviation")} <= named
