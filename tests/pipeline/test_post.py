"""After the network: the arithmetic of boxes, descriptions, and planted mistakes in an audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import UsageError
from auditor.graphs import model
from auditor.pipeline import description
from auditor.pipeline import photos as folders
from auditor.pipeline.postprocessing import heads, post, results
from auditor.pipeline.postprocessing.post import Post
from auditor.pipeline.postprocessing.results import NAME
from auditor.pipeline.preprocessing import stages
from auditor.pipeline.preprocessing.stages import Placement
from auditor.pipeline.preprocessing.steps import Preparation
from auditor.pipeline.sysnoise.table import sysnoise
from auditor.ports import Silent
from auditor.records.report import AuditReport
from auditor.replays import sessions
from tests.helpers import nodes_of

_CORNERS = hnp.arrays(
    np.float32, (6, 4), elements=st.floats(1, 100, width=32, allow_nan=False)
).map(lambda a: np.concatenate([a[:, :2], a[:, :2] + a[:, 2:]], axis=1))
_POSTS = st.builds(
    Post,
    kind=st.just("boxes"),
    activation=st.sampled_from(["none", "softmax"]),
    background=st.sampled_from([None, 0]),
    threshold=st.sampled_from([0.3, 0.5]),
    coding=st.sampled_from(["corners", "centre", "dfl"]),
    stride=st.sampled_from([8, (8, 16)]),
    shift=st.sampled_from([0.0, 0.5]),
    offset=st.sampled_from([0, 1]),
    clip=st.sampled_from([None, (32, 32)]),
    rounding=st.sampled_from(["none", "floor"]),
    nms=st.sampled_from(["none", "opencv"]),
    iou_offset=st.sampled_from([0, 1]),
    class_aware=st.booleans(),
    top_k=st.sampled_from([1, 100]),
)


def boxes(numbers: np.ndarray, scores: list[float], made: Post) -> np.ndarray:
    """Detections only, without the rows of zeros."""
    outputs = {"b": numbers[None], "s": np.array(scores, np.float32)[None, :, None]}
    rows = results.result(outputs, replace(made, output="b", scores="s"))[NAME][0]
    return rows[rows.any(axis=1)]


# --- the arithmetic ------------------------------------------------------------------------------


@given(_CORNERS, _CORNERS, st.sampled_from([0, 1]))
@settings(max_examples=25)
def test_deltas_are_the_inverse_of_their_definition(
    anchors: np.ndarray, wanted: np.ndarray, offset: int
) -> None:
    """Encoded as R-CNN does (Girshick 2014, appendix C), with the offset of SysNoise."""

    def middle_and_size(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = corners[:, 2:] - corners[:, :2] + offset
        return corners[:, :2] + size / 2, size

    (ca, sa), (cw, sw) = middle_and_size(anchors), middle_and_size(wanted)
    deltas = np.concatenate([(cw - ca) / sa / 0.1, np.log(sw / sa) / 0.2], axis=1)
    made = Post("boxes", coding="centre-deltas", variances=(0.1, 0.2), offset=offset)
    found = heads._from_anchors(deltas.astype(np.float32), anchors, made)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-2)


def test_an_ssd_head_is_decoded_as_by_openvino(tmp_path: Path) -> None:
    """Against its DetectionOutput: priors and boxes in parts of the input, a background class."""
    import openvino as ov

    rng = np.random.default_rng(7)
    start = rng.uniform(0.1, 0.5, (30, 2))
    priors = np.concatenate([start, start + rng.uniform(0.1, 0.4, (30, 2))], 1).astype(np.float32)
    deltas = rng.normal(0, 1, (1, 30, 4)).astype(np.float32)
    scores = rng.dirichlet([1, 1], (1, 30)).astype(np.float32)
    ops = ov.opset8
    given = [ops.parameter(s, np.float32) for s in ([1, 120], [1, 60], [1, 2, 120])]
    asked = {
        "background_label_id": 0, "top_k": 30, "keep_top_k": [30], "nms_threshold": 0.4,
        "confidence_threshold": 0.5, "share_location": True, "normalized": True,
        "code_type": "caffe.PriorBoxParameter.CENTER_SIZE",
    }  # fmt: skip
    network = ov.Model([ops.detection_output(*given, asked)], given)
    compiled = ov.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    variances = np.tile(np.array([0.1, 0.1, 0.2, 0.2], np.float32), 30)
    feeds = [deltas.reshape(1, -1), scores.reshape(1, -1), np.stack([priors.ravel(), variances])]
    wanted = compiled([*feeds[:2], feeds[2][None]])[0][0, 0]
    wanted = wanted[wanted[:, 2] > 0][:, [3, 4, 5, 6, 2]] * [300, 200, 300, 200, 1]
    np.save(tmp_path / "priors.npy", priors)
    made = Post(
        "boxes", "b", "s", coding="centre-deltas", anchors=str(tmp_path / "priors.npy"),
        variances=(0.1, 0.2), unit="parts", background=0, nms="onnxruntime", iou=0.4,
    )  # fmt: skip
    rows = results.result({"b": deltas, "s": scores}, made, placed(200, 300))[NAME][0]
    rows = rows[rows.any(axis=1)]
    assert 5 < len(rows) == len(wanted)
    rows, wanted = (r[np.argsort(-r[:, 4])] for r in (rows, wanted))
    np.testing.assert_allclose(rows, wanted, atol=1e-3)


def placed(height: int, width: int) -> Placement:
    """A network's input of this size."""
    return Placement((1.0, 1.0), (0.0, 0.0), (height, width), (height, width))


