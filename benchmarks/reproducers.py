"""Reproducers of real bugs, run where the auditor is not installed.

    python -m benchmarks.reproducers FOLDER [--backends ort,ov,tvm] [--json FILE] [NAME ...]

FOLDER holds single small models ``NAME.onnx`` with their inputs in ``NAME.npz``, as for
``benchmarks.cases``. Each is audited, ``audit repro`` is run for the first finding of every
backend, and the script that it writes is run in a new virtual environment that has numpy, onnx,
safetensors and the engines alone. A line for each says whether it shows its difference there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What an issue's reader has; the engines are those installed here, in the same versions.
_ENGINES = {"ort": "onnxruntime", "ov": "openvino", "tvm": "apache-tvm"}
_PLAIN = ("numpy", "onnx", "safetensors")
_SECONDS = 300.0


def fresh(folder: Path, backends: Sequence[str]) -> Path:
    """The interpreter of a new environment with the engines and without the auditor."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    packages = [f"{p}=={version(p)}" for p in (*_PLAIN, *(_ENGINES[b] for b in backends))]
    subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True)
    return python


def results(model: Path, backends: Sequence[str], python: Path) -> Iterator[dict[str, Any]]:
    """What became of the first finding of each backend on one model."""
    with tempfile.TemporaryDirectory(prefix="reproducers-") as scratch:
        report = Path(scratch, "report.json")
        inputs = ["--data", model.with_suffix(".npz"), "--allow-nonfinite", "--threads", "1"]
        asked = ["--backends", ",".join(backends), "--no-confirm", "-o", report]
        _audit(model, *inputs, *asked)
        if not report.exists():
            yield {"case": model.stem, "backend": "", "outcome": "refused"}
            return
        said = json.loads(report.read_text("utf-8"))
        first: dict[str, dict[str, Any]] = {}
        for finding in said["findings"]:
            first.setdefault(finding["backend"], finding)
        for backend, finding in first.items():
            out = Path(scratch, backend)
            made = _audit("repro", report, "--finding", finding["rank"], "-o", out)
            row = {
                "case": model.stem,
                "backend": backend,
                "cause": finding["noise"] or "unexplained",
            }
            if not out.exists():
                yield row | {"outcome": "not written", "said": _last(made.stderr)}
                continue
            ran = _run([python, "repro.py"], cwd=out)
            outcome = {1: "shown", 0: "not shown"}.get(ran.returncode, "failed")
            yield row | {"outcome": outcome, "said": _last(ran.stdout + ran.stderr)}


def _audit(*arguments: object) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "-m", "auditor", *map(str, arguments)])


def _run(command: Sequence[object], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, check=False, timeout=_SECONDS
    )


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "").strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a script does not show its difference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproducers", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--backends", default="ort,ov,tvm")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    arguments = parser.parse_args(argv)
    backends = arguments.backends.split(",")
    models = sorted(arguments.folder.glob("*.onnx"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="reproducers-venv-") as folder:
        python = fresh(Path(folder), backends)
        for model in (m for m in models if not arguments.names or m.stem in arguments.names):
            for row in results(model, backends, python):
                rows.append(row)
                print(" | ".join(str(value) for value in row.values()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), "utf-8")
    outcomes = Counter(row["outcome"] for row in rows)
    print(f"{len(rows)} findings on {len({row['case'] for row in rows})} models: {dict(outcomes)}")
    return int(outcomes["shown"] < len(rows))


if __name__ == "__main__":
    sys.exit(main())
