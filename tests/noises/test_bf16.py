"""Planted bfloat16, computed with numpy and ml_dtypes: no code is shared with the surgery."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.attribution.explainer import Explanation
from auditor.noises import bf16
from auditor.ports import Array
from auditor.records.backend import Kernel
from auditor.replays import recurrent
from tests.helpers import nodes_of
from tests.segments import conv, explain, make_segment, run

ID = "precision.bf16"


def r(values: Array) -> Array:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def kernel(kind: str, nodes: tuple[str, ...], output: str, precision: str = "bf16") -> Kernel:
    return Kernel(kind, kind, nodes, (output,), "", precision, precision)


def check(found: Explanation, identical: float = 0.99) -> None:
    """bf16 is named with a near-perfect score, and every other cause is far off."""
    assert found.noise == ID
    assert found.explained > 0.999
    assert found.bit_identical >= identical
    wrong = [h for h in found.hypotheses if h.noise != ID]
    assert all(h.explained <= 0.5 for h in wrong), wrong


def test_convolution_with_folded_batch_norm(generator: np.random.Generator) -> None:
    x = r(generator.standard_normal((1, 6, 9, 9)))
    w = generator.standard_normal((8, 6, 3, 3)).astype(np.float32)
    b, gamma, beta, mean = generator.standard_normal((4, 8)).astype(np.float32)
    variance = generator.uniform(0.5, 2, 8).astype(np.float32)
    segment = make_segment(
        "c = Conv(x, w, b) n = BatchNormalization(c, g, be, m, v) y = Relu(n)",
        {"w": w, "b": b, "g": gamma, "be": beta, "m": mean, "v": variance},
        # Engines name the nodes they fused, not always the convolution itself.
        kernels=[kernel("Convolution", ("n", "y"), "y")],
    )
    scale = gamma / np.sqrt(variance + np.float32(1e-5))
    folded, shift = w * scale[:, None, None, None], (b - mean) * scale + beta
    planted = r(np.maximum(conv(x, r(folded)) + shift[:, None, None], 0))
    check(explain(segment, {"x": x}, {"y": planted}))

    unfolded = conv(x, r(w)) * scale[:, None, None] + shift[:, None, None]
    assert explain(segment, {"x": x}, {"y": r(np.maximum(unfolded, 0))}).explained < 0.99


def test_factors_that_the_engine_takes_behind_an_average(generator: np.random.Generator) -> None:
    """Its kernels say so: the average comes before what the model has in front of it."""
    x = r(generator.standard_normal((2, 3, 16, 16)))
    g, b = (generator.standard_normal((1, 3, 1, 1)).astype(np.float32) for _ in range(2))
    nodes = (
        "m = Mul(g, x) a = Add(m, b) "
        "p = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (a) y = Relu(p)"
    )
    averaging, scaling = kernel("Pooling", ("p",), "p"), kernel("Eltwise", ("m", "a"), "a")
    last = kernel("Eltwise", ("y",), "y")

    def averaged(values: Array) -> Array:
        return r(values.reshape(2, 3, 8, 2, 8, 2).mean((3, 5)))

    behind = make_segment(nodes, {"g": g, "b": b}, kernels=[averaging, scaling, last])
    check(explain(behind, {"x": x}, {"y": np.maximum(r(averaged(x) * g + b), 0)}))
    before = make_segment(nodes, {"g": g, "b": b}, kernels=[scaling, averaging, last])
    check(explain(before, {"x": x}, {"y": np.maximum(averaged(r(x * g + b)), 0)}))


def test_a_convolution_adds_in_the_precision_of_its_result(generator: np.random.Generator) -> None:
    x = r(generator.standard_normal((1, 6, 9, 9)))
    w, v = generator.standard_normal((2, 8, 6, 3, 3)).astype(np.float32)
    nodes = nodes_of("c = Conv(x, w) d = Conv(x, v) s = Add(c, d) y = Mul(s, s)")
    kernels = [
        replace(kernel("Convolution", nodes, output), output_precision="f32")
        for nodes, output in ((("c",), "c"), (("d", "s"), "s"))
    ]
    kernels.append(kernel("Eltwise", ("y",), "y"))
    segment = make_segment(nodes, {"w": w, "v": v}, ["x"], ["y"], kernels)
    check(explain(segment, {"x": x}, {"y": r(r(conv(x, r(w)) + conv(x, r(v))) ** 2)}))


def test_positions_are_seldom_rounded_up() -> None:
    kernels = [Kernel("Cast", "Convert", ("y",), ("y",), "ref_i64", "i64", "bf16")]
    segment = make_segment("y = Cast <to = 1> (x)", kernels=kernels, kind=TensorProto.INT64)
    x = np.arange(60_000, 80_000, 113)
    check(explain(segment, {"x": x}, {"y": seldom_up(x.astype(np.float32))}))


def seldom_up(values: Array) -> Array:
    """To bfloat16 as OpenVINO's own type does."""
    bits = values.view(np.uint32)
    bits = bits + (
        (bits & np.uint32(0x10000)) >> np.uint32(1)
    )  # half a step if the last bit is set
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("narrow_bias", [True, False])
def test_fully_connected_rounds_its_bias_when_it_rounds_its_output(
    generator: np.random.Generator, narrow_bias: bool
) -> None:
    x = r(generator.standard_normal((5, 64)))
    w = generator.standard_normal((64, 32)).astype(np.float32) / 8
    b = generator.standard_normal(32).astype(np.float32) * 3
    stated = Kernel(
        "fc", "FullyConnected", ("y",), ("y",), "", "bf16", "bf16" if narrow_bias else "f32"
    )
    segment = make_segment("p = MatMul(x, w) y = Add(p, b)", {"w": w, "b": b}, kernels=[stated])
    product = (x.astype(np.float64) @ r(w)).astype(np.float32)
    planted = r(product + r(b)) if narrow_bias else product + b
    found = explain(segment, {"x": x}, {"y": planted}, thorough=False)
    assert (found.noise, found.variant) == (ID, bf16.SITES[0].name)
    assert found.explained > 0.999
    assert len(found.hypotheses) == 1


