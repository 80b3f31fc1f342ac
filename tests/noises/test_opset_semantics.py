"""Operators read as another version defines them, computed with numpy and by real runtimes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.noises import opset_semantics
from auditor.ports import Array
from tests.segments import diagnose, make_segment

ID = "implementation.opset_semantics"


def soft(x: Array, axis: Any, log: bool = False) -> Array:
    wide = np.exp(x.astype(np.float64))
    result = wide / wide.sum(axis, keepdims=True)
    return np.asarray(np.log(result) if log else result, np.float32)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("version", "axis", "planted"), [(11, 1, 1), (12, None, -1), (12, 2, 2)])
def test_older_softmax_along_one_axis(
    generator: np.random.Generator, kind: str, version: int, axis: int | None, planted: int
) -> None:
    x = generator.standard_normal((2, 3, 4, 5)).astype(np.float32)
    given: Any = {} if axis is None else {"axis": axis}
    node = helper.make_node(kind, ["x"], ["y"], **given)
    segment = make_segment([node], {}, ["x"], ["y"], opset=version)
    found = diagnose(segment, {"x": x}, {"y": soft(x, planted, kind == "LogSoftmax")})
    assert found.noise == ID and found.explained > 0.999999


def test_newer_softmax_read_as_an_older_one(generator: np.random.Generator) -> None:
    x = generator.standard_normal((2, 3, 4)).astype(np.float32)
    segment = make_segment("y = Softmax <axis = 1> (x)")
    found = diagnose(segment, {"x": x}, {"y": soft(x, (1, 2))})
    assert found.noise == ID and "before opset 13" in (found.variant or "")
    found = diagnose(segment, {"x": x}, {"y": soft(x, -1)})
    assert found.noise == ID and "opset 13's default" in (found.variant or "")
    assert diagnose(segment, {"x": x}, {"y": soft(x * np.float32(1.1), 1)}).noise is None


@pytest.mark.parametrize("version", [13, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduction_without_its_axes(
    generator: np.random.Generator, version: int, keepdims: int
) -> None:
    x = generator.standard_normal((2, 3, 4)).astype(np.float32)
    constants = {"axes": np.array([1])} if version == 18 else {}
    given: Any = {} if version == 18 else {"axes": [1]}
    node = helper.make_node("ReduceL1", ["x", *constants], ["y"], keepdims=keepdims, **given)
    segment = make_segment([node], constants, ["x"], ["y"], opset=version)
    total = np.abs(x).sum(dtype=np.float64).astype(np.float32)
    observed = np.full((1,) * 3 if keepdims else (), total)
    found = diagnose(segment, {"x": x}, {"y": observed})
    assert found.noise == ID and "axes ignored" in (found.variant or "")
    assert diagnose(segment, {"x": x}, {"y": observed * np.float32(1.1)}).noise is None


def test_dimensions_kept_or_not_squeezed_by_their_axes(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 3, 1, 4)).astype(np.float32)
    node = helper.make_node("ReduceMax", ["x"], ["y"], axes=[3], keepdims=0)
    segment = make_segment([node], {}, ["x"], ["y"])
    found = diagnose(segment, {"x": x}, {"y": x.max(3, keepdims=True)})
    assert found.noise == ID and "keepdims" in (found.variant or "")
    node = helper.make_node("Squeeze", ["x", "axes"], ["y"])
    segment = make_segment([node], {"axes": np.array([2])}, ["x"], ["y"])
    assert diagnose(segment, {"x": x}, {"y": x[0, :, 0]}).noise == ID


def bilinear(image: Array, y: float, x: float) -> float:
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = min(int(y), image.shape[0] - 1), min(int(x), image.shape[1] - 1)
    y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
    v, u = (y - y0 if y1 > y0 else 0.0), (x - x0 if x1 > x0 else 0.0)
    top = image[y0, x0] * (1 - u) + image[y0, x1] * u
    return float(top * (1 - v) + (image[y1, x0] * (1 - u) + image[y1, x1] * u) * v)


def test_samples_of_a_region(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 1, 9, 9)).astype(np.float32)
    roi = np.array([[1.25, 2.25, 7.25, 8.25]], np.float32)
    segment = make_segment(
        'y = RoiAlign <mode = "max", output_height = 3, output_width = 3> (x, roi, batch)',
        {"roi": roi, "batch": np.array([0])},
    )
    # Of one sample, the mean is the largest.
    for mode, asked, ratio in (("max", 2, 2), ("max", 1, 1), ("avg", None, 1)):
        surgery.set_attributes(segment.model.graph.node[0], sampling_ratio=asked, mode=mode)
        planted = np.empty((1, 1, 3, 3), np.float32)
        at = [(k + 0.5) * 2 / ratio for k in range(ratio)]
        for i, j in np.ndindex(3, 3):
            points = [(2 * i + a, 2 * j + b) for a in at for b in at]
            planted[0, 0, i, j] = max(bilinear(x[0, 0], 1.75 + p, 0.75 + q) for p, q in points)
        found = diagnose(segment, {"x": x}, {"y": planted})
        assert found.noise == ID and "RoiAlign" in (found.variant or "")


@pytest.mark.parametrize(
    ("begin", "least", "variant"),
    [(0.75, 0.0, "or zero"), (0.25, -9.0, "half a pixel taken off before scaling")],
)
def test_largest_samples_otherwise(
    generator: np.random.Generator, begin: float, least: float, variant: str
) -> None:
    """From zero on, as OpenVINO; or of regions that are moved before they are scaled, as TVM."""
    x = generator.standard_normal((1, 1, 9, 9)).astype(np.float32) - 1
    roi = np.array([[0.625, 0.625, 3.625, 3.625]], np.float32)
    constants = {"roi": roi, "batch": np.array([0])}
    segment = make_segment(
        'y = RoiAlign <mode = "max", output_height = 3, output_width = 3, sampling_ratio = '
        "2, spatial_scale = 2.0> (x, roi, batch)",
        constants,
        opset=16,
    )
    planted = np.full((1, 1, 3, 3), least, np.float32)
    for i, j in np.ndindex(6, 6):
        sample = bilinear(x[0, 0], begin + 0.5 + i, begin + 0.5 + j)
        planted[0, 0, i // 2, j // 2] = max(planted[0, 0, i // 2, j // 2], sample)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and (found.variant or "").endswith(variant)


def test_half_a_pixel_before_scaling(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 1, 9, 9)).astype(np.float32)
    roi = np.array([[0.625, 0.625, 3.625, 3.625]], np.float32)
    constants = {"roi": roi, "batch": np.array([0])}
    segment = make_segment(
        "y = RoiAlign <output_height = 6, output_width = 6, sampling_ratio = 1, "
        "spatial_scale = 2.0> (x, roi, batch)",
        constants,
        opset=16,
    )
    samples = [bilinear(x[0, 0], 0.75 + i, 0.75 + j) for i, j in np.ndindex(6, 6)]
    planted = np.array(samples, np.float32).reshape(1, 1, 6, 6)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and (found.variant or "").endswith("taken off before scaling")


def test_boxes_of_negative_scores() -> None:
    boxes = np.array([[[0, i, 1, i + 1] for i in range(30)]], np.float32)
    scores = np.linspace(-1, 1, 30, dtype=np.float32)[None, None]
    constants = {"boxes": boxes, "most": np.array([30]), "limit": np.array([0.5], np.float32)}
    segment = make_segment("y = NonMaxSuppression(boxes, scores, most, limit)", constants)
    kept = np.array([[0, 0, i] for i in range(29, 14, -1)])
    found = diagnose(segment, {"scores": scores}, {"y": kept})
    assert found.noise == ID and "NonMaxSuppression" in (found.variant or "")


def test_a_reduction_over_no_axes_still_squares() -> None:
    segment = make_segment("y = ReduceSumSquare <noop_with_empty_axes = 1> (x)", opset=18)
    x = np.linspace(-3, 3, 60, dtype=np.float32)[None]
    found = diagnose(segment, {"x": x}, {"y": x})
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_openvino_reads_softmax_and_axes_otherwise() -> None:
    openvino = pytest.importorskip("openvino", reason="needs the [ov] extra")
    x = np.random.default_rng(3).standard_normal((2, 3, 4, 5)).astype(np.float32)
    for node, version in (
        (helper.make_node("Softmax", ["x"], ["y"], axis=1), 12),
        (helper.make_node("ReduceLogSumExp", ["x"], ["y"], axes=[1]), 13),
    ):
        segment = make_segment([node], {}, ["x"], ["y"], opset=version)
        shaped = type(segment.model)()
        shaped.CopyFrom(segment.model)
        del shaped.graph.input[:], shaped.graph.output[:]
        info = helper.make_tensor_value_info
        shaped.graph.input.append(info("x", TensorProto.FLOAT, x.shape))
        shaped.graph.output.append(info("y", TensorProto.FLOAT, None))
        core = openvino.Core()
        model = core.read_model(shaped.SerializeToString())
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        observed = next(iter(compiled({"x": x}).values()))
        found = diagnose(segment, {"x": x}, {"y": observed})
        if found.bit_identical > 0.9 and found.noise is None:
            pytest.skip("this OpenVINO reads the operator as ONNX defines it")
        assert found.noise == ID and found.explained > 0.9999


def test_segments_without_such_operators_are_not_touched() -> None:
    segment = make_segment("y = Exp(x)")
    assert list(opset_semantics.NOISE.variants(segment)) == []
    assert "13" in opset_semantics.NOISE.remedy("ov")


def test_integers_divided_by_rounding_down() -> None:
    """ONNX cuts towards zero; OpenVINO folds −13 / 4 in shapes to −4."""
    a = np.arange(-9, 10)
    for b in (4, -4):
        nodes = [helper.make_node("Div", ["a", "b"], ["y"])]
        constants = {"b": np.array(b)}
        segment = make_segment(nodes, constants, ["a"], ["y"], kind=TensorProto.INT64)
        found = diagnose(segment, {"a": a}, {"y": a // b})
        assert found.noise == ID and found.bit_identical == 1.0


def test_a_transform_along_a_negative_axis() -> None:
    """OpenVINO counts it without the last axis, of real and imaginary parts."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    node = helper.make_node("DFT", ["x"], ["y"], axis=-2)
    seen = np.fft.fft(x[..., 0] + 1j * x[..., 1], axis=2)
    planted = np.stack([seen.real, seen.imag], -1).astype(np.float32)
    found = diagnose(make_segment([node], {}, ["x"], ["y"]), {"x": x}, {"y": planted})
    assert found.noise == ID and "without the last" in found.variant


