"""Backends side by side, each on cores of its own: the same bits as each alone.

``python -m benchmarks.pinned MODEL.onnx DATA.npz [--backends ort,ov]`` records what each backend
computes (``audit record``: every tensor that it shows, with the proofs), pinned to its share of the
cores, first one after the other and then all at once, and compares the files tensor by tensor,
bit for bit. Exit code 1 where one differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Pins itself and so everything that it starts: sched_setaffinity(2) is inherited.
_PINNED = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def record(
    model: Path, data: Path, backend: str, cores: Sequence[int], into: Path
) -> subprocess.Popen[bytes]:
    """Start recording on these cores."""
    pinned = [sys.executable, "-c", _PINNED, ",".join(map(str, cores))]
    command = ["-m", "auditor", "record", str(model), "--backend", backend, "--data", str(data)]
    command += ["--threads", str(len(cores)), "-o", str(into)]
    return subprocess.Popen(
        [*pinned, *command],
        env=os.environ | {"SYSNOISE_CACHE": "off"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def ended(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for all of them.

    Raises:
        RuntimeError: one failed.
    """
    for process in processes:
        if process.wait():
            raise RuntimeError(f"exit code {process.returncode} from {process.args!r}")


def differing(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many arrays two recordings have, and the names of those whose bits differ."""
    with np.load(one) as a, np.load(other) as b:
        names = sorted({*a.files, *b.files})
        same = {
            name
            for name in names
            if name in a.files and name in b.files and a[name].tobytes() == b[name].tobytes()
        }
        return len(names), [name for name in names if name not in same]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pinned", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backends", default="ort,ov")
    arguments = parser.parse_args(argv)
    backends = arguments.backends.split(",")
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // len(backends)
    if not share:
        parser.error(f"{len(backends)} backends need as many cores; there are {len(cores)}")
    shares = {b: cores[i * share : (i + 1) * share] for i, b in enumerate(backends)}
    code = 0
    with tempfile.TemporaryDirectory(prefix="pinned-") as name:

        def into(backend: str, how: str) -> Path:
            return Path(name) / f"{backend.replace(':', '-')}-{how}.npz"

        begin = time.perf_counter()
        for backend, own in shares.items():
            job = record(arguments.model, arguments.data, backend, own, into(backend, "alone"))
            ended([job])
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        jobs = [
            record(arguments.model, arguments.data, backend, own, into(backend, "beside"))
            for backend, own in shares.items()
        ]
        ended(jobs)
        beside = time.perf_counter() - begin
        print(f"one after the other {alone:.1f} s, side by side {beside:.1f} s")
        for backend, own in shares.items():
            count, wrong = differing(into(backend, "alone"), into(backend, "beside"))
            print(f"{backend} on cores {own}: {count - len(wrong)} of {count} arrays the same bits")
            for tensor in wrong[:5]:
                print(f"  not {tensor}")
            code |= bool(wrong)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
