"""Reports that are JSON documents of their own."""

from __future__ import annotations

import json
import math

from auditor.records.forensics import ForensicsReport
from auditor.records.model import ModelInfo
from auditor.records.stream import Streamed, StreamReport, StreamStep
from reports import _forensics, _stream


def test_what_is_not_finite_is_null() -> None:
    """JSON has no infinity and no NaN (RFC 8259, section 6)."""
    step = StreamStep(0, (1,), (0,), 0.25, None, math.inf, 0.5, math.nan, 1.0)
    model = ModelInfo("vad.onnx", "0" * 64, 17, 3, 4)
    report = StreamReport(model, (("h", "hn"),), "y", "a sound", (Streamed("ov", (step,)),))
    document = json.loads(_stream.render_json(report), parse_constant=_refused)
    assert document["format"] == "sysnoise-stream/1"
    assert document["states"] == [["h", "hn"]]
    (found,) = document["backends"][0]["steps"]
    assert (found["relative_l2"], found["states"], found["inherited"]) == (None, 0.5, None)

    forensics = ForensicsReport(
        *("pillow", math.inf, False, (), (), None, "rgb", "nchw", None),
        *((1.0,) * 3, (0.0,) * 3, True, 1, 0, ()),
    )
    assert json.loads(_forensics.to_json(forensics), parse_constant=_refused)["residual"] is None


def _refused(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")
