"""The report as SARIF 2.1.0, for code scanning services and SARIF viewers.

Findings are results, ranked; the causes they name are the rules. A divergence of an output that
fails the audit is a result too, for many small errors can make one. What was not audited, and what
was captured without a proof, are notifications of the invocation; every backend's figures are in
the properties of the run.

A model is a binary file. Each result points at its first line and column, because GitHub requires
a region, and names the ONNX nodes as logical locations.

Sources: SARIF 2.1.0 with errata 01 (OASIS); "SARIF support for code scanning" (GitHub Docs), whose
required properties and limits are kept: 5,000 results of a run, 1,024 characters of a description,
and ``primaryLocationLineHash`` as the only fingerprint it reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import quote

from auditor.records.terms import severity
from reports import _words as words

if TYPE_CHECKING:
    from auditor.records.measured import OutputDistance, Segment
    from auditor.records.report import AuditReport, BackendReport, Finding
    from auditor.records.terms import Severity

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS: dict[Severity, str] = {
    "critical": "error",
    "high": "error",
    "medium": "warning",
    "low": "note",
    "info": "note",
}
_UNEXPLAINED = "unexplained"
_DIVERGENCE = "divergence"
_RULE = "rule"

_MOST_RESULTS = 5000
_MOST_NODES = 100  # of one finding
_NAME = 300  # characters of a name in a property
_SHOWN = 120  # and in a message
_TEXT = 1000  # characters of a message

Object = dict[str, object]


class _Sarif:
    """Report format ``sarif``."""

    name = "sarif"
    suffixes = (".sarif", ".sarif.json")

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report as ASCII JSON text, without infinity and NaN."""
        log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [_run(report)]}
        return json.dumps(log, indent=2, allow_nan=False) + "\n"


RENDERER = _Sarif()


def _run(report: AuditReport) -> Object:
    # Before names are made visible: a file is found by its own name only.
    uris = [_uri(report.model.path)]
    if report.model.candidate:
        uris.append(_uri(report.model.candidate))
    report = words.visible(report)
    artifacts: list[Object] = [{"location": {"uri": uri}} for uri in uris]
    artifacts[0] |= {"roles": ["analysisTarget"], "hashes": {"sha-256": report.model.sha256}}
    place: Object = {
        "artifactLocation": {"uri": uris[0], "index": 0},
        "region": {"startLine": 1, "startColumn": 1, "endLine": 1, "endColumn": 1},
    }
    found = _results(report, place)
    results = list(islice(found, _MOST_RESULTS))
    left = sum(1 for _ in found)
    rules = _rules(report)
    index = {rule["id"]: number for number, rule in enumerate(rules)}
    return {
        "tool": {
            "driver": {
                "name": "SysNoise auditor",
                "version": report.tool_version,
                "rules": rules,
                "notifications": [_rule(id, text, "", ()) for id, text in _KINDS.items()],
            }
        },
        "invocations": [
            {
                "executionSuccessful": report.verdict != "incomplete",
                "exitCode": report.exit_code,
                "exitCodeDescription": f"{report.verdict}: {words.headline(report)}",
                "toolExecutionNotifications": list(_notifications(report, left)),
            }
        ],
        "artifacts": artifacts,
        "columnKind": "utf16CodeUnits",
        "results": [result | {"ruleIndex": index[result["ruleId"]]} for result in results],
        "properties": _properties(report),
    }


# --- rules ---------------------------------------------------------------------------------------


def _rules(report: AuditReport) -> list[Object]:
    """The causes that this report names, and what is reported without one."""
    stated = {noise.id: noise for noise in report.noises}
    rules = []
    for id in dict.fromkeys((*stated, *(f.noise for f in report.findings if f.noise))):
        noise = stated.get(id)
        if noise is None:  # a report written before it carried them
            rules.append(_rule(id, f"The cause {id}.", "", ()))
            continue
        more = f"{noise.cause} Source: {noise.source}"
        rules.append(_rule(id, f"{noise.title}.", more, (noise.stage, noise.type)))
    unexplained = "An error that no known cause reproduces."
    more = (
        "On the same inputs the runtime's tensors differ here from the reference's, and no cause "
        "that can be replayed reproduces the difference."
    )
    rules.append(_rule(_UNEXPLAINED, unexplained, more, ()))
    divergence = "An output of the compiled model differs from the reference's."
    more = "Relative L2 of the whole output: all layers together."
    rules.append(_rule(_DIVERGENCE, divergence, more, ()))
    broken = "A rule of the policy or the baseline about a backend as a whole does not hold."
    rules.append(_rule(_RULE, broken, "", ()))
    return rules


