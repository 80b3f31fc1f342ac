"""Trained networks on real inputs: what the README promises, checked."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.ports import Silent
from tests import helpers

OV_F32 = {"ov": {"INFERENCE_PRECISION_HINT": "f32"}}


def _audit(path, *backends, **more):
    options = AuditOptions(
        backends=tuple(BackendSpec(b) for b in backends),
        data=path.with_suffix(".npz"),
        samples=more.pop("samples", 1),
        **more,
    )
    return audit(path, options, noises=discovery.noises(), progress=Silent())


def _proved(backend):
    proof = backend.fidelity
    assert proof.outputs_bitwise_equal
    assert proof.program_unchanged
    return proof.output_proved + proof.cone_proved, proof.candidates


def _silent(report):
    assert report.findings == ()
    assert report.gaps == ()
    assert (report.verdict, report.exit_code) == ("pass", 0)


def test_efficientnet_is_proved_everywhere_and_clean_in_f32(efficientnet):
    report = _audit(efficientnet, "ort", "ov", "tvm", options=OV_F32)
    _silent(report)
    by_id = {b.id: b for b in report.backends}
    assert _proved(by_id["ort"]) == (52, 52)
    captured, candidates = _proved(by_id["ov"])
    assert captured >= 50
    assert candidates - captured <= 1
    captured, candidates = _proved(by_id["tvm"])
    assert captured == candidates
    for backend in report.backends:
        assert [c.noise for c in backend.categories] == ["implementation.fp32_rounding"]
        assert backend.outputs[0].top1_agreement == 1.0


def test_openvino_in_f32_is_clean_on_every_network(minilm, ppocr_det, mtcnn):
    for path in (minilm, ppocr_det, *mtcnn):
        report = _audit(path, "ort", "ov", options=OV_F32)
        _silent(report)
        for backend in report.backends:
            captured, _ = _proved(backend)
            assert captured >= 5, path.name


def _audit_in_bf16(path):
    """OpenVINO computes in bfloat16 by default on CPUs that have it, with AVX-512 when asked to."""
    helpers.needs_bf16()
    report = _audit(path, "ov", options={"ov": {"INFERENCE_PRECISION_HINT": "bf16"}})
    (backend,) = report.backends
    assert any(k.precision == "bf16" for k in backend.provenance.kernels)
    captured, candidates = _proved(backend)
    assert captured >= 0.9 * candidates
    for segment in backend.segments:
        if segment.introduced > segment.floor and np.isfinite(segment.introduced):
            assert segment.noise == "precision.bf16", segment.nodes
            assert segment.explained >= 0.99, segment.nodes
    return report, backend


@pytest.mark.parametrize("name", ["efficientnet_lite0", "ppocr_det", "mtcnn_o"])
def test_openvinos_bfloat16_is_named(zoo_model, name):
    _, backend = _audit_in_bf16(zoo_model(name))
    named = {c.noise: c.share for c in backend.categories}
    assert named["precision.bf16"] >= 0.95


def test_a_mask_that_does_not_cancel_in_bfloat16_is_the_first_finding(minilm):
    """OpenVINO multiplies (1 − mask) · lowest float out, and the embedding is NaN."""
    report, backend = _audit_in_bf16(minilm)
    assert "/Mul" in report.findings[0].nodes
    assert report.findings[0].noise == "precision.bf16"
    assert report.findings[0].explained == 1.0
    (without,) = [c for c in backend.counterfactuals if "precision.bf16" in c.noises]
    assert without.after < 1e-5


def test_the_divergence_of_a_quantised_model_is_the_true_one(efficientnet_int8):
    """Marking every tensor as an output turns this program into another one and reports 0."""
    feeds = {k: v[0] for k, v in np.load(efficientnet_int8.with_suffix(".npz")).items()}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (plain,) = ort.InferenceSession(efficientnet_int8, options).run(None, feeds)
    (shipped,) = ort.InferenceSession(efficientnet_int8).run(None, feeds)
    truth = float(np.linalg.norm(shipped - plain) / np.linalg.norm(plain))
    assert truth > 1e-3

    report = _audit(efficientnet_int8, "ort")
    (backend,) = report.backends
    _proved(backend)
    assert backend.outputs[0].distance.relative_l2 == pytest.approx(truth, rel=1e-4)
    assert sum(share for _, share in backend.booked) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("backend", ["ort", "ov"])
@pytest.mark.parametrize(("name", "at"), [("efficientnet_lite0", 20), ("minilm", 12)])
def test_a_scaled_weight_is_first_and_unexplained(zoo_model, tmp_path, backend, name, at):
    path = zoo_model(name)
    model = onnx.load(path)
    weights = {t.name: t for t in model.graph.initializer}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    layers = [n for n in layers if n.input[1] in weights]
    guilty = layers[at]
    tensor = weights[guilty.input[1]]
    scaled = numpy_helper.to_array(tensor) * np.float32(1.01)
    tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
    candidate = tmp_path / "candidate.onnx"
    onnx.save(model, candidate)

    report = _audit(path, backend, candidate=candidate, options=OV_F32)
    first = report.findings[0]
    assert guilty.name in first.nodes
    assert first.noise is None
    assert len({f.segments for f in report.findings}) <= 2  # an overlapping segment at most
    assert report.backends[0].unexplained_share > 0.95


def test_several_photographs_are_averaged(efficientnet):
    report = _audit(efficientnet, "ort", samples=3)
    assert report.stimulus.samples == 3
    assert report.stimulus.kind == "recorded"
    _silent(report)
