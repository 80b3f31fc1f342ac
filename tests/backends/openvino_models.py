"""Models for the tests of the OpenVINO backend, and what they should give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.records.backend import BuildRequest
from backends.ov import BACKEND

if TYPE_CHECKING:
    from auditor.ports import Array, Arrays, Build


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
