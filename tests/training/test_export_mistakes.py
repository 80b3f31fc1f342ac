"""Export mistakes, planted: each is located by module and named, and nothing else is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.ports import Silent
from auditor.records.report import AuditReport, Finding
from backends import _parameters
from tests.helpers import NETS, nets

SHAPE = (2, 3, 10, 10)


def export(module: torch.nn.Module, path: Path, **options: Any) -> onnx.ModelProto:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), str(path), dynamo=False, opset_version=17, **options)
    return onnx.load(path)


def run(path: Path, source: str = f"{NETS}:small", **options: Any) -> AuditReport:
    asked = AuditOptions(backends=(BackendSpec("torch"),), source=source, threads=1, **options)
    report = audit(path, asked, noises=discovery.noises(), progress=Silent())
    assert report.backends[0].status == "audited", report.backends[0].gap
    return report


def modules(found: tuple[Finding, ...], noise: str | None) -> set[str]:
    return {m.partition(" ")[0] for f in found if f.noise == noise for m in f.modules}


def test_training_mode(tmp_path: Path) -> None:
    preserve = torch.onnx.TrainingMode.PRESERVE
    trained = nets().small()
    for name, module in trained.named_modules():  # as one that was frozen in part
        if name.endswith(("bn", "drop")):
            module.train()
    statistics = {k: v.clone() for k, v in trained.state_dict().items()}
    path = tmp_path / "m.onnx"
    model = export(trained, path, training=preserve, do_constant_folding=False)
    # Tracing it moved the statistics: that is another mistake.
    for tensor in model.graph.initializer:
        if "running" in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(statistics[tensor.name].numpy(), tensor.name))
    onnx.save(model, path)
    report = run(path)
    named = modules(report.findings, "export.training_mode")
    assert {"blocks.0.bn", "blocks.1.bn", "blocks.0.drop", "blocks.1.drop"} <= named
    assert "is in training mode in 4 nodes" in report.stimulus.notes[-1]
    assert not modules(report.findings, None)
    assert report.exit_code == 1
    # The file draws random numbers: what no segment accounts for is no rounding.
    assert "implementation.fp32_rounding" not in {c.noise for c in report.backends[0].categories}


def test_a_constant_of_another_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = export(
        nets().small(), path, do_constant_folding=False, keep_initializers_as_inputs=False
    )
    weight = next(t for t in model.graph.initializer if t.name == "norm.weight")
    values = numpy_helper.to_array(weight).copy()
    values[3] += 0.25
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    (finding,) = run(path).findings
    assert finding.noise == "export.constants" and (finding.explained or 0) > 0.999
    assert finding.modules[0].startswith("norm (nets.py:")
    assert any("`norm.weight` differs from the module's" in line for line in finding.evidence)


@pytest.mark.parametrize(
    ("node", "place"), [("/query/MatMul", "query"), ("/blocks/blocks.0/conv/Conv", "blocks.0.conv")]
)
def test_a_weight_that_has_neither_its_name_nor_its_values(
    node: str, place: str, tmp_path: Path
) -> None:
    """Drawn anew, as behind a tie that was broken; folding took the parameter's name from it."""
    path = tmp_path / "m.onnx"
    model = export(nets().small(), path)
    (reads,) = (n.input[1] for n in model.graph.node if n.name == node)
    (weight,) = (t for t in model.graph.initializer if t.name == reads)
    assert weight.name.startswith("onnx::")
    drawn = np.random.default_rng(0).normal(0, 0.3, tuple(weight.dims)).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(drawn, weight.name))
    onnx.save(model, path)
    (finding,) = run(path).findings
    assert finding.noise == "export.constants" and (finding.explained or 0) > 0.999
    assert finding.modules[0].startswith(f"{place} (nets.py:")


def test_a_fold_that_keeps_the_parameters_name_is_compared_with_the_fold() -> None:
    """As PyTorch's newer exporter folds; its epsilon was another one."""
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).eval()
    torch.nn.init.uniform_(block[1].running_var, 0.01, 0.02)
    weight, variance = block[0].weight.detach(), block[1].running_var[:, None, None, None]
    right, wrong = ((weight / torch.sqrt(variance + eps)).numpy() for eps in (1e-5, 1e-3))
    (found,) = _parameters.constants(block, {"0.weight": wrong}, {}).values()
    np.testing.assert_allclose(found, right, rtol=1e-5)


