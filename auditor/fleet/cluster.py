"""Cells on the nodes of a Ray cluster.

A node declares what it has as Ray's custom resources (``ray start --resources=…``),
and Ray's scheduler places each cell where what it needs and its processors are free. Ray retries
nothing by itself: the run of the work list counts attempts, and takes each cell's result once.

Files are used in place where a node has them under the same path (a shared file system), and
otherwise come through Ray's object store.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auditor import __version__
from auditor.errors import UsageError
from auditor.fleet.node import Outcome, audit
from auditor.fleet.run import LostError
from auditor.fleet.worklist import Cell
from auditor.records.fleet import FleetNode

_REACHED = 5.0  # seconds that a cluster has to answer in
_PIECE = 1 << 28  # bytes of one object in the store
_HINT = (
    "Start one with `ray start --head`, or leave --address out to use this machine; set "
    "RAY_AUTH_MODE=token if it asks for a token."
)
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is where the work list is; the time is that of its last change, in ns."""

    path: str
    size: int
    changed: int

    def is_here(self) -> bool:
        """Whether this machine has it under the same path."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_size, found.st_mtime_ns) == (self.size, self.changed)


class Cluster:
    """A Ray cluster, which somebody else started."""

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: ``auto``, ``host:port`` or ``ray://host:port``.

        Raises:
            UsageError: Ray is not installed, or there is no cluster.
        """
        _check_reachable(address)
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "--address needs Ray", "Install it: pip install 'sysnoise-auditor[fleet]'."
            ) from error
        self.address: str | None = address
        self._ray: Any = ray
        handlers = {number: signal.getsignal(number) for number in _STOPPING}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise UsageError(f"no Ray cluster at {address}: {_first(error)}", _HINT) from error
        finally:
            for number, handler in handlers.items():  # Ray sets one of its own
                signal.signal(number, handler)
        self._task = ray.remote(run)
        self._seen: dict[str, FleetNode] = {}
        self._fresh = 0.0  # until when what was seen last counts
        self._files: dict[str, tuple[File, ...]] = {}
        self._shipped: dict[str, list[Any]] = {}

    def nodes(self) -> tuple[FleetNode, ...]:
        """Every node seen so far; the cluster is asked once a second."""
        if time.monotonic() < self._fresh:
            return tuple(self._seen.values())
        self._fresh = time.monotonic() + 1.0
        for node in self._ray.nodes():
            known = self._seen.get(node["NodeID"])
            had = known.resources if known else {}
            self._seen[node["NodeID"]] = FleetNode(
                _name(node["NodeManagerHostname"], node["NodeID"]),
                _declared(node["Resources"]) or had,
                node["Alive"],
            )
        return tuple(self._seen.values())

    def misses(self, cell: Cell) -> str | None:
        """What no node that is alive declares."""
        alive = [node for node in self.nodes() if node.alive]
        if any(_has(node, cell) for node in alive):
            return None
        nodes = ", ".join(node.name for node in alive) or "none"
        return f"no node declares {' and '.join(cell.needs)} (nodes: {nodes})"

    def start(self, cell: Cell) -> Any:
        """Queue a cell with Ray, for a whole node unless it says how many threads it uses."""
        able = [node for node in self.nodes() if node.alive and _has(node, cell)]
        every = (int(node.resources.get("CPU", 0)) for node in able)
        processors = cell.threads or min(every, default=1)
        if cell.report not in self._files:
            self._files[cell.report] = _described(cell.files)
        files = self._files[cell.report]
        task = self._task.options(
            num_cpus=processors,
            resources=dict.fromkeys(cell.needs, 1),
            max_retries=0,
            scheduling_strategy="SPREAD",
            name=f"audit {cell.model} on {cell.column}",
        )
        shipped = {file.path: self._shipped.get(file.path) for file in files}
        return task.remote(cell.arguments, files, shipped, __version__)

    def ended(self, jobs: Collection[Any], seconds: float) -> Collection[Any]:
        """The jobs that have ended, as soon as there is one or the time is over."""
        ended, _ = self._ray.wait(list(jobs), num_returns=1, timeout=seconds)
        found: list[Any] = ended
        return found

    def outcome(self, job: Any) -> Outcome:
        """What an ended job gave.

        Raises:
            LostError: its node or its worker is gone, or its node cannot run the auditor.
        """
        try:
            found: Outcome = self._ray.get(job)
        except self._ray.exceptions.RayTaskError as error:
            raise LostError(f"it failed on its node: {_first(error.cause)}") from error
        except self._ray.exceptions.RayError as error:
            raise LostError(f"{type(error).__name__}: {_first(error)}") from error
        return found

    def cancel(self, job: Any) -> None:
        """End a job, or take it back."""
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.cancel(job, force=True)

    def ship(self, cell: Cell) -> None:
        """Put the cell's files into the object store, from where nodes take them."""
        import numpy as np

        for file in self._files[cell.report]:
            if file.path not in self._shipped:
                whole = np.memmap(file.path, np.uint8, "r") if file.size else np.zeros(0, np.uint8)
                self._shipped[file.path] = [
                    self._ray.put(np.asarray(whole[start : start + _PIECE]))
                    for start in range(0, file.size, _PIECE)
                ]

    def close(self) -> None:
        """Leave the cluster; what this program still has running there is ended by it."""
        self._ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse an address at which nobody listens: Ray would try for ever.

    Raises:
        UsageError: nobody does.
    """
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        raise UsageError(f"--address {address} is no address", "Write auto, or HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACHED).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"no Ray cluster at {address}: {error}", _HINT) from error


def run(
    arguments: Sequence[str],
    files: Sequence[File],
    shipped: Mapping[str, Sequence[Any] | None],
    version: str,
) -> Outcome:
    """One cell, on a node.

    Args:
        arguments: of ``audit``.
        files: what it reads.
        shipped: by path, pieces of each file in the object store; None where it was not put there.
        version: of the auditor that asks.

    Raises:
        RuntimeError: another version of the auditor is installed here.
    """
    import ray

    if version != __version__:
        raise RuntimeError(f"it has version {__version__} of the auditor, not {version}")
    context = ray.get_runtime_context()
    here = _name(platform.node(), context.get_node_id())
    if all(file.is_here() for file in files):
        return audit(arguments, here)
    if lacking := tuple(file.path for file in files if shipped[file.path] is None):
        return Outcome(0, None, "", here, 0.0, lacking)
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as folder:
        for file in files:
            copy = Path(folder + file.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with copy.open("wb") as target:
                for piece in shipped[file.path] or ():
                    ray.get(piece).tofile(target)
        moved = [folder + a if os.path.exists(folder + a) else a for a in arguments]
        outcome = audit(moved, here)
    if outcome.report is None:
        return replace(outcome, said=outcome.said.replace(folder, ""))
    # The report speaks of the files by the names that they have where the work list is.
    return replace(outcome, report=outcome.report.replace(f"{folder}/", "/"))


def _first(error: BaseException) -> str:
    """The first sentence of what an error says: Ray explains at length."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__).partition(". ")[0]


def _described(paths: Sequence[Path]) -> tuple[File, ...]:
    """All files of a cell: folders' contents, and what lies beside a model, too."""
    found: dict[str, File] = {}
    for path in paths:
        every = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        if path.suffix == ".onnx":
            every += _beside(path)
        for file in every:
            stat = file.stat()
            found[str(file)] = File(str(file), stat.st_size, stat.st_mtime_ns)
    return tuple(found.values())


def _beside(model: Path) -> tuple[Path, ...]:
    """The data files of a model; none where it is unusable, which its audit will say."""
    from auditor.graphs import model as models

    try:
        return models.external_files(model)
    except UsageError:
        return ()


def _name(host: str, id: str) -> str:
    """A node's name: several raylets may run on one host."""
    return f"{host} ({id[:6]})"


def _declared(resources: Mapping[str, float]) -> dict[str, float]:
    """Without what Ray declares of every node."""
    own = ("node:", "memory", "object_store_memory")
    return {name: value for name, value in resources.items() if not name.startswith(own)}


def _has(node: FleetNode, cell: Cell) -> bool:
    processors = node.resources.get("CPU", 0.0)
    return processors >= (cell.threads or 1) and all(
        node.resources.get(need, 0.0) >= 1 for need in cell.needs
    )
