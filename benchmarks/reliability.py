"""Everything that tries to break the auditor, and docs/reliability.md from what it showed.

``python -m benchmarks.reliability`` runs the long forms of the fuzzer, the faults, the odd places,
the kills, the endurance runs and the injections, some hours in all; ``--part NAME`` runs one of
them, ``--render`` none. Each leaves its results in ``.reliability/``; the page is written from what
is there, and says itself where less was run than the aim.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import zoo

ROOT = Path(__file__).parents[1]
STORE = ROOT / ".reliability"
PAGE = ROOT / "docs" / "reliability.md"
MODELS = ("model", "model-bytes", "audit", "graph")  # the fuzzer's targets that are models
AIMS = {"models": 10_000, "kills": 50, "row": 1000, "together": 40}
_NETWORK = "mtcnn_p"
GUIDED = ("data", "npy", "report", "policy", "pipeline")
_SECONDS = 60  # of each


def commands() -> dict[str, list[list[str]]]:
    """By part, the modules to run with their arguments."""
    counts = {"model": 4000, "model-bytes": 4000, "audit": 2000, "graph": 500}
    counts |= dict.fromkeys(("data", "trace", "report", "policy", "pipeline", "image"), 1000)
    network = [f".zoo/{_NETWORK}.onnx", "--data", f".zoo/{_NETWORK}.npz", "--backends", "ort,ov"]
    return {
        "fuzz": [
            ["tests.fuzz.run", "--target", target, "--count", str(count), "--seed", "200000"]
            for target, count in counts.items()
        ],
        "faults": [["tests.faults.run"]],
        "places": [["tests.faults.places"]],
        "kills": [["benchmarks.kills", "--kills", str(AIMS["kills"]), *network]],
        "endurance": [
            ["tests.endurance.run", "row", "--count", str(AIMS["row"])],
            ["tests.endurance.run", "together", "--count", "5", "--backends", "ort,ov"],
            ["tests.endurance.run", "threads", "--backends", "ort,ov,tvm"],
            ["tests.endurance.run", "threads", "--backends", "ort,ov", "--model", network[0]],
        ],
        "injection": [["tests.injection.run"]],
        "guided": [],  # runs below
    }


def run(part: str) -> None:
    """Run one part anew."""
    file = STORE / f"{part}.json"
    file.unlink(missing_ok=True)
    if part == "guided":
        file.write_text(json.dumps([guide(target) for target in GUIDED]), "utf-8")
    for module, *arguments in commands()[part]:
        print(f"# python -m {module} {' '.join(arguments)}", flush=True)
        # The exit code says whether something was wrong, and so does the file.
        subprocess.run(
            [sys.executable, "-m", module, *arguments, "--json", str(file)], cwd=ROOT, check=False
        )


def guide(target: str) -> dict[str, Any]:
    """Coverage-guided fuzzing of one target, as its own output tells of it."""
    module = ["-m", "tests.fuzz.guided", "--target", target, "--seconds", str(_SECONDS)]
    done = subprocess.run(
        [sys.executable, *module], cwd=ROOT, capture_output=True, text=True, check=False
    )
    runs = re.search(r"^Done (\d+) runs", done.stderr, re.MULTILINE)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    return {
        "target": target,
        "runs": int(runs[1]) if runs else 0,
        "covered": int(covered[-1]) if covered else 0,
        "wrong": "" if done.returncode == 0 else done.stderr[-300:],
    }


# --- the page ------------------------------------------------------------------------------------


def stored(part: str) -> list[Any]:
    """What a part left; nothing where it was not run."""
    file = STORE / f"{part}.json"
    found = json.loads(file.read_text("utf-8")) if file.exists() else []
    assert isinstance(found, list)
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _said(wrong: Iterable[str]) -> str:
    """What went wrong, as a list."""
    lines = [f"- {text[:300].replace('|', '/')}" for text in wrong]
    return "\n" + "\n".join(lines) if lines else ""


def fuzzed() -> tuple[str, str]:
    """The fuzzer's figures, and how many models it was."""
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    for result in stored("fuzz"):
        mine = tally[result["target"]]
        mine.update({k: result[k] for k in ("inputs", "loaded", "refused")})
        mine.update(result["wrong"])
    kinds = ("inputs", "loaded", "refused", "crash", "hang", "traceback", "message")
    models = sum(tally[target]["inputs"] for target in MODELS)
    text = (
        "Structure and bytes damaged, and valid networks that are odd (`graph`: NaN, infinite and "
        "denormal weights, nothing left of a tensor, operator sets 13 to 22). `audit` and "
        "`graph` are "
        "whole audits on ONNX Runtime and OpenVINO with every report format. *Loaded* and "
        "*refused in "
        "one message* are sound; the other columns are bugs, in the child process that reads.\n\n"
    )
    head = (
        "target",
        "inputs",
        "loaded",
        "refused",
        "crashes",
        "hangs",
        "tracebacks",
        "bad messages",
    )
    page = text + table(head, ([t, *(c[k] for k in kinds)] for t, c in tally.items()))
    if guided := stored("guided"):
        head = ("parser", "inputs", "edges covered", "verdict")
        rows = ([g["target"], g["runs"], g["covered"], g["wrong"] or "sound"] for g in guided)
        page += "\n\nGuided by coverage of our own code (atheris):\n\n" + table(head, rows)
    return page, str(models)


