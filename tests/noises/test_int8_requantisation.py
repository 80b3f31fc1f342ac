"""Integer kernels and other roundings, by numpy and by ONNX Runtime's own integer operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.attribution.explainer import Explainer
from auditor.decomposition.divergence import Local
from auditor.graphs import surgery
from auditor.noises import bf16, fp16, int8, int8_requantisation, int8_saturation, tf32
from auditor.ports import Array, Arrays, SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays import sessions
from tests.segments import explained, make_segment, run

ID = "precision.int8_requantisation"
NOISES = (bf16.NOISE, fp16.NOISE, int8.NOISE, int8_requantisation.NOISE)
NOISES += (int8_saturation.NOISE, tf32.NOISE)  # type: ignore[assignment]


explain = partial(explained, NOISES)


def scalars(**values: tuple[float, int]) -> Arrays:
    """Scale ``NAMEs`` and uint8 zero point ``NAMEz`` of each name."""
    scales = {f"{n}s": np.asarray(s, np.float32) for n, (s, _) in values.items()}
    return scales | {f"{n}z": np.asarray(z, np.uint8) for n, (_, z) in values.items()}


def q(x: str, grid: str, to: str) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [x, f"{grid}s", f"{grid}z"], [to])


def dq(x: str, grid: str, to: str) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [x, f"{grid}s", f"{grid}z"], [to])


@pytest.fixture
def conv(generator: np.random.Generator) -> tuple[SegmentGraph, Arrays]:
    """A quantised convolution full of near ties, with weights that cannot saturate."""
    t = scalars(x=(0.1, 30), y=(0.01, 128)) | {
        "w": generator.integers(-3, 4, (8, 4, 3, 3)).astype(np.int8),
        "ws": np.full(8, 0.05, np.float32),
        "wz": np.zeros(8, np.int8),
        "b": generator.integers(-40, 40, 8).astype(np.int32),
        "bs": np.full(8, np.float32(0.1) * np.float32(0.05)),
        "bz": np.zeros(8, np.int32),
    }
    return convolution(t), t | {"x": generator.integers(20, 41, (1, 4, 12, 12), np.uint8)}


def convolution(constants: Arrays) -> SegmentGraph:
    nodes = [
        dq("x", "x", "xd"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        q("r", "y", "y"),
    ]
    made: SegmentGraph = make_segment(nodes, constants, ["x"], ["y"], kind=TensorProto.UINT8)
    return made


def qlinear(t: Arrays, bias: Array) -> Array:
    """The same in ONNX Runtime's QLinearConv, whose integer result Relu's limit then clips."""
    names = ("x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b")
    node = helper.make_node("QLinearConv", names, ["y"], pads=[1, 1, 1, 1])
    constants = [numpy_helper.from_array(t[n], n) for n in names[1:-1]]
    constants.append(numpy_helper.from_array(bias, "b"))
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, t["x"].shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = np.maximum(session.run(None, {"x": t["x"]})[0], t["yz"])
    return result


def test_an_integer_convolution(conv: tuple[SegmentGraph, Arrays]) -> None:
    segment, t = conv
    found = explain(segment, {"x": t["x"]}, qlinear(t, t["b"]))
    assert (found.noise, found.bit_identical) == (ID, 1.0)
    assert found.variant.startswith("sums of integers, stored bias")


def test_a_bias_of_another_scale_is_taken_as_it_is_stored(
    conv: tuple[SegmentGraph, Arrays],
) -> None:
    _, t = conv
    t = t | {"bs": np.full(8, 0.02, np.float32)}
    segment = convolution({n: v for n, v in t.items() if n != "x"})
    found = explain(segment, {"x": t["x"]}, qlinear(t, t["b"]))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_a_real_bias_becomes_integers(
    conv: tuple[SegmentGraph, Arrays], generator: np.random.Generator
) -> None:
    """As ONNX Runtime's optimiser makes of it; the weights of the second lie the other way."""
    _, t = conv
    feeds = {"x": t.pop("x")}
    t["real"] = ((t["b"] + generator.uniform(-0.4, 0.4, 8)) * t["bs"]).astype(np.float32)
    t["w"] = t["w"][:, :1]
    for op_type, group, axis in (("Conv", 4, 0), ("ConvTranspose", 1, 1)):
        t["w"] = t["w"] if axis == 0 else np.ascontiguousarray(t["w"][:4].repeat(8, 1))
        results = {}
        for bias in ("real", "bd"):
            nodes = [
                dq("x", "x", "xd"),
                helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis),
                helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
                helper.make_node(op_type, ["xd", "wd", bias], ["y"], group=group),
            ]
            made = make_segment(nodes, t, ["x"], ["y"])
            made.model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
            results[bias] = made, run(made.model, feeds)["y"]
        found = explain(results["real"][0], feeds, results["bd"][1])
        assert (found.noise, found.bit_identical) == (ID, 1.0)


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_softmax_between_8_bit_values(generator: np.random.Generator, axis: int) -> None:
    """ONNX Runtime's own kernel: 1 / 0.0031 = 322.6 is cut to 322."""
    t = scalars(x=(0.04, 120), y=(0.0031, 0))
    nodes = [dq("x", "x", "d"), helper.make_node("Softmax", ["d"], ["s"], axis=axis)]
    segment = make_segment([*nodes, q("s", "y", "y")], t, ["x"], ["y"], kind=TensorProto.UINT8)
    feeds = {"x": generator.integers(0, 256, (6, 20, 24), np.uint8)}
    session = ort.InferenceSession(
        segment.model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = explain(segment, feeds, session.run(None, feeds)[0])
    assert (found.noise, found.bit_identical) == (ID, 1.0)
    assert found.variant.startswith("softmax from a table")


def test_pairs_with_other_scales_are_merged(generator: np.random.Generator) -> None:
    nodes = [dq("x", "a", "d"), q("d", "b", "e"), dq("e", "b", "f"), q("f", "a", "g")]
    nodes.append(dq("g", "a", "y"))
    segment = make_segment(
        nodes, scalars(a=(0.05, 128), b=(0.11, 100)), ["x"], ["y"], kind=TensorProto.UINT8
    )
    x = generator.integers(0, 256, (4, 64), np.uint8)
    found = explain(segment, {"x": x}, (x.astype(np.float32) - 128) * np.float32(0.05))
    assert found.noise == ID and found.explained > 0.999999


@pytest.mark.parametrize("kernels", [True, False])
def test_sums_without_rounding(generator: np.random.Generator, kernels: bool) -> None:
    """A convolution fused with the sum behind it keeps its value unrounded."""
    w = generator.standard_normal((4, 4, 1, 1)).astype(np.float32)
    nodes = [q("x", "x", "xq"), dq("xq", "x", "xd"), helper.make_node("Conv", ["xd", "w"], ["c"])]
    nodes += [q("c", "c", "cq"), dq("cq", "c", "cd"), helper.make_node("Add", ["xd", "cd"], ["s"])]
    nodes += [q("s", "s", "sq"), dq("sq", "s", "y")]
    grids = {"x": (0.03, 128), "c": (0.06, 120), "s": (0.02, 128)}
    fused = (Kernel("k", "Convolution", ("c", "cq", "s", "sq"), ("s",), "", "i8", "u8"),)
    segment = make_segment(
        nodes, scalars(**grids) | {"w": w}, ["x"], ["y"], fused if kernels else ()
    )
    x = generator.standard_normal((1, 4, 16, 16)).astype(np.float32)
    steps = np.clip(np.round(x.astype(np.float64) / 0.03), -128, 127) * 0.03
    total = steps + np.einsum("ocij,nchw->nohw", w.astype(np.float64), steps)
    planted = np.clip(np.round(total / 0.02), -128, 127) * 0.02
    found = explain(segment, {"x": x}, planted.astype(np.float32))
    assert found.noise == ID and found.explained > 0.99
    assert found.variant == "values that enter a sum are limited, not rounded"


def test_values_that_are_limited_to_zero_but_for_the_last_bits(
    generator: np.random.Generator,
) -> None:
    """Half of them are none, up to what adding the zero point and taking it off again leaves."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), q("r", "r", "rq"), dq("rq", "r", "y")]
    segment = make_segment(nodes, scalars(r=(0.02, 0)), ["x"], ["y"])
    x = generator.uniform(-4, 4, (1, 4, 16, 16)).astype(np.float32)
    limited = np.clip(x, 0, np.float32(0.02 * 255)) + generator.uniform(-4e-7, 4e-7, x.shape)
    found = explain(segment, {"x": x}, limited.astype(np.float32))
    assert found.noise == ID and found.explained > 0.99999
    assert found.variant == "values are limited, not rounded"
    shifted = limited + 0.004 * (limited < 1e-3)  # a fifth of a step is another value
    assert explain(segment, {"x": x}, shifted.astype(np.float32)).noise is None


def test_a_rounding_left_out_behind_a_product_that_saturates(
    generator: np.random.Generator,
) -> None:
    """Two products, as a build shows them that does not show what lies between them."""
    t = scalars(x=(0.02, 10), a=(0.1, 128), y=(0.1, 128)) | {
        "ws": np.array(0.01, np.float32),
        "wz": np.array(0, np.int8),
        "w1": generator.integers(-127, 128, (32, 24)).astype(np.int8),
        "w2": generator.integers(-20, 21, (24, 16)).astype(np.int8),
    }
    t["w1"][:, 4:] //= 4  # a few columns saturate, of which few of the next product's depend
    t["w2"][:4, 4:] = 0
    nodes = [dq("x", "x", "xd"), dq("w1", "w", "v1"), dq("w2", "w", "v2")]
    nodes += [helper.make_node("MatMul", ["xd", "v1"], ["m"]), q("m", "a", "mq")]
    nodes += [dq("mq", "a", "a"), helper.make_node("MatMul", ["a", "v2"], ["n"])]
    segment = make_segment(
        [*nodes, q("n", "y", "nq"), dq("nq", "y", "y")], t, ["x"], ["y"], kind=TensorProto.UINT8
    )
    x = generator.integers(0, 256, (40, 32), np.uint8)
    products = x.astype(np.int64)[:, :, None] * t["w1"]
    pairs = products.reshape(40, 16, 2, 24).sum(axis=2)
    sums = np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1) - 10 * t["w1"].sum(axis=0)
    between = np.clip(np.rint(sums * 0.02 * 0.01 / 0.1), -128, 127) * 0.1
    assert np.abs(pairs).max() > 2**15
    planted = (between @ t["w2"] * 0.01).astype(np.float32)
    found = explain(segment, {"x": x}, planted)
    assert found.noise == "precision.int8_saturation" and found.explained > 0.9999
    assert {id for h in found.hypotheses if h.explained > 0.9999 for id in h.beside} == {ID}


def reciprocal(x: Array) -> Array:
    return np.round(x * (np.float32(1) / np.float32(0.07))) + 101


def zero_first(x: Array) -> Array:
    return np.round(x / np.float32(0.07) + np.float32(101))


def away(x: Array) -> Array:
    values = x / np.float32(0.07)
    return np.trunc(values + np.copysign(np.float32(0.5), values)) + 101


@pytest.mark.parametrize("rule", [reciprocal, zero_first, away])
def test_roundings(generator: np.random.Generator, rule: Any) -> None:
    ties = (generator.integers(-100, 150, 4000) + 0.5).astype(np.float32) * np.float32(0.07)
    segment = make_segment([q("x", "g", "y")], scalars(g=(0.07, 101)), ["x"], ["y"])
    planted = np.clip(rule(ties[None]), 0, 255).astype(np.uint8)
    found = explain(segment, {"x": ties[None]}, planted)
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_dynamic_ranges() -> None:
    x = np.array([[0, 2, -3, -2.5, 1.34, 0.5]], np.float32)
    segment = make_segment("y, s, z = DynamicQuantizeLinear(x)", outputs=["y"])
    planted = np.round(x * 255 / np.float32(5)) + 153  # 5 = 2 − (−3), 153 = 3 · 255 / 5
    found = explain(segment, {"x": x}, planted.astype(np.uint8))
    assert (found.noise, found.bit_identical) == (ID, 1.0)


@pytest.mark.parametrize("defect", ["scaled", "swapped", "bias"])
def test_defects_are_not_named(conv: tuple[SegmentGraph, Arrays], defect: str) -> None:
    segment, t = conv
    wrong = {n: v.copy() for n, v in t.items() if n != "x"}
    if defect == "scaled":
        wrong["ws"][3] *= np.float32(1.02)
    elif defect == "swapped":
        wrong["w"][[0, 1]] = wrong["w"][[1, 0]]
    else:
        wrong["b"][5] += 20
    planted = run(convolution(wrong).model, {"x": t["x"]})["y"]
    assert explain(segment, {"x": t["x"]}, planted).noise is None


def test_float_segments_are_left_alone() -> None:
    nodes: Sequence[onnx.NodeProto] = [helper.make_node("Exp", ["x"], ["y"])]
    assert not list(int8_requantisation.NOISE.variants(make_segment(nodes, {}, ["x"], ["y"])))


def test_sums_in_steps_of_the_result() -> None:
    """erf(x) + 1 as transformers quantise it: every sum lies half-way between two steps."""
    t = scalars(a=(2 / 255, 128), b=(1 / 255, 0), y=(2 / 255, 0))
    nodes = [
        dq("a", "a", "ad"),
        dq("b", "b", "bd"),
        helper.make_node("Add", ["ad", "bd"], ["s"]),
        q("s", "y", "y"),
    ]
    constants = t | {"b": np.array(255, np.uint8)}
    segment = make_segment(nodes, constants, ["a"], ["y"], kind=TensorProto.UINT8)
    feeds = {"a": np.arange(256, dtype=np.uint8)}
    model = surgery.copied(segment.model)
    del model.graph.node[:]
    names = ("a", "as", "az", "b", "bs", "bz", "ys", "yz")
    model.graph.node.append(helper.make_node("QLinearAdd", names, ["y"], domain="com.microsoft"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    observed = run(model, feeds)["y"]
    replayed = run(segment.model, feeds)
    assert np.mean(observed != replayed["y"]) > 0.2
    found = explain(segment, feeds, observed)
    assert (found.noise, found.bit_identical) == (ID, 1.0)
    assert found.variant is not None and found.variant.startswith("sums of two integers")
    # Two steps up everywhere is another error (one is what rounding ties up does to most of them).
    wrong = np.minimum(replayed["y"], 253) + np.uint8(2)
    assert explain(segment, feeds, wrong).noise is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_recurrent_layer_whose_threads_quantise_parts_of_the_batch(
    generator: np.random.Generator, threads: int
) -> None:
    """ONNX Runtime's own kernel, on a batch whose ranges differ."""
    x = generator.standard_normal((6, 8, 16)) * np.linspace(0.2, 3, 8)[:, None]
    t: Arrays = {}
    for name, rows in {"w": 16, "r": 24}.items():
        t[name] = generator.integers(0, 256, (1, rows, 96)).astype(np.uint8)
        t[f"{name}s"] = np.full(1, 0.01, np.float32)
        t[f"{name}z"] = np.full(1, 128, np.uint8)
    inputs = ["x", "w", "r", "", "", "", "", "", "ws", "wz", "rs", "rz"]
    node = helper.make_node("DynamicQuantizeLSTM", inputs, ["y"], hidden_size=24)
    node.domain = "com.microsoft"
    segment = make_segment([node], t, ["x"], ["y"])
    segment.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    feeds = {"x": x.astype(np.float32)}
    (observed,) = sessions.session(segment.model, threads).run(None, feeds)
    replayed = run(segment.model, feeds)  # on one thread
    assert np.array_equal(observed, replayed["y"]) is (threads == 1)
    for own, named in ((threads, threads > 1), (1, False)):
        local = Local(feeds, {"y": observed}, replayed)
        found = Explainer(NOISES).explain(replace(segment, threads=own), local)
        assert (found.noise == ID) is named
        assert not named or ("thread" in found.variant and found.bit_identical == 1.0)


@pytest.mark.parametrize("zero", [-60, -1, -128])
def test_integers_that_openvino_spreads_where_it_concatenates_them(zero: int) -> None:
    """A quantised image beside a constant of zeros, in front of a convolution that copies both."""
    pytest.importorskip("openvino")
    import openvino

    t: Arrays = {"xs": np.array(1 / 128, np.float32), "xz": np.array(zero, np.int8)}
    nodes = [q("x", "x", "q"), dq("q", "x", "y")]
    x = (np.arange(-384, 384, dtype=np.float32) / 128).reshape(1, 3, 16, 16)
    constants = t | {
        "border": np.zeros((1, 3, 1, 16), np.float32),
        "w": np.eye(3, dtype=np.int8).reshape(3, 3, 1, 1),
        "ws": np.array(1, np.float32),
        "wz": np.array(0, np.int8),
    }
    padded = [
        *nodes,
        helper.make_node("Concat", ["y", "border"], ["c"], axis=2),
        dq("w", "w", "wd"),
        helper.make_node("Conv", ["c", "wd"], ["out"]),
    ]
    whole = make_segment(padded, constants, ["x"], ["out"]).model
    whole.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))
    )
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(whole.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    observed = compiled(x)[0][:, :, :16]
    segment = make_segment(nodes, t, ["x"], ["y"])
    plain = run(segment.model, {"x": x})["y"]
    integers = np.clip(np.rint(x * 128) + zero, -128, 127)
    low = 0 if zero == -128 else -128
    spread = ((low + (integers + 128) * 256 / 255) / 128).astype(np.float32)
    # Whether it does is its own affair on each processor; what it does then is this.
    seen = plain if np.allclose(observed, plain, atol=1e-5) else spread
    np.testing.assert_allclose(observed, seen, atol=1e-5)
    for values in [spread] if seen is plain else [spread, observed]:
        found = explain(segment, {"x": x}, values)
        assert found.noise == ID and "spread" in found.variant and found.explained > 0.999999
    wrong = plain + np.float32(1 / 256)  # half a step everywhere is no such range
    assert explain(segment, {"x": x}, wrong).noise is None


@pytest.mark.parametrize("domain", ["com.microsoft", ""])
def test_sixteen_bits_that_openvino_leaves_out(generator: np.random.Generator, domain: str) -> None:
    """Neither rounded nor limited, of whatever domain the quantisers are."""
    pytest.importorskip("openvino")
    import openvino

    grids = {"x": (2.0**-14, 30000), "c": (2.0**-15, 32768)}  # c leaves its range of ±1
    t: Arrays = {f"{n}s": np.array(s, np.float32) for n, (s, _) in grids.items()}
    t |= {f"{n}z": np.array(z, np.uint16) for n, (_, z) in grids.items()}
    t["w"] = generator.standard_normal((4, 3, 3, 3)).astype(np.float32) / 4
    nodes = [q("x", "x", "xq"), dq("xq", "x", "xd"), helper.make_node("Conv", ["xd", "w"], ["c"])]
    nodes += [q("c", "c", "cq"), dq("cq", "c", "y")]
    for node in nodes:
        node.domain = "" if node.op_type == "Conv" else domain
    segment = make_segment(nodes, t, ["x"], ["y"], opset=17 if domain else 21)
    if domain:
        segment.model.opset_import.append(helper.make_opsetid(domain, 1))
    x = generator.uniform(-1, 1, (1, 3, 12, 12)).astype(np.float32)
    whole = surgery.copied(segment.model)
    whole.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))
    )
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(whole.SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32"},
    )
    found = explain(segment, {"x": x}, compiled(x)[0])
    assert found.noise == ID and "16 bits" in found.variant and found.explained > 0.9999
    assert not found.failures


