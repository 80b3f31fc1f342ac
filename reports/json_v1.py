"""Version 1 of the report as JSON: what other tools read, and what ``audit show`` starts from.

The mapping is written out here, key by key, so that the records may change without changing the
format; ``report_v1.schema.json`` beside this file publishes it. Within version 1 keys are only
ever added: readers ignore keys they do not know, and a key whose record field has a default may
be absent.

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
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal

from auditor.errors import UsageError
from auditor.records.backend import Gap, Kernel, Provenance, Skipped
from auditor.records.measured import (
    CategoryShare,
    Concentration,
    Consequence,
    Counterfactual,
    Distance,
    EndToEnd,
    FidelityProof,
    Hypothesis,
    Latency,
    OutputChange,
    OutputDistance,
    Picture,
    Segment,
    Spread,
    TensorStats,
)
from auditor.records.model import Machine, ModelInfo, ReferenceInfo, StimulusInfo
from auditor.records.report import (
    Agreement,
    AuditReport,
    BackendReport,
    Broken,
    Finding,
    Judgement,
    NoiseInfo,
    PipelineReport,
    PipelineStep,
    Waiver,
)
from auditor.records.terms import (
    Conclusion,
    Confidence,
    Fidelity,
    OutputKind,
    Severity,
    Stage,
    Status,
    Verdict,
)
from reports._codec import (
    BOOL,
    BYTES,
    ERROR,
    INT,
    INTS,
    MAYBE_TEXT,
    MEASURED,
    MISSING_KEY,
    SHARE,
    TEXT,
    TEXTS,
    Codec,
    MalformedError,
    as_object,
    choice,
    keyed,
    many,
    number,
    optional,
    pair,
    parse,
    record,
)

SCHEMA_VERSION = 1
TOOL = "sysnoise-auditor"


# --- the mapping ---------------------------------------------------------------------------------

_MODEL = record(
    ModelInfo,
    {
        "path": TEXT,
        "sha256": TEXT,
        "opset": INT,
        "nodes": INT,
        "parameters": INT,
        "producer": TEXT,
        "candidate": MAYBE_TEXT,
    },
)
_STIMULUS = record(
    StimulusInfo,
    {
        "kind": choice(Literal["recorded", "synthetic"]),
        "samples": INT,
        "seed": optional(INT),
        "source": TEXT,
        "shapes": keyed(INTS),
        "notes": TEXTS,
        "sha256": MAYBE_TEXT,
    },
)
_REFERENCE = record(ReferenceInfo, {"engine": TEXT, "version": TEXT, "precision": TEXT})
_KERNEL = record(
    Kernel,
    {
        "name": TEXT,
        "type": TEXT,
        "nodes": TEXTS,
        "outputs": TEXTS,
        "primitive": TEXT,
        "precision": TEXT,
        "output_precision": TEXT,
    },
)
_PROVENANCE = record(
    Provenance,
    {
        "engine": TEXT,
        "version": TEXT,
        "device": TEXT,
        "options": keyed(TEXT),
        "kernels": many(_KERNEL),
        "notes": TEXTS,
        "denied": TEXTS,
    },
)
GAP = record(
    Gap,
    {
        "subject": TEXT,
        "stage": TEXT,
        "reason": TEXT,
        "remedy": MAYBE_TEXT,
        "log": TEXTS,
    },
)
_SKIPPED = record(Skipped, {"tensor": TEXT, "reason": TEXT})
_FIDELITY = record(
    FidelityProof,
    {
        "outputs_bitwise_equal": BOOL,
        "program_unchanged": BOOL,
        "candidates": INT,
        "output_proved": INT,
        "cone_proved": INT,
        "perturbing": INT,
        "run_to_run": ERROR,
        "rebuild": MEASURED,
        "skipped": many(_SKIPPED),
        "cached": INT,
    },
)
_PLAIN_DISTANCE = record(
    Distance,
    {
        "relative_l2": ERROR,
        "max_abs": ERROR,
        "sqnr_db": number(math.inf),
        "cosine": SHARE,
        "mismatch": MAYBE_TEXT,
    },
)


def _load_distance(data: object, path: str) -> Distance:
    found: Distance = _PLAIN_DISTANCE.load(data, path)
    if math.isinf(found.relative_l2) and math.isinf(found.sqnr_db):
        return Distance(found.relative_l2, found.max_abs, -math.inf, found.cosine, found.mismatch)
    return found


_DISTANCE = Codec(_PLAIN_DISTANCE.dump, _load_distance)


def _load_edge(data: object, path: str) -> float:
    if data is None:
        raise MalformedError(path, "a number")
    return SHARE.load(data, path)


_SPREAD = optional(
    record(
        Spread,
        {
            "samples": INT,
            "mean": ERROR,
            "deviation": ERROR,
            "low": ERROR,
            "high": ERROR,
            "low_at": INT,
            "high_at": INT,
        },
    )
)
_CONSEQUENCE = record(
    Consequence,
    {
        "output": TEXT,
        "kind": choice(OutputKind),
        "samples": INT,
        "items": INT,
        "changed": optional(INT),
        "first_changed": optional(INT),
        "margin": MEASURED,
        "margin_after": MEASURED,
        "kl": MEASURED,
        "iou": MEASURED,
        "cosine": MEASURED,
        "lowest": MEASURED,
        "sentence": TEXT,
        "added": optional(INT),
        "searched": optional(INT),
        "nearest_changed": optional(INT),
        "ranks_changed": optional(INT),
        "texts": optional(INT),
        "texts_changed": optional(INT),
        "edits": optional(INT),
        "characters": optional(INT),
        "blank": optional(INT),
        "example": optional(many(TEXT)),
    },
)
_OUTPUT = record(
    OutputDistance,
    {
        "name": TEXT,
        "distance": _DISTANCE,
        "top1_agreement": MEASURED,
        "kind": choice(OutputKind),
        "kind_stated": BOOL,
        "consequence": optional(_CONSEQUENCE),
        "spread": _SPREAD,
        "nonfinite": INT,
        "first_nonfinite": optional(INT),
        "one_step": MEASURED,
        "max_ulp": MEASURED,
    },
    "distance",
)
_PLAIN_TENSOR = record(
    TensorStats,
    {
        "name": TEXT,
        "dtype": TEXT,
        "shape": INTS,
        "role": choice(Literal["input", "output"]),
        "reference_range": pair(SHARE),
        "backend_range": pair(SHARE),
        "distance": _DISTANCE,
        "histogram": INTS,
        "histogram_edges": many(Codec(SHARE.dump, _load_edge)),
    },
    "distance",
)


def _load_tensor(data: object, path: str) -> TensorStats:
    found: TensorStats = _PLAIN_TENSOR.load(data, path)
    if found.histogram and len(found.histogram_edges) != len(found.histogram) + 1:
        raise MalformedError(f"{path}.histogram_edges", "one more than the counts")
    return found


_TENSOR = Codec(_PLAIN_TENSOR.dump, _load_tensor)
_HYPOTHESIS = record(
    Hypothesis,
    {
        "noise": TEXT,
        "variant": TEXT,
        "explained": number(-math.inf),
        "bit_identical": SHARE,
    },
)
_CONCENTRATION = record(
    Concentration, {"axis": INT, "index": INT, "axis_size": INT, "share": SHARE}
)
_PLAIN_PICTURE = record(
    Picture,
    {
        "tensor": TEXT,
        "sample": INT,
        "plane": TEXT,
        "size": pair(INT),
        "cells": pair(INT),
        "range": pair(SHARE),
        "most_accumulated": SHARE,
        "most_introduced": SHARE,
        "reference": BYTES,
        "deployed": BYTES,
        "accumulated": BYTES,
        "introduced": BYTES,
    },
)


def _load_picture(data: object, path: str) -> Picture:
    found: Picture = _PLAIN_PICTURE.load(data, path)
    for levels in (found.reference, found.deployed, found.accumulated, found.introduced):
        if len(levels) != math.prod(found.cells):
            raise MalformedError(path, "a byte for each cell")
    return found


_PICTURE = Codec(_PLAIN_PICTURE.dump, _load_picture)
_SEGMENT = record(
    Segment,
    {
        "id": TEXT,
        "nodes": TEXTS,
        "node_keys": TEXTS,
        "op_types": TEXTS,
        "inputs": TEXTS,
        "outputs": TEXTS,
        "kernel": TEXT,
        "precision": TEXT,
        "fidelity": choice(Fidelity),
        "accumulated": ERROR,
        "introduced": ERROR,
        "inherited": ERROR,
        "amplification": MEASURED,
        "leave_one_in": MEASURED,
        "impact_share": MEASURED,
        "floor": ERROR,
        "noise": MAYBE_TEXT,
        "explained": MEASURED,
        "bit_identical": SHARE,
        "residual": ERROR,
        "hypotheses": many(_HYPOTHESIS),
        "tensors": many(_TENSOR),
        "concentration": optional(_CONCENTRATION),
        "unmeasured": MAYBE_TEXT,
        "leave_one_in_spread": _SPREAD,
        "impact_share_spread": _SPREAD,
        "explained_spread": _SPREAD,
        "explained_on": optional(INT),
        "contradicted": INT,
        "one_step": MEASURED,
        "consequences": many(_CONSEQUENCE),
        "constants": TEXTS,
        "modules": TEXTS,
        "picture": optional(_PICTURE),
    },
)
_CATEGORY = record(
    CategoryShare,
    {"noise": TEXT, "stage": choice(Stage), "share": SHARE, "spread": _SPREAD},
)


def _dump_booked(value: tuple[str, float]) -> object:
    label, share = value
    return {"label": TEXT.dump(label), "share": SHARE.dump(share)}


def _load_booked(data: object, path: str) -> tuple[str, float]:
    found = as_object(data, path)
    return (
        TEXT.load(found.get("label"), f"{path}.label"),
        SHARE.load(found.get("share"), f"{path}.share"),
    )


_COUNTERFACTUAL = record(
    Counterfactual,
    {
        "factor": TEXT,
        "options": keyed(TEXT),
        "noises": TEXTS,
        "conclusion": choice(Conclusion),
        "samples": INT,
        "before": MEASURED,
        "after": MEASURED,
        "removed": MEASURED,
        "claimed": MEASURED,
        "latency_before": MEASURED,
        "latency_after": MEASURED,
        "outputs": many(
            record(OutputChange, {"name": TEXT, "before": MEASURED, "after": MEASURED})
        ),
        "failure": MAYBE_TEXT,
        "sentence": TEXT,
    },
)
_END_TO_END = record(
    EndToEnd,
    {
        "outputs": many(_OUTPUT),
        "shares": many(_CATEGORY),
        "unexplained_share": SHARE,
        "samples": INT,
    },
)
_PIPELINE = record(
    PipelineReport,
    {
        "source": TEXT,
        "photos": INT,
        "training": keyed(TEXT),
        "deployment": keyed(TEXT),
        "steps": many(
            record(
                PipelineStep,
                {
                    "noise": TEXT,
                    "name": TEXT,
                    "training": TEXT,
                    "deployment": TEXT,
                    "introduced": ERROR,
                    "bit_identical": SHARE,
                    "effect": MEASURED,
                    "leave_one_in": MEASURED,
                    "share": MEASURED,
                    "leave_one_in_spread": _SPREAD,
                    "consequences": many(_CONSEQUENCE),
                },
            )
        ),
        "outputs": many(_OUTPUT),
    },
)
_LATENCY = record(Latency, {"seconds": SHARE, "reference_seconds": SHARE})
_BACKEND = record(
    BackendReport,
    {
        "id": TEXT,
        "device": TEXT,
        "status": choice(Status),
        "gap": optional(GAP),
        "provenance": optional(_PROVENANCE),
        "fidelity": optional(_FIDELITY),
        "outputs": many(_OUTPUT),
        "categories": many(_CATEGORY),
        "unexplained_share": SHARE,
        "segments": many(_SEGMENT),
        "booked": many(Codec(_dump_booked, _load_booked)),
        "additivity": MEASURED,
        "input_control": MEASURED,
        "warnings": TEXTS,
        "seconds": keyed(ERROR),
        "unexplained_spread": _SPREAD,
        "booked_samples": INT,
        "counterfactuals": many(_COUNTERFACTUAL),
        "latency": optional(_LATENCY),
        "end_to_end": optional(_END_TO_END),
    },
)
_FINDING = record(
    Finding,
    {
        "rank": INT,
        "backend": TEXT,
        "segment": TEXT,
        "segments": TEXTS,
        "nodes": TEXTS,
        "op_types": TEXTS,
        "kernel": TEXT,
        "noise": MAYBE_TEXT,
        "stage": choice(Stage),
        "leave_one_in": MEASURED,
        "impact_share": MEASURED,
        "introduced": ERROR,
        "effect": MEASURED,
        "explained": MEASURED,
        "bit_identical": SHARE,
        "severity": choice(Severity),
        "confidence": choice(Confidence),
        "evidence": TEXTS,
        "remedy": MAYBE_TEXT,
        "fingerprint": TEXT,
        "leave_one_in_spread": _SPREAD,
        "explained_spread": _SPREAD,
        "consequences": many(_CONSEQUENCE),
        "modules": TEXTS,
        "beside": TEXTS,
    },
)
_NOISE = record(
    NoiseInfo,
    {
        "id": TEXT,
        "stage": choice(Stage),
        "type": TEXT,
        "title": TEXT,
        "cause": TEXT,
        "source": TEXT,
    },
)
_JUDGEMENT = record(
    Judgement,
    {
        "source": TEXT,
        "broken": many(
            record(
                Broken,
                {
                    "sentence": TEXT,
                    "backend": TEXT,
                    "output": MAYBE_TEXT,
                    "fingerprint": MAYBE_TEXT,
                },
            )
        ),
        "waived": many(record(Waiver, {"fingerprint": TEXT, "reason": TEXT})),
        "notes": TEXTS,
    },
)
_AGREEMENT = record(Agreement, {"a": TEXT, "b": TEXT, "relative_l2": ERROR})
_BODY: dict[str, Codec[Any]] = {
    "model": _MODEL,
    "stimulus": _STIMULUS,
    "reference": _REFERENCE,
    "backends": many(_BACKEND),
    "findings": many(_FINDING),
    "agreement": many(_AGREEMENT),
    "outlier": MAYBE_TEXT,
    "gaps": many(GAP),
    "verdict": choice(Verdict),
    "exit_code": INT,
    "timing": keyed(ERROR),
    "fail_on": choice(Severity),
    "requested": TEXTS,
    "noises": many(_NOISE),
    "judgement": optional(_JUDGEMENT),
    "pipeline": optional(_PIPELINE),
    "command": TEXTS,
    "machine": optional(
        record(
            Machine,
            {"cpu": TEXT, "flags": TEXTS, "cores": INT, "system": TEXT, "python": TEXT},
        )
    ),
    "threads": optional(INT),
}
_ADDED = {f.name for f in fields(AuditReport) if f.default is not MISSING}  # since version 1


# --- the interface -------------------------------------------------------------------------------


def dump(report: AuditReport) -> dict[str, object]:
    """The report as JSON values (strict: no infinity, no NaN)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": TOOL, "version": report.tool_version},
    } | {key: codec.dump(getattr(report, key)) for key, codec in _BODY.items()}


