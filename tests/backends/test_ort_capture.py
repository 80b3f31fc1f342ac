"""What is observed in ONNX Runtime's programs, whose it is, and that observing changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from backends import _ort_session
from tests.backends.ort_models import (
    LIGHT,
    X,
    build,
    conv,
    info,
    marked,
    needs_nchwc,
    quantise,
    quantised_net,
    reference,
    relative,
    run_at,
    save,
    small_net,
    weight,
)
from tests.helpers import audit_in, onnx_model


def test_a_light_model_is_observed_whole_and_unchanged(tmp_path: Path) -> None:
    path = LIGHT / "light_squeezenet.onnx"
    feeds = {"data_0": np.random.default_rng(0).random((1, 3, 224, 224), np.float32)}
    built = build(path, tmp_path)
    needs_nchwc(built)
    observed = built.instrument(feeds)
    capture = observed.run(feeds)
    plain = built.run(feeds)
    # The session that writes its graph runs the very program a user runs.
    shipped = run_at(path, "ORT_ENABLE_ALL", feeds, None)
    assert plain.keys() == capture.outputs.keys() == shipped.keys()
    for output, value in plain.items():
        assert value.tobytes() == capture.outputs[output].tobytes() == shipped[output].tobytes()
    assert observed.program_unchanged
    assert (len(observed.probes), observed.skipped) == (39, ())
    truth = reference(path, feeds, capture.tensors)
    assert max(relative(v, truth[n]) for n, v in capture.tensors.items()) < 1e-4


def test_blocked_tensors_come_back_in_onnx_layout(tmp_path: Path) -> None:
    path = small_net(tmp_path / "net.onnx")
    built = build(path, tmp_path)
    needs_nchwc(built)
    observed = built.instrument(X)
    tensors = observed.run(X).tensors
    assert set(tensors) == {"r1", "r2", "a3", "p3", "c4", "m4", "g", "f", "y"}
    truth = reference(path, X)
    for name, value in tensors.items():  # 24 channels in blocks of 16 leave padding to remove
        assert value.flags.c_contiguous
        assert relative(value, truth[name]) < 1e-5, name
    inferred = {p.tensor for p in observed.probes if p.inferred}
    # Wider blocks leave the small pooling as it is, which keeps its tensors under their own names.
    assert {"r1", "r2", "c4", "m4"} <= inferred <= {"r1", "r2", "a3", "p3", "c4", "m4"}


def test_what_is_rounded_for_some_readers_is_shown_as_it_was_made(tmp_path: Path) -> None:
    """One Add hands its sum to the next in float32; only the normalisation reads it rounded."""
    model = onnx_model(
        "(float16[1, 64] x, float16[1, 64] y) => (float16[1, 64] b, float16[1, 64] n) "
        "{ a = Add(x, y) b = Add(a, y) n = LayerNormalization(a, scale) }",
        {"scale": np.ones(64, np.float16)},
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, 64)).astype(np.float16) for name in "xy"}
    built = build(tmp_path / "m.onnx", tmp_path)
    observed = built.instrument(feeds)
    captured = observed.run(feeds)
    assert observed.program_unchanged
    for output, value in built.run(feeds).items():
        assert value.tobytes() == captured.outputs[output].tobytes()
    sums = feeds["x"].astype(np.float32) + feeds["y"].astype(np.float32)
    assert np.array_equal(captured.tensors["a"].astype(np.float32), sums)


def test_each_node_belongs_to_one_kernel(tmp_path: Path) -> None:
    built = build(small_net(tmp_path / "net.onnx"), tmp_path)
    needs_nchwc(built)
    groups = [k.nodes for k in built.provenance.kernels if k.nodes]
    assert groups == [
        ("c1", "r1"),
        ("c2", "r2"),
        ("c3", "a3"),
        ("p3",),
        ("c4",),
        ("s4", "m4"),
        ("g",),
        ("f",),
        ("y",),
    ]
    first = built.provenance.kernels[0]
    assert (first.primitive, first.precision) == ("com.microsoft.nchwc.Conv", "f32")


def test_blocked_sum_of_dynamic_size_is_named(tmp_path: Path) -> None:
    """With unknown H and W the optimiser adds two blocked tensors as reshaped ones."""
    rng = np.random.default_rng(0)
    nodes = [
        conv("x", "a", "w1", pads=[1] * 4),
        conv("x", "b", "w2", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["ra"]),
        helper.make_node("Relu", ["b"], ["rb"]),
        helper.make_node("Add", ["ra", "rb"], ["sum"]),
        conv("sum", "y", "w3", kernel_shape=[1, 1]),
    ]
    shapes = {"w1": (24, 3, 3, 3), "w2": (24, 3, 3, 3), "w3": (16, 24, 1, 1)}
    weights = [weight(rng, n, *s) for n, s in shapes.items()]
    weights += [weight(rng, f"{n}_b", s[0]) for n, s in shapes.items()]
    size = ["N", 3, "H", "W"]
    graph = helper.make_graph(
        nodes, "sum", [info("x", *size)], [info("y", "N", 16, "H", "W")], weights
    )
    path = save(tmp_path / "sum.onnx", graph)
    built = build(path, tmp_path)
    needs_nchwc(built)
    observed = built.instrument(X)
    tensors = observed.run(X).tensors
    assert set(tensors) == {"ra", "rb", "sum", "y"}
    assert observed.skipped == ()
    truth = reference(path, X)
    assert max(relative(v, truth[n]) for n, v in tensors.items()) < 1e-5


def test_what_lies_between_transposes_taken_out_is_turned_back(tmp_path: Path) -> None:
    """A quantised sequence network: the optimiser runs its convolution with channels last."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        conv("x", "c", "w", pads=[1, 1]),  # without kernel_shape
        node("Erf", ["c"], ["e"]),
        node("Mul", ["c", "e"], ["m"]),
        node("Transpose", ["m"], ["t"], perm=[0, 2, 1]),
        node("Add", ["t", "place"], ["a"]),
        node("MatMul", ["a", "v"], ["y"]),
    ]
    shapes = {"w": (8, 4, 3), "w_b": (8,), "place": (12, 8), "v": (8, 5)}
    weights = [weight(rng, n, *s) for n, s in shapes.items()]
    graph = helper.make_graph(
        nodes, "turned", [info("x", 1, 4, 12)], [info("y", 1, 12, 5)], weights
    )
    feeds = {"x": rng.standard_normal((1, 4, 12)).astype(np.float32)}
    path = quantise(
        save(tmp_path / "float.onnx", graph),
        tmp_path / "qdq.onnx",
        [feeds],
        op_types_to_quantize=["Conv", "MatMul"],
        activation_type="QUInt8",
        reduce_range=True,  # weights of 8 bits saturate without VNNI, and values are to agree
    )
    built = build(path, tmp_path)
    tensors = built.instrument(feeds).run(feeds).tensors
    truth = reference(path, feeds)
    assert "QLinearConv" in {k.type for k in built.provenance.kernels}
    assert {"e", "m", "a"} <= tensors.keys()
    assert all(tensors[n].shape == truth[n].shape for n in tensors if n in truth)
    assert max(relative(tensors[n], truth[n]) for n in ("e", "m", "a")) < 0.05


