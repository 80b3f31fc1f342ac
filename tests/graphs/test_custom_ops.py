"""A real library of custom operators, loaded only when it is named."""

import json
from functools import partial

import numpy as np
import onnx
import onnxruntime_extensions
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers import ROOT, audit_in, nodes_of

LIBRARY = onnxruntime_extensions.get_library_path()


audit = partial(audit_in, ROOT)


@pytest.fixture
def models(tmp_path):
    """x·w, its positive and negative part by a custom operator, their difference·w; and a fault."""
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32) / 4
    nodes = nodes_of(
        "m = MatMul(x, w) n, p = ai.onnx.contrib.NegPos(m) s = Sub(p, n) y = MatMul(s, v)"
    )
    shape = [4, 16]
    for name, factor in (("clean", 1.0), ("faulty", 1.01)):
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [
                numpy_helper.from_array(weight, "w"),
                numpy_helper.from_array(weight * np.float32(factor), "v"),
            ],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        onnx.save(made, tmp_path / f"{name}.onnx")
    return tmp_path


def test_a_fault_beside_a_custom_operator_is_located(models):
    done = audit(
        models / "clean.onnx",
        *("--candidate", models / "faulty.onnx"),
        *("--backends", "ort,ov", "--custom-ops", LIBRARY, "-o", models / "report.json"),
    )
    report = json.loads((models / "report.json").read_text())
    ort, ov = report["backends"]
    assert ort["fidelity"]["outputs_bitwise_equal"]
    assert ort["fidelity"]["program_unchanged"]
    (finding,) = report["findings"]
    assert any("y" in node for node in finding["nodes"])
    assert finding["noise"] is None
    # OpenVINO does not take libraries of ONNX Runtime.
    assert ov["status"] == "gap"
    assert "NegPos" in ov["gap"]["reason"]
    assert done.returncode == 1  # the finding; the gap alone would be 3


def test_without_the_library_the_operator_is_named(models):
    done = audit(models / "clean.onnx", "--backends", "ort")
    assert done.returncode == 2
    assert "`NegPos`" in done.stderr
    assert "--custom-ops" in done.stderr


@pytest.mark.parametrize("library", ["clean.onnx", "missing.so"])
def test_what_is_no_library_is_refused(models, library):
    done = audit(models / "clean.onnx", "--backends", "ort", "--custom-ops", models / library)
    assert done.returncode == 2
    assert "--custom-ops" in done.stderr
    assert "Traceback" not in done.stderr