def _rule(id: str, short: str, more: str, tags: Sequence[str]) -> Object:
    short_tags = (words.elide(tag, _NAME) for tag in tags)
    return {
        "id": words.elide(id, _NAME),
        "shortDescription": _message(short),
        "fullDescription": _message(more or short),
        "help": _message(more or short),
        "defaultConfiguration": {"level": "warning"},
        "properties": {"tags": list(dict.fromkeys(short_tags))},
    }


# --- results -------------------------------------------------------------------------------------


def _results(report: AuditReport, place: Object) -> Iterator[Object]:
    """Outputs and backends that fail the audit, then every finding in its order."""
    for backend in report.backends:
        for output in backend.outputs:
            if words.diverges(backend, output, report):
                level = severity(output.distance.relative_l2)
                yield _divergence(backend, output, level, place)
        if rules := words.rules(backend, report):
            yield _broken(backend, rules, place)
    segments = {(b.id, s.id): s for b in report.backends for s in b.segments}
    for finding in report.findings:
        found = (segments.get((finding.backend, id)) for id in finding.segments)
        result = _finding(finding, [segment for segment in found if segment], place)
        if reason := words.waived(finding, report):
            suppression = {"kind": "external", "status": "accepted"}
            result["suppressions"] = [suppression | {"justification": words.elide(reason, _TEXT)}]
        yield result


def _divergence(
    backend: BackendReport, output: OutputDistance, level: Severity, place: Object
) -> Object:
    name = words.elide(output.name, _NAME)
    said = f"{level}: output {name} of {backend.id} differs: {words.distance(output)}"
    identity = json.dumps([backend.id, output.name])
    return {
        "ruleId": _DIVERGENCE,
        "level": _LEVELS[level],
        "rank": _rank(output.distance.relative_l2),
        "message": _message(f"{said}. Causes: {words.causes(backend)}."),
        "locations": [
            {
                "physicalLocation": place,
                "logicalLocations": [{"fullyQualifiedName": name, "kind": "output"}],
            }
        ],
        "partialFingerprints": _fingerprints(hashlib.sha256(identity.encode()).hexdigest()[:32]),
        "properties": {"backend": backend.id, "severity": level} | _figures(output),
    }


def _broken(backend: BackendReport, rules: Sequence[str], place: Object) -> Object:
    identity = json.dumps([backend.id, _RULE])
    return {
        "ruleId": _RULE,
        "level": "error",
        "message": _message(". ".join(words.elide(rule, _TEXT) for rule in rules)),
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": _fingerprints(hashlib.sha256(identity.encode()).hexdigest()[:32]),
        "properties": {"backend": backend.id},
    }


def _finding(finding: Finding, segments: Sequence[Segment], place: Object) -> Object:
    kinds = finding.stage if words.of_step(finding) else ", ".join(finding.op_types)
    said = (
        f"{finding.severity}, on {finding.backend}, {words.place(finding, _SHOWN)} "
        f"({words.elide(kinds, _SHOWN)}): "
        f"{words.finding(finding)}."
    )
    labels = [pair for s in segments for pair in zip(s.nodes, s.node_keys, strict=False)]
    labels = labels or [(label, label) for label in finding.nodes]
    short = ((words.elide(label, _NAME), words.elide(key, _NAME)) for label, key in labels)
    names = list(dict.fromkeys(short))  # merged segments share nodes
    nodes = [
        {"name": label, "fullyQualifiedName": key, "kind": "node"}
        for label, key in names[:_MOST_NODES]
    ]
    location: Object = {"physicalLocation": place}
    result: Object = {
        "ruleId": words.elide(finding.noise or _UNEXPLAINED, _NAME),
        "level": _LEVELS[finding.severity],
        "rank": _rank(finding.introduced if finding.effect is None else finding.effect),
        "message": _message(f"{said} {finding.remedy}" if finding.remedy else said),
        "locations": [location | ({"logicalLocations": nodes} if nodes else {})],
        "properties": {
            "rank": finding.rank,
            "backend": finding.backend,
            "segments": finding.segments[:_MOST_NODES],
            "nodes": len(names),
            "kernel": words.elide(finding.kernel, _NAME),
            "stage": finding.stage,
            "severity": finding.severity,
            "confidence": finding.confidence,
            "introduced": _number(finding.introduced),
            "effect": _number(finding.effect),
            "impact": _number(finding.leave_one_in),
            "share": _number(finding.impact_share),
            "explained": _number(finding.explained),
            "bitIdentical": _number(finding.bit_identical),
            "evidence": [words.elide(line, _TEXT) for line in finding.evidence[:_MOST_NODES]],
        },
    }
    if finding.fingerprint:
        result["partialFingerprints"] = _fingerprints(finding.fingerprint)
    return result


