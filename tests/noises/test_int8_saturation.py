"""Products that saturate as VPMADDUBSW does, in numpy and on this machine's own kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.noises import bf16, fp16, int8, int8_requantisation, int8_saturation, tf32
from auditor.ports import Array, Arrays, CompiledConstant, SegmentGraph
from tests.segments import explained, make_segment, run

ID = "precision.int8_saturation"
REQUANTISED = "precision.int8_requantisation"
CAUSES = (bf16, fp16, int8, int8_requantisation, int8_saturation, tf32)
explain = partial(explained, [cause.NOISE for cause in CAUSES])
XS, WS, YS = np.float32(0.02), np.float32(0.01), np.float32(0.75)
XZ, YZ = 7, 121


def maddubs(a: Array, w: Array) -> Array:
    """Dot products as VPMADDUBSW and VPMADDWD make them: [..., K] uint8 by [K, N] int8."""
    total = np.zeros((*a.shape[:-1], w.shape[1]), np.int64)
    for k in range(0, len(w), 2):
        pair = sum(
            np.multiply.outer(a[..., i].astype(np.int32), w[i].astype(np.int32))
            for i in range(k, min(k + 2, len(w)))
        )
        total += np.minimum(np.maximum(pair, -32768), 32767)
    return total


def quantised(total: Array, bias: Array) -> Array:
    """Requantised in double."""
    real = (total + bias) * (float(XS) * float(WS) / float(YS))
    return np.clip(np.round(real) + YZ, 0, 255).astype(np.uint8)


@pytest.fixture
def dense(generator: np.random.Generator) -> tuple[SegmentGraph, Arrays]:
    x = generator.integers(0, 256, (32, 37), np.uint8)
    w = generator.integers(-127, 128, (37, 24)).astype(np.int8)
    return dequantised("MatMul", w), {"x": x, "w": w}


def dequantised(
    op_type: str, w: Array, bias: Array | None = None, **attributes: Any
) -> SegmentGraph:
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node(op_type, ["xd", "wd"], ["p"], **attributes),
        helper.make_node("QuantizeLinear", ["p", "ys", "yz"], ["y"]),
    ]
    constants: Arrays = {"xs": XS, "xz": np.uint8(XZ), "ws": WS, "wz": np.int8(0), "w": w}  # type: ignore[dict-item]
    constants |= {"ys": YS, "yz": np.uint8(YZ)}  # type: ignore[dict-item]
    if bias is not None:
        constants |= {"b": bias, "bs": XS * WS, "bz": np.int32(0)}  # type: ignore[dict-item]
        nodes.insert(0, helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"]))
        nodes[3].input.append("bd")
    made: SegmentGraph = make_segment(nodes, constants, ["x"], ["y"], kind=TensorProto.UINT8)
    return made


def test_matrix_products(dense: tuple[SegmentGraph, Arrays]) -> None:
    segment, t = dense
    w = t["w"].astype(np.int64)
    planted = quantised(maddubs(t["x"], t["w"]) - XZ * w.sum(axis=0), np.zeros(24))
    found = explain(segment, {"x": t["x"]}, planted)
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical > 0.99


def test_weights_that_the_graph_fills_and_quantises_itself(
    dense: tuple[SegmentGraph, Arrays],
) -> None:
    segment, t = dense
    w = np.full((37, 24), 127, np.int8)
    (held,) = (c for c in segment.model.graph.initializer if c.name == "w")
    held.CopyFrom(numpy_helper.from_array(np.array(w.shape), "shape"))
    filled = numpy_helper.from_array(np.float32(WS * 127).reshape(1), "value")
    for node in (
        helper.make_node("QuantizeLinear", ["real", "ws", "wz"], ["w"]),
        helper.make_node("ConstantOfShape", ["shape"], ["real"], value=filled),
    ):
        segment.model.graph.node.insert(0, node)
    planted = quantised(maddubs(t["x"], w) - XZ * w.astype(np.int64).sum(axis=0), np.zeros(24))
    found = explain(segment, {"x": t["x"]}, planted)
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical > 0.99


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_that_are_8_bits_held_as_floats(
    dense: tuple[SegmentGraph, Arrays], per_channel: bool
) -> None:
    """As a file of another engine has them, one channel in a wider range than it needs."""
    segment, t = dense
    w = t["w"]
    w[:, 3] = np.clip(w[:, 3], -90, 90)
    w[0] = np.where(np.arange(24) == 3, 90, 127)
    wide = np.where(np.arange(24) % 2, WS, np.float32(3) * WS) if per_channel else WS
    (node,) = (n for n in segment.model.graph.node if n.output[0] == "wd")
    segment.model.graph.node.remove(node)
    values = w.astype(np.float32) * wide
    segment.model.graph.initializer.append(numpy_helper.from_array(values, "wd"))
    total = (maddubs(t["x"], w) - XZ * w.astype(np.int64).sum(axis=0)) * (wide / WS)
    planted = quantised(total, np.zeros(24))
    found = explain(segment, {"x": t["x"]}, planted)
    assert found.noise == ID and found.explained > 0.999 and found.bit_identical > 0.99
    values = numpy_helper.from_array(values + np.float32(WS / 20), "wd")
    segment.model.graph.initializer[-1].CopyFrom(values)  # on no grid
    assert not list(int8_saturation.NOISE.variants(segment))


def test_a_float_segment_of_which_the_file_is_quantised(
    dense: tuple[SegmentGraph, Arrays], generator: np.random.Generator
) -> None:
    """What the quantiser chose explains nearly nothing, as nearly every sum saturates."""
    _, t = dense
    stored = t["w"] * WS
    trained = stored + generator.uniform(-0.4, 0.4, stored.shape).astype(np.float32) * WS
    compiled = CompiledConstant(stored, 0.003, "8 bits", None, quantised=True)
    ends = (np.array([0, 255]) - XZ) * float(XS)
    segment = replace(
        make_segment("y = MatMul(x, w)", {"w": trained}),
        compiled={"w": compiled},
        grids={"x": np.array([*ends, 256.0])},
    )
    total = maddubs(t["x"], t["w"]) - XZ * t["w"].astype(np.int64).sum(axis=0)
    planted = (total * (float(XS) * float(WS))).astype(np.float32)
    found = explain(segment, {"x": (t["x"].astype(np.float32) - XZ) * XS}, planted)
    assert {found.noise, *found.hypotheses[0].beside} == {"precision.int8", ID}
    assert found.explained > 0.999 > 0.1 > found.hypotheses[1].explained


@pytest.mark.parametrize("step", [1, 3, 6])
def test_saturation_without_the_rounding_behind_it(
    generator: np.random.Generator, step: int
) -> None:
    """A kernel that saturates and hands its sums over as floats, where the model rounds them.

    Saturation alone gives most of it, on steps where the backend has none: it is no cause by
    itself, and what is must be looked for on top of it, not of what explains little on none.
    """
    x = generator.integers(0, 256, (32, 37), np.uint8)
    w = generator.integers(-127, 128, (37, 24)).astype(np.int8)
    segment = dequantised("MatMul", w)
    model = segment.model
    model.graph.node[3].output[0] = "q"
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "ys", "yz"], ["y"]))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    scale = np.float32(step)
    for constant in model.graph.initializer:
        if constant.name == "ys":
            constant.CopyFrom(numpy_helper.from_array(scale, "ys"))
    total = maddubs(x, w) - XZ * w.astype(np.int64).sum(axis=0)
    real = total * (float(XS) * float(WS))
    planted = np.clip(real, -YZ * scale, (255 - YZ) * scale).astype(np.float32)
    found = explain(segment, {"x": x}, planted)
    assert {ID, REQUANTISED} <= {found.noise, *found.hypotheses[0].beside}, found.hypotheses[:3]
    assert found.explained > 0.9999


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("apart", [False, True])
def test_convolutions(generator: np.random.Generator, apart: bool, group: int) -> None:
    """Pairs go along position, then channel; or channels are padded to pairs at each position."""
    x = generator.integers(0, 256, (2, 3 * group, 9, 8), np.uint8)
    w = generator.integers(-127, 128, (4 * group, 3, 3, 3)).astype(np.int8)
    bias = generator.integers(-9000, 9000, 4 * group).astype(np.int32)
    options = {"pads": [1, 0, 1, 2], "strides": [2, 1], "group": group}
    segment = dequantised("Conv", w, bias, **options)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 2)), constant_values=XZ)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2]
    parts = []
    for g in range(group):
        a = windows[:, 3 * g : 3 * g + 3].transpose(0, 2, 3, 4, 5, 1)  # n, h, w, i, j, c
        v = w[4 * g : 4 * g + 4].transpose(2, 3, 1, 0)  # i, j, c, o
        if apart:
            a = np.pad(a, [(0, 0)] * 5 + [(0, 1)])
            v = np.pad(v, [(0, 0)] * 2 + [(0, 1), (0, 0)])
        parts.append(maddubs(a.reshape(*a.shape[:3], -1), v.reshape(-1, 4)))
    total = np.concatenate(parts, axis=3) - XZ * w.astype(np.int64).sum(axis=(1, 2, 3))
    planted = quantised(total, bias).transpose(0, 3, 1, 2)
    found = explain(segment, {"x": x}, planted)
    assert found.noise == ID and found.explained > 0.999
    assert found.variant is not None and ("each kernel position" in found.variant) == apart


def test_padding_by_a_node_of_its_own(generator: np.random.Generator) -> None:
    """Zero is one of the quantised values, so padding with it keeps them integers."""
    x = generator.integers(0, 256, (2, 3, 9, 8), np.uint8)
    w = generator.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    segment = dequantised("Conv", w)
    graph = segment.model.graph
    pads, zero = np.array([0, 0, 1, 0, 0, 0, 1, 2]), np.float32(0)
    graph.initializer.extend(
        numpy_helper.from_array(v, n) for v, n in ((pads, "pads"), (zero, "v"))
    )
    graph.node[2].input[0] = "xp"
    graph.node.insert(2, helper.make_node("Pad", ["xd", "pads", "v"], ["xp"]))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 2)), constant_values=XZ)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    total = maddubs(
        windows.transpose(0, 2, 3, 4, 5, 1).reshape(2, 9, 8, -1),
        w.transpose(2, 3, 1, 0).reshape(-1, 4),
    )
    total -= XZ * w.astype(np.int64).sum(axis=(1, 2, 3))
    planted = quantised(total, np.zeros(4)).transpose(0, 3, 1, 2)
    found = explain(segment, {"x": x}, planted)
    assert found.noise == ID and found.explained > 0.999, found.hypotheses[:3]


def test_this_processor(dense: tuple[SegmentGraph, Arrays]) -> None:
    """ONNX Runtime's own kernels, where the processor saturates."""
    segment, t = dense
    model = onnx.ModelProto()
    model.CopyFrom(segment.model)
    model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("x", TensorProto.UINT8, t["x"].shape)
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.UINT8, (32, 24)))
    fused = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    observed = fused.run(None, {"x": t["x"]})[0]
    if np.abs(observed.astype(int) - run(segment.model, {"x": t["x"]})["y"]).max() <= 1:
        pytest.skip("this processor adds 8-bit products without saturation")
    found = explain(segment, {"x": t["x"]}, observed)
    assert found.noise == ID and found.explained > 0.999


