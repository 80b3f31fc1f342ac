"""Both sides of a pipeline in one audit: shares, planted mistakes, bad photographs, by command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import UsageError
from auditor.pipeline import description, upstream
from auditor.pipeline.preprocessing import stages
from auditor.pipeline.preprocessing.libraries import Conversion
from auditor.pipeline.preprocessing.stages import Colour, Decode, Pipeline, Resize
from auditor.pipeline.preprocessing.steps import Preparation
from auditor.ports import Silent
from auditor.records.report import AuditReport, PipelineStep
from reports import json_v1
from tests.helpers import ROOT, audit_in

# Each mistake alone, and the step that must be named for it.
MISTAKES = {
    'decoder = "simplejpeg:fast"': "decoder",
    'colour = { library = "formula", matrix = "bt601", range = "full" }': "colour",
    "crop = [32, 32]\nprecrop = 0.8": "framing",
    'resize = { library = "opencv" , interpolation = "nearest" }': "resize",
    'channels = "bgr"': "channels",
    "normalise = { mean = 0.45 }": "normalise",
}


def deployed(pipeline: Path, *lines: str) -> Path:
    """The pipeline with a deployment side of these lines."""
    pipeline.write_text("\n".join([pipeline.read_text(), "[deployment]", *lines]))
    return pipeline


def run(network: Path, photos: Path, pipeline: Path | str, **options: object) -> AuditReport:
    asked = AuditOptions((BackendSpec("ort"),), images=photos, pipeline=str(pipeline), **options)
    return audit(
        network, replace(asked, confirm=False), noises=discovery.noises(), progress=Silent()
    )


def step(report: AuditReport, name: str) -> PipelineStep:
    assert report.pipeline is not None
    (found,) = (s for s in report.pipeline.steps if s.name == name)
    return found


# --- the steps -----------------------------------------------------------------------------------

_RESIZES = st.one_of(
    st.none(),
    st.builds(
        Resize,
        library=st.sampled_from(["pillow", "opencv"]),
        interpolation=st.sampled_from(["bilinear", "nearest"]),
        antialias=st.just(False),
        short_side=st.sampled_from([40, 48]),
    ),
    st.builds(
        Resize,
        library=st.just("opencv"),
        interpolation=st.just("bilinear"),
        antialias=st.just(False),
        letterbox=st.just((32, 32)),
    ),
)
_PIPELINES = st.builds(
    Pipeline,
    decode=st.builds(
        Decode,
        st.sampled_from(["pillow", "opencv"]),
        st.just("default"),
        st.sampled_from(["apply", "ignore"]),
    ),
    colour=st.sampled_from([None, Colour("formula", Conversion("bt601", "full", "rounded"))]),
    precrop=st.sampled_from([None, 0.9]),
    resize=_RESIZES,
    crop=st.sampled_from([None, (32, 32)]),
    channels=st.sampled_from(["rgb", "bgr"]),
    scale=st.sampled_from([1.0, 0.5]),
    mean=st.sampled_from([(0.0, 0.0, 0.0), (1.0, 2.0, 3.0)]),
    std=st.sampled_from([(1.0, 1.0, 1.0), (2.0, 2.0, 2.0)]),
    layout=st.sampled_from(["nchw", "nhwc"]),
    dtype=st.sampled_from(["float32", "float16"]),
)


@given(_PIPELINES, _PIPELINES)
def test_all_steps_lead_from_training_to_deployment(a: Pipeline, b: Pipeline) -> None:
    """No field of a pipeline is in no step, or part of a difference would have no name."""
    reached = a
    for one in upstream.STEPS:
        reached = one.take(reached, b)
    assert reached == b
    names = stages.differing(upstream.STEPS, a, b)
    assert (a == b) == (not names)


def test_every_step_is_in_the_catalogue() -> None:
    catalogue = {noise.id: noise for noise in discovery.noises()}
    for one in upstream.STEPS:
        assert catalogue[one.noise].stage == "pre-processing"


# --- the audit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "name"), MISTAKES.items())
def test_a_planted_mistake_is_the_first_offender(
    network: Path, photos: Path, pipeline: Path, line: str, name: str
) -> None:
    report = run(network, photos, deployed(pipeline, line))
    first = report.findings[0]
    assert (first.backend, first.noise) == ("pipeline", f"preprocessing.{name}")
    assert report.pipeline is not None and [s.name for s in report.pipeline.steps] == [name]
    assert step(report, name).share == pytest.approx(1)
    assert step(report, name).leave_one_in == pytest.approx(1)
    assert report.verdict == "fail"


def test_figures_are_those_of_the_two_systems(network: Path, photos: Path, pipeline: Path) -> None:
    path = deployed(pipeline, 'decoder = "simplejpeg:fast"', "normalise = { mean = 0.49 }")
    report = run(network, photos, path, samples=12)
    sides = description.load(str(path))
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(network, plain, providers=["CPUExecutionProvider"])
    above = below = alone = 0.0
    for photo in sorted(photos.iterdir()):
        prepared = Preparation(photo.read_bytes())
        feed = session.get_inputs()[0].name
        old, new, only = (
            session.run(None, {feed: prepared.tensor(p)})[0].astype(np.float64)
            for p in (
                sides.training,
                sides.deployment,
                replace(sides.training, mean=sides.deployment.mean),
            )
        )
        above += float(np.sum((new - old) ** 2))
        below += float(np.sum(old**2))
        alone += float(np.linalg.norm(only - old) / np.linalg.norm(old)) / 12
    (output,) = report.backends[0].end_to_end.outputs
    assert output.distance.relative_l2 == pytest.approx((above / below) ** 0.5, rel=1e-3)
    assert step(report, "normalise").effect == pytest.approx(alone, rel=1e-4)
    shares = [s.share for s in report.pipeline.steps]
    assert sum(shares) == pytest.approx(1)


def test_network_and_pipeline_share_one_difference(
    network: Path, photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    """A candidate with coarse weights stands for a network that really differs."""
    coarse = onnx.load(network)
    for tensor in coarse.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            values = values.astype(np.float16).astype(np.float32) * np.float32(1.01)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(coarse, tmp_path / "coarse.onnx")
    path = deployed(pipeline, 'decoder = "simplejpeg:fast"', 'channels = "bgr"')
    report = run(network, photos, path, candidate=tmp_path / "coarse.onnx")
    whole = report.backends[0].end_to_end
    assert whole is not None and whole.samples == 4
    shares = {s.noise: s.share for s in whole.shares}
    assert {"preprocessing.decoder", "preprocessing.channels"} < shares.keys()
    assert sum(shares.values()) + whole.unexplained_share == pytest.approx(1)
    network_part = 1 - shares["preprocessing.decoder"] - shares["preprocessing.channels"]
    assert abs(network_part) > 1e-3
    assert {f.backend for f in report.findings} == {"ort", "pipeline"}
    effects = [f.effect for f in report.findings]
    assert effects == sorted(effects, reverse=True)
    assert [f.rank for f in report.findings] == list(range(1, len(effects) + 1))


def test_texts_are_shown_in_their_characters(photos: Path, pipeline: Path) -> None:
    """Bright places of each row, read one after another; a class is a channel."""
    network = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        n (float[1,3,32,32] image) => (float[1,32,3] y) {
            rows = ReduceMax <axes = [3], keepdims = 0> (image)
            y = Transpose <perm = [0, 2, 1]> (rows) }""")
    path = pipeline.parent / "text.onnx"
    onnx.save(network, path)
    (pipeline.parent / "letters.txt").write_text("g\nb\n")
    with pipeline.open("a") as file:
        file.write('post = { kind = "text", charset = "letters.txt" }\n')
    report = run(path, photos, deployed(pipeline, 'channels = "bgr"'))
    assert report.pipeline is not None
    (found,) = report.pipeline.outputs
    examples = [m.consequence.example for m in (found, *report.backends[0].end_to_end.outputs)]
    assert examples == [("", "b")] * 2


