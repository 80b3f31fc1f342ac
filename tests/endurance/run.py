"""Audits in a row, at once, and on other numbers of threads: nothing grows, nothing changes.

``python -m tests.endurance.run row --count 1000`` makes audits one after another in one process and
looks, after each, at its memory, descriptors, threads, temporary files and shared memory;
``together --count 5`` starts eight at once on one cache, five times; ``threads`` audits on 1 to 4
threads. Every report must have the same bytes, what a clock says aside.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from auditor.ports import Silent
from tests.helpers import nodes_of, untimed, unused

ROOT = Path(__file__).parents[2]
_WARM = 5  # audits after which caches are full
_GROWTH = 8 * 2**20  # bytes that the median memory of the last quarter may be above the first's
_TOGETHER = 8


def model(path: Path) -> Path:
    """A very small network: a convolution, an activation, a product."""
    numbers = np.random.default_rng(0)
    constants = {
        "w": numbers.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "m": numbers.standard_normal((4, 5)).astype(np.float32),
    }
    graph = helper.make_graph(
        nodes_of(
            "[conv] a = Conv(x, w) [relu] b = Relu(a) [pool] c = GlobalAveragePool(b) "
            "[flatten] d = Flatten(c) [product] e = MatMul(d, m) [softmax] y = Softmax(e)"
        ),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def digest(report: Any) -> str:
    """Hash of a report's bytes, what a clock says aside."""
    return hashlib.sha256(json.dumps(untimed(report), sort_keys=True).encode()).hexdigest()[:16]


def state(scratch: Path, shared: set[str]) -> dict[str, int]:
    """What the process holds now."""
    gc.collect()
    me = psutil.Process()
    return {
        "memory": me.memory_info().rss,
        "descriptors": me.num_fds(),
        "threads": me.num_threads(),
        "children": len(me.children(recursive=True)),
        "files": len(list(scratch.iterdir())),
        "shared": len(set(os.listdir("/dev/shm")) - shared),
    }


def row(count: int, backends: list[str], seconds: float) -> dict[str, Any]:
    """Audits in a row in this process; none begins after so many seconds."""
    from auditor import discovery
    from auditor.audit import AuditOptions, BackendSpec, audit
    from reports import json_v1

    with TemporaryDirectory(prefix="endurance-") as folder:
        scratch = Path(folder, "tmp")
        scratch.mkdir()
        os.environ["TMPDIR"] = str(scratch)
        import tempfile

        tempfile.tempdir = None
        path = model(Path(folder, "model.onnx"))
        specs = tuple(BackendSpec(id) for id in backends)
        options = AuditOptions(backends=specs, threads=1)
        shared = set(os.listdir("/dev/shm"))
        curve, digests, begun = [], set(), time.monotonic()
        for _ in range(count):
            if time.monotonic() - begun > seconds:
                break
            report = audit(path, options, noises=discovery.noises(), progress=Silent())
            assert not report.gaps, report.gaps
            text = json_v1.RENDERER.render(report, width=None, color=False)
            digests.add(digest(json.loads(text)))
            curve.append(state(scratch, shared))
    return {
        "what": "row",
        "backends": backends,
        "audits": len(curve),
        "seconds": round(time.monotonic() - begun),
        "reports": len(digests),
        "growth": growth(curve),
        "curve": {key: [point[key] for point in curve] for key in curve[0]},
        "wrong": wrong(curve, digests),
    }


