"""One change at one node of a real model is found there, and called what it is or nothing.

A small part of ``python -m benchmarks.plants``, whose docstring says how reports are scored.
"""

from dataclasses import replace

import numpy as np
import onnx
import openvino as ov
import pytest

from benchmarks.plants import faults, suite, table
from benchmarks.plants.network import Network, Rewrite, values


@pytest.fixture(scope="session")
def subject(zoo_model):
    made = {}

    def get(name):
        if name not in made:
            zoo_model(name)
            made[name] = suite.Subject(name)
        return made[name]

    return get


def _run(subject, backend, case, baseline=()):
    assert case is not None
    return suite.run(subject, backend, case, baseline)


@pytest.mark.parametrize(
    ("model", "backend", "name"),
    [
        ("mtcnn_p", "ort", "ceil_mode/rounded the other way"),
        ("mtcnn_p", "ov", "ceil_mode/rounded the other way"),
        ("mtcnn_p", "ort", "opset_semantics/softmax over its axis and all behind"),
        ("mtcnn_p", "ort", "approximation/softmax by exponent bits"),
        ("mtcnn_p", "ov", "fp16/operands and result"),
        ("mtcnn_r", "ort", "bf16/operands"),
        ("mtcnn_r", "ort", "tf32/operands"),
        ("mtcnn_r", "ov", "int8/weights per channel, largest"),
        ("mtcnn_r", "ort", "attribute_ignored/bias"),
        ("ppocr_cls", "ort", "padding/at the other end"),
        ("ppocr_cls", "ort", "approximation/smooth for a hard sigmoid"),
        ("ppocr_cls", "ort", "normalisation/epsilon of a batch"),
        ("ppocr_det", "ort", "upsample/linear"),
    ],
)
def test_a_noise_is_located_and_named(subject, model, backend, name):
    result = _run(subject(model), backend, suite.plant(subject(model), name))
    assert (result.outcome, result.stray) == ("right", ()), result


@pytest.mark.parametrize(
    ("model", "backend", "name"),
    [
        ("mtcnn_p", "ort", "defect/weights scaled"),
        ("mtcnn_r", "ov", "defect/two channels swapped"),
        ("mtcnn_r", "ort", "defect/wrong bias"),
        ("mtcnn_p", "ov", "defect/a channel dropped"),
        ("mtcnn_r", "ort", "defect/taps turned"),
        ("ppocr_cls", "ort", "defect/an activation scaled"),
    ],
)
def test_a_defect_is_located_and_stays_unexplained(subject, model, backend, name):
    result = _run(subject(model), backend, suite.plant(subject(model), name, seed=1))
    assert (result.outcome, result.causes, result.stray) == ("right", (None,), ()), result


@pytest.mark.parametrize(
    ("model", "backend", "name"),
    [
        ("mtcnn_p", "ort", "null/split by inputs"),
        ("mtcnn_r", "ov", "null/Gemm as MatMul and Add"),
        ("mtcnn_r", "ort", "null/weights by 3, result by 1/3"),
        ("ppocr_cls", "ort", "null/batch normalisation folded"),
        ("ppocr_cls", "ov", "null/batch normalisation unfolded"),
        ("ppocr_cls", "ort", "null/padded apart"),
    ],
)
def test_a_rewrite_that_changes_nothing_is_silent(subject, model, backend, name):
    result = _run(subject(model), backend, suite.plant(subject(model), name, seed=2))
    assert (result.outcome, result.findings) == ("silent", ()), result


@pytest.mark.parametrize("number", [0, 3])
def test_two_faults_at_once_are_told_apart(subject, number):
    case = suite.draw(subject("mtcnn_r"), "two", "fp32", 0, number)
    result = _run(subject("mtcnn_r"), "ort", case)
    assert len({p.node for p in result.plants}) == 2
    assert result.located == (True, True)
    assert result.causes[1] is None  # the second is always a defect
    assert result.stray == ()


def test_what_is_planted_is_what_was_asked_for(subject):
    """A plant moves its own node and nothing before it."""
    model = subject("mtcnn_p")
    case = suite.plant(model, "defect/weights scaled")
    (planted,) = case.plants
    changed = values(case.network.proto, model.feeds)
    order = [n.output[0] for n in model.proto.graph.node]
    before = order[: order.index(planted.node)]
    assert all(np.array_equal(changed[n], model.values[n]) for n in before)
    assert planted.change == pytest.approx(0.01, rel=0.2)
    again = suite.plant(model, "defect/weights scaled")
    assert again.network.proto == case.network.proto


