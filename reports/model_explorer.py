"""Node data for Google's Model Explorer: a heat map over its graph of the same ONNX file.

Drop the file on an open graph, or ``model-explorer … --node_data_paths``. Values are the relative
L2 that each node's segment introduced on the backend that diverges most; a node is found by the
name of its first output tensor (``GraphNodeData`` in node_data_builder.py of Model Explorer).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from reports import _words as words

if TYPE_CHECKING:
    from auditor.records.report import AuditReport, BackendReport

# Colours up to a value, from nothing to see to nothing to ship.
_COLOURS = (
    (1e-6, "#ffffff"),
    (1e-5, "#fff7ec"),
    (1e-4, "#fdd49e"),
    (1e-3, "#fdbb84"),
    (1e-2, "#fc8d59"),
    (1e-1, "#e34a33"),
    (1e30, "#b30000"),
)
_INCOMPARABLE = 1e30  # JSON has no infinity


class _ModelExplorer:
    """Report format ``model-explorer``."""

    name = "model-explorer"
    suffixes = (".nodes.json",)

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The node data as ASCII JSON text."""
        audited = [b for b in report.backends if b.segments]
        worst = max(audited, key=_divergence, default=None)
        results: dict[str, dict[str, float]] = {}
        for segment in worst.segments if worst else ():
            value = segment.introduced if math.isfinite(segment.introduced) else _INCOMPARABLE
            for key in segment.node_keys:  # a node of several segments shows the largest
                if value >= results.get(key, {"value": -1.0})["value"]:
                    results[key] = {"value": value}
        who = words.visible(worst.id) if worst else "no backend"
        data = {
            "name": f"introduced relative L2 on {who}",
            "results": results,
            "thresholds": [
                {"value": value, "bgColor": colour, "textColor": "#000000"}
                for value, colour in _COLOURS
            ],
        }
        return json.dumps(data, indent=2, allow_nan=False) + "\n"


RENDERER = _ModelExplorer()


def _divergence(backend: BackendReport) -> float:
    return max((o.distance.relative_l2 for o in backend.outputs), default=0.0)
