"""What a machine does with one cell: an audit in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Ends what it becomes when its parent ends (PR_SET_PDEATHSIG, SIGTERM): a node that is lost must
# not go on with a cell that another one has got.
_TIED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
_SAID = 1 << 16  # bytes of what an audit says that are kept
_PATIENCE = 10.0  # seconds that an audit has to end in, once asked to


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an audit ended.

    Attributes:
        code: its exit code; negative where a signal ended it.
        report: the JSON report; None where it wrote none.
        said: the end of what it wrote to standard error.
        node: the machine.
        seconds: wall time.
        lacking: files that are not on this machine, so that nothing was run.
    """

    code: int
    report: str | None
    said: str
    node: str
    seconds: float
    lacking: tuple[str, ...] = ()


def audit(
    arguments: Sequence[str],
    node: str,
    started: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Outcome:
    """Run ``audit`` with these arguments, in an empty folder, and wait for its end.

    Args:
        arguments: paths in them are absolute.
        node: what this machine is called.
        started: is given the process.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        report, said = folder / "report.json", folder / "said.txt"
        command = ["-m", "auditor", *arguments, "--format", "json", "--output", str(report)]
        if sys.platform == "linux":
            command = ["-c", _TIED, str(os.getpid()), *command]
        with said.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=os.environ | {"NO_COLOR": "1", "PYTHONPATH": _importable()},
            )
        if started:
            started(process)
        try:
            code = process.wait()
        finally:
            end(process)
        return Outcome(
            code=code,
            report=report.read_text(encoding="utf-8") if report.is_file() else None,
            said=said.read_bytes()[-_SAID:].decode("utf-8", "replace"),
            node=node,
            seconds=time.perf_counter() - start,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End an audit and the engines' processes that belong to it, if it has not ended."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            return
        process.kill()
        process.wait()


def _importable() -> str:
    """Where this process finds its modules: the audit runs the same auditor."""
    return os.pathsep.join(entry for entry in sys.path if entry)