def test_rounding_by_splitting_is_rounding_to_bfloat16():
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4096] x) => (float[4096] y)'
        "{ y = Identity(x) }"
    )
    network = Network(graph)
    rewrite = Rewrite(network, "y")
    rewrite.done(faults.rounded(rewrite, "x", 8))
    assert np.array_equal(values(network.proto, {"x": x})["y"], faults.in_bfloat16(x))


def _result(kind, plant_id, **more):
    planted = suite.Planted(plant_id, "b", "Conv", 0.1)
    return suite.Result("m", "ort", "fp32", 0, 0, kind, (planted,), "failed", **more)


def _finding(noise, *nodes):
    return suite.Found(nodes, noise, 0.1, 0.1, None)


def test_the_score_keeps_its_rules():
    scale = _result("defect", "defect/weights scaled")
    here, elsewhere = _finding(None, "a", "b"), _finding(None, "c")
    assert suite.score(scale, [here], []).outcome == "right"
    assert suite.score(scale, [elsewhere, here], []).outcome == "not located"
    assert suite.score(scale, [here, elsewhere], []).stray == (None,)
    assert suite.score(scale, [elsewhere, here], [elsewhere]).outcome == "right"
    assert suite.score(scale, [elsewhere, here], [here]).outcome == "not located"
    cut = replace(_finding("precision.bf16", "c", "d"), beside=("precision.fp16",))
    apart = [_finding("precision.bf16", "c"), _finding("precision.fp16", "d")]
    assert suite.score(scale, [cut, here], apart).outcome == "right"
    assert suite.score(scale, [cut, here], apart[:1]).outcome == "not located"
    assert suite.score(scale, [_finding("precision.bf16", "b")], []).outcome == "wrong cause"
    assert suite.score(scale, [], []).outcome == "not located"
    bf16 = _result("noise", "bf16/weights")
    assert suite.score(bf16, [_finding("precision.bf16", "b")], []).outcome == "right"
    both = replace(_finding("precision.bf16", "a", "b"), beside=("precision.fp16",))
    assert suite.score(bf16, [_finding("precision.bf16", "b")], [both]).outcome == "right"
    assert suite.score(bf16, [here], []).outcome == "unexplained"
    assert suite.score(bf16, [_finding("precision.fp16", "b")], []).outcome == "wrong cause"
    null = _result("null", "null/identity")
    assert suite.score(null, [], []).outcome == "silent"
    assert suite.score(null, [elsewhere], []).outcome == "false positive"


def test_results_are_kept_and_tabulated(tmp_path):
    kept = suite.Results(tmp_path / "results.jsonl")
    right = suite.score(_result("noise", "bf16/weights"), [_finding("precision.bf16", "b")], [])
    missed = suite.score(_result("defect", "defect/weights scaled"), [], [])
    for result in (right, missed):
        kept.add(result)
    again = suite.Results(tmp_path / "results.jsonl")
    assert list(again.done.values()) == [right, missed]
    text = table.render(list(again.done.values()), "command")
    assert "| fp32 | 1/2 (50.0%) | 1/1 (100.0%) | 0/1 (0.0%) |" in text
    assert "defect/weights scaled | Conv `b`" in text


@pytest.mark.parametrize(("kind", "number"), [("two", 2), ("noise", 2), ("defect", 0), ("null", 2)])
def test_a_fault_on_top_of_a_build_in_bfloat16(subject, tmp_path, kind, number):
    """The build's own rounding is looked for beside a fault that it does not hide."""
    case = suite.draw(subject("mtcnn_r"), kind, "bf16", 0, number)
    baseline = suite.Results(tmp_path / "results.jsonl").baseline(subject("mtcnn_r"), "ort", "bf16")
    assert {f.noise for f in baseline} == {"precision.bf16"}
    result = _run(subject("mtcnn_r"), "ort", case, baseline)
    assert result.outcome in ("right", "silent"), result
    assert result.stray == ()


def test_a_build_that_the_engine_computes_otherwise_is_not_scored(subject):
    """OpenVINO takes the hint bf16 for float32 on processors without it: what ran is no bf16."""
    model = subject("mtcnn_p")
    case = suite.draw(model, "defect", "native-bf16", 0, 0)
    result = suite.run(model, "ov", case, [])
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert result.outcome != "failed", result
    else:
        assert result.outcome == "failed", result
        assert result.failure.startswith("bf16 was asked for; this device computes in f32")
        assert "(native-bf16): 1 cases, bf16 was asked for" in table.render([result], "command")
