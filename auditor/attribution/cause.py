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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import onnx

from auditor.attribution import combined
from auditor.attribution.hypotheses import (
    CLEARLY,
    ELEMENTS,
    ROUNDED,
    Bench,
    Tested,
    forms,
    holds,
    merit,
    tells,
)
from auditor.comparison import metrics
from auditor.graphs import artefact, surgery
from auditor.graphs.weights import size_of
from auditor.ports import Arrays, Fitting, Noise, SegmentGraph, Variant
from auditor.records.measured import Hypothesis
from auditor.replays import blockwise, branches, fused, sessions

# Both keep 11 significant bits and differ in the smallest numbers only: the better fit is named.
ALIKE = frozenset(("precision.fp16", "precision.tf32"))
# Branches of a segment of so few nodes are looked into like any other segment.
SHORT = 16
# How many other forms of the cause are tested again where few elements differ.
FORMS = 4
# Relative L2 between two ways to run one segment in float32.
_SAME = 1e-6
# Each rival may hold its weights several times over: those of larger segments are tried in turn.
_HEAVY = 256 << 20
# bfloat16 exists in ONNX graphs from this opset on.
OPSET = 13

# Winners of earlier segments, by the operators they hold: (noise id, variant name).
Prior = dict[tuple[str, ...], tuple[str, str]]
# What trying a cause gave: results, or sentences why there are none; and what maps causes to that.
_Tried = list[Tested | str]
Beside = Callable[[Callable[[Noise], _Tried], Iterable[Noise]], Iterable[_Tried]]


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
        own: share of the introduced error that the compiled file's own constants explain, those
            that are no rounding of the model's; None where it has none.
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
    own: float | None = None


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
    beside: Beside = map,
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
        beside: maps a function over rivals, perhaps on several threads.
    """
    bench = Bench(segment, inputs, observed, replayed, threads, keep=combined.PARTIAL, floor=floor)
    if not bench.explainable:
        return _conclude(bench, None)
    bench.says = frozenset(
        n.id for n in noises if n.id.startswith("precision.") and n.stated_by(segment.kernels)
    )
    prior = {} if prior is None else prior
    own = _own(bench)
    operators = tuple(dict.fromkeys(node.op_type for node in segment.model.graph.node))
    search = _Search(bench, noises, prior.get(operators))
    search.run(beside if thorough else None)
    if not bench.found and own is not None and own >= bench.complete:
        return replace(_conclude(bench, None), own=own)  # the file is another one: no noise beside
    if not bench.found:
        combined.in_few(bench, noises)
    search.fit()
    usual = dict(prior.values())
    combined.beneath(bench, noises, usual)
    if not bench.found:
        combined.combine(bench, search.ordered, usual)
    if not bench.found:
        combined.alone(bench, search.segment, search.ordered)
    if bench.found:
        combined.further(bench, noises, usual)
    winner = _winner(bench, noises)
    if winner is not None:
        if later and bench.different < ELEMENTS:
            search.all_forms(winner.hypothesis.noise)
        prior[operators] = (winner.hypothesis.noise, winner.hypothesis.form)
    return replace(_conclude(bench, winner), own=own)


class _Search:
    """Tests the catalogue on one segment.

    Attributes:
        segment: as noises see it: operators that ONNX fuses are written out.
        ordered: the noises, first those that the engine states, then what explained such segments.
    """

    def __init__(
        self, bench: Bench, noises: Sequence[Noise], believed: tuple[str, str] | None
    ) -> None:
        """``believed`` are the noise and the variant that explained such a segment before."""
        self._bench, self._believed = bench, believed
        self.segment = fused.written_out(blockwise.written_out(_modern(bench)))
        inside = self._unbranched = _unbranched(bench, self.segment)
        bench.branched = inside is not self.segment and len(inside.model.graph.node) > SHORT
        self.ordered = sorted(
            noises,
            key=lambda n: (
                not n.stated_by(self.segment.kernels),
                believed is None or n.id != believed[0],
            ),
        )

    def run(self, beside: Beside | None) -> None:
        """Test until a cause is found; then the likeliest form of every rival, ``beside``."""
        bench, waiting = self._bench, iter(self.ordered)
        for noise in waiting:
            for variant in self._variants(noise, bench.failures):
                bench.test(noise.id, variant)
                if bench.settled:  # not from NAMED on: another cause may explain the rest as well
                    break
            if bench.settled:
                break
        if beside is None:
            return
        if sum(map(size_of, self.segment.model.graph.initializer)) > _HEAVY:
            beside = map
        for rival in beside(self._likeliest, waiting):
            for found in rival:
                bench.note(found)

    def fit(self) -> None:
        """Fit what calibration decided, where no cause was found."""
        bench = self._bench
        if bench.found:
            return
        for noise in self.ordered:
            if isinstance(noise, Fitting):
                for variant in noise.fits(self.segment, bench.inputs, bench.observed):
                    bench.test(noise.id, variant)

    def all_forms(self, noise: str) -> None:
        """Test every form of a noise that was not tested yet."""
        bench = self._bench
        tested = {(t.hypothesis.noise, t.hypothesis.variant) for t in bench.tested}
        for known in (n for n in self.ordered if n.id == noise):
            for variant in forms(bench.failures, known, self._unbranched, None):
                if (noise, variant.name) not in tested:
                    bench.test(noise, variant)

    def _variants(self, noise: Noise, failures: list[str]) -> Iterator[Variant]:
        believed = self._believed
        expected = believed[1] if believed is not None and believed[0] == noise.id else None
        seen = self._unbranched if tells(self._bench, noise) else self.segment
        return forms(failures, noise, seen, expected)

    def _likeliest(self, noise: Noise) -> _Tried:
        failures: list[str] = []
        first = islice(self._variants(noise, failures), 1)
        return [*(self._bench.tried(noise.id, variant) for variant in first), *failures]


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
    bench = Bench(segment, inputs, observed, replayed, threads)
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
    bench = Bench(segment, inputs, observed, replayed, threads)
    if bench.explainable:
        bench.test("", Variant("", segment.model))
    return bench.tested[0].hypothesis.explained if bench.tested else None


def _own(bench: Bench) -> float | None:
    """Share of the error that the compiled file's constants explain, but for mere roundings."""
    segment = bench.segment
    changed = artefact.replaced(segment.model, artefact.others(segment.compiled))
    if changed is None:
        return None
    segment = replace(segment, model=changed)
    return measured(segment, bench.inputs, bench.observed, bench.replayed, threads=bench.threads)