def test_levels_of_distributions() -> None:
    """PicoDet: each level a row of cells; means of distributions, in strides, from their middle."""
    bins = np.full((8, 4, 3), -50, np.float32)  # 2x3 cells 8 pixels apart, 1x2 of 16
    bins[:, :, 1] = 50  # one stride to each side
    bins[7, 2] = [50, -50, 50]  # half of nothing, half of two strides
    levels = bins.reshape(1, 8, 12)
    outputs = {"b8": levels[:, :6], "b16": levels[:, 6:], "s8": np.ones((1, 6, 2), np.float32)}
    outputs["s16"] = np.ones((1, 2, 2), np.float32)
    made = Post("boxes", ("b8", "b16"), ("s8", "s16"), coding="dfl", stride=(8, 16), threshold=0.5)
    rows = results.result(outputs, made, placed(16, 24))[NAME][0]
    np.testing.assert_allclose(rows[4, :4], [4, 4, 20, 20])  # around 12, 12
    np.testing.assert_allclose(rows[7, :4], [8, -8, 40, 24])  # around 24, 8
    corner = results.result(outputs, replace(made, shift=0.0, offset=1), placed(16, 24))[NAME][0]
    np.testing.assert_allclose(corner[4, :4], [0, 0, 15, 15])
    whole = np.concatenate([levels, np.ones((1, 8, 2), np.float32)], axis=2)  # as YOLOv8's head
    one = replace(made, output="", scores="", bins=3)
    np.testing.assert_array_equal(results.result({"o": whole}, one, placed(16, 24))[NAME][0], rows)
    with pytest.raises(UsageError, match="5 cells for 8 boxes"):
        results.result({"o": whole}, one, placed(16, 16))
    with pytest.raises(UsageError, match="size of the network's input"):
        results.result({"o": whole}, one)


def test_distances_and_their_centreness() -> None:
    """FCOS: maps of distances; the root of the score's product with the objectness."""
    maps = np.zeros((1, 4, 2, 2), np.float32) + np.array([1, 2, 3, 4], np.float32)[:, None, None]
    outputs = {"b": maps, "s": np.full((1, 3, 2, 2), 0.0), "c": np.full((1, 1, 2, 2), 100.0)}
    made = Post(
        "boxes", "b", "s", "c", join="root", channels_first=True, activation="sigmoid",
        coding="distances", unit="strides", stride=8,
    )  # fmt: skip
    row = results.result(outputs, made)[NAME][0][1]
    np.testing.assert_allclose(row, [12 - 8, 4 - 16, 12 + 24, 4 + 32, 0.5**0.5, 0], rtol=1e-6)
    pixels = results.result(outputs, replace(made, unit="pixels", join="product"))[NAME][0][1]
    np.testing.assert_allclose(pixels, [11, 2, 15, 8, 0.5, 0], rtol=1e-6)