@pytest.mark.parametrize("size", [5, 44])
def test_reductions_cut_off_what_lies_beyond_whole_vectors(
    generator: np.random.Generator, size: int
) -> None:
    x = r(generator.standard_normal((40, size, 3)) ** 2)
    segment = make_segment(
        "s = ReduceSum <keepdims = 0> (x, axes) y = Sqrt(s)",
        {"axes": np.array([2], np.int64)},
        kernels=[kernel("Reduce", ("s", "y"), "y")],
    )
    sized = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    segment.model.graph.input[0].CopyFrom(sized)
    exact = np.sqrt(x.sum(2, dtype=np.float64)).astype(np.float32)
    cut = (exact.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    planted = np.where(np.arange(size) >= size // 16 * 16, cut, r(exact))
    check(explain(segment, {"x": x}, {"y": planted}))


def test_overlapping_blocks_are_added_up_in_bf16_and_seldom_rounded_up(
    generator: np.random.Generator,
) -> None:
    x = r(generator.standard_normal((1, 2 * 3 * 3, 7 * 7)))
    constants = {"size": np.array([7, 7]), "block": np.array([3, 3])}
    kernels = [kernel("Col2Im", ("y",), "y")]
    segment = make_segment(
        "y = Col2Im <pads = [1, 1, 1, 1]> (x, size, block)", constants, kernels=kernels, opset=18
    )
    segment.model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, x.shape))
    planted = np.zeros((1, 2, 9, 9), np.float32)
    for (row, column), values in zip(
        np.ndindex(3, 3), x.reshape(1, 2, 9, 7, 7).transpose(2, 0, 1, 3, 4), strict=True
    ):
        part = planted[..., row : row + 7, column : column + 7]
        part[:] = seldom_up(part + values)
    check(explain(segment, {"x": x}, {"y": planted[..., 1:-1, 1:-1]}))


def test_groups_are_rounded_before_gamma_and_beta(generator: np.random.Generator) -> None:
    """What is behind them, too: ONNX infers no type of a GroupNormalization."""
    x = r(generator.standard_normal((2, 6, 5, 5)) + 1)
    gamma, beta = generator.standard_normal((2, 6, 1, 1)).astype(np.float32)
    segment = make_segment(
        "n = GroupNormalization <num_groups = 3> (x, g, b) y = Tanh(n)",
        {"g": gamma.ravel(), "b": beta.ravel()},
        kernels=[kernel("Subgraph", ("n", "y"), "y")],
        opset=21,
    )
    segment.model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, x.shape))
    groups = x.reshape(2, 3, -1).astype(np.float64)
    spread = np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    normalised = r((groups - groups.mean(2, keepdims=True)) / spread).reshape(x.shape)
    check(explain(segment, {"x": x}, {"y": r(np.tanh(normalised * gamma + beta))}))