@pytest.mark.parametrize(
    ("kind", "zero", "second", "middle"),
    [(np.int8, 0, np.int8, 0), (np.uint8, 0, np.uint8, 128), (np.uint8, 121, np.int8, 0)],
)
def test_products_of_two_tensors(
    generator: np.random.Generator, kind: Any, zero: int, second: Any, middle: int
) -> None:
    """As attention multiplies: rows as uint8, columns as int8, an odd one without a partner."""
    a = generator.integers(0, 256, (2, 3, 16, 37)) + np.iinfo(kind).min
    b = generator.integers(0, 256, (3, 24, 37)) + np.iinfo(second).min
    constants = {"as": XS, "az": kind(zero), "bs": WS, "bz": second(middle)}
    segment = make_segment(
        "ad = DequantizeLinear(a, as, az) bd = DequantizeLinear(b, bs, bz) "
        "bt = Transpose <perm = [0, 2, 1]> (bd) y = MatMul(ad, bt)",
        constants,
        ["a", "b"],
    )
    for given, of in zip(segment.model.graph.input, (kind, second), strict=True):
        given.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(of))
    columns = (b - middle).transpose(0, 2, 1)
    raw = a - np.iinfo(kind).min  # int8 with its sign bit flipped
    total = np.stack([[maddubs(x, y) for x, y in zip(r, columns, strict=True)] for r in raw])
    total -= (zero - np.iinfo(kind).min) * columns.sum(axis=-2, keepdims=True)
    planted = (total * (float(XS) * float(WS))).astype(np.float32)
    found = explain(segment, {"a": a.astype(kind), "b": b.astype(second)}, planted)
    assert found.noise == ID and found.explained > 0.999, found.hypotheses[:3]


