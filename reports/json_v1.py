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

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

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

SCHEMA_VERSION = 1
TOOL = "sysnoise-auditor"

_MAX_BYTES = 256 * 2**20  # a hundred times the largest report seen

_MISSING = "a value, but the key is missing"

T = TypeVar("T")


class _MalformedError(Exception):
    """The JSON does not say what it should; the message begins with the path in the file."""

    def __init__(self, path: str, expected: str) -> None:
        super().__init__(f"{path.removeprefix('.') or 'the report'}: expected {expected}")


@dataclass(frozen=True, slots=True)
class _Codec(Generic[T]):
    """How one kind of value is written, and read back from the JSON found at a path."""

    dump: Callable[[T], object]
    load: Callable[[object, str], T]


# --- single values -------------------------------------------------------------------------------


def _only(kind: type[T], name: str) -> _Codec[T]:
    def load(data: object, path: str) -> T:
        # bool is a subclass of int, yet true is no number.
        if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
            raise _MalformedError(path, name)
        return data

    return _Codec(kind, load)


def _number(null: float) -> _Codec[float]:
    """A number; ``null`` is the non-finite value that null stands for."""

    def dump(value: float) -> object:
        return float(value) if math.isfinite(value) else None

    def load(data: object, path: str) -> float:
        if data is None:
            return null
        if isinstance(data, bool) or not isinstance(data, int | float):
            raise _MalformedError(path, "a number or null")
        try:
            value = float(data)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise _MalformedError(path, "a finite number or null")
        return value

    return _Codec(dump, load)


def _dump_bytes(value: bytes) -> object:
    return base64.b64encode(value).decode("ascii")


