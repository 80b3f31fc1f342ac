"""Names the cause of one segment's introduced error by replaying hypotheses on its inputs.

A cause is named only when running the reference with that cause reproduces most of what the
backend did, and no other cause does nearly as well::

    explained = 1 − Σ ‖out_b − h_n(in_b)‖² / Σ ‖out_b − h(in_b)‖²

with each output divided by its norm. What an engine says about itself decides the order of the
experiments and breaks ties; it never replaces one.

Where out_b has another *shape* than h(in_b) there is no difference to take: the plain replay
reproduces nothing of that output, so its error is the whole tensor and a cause that gives the
observed shape explains 1 − ‖out_b − h_n(in_b)‖² / ‖out_b‖². A cause that gives a wrong shape where
the plain replay's is right is infinitely far off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from auditor import metrics
from auditor.errors import NoiseError
from auditor.ports import Array, Arrays, Fitting, Noise, SegmentGraph, Variant
from auditor.records.measured import Hypothesis
from auditor.replays import blockwise, branches, fused, replay, rounding, surgery
from auditor.replays.portions import Portions

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
# … and only when it reproduces this fraction of the elements of integer, boolean and 8-bit outputs.
EXACT = 0.9
# Values on one step of 8 bits, whatever multiplied it by the scale.
_LAST_BITS = 1e-5
# From here on nothing is left to look for. Another convention is followed to rounding or not at
# all: less than this much of it is none, unless the engine or the model rounds as well, and neither
# is what leaves more than so many times the segment's floor: there is something else beside it.
ENOUGH = 0.995
BESIDE = 30.0
CONVENTIONS = (
    "inference.",
    "implementation.attribute_ignored",
    "implementation.opset_semantics",
    "implementation.tie_breaking",
)
# What bfloat16 may leave beside it, relative to the output: the roundings of some kernels.
NARROW = 4 * 2.0**-8
# Whether a rounding turns a choice or a count is a matter of chance, one in two: so many must have
# turned, and all the right way, for a precision that the engine does not state to be the cause.
ROUNDED = ("precision.bf16", "precision.fp16", "precision.tf32")
TURNED = 12
# Both keep 11 significant bits and differ in the smallest numbers only: the better fit is named.
ALIKE = frozenset(("precision.fp16", "precision.tf32"))
# A second cause is looked for beside one that explains at least this much but is not named.
PARTIAL = 0.2
# How many variants of each other noise are tried as that second cause, and which part of what the
# first leaves it must explain: a poor fit of one cause is no evidence of another.
COMBINED = 2
ADDS = 0.5
# How many hypotheses, of all, are tried together with what the engine says it does.
LIKELY = 8
# Causes of this family are tried on one product of several, in quantised segments those of 8 bits
# only. So many elements must differ that none of these hypotheses, of which there are more than
# before, is met by chance; and so many are tried at most.
ALONE, ALONE_QUANTISED, ELEMENTS, TRIED = "precision.", "precision.int8", 100, 240
# How many other forms of the cause are tested again where few elements differ.
FORMS = 4
# Another cause counts as a rival when it leaves less than this multiple of the winner's residual.
CLEARLY = 2.0
# From this part of a type's largest number on, a value stands for infinity: what a maximum over
# nothing gives, which is the lowest number of bfloat16 where that was the kernel's type.
EXTREME = 0.99
# Relative L2 between two ways to run one segment in float32.
_SAME = 1e-6
# How ONNX Runtime names an error of a model whose shapes do not fit, which it sees before a run.
_MISSHAPEN = "ShapeInferenceError"
# bfloat16 exists in ONNX graphs from this opset on.
OPSET = 13

# Winners of earlier segments, by the operators they hold: (noise id, variant name).
Prior = dict[tuple[str, ...], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Retest:
    """What replaying one cause on one sample did.

    Attributes:
        left, error: Σ over outputs of the squared error that the cause and the plain replay
            leave, each relative to its output's norm: explained = 1 − left / error.
        needed: the share explained from which on a cause is named here.
        exact: whether the outputs are counted, so that ``bit_identical`` decides too.
        outputs: h_n(in_b), by ONNX name.
    """

    left: float
    error: float
    bit_identical: float
    needed: float
    exact: bool
    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Contender:
    """A cause to test again on later samples, and how it did on the first one (no outputs)."""

    noise: str
    variant: Variant
    first: Retest
    says: frozenset[str]  # the precisions that the engine reports in this segment
    folder: Path | None  # where the files with its weights are


@dataclass(frozen=True, slots=True)
class Explanation:
    """What replaying every hypothesis on one segment found.

    Attributes:
        noise: id of the cause named; None when the error is unexplained.
        variant: the form of it that fits best; of the best hypothesis when none is named.
        explained: share of the introduced error that it reproduces; 0 when none is named.
        bit_identical: fraction of elements with the backend's exact value, by the named cause
            or else by the plain replay.
        residual: ‖out_b − h_n‖ / ‖out_b − h‖ of the named cause; 1 when none is named.
        hypotheses: all that was tested, best first.
        outputs: h_n(in_b) of the named cause, or else h(in_b), by ONNX name.
        failures: hypotheses that could not be replayed, as sentences.
        contenders: the named cause, where few elements differ its other forms that fit, and the
            best of the others that would have been named without it, for ``retest``; empty when
            none is named.
    """

    noise: str | None
    variant: str | None
    explained: float
    bit_identical: float
    residual: float
    hypotheses: tuple[Hypothesis, ...]
    outputs: Arrays
    failures: tuple[str, ...] = ()
    contenders: tuple[Contender, ...] = ()


@dataclass(frozen=True, slots=True)
class _Tested:
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
class _Bench:
    """One segment under test."""

    segment: SegmentGraph
    inputs: Arrays
    observed: Arrays
    replayed: Arrays
    threads: int
    keep: float = -math.inf  # share explained below which outputs and model are let go
    floor: float = math.inf  # of the introduced error; nothing is asked of what is left without
    tested: list[_Tested] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _scales: dict[str, float] = field(default_factory=dict)
    _weights: dict[str, float] = field(default_factory=dict)  # of one non-finite element
    _reshaped: set[str] = field(default_factory=set)
    _error: float = 0.0
    _different: int = 0  # elements
    _turned: int = 0  # those of them that are choices or counts
    _coarse: bool | None = None  # once it was asked for
    says: frozenset[str] = frozenset()  # the precisions that the engine reports
    base: _Tested | None = None  # the best of those
    likely: list[_Tested] = field(default_factory=list)  # of the others, beside it
    branched: bool = False  # whether there are branches to look into
    rounds: bool = False  # whether the model itself rounds, to 8 bits for instance

    def __post_init__(self) -> None:
        self.rounds = any("Linear" in n.op_type for n in self.segment.model.graph.node)
        for name, value in self.replayed.items():
            observed = self.observed[name]
            if observed.shape != value.shape:
                self._reshaped.add(name)
                turned = observed.size
            else:
                turned = int(np.count_nonzero(observed != value))
                self._different += turned
            self._turned += turned if observed.dtype.kind != "f" else 0
            self._scales[name] = _scale(observed if name in self._reshaped else value)
            odd = (
                np.count_nonzero(~(abs(observed) < _limit(observed)))
                if name in self._reshaped
                else 0
            )
            self._weights[name] = 1 / odd if odd else 1.0
        self._error = self._distance(self.replayed)

    @property
    def error(self) -> float:
        """What the plain replay leaves: Σ over outputs of ‖out_b − h‖² / ‖h‖²."""
        return self._error

    @property
    def best(self) -> _Tested | None:
        """The hypothesis that explains most so far, of those that give the steps of 8 bits."""
        return max(self.tested, key=lambda t: (t.fits, *_merit(t)), default=None)

    def _fits(self, outputs: Arrays) -> bool:
        nodes = self.segment.model.graph.node
        steps = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"} & outputs.keys()
        return all(
            outputs[name].shape == self.observed[name].shape
            and np.isclose(outputs[name], self.observed[name], _LAST_BITS, 0).mean() >= EXACT
            for name in steps
        )

    @property
    def done(self) -> bool:
        """Whether some hypothesis explains all there is to explain."""
        found = (t.hypothesis for t in self.tested if t.fits)
        return any(f.explained >= max(ENOUGH, self.needed(f)) for f in found)

    @property
    def explainable(self) -> bool:
        """Whether there is a finite error."""
        return 0 < self._error < math.inf

    @property
    def named(self) -> float:
        """The share from which on a cause is named here."""
        if self._reshaped:
            return NAMED_RESHAPED
        chance = CHANCE_STATED if self.says else CHANCE
        return max(NAMED, 1 - math.pow(chance, 2 / max(1, self._different)))

    def needed(self, found: Hypothesis) -> float:
        """The share from which on this cause is named here."""
        noise = found.noise
        joined = any(f", and {other}:" in found.variant for other in ROUNDED)
        narrow = joined or not self.says.isdisjoint(ROUNDED)
        if narrow and noise in ROUNDED and noise not in self.says:
            return max(self.named, ENOUGH)  # beside the engine's rounding another one fits roughly
        if self.rounds or not noise.startswith(CONVENTIONS):
            return self.named
        if narrow:
            return max(self.named, min(ENOUGH, 1 - NARROW**2 / self._error))
        floor = math.inf if _counted(self) else self.floor  # choices turn one by one
        rounding = len(self.replayed) * (BESIDE * floor) ** 2
        return max(self.named, ENOUGH, 1 - rounding / self._error)

    @property
    def found(self) -> bool:
        """Whether the hypothesis that explains most explains enough."""
        best = self.best
        return best is not None and best.hypothesis.explained >= self.needed(best.hypothesis)

    @property
    def coarse(self) -> bool:
        """Whether the error is a few choices, or which values are finite: several causes may fit.

        Numbers tell one computation from another; that one box of ten is missing does not.
        """
        if self._coarse is None:
            ordinary = sum(
                _ordinary(self.observed[n], v) / self._scales[n]
                for n, v in self.replayed.items()
                if v.dtype.kind == "f"
            )
            few = self._turned < ELEMENTS
            self._coarse = few and ordinary <= (1 - ENOUGH) * self._error
        return self._coarse

    def test(self, noise: str, variant: Variant) -> None:
        """Replay one variant, unless the engine refuses the model.

        One whose shapes do not fit the rest of the segment is refuted, since the backend did run.
        """
        refuted = Hypothesis(noise, variant.name, -math.inf, 0.0)
        try:
            session = self._session(variant.model)
        except Exception as error:  # ORT raises a family of classes that share no base
            reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
            if _MISSHAPEN in reason:
                self._note(refuted, self.replayed, variant)
                return
            self.failures.append(f"{noise} ({variant.name}) cannot be replayed: {reason}")
            return
        try:
            values = session.run(list(self.observed), self.inputs)
        except Exception:  # as above
            self._note(refuted, self.replayed, variant)
            return
        outputs = dict(zip(self.observed, values, strict=True))
        explained = 1 - self._distance(outputs) / self._error
        same = sum(metrics.bit_identical(self.observed[n], v) for n, v in outputs.items())
        hypothesis = Hypothesis(noise, variant.name, explained, same / len(outputs))
        self._note(hypothesis, outputs, variant)

    def _note(self, hypothesis: Hypothesis, outputs: Arrays, variant: Variant) -> None:
        tested = _Tested(hypothesis, outputs, variant, self._beside(outputs), self._fits(outputs))
        if hypothesis.noise in self.says:
            self.base = tested if self.base is None else max(self.base, tested, key=_merit)
        elif self.base is not None:
            self.likely = sorted((*self.likely, tested), key=lambda t: -t.beside)[:LIKELY]
        if hypothesis.explained < self.keep:  # models hold their weights: all would fill the memory
            tested = replace(tested, outputs={}, variant=Variant(variant.name, onnx.ModelProto()))
        self.tested.append(tested)

    def _beside(self, outputs: Arrays) -> float:
        best = self.base or self.best
        if best is None or not best.outputs or self._reshaped or self.done:  # nothing is left then
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
            return replay.session(model, self.threads, self.segment.folder)
        except Exception:  # as above
            opened = surgery.copied(model)
            for value in opened.graph.input:
                value.type.tensor_type.ClearField("shape")
            return replay.session(opened, self.threads, self.segment.folder)

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
            elif name in self._reshaped:
                total += 1.0
            else:
                return math.inf
        return total


def explain(
    segment: SegmentGraph,
    inputs: Arrays,
    observed: Arrays,
    replayed: Arrays,
    noises: Sequence[Noise],
    *,
    threads: int = 1,
    prior: Prior | None = None,
    thorough: bool = False,
    floor: float = math.inf,
    later: bool = False,
) -> Explanation:
    """Find the cause of one segment's introduced error.

    Args:
        segment: the reference segment, and the kernels the engine says it ran there.
        inputs: in_b, the backend's own tensors at the segment's inputs.
        observed: out_b, the backend's tensors at its outputs.
        replayed: h(in_b), the reference segment run on ``inputs``.
        noises: the catalogue.
        threads: intra-op threads of each replay.
        prior: winners of earlier segments, tried first; this segment's winner is added.
        thorough: also test the most likely variant of every rival after a cause was found.
        floor: the introduced error, relative L2, that rounding explains; infinity if unknown.
        later: whether other samples will come, which tell forms of one cause apart where this one
            has too few elements.
    """
    bench = _Bench(segment, inputs, observed, replayed, threads, keep=PARTIAL, floor=floor)
    if not bench.explainable:
        return _conclude(bench, None)
    bench.says = frozenset(
        n.id for n in noises if n.id.startswith("precision.") and n.stated_by(segment.kernels)
    )
    prior = {} if prior is None else prior
    operators = tuple(dict.fromkeys(node.op_type for node in segment.model.graph.node))
    believed = prior.get(operators)
    segment = fused.written_out(blockwise.written_out(_modern(bench)))
    unbranched = _unbranched(bench, segment)
    bench.branched = unbranched is not segment
    ordered = sorted(
        noises,
        key=lambda n: (not n.stated_by(segment.kernels), believed is None or n.id != believed[0]),
    )
    for noise in ordered:
        if bench.done and not (thorough or bench.coarse):
            break
        # Not from NAMED on: another cause may explain the rest as well.
        settled = bench.done and not bench.coarse
        expected = believed[1] if believed is not None and believed[0] == noise.id else None
        seen = unbranched if _tells(bench, noise) else segment
        for variant in _variants(bench, noise, seen, expected):
            bench.test(noise.id, variant)
            if settled or (bench.done and not bench.coarse):
                break
    if not bench.found:
        for noise in ordered:
            for variant in (
                noise.fits(segment, inputs, observed) if isinstance(noise, Fitting) else ()
            ):
                bench.test(noise.id, variant)
    _beneath(bench, noises)
    best = bench.best
    if best is not None and not bench.found and best.hypothesis.explained >= PARTIAL:
        _combine(bench, ordered, dict(prior.values()))
    if not bench.found:
        _alone(bench, segment, ordered)
    winner = _winner(bench, noises)
    if winner is not None:
        if later and bench._different < ELEMENTS:
            tested = {(t.hypothesis.noise, t.hypothesis.variant) for t in bench.tested}
            for noise in (n for n in noises if n.id == winner.hypothesis.noise):
                for variant in _variants(bench, noise, unbranched, None):
                    if (noise.id, variant.name) not in tested:
                        bench.test(noise.id, variant)
        prior[operators] = (winner.hypothesis.noise, winner.hypothesis.variant)
    return _conclude(bench, winner)


def retest(
    contenders: Sequence[Contender],
    inputs: Arrays,
    observed: Arrays,
    replayed: Arrays,
    *,
    threads: int = 1,
) -> list[Retest]:
    """Replay the contenders of an earlier explanation on another sample of the same segment.

    The arguments are those of ``explain``. One result per contender; none at all where there is
    no contender, where this sample has no finite error to explain, or where a contender cannot
    be replayed any more.
    """
    if not contenders:
        return []
    segment = SegmentGraph(contenders[0].variant.model, (), folder=contenders[0].folder)
    bench = _Bench(segment, inputs, observed, replayed, threads)
    if not bench.explainable:
        return []
    bench.says = contenders[0].says
    for contender in contenders:
        bench.test(contender.noise, contender.variant)
    if len(bench.tested) < len(contenders):
        return []
    return [_result(bench, tested, tested.outputs) for tested in bench.tested]


def measured(
    segment: SegmentGraph, inputs: Arrays, observed: Arrays, replayed: Arrays, *, threads: int
) -> float | None:
    """Share of a segment's error that running it, changed, on its inputs explains.

    None where there is no finite error or the model cannot be run; the other arguments are those
    of ``explain``.
    """
    bench = _Bench(segment, inputs, observed, replayed, threads)
    if bench.explainable:
        bench.test("", Variant("", segment.model))
    return bench.tested[0].hypothesis.explained if bench.tested else None


def holds(explained: float, bit_identical: float, needed: float, exact: bool) -> bool:
    """Whether a share explained is enough to name a cause."""
    return explained >= needed and (not exact or bit_identical >= EXACT)


def _modern(bench: _Bench) -> SegmentGraph:
    """The segment at an opset that knows bfloat16, if that leaves its outputs' bits alone."""
    segment = bench.segment
    if surgery.opset(segment.model) >= OPSET:
        return segment
    for model in rounding.upgraded(segment.model, OPSET):
        try:
            session = replay.session(model, bench.threads, segment.folder)
            values = session.run(list(bench.replayed), bench.inputs)
        except Exception:  # what ORT refuses is no conversion; its errors share no base
            continue
        outputs = dict(zip(bench.replayed, values, strict=True))
        if metrics.bitwise_equal(outputs, bench.replayed):
            return replace(segment, model=model)
    return segment


