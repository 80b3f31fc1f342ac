"""Causes put into whole models: against numpy, against a real runtime, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery, sensitivity, stimulus
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.graphs import model
from auditor.ports import Array, Silent
from auditor.records.measured import Sensitivity
from tests.helpers import nodes_of


def run(
    path: Path, *ids: str, data: Path | None = None, samples: int = 1, seconds: float = 60.0
) -> list[Sensitivity]:
    loaded = model.load(path)
    given = stimulus.load(loaded, data, 0, samples, {})
    noises = [discovery.noise(id) for id in ids] if ids else discovery.noises()
    return list(
        sensitivity.simulated(loaded, given, noises, threads=1, seconds=seconds, progress=Silent())
    )


def save(
    path: Path, nodes: Any, constants: dict[str, Array], shape: Any, opset: int = 17, rank: int = 0
) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    tensors = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    open_ = [f"y{axis}" for axis in range(rank or len(shape))]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, open_)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    imports = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


@pytest.mark.parametrize("opset", [9, 17])
def test_the_figure_is_what_the_cause_does(tmp_path: Path, opset: int) -> None:
    """Weights in bf16, by truncating and rounding their bits; also where Cast lacks bfloat16."""
    r = np.random.default_rng(1)
    w, x = (r.standard_normal(s).astype(np.float32) for s in ((32, 16), (3, 4, 32)))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"w": w}, [4, 32], opset)
    np.savez(tmp_path / "x.npz", x=x)
    rows = run(path, "precision.bf16", data=tmp_path / "x.npz", samples=3)
    (found,) = (row for row in rows if row.variant == "weights in bf16")
    bits = w.view(np.uint32)
    narrow = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    errors = [np.linalg.norm(v @ narrow - v @ w) / np.linalg.norm(v @ w) for v in x]
    assert found.relative_l2 == pytest.approx(np.mean(errors), rel=1e-3)
    assert found.outputs[0].spread is not None
    assert found.outputs[0].spread.high_at == int(np.argmax(errors))


def test_four_bits_by_blocks(tmp_path: Path) -> None:
    """Of ``x @ w`` and of ``x @ w.T``: 40 values are a whole block of 32 and a quarter of one."""
    r = np.random.default_rng(2)
    w, v, x = (r.standard_normal(s).astype(np.float32) for s in ((40, 8), (6, 8), (1, 4, 40)))
    nodes = nodes_of("h = MatMul(x, w) y = Gemm <transB = 1> (h, v)")
    path = save(tmp_path / "m.onnx", nodes, {"w": w, "v": v}, [4, 40])
    np.savez(tmp_path / "x.npz", x=x)

    def four(matrix: np.ndarray) -> np.ndarray:  # each column is added up
        made = matrix.copy()
        for column in made.T:
            for start in range(0, len(column), 32):
                block = column[start : start + 32]
                scale = block[np.abs(block).argmax()] / -8
                block[:] = np.clip(np.rint(block / scale), -8, 7) * scale
        return made

    whole, narrow = x[0] @ w @ v.T, x[0] @ four(w) @ four(v.T)
    found = next(
        r for r in run(path, "precision.int4", data=tmp_path / "x.npz") if "32" in r.variant
    )
    error = np.linalg.norm(narrow - whole) / np.linalg.norm(whole)
    assert found.relative_l2 == pytest.approx(error, rel=1e-4)


def test_another_shape_is_no_number(tmp_path: Path) -> None:
    pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2])
    path = save(tmp_path / "m.onnx", [pool], {}, [1, 2, 8, 8])
    row = next(r for r in run(path, "inference.ceil_mode") if "other way" in r.variant)
    assert row.relative_l2 == np.inf and row.failure is None
    assert "1x2x4x4 instead of 1x2x3x3" in (row.outputs[0].distance.mismatch or "")


def test_what_cannot_run_is_listed(tmp_path: Path) -> None:
    nodes = nodes_of("p = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (x) y = Reshape(p, s)")
    path = save(tmp_path / "m.onnx", nodes, {"s": np.array([2, 9])}, [1, 2, 8, 8], rank=2)
    row = next(r for r in run(path, "inference.ceil_mode") if "other way" in r.variant)
    assert row.relative_l2 is None and row.failure and not row.outputs


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((6000, 700)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"w": w}, [300, 6000])
    rows = run(path, "precision.fp16", seconds=0.3)
    row = next(r for r in rows if "running sums" in r.variant)
    assert row.relative_l2 is None and row.failure == "one run takes more than 0.3 s"
    assert any(r.relative_l2 for r in rows)


def test_defects_of_backends_are_not_simulated(tmp_path: Path) -> None:
    node = helper.make_node("LeakyRelu", ["x"], ["y"], alpha=0.3)
    path = save(tmp_path / "m.onnx", [node], {}, [4])
    assert run(path, "implementation.attribute_ignored") == []


def test_notes_name_what_was_left_out(tmp_path: Path) -> None:
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["out"])], "b", [], [out])
    nodes = [
        helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body),
        helper.make_node("Sigmoid", ["z"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"c": np.array(True)}, [4])
    loaded = model.load(path)
    given = stimulus.load(loaded, None, 0, 1, {})
    noises = [discovery.noise(i) for i in ("implementation.approximation", "precision.int8")]
    rows = run(path, *(n.id for n in noises))
    said = " ".join(sensitivity.notes(loaded, given.info, noises, rows))
    assert "2 nodes in the bodies of If, Loop or Scan are left as they are" in said
    assert "inputs are random" in said and "precision.int8" in said
    assert "implementation.approximation" not in said and rows


def test_it_foretells_what_a_runtime_does(efficientnet_int8: Path) -> None:
    """ONNX Runtime saturates on x86 without VNNI: the audit finds what the simulation foretold."""
    data = efficientnet_int8.with_suffix(".npz")
    options = AuditOptions(backends=(BackendSpec("ort"),), data=data, samples=1, threads=2)
    report = audit(efficientnet_int8, options, noises=discovery.noises(), progress=Silent())
    found = report.backends[0].outputs[0].distance.relative_l2
    if found < 0.2:
        pytest.skip("this processor has VNNI: nothing saturates")
    rows = run(efficientnet_int8, "precision.int8_saturation", data=data)
    best = min(abs((row.relative_l2 or 0) - found) for row in rows)
    assert best < 0.1 * found


def test_a_refusal_says_what_does_not_fit_instead_of_where_the_engine_found_it() -> None:
    """ONNX Runtime's own words, where it broadcasts two sizes that do not fit."""
    value = helper.make_tensor_value_info
    names = [value("x", TensorProto.FLOAT, ["n"]), value("y", TensorProto.FLOAT, ["m"])]
    nodes = [helper.make_node("Add", ["x", "y"], ["z"])]
    graph = helper.make_graph(nodes, "g", names, [value("z", TensorProto.FLOAT, None)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(made.SerializeToString())
    with pytest.raises(Exception, match="onnxruntime_src") as caught:
        session.run(None, {"x": np.zeros(3, np.float32), "y": np.zeros(4, np.float32)})
    said = sensitivity.reason(caught.value)
    assert said.startswith("Attempting to broadcast") and "onnxruntime" not in said, said