def load(source: Path | Mapping[str, object]) -> AuditReport:
    """The report that ``dump`` described.

    Args:
        source: a report file, or what parsing one gave.

    Raises:
        UsageError: it cannot be read, is not such a report, or is of another version.
    """
    data: object = parse(source) if isinstance(source, Path) else source
    if not isinstance(data, Mapping) or "schema_version" not in data:
        if isinstance(data, Mapping) and isinstance(other := data.get("format"), str):
            raise UsageError(
                f"this is `{other}`, and not the report of an audit",
                "`audit show` draws reports of audits and of fleets; other files are for programs.",
            )
        raise UsageError(
            "this is not a report of the auditor: it has no schema_version",
            "Give the file that `audit MODEL -o report.json` wrote.",
        )
    version = data["schema_version"]
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UsageError(
            f"the report has schema_version {str(version)[:40]}; this auditor reads "
            f"{SCHEMA_VERSION}",
            "Show it with the version of the auditor that wrote it, or run the audit again.",
        )
    try:
        values = {
            key: codec.load(_get(data, key), key)
            for key, codec in _BODY.items()
            if key in data or key not in _ADDED
        }
        tool = as_object(_get(data, "tool"), "tool")
        return AuditReport(tool_version=TEXT.load(tool.get("version"), "tool.version"), **values)
    except MalformedError as error:
        raise UsageError(
            f"the report is malformed at {error}",
            "The file was changed or cut short; run the audit again.",
        ) from error


def _get(data: Mapping[str, object], key: str) -> object:
    if key not in data:
        raise MalformedError(key, MISSING_KEY)
    return data[key]


class _Json:
    """Report format ``json``."""

    name = "json"
    suffixes = (".json",)

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report as ASCII JSON text, keys sorted so that two reports can be diffed."""
        return json.dumps(dump(report), indent=2, sort_keys=True, allow_nan=False) + "\n"


RENDERER = _Json()