def test_sides_that_are_alike_are_silent(network: Path, photos: Path, pipeline: Path) -> None:
    report = run(network, photos, pipeline)
    assert report.pipeline is None and report.backends[0].end_to_end is None
    assert not report.findings and report.exit_code == 0
    assert "nothing but the network can differ" in " ".join(report.stimulus.notes)


def test_another_decoder_with_the_same_bits_is_no_offender(
    network: Path, photos: Path, pipeline: Path
) -> None:
    report = run(network, photos, deployed(pipeline, 'decoder = "simplejpeg"'))
    assert step(report, "decoder").bit_identical == 1
    assert step(report, "decoder").effect == 0
    assert not report.findings and report.verdict == "pass"


# --- bad input -----------------------------------------------------------------------------------


def test_photographs_that_cannot_be_used_are_gaps(
    network: Path, photos: Path, pipeline: Path
) -> None:
    (photos / "00_tile.jpg").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(photos / "01_tile.jpg")
    Image.new("RGB", (64, 64)).save(photos / "02_tile.png")
    only = deployed(pipeline, 'decoder = "simplejpeg:fast"')  # which reads JPEG only
    for name in ("03", "04", "05", "06", "07", "08", "09", "10", "11"):
        (photos / f"{name}_tile.jpg").unlink()
    report = run(network, photos, only, samples=99)
    assert {g.subject for g in report.gaps} == {"00_tile.jpg", "02_tile.png"}
    assert report.stimulus.samples == 2
    assert report.verdict == "fail"


