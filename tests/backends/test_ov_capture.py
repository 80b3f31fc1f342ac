"""The OpenVINO backend: a probe is accepted only if the program stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.errors import BackendError
from auditor.records.backend import BuildRequest
from backends import _ov_probes, _ov_session, _ov_source
from backends.ov import BACKEND
from benchmarks import decoder, deep
from tests.backends.openvino_models import (
    F32,
    X,
    build,
    info,
    precision_of,
    reference,
    rounded_to_bf16,
    save,
)
from tests.helpers import nodes_of

if TYPE_CHECKING:
    from auditor.ports import Arrays

openvino = pytest.importorskip("openvino")


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, directions: int, batch: int
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
    programs = []
    compiled = _ov_session.Plain.compiled

    def counted(self: _ov_session.Plain, model: Any) -> Any:
        programs.append(model)
        return compiled(self, model)

    monkeypatch.setattr(_ov_session.Plain, "compiled", counted)
    made = build(path, options=F32).instrument(x)
    # Each packs all weights anew: what was moved is tried along with what is left as it was.
    assert len(programs) <= (6 if directions == batch == 1 else 4)
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


def test_a_tensor_that_one_of_two_readers_refutes_is_not_shown(
    residual: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the first kernel that makes a1 apart errs in a channel which only a sum reads."""
    model = onnx.load(residual)
    blind = next(t for t in model.graph.initializer if t.name == "c4_w")
    weights = numpy_helper.to_array(blind).copy()
    weights[:, 0] = 0
    blind.CopyFrom(numpy_helper.from_array(weights, blind.name))
    onnx.save(model, path := residual.with_name("blind.onnx"))
    right = build(path, options=F32).instrument(X).run(X).tensors
    if not {"a1", "r4", "r5"} <= right.keys():
        pytest.skip("OpenVINO does not show the operand of a sum and its readers on this CPU")
    run, erring = _ov_session.CutOut.run, list[Any]()

    def off(self: Any, known: Any, wanted: Any) -> Arrays:
        made: Arrays = dict(run(self, known, wanted))
        if "a1" in made and self in (erring or [self]):
            erring[:] = [self]
            made["a1"] = made["a1"].copy()
            made["a1"][:, 0] += 1
        return made

    monkeypatch.setattr(_ov_session.CutOut, "run", off)
    made = build(path, options=F32).instrument(X)
    shown = made.run(X).tensors
    assert erring
    assert "a1" in {s.tensor for s in made.skipped} or np.array_equal(shown["a1"], right["a1"])


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