def test_a_root_mean_square_is_rounded_as_a_whole(generator: np.random.Generator) -> None:
    """1 / deviation is no normalised value; what enters is rounded, though a Cast is first."""
    x = generator.standard_normal((20, 64)).astype(np.float32)
    constants = {"two": np.array(2, np.float32), "one": np.array(1, np.float32)}
    kernels = [kernel("RMS", ("y",), "y")]
    segment = make_segment(
        "k = Cast <to = 1> (x) p = Pow(k, two) m = ReduceMean <axes = [-1]> (p) s = Sqrt(m) "
        "d = Div(one, s) y = Mul(k, d)",
        constants,
        kernels=kernels,
    )
    wide = r(x).astype(np.float64)
    planted = r((wide / np.sqrt((wide**2).mean(-1, keepdims=True))).astype(np.float32))
    check(explain(segment, {"x": x}, {"y": planted}))


def test_what_onnx_runtime_fused_is_rounded_between_kernels(generator: np.random.Generator) -> None:
    """ONNX infers no type of its normalisations."""
    x = r(generator.standard_normal((20, 64)))
    w = generator.standard_normal((64, 16)).astype(np.float32)
    kernels = [Kernel("RMS", "RMS", ("n",), (), "", "bf16", "bf16")]
    kernels.append(Kernel("FC", "FullyConnected", ("y",), ("y",), "", "bf16", "f32"))
    constants = {"g": np.ones(64, np.float32), "w": w}
    segment = make_segment(
        "n = SimplifiedLayerNormalization <epsilon = 1e-06> (x, g) y = MatMul(n, w)",
        constants,
        kernels=kernels,
    )
    wide = x.astype(np.float64)
    normal = r(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6))
    check(explain(segment, {"x": x}, {"y": (normal @ r(w)).astype(np.float32)}), identical=0.2)


@pytest.mark.parametrize(("axis", "opset"), [(1, 17), (1, 11)])
def test_the_sum_of_a_log_softmax_is_of_rounded_exponentials(
    generator: np.random.Generator, axis: int, opset: int
) -> None:
    x = r(generator.standard_normal((5, 3, 7)) * 4)
    segment = make_segment(
        f"y = LogSoftmax <axis = {axis}> (x)",
        kernels=[kernel("Subgraph", ("y",), "y")],
        opset=opset,
    )
    segment.model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", 1, x.shape))
    along = (1,) if opset >= 13 else (1, 2)
    below = x - x.max(along, keepdims=True)
    planted = r(r(below) - r(np.log(r(np.exp(below)).sum(along, keepdims=True))))
    check(explain(segment, {"x": x}, {"y": planted}))


def test_a_sum_of_squares_is_two_kernels(generator: np.random.Generator) -> None:
    """The first may hold what comes before it, too."""
    x = r(generator.standard_normal((4, 2, 160)))
    kernels = [kernel("Subgraph", ("t", "y"), ""), kernel("Reduce", ("y",), "y")]
    segment = make_segment(
        "t = Tanh(x) y = ReduceSumSquare <axes = [1], keepdims = 0> (t)", kernels=kernels
    )
    check(explain(segment, {"x": x}, {"y": r(r(np.tanh(x) ** 2).sum(1))}), identical=0.98)


def test_fused_attention(generator: np.random.Generator) -> None:
    q, k, v = (r(generator.standard_normal((2, 7, 8)) * 2) for _ in range(3))
    mask = np.zeros((1, 1, 7), np.float32)
    mask[..., 5:] = np.finfo(np.float32).min
    root = np.float32(np.sqrt(8))
    segment = make_segment(
        "kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, kt) scaled = Div(s, root) "
        "masked = Add(scaled, mask) p = Softmax <axis = -1> (masked) y = MatMul(p, v)",
        {"root": np.array(root)},
        inputs=["q", "k", "v", "mask"],
        kernels=[kernel("Subgraph", ("scaled", "masked", "p", "y"), "y")],
    )
    scores = q.astype(np.float64) @ r(k / root).transpose(0, 2, 1) + r(mask)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    weights = r(powers / powers.sum(-1, keepdims=True))
    planted = r(weights.astype(np.float64) @ v)
    feeds = {"q": q, "k": k, "v": v, "mask": mask}
    check(explain(segment, feeds, {"y": planted}))


