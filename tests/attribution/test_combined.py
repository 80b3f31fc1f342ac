"""Causes beside one that explains enough by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from onnx import helper, numpy_helper

from auditor.attribution.explainer import Explanation, Prior
from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from tests import segments
from tests.segments import made_up, make_segment, run

SHAPE = (1, 20, 30)
STEP = 0.125


def adding(id: str, *, behind: str = "", **forms: Array) -> Cause:
    """A cause that adds a constant to what the segment's first node gives.

    Only where the segment has a constant of the name ``behind``, if any.
    """

    def variants(segment: SegmentGraph) -> Iterable[Variant]:
        if behind and behind not in {c.name for c in segment.model.graph.initializer}:
            return
        for name, value in forms.items():
            model = surgery.copied(segment.model)
            node, label = model.graph.node[0], f"{id}/{name}"
            inner = helper.make_node(node.op_type, node.input, [f"{label}/before"])
            added = helper.make_node("Add", [inner.output[0], label], node.output)
            model.graph.initializer.append(numpy_helper.from_array(value, label))
            rest = [inner, added, *model.graph.node[1:]]
            del model.graph.node[:]
            model.graph.node.extend(rest)
            yield Variant(name, model)

    return made_up(id, variants)


def parts(small: float, elements: int = 0) -> tuple[Array, Array]:
    """Two errors of multiples of ``STEP``, of which the second is this part of their squares."""
    generator = np.random.default_rng(7)
    large, other = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    chosen = generator.permutation(large.size)
    large.flat[chosen[:300]] = generator.choice([-4, 4], 300) * STEP
    count = elements or round(small / (1 - small) * 300 * 16)
    other.flat[chosen[300 : 300 + count]] = generator.choice([-STEP, STEP], count)
    return large, other


def explain(
    noises: Iterable[Cause],
    error: Array,
    *,
    quantised: bool = False,
    usual: Mapping[str, str] | None = None,
) -> Explanation:
    rounded = "q = QuantizeLinear(n, s, z) y = DequantizeLinear(q, s, z)"
    segment = make_segment(
        f"n = Neg(x) {rounded if quantised else 'y = Identity(n)'}",
        {"s": np.array(STEP, np.float32), "z": np.array(0, np.int8)},
    )
    x = np.random.default_rng(3).integers(-60, 60, SHAPE).astype(np.float32) * np.float32(STEP)
    prior: Prior = {(noise,): (noise, form) for noise, form in (usual or {}).items()}
    observed = {"y": run(segment.model, {"x": x})["y"] + error}
    return segments.explain(
        segment, {"x": x}, observed, tuple(noises), thorough=False, floor=1e-6, prior=prior
    )


def beside(found: Explanation) -> tuple[str, ...]:
    best = found.hypotheses[0]
    assert (best.noise, best.variant) == (found.noise, found.variant)
    return best.beside


@pytest.mark.parametrize("quantised", [False, True])
def test_what_explains_nine_tenths_does_not_hide_what_explains_the_rest(quantised: bool) -> None:
    large, small = parts(0.05, elements=50 if quantised else 0)  # nine steps in ten must be right
    noises = [adding("z.small", other=large[:, ::-1], all=small), adding("z.large", all=large)]
    found = explain(noises, large + small, quantised=quantised)
    assert (found.noise, beside(found), found.explained) == ("z.large", ("z.small",), 1.0)
    alone = explain(noises[1:], large + small, quantised=quantised)
    assert (alone.noise, beside(alone)) == ("z.large", ()) and 0.9 < alone.explained < 1


def test_what_explains_less_than_half_of_the_rest_is_not_named_beside() -> None:
    """Nor does what is near it of the whole count: measured is what is left."""
    large, small = parts(0.05)
    some = np.where(np.random.default_rng(1).random(SHAPE) < 0.3, small, 0).astype(np.float32)
    found = explain([adding("z.large", all=large), adding("z.small", all=some)], large + small)
    assert (found.noise, beside(found)) == ("z.large", ())


def test_two_causes_of_the_rest_that_fit_alike_are_not_named() -> None:
    large, small = parts(0.05)
    noises = [adding("z.large", all=large), adding("z.a", all=small), adding("z.b", all=small)]
    found = explain(noises, large + small)
    assert (found.noise, beside(found)) == ("z.large", ())


@pytest.mark.parametrize(
    ("elements", "usual", "named"),
    [(40, False, True), (5, False, False), (5, True, True)],
)
def test_few_steps_are_no_evidence_of_what_the_build_does_nowhere_else(
    elements: int, usual: bool, named: bool
) -> None:
    large, small = parts(0, elements)
    noises = [adding("z.small", all=small), adding("z.large", all=large * np.float32(0.9999))]
    known = {"z.small": "all"} if usual else {}
    found = explain(noises, large + small, quantised=True, usual=known)
    assert found.noise == "z.large"
    assert beside(found) == (("z.small",) if named else ())


def test_the_rest_of_nearly_all_is_looked_for_among_what_the_build_does_elsewhere() -> None:
    large, small = parts(0.002)
    noises = [adding("z.large", all=large), adding("z.small", all=small)]
    found = explain(noises, large + small)
    assert beside(found) == () and len(found.hypotheses) == 1  # and costs nothing
    found = explain(noises, large + small, usual={"z.small": "all"})
    assert beside(found) == ("z.small",) and found.explained == 1.0


@pytest.mark.parametrize(("few", "named"), [(40, True), (200, False)])
def test_what_is_right_but_for_few_values_is_looked_into_however_little_it_explains(
    few: int, named: bool
) -> None:
    """Few values far off outweigh all others: products that saturate, behind 8-bit weights."""
    generator = np.random.default_rng(5)
    fine = generator.uniform(-0.1, 0.1, SHAPE).astype(np.float32)
    far = np.zeros(SHAPE, np.float32)
    far.flat[generator.permutation(far.size)[:few]] = 64
    first = adding("precision.int8", all=fine)
    second = adding("precision.int8_z", behind="precision.int8/all", other=-far, all=far)
    found = explain([first, second], fine + far)
    assert found.noise == ("precision.int8" if named else None)
    if named:
        assert beside(found) == ("precision.int8_z",) and found.explained > 0.9999
    assert explain([first], fine + far).noise is None