def _load_bytes(data: object, path: str) -> bytes:
    try:
        return base64.b64decode(_TEXT.load(data, path), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _MalformedError(path, "base64 (RFC 4648)") from error


def _choice(words: Any) -> _Codec[Any]:
    """One word of a ``Literal``."""
    known = get_args(words)

    def load(data: object, path: str) -> object:
        if data not in known:
            raise _MalformedError(path, f"one of {', '.join(known)}")
        return data

    return _Codec(str, load)


def _optional(codec: _Codec[T]) -> _Codec[T | None]:
    def dump(value: T | None) -> object:
        return None if value is None else codec.dump(value)

    def load(data: object, path: str) -> T | None:
        return None if data is None else codec.load(data, path)

    return _Codec(dump, load)


# --- collections ---------------------------------------------------------------------------------


def _many(codec: _Codec[T]) -> _Codec[tuple[T, ...]]:
    def dump(values: tuple[T, ...]) -> object:
        return [codec.dump(value) for value in values]

    def load(data: object, path: str) -> tuple[T, ...]:
        if not isinstance(data, list):
            raise _MalformedError(path, "a list")
        return tuple(codec.load(item, f"{path}[{i}]") for i, item in enumerate(data))

    return _Codec(dump, load)


def _keyed(codec: _Codec[T]) -> _Codec[dict[str, T]]:
    def dump(values: dict[str, T]) -> object:
        return {str(key): codec.dump(value) for key, value in values.items()}

    def load(data: object, path: str) -> dict[str, T]:
        return {k: codec.load(v, f"{path}.{k}") for k, v in _object(data, path).items()}

    return _Codec(dump, load)


def _pair(codec: _Codec[T]) -> _Codec[tuple[T, T]]:
    several = _many(codec)

    def load(data: object, path: str) -> tuple[T, T]:
        try:
            low, high = several.load(data, path)
        except ValueError as error:
            raise _MalformedError(path, "two numbers") from error
        return low, high

    return _Codec(several.dump, load)


def _object(data: object, path: str) -> Mapping[str, object]:
    if not isinstance(data, Mapping):
        raise _MalformedError(path, "an object")
    return data


def _record(kind: type[Any], keys: Mapping[str, _Codec[Any]], *inline: str) -> _Codec[Any]:
    """A record: its JSON keys are its field names; fields ``inline`` spread theirs in its place."""
    required = {
        f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
    }

    def dump(record: Any) -> object:
        data: dict[str, object] = {}
        for key, codec in keys.items():
            value = codec.dump(getattr(record, key))
            if key in inline and isinstance(value, dict):
                data |= value
            else:
                data[key] = value
        return data

    def load(data: object, path: str) -> Any:
        found = _object(data, path)
        values: dict[str, object] = {}
        for key, codec in keys.items():
            if key in inline:
                values[key] = codec.load(found, path)
            elif key in found:
                values[key] = codec.load(found[key], f"{path}.{key}")
            elif key in required:
                raise _MalformedError(f"{path}.{key}", _MISSING)
        return kind(**values)

    return _Codec(dump, load)


# --- the mapping ---------------------------------------------------------------------------------

_TEXT = _only(str, "text")
_BYTES = _Codec(_dump_bytes, _load_bytes)
_INT = _only(int, "an integer")
_BOOL = _only(bool, "true or false")
_TEXTS = _many(_TEXT)
_INTS = _many(_INT)
_ERROR = _number(math.inf)
_SHARE = _number(math.nan)
_MAYBE_TEXT = _optional(_TEXT)
_MEASURED = _optional(_SHARE)

_MODEL = _record(
    ModelInfo,
    {
        "path": _TEXT,
        "sha256": _TEXT,
        "opset": _INT,
        "nodes": _INT,
        "parameters": _INT,
        "producer": _TEXT,
        "candidate": _MAYBE_TEXT,
    },
)
_STIMULUS = _record(
    StimulusInfo,
    {
        "kind": _choice(Literal["recorded", "synthetic"]),
        "samples": _INT,
        "seed": _optional(_INT),
        "source": _TEXT,
        "shapes": _keyed(_INTS),
        "notes": _TEXTS,
        "sha256": _MAYBE_TEXT,
    },
)
_REFERENCE = _record(ReferenceInfo, {"engine": _TEXT, "version": _TEXT, "precision": _TEXT})
_KERNEL = _record(
    Kernel,
    {
        "name": _TEXT,
        "type": _TEXT,
        "nodes": _TEXTS,
        "outputs": _TEXTS,
        "primitive": _TEXT,
        "precision": _TEXT,
        "output_precision": _TEXT,
    },
)
_PROVENANCE = _record(
    Provenance,
    {
        "engine": _TEXT,
        "version": _TEXT,
        "device": _TEXT,
        "options": _keyed(_TEXT),
        "kernels": _many(_KERNEL),
        "notes": _TEXTS,
    },
)
_GAP = _record(
    Gap,
    {
        "subject": _TEXT,
        "stage": _TEXT,
        "reason": _TEXT,
        "remedy": _MAYBE_TEXT,
        "log": _TEXTS,
    },
)
_SKIPPED = _record(Skipped, {"tensor": _TEXT, "reason": _TEXT})
_FIDELITY = _record(
    FidelityProof,
    {
        "outputs_bitwise_equal": _BOOL,
        "program_unchanged": _BOOL,
        "candidates": _INT,
        "output_proved": _INT,
        "cone_proved": _INT,
        "perturbing": _INT,
        "run_to_run": _ERROR,
        "rebuild": _MEASURED,
        "skipped": _many(_SKIPPED),
        "cached": _INT,
    },
)
_PLAIN_DISTANCE = _record(
    Distance,
    {
        "relative_l2": _ERROR,
        "max_abs": _ERROR,
        "sqnr_db": _number(math.inf),
        "cosine": _SHARE,
        "mismatch": _MAYBE_TEXT,
    },
)


def _load_distance(data: object, path: str) -> Distance:
    found: Distance = _PLAIN_DISTANCE.load(data, path)
    if math.isinf(found.relative_l2) and math.isinf(found.sqnr_db):
        return Distance(found.relative_l2, found.max_abs, -math.inf, found.cosine, found.mismatch)
    return found


_DISTANCE = _Codec(_PLAIN_DISTANCE.dump, _load_distance)


def _load_edge(data: object, path: str) -> float:
    if data is None:
        raise _MalformedError(path, "a number")
    return _SHARE.load(data, path)


_SPREAD = _optional(
    _record(
        Spread,
        {
            "samples": _INT,
            "mean": _ERROR,
            "deviation": _ERROR,
            "low": _ERROR,
            "high": _ERROR,
            "low_at": _INT,
            "high_at": _INT,
        },
    )
)
_CONSEQUENCE = _record(
    Consequence,
    {
        "output": _TEXT,
        "kind": _choice(OutputKind),
        "samples": _INT,
        "items": _INT,
        "changed": _optional(_INT),
        "first_changed": _optional(_INT),
        "margin": _MEASURED,
        "margin_after": _MEASURED,
        "kl": _MEASURED,
        "iou": _MEASURED,
        "cosine": _MEASURED,
        "lowest": _MEASURED,
        "sentence": _TEXT,
        "added": _optional(_INT),
        "searched": _optional(_INT),
        "nearest_changed": _optional(_INT),
        "ranks_changed": _optional(_INT),
        "texts": _optional(_INT),
        "texts_changed": _optional(_INT),
        "edits": _optional(_INT),
        "characters": _optional(_INT),
        "blank": _optional(_INT),
        "example": _optional(_many(_TEXT)),
    },
)
_OUTPUT = _record(
    OutputDistance,
    {
        "name": _TEXT,
        "distance": _DISTANCE,
        "top1_agreement": _MEASURED,
        "kind": _choice(OutputKind),
        "kind_stated": _BOOL,
        "consequence": _optional(_CONSEQUENCE),
        "spread": _SPREAD,
        "nonfinite": _INT,
        "first_nonfinite": _optional(_INT),
        "one_step": _MEASURED,
        "max_ulp": _MEASURED,
    },
    "distance",
)
_PLAIN_TENSOR = _record(
    TensorStats,
    {
        "name": _TEXT,
        "dtype": _TEXT,
        "shape": _INTS,
        "role": _choice(Literal["input", "output"]),
        "reference_range": _pair(_SHARE),
        "backend_range": _pair(_SHARE),
        "distance": _DISTANCE,
        "histogram": _INTS,
        "histogram_edges": _many(_Codec(_SHARE.dump, _load_edge)),
    },
    "distance",
)


def _load_tensor(data: object, path: str) -> TensorStats:
    found: TensorStats = _PLAIN_TENSOR.load(data, path)
    if found.histogram and len(found.histogram_edges) != len(found.histogram) + 1:
        raise _MalformedError(f"{path}.histogram_edges", "one more than the counts")
    return found


_TENSOR = _Codec(_PLAIN_TENSOR.dump, _load_tensor)
_HYPOTHESIS = _record(
    Hypothesis,
    {
        "noise": _TEXT,
        "variant": _TEXT,
        "explained": _number(-math.inf),
        "bit_identical": _SHARE,
    },
)
_CONCENTRATION = _record(
    Concentration, {"axis": _INT, "index": _INT, "axis_size": _INT, "share": _SHARE}
)
_PLAIN_PICTURE = _record(
    Picture,
    {
        "tensor": _TEXT,
        "sample": _INT,
        "plane": _TEXT,
        "size": _pair(_INT),
        "cells": _pair(_INT),
        "range": _pair(_SHARE),
        "most_accumulated": _SHARE,
        "most_introduced": _SHARE,
        "reference": _BYTES,
        "deployed": _BYTES,
        "accumulated": _BYTES,
        "introduced": _BYTES,
    },
)


def _load_picture(data: object, path: str) -> Picture:
    found: Picture = _PLAIN_PICTURE.load(data, path)
    for levels in (found.reference, found.deployed, found.accumulated, found.introduced):
        if len(levels) != math.prod(found.cells):
            raise _MalformedError(path, "a byte for each cell")
    return found


_PICTURE = _Codec(_PLAIN_PICTURE.dump, _load_picture)
_SEGMENT = _record(
    Segment,
    {
        "id": _TEXT,
        "nodes": _TEXTS,
        "node_keys": _TEXTS,
        "op_types": _TEXTS,
        "inputs": _TEXTS,
        "outputs": _TEXTS,
        "kernel": _TEXT,
        "precision": _TEXT,
        "fidelity": _choice(Fidelity),
        "accumulated": _ERROR,
        "introduced": _ERROR,
        "inherited": _ERROR,
        "amplification": _MEASURED,
        "leave_one_in": _MEASURED,
        "impact_share": _MEASURED,
        "floor": _ERROR,
        "noise": _MAYBE_TEXT,
        "explained": _MEASURED,
        "bit_identical": _SHARE,
        "residual": _ERROR,
        "hypotheses": _many(_HYPOTHESIS),
        "tensors": _many(_TENSOR),
        "concentration": _optional(_CONCENTRATION),
        "unmeasured": _MAYBE_TEXT,
        "leave_one_in_spread": _SPREAD,
        "impact_share_spread": _SPREAD,
        "explained_spread": _SPREAD,
        "explained_on": _optional(_INT),
        "contradicted": _INT,
        "one_step": _MEASURED,
        "consequences": _many(_CONSEQUENCE),
        "constants": _TEXTS,
        "modules": _TEXTS,
        "picture": _optional(_PICTURE),
    },
)
_CATEGORY = _record(
    CategoryShare,
    {"noise": _TEXT, "stage": _choice(Stage), "share": _SHARE, "spread": _SPREAD},
)


def _dump_booked(value: tuple[str, float]) -> object:
    label, share = value
    return {"label": _TEXT.dump(label), "share": _SHARE.dump(share)}


def _load_booked(data: object, path: str) -> tuple[str, float]:
    found = _object(data, path)
    return (
        _TEXT.load(found.get("label"), f"{path}.label"),
        _SHARE.load(found.get("share"), f"{path}.share"),
    )


_COUNTERFACTUAL = _record(
    Counterfactual,
    {
        "factor": _TEXT,
        "options": _keyed(_TEXT),
        "noises": _TEXTS,
        "conclusion": _choice(Conclusion),
        "samples": _INT,
        "before": _MEASURED,
        "after": _MEASURED,
        "removed": _MEASURED,
        "claimed": _MEASURED,
        "latency_before": _MEASURED,
        "latency_after": _MEASURED,
        "outputs": _many(
            _record(OutputChange, {"name": _TEXT, "before": _MEASURED, "after": _MEASURED})
        ),
        "failure": _MAYBE_TEXT,
        "sentence": _TEXT,
    },
)
_END_TO_END = _record(
    EndToEnd,
    {
        "outputs": _many(_OUTPUT),
        "shares": _many(_CATEGORY),
        "unexplained_share": _SHARE,
        "samples": _INT,
    },
)
_PIPELINE = _record(
    PipelineReport,
    {
        "source": _TEXT,
        "photos": _INT,
        "training": _keyed(_TEXT),
        "deployment": _keyed(_TEXT),
        "steps": _many(
            _record(
                PipelineStep,
                {
                    "noise": _TEXT,
                    "name": _TEXT,
                    "training": _TEXT,
                    "deployment": _TEXT,
                    "introduced": _ERROR,
                    "bit_identical": _SHARE,
                    "effect": _MEASURED,
                    "leave_one_in": _MEASURED,
                    "share": _MEASURED,
                    "leave_one_in_spread": _SPREAD,
                    "consequences": _many(_CONSEQUENCE),
                },
            )
        ),
        "outputs": _many(_OUTPUT),
    },
)
_LATENCY = _record(Latency, {"seconds": _SHARE, "reference_seconds": _SHARE})
_BACKEND = _record(
    BackendReport,
    {
        "id": _TEXT,
        "device": _TEXT,
        "status": _choice(Status),
        "gap": _optional(_GAP),
        "provenance": _optional(_PROVENANCE),
        "fidelity": _optional(_FIDELITY),
        "outputs": _many(_OUTPUT),
        "categories": _many(_CATEGORY),
        "unexplained_share": _SHARE,
        "segments": _many(_SEGMENT),
        "booked": _many(_Codec(_dump_booked, _load_booked)),
        "additivity": _MEASURED,
        "input_control": _MEASURED,
        "warnings": _TEXTS,
        "seconds": _keyed(_ERROR),
        "unexplained_spread": _SPREAD,
        "booked_samples": _INT,
        "counterfactuals": _many(_COUNTERFACTUAL),
        "latency": _optional(_LATENCY),
        "end_to_end": _optional(_END_TO_END),
    },
)
_FINDING = _record(
    Finding,
    {
        "rank": _INT,
        "backend": _TEXT,
        "segment": _TEXT,
        "segments": _TEXTS,
        "nodes": _TEXTS,
        "op_types": _TEXTS,
        "kernel": _TEXT,
        "noise": _MAYBE_TEXT,
        "stage": _choice(Stage),
        "leave_one_in": _MEASURED,
        "impact_share": _MEASURED,
        "introduced": _ERROR,
        "effect": _MEASURED,
        "explained": _MEASURED,
        "bit_identical": _SHARE,
        "severity": _choice(Severity),
        "confidence": _choice(Confidence),
        "evidence": _TEXTS,
        "remedy": _MAYBE_TEXT,
        "fingerprint": _TEXT,
        "leave_one_in_spread": _SPREAD,
        "explained_spread": _SPREAD,
        "consequences": _many(_CONSEQUENCE),
        "modules": _TEXTS,
    },
)
_NOISE = _record(
    NoiseInfo,
    {
        "id": _TEXT,
        "stage": _choice(Stage),
        "type": _TEXT,
        "title": _TEXT,
        "cause": _TEXT,
        "source": _TEXT,
    },
)
_JUDGEMENT = _record(
    Judgement,
    {
        "source": _TEXT,
        "broken": _many(
            _record(
                Broken,
                {
                    "sentence": _TEXT,
                    "backend": _TEXT,
                    "output": _MAYBE_TEXT,
                    "fingerprint": _MAYBE_TEXT,
                },
            )
        ),
        "waived": _many(_record(Waiver, {"fingerprint": _TEXT, "reason": _TEXT})),
        "notes": _TEXTS,
    },
)
_AGREEMENT = _record(Agreement, {"a": _TEXT, "b": _TEXT, "relative_l2": _ERROR})
_BODY: dict[str, _Codec[Any]] = {
    "model": _MODEL,
    "stimulus": _STIMULUS,
    "reference": _REFERENCE,
    "backends": _many(_BACKEND),
    "findings": _many(_FINDING),
    "agreement": _many(_AGREEMENT),
    "outlier": _MAYBE_TEXT,
    "gaps": _many(_GAP),
    "verdict": _choice(Verdict),
    "exit_code": _INT,
    "timing": _keyed(_ERROR),
    "fail_on": _choice(Severity),
    "requested": _TEXTS,
    "noises": _many(_NOISE),
    "judgement": _optional(_JUDGEMENT),
    "pipeline": _optional(_PIPELINE),
    "command": _TEXTS,
    "machine": _optional(
        _record(
            Machine,
            {"cpu": _TEXT, "flags": _TEXTS, "cores": _INT, "system": _TEXT, "python": _TEXT},
        )
    ),
    "threads": _optional(_INT),
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
    data: object = _parse(source) if isinstance(source, Path) else source
    if not isinstance(data, Mapping) or "schema_version" not in data:
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
        tool = _object(_get(data, "tool"), "tool")
        return AuditReport(tool_version=_TEXT.load(tool.get("version"), "tool.version"), **values)
    except _MalformedError as error:
        raise UsageError(
            f"the report is malformed at {error}",
            "The file was changed or cut short; run the audit again.",
        ) from error


def _get(data: Mapping[str, object], key: str) -> object:
    if key not in data:
        raise _MalformedError(key, _MISSING)
    return data[key]


def _parse(path: Path) -> object:
    hint = "Give the file that `audit MODEL -o report.json` wrote."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path} is larger than {_MAX_BYTES >> 20} MiB", hint)
        return json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"{path} is not JSON: {reason}", hint) from error


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not a JSON number")


class _Json:
    """Report format ``json``."""

    @property
    def name(self) -> str:
        """The name in ``--format``."""
        return "json"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings of a file's name that mean this format."""
        return (".json",)

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report as ASCII JSON text, keys sorted so that two reports can be diffed."""
        return json.dumps(dump(report), indent=2, sort_keys=True, allow_nan=False) + "\n"


RENDERER = _Json()
