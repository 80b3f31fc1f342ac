"""Findings are ranked by what they do to the output; gaps and findings make the exit code."""

import math
from dataclasses import replace

import pytest

from auditor import discovery
from auditor.records import terms
from auditor.records.backend import Gap
from auditor.records.measured import (
    Counterfactual,
    Distance,
    Hypothesis,
    OutputDistance,
    Segment,
)
from auditor.records.report import Agreement, BackendReport
from auditor.records.terms import Conclusion
from auditor.verdict import ranking


def _segment(id, *, introduced, floor=3e-6, nodes=("n",), ops=None, noise=None, **more):
    return Segment(
        id=id,
        nodes=nodes,
        node_keys=nodes,
        op_types=ops or ("Conv",) * len(nodes),
        inputs=("x",),
        outputs=("y",),
        kernel="",
        precision="",
        fidelity="output-proved",
        accumulated=introduced,
        introduced=introduced,
        inherited=0.0,
        amplification=None,
        leave_one_in=None,
        impact_share=None,
        floor=floor,
        noise=noise,
        explained=None,
        bit_identical=0.0,
        residual=introduced,
        **more,
    )


def _backend(*segments, id="ov", relative=0.0, status="audited", gap=None):
    distance = Distance(relative, 0.0, math.inf, 1.0)
    return BackendReport(
        id=id,
        device="CPU",
        status=status,
        gap=gap,
        outputs=(OutputDistance("y", distance),) if status == "audited" else (),
        segments=segments,
    )


def test_the_largest_effect_comes_first_and_floors_are_respected():
    backend = _backend(
        _segment("s0", introduced=1e-2, nodes=("a",)),
        _segment("s1", introduced=1e-3, nodes=("b",)),
        _segment("s2", introduced=1e-7, nodes=("c",)),
    )
    effects = {("ov", "s0"): 1e-4, ("ov", "s1"): 5e-2}
    found = ranking.findings([backend], effects, {})
    assert [f.segment for f in found] == ["s1", "s0"]
    assert [f.rank for f in found] == [1, 2]
    assert [f.severity for f in found] == ["high", "low"]
    assert all(f.noise is None and f.confidence == "medium" for f in found)


def test_overlapping_segments_with_the_same_cause_are_one_finding():
    both = Hypothesis("a.b", "one form, and c.d: its form", 0.99, 0.5)
    backend = _backend(
        _segment("s0", introduced=1e-2, nodes=("a", "shared")),
        _segment("s1", introduced=2e-2, nodes=("shared", "b")),
        _segment("s2", introduced=1e-2, nodes=("c",), noise="a.b", hypotheses=(both,)),
    )
    found = ranking.findings([backend], {}, {})
    assert [f.segments for f in found] == [("s0", "s1"), ("s2",)]
    assert found[0].segment == "s1"
    assert [f.beside for f in found] == [(), ("c.d",)]


def test_a_finding_leads_with_the_node_a_person_looks_for():
    nodes, ops = ("dq", "act", "conv"), ("DequantizeLinear", "Relu", "Conv")
    (found,) = ranking.findings(
        [_backend(_segment("s0", introduced=1, nodes=nodes, ops=ops))], {}, {}
    )
    assert found.nodes == ("conv", "act", "dq")
    assert found.op_types == ("Conv", "Relu", "DequantizeLinear")


@pytest.mark.parametrize(
    ("relative", "severity"),
    [(0.0, "info"), (2e-4, "low"), (2e-3, "medium"), (0.02, "high"), (math.inf, "critical")],
)
def test_severity_follows_the_effect(relative, severity):
    assert terms.severity(relative) == severity


def test_exit_codes():
    clean, broken = _backend(id="ort"), _backend(id="ov", relative=0.5)
    missing = _backend(id="tvm", status="gap", gap=Gap("tvm", "start", "not installed"))
    assert ranking.verdict([clean], (), ["ort"], "medium") == ("pass", 0)
    assert ranking.verdict([clean, broken], (), ["ort", "ov"], "medium") == ("fail", 1)
    assert ranking.verdict([clean, missing], (), ["ort", "tvm"], "medium") == ("incomplete", 3)
    assert ranking.verdict([clean, missing], (), ["ort"], "medium") == ("pass", 0)
    assert ranking.verdict([broken, missing], (), ["ov", "tvm"], "medium") == ("fail", 1)
    assert ranking.verdict([missing], (), [], "medium") == ("incomplete", 3)


def test_the_outlier_is_the_one_all_others_agree_against():
    def pairs(**far):
        names = ["reference", "ort", "ov", "tvm"]
        return [
            Agreement(a, b, max(far.get(a, 1e-7), far.get(b, 1e-7)))
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        ]

    assert ranking.outlier(pairs(ov=1e-2)) == "ov"
    assert ranking.outlier(pairs()) is None
    assert ranking.outlier(pairs()[:1]) is None


@pytest.mark.parametrize(("left", "confidence"), [(0.5e-6, "high"), (5e-6, "medium")])
def test_a_replay_that_leaves_rounding_is_strong(left: float, confidence: str) -> None:
    """Sums in another order have no bit in common, however right the cause is."""
    segment = _segment("s0", introduced=1e-2, nodes=("a",), noise="precision.int8")
    segment = replace(segment, explained=1 - (left / 1e-2) ** 2, bit_identical=0.1, floor=1e-6)
    noises = {noise.id: noise for noise in discovery.noises()}
    (finding,) = ranking.findings([_backend(segment)], {("ov", "s0"): 1e-2}, noises)
    assert finding.confidence == confidence


def test_causes_beside_the_first_have_their_own_remedy() -> None:
    """What saturates in a quantised model is not cured by what quantises it less."""
    both = Hypothesis("precision.int8", "both, and precision.int8_saturation: pairs", 0.99, 0.99)
    segment = _segment("s0", introduced=1e-2, noise="precision.int8", hypotheses=(both,))
    noises = {noise.id: noise for noise in discovery.noises()}
    (found,) = ranking.findings([_backend(segment)], {}, noises)
    assert found.beside == ("precision.int8_saturation",) and found.remedy is not None
    first, _, second = found.remedy.partition("; against precision.int8_saturation: ")
    assert first == noises["precision.int8"].remedy("ov")
    assert second == noises["precision.int8_saturation"].remedy("ov")


@pytest.mark.parametrize("conclusion", ["unchanged", "contradicted", "confirmed", "measured"])
def test_an_option_that_was_tried_in_vain_is_no_remedy(conclusion: Conclusion) -> None:
    segment = _segment("s0", introduced=1e-2, noise="precision.int8_saturation")
    noises = {noise.id: noise for noise in discovery.noises()}
    saturation = noises["precision.int8_saturation"]
    option = {"session.x64quantprecision": "1"}
    made = Counterfactual("U8S8 kernels", option, (saturation.id,), conclusion)
    backend = replace(_backend(segment, id="ort"), counterfactuals=(made,))
    (found,) = ranking.findings([backend], {}, noises)
    (after,) = ranking.tried([found], [backend], noises)
    helps = conclusion in ("confirmed", "measured")
    assert after.remedy == (found.remedy if helps else saturation.advice)
    assert found.remedy != saturation.advice
