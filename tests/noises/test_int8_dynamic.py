"""Weights of few bits: what they are, and activations that are quantised as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.noises import bf16, fp16, int8_dynamic, tf32
from auditor.ports import Array, SegmentGraph, Silent
from auditor.records.report import AuditReport
from auditor.replays import blockwise, dynamic
from tests.helpers import nodes_of
from tests.segments import explain, make_segment, run

ID = "precision.int8_dynamic"


def packed(integers: Array, bits: int) -> Array:
    """Integers of one row in bytes, the first in the lowest bits."""
    each = 8 // bits
    padded = np.pad(integers, ((0, 0), (0, -integers.shape[1] % each)))
    total = np.zeros((len(padded), padded.shape[1] // each), np.uint8)
    for place in range(each):
        total |= padded[:, place::each].astype(np.uint8) << (bits * place)
    return total


def matmul_nbits(
    generator: np.random.Generator, bits: int, block: int, row: int, zeros: bool, level: int = 0
) -> tuple[onnx.ModelProto, Array]:
    """A model of one MatMulNBits with bias, and its weights as ``[row, 6]``."""
    columns, blocks = 6, -(-row // block)
    integers = generator.integers(0, 1 << bits, (columns * blocks, block)).astype(np.uint8)
    scales = generator.uniform(0.01, 0.1, columns * blocks).astype(np.float32)
    middle = generator.integers(0, 1 << bits, (columns, blocks)) if zeros else None
    zero = np.full(columns * blocks, 1 << (bits - 1)) if middle is None else middle.reshape(-1)
    real = (integers.astype(float) - zero[:, None]) * scales[:, None]
    values = {
        "w": packed(integers, bits).reshape(columns, blocks, -1),
        "s": scales,
        "b": generator.standard_normal(columns).astype(np.float32),
    }
    if middle is not None:
        values["z"] = packed(middle, bits).reshape(-1)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s", "z" if zeros else "", "", "b"],
        ["y"],
        domain="com.microsoft",
        **{"K": row, "N": columns, "bits": bits, "block_size": block, "accuracy_level": level},
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, row])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, columns])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model, real.reshape(columns, -1)[:, :row].T


@pytest.mark.parametrize(
    ("bits", "block", "row", "zeros"),
    [(4, 32, 64, False), (4, 16, 48, True), (4, 32, 80, True), (8, 32, 64, False)],
)
def test_written_out_it_is_what_onnx_runtime_computes(
    bits: int, block: int, row: int, zeros: bool, generator: np.random.Generator
) -> None:
    model, weights = matmul_nbits(generator, bits, block, row, zeros)
    x = {"x": generator.standard_normal((4, row)).astype(np.float32)}
    plain = onnxruntime.InferenceSession(model.SerializeToString()).run(None, x)[0]
    bias = numpy_helper.to_array(model.graph.initializer[2])
    assert np.allclose(plain, x["x"].astype(float) @ weights + bias, rtol=0, atol=1e-4)
    written = blockwise.written_out(SegmentGraph(model, ())).model
    assert "MatMulNBits" not in {node.op_type for node in written.graph.node}
    assert np.allclose(run(written, x)["y"], plain, rtol=0, atol=1e-5)


def by_groups(x: Array, group: int) -> Array:
    """To 127 steps of each group's largest, by multiplying with the inverse of the step."""
    apart = x.reshape(len(x), -1, group)
    step = np.abs(apart).max(-1, keepdims=True) / 127
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    return np.asarray((np.rint(apart * inverse) * step).reshape(x.shape))


def test_a_planted_group_is_named(generator: np.random.Generator) -> None:
    model, weights = matmul_nbits(generator, 4, 32, 256, zeros=False)
    segment = SegmentGraph(model, ())
    x = generator.standard_normal((4, 256)).astype(np.float32)
    x[1] = 0
    bias = numpy_helper.to_array(model.graph.initializer[2])
    observed = {"y": (by_groups(x, 128) @ weights + bias).astype(np.float32)}
    noises = (bf16.NOISE, fp16.NOISE, tf32.NOISE, int8_dynamic.NOISE)
    found = explain(segment, {"x": x}, observed, noises)
    assert (found.noise, found.variant) == (ID, "in groups of 128")
    assert found.explained > 0.999


def test_what_is_quantised_in_the_model_is_quantised_once_more(
    generator: np.random.Generator,
) -> None:
    """OpenVINO, where the weights of a Gemm are unsigned; half of an even step is no tie there."""
    grid = {"s": np.float32(0.02), "z": np.uint8(125)}
    weights = grid | {"w": generator.integers(0, 255, (8, 64)).astype(np.uint8)}
    segment = make_segment(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
        "v = DequantizeLinear(w, s, z) y = Gemm <transB = 1> (d, v)",
        weights,
    )
    x = (grid["s"] * generator.integers(-125, 130, (16, 64))).astype(np.float32)
    x[:, ::32] = grid["s"] * np.float32(130)
    real = (weights["w"].astype(np.float32) - 125) * grid["s"]
    observed = {"y": (by_groups(x, 32) @ real.T).astype(np.float32)}
    noises = (bf16.NOISE, int8_dynamic.NOISE)
    found = explain(segment, {"x": x}, observed, noises, thorough=False)
    assert (found.noise, found.variant) == (ID, "in groups of 32")
    assert found.explained > 0.999


