"""Models quantised by ONNX Runtime's quantiser, and by numpy with integer arithmetic."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.noises import (
    _calibrated,
    _equations,
    bf16,
    fp16,
    int8,
    int8_requantisation,
    int8_saturation,
    tf32,
)
from auditor.ports import Array, Arrays, SegmentGraph
from auditor.records.backend import Kernel
from tests.segments import conv, explained, make_segment, run

ID = "precision.int8"
NOISES = (bf16.NOISE, fp16.NOISE, int8.NOISE, int8_requantisation.NOISE)
NOISES += (int8_saturation.NOISE, tf32.NOISE)  # type: ignore[assignment]


explain = partial(explained, NOISES)


@pytest.fixture
def dense(generator: np.random.Generator) -> tuple[SegmentGraph, Arrays]:
    x = generator.standard_normal((16, 96)).astype(np.float32)
    w = (generator.standard_normal((96, 32)) * generator.uniform(0.2, 2, 32)).astype(np.float32)
    segment = make_segment("y = MatMul(x, w)", {"w": w})
    return segment, {"x": x, "w": w}


def stepped(w: Array, scale: Array) -> Array:
    """Weights as stored int8 times a double scale."""
    stored = np.floor(w.astype(np.float64) / scale + 0.5).astype(np.int8)
    return stored.astype(np.float64) * scale


def test_outputs_on_a_grid(generator: np.random.Generator) -> None:
    feeds = {n: generator.standard_normal((8, 40)).astype(np.float32) for n in "ab"}
    segment = make_segment("y = Add(a, b)")
    exact = feeds["a"].astype(np.float64) + feeds["b"]
    for wrong, cause in ((1.0, ID), (1.05, None)):  # a factor that no rounding explains
        steps = np.clip(np.floor(wrong * exact / 0.03 + 0.5), -100, 155)
        found = explain(segment, feeds, (steps * 0.03).astype(np.float32))
        assert found.noise == cause


@pytest.mark.parametrize(
    "behind",
    ["y = PRelu(z, slope)", "y = Add(z, skip)", "h = HardSwish(z) y = Mul(h, skip)"],
    ids=["PRelu", "Add", "HardSwish"],
)
@pytest.mark.parametrize("wrong", [False, True])
def test_a_tensor_before_the_outputs_on_a_grid(
    generator: np.random.Generator, behind: str, wrong: bool
) -> None:
    """Fused behind a product, or read by the sum that a segment consists of."""
    x = generator.standard_normal((64, 24)).astype(np.float32)
    constants = {
        "w": generator.standard_normal((24, 16)).astype(np.float32),
        "slope": generator.uniform(-0.2, 0.5, 16).astype(np.float32),
    }
    feeds = {"x": x, "skip": generator.standard_normal((64, 16)).astype(np.float32)}
    segment = make_segment(f"z = MatMul(x, w) {behind}", constants)
    feeds = {n: v for n, v in feeds.items() if n == "x" or "skip" in behind}
    z = x @ constants["w"]
    step = np.ptp(z) / 255
    rounded = (np.rint(z / step) * step).astype(np.float32)
    planted = make_segment(behind, constants, ["z", *(n for n in feeds if n != "x")], ["y"])
    given = {"z": rounded * np.float32(1.05) if wrong else rounded}
    (observed,) = run(planted.model, given | {n: v for n, v in feeds.items() if n != "x"}).values()
    found = explain(segment, feeds, observed)
    assert found.noise == (None if wrong else ID)
    assert wrong or found.explained > 0.999


def test_a_quantised_operand_of_a_sum(generator: np.random.Generator) -> None:
    feeds = {n: generator.standard_normal((80, 40)).astype(np.float32) for n in "ab"}
    step = np.float32(np.ptp(feeds["b"]) / 255)
    observed = feeds["a"] + np.clip(np.rint(feeds["b"] / step), -60, 70) * step
    found = explain(make_segment("y = Add(a, b)"), feeds, observed)
    assert found.noise == ID and found.explained > 0.999


@pytest.mark.parametrize("node", ["y = Mul(x, factor)", "z = Mul(x, factor) y = PRelu(z, factor)"])
def test_scaled_pixels_are_on_a_grid_without_rounding(
    generator: np.random.Generator, node: str
) -> None:
    """They are 256 values anyhow, and rounding these to others shifts each by less than a step."""
    x = (generator.integers(0, 256, (4, 100)) / 255).astype(np.float32)
    segment = make_segment(node, {"factor": np.full(1, 0.5, np.float32)})
    observed = run(segment.model, {"x": x})["y"] * np.float32(1.001)
    assert explain(segment, {"x": x}, observed).noise is None


@pytest.mark.parametrize("per_channel", [True, False])
def test_stored_weights(dense: tuple[SegmentGraph, Arrays], per_channel: bool) -> None:
    segment, t = dense
    largest = np.abs(t["w"]).max(axis=0 if per_channel else None)
    planted = (t["x"] @ stepped(t["w"], largest.astype(np.float64) / 127)).astype(np.float32)
    found = explain(segment, {"x": t["x"]}, planted)
    assert found.noise == ID and found.explained > 0.99
    assert found.variant == f"weights per {'channel' if per_channel else 'tensor'}"


def test_convolution_channels() -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((1, 4, 10, 10)).astype(np.float32)
    w = (generator.standard_normal((8, 4, 3, 3)) * np.arange(1, 9)[:, None, None, None]).astype("f")
    segment = make_segment("y = Conv(x, w)", {"w": w})
    largest = np.abs(w).max(axis=(1, 2, 3), keepdims=True)
    planted = conv(x, stepped(w, largest.astype(np.float64) / 127).astype(np.float32))
    found = explain(segment, {"x": x}, planted)
    assert found.noise == ID and found.explained > 0.99


def test_weights_of_8_bits_in_a_half_precision_file(generator: np.random.Generator) -> None:
    """It stores steps times a scale, which its own format rounds once more."""
    x = generator.standard_normal((16, 96)).astype(np.float32)
    w = generator.standard_normal((96, 32)).astype(np.float16).astype(np.float32)
    nodes = "y = MatMul(x, w)"
    segment = make_segment(nodes, {"w": w})
    planted = stepped(w, np.abs(w).max(axis=0) / 127.0).astype(np.float16).astype(np.float32)
    # Whether numpy adds in the reference's order depends on the processor.
    observed = run(make_segment(nodes, {"w": planted}).model, {"x": x})["y"]
    found = explain(segment, {"x": x}, observed)
    assert found.noise == ID and found.bit_identical > 0.9  # a column may hold a tie


def test_dynamic_quantisation(dense: tuple[SegmentGraph, Arrays], tmp_path: Path) -> None:
    """ONNX Runtime's quantize_dynamic, with uint8 weights so that nothing saturates."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    segment, t = dense
    model = onnx.ModelProto()
    model.CopyFrom(segment.model)
    for value, shape in ((model.graph.input[0], (16, 96)), (model.graph.output[0], (16, 32))):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    onnx.save(model, tmp_path / "float.onnx")
    quantization.quantize_dynamic(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        weight_type=quantization.QuantType.QUInt8,
    )
    session = ort.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    found = explain(segment, {"x": t["x"]}, session.run(None, {"x": t["x"]})[0])
    assert found.noise == ID and found.explained > 0.99


