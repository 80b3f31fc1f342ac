"""``audit repro`` and ``audit rerun``: real differences, run as a stranger would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
FILES = {"model.onnx", "inputs.safetensors", "expected.safetensors", "repro.py", "ISSUE.md"}


def audit(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "auditor", *map(str, arguments)]
    return subprocess.run(
        line, cwd=cwd, capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def run_script(folder: Path) -> subprocess.CompletedProcess[str]:
    """In its own folder and without this repository."""
    line = [sys.executable, "repro.py"]
    return subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def saved(
    path: Path, nodes: list, inputs: dict, outputs: dict, constants: dict | None = None
) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(n, *v) for n, v in inputs.items()],
        [value(n, *v) for n, v in outputs.items()],
        [numpy_helper.from_array(v, n) for n, v in (constants or {}).items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture
def saturating(tmp_path: Path) -> Path:
    """OpenVINO's CPU plugin saturates sums of 8 bits, ONNX says that they wrap."""
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    kind = (TensorProto.UINT8, [1, 64])
    return saved(tmp_path / "add.onnx", nodes, {"a": kind, "b": kind}, {"y": kind})


@pytest.fixture
def resizing(tmp_path: Path) -> Path:
    """TVM computes positions from sizes instead of the scale given; fused with its neighbours."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["a"]),
        helper.make_node(
            "Resize", ["a", "", "scales"], ["r"], mode="linear",
            coordinate_transformation_mode="asymmetric",
        ),
        helper.make_node("Add", ["r", "two"], ["s"]),
        helper.make_node("Relu", ["s"], ["y"]),
    ]  # fmt: skip
    constants = {"two": np.float32(2), "scales": np.array([1, 1, 1.3, 1.3], np.float32)}
    return saved(
        tmp_path / "resize.onnx",
        nodes,
        {"x": (TensorProto.FLOAT, [1, 3, 9, 9])},
        {"y": (TensorProto.FLOAT, [1, 3, 11, 11])},
        constants,
    )


def report_of(model: Path, backend: str, *more: object) -> Path:
    path = model.with_suffix(".json")
    done = audit(model, "--backends", backend, "--no-confirm", "-o", path, *more)
    assert done.returncode == 1, done.stdout + done.stderr
    return path


def test_a_difference_of_one_operator(saturating: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    done = audit("repro", report_of(saturating, "ov"), "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {f.name for f in folder.iterdir()} == FILES
    shown = run_script(folder)
    assert shown.returncode == 1 and "DIFFERENT" in shown.stdout, shown.stderr
    feeds, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    np.testing.assert_array_equal(expected["y"], feeds["a"] + feeds["b"])
    issue = (folder / "ISSUE.md").read_text()
    assert "# OpenVINO: Add differs from ONNX" in issue and "DIFFERENT" in issue


def test_the_script_says_so_once_the_difference_is_gone(saturating: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    assert audit("repro", report_of(saturating, "ov"), "-o", folder).returncode == 0
    feeds = load_file(folder / "inputs.safetensors")
    sums = feeds["a"].astype(np.int64) + feeds["b"]
    save_file({"y": np.minimum(sums, 255).astype(np.uint8)}, folder / "expected.safetensors")
    alike = run_script(folder)
    assert alike.returncode == 0 and "alike" in alike.stdout


def test_a_fused_segment_is_cut_down_to_the_guilty_node(resizing: Path, tmp_path: Path) -> None:
    report = report_of(resizing, "tvm")
    (finding, *_) = json.loads(report.read_text())["findings"]
    assert len(finding["nodes"]) > 1  # TVM runs them as one function
    folder = tmp_path / "repro"
    done = audit("repro", report, "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    graph = onnx.load(folder / "model.onnx").graph
    assert [n.op_type for n in graph.node if n.op_type != "Constant"] == ["Resize"]
    assert run_script(folder).returncode == 1


def test_options_of_the_audit_are_those_of_the_script(saturating: Path, tmp_path: Path) -> None:
    more = ("--option", "ov.PERFORMANCE_HINT=THROUGHPUT", "--threads", "1")
    folder = tmp_path / "repro"
    assert audit("repro", report_of(saturating, "ov", *more), "-o", folder).returncode == 0
    text = (folder / "repro.py").read_text()
    assert "'PERFORMANCE_HINT': 'THROUGHPUT'" in text and "'INFERENCE_NUM_THREADS': 1" in text


def test_threads_of_the_audit_are_those_of_the_script(resizing: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    done = audit("repro", report_of(resizing, "tvm", "--threads", "1"), "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "repro.py").read_text()
    assert 0 < text.index("TVM_NUM_THREADS") < text.index("import tvm")
    assert run_script(folder).returncode == 1


def test_values_that_are_not_finite_are_told_apart(tmp_path: Path) -> None:
    """OpenVINO's exponential of NaN is infinite: neither is finite, and yet they differ."""
    kind = {"x": (TensorProto.FLOAT, [2])}
    model = saved(
        tmp_path / "exp.onnx", [helper.make_node("Exp", ["x"], ["y"])], kind, {"y": kind["x"]}
    )
    data = tmp_path / "data.npz"
    np.savez(data, x=np.array([np.nan, 1], np.float32))
    report = report_of(model, "ov", "--data", data, "--allow-nonfinite")
    folder = tmp_path / "repro"
    done = audit("repro", report, "-o", folder)
    assert done.returncode == 0 and "DIFFERENT: inf" in done.stdout, done.stdout
    assert run_script(folder).returncode == 1