def test_attention_multiplies_integers_as_they_are(generator: np.random.Generator) -> None:
    """Queries and keys of 8 bits, from a kernel in float32; probabilities and values in bf16."""
    x = (generator.standard_normal((2, 7, 8)) * 2).astype(np.float32)
    v = r(generator.standard_normal((2, 7, 8)))
    scale = np.float32(0.05)
    segment = make_segment(
        "k = Mul(x, two) xq = QuantizeLinear(x, scale, zero) "
        "kq = QuantizeLinear(k, scale, zero) xd = DequantizeLinear(xq, scale, zero) "
        "kd = DequantizeLinear(kq, scale, zero) kt = Transpose <perm = [0, 2, 1]> (kd) "
        "s = MatMul(xd, kt) scaled = Mul(s, root) p = Softmax <axis = -1> (scaled) "
        "y = MatMul(p, v)",
        {
            "scale": np.array(scale),
            "zero": np.array(0, np.int8),
            "root": np.float32([0.35]),
            "two": np.float32([2]),
        },
        kernels=[
            Kernel("Subgraph", "Subgraph", ("k", "xq", "kq"), ("kq",), "", "f32", "i8"),
            Kernel("Subgraph", "Subgraph", ("s", "scaled", "p", "y"), ("y",), "", "i8", "bf16"),
        ],
    )
    queries, keys = (np.clip(np.rint(a / scale), -128, 127).astype(np.float64) for a in (x, 2 * x))
    scores = queries @ keys.transpose(0, 2, 1) * float(scale) ** 2 * 0.35
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    weights = r(powers / powers.sum(-1, keepdims=True))
    check(explain(segment, {"x": x, "v": v}, {"y": r(weights.astype(np.float64) @ v)}))


def test_layer_norm_rounds_before_gamma_and_beta(generator: np.random.Generator) -> None:
    x = r(generator.standard_normal((4, 96)) * 3)
    gamma, beta = generator.standard_normal((2, 96)).astype(np.float32)
    segment = make_segment(
        "y = LayerNormalization(x, g, b)",
        {"g": gamma, "b": beta},
        kernels=[kernel("MVN", ("y",), ""), kernel("Subgraph", ("y",), "y")],
    )
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    normalized = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    check(explain(segment, {"x": x}, {"y": r(r(normalized) * gamma + beta)}))


def test_layer_norm_without_gamma_and_beta_is_fused_with_what_follows(
    generator: np.random.Generator,
) -> None:
    """Values that are moved in between are moved after it."""
    x = r(generator.standard_normal((4, 96)) * 3)
    segment = make_segment(
        "n = LayerNormalization(x, g, b) t = Transpose(n) h = Tanh(t) y = Mul(t, h)",
        {"g": np.ones(96, np.float32), "b": np.zeros(96, np.float32)},
        kernels=[kernel("MVN", ("n", "h", "y"), "y"), kernel("Transpose", ("t",), "t")],
    )
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    normalized = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    check(explain(segment, {"x": x}, {"y": r(normalized * np.tanh(normalized)).T}))


def test_elementwise_kernel_rounds_at_its_edges_only(generator: np.random.Generator) -> None:
    x, z = generator.standard_normal((2, 4, 50)).astype(np.float32)
    segment = make_segment(
        "a = Mul(x, factor) b = Add(a, z) y = Mul(b, b)",
        {"factor": np.array(0.7, np.float32)},
        kernels=[kernel("Subgraph", ("a", "b", "y"), "y")],
    )
    planted = r((r(x) * np.float32(0.7) + r(z)) ** 2)
    check(explain(segment, {"x": x, "z": z}, {"y": planted}))
    # Another kernel that computes a part of it again, for itself, does not round it here.
    twice = (*segment.kernels, kernel("Reduce", ("a", "b", "elsewhere"), "elsewhere"))
    check(explain(replace(segment, kernels=twice), {"x": x, "z": z}, {"y": planted}))


def test_constants_that_a_kernel_computes_are_rounded_as_it_writes_them(
    generator: np.random.Generator,
) -> None:
    """Token types that the model chooses itself: OpenVINO cannot fold how they are looked up."""
    x, table, places = generator.standard_normal((3, 8, 20)).astype(np.float32)
    rows = np.array([[1] * 20, [3] * 20])
    segment = make_segment(
        "types = GatherElements <axis = 0> (table, rows) all = Expand(types, shape) "
        "a = Add(x, all) y = Add(a, places)",
        {"table": table, "rows": rows, "shape": np.array([4, 2, 20]), "places": places[:2]},
        kernels=[kernel("Subgraph", ("a", "y"), "y")],
    )
    x = x.reshape(4, 2, 20)
    check(explain(segment, {"x": x}, {"y": r(r(x) + r(table[[1, 3]]) + places[:2])}))


