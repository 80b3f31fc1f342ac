"""Half-precision models: the reference is in float32, and rounding to their types is no news."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.graphs import model as models
from auditor.ports import Array, Silent
from auditor.records.report import AuditReport
from auditor.replays import sessions, widening
from tests.helpers import onnx_model

RNG = np.random.default_rng(3)
KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def weight(*shape: int) -> Array:
    return RNG.standard_normal(shape) / np.sqrt(shape[-2])


FIRST, SECOND = weight(64, 96), weight(96, 10)


def network(kind: Any, first: Array = FIRST) -> onnx.ModelProto:
    """Products with a normalisation written out in single operators between them."""
    narrow = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    one = helper.make_tensor("one", narrow, (), [1e-3])
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("ReduceMean", ["a", "axis"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["a", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "centred"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axis"], ["variance"], keepdims=1),
        helper.make_node("Constant", [], ["epsilon"], value=one),
        helper.make_node("Add", ["variance", "epsilon"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["deviation"]),
        helper.make_node("Div", ["centred", "deviation"], ["normal"]),
        helper.make_node("Cast", ["flag"], ["gate"], to=narrow),
        helper.make_node("Mul", ["normal", "gate"], ["gated"]),
        helper.make_node("MatMul", ["gated", "second"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(first.astype(kind), "first"),
        numpy_helper.from_array(SECOND.astype(kind), "second"),
        numpy_helper.from_array(np.array([-1], np.int64), "axis"),
        numpy_helper.from_array(np.array(True), "flag"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", narrow, [4, 64])],
        [helper.make_tensor_value_info("y", narrow, [4, 10])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def saved(folder: Path, proto: onnx.ModelProto, name: str = "m.onnx") -> Path:
    (folder / name).write_bytes(proto.SerializeToString())
    return folder / name


@pytest.mark.parametrize("kind", KINDS)
def test_the_widened_model_is_the_mathematics(tmp_path: Path, kind: str) -> None:
    model = models.load(saved(tmp_path, network(KINDS[kind])))
    assert widening.is_narrow(model)
    wide = widening.widened(model, tmp_path)
    assert len(wide.proto.graph.node) == len(model.proto.graph.node)
    assert set(widening.declared(model)) >= {"x", "a", "normal", "gated", "y"}
    x = RNG.standard_normal((4, 64)).astype(KINDS[kind])
    feeds = widening.wide({"x": x})
    (y,) = sessions.session(wide.proto, 1, wide.folder).run(None, feeds)
    first, second = (w.astype(KINDS[kind]).astype(np.float64) for w in (FIRST, SECOND))
    a = x.astype(np.float64) @ first
    centred = a - a.mean(-1, keepdims=True)
    epsilon = np.float64(np.array(1e-3, KINDS[kind]))
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) @ second
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("read", ["Relu", ""])
def test_what_only_rounds_to_a_narrow_type_is_no_model_of_it(tmp_path: Path, read: str) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["short"], to=onnx.TensorProto.BFLOAT16)]
    nodes += [helper.make_node(read, ["short"], ["r"])] if read else []
    nodes.append(helper.make_node("Cast", ["r" if read else "short"], ["y"], to=1))
    values = [helper.make_tensor_value_info(name, 1, [4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert widening.is_narrow(models.load(saved(tmp_path, made))) == bool(read)


def test_a_float32_model_is_left_alone(tmp_path: Path) -> None:
    assert not widening.is_narrow(models.load(saved(tmp_path, network(np.float32))))


def report_of(
    folder: Path, model: onnx.ModelProto, *backends: str, candidate: onnx.ModelProto | None = None
) -> AuditReport:
    x = RNG.standard_normal((1, 4, 64)).astype(np.float16)
    np.savez(folder / "x.npz", x=x)
    options = AuditOptions(
        backends=tuple(BackendSpec(id) for id in backends),
        data=folder / "x.npz",
        candidate=saved(folder, candidate, "c.onnx") if candidate else None,
        options={"ov": {"INFERENCE_PRECISION_HINT": "f32"}},
    )
    path = saved(folder, model)
    return audit(path, options, noises=discovery.noises(), progress=Silent())


def test_a_clean_model_is_silent(tmp_path: Path) -> None:
    report = report_of(tmp_path, network(np.float16), "ort", "ov")
    assert report.reference.precision == "float32 for the model's fp16"
    assert (report.verdict, report.findings, report.gaps) == ("pass", (), ())
    for backend in report.backends:
        # Rounded to eleven bits at least where it is handed over: no float32 is that far off.
        assert 5e-5 < backend.outputs[0].distance.relative_l2 < 1e-3
        last = next(s for s in backend.segments if "y" in s.outputs)
        assert last.noise == "precision.fp16" and last.introduced < last.floor
        shares = {c.noise: c.share for c in backend.categories}
        assert shares["precision.fp16"] > 0.99
        assert sum(shares.values()) + backend.unexplained_share == pytest.approx(1)


def test_what_one_reader_rounds_and_another_does_not_is_explained(tmp_path: Path) -> None:
    """ONNX Runtime hands a sum on in float32, and in float16 to the normalisation."""
    hands = onnx_model(
        "(float16[1, 4, 64] x) => (float16[1, 4, 64] y, float16[1, 4, 64] n) "
        "{ a = Add(x, first) y = Add(a, first) n = LayerNormalization(a, scale) }",
        {"first": FIRST[:, 0].astype(np.float16), "scale": np.ones(64, np.float16)},
    )
    (side,) = report_of(tmp_path, hands, "ort").backends
    shares = {c.noise: c.share for c in side.categories}
    assert shares["precision.fp16"] == pytest.approx(1, abs=0.01)
    assert side.unexplained_share == pytest.approx(0, abs=0.01)
    segments = {s.outputs[0]: s for s in side.segments}
    assert segments["n"].noise == "precision.fp16" and (segments["n"].explained or 0) > 0.99
    assert segments["a"].introduced < 1e-6


def test_sums_in_the_narrow_type_are_named(tmp_path: Path) -> None:
    """TVM adds up the products of a float16 model in float16."""
    report = report_of(tmp_path, network(np.float16), "tvm")
    assert len(report.findings) == 2
    assert {finding.noise for finding in report.findings} == {"precision.fp16"}
    assert all(finding.explained and finding.explained > 0.99 for finding in report.findings)


def test_a_defect_shows_above_the_rounding(tmp_path: Path) -> None:
    wrong, backends = FIRST.copy(), ("ort", "ov", "tvm")
    wrong[:, 3] *= 1.1
    made = network(np.float16), network(np.float16, wrong)
    report = report_of(tmp_path, made[0], *backends, candidate=made[1])
    for backend in backends:
        first = next(f for f in report.findings if f.backend == backend)
        assert "a" in first.nodes or any("→ a" in node for node in first.nodes)
        assert first.noise is None
