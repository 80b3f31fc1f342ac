"""``audit repro`` and ``audit rerun``: real differences, run as a stranger would run them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from auditor import repro
from auditor.options import AuditOptions, BackendSpec
from auditor.ports import Silent
from auditor.processes import worker
from tests.helpers import audit_in, nodes_of, onnx_model

ROOT = Path(__file__).resolve().parents[1]
FILES = {"model.onnx", "inputs.safetensors", "expected.safetensors", "repro.py", "ISSUE.md"}


def audit(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return audit_in(cwd, *arguments)


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


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVINO's CPU plugin saturates sums of 8 bits, ONNX says that they wrap."""
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    kind = (TensorProto.UINT8, [1, 64])
    path = tmp_path_factory.mktemp("reported") / "add.onnx"
    model = saved(path, nodes, {"a": kind, "b": kind}, {"y": kind})
    options = ("--option", "ov.PERFORMANCE_HINT=THROUGHPUT", "--threads", "1", "--seed", 5)
    return report_of(model, "ov", *options)


@pytest.fixture(scope="module")
def reproduced(reported: Path) -> Path:
    folder = reported.with_name("repro")
    done = audit("repro", reported, "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def resizing(tmp_path: Path) -> Path:
    """TVM computes positions from sizes instead of the scale given; fused with its neighbours."""
    nodes = nodes_of("a = Mul(x, two) "
'r = Resize <coordinate_transformation_mode = "asymmetric", mode = "linear"> (a, , '
"scales) "
"s = Add(r, two) y = Relu(s)")  # fmt: skip
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


def test_a_difference_of_one_operator(reproduced: Path) -> None:
    assert {f.name for f in reproduced.iterdir()} == FILES
    shown = run_script(reproduced)
    assert shown.returncode == 1 and "DIFFERENT" in shown.stdout, shown.stderr
    feeds, expected = (load_file(reproduced / f"{n}.safetensors") for n in ("inputs", "expected"))
    np.testing.assert_array_equal(expected["y"], feeds["a"] + feeds["b"])
    issue = (reproduced / "ISSUE.md").read_text()
    assert "# OpenVINO: Add differs from ONNX" in issue and "DIFFERENT" in issue


def test_options_of_the_audit_are_those_of_the_script(reproduced: Path) -> None:
    text = (reproduced / "repro.py").read_text()
    assert "'PERFORMANCE_HINT': 'THROUGHPUT'" in text and "'INFERENCE_NUM_THREADS': 1" in text


def test_the_script_says_so_once_the_difference_is_gone(reproduced: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(reproduced, tmp_path / "repro")
    feeds = load_file(folder / "inputs.safetensors")
    sums = feeds["a"].astype(np.int64) + feeds["b"]
    save_file({"y": np.minimum(sums, 255).astype(np.uint8)}, folder / "expected.safetensors")
    alike = run_script(folder)
    assert alike.returncode == 0 and "alike" in alike.stdout


def test_trials_share_a_process_until_it_ends(tmp_path: Path, monkeypatch) -> None:
    started = []

    class Counted(worker.Worker):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            started.append(self)

    monkeypatch.setattr(worker, "Worker", Counted)
    spec, feeds = BackendSpec("ort"), {"a": np.float32([1, 2])}
    first, second = (
        onnx_model(f"(float[2] a) => (float[2] {name}) {{ {name} = {op}(a, a) }}", ir_version=9)
        for name, op in (("y", "Add"), ("z", "Mul"))
    )
    with closing(repro._Lab(spec, AuditOptions(backends=(spec,)), tmp_path, Silent())) as lab:
        for model in (first, second):
            case = lab.case(model, feeds)
            assert case is not None and case.relative_l2 == 0
        assert len(started) == 1
        started[0].kill()
        assert lab.case(first, feeds) is None
        assert lab.case(first, feeds) is not None
    assert len(started) == 2 and not any(one.alive for one in started)


def test_a_fused_segment_is_cut_down_to_the_guilty_node(resizing: Path, tmp_path: Path) -> None:
    report = report_of(resizing, "tvm", "--threads", "1")
    (finding, *_) = json.loads(report.read_text())["findings"]
    assert len(finding["nodes"]) > 1  # TVM runs them as one function
    folder = tmp_path / "repro"
    done = audit("repro", report, "-o", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    graph = onnx.load(folder / "model.onnx").graph
    assert [n.op_type for n in graph.node if n.op_type != "Constant"] == ["Resize"]
    text = (folder / "repro.py").read_text()
    assert 0 < text.index("TVM_NUM_THREADS") < text.index("import tvm")  # the audit's threads
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


def test_bad_requests_are_named(reported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repro"

    def refused(*arguments: object) -> str:
        done = audit(*arguments)
        assert done.returncode == 2 and not done.stdout and not folder.exists()
        return done.stderr

    def changed(**more: object) -> Path:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(data | more))
        return path

    data = json.loads(reported.read_text())
    (found,) = data["findings"]
    assert "has no finding 7" in refused("repro", reported, "--finding", 7, "-o", folder)
    assert "exists" in refused("repro", reported, "-o", tmp_path)
    made_without = changed(command=[])
    assert "does not say how it was made" in refused("repro", made_without, "-o", folder)
    assert "does not say how it was made" in refused("rerun", made_without)
    assert "cannot be run" in refused("rerun", changed(command=["--no-such-option"]))
    elsewhere = changed(findings=[found | {"segment": "elsewhere"}])
    assert "elsewhere" in refused("repro", elsewhere, "-o", folder)
    step = changed(findings=[found | {"backend": "pipeline"}])
    assert "is a step around the network" in refused("repro", step, "-o", folder)
    another = changed(model=data["model"] | {"sha256": "0" * 64})
    assert "has changed since" in refused("repro", another, "-o", folder)


# --- again ---------------------------------------------------------------------------------------


def test_a_report_can_be_made_again_from_itself(reported: Path, tmp_path: Path) -> None:
    before = reported.read_bytes()
    second = tmp_path / "second.json"
    # A policy that the first run did not have.
    (tmp_path / "audit.toml").write_text('backends = ["tvm"]\n[tolerance]\nrelative_l2 = 1e3\n')
    done = audit("rerun", reported, "-o", second, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    old, new = json.loads(before), json.loads(second.read_text())
    assert reported.read_bytes() == before, "what the command wrote is not written again"
    for key in ("findings", "agreement", "stimulus", "command"):
        assert old[key] == new[key]
    assert audit("rerun", reported, "--baseline").returncode == 0
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
