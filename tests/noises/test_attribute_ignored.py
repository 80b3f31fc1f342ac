"""Operators run as if the model had not set something, computed with numpy and by runtimes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.noises import attribute_ignored
from auditor.ports import Array, Arrays
from tests.helpers import nodes_of
from tests.segments import conv, diagnose, make_segment, run

ID = "implementation.attribute_ignored"


def leaky(x: Array, alpha: float) -> Array:
    return np.where(x > 0, x, x * np.float32(alpha))


def lrn(x: Array, size: int, alpha: float, beta: float, bias: float) -> Array:
    squares = x.astype(np.float64) ** 2
    sums = np.zeros_like(squares)
    for c in range(x.shape[1]):
        low, high = max(0, c - (size - 1) // 2), min(x.shape[1], c + size // 2 + 1)
        sums[:, c] = squares[:, low:high].sum(1)
    return np.asarray(x / (bias + alpha / size * sums) ** beta, np.float32)


@pytest.mark.parametrize(
    ("op_type", "attributes", "planted"),
    [
        ("LeakyRelu", {"alpha": 0.2}, lambda x: leaky(x, 0.01)),
        ("ThresholdedRelu", {"alpha": 0.3}, lambda x: np.where(x > 1, x, 0)),
        ("LRN", {"size": 3, "alpha": 0.9, "beta": 0.6, "bias": 1.2},
         lambda x: lrn(x, 3, 0.9, 0.6, 1.0)),
        ("Gemm", {"alpha": 0.5}, None),
        ("CumSum", {"reverse": 1}, lambda x: np.cumsum(x, -1)),
        ("CumSum", {"exclusive": 1}, lambda x: np.cumsum(x, -1)),
        ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, None),
        ("IsInf", {"detect_negative": 0}, np.isinf),
    ],
)  # fmt: skip
def test_attribute_at_its_default(
    generator: np.random.Generator, op_type: str, attributes: Any, planted: Any
) -> None:
    shape = (6, 6) if op_type == "Gemm" else (2, 8, 4, 4)
    x = (generator.standard_normal(shape) * 2).astype(np.float32)
    constants: Arrays = {}
    if op_type == "Gemm":
        constants = {"w": generator.standard_normal((6, 6)).astype(np.float32)}
        observed = x @ constants["w"]
    elif op_type == "DepthToSpace":
        blocks = x.reshape(2, 2, 2, 2, 4, 4)
        observed = blocks.transpose(0, 3, 4, 1, 5, 2).reshape(2, 2, 8, 8)
    else:
        if op_type == "CumSum":
            constants = {"axis": np.array(-1)}
        if op_type == "IsInf":
            x[0, 0] = -np.inf
            x[1, 1] = np.inf
        observed = np.asarray(planted(x), bool if op_type == "IsInf" else np.float32)
    node = helper.make_node(op_type, ["x", *constants], ["y"], **attributes)
    segment = make_segment([node], constants, ["x"], ["y"])
    found = diagnose(segment, {"x": x}, {"y": observed})
    assert found.noise == ID and found.explained > 0.9999
    ignored = found.variant or ""
    assert any(f"{op_type}: {name} ignored" == ignored for name in attributes)


def test_slope_along_the_channels(generator: np.random.Generator) -> None:
    x = generator.standard_normal((2, 4, 3, 4)).astype(np.float32)
    slope = np.array([0.1, -0.5, 2, 0.7], np.float32)
    segment = make_segment("y = PRelu(x, slope)", {"slope": slope})
    planted = np.where(x < 0, x * slope[:, None, None], x)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.bit_identical == 1.0
    wrong = np.where(x < 0, x * slope * np.float32(1.05), x)
    assert diagnose(segment, {"x": x}, {"y": wrong}).noise is None


def sigma(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def lstm(x: Array, w: Array, r: Array, b: Array, start: Array) -> Array:
    """One direction, gates in ONNX's order (input, output, forget, cell), no peepholes."""
    h, c = start.copy(), np.zeros_like(start)
    steps = []
    for step in x.astype(np.float64):
        i, o, f, g = np.split(step @ w.T + h @ r.T + b, 4, axis=-1)
        c = sigma(f) * c + sigma(i) * np.tanh(g)
        h = sigma(o) * np.tanh(c)
        steps.append(h)
    return np.asarray(np.stack(steps)[:, None], np.float32)


