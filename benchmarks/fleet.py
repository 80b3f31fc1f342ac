"""``audit fleet`` on a real Ray cluster of several raylets, one of which is killed at work.

``python -m benchmarks.fleet`` starts a head without processors and three nodes on this host, and
where that is allowed a fourth one that does not see the models' folder (a mount namespace of its
own), so that files are sent to it. It runs the command, kills one node with SIGKILL while an audit
runs on it, and compares with the same work list without a cluster: every cell is there once, with
the same figures, and what no node declares is a gap. Exit code 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import zoo

MODELS = ("mtcnn_p", "mtcnn_r", "mtcnn_o", "efficientnet_lite0")
WORKLIST = """
[audit]
samples = 1
threads = 1
cache = false
[[backend]]
id = "ort"
[[backend]]
id = "ov"
[[backend]]
id = "ov:GPU"
"""
ELSEWHERE = """
[[backend]]
id = "ort"
name = "ort elsewhere"
needs = ["elsewhere"]
"""
STORE = 80 * 2**20  # bytes of each node's object store
# A lost node is noticed after a second.
CHECKS = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}


def work_list(folder: Path, elsewhere: bool) -> Path:
    """Models in a folder of their own, and a work list for them."""
    models = folder / "models"
    models.mkdir()
    text = WORKLIST + (ELSEWHERE if elsewhere else "")
    for source in zoo.obtain(list(MODELS)):
        for file in (source, source.with_suffix(".npz")):
            shutil.copy(file, models)
        text += f'[[model]]\npath = "models/{source.name}"\ndata = "models/{source.stem}.npz"\n'
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


def command(worklist: Path, folder: Path, *more: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "auditor", "fleet", str(worklist), "-o", str(folder), *more]


def audits(process: psutil.Process) -> list[psutil.Process]:
    """Audits below a process."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if {"auditor", "--backends"} <= set(child.cmdline()):
                    found.append(child)
    return found


@contextlib.contextmanager
def isolated_node(address: str, hidden: Path) -> Iterator[None]:
    """A node that does not see a folder."""
    start = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        f"--address={address}",
        "--block",
    ]
    start += ["--num-cpus=1", f"--object-store-memory={STORE}"]
    start += ["--resources", json.dumps({"backend_ort": 1, "elsewhere": 1})]
    script = f'mount -t tmpfs none "{hidden}" && exec "$@"'
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", *start],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield
        finally:
            family = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(True))]
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)


def on_cluster(worklist: Path, folder: Path, elsewhere: bool) -> dict[str, Any]:
    """Run the work list on a cluster that loses a node; the facts."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE, "wait": False}
    begin = time.perf_counter()
    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": CHECKS})
    killed = None
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.shutdown)
        cluster.add_node(**node, resources={"backend_ort": 1})
        victim = cluster.add_node(**node, resources={"backend_ort": 1, "backend_ov": 1})
        cluster.add_node(**node, resources={"backend_ov": 1})
        if elsewhere:
            stack.enter_context(isolated_node(cluster.address, worklist.parent / "models"))
        cluster.wait_for_nodes()
        started = time.perf_counter() - begin
        raylet = psutil.Process(victim.all_processes["raylet"][0].process.pid)
        with subprocess.Popen(command(worklist, folder, "--address", cluster.address)) as fleet:
            while fleet.poll() is None:
                if killed is None and (running := audits(raylet)):
                    time.sleep(0.5)  # in the middle
                    killed = [process.cmdline() for process in running]
                    cluster.remove_node(victim, allow_graceful=False)
                time.sleep(0.05)
        left = audits(psutil.Process())
    report: dict[str, Any] = json.loads((folder / "fleet.json").read_text())
    return {"start_s": started, "killed": killed, "left": left, "report": report}


def faults(facts: dict[str, Any], alone: dict[str, Any], folder: Path) -> list[str]:
    """What does not hold."""
    report = facts["report"]
    found = []

    def check(holds: bool, what: str) -> None:
        if not holds:
            found.append(what)

    check(facts["killed"] is not None, "no node was killed while an audit ran on it")
    check(not facts["left"], "audits are left behind")
    names = [(cell["model"], cell["column"]) for cell in report["cells"]]
    check(len(set(names)) == len(names), "a cell is there twice")
    lost = [a["lost"] for cell in report["cells"] for a in cell["attempts"] if a["lost"]]
    check(bool(lost), "no attempt was lost")
    check(any(not node["alive"] for node in report["nodes"]), "no node is said to be lost")
    check(report["exit_code"] == alone["exit_code"], "the exit code differs")
    check(names == [(c["model"], c["column"]) for c in alone["cells"]], "the cells differ")
    for here, there in zip(alone["cells"], report["cells"], strict=True):
        name = f"{there['model']} on {there['column']}"
        if there["column"] == "ov:GPU":
            check(
                there["gap"] is not None and "device_gpu" in there["gap"]["reason"],
                f"{name}: no gap",
            )
            continue
        check(there["gap"] is None, f"{name}: {there['gap']}")
        check(sum(not a["lost"] for a in there["attempts"]) == 1, f"{name}: not one result")
        if there["column"] != "ort elsewhere":  # which this machine alone cannot take
            for key in ("relative_l2", "findings", "sha256", "noise"):
                check(here[key] == there[key], f"{name}: {key} differs")
        if there["report"]:
            document = json.loads((folder / there["report"]).read_text())
            check(document["model"]["sha256"] == there["sha256"], f"{name}: another model's report")
            path = Path(document["model"]["path"])
            check(path.parent == folder.parent / "models", f"{name}: the path {path}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(prefix="fleet-benchmark-") as name:
        folder = Path(name)
        probe = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{folder}"']
        elsewhere = subprocess.run(probe, stderr=subprocess.DEVNULL, check=False).returncode == 0
        if not elsewhere:
            print("no mount namespace here: sending files is not tried", file=sys.stderr)
        worklist = work_list(folder, elsewhere)
        begin = time.perf_counter()
        subprocess.run(command(worklist, folder / "alone", "--wait", "0"), check=False)
        alone = json.loads((folder / "alone" / "fleet.json").read_text())
        print(f"this machine alone: {time.perf_counter() - begin:.0f} s", flush=True)
        facts = on_cluster(worklist, folder / "cluster", elsewhere)
        found = faults(facts, alone, folder / "cluster")
    report = facts["report"]
    lost = [a["lost"] for cell in report["cells"] for a in cell["attempts"] if a["lost"]]
    print(f"{len(report['nodes'])} nodes, up after {facts['start_s']:.0f} s")
    print(f"{len(report['cells'])} cells in {report['seconds']:.0f} s")
    print(f"audits on the node when it was killed: {len(facts['killed'] or ())}; attempts lost:")
    for reason in lost:
        print(f"  {reason}")
    for what in found:
        print(f"FAULT: {what}")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