def test_the_integer_format_is_observed_in_whole(tmp_path: Path) -> None:
    """The optimiser turns its convolutions to channels last, and names what they make anew."""
    quantization = pytest.importorskip("onnxruntime.quantization", reason="needs its dependencies")
    path = quantise(
        small_net(tmp_path / "float.onnx"),
        tmp_path / "qlinear.onnx",
        [X],
        quant_format=quantization.QuantFormat.QOperator,
        activation_type="QUInt8",
        weight_type="QUInt8",  # which no processor saturates
    )
    observed = build(path, tmp_path).instrument(X)
    assert observed.skipped == ()
    tensors, truth = observed.run(X).tensors, reference(path, X)
    operators = {n.output[0]: n.op_type for n in onnx.load(path).graph.node}
    integers = {name for name, op_type in operators.items() if op_type.startswith("QLinear")}
    assert integers and integers <= tensors.keys()
    assert all(np.array_equal(tensors[name], truth[name]) for name in integers)


def test_attention_over_windows_is_observed_in_whole(tmp_path: Path) -> None:
    """Its products lose their axes to the reshapes around them, one slice its transpose."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        n (float[1,4,4,8] x) => (float[1,4,4,8] y)
        <int64[6] split = {1,2,2,2,2,8}, int64[3] windows = {4,4,8}, int64[4] heads = {4,4,2,12},
         int64[3] joined = {4,4,8}, int64[4] whole = {1,4,4,8}, int64[1] last = {3},
         int64[1] i0 = {0}, int64[1] i4 = {4}, int64[1] i8 = {8}, int64[1] i12 = {12}> {
            f = Reshape(x, split) t = Transpose <perm = [0,1,3,2,4,5]> (f) r = Reshape(t, windows)
            p = MatMul(r, w) a = Add(b, p) h = Reshape(a, heads)
            d = Transpose <perm = [0,2,1,3]> (h) q = Slice(d, i0, i4, last)
            k = Slice(d, i4, i8, last) v = Slice(d, i8, i12, last)
            e = Transpose <perm = [0,1,3,2]> (k) m = MatMul(q, e) s = Softmax(m) o = MatMul(s, v)
            u = Transpose <perm = [0,2,1,3]> (o) g = Reshape(u, joined) z = MatMul(g, w2)
            c = Add(b2, z) n = Reshape(c, split) l = Transpose <perm = [0,1,3,2,4,5]> (n)
            y = Reshape(l, whole) }""")
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 24), "b": (24,), "w2": (8, 8), "b2": (8,)}
    model.graph.initializer.extend(weight(rng, name, *shape) for name, shape in shapes.items())
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    onnx.save(model, tmp_path / "m.onnx")
    report = tmp_path / "report.json"
    audit_in(tmp_path, "m.onnx", "--backends", "ort", "--no-confirm", "--no-cache", "-o", report)
    fidelity = json.loads(report.read_text())["backends"][0]["fidelity"]
    assert (fidelity["skipped"], fidelity["output_proved"]) == ([], fidelity["candidates"])