def test_nothing_left_is_one_clear_error(network: Path, photos: Path, pipeline: Path) -> None:
    for photo in photos.iterdir():
        photo.write_bytes(b"no picture")
    with pytest.raises(UsageError, match="no photograph can be used of 4"):
        run(network, photos, pipeline)


def test_a_side_that_does_not_fit_the_network(network: Path, photos: Path, pipeline: Path) -> None:
    with pytest.raises(UsageError, match="the pipeline makes float32 1x3x16x16"):
        run(network, photos, deployed(pipeline, "crop = 16"))


command = partial(audit_in, ROOT)


@pytest.mark.parametrize("given", [["--images", "x"], ["--pipeline", "imagenet-tf"]])
def test_images_and_pipeline_belong_together(network: Path, given: list[str]) -> None:
    result = command(network, "--backends", "ort", *given)
    assert result.returncode == 2 and "belong together" in result.stderr


def test_by_command(network: Path, photos: Path, pipeline: Path, tmp_path: Path) -> None:
    path = deployed(pipeline, 'channels = "bgr"', "crop = 32")
    report = tmp_path / "report.json"
    made = [network, "--images", photos, "--pipeline", path, "--backends", "ort,ov"]
    made += ["--option", "ov.INFERENCE_PRECISION_HINT=f32"]  # on every processor
    result = command(*made, "-o", report)
    assert result.returncode == 1, result.stderr
    assert "Around the network" in result.stdout and "preprocessing.channels" in result.stdout
    data = json.loads(report.read_text())
    for backend in data["backends"]:
        whole = backend["end_to_end"]
        total = sum(s["share"] for s in whole["shares"]) + whole["unexplained_share"]
        assert total == pytest.approx(1)
    shown = command("show", report, "--layer", "channels")
    assert "of the whole difference on ov" in shown.stdout
    for format, needle in (
        ("markdown", "### Around the network"),
        ("junit", 'name="pipeline"'),
        ("sarif", "preprocessing.channels"),
        ("html", "Around the network"),
    ):
        renderer = discovery.renderers()[format]
        assert needle in renderer.render(json_v1.load(report), width=None, color=False)
    policy = tmp_path / "audit.toml"
    policy.write_text('[categories]\n"preprocessing.channels" = "allow"\n')
    assert command(*made, "--policy", policy).returncode == 0
    again = command(*made, "--baseline", report)
    assert again.returncode == 0, again.stdout
