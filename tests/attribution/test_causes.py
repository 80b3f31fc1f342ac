"""A cause named on one sample is tested on the others."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.attribution.causes import Causes
from auditor.decomposition.divergence import Local
from auditor.ports import SegmentGraph
from auditor.records.backend import Kernel
from tests.helpers import onnx_model

WIDTH = 32
OPSET = helper.make_opsetid("", 17)
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32)


def _segment():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[OPSET])
    model.ir_version = 9
    return SegmentGraph(model, ())


def _sample(*, half, noise=0.0):
    """A product whose factors were narrowed to float16, or not, with some noise added."""
    x = RNG.standard_normal((64, WIDTH)).astype(np.float32)
    a, w = (v.astype(np.float16).astype(np.float32) if half else v for v in (x, WEIGHT))
    observed = a @ w + np.float32(noise) * RNG.standard_normal((64, WIDTH)).astype(np.float32)
    return Local({"x": x}, {"y": observed}, {"y": x @ WEIGHT})


@pytest.fixture
def causes():
    return Causes(discovery.noises(), 1, later=True)


def _look(causes, local):
    part, failures = causes.look("s0", _segment(), local, 0, thorough=False)
    assert failures == ()
    return part


def test_a_cause_that_holds_on_every_sample_stays_named(causes):
    first = _sample(half=True)
    part = _look(causes, first)
    np.testing.assert_allclose(part["y"], first.error["y"], atol=1e-5)
    for sample in (1, 2):
        later = _sample(half=True)
        part = causes.again("s0", later, sample)
        np.testing.assert_allclose(part["y"], later.error["y"], atol=1e-5)
    found = causes.verdict("s0")
    assert found.noise in {"precision.fp16", "precision.tf32"}  # the same bits in this range
    assert found.explained > 0.99
    assert (found.contradicted, found.refuted, found.spread.samples) == (0, None, 3)


def test_one_contradicting_sample_is_counted_and_shown(causes):
    _look(causes, _sample(half=True))
    for sample in (1, 2):
        assert causes.again("s0", _sample(half=True), sample) is not None
    assert causes.again("s0", _sample(half=True, noise=7e-4), 3) is None
    found = causes.verdict("s0")
    assert found.noise is not None  # the sums say that it still makes nearly all of the error
    assert (found.contradicted, found.spread.low_at) == (1, 3)
    assert 0.5 < found.spread.low < 0.9 < found.explained


def test_a_cause_that_explains_too_little_over_all_samples_loses_its_name(causes):
    _look(causes, _sample(half=True))
    causes.again("s0", _sample(half=False, noise=1.0), 1)
    found = causes.verdict("s0")
    assert found.noise is None
    assert found.refuted is not None
    assert (found.explained, found.residual, found.contradicted) == (0.0, 1.0, 1)


def test_shares_are_sums_of_squares_not_means_of_shares(causes):
    locals_ = [_sample(half=True), _sample(half=True, noise=3e-4), _sample(half=True, noise=1e-4)]
    _look(causes, locals_[0])
    parts = [causes.again("s0", local, i) for i, local in enumerate(locals_[1:], 1)]
    left = error = 0.0
    for local, part in zip(locals_[1:], parts, strict=True):
        norm = float(np.square(local.replayed["y"], dtype=np.float64).sum())
        rest = (local.error["y"] - part["y"]).astype(np.float64)
        left += float(np.square(rest).sum()) / norm
        error += float(np.square(local.error["y"], dtype=np.float64).sum()) / norm
    norm = float(np.square(locals_[0].replayed["y"], dtype=np.float64).sum())
    error += float(np.square(locals_[0].error["y"], dtype=np.float64).sum()) / norm
    assert causes.verdict("s0").explained == pytest.approx(1 - left / error, abs=1e-4)


def test_an_unexplained_error_stays_unexplained(causes):
    assert _look(causes, _sample(half=False, noise=1e-2)) is None
    assert causes.again("s0", _sample(half=True), 1) is None
    found = causes.verdict("s0")
    assert (found.noise, found.refuted, found.spread) == (None, None, None)


def test_a_sample_without_an_error_says_nothing(causes):
    _look(causes, _sample(half=True))
    clean = _sample(half=False)
    assert causes.again("s0", Local(clean.inputs, clean.replayed, clean.replayed), 1) is None
    assert causes.verdict("s0").spread.samples == 1


def test_with_one_sample_no_model_is_kept():
    causes = Causes(discovery.noises(), 1, later=False)
    _look(causes, _sample(half=True))
    assert causes._cases["s0"].found.contenders == ()
    assert causes.verdict("s0").noise is not None


def test_forms_that_one_number_cannot_tell_apart_are_told_by_the_next(causes):
    """A reduction that cuts its single result off, where rounding does the same at first."""
    model = onnx_model(
        "(float[1, 3] x) => (float[1, 1] y) { y = ReduceSum(x, axes) }", {"axes": np.array([1])}
    )
    segment = SegmentGraph(model, (Kernel("k", "Reduce", ("y",), ("y",), "", "bf16", "bf16"),))

    def sample(*values):
        x = np.array([values], np.float32)
        return Local({"x": x}, {"y": np.ones((1, 1), np.float32)}, {"y": x.sum(1, keepdims=True)})

    causes.look("s0", segment, sample(1, 2**-10, 0), 0, thorough=False)
    assert causes.again("s0", sample(1, 2**-8, 2**-9), 1) is not None
    found = causes.verdict("s0")
    assert (found.noise, found.contradicted, found.refuted) == ("precision.bf16", 0, None)
