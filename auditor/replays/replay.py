"""Runs the reference segment by segment: each segment is one unoptimised ORT session.

Measured to be bitwise equal to running the whole graph (checked again in every audit), and it
lets one segment be fed with a backend's own tensors, or rerun alone when only its inputs
changed.

Sessions have one thread each and segments run beside each other: a single layer is too little work
to share, and the reference's bits do not depend on how many cores there are.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from auditor.comparison.metrics import bitwise_equal
from auditor.errors import AuditError
from auditor.graphs import surgery
from auditor.graphs.segments import Cut, Graph
from auditor.ports import Array, Arrays
from auditor.processes import memory
from auditor.replays.sessions import one_line, session
from auditor.replays.turns import Turns

T = TypeVar("T")
R = TypeVar("R")

# Patches one segment's outputs: (outputs of the reference segment, its inputs) → outputs.
Patch = Callable[[Arrays, Arrays], Arrays]

# Bytes of weights that sessions are kept for; each holds its own, packed for the processor. What
# does not fit is compiled again when it is needed.
BUDGET = 2 << 30

# Bytes of tensors that walks beside each other may hold.
WALKING = 1 << 30

# So many go in step at most.
IN_STEP = 64

_LARGE = 64 << 20

# What numpy says of the types that ml_dtypes adds to it, such as bfloat16 (dtype.isbuiltin).
_REGISTERED = 2

# In networks of more segments than the first, runs of so many are also one session each, where
# nothing is patched: for small layers, handing tensors over costs more than the layers do. It is
# done up to so many bytes of weights, which these sessions hold once more.
_MANY, _IN_ONE, _LIGHT = 75, 16, 64 << 20


class ReplayError(AuditError):
    """The reference could not run a segment on the given tensors (a wrong shape, mostly).

    Attributes:
        inputs: the tensors that the segment reads.
    """

    def __init__(self, cut: Cut, what: str, error: Exception) -> None:
        """Say ``what`` could not be done with the segment, and why in ONNX Runtime's words."""
        super().__init__(f"segment {cut.id} cannot be {what}: {one_line(error)}")
        self.inputs = cut.inputs


def _element_type(value: Array) -> int:
    """ONNX element type of an array; texts are numpy's ``str``."""
    if value.dtype.kind == "U":
        return onnx.TensorProto.STRING
    return onnx.helper.np_dtype_to_tensor_dtype(value.dtype)


@dataclass(frozen=True, slots=True)
class Block:
    """Segments in a row, and one segment that holds all their nodes."""

    cuts: tuple[Cut, ...]
    merged: Cut


