"""The heat map for Model Explorer: strict JSON, one value for each node."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from auditor import discovery
from auditor.records.report import AuditReport
from reports.model_explorer import RENDERER


def rendered(report: AuditReport) -> dict:
    text = RENDERER.render(report, width=None, color=False)
    assert text.isascii()
    return json.loads(text, parse_constant=lambda c: 1 / 0)


def test_nodes_are_found_by_their_output_tensor(report: AuditReport) -> None:
    data = rendered(report)
    worst = max(
        (b for b in report.backends if b.segments),
        key=lambda b: max(o.distance.relative_l2 for o in b.outputs),
    )
    assert data["name"] == f"introduced relative L2 on {worst.id}"
    for segment in worst.segments:
        for key in segment.node_keys:
            assert data["results"][key]["value"] >= segment.introduced
    values = [t["value"] for t in data["thresholds"]]
    assert values == sorted(values)


def test_what_cannot_be_compared_is_the_reddest(report: AuditReport) -> None:
    backend = next(b for b in report.backends if b.segments)
    segment = replace(backend.segments[0], introduced=math.inf)
    data = rendered(replace(report, backends=(replace(backend, segments=(segment,)),)))
    assert data["results"][segment.node_keys[0]]["value"] == data["thresholds"][-1]["value"]


def test_the_suffix_means_the_format() -> None:
    assert ".nodes.json" in discovery.renderers()["model-explorer"].suffixes


def test_any_report_can_be_drawn(any_reports: tuple[AuditReport, ...]) -> None:
    for report in any_reports:
        assert set(rendered(report)) == {"name", "results", "thresholds"}