@pytest.mark.parametrize("defect", ["scaled", "swapped", "coarse"])
def test_defects_are_not_named(dense: tuple[SegmentGraph, Arrays], defect: str) -> None:
    segment, t = dense
    wrong = t["w"].astype(np.float64)
    if defect == "scaled":
        wrong[:, 3] *= 1.01
    elif defect == "swapped":
        wrong[:, [0, 1]] = wrong[:, [1, 0]]
    else:
        wrong = np.round(wrong * 50) / 50  # a grid, but not that of 8 bits
    found = explain(segment, {"x": t["x"]}, (t["x"] @ wrong).astype(np.float32))
    assert found.noise is None


def test_quantised_segments_are_left_to_others() -> None:
    constants = {"s": np.asarray(0.1, np.float32), "w": np.ones((4, 4), np.float32)}
    assert not list(
        int8.NOISE.variants(
            make_segment(
                "q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = MatMul(d, w)", constants
            )
        )
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38])
def test_weights_that_no_8_bits_hold_are_not_quantised(odd: float) -> None:
    w = np.ones((4, 4), np.float32)
    w[1, 2] = odd
    w[3, 3] = -1.0
    segment = make_segment("y = MatMul(x, w)", {"w": w})
    assert list(int8.NOISE.variants(segment)) == []


def clipped(w: Array, part: Array) -> Array:
    """Weights on 255 levels up to a part of each column's largest, as a calibration may choose."""
    limit = np.abs(w).max(axis=0) * part
    levels = np.linspace(-limit, limit, 255, dtype=np.float64)  # [level, column]
    nearest = np.abs(w[None].astype(np.float64) - levels[:, None]).argmin(axis=0)
    return np.take_along_axis(levels, nearest, axis=0)


