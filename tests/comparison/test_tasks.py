"""What is read off an output: the rules, and figures checked against others' formulas."""

import math

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rapidfuzz.distance import Levenshtein

from auditor.comparison import texts
from auditor.comparison.tasks import TaskMeter, assume
from auditor.errors import UsageError

RNG = np.random.default_rng(0)


def _logits(rows=4, classes=10):
    return (3 * RNG.standard_normal((rows, classes))).astype(np.float32)


def _softmax(values):
    return torch.softmax(torch.from_numpy(values), -1).numpy()


def _corners(count=50):
    low = RNG.uniform(0, 200, (1, count, 2))
    return np.concatenate([low, low + RNG.uniform(5, 60, (1, count, 2))], 2).astype(np.float32)


def _head(count=300, classes=20):
    """A detection head as exported: centre, size and class scores along the middle axis."""
    corners = _corners(count)
    size = corners[..., 2:] - corners[..., :2]
    scores = RNG.uniform(0, 1, (1, count, classes))
    rows = np.concatenate([corners[..., :2] + size / 2, size, scores], 2)
    return np.swapaxes(rows, 1, 2).astype(np.float32)


def _unit(rows=3, width=64):
    values = RNG.standard_normal((rows, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def _measure(kind, *pairs):
    meter = TaskMeter("y", kind)
    for sample, (observed, reference) in enumerate(pairs):
        meter.add(observed, reference, sample)
    return meter.result()


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("output", _logits(), "scores"),
        ("output", _softmax(_logits(classes=2)), "scores"),
        ("output", _softmax(_logits(40, 500))[None], "scores"),  # one row per time step
        ("logits", RNG.standard_normal((1, 16, 300)).astype(np.float32), "scores"),
        ("logits", _logits(classes=4), "scores"),
        ("output", _logits(classes=4), "none"),  # as often coordinates
        ("output", RNG.uniform(0, 1, (2, 20)).astype(np.float32), "none"),  # several answers
        ("output", RNG.uniform(0, 1, (1, 1, 32, 32)).astype(np.float32), "mask"),
        ("output", RNG.standard_normal((1, 8, 32, 32)).astype(np.float32), "none"),
        ("mask", RNG.standard_normal((1, 1, 32, 32)).astype(np.float32), "mask"),
        ("output", _corners(), "boxes"),
        ("output", _head(), "boxes"),
        ("boxes", _corners()[0], "boxes"),
        ("boxes", RNG.standard_normal((8, 4)).astype(np.float32), "none"),  # offsets
        ("output", _unit(), "embedding"),
        ("last_hidden_state", RNG.standard_normal((1, 16, 48)).astype(np.float32), "embedding"),
        ("output", RNG.standard_normal((1, 16, 48)).astype(np.float32), "embedding"),
        ("landmarks", RNG.standard_normal((8, 10)).astype(np.float32), "none"),
        ("output", np.arange(10)[None], "none"),
        ("output", np.float32(1.0), "none"),
        ("output", np.full((1, 10), np.nan, np.float32), "none"),
        ("output", np.zeros((0, 4), np.float32), "none"),
    ],
)
def test_the_kind_is_assumed_from_name_and_values(name, values, kind):
    assert assume(name, np.asarray(values)) == kind


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("efficientnet_lite0", {"logits": "scores"}),
        ("minilm", {"sentence_embedding": "embedding"}),
        ("ppocr_det", {"sigmoid_0.tmp_0": "mask"}),
        ("ppocr_rec", {"softmax_11.tmp_0": "scores"}),
        ("mtcnn_r", {"boxes": "none", "scores": "scores"}),
        ("mtcnn_o", {"boxes": "none", "landmarks": "none", "scores": "scores"}),
    ],
)
def test_real_outputs_are_read_as_what_they_are(zoo_model, model, kinds):
    path = zoo_model(model)
    session = ort.InferenceSession(path)
    data = np.load(path.with_suffix(".npz"))
    values = session.run(None, {name: data[name][0] for name in data})
    found = {o.name: assume(o.name, v) for o, v in zip(session.get_outputs(), values, strict=True)}
    assert found == kinds


@pytest.mark.parametrize("probabilities", [False, True])
def test_scores_agree_with_torch(probabilities):
    reference, observed = _logits(6, 30), _logits(6, 30)
    observed = (reference + observed / 2).astype(np.float32)
    b, r = (torch.log_softmax(torch.from_numpy(v).double(), -1) for v in (observed, reference))
    kl = torch.nn.functional.kl_div(b, r, log_target=True, reduction="batchmean")
    if probabilities:
        observed, reference = _softmax(observed), _softmax(reference)
    top = torch.topk(torch.from_numpy(reference), 2, dim=-1)
    found = _measure("scores", (observed, reference))
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.margin == pytest.approx(float((top.values[:, 0] - top.values[:, 1]).mean()))
    flips = torch.from_numpy(observed).argmax(-1) != torch.from_numpy(reference).argmax(-1)
    assert (found.items, found.changed) == (6, int(flips.sum()))


