"""Measures options on photographs: photographs beside each other, one thread each.

A photograph is read once and decoded once by each decoder, and its tensors are dropped before the
next one's: memory does not grow with their number. Where two options give the network the same
bits, it runs once.
"""

from __future__ import annotations

import hashlib
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from auditor import sensitivity
from auditor.comparison import metrics
from auditor.comparison.tasks import TaskMeter
from auditor.pipeline.postprocessing.results import NAME, result, text
from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.pipeline.preprocessing.stages import Placement
from auditor.pipeline.preprocessing.steps import FirstAndLatest, Preparation, normalised
from auditor.pipeline.scoring import Case, Gallery

if TYPE_CHECKING:
    from auditor.pipeline.photos import Photos
    from auditor.pipeline.postprocessing.post import Post
    from auditor.pipeline.preprocessing.stages import Pipeline
    from auditor.pipeline.scoring import Task, Verdict
    from auditor.pipeline.sysnoise.checkpoint import Cells, Checkpoint, Measured
    from auditor.pipeline.sysnoise.networks import Forms, Networks
    from auditor.ports import Array, Arrays, Progress
    from auditor.records.terms import OutputKind

# Outputs of one photograph: dense ones are large.
_Made = FirstAndLatest[object, "Arrays"]

BASE = "training"  # the trial that the others are compared with
_SHOWN_EVERY = 0.5  # seconds
_KEPT = 32 << 20  # bytes of outputs of one photograph
_INPUTS = 8  # of one photograph


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure on every photograph: a pipeline, forms in the network, what follows."""

    name: str
    pipeline: Pipeline
    forms: Forms = ()
    post: Post | None = None


class Verdicts:
    """What a label says of one trial's result, by photograph, packed."""

    def __init__(self) -> None:
        """Hold none."""
        self.photos = array("q")
        self._numbers = array("d")
        self._ends = array("q")

    def put(self, photo: int, verdict: Verdict) -> None:
        """Enter one photograph."""
        self.photos.append(photo)
        self._numbers.extend(verdict)
        self._ends.append(len(self._numbers))

    def get(self) -> dict[int, Verdict]:
        """The verdicts by photograph, in their order."""
        begins = [0, *self._ends[:-1]]
        every = zip(self.photos, begins, self._ends, strict=True)
        return {photo: self._numbers[b:e].tolist() for photo, b, e in sorted(every)}


class Table:
    """What was measured, as arrays ``[photographs, trials]``; a few bytes for each.

    Attributes:
        changed, relative_l2: see ``SysnoiseEffect``; NaN where not measured.
        top1: the class, -1 where there is none.
        texts: by photograph and column, the text, for the first trial and where it differs.
        verdicts: by trial, what the labels say; of detections a few dozen bytes each.
        refusals: by trial, how many photographs could not be processed, and the first reason.
        failed: by index, why a photograph could not be used at all.
    """

    def __init__(self, photos: int, names: Sequence[str]) -> None:
        self.columns = {name: i for i, name in enumerate(names)}
        shape = (photos, len(names))
        self.changed = np.full(shape, np.nan, np.float32)
        self.relative_l2 = np.full(shape, np.nan, np.float32)
        self.top1 = np.full(shape, -1, np.int32)
        self.texts: dict[tuple[int, int], str] = {}
        self.verdicts = {name: Verdicts() for name in names}
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
            changed, relative, answer, verdict = cell
            self.changed[photo, column] = np.nan if changed is None else changed
            self.relative_l2[photo, column] = np.nan if relative is None else relative
            if isinstance(answer, str):
                if column == 0 or answer != self.texts.get((photo, 0)):
                    self.texts[photo, column] = answer
            else:
                self.top1[photo, column] = -1 if answer is None else answer
            if verdict is not None:
                self.verdicts[name].put(photo, verdict)


@dataclass(frozen=True, slots=True)
class Read:
    """How a result is read.

    Attributes:
        output: its name among the outputs.
        kind: as what.
        classes: whether a mask holds class numbers, not only 0 and 1.
        task: how labels judge it; None where they do not.
        characters: of the classes of a text.
    """

    output: str
    kind: OutputKind
    task: Task | None = None
    characters: tuple[str, ...] = ()
    classes: bool = False