def growth(curve: list[dict[str, int]]) -> dict[str, float]:
    """The median of the last quarter minus that of the first, once it is warm."""
    warm = curve[min(_WARM, len(curve) // 2) :]
    part = max(1, len(warm) // 4)
    return {
        key: statistics.median(p[key] for p in warm[-part:])
        - statistics.median(p[key] for p in warm[:part])
        for key in curve[0]
    }


def wrong(curve: list[dict[str, int]], digests: set[str]) -> list[str]:
    """What grew or changed."""
    grown = growth(curve)
    found = [
        f"{key} grew by {by:g}"
        for key, by in grown.items()
        if by > (_GROWTH if key == "memory" else 0)
    ]
    last = curve[-1]
    found += [f"{last[key]} {key} left" for key in ("children", "files", "shared") if last[key]]
    return found + ([f"{len(digests)} different reports"] if len(digests) > 1 else [])


def _started(path: Path, report: Path, backends: list[str], *more: str, **variables: str) -> Any:
    command = [sys.executable, "-m", "auditor", str(path), "--backends", ",".join(backends)]
    return subprocess.Popen(
        [*command, "-o", str(report), *more],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def together(count: int, backends: list[str]) -> dict[str, Any]:
    """Eight audits at once on one cache, ``count`` times; the cache is empty at first."""
    found: list[str] = []
    digests, made = set(), 0
    begun = time.monotonic()
    with TemporaryDirectory(prefix="endurance-") as name:
        folder = Path(name)
        path = model(folder / "model.onnx")
        scratch, cache = folder / "tmp", folder / "cache"
        scratch.mkdir()
        shared = set(os.listdir("/dev/shm"))
        for _ in range(count):
            files = [folder / f"{number}.json" for number in range(_TOGETHER)]
            places = {"TMPDIR": str(scratch), "SYSNOISE_CACHE": str(cache)}
            jobs = [_started(path, file, backends, "--threads", "1", **places) for file in files]
            for job, file in zip(jobs, files, strict=True):
                _, errors = job.communicate(timeout=300)
                made += 1
                if job.returncode not in (0, 1):  # 1: findings
                    found.append(f"exit code {job.returncode}: {errors[-300:]}")
                    continue
                digests.add(digest(_uncached(json.loads(file.read_text()))))
        for entry in cache.glob("*/*.safetensors"):
            stated = entry.stem.partition("-")[2]
            if hashlib.sha256(entry.read_bytes()).hexdigest() != stated:
                found.append(f"damaged cache entry {entry.name}")
        found += [f"left behind: {p.name}" for p in scratch.iterdir()]
        found += [f"left in /dev/shm: {n}" for n in unused(set(os.listdir("/dev/shm")) - shared)]
    if len(digests) > 1:
        found.append(f"{len(digests)} different reports")
    return {
        "what": "together",
        "backends": backends,
        "audits": made,
        "seconds": round(time.monotonic() - begun),
        "reports": len(digests),
        "wrong": found,
    }


def _uncached(report: dict[str, Any]) -> dict[str, Any]:
    """Without what says that something came from the cache."""
    for backend in report["backends"]:
        backend["fidelity"].pop("cached", None)
        if backend["provenance"]:
            notes = backend["provenance"]["notes"]
            backend["provenance"]["notes"] = [n for n in notes if "the cache" not in n]
    return report


def threads(
    backends: list[str], given: Path | None = None, numbers: tuple[int, ...] = (1, 2, 3, 4)
) -> dict[str, Any]:
    """The same audit on other numbers of threads, twice each: which backends keep their bits.

    Args:
        backends: their ids.
        given: the network to audit; None for a very small one.
        numbers: of threads.
    """
    digests: dict[str, dict[int, set[str]]] = {id: {} for id in backends}
    found: list[str] = []
    made = 0
    begun = time.monotonic()
    with TemporaryDirectory(prefix="endurance-") as name:
        folder = Path(name)
        path = given.resolve() if given else model(folder / "model.onnx")
        for number in (*numbers, *numbers):
            file = folder / "report.json"
            job = _started(path, file, backends, "--threads", str(number), "--no-cache")
            _, errors = job.communicate(timeout=300)
            made += 1
            if job.returncode not in (0, 1):  # 1: findings
                found.append(f"{number} threads: exit code {job.returncode}: {errors[-300:]}")
                continue
            for backend in json.loads(file.read_text())["backends"]:
                backend.pop("provenance")  # which states the threads
                digests[backend["id"]].setdefault(number, set()).add(digest(backend))
    return {
        "what": "threads",
        "backends": backends,
        "audits": made,
        "threads": list(numbers),
        "seconds": round(time.monotonic() - begun),
        "model": given.stem if given else "a very small network",
        "differ": [id for id, kept in digests.items() if len(set().union(*kept.values())) > 1],
        "unsteady": [id for id, kept in digests.items() if any(len(k) > 1 for k in kept.values())],
        "wrong": found,
    }


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("row", "together", "threads"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--backends", default="ort")
    parser.add_argument("--model", type=Path, help="for threads: a network instead of a tiny one")
    parser.add_argument("--seconds", type=float, default=1e9, help="no audit begins after that")
    parser.add_argument("--json", type=Path, help="add the result to this file")
    asked = parser.parse_args()
    backends = asked.backends.split(",")
    make: dict[str, Callable[[], dict[str, Any]]] = {
        "row": lambda: row(asked.count, backends, asked.seconds),
        "together": lambda: together(asked.count, backends),
        "threads": lambda: threads(backends, asked.model),
    }
    result = make[asked.what]()
    print(json.dumps({k: v for k, v in result.items() if k != "curve"}, indent=1))
    if asked.json:
        earlier = json.loads(asked.json.read_text()) if asked.json.exists() else []
        asked.json.write_text(json.dumps([*earlier, result]))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
