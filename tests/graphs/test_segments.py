"""Cutting a graph: every node is in a segment, and segments chain up to the whole model."""

import time

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from auditor.comparison.metrics import bitwise_equal
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.graphs.segments import Graph
from auditor.replays import replay
from auditor.replays.reference import Reference
from auditor.replays.replay import Replayer
from auditor.replays.sessions import session
from tests.helpers import nodes_of


def _model(nodes, weights=(), inputs=("x",), outputs=("y",), opset=17):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 8]) for n in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(v, n) for n, v in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    return model


@pytest.fixture
def residual():
    """Two layers with a skip, a folded constant and a node with two outputs."""
    rng = np.random.default_rng(0)
    weights = [(n, rng.standard_normal((8, 8)).astype(np.float32)) for n in ("w1", "w2")]
    return _model(
        nodes_of(
            "a = MatMul(x, w1) b = Relu(a) w2t = Transpose <perm = [1, 0]> (w2) "
            "c = MatMul(b, w2t) d = Add(c, a) e, f = Split <axis = 1> (d) "
            "y = Concat <axis = 1> (f, e)"
        ),
        weights,
    )


def test_a_segment_is_the_cone_between_captured_tensors(residual):
    cuts = Graph(residual).cut(["a", "d", "y"])
    assert [(c.inputs, c.outputs) for c in cuts] == [
        (("x",), ("a",)),
        (("a",), ("d",)),
        (("d",), ("y",)),
    ]
    assert [len(c.nodes) for c in cuts] == [1, 3, 2]
    assert cuts[1].constants == (2,)


def test_outputs_of_one_node_share_a_segment(residual):
    cuts = Graph(residual).cut(["d", "e", "f", "y"])
    assert ("e", "f") in [c.outputs for c in cuts]


def test_one_of_two_outputs_of_a_node_may_be_a_boundary(residual):
    feeds = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)}
    graph = Graph(residual)
    whole = Replayer(graph, 1).walk(graph.cut(["y"]), feeds)
    split = Replayer(graph, 1).walk(graph.cut(["e", "y"]), feeds)
    assert bitwise_equal({"y": whole["y"]}, {"y": split["y"]})


def test_constants_inputs_and_unknown_names_are_no_boundaries(residual):
    assert Graph(residual).cut(["w2t", "x", "nonsense", "y"]) == Graph(residual).cut(["y"])


def test_a_subgraph_reads_its_outer_tensors():
    def branch(name, op):
        node = helper.make_node(op, ["a"], [name])
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out])

    model = _model(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node(
                "If", ["c"], ["y"], then_branch=branch("t", "Exp"), else_branch=branch("e", "Neg")
            ),
        ],
        [("c", np.asarray(True))],
    )
    cuts = Graph(model).cut(["a", "y"])
    assert cuts[1].inputs == ("a",)


@settings(max_examples=15)
@given(st.data())
def test_segment_by_segment_has_the_bits_of_the_whole(data):
    """Random chains with skips, cut at random tensors, equal the uncut model bit for bit."""
    length = data.draw(st.integers(2, 10))
    names = ["x"]
    nodes, weights = [], []
    rng = np.random.default_rng(length)
    for i in range(length):
        op = data.draw(st.sampled_from(["Relu", "MatMul", "Add", "Sigmoid"]))
        read = data.draw(st.sampled_from(names))
        if op == "MatMul":
            weights.append((f"w{i}", rng.standard_normal((8, 8)).astype(np.float32)))
            inputs = [read, f"w{i}"]
        else:
            inputs = [read, data.draw(st.sampled_from(names))] if op == "Add" else [read]
        nodes.append(helper.make_node(op, inputs, [f"t{i}"]))
        names.append(f"t{i}")
    model = _model(nodes, weights, outputs=(names[-1],))
    graph = Graph(model)
    cuts = graph.cut([*data.draw(st.sets(st.sampled_from(names[1:]))), names[-1]])
    x = rng.standard_normal((2, 8)).astype(np.float32)
    whole = session(model, 1).run(None, {"x": x})[0]
    pieces = Replayer(graph, 1).walk(cuts, {"x": x})[names[-1]]
    assert whole.tobytes() == pieces.tobytes()
    covered = {n for c in cuts for n in c.nodes}
    assert all(c.nodes for c in cuts)
    assert graph.producer[names[-1]] in covered


