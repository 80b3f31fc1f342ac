"""Causes that explain an error only together, and those of one kernel of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import onnx

from auditor.attribution.hypotheses import (
    CHANCE,
    CHANCE_STATED,
    CLEARLY,
    ELEMENTS,
    PRECISION,
    TURNED,
    Bench,
    Tested,
    forms,
    inside_branches,
    merit,
)
from auditor.graphs import artefact
from auditor.ports import Arrays, Noise, SegmentGraph, Variant
from auditor.records.measured import Hypothesis
from auditor.replays import sessions
from auditor.replays.portions import Portions

# A second cause is looked for beside one that explains at least this much but is not named.
PARTIAL = 0.2
# How many variants of each other noise are tried as that second cause.
COMBINED = 2
# The part of what the first cause leaves that a second must explain: a poor fit of one cause is no
# evidence of another.
ADDS = 0.5
# How many causes are named together at most.
MOST = 3
# How many causes that explain part of the error are looked for beside the stated precision.
OWN = 4
# Precisions are tried on one product of several; in quantised segments those of 8 bits only.
EIGHT_BITS = PRECISION + "int8"
# How many such hypotheses are tried at most.
TRIED = 240


def test_under_stated_precision(bench: Bench, usual: Mapping[str, str]) -> None:
    """Test likely causes under the precision that the engine states, where none was found yet.

    A small fault changes how every value behind it is rounded to a narrow format. Then neither the
    fault nor the format explains anything by itself, and both together explain all.

    Args:
        bench: the segment under test.
        usual: the causes of earlier segments, with their variants.
    """
    base = bench.base
    if base is None:
        return
    noise = next(n for n in bench.noises if n.id == base.hypothesis.noise)
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
            if bench.all_explained:
                return


def _firsts(bench: Bench) -> list[Tested]:
    """The causes to test under the stated precision, likeliest first.

    First those that explain part of the error by themselves; then those that would explain most
    jointly with it, which is an estimate that says nothing where the rounding turns with the fault.
    """
    own = [
        t
        for t in sorted(bench.tested, key=merit, reverse=True)
        if t.hypothesis.noise not in bench.stated and t.hypothesis.explained >= PARTIAL
    ][:OWN]
    return [*own, *(t for t in bench.likely if all(t is not other for other in own))]


def _test_both(
    bench: Bench,
    first: Hypothesis,
    second: Hypothesis,
    model: onnx.ModelProto,
    adds: float = ADDS,
) -> None:
    """Test two causes together; forget them where one explains too little of what the other leaves.

    The cause that explains more by itself is named, and the variant's name says both. Of a
    precision that the engine states nothing is asked: that it is there is known.

    Args:
        bench: the segment under test.
        first: what one cause explains by itself.
        second: what the other explains by itself.
        model: the segment with both.
        adds: the part of what one leaves that the other must explain.
    """
    causes = sorted((first, second), key=lambda h: -h.explained)
    least = [
        1 - (1 - adds) * (1 - one.explained)
        for one, other in (causes, causes[::-1])
        if other.noise not in bench.stated
    ]
    tested = len(bench.tested)
    name = f"{causes[0].variant}, and {causes[1].noise}: {causes[1].variant}"
    bench.test(causes[0].noise, Variant(name, model))
    if any(t.hypothesis.explained < max(least, default=-math.inf) for t in bench.tested[tested:]):
        del bench.tested[tested:]


def test_on_one_product(bench: Bench, segment: SegmentGraph, noises: Sequence[Noise]) -> None:
    """Test precisions on one product of several: a runtime may treat a single kernel that way.

    Where none explains enough, the likeliest are tested together with what explains most: a
    rounding that is left out behind one product is hidden where another product saturates.

    Args:
        bench: the segment under test.
        segment: the same with what ONNX fuses written out.
        noises: the catalogue, likeliest first.
    """
    # There are more of these hypotheses than of all others: few elements would be met by chance.
    if bench.error.different < ELEMENTS or bench.error.reshaped:
        return
    found = list(_on_one(bench, segment, noises))
    if not bench.named:
        _test_under_best(bench, sorted(found, key=lambda f: -f[0])[:OWN])


# The share that a cause on one product would explain jointly with what explains most, what it
# explains by itself, and the segment with it.
_OnOne = tuple[float, Hypothesis, onnx.ModelProto]


def _on_one(bench: Bench, segment: SegmentGraph, noises: Sequence[Noise]) -> Iterator[_OnOne]:
    """Test causes on one product each; yields those that are worth a test with another cause."""
    portions, most = Portions(segment), len(bench.tested) + TRIED
    family = EIGHT_BITS if portions.quantised else PRECISION
    tried = [n for n in noises if n.id.startswith(family)]
    values = sessions.inside(segment.model, bench.threads, bench.local.inputs)
    for cut, portion in portions:
        changed = ((n, v) for n in tried for v in forms(bench.failures, n, portion, None))
        for noise, variant in changed:
            if not _matters(variant.model, values, bench.threads):
                continue
            whole = portions.with_one(cut, variant.model)
            before = len(bench.tested)
            if whole is not None:
                bench.test(noise.id, Variant(f"{variant.name}, {portions.name(cut)}", whole))
                for tested in bench.tested[before:]:
                    if tested.jointly > _worth(bench.partial):
                        yield tested.jointly, tested.hypothesis, whole
            if bench.all_explained or len(bench.tested) >= most:
                return


def _worth(first: Tested | None) -> float:
    """The joint share from which on a second cause is worth a test with the first."""
    return math.inf if first is None else 1 - (1 - ADDS) * (1 - first.hypothesis.explained)


def _test_under_best(bench: Bench, found: Sequence[_OnOne]) -> None:
    """Test causes on one product together with the cause that explains most."""
    first = bench.partial
    noise = first and next((n for n in bench.noises if n.id == first.hypothesis.noise), None)
    if not first or not noise:
        return
    for _, other, model in found:
        if other.noise == noise.id:
            continue
        both = _in_form(bench, noise, first.hypothesis.variant, model)
        if both is not None:
            _test_both(bench, first.hypothesis, other, both)
        if bench.all_explained:
            return


def _in_form(
    bench: Bench, noise: Noise, form: str, model: onnx.ModelProto
) -> onnx.ModelProto | None:
    """A changed segment with one form of a noise on top; None where it has no such form."""
    base = replace(bench.segment, model=model)
    found = next(iter(forms(bench.failures, noise, base, form)), None)
    return found.model if found is not None and found.name == form else None


def _matters(model: onnx.ModelProto, values: Arrays, threads: int) -> bool:
    """Whether a changed portion gives other bits than the reference's.

    To ask this of the portion costs less than to replay the segment with it.
    """
    names = [o.name for o in model.graph.output]
    try:
        feeds = {i.name: values[i.name] for i in model.graph.input}
        found = sessions.session(model, threads).run(names, feeds)
        return not all(np.array_equal(v, values[n]) for n, v in zip(names, found, strict=True))
    except Exception:  # what cannot be run alone is tried in its place; ORT's errors share no base
        return True


def test_beside_mostly_exact(bench: Bench) -> None:
    """Test every form of the causes of 8 bits beside hypotheses that give most values exactly.

    The few values that such a hypothesis leaves far off, where products saturate for instance,
    outweigh all others in any norm: the share that it explains says nothing.
    """
    exact = [t for t in sorted(bench.tested, key=merit, reverse=True) if bench.mostly_exact(t)]
    _test_eight_bits_beside(bench, exact[:OWN])


def test_beside_chosen(bench: Bench, segment: SegmentGraph) -> None:
    """Test the causes of 8 bits on top of what a quantiser chose, however little that explains.

    That it is there is known from the compiled file; where sums saturate, all is far off.

    Args:
        bench: the segment under test.
        segment: the same with what ONNX fuses written out.
    """
    if not segment.grids:
        return
    alone = {t.hypothesis.variant: t for t in bench.tested}
    made = (v for v in artefact.variants(segment, "8 bits") if v.name in artefact.CHOSEN_OF_BOTH)
    chosen = (replace(alone[v.name], variant=v) for v in made if v.name in alone)
    _test_eight_bits_beside(bench, chosen)


def _test_eight_bits_beside(bench: Bench, firsts: Iterable[Tested]) -> None:
    """Test every form of the causes of 8 bits beside hypotheses, until a cause may be named."""
    for first, noise in product(firsts, bench.noises):
        if noise.id.startswith(EIGHT_BITS) and not bench.named:
            _pair(bench, first, noise, expected="")


def test_second_cause(bench: Bench, noises: Sequence[Noise], usual: Mapping[str, str]) -> None:
    """Test the likeliest variants of every other noise beside a cause that explains a part.

    Args:
        bench: the segment under test.
        noises: the catalogue, likeliest first.
        usual: the causes of earlier segments, with their variants. They are tried first, since
            what a build does everywhere it also does beside a fault.
    """
    first = bench.partial
    if first is None:
        return
    likely: dict[str, list[tuple[float, str]]] = {}
    for tested in bench.tested:
        hypothesis = tested.hypothesis
        likely.setdefault(hypothesis.noise, []).append((tested.jointly, hypothesis.variant))
    for found in likely.values():
        found.sort(reverse=True)
    most = {noise: found[0][0] for noise, found in likely.items()}
    for noise in sorted(noises, key=lambda n: (n.id not in usual, -most.get(n.id, -math.inf))):
        names = [name for _, name in likely.get(noise.id, ())[:COMBINED]]
        _pair(bench, first, noise, usual.get(noise.id), names)
        if bench.all_explained:
            return
    # The stated precision hides which of several forms of a fault is the right one.
    stated = [n for n in noises if n.id in usual and n.stated_by(bench.said)]
    others = [t for t in bench.tested if t.variant.model.graph.node and t is not first]
    for other in sorted(others, key=merit, reverse=True)[:COMBINED]:
        for noise in stated:
            _pair(bench, other, noise, usual[noise.id])


def test_what_is_left(bench: Bench, usual: Mapping[str, str]) -> None:
    """Test other causes beside one that explains enough, for what it leaves above rounding.

    The causes of earlier segments are tried in the very form that they had there, whatever they
    explain by themselves. Of the others, those are tried that explain by themselves about as much
    as is left: where that is much, all of them have been tested before. The one that reproduces
    most of what is left is kept, if that is more than chance would and no other does nearly as
    well.

    Args:
        bench: the segment under test.
        usual: the causes of earlier segments, with their variants.
    """
    for _ in range(MOST - 1):
        first = bench.best
        if first is None or bench.error.reshaped or bench.coarse:
            return
        if not (left := bench.elements_left(first)):
            return
        tested = len(bench.tested)
        for noise, variant in _beside(bench, first, usual):
            known = usual.get(noise.id) == variant
            if left < TURNED and bench.all_stepped and not known:
                continue  # each is even odds
            chance = CHANCE_STATED if known else CHANCE
            share = max(ADDS, 1 - math.pow(chance, 2 / left))
            both = _in_form(bench, noise, variant, first.variant.model)
            if both is not None:
                second = Hypothesis(noise.id, variant, -math.inf, 0.0)
                _test_both(bench, first.hypothesis, second, both, share)
        added = sorted(bench.tested[tested:], key=merit, reverse=True)
        del bench.tested[tested:]
        if not added or not added[0].plausible:
            return
        best, *others = (t.hypothesis for t in added)
        alike = (h for h in others if 1 - h.explained <= CLEARLY * (1 - best.explained))
        if any(h.beside != best.beside for h in alike):
            return
        bench.tested.append(added[0])


def _beside(bench: Bench, first: Tested, usual: Mapping[str, str]) -> list[tuple[Noise, str]]:
    """The causes to try beside the first, each with the name of its form."""
    named = {first.hypothesis.noise, *first.hypothesis.beside}
    others = {n.id: n for n in bench.noises if n.id not in named and inside_branches(bench, n)}
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
    expected: str | None,
    likely: Sequence[str] = (),
) -> None:
    """Test the first variants of a noise beside a hypothesis, and those whose names are given.

    Args:
        bench: the segment under test.
        first: the hypothesis.
        noise: the other cause.
        expected: the variant to begin with; every other is tested as well unless it is None.
        likely: names of variants to test wherever they come.
    """
    found = first.hypothesis
    if noise.id == found.noise or noise.id in found.beside or not inside_branches(bench, noise):
        return
    base = replace(bench.segment, model=first.variant.model)
    tested = (t.hypothesis for t in bench.tested)
    shares = {h.variant: h.explained for h in tested if h.noise == noise.id}
    for position, variant in enumerate(forms(bench.failures, noise, base, expected)):
        if expected is None and position >= COMBINED and variant.name not in likely:
            continue
        share = shares.get(variant.name, -math.inf)
        second = Hypothesis(noise.id, variant.name, share, 0.0)
        _test_both(bench, found, second, variant.model)
        if bench.all_explained:
            return
