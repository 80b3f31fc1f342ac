"""Hypotheses about one segment: each replayed on the backend's inputs, and what it explains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from auditor.comparison import metrics
from auditor.errors import NoiseError
from auditor.graphs import surgery
from auditor.ports import Array, Arrays, Noise, SegmentGraph, Variant
from auditor.records.measured import Hypothesis
from auditor.replays import sessions

# A cause is named from this share on: right causes were measured at 0.999 and more, the best
# wrong one at 0.38 (docs/method.md).
NAMED = 0.9
# … and from this one where the shape differs: most of a tensor's own norm is explained by any
# replay that is roughly right, a smooth image moved by a pixel for instance.
NAMED_RESHAPED = 0.999
# … and from a higher one where few elements differ: with tens of hypotheses on one number, one of
# them is near it by chance. The share is such that random errors of n elements, Gaussian and of the
# right size, would reach it with about this probability. It may be larger where the engine itself
# says that it computes in another precision: then one hypothesis is tested, not tens.
CHANCE = 3e-4
CHANCE_STATED = 3e-2
# Another cause counts as a rival when it leaves less than this multiple of the winner's residual.
CLEARLY = 2.0
# … and only when it reproduces this fraction of the elements of integer, boolean and 8-bit outputs.
EXACT = 0.9
# Values on one step of 8 bits, whatever multiplied it by the scale, and of zero, whatever was added
# and taken off again, by the largest.
_LAST_BITS = 1e-5
_NOUGHT = 4 * float(np.finfo(np.float32).eps)
# From here on nothing is left to look for. Another convention is followed to rounding or not at
# all: less than this much of it is none, unless the engine or the model rounds as well, and neither
# is what leaves more than so many times the segment's floor: there is something else beside it.
ENOUGH = 0.995
BESIDE = 30.0
CONVENTIONS = (
    "inference.",
    "implementation.attribute_ignored",
    "implementation.normalisation",
    "implementation.opset_semantics",
    "implementation.tie_breaking",
)
# Not these forms: where a variance is a difference of sums, rounding decides what is left of it.
CANCELLING = ("variance in two passes", "variance as E[x²] − E[x]²")
# What bfloat16 may leave beside it, relative to the output: the roundings of some kernels.
NARROW = 4 * 2.0**-8
# Whether a rounding turns a choice or a count is a matter of chance, one in two: so many must have
# turned, and all the right way, for a precision that the engine does not state to be the cause.
ROUNDED = ("precision.bf16", "precision.fp16", "precision.tf32")
TURNED = 12
# A result of fewer elements may be met by chance.
ELEMENTS = 100
# How many hypotheses, of all, are tried together with what the engine says it does.
LIKELY = 8
# From this part of a type's largest number on, a value stands for infinity: what a maximum over
# nothing gives, which is the lowest number of bfloat16 where that was the kernel's type.
EXTREME = 0.99
# How ONNX Runtime names an error of a model whose shapes do not fit, which it sees before a run.
_MISSHAPEN = "ShapeInferenceError"


@dataclass(frozen=True, slots=True)
class Tested:
    """One hypothesis.

    ``beside`` is what it would explain together with what the engine says, or else with the best
    one before it; that is an estimate, as if both changed the outputs by themselves. ``fits`` says
    whether it gives the steps of outputs that are 8 bits dequantised: what moves values from one
    step to the next is no cause unless it does, and a scale with other last bits does not.
    """

    hypothesis: Hypothesis
    outputs: Arrays
    variant: Variant
    beside: float = -math.inf
    fits: bool = True


@dataclass(slots=True)
class Bench:
    """One segment under test."""

    segment: SegmentGraph
    inputs: Arrays
    observed: Arrays
    replayed: Arrays
    threads: int
    keep: float = -math.inf  # share explained below which outputs and model are let go
    floor: float = math.inf  # of the introduced error; nothing is asked of what is left without
    tested: list[Tested] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _scales: dict[str, float] = field(default_factory=dict)
    _weights: dict[str, float] = field(default_factory=dict)  # of one non-finite element
    reshaped: set[str] = field(default_factory=set)
    _error: float = 0.0
    _finite: float | None = None  # the part of it in values that are finite, once it was asked for
    different: int = 0  # elements
    turned: int = 0  # those of them that are choices or counts
    says: frozenset[str] = frozenset()  # the precisions that the engine reports
    base: Tested | None = None  # the best of those
    likely: list[Tested] = field(default_factory=list)  # of the others, beside it
    branched: bool = False  # whether there are long branches to look into
    rounds: bool = False  # whether the model itself rounds, to 8 bits for instance

    def __post_init__(self) -> None:
        self.rounds = any("Linear" in n.op_type for n in self.segment.model.graph.node)
        for name, value in self.replayed.items():
            observed = self.observed[name]
            if observed.shape != value.shape:
                self.reshaped.add(name)
                turned = observed.size
            else:
                turned = int(np.count_nonzero(observed != value))
                self.different += turned
            self.turned += turned if observed.dtype.kind != "f" else 0
            self._scales[name] = _scale(observed if name in self.reshaped else value)
            odd = (
                np.count_nonzero(~(abs(observed) < _limit(observed)))
                if name in self.reshaped
                else 0
            )
            self._weights[name] = 1 / odd if odd else 1.0
        self._error = self._distance(self.replayed)

    @property
    def error(self) -> float:
        """What the plain replay leaves: Σ over outputs of ‖out_b − h‖² / ‖h‖²."""
        return self._error

    @property
    def best(self) -> Tested | None:
        """The hypothesis that explains most so far, of those that give the steps of 8 bits."""
        return max(self.tested, key=lambda t: (t.fits, *merit(t)), default=None)

    @property
    def partial(self) -> Tested | None:
        """What a second cause is looked for beside: the best where that explains something.

        Else the one that explains most, whatever steps it gives: those may be the other's doing.
        """
        best = self.best
        if best is None or best.hypothesis.explained < self.keep:
            best = max(self.tested, key=merit, default=None)
        return best if best is not None and best.hypothesis.explained >= self.keep else None

    def mostly(self, found: Tested) -> bool:
        """Whether it gives most values exactly, and without it few are: another made the rest.

        Where products saturate, few values are wrong by so much that it explains little.
        """
        names = self.replayed.keys() - self.reshaped
        same = [metrics.bit_identical(self.observed[n], self.replayed[n]) for n in names]
        return found.hypothesis.bit_identical >= EXACT > sum(same) / max(1, len(same))

    def _fits(self, outputs: Arrays) -> bool:
        return all(
            outputs[name].shape == self.observed[name].shape
            and _one_step(outputs[name], self.observed[name]).mean() >= EXACT
            for name in self._stepped & outputs.keys()
        )

    @property
    def _stepped(self) -> set[str]:
        """Tensors that are 8 bits dequantised."""
        nodes = self.segment.model.graph.node
        return {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}

    def left(self, found: Tested) -> int:
        """How many elements a hypothesis leaves wrong by more than rounding does.

        Of 8 bits dequantised, those on another step, whatever the floor: it is of ties that turn.
        """
        if not self.all_stepped and found.hypothesis.explained >= self.complete:
            return 0
        same = _one_step if self.all_stepped else np.equal
        pairs = ((self.observed[name], value) for name, value in found.outputs.items())
        return sum(int(np.count_nonzero(~same(v, b))) for b, v in pairs)

    @property
    def all_stepped(self) -> bool:
        """Whether every output is 8 bits dequantised."""
        return self._stepped.issuperset(self.observed)

    @property
    def done(self) -> bool:
        """Whether some hypothesis explains all there is to explain."""
        found = (t.hypothesis for t in self.tested if t.fits)
        return any(
            holds(f.explained, f.bit_identical, max(ENOUGH, self.needed(f)), self.counted)
            for f in found
        )

    @property
    def settled(self) -> bool:
        """Whether what explains all there is must be the cause: other causes are rivals only."""
        return self.done and not self.coarse

    @property
    def explainable(self) -> bool:
        """Whether there is a finite error."""
        return 0 < self._error < math.inf

    @property
    def named(self) -> float:
        """The share from which on a cause is named here."""
        if self.reshaped:
            return NAMED_RESHAPED
        chance = CHANCE_STATED if self.says else CHANCE
        return max(NAMED, 1 - math.pow(chance, 2 / max(1, self.different)))

    def needed(self, found: Hypothesis) -> float:
        """The share from which on this cause is named here."""
        noise = found.noise
        narrow = not set(found.beside).isdisjoint(ROUNDED) or not self.says.isdisjoint(ROUNDED)
        if narrow and noise in ROUNDED and noise not in self.says:
            return max(self.named, ENOUGH)  # beside the engine's rounding another one fits roughly
        followed = noise.startswith(CONVENTIONS) and not found.variant.startswith(CANCELLING)
        if self.rounds or not followed:
            return self.named
        if narrow:
            return max(self.named, min(ENOUGH, 1 - NARROW**2 / self._error))
        return max(self.named, self.complete)

    @property
    def complete(self) -> float:
        """The share from which on nothing is left to explain but float32's rounding."""
        floor = math.inf if self.counted else self.floor  # choices turn one by one
        rounding = len(self.replayed) * (BESIDE * floor) ** 2
        return max(ENOUGH, 1 - rounding / self._error)

    @property
    def counted(self) -> bool:
        """Whether an output is no float: there one huge value outweighs all in any norm."""
        return any(value.dtype.kind != "f" for value in self.observed.values())

    @property
    def few_steps(self) -> bool:
        """Whether the error is a few values that fell on another of 8 bits' steps: choices too."""
        return self.different < TURNED and self.all_stepped

    @property
    def found(self) -> bool:
        """Whether the hypothesis that explains most explains enough."""
        best = self.best
        if best is None or not best.fits:
            return False
        return best.hypothesis.explained >= self.needed(best.hypothesis)

    @property
    def coarse(self) -> bool:
        """Whether the error is a few choices, or which values are finite: several causes may fit.

        Numbers tell one computation from another; that one box of ten is missing does not.
        """
        return self.turned < ELEMENTS and self._plain_ordinary() <= (1 - ENOUGH) * self._error

    def _plain_ordinary(self) -> float:
        if self._finite is None:
            self._finite = self._ordinary(self.replayed)
        return self._finite

    def _ordinary(self, outputs: Arrays) -> float:
        return sum(
            _ordinary(self.observed[n], v) / self._scales[n]
            for n, v in outputs.items()
            if v.dtype.kind == "f"
        )

    def _spoils(self, outputs: Arrays) -> bool:
        """Whether values are wrong by more than rounding that were right without the hypothesis.

        One value that is infinite outweighs what is wrong of all others.
        """
        before = self._plain_ordinary()
        if self.counted or self.reshaped or before > (1 - ENOUGH) * self._error:
            return False
        rounding = len(self.replayed) * (BESIDE * self.floor) ** 2
        return self._ordinary(outputs) > max(2 * before, rounding)

    def chance(self, outputs: Arrays) -> bool:
        """Whether so few choices turned, or values are infinite, that any rounding may give them.

        Not where the values that are finite are off as well, and the hypothesis says how.
        """
        if self.counted:
            return self.turned < TURNED
        before = self._plain_ordinary()
        if self._error - before >= TURNED:  # what values add that are infinite
            return False
        least = len(self.replayed) * self.floor**2 if self.floor < math.inf else 0.0
        return before <= least or self._ordinary(outputs) > (1 - NAMED) * before

    def test(self, noise: str, variant: Variant) -> None:
        """Replay one variant, and keep what it explains."""
        self.note(self.tried(noise, variant))

    def tried(self, noise: str, variant: Variant) -> Tested | str:
        """Replay one variant; why not, where the engine refuses the model.

        One whose shapes do not fit the rest of the segment is refuted, since the backend did run.
        Nothing is changed here: several may be tried beside each other.
        """
        refuted = Hypothesis(noise, variant.name, -math.inf, 0.0)
        try:
            session = self._session(variant.model)
        except Exception as error:  # ORT raises a family of classes that share no base
            reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
            if _MISSHAPEN in reason:
                return self._judged(refuted, self.replayed, variant)
            return f"{noise} ({variant.name}) cannot be replayed: {reason}"
        try:
            values = session.run(list(self.observed), self.inputs)
        except Exception:  # as above
            return self._judged(refuted, self.replayed, variant)
        outputs = dict(zip(self.observed, values, strict=True))
        explained = 1 - self._distance(outputs) / self._error
        same = sum(metrics.bit_identical(self.observed[n], v) for n, v in outputs.items())
        hypothesis = Hypothesis(noise, variant.name, explained, same / len(outputs))
        return self._judged(hypothesis, outputs, variant)

    def _judged(self, hypothesis: Hypothesis, outputs: Arrays, variant: Variant) -> Tested:
        fits = self._fits(outputs) and not self._spoils(outputs)
        return Tested(hypothesis, outputs, variant, fits=fits)

    def note(self, found: Tested | str) -> None:
        """Keep what a variant explains, or why it could not be replayed."""
        if isinstance(found, str):
            self.failures.append(found)
            return
        tested = replace(found, beside=self._beside(found.outputs))
        hypothesis = tested.hypothesis
        if hypothesis.noise in self.says:
            self.base = tested if self.base is None else max(self.base, tested, key=merit)
        elif self.base is not None:
            self.likely = sorted((*self.likely, tested), key=lambda t: -t.beside)[:LIKELY]
        # Models hold their weights: all would fill the memory.
        if hypothesis.explained < self.keep and not self.mostly(tested):
            empty = Variant(tested.variant.name, onnx.ModelProto())
            tested = replace(tested, outputs={}, variant=empty)
        self.tested.append(tested)

    def _beside(self, outputs: Arrays) -> float:
        best = self.base or self.best
        if best is None or not best.outputs or self.reshaped or self.done:  # nothing is left then
            return -math.inf
        both: Arrays = {}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, value in outputs.items():
                plain = self.replayed[name]
                if value.shape != plain.shape or value.dtype.kind != "f":
                    return -math.inf
                both[name] = best.outputs[name] + (value - plain)
        return 1 - self._distance(both) / self._error

    def _session(self, model: onnx.ModelProto) -> Any:
        """A session; with the inputs' shapes left open where they show already that none fits."""
        try:
            return sessions.session(model, self.threads, self.segment.folder)
        except Exception:  # as above
            opened = surgery.copied(model)
            for value in opened.graph.input:
                value.type.tensor_type.ClearField("shape")
            return sessions.session(opened, self.threads, self.segment.folder)

    def _distance(self, outputs: Arrays) -> float:
        """Σ over outputs of ‖out_b − outputs‖² / ‖h‖².

        An element that is NaN or infinite on one side only counts as an error as large as the
        whole tensor. Where the plain replay has another shape than the backend, ‖out_b‖ stands
        for ‖h‖, whatever has a wrong shape is an error as large as that, and all non-finite
        elements together count as much as all others.
        """
        total = 0.0
        for name, value in outputs.items():
            observed = self.observed[name]
            if observed.shape == value.shape:
                total += _square_error(observed, value, self._scales[name], self._weights[name])
            elif name in self.reshaped:
                total += 1.0
            else:
                return math.inf
        return total


