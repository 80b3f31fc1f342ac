"""A team's rules for a release: what may diverge how far, and what was accepted until when.

``audit.toml`` in the current folder, or ``[tool.auditor]`` in ``pyproject.toml``::

    fail_on = "high"                 # for what no tolerance covers; --fail-on overrides it
    backends = ["ov", "tvm"]         # required; --backends overrides it
    [tolerance]                      # every output of every backend
    relative_l2 = 1e-3
    [tolerance.ov]                   # one backend
    relative_l2 = 2e-2
    latency_ratio = 0.8              # of one run to ONNX Runtime's with its default options
    [tolerance.ov.outputs.logits]    # one output
    top1_flips = 0.01
    [categories]
    "precision.bf16" = "allow"
    [[accept]]                       # a finding, by the fingerprint that reports show
    fingerprint = "0123456789abcdef0123456789abcdef"
    reason = "checked on the test set"
    expires = 2027-01-31

The closest tolerance counts. An output without a tolerance of its relative L2, and every finding
where its backend has none, is judged by ``fail_on``; of such an output's divergence, the share of
allowed categories does not count.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from auditor.errors import UsageError
from auditor.records.comparison import Comparison
from auditor.records.measured import OutputDistance
from auditor.records.report import AuditReport, BackendReport, Broken, Finding, Judgement, Waiver
from auditor.records.terms import PIPELINE, SEVERITIES, Severity, Verdict, severity

FILE = "audit.toml"
_PYPROJECT = "pyproject.toml"
_TOP = ("fail_on", "backends", "tolerance", "categories", "accept")
_ACCEPT = ("fingerprint", "reason", "expires")
# What a tolerance limits, and whether the measured value must not be above it (else: below).
_METRICS = {
    "relative_l2": True,
    "max_abs": True,
    "max_ulp": True,
    "sqnr_db": False,
    "cosine": False,
    "top1_flips": True,
    "iou": False,
}
_LATENCY = "latency_ratio"  # of a backend, not of an output
_EVERY = ""  # backend or output


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A finding that somebody accepted.

    Attributes:
        expires: the last day on which it counts; None for ever.
    """

    fingerprint: str
    reason: str
    expires: date | None


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one file.

    Attributes:
        source: the file.
        tolerances: by backend id and output name, either of which may be "" for every one; the
            limit by metric.
    """

    source: str
    fail_on: Severity | None
    backends: tuple[str, ...]
    tolerances: Mapping[tuple[str, str], Mapping[str, float]]
    allowed: frozenset[str]
    accepted: tuple[Acceptance, ...]

    @property
    def limits_latency(self) -> bool:
        """Whether any backend has a tolerance of its latency."""
        return any(_LATENCY in limits for limits in self.tolerances.values())


# --- reading -------------------------------------------------------------------------------------


def find(folder: Path) -> Policy | None:
    """The policy of a folder, if it has one.

    Raises:
        UsageError: it is wrong, or there are two.
    """
    own = folder / FILE
    project = _table(folder / _PYPROJECT) if (folder / _PYPROJECT).is_file() else {}
    inside = project.get("tool", {}).get("auditor")
    if own.is_file() and inside is not None:
        raise UsageError(
            f"both {FILE} and [tool.auditor] of {_PYPROJECT} hold a policy", "Keep one of them."
        )
    if own.is_file():
        return load(own)
    return None if inside is None else _policy(inside, f"{_PYPROJECT} [tool.auditor]")


def load(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        UsageError: it is missing, no TOML, or has a key or value that is not known.
    """
    if not path.is_file():
        raise UsageError(
            f"the policy {path} does not exist",
            "`audit init REPORT.json` writes one from a report.",
        )
    return _policy(_table(path), str(path))


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "Correct it; it is TOML.") from error


def _policy(table: Mapping[str, Any], source: str) -> Policy:
    _known(table, _TOP, source)
    fail_on = table.get("fail_on")
    if fail_on is not None and fail_on not in SEVERITIES:
        raise _wrong(source, "fail_on", fail_on, f"one of {', '.join(SEVERITIES)}")
    backends = table.get("backends", [])
    if not isinstance(backends, list) or not all(isinstance(b, str) for b in backends):
        raise _wrong(source, "backends", backends, 'a list of ids such as ["ov"]')
    categories = _a_table(table, "categories", source)
    for id, what in categories.items():
        if what != "allow":
            raise _wrong(source, f"categories.{id}", what, '"allow"')
    return Policy(
        source=source,
        fail_on=fail_on,
        backends=tuple(backends),
        tolerances=dict(_tolerances(_a_table(table, "tolerance", source), source)),
        allowed=frozenset(categories),
        accepted=tuple(_acceptances(table.get("accept", []), source)),
    )