@pytest.mark.parametrize(("kind", "bits"), [("FLOAT8E4M3FN", 3), ("FLOAT8E5M2", 2)])
def test_float8_by_way_of_float16(generator: np.random.Generator, kind: str, bits: int) -> None:
    """Values a hair beyond the middle between two are in the middle after the first rounding."""
    pytest.importorskip("openvino")
    import openvino

    element = getattr(TensorProto, kind)
    nodes = [q("x", "x", "q"), dq("q", "x", "y")]
    segment = make_segment(nodes, {"xs": np.array(0.5, np.float32)}, ["x"], ["y"], opset=19)
    zero = helper.make_tensor("xz", element, [], [0.0])
    segment.model.graph.initializer.append(zero)
    steps = (1 + generator.integers(0, 2**bits, 400) * 2.0**-bits) + 2.0 ** -(bits + 1)
    x = (steps * generator.choice([1, 2, 4], 400) * (1 + 2.0**-14)).astype(np.float32) / 2
    step = np.exp2(np.floor(np.log2(x * 2)) - bits)
    planted = (np.rint((x * 2).astype(np.float16) / step) * step / 2).astype(np.float32)
    whole = surgery.copied(segment.model)
    whole.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [400]))
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(whole.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    # Whether it does is its own affair on each processor; what it does then is this.
    plain, seen = run(segment.model, {"x": x})["y"], compiled(x)[0]
    assert np.array_equal(seen, planted) or np.array_equal(seen, plain)
    found = explain(segment, {"x": x}, planted)
    assert found.noise == ID and "float8" in found.variant and found.explained > 0.9999


@pytest.mark.parametrize("by_row", [False, True])
def test_a_recurrent_layer_that_reads_real_numbers(
    generator: np.random.Generator, by_row: bool
) -> None:
    """OpenVINO's answer to DynamicQuantizeLSTM: 8-bit weights, and nothing else is rounded."""
    x = generator.standard_normal((6, 1, 8)).astype(np.float32)
    rows = (1, 20) if by_row else (1,)
    t: Arrays = {}
    for name, columns in {"w": 8, "r": 5}.items():
        t[name] = generator.integers(0, 128, (1, columns, 20)).astype(np.uint8)
        t[f"{name}s"] = generator.uniform(0.004, 0.006, rows).astype(np.float32)
        t[f"{name}z"] = np.full(rows, 61, np.uint8)  # one, as ONNX Runtime wants
    inputs = ["x", "w", "r", "", "", "", "", "", "ws", "wz", "rs", "rz"]
    node = helper.make_node("DynamicQuantizeLSTM", inputs, ["y"], hidden_size=5)
    node.domain = "com.microsoft"
    segment = make_segment([node], t, ["x"], ["y"])
    segment.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    def real(name: str) -> Array:
        return np.asarray((t[name][0].astype(float) - t[f"{name}z"][0]) * t[f"{name}s"][0])

    def squash(v: Array) -> Array:
        return np.asarray(1 / (1 + np.exp(-v)))

    h, c, observed = np.zeros((1, 5)), np.zeros((1, 5)), []
    for step in x.astype(float):
        i, o, f, g = np.split(step @ real("w") + h @ real("r"), 4, axis=1)
        c = squash(f) * c + squash(i) * np.tanh(g)
        h = squash(o) * np.tanh(c)
        observed.append(h)
    found = explain(segment, {"x": x}, np.array(observed, np.float32)[:, None])
    assert found.noise == ID and "recurrent" in found.variant
    assert found.explained > 0.9999