def test_slices_that_became_one_split_are_turned_back(tmp_path: Path) -> None:
    """Rotary positions: the optimiser splits before the transpose, and names halves after nodes."""
    draw = np.random.default_rng(0)
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        n (float[1,5,12] x) => (float[1,3,5,4] y)
        <int64[4] heads = {0,-1,3,4}, int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] i4 = {4},
         int64[1] last = {3}> {
            q = Reshape(x, heads) t = Transpose <perm = [0,2,1,3]> (q)
            a = Slice(t, i0, i2, last) b = Slice(t, i2, i4, last) n = Neg(b)
            r = Concat <axis = -1> (n, a) c = Mul(t, cos) s = Mul(r, sin) e = Add(c, s)
            k = Transpose <perm = [0,1,3,2]> (e) m = MatMul(e, k) p = Softmax(m) y = MatMul(p, e)
        }""")
    for i, node in enumerate(model.graph.node):
        node.name = f"/layer/{node.op_type}_{i}"
    model.graph.initializer.extend(weight(draw, n, 1, 1, 5, 4) for n in ("cos", "sin"))
    path = save(tmp_path / "m.onnx", model.graph)
    x = {"x": draw.standard_normal((1, 5, 12)).astype(np.float32)}
    instrumented = build(path, tmp_path).instrument(x)
    assert instrumented.program_unchanged
    captured = instrumented.run(x).tensors
    names = ["a", "b", "n", "r", "c", "s", "e"]
    assert {*names} <= captured.keys()
    for name, value in reference(path, x, names).items():
        if name in captured:
            np.testing.assert_allclose(captured[name], value, atol=1e-6, err_msg=name)


def test_rows_that_are_gathered_became_one_split(tmp_path: Path) -> None:
    """What the optimiser splits and then squeezes are the rows: it makes no tensor of its own."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        n (float[4,2] x) => (float[4] y) <int64 i0 = {0}, int64 i1 = {1}> {
            t = Tanh(x) a = Gather <axis = 1> (t, i0) b = Gather <axis = 1> (t, i1)
            s = Sigmoid(a) y = Mul(s, b) }""")
    path = save(tmp_path / "m.onnx", model.graph)
    x = {"x": np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)}
    built = build(path, tmp_path)
    assert "Split" in [kernel.type for kernel in built.provenance.kernels]
    instrumented = built.instrument(x)
    assert instrumented.skipped == ()
    assert {"t", "a", "b", "s"} <= {probe.tensor for probe in instrumented.probes}


def test_a_network_with_channels_last_is_observed_in_its_own_layout(tmp_path: Path) -> None:
    """As converters from TensorFlow write it: a bias behind the transpose behind a convolution.

    The optimiser takes the transposes out, moves the bias into the convolution, and names what it
    makes anew after nodes instead of tensors.
    """
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []

    def node(op_type: str, name: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op_type, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def layer(x: str, name: str, **attributes: object) -> str:
        first = node("Transpose", f"{name}__in", x, perm=[0, 3, 1, 2])
        made = node("Conv", f"{name}/mul", first, f"{name}_w", **attributes)
        last = node("Transpose", f"{name}__out", made, perm=[0, 2, 3, 1])
        return node("Add", f"{name}/add", last, f"{name}_b")

    first = layer("x", "c1", kernel_shape=[3, 3], pads=[1] * 4)
    gate = node("Clip", "relu6", node("Add", "three", first, "3"), "0", "6")
    swish = node("Mul", "swish", first, node("Mul", "sixth", gate, "1/6"))
    second = layer(swish, "c2", kernel_shape=[3, 3], pads=[1] * 4, group=24)
    third = layer(node("Relu", "relu", second), "c3", kernel_shape=[1, 1])
    turned = node("Transpose", "c4__in", third, perm=[0, 3, 1, 2])
    made = node("Conv", "c4", turned, "c4_w", "c4_b", kernel_shape=[1, 1])
    back = node("Transpose", "c4__out", made, perm=[0, 2, 3, 1])
    node("Add", "y", node("HardSwish", "hard", back), swish)
    shapes = {"c1_w": (24, 4, 3, 3), "c2_w": (24, 1, 3, 3), "c3_w": (24, 24, 1, 1)}
    shapes["c4_w"] = (24, 24, 1, 1)
    weights = [weight(rng, n, *shape) for n, shape in shapes.items()]
    weights += [weight(rng, f"c{i}_b", 24) for i in (1, 2, 3, 4)]
    numbers = {"3": 3, "0": 0, "6": 6, "1/6": 1 / 6}
    weights += [numpy_helper.from_array(np.float32(v), n) for n, v in numbers.items()]
    graph = helper.make_graph(
        nodes, "tf", [info("x", 1, 9, 10, 4)], [info("y:0", 1, 9, 10, 24)], weights
    )
    feeds = {"x": rng.standard_normal((1, 9, 10, 4)).astype(np.float32)}
    path = save(tmp_path / "tf.onnx", graph)
    built = build(path, tmp_path)
    needs_nchwc(built)
    observed = built.instrument(feeds)
    tensors = observed.run(feeds).tensors
    assert observed.skipped == ()
    assert tensors.keys() >= {
        "c1/add:0",
        "three:0",
        "relu6:0",
        "sixth:0",
        "swish:0",
        "relu:0",
        "hard:0",
    }
    truth = reference(path, feeds)
    assert max(relative(value, truth[name]) for name, value in tensors.items()) < 1e-5


def test_marking_a_qdq_model_measures_another_program_and_capturing_does_not(
    tmp_path: Path,
) -> None:
    path = quantised_net(tmp_path, signed=False, reduce_range=False)
    shipped = run_at(path, "ORT_ENABLE_ALL", X, tmp_path / "shipped.onnx")
    naive = run_at(marked(path), "ORT_ENABLE_ALL", X, tmp_path / "naive.onnx")
    operators = [
        sorted(n.op_type for n in onnx.load(tmp_path / name).graph.node)
        for name in ("shipped.onnx", "naive.onnx")
    ]
    assert "QLinearConv" in operators[0]
    assert "QLinearConv" not in operators[1], "marking every tensor should undo the fusions"

    built = build(path, tmp_path)
    observed = built.instrument(X)
    captured = observed.run(X).outputs["y"]
    assert observed.program_unchanged
    assert sorted(k.type for k in built.provenance.kernels) == operators[0]
    assert captured.tobytes() == shipped["y"].tobytes()
    truth = reference(path, X)["y"]
    assert relative(captured, truth) == relative(shipped["y"], truth)
    # With 8-bit weights the integer kernels of many CPUs saturate: what is shipped is off by
    # per cents, which the marked program hides.
    assert relative(naive["y"], truth) <= relative(shipped["y"], truth)


def test_a_changed_program_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: loading the graph with QDQ handling on splits DequantizeLinear nodes."""
    session = _ort_session.Options.session

    def careless(self: object, model: Path, dump: Path, level: str, extra: object, **kw: str):  # type: ignore[no-untyped-def]
        kept = extra if kw["stage"] == "build" else {}
        return session(self, model, dump, level, kept, **kw)  # type: ignore[arg-type]

    path = quantised_net(tmp_path, signed=True, reduce_range=True)
    assert build(path, tmp_path).instrument(X).program_unchanged
    monkeypatch.setattr(_ort_session.Options, "session", careless)
    assert not build(path, tmp_path).instrument(X).program_unchanged