def _unbranched(bench: _Bench, segment: SegmentGraph) -> SegmentGraph:
    """The segment with the branches that it takes, if it then gives its outputs.

    Up to rounding: ONNX Runtime packs weights that are constants, and adds up in another order.
    """

    def run(model: onnx.ModelProto, names: Sequence[str]) -> Arrays:
        session = replay.session(model, bench.threads, segment.folder)
        values = session.run(list(names), bench.inputs)
        return dict(zip(names, values, strict=True))

    names = tuple(bench.replayed)
    try:
        model = branches.taken(segment.model, bench.inputs, run)
        if model is None or metrics.relative_l2(run(model, names), bench.replayed, names) > _SAME:
            return segment
    except Exception:  # what ORT refuses is looked at as it is; its errors share no base
        return segment
    return replace(segment, model=model)


def _tells(bench: _Bench, noise: Noise) -> bool:
    """Whether a noise is looked for inside branches.

    One holds a whole network sometimes. A precision is that of all of it; of faults that may be
    anywhere in it, one or the other would fit by chance.
    """
    return not bench.branched or noise.id.startswith("precision.")


def _variants(
    bench: _Bench, noise: Noise, segment: SegmentGraph, expected: str | None
) -> Iterator[Variant]:
    """A noise's variants, the expected one first."""
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
        bench.failures.append(f"{noise.id}: {error.message}")