class Sweep:
    """Runs trials over the photographs of a folder."""

    def __init__(
        self,
        photos: Photos,
        networks: Networks,
        read: Read,
        checkpoint: Checkpoint,
        threads: int,
        progress: Progress,
    ) -> None:
        """Prepare.

        Args:
            photos: what to measure on.
            networks: the network and its forms.
            read: which output is read, as what, and how labels judge it.
            checkpoint: where measurements are kept.
            threads: how many photographs are processed beside each other.
            progress: told how many are done.
        """
        self._photos = photos
        self._networks = networks
        self._read = read
        self._gallery: Gallery | None = None
        self._checkpoint = checkpoint
        self._threads = threads
        self._progress = progress
        self._stop = threading.Event()
        self.network_seconds = 0.0  # of all threads together
        self.runs: Counter[Forms] = Counter()
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

    def collect(self, base: Trial) -> None:
        """Make the gallery that a task may need: the labelled photographs after ``base``.

        Holds one vector of each.
        """
        from auditor.pipeline.tasks.embed import unit

        labels = self._photos.labels
        names = [name for name in self._photos.names if name in labels]

        def vector(name: str) -> Array | None:
            if self._stop.is_set():
                raise InterruptedError
            try:
                tensor = Preparation(self._photos.read(name)).tensor(base.pipeline)
                values = self._networks.run(base.forms, tensor)
                if base.post is not None:
                    values = result(values, base.post)
            except Exception:  # the sweep meets it again, and names the photograph
                return None
            return unit(values[self._read.output])

        self._progress.update("reference", f"gallery of {len(names)} photographs")
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                found = dict(zip(names, pool.map(vector, names), strict=True))
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        length = next((v.size for v in found.values() if v is not None), 0)
        kept = {n: v for n, v in found.items() if v is not None and v.size == length}
        if kept:
            self._gallery = Gallery(
                np.stack(list(kept.values())), tuple(kept), tuple(labels[n] for n in kept)
            )

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
        stamp = data + repr(self._photos.labels.get(name)).encode()
        known = self._checkpoint.known(name, stamp)
        if all(trial.name in known for trial in trials) or isinstance(known.get(BASE), str):
            return index, None, known
        inputs = _Inputs(Preparation(data))
        cells: Cells = {}
        made = _Made(_KEPT, _size)
        judged: dict[object, Measured] = {}
        expected: Arrays = {}
        for trial in trials:
            if self._stop.is_set():
                raise InterruptedError
            if trial.name in known and trial.name != BASE:
                cells[trial.name] = known[trial.name]
                continue
            try:
                fed = inputs.get(trial.pipeline)
                place = fed.place
                key = trial.forms, fed.key
                whole = key, trial.post, place
                if whole in judged:
                    cells[trial.name] = judged[whole]
                    continue
                values = self._outputs(key, fed, trial, made)
                if trial.post is not None:
                    values = result(values, trial.post, place)
                    if trial.post.kind == "mask" and trial.post.resize != "none":
                        place = Placement((1.0, 1.0), (0.0, 0.0), place.photo, place.photo)
                case = self._case(name, place)
                judged[whole] = self._compared(values, expected or values, case)
                cells[trial.name] = judged[whole]
                expected = expected or values
            except PhotoError as error:
                cells[trial.name] = error.message
            except Exception as error:  # engines raise classes that share no base
                cells[trial.name] = sensitivity.reason(error)
            if not expected:
                break
        return index, stamp, cells

    def _outputs(self, key: object, fed: _Input, trial: Trial, made: _Made) -> Arrays:
        """What the network gives, run once for each input with the same bits."""
        if (known := made.get(key)) is not None:
            return known
        tensor = fed.tensor(trial.pipeline)
        begun = time.perf_counter()
        values = self._networks.run(trial.forms, tensor)
        with self._lock:
            self.network_seconds += time.perf_counter() - begun
            self.runs[trial.forms] += 1
        made.put(key, values)
        return values

    def _case(self, name: str, place: Placement) -> Case | None:
        if self._read.task is None or name not in self._photos.labels:
            return None
        label = self._photos.labels[name]
        return Case(name, label, place, self._gallery, self._read.characters)

    def _compared(self, values: Arrays, expected: Arrays, case: Case | None) -> Measured:
        value = values[self._read.output]
        answer = self._answer(value)
        verdict = self._read.task.judge(value, case) if case and self._read.task else None
        if values is expected:
            return (None if self._read.kind == "none" else 0.0), 0.0, answer, verdict
        if self._read.kind == "boxes" and self._read.output == NAME:
            values, expected = _either(values, expected)
            value = values[NAME]
        relative = metrics.relative_l2(values, expected, tuple(expected))
        return self._changed(value, expected[self._read.output]), relative, answer, verdict

    def _answer(self, value: Array) -> int | str | None:
        """The class or the text, where a photograph has one."""
        if self._read.kind == "text":
            return text(value, self._read.characters)
        rows = value.size // max(value.shape[-1:] or (1,))
        return int(value.argmax()) if self._read.kind == "scores" and rows == 1 else None

    def _changed(self, value: Array, expected: Array) -> float | None:
        kind = self._read.kind
        if kind == "text":
            return float(not np.array_equal(value, expected))
        if self._read.classes:
            return 1 - _overlap(value, expected)
        meter = TaskMeter(self._read.output, kind)
        meter.add(value, expected, 0)
        read = meter.result()
        if read is None:
            return None
        if kind == "mask":
            return 1 - (read.iou or 0.0)
        if kind == "embedding":
            return 1 - (read.cosine or 0.0)
        return (read.changed or 0) / read.items if read.items else 0.0