@pytest.mark.parametrize("lost", ["input P", "input initial_h", "direction"])
def test_what_a_recurrent_layer_ignores(generator: np.random.Generator, lost: str) -> None:
    x = generator.standard_normal((5, 2, 3)).astype(np.float32)
    constants = {
        "w": generator.standard_normal((1, 16, 3)),
        "r": generator.standard_normal((1, 16, 4)),
        "b": generator.standard_normal((1, 32)),
        "h0": generator.standard_normal((1, 2, 4)),
        "p": generator.standard_normal((1, 12)),
    }
    constants = {k: v.astype(np.float32) for k, v in constants.items()}
    start = np.zeros((2, 4)) if lost == "input initial_h" else constants["h0"][0]
    inputs = ["x", "w", "r", "b", "", "h0", "", "p" if lost == "input P" else ""]
    direction = "reverse" if lost == "direction" else "forward"
    node = helper.make_node("LSTM", inputs, ["y"], hidden_size=4, direction=direction)
    segment = make_segment([node], constants, ["x"], ["y"])
    bias = constants["b"][0, :16] + constants["b"][0, 16:]
    planted = lstm(x, constants["w"][0], constants["r"][0], bias, start)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.variant == f"LSTM: {lost} ignored"


def test_two_attributes_at_once() -> None:
    x = np.linspace(-3, 3, 400, dtype=np.float32)[None]
    segment = make_segment("y = HardSigmoid <alpha = 0.7, beta = 0.1> (x)")
    found = diagnose(segment, {"x": x}, {"y": np.clip(np.float32(0.2) * x + 0.5, 0, 1)})
    assert found.noise == ID and found.variant == "all attributes ignored"


def test_functions_of_one_direction_in_both(generator: np.random.Generator) -> None:
    x = generator.standard_normal((5, 2, 3)).astype(np.float32)
    constants = {
        "w": generator.standard_normal((2, 4, 3)),
        "r": generator.standard_normal((2, 4, 4)),
    }
    constants = {k: v.astype(np.float32) for k, v in constants.items()}

    def bidirectional(*functions: str) -> Any:
        node = helper.make_node(
            "RNN",
            ["x", "w", "r"],
            ["y"],
            hidden_size=4,
            direction="bidirectional",
            activations=functions,
        )
        return make_segment([node], constants, ["x"], ["y"])

    planted = run(bidirectional("Relu", "Relu").model, {"x": x})
    found = diagnose(bidirectional("Relu", "Tanh"), {"x": x}, planted)
    assert found.noise == ID and found.variant == "activations of the first direction in both"


