"""Version 1 of the report as JSON: what other tools read, and what ``audit show`` starts from.

Its keys are the fields of the records; ``report_v1.schema.json`` beside this file publishes them,
and tests hold the two together, so that a record cannot change the format unnoticed. Within
version 1 keys are only ever added: readers ignore keys they do not know, and a key whose record
field has a default may be absent.

JSON has no infinity and no NaN (RFC 8259, section 6), so such numbers are written as null:

=====================================  =======================================================
null in                                means
=====================================  =======================================================
``relative_l2``, ``max_abs``,          infinite: the two cannot be compared value by value
``accumulated``, ``introduced``,       (``mismatch`` says why where it is known)
``inherited``, ``residual``, ``floor``
a number of a spread                   infinite
``sqnr_db``                            infinite; minus infinite if ``relative_l2`` is null too
``cosine``, a value range, a share     undefined (NaN)
``explained`` of a hypothesis          minus infinite: the replay is infinitely far off
every other number                     not measured
=====================================  =======================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from auditor.errors import UsageError
from auditor.records.measured import (
    Distance,
    FidelityProof,
    Hypothesis,
    OutputDistance,
    Picture,
    Segment,
    Spread,
    TensorStats,
)
from auditor.records.report import Agreement, AuditReport, BackendReport, Finding, PipelineStep
from reports._codec import (
    ERROR,
    MISSING_KEY,
    SHARE,
    TEXT,
    Codec,
    MalformedError,
    Records,
    as_object,
    many,
    number,
    parse,
)

SCHEMA_VERSION = 1
TOOL = "sysnoise-auditor"


# --- what the types of fields do not say ---------------------------------------------------------

# Errors: null is infinite.
_ERRORS: dict[type[Any], tuple[str, ...]] = {
    Agreement: ("relative_l2",),
    Distance: ("relative_l2", "max_abs"),
    FidelityProof: ("run_to_run",),
    Finding: ("introduced",),
    PipelineStep: ("introduced",),
    Segment: ("accumulated", "introduced", "inherited", "floor", "residual"),
    Spread: ("mean", "deviation", "low", "high"),
}


def _load_edge(data: object, path: str) -> float:
    if data is None:
        raise MalformedError(path, "a number")
    return SHARE.load(data, path)


def _dump_booked(value: tuple[str, float]) -> object:
    label, share = value
    return {"label": TEXT.dump(label), "share": SHARE.dump(share)}


def _load_booked(data: object, path: str) -> tuple[str, float]:
    found = as_object(data, path)
    return (
        TEXT.load(found.get("label"), f"{path}.label"),
        SHARE.load(found.get("share"), f"{path}.share"),
    )


def _distance(found: Distance, path: str) -> Distance:
    if math.isinf(found.relative_l2) and math.isinf(found.sqnr_db):
        return replace(found, sqnr_db=-math.inf)
    return found


def _tensor(found: TensorStats, path: str) -> TensorStats:
    if found.histogram and len(found.histogram_edges) != len(found.histogram) + 1:
        raise MalformedError(f"{path}.histogram_edges", "one more than the counts")
    return found


def _picture(found: Picture, path: str) -> Picture:
    for levels in (found.reference, found.deployed, found.accumulated, found.introduced):
        if len(levels) != math.prod(found.cells):
            raise MalformedError(path, "a byte for each cell")
    return found


_REPORT = Records(
    special={
        **{(kind, name): ERROR for kind, names in _ERRORS.items() for name in names},
        (Distance, "sqnr_db"): number(math.inf),
        (Hypothesis, "explained"): number(-math.inf),
        (TensorStats, "histogram_edges"): many(Codec(SHARE.dump, _load_edge)),
        (BackendReport, "booked"): many(Codec(_dump_booked, _load_booked)),
    },
    inline={OutputDistance: "distance", TensorStats: "distance"},
    loaded={Distance: _distance, TensorStats: _tensor, Picture: _picture},
).of(AuditReport)


# --- the interface -------------------------------------------------------------------------------


def dump(report: AuditReport) -> dict[str, object]:
    """The report as JSON values (strict: no infinity, no NaN)."""
    data: Any = _REPORT.dump(report)
    tool = {"name": TOOL, "version": data.pop("tool_version")}
    return {"schema_version": SCHEMA_VERSION, "tool": tool, **data}


def load(source: Path | Mapping[str, object]) -> AuditReport:
    """The report that ``dump`` described.

    Args:
        source: a report file, or what parsing one gave.

    Raises:
        UsageError: it cannot be read, is not such a report, or is of another version.
    """
    data: object = parse(source) if isinstance(source, Path) else source
    what = str(source) if isinstance(source, Path) else "the report"
    if not isinstance(data, Mapping) or "schema_version" not in data:
        if isinstance(data, Mapping) and isinstance(other := data.get("format"), str):
            raise UsageError(
                f"{what} is `{other}`, and not the report of an audit",
                "`audit show` draws reports of audits and of fleets; other files are for programs.",
            )
        raise UsageError(
            f"{what} is not a report of the auditor: it has no schema_version",
            "Give the file that `audit MODEL -o report.json` wrote.",
        )
    version = data["schema_version"]
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UsageError(
            f"{what} has schema_version {str(version)[:40]}; this auditor reads {SCHEMA_VERSION}",
            "Show it with the version of the auditor that wrote it, or run the audit again.",
        )
    try:
        if "tool" not in data:
            raise MalformedError("tool", MISSING_KEY)
        version = TEXT.load(as_object(data["tool"], "tool").get("version"), "tool.version")
        report: AuditReport = _REPORT.load({**data, "tool_version": version}, "")
    except MalformedError as error:
        raise UsageError(
            f"{what} is malformed at {error}",
            "The file was changed or cut short; run the audit again.",
        ) from error
    return report


class _Json:
    """Report format ``json``."""

    name = "json"
    suffixes = (".json",)

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report as ASCII JSON text, keys sorted so that two reports can be diffed."""
        return json.dumps(dump(report), indent=2, sort_keys=True, allow_nan=False) + "\n"


RENDERER = _Json()
