"""Causes that explain an error only together, and those of one kernel of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import onnx

from auditor.attribution.hypotheses import (
    CHANCE,
    CHANCE_STATED,
    CLEARLY,
    ELEMENTS,
    TURNED,
    Bench,
    Tested,
    forms,
    merit,
    tells,
)
from auditor.ports import Arrays, Noise, SegmentGraph, Variant
from auditor.records.measured import Hypothesis
from auditor.replays import sessions
from auditor.replays.portions import Portions

# A second cause is looked for beside one that explains at least this much but is not named.
PARTIAL = 0.2
# How many variants of each other noise are tried as that second cause, and which part of what the
# first leaves it must explain: a poor fit of one cause is no evidence of another.
COMBINED = 2
ADDS = 0.5
# So many causes are named together at most.
MOST = 3
# How many causes that explain part of the error are looked for beside what the engine says.
OWN = 4
# Causes of this family are tried on one product of several, in quantised segments those of 8 bits
# only. ``ELEMENTS`` must differ, or one of these hypotheses, of which there are more than before,
# would be met by chance; and so many are tried at most.
ALONE, ALONE_QUANTISED, TRIED = "precision.", "precision.int8", 240


def beneath(bench: Bench, noises: Sequence[Noise], usual: Mapping[str, str]) -> None:
    """Test what the engine says it does on top of the causes that are likeliest beside it.

    A small fault changes what every narrow rounding makes of its values, so that neither explains
    anything by itself where both together explain all.
    """
    base = bench.base
    if base is None or bench.found:
        return
    noise = next(n for n in noises if n.id == base.hypothesis.noise)
    # Its form that fits best without the fault, and that of other segments.
    expected = {base.hypothesis.variant, usual.get(noise.id)}
    for position, first in enumerate(_firsts(bench)):
        on_top = replace(bench.segment, model=first.variant.model)
        for variant in forms(bench.failures, noise, on_top, base.hypothesis.variant):
            # Beside a fault another of its forms may be the right one: those of the likeliest ones.
            if position >= COMBINED and variant.name not in expected:
                continue
            second = replace(base.hypothesis, variant=variant.name)
            _test_both(bench, first.hypothesis, second, variant.model)
            if bench.done:
                return


def _firsts(bench: Bench) -> list[Tested]:
    """Causes to look for beside what the engine says: by themselves, then by their sum with it.

    A sum is an estimate, and none where the rounding turns with the fault.
    """
    own = [
        t
        for t in sorted(bench.tested, key=merit, reverse=True)
        if t.hypothesis.noise not in bench.says and t.hypothesis.explained >= PARTIAL
    ][:OWN]
    return [*own, *(t for t in bench.likely if all(t is not other for other in own))]


def _test_both(
    bench: Bench,
    first: Hypothesis,
    second: Hypothesis,
    model: onnx.ModelProto,
    adds: float = ADDS,
) -> None:
    """Test two causes, and forget it where one explains too little of what the other leaves.

    Named is the one that explains more by itself; the variant says both. Of a precision that the
    engine states no more is asked: that it is there is known.
    """
    causes = sorted((first, second), key=lambda h: -h.explained)
    least = [
        1 - (1 - adds) * (1 - one.explained)
        for one, other in (causes, causes[::-1])
        if other.noise not in bench.says
    ]
    tested = len(bench.tested)
    name = f"{causes[0].variant}, and {causes[1].noise}: {causes[1].variant}"
    bench.test(causes[0].noise, Variant(name, model))
    if any(t.hypothesis.explained < max(least, default=-math.inf) for t in bench.tested[tested:]):
        del bench.tested[tested:]


def alone(bench: Bench, segment: SegmentGraph, noises: Sequence[Noise]) -> None:
    """Test causes on one product of several: a runtime may treat one kernel alone so.

    Where none explains enough, those that could with what explains most: a rounding that is left
    out behind one product is hidden where another saturates.
    """
    if bench.different < ELEMENTS or bench.reshaped:
        return
    found = list(_on_one(bench, segment, noises))
    if not bench.found:
        _beneath_most(bench, noises, sorted(found, key=lambda f: -f[0])[:OWN])


# What a cause would explain with the one that explains most, it, and the segment with it.
_Beneath = tuple[float, Hypothesis, onnx.ModelProto]


def _on_one(bench: Bench, segment: SegmentGraph, noises: Sequence[Noise]) -> Iterator[_Beneath]:
    """Test causes on one product each, and give those worth a test with another."""
    portions, most = Portions(segment), len(bench.tested) + TRIED
    family = ALONE_QUANTISED if portions.quantised else ALONE
    tried = [n for n in noises if n.id.startswith(family)]
    values = sessions.inside(segment.model, bench.threads, bench.inputs)
    for cut, portion in portions:
        for noise in tried:
            for variant in forms(bench.failures, noise, portion, None):
                if not _matters(variant.model, values, bench.threads):
                    continue
                whole = portions.with_one(cut, variant.model)
                before = len(bench.tested)
                if whole is not None:
                    bench.test(noise.id, Variant(f"{variant.name}, {portions.name(cut)}", whole))
                    for tested in bench.tested[before:]:
                        if tested.beside > _worth(bench.partial):
                            yield tested.beside, tested.hypothesis, whole
                if bench.done or len(bench.tested) >= most:
                    return


def _worth(first: Tested | None) -> float:
    """What a second cause must explain with the first, by the sum of what both do."""
    return math.inf if first is None else 1 - (1 - ADDS) * (1 - first.hypothesis.explained)


def _beneath_most(bench: Bench, noises: Sequence[Noise], beneath: Sequence[_Beneath]) -> None:
    """Test what explains most on top of causes of one product."""
    first = bench.partial
    noise = first and next((n for n in noises if n.id == first.hypothesis.noise), None)
    for _, other, model in beneath:
        if not first or not noise or other.noise == noise.id:
            continue
        base = replace(bench.segment, model=model)
        expected = first.hypothesis.variant
        for variant in forms(bench.failures, noise, base, expected):
            if variant.name == expected:
                _test_both(bench, first.hypothesis, other, variant.model)
                break
        if bench.done:
            return


def _matters(model: onnx.ModelProto, values: Arrays, threads: int) -> bool:
    """Whether a portion gives other bits than the reference's, which costs less to ask."""
    names = [o.name for o in model.graph.output]
    try:
        feeds = {i.name: values[i.name] for i in model.graph.input}
        found = sessions.session(model, threads).run(names, feeds)
        return not all(np.array_equal(v, values[n]) for n, v in zip(names, found, strict=True))
    except Exception:  # what cannot be run alone is tried in its place; ORT's errors share no base
        return True