def test_output_shape_of_a_transposed_convolution(generator: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    x = generator.standard_normal((1, 2, 3, 3)).astype(np.float32)
    w = generator.standard_normal((2, 3, 3, 3)).astype(np.float32)
    segment = make_segment(
        "y = ConvTranspose <output_shape = [10, 8], strides = [3, 2]> (x, w)", {"w": w}
    )
    operands = (torch.from_numpy(x), torch.from_numpy(w))
    observed = torch.nn.functional.conv_transpose2d(*operands, stride=(3, 2)).numpy()
    found = diagnose(segment, {"x": x}, {"y": observed})
    assert found.noise == ID and "output_shape" in (found.variant or "")


def test_outputs_that_are_not_computed(generator: np.random.Generator) -> None:
    x = generator.standard_normal((2, 8)).astype(np.float32)
    segment = make_segment(
        "y, mean, d = LayerNormalization(x, g) deviation = Neg(d)", {"g": np.ones(8, np.float32)}
    )
    exact = run(segment.model, {"x": x})
    found = [v for v in attribute_ignored.NOISE.variants(segment) if "outputs" in v.name]
    (values,) = (run(variant.model, {"x": x}) for variant in found)
    np.testing.assert_array_equal(values["y"], exact["y"])
    assert values["mean"].shape == values["deviation"].shape == ()


def test_limits_of_boxes_that_are_computed() -> None:
    """Without its first limit a selection is empty; constant limits are left to ties."""
    names = ["most", "limit", "least"]
    feeds = {
        "boxes": np.array([[[0, 0, 1, 1], [2, 2, 3, 3]]], np.float32),
        "scores": np.array([[[0.9, 0.8]]], np.float32),
        "limit": np.array([0.5], np.float32),
        "least": np.array([0.1], np.float32),
    }
    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", *names], ["y"])
    segment = make_segment([node], {}, ["boxes", "scores", *names], ["y"])
    segment.model.graph.input[2].type.tensor_type.elem_type = TensorProto.INT64
    first, *_ = attribute_ignored.NOISE.variants(segment)
    assert "max_output_boxes_per_class" in first.name
    assert run(first.model, feeds | {"most": np.array([5])})["y"].shape == (0, 3)
    limits = {n: feeds.get(n, np.array([5])) for n in names}
    fixed = make_segment([node], limits, ["boxes", "scores"], ["y"])
    assert list(attribute_ignored.NOISE.variants(fixed)) == []


def test_wrong_values_are_not_ignored_attributes(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 4, 8, 8)).astype(np.float32)
    w = generator.standard_normal((6, 4, 3, 3)).astype(np.float32)
    b = generator.standard_normal(6).astype(np.float32)
    segment = make_segment("y = Conv(x, w, b)", {"w": w, "b": b})
    shift = b[:, None, None]
    for planted in (
        conv(x, w * np.float32(1.01)) + shift,
        conv(x, w) + shift * np.float32(1.5),
        conv(x, w) + np.roll(shift, 1, 0),
        (conv(x, w) + shift)[:, [1, 0, 2, 3, 4, 5]],
    ):
        assert diagnose(segment, {"x": x}, {"y": planted}).noise is None
    assert diagnose(segment, {"x": x}, {"y": conv(x, w)}).noise == ID


