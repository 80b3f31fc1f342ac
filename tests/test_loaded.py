"""``--artifact``: engines' own files, as the engines write them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
import tensorrt_rtx as trt
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.target import codegen

from backends import _tvm_library
from tests.helpers import ROOT, audit_in

audit = partial(audit_in, ROOT)


def network(path: Path, *, scale: float = 1.0, output: str = "logits") -> Path:
    rng = np.random.default_rng(4)
    w = (rng.standard_normal((16, 3, 3, 3)) * scale).astype(np.float32)
    v = rng.standard_normal((16, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "v"], [output]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "network",
        [value("image", TensorProto.FLOAT, [1, 3, 16, 16])],
        [value(output, TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def converted(model: Path, name: str, *, compressed: bool) -> Path:
    path = model.with_name(name)
    ov.save_model(ov.convert_model(model), path, compress_to_fp16=compressed)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return network(tmp_path / "model.onnx")


def backend_of(
    model: Path, artifact: Path, *more: object, backend: str = "ov"
) -> tuple[int, dict, dict]:
    report = model.with_suffix(".json")
    loaded = ["--artifact", f"{backend}={artifact}", "-o", report]
    if backend == "ov":
        loaded += ["--option", "ov.INFERENCE_PRECISION_HINT=f32"]  # on every processor
    done = audit(model, "--backends", backend, "--no-confirm", *loaded, *more)
    assert done.returncode in (0, 1, 3), done.stderr
    data = json.loads(report.read_text())
    return done.returncode, data, data["backends"][0]


def test_compressed_weights_are_named(model: Path) -> None:
    code, data, backend = backend_of(
        model, converted(model, "half.xml", compressed=True), "--fail-on", "low"
    )
    assert code == 1 and {f["noise"] for f in data["findings"]} == {"precision.fp16"}
    said = " ".join(line for f in data["findings"] for line in f["evidence"])
    assert "constant `w` differs" in said and "stored in float16" in said
    # Inference is in float32 already: to advise that would be no help.
    assert {f["remedy"] for f in data["findings"]} == {"save models with compress_to_fp16=False"}
    assert "half.xml was loaded" in " ".join(backend["provenance"]["notes"])
    assert backend["fidelity"]["outputs_bitwise_equal"]
    # The engine states the type in which they are stored; it computes in float32.
    assert {kernel["precision"] for kernel in backend["provenance"]["kernels"]} == {"f32"}


def test_a_faithful_file_is_silent(model: Path) -> None:
    code, data, _ = backend_of(model, converted(model, "whole.xml", compressed=False))
    assert code == 0 and not data["findings"]


def test_other_weights_are_evidence(model: Path, tmp_path: Path) -> None:
    other = network(tmp_path / "other.onnx", scale=1.25)
    code, data, _ = backend_of(model, converted(other, "other.xml", compressed=False))
    said = " ".join(line for f in data["findings"] for line in f["evidence"])
    assert code == 1 and "1.25 times the model's" in said
    assert {f["noise"] for f in data["findings"]} == {None}  # weights changed: no noise


def test_a_file_of_another_model_is_a_gap(model: Path, tmp_path: Path) -> None:
    other = network(tmp_path / "other.onnx", output="scores")
    code, data, _ = backend_of(model, converted(other, "other.xml", compressed=False))
    assert code == 3
    assert "has no output `logits` at place 1; its outputs: scores" in data["gaps"][0]["reason"]


def test_a_damaged_file_is_a_gap(model: Path) -> None:
    path = converted(model, "cut.xml", compressed=False)
    path.write_bytes(path.read_bytes()[:500])
    code, data, _ = backend_of(model, path)
    assert code == 3 and "cannot read the model" in data["gaps"][0]["reason"]


def test_bad_requests_are_named(model: Path, tmp_path: Path) -> None:
    path = converted(model, "whole.xml", compressed=False)
    for text, said in (
        (f"tvm={path}", "names no audited backend"),
        (str(path), "names no audited backend"),
        (f"ort={path}", "the ort backend loads files in .onnx, .ort"),
        (f"ov={model}", "the ov backend loads files in .xml"),
        ("ov=missing.xml", "does not exist"),
    ):
        done = audit(model, "--backends", "ov,ort", "--artifact", text)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_neither_repro_nor_fix_mistake_the_file_for_the_model(model: Path, tmp_path: Path) -> None:
    half = converted(model, "half.xml", compressed=True)
    backend_of(model, half, "--fail-on", "low")
    for verb in ("repro", "fix"):
        more = ["-o", tmp_path / "out"] if verb == "repro" else []
        done = audit(verb, model.with_suffix(".json"), *more)
        assert done.returncode == 2 and "audited half.xml" in done.stderr


# --- ONNX Runtime: optimised .onnx and .ort ----------------------------------------------------


def optimised(model: Path, name: str, level: str = "ORT_ENABLE_EXTENDED") -> Path:
    path = model.with_name(name)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return path


@pytest.mark.parametrize(
    ("name", "level"), [("fast.onnx", "ORT_ENABLE_EXTENDED"), ("fast.ort", "ORT_ENABLE_ALL")]
)
def test_an_optimised_file_is_audited_as_it_ships(model: Path, name: str, level: str) -> None:
    code, data, backend = backend_of(model, optimised(model, name, level), backend="ort")
    assert code == 0 and not data["findings"]
    fidelity = backend["fidelity"]
    assert fidelity["outputs_bitwise_equal"] and fidelity["program_unchanged"]
    assert {s["outputs"][0] for s in backend["segments"]} >= {"b", "c", "logits"}
    notes = " ".join(backend["provenance"]["notes"])
    assert f"{name} was loaded" in notes and backend["provenance"]["options"]["level"] == "disable"
    assert ("suits processors like the one" in notes) == (level == "ORT_ENABLE_ALL")


def test_an_optimised_file_of_other_weights_is_evidence(model: Path) -> None:
    other = network(model.with_name("other.onnx"), scale=1.25)
    code, data, _ = backend_of(model, optimised(other, "fast.onnx"), backend="ort")
    said = " ".join(line for f in data["findings"] for line in f["evidence"])
    assert code == 1 and "1.25 times the model's" in said
    assert {f["noise"] for f in data["findings"]} == {None}


def test_an_optimised_file_with_half_precision_weights_is_named(model: Path) -> None:
    made = onnx.load(model)
    for tensor in made.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        cast = helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT)
        made.graph.node.insert(0, cast)
    half_file = model.with_name("half.onnx")
    onnx.save(made, half_file)
    code, data, _ = backend_of(
        model, optimised(half_file, "half.ort"), "--fail-on", "low", backend="ort"
    )
    assert code == 1 and {f["noise"] for f in data["findings"]} == {"precision.fp16"}


def test_an_optimised_file_without_an_output_is_a_gap(model: Path) -> None:
    other = network(model.with_name("other.onnx"), output="scores")
    code, data, _ = backend_of(model, optimised(other, "other.ort"), backend="ort")
    assert code == 3
    assert "other.ort has no output `logits`; its outputs: scores" in data["gaps"][0]["reason"]


# --- TVM libraries -----------------------------------------------------------------------------


def library(model: Path, name: str) -> Path:
    path = model.with_name(name)
    module = from_onnx(onnx.load(model), {"image": [1, 3, 16, 16]})
    target = tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
    with tvm.transform.PassContext(opt_level=2):
        lowered = relax.get_default_pipeline(target)(module)
        relax.build(lowered, target=target, relax_pipeline=None).export_library(str(path))
    return path


def test_a_library_is_named_by_its_values(model: Path) -> None:
    code, data, backend = backend_of(model, library(model, "lib.so"), backend="tvm")
    assert code == 0 and not data["findings"]
    assert {s["outputs"][0] for s in backend["segments"]} >= {"b", "c", "logits"}
    notes = " ".join(backend["provenance"]["notes"])
    assert "lib.so was loaded" in notes and "2 of the model's 2 constants" in notes


def test_a_library_of_other_weights_is_evidence(model: Path) -> None:
    other = network(model.with_name("other.onnx"), scale=1.02)
    code, data, _ = backend_of(model, library(other, "lib.so"), backend="tvm")
    said = " ".join(line for f in data["findings"] for line in f["evidence"])
    assert code == 1 and "1.02 times the model's" in said


def test_a_tensor_is_the_result_nearest_to_it() -> None:
    """Not the product before its bias, which is near enough and comes first."""
    product = np.arange(1, 9, dtype=np.float32)
    expected = {"biased": product + np.float32(0.01), "copy": product + np.float32(0.01)}
    results = [product, expected["biased"] * np.float32(1 + 1e-6), expected["copy"], product * 3]
    assert _tvm_library._name(results, expected) == [None, "copy", "biased", None]


def test_no_library_is_a_gap(model: Path) -> None:
    path = model.with_name("lib.so")
    path.write_bytes(b"no library")
    code, data, _ = backend_of(model, path, backend="tvm")
    assert code == 3 and "lib.so is no library of a Relax program" in data["gaps"][0]["reason"]


# --- TensorRT plans ----------------------------------------------------------------------------


def test_a_plan_says_what_can_be_read_without_a_gpu(model: Path) -> None:
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    made = onnx.load(model)
    for node in made.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    onnx.save(made, model)
    assert parser.parse_from_file(str(model))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    path = model.with_name("model.plan")
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    code, data, backend = backend_of(model, path, backend="trt")
    notes = " ".join(backend["provenance"]["notes"])
    assert "bytes written by TensorRT for RTX 1." in notes
    assert "ONNX nodes in its layers" in notes
    if backend["status"] != "audited":  # no GPU
        assert code == 3 and "no CUDA device" in data["gaps"][0]["reason"]
    path.write_bytes(path.read_bytes()[:2000])
    code, data, _ = backend_of(model, path, backend="trt")
    assert code == 3 and data["gaps"][0]["reason"] == "model.plan is cut off"
