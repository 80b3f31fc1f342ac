"""Tensors that a program holds with other axes than the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.ports import Silent

OPTIONS = {"ov": {"INFERENCE_PRECISION_HINT": "f32"}}


def test_an_axis_of_one_that_the_program_leaves_out(tmp_path: Path) -> None:
    """Constants of four axes give GELU a fourth; OpenVINO fuses it with the product of three."""
    pytest.importorskip("openvino", reason="needs the [ov] extra")
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((16, 16)).astype(np.float32),
        "v": rng.standard_normal((16, 8)).astype(np.float32),
        "axes": np.array([0]),
    }
    for name, value in (("root", np.sqrt(2)), ("one", 1), ("half", 0.5)):
        constants[name] = np.full((1, 1, 1, 1), value, np.float32)
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "h"),
        node("Div", ["h", "root"], ["d"], "d"),
        node("Erf", ["d"], ["e"], "e"),
        node("Add", ["e", "one"], ["a"], "a"),
        node("Mul", ["h", "a"], ["m"], "m"),
        node("Mul", ["m", "half"], ["g"], "g"),
        node("Squeeze", ["g", "axes"], ["s"], "s"),
        node("MatMul", ["s", "v"], ["y"], "y"),
    ]
    value = helper.make_tensor_value_info
    x, y = (value(n, TensorProto.FLOAT, [2, 6, d]) for n, d in (("x", 16), ("y", 8)))
    tensors = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    asked = AuditOptions(backends=(BackendSpec("ov"),), options=OPTIONS, confirm=False, threads=1)
    found = audit(tmp_path / "m.onnx", asked, noises=discovery.noises(), progress=Silent())
    assert found.gaps == () and found.findings == ()
    assert found.backends[0].fidelity.output_proved > 1  # what lies between is seen
