"""Tensors of another export of the same network find their counterparts."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.capture.matching import match
from auditor.graphs.segments import Graph


def _chain(ops, names, inputs="x"):
    nodes, weights, current = [], [], inputs
    for op, name in zip(ops, names, strict=True):
        read = [current]
        if op == "MatMul":
            weights.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), f"w_{name}"))
            read.append(f"w_{name}")
        nodes.append(helper.make_node(op, read, [name]))
        current = name
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(inputs, TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, [1, 4])],
        weights,
    )
    return Graph(onnx.helper.make_model(graph))


def test_equal_names_correspond():
    a = _chain(["MatMul", "Relu", "Exp"], ["a", "b", "y"])
    assert match(a, a) == {n: n for n in ("x", "a", "b", "y")}


def test_renamed_tensors_correspond_by_place():
    ours = _chain(["MatMul", "Relu", "Exp"], ["a", "b", "y"])
    theirs = _chain(["MatMul", "Relu", "Exp"], ["t1", "t2", "out"], inputs="in")
    assert match(ours, theirs) == {"in": "x", "t1": "a", "t2": "b", "out": "y"}


def test_an_inserted_node_shifts_nothing():
    ours = _chain(["MatMul", "Relu", "MatMul", "Exp"], ["a", "b", "c", "y"])
    theirs = _chain(["MatMul", "Relu", "Abs", "MatMul", "Exp"], ["t1", "t2", "t3", "t4", "out"])
    assert match(ours, theirs) == {"x": "x", "t1": "a", "t2": "b", "t4": "c", "out": "y"}


def test_what_is_passed_on_under_a_name_is_what_it_names():
    ours = _chain(["MatMul", "Relu", "Exp"], ["a", "b", "y"])
    theirs = _chain(["MatMul", "Identity", "Relu", "Exp"], ["new", "a", "b", "y"])
    assert match(ours, theirs)["new"] == "a"


def test_outputs_that_are_constants_correspond():
    proto = _chain(["MatMul", "Relu"], ["a", "y"]).proto
    proto.graph.output.append(helper.make_tensor_value_info("w_a", TensorProto.FLOAT, [4, 4]))
    assert match(Graph(proto), Graph(proto))["w_a"] == "w_a"
