"""The training side at the head of the chain: PyTorch's own values against the export's."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.commands._options import backend_specs, with_training
from auditor.errors import UsageError
from auditor.ports import Silent
from auditor.records.report import AuditReport, BackendReport
from auditor.training import pairing
from backends import _source
from tests.helpers import NETS, nets

SHAPE = (1, 3, 10, 10)


def export(module: torch.nn.Module, path: Path, **options: Any) -> Path:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (x,), str(path), **({"dynamo": False, "verbose": False} | options)
        )
    return path


def run(path: Path, source: str, *others: str, **options: Any) -> AuditReport:
    specs = tuple(BackendSpec(id) for id in ("torch", *others))
    asked = AuditOptions(backends=specs, source=source, threads=1, **options)
    return audit(path, asked, noises=discovery.noises(), progress=Silent())


def of(report: AuditReport) -> BackendReport:
    return next(b for b in report.backends if b.id == "torch")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")  # named as the argument of forward is
    return export(nets().small(), folder / "small.onnx", input_names=["x"])


def assert_clean(report: AuditReport, *, least: float) -> None:
    side = of(report)
    assert side.status == "audited" and side.fidelity is not None
    assert side.fidelity.outputs_bitwise_equal and side.fidelity.program_unchanged
    assert side.fidelity.perturbing == 0
    assert not report.findings and report.exit_code == 0
    assert all(output.distance.relative_l2 < 1e-5 for output in side.outputs)
    placed = [s for s in side.segments if any(".py:" in m for m in s.modules)]
    assert len(placed) >= 0.95 * len(side.segments)
    assert side.fidelity.output_proved >= least * side.fidelity.candidates


@pytest.mark.parametrize("name", ["efficientnet_lite0", "minilm", "mtcnn_p"])
def test_clean_exports_of_real_models_are_silent(
    name: str, zoo_model: Callable[[str], Path]
) -> None:
    path = zoo_model(name)
    data = path.with_suffix(".npz")
    report = run(path, f"benchmarks.zoo:{name}", data=data, samples=1)
    assert_clean(report, least=0.65)  # attention and GELU are one operation each in PyTorch


@pytest.mark.parametrize("dynamo", [False, True])
def test_every_segment_names_its_module_and_line(tmp_path: Path, dynamo: bool) -> None:
    path = export(nets().small(), tmp_path / "m.onnx", dynamo=dynamo)
    report = run(path, f"{NETS}:small", "ort")
    assert_clean(report, least=0.5)
    said = {m for s in of(report).segments for m in s.modules}
    line = next(i for i, t in enumerate(NETS.read_text().splitlines(), 1) if "self.query(y)" in t)
    assert f"query (nets.py:{line})" in said
    # The newer exporter names what it folded a normalisation into after the normalisation.
    folded = "blocks.1.bn" if dynamo else "blocks.1.conv"
    assert any(m.startswith(f"{folded} (nets.py:") for m in said)
    ort = next(b for b in report.backends if b.id == "ort")
    assert any("query (nets.py" in m for s in ort.segments for m in s.modules)


def test_a_changed_weight_is_located_by_module_and_line(small: Path, tmp_path: Path) -> None:
    model = onnx.load(small)
    weight = next(t for t in model.graph.initializer if t.name == "head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    report = run(path, f"{NETS}:small")
    (finding,) = report.findings
    assert finding.backend == "torch" and "Gemm" in finding.op_types
    assert finding.modules[0].startswith("head (nets.py:")
    assert finding.introduced == pytest.approx(0.01, rel=0.2)


def test_values_find_each_other_again_behind_a_fault(small: Path, tmp_path: Path) -> None:
    """A fault early on moves every value behind it; only its own node is blamed."""
    model = onnx.load(small)
    conv = next(n for n in model.graph.node if n.name == "/blocks/blocks.0/conv/Conv")
    weight = next(t for t in model.graph.initializer if t.name == conv.input[1])
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0), weight.name))
    path = tmp_path / "rolled.onnx"
    onnx.save(model, path)
    report = run(path, f"{NETS}:small")
    assert [f.modules[0].partition(" ")[0] for f in report.findings] == ["blocks.0.conv"]
    assert report.findings[0].leave_one_in == pytest.approx(1, abs=1e-3)


def test_an_exported_program_is_a_source(small: Path, tmp_path: Path) -> None:
    program = torch.export.export(nets().small(), (torch.zeros(SHAPE),))
    path = tmp_path / "small.pt2"
    torch.export.save(program, path)
    with pytest.raises(UsageError, match="can run code") as caught:
        run(small, str(path))
    assert "--trust-source" in caught.value.hint
    report = run(small, str(path), trust_source=True)
    assert_clean(report, least=0.5)
    assert any("query (nets.py:" in m for s in of(report).segments for m in s.modules)


def test_training_mode_is_left_and_said(small: Path) -> None:
    report = run(small, f"{NETS}:in_training_mode")
    assert_clean(report, least=0.5)
    provenance = of(report).provenance
    assert provenance and any("evaluation mode" in note for note in provenance.notes)


def test_what_the_source_compiles_is_run_as_it_is_written(small: Path) -> None:
    """Compiled, its operations could not be seen; and compiling them takes minutes."""
    assert_clean(run(small, f"{NETS}:compiled"), least=0.5)


def test_no_line_of_ours_is_taken_for_one_of_the_source(tmp_path: Path) -> None:
    path = export(nets().unwritten(), tmp_path / "m.onnx")
    said = {m for s in of(run(path, f"{NETS}:unwritten")).segments for m in s.modules}
    assert said == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("crashes", "killed by SIGSEGV"),
        ("hangs", "did not answer within 10 s"),
        ("fails", "RuntimeError: no weights on this machine"),
    ],
)
def test_what_goes_wrong_in_the_users_code_is_a_gap(small: Path, name: str, said: str) -> None:
    report = run(small, f"{NETS}:{name}", "ort", timeout=10 if name == "hangs" else 120)
    gap = of(report).gap
    assert gap is not None and said in gap.reason
    assert report.exit_code == 3
    assert next(b for b in report.backends if b.id == "ort").status == "audited"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.at.all:factory", "no module `nowhere.at.all`"),
        (f"{NETS}:smal", "no `smal`"),
        (f"{NETS}:no_module", "not a torch.nn.Module"),
        ("small", "names no factory"),
        ("tests/source", "is a folder"),
        ("missing.py:f", "does not exist"),
        ("missing.pt2", "does not exist"),
    ],
)
def test_a_wrong_source_is_one_clear_error(source: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        _source.load(source, trusted=False)
    assert caught.value.hint


def test_the_command_line_puts_the_training_side_first() -> None:
    specs = backend_specs(["ort"])
    assert [s.label for s in with_training(specs, "m:f")] == ["torch", "ort"]
    assert with_training(specs, None) == specs
    assert "torch" not in {s.id for s in backend_specs(None)}


def test_a_training_side_without_a_source_is_one_clear_error(small: Path) -> None:
    options = AuditOptions(backend_specs(["torch:cuda"]))
    with pytest.raises(UsageError, match="what the model was exported from"):
        audit(small, options, noises=(), progress=Silent())


def test_another_path_on_a_later_sample_is_a_gap(small: Path, tmp_path: Path) -> None:
    x = np.stack([np.full(SHAPE, -1, np.float32), np.full(SHAPE, 1, np.float32)])
    np.savez(tmp_path / "x.npz", **{onnx.load(small).graph.input[0].name: x})
    report = run(small, f"{NETS}:branches", data=tmp_path / "x.npz", samples=2)
    gap = of(report).gap
    assert gap is not None and "other operations than on the first sample" in gap.reason


def test_what_is_added_to_a_mask_is_not_the_mask(tmp_path: Path) -> None:
    """The module masks and normalises in one operation: it never has the masked scores."""
    rows = onnx.parser.parse_graph(
        "rows (float[1, 4] x, float[4, 4] hide) => (float[4, 4] y) "
        "<float[1] far = {-100}> { mask = Mul(hide, far) sum = Add(mask, x) y = Softmax(sum) }"
    )
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(rows, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
    x = np.float32([[0.01, -0.02, 0.03, 0.01]])
    hide = np.triu(np.ones((4, 4), np.float32), 1)
    powers = np.exp(x - 100 * hide)
    arrays = [-100 * hide, powers / powers.sum(axis=1, keepdims=True)]
    values = [pairing.Value(pairing.Sketch.of(a), "aten.op", "net", None) for a in arrays]
    feeds = {"x": x, "hide": hide}
    found = pairing.pair(
        path, feeds, values, {"y": 1}, arrays.__getitem__, threads=1, folder=tmp_path
    )
    assert {name: pair.index for name, pair in found.pairs.items()} == {"mask": 0, "y": 1}


def test_watching_loads_no_compiler() -> None:
    """PyTorch would load it, in 2 s, to keep it away from what watches the operations."""
    code = """
import sys, torch
from backends.torch import _mode
class Recorder:
    seen = []
    def add(self, operation, value): self.seen.append(operation)
with _mode(Recorder()):
    torch.ones(2) + 1
assert "aten.add.Tensor" in Recorder.seen, Recorder.seen
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