def tells(bench: Bench, noise: Noise) -> bool:
    """Whether a noise is looked for inside branches.

    A long one holds a whole network sometimes. A precision is that of all of it; of faults that may
    be anywhere in it, one or the other would fit by chance.
    """
    return not bench.branched or noise.id.startswith("precision.")


def forms(
    failures: list[str], noise: Noise, segment: SegmentGraph, expected: str | None
) -> Iterator[Variant]:
    """A noise's variants, the expected one first; where there are none, ``failures`` say why."""
    try:
        if expected is None:
            yield from noise.variants(segment)
            return
        waiting: list[Variant] = []
        found = False
        for variant in noise.variants(segment):
            if found:
                yield variant
            elif variant.name == expected:
                found = True
                yield variant
                yield from waiting
            else:
                waiting.append(variant)
        if not found:
            yield from waiting
    except NoiseError as error:
        failures.append(f"{noise.id}: {error.message}")


def holds(explained: float, bit_identical: float, needed: float, exact: bool) -> bool:
    """Whether a share explained is enough to name a cause."""
    return explained >= needed and (not exact or bit_identical >= EXACT)


def merit(tested: Tested) -> tuple[float, float]:
    """By which hypotheses are ranked."""
    return tested.hypothesis.explained, tested.hypothesis.bit_identical