@pytest.mark.parametrize("rows", [8, 64])
def test_weights_clipped_by_an_unknown_calibration(
    generator: np.random.Generator, rows: int
) -> None:
    x = generator.standard_normal((rows, 96)).astype(np.float32)
    w = generator.standard_normal((96, 8)).astype(np.float32) * np.float32(0.1)
    segment = make_segment("z = MatMul(x, w) y = Sigmoid(z)", {"w": w})
    planted = x @ clipped(w, generator.uniform(0.85, 1, 8))
    observed = (1 / (1 + np.exp(-planted))).astype(np.float32)
    found = explain(segment, {"x": x}, observed)
    assert found.noise == ID and found.explained > 0.97
    assert found.variant == "weights per channel, fitted"


def test_what_two_results_may_have_given_says_nothing() -> None:
    """Behind a curve that goes both ways, where the error reaches the other branch."""
    x = np.linspace(-1, 2, 300, dtype=np.float32)[:, None]
    model = make_segment(
        "z = MatMul(x, w) y = LeakyRelu <alpha = -0.5> (z)", {"w": np.ones((1, 1), np.float32)}
    ).model
    given = x + np.tile(np.float32([[0.03], [-0.03]]), (150, 1))
    observed = np.where(given > 0, given, -given / 2)
    values = {"x": x, "z": x, "y": run(model, {"x": x})["y"]}
    found = _equations.before(model, 0, values, {"y": observed}, narrow=False)
    assert found is not None
    result, weight = found
    known = weight > 0
    assert known[x > 0.5].all()
    assert np.allclose(result[known], given[known], atol=1e-5)


def test_weights_clipped_by_an_unknown_calibration_in_bfloat16() -> None:
    """The weights that it rounds are those on the grid."""
    generator = np.random.default_rng(0)

    def r(values: Array) -> Array:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    x = r(generator.standard_normal((16, 96)))
    w = (generator.standard_normal((96, 8)) * 0.1).astype(np.float32)
    segment = make_segment("y = MatMul(x, w)", {"w": w})
    said = (Kernel("k", "FullyConnected", ("y",), ("y",), "", "bf16", "bf16"),)
    planted = clipped(w, generator.uniform(0.85, 1, 8))
    observed = {"y": r(x @ r(planted))}
    (form,) = int8.NOISE.fits(replace(segment, kernels=said), {"x": x}, observed)
    found = run(form.model, {"x": np.eye(96, dtype=np.float32)})["y"]
    assert np.linalg.norm(found - planted) < 0.08 * np.linalg.norm(w - planted)


def test_one_equation_for_each_scale_proves_nothing(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 96)).astype(np.float32)
    w = generator.standard_normal((96, 8)).astype(np.float32)
    segment = make_segment("y = MatMul(x, w)", {"w": w})
    observed = (x @ clipped(w, generator.uniform(0.85, 1, 8))).astype(np.float32)
    assert explain(segment, {"x": x}, observed).noise is None
    # … but where a percentile of each column is its range there is no scale to find.
    second, largest = np.sort(np.abs(w), axis=0)[-2:]
    part = (second + (0.999 * 95 - 94) * (largest - second)) / largest
    found = explain(segment, {"x": x}, (x @ clipped(w, part)).astype(np.float32))
    assert found.variant == "weights per channel, fitted" and found.explained > 0.99
    # … and of one scale for all of many columns there are many equations.
    w = generator.standard_normal((96, 128)).astype(np.float32)
    segment = make_segment("y = MatMul(x, w)", {"w": w})
    step = np.abs(w).max() * 0.9 / 127
    planted = x @ np.clip(np.round(w / step) * step, -127 * step, 127 * step)
    found = explain(segment, {"x": x}, planted.astype(np.float32))
    assert found.variant == "weights per tensor, fitted" and found.explained > 0.99


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("ends", [(-1.87, 2.21), (-1.2, 1.5)])  # the latter of another input
def test_inputs_clipped_by_an_unknown_calibration(
    generator: np.random.Generator, ends: tuple[float, float], weights: bool
) -> None:
    x = generator.standard_normal((1, 4, 12, 12)).astype(np.float32)
    w = generator.standard_normal((8, 4, 3, 3)).astype(np.float32)
    segment = make_segment("y = Conv(x, w)", {"w": w})
    grid = np.linspace(*ends, 256)
    grid -= grid[np.abs(grid).argmin()]  # zero is one of the values
    narrow = grid[np.abs(x[..., None] - grid).argmin(axis=-1)].astype(np.float32)
    read = clipped(w.reshape(8, -1).T, np.ones(8)).T.reshape(w.shape) if weights else w
    found = explain(segment, {"x": x}, conv(narrow, read))
    assert found.noise == ID and found.explained > 0.99
    assert found.variant == ("weights per channel, fitted, " if weights else "") + "inputs fitted"