@pytest.mark.parametrize("signed", [True, False])
def test_int8_tensors_are_named_in_any_layout(tmp_path: Path, signed: bool) -> None:
    """7-bit weights keep the integer kernels from saturating, so values must agree closely."""
    path = quantised_net(tmp_path, signed=signed, reduce_range=True)
    built = build(path, tmp_path)
    observed = built.instrument(X)
    tensors = observed.run(X).tensors
    truth = reference(path, X)
    quantised = {n for n in tensors if n.endswith("_QuantizeLinear_Output")}
    expected = {f"{n}_QuantizeLinear_Output" for n in ("x", "r1", "r2", "c3", "a3", "p3", "m4")}
    assert quantised >= expected
    assert observed.skipped == ()
    for name in quantised:
        assert tensors[name].dtype == truth[name].dtype == (np.int8 if signed else np.uint8)
        assert tensors[name].shape == truth[name].shape
        steps = np.abs(tensors[name].astype(int) - truth[name].astype(int))
        assert np.mean(steps) < 0.5, name


@pytest.mark.parametrize("signed", [True, False])
def test_integers_behind_transposes_are_not_named_as_real_numbers(
    tmp_path: Path, signed: bool
) -> None:
    """A pair of transposes hides whose integers a product reads, or channels last a pooling's.

    A tensor that was named after what the model dequantises made every one before it doubtful.
    """
    path = quantised_net(tmp_path, signed=signed, reduce_range=True)
    model = onnx.load(path)
    nodes = list(model.graph.node)
    rounding = next(n for n in nodes if n.output[0] == "r2_QuantizeLinear_Output")
    there, back = (
        helper.make_node("Transpose", [a], [b], perm=[1, 0, 2, 3])
        for a, b in (
            (rounding.input[0], "there"),
            ("there", "back"),
        )
    )
    rounding.input[0] = "back"
    at = nodes.index(rounding)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], there, back, *nodes[at:]])
    onnx.save(model, path)
    tensors = build(path, tmp_path).instrument(X).run(X).tensors
    assert "r2_QuantizeLinear_Output" in tensors
    truth = reference(path, X, tensors)
    assert {n: v.dtype for n, v in tensors.items()} == {n: truth[n].dtype for n in tensors}