def _beneath(bench: _Bench, noises: Sequence[Noise]) -> None:
    """Test what the engine says it does on top of the causes that are likeliest beside it.

    A small fault changes what every narrow rounding makes of its values, so that neither explains
    anything by itself where both together explain all.
    """
    base = bench.base
    if base is None or bench.found:
        return
    noise = next(n for n in noises if n.id == base.hypothesis.noise)
    for position, first in enumerate(bench.likely):
        on_top = replace(bench.segment, model=first.variant.model)
        for variant in _variants(bench, noise, on_top, base.hypothesis.variant):
            usual = variant.name == base.hypothesis.variant
            # Beside a fault another of its forms may be the right one: those of the likeliest ones.
            if position >= COMBINED and not usual:
                break
            second = replace(base.hypothesis, variant=variant.name)
            _test_both(bench, first.hypothesis, second, variant.model)
            if bench.done:
                return


def _test_both(
    bench: _Bench, first: Hypothesis, second: Hypothesis, model: onnx.ModelProto
) -> None:
    """Test two causes, and forget it where one explains too little of what the other leaves.

    Named is the one that explains more by itself; the variant says both. Of a precision that the
    engine states no more is asked: that it is there is known.
    """
    causes = sorted((first, second), key=lambda h: -h.explained)
    least = [
        1 - (1 - ADDS) * (1 - one.explained)
        for one, other in (causes, causes[::-1])
        if other.noise not in bench.says
    ]
    tested = len(bench.tested)
    name = f"{causes[0].variant}, and {causes[1].noise}: {causes[1].variant}"
    bench.test(causes[0].noise, Variant(name, model))
    if any(t.hypothesis.explained < max(least, default=-math.inf) for t in bench.tested[tested:]):
        del bench.tested[tested:]