class Replayer:
    """The reference's segments, ready to run; sessions are made at first use and shared.

    Those used last are kept, as many as ``budget`` bytes of weights allow. Threads work on segments
    beside each other where all can be kept, else inside of one.

    Attributes:
        threads: intra-op threads of each session.
        held: bytes of weights that the sessions kept have.
    """

    def __init__(
        self,
        graph: Graph,
        threads: int,
        weights: Mapping[str, Array] | None = None,
        folder: Path | None = None,
        budget: int = BUDGET,
    ) -> None:
        """Make no session yet.

        Args:
            graph: the reference's graph.
            threads: how many threads may work.
            weights: the graph's detached weights.
            folder: where the files with these are.
            budget: bytes of weights that sessions are kept for.
        """
        self.graph = graph
        fits = graph.size(graph.initializers) <= budget
        self._keeps = fits
        self.threads = 1 if fits else threads
        self.weights = weights or {}
        self.folder = folder
        self.types: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._sessions: dict[tuple[object, ...], tuple[Any, int]] = {}  # the last used at the end
        self._lock = threading.Lock()  # of the sessions
        self._budget = budget
        self._workers = threads if fits else 1
        self._turns = threading.local()  # of the walk that a thread does in step with others
        self._live = 1  # bytes of tensors that a walk holds at once
        self.held = 0

    def model(self, cut: Cut, values: Mapping[str, Array]) -> onnx.ModelProto:
        """A segment as a stand-alone model for ``values``; it must have been run before.

        Large weights stay in their files (``weights``, ``folder``).
        """
        return self.graph.extract(cut, self.types, self._shapes(cut, values), {})

    def run(self, cut: Cut, values: Mapping[str, Array]) -> Arrays:
        """Run one segment on ``values`` (at least its inputs) and return its outputs.

        A runtime may keep a tensor in more bits than the model says (ONNX Runtime has few float16
        kernels for CPUs): it is fed rounded to the model's type.

        Raises:
            ReplayError: ONNX Runtime refused the segment or the values.
        """
        if turns := getattr(self._turns, "taken", None):
            turns.wait(cut.nodes[-1])
        feeds = {name: self.typed(name, values[name]) for name in cut.inputs}
        try:
            found = dict(zip(cut.outputs, self._session(cut, feeds).run(None, feeds), strict=True))
        except Exception as error:  # ORT raises a family of classes that share no base
            raise ReplayError(cut, "replayed", error) from error
        for name, value in found.items():
            if name not in self.types and hasattr(value, "dtype"):
                self.types[name] = _element_type(value)
        return found

    def run_changed(
        self,
        cut: Cut,
        model: onnx.ModelProto,
        values: Mapping[str, Array],
        replayed: Arrays,
        change: Callable[[onnx.ModelProto], onnx.ModelProto | None],
        opset: int,
        how: str,
    ) -> Arrays:
        """Run one segment rewritten by ``change``; ``replayed`` where that changes nothing.

        Args:
            cut: the segment.
            model: the same as a stand-alone model, which stays as it is.
            values: its inputs.
            replayed: what it computes from them as written, to check a change of opset by.
            change: rewrites a copy of the segment; None where there is nothing to rewrite.
            opset: from which on ``change`` works.
            how: what is said to have been tried where it cannot be run.

        Raises:
            ReplayError: ONNX Runtime refused the rewritten segment.
        """
        candidates = [model] if surgery.opset(model) >= opset else surgery.upgraded(model, opset)
        feeds = {name: values[name] for name in cut.inputs}

        def run(variant: onnx.ModelProto) -> Arrays:
            results = session(variant, self.threads, self.folder).run(None, feeds)
            return dict(zip(cut.outputs, results, strict=True))

        refused: Exception | None = None
        for candidate in candidates:
            try:
                changed = change(candidate)
                if changed is None:
                    return replayed
                if candidate is model or bitwise_equal(run(candidate), replayed):
                    return run(changed)
            except Exception as error:  # ORT raises a family of classes that share no base
                refused = error  # what a conversion made: another may do
        if refused is not None:
            raise ReplayError(cut, how, refused) from refused
        return replayed

    def beside(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Do ``work`` on each item, a few at a time on several threads; yields results in order.

        As many as tensors of as many walks may be held at once (``WALKING``).
        """
        workers = max(1, min(self._workers, WALKING // self._live))
        if workers == 1:
            yield from map(work, items)
            return
        ahead: deque[Future[R]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for item in items:
                    ahead.append(pool.submit(work, item))
                    if len(ahead) > workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def walking(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Do ``work`` on each item, one walk each, in step; yields results in order.

        Where not all sessions can be kept, as many walks as may be held at once go in step.
        """
        if self._keeps:
            yield from self.beside(work, items)
            return
        items = iter(items)
        while batch := list(islice(items, max(1, min(IN_STEP, WALKING // self._live)))):
            turns = Turns(len(batch))

            def walk(item: T, turns: Turns = turns) -> R:
                self._turns.taken = turns
                try:
                    return work(item)
                finally:
                    self._turns.taken = None
                    turns.leave()

            with ThreadPoolExecutor(len(batch)) as pool:
                try:
                    yield from pool.map(walk, batch)
                finally:
                    turns.end()

    def walk(
        self,
        cuts: Sequence[Cut],
        feeds: Arrays,
        base: Arrays | None = None,
        patches: Mapping[str, Patch] | None = None,
        wanted: Collection[str] | None = None,
        blocks: Mapping[str, Block] | None = None,
    ) -> Arrays:
        """Evaluate segments in order, rerunning only what differs from ``base``.

        Args:
            cuts: all segments of one cut of the graph, in topological order.
            feeds: the stimulus.
            base: tensors of an earlier walk; a segment whose inputs are all those very arrays
                keeps its outputs. None runs everything.
            patches: by segment id, what replaces the segment's own outputs.
            wanted: which tensors to return, so that others need not be held; None for all.
            blocks: runs of segments that may be run as one (``blocks``); only with ``wanted``.

        Returns:
            The tensors of the walk, the stimulus included, by ONNX name.
        """
        values: Arrays = dict(base) if base else {}
        values.update(feeds)
        patches = patches or {}
        cuts = _in_blocks(cuts, patches, blocks) if blocks else cuts
        last = _last_reads(cuts)
        for cut in cuts:
            patch = patches.get(cut.id)
            unchanged = base is not None and all(
                values[name] is base.get(name, feeds.get(name)) for name in cut.inputs
            )
            if unchanged and patch is None:
                continue
            outputs = (
                {name: values[name] for name in cut.outputs} if unchanged else self.run(cut, values)
            )
            if patch is not None:
                outputs = patch(outputs, {name: values[name] for name in cut.inputs})
            values.update(outputs)
            if wanted is not None:
                for name in (*cut.inputs, *cut.outputs):
                    if last.get(name, cut.id) == cut.id and name not in wanted:
                        del values[name]
        if base is None and wanted is None:
            self._live = max(self._live, _most_held(cuts, values, last))
        return values if wanted is None else {n: v for n, v in values.items() if n in wanted}

    def blocks(
        self, cuts: Sequence[Cut], base: Arrays, outputs: Collection[str]
    ) -> dict[str, Block]:
        """Runs of segments that are quicker as one, by their first segment's id.

        Those that give the very bits of ``base``; none in networks of few segments or large ones.

        Args:
            cuts: all segments of one cut of the graph, in topological order.
            base: the reference's tensors.
            outputs: the tensors that walks return.
        """
        if len(cuts) <= _MANY or self.graph.size(self.graph.initializers) > _LIGHT:
            return {}
        found: dict[str, Block] = {}
        order = {cut.id: position for position, cut in enumerate(cuts)}
        last = {name: order[id] for name, id in _last_reads(cuts).items()}
        for start in range(0, len(cuts), _IN_ONE):
            part = tuple(cuts[start : start + _IN_ONE])
            made = [name for cut in part for name in cut.outputs]
            reads = dict.fromkeys(name for cut in part for name in cut.inputs)
            end = start + len(part)
            merged = Cut(
                f"{part[0].id}–{part[-1].id}",
                tuple(sorted({i for cut in part for i in cut.nodes})),
                tuple(sorted({i for cut in part for i in cut.constants})),
                tuple(name for name in reads if name not in made),
                tuple(n for n in made if last.get(n, 0) >= end or n in outputs),
            )
            with contextlib.suppress(ReplayError):
                same = self.run(merged, base)
                if merged.outputs and bitwise_equal(same, {n: base[n] for n in same}):
                    found[part[0].id] = Block(part, merged)
        return found

    def stream(self, feeds: Arrays) -> Arrays:
        """Final outputs of the whole graph, run node by node; nothing is kept that is read no more.

        Raises:
            ReplayError: ONNX Runtime refused a node or the values.
        """
        cuts = self.graph.cut(self.graph.producer)
        last = _last_reads(cuts) | dict.fromkeys(self.graph.outputs, "")
        values = dict(feeds)
        for cut in cuts:
            values |= self.run(cut, values)
            for name in (*cut.inputs, *cut.outputs):
                if last.get(name) in (None, cut.id):
                    values.pop(name, None)
        return {name: values[name] for name in self.graph.outputs if name in values}

    def typed(self, name: str, value: Array) -> Array:
        """A backend's tensor in the model's type; as it is where that would change its numbers.

        TVM's mask of a Dropout, for one, is of floats.
        """
        kind = self.types.get(name)
        if kind is None:
            return value
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        if value.dtype != dtype and value.dtype.isbuiltin == _REGISTERED:
            value = value.astype(np.float32)
        if value.dtype == dtype or not {value.dtype.kind, dtype.kind} <= set("fiub"):
            return value
        kinds = value.dtype.kind + dtype.kind
        with np.errstate(over="ignore", invalid="ignore"):
            typed = value.astype(dtype)
        alike = kinds in ("ff", "ii", "iu", "ui", "uu")
        return typed if alike or np.array_equal(typed, value) else value

    def _session(self, cut: Cut, feeds: Arrays) -> Any:
        with self._lock:
            return self._session_of(cut, feeds)

    def _session_of(self, cut: Cut, feeds: Arrays) -> Any:
        for name, value in feeds.items():
            if name not in self.types:
                self.types[name] = _element_type(value)
            self.shapes.setdefault(name, value.shape)
        shapes = self._shapes(cut, feeds)
        key = (cut.nodes, cut.inputs, cut.outputs, shapes is None)
        made = self._sessions.pop(key, None)
        if made is None:
            size = self.graph.size(
                {n for i in (*cut.nodes, *cut.constants) for n in self.graph.reads[i]}
            )
            self._make_room(size)
            model = self.graph.extract(cut, self.types, shapes, {})
            made = session(model, self.threads, self.folder), size
            self.held += size
        self._sessions[key] = made
        return made[0]

    def release(self) -> None:
        """Give up every session, until it is needed again."""
        with self._lock:
            self._sessions.clear()
            self.held = 0

    def _make_room(self, size: int) -> None:
        """Give up the sessions that were not used for longest, until ``size`` more bytes fit."""
        dropped = 0
        while self._sessions and self.held + size > self._budget:
            _, held = self._sessions.pop(next(iter(self._sessions)))
            self.held -= held
            dropped += held
        if dropped > _LARGE:
            memory.give_back()

    def _shapes(self, cut: Cut, values: Mapping[str, Array]) -> Mapping[str, Sequence[int]] | None:
        """Shapes to declare: none where a backend's tensor has another than the reference's."""
        expected = all(values[name].shape == self.shapes[name] for name in cut.inputs)
        return self.shapes if expected else None


def _in_blocks(
    cuts: Sequence[Cut], patched: Container[str], blocks: Mapping[str, Block]
) -> list[Cut]:
    """The segments of a walk, with each block that holds no patched segment as one segment."""
    steps: list[Cut] = []
    position = 0
    while position < len(cuts):
        block = blocks.get(cuts[position].id)
        if block is None or any(cut.id in patched for cut in block.cuts):
            steps.append(cuts[position])
            position += 1
        else:
            steps.append(block.merged)
            position += len(block.cuts)
    return steps


def _last_reads(cuts: Sequence[Cut]) -> dict[str, str]:
    """The id of the last segment that reads each tensor."""
    return {name: cut.id for cut in cuts for name in cut.inputs}


def _most_held(cuts: Sequence[Cut], values: Arrays, last: Mapping[str, str]) -> int:
    """The most bytes of tensors that are still to be read at any time of a walk."""
    made = {name for cut in cuts for name in cut.outputs}
    most = held = sum(values[name].nbytes for name in last.keys() - made)
    for cut in cuts:
        held += sum(values[name].nbytes for name in cut.outputs)
        most = max(most, held)
        done = {n for n in (*cut.inputs, *cut.outputs) if last.get(n, cut.id) == cut.id}
        held -= sum(values[name].nbytes for name in done)
    return most


def add(outputs: Arrays, error: Arrays, observed: Arrays) -> Arrays:
    """A segment's outputs with a frozen error added, in the outputs' own types.

    Where an error cannot be added (another shape, a type that is not floating point, a
    non-finite value), the observed value takes the place; and where it is the error of that very
    output, as a sum would lose what is small beside it (a mask of -1e4 in place of -3.4e38).
    """
    result: Arrays = {}
    for name, value in outputs.items():
        delta = error.get(name)
        if delta is None:
            result[name] = value
        elif delta.shape != value.shape:
            result[name] = observed[name]
        elif value.dtype.kind != "f":
            result[name] = np.where(delta != 0, observed[name].astype(value.dtype), value)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                seen = observed[name].astype(value.dtype, copy=False)
                total = (value + delta).astype(value.dtype, copy=False)
                replaced = ~np.isfinite(delta) | (seen - delta == value)
            result[name] = np.where(replaced, seen, total)
    return result


def difference(observed: Arrays, reference: Arrays) -> Arrays:
    """``observed − reference`` per tensor, as floats; the observed tensor where shapes differ."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            name: _minus(observed[name], value)
            if observed[name].shape == value.shape
            else observed[name]
            for name, value in reference.items()
        }


def _minus(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f" and b.dtype.kind == "f":
        return (
            a.astype(b.dtype, copy=False) - b
            if b.dtype != np.float16
            else a.astype(np.float32) - b.astype(np.float32)
        )
    return a.astype(np.float64) - b.astype(np.float64)