@pytest.mark.parametrize("ends", [(-2.3, 3), (-1.87, 2.21), (-1.2, 1.5)])
def test_inputs_cut_off_without_rounding(
    generator: np.random.Generator, ends: tuple[float, float]
) -> None:
    """256 values with the same ends leave nearly nothing of that, and explain nothing of it."""
    x = generator.standard_normal((1, 4, 12, 12)).astype(np.float32)
    w = generator.standard_normal((8, 4, 3, 3)).astype(np.float32)
    segment = make_segment("y = Conv(x, w)", {"w": w})
    observed = conv(np.clip(x, *np.float32(ends)), w)
    assert explain(segment, {"x": x}, observed).noise is None


@pytest.mark.parametrize("defect", [False, True])
def test_one_row_of_a_layer_behind_a_global_pooling(
    generator: np.random.Generator, defect: bool
) -> None:
    """The steps of weights are known; two numbers of the operand's are not, in 50 equations."""
    x = generator.gamma(1, 0.3, (1, 200)).astype(np.float32) - np.float32(0.2)
    w = generator.standard_normal((200, 50)).astype(np.float32)
    segment = make_segment("y = MatMul(x, w)", {"w": w})
    step = np.float32(x.max() * 1.1 / 210)
    read = np.clip(np.rint(x / step), -45, 210) * step
    if defect:
        read = x * np.float32(1.01)
        read[0, ::9] = 0
    observed = (read @ clipped(w, np.ones(50))).astype(np.float32)
    found = explain(segment, {"x": x}, observed)
    assert found.noise == (None if defect else ID)
    assert defect or found.explained > 0.97


def test_a_skewed_operand_that_is_clipped_at_both_ends() -> None:
    generator = np.random.default_rng(1)
    x = generator.standard_normal((256, 36)) ** 3
    x = (x * np.where(x > 0, 0.4, 0.07)).astype(np.float32)
    w = generator.standard_normal((36, 8)).astype(np.float32)
    step = np.float32(5 / 255)
    observed = (np.clip(np.rint(x / step), -61, 194) * step).astype(np.float32) @ w
    model = make_segment("y = MatMul(x, w)", {"w": w}).model
    *_, fit = _calibrated.fits(model, {0: w}, {"x": x}, {"y": observed})
    assert fit.operand is not None and fit.operand.low == -61
    assert fit.operand.step == pytest.approx(step, rel=1e-4)


def test_inputs_that_a_kernel_in_bfloat16_gives(generator: np.random.Generator) -> None:
    """The operand is another kernel's, and weights are rounded as they are behind a factor."""

    def r(values: Array) -> Array:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    x = r(generator.standard_normal((256, 32)))
    first, second = (generator.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    factor = generator.uniform(0.5, 2, 32).astype(np.float32)
    weights = {"first": first, "second": second, "factor": factor}
    said = (
        Kernel("a", "FullyConnected", ("h",), ("h",), "", "bf16", "bf16"),
        Kernel("b", "FullyConnected", ("m", "y"), ("y",), "", "bf16", "bf16"),
    )
    segment = replace(
        make_segment("h = MatMul(x, first) m = MatMul(h, second) y = Mul(m, factor)", weights),
        kernels=said,
    )
    steps = np.clip(np.rint((x @ r(first)).astype(np.float32) / np.float32(0.11)), -120, 135)
    observed = {"y": r(r(steps * np.float32(0.11)) @ r(second * factor))}
    forms = list(int8.NOISE.fits(segment, {"x": x}, observed))
    (node,) = (n for n in forms[-1].model.graph.node if n.op_type == "QuantizeLinear")
    scales = {t.name: numpy_helper.to_array(t) for t in forms[-1].model.graph.initializer}
    assert scales[node.input[1]] == pytest.approx(0.11, rel=2e-5)


def test_scaled_weights_are_no_clipping_where_inputs_are_much_alike(
    generator: np.random.Generator,
) -> None:
    """One number for each column can imitate one direction of the error, but no more."""
    x = (generator.standard_normal((64, 32)) * 0.2 + generator.uniform(0, 2, 32)).astype(np.float32)
    w = generator.standard_normal((32, 4)).astype(np.float32)
    segment = make_segment("y = MatMul(x, w)", {"w": w})
    observed = (x @ (w.astype(np.float64) * 1.003)).astype(np.float32)
    assert explain(segment, {"x": x}, observed).noise is None