def test_annotated_inputs(generator: np.random.Generator) -> None:
    """A dequantised input's grid is read off its quantisation annotation."""
    q = generator.integers(0, 256, (16, 32), np.uint8)
    w = generator.integers(-127, 128, (32, 8)).astype(np.int8)
    constants = {"ws": WS, "wz": np.int8(0), "w": w, "xs": XS, "xz": np.uint8(XZ)}
    segment = make_segment("wd = DequantizeLinear(w, ws, wz) y = MatMul(x, wd)", constants)
    x = (q.astype(np.float32) - np.float32(XZ)) * XS
    planted = (maddubs(q, w) - XZ * w.astype(np.int64).sum(axis=0)) * (float(XS) * float(WS))
    assert explain(segment, {"x": x}, planted.astype(np.float32)).noise is None
    annotation = segment.model.graph.quantization_annotation.add(tensor_name="x")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="xs")
    annotation.quant_parameter_tensor_names.add(key="ZERO_POINT_TENSOR", value="xz")
    found = explain(segment, {"x": x}, planted.astype(np.float32))
    assert found.noise == ID and found.explained > 0.999


@pytest.mark.parametrize("defect", ["scaled", "swapped", "bias"])
def test_defects_are_not_named(generator: np.random.Generator, defect: str) -> None:
    x = generator.integers(0, 256, (1, 4, 8, 8), np.uint8)
    w = generator.integers(-127, 128, (6, 4, 3, 3)).astype(np.int8)
    bias = generator.integers(-9000, 9000, 6).astype(np.int32)
    segment = dequantised("Conv", w, bias)
    wrong = w.copy()
    if defect == "scaled":
        wrong[2] //= 2
    elif defect == "swapped":
        wrong[[0, 1]] = wrong[[1, 0]]
    shifted = bias + (3000 if defect == "bias" else 0) * (np.arange(6) == 3)
    planted = run(dequantised("Conv", wrong, shifted.astype(np.int32)).model, {"x": x})
    assert explain(segment, {"x": x}, planted["y"]).noise is None


