"""Outputs that are no ordinary tensors of numbers, or hold none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.graphs import model as models
from auditor.ports import Silent
from auditor.records.report import AuditReport
from tests.helpers import onnx_model

KEYS = {"classlabels_int64s": [7, 2, 5], "classlabels_strings": ["wasp", "ant", "bee"]}


def classifier(labels: str) -> onnx.ModelProto:
    """Labels and, for each row, a map from label to score, as scikit-learn's converter writes."""
    rng = np.random.default_rng(0)
    keys = KEYS[labels]
    nodes = [
        helper.make_node(
            "LinearClassifier",
            ["x"],
            ["label", "raw"],
            domain="ai.onnx.ml",
            coefficients=rng.standard_normal(12).astype(np.float32).tolist(),
            intercepts=[0.1, 0.2, 0.3],
            **{labels.replace("int64s", "ints"): keys},
        ),
        helper.make_node("Softmax", ["raw"], ["scores"]),
        helper.make_node("ZipMap", ["scores"], ["map"], domain="ai.onnx.ml", **{labels: keys}),
    ]
    kind = TensorProto.INT64 if labels == "classlabels_int64s" else TensorProto.STRING
    row = helper.make_map_type_proto(kind, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    outputs = [
        helper.make_tensor_value_info("label", kind, [None]),
        helper.make_value_info("map", helper.make_sequence_type_proto(row)),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def audited(model: onnx.ModelProto, path: Path, **options: object) -> AuditReport:
    path.write_bytes(model.SerializeToString())
    asked = AuditOptions(backends=(BackendSpec("ort"),), threads=1, confirm=False, **options)
    return audit(path, asked, noises=(), progress=Silent())


@pytest.mark.parametrize("labels", KEYS)
def test_a_map_for_each_row_is_compared_as_a_table(tmp_path: Path, labels: str) -> None:
    """Its columns are in the order of the keys, which is not that of what ZipMap read."""
    model = classifier(labels)
    report = audited(model, tmp_path / "m.onnx")
    (ort,) = report.backends
    compared = {o.name: o.distance.relative_l2 for o in ort.outputs}
    assert compared["map"] < 1e-6
    assert [g.reason for g in report.gaps] == (
        ["output `label` is a string, which is not compared."] if "strings" in labels else []
    )
    assert ort.fidelity.outputs_bitwise_equal and ort.fidelity.program_unchanged
    assert not [s for s in ort.fidelity.skipped if s.tensor == "map"]


def test_what_differs_in_a_map_is_found(tmp_path: Path) -> None:
    """Another file, whose keys stand at other columns: the map says so, the label does not."""
    turned = classifier("classlabels_int64s")
    turned.graph.node[2].attribute[0].ints[:] = [2, 7, 5]
    (tmp_path / "turned.onnx").write_bytes(turned.SerializeToString())
    report = audited(
        classifier("classlabels_int64s"), tmp_path / "m.onnx", candidate=tmp_path / "turned.onnx"
    )
    found = {o.name: o.distance.relative_l2 for o in report.backends[0].outputs}
    assert found["label"] == 0.0 and found["map"] > 0.01


def test_a_size_of_zero_is_one(tmp_path: Path) -> None:
    """A cache that is empty at the first step: ONNX Runtime takes no other size there."""
    text = (
        "(float[0, 4] past, float[1, 4] x) => (float[1, 4] y, float[0, 4] z) "
        "{ y = Concat <axis = 0> (past, x) z = Relu(past) }"
    )
    report = audited(onnx_model(text), tmp_path / "m.onnx")
    assert report.stimulus.shapes["past"] == (0, 4)
    (gap,) = report.gaps
    assert gap.reason == "output `z` has no elements on any sample: there was nothing to compare."
    np.savez(tmp_path / "x.npz", past=np.ones((0, 4), "f"), x=np.ones((1, 4), "f"))
    recorded = audited(onnx_model(text), tmp_path / "m.onnx", data=tmp_path / "x.npz")
    assert recorded.stimulus.shapes["past"] == (0, 4)


def test_a_string_alone_is_refused(tmp_path: Path) -> None:
    model = classifier("classlabels_strings")
    del model.graph.output[1], model.graph.node[2]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(models.UsageError, match="output `label` is a string"):
        models.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", ["text", "scores"])
def test_classes_for_a_text_that_nothing_is_read_as_are_a_gap(tmp_path: Path, kind: str) -> None:
    model = onnx_model("(float[1, 6, 4] x) => (float[1, 6, 4] y) { y = Softmax(x) }", ir_version=9)
    given = {"tokens": ("-", "a", "b", "c"), "output_kinds": {"y": kind}}
    report = audited(model, tmp_path / "m.onnx", **given)
    said = [gap.reason for gap in report.gaps if "--tokens" in gap.reason]
    assert said == ([] if kind == "text" else ["--tokens: no output is read as a text."])