def test_branches_may_repeat_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [weight(rng, "w", 16, 16, 3, 3), weight(rng, "w_b", 16)]
    local = [weight(rng, "v", 16, 16, 3, 3), weight(rng, "v_b", 16)]

    def branch(name: str, w: str) -> onnx.GraphProto:
        nodes = [conv("h", f"{name}_c", w, pads=[1] * 4)]
        nodes.append(helper.make_node("Relu", [f"{name}_c"], [f"{name}_y"]))
        nodes.append(conv(f"{name}_y", f"{name}_z", w, pads=[1] * 4))
        out = [info(f"{name}_z", 2, 16, 16, 16)]
        return helper.make_graph(nodes, name, [], out, local if w == "v" else [])

    nodes = [
        conv("x", "c", "w1", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["h"]),
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["flag"], to=TensorProto.BOOL),
        helper.make_node(
            "If", ["flag"], ["y"], then_branch=branch("then", "w"), else_branch=branch("else", "v")
        ),
    ]
    weights += [weight(rng, "w1", 16, 3, 3, 3), weight(rng, "w1_b", 16)]
    graph = helper.make_graph(
        nodes, "if", [info("x", 2, 3, 16, 16)], [info("y", 2, 16, 16, 16)], weights
    )
    path = save(tmp_path / "if.onnx", graph)
    built = build(path, tmp_path)
    observed = built.instrument(X)
    for feeds in (X, {"x": np.zeros_like(X["x"])}):  # both branches
        capture = observed.run(feeds)
        assert capture.outputs["y"].tobytes() == built.run(feeds)["y"].tobytes()
        truth = reference(path, feeds)
        assert capture.tensors["flag"].shape == ()
        for name in ("h", "y", "top"):
            np.testing.assert_allclose(capture.tensors[name], truth[name], rtol=1e-3, atol=1e-4)
    assert observed.program_unchanged


def test_constants_and_other_types_are_no_probes(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Constant", [], ["two"], value_float=2.0),
        node("Mul", ["two", "k"], ["folded"]),
        node("Add", ["x", "folded"], ["y"]),
        node("Cast", ["y"], ["text"], to=TensorProto.STRING),
        node("Cast", ["text"], ["z"], to=TensorProto.FLOAT),
    ]
    k = numpy_helper.from_array(np.float32(3), "k")
    graph = helper.make_graph(nodes, "types", [info("x", 4)], [info("y", 4), info("z", 4)], [k])
    path = save(tmp_path / "types.onnx", graph)
    feeds = {"x": np.arange(4, dtype=np.float32)}
    for level in ("all", "disable"):
        observed = build(path, tmp_path, level=level).instrument(feeds)
        assert {p.tensor for p in observed.probes} == {"y", "z"}
        assert [s.tensor for s in observed.skipped] == ["text"]
        assert "string" in observed.skipped[0].reason
        assert set(observed.run(feeds).tensors) == {"y", "z"}
