"""Measures options on photographs: photographs beside each other, one thread each.

A photograph is read once and decoded once by each decoder, and its tensors are dropped before the
next one's: memory does not grow with their number. Where two options give the network the same
bits, it runs once.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from auditor import metrics, sensitivity
from auditor.pipeline.libraries import PhotoError
from auditor.pipeline.post import result
from auditor.pipeline.steps import Preparation
from auditor.tasks import TaskMeter

if TYPE_CHECKING:
    from auditor.pipeline.checkpoint import Cell, Cells, Checkpoint
    from auditor.pipeline.description import Pipeline
    from auditor.pipeline.networks import Forms, Networks
    from auditor.pipeline.photos import Photos
    from auditor.pipeline.post import Post
    from auditor.ports import Array, Arrays, Progress
    from auditor.records import OutputKind

BASE = "training"  # the trial that the others are compared with
_SHOWN_EVERY = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure on every photograph: a pipeline, forms in the network, what follows."""

    name: str
    pipeline: Pipeline
    forms: Forms = ()
    post: Post | None = None


class Table:
    """What was measured, as arrays ``[photographs, trials]``; a few bytes for each.

    Attributes:
        changed, relative_l2: see ``SysnoiseEffect``; NaN where not measured.
        top1: the class, -1 where there is none.
        refusals: by trial, how many photographs could not be processed, and the first reason.
        failed: by index, why a photograph could not be used at all.
    """

    def __init__(self, photos: int, names: Sequence[str]) -> None:
        self.columns = {name: i for i, name in enumerate(names)}
        shape = (photos, len(names))
        self.changed = np.full(shape, np.nan, np.float32)
        self.relative_l2 = np.full(shape, np.nan, np.float32)
        self.top1 = np.full(shape, -1, np.int32)
        self.refusals: dict[str, tuple[int, str]] = {}
        self.failed: dict[int, str] = {}

    def put(self, photo: int, cells: Cells) -> None:
        """Enter one photograph."""
        if isinstance(why := cells[BASE], str):
            self.failed[photo] = why
            return
        for name, column in self.columns.items():
            cell = cells[name]
            if isinstance(cell, str):
                count, first = self.refusals.get(name, (0, cell))
                self.refusals[name] = (count + 1, first)
                continue
            changed, relative, top1 = cell
            self.changed[photo, column] = np.nan if changed is None else changed
            self.relative_l2[photo, column] = np.nan if relative is None else relative
            self.top1[photo, column] = -1 if top1 is None else top1


class Sweep:
    """Runs trials over the photographs of a folder."""

    def __init__(
        self,
        photos: Photos,
        networks: Networks,
        read: tuple[str, OutputKind],
        checkpoint: Checkpoint,
        threads: int,
        progress: Progress,
    ) -> None:
        """Prepare.

        Args:
            photos: what to measure on.
            networks: the network and its forms.
            read: the output that is read, and as what.
            checkpoint: where measurements are kept.
            threads: how many photographs are processed beside each other.
            progress: told how many are done.
        """
        self._photos = photos
        self._networks = networks
        self._output, self._kind = read
        self._checkpoint = checkpoint
        self._threads = threads
        self._progress = progress
        self._stop = threading.Event()
        self.network_seconds = 0.0  # of all threads together
        self.runs = 0
        self._lock = threading.Lock()

    def run(self, trials: Sequence[Trial]) -> Table:
        """Measure; the first trial is the one that the others are compared with."""
        table = Table(len(self._photos.names), [trial.name for trial in trials])
        begun = time.perf_counter()
        shown = 0.0
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for done, (index, data, cells) in enumerate(self._all(pool, trials), 1):
                    table.put(index, cells)
                    if data is not None:
                        self._checkpoint.add(self._photos.names[index], data, cells)
                    now = time.perf_counter()
                    if now - shown > _SHOWN_EVERY:
                        shown = now
                        left = (now - begun) / done * (len(self._photos.names) - done)
                        self._progress.update(
                            "reference",
                            f"photograph {done} of {len(self._photos.names)}, "
                            f"{len(trials)} trials each, about {_duration(left)} left",
                        )
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return table

    def _all(
        self, pool: ThreadPoolExecutor, trials: Sequence[Trial]
    ) -> Iterator[tuple[int, bytes | None, Cells]]:
        """Every photograph as soon as it is done; few are under way at a time."""
        waiting = iter(range(len(self._photos.names)))
        under_way: set[Future[tuple[int, bytes | None, Cells]]] = set()
        while True:
            while len(under_way) < 2 * self._threads:
                index = next(waiting, None)
                if index is None:
                    break
                under_way.add(pool.submit(self._photo, index, trials))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    def _photo(self, index: int, trials: Sequence[Trial]) -> tuple[int, bytes | None, Cells]:
        """All trials on one photograph; its bytes where there is something new to keep."""
        name = self._photos.names[index]
        try:
            data = self._photos.read(name)
        except PhotoError as error:
            return index, None, {BASE: error.message}
        known = self._checkpoint.known(name, data)
        if all(trial.name in known for trial in trials) or isinstance(known.get(BASE), str):
            return index, None, known
        preparation = Preparation(data)
        cells: Cells = {}
        made: dict[tuple[Forms, bytes], Arrays] = {}
        expected: Arrays = {}
        for trial in trials:
            if self._stop.is_set():
                raise InterruptedError
            if trial.name in known and trial.name != BASE:
                cells[trial.name] = known[trial.name]
                continue
            try:
                values = self._outputs(preparation.tensor(trial.pipeline), trial.forms, made)
                if trial.post is not None:
                    values = result(values, trial.post)
            except PhotoError as error:
                cells[trial.name] = error.message
            except Exception as error:  # engines raise classes that share no base
                cells[trial.name] = sensitivity.reason(error)
            else:
                expected = expected or values
                cells[trial.name] = self._compared(values, expected)
            if not expected:
                break
        return index, data, cells

    def _outputs(
        self, tensor: Array, forms: Forms, made: dict[tuple[Forms, bytes], Arrays]
    ) -> Arrays:
        key = (forms, hashlib.blake2b(tensor.tobytes(), digest_size=16).digest())
        if key not in made:
            begun = time.perf_counter()
            made[key] = self._networks.run(forms, tensor)
            with self._lock:
                self.network_seconds += time.perf_counter() - begun
                self.runs += 1
        return made[key]

    def _compared(self, values: Arrays, expected: Arrays) -> Cell:
        value = values[self._output]
        rows = value.size // max(value.shape[-1:] or (1,))
        top1 = int(value.argmax()) if self._kind == "scores" and rows == 1 else None
        if values is expected:
            return (None if self._kind == "none" else 0.0), 0.0, top1
        relative = metrics.relative_l2(values, expected, tuple(expected))
        meter = TaskMeter(self._output, self._kind)
        meter.add(value, expected[self._output], 0)
        read = meter.result()
        changed: float | None = None
        if read is not None and self._kind == "mask":
            changed = 1 - (read.iou or 0.0)
        elif read is not None and self._kind == "embedding":
            changed = 1 - (read.cosine or 0.0)
        elif read is not None:
            changed = (read.changed or 0) / read.items if read.items else 0.0
        return changed, relative, top1


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min" if minutes > 2 else f"{60 * minutes + rest} s"