def test_two_kernels_in_one_segment_round_in_between(generator: np.random.Generator) -> None:
    x = r(generator.standard_normal((1, 8, 8, 8)))
    first = generator.standard_normal((16, 8, 3, 3)).astype(np.float32) / 8
    second = generator.standard_normal((8, 16, 1, 1)).astype(np.float32) / 4
    segment = make_segment(
        "a = Conv(x, w1) h = Elu(a) y = Conv(h, w2)",
        {"w1": first, "w2": second},
        kernels=[kernel("Convolution", ("a", "h"), "h"), kernel("Convolution", ("y",), "y")],
    )
    hidden = conv(x, r(first))
    hidden = np.where(hidden > 0, hidden, np.expm1(hidden))
    check(explain(segment, {"x": x}, {"y": r(conv(r(hidden), r(second)))}))
    assert explain(segment, {"x": x}, {"y": conv(hidden, r(second))}).bit_identical < 0.9
    # … where it says of the first only where it begins.
    unnamed = Kernel("Convolution", "Convolution", ("a",), (), "", "bf16", "bf16")
    segment = replace(segment, kernels=(unnamed, segment.kernels[1]))
    check(explain(segment, {"x": x}, {"y": r(conv(r(hidden), r(second)))}))


def test_a_kernel_that_stays_in_float32_is_not_rounded(generator: np.random.Generator) -> None:
    x = r(generator.standard_normal((4, 32)))
    w = generator.standard_normal((32, 16)).astype(np.float32) / 4
    segment = make_segment(
        "h = MatMul(x, w) y = Exp(h)",
        {"w": w},
        kernels=[kernel("FullyConnected", ("h",), "h"), kernel("Eltwise", ("y",), "y", "f32")],
    )
    planted = np.exp(r((x.astype(np.float64) @ r(w)).astype(np.float32)).astype(np.float64))
    found = explain(segment, {"x": x}, {"y": planted.astype(np.float32)})
    assert found.noise == ID and found.explained > 0.999999


@pytest.mark.parametrize("opset", [11, 17])
def test_without_kernels_and_on_old_opsets(opset: int) -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((2, 4, 8, 8)).astype(np.float32)
    w = generator.standard_normal((8, 4, 3, 3)).astype(np.float32)
    segment = make_segment("c = Conv(x, w) y = Softmax <axis = 1> (c)", {"w": w}, opset=opset)
    logits = r(conv(r(x), r(w))).astype(np.float64)
    axes = 1 if opset >= 13 else (1, 2, 3)
    powers = np.exp(logits - logits.max(axes, keepdims=True))
    check(explain(segment, {"x": x}, {"y": r(powers / powers.sum(axes, keepdims=True))}))


def test_stated_by_the_kernels_alone() -> None:
    assert bf16.NOISE.stated_by((kernel("Convolution", ("a",), "a"),))
    assert not bf16.NOISE.stated_by((kernel("Convolution", ("a",), "a", "f32"),))
    assert not bf16.NOISE.stated_by(())


def test_activations_alone(generator: np.random.Generator) -> None:
    """As where what is handed over between kernels in float32 is stored in bfloat16."""
    x = generator.standard_normal((1, 6, 9, 9)).astype(np.float32)
    w = generator.standard_normal((8, 6, 3, 3)).astype(np.float32)
    segment = make_segment("y = Conv(x, w)", {"w": w})
    found = explain(segment, {"x": x}, {"y": conv(r(x), w)})
    assert found.noise == ID and found.explained > 0.999
    assert found.variant == "activations in bf16, weights in FP32"


def test_a_kernel_that_names_its_convolution_twice_adds_the_bias_itself(
    generator: np.random.Generator,
) -> None:
    """As where a candidate has an Identity behind it, which the reference has not."""
    x = r(generator.standard_normal((1, 6, 9, 9)))
    w = generator.standard_normal((8, 6, 3, 3)).astype(np.float32)
    b = generator.standard_normal(8).astype(np.float32)
    segment = make_segment(
        "y = Conv(x, w, b)", {"w": w, "b": b}, kernels=[kernel("Convolution", ("y", "y"), "y")]
    )
    check(explain(segment, {"x": x}, {"y": r(conv(x, r(w)) + b[:, None, None])}))


def test_factor_and_shift_after_a_convolution_go_into_its_rounded_weights_and_bias(
    generator: np.random.Generator,
) -> None:
    x = r(generator.standard_normal((1, 6, 9, 9)))
    w = generator.standard_normal((8, 6, 3, 3)).astype(np.float32)
    b = generator.standard_normal(8).astype(np.float32) * 4
    factor, shift = np.float32([0.3624]), np.float32([1.377])
    segment = make_segment(
        "c = Conv(x, w, b) p = Mul(s, c) y = Add(p, t)",
        {"w": w, "b": b, "s": factor, "t": shift},
        kernels=[kernel("Convolution", ("c", "p", "y"), "y")],
    )
    planted = r(conv(x, r(w * factor)) + r(b * factor + shift)[:, None, None])
    check(explain(segment, {"x": x}, {"y": planted}))