def faulted() -> tuple[str, str]:
    """The faults' figures, and how many were survived of how many."""
    from tests.faults.run import BACKENDS, KINDS, OUTSIDE, STAGES, verdict

    latest = {(r["backend"], r["stage"], r["kind"]): r for r in stored("faults")}
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for (backend, stage, kind), result in latest.items():
        cells[backend, stage][verdict(result)] += 1
        kinds[kind][verdict(result)] += 1

    def shown(count: Counter[str]) -> str:
        if not count:
            return "–"
        tried = count["survived"] + count["failed"]
        others = [f"{count[w]} {w}" for w in ("not reached", "impossible here") if count[w]]
        return "; ".join([f"{count['survived']}/{tried}"] * bool(tried) + others)

    total: Counter[str] = sum(cells.values(), Counter())
    rows = ([stage, *(shown(cells[b, stage]) for b in BACKENDS)] for stage in STAGES)
    text = (
        "Survived of tried, a real fault each (the kinds: "
        + ", ".join(f"{kind} {shown(kinds[kind])}" for kind in (*KINDS, *OUTSIDE))
        + "). The audit must end by itself, name the stage, the signal and the engine's last "
        "words, keep "
        "the other backend's part bit for bit, and leave no process, file or shared memory. "
        "*Not reached*: without a GPU TensorRT builds and does nothing after.\n\n"
    )
    failed = [
        f"{' '.join(key)}: {'; '.join(r['wrong'])}"
        for key, r in latest.items()
        if verdict(r) == "failed"
    ]
    page = text + table(("stage", *BACKENDS), rows) + _said(failed)
    return page, f"{total['survived']} of {total['survived'] + total['failed']}"


def placed() -> tuple[str, str]:
    """Odd places."""
    words = {"same": "the same report", "gaps": "a report with the gap", "refused": "one message"}
    latest = {r["place"]: r for r in stored("places")}
    rows = [
        (place, words.get(r["what"], r["what"]), "; ".join(r["wrong"])[:200] or "sound")
        for place, r in latest.items()
    ]
    text = (
        "Audits where something is missing, on ONNX Runtime, OpenVINO and TVM. *The same report* "
        "has the "
        "bytes of the one made with nothing missing, what a clock says aside.\n\n"
    )
    sound = sum(not r["wrong"] for r in latest.values())
    return text + table(("place", "what came", "verdict"), rows), f"{sound} of {len(latest)}"


def killed() -> tuple[str, str]:
    """SIGKILL at random moments."""
    total: Counter[str] = sum((Counter(told) for told in stored("kills")), Counter())
    text = (
        f"`kill -9` at random moments of an audit of {_NETWORK} on ONNX Runtime and OpenVINO: "
        f"{total['kills']} killed, {total['finished']} had finished before. Damaged cache entries "
        f"{total['damaged']}, half reports {total['half_reports']}, processes left "
        f"{total['left_processes']}; {total['resumed']} audits went on from what the one before "
        "had stored."
    )
    return text, str(total["kills"])


_MIB = 2**20


