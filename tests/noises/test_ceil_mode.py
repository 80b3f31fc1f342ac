"""Planted pooling sizes and divisors: every window is walked in numpy, and OpenVINO's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from auditor.graphs import surgery
from auditor.noises import ceil_mode
from auditor.ports import Array, SegmentGraph
from tests.segments import diagnose, make_segment, run

ID = "inference.ceil_mode"
LOWEST = np.finfo(np.float32).min

Divisor = Callable[[int, int], int]  # (cells inside the padded input, cells in the kernel)


def walk(
    x: Array, kernel: int, stride: int, pads: tuple[int, int], windows: int, divisor: Divisor | None
) -> Array:
    """A square pooling of NCHW, window by window; a maximum where there is no divisor."""
    begin, end = pads
    size = x.shape[-1]
    result = np.zeros((*x.shape[:2], windows, windows), np.float64)
    for i, j in np.ndindex(windows, windows):
        top, left = i * stride - begin, j * stride - begin
        seen = x[
            ..., max(top, 0) : max(top + kernel, 0), max(left, 0) : max(left + kernel, 0)
        ].astype(np.float64)
        if divisor is None:
            result[:, :, i, j] = seen.max((2, 3), initial=float(LOWEST))
            continue
        height = min(top + kernel, size + end) - top
        width = min(left + kernel, size + end) - left
        result[:, :, i, j] = seen.sum((2, 3)) / divisor(height * width, kernel * kernel)
    return result.astype(np.float32)


def inside(cells: int, kernel: int) -> int:
    return cells


def whole(cells: int, kernel: int) -> int:
    return kernel


def pool(op_type: str, kernel: int, stride: int, pads: int, **more: Any) -> Any:
    node = helper.make_node(
        op_type,
        ["x"],
        ["y"],
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        pads=[pads] * 4,
        **more,
    )
    return make_segment([node], {}, ["x"], ["y"], opset=19)


@pytest.fixture
def x(generator: np.random.Generator) -> Array:
    return generator.standard_normal((1, 3, 17, 17)).astype(np.float32)


@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
def test_rounded_the_other_way(x: Array, op_type: str, ceil: int) -> None:
    x = x[..., :16, :16]
    segment = pool(op_type, 3, 2, 1, ceil_mode=ceil, **_counting(op_type))
    planted = walk(x, 3, 2, (1, 1), 8 if ceil else 9, _divisor(op_type, inside))
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999
    assert found.outputs["y"].shape == planted.shape


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
def test_last_window_in_the_padding_is_kept(x: Array, op_type: str) -> None:
    segment = pool(op_type, 2, 2, 1, ceil_mode=1, **_counting(op_type))
    planted = walk(x, 2, 2, (1, 1), 10, _divisor(op_type, inside))
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999 and "kept" in found.variant


@pytest.mark.parametrize(("size", "kernel", "pads"), [(15, 1, 0), (16, 2, 1)])
def test_last_window_past_the_edge_is_kept(x: Array, size: int, kernel: int, pads: int) -> None:
    """Cells lie between the windows, and of the last one none is in the tensor."""
    x = x[..., :size, :size]
    segment = pool("MaxPool", kernel, 3, pads, ceil_mode=1)
    windows = -(-(size - kernel + 2 * pads) // 3) + 1
    planted = walk(x, kernel, 3, (pads, pads), windows, None)
    assert (planted[..., -1] == LOWEST).all()
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999 and "kept" in found.variant


@pytest.mark.parametrize("power", [1, 2, 3])
def test_lp_pooling_as_an_average_of_powers(x: Array, power: int) -> None:
    """OpenVINO and TVM compute it so."""
    segment = pool("LpPool", 3, 2, 0, ceil_mode=1, p=power)
    means = walk(np.abs(x[..., :16, :16]) ** power, 3, 2, (0, 0), 8, inside)
    found = diagnose(segment, {"x": x[..., :16, :16]}, {"y": (means * 9) ** (1 / power)})
    assert found.noise == ID and found.explained > 0.9999 and "weighs" in found.variant


def test_kept_windows_of_a_bfloat16_build(x: Array) -> None:
    """Its lowest number is not float32's, and its inputs were rounded before."""
    segment = pool("MaxPool", 2, 2, 1, ceil_mode=1)
    narrow = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    planted = walk(narrow, 2, 2, (1, 1), 10, None)
    planted[planted == LOWEST] = float(ml_dtypes.finfo(ml_dtypes.bfloat16).min)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and 0.999 < found.explained < 1