def test_a_walk_reruns_only_what_changed(residual, monkeypatch):
    graph = Graph(residual)
    cuts = graph.cut(["a", "b", "c", "d", "y"])
    replayer = Replayer(graph, 1)
    feeds = {"x": np.ones((2, 8), np.float32)}
    base = replayer.walk(cuts, feeds)
    ran = []
    original = replayer.run
    monkeypatch.setattr(replayer, "run", lambda cut, v: ran.append(cut.id) or original(cut, v))
    patched = replayer.walk(
        cuts, feeds, base, {"s2": lambda o, _: {n: v + 1 for n, v in o.items()}}
    )
    assert ran == ["s3", "s4"]
    np.testing.assert_allclose(patched["d"], base["d"] + 1, rtol=1e-6)


def test_a_walk_returns_what_is_wanted(residual):
    graph = Graph(residual)
    cuts = graph.cut(["a", "b", "c", "d", "y"])
    replayer = Replayer(graph, 1)
    feeds = {"x": np.ones((2, 8), np.float32)}
    full = replayer.walk(cuts, feeds)
    some = replayer.walk(cuts, feeds, wanted=("b", "y"))
    assert some.keys() == {"b", "y"}
    assert bitwise_equal(some, {name: full[name] for name in some})


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_work_beside_each_other_comes_in_order_and_not_far_ahead(residual, threads):
    replayer = Replayer(Graph(residual), threads)
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        return item * item

    for number, result in enumerate(replayer.beside(work, range(20))):
        assert result == number * number
        assert len(begun) <= number + 2 + threads
    with pytest.raises(ZeroDivisionError):
        list(replayer.beside(lambda item: 1 // item, (1, 0, 1)))


def test_a_model_larger_than_the_budget_uses_its_threads_inside_of_segments(heavy):
    small = Replayer(Graph(heavy.proto), 4, heavy.weights, heavy.folder, budget=1 << 20)
    large = Replayer(Graph(heavy.proto), 4, heavy.weights, heavy.folder)
    assert (small.threads, large.threads) == (4, 1)


def test_sparse_and_missing_optional_inputs_are_fine():
    model = _model(
        [helper.make_node("Clip", ["x", "", "high"], ["y"])], [("high", np.float32(0.5))]
    )
    graph = Graph(model)
    (cut,) = graph.cut(["y"])
    found = Replayer(graph, 1).walk((cut,), {"x": np.ones((2, 8), np.float32)})
    assert float(found["y"].max()) == 0.5


def test_integers_of_another_width_are_replayed_as_the_model_holds_them():
    text = """<ir_version: 10, opset_import: ["": 18]>
        g (int32[2] x) => (int32[2] y) { h = Add (x, x)  y = Add (h, x) }"""
    graph = Graph(onnx.parser.parse_model(text))
    replayer, cuts = Replayer(graph, 1), graph.cut(["h", "y"])
    x = {"x": np.array([1, 2], np.int32)}
    replayer.walk(cuts, x)
    seen = x | {"h": np.array([7, 2**32 + 7])}
    assert replayer.run(cuts[1], seen)["y"].tolist() == [8, 9]


def test_a_mask_of_floats_is_replayed_where_they_are_zeros_and_ones():
    text = """<ir_version: 10, opset_import: ["": 18]>
        g (float[2] x) => (float[2] y) { m = Greater (x, x)  y = Cast <to = 1> (m) }"""
    graph = Graph(onnx.parser.parse_model(text))
    replayer, cut = Replayer(graph, 1), graph.cut(["m", "y"])[1]
    for mask in (np.array([True, False]), np.float32([1, 0])):
        assert replayer.run(cut, {"m": mask})["y"].tolist() == [1, 0]


def test_types_that_cannot_be_fed_are_named(tmp_path):
    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float8e4m3fn[4] x) => (float[4] y) { y = Cast <to = 1> (x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    model = models.load(tmp_path / "m.onnx")
    reference = Reference(model, 1)
    with pytest.raises(UsageError, match="`x` is float8_e4m3fn") as caught:
        reference.run({"x": np.zeros(4, model.inputs[0].dtype)})
    assert "Cast" in caught.value.hint


def test_two_backends_may_see_different_outputs_of_one_node(residual):
    """Sessions are shared between cuts, but never between different outputs."""
    graph = Graph(residual)
    replayer = Replayer(graph, 1)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)}
    whole = replayer.walk(graph.cut(["d", "e", "f", "y"]), feeds)
    for seen in ("e", "f"):
        found = replayer.walk(graph.cut(["d", seen]), feeds)
        np.testing.assert_array_equal(found[seen], whole[seen])


@pytest.fixture
def heavy(tmp_path):
    """A chain of matrix products with 256 KiB of weights each, and its model file."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(12):
        values = rng.standard_normal((256, 256)).astype(np.float32) / 16
        weights.append(numpy_helper.from_array(values, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Tanh", [f"h{i}"], [f"t{i}"]))
        last = f"t{i}"
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 256])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [4, 256])],
        weights,
    )
    path = tmp_path / "heavy.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return models.load(path)


def test_a_model_larger_than_the_budget_gives_the_same_bits(heavy):
    feeds = {"x": np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)}
    whole, pieces = Reference(heavy, 1), Reference(heavy, 1, budget=1 << 20)
    assert whole.whole and not pieces.whole
    assert "node by node" in pieces.info.engine
    expected = whole.run(feeds)
    assert bitwise_equal(pieces.run(feeds), expected)
    cuts = pieces.graph.cut(pieces.graph.producer)
    assert bitwise_equal({"t11": pieces.replayer.walk(cuts, feeds)["t11"]}, expected)


def test_sessions_hold_no_more_weights_than_the_budget(heavy):
    replayer = Replayer(Graph(heavy.proto), 1, heavy.weights, heavy.folder, budget=1 << 20)
    feeds = {"x": np.ones((4, 256), np.float32)}
    cuts = replayer.graph.cut(replayer.graph.producer)
    first = replayer.walk(cuts, feeds)
    assert 0 < replayer.held <= 1 << 20
    assert len(replayer._sessions) < len(cuts)
    again = replayer.walk(cuts, feeds)  # those given up are made again
    assert bitwise_equal(first, again)
    assert replayer.held <= 1 << 20


def test_walks_in_step_share_sessions_that_cannot_be_kept(heavy, monkeypatch):
    replayer = Replayer(Graph(heavy.proto), 1, heavy.weights, heavy.folder, budget=1 << 20)
    feeds = {"x": np.ones((4, 256), np.float32)}
    cuts = replayer.graph.cut(replayer.graph.producer)
    base = replayer.walk(cuts, feeds)

    def negated(cut):
        patch = {cut.id: lambda outputs, _: {name: -value for name, value in outputs.items()}}
        return replayer.walk(cuts, feeds, base, patch, ("t11",))

    apart = list(map(negated, cuts[::3]))
    made = []
    compiled = replay.session
    monkeypatch.setattr(replay, "session", lambda *given: made.append(given) or compiled(*given))
    together = list(replayer.walking(negated, cuts[::3]))
    assert all(map(bitwise_equal, together, apart))
    assert len(made) <= len(cuts)
    walks = replayer.walking(lambda cut: negated(cut) if cut is not cuts[3] else 1 / 0, cuts)
    assert next(walks).keys() == {"t11"}
    with pytest.raises(ZeroDivisionError):
        list(walks)  # and the others are not waited for


def test_integers_between_captured_real_values_are_no_boundary() -> None:
    """A program that does not round there holds integers all the same, where others read them."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (float[4] y)'
        "<float s = {0.1}, uint8 z = {3}>"
        "{ a = Relu(x) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) y = Relu(d) }"
    )
    graph = Graph(model)
    assert graph.halves({"a", "q", "d", "y"}) == {"q"}
    assert graph.halves({"q", "d", "y"}) == set()
    assert graph.halves({"a", "q", "y"}) == set()