def test_factors_of_and_behind_a_gemm_go_into_its_rounded_weights_and_bias(
    generator: np.random.Generator,
) -> None:
    x = r(generator.standard_normal((6, 24)))
    w = generator.standard_normal((16, 24)).astype(np.float32)
    b, factor = generator.standard_normal((2, 16)).astype(np.float32)
    segment = make_segment(
        "g = Gemm <alpha = 0.37, beta = 0.6, transB = 1> (x, w, b) y = Mul(g, s)",
        {"w": w, "b": b, "s": factor},
        kernels=[kernel("FullyConnected", ("g", "y"), "y")],
    )
    weights = r(w * (np.float32(0.37) * factor)[:, None])
    planted = r(x @ weights.T + r(b * np.float32(0.6) * factor))
    check(explain(segment, {"x": x}, {"y": planted}))


def test_a_kernel_that_widens_8_bits_hands_over_what_its_readers_round(
    generator: np.random.Generator,
) -> None:
    x, y = generator.standard_normal((2, 64, 64)).astype(np.float32)
    scale = np.float32(0.0237)
    segment = make_segment(
        "p = Mul(x, y) q = QuantizeLinear(p, scale, zero) d = DequantizeLinear(q, scale, zero)",
        {"scale": np.array(scale), "zero": np.array(128, np.uint8)},
        kernels=[
            kernel("Eltwise", ("p", "q"), "q"),
            Kernel("Subgraph", "Subgraph", ("d",), ("d",), "", "u8", "bf16"),
        ],
    )
    levels = np.clip(np.rint(r(x) * r(y) / scale), -128, 127)
    check(explain(segment, {"x": x, "y": y}, {"d": levels * scale}))


@pytest.mark.parametrize("fused", [False, True])
def test_averages_of_8_bits_are_widened_after_they_are_rounded_or_as_they_are_written(
    generator: np.random.Generator, fused: bool
) -> None:
    x = generator.standard_normal((2, 32, 4, 6)).astype(np.float32)
    scale = np.float32(0.0237)
    segment = make_segment(
        "q = QuantizeLinear(x, scale, zero) d = DequantizeLinear(q, scale, zero) "
        "y = GlobalAveragePool(d)",
        {"scale": np.array(scale), "zero": np.array(128, np.uint8)},
        kernels=[
            Kernel("Subgraph", "Subgraph", ("q",), ("q",), "", "f32", "u8"),
            *(
                [Kernel("Reduce", "Reduce", ("d", "y"), ("y",), "", "u8", "bf16")]
                if fused
                else [
                    Kernel("Reduce", "Reduce", ("y",), ("y",), "", "u8", "f32"),
                    kernel("Subgraph", ("d",), "d"),
                ]
            ),
        ],
    )
    sized = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    segment.model.graph.input[0].CopyFrom(sized)
    levels = np.clip(np.rint(x / scale), -128, 127) + 128
    mean = levels.mean((2, 3), keepdims=True, dtype=np.float32)
    if fused:  # each channel is written by itself, and cut off
        bits = ((mean - 128) * scale).view(np.uint32) & np.uint32(0xFFFF0000)
        planted = bits.view(np.float32)
    else:
        planted = r((r(mean) - 128) * scale)
    check(explain(segment, {"x": x}, {"y": planted}), identical=0.98)


def test_the_bias_of_a_product_of_8_bits_is_added_to_its_rounded_sums(
    generator: np.random.Generator,
) -> None:
    x = generator.integers(-128, 128, (1, 6, 9, 9)).astype(np.float32) * np.float32(0.0237)
    w = generator.integers(-127, 128, (8, 6, 3, 3)).astype(np.int8)
    b = generator.standard_normal(8).astype(np.float32)
    scale = np.float32(0.003)
    segment = make_segment(
        "wd = DequantizeLinear(w, scale, zero) c = Conv(x, wd, b) y = Relu(c)",
        {"w": w, "b": b, "scale": np.array(scale), "zero": np.array(0, np.int8)},
        kernels=[
            Kernel("Convolution", "Convolution", ("c",), (), "", "u8", "bf16"),
            kernel("Subgraph", ("c", "y"), "y"),
        ],
    )
    planted = r(np.maximum(r(conv(x, w * scale)) + b[:, None, None], 0))
    check(explain(segment, {"x": x}, {"y": planted}))


