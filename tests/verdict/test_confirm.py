"""Counterfactuals: the program built again without one factor says what the factor did."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.capture.trace import Tracer
from auditor.errors import BackendError
from auditor.ports import Silent
from auditor.records.backend import Switch
from auditor.records.report import AuditReport
from auditor.verdict import confirm
from tests.helpers import nodes_of

KEY = "optimization.enable_gelu_approximation"
TANH = {"ort": {KEY: "1"}}


def gelu() -> onnx.ModelProto:
    """The exact Gelu, as PyTorch exports it: ONNX Runtime fuses it, and may approximate it."""
    graph = helper.make_graph(
        nodes_of(
            "h = MatMul(x, w) scaled = Div(h, root) error = Erf(scaled) "
            "shifted = Add(error, one) doubled = Mul(h, shifted) y = Mul(doubled, half)"
        ),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 16])],
        [
            numpy_helper.from_array(np.eye(16, dtype=np.float32), "w"),
            *(
                numpy_helper.from_array(np.float32(value), name)
                for name, value in (("root", math.sqrt(2)), ("one", 1.0), ("half", 0.5))
            ),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def run(**more: Any) -> AuditReport:
        onnx.save(gelu(), tmp_path / "m.onnx")
        options = AuditOptions(backends=(BackendSpec("ort"),), **more)
        path = tmp_path / "m.onnx"
        return audit(path, options, noises=discovery.noises(), progress=Silent())

    return run


def test_a_factor_that_makes_the_divergence_is_confirmed(run: Any) -> None:
    report = run(options=TANH)
    assert report.findings[0].noise == "implementation.approximation"
    made = report.backends[0].counterfactuals[0]
    assert "implementation.approximation" in made.noises
    assert made.conclusion == "confirmed"
    assert made.options == {KEY: "0"}
    assert made.before is not None and made.before > 1e-5
    assert made.after is not None and made.after < 1e-6
    assert made.latency_before and made.latency_after
    assert f"{KEY}=0" in report.findings[0].evidence[0]


def test_without_findings_nothing_is_built(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracer, "ablate", lambda *_: pytest.fail("was built again"))
    assert run().backends[0].counterfactuals == ()


def test_it_can_be_left_out(run: Any) -> None:
    report = run(options=TANH, confirm=False)
    assert report.findings and report.backends[0].counterfactuals == ()


def test_a_build_that_fails_is_said_and_costs_nothing(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Tracer, switch: object) -> None:
        raise BackendError("the process was killed by SIGSEGV", stage="ablate")

    monkeypatch.setattr(Tracer, "ablate", broken)
    report = run(options=TANH)
    assert report.findings[0].noise == "implementation.approximation"
    made = report.backends[0].counterfactuals
    assert made and all(one.conclusion == "failed" for one in made)
    assert "SIGSEGV" in (made[0].failure or "")


def test_a_factor_that_changes_nothing_is_not_confirmed(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: leaving the factor out keeps the divergence."""
    same = Tracer.ablate

    def kept(self: Tracer, switch: Any) -> None:
        same(self, replace(switch, options={KEY: "1"}))

    monkeypatch.setattr(Tracer, "ablate", kept)
    report = run(options=TANH)
    made = report.backends[0].counterfactuals[0]
    assert made.conclusion in ("unchanged", "contradicted")
    assert report.findings[0].noise == "implementation.approximation"  # measured by replay


def test_nothing_that_is_left_out_speaks_against_rounding() -> None:
    """Without one instruction or order of sums there is another, and it rounds as well."""
    switch = Switch("x", {}, ("implementation.fp32_rounding", "implementation.accumulation"))
    assert confirm._rounds_anyhow(switch, {"implementation.fp32_rounding": 1.0})
    assert not confirm._rounds_anyhow(switch, {"precision.bf16": 1.0})
    both = {"implementation.fp32_rounding": 0.5, "implementation.accumulation": 0.5}
    assert not confirm._rounds_anyhow(switch, both)


@pytest.mark.parametrize(
    ("before", "after", "claimed", "conclusion"),
    [
        (1e-2, 1e-4, 0.99, "confirmed"),
        (1e-2, 1e-2, 0.99, "contradicted"),
        (1e-2, 6e-3, 0.9, "partial"),
        (1e-2, 2e-2, 0.5, "contradicted"),
        (1e-2, 1e-4, None, "measured"),
        (math.inf, 1e-4, 1.0, "confirmed"),
        (1e-2, math.inf, 1.0, "measured"),
        (0.0, 0.0, 1.0, "measured"),
    ],
)
def test_conclusions(before: float, after: float, claimed: float | None, conclusion: str) -> None:
    removed = confirm._removed(before, after)
    assert confirm._conclusion(removed, claimed, elsewhere=False) == conclusion
    # No factor of the engine speaks against a cause that may be in the file it compiled, say.
    other = "measured" if conclusion == "contradicted" else conclusion
    assert confirm._conclusion(removed, claimed, elsewhere=True) == other
