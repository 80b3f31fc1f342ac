"""`audit export`: both exporters on a user's own module, and what makes one file the better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec
from auditor.ports import Silent
from auditor.records.export import ExportTrial
from auditor.training.export import Exports, _chosen, compare
from backends import _export
from reports import _export as table
from tests.helpers import NETS


def made(
    folder: Path, factory: str, ways: list[tuple[str, int | None]], x: np.ndarray, axis: str = ""
) -> Exports:
    name = "ids" if x.dtype == np.int64 else "x"
    data = folder / "example.npz"
    np.savez(data, **{name: x[None]})
    specs = (BackendSpec("torch"), BackendSpec("ort"))
    options = AuditOptions(
        backends=specs, source=f"{NETS}:{factory}", data=data, threads=1, confirm=False
    )
    dynamic = {name: {axis: "tokens"}} if axis else {}
    return compare(
        ways, options, dynamic, folder, "m.onnx", noises=discovery.noises(), progress=Silent()
    )


def test_both_exporters_are_compared_with_pytorch_itself(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 10, 10), np.float32)
    result = made(tmp_path, "small", [("dynamo", 18), ("torchscript", 13)], x)
    trial, refused = result.report.trials
    assert trial.failure is None and not trial.findings and not trial.gaps
    assert trial.distances["reference"] < 1e-6 and trial.distances["ort"] < 1e-6
    assert refused.failure and "scaled_dot_product_attention" in refused.failure
    assert result.report.chosen == 0 and result.files[1] is None
    file = result.files[0]
    assert file is not None and onnx.load(file).opset_import[0].version == 18
    assert "dynamo@18" in table.render(result.report, 100, False).split("use")[1]


def test_a_file_with_a_frozen_branch_loses(tmp_path: Path) -> None:
    """At the traced size both are right; what one froze shows at another.

    Its other keywords are left out, and it returns a mapping.
    """
    x = np.arange(16, dtype=np.int64).reshape(2, 8)
    result = made(tmp_path, "keyed", [("torchscript", 17)], x, "1")
    (trial,) = result.report.trials
    assert trial.distances["ort"] < 1e-6 and trial.findings == 1
    assert onnx.load(result.files[0] or "").graph.output[0].name == "logits"
    sound = replace(trial, findings=0, causes=())
    assert _chosen([trial, sound])[0] == 1


def test_a_branch_that_a_value_decides_is_told_where_tracing_froze_it(tmp_path: Path) -> None:
    """The one sample goes the same way in both: no figure shows it."""
    x = np.random.default_rng(0).standard_normal((1, 3, 10, 10), np.float32)
    result = made(tmp_path, "branches", [("torchscript", 17), ("dynamo", 18)], x)
    traced, refused = result.report.trials
    assert traced.findings == 0 and traced.distances["ort"] < 1e-6
    line = next(i for i, t in enumerate(NETS.read_text().splitlines(), 1) if "x.mean() > 0" in t)
    assert traced.frozen == (f"nets.py:{line}",)
    assert refused.failure and f"(nets.py:{line})" in refused.failure
    assert f"nets.py:{line}" in table.render(result.report, 100, False).split("dynamo")[0]


def test_the_choice_follows_gaps_then_mistakes_then_distance() -> None:
    near = ExportTrial("dynamo", 18, 18, 9, {"reference": 1e-7, "ort": 1e-7, "ov": 1e-2})
    far = replace(near, exporter="torchscript", distances=near.distances | {"ov": 9e-2})
    assert _chosen([far, near])[0] == 1
    assert _chosen([near, replace(near, gaps={"ov": "refused"})])[0] == 0
    assert _chosen([replace(near, findings=1), far])[0] == 1
    assert _chosen([near, replace(near, opset=21, written=21)])[0] == 1
    assert _chosen([replace(near, distances={}, failure="no")])[0] is None


def test_the_older_exporters_errors_end_before_its_graph() -> None:
    error = ValueError("STFT takes no complex types  [Caused by the value 'x defined in (%x : Flo")
    assert _export._said(error) == "ValueError: STFT takes no complex types"


def test_the_newer_exporters_errors_name_the_reason_and_the_line() -> None:
    reason = ValueError(
        'Cannot view a tensor!\nOriginal traceback:\nFile "/a/swin.py", line 7, in f'
    )
    kind = type("ConversionError", (RuntimeError,), {"__module__": "torch.onnx.errors"})
    error = kind("Failed. Next steps:\n- Create an issue")
    error.__cause__ = reason
    assert _export._said(error) == "ValueError: Cannot view a tensor! (swin.py:7)"
    guard = RuntimeError("Could not guard\nCaused by: (site-packages/a/boxes.py:103 in f)")
    assert _export._said(guard) == "RuntimeError: Could not guard (boxes.py:103)"
