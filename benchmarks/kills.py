"""Kill an audit at random moments: nothing may be damaged, and no report may be half.

``python -m benchmarks.kills [--kills 50] [--seed 0] [--json FILE] MODEL [ARGUMENTS]`` starts the
same audit again and again with a cache of its own and ends it with SIGKILL at a random moment of
the time that it takes. After each kill every entry of the cache must have the digest in its name, a
report must be whole or absent, and no worker may live on. At last the audit runs to its end, and
must say what an audit without the cache says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_QUIET = subprocess.DEVNULL
_GRACE = 10.0  # seconds after which a worker should have noticed that its parent is gone


@dataclass(slots=True)
class Told:
    """What was seen after the kills."""

    kills: int = 0
    finished: int = 0  # audits that ended before they were killed
    damaged: int = 0
    half_reports: int = 0
    left_processes: int = 0
    drafts: int = 0
    resumed: int = 0  # audits that found something in the cache


def campaign(
    command: Sequence[str],
    environment: Mapping[str, str],
    cache: Path,
    report: Path,
    kills: int,
    *,
    seed: int,
) -> Told:
    """Kill the audit ``kills`` times, then let it finish.

    The longest moment grows to what a whole run takes, and the cache is emptied now and then, so
    that every stage is met.
    """
    rng, told = random.Random(seed), Told()
    begun = time.monotonic()
    subprocess.run(command, env=dict(environment), stdout=_QUIET, stderr=_QUIET, check=False)
    takes = time.monotonic() - begun
    for number in range(kills):
        if number % 5 == 0:
            for path in cache.glob("*/*"):
                path.unlink()
        report.unlink(missing_ok=True)
        told.resumed += any(cache.glob("*/*.safetensors"))
        process = subprocess.Popen(
            command, env=dict(environment), stdout=_QUIET, stderr=_QUIET, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.05, takes))
            told.finished += 1
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            told.kills += 1
        _look(cache, report, told)
        told.left_processes += _left(cache)
    subprocess.run(command, env=dict(environment), stdout=_QUIET, stderr=_QUIET, check=False)
    _look(cache, report, told)
    return told


def _look(cache: Path, report: Path, told: Told) -> None:
    for path in cache.glob("*/*.safetensors"):
        digest = path.stem.partition("-")[2]
        told.damaged += hashlib.sha256(path.read_bytes()).hexdigest() != digest
    told.drafts = max(told.drafts, len(list(cache.glob("*/*.draft"))))
    if report.exists():
        try:
            json.loads(report.read_text("utf-8"))
        except ValueError:
            told.half_reports += 1


def _left(cache: Path) -> int:
    """Workers of a killed audit that live on after some seconds; ``cache`` is its alone."""
    end = time.monotonic() + _GRACE
    while left := _workers(os.fsencode(cache)):
        if time.monotonic() > end:
            return left
        time.sleep(0.1)
    return 0


def _workers(mark: bytes) -> int:
    """Living workers with ``mark`` in their environment."""
    count = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            worker = b"auditor.processes.worker" in (entry / "cmdline").read_bytes()
            count += worker and mark in (entry / "environ").read_bytes()
        except OSError:
            continue
    return count


def main() -> int:
    """Run the campaign on a model and print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="add what was seen to this file")
    parser.add_argument("model")
    known, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        report, cache = Path(folder, "report.json"), Path(folder, "cache")
        line = [sys.executable, "-m", "auditor", known.model, "-o", str(report), *more]
        environment = os.environ | {"SYSNOISE_CACHE": str(cache)}
        told = campaign(line, environment, cache, report, known.kills, seed=known.seed)
        print(told)
        if known.json:
            earlier = json.loads(known.json.read_text()) if known.json.exists() else []
            known.json.write_text(json.dumps([*earlier, asdict(told)]))
        return int(bool(told.damaged or told.half_reports or told.left_processes))


if __name__ == "__main__":
    sys.exit(main())
