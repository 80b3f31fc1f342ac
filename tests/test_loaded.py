"""``--artifact``: OpenVINO's own files, as its converter writes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]


def audit(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "auditor", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


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


def backend_of(model: Path, artifact: Path, *more: object) -> tuple[int, dict, dict]:
    report = model.with_suffix(".json")
    loaded = ("--artifact", f"ov={artifact}", "-o", report)
    done = audit(model, "--backends", "ov", "--no-confirm", *loaded, *more)
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
    assert "half.xml was loaded" in " ".join(backend["provenance"]["notes"])
    assert backend["fidelity"]["outputs_bitwise_equal"]


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
        (f"ort={path}", "the ort backend loads no files of its own"),
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