def _alone(bench: _Bench, segment: SegmentGraph, noises: Sequence[Noise]) -> None:
    """Test causes on one product of several: a runtime may treat one kernel alone so."""
    if bench._different < ELEMENTS or bench._reshaped:
        return
    portions, most = Portions(segment), len(bench.tested) + TRIED
    family = ALONE_QUANTISED if portions.quantised else ALONE
    tried = [n for n in noises if n.id.startswith(family)]
    values = replay.inside(segment.model, bench.threads, bench.inputs)
    for cut, portion in portions:
        for noise in tried:
            for variant in _variants(bench, noise, portion, None):
                if not _matters(variant.model, values, bench.threads):
                    continue
                whole = portions.with_one(cut, variant.model)
                if whole is not None:
                    bench.test(noise.id, Variant(f"{variant.name}, {portions.name(cut)}", whole))
                if bench.done or len(bench.tested) >= most:
                    return


def _matters(model: onnx.ModelProto, values: Arrays, threads: int) -> bool:
    """Whether a portion gives other bits than the reference's, which costs less to ask."""
    names = [o.name for o in model.graph.output]
    try:
        feeds = {i.name: values[i.name] for i in model.graph.input}
        found = replay.session(model, threads).run(names, feeds)
        return not all(np.array_equal(v, values[n]) for n, v in zip(names, found, strict=True))
    except Exception:  # what cannot be run alone is tried in its place; ORT's errors share no base
        return True