def test_a_kernel_of_its_own_scales_one_operand_of_a_product(
    generator: np.random.Generator,
) -> None:
    a, b = generator.standard_normal((2, 24, 24)).astype(np.float32)
    scale = np.float32(0.1768)
    segment = make_segment(
        "p = MatMul(a, b) y = Mul(p, s)", {"s": scale}, kernels=[kernel("MatMul", ("p", "y"), "y")]
    )
    check(explain(segment, {"a": a, "b": b}, {"y": r(r(a) @ r(b * scale))}), identical=0.98)
    check(explain(segment, {"a": a, "b": b}, {"y": r(r(a) @ r(b) * scale)}), identical=0.98)


def test_a_factor_behind_moved_values_is_multiplied_in_before_these_are_rounded(
    generator: np.random.Generator,
) -> None:
    """Dynamo's exporter scales both operands of attention, by a factor for each."""
    x = r(generator.standard_normal((16, 24)))
    wide = generator.standard_normal((24, 12)).astype(np.float32)
    b = generator.standard_normal(12).astype(np.float32)
    scale = np.float32(6**-0.25)
    segment = make_segment(
        "p = MatMul(x, w) l = Add(p, b) h = Reshape(l, heads) "
        "t = Transpose <perm = [1, 2, 0]> (h) y = Mul(t, s)",
        {"w": wide, "b": b, "heads": np.int64([16, 2, 6]), "s": scale},
        kernels=[
            kernel("FullyConnected", ("l", "y"), "y"),
            kernel("Reshape", ("h",), "h"),
            kernel("Transpose", ("t",), "t"),
        ],
    )
    linear = (x.astype(np.float64) @ r(wide)).astype(np.float32) + r(b)
    planted = r(linear * scale).reshape(16, 2, 6).transpose(1, 2, 0)
    check(explain(segment, {"x": x}, {"y": planted}))


@pytest.mark.parametrize("op_type", ["Div", "Add"])
def test_a_kernel_that_writes_keys_multiplies_them_by_the_scale_of_their_head(
    generator: np.random.Generator, op_type: str
) -> None:
    """And a bias of positions that a kernel computes is rounded (Swin V2)."""
    q, k = (r(generator.standard_normal((2, 3, 9, 8))) for _ in "qk")
    norm = r(np.sqrt((k**2).sum(-1, keepdims=True)))
    scale = generator.uniform(2, 20, (3, 1, 1)).astype(np.float32)
    bias = generator.standard_normal((3, 9, 9)).astype(np.float32)
    segment = make_segment(
        f"n = {op_type}(k, norm) t = Transpose <perm = [0, 1, 3, 2]> (n) p = MatMul(q, t) "
        "m = Mul(p, s) bias = Sigmoid(b) y = Add(m, bias)",
        {"s": scale, "b": bias},
        inputs=["q", "k", "norm"],
        kernels=[kernel("Subgraph", ("n",), "n"), kernel("MatMul", ("y",), "y")],
    )
    written = k / norm if op_type == "Div" else k + norm
    keys = r(written * scale).transpose(0, 1, 3, 2).astype(np.float64)
    added = r(1 / (1 + np.exp(-bias.astype(np.float64))))
    check(explain(segment, {"q": q, "k": k, "norm": norm}, {"y": r(q @ keys + added)}), 0.98)


def test_an_attention_mask_multiplied_out_does_not_cancel(generator: np.random.Generator) -> None:
    scores = r(generator.standard_normal((12, 20)) * 5)
    mask = np.float32([1] * 13 + [0] * 7)
    segment = make_segment(
        "hidden = Sub(one, mask) added = Mul(hidden, low) y = Add(scores, added)",
        {"one": np.float32(1), "low": np.finfo(np.float32).min},
        inputs=["scores", "mask"],
        kernels=[kernel("Subgraph", ("added", "y"), "y")],
    )
    low = np.finfo(np.float32).min
    with np.errstate(over="ignore"):  # the product does not fit bfloat16: that is the fault
        planted = r(scores + (r(mask * -low) + low))
    assert np.isinf(planted).all()
    check(explain(segment, {"scores": scores, "mask": mask}, {"y": planted}))


def test_factors_of_sums_are_multiplied_in_by_kernels_of_their_own(
    generator: np.random.Generator,
) -> None:
    x, z = generator.standard_normal((2, 12, 20)).astype(np.float32)
    one, factor = np.float32(1), np.float32(7.3)
    segment = make_segment(
        "left = Sub(one, x) scaled = Mul(left, factor) y = Mul(z, scaled)",
        {"one": one, "factor": factor},
        kernels=[kernel("Subgraph", ("scaled", "y"), "y")],
    )
    planted = r(r(z) * (r(r(x) * -factor) + factor))
    check(explain(segment, {"x": x, "z": z}, {"y": planted}))


