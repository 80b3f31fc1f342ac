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
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from auditor.attribution import combined, prepared
from auditor.attribution.hypotheses import (
    CLEARLY,
    ELEMENTS,
    Bench,
    Tested,
    forms,
    holds,
    inside_branches,
    merit,
)
from auditor.comparison import metrics
from auditor.decomposition.divergence import Local
from auditor.graphs import artefact
from auditor.graphs.weights import size_of
from auditor.ports import Arrays, Fitting, Noise, SegmentGraph, Variant
from auditor.records.backend import Kernel
from auditor.records.measured import Hypothesis

# Branches of so few nodes are looked into like any other segment.
SHORT = 16
# How many other forms of the winner are tested again on later samples where few elements differ.
FORMS = 4
# Nodes of a segment, most of a model that a backend does not show, from which on each cause is
# tried in one form alone: every replay is a run of the model, and there would be hundreds.
_MANY = 1000
# Bytes of weights from which on rivals are tried in turn: each may hold them several times over.
_HEAVY = 256 << 20

# Winners of earlier segments, by the operators they hold: (noise id, variant name).
Prior = dict[tuple[str, ...], tuple[str, str]]
# What trying a cause gave: results, or sentences why there are none.
_Tried = list[Tested | str]
# Maps a function over causes, perhaps on several threads.
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
    kernels: tuple[Kernel, ...]  # what the engine says it ran in this segment
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
    hypotheses: tuple[Hypothesis, ...]
    outputs: Arrays
    failures: tuple[str, ...] = ()
    contenders: tuple[Contender, ...] = ()
    own: float | None = None


@dataclass(slots=True)
class Explainer:
    """Finds the causes of the errors of one backend's segments, one segment after another.

    Attributes:
        noises: the catalogue.
        threads: intra-op threads of each replay.
        later: whether other samples will come, which tell forms of one cause apart where one
            sample has too few elements.
        beside: maps a function over rival causes, perhaps on several threads.
        prior: winners of earlier segments, which are tried first on segments like them.
    """

    noises: Sequence[Noise]
    threads: int = 1
    later: bool = False
    beside: Beside = map
    prior: Prior = field(default_factory=dict)

    def explain(
        self,
        segment: SegmentGraph,
        local: Local,
        *,
        thorough: bool = False,
        floor: float = math.inf,
    ) -> Explanation:
        """Find the cause of one segment's introduced error.

        Args:
            segment: the reference segment, and the kernels the engine says it ran there.
            local: its divergence on this sample.
            thorough: also test the most likely variant of every rival after a cause was found.
            floor: the introduced error, relative L2, that rounding explains; infinity if unknown.
        """
        bench = Bench(segment, local, self.noises, self.threads, combined.PARTIAL, floor)
        if not bench.error.explainable:
            return _conclude(bench, None)
        own = _own(bench)
        operators = tuple(dict.fromkeys(node.op_type for node in segment.model.graph.node))
        search = _Search(bench, self.prior.get(operators))
        search.run(self.beside if thorough else None)
        if not bench.named and own is not None and own >= bench.all_but_rounding:
            # The compiled file is of another model: no noise is looked for beside that.
            return replace(_conclude(bench, None), own=own)
        if search.short:
            bench.failures.append(
                f"nothing was observed between {len(segment.model.graph.node)} nodes: each cause "
                "was tried in its likeliest form only"
            )
        else:
            self._search_combinations(bench, search)
        winner = _winner(bench)
        if winner is not None:
            if self.later and bench.error.different < ELEMENTS:
                search.all_forms(winner.hypothesis.noise)
            self.prior[operators] = (winner.hypothesis.noise, winner.hypothesis.form)
        return replace(_conclude(bench, winner), own=own)

    def _search_combinations(self, bench: Bench, search: _Search) -> None:
        """Test causes that explain an error together, or in a part of the segment only."""
        usual = dict(self.prior.values())
        tests: tuple[Callable[[], None], ...] = (
            partial(combined.test_beside_mostly_exact, bench),
            partial(combined.test_beside_chosen, bench, search.segment),
            search.fit,
            partial(combined.test_under_stated_precision, bench, usual),
            partial(combined.test_second_cause, bench, search.ordered, usual),
            partial(combined.test_on_one_product, bench, search.segment, search.ordered),
        )
        for test in tests:
            if not bench.named:
                test()
        if bench.named:
            combined.test_what_is_left(bench, usual)

    def retest(self, contenders: Sequence[Contender], local: Local) -> list[Retest]:
        """Replay the contenders of an earlier explanation on another sample of the same segment.

        Returns:
            One result per contender. None at all where there is no contender, where this sample
            has no finite error to explain, or where a contender cannot be replayed any more.
        """
        if not contenders:
            return []
        first = contenders[0]
        segment = SegmentGraph(first.variant.model, first.kernels, folder=first.folder)
        bench = Bench(segment, local, self.noises, self.threads)
        if not bench.error.explainable:
            return []
        for contender in contenders:
            bench.test(contender.noise, contender.variant)
        if len(bench.tested) < len(contenders):
            return []
        return [_result(bench, tested, tested.outputs) for tested in bench.tested]