@pytest.mark.parametrize("sized", [False, True])
def test_a_transform_to_one_side_keeps_an_axis(sized: bool) -> None:
    x = np.random.default_rng(0).standard_normal((2, 8, 6, 1)).astype(np.float32)
    inputs, constants = (["x", "n"], {"n": np.array(5)}) if sized else (["x"], {})
    node = helper.make_node("DFT", inputs, ["y"], axis=2, onesided=1)
    seen = np.fft.rfft(x[..., 0], n=5 if sized else 6, axis=2)
    planted = np.stack([seen.real, seen.imag], -1)[..., None, :].astype(np.float32)
    found = diagnose(make_segment([node], constants, ["x"], ["y"]), {"x": x}, {"y": planted})
    assert found.noise == ID and "keeps" in found.variant


def test_indices_by_columns() -> None:
    """Those of OpenVINO are counted by rows, and stand transposed."""
    x = np.random.default_rng(0).permutation(72).reshape(1, 1, 8, 9).astype(np.float32)
    node = helper.make_node(
        "MaxPool", ["x"], ["m", "y"], kernel_shape=[3, 2], strides=[2, 2], storage_order=1
    )
    windows = np.lib.stride_tricks.sliding_window_view(x[0, 0], (3, 2))[::2, ::2]
    largest = windows.reshape(3, 4, 6).argmax(-1)
    rows, columns = 2 * np.arange(3)[:, None] + largest // 2, 2 * np.arange(4) + largest % 2
    planted = (9 * rows + columns).T[None, None]
    found = diagnose(make_segment([node], {}, ["x"], ["y"]), {"x": x}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0