class _Input:
    """What one pipeline makes of one photograph.

    Attributes:
        key: equal where every bit of two tensors is.
        place: where in the photograph it is.
    """

    def __init__(self, pixels: Array, place: Placement, pipeline: Pipeline) -> None:
        p = pipeline
        line = p.channels, p.scale, p.mean, p.std, p.layout, p.dtype
        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
        self.key: object = (line, pixels.shape, digest)
        self.place = place
        self._pixels = pixels
        self._tensor: Array | None = None

    def tensor(self, pipeline: Pipeline) -> Array:
        """The tensor; made when it is first asked for."""
        if self._tensor is None:
            self._tensor = normalised(self._pixels, pipeline)
        return self._tensor


class _Inputs:
    """Inputs of one photograph: many trials share one."""

    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation
        self._kept: FirstAndLatest[Pipeline, _Input] = FirstAndLatest(_INPUTS)

    def get(self, pipeline: Pipeline) -> _Input:
        """Raises as ``Preparation.pixels`` does."""
        if (known := self._kept.get(pipeline)) is not None:
            return known
        pixels = self._preparation.pixels(pipeline)
        made = _Input(pixels, self._preparation.place(pipeline), pipeline)
        self._kept.put(pipeline, made)
        return made


def _either(values: Arrays, expected: Arrays) -> tuple[Arrays, Arrays]:
    """Two results of boxes without the candidates that are a detection in neither: most are."""
    mine, theirs = values[NAME], expected[NAME]
    if mine.shape != theirs.shape:
        return values, expected
    kept = mine[0].any(axis=1) | theirs[0].any(axis=1)
    kept[:1] = True  # never empty
    return {NAME: mine[:, kept]}, {NAME: theirs[:, kept]}


def _size(values: Arrays) -> int:
    return sum(value.nbytes for value in values.values())


def _overlap(value: Array, expected: Array) -> float:
    """Mean IoU of the classes that either of two masks has."""
    if value.shape != expected.shape:
        return 0.0
    pairs = [(value == c, expected == c) for c in np.union1d(value, expected)]
    return float(np.mean([np.sum(a & b) / np.sum(a | b) for a, b in pairs]))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min" if minutes > 2 else f"{60 * minutes + rest} s"