def test_anchors_of_a_cell_share_its_channels() -> None:
    """RetinaNet: ratios outside, sizes inside; classes of the first anchor come first."""
    deltas, scores = np.zeros((1, 16, 1, 2), np.float32), np.zeros((1, 8, 1, 2), np.float32)
    deltas[0, 4 * 3, 0, 1] = 0.5  # x of the last anchor of the second cell, by half its width
    scores[0, 2 * 3 + 1] = 1
    made = Post(
        "boxes", "b", "s", coding="centre-deltas", channels_first=True, stride=(8,), shift=0.0,
        sizes=((4, 8),), ratios=(1.0, 4.0),
    )  # fmt: skip
    corners, _, kind, classes = heads.candidates({"b": deltas, "s": scores}, made)
    np.testing.assert_allclose(corners[:4, 2:] * 2, [[4, 4], [8, 8], [2, 8], [4, 16]])
    np.testing.assert_allclose(corners[7], [8 + 2 - 2, -8, 8 + 2 + 2, 8])
    assert classes == 2 and kind.tolist() == [0, 0, 0, 1] * 2


def test_levels_in_one_output() -> None:
    """YOLOX: exponentials of sizes in strides, objectness behind the four numbers."""
    head = np.zeros((1, 5, 7), np.float32)  # 2x2 cells 8 pixels apart, one of 16
    head[0, :, 4], head[0, :, 5:] = 0.8, (0.5, 0.75)
    head[0, 3, :4] = [0.25, 0.5, 0, np.log(2)]
    made = Post(
        "boxes", coding="centre-deltas", objectness="behind", stride=(8, 16), shift=0.0,
        anchors=(((8.0, 8.0),), ((16.0, 16.0),)),
    )  # fmt: skip
    rows = results.result({"o": head}, made, placed(16, 16))[NAME][0]
    np.testing.assert_allclose(rows[3], [10 - 4, 12 - 8, 10 + 4, 12 + 8, 0.6, 1], rtol=1e-6)
    np.testing.assert_allclose(rows[4, :4], [-8, -8, 8, 8])


def test_an_offset_moves_the_far_corner_by_one() -> None:
    numbers = np.array([[10, 10, 4, 6]], np.float32)
    plain, offset = (
        boxes(numbers, [0.9], Post("boxes", coding="centre", offset=o)) for o in (0, 1)
    )
    np.testing.assert_array_equal(plain[0, :4], [8, 7, 12, 13])
    np.testing.assert_array_equal(offset[0, :4], [8, 7, 11, 12])


def test_a_grid_of_anchors_is_laid_out_row_by_row() -> None:
    made = Post("boxes", coding="corner-deltas", channels_first=True, stride=2, cell=12)
    scores = np.ones((1, 1, 2, 3), np.float32)
    outputs = {"b": np.zeros((1, 4, 2, 3), np.float32), "s": scores}
    rows = results.result(outputs, replace(made, scores="s"))[NAME][0]
    np.testing.assert_array_equal(rows[1], [2, 0, 14, 12, 1])
    np.testing.assert_array_equal(rows[3], [0, 2, 12, 14, 1])


def test_scores_that_follow_the_numbers_have_a_class() -> None:
    """YOLO: [1, 4 + classes, candidates]."""
    head = np.array([[[8, 20], [8, 20], [4, 4], [4, 4], [0.1, 0.7], [0.9, 0.2]]], np.float32)
    made = Post("boxes", coding="centre", channels_first=True)
    rows = results.result({"o": head}, made)[NAME][0]
    np.testing.assert_allclose(rows, [[6, 6, 10, 10, 0.9, 1], [18, 18, 22, 22, 0.7, 0]], rtol=1e-6)