def _combine(bench: _Bench, noises: Sequence[Noise], usual: Mapping[str, str]) -> None:
    """Test a second cause on top of the best one: the likeliest variants of every other noise.

    ``usual`` are the causes of earlier segments with their variants. They are tried first, since
    what a build does everywhere it also does beside a fault.
    """
    first = bench.best
    assert first is not None
    likely: dict[str, list[tuple[float, str]]] = {}
    for tested in bench.tested:
        hypothesis = tested.hypothesis
        likely.setdefault(hypothesis.noise, []).append((tested.beside, hypothesis.variant))
    for found in likely.values():
        found.sort(reverse=True)
    most = {noise: found[0][0] for noise, found in likely.items()}
    for noise in sorted(noises, key=lambda n: (n.id not in usual, -most.get(n.id, -math.inf))):
        names = [name for _, name in likely.get(noise.id, ())[:COMBINED]]
        _pair(bench, first, noise, usual, names)
        if bench.done:
            return
    # What the engine says it does hides which of several forms of a fault is the right one.
    says = [n for n in noises if n.id in usual and n.stated_by(bench.segment.kernels)]
    others = [t for t in bench.tested if t.variant.model.graph.node and t is not first]
    for other in sorted(others, key=_merit, reverse=True)[:COMBINED]:
        for noise in says:
            _pair(bench, other, noise, usual)


