"""The confusion table as Markdown."""

from __future__ import annotations

import datetime
import os
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.plants.faults import PLANTS
from benchmarks.plants.suite import Result

_ENGINES = ("onnxruntime", "openvino", "apache-tvm", "onnx", "torch", "numpy")
_OUTCOMES = ("right", "unexplained", "wrong cause", "not located")
# Causes of the catalogue that no change of these models' graphs can plant.
_ABSENT = {
    "implementation.accumulation": "needs float16 sums inside one operator, which no graph writes",
    "implementation.denormals": "no model here computes with subnormal numbers",
    "implementation.fp32_rounding": "is what the nulls test: it must not be a finding",
    "implementation.nonfinite": "no model here computes with NaN or infinity",
    "implementation.tie_breaking": "no model here has a TopK, an ArgMax or equal boxes",
    "precision.double_as_float": "no model here is float64",
    "precision.int8_saturation": "engines show it themselves on processors without VNNI, in the "
    "int8 model's findings without a plant",
    "precision.integer_overflow": "no model here computes with integers that leave their range",
    "precision.narrowed_integers": "no model here has integers beyond 32 bits",
}


def render(results: Sequence[Result], command: str) -> str:
    """The whole document."""
    done = [r for r in results if r.outcome != "failed"]
    parts = [
        "# Planted faults",
        "",
        "What the auditor finds when one node of a real model is changed in a known way. Generated "
        f"by `{command}`; what is planted and how it is scored: `benchmarks/plants/`.",
        "",
        _machine(),
        "",
        f"Seeds: {', '.join(str(s) for s in sorted({r.seed for r in results}))}.",
        "",
        "The changed model is what the backend compiles, the original is the reference. *Located*: "
        "the top-ranked finding holds the changed node (of two faults: the first two findings hold "
        "both). *Right*: it also names a cause that is true, or none for a defect that is no known "
        "noise. A rewrite that changes nothing must give no finding at all.",
        "",
        "`bf16` builds round the operands of every product to bfloat16 and carry the fault on top; "
        "there the findings that the build has without the fault do not count. `native-bf16` is "
        "OpenVINO's own bfloat16, where nearly every segment has such a finding. MiniLM's mask is "
        "−10000 there: with its own, the lowest float32, NaN comes out of the first attention, and "
        "behind NaN nothing can be told. Changed weights and scales of rounded operands stand "
        "nowhere in the changed files.",
        "",
        "## Summary",
        "",
        *_summary(done),
        "",
        "## By model, backend and kind",
        "",
        *_by_place(done),
        "",
        "## By plant",
        "",
        *_by_family(done),
        "",
        "## Planted against named",
        "",
        *_confusion(done),
        "",
        "## Every case that is not right",
        "",
        *_misses(done),
        "",
        "## Not run",
        "",
        *_failed(results),
        "",
        "## Not planted",
        "",
        *(f"- `{cause}`: {why}." for cause, why in _ABSENT.items()),
        "",
    ]
    return "\n".join(parts)


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    versions = ", ".join(f"{name} {version(name)}" for name in _ENGINES)
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{today}, {cpu.strip()}, {os.cpu_count()} cores. {versions}."


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*("---" for _ in names))]


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({part / whole:.1%})" if whole else "–"


def _summary(done: Sequence[Result]) -> list[str]:
    lines = _head(
        "build",
        "located (top 1)",
        "right cause of a noise",
        "false names on defects",
        "false positives on nulls",
        "two faults: both located",
        "… and both right",
    )
    for build in dict.fromkeys(r.build for r in done):
        mine = [r for r in done if r.build == build]
        single = [r for r in mine if r.kind in ("noise", "defect")]
        noises = [r for r in single if r.kind == "noise"]
        defects = [r for r in single if r.kind == "defect"]
        nulls = [r for r in mine if r.kind == "null"]
        two = [r for r in mine if r.kind == "two"]
        lines.append(
            _row(
                build,
                _share(sum(all(r.located) for r in single), len(single)),
                _share(sum(r.outcome == "right" for r in noises), len(noises)),
                _share(sum(any([*r.causes, *r.stray]) for r in defects), len(defects)),
                _share(sum(r.outcome != "silent" for r in nulls), len(nulls)),
                _share(sum(all(r.located) for r in two), len(two)),
                _share(sum(r.outcome == "right" for r in two), len(two)),
            )
        )
    return lines