@given(_CORNERS, st.lists(st.integers(1, 99), min_size=6, max_size=6, unique=True))
@settings(max_examples=40)
def test_suppression_keeps_the_best_and_nothing_that_overlaps_it(
    numbers: np.ndarray, scores: list[int]
) -> None:
    """Both libraries, against the definition: greedy, by score, IoU above the limit is gone."""

    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        inside = np.clip(np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]), 0, None)
        areas = [np.prod(v[2:4] - v[:2]) for v in (a, b)]
        return float(np.prod(inside) / (sum(areas) - np.prod(inside)))

    weights = [s / 100 for s in scores]
    every = boxes(numbers, weights, Post("boxes", threshold=0.0))
    ordered = every[np.argsort(-every[:, 4])]
    if any(abs(overlap(a, b) - 0.5) < 1e-3 for a in every for b in every):
        return  # on the limit, where rounding decides
    left: list[np.ndarray] = []
    for row in ordered:
        if all(overlap(row, other) <= 0.5 for other in left):
            left.append(row)
    for library in ("onnxruntime", "opencv"):
        kept = boxes(numbers, weights, Post("boxes", threshold=0.0, nms=library, iou=0.5))
        np.testing.assert_array_equal(kept[np.argsort(-kept[:, 4])], np.array(left))


def test_an_offset_of_overlaps_decides_between_neighbours() -> None:
    numbers = np.array([[0, 0, 9, 9], [0, 5, 9, 14]], np.float32)  # IoU 4/14, with offset 5/15
    for offset, left in ((0, 2), (1, 1)):
        for library in ("onnxruntime", "opencv"):
            made = Post("boxes", nms=library, iou=0.3, iou_offset=offset)
            assert len(boxes(numbers, [0.9, 0.8], made)) == left


def test_classes_suppress_each_other_only_where_told() -> None:
    head = np.array([[[8, 8.5, 4, 4, 0.9, 0.1], [8, 8, 4, 4, 0.1, 0.8]]], np.float32)
    for aware, left in ((True, 2), (False, 1)):
        made = Post("boxes", coding="centre", nms="onnxruntime", class_aware=aware)
        rows = results.result({"o": head}, made)[NAME][0]
        assert np.count_nonzero(rows.any(axis=1)) == left


@given(_POSTS, _POSTS)
@settings(max_examples=50)
def test_all_steps_lead_from_training_to_deployment(a: Post, b: Post) -> None:
    reached = post.between(a, b)
    assert reached[0] == ("", a) and reached[-1][1] == b
    assert {step.noise for step in post.STEPS} <= {noise.id for noise in discovery.noises()}
    for step in stages.differing(post.STEPS, a, b):
        assert a.steps()[step.name] != b.steps()[step.name]


# --- descriptions --------------------------------------------------------------------------------

_SIDE = '[training]\ndecoder = "pillow"\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("post = {}", None),
        ("post = { threshold = 0.5 }", "does not say `post.kind`"),
        ('post = { kind = "texts" }', "`texts` is no value of `post.kind`"),
        ('[training.post]\nkind = "mask"\ntreshold = 1', "line 5: `post.treshold` is no key"),
        ('post = { kind = "boxes", coding = "centre-deltas" }', "needs anchors"),
        ('post = { kind = "boxes", offset = 0.5 }', "0 or 1"),
        ('post = { kind = "boxes", variances = [1, 2, 3] }', "two numbers"),
        ('post = { kind = "boxes", output = 3 }', "a name in quotes"),
        ('post = { kind = "mask", output = ["a", "b"] }', "names 2 outputs"),
        ('post = { kind = "boxes", output = ["a", "b"], scores = "s" }', "names 1 outputs"),
        ('post = { kind = "boxes", coding = "dfl" }', "Say the `stride` of each level"),
        (
            'post = { kind = "boxes", stride = [8, 16], cell = [8] }',
            "has 1 levels, `post.stride` 2",
        ),
        ('post = { kind = "boxes", stride = 8, anchors = [[[8, 0]]] }', "[width, height]"),
        ('post = { kind = "boxes", stride = 8, cell = 8, sizes = [[8]] }', "so does `post.sizes`"),
        ('post = "softmax"', "a table is expected"),
        (
            'post = { kind = "mask" }\n[deployment]\npost = { kind = "scores" }',
            "results of different kinds",
        ),
    ],
)
def test_a_mistake_is_named(line: str, said: str | None) -> None:
    text = f"{_SIDE}{line}\n"
    if said is None:
        assert description.parse(text, "p.toml").training_post is None
        return
    with pytest.raises(UsageError) as error:
        description.parse(text, "p.toml")
    assert said in f"{error.value.message} {error.value.hint}"