def _one_step(values: Array, observed: Array) -> Array:
    """Which of them are on the same step, where they are 8 bits dequantised."""
    nought = _NOUGHT * float(np.abs(observed).max(initial=0, where=np.isfinite(observed)))
    return np.isclose(values, observed, _LAST_BITS, nought)


def _ordinary(observed: Array, value: Array) -> float:
    """The squared error of elements that are finite, and no stand-in for infinity, in both."""
    if observed.shape != value.shape:
        return metrics.square_sum(metrics.to_float(observed))  # a shape is seen at once
    b, r, limit = metrics.to_float(observed), metrics.to_float(value), _limit(observed)
    with np.errstate(over="ignore", invalid="ignore"):
        error = b - r
    return metrics.square_sum(np.where((abs(b) < limit) & (abs(r) < limit), error, 0))


def _square_error(observed: Array, value: Array, scale: float, weight: float) -> float:
    b, r = metrics.to_float(observed), metrics.to_float(value)
    limit = _limit(observed)
    with np.errstate(over="ignore", invalid="ignore"):
        error = b - r
        squares = metrics.square_sum(error)
    if squares < limit:  # so no element is extreme, or it is the same in both
        return squares / scale
    ordinary = (abs(b) < limit) & (abs(r) < limit)
    extreme = np.isfinite(error) & (np.minimum(abs(b), abs(r)) >= limit)
    # Two finite stand-ins for one infinity agree, whatever type's lowest number they are.
    agree = (b == r) | (np.isnan(b) & np.isnan(r)) | extreme
    squares = metrics.square_sum(np.where(ordinary, error, 0))
    return squares / scale + weight * float(np.count_nonzero(~ordinary & ~agree))


def _scale(values: Array) -> float:
    """‖values‖² of what is finite and no stand-in for infinity, or else 1."""
    wide, limit = metrics.to_float(values), _limit(values)
    squares = metrics.square_sum(wide)
    if not squares < limit:
        squares = metrics.square_sum(np.where(abs(wide) < limit, wide, 0))
    return squares or 1.0


def _limit(values: Array) -> float:
    """From where on a number of this type stands for infinity."""
    return EXTREME * float(np.finfo(values.dtype).max) if values.dtype.kind == "f" else math.inf