def test_seven_bit_weights_cannot_saturate() -> None:
    w = np.full((32, 8), 64, np.int8)
    assert list(int8_saturation.NOISE.variants(dequantised("MatMul", w))) == []
    assert list(int8_saturation.NOISE.variants(dequantised("MatMul", w * 2 - 1)))


def test_exact_integers_are_another_cause(dense: tuple[SegmentGraph, Arrays]) -> None:
    """Weights that could saturate, and a backend that does not: only roundings differ."""
    segment, t = dense
    x = t["x"] // 4
    ties = quantised((x.astype(np.int64) - XZ) @ t["w"].astype(np.int64), np.zeros(24))
    flipped = ties.copy()
    flipped.flat[5] += 1
    assert explain(segment, {"x": x}, flipped).noise != ID


def test_the_reference_is_exact_in_integer_models(generator: np.random.Generator) -> None:
    """It runs on the same processor, whose kernels may saturate: that is the backend's doing."""
    x = generator.integers(128, 256, (8, 64), np.uint8)
    w = generator.integers(60, 128, (64, 16)).astype(np.int8)
    segment = make_segment("y = MatMulInteger(x, w)", {"w": w}, kind=TensorProto.UINT8)
    exact = x.astype(np.int32) @ w.astype(np.int32)
    assert np.array_equal(run(segment.model, {"x": x})["y"], exact)
    assert numpy_helper.to_array(segment.model.graph.initializer[0]).dtype == np.int8
    model = segment.model.SerializeToString()
    kernel = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    observed = kernel.run(None, {"x": x})[0]
    if np.array_equal(observed, exact):
        pytest.skip("this processor adds 8-bit products without saturation")
    assert np.array_equal(observed, maddubs(x, w))
    found = explain(segment, {"x": x}, observed)
    assert (found.noise, found.bit_identical) == (ID, 1.0)
