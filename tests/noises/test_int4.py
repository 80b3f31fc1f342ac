"""Weights of 4 bits, as the engines' own tools write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from tests.helpers import ROOT, audit_in, nodes_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers; the second is a Gemm, whose weights lie transposed."""
    rng = np.random.default_rng(5)
    nodes = nodes_of("m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = Gemm <transB = 1> (r, v, c)")
    constants = {"w": (96, 64), "b": (64,), "v": (48, 64), "c": (48,)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 48])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in constants.items()
        ],
    )
    path = tmp_path / "model.onnx"
    imports = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def named(model: Path, *options: object, explained: float = 0.9999) -> set[str | None]:
    """The causes of what is found, each of which explains as much."""
    report = model.with_suffix(".json")
    done = audit_in(ROOT, model, "--no-confirm", "-o", report, *options)
    assert done.returncode == 1, done.stderr
    findings = json.loads(report.read_text())["findings"]
    assert all((f["explained"] or 0) > explained for f in findings)
    assert any("stored in 4 bits" in line for f in findings for line in f["evidence"])
    return {f["noise"] for f in findings}


@pytest.mark.parametrize("written", list(QuantFormat))
@pytest.mark.parametrize("symmetric", [True, False])
def test_runtime_operators(model: Path, written: QuantFormat, symmetric: bool) -> None:
    """``MatMulNBits`` and DequantizeLinear by blocks; the last block is not full."""
    how = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=symmetric, quant_format=written)
    tool = MatMulNBitsQuantizer(onnx.load(model), algo_config=how)
    tool.process()
    candidate = model.with_name("four.onnx")
    tool.model.save_model_to_file(str(candidate), False)
    assert named(model, "--backends", "ort", "--candidate", candidate) == {"precision.int4"}


def test_an_engines_own_file(model: Path) -> None:
    """Which stores weights transposed, under names of its own, and rounds what they multiply."""
    import nncf

    made = nncf.compress_weights(
        ov.convert_model(model),
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=32,
        all_layers=True,
    )
    artifact = model.with_name("four.xml")
    ov.save_model(made, artifact, compress_to_fp16=False)
    options = ("--option", "ov.INFERENCE_PRECISION_HINT=f32", "--artifact", f"ov={artifact}")
    assert named(model, "--backends", "ov", *options, explained=0.99) == {"precision.int4"}
