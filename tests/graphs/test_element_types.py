"""Element types put in the place of others, wherever a graph names one."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from auditor.graphs import element_types

GRAPH = """g (bool k, double[2] x) => (double[2] y) <double[1] w = {1e300}> {
    r = Cast <to = 11> (w)
    y = If (k) <then_branch = a () => (p) { p = Add(x, r) },
        else_branch = b () => (double[2] q) { q = Constant <value = double[2] {1.0, 2.0}> () }>
}"""


def test_every_place_that_names_a_type() -> None:
    graph = onnx.parser.parse_graph(GRAPH)
    before = list(element_types.of_graph(graph))
    element_types.replace(graph, {TensorProto.DOUBLE: TensorProto.FLOAT})
    after = list(element_types.of_graph(graph))
    assert before.count(TensorProto.DOUBLE) == after.count(TensorProto.FLOAT) == 6
    assert TensorProto.DOUBLE not in after and TensorProto.BOOL in after
    assert np.isposinf(numpy_helper.to_array(graph.initializer[0])).all()


def test_what_declares_no_type_still_declares_none() -> None:
    """An empty type is not the same to ONNX: it infers none in its place."""
    graph = onnx.parser.parse_graph(GRAPH)
    element_types.replace(graph, {TensorProto.DOUBLE: TensorProto.FLOAT})
    branch = graph.node[1].attribute[0].g
    assert branch.output[0].name == "p" and not branch.output[0].HasField("type")
