"""Models for the tests of the ONNX Runtime backend, and what they should give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.records.backend import BuildRequest
from backends.ort import BACKEND

if TYPE_CHECKING:
    from collections.abc import Iterable

    from auditor.ports import Arrays, Build

ort = pytest.importorskip("onnxruntime")

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
X = {"x": np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)}


def build(path: Path, workdir: Path, *, device: str | None = None, **options: str) -> Build:
    return BACKEND.build(BuildRequest(path, {}, False, device, 2, options, workdir))


def info(name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(rng: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    scale = np.sqrt(2 / np.prod(shape[1:]))
    return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)


def conv(x: str, y: str, w: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, w, f"{w}_b"], [y], **attributes)


def save(path: Path, graph: onnx.GraphProto, **options: object) -> Path:
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, path, **options)
    return path


def small_net(path: Path, *, height: int | str = 16, **options: object) -> Path:
    """A CNN whose 24 channels are padded when blocked, with a residual Add, SiLU and a head."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        conv("x", "c1", "w1", pads=[1] * 4, kernel_shape=[3, 3]),
        node("Relu", ["c1"], ["r1"]),
        conv("r1", "c2", "w2", pads=[1] * 4, kernel_shape=[3, 3], group=24),
        node("Clip", ["c2", "low", "high"], ["r2"]),
        conv("r2", "c3", "w3", kernel_shape=[1, 1]),
        node("Add", ["c3", "r1"], ["a3"]),
        node("MaxPool", ["a3"], ["p3"], kernel_shape=[2, 2], strides=[2, 2]),
        conv("p3", "c4", "w4", kernel_shape=[1, 1]),
        node("Sigmoid", ["c4"], ["s4"]),
        node("Mul", ["c4", "s4"], ["m4"]),
        node("GlobalAveragePool", ["m4"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w5", "w5_b"], ["y"]),
    ]
    shapes = {
        "w1": (24, 3, 3, 3),
        "w2": (24, 1, 3, 3),
        "w3": (24, 24, 1, 1),
        "w4": (32, 24, 1, 1),
        "w5": (32, 10),
    }
    weights = [weight(rng, name, *shape) for name, shape in shapes.items()]
    biases = [weight(rng, f"{name}_b", shape[0]) for name, shape in shapes.items() if name != "w5"]
    limits = [
        numpy_helper.from_array(np.float32(0), "low"),
        numpy_helper.from_array(np.float32(6), "high"),
    ]
    initializers = [*weights, *biases, weight(rng, "w5_b", 10), *limits]
    inputs = [info("x", "N", 3, height, height)]
    graph = helper.make_graph(nodes, "net", inputs, [info("y", "N", 10)], initializers)
    return save(path, graph, **options)


def quantise(source: Path, path: Path, samples: list[Arrays], **options: Any) -> Path:
    """A float model in QDQ form, calibrated on ``samples``; types by their ``QuantType`` names."""
    quantization = pytest.importorskip("onnxruntime.quantization", reason="needs its dependencies")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = iter(samples)

        def get_next(self) -> Arrays | None:
            return next(self.batches, None)

    for key in options.keys() & {"weight_type", "activation_type"}:
        options[key] = quantization.QuantType[options[key]]
    quantization.quantize_static(source, path, Reader(), **options)
    return path


def quantised_net(tmp_path: Path, *, signed: bool, reduce_range: bool) -> Path:
    """``small_net`` in QDQ form."""
    return quantise(
        small_net(tmp_path / "float.onnx"),
        tmp_path / "qdq.onnx",
        [X, {"x": -X["x"]}],
        per_channel=True,
        reduce_range=reduce_range,
        weight_type="QInt8",
        activation_type="QInt8" if signed else "QUInt8",
    )


def marked(path: Path, only: Iterable[str] | None = None) -> onnx.ModelProto:
    """The model with every tensor as an output: what other tools compile to observe it."""
    model = onnx.load(path)
    declared = {o.name for o in model.graph.output}
    for node in model.graph.node:
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name)
            for name in node.output
            if name not in declared and (only is None or name in only)
        )
    return model


def run_at(model: onnx.ModelProto | Path, level: str, feeds: Arrays, dump: Path | None) -> Arrays:
    """All outputs of a plain session on ``model``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def reference(path: Path, feeds: Arrays, only: Iterable[str] | None = None) -> Arrays:
    return run_at(marked(path, only), "ORT_DISABLE_ALL", feeds, None)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    difference = a.astype(np.float64) - b.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(b.astype(np.float64)))


def needs_nchwc(built: Build) -> None:
    if not any("nchwc" in k.primitive for k in built.provenance.kernels):
        pytest.skip("this CPU has no NCHWc kernels in ONNX Runtime")
