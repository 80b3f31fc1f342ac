"""The introduced error that rounding alone can make: nothing below it is blamed on a segment."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from auditor.comparison import metrics
from auditor.comparison.metrics import Moments
from auditor.decomposition.divergence import Local
from auditor.graphs import surgery
from auditor.graphs.segments import Cut
from auditor.noises import fp32_rounding
from auditor.ports import Arrays
from auditor.replays import decisions, functions, positions, quantised, reorder, rounding
from auditor.replays.replay import Replayer, ReplayError
from auditor.replays.sessions import session
from auditor.replays.widening import own_types
from auditor.replays.writer import FP16, OPSET_OF_SUMS, Format

# Operators that draw numbers.
_RANDOM = ("Random", "Multinomial", "Bernoulli", "Dropout")
# A runtime may round to the model's narrow types at other places than every operator's result.
OWN_TYPES_FACTOR = 2.0
OWN_TYPES_LIMIT = 8.0  # half units in the last place
# Elements that move further, of their root mean square, when positions do are decided by them; of
# the others so many must be as far off, and such a part.
_DECIDED, _OTHERS, _PART = 1e-3, 16, 0.02
_UNITS = 4.0  # last bits by which two ways to compute a position may differ
# So that a floor that is the error itself is not below it where that is added up otherwise.
_ABOVE = 1 + 1e-6
# Additions up to which sums are added up one after another: a second's work, and 2 GB at worst.
STEPS = 5e8
# Adding up one after another holds every product: one segment at a time.
_SUMMING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Floor:
    """Introduced errors, relative L2.

    Attributes:
        total: below it nothing is blamed on the segment.
        single: the part of it that holds where nothing is kept in less than float32.
        own: the narrow format whose rounding does what is between the two, if any.
    """

    total: float
    single: float
    own: Format | None = None

    @classmethod
    def only(cls, error: float) -> Floor:
        """One that no narrow format is part of."""
        return cls(error, error)


def floor(
    replayer: Replayer,
    cut: Cut,
    local: Local,
    apart: Mapping[str, Moments],
    again: Arrays | None = None,
    own: Format | None = None,
) -> Floor:
    """The introduced error, relative L2, below which nothing is blamed on this segment.

    It is the largest of these:

    - What float32 rounding can do, by replays in which one thing is rounded otherwise: the inputs'
      last bits (comparisons and their like are still made on the inputs as they were observed),
      the order of every sum, the last bits of the positions of interpolations, and exponentials.
    - What rounding to the model's own narrow types does. Where that is far more than a few
      roundings, it is not part of the floor: then it is worth a word.
    - How far two runs of the program are apart, where it does not repeat its own bits.

    Three kinds of segments are judged otherwise. Between integers, booleans and texts rounding does
    nothing: a sum that overflows in one order only is an error. Where computed positions decide
    which element is read, as in a Resize of integers, rounding moves single elements far: the
    others have a floor of their own. And where only values in the middle between two 8-bit steps
    went to the other side, the whole error is rounding.

    Args:
        replayer: runs the reference's segments.
        cut: the segment.
        local: its divergence on one sample.
        apart: how far the backend's tensors are from the reference's, whose norms the error is
            relative to.
        again: a second capture, where the program does not repeat its own bits.
        own: the narrow format that the model gives the segment's outputs, if any.
    """
    model = replayer.model(cut, local.inputs)
    moved = _Moved(replayer, cut, model, local, apart)
    repeat = 2 * moved.distance({n: again[n] for n in cut.outputs}, local.observed) if again else 0
    if surgery.is_exact(model):
        return Floor.only(repeat)
    if moved.draws():
        least = max(fp32_rounding.floor(0.0), repeat)
        if any(node.op_type == "Dropout" for node in model.graph.node):
            return Floor.only(least)  # that it drops at all has a name (export.training_mode)
        # No two runs of it are alike: nothing can be told by its numbers, nor their count.
        if any(v.shape != local.replayed[n].shape for n, v in local.observed.items()):
            return Floor.only(math.inf)
        off = moved.distance(local.observed, local.replayed)
        return Floor.only(max(least, off * _ABOVE))
    jitter = moved.jittered()
    terms = reorder.longest_sum(model.graph.node, surgery.shapes(model))
    # As the model has them: a backend may show what it computed in float32 as that.
    wide = double(map(helper.tensor_dtype_to_np_dtype, surgery.types(model).values()))
    single = fp32_rounding.floor(
        jitter,
        moved.reordered(),
        terms,
        double=wide,
        exact=max(0.0 if wide else moved.evaluated_exactly(), moved.repositioned()),
    )
    single = max(single, repeat)
    narrow = moved.in_own_types(own) if own else 0.0
    # Float16 that a backend hands over where the model has float32 is no type of the model's own.
    if any(value.dtype == np.float16 for value in local.replayed.values()):
        own, narrow = own or FP16, max(narrow, fp32_rounding.SMALLEST_HALF)
    found = max(single, narrow)
    introduced = moved.distance(local.observed, local.replayed)
    if found < introduced <= fp32_rounding.furthest(jitter, terms) and moved.quick(terms):
        in_order = fp32_rounding.floor(jitter, moved.summed_in_order(), terms, double=wide)
        single, found = max(single, in_order), max(found, in_order)
    if _DECIDED < introduced <= found and moved.places() and moved.undecided() > _DECIDED:
        return Floor.only(_DECIDED)
    if found < introduced and (sided := moved.sided(terms)) is not None:
        near = moved.distance(local.observed, sided) <= found
        return Floor.only(introduced * _ABOVE if near else found)
    return Floor(found, single, own)


def double(kinds: Iterable[np.dtype[Any]]) -> bool:
    """Whether tensors of these types are float64 as far as they are real numbers."""
    real = {kind for kind in kinds if kind.kind not in "biuOUS"}
    return real == {np.dtype(np.float64)}


def draws(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether any of the nodes may draw random numbers."""
    return any(node.op_type.startswith(_RANDOM) for node in nodes)