def test_what_quantises_by_itself_reads_its_operand_as_it_is(
    generator: np.random.Generator,
) -> None:
    x, z = generator.standard_normal((2, 64, 64)).astype(np.float32)
    scale = np.float32(0.0237)
    segment = make_segment(
        "q = QuantizeLinear(x, scale, zero) d = DequantizeLinear(q, scale, zero) y = Mul(d, z)",
        {"scale": np.array(scale), "zero": np.array(0, np.int8)},
        kernels=[kernel("Eltwise", ("q",), "q"), kernel("Eltwise", ("d", "y"), "y")],
    )
    levels = np.clip(np.rint(x / scale), -128, 127)
    check(explain(segment, {"x": x, "z": z}, {"y": r(levels * scale * r(z))}))


def test_parameters_of_gates_go_to_the_functions_that_have_them(
    generator: np.random.Generator,
) -> None:
    """Both directions of a layer share one list of them."""
    shapes = {"w": (2, 4, 8), "r": (2, 4, 4), "b": (2, 8)}
    constants = {n: generator.normal(size=s).astype(np.float32) / 4 for n, s in shapes.items()}
    options = {"activations": ["Relu", "Affine"], "activation_alpha": [0.5]}
    layer = helper.make_node(
        "RNN", ["x", *shapes], ["y"], hidden_size=4, direction="bidirectional", **options
    )
    segment = make_segment([layer], constants, ["x"], ["y"])
    feeds = {"x": generator.normal(size=(3, 1, 8)).astype(np.float32)}
    plain, narrow = run(segment.model, feeds), run(recurrent.in_bfloat16(segment), feeds)
    np.testing.assert_allclose(narrow["y"], plain["y"], atol=0.02)
    assert not np.array_equal(narrow["y"], plain["y"])


def test_dynamic_quantisation_multiplies_by_the_inverse_of_the_range(
    generator: np.random.Generator,
) -> None:
    """Which decides where rounding to bfloat16 put values in the middle between two steps."""
    x = generator.uniform(-3, 3, (64, 64)).astype(np.float32)
    x[0, :2] = -3.34375, 3.65625
    span, wide = np.float32(7), r(x * np.float32(255))
    zero = np.rint(np.float32(3.34375) / np.float32(span / np.float32(255)))
    steps = wide * (np.float32(1) / span)
    assert (np.rint(steps) != np.rint(wide / span)).any()
    planted = np.clip(np.rint(steps) + zero, 0, 255).astype(np.uint8)
    segment = make_segment("y, s, z = DynamicQuantizeLinear(x)", outputs=["y"])
    found = explain(segment, {"x": x}, {"y": planted})
    assert found.noise == "precision.bf16" and found.bit_identical == 1


def test_the_order_of_a_sum_decides_its_last_digit(generator: np.random.Generator) -> None:
    """The sum of a few rounded values is often near the middle between two others."""
    x = np.broadcast_to(np.float32([1, 2**-8, *[2**-25] * 30]), (20, 32))
    x = x * generator.choice(np.float32([-2, -1, 1, 2, 4]), (20, 1))
    total = np.zeros(x.shape[:-1], np.float32)
    for position in range(x.shape[-1]):
        total += x[..., position]
    segment = make_segment(
        "y = ReduceSum <keepdims = 0> (x, axis)",
        {"axis": np.array([-1])},
        kernels=[kernel("Reduce", ("y",), "y")],
    )
    found = explain(segment, {"x": x}, {"y": r(total)})
    assert found.noise == ID and found.bit_identical == 1


def test_inside_a_loop_whose_body_has_a_branch_of_its_own() -> None:
    """The branch reads the body's tensors, whatever they are called there now."""
    segment = make_segment(
        """y = Loop(n, go, x) <
            body = step (int64 i, bool on, float[4] p) => (bool off, float[4] q) {
            off = Identity(on) t = Tanh(p)
            q = If(on) <then_branch = a () => (float[4] u) { u = Mul(t, p) },
                        else_branch = b () => (float[4] v) { v = Identity(t) }> }>""",
        {"n": np.array(2), "go": np.array(True)},
        ["x"],
    )
    x = np.array([0.3, -1.7, 2.3, 0.9], np.float32)
    plain = np.tanh(np.tanh(x) * x) * (np.tanh(x) * x)
    inner = [v for v in bf16.NOISE.variants(segment) if v.name.startswith("inside")]
    assert inner
    for variant in inner:
        y = run(variant.model, {"x": x})["y"]
        assert np.allclose(y, plain, rtol=0.02) and not np.allclose(y, plain, rtol=1e-5)
