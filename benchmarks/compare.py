"""What an audit costs, beside a plain run of the same runtimes and beside Polygraphy.

``python -m benchmarks.compare [MODEL…]`` measures, in one go and in turn so that a busy machine
is busy for all of them:

- *floor*: import, compile and run once, plainly (``benchmarks/floor.py``);
- *audit*: ``audit MODEL --backends ort,ov --samples 1``, and with more samples, for the cost of
  each further input in runs of the unoptimised model;
- *audit ort* and *polygraphy*: the one comparison that both make, every layer of optimised
  ONNX Runtime against unoptimised, on the same input.

Every figure is a whole process from start to exit. Memory is the largest proportional set size of a
process and its children (Linux: a page that several share counts once), sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks import zoo

MODELS = ("efficientnet_lite0", "minilm", "ppocr_det", "light_resnet50")
PACKAGES = (
    "sysnoise-auditor",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "apache-tvm",
    "polygraphy",
)
MIB = 1 << 20


@dataclass
class Cost:
    """What one command cost, run by run."""

    wall: list[float] = field(default_factory=list)  # seconds
    cpu: list[float] = field(default_factory=list)  # seconds, all processes
    peak: list[float] = field(default_factory=list)  # MiB

    def median(self, what: str) -> float:
        """Median of ``wall``, ``cpu`` or ``peak``."""
        values: list[float] = getattr(self, what)
        return statistics.median(values)


@dataclass(frozen=True)
class Work:
    """Commands to run one after the other, and how to tell that they did their work."""

    commands: Sequence[Sequence[str]]
    accepted: frozenset[int] = frozenset({0})  # exit codes
    product: Path | None = None  # a file that must be there afterwards
    cleared: Path | None = None  # a folder that must not be there before


class FailedError(RuntimeError):
    """A measured command did not do its work."""


def tree_memory(process: psutil.Process) -> int:
    """Proportional set size, in bytes, of a process and its descendants now."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                total += member.memory_full_info().pss
    return total