def _pair(
    bench: _Bench,
    first: _Tested,
    noise: Noise,
    usual: Mapping[str, str],
    likely: Sequence[str] = (),
) -> None:
    """Test the likeliest variants of a noise on top of a hypothesis: the first, and those named.

    Of one that was found earlier in this build, all: its forms were tested before the others.
    """
    found = first.hypothesis
    if noise.id == found.noise or f", and {noise.id}:" in found.variant or not _tells(bench, noise):
        return
    base = replace(bench.segment, model=first.variant.model)
    expected = usual.get(noise.id)
    tested = (t.hypothesis for t in bench.tested)
    shares = {h.variant: h.explained for h in tested if h.noise == noise.id}
    for position, variant in enumerate(_variants(bench, noise, base, expected)):
        if position >= COMBINED and variant.name not in likely and noise.id not in usual:
            continue
        share = shares.get(variant.name, -math.inf)
        second = Hypothesis(noise.id, variant.name, share, 0.0)
        _test_both(bench, found, second, variant.model)
        if bench.done:
            return


def _winner(bench: _Bench, noises: Sequence[Noise]) -> _Tested | None:
    """The best hypothesis, when it explains enough and clearly more than every other noise.

    Two causes can fit alike: what the engine says of itself decides, two that give the very same
    numbers are one for this purpose, and otherwise none is named.
    """
    fitting = [t for t in bench.tested if _fits(bench, t)]
    best = max(fitting, key=_merit, default=None)
    if best is None:
        return None
    rivals = [
        t
        for t in fitting
        if t.hypothesis.noise != best.hypothesis.noise
        and not ALIKE.issuperset((t.hypothesis.noise, best.hypothesis.noise))
        and 1 - t.hypothesis.explained <= CLEARLY * (1 - best.hypothesis.explained)
    ]
    says = {n.id for n in noises if n.stated_by(bench.segment.kernels)}
    spoken = [t for t in (best, *rivals) if t.hypothesis.noise in says]
    if spoken:
        return max(spoken, key=_merit)
    same = all(metrics.bitwise_equal(t.outputs, best.outputs) for t in rivals)
    return best if same and not (rivals and bench.coarse) else None