def _tolerances(
    table: Mapping[str, Any], source: str
) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    yield (_EVERY, _EVERY), _limits(table, "tolerance", source, dict)
    for backend, limits in table.items():
        if not isinstance(limits, dict):
            continue
        where = f"tolerance.{backend}"
        outputs = _a_table(limits, "outputs", source, where)
        rest = {key: value for key, value in limits.items() if key != "outputs"}
        yield (backend, _EVERY), _limits(rest, where, source)
        for output in outputs:
            inner = _a_table(outputs, output, source, f"{where}.outputs")
            if _LATENCY in inner:
                raise UsageError(
                    f"{source} has `{_LATENCY}` in `{where}.outputs.{output}`",
                    f"A run has one latency for all outputs: write it in [{where}].",
                )
            yield (backend, output), _limits(inner, f"{where}.outputs.{output}", source)


def _limits(
    table: Mapping[str, Any], where: str, source: str, skipped: type | tuple[()] = ()
) -> dict[str, float]:
    own = {key: value for key, value in table.items() if not isinstance(value, skipped)}
    _known(own, (*_METRICS, _LATENCY), source, where)
    for key, value in own.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise _wrong(source, f"{where}.{key}", value, "a number")
    return own


def _acceptances(entries: object, source: str) -> Iterator[Acceptance]:
    if not isinstance(entries, list):
        raise _wrong(source, "accept", entries, "[[accept]] entries")
    for entry in entries:
        if not isinstance(entry, dict):
            raise _wrong(source, "accept", entry, "[[accept]] entries")
        _known(entry, _ACCEPT, source, "accept")
        for key in ("fingerprint", "reason"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise _wrong(source, f"accept.{key}", entry.get(key), "a text")
        expires = entry.get("expires")
        if expires is not None and type(expires) is not date:
            raise _wrong(source, "accept.expires", expires, "a date such as 2027-01-31")
        yield Acceptance(entry["fingerprint"], entry["reason"], expires)


def _a_table(table: Mapping[str, Any], key: str, source: str, where: str = "") -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise _wrong(source, f"{where}.{key}".lstrip("."), value, "a table")
    return value


def _known(table: Mapping[str, Any], keys: Sequence[str], source: str, where: str = "") -> None:
    import difflib

    for key in table:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            meant = f"Did you mean `{close[0]}`? " if close else ""
            name = f"{where}.{key}".lstrip(".")
            raise UsageError(
                f"{source} has the unknown key `{name}`", f"{meant}Known: {', '.join(keys)}."
            )


def _wrong(source: str, key: str, value: object, wanted: str) -> UsageError:
    return UsageError(f"{source}: `{key}` is {value!r}", f"It must be {wanted}.")


def check(policy: Policy, backends: Collection[str], noises: Collection[str]) -> None:
    """Refuse a policy that speaks of what there is not.

    Raises:
        UsageError: an unknown backend or cause, which would silently never apply.
    """
    named = {id for id, _ in policy.tolerances if id != _EVERY} | set(policy.backends)
    for id in sorted(named):
        if id.partition(":")[0] not in backends:
            raise UsageError(
                f"{policy.source} names the unknown backend `{id}`",
                f"Backends: {', '.join(sorted(backends))}.",
            )
    for id in sorted(policy.allowed):
        if id not in noises:
            raise UsageError(
                f"{policy.source} names the unknown category `{id}`", "`audit noises` lists them."
            )


# --- judging -------------------------------------------------------------------------------------


def judged(report: AuditReport, policy: Policy, today: date) -> AuditReport:
    """The report with the policy's verdict."""
    waivers = tuple(_waivers(report, policy, today))
    waived = {waiver.fingerprint for waiver in waivers}
    broken = [
        rule
        for backend in report.backends
        for output in backend.outputs
        for rule in _outputs(backend, output, report.fail_on, policy)
    ]
    broken += [rule for backend in report.backends for rule in _slow(backend, policy)]
    broken += [
        rule
        for finding in report.findings
        if finding.fingerprint not in waived
        for rule in _finding(finding, report.fail_on, policy)
    ]
    judgement = Judgement(
        policy.source, tuple(broken), waivers, tuple(_notes(report, policy, today))
    )
    return _decided(report, judgement)


def held_against(report: AuditReport, comparison: Comparison) -> AuditReport:
    """The report with the verdict that only what is new or worse than a baseline fails."""
    known = tuple(
        Waiver(change.finding.fingerprint, f"known from {comparison.old}: {change.trend}")
        for change in comparison.findings
        if change.trend in ("same", "better")
    )
    notes = comparison.incomparable + comparison.provenance
    return _decided(report, Judgement(comparison.old, comparison.regressions, known, notes))


def _decided(report: AuditReport, judgement: Judgement) -> AuditReport:
    audited = {backend.id for backend in report.backends if backend.status == "audited"}
    complete = {backend.id for backend in report.backends if backend.complete}
    verdict: Verdict = "pass"
    if judgement.broken:
        verdict = "fail"
    elif not audited or not complete.issuperset(report.requested):
        verdict = "incomplete"
    code = {"pass": 0, "fail": 1, "incomplete": 3}[verdict]
    return replace(report, judgement=judgement, verdict=verdict, exit_code=code)


def _waivers(report: AuditReport, policy: Policy, today: date) -> Iterator[Waiver]:
    accepted = {a.fingerprint: a for a in policy.accepted if not _expired(a, today)}
    for finding in report.findings:
        if finding.noise in policy.allowed:
            yield Waiver(finding.fingerprint, f"{finding.noise} is allowed")
        elif acceptance := accepted.get(finding.fingerprint):
            yield Waiver(finding.fingerprint, f"accepted: {acceptance.reason}")


def _expired(acceptance: Acceptance, today: date) -> bool:
    return acceptance.expires is not None and acceptance.expires < today


def _outputs(
    backend: BackendReport, output: OutputDistance, fail_on: Severity, policy: Policy
) -> Iterator[Broken]:
    def broken(what: str) -> Broken:
        said = f"output `{output.name}` on {backend.id}: {what}"
        return Broken(said, backend.id, output=output.name)

    limits = _limits_of(backend.id, output.name, policy)
    for metric, limit in limits.items():
        if metric == _LATENCY:
            continue
        measured = _measured(output, metric)
        if measured is None:
            yield broken(f"{metric} has a tolerance, and was not measured there")
        elif not (measured <= limit if _METRICS[metric] else measured >= limit):
            yield broken(f"{metric} is {measured:.3g}, and its tolerance {limit:g}")
    if "relative_l2" not in limits:
        share = sum(c.share for c in backend.categories if c.noise in policy.allowed)
        left = output.distance.relative_l2
        if share > 0:
            left *= math.sqrt(max(0.0, 1.0 - share))  # shares are of its square
        if _reaches(severity(left), fail_on):
            rest = " without the allowed categories" if share > 0 else ""
            yield broken(f"relative_l2 is {left:.3g}{rest}, severity {severity(left)}")


def _slow(backend: BackendReport, policy: Policy) -> Iterator[Broken]:
    limit = _limits_of(backend.id, _EVERY, policy).get(_LATENCY)
    if limit is None or backend.status != "audited":
        return
    measured = backend.latency.ratio if backend.latency else None
    if measured is None:
        why = f"{_LATENCY} has a tolerance, and was not measured there"
    elif measured > limit:
        why = f"{_LATENCY} is {measured:.3g}, and its tolerance {limit:g}"
    else:
        return
    yield Broken(f"{backend.id}: {why}", backend.id)


def _finding(finding: Finding, fail_on: Severity, policy: Policy) -> Iterator[Broken]:
    def broken(what: str) -> Broken:
        said = f"finding {finding.rank} on {finding.backend}, {finding.nodes[0]}: {what}"
        return Broken(said, finding.backend, fingerprint=finding.fingerprint)

    limits = [
        limits["relative_l2"]
        for (backend, _), limits in policy.tolerances.items()
        if backend in (_EVERY, finding.backend) and "relative_l2" in limits
    ]
    if limits and finding.effect is not None:
        if finding.effect > max(limits):
            yield broken(f"its error alone makes {finding.effect:.3g} of relative_l2")
    elif _reaches(finding.severity, fail_on):
        yield broken(f"severity {finding.severity}")


def _reaches(level: Severity, fail_on: Severity) -> bool:
    return SEVERITIES.index(level) >= SEVERITIES.index(fail_on)


def tolerance(policy: Policy, backend: str, outputs: Iterable[str]) -> float | None:
    """The smallest relative L2 that any of these outputs may have; None where none is set."""
    limits = (_limits_of(backend, output, policy) for output in outputs)
    return min((found["relative_l2"] for found in limits if "relative_l2" in found), default=None)


def _limits_of(backend: str, output: str, policy: Policy) -> dict[str, float]:
    limits: dict[str, float] = {}
    for place in ((_EVERY, _EVERY), (backend, _EVERY), (backend, output)):
        limits |= policy.tolerances.get(place, {})
    return limits


def _measured(output: OutputDistance, metric: str) -> float | None:
    if metric == "top1_flips":
        return None if output.top1_agreement is None else 1.0 - output.top1_agreement
    if metric == "iou":
        return output.consequence.iou if output.consequence else None
    if metric == "max_ulp":
        return output.max_ulp
    value: float = getattr(output.distance, metric)
    return value


def _notes(report: AuditReport, policy: Policy, today: date) -> Iterator[str]:
    found = {finding.fingerprint for finding in report.findings}
    for acceptance in policy.accepted:
        if _expired(acceptance, today):
            yield f"The acceptance of {acceptance.fingerprint} ended on {acceptance.expires}."
        elif acceptance.fingerprint not in found:
            yield f"Nothing here has the accepted fingerprint {acceptance.fingerprint}."
    outputs = {(b.id, o.name) for b in report.backends for o in b.outputs}
    for backend, output in policy.tolerances:
        if output and (backend, output) not in outputs:
            yield f"There is no output `{output}` on {backend}, for which there is a tolerance."


# --- proposing -----------------------------------------------------------------------------------

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
    lines = [
        f"# Written by `audit init` from {_comment(source)}: every figure is what was measured",
        f"# there, with a margin of {_MARGIN:g}. Make them as tight as your release needs.",
        "",
        "# What no tolerance covers fails from this severity on.",
        f'fail_on = "{report.fail_on}"',
    ]
    audited = [backend for backend in report.backends if backend.status == "audited"]
    if audited:
        ids = ", ".join(_quoted(backend.id) for backend in audited)
        lines += ["# Without these the audit is incomplete.", f"backends = [{ids}]"]
    alone: dict[str, float] = {}  # what the worst finding of each backend does by itself
    for finding in report.findings:
        if finding.effect is not None and math.isfinite(finding.effect):
            alone[finding.backend] = max(finding.effect, alone.get(finding.backend, 0.0))
    for backend in audited:
        outputs: list[str] = []
        limits: list[float] = []
        general: list[str] = []
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
        if backend.latency:
            ratio = backend.latency.ratio
            general.append(f"{_LATENCY} = {_rounded(_MARGIN * ratio)}  # measured {ratio:.2g}")
        # Errors that cancel, or that a result is judged by: the outputs' own limits stay.
        if limits and (effect := alone.get(backend.id, 0.0)) > max(limits):
            general.append(_by_itself(effect))
        if general:
            lines += ["", f"[tolerance.{_quoted(backend.id)}]", *general]
        lines += outputs
    if PIPELINE in alone:
        lines += ["", f"[tolerance.{_quoted(PIPELINE)}]", _by_itself(alone[PIPELINE])]
    lines += [
        "",
        "# Causes that are decisions of yours rather than faults.",
        "[categories]",
        '# "precision.bf16" = "allow"',
    ]
    ends = date.today() + _ACCEPTED_FOR
    for finding in report.findings[:_SHOWN]:
        lines += [
            "",
            f"# {_comment(finding.backend)}: {_comment(finding.nodes[0])}, "
            f"{finding.noise or 'unexplained'}, {finding.severity}",
            "# [[accept]]",
            f'# fingerprint = "{finding.fingerprint}"',
            '# reason = ""',
            f"# expires = {ends}",
        ]
    if (more := len(report.findings) - _SHOWN) > 0:
        lines += ["", f"# And {more} more findings: their fingerprints are in the JSON report."]
    return "\n".join(lines) + "\n"


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
    import json

    # JSON's escapes are TOML's, but for DEL and lone surrogates, which TOML has no way to write.
    quoted = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
    return quoted.encode("utf-8", "replace").decode("utf-8")


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
