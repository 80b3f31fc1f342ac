from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import surgery
from auditor.ports import Array
from auditor.replays import sessions


def model(
    nodes: list[onnx.NodeProto], kind: int = TensorProto.FLOAT, version: int = 17
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, None)],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(np.array([2.0], np.float32), "two")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=8)


def run(of: onnx.ModelProto, x: Array) -> Array:
    return np.asarray(sessions.session(of, 1).run(None, {"x": x})[0])


CHAIN = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Neg", ["r"], ["y"])]
X = np.array([-1, 2, 3], np.float32)


@pytest.mark.parametrize("version", [11, 13, 18, 21])
def test_a_node_runs_another_body_and_the_source_is_untouched(version: int) -> None:
    source = model(CHAIN, version=version)
    before = source.SerializeToString()
    changed = surgery.substituted(source, {0: "(a) => (b) { b = Mul(a, a) }"})
    np.testing.assert_array_equal(run(changed, X), -(X * X))
    assert source.SerializeToString() == before


def test_changes_add_up() -> None:
    changed = surgery.substituted(model(CHAIN), {0: "(a) => (b) { b = Mul(a, a) }"})
    again = surgery.substituted(changed, {1: "(a) => (b) { b = Add(a, a) }"})
    np.testing.assert_array_equal(run(again, X), 2 * X * X)


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
def test_tensors_pass_functions_on_their_way(kind: Any) -> None:
    half = (
        "(a) => (b) { c = Constant <value = float {0.5}> () k = Cast <to = $T> (c) b = Mul(a, k) }"
    )
    source = model(CHAIN, helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    both = surgery.passing(source, {(0, 0): half, (1, 0): half}, {1: half})
    result = run(both, X.astype(kind))
    assert result.dtype == kind
    np.testing.assert_array_equal(result, -np.maximum(X, 0).astype(kind) / 8)


def test_integers_pass_unchanged() -> None:
    body = "(a) => (b) { b = Neg(a) }"
    source = model([helper.make_node("Abs", ["x"], ["y"])], TensorProto.INT64)
    assert len(surgery.passing(source, {(0, 0): body}, {0: body}).graph.node) == 1


def test_attributes_are_read_written_and_printed() -> None:
    node = helper.make_node("AveragePool", ["x"], ["y"], auto_pad="VALID", kernel_shape=[2, 2])
    assert surgery.attributes(node) == {"auto_pad": "VALID", "kernel_shape": [2, 2]}
    surgery.set_attributes(node, auto_pad=None, ceil_mode=1)
    assert surgery.attributes(node) == {"kernel_shape": [2, 2], "ceil_mode": 1}
    body = f"(a) => (b) {{ b = AveragePool {surgery.options(node, ceil_mode=None)} (a) }}"
    image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    plain = run(surgery.substituted(model([node]), {0: body}), image)
    assert plain.shape == (1, 1, 3, 3) and plain[0, 0, 0, 0] == 2.5


@pytest.mark.parametrize("version", [11, 13, 17, 18])
@pytest.mark.parametrize("op_type", ["ReduceSum", "ReduceMax"])
def test_reductions_in_every_operator_set(version: int, op_type: str) -> None:
    body = f"(a) => (b) {{ {surgery.reduction('b', op_type, 'a', [-1], version)} }}"
    source = model([helper.make_node("Neg", ["x"], ["y"])], version=version)
    result = run(surgery.substituted(source, {0: body}), X[None])
    np.testing.assert_array_equal(result, [[4.0 if op_type == "ReduceSum" else 3.0]])


def test_who_takes_another_shape() -> None:
    tail = [helper.make_node("Neg", ["r"], ["n"]), helper.make_node("Add", ["n", "two"], ["y"])]
    alone = model([CHAIN[0], tail[0]])
    added = model([CHAIN[0], *tail])
    assert surgery.takes_any_shape(alone, alone.graph.node[0])
    assert not surgery.takes_any_shape(added, added.graph.node[0])
    assert surgery.constants(added)["two"].tolist() == [2.0]


def test_what_cannot_be_inferred_has_no_type() -> None:
    """The runtime's own quantisers mean what ONNX's do; of other operators nothing is known."""
    source = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1,
        "own" : 1]> g (float[4] x) => (y) <float s = {0.5}, uint16 z = {7}> {
            q = com.microsoft.QuantizeLinear(x, s, z) d = com.microsoft.DequantizeLinear(q, s, z)
            y = own.Unknown(d) }""")
    kinds = surgery.types(source)
    assert (kinds["q"], kinds["d"]) == (TensorProto.UINT16, TensorProto.FLOAT)
    assert "y" not in kinds
    assert [i for i, _ in surgery.find(source, ("DequantizeLinear", "Unknown"))] == [1]


def test_copies_are_left_out_but_for_outputs() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y, float[2] z) {
        a = Identity(x) b = Identity(a) c = Relu(b) d = Identity(c) y = Neg(d) z = Identity(d) }"""
    made = surgery.without_copies(onnx.parser.parse_model(text))
    assert [(n.op_type, list(n.input)) for n in made.graph.node] == [
        ("Relu", ["x"]),
        ("Neg", ["c"]),
        ("Identity", ["c"]),
    ]


def test_types_and_shapes_of_one_segment_are_inferred_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    light = surgery._light

    def counted(of: onnx.ModelProto) -> onnx.ModelProto:
        asked.append(len(of.graph.node))
        return light(of)

    monkeypatch.setattr(surgery, "_light", counted)
    source = model([*CHAIN, helper.make_node("Add", ["y", "two"], ["once"])])
    source.graph.input[0].type.tensor_type.shape.dim.add(dim_value=3)
    for _ in range(3):
        kinds, sizes = surgery.types(source), surgery.shapes(source)
        assert kinds["once"] == TensorProto.FLOAT and sizes["once"] == (3,)
        kinds.clear()  # what is handed out is the caller's own
        sizes.clear()
    assert asked == [3]
    source.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5
    assert surgery.shapes(source)["once"] == (5,)  # another model is another question


@pytest.mark.parametrize("size", [1, 1 << 17])  # encoded at once, and without its weights
def test_weights_that_are_inputs_as_well_are_counted_once(size: int) -> None:
    source = model([helper.make_node("Add", ["x", "wide"], ["y"])])
    source.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)
    source.graph.initializer.append(numpy_helper.from_array(np.ones(size, np.float32), "wide"))
    source.graph.input.append(helper.make_tensor_value_info("wide", TensorProto.FLOAT, [size]))
    assert surgery.shapes(source) == {"x": (1,), "two": (1,), "wide": (size,), "y": (size,)}