class _Search:
    """Tests the catalogue on one segment.

    Attributes:
        segment: as noises see it: operators that ONNX fuses are written out.
        ordered: the noises, first those that the engine states, then what explained such segments.
        short: whether the segment is so large that one form of each noise must do.
    """

    def __init__(self, bench: Bench, believed: tuple[str, str] | None) -> None:
        """Prepare the segment; ``believed``: the noise and form that explained its like before."""
        self._bench, self._believed = bench, believed
        self.segment = prepared.segment(bench)
        inside = self._unbranched = prepared.unbranched(bench, self.segment)
        self.short = len(bench.segment.model.graph.node) > _MANY
        bench.branched = inside is not self.segment and len(inside.model.graph.node) > SHORT
        self.ordered = sorted(
            bench.noises,
            key=lambda n: (
                not n.stated_by(bench.said),
                believed is None or n.id != believed[0],
            ),
        )

    def run(self, beside: Beside | None) -> None:
        """Test until a cause is found, then the likeliest form of every rival.

        Args:
            beside: maps a function over the rivals; None to leave them out.
        """
        bench, waiting = self._bench, iter(self.ordered)
        for noise in waiting:
            variants = self._variants(noise, bench.failures)
            for variant in islice(variants, 1 if self.short else None):
                bench.test(noise.id, variant)
                if bench.settled:  # not yet where it may be named: a later one may explain more
                    break
            if bench.settled:
                break
        if beside is None:
            return
        if sum(map(size_of, self.segment.model.graph.initializer)) > _HEAVY:
            beside = map
        for rival in beside(self._likeliest, waiting):
            for found in rival:
                bench.record(found)

    def fit(self) -> None:
        """Test forms whose numbers are fitted to the backend."""
        bench = self._bench
        for noise in self.ordered:
            if isinstance(noise, Fitting):
                for variant in noise.fits(self.segment, bench.local.inputs, bench.local.observed):
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
        inside = inside_branches(self._bench, noise)
        seen = self._unbranched if inside else self.segment
        return forms(failures, noise, seen, expected)

    def _likeliest(self, noise: Noise) -> _Tried:
        failures: list[str] = []
        first = islice(self._variants(noise, failures), 1)
        return [*(self._bench.replay(noise.id, variant) for variant in first), *failures]


def measured(segment: SegmentGraph, local: Local, threads: int) -> float | None:
    """The share of a segment's error that a changed segment explains when it is run in its place.

    Args:
        segment: the changed one.
        local: the divergence of the segment as written.
        threads: intra-op threads of the run.

    Returns:
        None where there is no finite error, or where the changed segment cannot be run.
    """
    bench = Bench(segment, local, (), threads)
    if bench.error.explainable:
        bench.test("", Variant("", segment.model))
    return bench.tested[0].hypothesis.explained if bench.tested else None


def _own(bench: Bench) -> float | None:
    """The share of the error that the compiled file's own constants explain.

    Constants that are roundings of the model's are left out; None where there are no others.
    """
    segment = bench.segment
    changed = artefact.replaced(segment.model, artefact.others(segment.compiled))
    if changed is None:
        return None
    return measured(replace(segment, model=changed), bench.local, bench.threads)


