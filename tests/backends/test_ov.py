"""The OpenVINO backend: a probe is accepted only if the program stays as it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import backends.ov as ov_backend
from auditor.errors import BackendError, UsageError
from auditor.records.backend import BuildRequest
from backends import _ov_probes, _ov_session, _ov_source
from backends.ov import BACKEND
from benchmarks import decoder, deep
from tests.helpers import nodes_of

if TYPE_CHECKING:
    from auditor.ports import Array, Arrays, Build

openvino = pytest.importorskip("openvino")

X = {"x": np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)}
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def build(
    path: Path,
    *,
    device: str | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    options: dict[str, str] | None = None,
) -> Build:
    return BACKEND.build(
        BuildRequest(path, shapes or {}, shapes is not None, device, 2, options or {}, path.parent)
    )


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: tuple[onnx.TensorProto, ...] = (),
    domains: tuple[str, ...] = (),
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def info(name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


@pytest.fixture
def residual(tmp_path: Path) -> Path:
    """A He-initialised CNN with two residual blocks; node names are empty, repeated, odd."""
    return residual_net(tmp_path / "residual.onnx", height=32)


def residual_net(path: Path, *, height: int | str) -> Path:
    rng = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []

    def conv(x: str, y: str, cin: int, cout: int, k: int, name: str = "") -> onnx.NodeProto:
        w = rng.standard_normal((cout, cin, k, k)) * np.sqrt(2 / (cin * k * k))
        b = rng.standard_normal(cout) * 0.1
        weights.append(numpy_helper.from_array(w.astype(np.float32), f"{y}_w"))
        weights.append(numpy_helper.from_array(b.astype(np.float32), f"{y}_b"))
        pads = [k // 2] * 4
        return helper.make_node("Conv", [x, f"{y}_w", f"{y}_b"], [y], pads=pads, name=name)

    nodes = [
        conv("x", "c1", 3, 32, 3, name="same"),
        helper.make_node("Relu", ["c1"], ["r1"], name="with, comma"),
        conv("r1", "c2", 32, 64, 3, name="same"),
        helper.make_node("Relu", ["c2"], ["r2"]),
        conv("r2", "c3", 64, 32, 1),
        helper.make_node("Add", ["c3", "r1"], ["a1"], name="same"),
        conv("a1", "c4", 32, 64, 3, name="#3#"),
        helper.make_node("Relu", ["c4"], ["r4"]),
        conv("r4", "c5", 64, 32, 1),
        helper.make_node("Add", ["c5", "a1"], ["a2"]),
        helper.make_node("Relu", ["a2"], ["r5"]),
        helper.make_node("GlobalAveragePool", ["r5"], ["y"]),
    ]
    return save(
        path, nodes, [info("x", 1, 3, height, 32)], [info("y", 1, 32, 1, 1)], tuple(weights)
    )


def reference(path: Path, names: tuple[str, ...], feeds: Arrays) -> Arrays:
    """The same graph without optimisation."""
    import onnxruntime as ort

    model = onnx.load(path)
    del model.graph.output[:]
    for node in model.graph.node:
        node.ClearField("name")  # ONNX Runtime refuses repeated names
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    return dict(zip(names, session.run(list(names), feeds), strict=True))


def rounded_to_bf16(x: Array) -> Array:
    """Nearest bfloat16, ties to even, as float32."""
    bits = x.view(np.uint32).astype(np.uint64)
    kept: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return kept.view(np.float32)


def precision_of(built: Build) -> str:
    return built.provenance.options["INFERENCE_PRECISION_HINT"]


# --- promise 1: observing changes nothing --------------------------------------------------


@pytest.mark.parametrize("options", [{}, F32], ids=["default", "f32"])
def test_every_tensor_between_kernels_is_captured_with_proof(
    residual: Path, options: dict[str, str]
) -> None:
    built = build(residual, options=options)
    plain = built.run(X)
    made = built.instrument(X)
    capture = made.run(X)

    assert made.program_unchanged and made.rebuilt
    assert capture.outputs["y"].tobytes() == plain["y"].tobytes()
    kernels = {name for kernel in built.provenance.kernels for name in kernel.outputs}
    assert {p.tensor for p in made.probes} == kernels - {"y"} == capture.tensors.keys()
    assert not made.skipped
    expected = reference(residual, tuple(capture.tensors), X)
    tolerance = 1e-5 if precision_of(built) == "f32" else 3e-2
    for name, value in capture.tensors.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous
        error = np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        assert error < tolerance, name


def test_operand_of_a_fused_addition_is_proved_apart(residual: Path) -> None:
    built = build(residual, options=F32)
    fused = [k for k in built.provenance.kernels if {"c3", "a1"} <= set(k.nodes)]
    if not fused:
        pytest.skip("OpenVINO does not fuse Convolution + Add on this CPU")
    probes = {p.tensor: p.fidelity for p in built.instrument(X).probes}
    assert probes["r1"] == probes["a1"] == "cone-proved"
    assert probes["r2"] == probes["r4"] == "output-proved"


def test_every_tensor_of_8_bits_is_captured_with_proof(tmp_path: Path) -> None:
    """Signed integers with zero points: convolutions widen what they write, and a sum is fused."""
    draw = np.random.default_rng(3)
    weights = {"s": np.float32(0.05), "z": np.int8(-3), "ws": np.float32(0.01), "wz": np.int8(0)}
    nodes = []

    def rounded(name: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"]))
        return f"{name}_d"

    def convolved(x: str, y: str, channels: int) -> str:
        # No two products leave 16 bits, where processors without VNNI would clip them.
        weights[y + "_w"] = draw.integers(-64, 65, (16, channels, 3, 3)).astype(np.int8)
        nodes.append(helper.make_node("DequantizeLinear", [y + "_w", "ws", "wz"], [y + "_v"]))
        nodes.append(helper.make_node("Conv", [x, y + "_v"], [y], pads=[1] * 4))
        return y

    first = rounded(convolved(rounded("x"), "a", 3))
    second = rounded(convolved(first, "b", 16))
    third = rounded(convolved(second, "c", 16))
    nodes.append(helper.make_node("Add", [second, third], ["sum"]))
    convolved(rounded("sum"), "y", 16)
    stored = tuple(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    path = save(
        tmp_path / "m.onnx", nodes, [info("x", 1, 3, 32, 32)], [info("y", 1, 16, 32, 32)], stored
    )
    built = build(path, options=F32)
    instrumented = built.instrument(X)
    assert instrumented.program_unchanged
    names = [f"{name}_d" for name in ("x", "a", "b", "c", "sum")]
    apart = any(k.type == "Eltwise" and "sum" in k.nodes for k in built.provenance.kernels)
    if apart:
        # Without VNNI a sum of signed integers is a kernel of its own, which reads one operand as
        # floats. Whatever shows these, the convolution rounds ties otherwise for it: no proof.
        assert [s.tensor for s in instrumented.skipped] == ["c_d"]
        names.remove("c_d")
    assert {p.tensor for p in instrumented.probes} == {*names}
    expected, captured = reference(path, tuple(names), X), instrumented.run(X).tensors
    for name in names:
        steps = np.abs(captured[name] - expected[name]) / 0.05
        assert np.allclose(steps, np.rint(steps), atol=1e-3)  # the very values of 8 bits
        assert (steps > 0.5).mean() < 0.2  # a tie may go the other way, and what follows from it


def test_what_a_kernel_writes_before_its_end_is_observed(tmp_path: Path) -> None:
    """An activation and what DynamicQuantizeLinear begins with are one kernel with two outputs."""
    nodes = [
        helper.make_node("Sqrt", ["x"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("DynamicQuantizeLinear", ["b"], ["q", "s", "z"]),
    ]
    outputs = [
        info("q", 1, 3, 32, 32, dtype=TensorProto.UINT8),
        info("s"),
        info("z", dtype=TensorProto.UINT8),
    ]
    path = save(tmp_path / "m.onnx", nodes, [info("x", 1, 3, 32, 32)], outputs)
    built, feeds = build(path, options=F32), {"x": np.abs(X["x"])}
    instrumented = built.instrument(feeds)
    assert instrumented.program_unchanged
    assert [(p.tensor, p.fidelity) for p in instrumented.probes] == [("b", "output-proved")]
    observed = instrumented.run(feeds).tensors["b"]
    np.testing.assert_allclose(observed, np.tanh(np.sqrt(feeds["x"])), rtol=1e-5)


def test_what_a_convolution_leaves_unrounded_is_captured_unrounded(tmp_path: Path) -> None:
    """Weights of unsigned 8 bits are multiplied in floats, and a rounding may be left out there.

    Whether it is depends on the kernel. What was captured must be what the next kernel read: to an
    operation that reads 8 bits, the same values would be shown rounded.
    """
    draw = np.random.default_rng(3)
    scales = {"x": 0.01, "g": 0.004, "w": 0.01, "a": 0.02, "b": 0.02}
    weights = {f"{n}s": np.float32(s) for n, s in scales.items()}
    weights |= {f"{n}z": np.uint8(128 if n in "xwb" else 0) for n in scales}
    nodes = []

    def rounded(name: str, grid: str) -> str:
        pair = [f"{grid}s", f"{grid}z"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *pair], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", *pair], [f"{name}_d"]))
        return f"{name}_d"

    def convolved(x: str, y: str, *shape: int) -> str:
        weights[y + "_w"] = draw.integers(0, 256, (*shape, 1, 1)).astype(np.uint8)
        nodes.append(helper.make_node("DequantizeLinear", [y + "_w", "ws", "wz"], [y + "_v"]))
        weights[y + "_b"] = draw.uniform(-1, 1, shape[0]).astype(np.float32)
        nodes.append(helper.make_node("Conv", [x, y + "_v", y + "_b"], [y]))
        return y

    nodes.append(helper.make_node("GlobalAveragePool", [rounded("x", "x")], ["g"]))
    nodes.append(helper.make_node("Relu", [convolved(rounded("g", "g"), "c", 64, 32)], ["a"]))
    nodes.append(
        helper.make_node(
            "HardSigmoid", [rounded(convolved(rounded("a", "a"), "b", 32, 64), "b")], ["h"]
        )
    )
    nodes.append(helper.make_node("Mul", ["x_d", "h"], ["y"]))
    stored = tuple(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    path = save(
        tmp_path / "m.onnx", nodes, [info("x", 1, 32, 8, 8)], [info("y", 1, 32, 8, 8)], stored
    )
    x = {"x": draw.uniform(-1, 1, (1, 32, 8, 8)).astype(np.float32) + np.float32(0.2)}
    instrumented = build(path, options=F32).instrument(x)
    assert instrumented.program_unchanged
    captured = instrumented.run(x).tensors
    assert {"a_d", "b_d"} <= captured.keys()
    kernel = (weights["b_w"][..., 0, 0].astype(float) - 128) * float(weights["ws"])
    products = np.einsum("oc,nchw->nohw", kernel, captured["a_d"])
    steps = (products + weights["b_b"].reshape(1, -1, 1, 1)) / scales["b"]
    off = captured["b_d"] / scales["b"] - np.clip(steps, -128, 127)
    assert np.abs(off).max() < 0.501


def test_8_bits_and_booleans_are_observed_in_bfloat16(tmp_path: Path) -> None:
    """Before a Result of their own type all that leads to them would be computed in float32."""
    draw = np.random.default_rng(3)
    weights = {"s": np.float32(0.05), "z": np.int8(0), "low": np.float32(-4)}
    nodes = []

    def rounded(name: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"]))
        return f"{name}_d"

    def product(x: str, y: str) -> str:
        weights[y + "_w"] = draw.integers(-99, 99, (64, 64)).astype(np.int8)
        nodes.append(helper.make_node("DequantizeLinear", [y + "_w", "s", "z"], [y + "_v"]))
        nodes.append(helper.make_node("MatMul", [x, y + "_v"], [y]))
        return y

    mixed = rounded(product(rounded("x"), "a"))
    nodes.append(helper.make_node("Softmax", [mixed], ["p"]))
    nodes.append(helper.make_node("IsNaN", ["p"], ["some"]))
    nodes.append(helper.make_node("Where", ["some", "low", "p"], ["b"]))
    product(rounded(product(rounded("b"), "c")), "y")
    stored = tuple(numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items())
    path = save(tmp_path / "m.onnx", nodes, [info("x", 32, 64)], [info("y", 32, 64)], stored)
    x = {"x": draw.standard_normal((32, 64)).astype(np.float32)}
    instrumented = build(path).instrument(x)
    assert instrumented.program_unchanged
    names = ("x_d", "a_d", "some", "c_d")
    captured = instrumented.run(x).tensors
    assert {*names} <= captured.keys()
    assert captured["some"].dtype == bool
    exact = reference(path, names, x)
    assert np.array_equal(captured["x_d"], exact["x_d"])
    steps = captured["c_d"] / np.float32(0.05)
    assert np.allclose(steps, np.rint(steps), atol=1e-3)  # none is rounded on its way here
    assert np.abs(captured["a_d"] - exact["a_d"]).max() < 0.06  # a step of 8 bits


def test_a_deep_network_is_copied_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block's sum is made apart, one after another: a copy for each would be quadratic."""
    path = tmp_path / "deep.onnx"
    onnx.save(deep.network(40, channels=8, side=8), path)
    built = build(path, options=F32)
    copies: list[int] = []
    cloned = _ov_source.Source.clone
    monkeypatch.setattr(_ov_source.Source, "clone", lambda self: copies.append(1) or cloned(self))
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    made = built.instrument({"x": x})
    apart = [p for p in made.probes if p.fidelity == "cone-proved"]
    assert len(apart) >= 7
    assert len(copies) <= 5
    assert made.program_unchanged