def test_the_deployment_side_inherits_key_by_key() -> None:
    both = ['post = { kind = "mask", threshold = 0.3 }', "[deployment]", 'post = { output = "m" }']
    found = description.parse(_SIDE + "\n".join(both), "p.toml")
    assert found.deployment_post == Post("mask", output="m", threshold=0.3)


# --- the audit -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of deltas and scores, from two convolutions with seeded random weights."""
    rng = np.random.default_rng(5)

    def weights(name: str, channels: int, scale: float) -> TensorProto:
        values = rng.standard_normal((channels, 3, 3, 3)).astype(np.float32) * np.float32(scale)
        return onnx.numpy_helper.from_array(values, name)

    nodes = [
        helper.make_node("Conv", ["image", "w"], ["deltas"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Conv", ["image", "v"], ["s"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Softmax", ["s"], ["scores"], axis=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "detector",
        [value("image", TensorProto.FLOAT, [1, 3, 32, 32])],
        [
            value("deltas", TensorProto.FLOAT, [1, 4, 15, 15]),
            value("scores", TensorProto.FLOAT, [1, 2, 15, 15]),
        ],
        [weights("w", 4, 0.01), weights("v", 2, 0.6)],
    )
    path = tmp_path_factory.mktemp("detector") / "detector.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


_DETECT = """
post = { kind = "boxes", output = "deltas", scores = "scores", channels_first = true, \
background = 0, threshold = 0.5, coding = "corner-deltas", stride = 2, cell = 12, offset = 1, \
nms = "onnxruntime", iou = 0.5 }
"""


def run(network: Path, photos: Path, pipeline: Path, *lines: str) -> AuditReport:
    """Audit with these lines at the end of the description's training side."""
    pipeline.write_text("\n".join([pipeline.read_text(), *lines]))
    asked = AuditOptions(
        (BackendSpec("ort"),), images=photos, pipeline=str(pipeline), confirm=False
    )
    return audit(network, asked, noises=discovery.noises(), progress=Silent())


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("offset = 0", "box_offset"),
        ('rounding = "floor"', "box_rounding"),
        ("threshold = 0.7", "threshold"),
        ("iou = 0.2", "nms"),
        ("cell = 10", "box_decode"),
    ],
)
def test_a_planted_mistake_is_the_first_offender(
    detector: Path, photos: Path, pipeline: Path, key: str, name: str
) -> None:
    report = run(detector, photos, pipeline, _DETECT, "[deployment]", f"post = {{ {key} }}")
    first = report.findings[0]
    assert (first.noise, first.stage) == (f"postprocessing.{name}", "post-processing")
    whole = report.backends[0].end_to_end
    assert whole is not None
    shares = {s.noise: s.share for s in whole.shares}
    assert shares[f"postprocessing.{name}"] == pytest.approx(1, abs=1e-3)
    assert sum(shares.values()) + whole.unexplained_share == pytest.approx(1)
    assert whole.outputs[0].kind == "boxes" and whole.outputs[0].name == NAME


def test_mistakes_on_both_sides_of_the_network_share_one_difference(
    detector: Path, photos: Path, pipeline: Path
) -> None:
    wrong = ["[deployment]", 'channels = "bgr"', "post = { offset = 0 }"]
    report = run(detector, photos, pipeline, _DETECT, *wrong)
    assert {f.noise for f in report.findings} == {
        "preprocessing.channels",
        "postprocessing.box_offset",
    }
    whole = report.backends[0].end_to_end
    assert whole is not None
    total = sum(s.share for s in whole.shares) + whole.unexplained_share
    assert total == pytest.approx(1)
    assert report.pipeline is not None
    assert sum(s.share or 0 for s in report.pipeline.steps) == pytest.approx(1)


