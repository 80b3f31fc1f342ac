"""The way of docs/sign-off.md, by command: from a first audit to a comparison of releases."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.helpers import audit_in


def test_from_the_first_audit_to_the_next_release(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pool = helper.make_node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1],
        ceil_mode=1, count_include_pad=1,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [pool],
        "g",
        [value("x", TensorProto.FLOAT, [1, 3, 7, 7])],
        [value("y", TensorProto.FLOAT, [1, 3, "height", "width"])],
    )
    opset = [helper.make_opsetid("", 19)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")

    def audit(code: int, *arguments: str) -> str:
        done = audit_in(tmp_path, *arguments, COLUMNS="200")
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    plain = ("m.onnx", "--backends", "ov", "--no-confirm")
    audit(1, *plain, "-o", "first.json")
    audit(0, "init", "first.json")
    policy = tmp_path / "audit.toml"
    lines = policy.read_text().splitlines()
    tight = ["relative_l2 = 1e-4" if line.startswith("relative_l2") else line for line in lines]
    assert tight != lines
    policy.write_text("\n".join(tight))
    assert "tolerance 0.0001" in audit(1, *plain)
    audit(0, "fix", "first.json", "-o", "fixed.onnx")
    fixed = (*plain, "--candidate", "fixed.onnx")
    assert "every rule holds" in audit(0, *fixed, "-o", "release.json")
    accuracy = ("--option", "ov.EXECUTION_MODE_HINT=ACCURACY")
    audit(0, *fixed, *accuracy, "--baseline", "release.json", "-o", "next.json")
    assert "PERFORMANCE → ACCURACY" in audit(0, "diff", "release.json", "next.json")
    assert "regression" in audit(1, "diff", "release.json", "first.json")