def _modern(bench: Bench) -> SegmentGraph:
    """The segment at an opset that knows bfloat16, if that leaves its outputs' bits alone."""
    segment = bench.segment
    if surgery.opset(segment.model) >= OPSET:
        return segment
    for model in surgery.upgraded(segment.model, OPSET):
        try:
            session = sessions.session(model, bench.threads, segment.folder)
            values = session.run(list(bench.replayed), bench.inputs)
        except Exception:  # what ORT refuses is no conversion; its errors share no base
            continue
        outputs = dict(zip(bench.replayed, values, strict=True))
        if metrics.bitwise_equal(outputs, bench.replayed):
            return replace(segment, model=model)
    return segment


def _unbranched(bench: Bench, segment: SegmentGraph) -> SegmentGraph:
    """The segment with the branches that it takes, if it then gives its outputs.

    Up to rounding: ONNX Runtime packs weights that are constants, and adds up in another order.
    """

    def run(model: onnx.ModelProto, names: Sequence[str]) -> Arrays:
        session = sessions.session(model, bench.threads, segment.folder)
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


def _winner(bench: Bench, noises: Sequence[Noise]) -> Tested | None:
    """The best hypothesis, when it explains enough and clearly more than every other noise.

    Two causes can fit alike: what the engine says of itself decides, two that give the very same
    numbers are one for this purpose, and otherwise none is named.
    """
    fitting = [t for t in bench.tested if _fits(bench, t)]
    best = max(fitting, key=merit, default=None)
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
        return max(spoken, key=merit)
    same = all(metrics.bitwise_equal(t.outputs, best.outputs) for t in rivals)
    if not same or (rivals and bench.coarse):
        return None
    # A precision that the engine does not state is named where nothing else does the same.
    return next((t for t in (best, *rivals) if t.hypothesis.noise not in ROUNDED), best)


def _fits(bench: Bench, tested: Tested) -> bool:
    """Whether a hypothesis explains enough, and not by chance."""
    found = tested.hypothesis
    unstated = found.noise in ROUNDED and found.noise not in bench.says
    # Choices, and which values are finite, do not tell one narrow format from another.
    other = not bench.says.isdisjoint(ROUNDED)
    chance = other or bench.chance(tested.outputs)
    few = (bench.coarse and chance) or bench.few_steps
    if not tested.fits or (unstated and few):
        return False
    return holds(found.explained, found.bit_identical, bench.needed(found), bench.counted)


def _contenders(bench: Bench, winner: Tested) -> tuple[Contender, ...]:
    fitting = sorted((t for t in bench.tested if _fits(bench, t)), key=merit, reverse=True)
    same = [t for t in fitting if t.hypothesis.noise == winner.hypothesis.noise and t is not winner]
    rivals = [t for t in fitting if t.hypothesis.noise != winner.hypothesis.noise]
    close = [winner, *same[: FORMS if bench.different < ELEMENTS else 0], *rivals[:1]]
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


def _result(bench: Bench, tested: Tested, outputs: Arrays) -> Retest:
    return Retest(
        left=(1 - tested.hypothesis.explained) * bench.error,
        error=bench.error,
        bit_identical=tested.hypothesis.bit_identical,
        needed=bench.needed(tested.hypothesis),
        exact=bench.counted,
        outputs=outputs,
    )


def _conclude(bench: Bench, winner: Tested | None) -> Explanation:
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