# --- bad input -----------------------------------------------------------------------------------


def test_bad_requests_are_named(saturating: Path, tmp_path: Path) -> None:
    report = report_of(saturating, "ov")
    folder = tmp_path / "repro"

    def refused(*arguments: object) -> str:
        done = audit(*arguments)
        assert done.returncode == 2 and not done.stdout and not folder.exists()
        return done.stderr

    assert "has no finding 7" in refused("repro", report, "--finding", 7, "-o", folder)
    assert "exists" in refused("repro", report, "-o", tmp_path)
    data = json.loads(report.read_text())
    made_without = report.with_name("api.json")
    made_without.write_text(json.dumps(data | {"command": []}))
    assert "does not say how it was made" in refused("repro", made_without, "-o", folder)
    assert "does not say how it was made" in refused("rerun", made_without)
    made_without.write_text(json.dumps(data | {"command": ["--no-such-option"]}))
    assert "cannot be run" in refused("rerun", made_without)
    tampered = json.loads(report.read_text())
    tampered["findings"][0]["segment"] = "elsewhere"
    made_without.write_text(json.dumps(tampered))
    assert "elsewhere" in refused("repro", made_without, "-o", folder)
    model = onnx.load(saturating)
    model.producer_name = "another"
    onnx.save(model, saturating)
    assert "has changed since" in refused("repro", report, "-o", folder)


def test_a_step_around_the_network_has_no_runtime(saturating: Path, tmp_path: Path) -> None:
    report = report_of(saturating, "ov")
    data = json.loads(report.read_text())
    data["findings"][0]["backend"] = "pipeline"
    report.write_text(json.dumps(data))
    done = audit("repro", report, "-o", tmp_path / "repro")
    assert done.returncode == 2 and "is a step around the network" in done.stderr


# --- again ---------------------------------------------------------------------------------------


def test_a_report_can_be_made_again_from_itself(saturating: Path, tmp_path: Path) -> None:
    first = report_of(saturating, "ov", "--seed", 5)
    before = first.read_bytes()
    second = tmp_path / "second.json"
    done = audit("rerun", first, "-o", second)
    assert done.returncode == 1, done.stderr
    old, new = json.loads(before), json.loads(second.read_text())
    assert first.read_bytes() == before, "what the command wrote is not written again"
    for key in ("findings", "agreement", "stimulus", "command"):
        assert old[key] == new[key]
    assert audit("rerun", first, "--baseline").returncode == 0
    assert audit("rerun", second, "--format", "markdown").stdout.startswith("## ❌")


def test_hostile_names_stay_content(tmp_path: Path) -> None:
    evil = "a`\n# [x](y) '''\"\"\" {0} \x1b[2J"
    kind = (TensorProto.UINT8, [1, 64])
    nodes = [helper.make_node("Add", [evil, "b"], ["y\n```"])]
    path = saved(tmp_path / "add.onnx", nodes, {evil: kind, "b": kind}, {"y\n```": kind})
    folder = tmp_path / "repro"
    done = audit("repro", report_of(path, "ov"), "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_script(folder).returncode == 1
    compile((folder / "repro.py").read_text(), "repro.py", "exec")
    assert "\x1b" not in (folder / "ISSUE.md").read_text() + done.stdout