def test_a_side_alike_is_silent(detector: Path, photos: Path, pipeline: Path) -> None:
    report = run(detector, photos, pipeline, _DETECT)
    assert not report.findings and report.exit_code == 0
    assert report.backends[0].end_to_end is not None  # the result is still what is compared


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"deltas"', '"boxes"'), "the network has no output `boxes`"),
        (("stride = 2, cell = 12", 'anchors = "none.npy"'), "cannot be read"),
        (("channels_first = true", "channels_first = false"), "scores of"),
    ],
)
def test_a_description_of_another_network(
    detector: Path, photos: Path, pipeline: Path, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(UsageError) as error:
        run(
            detector, photos, pipeline, _DETECT.replace(*change), "[deployment]", 'channels = "bgr"'
        )
    assert said in error.value.message


def test_a_mask_and_an_activation(network: Path, photos: Path, pipeline: Path) -> None:
    report = run(
        network,
        photos,
        pipeline,
        'post = { kind = "scores", activation = "softmax" }',
        '[deployment]\npost = { activation = "none" }',
    )
    assert report.findings[0].noise == "postprocessing.activation"


def test_a_backend_with_outputs_of_another_shape_is_a_gap_of_the_result(
    photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    """TVM leaves SAME_LOWER unpadded here: fewer scores than boxes."""
    value = helper.make_tensor_value_info
    weights = onnx.numpy_helper.from_array(
        np.random.default_rng(6).standard_normal((4, 3, 1, 1)).astype(np.float32), "w"
    )
    nodes = nodes_of("deltas = Conv <kernel_shape = [1, 1], strides = [2, 2]> (image, w) "
'scores = MaxPool <auto_pad = "SAME_LOWER", kernel_shape = [3, 3], strides = [2, 2]> '
"(image)")  # fmt: skip
    shapes = {"deltas": [1, 4, 16, 16], "scores": [1, 3, 16, 16]}
    graph = helper.make_graph(
        nodes,
        "odd",
        [value("image", TensorProto.FLOAT, [1, 3, 31, 31])],
        [value(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [weights],
    )
    path = tmp_path / "odd.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    lines = [_DETECT.replace("background = 0, ", ""), "[deployment]", 'channels = "bgr"']
    text = pipeline.read_text().replace("crop = 32", "crop = 31")
    pipeline.write_text("\n".join([text, *lines]))
    asked = AuditOptions(
        (BackendSpec("tvm"),), images=photos, pipeline=str(pipeline), confirm=False
    )
    report = audit(path, asked, noises=discovery.noises(), progress=Silent())
    (backend,) = report.backends
    assert backend.status == "audited" and report.exit_code == 1
    assert any("has no result" in gap.reason for gap in report.gaps)
    assert {f.backend for f in report.findings} == {"pipeline", "tvm"}


# --- the table -----------------------------------------------------------------------------------


def test_the_table_has_what_comes_after_the_network(
    detector: Path, photos: Path, pipeline: Path
) -> None:
    pipeline.write_text(
        "\n".join([pipeline.read_text(), _DETECT, "[deployment]", "post = { threshold = 0.6 }"])
    )
    described = description.load(str(pipeline))
    report = sysnoise(
        model.load(detector),
        described,
        folders.find(photos, None, 6),
        [],
        keep=photos.parent / "keep.jsonl",
        threads=2,
        progress=Silent(),
    )
    assert (report.output, report.kind) == (NAME, "boxes")
    types = {t.id: t for t in report.types}
    (offset,) = types["postprocessing.box_offset"].options
    assert len(types["postprocessing.box_rounding"].options) == 2
    assert {o.name for o in types["postprocessing.nms"].options} == {
        "onnxruntime, IoU with offset 1",
        "opencv, IoU with offset 0",
        "opencv, IoU with offset 1",
    }
    assert report.deployment is not None and report.deployment.effect.relative_l2.value > 0
    assert any("postprocessing.box_offset" in step.types for step in report.accumulation)

    session = sessions.session(onnx.load(detector), 1)
    first, names = described.training_post, [o.name for o in session.get_outputs()]
    assert first is not None
    apart = []
    for photo in folders.find(photos, None, 6).names:
        tensor = Preparation((photos / photo).read_bytes()).tensor(described.training)
        outputs = dict(zip(names, session.run(names, {"image": tensor}), strict=True))
        old, new = (results.result(outputs, p)[NAME] for p in (first, replace(first, offset=0)))
        # A photograph on which nothing is detected keeps its zeros.
        apart.append(np.linalg.norm(new - old) / (np.linalg.norm(old) or 1))
    assert offset.effect.relative_l2.value == pytest.approx(float(np.mean(apart)), rel=1e-4)