def _fits(bench: _Bench, tested: _Tested) -> bool:
    """Whether a hypothesis explains enough, and not by chance."""
    found = tested.hypothesis
    counted = _counted(bench)
    unstated = found.noise in ROUNDED and found.noise not in bench.says
    if not tested.fits or (counted and unstated and bench.coarse and bench._turned < TURNED):
        return False
    return holds(found.explained, found.bit_identical, bench.needed(found), counted)


def _counted(bench: _Bench) -> bool:
    """Whether an output is integer or boolean: there one huge value outweighs all in any norm."""
    return any(value.dtype.kind != "f" for value in bench.observed.values())


def _contenders(bench: _Bench, winner: _Tested) -> tuple[Contender, ...]:
    fitting = sorted((t for t in bench.tested if _fits(bench, t)), key=_merit, reverse=True)
    same = [t for t in fitting if t.hypothesis.noise == winner.hypothesis.noise and t is not winner]
    rivals = [t for t in fitting if t.hypothesis.noise != winner.hypothesis.noise]
    close = [winner, *same[: FORMS if bench._different < ELEMENTS else 0], *rivals[:1]]
    return tuple(
        Contender(
            t.hypothesis.noise,
            t.variant,
            _result(bench, t, {}),
            bench.says,
            bench.segment.folder,
        )
        for t in close
    )


def _result(bench: _Bench, tested: _Tested, outputs: Arrays) -> Retest:
    return Retest(
        left=(1 - tested.hypothesis.explained) * bench.error,
        error=bench.error,
        bit_identical=tested.hypothesis.bit_identical,
        needed=bench.needed(tested.hypothesis),
        exact=_counted(bench),
        outputs=outputs,
    )


def _conclude(bench: _Bench, winner: _Tested | None) -> Explanation:
    tested = sorted((t.hypothesis for t in bench.tested), key=lambda h: -h.explained)
    if winner is None:
        same = [metrics.bit_identical(bench.observed[n], v) for n, v in bench.replayed.items()]
        return Explanation(
            noise=None,
            variant=tested[0].variant if tested else None,
            explained=0.0,
            bit_identical=sum(same) / len(same) if same else 1.0,
            residual=1.0,
            hypotheses=tuple(tested),
            outputs=bench.replayed,
            failures=tuple(bench.failures),
        )
    found = winner.hypothesis
    return Explanation(
        noise=found.noise,
        variant=found.variant,
        explained=found.explained,
        bit_identical=found.bit_identical,
        residual=math.sqrt(max(0.0, 1 - found.explained)),
        hypotheses=tuple(tested),
        outputs=winner.outputs,
        failures=tuple(bench.failures),
        contenders=_contenders(bench, winner),
    )


def _merit(tested: _Tested) -> tuple[float, float]:
    return tested.hypothesis.explained, tested.hypothesis.bit_identical


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