def _winner(bench: Bench) -> Tested | None:
    """The best hypothesis, when it explains enough and clearly more than every other noise.

    Where two causes fit alike, the one that the engine states is named. Two that give the very same
    numbers count as one, and so do two formats of the same significand, which differ in the
    smallest numbers only. Otherwise none is named.
    """
    significands = {n.id: n.significand for n in bench.noises if n.significand is not None}

    def alike(one: str, other: str) -> bool:
        return one in significands and significands[one] == significands.get(other)

    fitting = [t for t in bench.tested if _fits(bench, t)]
    best = max(fitting, key=merit, default=None)
    if best is None:
        return None
    rivals = [
        t
        for t in fitting
        if t.hypothesis.noise != best.hypothesis.noise
        and not alike(t.hypothesis.noise, best.hypothesis.noise)
        and 1 - t.hypothesis.explained <= CLEARLY * (1 - best.hypothesis.explained)
    ]
    stated = {n.id for n in bench.noises if n.stated_by(bench.said)}
    if known := [t for t in (best, *rivals) if t.hypothesis.noise in stated]:
        return max(known, key=merit)
    same = all(metrics.bitwise_equal(t.outputs, best.outputs) for t in rivals)
    if not same or (rivals and bench.coarse):
        return None
    # A precision that the engine does not state is named where nothing else does the same.
    return next((t for t in (best, *rivals) if t.hypothesis.noise not in bench.narrow), best)


def _fits(bench: Bench, tested: Tested) -> bool:
    """Whether a hypothesis explains enough, and not by chance."""
    found = tested.hypothesis
    unstated = found.noise in bench.narrow and found.noise not in bench.stated
    # Choices, and which values are finite, do not tell one narrow format from another.
    chance = bool(bench.stated & bench.narrow) or bench.by_chance(tested.outputs)
    few = (bench.coarse and chance) or bench.few_steps
    if not tested.plausible or (unstated and few):
        return False
    return holds(found.explained, found.bit_identical, bench.required(found), bench.error.counted)


def _contenders(bench: Bench, winner: Tested) -> tuple[Contender, ...]:
    """What to test again on later samples: the winner, its other forms, and the best rival."""
    fitting = sorted((t for t in bench.tested if _fits(bench, t)), key=merit, reverse=True)
    same = [t for t in fitting if t.hypothesis.noise == winner.hypothesis.noise and t is not winner]
    rivals = [t for t in fitting if t.hypothesis.noise != winner.hypothesis.noise]
    close = [winner, *same[: FORMS if bench.error.different < ELEMENTS else 0], *rivals[:1]]
    return tuple(
        Contender(
            t.hypothesis.noise,
            t.variant,
            _result(bench, t, {}),
            bench.segment.kernels,
            bench.segment.folder,
        )
        for t in close
    )


def _result(bench: Bench, tested: Tested, outputs: Arrays) -> Retest:
    """What replaying one hypothesis did, with ``outputs`` to keep of it."""
    return Retest(
        left=(1 - tested.hypothesis.explained) * bench.error.total,
        error=bench.error.total,
        bit_identical=tested.hypothesis.bit_identical,
        needed=bench.required(tested.hypothesis),
        exact=bench.error.counted,
        outputs=outputs,
    )


def _conclude(bench: Bench, winner: Tested | None) -> Explanation:
    """What was found, with everything that was tested."""
    tested = sorted((t.hypothesis for t in bench.tested), key=lambda h: -h.explained)
    observed, replayed = bench.local.observed, bench.local.replayed
    same = [metrics.bit_identical(observed[n], v) for n, v in replayed.items()]
    unexplained = Explanation(
        noise=None,
        variant=tested[0].variant if tested else None,
        explained=0.0,
        bit_identical=sum(same) / len(same) if same else 1.0,
        hypotheses=tuple(tested),
        outputs=replayed,
        failures=tuple(bench.failures),
    )
    if winner is None:
        return unexplained
    found = winner.hypothesis
    return replace(
        unexplained,
        noise=found.noise,
        variant=found.variant,
        explained=found.explained,
        bit_identical=found.bit_identical,
        outputs=winner.outputs,
        contenders=_contenders(bench, winner),
    )
