"""Hypotheses about one segment: what each explains when it is replayed on the backend's inputs.

``Bench`` replays them and keeps the results. It also knows from which share on a cause may be named
on this segment: few elements, outputs of another shape and the precision that the engine itself
states each ask for more, or for less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from auditor.attribution.error import SegmentError
from auditor.comparison import metrics
from auditor.decomposition.divergence import Local
from auditor.errors import NoiseError
from auditor.graphs import surgery
from auditor.ports import Array, Arrays, Noise, SegmentGraph, Variant
from auditor.records.backend import Kernel
from auditor.records.measured import Hypothesis
from auditor.replays import sessions

# The family of the causes that are formats of numbers.
PRECISION = "precision."
# A cause is named from this share on: right causes were measured at 0.999 and more, the best
# wrong one at 0.38 (docs/method.md).
NAMED = 0.9
# Where the shape differs, this share is needed: any replay that is roughly right explains most of a
# tensor's own norm, a smooth image moved by a pixel for instance.
NAMED_RESHAPED = 0.999
# Where few elements differ, more is needed too: of tens of hypotheses about one number, one is near
# it by chance. The share is such that random errors of n elements, Gaussian and of the right size,
# would reach it with about this probability. The probability may be larger where the engine itself
# says that it computes in another precision: then one hypothesis is tested, not tens.
CHANCE = 3e-4
CHANCE_STATED = 3e-2
# Another cause is a rival when it leaves less than this multiple of what the winner leaves.
CLEARLY = 2.0
# Of integer, boolean and 8-bit outputs, a cause must give this fraction of the elements exactly.
EXACT = 0.9
# Two numbers are on the same 8-bit step when they differ by no more than this: relatively, for the
# product with the scale, and of the largest value, for what is left of zero after something was
# added and taken off again.
_LAST_BITS = 1e-5
_NOUGHT = 4 * float(np.finfo(np.float32).eps)
# From this share on there is nothing left to look for.
ENOUGH = 0.995
# A convention (``Noise.convention``) that leaves more than this multiple of the segment's floor is
# not the whole cause: there is something else beside it.
BESIDE = 30.0
# What some kernels' roundings to bfloat16 may leave beside a convention, relative to the output.
NARROW = 4 * 2.0**-8
# Whether rounding turns a choice or a count is a matter of chance, one in two. So many must have
# turned, and all the right way, before a precision that the engine does not state is the cause.
TURNED = 12
# A result of fewer elements may be met by chance.
ELEMENTS = 100
# How many of all hypotheses are tried together with the precision that the engine states.
LIKELY = 8
# ONNX Runtime's name for an error of a model whose shapes do not fit, which it sees before a run.
_MISSHAPEN = "ShapeInferenceError"


@dataclass(frozen=True, slots=True)
class Tested:
    """One hypothesis and what its replay gave.

    Attributes:
        hypothesis: what it explains.
        outputs: h_n(in_b), by ONNX name.
        variant: the model that was run.
        jointly: the share that it would explain together with the precision that the engine
            states, or else with the best hypothesis before it. An estimate: the sum of what each
            changes by itself.
        plausible: False where it puts 8-bit outputs on other steps than the backend did, or makes
            finite values wrong that were right without it. Such a hypothesis is no cause, whatever
            share it explains.
    """

    hypothesis: Hypothesis
    outputs: Arrays
    variant: Variant
    jointly: float = -math.inf
    plausible: bool = True


@dataclass
class Bench:
    """One segment under test: replays hypotheses, and judges what they explain.

    Attributes:
        segment: the reference segment, and the kernels that the engine says it ran there.
        local: its divergence on the sample under test.
        noises: the catalogue; only what causes state about themselves is read here.
        threads: intra-op threads of each replay.
        keep_from: share explained below which a hypothesis' outputs and model are let go.
        floor: the introduced error, relative L2, that rounding explains. Where it is infinite,
            nothing is asked of what a cause leaves.
        said: the kernels that the engine names; where it names none, as in a dump of tensors, one
            that writes the narrow type that it hands over.
        stated: ids of the precisions that the engine says it computes in.
        tested: results so far.
        failures: hypotheses that could not be replayed, as sentences.
        base: the best hypothesis of ``stated``.
        likely: those of the other causes that would explain most together with ``base``.
        branched: whether the segment has long branches to look into.
    """

    segment: SegmentGraph
    local: Local
    noises: Sequence[Noise]
    threads: int
    keep_from: float = -math.inf
    floor: float = math.inf
    tested: list[Tested] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    base: Tested | None = None
    likely: list[Tested] = field(default_factory=list)
    branched: bool = False

    def __post_init__(self) -> None:
        """Measure the error."""
        self.error = SegmentError(self.local)
        self.said = self.segment.kernels or tuple(_writing(self.local))
        self.stated = frozenset(
            n.id for n in self.noises if n.id.startswith(PRECISION) and n.stated_by(self.said)
        )
        self.narrow = frozenset(n.id for n in self.noises if n.significand is not None)
        self._cancelling = {n.id: n.cancelling for n in self.noises if n.convention}

    # --- the best so far -----------------------------------------------------------------------

    @property
    def best(self) -> Tested | None:
        """The plausible hypothesis that explains most so far."""
        return max(self.tested, key=lambda t: (t.plausible, *merit(t)), default=None)

    @property
    def partial(self) -> Tested | None:
        """The hypothesis that a second cause is looked for beside; None where none explains enough.

        It is the best one, or else the one that explains most though it is not plausible: the
        second cause may be what moves its values to other steps.
        """
        best = self.best
        if best is None or best.hypothesis.explained < self.keep_from:
            best = max(self.tested, key=merit, default=None)
        return best if best is not None and best.hypothesis.explained >= self.keep_from else None

    @property
    def named(self) -> bool:
        """Whether the best hypothesis explains enough to be named."""
        best = self.best
        if best is None or not best.plausible:
            return False
        return best.hypothesis.explained >= self.required(best.hypothesis)

    @property
    def all_explained(self) -> bool:
        """Whether some hypothesis explains all there is to explain."""
        found = (t.hypothesis for t in self.tested if t.plausible)
        return any(
            holds(f.explained, f.bit_identical, max(ENOUGH, self.required(f)), self.error.counted)
            for f in found
        )

    @property
    def settled(self) -> bool:
        """Whether what explains all there is must be the cause: other causes are rivals only."""
        return self.all_explained and not self.coarse

    def mostly_exact(self, tested: Tested) -> bool:
        """Whether a hypothesis gives most values exactly, of which the plain replay gives few.

        Where products saturate, few values are wrong by so much that it explains little.
        """
        return tested.hypothesis.bit_identical >= EXACT > self._identical

    @cached_property
    def _identical(self) -> float:
        """The fraction of the elements that the plain replay gives exactly."""
        error = self.error
        names = error.replayed.keys() - error.reshaped
        same = [metrics.bit_identical(error.observed[n], error.replayed[n]) for n in names]
        return sum(same) / max(1, len(same))

    def elements_left(self, tested: Tested) -> int:
        """How many elements a hypothesis leaves wrong by more than rounding does.

        Of outputs that are 8 bits dequantised, those on another step are counted, whatever the
        floor says: the floor of such outputs is made of ties that turn.
        """
        if not self.all_stepped and tested.hypothesis.explained >= self.all_but_rounding:
            return 0
        same = _one_step if self.all_stepped else np.equal
        pairs = ((self.error.observed[name], value) for name, value in tested.outputs.items())
        return sum(int(np.count_nonzero(~same(v, b))) for b, v in pairs)

    # --- the share that is needed --------------------------------------------------------------

    @property
    def threshold(self) -> float:
        """The share from which on a cause is named here, whichever it is."""
        if self.error.reshaped:
            return NAMED_RESHAPED
        chance = CHANCE_STATED if self.stated else CHANCE
        return max(NAMED, 1 - math.pow(chance, 2 / max(1, self.error.different)))

    def required(self, found: Hypothesis) -> float:
        """The share from which on this cause is named here."""
        narrow = bool(self.narrow.intersection(found.beside) or self.narrow & self.stated)
        if narrow and found.noise in self.narrow and found.noise not in self.stated:
            # Beside the precision that the engine states, any other fits roughly.
            return max(self.threshold, ENOUGH)
        cancelling = self._cancelling.get(found.noise)
        if self._quantises or cancelling is None or found.variant.startswith(cancelling):
            return self.threshold
        if narrow:
            return max(self.threshold, min(ENOUGH, 1 - NARROW**2 / self.error.total))
        return max(self.threshold, self.all_but_rounding)

    @property
    def all_but_rounding(self) -> float:
        """The share from which on nothing is left to explain but float32's rounding."""
        return max(ENOUGH, 1 - self._rounding / self.error.total)

    @property
    def _rounding(self) -> float:
        """The part of the error that may be float32's rounding beside a convention."""
        floor = math.inf if self.error.counted else self.floor  # choices turn one by one
        return len(self.error.replayed) * (BESIDE * floor) ** 2

    # --- what chance may do --------------------------------------------------------------------

    @property
    def coarse(self) -> bool:
        """Whether the error is a few choices, or which values are finite: several causes may fit.

        Numbers tell one computation from another; that one box of ten is missing does not.
        """
        error = self.error
        return error.turned < ELEMENTS and error.finite <= (1 - ENOUGH) * error.total

    @property
    def few_steps(self) -> bool:
        """Whether the error is a few values that fell on another 8-bit step, which are choices."""
        return self.error.different < TURNED and self.all_stepped

    def by_chance(self, outputs: Arrays) -> bool:
        """Whether so few choices turned, or values are infinite, that any rounding may give them.

        Not where finite values are off as well, and the hypothesis says how.
        """
        error = self.error
        if error.counted:
            return error.turned < TURNED
        if error.total - error.finite >= TURNED:  # what values add that are infinite
            return False
        least = len(error.replayed) * self.floor**2 if self.floor < math.inf else 0.0
        return error.finite <= least or error.finite_left_by(outputs) > (1 - NAMED) * error.finite

    # --- outputs that are 8 bits dequantised ---------------------------------------------------

    @cached_property
    def _quantises(self) -> bool:
        """Whether the model itself rounds, to 8 bits for instance."""
        return any("Linear" in n.op_type for n in self.segment.model.graph.node)

    @cached_property
    def _stepped(self) -> frozenset[str]:
        """Tensors that are 8 bits dequantised: multiples of a scale."""
        nodes = self.segment.model.graph.node
        return frozenset(n.output[0] for n in nodes if n.op_type == "DequantizeLinear")

    @property
    def all_stepped(self) -> bool:
        """Whether every output is 8 bits dequantised."""
        return self._stepped.issuperset(self.error.observed)

    def _on_steps(self, outputs: Arrays) -> bool:
        """Whether most 8-bit values are on the steps on which the backend has them."""
        observed = self.error.observed
        return all(
            outputs[name].shape == observed[name].shape
            and _one_step(outputs[name], observed[name]).mean() >= EXACT
            for name in self._stepped & outputs.keys()
        )

    def _spoils(self, outputs: Arrays) -> bool:
        """Whether values are wrong by more than rounding that were right without the hypothesis.

        One value that is infinite outweighs what is wrong of all others.
        """
        error = self.error
        if error.counted or error.reshaped or error.finite > (1 - ENOUGH) * error.total:
            return False
        return error.finite_left_by(outputs) > max(2 * error.finite, self._rounding)

    # --- replaying -----------------------------------------------------------------------------

    def test(self, noise: str, variant: Variant) -> None:
        """Replay one variant of a noise (by its id), and keep what it explains."""
        self.record(self.replay(noise, variant))

    def replay(self, noise: str, variant: Variant) -> Tested | str:
        """Replay one variant and say what it explains, or why it cannot be run.

        A variant whose shapes do not fit the rest of the segment is refuted, since the backend did
        run. Nothing is changed here, so that threads may replay several beside each other.
        """
        observed = self.error.observed
        refuted = Hypothesis(noise, variant.name, -math.inf, 0.0)
        try:
            session = self._session(variant.model)
        except Exception as error:  # ORT raises a family of classes that share no base
            reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
            if _MISSHAPEN in reason:
                return self._judged(refuted, self.error.replayed, variant)
            return f"{noise} ({variant.name}) cannot be replayed: {reason}"
        try:
            values = session.run(list(observed), self.local.inputs)
        except Exception:  # as above
            return self._judged(refuted, self.error.replayed, variant)
        outputs = dict(zip(observed, values, strict=True))
        explained = 1 - self.error.left_by(outputs) / self.error.total
        same = sum(metrics.bit_identical(observed[n], v) for n, v in outputs.items())
        hypothesis = Hypothesis(noise, variant.name, explained, same / len(outputs))
        return self._judged(hypothesis, outputs, variant)

    def _judged(self, hypothesis: Hypothesis, outputs: Arrays, variant: Variant) -> Tested:
        plausible = self._on_steps(outputs) and not self._spoils(outputs)
        return Tested(hypothesis, outputs, variant, plausible=plausible)

    def record(self, found: Tested | str) -> None:
        """Keep what a variant explains, or the sentence why it could not be replayed."""
        if isinstance(found, str):
            self.failures.append(found)
            return
        tested = replace(found, jointly=self._jointly(found.outputs))
        hypothesis = tested.hypothesis
        if hypothesis.noise in self.stated:
            self.base = tested if self.base is None else max(self.base, tested, key=merit)
        elif self.base is not None:
            self.likely = sorted((*self.likely, tested), key=lambda t: -t.jointly)[:LIKELY]
        # Models hold their weights: all would fill the memory.
        if hypothesis.explained < self.keep_from and not self.mostly_exact(tested):
            empty = Variant(tested.variant.name, onnx.ModelProto())
            tested = replace(tested, outputs={}, variant=empty)
        self.tested.append(tested)

    def _jointly(self, outputs: Arrays) -> float:
        """The share that outputs would explain together with ``base``, or else with the best."""
        best = self.base or self.best
        if best is None or not best.outputs or self.error.reshaped or self.all_explained:
            return -math.inf
        both: Arrays = {}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, value in outputs.items():
                plain = self.error.replayed[name]
                if value.shape != plain.shape or value.dtype.kind != "f":
                    return -math.inf
                both[name] = best.outputs[name] + (value - plain)
        return 1 - self.error.left_by(both) / self.error.total

    def _session(self, model: onnx.ModelProto) -> Any:
        """A session; with the inputs' shapes left open where they show already that none fits."""
        try:
            return sessions.session(model, self.threads, self.segment.folder)
        except Exception:  # as above
            opened = surgery.copied(model)
            for value in opened.graph.input:
                value.type.tensor_type.ClearField("shape")
            return sessions.session(opened, self.threads, self.segment.folder)


def inside_branches(bench: Bench, noise: Noise) -> bool:
    """Whether a noise is looked for inside branches.

    A long branch may hold a whole network. A precision is that of all of it. Of faults that may be
    anywhere in it, one or the other would fit by chance.
    """
    return not bench.branched or noise.id.startswith(PRECISION)


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
    """What hypotheses are ranked by: the share explained, then the bit-identical elements."""
    return tested.hypothesis.explained, tested.hypothesis.bit_identical


def _one_step(values: Array, observed: Array) -> Array:
    """Which values, of 8 bits dequantised, are on the step on which the backend has them."""
    nought = _NOUGHT * float(np.abs(observed).max(initial=0, where=np.isfinite(observed)))
    return np.isclose(values, observed, _LAST_BITS, nought)


def _writing(local: Local) -> Iterator[Kernel]:
    """What handed over a segment's outputs in a type of two bytes where the model's has more."""
    for name, value in local.observed.items():
        wide = local.replayed[name].dtype
        if value.dtype.itemsize == 2 and value.dtype.kind in "fV" and wide.itemsize > 2:
            yield Kernel(name, "", (), (name,), "", str(value.dtype), str(value.dtype))
