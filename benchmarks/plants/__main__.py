"""Command line: run cases that are not in the results yet, and write the table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plants, zoo
from benchmarks.plants import suite, table
from benchmarks.plants.suite import Results, Subject

DEFAULT_RESULTS = zoo.zoo_dir() / "plants.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plants",
        description=plants.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=10, help="noises per model and backend")
    parser.add_argument("--defects", type=int, help="a third of --count unless given")
    parser.add_argument("--nulls", type=int, help="a third of --count unless given")
    parser.add_argument("--two", type=int, help="pairs of faults; a fifth of --count unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", help="all that the suite has unless given")
    parser.add_argument("--backends", default="ort,ov")
    parser.add_argument("--build", choices=suite.BUILDS, default="fp32")
    parser.add_argument("--results", type=Path, nargs="+", default=[DEFAULT_RESULTS])
    parser.add_argument("--minutes", type=float, help="stop before a case that would begin later")
    parser.add_argument("--table", type=Path, help="write the table of all results and stop")
    arguments = parser.parse_args(argv)
    results = [Results(path) for path in arguments.results]
    if arguments.table:
        together = [r for file in results for r in file.done.values()]
        command = f"python -m benchmarks.plants --table {arguments.table}"
        arguments.table.write_text(table.render(together, command))
        return 0
    third = -(-arguments.count // 3)
    counts = {
        "noise": arguments.count,
        "defect": third if arguments.defects is None else arguments.defects,
        "null": third if arguments.nulls is None else arguments.nulls,
        "two": -(-arguments.count // 5) if arguments.two is None else arguments.two,
    }
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    kept = results[0]
    for name in (arguments.models or ",".join(suite.models(arguments.build))).split(","):
        subject = Subject(name)
        for backend in arguments.backends.split(","):
            for identity in suite.cases(subject, backend, arguments.build, counts, arguments.seed):
                if identity in kept.done:
                    continue
                if time.monotonic() > end:
                    return 0
                *_, seed, number, kind = identity
                case = suite.draw(subject, kind, arguments.build, seed, number)
                if case is None:
                    continue
                baseline = kept.baseline(subject, backend, arguments.build)
                result = suite.run(subject, backend, case, baseline)
                kept.add(result)
                planted = " + ".join(p.id for p in result.plants)
                where = f"{name} {backend} {arguments.build} {kind} {number}"
                print(
                    f"{where}: {planted}: {result.outcome}"
                    f" {result.causes or ''} {result.seconds:.1f} s {result.failure}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