def _fingerprints(value: str) -> Object:
    return {"finding/v1": value, "primaryLocationLineHash": value}


def _rank(error: float) -> float:
    """SARIF's priority from 0 to 100: 20 for each power of ten of the relative L2 up to 1."""
    if math.isnan(error) or error <= 0:
        return 0.0
    return round(min(max(100 + 20 * math.log10(error), 0.0), 100.0), 1)


# --- what was not audited ------------------------------------------------------------------------


def _notifications(report: AuditReport, left: int) -> Iterator[Object]:
    blocking = {b.id for b in report.backends if words.blocks(b, report)}
    for gap in report.gaps[:_MOST_RESULTS]:
        level = "error" if gap.subject in blocking else "warning"
        subject, remedy = words.elide(gap.subject, _NAME), words.elide(gap.remedy or "", _TEXT)
        said = f"{subject}, {gap.stage}: {words.elide(gap.reason, _TEXT)}. {remedy}".rstrip()
        yield _notification("gap", level, said)
    for backend in report.backends:
        for note in words.notes(backend):
            yield _notification("note", "note", f"{backend.id}: {words.elide(note, _TEXT)}")
        proof = backend.fidelity
        if proof is None:
            continue
        if not words.proved(proof):
            yield _notification("unproved", "warning", f"{backend.id}: {words.proof(proof)}.")
        for reason, tensors in words.by_reason(proof.skipped).items():
            number = f"{len(tensors)} of {proof.candidates} tensors not observed"
            said = f"{backend.id}: {number}: {words.elide(reason, _TEXT)}."
            yield _notification("gap", "note", said)
    for what, more in (("findings", left), ("gaps", len(report.gaps) - _MOST_RESULTS)):
        if more > 0:
            yield _notification("gap", "warning", f"{more} more {what} are in the JSON report.")


def _notification(kind: str, level: str, text: str) -> Object:
    return {"descriptor": {"id": kind}, "level": level, "message": _message(text)}


_KINDS = {
    "gap": "Something was not audited.",
    "unproved": "Tensors were captured without proof that this left the program unchanged.",
    "note": "Something the reader of a backend's figures must know.",
}


# --- the figures of the run ----------------------------------------------------------------------


def _properties(report: AuditReport) -> Object:
    reference, stimulus = report.reference, report.stimulus
    return {
        "verdict": report.verdict,
        "failOn": report.fail_on,
        "findings": len(report.findings),
        "reference": words.reference(reference),
        "inputs": {"kind": stimulus.kind, "samples": stimulus.samples, "seed": stimulus.seed},
        "outlier": report.outlier,
        "agreement": [
            {"a": pair.a, "b": pair.b, "relativeL2": _number(pair.relative_l2)}
            for pair in report.agreement
        ],
        "backends": [_backend(backend) for backend in report.backends],
        "seconds": _number(report.timing.get("total")),
    }


def _backend(backend: BackendReport) -> Object:
    made, proof = backend.provenance, backend.fidelity
    return {
        "id": backend.id,
        "status": backend.status,
        "ran": words.ran(made, backend.status) if made else None,
        "proof": words.proof(proof) if proof else None,
        "proved": words.proved(proof) if proof else False,
        "outputs": [
            {"name": words.elide(o.name, _NAME)} | _figures(o)
            for o in backend.outputs[:_MOST_RESULTS]
        ],
        "causes": [{"id": c.noise, "share": _number(c.share)} for c in backend.categories],
        "unexplained": _number(backend.unexplained_share),
    }


def _figures(output: OutputDistance) -> Object:
    d = output.distance
    return {
        "relativeL2": _number(d.relative_l2),
        "maxAbs": _number(d.max_abs),
        "sqnrDb": _number(d.sqnr_db),
        "cosine": _number(d.cosine),
        "top1Agreement": _number(output.top1_agreement),
        "mismatch": d.mismatch,
    }


# --- values --------------------------------------------------------------------------------------


def _number(value: float | None) -> float | None:
    """The number, or None where it was not measured or JSON has none for it."""
    return float(value) if value is not None and math.isfinite(value) else None


def _message(text: str) -> Object:
    """A plain text message (SARIF 3.11) that holds neither placeholders nor embedded links."""
    text = text.replace("{", "{{").replace("}", "}}").replace("](", "]\\(")
    return {"text": words.elide(text, _TEXT)}


def _uri(path: str) -> str:
    """The path as a URI reference; relative as it was given, since GitHub resolves it."""
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:  # not a path of this system
        data = words.visible(path).encode()
    return ("file://" if data.startswith(b"/") else "") + quote(data)
