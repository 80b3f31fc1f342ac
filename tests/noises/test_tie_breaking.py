"""Ties decided the other way, by numpy's sorting and by plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.noises import tie_breaking
from auditor.ports import Array, Arrays, SegmentGraph
from tests.segments import diagnose, make_segment, run

ID = "implementation.tie_breaking"


@pytest.fixture
def tied(generator: np.random.Generator) -> Array:
    return generator.integers(0, 4, (6, 12)).astype(np.float32)


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize(("axis", "last"), [(1, 0), (-1, 1), (0, 0)])
def test_extreme_of_equals(tied: Array, op_type: str, axis: int, last: int) -> None:
    node = helper.make_node(op_type, ["x"], ["y"], axis=axis, keepdims=0, select_last_index=last)
    segment = make_segment([node], {}, ["x"], ["y"])
    planted = np.empty(np.delete(tied.shape, axis), np.int64)
    for i, row in enumerate(np.moveaxis(tied, axis, -1)):
        places = np.flatnonzero(row == (row.max() if op_type == "ArgMax" else row.min()))
        planted[i] = places[0] if last else places[-1]
    found = diagnose(segment, {"x": tied}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0
    wrong = np.random.default_rng(8).integers(0, tied.shape[axis], planted.shape)
    assert diagnose(segment, {"x": tied}, {"y": wrong}).noise is None


@pytest.mark.parametrize("largest", [0, 1])
def test_order_of_equals(tied: Array, largest: int) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=1, largest=largest)
    segment = make_segment([node], {"k": np.array([7])}, ["x"], ["v", "i"])
    order = np.lexsort((-np.arange(12) + np.zeros_like(tied), -tied if largest else tied), axis=1)
    order = order[:, :7]
    observed = {"v": np.take_along_axis(tied, order, 1), "i": order.astype(np.int64)}
    assert diagnose(segment, {"x": tied}, observed).noise == ID


def overlap(a: Array, b: Array) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inter = np.prod(np.maximum(high - low, 0))
    return float(inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter))


def select(boxes: Array, scores: Array, limit: float, *, inclusive: bool, last: bool) -> Array:
    """Non-maximum suppression as a plain loop over one image and its classes."""
    rows = []
    for label, row in enumerate(scores[0]):
        order = sorted(range(len(row)), key=lambda i: (-row[i], -i if last else i))
        kept: list[int] = []
        for i in order:
            shares = [overlap(boxes[0, i], boxes[0, k]) for k in kept]
            if not any(s > limit or (inclusive and s == limit) for s in shares):
                kept.append(i)
        rows += [[0, label, i] for i in kept]
    return np.array(rows, np.int64)


@pytest.fixture
def boxes() -> tuple[SegmentGraph, Arrays]:
    """Pairs of boxes that overlap by exactly a half or by a quarter, with tied scores."""
    corners = [(y, x, y + 1, x + 1) for y in range(0, 6, 2) for x in range(0, 6, 2)]
    halves = [(y + (0.75, 0.5)[x > 0], x, y2, x2) for y, x, y2, x2 in corners]
    values = np.array([corners + halves], np.float32)
    scores = np.random.default_rng(1).integers(1, 5, (1, 2, 18)).astype(np.float32) / 8
    constants = {
        "most": np.array([20]),
        "limit": np.array([0.5], np.float32),
        "least": np.array([0.01], np.float32),
    }
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", *constants], ["y"])
    segment = make_segment([node], constants, ["boxes", "scores"], ["y"])
    return segment, {"boxes": values, "scores": scores}


@pytest.mark.parametrize("limit", [0.5, 0.4])
@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_boxes(boxes: Any, limit: float, inclusive: bool, last: bool) -> None:
    segment, feeds = boxes
    segment.model.graph.initializer[1].CopyFrom(
        helper.make_tensor("limit", TensorProto.FLOAT, (1,), [limit])
    )
    picked = select(feeds["boxes"], feeds["scores"], limit, inclusive=inclusive, last=last)
    plain = select(feeds["boxes"], feeds["scores"], limit, inclusive=False, last=False)
    np.testing.assert_array_equal(run(segment.model, feeds)["y"], plain)
    found = diagnose(segment, feeds, {"y": picked})
    if np.array_equal(picked, plain):
        assert found.noise is None and found.hypotheses == ()
    elif inclusive and last and limit == 0.5:
        assert found.noise is None  # two at once, and neither alone is enough
    else:
        assert found.noise == ID and found.bit_identical == 1.0


def test_boxes_sorted_by_score(boxes: Any) -> None:
    segment, feeds = boxes
    picked = run(segment.model, feeds)["y"]
    keys = feeds["scores"][picked[:, 0], picked[:, 1], picked[:, 2]]
    planted = picked[np.argsort(-keys, kind="stable")]
    found = diagnose(segment, feeds, {"y": planted})
    assert found.noise == ID and "score" in (found.variant or "")
    shuffled = np.random.default_rng(2).permutation(picked)
    assert diagnose(segment, feeds, {"y": shuffled}).noise is None


def test_halves_rounded_away_from_zero() -> None:
    x = np.arange(-9, 10, dtype=np.float32)[None] / 2
    segment = make_segment("y = Round(x)")
    planted = np.trunc(x + np.copysign(np.float32(0.5), x))
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0


def by_openvino(segment: SegmentGraph, feeds: Arrays, kinds: dict[str, int]) -> Arrays:
    """What OpenVINO makes of a segment, whose outputs have these element types."""
    openvino = pytest.importorskip("openvino", reason="needs the [ov] extra")
    shaped = type(segment.model)()
    shaped.CopyFrom(segment.model)
    del shaped.graph.input[:], shaped.graph.output[:]
    info = helper.make_tensor_value_info
    for name, value in feeds.items():
        shaped.graph.input.append(info(name, TensorProto.FLOAT, value.shape))
    shaped.graph.output.extend(info(name, kind, None) for name, kind in kinds.items())
    core = openvino.Core()
    results = core.compile_model(core.read_model(shaped.SerializeToString()), "CPU")(feeds)
    return dict(zip(kinds, results.values(), strict=True))


def test_openvino_counts_an_overlap_at_the_limit(boxes: Any) -> None:
    segment, feeds = boxes
    observed = by_openvino(segment, feeds, {"y": TensorProto.INT64})["y"].astype(np.int64)
    expected = select(feeds["boxes"], feeds["scores"], 0.5, inclusive=True, last=False)
    if not np.array_equal(observed, expected):
        pytest.skip("this OpenVINO decides otherwise")
    assert diagnose(segment, feeds, {"y": observed}).noise == ID


@pytest.mark.parametrize(("largest", "kind"), [(0, TensorProto.FLOAT), (1, TensorProto.DOUBLE)])
def test_openvino_selects_by_a_heap(
    generator: np.random.Generator, largest: int, kind: int
) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], largest=largest)
    segment = make_segment([node], {"k": np.array([20])}, ["x"], ["v", "i"])
    x = generator.integers(0, 4, (2, 90)).astype(helper.tensor_dtype_to_np_dtype(kind))
    segment.model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, x.shape))
    segment.model.graph.output[0].type.tensor_type.elem_type = kind
    observed = by_openvino(segment, {"x": x}, {"v": kind, "i": TensorProto.INT64})
    found = diagnose(segment, {"x": x}, observed)
    assert found.noise == ID and found.bit_identical == 1


def test_a_long_row_goes_through_the_heap_in_part(generator: np.random.Generator) -> None:
    """A detector's saturated scores: more of them are equal than are taken, among 150,000."""
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    segment = make_segment([node], {"k": np.array([1000])}, ["x"], ["v", "i"])
    x = np.minimum(generator.random((1, 150_000)) * 1.02, 1).astype(np.float32)
    x[:, :20_000] *= 0.99  # equal values come late, and push smaller ones out
    segment.model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    )
    observed = by_openvino(segment, {"x": x}, {"v": TensorProto.FLOAT, "i": TensorProto.INT64})
    found = diagnose(segment, {"x": x}, observed)
    assert found.noise == ID and found.bit_identical == 1


def test_segments_without_selections_are_not_touched() -> None:
    segment = make_segment("y = Exp(x)")
    assert list(tie_breaking.NOISE.variants(segment)) == []
    assert tie_breaking.NOISE.remedy("ov")
