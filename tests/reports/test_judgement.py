"""A policy's verdict reads the same in every format."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from auditor.records.report import AuditReport
from reports import json_v1, junit, markdown, sarif, terminal


@pytest.mark.parametrize("width", [80, 120, 200])
def test_in_the_terminal(judged: AuditReport, width: int) -> None:
    text = " ".join(terminal.RENDERER.render(judged, width=width, color=False).split())
    assert "3 broken rules; 1 finding waived (audit.toml)" in text
    assert "output `Softmax:0` on ov: relative_l2 is 0.012" in text
    assert "latency 2.1 ms, 0.42 times the 5 ms of ONNX Runtime's defaults" in text
    assert "ended on 2026-01-01." in text


def test_in_json(judged: AuditReport) -> None:
    text = json_v1.RENDERER.render(judged, width=None, color=False)
    assert json_v1.load(json.loads(text)) == judged


def test_in_sarif(judged: AuditReport) -> None:
    log = json.loads(sarif.RENDERER.render(judged, width=None, color=False))
    results = log["runs"][0]["results"]
    suppressed = [result for result in results if "suppressions" in result]
    assert [result["properties"]["rank"] for result in suppressed] == [1]
    assert suppressed[0]["suppressions"][0]["justification"].startswith("accepted")
    assert sum(result["ruleId"] == "divergence" for result in results) == 1
    (rule,) = (result for result in results if result["ruleId"] == "rule")
    assert (rule["level"], rule["message"]["text"]) == (
        *("error", "ov: latency_ratio is 0.42, and its tolerance 0.4"),
    )


def test_in_junit(judged: AuditReport) -> None:
    root = ElementTree.fromstring(junit.RENDERER.render(judged, width=None, color=False))
    failed = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert [case.get("name", "").split()[0] for case in failed] == [
        *("final", "rules", "precision.bf16"),
    ]
    assert "accepted: checked on the test set" in "".join(root.itertext())


def test_in_markdown(judged: AuditReport) -> None:
    text = markdown.RENDERER.render(judged, width=None, color=False)
    assert "Broken rules of `audit.toml`" in text
    assert "latency_ratio is 0.42" in text.replace("\\", "")