def test_what_changes_a_kernel_without_touching_it_is_found_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of channels are multiplied in at once by OpenVINO, unless one channel is observed."""
    nodes, weights = [], [numpy_helper.from_array(np.array(1), "axis")]
    for i in range(3):
        weights += [
            numpy_helper.from_array(np.array(i), f"i{i}"),
            numpy_helper.from_array(np.array(0.4 + i, np.float32), f"f{i}"),
        ]
        nodes += [
            helper.make_node("Gather", ["x", f"i{i}"], [f"g{i}"], axis=1),
            helper.make_node("Unsqueeze", [f"g{i}", "axis"], [f"u{i}"]),
            helper.make_node("Mul", [f"u{i}", f"f{i}"], [f"m{i}"]),
            helper.make_node("Add", [f"m{i}", f"f{i}"], [f"a{i}"]),
        ]
    nodes.append(helper.make_node("Concat", ["a0", "a1", "a2"], ["s0"], axis=1))
    nodes += [helper.make_node("Softmax", [f"s{i}"], [f"s{i + 1}"]) for i in range(4)]
    shape = (1, 3, 8, 8)
    path = save(tmp_path / "m.onnx", nodes, [info("x", *shape)], [info("s4", *shape)], weights)
    built = build(path)
    monkeypatch.setattr(
        _ov_probes.Probing, "_bisect", None
    )  # the last resort, which may lose everything
    made = built.instrument({"x": np.random.default_rng(0).random(shape, np.float32)})
    assert made.program_unchanged
    assert {"s1", "s2", "s3"} <= {probe.tensor for probe in made.probes}


def test_probes_leave_the_order_in_which_kernels_are_fused(tmp_path: Path) -> None:
    """Masks that are multiplied on from one step to the next are one kernel with what reads them.

    OpenVINO fuses in the order in which it meets operations, from the last Result on, and lists an
    output as often as it is read.
    """
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        n (float[4,16] x) => (float[4,16] y, float[4,16] z)
        <float top = {1.3}, int64[1] ax = {1}, int64[1] k = {3}> {
            a = MatMul(x, w0) m0 = Relu(a) s0 = Sub(top, m0)
            h0 = Mul(m0, x) b0 = MatMul(h0, w0) z1 = Mul(b0, s0)
            v1, i1 = TopK(z1, k) r1 = ReduceSum(v1, ax) g1 = GatherElements <axis = 1> (z1, i1)
            f1 = ReduceMax <axes = [1]> (g1) e1 = Add(r1, f1)
            q1 = Sub(z1, e1) m1 = Relu(q1) t1 = Sub(top, m1) s1 = Mul(s0, t1)
            h1 = Mul(m1, x) b1 = MatMul(h1, w0) z2 = Mul(b1, s1) r2 = ReduceSum(z2, ax)
            q2 = Sub(z2, r2) m2 = Relu(q2) t2 = Sub(top, m2) z = Mul(s1, t2)
            h2 = Mul(m2, x) y = MatMul(h2, w0)
        }""")
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((16, 16)).astype(np.float32) / 4
    model.graph.initializer.append(numpy_helper.from_array(weights, "w0"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    made = build(path).instrument({"x": draw.standard_normal((4, 16)).astype(np.float32)})
    proofs = {p.tensor: p.fidelity for p in made.probes}
    assert made.program_unchanged
    steps = ("z1", "v1", "r1", "f1", "h1", "b1", "z2")
    assert [proofs[name] for name in steps] == ["output-proved"] * 7


def test_what_needs_no_more_than_a_shape_is_found_where_it_widens_a_kernel(tmp_path: Path) -> None:
    """Positions of an open length, observed in float32, make OpenVINO normalise in that, too."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        n (int64[b,s] ids) => (float[b,s,32] y)
        <int64 zero = {0}, int64 one = {1}, float eps = {0.00001}, int64[1] axis = {1}> {
            h = Gather(e, ids) squares = Mul(h, h) mean = ReduceMean <axes = [-1]> (squares)
            shifted = Add(mean, eps) root = Sqrt(shifted) inverse = Reciprocal(root)
            normal = Mul(h, inverse) scaled = Mul(normal, g)
            shape = Shape(h) length = Gather(shape, one) places = Range(zero, length, one)
            floats = Cast <to = 1> (places) column = Unsqueeze(floats, axis)
            angle = Mul(column, f) c = Cos(angle)
            q = MatMul(scaled, w) turned = Mul(q, c) y = MatMul(turned, w)
        }""")
    draw = np.random.default_rng(0)
    for name, shape in {"e": (50, 32), "g": (32,), "w": (32, 32), "f": (1, 32)}.items():
        value = draw.uniform(0.1, 1, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    built = BACKEND.build(
        BuildRequest(path, {"ids": (1, 8)}, True, None, 2, {}, tmp_path, open=True)
    )
    if precision_of(built) != "bf16":
        pytest.skip("this CPU has no bf16")
    instrumented = built.instrument({"ids": np.arange(1, 9).reshape(1, 8)})
    assert instrumented.program_unchanged
    proofs = {p.tensor: p.fidelity for p in instrumented.probes}
    assert [proofs[n] for n in ("scaled", "angle", "q", "turned")] == ["output-proved"] * 4


def test_a_kernel_that_probes_move_is_told_from_what_it_moves_past(tmp_path: Path) -> None:
    """Grouped attention's scale is applied before keys are repeated, unless those are observed."""
    path = tmp_path / "decoder.onnx"
    decoder.write(path, decoder.Shape(2, 48, 96, 4, 2, 200, 12))
    feeds = {"input_ids": np.arange(12)[None]}
    made = build(path).instrument(feeds)
    assert made.program_unchanged and not made.skipped
    # Two a layer change the program at most: repeated keys, and where attention is one kernel that
    # also transposes what it gives, as in f32, this.
    apart = [probe.tensor for probe in made.probes if probe.fidelity != "output-proved"]
    assert len(apart) <= 4 and len(made.probes) > 30, apart


@pytest.mark.parametrize(
    ("kind", "directions", "batch"),
    [("GRU", 1, 3), ("LSTM", 1, 3), ("RNN", 1, 3), ("LSTM", 2, 1), ("GRU", 1, 1)],
)
def test_recurrent_layers_are_observed_where_their_values_were_moved_to(
    tmp_path: Path, kind: str, directions: int, batch: int
) -> None:
    """One transposition is left of two behind each layer: what is between them is nowhere.

    Of two directions, what is flattened is neither: the next layer transposes it at once. Of one
    direction and one sentence, all of it is one change of the shape, and the layer runs apart.
    """
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[kind]
    draw = np.random.default_rng(0)
    wide = 4 * directions

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(draw.standard_normal(shape).astype(np.float32) / 4, name)

    stored = [numpy_helper.from_array(np.array([0, 0, -1]), "flat"), weights("last", wide, 4)]
    nodes, read = [], "x"
    named = {"direction": "bidirectional" if directions == 2 else "forward"}
    for i in range(2):
        for name, columns in (("w", wide), ("r", 4)):
            stored.append(weights(f"{name}{i}", directions, gates * 4, columns))
        nodes += [
            helper.make_node(kind, [read, f"w{i}", f"r{i}"], [f"h{i}"], hidden_size=4, **named),
            helper.make_node("Transpose", [f"h{i}"], [f"t{i}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"t{i}", "flat"], [f"f{i}"]),
        ]
        read = f"f{i}"
    nodes.append(helper.make_node("MatMul", [read, "last"], ["y"]))
    ends = [info("x", 5, batch, wide)], [info("y", 5, batch, 4)]
    path = save(tmp_path / "m.onnx", nodes, *ends, tuple(stored))
    x = {"x": draw.standard_normal((5, batch, wide)).astype(np.float32)}
    made = build(path, options=F32).instrument(x)
    assert made.program_unchanged
    assert made.skipped == ()
    seen = {p.tensor: p.fidelity for p in made.probes}
    layers = [{f"h{i}", f"t{i}", f"f{i}"} & seen.keys() for i in range(2)]
    assert all(len(shown) == 1 for shown in layers), seen
    assert seen[min(layers[1])] == "output-proved"
    exact = reference(path, tuple(seen), x)
    for name, value in made.run(x).tensors.items():
        np.testing.assert_allclose(value, exact[name], atol=1e-6)


def test_what_a_kernel_also_scales_for_another_is_observed(tmp_path: Path) -> None:
    """The factor of the next block's normalisation is multiplied in where the block ends."""
    draw = np.random.default_rng(0)
    text, weights = "", []
    for i in range(3):
        text += f"""n{i} = BatchNormalization(r{i}, s{i}, b{i}, m{i}, v{i})
            c{i} = Conv(r{i}, w{i}) d{i} = Conv(r{i}, u{i}) e{i} = Add(c{i}, d{i})
            a{i} = Add(e{i}, n{i}) r{i + 1} = Relu(a{i}) """
        stored = {f"{name}{i}": draw.random(16, np.float32) + 0.5 for name in "sbmv"}
        for name in "wu":
            stored[f"{name}{i}"] = draw.standard_normal((16, 16, 1, 1)).astype(np.float32) / 4
        weights += [numpy_helper.from_array(v, n) for n, v in stored.items()]
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        n (float[1,16,8,8] x) => (float[1,16,8,8] r3) {{ r0 = Relu(x) {text} }}""")
    model.graph.initializer.extend(weights)
    onnx.save(model, tmp_path / "m.onnx")
    x = {"x": draw.standard_normal((1, 16, 8, 8)).astype(np.float32)}
    made = build(tmp_path / "m.onnx", options=F32).instrument(x)
    assert made.program_unchanged
    assert {"r1", "r2"} <= {p.tensor for p in made.probes if p.fidelity == "output-proved"}
    exact = reference(tmp_path / "m.onnx", ("r1", "r2"), x)
    captured = made.run(x).tensors
    for name in ("r1", "r2"):
        np.testing.assert_allclose(captured[name], exact[name], atol=1e-5)


def test_captures_of_another_sample_are_its_own(residual: Path) -> None:
    built = build(residual)
    made = built.instrument(X)
    other = {"x": -2 * X["x"]}
    capture = made.run(other)
    assert capture.outputs["y"].tobytes() == built.run(other)["y"].tobytes()
    again = built.instrument(other).run(other)
    assert {n: v.tobytes() for n, v in capture.tensors.items()} == {
        n: v.tobytes() for n, v in again.tensors.items()
    }


def test_a_probe_that_changes_the_program_is_refused(
    residual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: nobody foresees that the operands of additions must be left alone."""
    built = build(residual, options=F32)
    foreseen = built.instrument(X)
    if all(p.fidelity == "output-proved" for p in foreseen.probes):
        pytest.skip("OpenVINO does not fuse Convolution + Add on this CPU")
    monkeypatch.setattr(_ov_source.Source, "operands", lambda self, group: iter(()))
    made = built.instrument(X)
    assert made.program_unchanged
    assert {p.tensor for p in made.probes} == {p.tensor for p in foreseen.probes}
    assert {p.tensor: p.fidelity for p in made.probes}["a1"] == "cone-proved"


def test_a_probe_that_the_engine_cannot_compile_is_left_out(
    residual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: as "object is not initialized", where bfloat16 reads the steps of a QDQ pair."""
    built = build(residual, options=F32)
    foreseen = built.instrument(X)
    compiled = _ov_session.Plain.compiled
    (probe,) = (c.probe for c in built._plain.candidates if c.tensor == "r1")

    def refused(self: _ov_session.Plain, model: Any) -> Any:
        if any(r.get_friendly_name() == probe for r in model.get_results()):
            raise BackendError("object is not initialized", stage="instrument")
        return compiled(self, model)

    monkeypatch.setattr(_ov_session.Plain, "compiled", refused)
    made = built.instrument(X)
    assert made.program_unchanged
    observed, before = ({p.tensor for p in i.probes} for i in (made, foreseen))
    assert before - {"r1"} <= observed


def test_nothing_is_claimed_when_outputs_differ(
    residual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: no comparison of outputs ever holds."""
    built = build(residual)
    monkeypatch.setattr(_ov_probes, "same_bits", lambda a, b: False)
    made = built.instrument(X)
    assert made.probes == ()  # what is left is the plain program itself
    assert {s.tensor for s in made.skipped} >= {"r1", "r2", "a1"}
    assert made.run(X).outputs["y"].tobytes() == built.run(X)["y"].tobytes()


def test_a_program_whose_outputs_differ_when_compiled_anew_is_told(
    residual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO shows memory that nobody wrote where a detector finds nothing, for instance."""
    built = build(residual)
    captured, compiled = _ov_session.Plain.capture, []

    def capture(self: Any, session: Any, *rest: Any) -> Any:
        outputs, tensors = captured(self, session, *rest)
        if session is not self.session:
            compiled.append(session)
            outputs = {name: value + np.float32(len(compiled)) for name, value in outputs.items()}
        return outputs, tensors

    monkeypatch.setattr(_ov_session.Plain, "capture", capture)
    made = built.instrument(X)
    assert made.probes == ()
    assert {s.reason for s in made.skipped} == {
        "compiled again without a probe, the program gives other outputs: none can be proved"
    }
    assert len(compiled) == 2  # with probes and without: no search for the one to blame


def test_a_wrong_tensor_made_apart_is_refused(
    residual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: kernels run apart write values that are off by one bit."""
    run = _ov_session.CutOut.run

    def off(self: Any, *args: Any) -> Arrays:
        return {n: np.nextafter(v, np.float32(9)) for n, v in run(self, *args).items()}

    monkeypatch.setattr(_ov_session.CutOut, "run", off)
    made = build(residual, options=F32).instrument(X)
    # r1's whole cone is one kernel with no probe upstream: its unchanged program is its proof.
    assert {p.tensor for p in made.probes if p.fidelity == "cone-proved"} <= {"r1"}
    assert "a1" in {s.tensor for s in made.skipped}


def test_the_model_compiled_is_the_one_that_ships(residual: Path) -> None:
    """Numbering the operations changes neither kernels nor bits."""
    built = build(residual)
    core = openvino.Core()
    shipped = core.compile_model(core.read_model(residual), "CPU", {"INFERENCE_NUM_THREADS": 2})
    assert shipped(X)["y"].tobytes() == built.run(X)["y"].tobytes()
    info = [op.get_rt_info() for op in shipped.get_runtime_model().get_ordered_ops()]
    primitives = {i["primitiveType"].astype(str) for i in info}
    assert {k.primitive for k in built.provenance.kernels} <= primitives


# --- values and names ------------------------------------------------------------------------


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    kind = TensorProto.BFLOAT16
    node = helper.make_node("Flatten", ["x"], ["y"])
    path = save(
        tmp_path / "m.onnx", [node], [info("x", 1, 256, 255, dtype=kind)], [info("y", 1, 65280)]
    )
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.elem_type = kind
    onnx.save(model, path)
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80].reshape(1, 256, 255)
    y = build(path).run({"x": finite})["y"]
    assert y.dtype == np.float32
    assert y.tobytes() == (finite.astype(np.uint32) << 16).tobytes()


def test_bfloat16_is_captured_as_the_program_holds_it(residual: Path) -> None:
    built = build(residual, options={"INFERENCE_PRECISION_HINT": "bf16"})
    if precision_of(built) != "bf16":
        pytest.skip(f"OpenVINO computes in {precision_of(built)} on this CPU, whatever the hint")
    plain = build(residual)
    said = any("bf16 by default" in note for note in plain.provenance.notes)
    assert said == (precision_of(plain) == "bf16")
    held = {k.outputs[0]: k.output_precision for k in built.provenance.kernels if k.outputs}
    tensors = built.instrument(X).run(X).tensors
    assert tensors
    for name, value in tensors.items():
        if held[name] == "bf16":
            assert value.tobytes() == rounded_to_bf16(value).tobytes(), name


def test_half_precision_models_are_captured_as_the_program_holds_them(tmp_path: Path) -> None:
    pads, kind = [1, 1, 1, 1], TensorProto.FLOAT16
    nodes = nodes_of(f"s = Conv <pads = {pads}> (x, w) y = Conv <pads = {pads}> (s, w)")
    ends = [info("x", 1, 4, 6, 6, dtype=kind)], [info("y", 1, 4, 6, 6, dtype=kind)]
    weights = np.linspace(-1, 1, 144, dtype=np.float16).reshape(4, 4, 3, 3)
    path = save(tmp_path / "m.onnx", nodes, *ends, (numpy_helper.from_array(weights, "w"),))
    feeds = {"x": np.linspace(-2, 2, 144, dtype=np.float16).reshape(1, 4, 6, 6)}
    seen = build(path, options=F32).instrument(feeds).run(feeds).tensors["s"]
    assert seen.dtype == np.float32
    assert np.any(seen.astype(np.float16) != seen)  # more than 11 bits


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


def test_outputs_that_are_inputs_or_share_a_tensor(tmp_path: Path) -> None:
    nodes = nodes_of("same = Identity(x) r = Relu(x) alias = Identity(r) n = Neg(alias)")
    names = ("same", "n", "alias", "r")
    path = save(tmp_path / "m.onnx", nodes, [info("x", 1, 4)], [info(n, 1, 4) for n in names])
    x = np.array([[-1, 2, -3, 4]], np.float32)
    built = build(path)
    relu = np.maximum(x, 0)
    expected = {"same": x, "n": -relu, "alias": relu, "r": relu}
    for outputs in (built.run({"x": x}), built.instrument({"x": x}).run({"x": x}).outputs):
        assert outputs.keys() == expected.keys()
        assert all(np.array_equal(outputs[n], expected[n]) for n in expected)


def test_texts_beside_numbers_are_left_out(tmp_path: Path) -> None:
    nodes = nodes_of(
        "i = ArgMax <axis = -1, keepdims = 0> (x) label = Gather(names, i) y = Relu(x)"
    )
    outputs = [info("label", 2, dtype=TensorProto.STRING), info("y", 2, 2)]
    weights = (helper.make_tensor("names", TensorProto.STRING, [2], [b"cat", b"dog"]),)
    path = save(tmp_path / "m.onnx", nodes, [info("x", 2, 2)], outputs, weights)
    feeds: Arrays = {"x": np.array([[1, -2], [-3, 4]], np.float32)}
    built = build(path)
    for made in (built.run(feeds), built.instrument(feeds).run(feeds).outputs):
        assert made.keys() == {"y"} and np.array_equal(made["y"], [[1, 0], [0, 4]])


@pytest.mark.parametrize("op_type", ["Sum", "Dropout"])
def test_an_input_that_a_dropped_operator_renames(tmp_path: Path, op_type: str) -> None:
    nodes = [helper.make_node(op_type, ["x"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [info("x", 2)], [info("y", 2)])
    feeds: Arrays = {"x": np.array([1, 2], np.float32)}
    assert np.array_equal(build(path).run(feeds)["y"], feeds["x"])


def test_a_single_node_has_nothing_to_observe(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    path = save(tmp_path / "m.onnx", [node], [info("x", 1, 4)], [info("y", 1, 4)])
    made = build(path).instrument({"x": np.ones((1, 4), np.float32)})
    assert made.probes == made.skipped == () and made.program_unchanged and not made.rebuilt


def test_integers_keep_their_type_and_their_narrowing_is_said(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["i", "i"], ["d"]), helper.make_node("Mul", ["d", "i"], ["y"])]
    ints = TensorProto.INT64
    path = save(tmp_path / "m.onnx", nodes, [info("i", 3, dtype=ints)], [info("y", 3, dtype=ints)])
    i = np.array([1, -2, 3], np.int64)
    built = build(path)
    capture = built.instrument({"i": i}).run({"i": i})
    assert capture.outputs["y"].dtype == np.int64
    assert capture.outputs["y"].tolist() == [2, 8, 18]
    assert any("64-bit integers are computed in 32 bits" in n for n in built.provenance.notes)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.UINT16])
def test_types_that_a_probe_would_not_show_are_left_out(tmp_path: Path, kind: int) -> None:
    """NumPy has no 8-bit floats, and 16 bits that the program holds in 32 would be wrapped."""
    nodes = nodes_of(f"r = Relu(x) narrow = Cast <to = {kind}> (r) y = Cast <to = 1> (narrow)")
    path = save(tmp_path / "m.onnx", nodes, [info("x", 1, 4)], [info("y", 1, 4)])
    made = build(path, options=F32).instrument({"x": np.ones((1, 4), np.float32)})
    assert [s.tensor for s in made.skipped] == ["narrow"]
    assert "narrow" not in {p.tensor for p in made.probes}


def test_dynamic_shapes_are_fixed_and_said(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx", height="h")
    built = build(path, shapes={"x": (1, 3, 32, 32)})
    assert "The model was compiled at these static shapes: x: 1x3x32x32." in built.provenance.notes
    assert built.instrument(X).program_unchanged


# --- what goes wrong -------------------------------------------------------------------------


def test_unknown_property_names_the_closest(residual: Path) -> None:
    with pytest.raises(UsageError, match="INFERENCE_PRECISION") as caught:
        build(residual, options={"INFERENCE_PRECISION": "f32"})
    assert "INFERENCE_PRECISION_HINT" in caught.value.hint


def test_impossible_value_of_a_property(residual: Path) -> None:
    with pytest.raises(UsageError, match="INFERENCE_PRECISION_HINT"):
        build(residual, options={"INFERENCE_PRECISION_HINT": "f99"})


def test_a_precision_the_device_lacks_is_said(residual: Path) -> None:
    built = build(residual, options={"INFERENCE_PRECISION_HINT": "bf16"})
    if precision_of(built) == "bf16":
        pytest.skip("this CPU computes in bf16")
    said = "bf16 was asked for; this device computes in f32 instead."
    assert built.provenance.denied == (said,)


def test_that_other_processors_compute_otherwise_by_default_is_said(residual: Path) -> None:
    capable = set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    said = any("has neither bf16 nor f16" in n for n in build(residual).provenance.notes)
    assert said == capable.isdisjoint(("BF16", "FP16"))
    chosen = build(residual, options={"INFERENCE_PRECISION_HINT": "f32"}).provenance.notes
    assert not any("by default" in note for note in chosen)


def test_unknown_device_lists_those_there_are(residual: Path) -> None:
    with pytest.raises(UsageError, match="NPU9") as caught:
        build(residual, device="NPU9")
    assert "CPU" in caught.value.hint


def test_unsupported_operator_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Foo", ["x"], ["y"], domain="my.dom")
    path = save(
        tmp_path / "m.onnx", [node], [info("x", 1, 4)], [info("y", 1, 4)], domains=("my.dom",)
    )
    with pytest.raises(BackendError, match=r"my\.dom\.Foo") as caught:
        build(path)
    assert caught.value.stage == "build" and caught.value.hint


def test_a_model_that_cannot_be_compiled_is_no_fault_of_an_option(tmp_path: Path) -> None:
    node = helper.make_node(
        "LSTM",
        ["x", "w", "r"],
        ["y"],
        hidden_size=4,
        activations=["Sigmoid", "Relu", "Softsign"],
    )
    weights = tuple(
        numpy_helper.from_array(np.ones((1, 16, 4), np.float32), name) for name in ("w", "r")
    )
    ends = [info("x", 3, 1, 4)], [info("y", 3, 1, 1, 4)]
    path = save(tmp_path / "m.onnx", [node], *ends, weights)
    with pytest.raises(BackendError, match="softsign"):
        build(path, options=F32)


def test_failure_while_running_is_told(residual: Path) -> None:
    with pytest.raises(BackendError) as caught:
        build(residual).run({"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert caught.value.stage == "run"


def test_available_without_telemetry() -> None:
    code = (
        "import sys; from backends.ov import BACKEND; a = BACKEND.availability();"
        "assert a.available and a.devices[0].id == '', a;"
        "assert {'f32', 'int8'} <= set(a.devices[0].precisions), a;"
        "assert 'openvino_telemetry' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(ov_backend.__file__).parents[1]
    )


def test_efficientnet(efficientnet: Path) -> None:
    with np.load(efficientnet.with_suffix(".npz")) as data:
        feeds = {name: data[name][0] for name in data.files}
    built = build(efficientnet)
    made = built.instrument(feeds)
    assert made.program_unchanged
    assert len(made.probes) + 1 >= 50, made.skipped


def test_what_the_device_replaces_can_be_kept_too(tmp_path: Path) -> None:
    """A resize, and a PReLU behind a product, whose marks the device would lose."""
    rng = np.random.default_rng(5)
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "s": (8, 1, 1), "d": (8, 8), "e": (8,), "t": (8,)}
    values = {name: rng.standard_normal(shape) / 3 for name, shape in shapes.items()}
    values |= {"z": np.array([1, 1, 2, 2])}
    nodes = nodes_of(
        "c = Conv(x, w, b) p = PRelu(c, s) "
        'r = Resize <mode = "nearest", nearest_mode = "floor"> (p, , z) '
        "m = ReduceMax <axes = [2, 3], keepdims = 0> (r) g = Gemm <transB = 1> (m, d, e) "
        "q = PRelu(g, t) y = Gemm <transB = 1> (q, d, e)"
    )
    weights = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    ins, outs = [info("x", "batch", 3, 32, 32)], [info("y", "batch", 8)]
    path = save(tmp_path / "net.onnx", nodes, ins, outs, tuple(weights))
    options = {"INFERENCE_PRECISION_HINT": "bf16"}
    if precision_of(build(path, shapes={"x": (1, 3, 32, 32)}, options=options)) != "bf16":
        pytest.skip("this CPU does not compute in bf16")
    everything = tuple(node.output[0] for node in nodes)
    made = BACKEND.build(
        BuildRequest(
            *(path, {"x": (1, 3, 32, 32)}, True, None, 2, options, tmp_path),
            artifact=tmp_path / "net.xml",
            kept=everything,
        )
    )
    ran = {k.precision for k in made.provenance.kernels if "bf16" in (k.precision, k.primitive)}
    assert ran == set()
    assert {n for k in made.provenance.kernels for n in k.nodes} >= {"q", "r"}
    expected = reference(path, ("y",), X)["y"]
    assert np.linalg.norm(made.run(X)["y"] - expected) < 2e-6 * np.linalg.norm(expected)
    halves = {"INFERENCE_PRECISION_HINT": "f16"}
    shipped = BACKEND.build(
        BuildRequest(
            *(path, {"x": (1, 3, 32, 32)}, True, None, 2, halves, tmp_path),
            artifact=tmp_path / "net.xml",
        )
    )
    seen = shipped.instrument(X)
    why = {skipped.tensor: skipped.reason for skipped in seen.skipped}
    assert not seen.probes, "a copy rounded to float16 for the probe is not the tensor"
    assert "for the probe alone" in why["p"], why


def test_a_refusal_says_what_the_translator_said(tmp_path: Path) -> None:
    """A tensor of another size than a Reshape is for, as a Resize that went wrong leaves it."""
    shape = numpy_helper.from_array(np.array([1, 40]), "shape")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [info("x", 1, 56)], [info("y", 1, 40)], (shape,))
    with pytest.raises(BackendError, match=r"Reshape-17 .* here: .*output shape \[1,40\]"):
        build(path)