def measure(work: Work, every: float = 0.02) -> tuple[float, float, float]:
    """Run the commands.

    Args:
        work: what to run.
        every: seconds between two looks at the memory. Each takes a core for 10 to 40 ms where a
            process holds much, which a long run on all cores has to wait for.

    Returns:
        Wall seconds and CPU seconds of all of them, and the largest peak in MiB.

    Raises:
        FailedError: one exited with a code that is not accepted, or the product is missing.
    """
    if work.product:
        work.product.unlink(missing_ok=True)
    if work.cleared:
        shutil.rmtree(work.cleared, ignore_errors=True)
    # Installed packages come with their bytecode; so does the auditor, after its first run.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["SYSNOISE_CACHE"] = "off"  # or the second repeat would measure less than the first
    wall = cpu = peak = 0.0
    for command in work.commands:
        with tempfile.TemporaryFile() as log:
            start = time.perf_counter()
            child = subprocess.Popen(
                command,
                cwd=zoo.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
            watched = psutil.Process(child.pid)
            while True:
                done, status, usage = os.wait4(child.pid, os.WNOHANG)
                if done:
                    break
                peak = max(peak, tree_memory(watched) / MIB)
                time.sleep(every)
            wall += time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            cpu += usage.ru_utime + usage.ru_stime
            missing = work.product and command is work.commands[-1] and not work.product.exists()
            if child.returncode not in work.accepted or missing:
                log.seek(0)
                tail = log.read().decode(errors="replace").splitlines()[-15:]
                raise FailedError(
                    f"exit {child.returncode} from {' '.join(command)}\n" + "\n".join(tail)
                )
    return wall, cpu, peak


def in_turn(works: Mapping[str, Work], repeats: int) -> tuple[dict[str, Cost], dict[str, str]]:
    """Measure commands in turn, so that what else the machine does slows all alike.

    Returns:
        The costs of those that did their work every time, and why the others failed.
    """
    costs = {name: Cost() for name in works}
    failed: dict[str, str] = {}
    for _ in range(repeats):
        for name, work in works.items():
            if name in failed:
                continue
            try:
                wall, cpu, peak = measure(work)
            except FailedError as error:
                failed[name] = str(error)
                continue
            costs[name].wall.append(wall)
            costs[name].cpu.append(cpu)
            costs[name].peak.append(peak)
    return {name: cost for name, cost in costs.items() if name not in failed}, failed


def polygraphy(model: Path, inputs: Path, scratch: Path) -> Work:
    """Save every tensor of the unoptimised model, then compare the optimised one's with them."""
    # Its command lies beside the interpreter of the environment that it was installed in.
    program = [sys.executable, "-c", "import sys, polygraphy.tools as t; sys.exit(t.main())"]
    every = [*program, "run", str(model), "--onnxrt", "--onnx-outputs", "*"]
    every += ["--load-inputs", str(inputs), "--graph-optimization-level"]
    golden, accuracy = scratch / "golden", scratch / "accuracy.json"
    compared = ["--compare", "simple", "cosine_similarity"]
    compared += ["--save-accuracy-results", str(accuracy)]
    commands = (
        [*every, "ORT_DISABLE_ALL", "--save-outputs", str(golden)],
        [*every, "ORT_ENABLE_ALL", "--load-outputs", str(golden), *compared],
    )
    # 1: some tensors differ. It adds to a folder of outputs, and would compare earlier ones too.
    return Work(commands, frozenset({0, 1}), accuracy, golden)


def polygraphy_inputs(data: Path, target: Path) -> None:
    """Write the first sample in Polygraphy's own format, outside what is measured."""
    code = (
        "import sys, numpy as np\n"
        "from polygraphy.json import save_json\n"
        "data = np.load(sys.argv[1], allow_pickle=False)\n"
        "save_json([{name: data[name][0] for name in data.files}], sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(data), str(target)], check=True)


def compare(model: Path, backends: str, repeats: int, further: int) -> dict[str, Any]:
    """Measure everything for one model."""
    data = model.with_suffix(".npz")
    python = sys.executable
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        scratch = Path(folder)
        report = scratch / "report.json"
        plain = [python, "-m", "benchmarks.floor", str(model), str(data), "--backends"]

        def audit(backends: str, samples: int) -> Work:
            command = [python, "-m", "auditor", str(model), "--data", str(data), "-o", str(report)]
            command += ["--backends", backends, "--samples", str(samples), "--no-cache"]
            return Work([command], frozenset({0, 1, 3}), report)  # 1: findings, 3: a gap

        works = {
            "floor": Work([[*plain, backends]]),
            "audit": audit(backends, 1),
            "audit, more inputs": audit(backends, 1 + further),
            "floor ort": Work([[*plain, "ort"]]),
            "audit ort": audit("ort", 1),
        }
        try:
            metadata.version("polygraphy")
        except metadata.PackageNotFoundError:
            print("polygraphy is not installed: not compared (make bench)", file=sys.stderr)
        else:
            polygraphy_inputs(data, scratch / "inputs.json")
            works["polygraphy"] = polygraphy(model, scratch / "inputs.json", scratch)
        done, failed = in_turn(works, repeats)
        clock = [python, "-m", "benchmarks.floor", str(model), str(data), "--reference", "11"]
        unit = float(subprocess.run(clock, cwd=zoo.ROOT, check=True, capture_output=True).stdout)
    return {
        "costs": {name: asdict(cost) for name, cost in done.items()},
        "failed": failed,
        "reference_run_s": unit,
        "ratios": ratios(done, unit, further),
    }


def ratios(costs: dict[str, Cost], unit: float, further: int) -> dict[str, float]:
    """The figures that the project sets itself targets for, from medians."""

    def over(what: str, left: str, right: str) -> float | None:
        if left in costs and right in costs:
            return costs[left].median(what) / costs[right].median(what)
        return None

    found = {
        "audit / floor, time": over("wall", "audit", "floor"),
        "polygraphy / audit ort, time": over("wall", "polygraphy", "audit ort"),
        "audit ort / polygraphy, memory": over("peak", "audit ort", "polygraphy"),
    }
    if "audit" in costs and "audit, more inputs" in costs:
        more = costs["audit, more inputs"].median("wall") - costs["audit"].median("wall")
        found["each further input, in reference runs"] = more / further / unit
    return {name: value for name, value in found.items() if value is not None}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": versions,
    }


def show(name: str, result: dict[str, Any]) -> None:
    """Print one model's figures."""
    print(f"\n{name}  (one reference run: {result['reference_run_s'] * 1e3:.1f} ms)")
    print(f"  {'median of the repeats':24}{'wall s':>9}{'cpu s':>9}{'peak MiB':>10}")
    for what, cost in result["costs"].items():
        wall, cpu, peak = (statistics.median(cost[k]) for k in ("wall", "cpu", "peak"))
        print(f"  {what:24}{wall:9.2f}{cpu:9.2f}{peak:10.0f}")
    for what, error in result["failed"].items():
        print(f"  {what:24}FAILED: {error}")
    for what, value in result["ratios"].items():
        print(f"  {what:42}{value:8.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--backends", default="ort,ov", help="of the floor and the audit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--further", type=int, default=3, help="how many further inputs")
    parser.add_argument("-o", "--output", type=Path, help="write every figure as JSON")
    arguments = parser.parse_args(argv)
    names = arguments.models or MODELS
    facts = machine()
    print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']:.1f} when started")
    print(", ".join(f"{k} {v}" for k, v in facts["packages"].items()))
    results = {}
    for name, path in zip(names, zoo.obtain(names), strict=True):
        results[name] = compare(path, arguments.backends, arguments.repeats, arguments.further)
        show(name, results[name])
        sys.stdout.flush()  # one model may take minutes
    if arguments.output:
        text = json.dumps({"machine": facts, "models": results}, indent=2)
        arguments.output.write_text(text + "\n")
    return int(any(result["failed"] for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
