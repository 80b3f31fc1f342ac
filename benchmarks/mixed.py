"""How few layers ``audit fix`` keeps in float32, against the fewest that do.

``python -m benchmarks.mixed [--data FILE] [--most 10] MODEL`` audits a model on OpenVINO with its
default precision, searches as ``audit fix`` does for a tenth of the divergence, and then builds
every set with fewer layers than it found, smallest first. Models of more than ``--most`` layers are
searched only: every layer doubles the number of sets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import auditor.cli  # noqa: F401  registers the verbs that a report's command is read with
from auditor import fix
from auditor.commands._asked import again, asked_for
from auditor.fixes._bench import Bench, Change
from auditor.ports import Silent
from auditor.records.fix import FixReport
from auditor.records.measured import Segment
from auditor.subject import model_of
from reports import json_v1


def fewest(bench: Bench, segments: tuple[Segment, ...], limit: float) -> tuple[int, int]:
    """The fewest of ``segments`` that must stay in float32, and how many sets were built."""
    built = 0
    for size in range(1, len(segments) + 1):
        for kept in combinations(segments, size):
            built += 1
            if bench.distance(Change("", (), kept=kept))[0] <= limit:
                return size, built
    raise SystemExit("not even all layers in float32 are within the limit")


def kept(report: FixReport) -> int | None:
    """The fewest layers of a build within the limit."""
    within = (a for a in report.attempts if a.after is not None and a.after <= report.limit)
    return min((a.kept for a in within if a.kept), default=None)


def main() -> int:
    """Search, then search exhaustively, and print both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--samples", default="4")
    parser.add_argument("--most", type=int, default=10)
    parser.add_argument("model")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mixed-") as folder:
        path = Path(folder, "report.json")
        line = [sys.executable, "-m", "auditor", known.model, "--backends", "ov", "--no-confirm"]
        if known.data:
            line += ["--data", known.data, "--samples", known.samples]
        audit = [*line, "-o", str(path)]
        subprocess.run(audit, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        report = json_v1.load(path)
        (backend,) = report.backends
        options = asked_for(again(report.command).params, None)
        begun = time.monotonic()
        found = fix.fix(report, backend, options, None, Path(folder), Silent(), ".xml").report
        number = kept(found)
        builds = sum(a.kept is not None for a in found.attempts)
        print(f"{known.model}: {found.before:.2e}, to {found.limit:.2e}")
        for made in found.attempts:
            after = made.failure or f"{made.after:.2e}"
            print(f"  {made.name}: {after}, {_ratio(made.latency_after, made.latency_before)}")
        print(
            f"audit fix: {number} layers in float32 after {builds} "
            f"builds, {time.monotonic() - begun:.0f} s"
        )
        if number is None or len(backend.segments) > known.most:
            return int(number is None)
        begun = time.monotonic()
        with Bench(
            model_of(report, options), options.backends[0], options, Path(folder), Silent()
        ) as bench:
            size, built = fewest(bench, backend.segments, found.limit)
        print(f"fewest: {size}, after {built} builds, {time.monotonic() - begun:.0f} s")
    return 0


def _ratio(after: float | None, before: float | None) -> str:
    return f"{after / before:.2f}x" if after and before else "-"


if __name__ == "__main__":
    sys.exit(main())