def test_flips_are_counted_and_the_first_one_named():
    steady = np.asarray([[0.0, 2.0, 1.0]], np.float32)
    flipped = np.asarray([[0.0, 2.0, 2.5]], np.float32)
    found = _measure("scores", (steady, steady), (flipped, steady), (flipped, steady))
    assert (found.samples, found.items, found.changed, found.first_changed) == (3, 3, 2, 1)
    assert found.margin == pytest.approx(1)
    assert found.margin_after == pytest.approx((1 - 0.5 - 0.5) / 3)
    assert found.sentence.startswith("top-1 flips in 2 of 3 rows, first on sample 1; margin 1 → 0;")


def test_scores_that_are_no_numbers_are_flips():
    reference = _logits(2)
    observed = reference.copy()
    observed[1, 3] = np.nan
    found = _measure("scores", (observed, reference))
    assert (found.changed, found.kl) == (1, 0)


def test_a_box_moved_by_half_its_width_overlaps_a_third():
    reference = np.asarray([[[0, 0, 10, 10], [100, 100, 120, 140]]], np.float32)
    observed = reference.copy()
    observed[0, 0, [0, 2]] += 5
    found = _measure("boxes", (observed, reference))
    assert found.lowest == pytest.approx(1 / 3)
    assert found.iou == pytest.approx((1 + 1 / 3) / 2)
    assert (found.items, found.changed, found.first_changed) == (2, 1, 0)


def test_boxes_may_come_in_another_order_and_number():
    reference = _corners(20)
    more = np.concatenate([reference[:, ::-1], _corners(3)], axis=1)
    assert _measure("boxes", (more, reference)).lowest == 1.0
    fewer = reference[:, :15]
    assert _measure("boxes", (fewer, reference)).changed >= 1
    assert _measure("boxes", (reference[:, :0], reference)).changed == 20


def test_a_detection_below_the_threshold_is_lost():
    reference = _head()
    reference[:, 4:] *= 0.2  # background everywhere …
    reference[0, 4, :5] = 0.9  # … but in five boxes
    observed = reference.copy()
    observed[0, 4:, 0] = 0.1
    observed[0, :2, 0] += 1000  # so that no neighbour stands in for it
    reference[0, :2, 0] += 1000
    found = _measure("boxes", (observed, reference))
    assert (found.items, found.changed, found.lowest) == (5, 1, 0)


def test_masks_count_pixels_on_either_side():
    reference = np.zeros((1, 1, 4, 4), np.float32)
    reference[..., :2, :] = 0.9
    observed = reference.copy()
    observed[..., 0, 0] = 0.4
    observed[..., 3, 3] = 0.6
    found = _measure("mask", (reference, reference), (observed, reference))
    assert (found.items, found.changed, found.first_changed) == (32, 2, 1)
    assert found.iou == pytest.approx((8 + 7) / (8 + 9))
    assert found.lowest == pytest.approx(7 / 9)


def test_two_empty_masks_agree():
    empty = np.zeros((1, 1, 4, 4), np.float32)
    assert _measure("mask", (empty, empty)).iou == 1


def _steps(*classes, count=5):
    return np.log(np.eye(count, dtype=np.float32)[list(classes)] + 0.01)[None]


def test_texts_are_read_off_their_steps():
    reference = _steps(0, 1, 1, 0, 1, 2, 0, 0, 3)  # 1 1 2 3
    observed = _steps(0, 1, 1, 1, 1, 2, 0, 4, 0)  # 1 2 4
    found = _measure("text", (reference, reference), (observed, reference))
    assert (found.blank, found.texts, found.texts_changed) == (0, 2, 1)
    assert (found.edits, found.characters, found.example) == (2, 8, ("1 1 2 3", "1 2 4"))
    assert (found.items, found.changed, found.first_changed) == (18, 3, 1)
    assert found.sentence.startswith(
        "1 of 2 texts change, 2 edits in 8 characters (blank: class 0)"
    )
    found = _measure("text", (observed[:, :4], reference))  # a runtime that drops steps
    assert (found.texts_changed, found.edits, found.changed) == (1, 3, 9)


def test_the_blank_is_the_token_that_says_so(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "b": 2, "a": 1, "<blk>": 3, "c": 4}')
    (tmp_path / "tokens.txt").write_text("<pad> 0\na 1\nb 2\n<blk> 3\nc 4\n")
    (tmp_path / "lines.txt").write_text("<pad>\na\nb\n<blk>\nc\n")
    for name in ("vocab.json", "tokens.txt", "lines.txt"):
        read = texts.tokens(tmp_path / name)
        meter = TaskMeter("y", "text", read)
        meter.add(_steps(1, 3, 1, 2), _steps(1, 1, 2, 4), 0)
        found = meter.result()
        assert (found.blank, found.edits, found.example) == (3, 2, ("abc", "aab")), name
    with pytest.raises(UsageError, match=r"none\.txt cannot be read"):
        texts.tokens(tmp_path / "none.txt")


@given(*[st.lists(st.integers(0, 3), max_size=8)] * 2)
def test_edits_are_levenshteins(a, b):
    assert texts.edits(a, b) == Levenshtein.distance(a, b)