def test_a_convolution_of_single_pixels_is_such_a_product(generator: np.random.Generator) -> None:
    """As OpenVINO computes it; 80 channels end in a group of 16."""
    grid = {"s": np.float32(0.02), "z": np.int8(3)}
    weights = grid | {"w": generator.integers(-127, 128, (8, 80, 1, 1)).astype(np.int8)}
    segment = make_segment("v = DequantizeLinear(w, s, z) y = Conv(x, v)", weights)
    x = generator.standard_normal((1, 80, 3, 5)).astype(np.float32)
    pixels = x[0].reshape(80, 15).T
    read = np.hstack([by_groups(pixels[:, :64], 32), by_groups(pixels[:, 64:], 16)])
    real = (weights["w"].astype(np.float32) - 3)[:, :, 0, 0] * grid["s"]
    observed = {"y": (read @ real.T).T.reshape(1, 8, 3, 5).astype(np.float32)}
    found = explain(segment, {"x": x}, observed, (int8_dynamic.NOISE,), thorough=False)
    assert (found.noise, found.variant) == (ID, "in groups of 32")
    assert found.explained > 0.999


@pytest.mark.parametrize("changed", [{"strides": [2, 2]}, {"pads": [1] * 4}, {"group": 2}, {}])
def test_other_convolutions_are_none(
    changed: dict[str, Any], generator: np.random.Generator
) -> None:
    size = 1 if changed else 3
    inner = 8 // changed.get("group", 1)
    weights = {
        "s": np.float32(0.02),
        "w": generator.integers(-127, 128, (8, inner, size, size)).astype(np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"]),
        helper.make_node("Conv", ["x", "v"], ["y"], **changed),
    ]
    segment = make_segment(nodes, weights, ["x"], ["y"])
    assert list(int8_dynamic.NOISE.variants(segment)) == []


def test_products_of_plain_weights_are_not_touched(generator: np.random.Generator) -> None:
    weights = {"w": generator.standard_normal((64, 8)).astype(np.float32)}
    segment = make_segment("y = MatMul(x, w)", weights)
    assert list(int8_dynamic.NOISE.variants(segment)) == []
    assert blockwise.written_out(segment) is segment


def compressed(path: Path, generator: np.random.Generator) -> None:
    """Two products of weights in 4 bits, a scale for each 32 of them, as quantisers write them."""
    nodes, constants, last = [], [], "x"
    for index in range(2):
        values = generator.integers(-8, 8, (128, 128)).astype(ml_dtypes.int4)
        scales = generator.uniform(0.005, 0.02, (4, 128)).astype(np.float32)
        constants += [
            numpy_helper.from_array(v, f"{n}{index}") for n, v in (("w", values), ("s", scales))
        ]
        given, made = [f"w{index}", f"s{index}"], [f"real{index}"]
        nodes.append(helper.make_node("DequantizeLinear", given, made, axis=0, block_size=32))
        last = f"y{index}"
        nodes.append(helper.make_node("MatMul", [f"x{index}" if index else "x", *made], [last]))
        if not index:
            nodes.append(helper.make_node("Tanh", [last], ["x1"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 128])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [8, 128])],
        constants,
    )
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def audited(folder: Path, id: str, **more: Any) -> AuditReport:
    options = AuditOptions(backends=(BackendSpec(id),), pictures=False, **more)
    return audit(folder / "m.onnx", options, noises=discovery.noises(), progress=Silent())


@pytest.mark.parametrize("id", ["ort", "ov"])
def test_an_engine_that_quantises_what_compressed_weights_read(
    id: str, tmp_path: Path, generator: np.random.Generator
) -> None:
    if not discovery.backend(id).availability().available:
        pytest.skip(f"{id} is not installed")
    compressed(tmp_path / "m.onnx", generator)
    options = {"ov": {"INFERENCE_PRECISION_HINT": "f32"}}
    report = audited(tmp_path, id, options=options if id == "ov" else {})
    if id == "ov" and not report.findings:
        pytest.skip("OpenVINO quantises nothing on this processor: it lacks VNNI")
    assert [f.noise for f in report.findings] == [ID, ID]
    assert [c.conclusion for c in report.backends[0].counterfactuals] == ["confirmed"]


def test_a_model_that_allows_8_bits_is_not_the_reference(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    model, _ = matmul_nbits(generator, 4, 32, 128, zeros=False, level=4)
    onnx.save(model, tmp_path / "m.onnx")
    report = audited(tmp_path, "ort", confirm=False)
    assert [f.noise for f in report.findings] == [ID]
    assert report.model.parameters == 6 * (128 + 4 + 1)  # weights, scales, bias


def test_integers_that_an_engine_holds_as_floats_are_compared(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    """OpenVINO multiplies integers in float32, and nothing of that is lost."""
    if not discovery.backend("ov").availability().available:
        pytest.skip("ov is not installed")
    weights = {
        "w": generator.integers(-127, 128, (16, 8)).astype(np.int8),
        "ws": np.float32(0.01),
        "wz": np.int8(0),
    }
    nodes = nodes_of(
        "q, s, z = DynamicQuantizeLinear(x) sums = MatMulInteger(q, w, z, wz) "
        "real = Cast <to = 1> (sums) scale = Mul(s, ws) y = Mul(real, scale)"
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
    report = audited(tmp_path, "ov", options={"ov": {"INFERENCE_PRECISION_HINT": "f32"}})
    assert not report.gaps and not report.findings
    (whole,) = (s for s in report.backends[0].segments if "sums" in s.outputs)
    assert whole.accumulated == 0


def own_bfloat16(values: Array) -> Array:
    """``ov::bfloat16``: half of the last bit is added only where that bit is odd."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + ((bits & 0x10000) >> 1)) & 0xFFFF0000
    return np.asarray(rounded.astype(np.uint32).view(np.float32))


def test_sums_of_integers_as_openvino_narrows_them() -> None:
    segment = make_segment("y = Cast <to = 1> (x)", kind=TensorProto.INT32)
    model = dynamic.in_bfloat16(segment)
    x = np.arange(-70_000, 70_000, 3, np.int32)
    assert np.array_equal(run(model, {"x": x})["y"], own_bfloat16(x))
