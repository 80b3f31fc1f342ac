"""Cells on this machine, without a cluster."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress

from auditor.fleet import node
from auditor.fleet.node import Outcome
from auditor.fleet.worklist import Cell
from auditor.records.fleet import FleetNode

_DERIVED = ("backend_", "device_")  # whether they are here an audit finds out itself


class Local:
    """Runs each cell in a child process, ``jobs`` of them at a time."""

    address = None

    def __init__(self, jobs: int) -> None:
        """Nothing is started yet."""
        self._name = platform.node() or "this machine"
        self._pool = ThreadPoolExecutor(jobs)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def nodes(self) -> tuple[FleetNode, ...]:
        """This machine."""
        return (FleetNode(self._name, {"CPU": float(os.cpu_count() or 1)}),)

    def misses(self, cell: Cell) -> str | None:
        """What this machine cannot be known to have; None where it may try."""
        asked = [name for name in cell.needs if not name.startswith(_DERIVED)]
        if not asked:
            return None
        return f"it needs {' and '.join(asked)}, which only a node of a cluster can declare"

    def start(self, cell: Cell) -> Future[Outcome]:
        """Queue a cell."""
        return self._pool.submit(self._audit, cell)

    def ended(self, jobs: Collection[Future[Outcome]], seconds: float) -> set[Future[Outcome]]:
        """The jobs that have ended, as soon as there is one or the time is over."""
        return wait(jobs, seconds, FIRST_COMPLETED).done

    def outcome(self, job: Future[Outcome]) -> Outcome:
        """What a job gave."""
        return job.result()

    def cancel(self, job: Future[Outcome]) -> None:
        """Take a job back that has not begun."""
        job.cancel()

    def ship(self, cell: Cell) -> None:
        """Nothing: every file is here."""

    def close(self) -> None:
        """End what is running."""
        with self._lock:
            self._closed = True
            running = tuple(self._running)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            with suppress(ProcessLookupError):
                process.terminate()
        self._pool.shutdown()

    def _audit(self, cell: Cell) -> Outcome:
        process: list[subprocess.Popen[bytes]] = []

        def started(child: subprocess.Popen[bytes]) -> None:
            with self._lock:
                process.append(child)
                self._running.add(child)
                if self._closed:
                    child.terminate()

        try:
            return node.audit(cell.arguments, self._name, started)
        finally:
            with self._lock:
                self._running.difference_update(process)