def test_a_file_in_float16(tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = tmp_path / "m.onnx"
    model = convert_float_to_float16(export(nets().small(), path), keep_io_types=True)
    onnx.save(model, path)
    report = run(path)
    assert report.findings and {f.noise for f in report.findings} == {"export.narrow_types"}
    assert any(m.startswith("blocks.0.conv (nets.py:") for f in report.findings for m in f.modules)
    shares = {c.noise: c.share for c in report.backends[0].categories}
    assert shares["export.narrow_types"] > 0.95


def test_autocast(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with torch.autocast("cpu", dtype=torch.float16):
        export(nets().small(), path)
    report = run(path)
    assert modules(report.findings, "export.narrow_types") >= {"blocks.0.conv", "head"}
    assert not modules(report.findings, None)


def align_corners(node: onnx.NodeProto) -> None:
    mode = next(a for a in node.attribute if a.name == "coordinate_transformation_mode")
    mode.s = b"align_corners"


def epsilon(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3


def ceil_mode(node: onnx.NodeProto) -> None:
    next(a for a in node.attribute if a.name == "ceil_mode").i = 1


@pytest.mark.parametrize(
    ("operator", "change", "noise", "line"),
    [
        ("Resize", align_corners, "inference.upsample", "nn.functional.interpolate"),
        ("LayerNormalization", epsilon, "implementation.normalisation", "self.norm("),
        ("MaxPool", ceil_mode, "inference.ceil_mode", "nn.functional.max_pool2d"),
    ],
)
def test_another_meaning_of_one_operator(
    operator: str,
    change: Callable[[onnx.NodeProto], None],
    noise: str,
    line: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.onnx"
    model = export(nets().small(), path)
    (node,) = (n for n in model.graph.node if n.op_type == operator)
    change(node)
    del model.graph.value_info[:]
    onnx.save(model, path)
    report = run(path)
    (finding,) = report.findings
    assert finding.noise == noise and (finding.explained or 0) > 0.99
    number = next(i for i, t in enumerate(NETS.read_text().splitlines(), 1) if line in t)
    assert any(f"nets.py:{number}" in module for module in finding.modules)


def test_gelu_by_tanh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: exact(x, approximate="tanh"))
    path = tmp_path / "m.onnx"
    export(nets().small(), path)
    (finding,) = run(path).findings
    assert finding.noise == "implementation.approximation"
    assert (finding.explained or 0) > 0.99


def exported_open(module: torch.nn.Module, path: Path) -> Path:
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (ids,),
            str(path),
            dynamo=False,
            input_names=["ids"],
            dynamic_axes={"ids": {0: "batch", 1: "tokens"}},
        )
    np.savez(path.with_suffix(".npz"), ids=ids.numpy()[None])
    return path


def test_a_frozen_size_shows_at_a_second_shape(tmp_path: Path) -> None:
    frozen = nets().FrozenSequence()
    frozen.load_state_dict(nets().sequence().state_dict())
    path = exported_open(frozen.eval(), tmp_path / "m.onnx")
    report = run(path, f"{NETS}:sequence", data=path.with_suffix(".npz"))
    (finding,) = report.findings
    assert finding.noise == "export.frozen_shape" and finding.severity == "critical"
    assert finding.confidence == "high" and (finding.explained or 0) > 0.999
    assert "Reshape" in finding.op_types
    line = next(i for i, t in enumerate(NETS.read_text().splitlines(), 1) if "3, 4).softmax" in t)
    assert any(f"nets.py:{line}" in m for m in finding.modules)
    assert "at tokens = 8 the file computes what the module does, at 12 not" in finding.evidence[0]
    assert report.exit_code == 1 and not report.gaps


def test_a_frozen_branch_shows_at_a_second_shape(tmp_path: Path) -> None:
    path = exported_open(nets().branching(), tmp_path / "m.onnx")
    report = run(path, f"{NETS}:branching", data=path.with_suffix(".npz"))
    (finding,) = report.findings
    assert finding.noise == "export.frozen_shape" and finding.confidence == "medium"
    assert finding.explained is None and finding.effect == pytest.approx(0.5, rel=1e-3)


def test_open_dimensions_that_work_are_silent(tmp_path: Path) -> None:
    path = exported_open(nets().sequence(), tmp_path / "m.onnx")
    report = run(path, f"{NETS}:sequence", data=path.with_suffix(".npz"))
    assert not report.findings and not report.gaps and report.exit_code == 0
