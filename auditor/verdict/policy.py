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
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from auditor.errors import UsageError, reason, suggestion
from auditor.records.terms import SEVERITIES, Severity

FILE = "audit.toml"
_PYPROJECT = "pyproject.toml"
_TOP = ("fail_on", "backends", "tolerance", "categories", "accept")
_ACCEPT = ("fingerprint", "reason", "expires")
# What a tolerance limits, and whether the measured value must not be above it (else: below).
METRICS = {
    "relative_l2": True,
    "max_abs": True,
    "max_ulp": True,
    "sqnr_db": False,
    "cosine": False,
    "top1_flips": True,
    "iou": False,
}
LATENCY = "latency_ratio"  # of a backend, not of an output
EVERY = ""  # backend or output


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
        return any(LATENCY in limits for limits in self.tolerances.values())

    def limits(self, backend: str, output: str = EVERY) -> dict[str, float]:
        """The limits of an output by metric: those set for it, for its backend, for all."""
        limits: dict[str, float] = {}
        for place in ((EVERY, EVERY), (backend, EVERY), (backend, output)):
            limits |= self.tolerances.get(place, {})
        return limits

    def tolerance(self, backend: str, outputs: Iterable[str]) -> float | None:
        """The smallest relative L2 that any of these outputs may have; None where none is set."""
        limits = (self.limits(backend, output) for output in outputs)
        found = (each["relative_l2"] for each in limits if "relative_l2" in each)
        return min(found, default=None)


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
        raise UsageError(
            f"{path} cannot be read: {reason(error)}", "Correct it; it is TOML."
        ) from error


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
    yield (EVERY, EVERY), _limits(table, "tolerance", source, dict)
    for backend, limits in table.items():
        if not isinstance(limits, dict):
            continue
        where = f"tolerance.{backend}"
        outputs = _a_table(limits, "outputs", source, where)
        rest = {key: value for key, value in limits.items() if key != "outputs"}
        yield (backend, EVERY), _limits(rest, where, source)
        for output in outputs:
            inner = _a_table(outputs, output, source, f"{where}.outputs")
            if LATENCY in inner:
                raise UsageError(
                    f"{source} has `{LATENCY}` in `{where}.outputs.{output}`",
                    f"A run has one latency for all outputs: write it in [{where}].",
                )
            yield (backend, output), _limits(inner, f"{where}.outputs.{output}", source)


def _limits(
    table: Mapping[str, Any], where: str, source: str, skipped: type | tuple[()] = ()
) -> dict[str, float]:
    own = {key: value for key, value in table.items() if not isinstance(value, skipped)}
    _known(own, (*METRICS, LATENCY), source, where)
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
    for key in table:
        if key not in keys:
            meant = suggestion(key, keys)
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
    named = {id for id, _ in policy.tolerances if id != EVERY} | set(policy.backends)
    for id in sorted(named):
        if id.partition(":")[0] not in backends:
            raise UsageError(
                f"{policy.source} names the unknown backend `{id}`",
                f"Backends: {', '.join(sorted(backends))}.",
            )
    for id in sorted(policy.allowed):
        if id not in noises:
            raise UsageError(
                f"{policy.source} names the unknown category `{id}`",
                f"{suggestion(id, noises)}`audit noises` lists them.",
            )