@pytest.mark.parametrize(("kernel", "stride", "pads"), [(3, 2, 1), (4, 5, 0)])
def test_average_over_the_whole_kernel(x: Array, kernel: int, stride: int, pads: int) -> None:
    x = x[..., :16, :16]
    segment = pool("AveragePool", kernel, stride, pads, ceil_mode=1, count_include_pad=1)
    windows = -(-(16 - kernel + 2 * pads) // stride) + 1
    planted = walk(x, kernel, stride, (pads, pads), windows, whole)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999
    assert found.variant == "cells past the padded edge count in an average"


def test_average_over_the_whole_kernel_where_a_window_is_dropped(x: Array) -> None:
    """Along the second axis; ONNX Runtime infers that window where the shape is known."""
    x = x[..., :16, :15]
    segment = pool("AveragePool", 3, 2, 1, ceil_mode=1, count_include_pad=1)
    surgery.set_attributes(segment.model.graph.node[0], kernel_shape=[3, 2])
    segment.model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, x.shape))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), (2, 3))[..., ::2, ::2, :, :]
    found = diagnose(segment, {"x": x}, {"y": windows.mean((-2, -1))})
    assert found.variant == "cells past the padded edge count in an average"


def test_rounded_up_over_the_whole_kernel(x: Array) -> None:
    segment = pool("AveragePool", 4, 3, 0)
    planted = walk(x[..., :15, :15], 4, 3, (0, 0), 5, whole)
    found = diagnose(segment, {"x": x[..., :15, :15]}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
def test_openvino_keeps_windows_and_divides_by_the_whole_kernel(x: Array, op_type: str) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the [ov] extra")
    from openvino import opset13 as ops

    given = ops.parameter(x.shape, np.float32)
    common = {"strides": [2, 2], "pads_begin": [1, 1], "pads_end": [1, 1], "kernel_shape": [3, 3]}
    x = x[..., :16, :16] if op_type == "AveragePool" else x
    given = ops.parameter(x.shape, np.float32)
    if op_type == "MaxPool":
        common["kernel_shape"] = [2, 2]
        made = ops.max_pool(given, dilations=[1, 1], rounding_type="ceil", **common).output(0)
    else:
        made = ops.avg_pool(given, exclude_pad=False, rounding_type="ceil", **common).output(0)
    compiled = openvino.compile_model(openvino.Model([made], [given]), "CPU")
    planted = np.array(compiled(x)[0])
    size = common["kernel_shape"][0]
    segment = pool(op_type, size, 2, 1, ceil_mode=1, **_counting(op_type))
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999


@pytest.mark.parametrize("defect", ["scaled", "swapped", "cropped", "shifted"])
def test_defects_are_not_named(x: Array, defect: str) -> None:
    segment = pool("MaxPool", 2, 2, 1, ceil_mode=1)
    right, kept = walk(x, 2, 2, (1, 1), 9, None), walk(x, 2, 2, (1, 1), 10, None)
    moved = walk(np.roll(x, 1, 3), 2, 2, (1, 1), 10, None)
    planted = {
        "scaled": right * np.float32(1.02),
        "swapped": right[:, [0, 2, 1]],
        "cropped": right[..., 1:, 1:],
        "shifted": np.where(kept == LOWEST, kept, moved),
    }[defect]
    found = diagnose(segment, {"x": x}, {"y": np.ascontiguousarray(planted)})
    assert found.noise is None
    assert all(h.explained < 0.999 for h in found.hypotheses)


def test_nothing_to_replay_without_a_strided_pooling() -> None:
    relu = make_segment("y = Relu(x)")
    unstrided: SegmentGraph = pool("MaxPool", 3, 1, 1, ceil_mode=1)
    assert not list(ceil_mode.NOISE.variants(relu))
    assert not list(ceil_mode.NOISE.variants(unstrided))


def test_indices_follow_where_they_can(x: Array) -> None:
    segment = make_segment(
        "y, i = MaxPool <ceil_mode = 0, kernel_shape = [2, 2], strides = [2, 2]> (x)"
    )
    (variant,) = ceil_mode.NOISE.variants(segment)
    found = run(variant.model, {"x": x})
    assert found["y"].shape == found["i"].shape == (1, 3, 9, 9)


def _counting(op_type: str) -> dict[str, int]:
    return {"count_include_pad": 1} if op_type == "AveragePool" else {}


def _divisor(op_type: str, divisor: Divisor) -> Divisor | None:
    return divisor if op_type == "AveragePool" else None
