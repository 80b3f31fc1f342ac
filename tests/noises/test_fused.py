"""Fused operators are written out as ONNX Runtime computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from auditor.graphs import model_file, surgery
from auditor.graphs.segments import Graph
from auditor.ports import Array, SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays import fused
from tests.segments import diagnose, make_segment, run

DOMAIN = "com.microsoft"
RNG = np.random.default_rng(5)


def drawn(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def declare(segment: SegmentGraph, feeds: dict[str, Array]) -> onnx.ModelProto:
    """Give the inputs their types and shapes, as segments have them."""
    for value in segment.model.graph.input:
        kind = helper.np_dtype_to_tensor_dtype(feeds[value.name].dtype)
        shape = feeds[value.name].shape
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))
    return segment.model


X, SKIP = drawn(2, 5, 12), drawn(2, 5, 12)
QKV = {"w": drawn(12, 36), "b": drawn(36)}
KEPT = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
NORM = {"g": drawn(12), "b": drawn(12), "a": drawn(12)}
WORDS = np.array([[3, 0, 4, 1, 2], [1, 1, 2, 3, 0]], np.int32)
TABLES = {
    "we": drawn(5, 12),
    "pe": drawn(7, 12),
    "se": drawn(2, 12),
    "g": drawn(12),
    "b": drawn(12),
}
WEAK = {"num_heads": 3, "mask_filter_value": -3.0}
# What ends each of the kernels below, where there are several.
ENDS = {
    "Attention": ["Reshape", "Add", "Reshape", "Reshape"],
    "SkipLayerNormalization": ["Add", "Add", "LayerNormalization", "LayerNormalization"],
    "EmbedLayerNormalization": ["Add", "Add", "LayerNormalization", "LayerNormalization"],
}


@pytest.mark.parametrize(
    ("op_type", "feeds", "constants", "options"),
    [
        ("Gelu", {"x": X}, {}, {}),
        ("QuickGelu", {"x": X}, {}, {"alpha": 1.5}),
        ("FastGelu", {"x": X}, {"b": drawn(12)}, {}),
        ("BiasGelu", {"x": X}, {"b": drawn(12)}, {}),
        ("SkipLayerNormalization", {"x": X, "s": SKIP}, NORM, {"epsilon": 0.01}),
        ("Attention", {"x": X}, QKV, {"num_heads": 3}),
        ("Attention", {"x": X}, {**QKV, "m": KEPT}, WEAK),
        ("Attention", {"x": X}, {**QKV, "m": KEPT.sum(1, dtype=np.int32)}, {**WEAK, "scale": 0.7}),
        ("SkipSimplifiedLayerNormalization", {"x": X, "s": SKIP}, {"g": NORM["g"]}, {}),
        ("FusedConv", {"x": X}, {"w": drawn(4, 5, 3)}, {"activation": "Tanh"}),
        (
            "FusedConv",
            {"x": X},
            {"w": drawn(4, 5, 3), "b": drawn(4), "z": drawn(2, 4, 10)},
            {"activation": "Clip", "activation_params": [0.0, 0.5]},
        ),
        (
            "FusedGemm",
            {"x": X[0]},
            {"w": drawn(12, 4), "b": drawn(4)},
            {"activation": "LeakyRelu", "activation_alpha": 0.3, "alpha": 0.5},
        ),
        ("FusedMatMul", {"x": X, "s": SKIP}, {}, {"transB": 1, "alpha": 0.3}),
        ("EmbedLayerNormalization", {"i": WORDS, "s": WORDS % 2}, TABLES, {"epsilon": 0.01}),
        ("MultiHeadAttention", {"q": X, "k": SKIP, "v": X}, {"b": drawn(36), "m": KEPT}, WEAK),
    ],
)
def test_written_out(
    op_type: str, feeds: dict[str, Array], constants: dict[str, Array], options: dict[str, Any]
) -> None:
    outputs = ["y", "mask"] if op_type == "EmbedLayerNormalization" else ["y"]
    node = helper.make_node(op_type, [*feeds, *constants], outputs, domain=DOMAIN, **options)
    made: SegmentGraph = make_segment([node], constants, list(feeds), ["y"])
    made.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    declare(made, feeds)
    kernels = tuple(
        Kernel(kind, kind, ("y",), (), "", "f32", "f32")
        for kind in ("Subgraph", "FullyConnected", "MVN", "Subgraph")
    )
    segment = fused.written_out(SegmentGraph(made.model, kernels))
    assert {n.domain for n in segment.model.graph.node} == {""}
    np.testing.assert_allclose(
        run(segment.model, feeds)["y"], run(made.model, feeds)["y"], rtol=2e-5, atol=2e-6
    )
    types = {n.output[0]: n.op_type for n in segment.model.graph.node}
    if op_type in ENDS:
        assert [types[kernel.nodes[0]] for kernel in segment.kernels] == ENDS[op_type]


def test_what_keeps_a_cache_stays() -> None:
    node = helper.make_node(
        "Attention", ["x", "w", "b", "", "p"], ["y", "q"], domain=DOMAIN, num_heads=3
    )
    segment = make_segment([node], QKV, ["x", "p"], ["y", "q"])
    segment.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    assert fused.written_out(segment).model.graph.node[0].op_type == "Attention"


Q, K, SEEN = drawn(2, 4, 5, 3), drawn(2, 2, 5, 3), np.tri(5, 7, -1, bool)
CACHED = {
    "q": X[..., :6],
    "k": SKIP[..., :6],
    "v": X,
    "m": SEEN,
    "pk": K[:, :, :2],
    "pv": drawn(2, 2, 2, 6),
}
UNFUSED = ("Concatenation", "Concatenation", "MatMul", "Eltwise", "Softmax", "Eltwise", "MatMul")
FUSED = ("Subgraph", "Eltwise", "Subgraph")


@pytest.mark.parametrize(
    ("feeds", "outputs", "options", "kinds", "ends"),
    [
        ({"q": Q, "k": K, "v": K}, ["y"], {"is_causal": 1}, FUSED, ["MatMul", *2 * ["Identity"]]),
        (
            CACHED,
            ["y", "nk", "nv", "qk"],
            {"q_num_heads": 2, "kv_num_heads": 2, "softcap": 0.5, "qk_matmul_output_mode": 3},
            UNFUSED,
            ["Concat", "Concat", "Mul", "Add", "Softmax", "Where", "MatMul"],
        ),
    ],
)
def test_attention(
    feeds: dict[str, Array],
    outputs: list[str],
    options: dict[str, Any],
    kinds: tuple[str, ...],
    ends: list[str],
) -> None:
    """One kernel or many; nothing left to attend to gives zeros."""
    node = helper.make_node("Attention", list(feeds), outputs, **options)
    segment = make_segment([node], {}, list(feeds), outputs, opset=24)
    made = declare(segment, feeds)
    kernels = tuple(Kernel(kind, kind, ("y",), (), "", "f32", "f32") for kind in kinds)
    segment = fused.written_out(SegmentGraph(made, kernels))
    types = {name: n.op_type for n in segment.model.graph.node for name in n.output}
    assert [types[kernel.nodes[0]] for kernel in segment.kernels] == ends
    expected = run(made, feeds)
    for name, value in run(segment.model, feeds).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("operator", ["SimplifiedLayerNormalization", "LayerNormalization"])
def test_types_that_onnx_cannot_infer(operator: str) -> None:
    """An operator of ONNX Runtime's in ONNX's domain: roundings need the type of its result."""
    proto = make_segment(f"y = {operator} <axis = -1> (x, g)", {"g": NORM["g"]}).model
    proto.opset_import[0].version = 14  # as transformers are optimised that were exported with it
    for value in (*proto.graph.input, *proto.graph.output):
        value.CopyFrom(helper.make_tensor_value_info(value.name, 1, X.shape))
    model_file.check(Path("m.onnx"), proto, ())
    graph = Graph(proto)
    made = graph.extract(graph.cut(["y"])[0], {"x": 1, "y": 1}, None, {})
    assert surgery.types(made)["y"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    "options",
    [{"left_window_size": 2}, {"is_causal": 1}, {"softcap": 0.5}, {"scale": 0.1}],
    ids=lambda options: next(iter(options)),
)
def test_an_attribute_of_attention_that_is_ignored(options: dict[str, Any]) -> None:
    """Whether it is one that is written out or not: no other cause fits by leaving it out."""
    feeds = {name: drawn(2, 3, 6, 8) for name in ("q", "k", "v")}

    def segment(**options: Any) -> SegmentGraph:
        node = helper.make_node("Attention", list(feeds), ["y"], **options)
        made = make_segment([node], {}, list(feeds), ["y"], opset=25)
        declare(made, feeds)
        return made

    found = diagnose(segment(**options), feeds, run(segment().model, feeds))
    (name,) = options
    assert (found.noise, found.variant) == (
        "implementation.attribute_ignored",
        f"Attention: {name} ignored",
    )