def test_embeddings_are_compared_by_their_angle():
    reference = np.asarray([[1, 0], [0, 2]], np.float32)
    observed = np.asarray([[1, 1], [0, 5]], np.float32)
    found = _measure("embedding", (observed, reference))
    assert found.lowest == pytest.approx(math.sqrt(0.5))
    assert found.cosine == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert found.changed is None


def test_a_search_over_embeddings_finds_others():
    """Three texts on a circle: the first moves past the middle between the other two."""
    reference = _on_circle(0.0, 0.5, -0.6)
    still = _measure("embedding", *((v, v) for v in reference))
    assert (still.searched, still.nearest_changed, still.ranks_changed) == (3, 0, 0)
    moved = _measure("embedding", *zip(_on_circle(-0.1, 0.5, -0.6), reference, strict=True))
    # Of 0.5 and -0.6 each, the nearest is the first text before and after.
    assert (moved.searched, moved.nearest_changed, moved.ranks_changed) == (3, 1, 1)
    assert "nearest other changes for 1 of 3" in moved.sentence
    assert _measure("embedding", *zip(reference[:2], reference[:2], strict=True)).searched is None


def test_a_texts_vector_is_the_mean_of_its_tokens():
    texts = [np.stack([v[0] * 2, v[0] * 0])[None] for v in _on_circle(0.0, 0.5, -0.6)]
    other = [np.stack([v[0] * 0, v[0] * 4])[None] for v in _on_circle(0.1, 0.5, -0.3)]
    found = _measure("embedding", *zip(other, texts, strict=True))
    plain = _measure(
        "embedding",
        *zip(_on_circle(0.1, 0.5, -0.3), _on_circle(0.0, 0.5, -0.6), strict=True),
    )
    assert (found.searched, found.ranks_changed) == (plain.searched, plain.ranks_changed)


def _on_circle(*angles):
    return [np.asarray([[math.cos(a), math.sin(a)]], np.float32) for a in angles]


@pytest.mark.parametrize("kind", ["scores", "mask", "embedding", "boxes", "text"])
def test_another_shape_changes_everything_and_does_not_fail(kind):
    reference = _corners(8)
    for observed in (reference[0], reference[..., :2], reference[:0]):
        found = _measure(kind, (observed, reference))
        assert found.sentence
        assert found.changed in (None, 0, found.items)


def test_nothing_is_read_off_an_output_of_no_kind():
    assert _measure("none", (_logits(), _logits())) is None


arrays = hnp.arrays(
    np.float32, (2, 6, 5), elements=st.floats(-1e3, 1e3, width=32), fill=st.nothing()
)


@given(arrays, st.sampled_from(["scores", "boxes", "mask", "embedding"]))
def test_equal_values_change_nothing(values, kind):
    found = _measure(kind, (values.copy(), values))
    assert found.changed in (None, 0)
    assert found.lowest is None or found.lowest == pytest.approx(1)
    assert found.kl is None or found.kl == pytest.approx(0, abs=1e-9)


@settings(max_examples=50)
@given(arrays, arrays, st.sampled_from(["scores", "boxes", "mask", "embedding"]))
def test_figures_stay_in_their_ranges(observed, reference, kind):
    found = _measure(kind, (observed, reference))
    assert found.changed is None or 0 <= found.changed <= found.items
    assert found.iou is None or 0 <= found.iou <= 1
    assert found.lowest is None or -1 <= found.lowest <= 1
    assert found.kl is None or found.kl >= 0


def test_boxes_that_only_the_other_side_has_are_new() -> None:
    boxes = np.array([[[0, 0, 4, 4, 0.9], [10, 10, 14, 14, 0.8]]], np.float32)
    more = np.concatenate([boxes, np.array([[[20, 20, 24, 24, 0.7]]], np.float32)], axis=1)
    padded = np.concatenate([boxes, np.zeros((1, 1, 5), np.float32)], axis=1)
    meter = TaskMeter("boxes", "boxes")
    meter.add(more, padded, 0)
    found = meter.result()
    assert found is not None and (found.items, found.changed, found.added) == (2, 0, 1)
    assert found.sentence.endswith("none of 2 lost, 1 new")
    meter = TaskMeter("boxes", "boxes")
    meter.add(padded, more, 0)
    found = meter.result()
    assert found is not None and (found.changed, found.added) == (1, 0)


def test_a_text_that_was_read_before_is_not_read_again():
    """A pipeline's result: repeats are characters, and there is no blank."""
    one, other = (np.zeros((1, 4, 2), np.float32) for _ in range(2))
    one[0, [0, 1, 2], [1, 0, 0]] = 1
    other[0, [0, 1], [1, 0]] = 1
    meter = TaskMeter("result", "text", ("a", "b"))
    meter.add(other, one, 0)
    meter.add(one, one, 1)
    found = meter.result()
    assert (found.items, found.changed, found.edits) == (2, 1, 1)
    assert found.sentence == "1 of 2 texts change, 1 edits in 6 characters, first `baa` → `ba`"