def test_openvino_ignores_the_bias_of_lrn() -> None:
    openvino = pytest.importorskip("openvino", reason="needs the [ov] extra")
    x = (np.random.default_rng(5).standard_normal((1, 7, 3, 3)) * 3).astype(np.float32)
    segment = make_segment("y = LRN <alpha = 0.5, beta = 0.7, bias = 1.5, size = 5> (x)")
    shaped = type(segment.model)()
    shaped.CopyFrom(segment.model)
    del shaped.graph.input[:], shaped.graph.output[:]
    info = helper.make_tensor_value_info
    shaped.graph.input.append(info("x", TensorProto.FLOAT, x.shape))
    shaped.graph.output.append(info("y", TensorProto.FLOAT, x.shape))
    core = openvino.Core()
    model = core.read_model(shaped.SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    observed = next(iter(compiled({"x": x}).values()))
    if np.allclose(observed, lrn(x, 5, 0.5, 0.7, 1.5), rtol=1e-5):
        pytest.skip("this OpenVINO honours the bias")
    found = diagnose(segment, {"x": x}, {"y": observed})
    assert (found.noise, found.variant) == (ID, "LRN: bias ignored")


def test_nothing_to_ignore() -> None:
    segment = make_segment("y = Relu(x)")
    assert list(attribute_ignored.NOISE.variants(segment)) == []
    assert attribute_ignored.NOISE.remedy("ov")


def test_one_of_two_fused_convolutions(generator: np.random.Generator) -> None:
    w = generator.standard_normal((8, 8, 1, 1)).astype(np.float32)
    b = generator.standard_normal(8).astype(np.float32)
    nodes = nodes_of("[first] h = Conv(x, w, b) r = Relu(h) [second] y = Conv(r, w, b)")
    segment = make_segment(nodes, {"w": w, "b": b}, ["x"], ["y"])
    x = generator.standard_normal((1, 8, 4, 4)).astype(np.float32)
    flat = w[:, :, 0, 0]
    h = np.maximum(np.einsum("oi,nihw->nohw", flat, x), 0)  # without its bias
    planted = np.einsum("oi,nihw->nohw", flat, h) + b[:, None, None]
    found = diagnose(segment, {"x": x}, {"y": planted.astype(np.float32)})
    assert found.noise == "implementation.attribute_ignored"
    assert found.variant == "Conv: input B ignored at first alone"


def test_a_hypothesis_whose_shapes_fit_nothing_is_refuted_not_missing(
    generator: np.random.Generator,
) -> None:
    weights = {
        "w": generator.standard_normal((8, 16)).astype(np.float32),
        "b": generator.standard_normal((4, 8)).astype(np.float32),
    }
    segment = make_segment("h = Gemm <transB = 1> (x, w) y = Add(h, b)", weights)
    x = generator.standard_normal((4, 16)).astype(np.float32)
    found = diagnose(segment, {"x": x}, {"y": x @ weights["w"].T + weights["b"] + 1})
    assert found.noise is None and not found.failures
    assert "Gemm: transB ignored" in {h.variant for h in found.hypotheses}


def test_what_kernels_of_onnx_runtime_cannot_be_without_is_left_to_them() -> None:
    """Without its zero points QLinearSigmoid aborts the process; sizes are read past the end."""
    names = ("x", "scale", "zero", "small", "none")
    sigmoid = helper.make_node("QLinearSigmoid", names, ["q"], domain="com.microsoft")
    product = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=32, N=8, bits=2, block_size=16,
    )  # fmt: skip
    for node in (sigmoid, product):
        segment = make_segment([node], {}, list(node.input), list(node.output))
        segment.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        assert list(attribute_ignored.NOISE.variants(segment)) == []


def attention(x: Array, w: Array, b: Array, heads: int) -> Array:
    """Self-attention with a scale of 1 / √(the size of a head)."""
    q, k, v = np.split(x.astype(np.float64) @ w + b, 3, -1)
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3) for t in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    e = np.exp(scores - scores.max(-1, keepdims=True))
    y = e / e.sum(-1, keepdims=True) @ v
    return np.asarray(y.transpose(0, 2, 1, 3).reshape(x.shape), np.float32)


def test_an_operator_of_onnx_runtime(generator: np.random.Generator) -> None:
    """Its attributes stand in ONNX Runtime's schemas, not in ONNX's; one at its default is none."""
    x = generator.standard_normal((2, 4, 8)).astype(np.float32)
    w, b = (generator.standard_normal(shape).astype(np.float32) for shape in ((8, 24), 24))
    node = helper.make_node(
        "Attention", ["x", "w", "b"], ["y"], domain="com.microsoft",
        num_heads=2, scale=0.9, unidirectional=0,
    )  # fmt: skip
    segment = make_segment([node], {"w": w, "b": b}, ["x"], ["y"])
    segment.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    found = diagnose(segment, {"x": x}, {"y": attention(x, w, b, 2)})
    assert (found.noise, found.variant) == (ID, "Attention: scale ignored")
    assert (
        diagnose(segment, {"x": x}, {"y": attention(x, w * np.float32(1.01), b, 2)}).noise is None
    )
    names = [variant.name for variant in attribute_ignored.NOISE.variants(segment)]
    assert not any("unidirectional" in name or "num_heads" in name for name in names)
