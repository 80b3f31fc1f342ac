"""A first policy, written from what a first audit measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import date, timedelta

from auditor.records.report import AuditReport, BackendReport, Finding
from auditor.records.terms import PIPELINE
from auditor.verdict.policy import LATENCY

_SHOWN = 10  # findings that a proposal could accept
_ACCEPTED_FOR = timedelta(days=90)
_MARGIN = 2.0  # of what was measured, up
_LEAST = 1e-5  # relative L2 that float32 rounding may make anywhere


def proposed(report: AuditReport, source: str) -> str:
    """A policy, as commented TOML, under which the report passes with some room.

    Args:
        report: a first audit.
        source: how to call it.
    """
    audited = [backend for backend in report.backends if backend.status == "audited"]
    alone = _alone(report)
    lines = [
        f"# Written by `audit init` from {_comment(source)}: every figure is what was measured",
        f"# there, times {_MARGIN:g} and rounded up. Make them as tight as your release needs.",
        "",
        "# What no tolerance covers fails from this severity on.",
        f'fail_on = "{report.fail_on}"',
    ]
    if audited:
        ids = ", ".join(_quoted(backend.id) for backend in audited)
        lines += ["# Without these the audit is incomplete.", f"backends = [{ids}]"]
    for backend in audited:
        lines += _tolerances(backend, alone.get(backend.id, 0.0))
    if PIPELINE in alone:
        lines += ["", f"[tolerance.{_quoted(PIPELINE)}]", _by_itself(alone[PIPELINE])]
    lines += [
        "",
        "# Causes that are decisions of yours rather than faults.",
        "[categories]",
        '# "precision.bf16" = "allow"',
    ]
    for finding in report.findings[:_SHOWN]:
        lines += _acceptance(finding)
    if (more := len(report.findings) - _SHOWN) > 0:
        lines += ["", f"# And {more} more findings: their fingerprints are in the JSON report."]
    return "\n".join(lines) + "\n"


def _alone(report: AuditReport) -> dict[str, float]:
    """What each backend's worst finding does to the outputs by itself."""
    alone: dict[str, float] = {}
    for finding in report.findings:
        if finding.effect is not None and math.isfinite(finding.effect):
            alone[finding.backend] = max(finding.effect, alone.get(finding.backend, 0.0))
    return alone


def _tolerances(backend: BackendReport, alone: float) -> Iterator[str]:
    """The tables of a backend; ``alone`` is what its worst finding does by itself."""
    outputs: list[str] = []
    limits: list[float] = []
    for output in backend.outputs:
        error = output.distance.relative_l2
        if not math.isfinite(error):
            continue
        worst = max(error, output.spread.high if output.spread else 0.0)
        limits.append(max(_MARGIN * worst, _LEAST))
        outputs += [
            "",
            f"[tolerance.{_quoted(backend.id)}.outputs.{_quoted(output.name)}]",
            f"relative_l2 = {_rounded(limits[-1])}  # measured {worst:.2g}",
        ]
        if output.top1_agreement is not None:
            flips = 1.0 - output.top1_agreement
            outputs.append(f"top1_flips = {flips:.4g}  # measured {flips:.4g}")
    general: list[str] = []
    if backend.latency:
        ratio = backend.latency.ratio
        general.append(f"{LATENCY} = {_rounded(_MARGIN * ratio)}  # measured {ratio:.2g}")
    # Errors that cancel, or that a result is judged by: the outputs' own limits stay.
    if limits and alone > max(limits):
        general.append(_by_itself(alone))
    if general:
        yield from ("", f"[tolerance.{_quoted(backend.id)}]", *general)
    yield from outputs


def _acceptance(finding: Finding) -> list[str]:
    """An acceptance to uncomment."""
    return [
        "",
        f"# {_comment(finding.backend)}: {_comment(finding.nodes[0])}, "
        f"{finding.noise or 'unexplained'}, {finding.severity}",
        "# [[accept]]",
        f'# fingerprint = "{finding.fingerprint}"',
        '# reason = ""',
        f"# expires = {date.today() + _ACCEPTED_FOR}",
    ]


def _by_itself(effect: float) -> str:
    limit = _rounded(_MARGIN * effect)
    return f"relative_l2 = {limit}  # of what one finding makes alone; measured {effect:.2g}"


def _rounded(limit: float) -> str:
    """A limit with one significant digit, rounded up."""
    exponent = math.floor(math.log10(limit))
    digit = math.ceil(limit / 10.0**exponent - 1e-9)
    return f"{digit * 10.0**exponent:.1g}"


def _quoted(text: str) -> str:
    """A TOML basic string."""
    # JSON's escapes are TOML's, but for DEL and lone surrogates, which TOML has no way to write.
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
    return quoted.encode("utf-8", "replace").decode("utf-8")


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