def _counted(results: Iterable[Result]) -> list[int]:
    counts = Counter(r.outcome for r in results)
    return [counts[o] for o in _OUTCOMES]


def _by_place(done: Sequence[Result]) -> list[str]:
    lines = _head(
        *("model", "backend", "build", "kind", "planted", *_OUTCOMES, "false positives", "stray")
    )
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for r in done:
        groups.setdefault((r.model, r.backend, r.build, r.kind), []).append(r)
    for group, mine in sorted(groups.items()):
        outcomes: list[object] = list(_counted(mine))
        wrong = sum(r.outcome == "false positive" for r in mine)
        if group[3] == "null":
            outcomes = ["–"] * len(_OUTCOMES)
        stray = sum(bool(r.stray) for r in mine)
        null = group[3] == "null"
        lines.append(
            _row(*group, len(mine), *outcomes, wrong if null else "–", "–" if null else stray)
        )
    return lines


def _by_family(done: Sequence[Result]) -> list[str]:
    lines = _head("plant", "planted", *_OUTCOMES)
    single = [r for r in done if r.kind in ("noise", "defect")]
    for name in sorted({r.plants[0].id for r in single}):
        mine = [r for r in single if r.plants[0].id == name]
        lines.append(_row(name, len(mine), *_counted(mine)))
    silent = [r for r in done if r.kind == "null"]
    lines += ["", *_head("null", "planted", "silent")]
    for name in sorted({r.plants[0].id for r in silent}):
        mine = [r for r in silent if r.plants[0].id == name]
        lines.append(_row(name, len(mine), sum(r.outcome == "silent" for r in mine)))
    return lines


def _confusion(done: Sequence[Result]) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for r in done:
        if r.kind not in ("noise", "defect"):
            continue
        if r.kind == "defect" and not any(r.located):
            named = "not located"
        else:
            named = (r.causes[0] or "unexplained") if r.located[0] else "not located"
        counts.setdefault(PLANTS[r.plants[0].id].family, Counter())[named] += 1
    columns = sorted({name for row in counts.values() for name in row})
    lines = _head("planted", *columns)
    for family, row in sorted(counts.items()):
        lines.append(_row(family, *(row[c] or "" for c in columns)))
    return lines


def _misses(done: Sequence[Result]) -> list[str]:
    missed = [
        r for r in done if r.outcome not in ("right", "silent") or (r.kind != "null" and r.stray)
    ]
    if not missed:
        return ["None."]
    lines = _head("model", "backend", "build", "case", "plant", "at", "change", "outcome", "named")
    for r in sorted(missed, key=lambda r: (r.build, r.kind, r.model, r.backend, r.number)):
        lines.append(
            _row(
                *(r.model, r.backend, r.build, f"{r.kind} {r.seed}:{r.number}"),
                " + ".join(p.id for p in r.plants),
                " + ".join(f"{p.op_type} `{p.node}`" for p in r.plants),
                " + ".join(f"{p.change:.1e}" for p in r.plants),
                r.outcome + (f", {len(r.stray)} stray" if r.stray and r.kind != "null" else ""),
                ", ".join(c or "–" for c in (*r.causes, *r.stray)[:4]),
            )
        )
    return lines


def _failed(results: Sequence[Result]) -> list[str]:
    failed = [r for r in results if r.outcome == "failed"]
    if not failed:
        return ["Every case was run."]
    reasons = Counter(
        (r.model, r.backend, r.build, r.failure.splitlines()[0][:160]) for r in failed
    )
    return [
        f"- {model} on {backend} ({build}): {count} cases, {reason}"
        for (model, backend, build, reason), count in sorted(reasons.items())
    ]