@dataclass(frozen=True, slots=True)
class _Moved:
    """How far each kind of rounding moves a segment's outputs.

    Each is a relative L2; 0 where the segment cannot be run that way.

    Attributes:
        replayer, cut, local, apart: as ``floor`` has them.
        model: the segment as a stand-alone model.
    """

    replayer: Replayer
    cut: Cut
    model: onnx.ModelProto
    local: Local
    apart: Mapping[str, Moments]

    def draws(self) -> bool:
        """Whether the segment draws random numbers: it does not repeat its own outputs."""
        nodes = (self.replayer.graph.nodes[i] for i in self.cut.nodes)
        return draws(nodes) and not metrics.bitwise_equal(
            self.replayer.run(self.cut, self.local.inputs), self.local.replayed
        )

    def jittered(self) -> float:
        """How far the inputs' last bits move the outputs, where no decision on them turns."""
        generator = np.random.default_rng(0)
        inputs = self.local.inputs
        nodes = (self.replayer.graph.nodes[i] for i in self.cut.nodes)
        boxes = {n.input[1] for n in nodes if n.op_type == "RoiAlign"} & inputs.keys()
        moved_boxes = {n: fp32_rounding.shifted(inputs[n]) for n in boxes}
        jittered = {n: fp32_rounding.jitter(v, generator) for n, v in inputs.items()} | moved_boxes
        moved = self._by(lambda: self._decided(jittered))
        if any(value.dtype.kind != "f" for value in self.local.replayed.values()):
            # What is counted in steps: moving all of them alike moves many over the edge.
            return moved
        scaled = {n: fp32_rounding.scaled(v) for n, v in inputs.items()} | moved_boxes
        return max(moved, self._by(lambda: self._decided(scaled)))

    def reordered(self) -> float:
        """How far adding up sums in another order moves the outputs."""
        return self._by(lambda: self._changed(reorder.reordered, reorder.OPSET, "reordered"))

    def repositioned(self) -> float:
        """How far the last bits of interpolated positions move the outputs."""
        return self._by(lambda: self._changed(positions.moved, positions.OPSET, "repositioned"))

    def places(self) -> bool:
        """Whether elements are read at computed positions."""
        nodes = (self.replayer.graph.nodes[i] for i in self.cut.nodes)
        return any(node.op_type in positions.PLACING for node in nodes)

    def undecided(self) -> float:
        """The error in elements that no rounding of a position moves far; 0 where few are off."""
        local, tries, total = self.local, list[Arrays](), 0.0
        modes = ("nearest", "linear", "cubic")
        changes = [functools.partial(positions.nudged, up=up) for up in (1, -1)]
        for units in (_UNITS, 1, -1, -_UNITS):
            changes.append(functools.partial(positions.moved, units=units, modes=modes))
            step = np.float32(1 + units * np.finfo(np.float32).eps)
            real = {n: v for n, v in local.inputs.items() if v.dtype == np.float32}
            with contextlib.suppress(ReplayError), np.errstate(over="ignore"):
                nearby = {n: v * step for n, v in real.items()}
                tries.append(self.replayer.run(self.cut, local.inputs | nearby))
        for change in changes:
            with contextlib.suppress(ReplayError):
                tries.append(self._changed(change, positions.OPSET, "with positions moved"))
        for name, value in local.replayed.items():
            plain, observed = metrics.to_float(value), metrics.to_float(local.observed[name])
            if plain.shape != observed.shape:
                continue
            limit = _DECIDED * math.sqrt(metrics.square_sum(plain) / max(1, plain.size))
            limit = limit if value.dtype.kind == "f" else 0.0
            near = np.ones(plain.shape, bool)
            for other in (t for t in tries if t[name].shape == value.shape):
                near &= abs(metrics.to_float(other[name]) - plain) <= limit
            off = near & (abs(observed - plain) > limit)
            if np.count_nonzero(off) >= max(_OTHERS, _PART * np.count_nonzero(near)):
                moments = Moments()
                moments.add(np.where(off, local.observed[name], value), value)
                total += moments.relative_to(self.apart[name])
        return math.sqrt(total / len(local.replayed))

    def evaluated_exactly(self) -> float:
        """How far exponentials and their like in double precision move the outputs."""
        return self._by(
            lambda: self._changed(functions.exact, functions.OPSET, "evaluated exactly")
        )

    def summed_in_order(self) -> float:
        """How far adding up products one after another moves the outputs."""
        with _SUMMING:
            return self._by(
                lambda: self._changed(rounding.in_order, OPSET_OF_SUMS, "summed in order")
            )

    def quick(self, terms: int) -> bool:
        """Whether sums of ``terms`` can be added up one after another in a second or so."""
        return terms * max(value.size for value in self.local.replayed.values()) <= STEPS

    def in_own_types(self, own: Format) -> float:
        """How far a few roundings to the model's own narrow type may move the outputs."""
        half_unit = 2.0**-own.bits  # what one rounding does at most
        moved = self._by(lambda: self._in_own_types(own))
        return max(half_unit, min(OWN_TYPES_FACTOR * moved, OWN_TYPES_LIMIT * half_unit))

    def sided(self, terms: int) -> Arrays | None:
        """The outputs in which values between two 8-bit steps fall on the backend's side."""
        observed = self.local.observed
        try:
            return self._changed(
                lambda model: quantised.either_side(model, observed, terms),
                quantised.OPSET,
                "rounded",
            )
        except ReplayError:
            return None

    def distance(self, a: Arrays, b: Arrays) -> float:
        """Root mean square of the outputs' distances, of which infinite ones count as 0."""
        total = 0.0
        for name, value in b.items():
            moments = Moments()
            moments.add(a[name], value)
            if 0 < moments.error < math.inf:
                total += moments.relative_to(self.apart[name])
        return math.sqrt(total / len(b))

    def _by(self, run: Callable[[], Arrays]) -> float:
        try:
            return self.distance(run(), self.local.replayed)
        except ReplayError:
            return 0.0

    def _changed(
        self,
        change: Callable[[onnx.ModelProto], onnx.ModelProto | None],
        opset: int,
        how: str,
    ) -> Arrays:
        inputs, replayed = self.local.inputs, self.local.replayed
        return self.replayer.run_changed(self.cut, self.model, inputs, replayed, change, opset, how)

    def _decided(self, moved: Arrays) -> Arrays:
        """Run on moved inputs; comparisons and their like still read the inputs as they are."""
        replayer, cut, values = self.replayer, self.cut, self.local.inputs
        split = decisions.decided(self.model)
        if split is None:
            return replayer.run(cut, moved)
        feeds = {}
        for given in split.graph.input:
            name = given.name.removesuffix(decisions.OBSERVED)
            value = (moved if given.name == name else values)[name]
            feeds[given.name] = replayer.typed(name, value)
        try:
            run = session(split, replayer.threads, replayer.folder).run
            results = run(list(cut.outputs), feeds)
        except Exception:  # ORT raises a family of classes that share no base
            return replayer.run(cut, moved)
        return dict(zip(cut.outputs, results, strict=True))

    def _in_own_types(self, own: Format) -> Arrays:
        """Run with inputs and the result of every operator rounded to the model's types.

        Inputs move by as much as rounding to the type could move them: a runtime may hold more
        bits than it shows.
        """
        replayer, local = self.replayer, self.local
        generator, unit = np.random.default_rng(0), 2.0**-own.bits
        inputs = {n: fp32_rounding.jitter(v, generator, unit) for n, v in local.inputs.items()}
        try:
            rounded = own_types(self.model, own) or self.model
            values = session(rounded, replayer.threads, replayer.folder).run(None, inputs)
        except Exception as error:  # ORT raises a family of classes that share no base
            raise ReplayError(self.cut, "rounded", error) from error
        return dict(zip(self.cut.outputs, values, strict=True))