def endured() -> tuple[str, dict[str, str]]:
    """Rows, audits at once, and numbers of threads."""
    parts, counts = [], {"row": "0", "together": "0"}
    for result in stored("endurance"):
        backends = ", ".join(result["backends"])
        wrong = _said(result["wrong"]) or " Nothing grew, nothing was left."
        match result["what"]:
            case "row":
                curve = result["curve"]
                at = sorted({round(i * (result["audits"] - 1) / 10) for i in range(11)})
                if result["audits"] > int(counts["row"]):
                    counts["row"] = str(result["audits"])
                rows = (
                    [
                        i + 1,
                        f"{curve['memory'][i] / _MIB:.1f}",
                        *(
                            curve[k][i]
                            for k in ("descriptors", "threads", "children", "files", "shared")
                        ),
                    ]
                    for i in at
                )
                head = (
                    "audit",
                    "memory, MiB",
                    "descriptors",
                    "threads",
                    "processes",
                    "files",
                    "shared",
                )
                parts.append(
                    f"{result['audits']} audits in a row in one process, on {backends}, "
                    f"{result['seconds']} s; different reports: {result['reports']}.{wrong}\n\n"
                    + table((*head[:-1], "shared memory"), rows)
                )
            case "together":
                counts["together"] = str(result["audits"])
                parts.append(
                    f"{result['audits']} audits, eight at once on one cache, on {backends}: "
                    "different "
                    f"reports: {result['reports']}.{wrong}"
                )
            case "threads":
                differ = ", ".join(result["differ"]) or "none"
                unsteady = ", ".join(result["unsteady"]) or "none"
                parts.append(
                    f"{result['model']} on {', '.join(map(str, result['threads']))} threads, twice "
                    f"each ({backends}). Backends whose part of the report is another one from run "
                    f"to run: {unsteady}; from one number of threads to another: {differ}."
                    + _said(result["wrong"])
                )
    return "\n\n".join(parts), counts


def injected() -> tuple[str, str]:
    """Names as attacks."""
    results = stored("injection")
    if not results:
        return "not run", "0"
    last = results[-1]
    text = (
        f"{last['strings']} strings (markup of Rich, terminal escapes, HTML and script, "
        "Markdown, SARIF, XML, "
        "paths, Unicode, 1 MB, bytes that are no UTF-8), each as every name of a model, its file's "
        f"name, and its producer: {last['audited']} audited, {last['refused']} refused in one "
        "message. "
        "What each format's own reader made of them:\n\n"
    )
    wrong: list[str] = last["wrong"]
    rows = [
        (format, count, sum(f": {format}:" in w for w in wrong))
        for format, count in last["formats"].items()
    ]
    page = text + table(("format", "reports", "interpreted"), rows)
    page += "\n\nHTML was opened in headless Chromium, every part unfolded." * (
        "html" in last["formats"]
    )
    return page + _said(wrong), f"{len(wrong)} interpreted"


def page() -> str:
    """The whole page."""
    fuzz, models = fuzzed()
    faults, survived = faulted()
    places, sound = placed()
    kills, killed_count = killed()
    endurance, counts = endured()
    injection, interpreted = injected()
    aims = [
        ("models fuzzed", AIMS["models"], models),
        ("kill -9", AIMS["kills"], killed_count),
        ("audits in a row", AIMS["row"], counts["row"]),
        ("audits, eight at once", AIMS["together"], counts["together"]),
    ]
    rows: list[tuple[object, ...]] = [
        (what, f"≥ {aim}", run, "" if int(run) >= aim else "fewer than the aim")
        for what, aim, run in aims
    ]
    rows += [
        ("faults survived", "all", survived, ""),
        ("odd places, sound", "all", sound, ""),
        ("injections", "0 interpreted", interpreted, ""),
    ]
    sections = {
        "Fuzzing": fuzz,
        "Faults": faults,
        "Places": places,
        "Kills": kills,
        "Long and wide": endurance,
        "Names as attacks": injection,
        "What was found, and fixed": (ROOT / "benchmarks/found.md").read_text("utf-8").strip(),
    }
    text = [
        "# Reliability",
        f"Written by `python -m benchmarks.reliability` on {date.today()}: {_machine()}. What is "
        "trusted, "
        "and what the defences are: [security.md](security.md).",
        table(("", "aim", "run", ""), rows),
        *(f"## {title}\n\n{body}" for title, body in sections.items()),
    ]
    return "\n\n".join(text) + "\n"


def _machine() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = []
    for package in ("onnxruntime", "openvino", "apache-tvm", "tensorrt-rtx-cu13"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    return f"{cpu}, {os.cpu_count()} cores, {', '.join(versions)}"


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=commands(), action="append", help="run this one only")
    parser.add_argument("--render", action="store_true", help="write the page from what is there")
    asked = parser.parse_args()
    STORE.mkdir(exist_ok=True)
    if not asked.render:
        zoo.obtain([_NETWORK])
        for part in asked.part or commands():
            run(part)
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