def in_few(bench: Bench, noises: Sequence[Noise]) -> None:
    """Test every form of the causes of 8 bits on top of what gives most values exactly.

    Few that are far off, where products saturate for instance, outweigh all others in any norm.
    """
    exact = [t for t in sorted(bench.tested, key=merit, reverse=True) if bench.mostly(t)]
    for first, noise in product(exact[:OWN], noises):
        if noise.id.startswith(ALONE_QUANTISED) and not bench.found:
            _pair(bench, first, noise, {noise.id: ""})


def combine(bench: Bench, noises: Sequence[Noise], usual: Mapping[str, str]) -> None:
    """Test a second cause on top of a partial one: the likeliest variants of every other noise.

    ``usual`` are the causes of earlier segments with their variants. They are tried first, since
    what a build does everywhere it also does beside a fault.
    """
    first = bench.partial
    if first is None:
        return
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
    for other in sorted(others, key=merit, reverse=True)[:COMBINED]:
        for noise in says:
            _pair(bench, other, noise, usual)


def further(bench: Bench, noises: Sequence[Noise], usual: Mapping[str, str]) -> None:
    """Test other causes beside one that explains enough, for what it leaves above rounding.

    What a build does elsewhere (``usual``) is tried in the very form that it has there, whatever it
    does by itself. Of the others those that explain about as much by themselves as is left: they
    have all been tested where that is much. Kept is the one that reproduces most of what is left,
    if more than chance would and no other does nearly as well.
    """
    for _ in range(MOST - 1):
        first = bench.best
        if first is None or bench.reshaped or bench.coarse or not (left := bench.left(first)):
            return
        tested = len(bench.tested)
        for noise, variant in _beside(bench, first, noises, usual):
            known = usual.get(noise.id) == variant
            if left < TURNED and bench.all_stepped and not known:
                continue  # each is even odds
            chance = CHANCE_STATED if known else CHANCE
            share = max(ADDS, 1 - math.pow(chance, 2 / left))
            base = replace(bench.segment, model=first.variant.model)
            found = next(iter(forms(bench.failures, noise, base, variant)), None)
            if found is not None and found.name == variant:
                second = Hypothesis(noise.id, variant, -math.inf, 0.0)
                _test_both(bench, first.hypothesis, second, found.model, share)
        added = sorted(bench.tested[tested:], key=merit, reverse=True)
        del bench.tested[tested:]
        if not added or not added[0].fits:
            return
        best, *others = (t.hypothesis for t in added)
        alike = (h for h in others if 1 - h.explained <= CLEARLY * (1 - best.explained))
        if any(h.beside != best.beside for h in alike):
            return
        bench.tested.append(added[0])


def _beside(
    bench: Bench, first: Tested, noises: Sequence[Noise], usual: Mapping[str, str]
) -> list[tuple[Noise, str]]:
    """The causes to try beside the first, each with the name of its form."""
    named = {first.hypothesis.noise, *first.hypothesis.beside}
    others = {n.id: n for n in noises if n.id not in named and tells(bench, n)}
    found = {id: variant for id, variant in usual.items() if id in others}
    rest = 1 - first.hypothesis.explained
    alone = (t.hypothesis for t in sorted(bench.tested, key=merit, reverse=True))
    likely = [h for h in alone if h.noise in others and h.explained >= ADDS / 2 * rest]
    pairs = dict.fromkeys((*found.items(), *((h.noise, h.variant) for h in likely[:OWN])))
    return [(others[id], variant) for id, variant in pairs]


def _pair(
    bench: Bench,
    first: Tested,
    noise: Noise,
    usual: Mapping[str, str],
    likely: Sequence[str] = (),
) -> None:
    """Test the likeliest variants of a noise on top of a hypothesis: the first, and those named.

    Of one that was found earlier in this build, all: its forms were tested before the others.
    """
    found = first.hypothesis
    if noise.id == found.noise or noise.id in found.beside or not tells(bench, noise):
        return
    base = replace(bench.segment, model=first.variant.model)
    expected = usual.get(noise.id)
    tested = (t.hypothesis for t in bench.tested)
    shares = {h.variant: h.explained for h in tested if h.noise == noise.id}
    for position, variant in enumerate(forms(bench.failures, noise, base, expected)):
        if position >= COMBINED and variant.name not in likely and noise.id not in usual:
            continue
        share = shares.get(variant.name, -math.inf)
        second = Hypothesis(noise.id, variant.name, share, 0.0)
        _test_both(bench, found, second, variant.model)
        if bench.done:
            return
