"""ONNX Runtime's QLinear operators whose results are cut off, by numpy and by OpenVINO itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from auditor.ports import Array, Arrays, SegmentGraph
from auditor.replays import qlinear
from tests.segments import diagnose

SCALES = {"a": 0.031, "b": 0.047, "c": 0.05}
ZEROS = {np.uint8: {"a": 117, "b": 130, "c": 121}, np.int8: {"a": -5, "b": 3, "c": 2}}
BOTH = ["a", "as", "az", "b", "bs", "bz", "cs", "cz"]
ONE = ["a", "as", "az", "cs", "cz"]
INPUTS = {
    "QLinearAdd": BOTH,
    "QLinearMul": BOTH,
    "QLinearConcat": ["cs", "cz", *BOTH[:6]],
}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "QLinearAveragePool": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "QLinearConcat": {"axis": 1},
    "QLinearLeakyRelu": {"alpha": 0.1},
    "QLinearSoftmax": {"axis": 3, "opset": 13},
}


def segment(op_type: str, kind: type) -> SegmentGraph:
    """One operator from a [1, 4, 8, 8], and b, to y."""
    read = INPUTS.get(op_type, ONE)
    node = helper.make_node(
        op_type, read, ["y"], "node", domain="com.microsoft", **ATTRIBUTES.get(op_type, {})
    )
    constants = {f"{n}s": np.float32(s).reshape(()) for n, s in SCALES.items()}
    constants |= {f"{n}z": np.array(z, kind) for n, z in ZEROS[kind].items()}
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [node],
        "s0",
        [helper.make_tensor_value_info(n, element, [1, 4, 8, 8]) for n in "ab" if n in read],
        [helper.make_tensor_value_info("y", element, None)],
        [numpy_helper.from_array(v, n) for n, v in constants.items() if n in read],
    )
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    return SegmentGraph(helper.make_model(graph, opset_imports=imports, ir_version=8), ())


def quantised(kind: type, generator: np.random.Generator, spread: float) -> Arrays:
    limits, zeros = np.iinfo(kind), ZEROS[kind]
    wide = {n: generator.standard_normal((1, 4, 8, 8)) * spread / SCALES[n] for n in "ab"}
    return {
        n: np.clip(np.rint(v) + zeros[n], limits.min, limits.max).astype(kind)
        for n, v in wide.items()
    }


def real(kind: type, **tensors: Array) -> Arrays:
    return {n: (v.astype(float) - ZEROS[kind][n]) * SCALES[n] for n, v in tensors.items()}


def planted(op_type: str, kind: type, inputs: Arrays) -> Array:
    zero = ZEROS[kind]["c"]
    if op_type == "QLinearAdd":
        both = real(kind, **inputs)
        steps = np.trunc((both["a"] + both["b"]) / SCALES["c"] + zero)
        return steps.astype(np.int64).astype(kind)  # numpy wraps around here
    a = inputs["a"]
    if op_type == "QLinearAveragePool":
        a = np.rint(a.reshape(1, 4, 4, 2, 4, 2).mean((3, 5)))
    value = real(kind, a=a)["a"]
    if op_type == "QLinearLeakyRelu":
        value = np.where(value < 0, 0.1 * value, value)
    steps = np.trunc(value / SCALES["c"]).astype(np.int64).astype(kind)
    limits = np.iinfo(kind)
    return np.clip(steps.astype(int) + zero, limits.min, limits.max).astype(kind)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearLeakyRelu", "QLinearAveragePool"])
def test_results_that_are_cut_off(generator: np.random.Generator, op_type: str, kind: type) -> None:
    """With values beyond 8 bits, and zero points that are added before that or after."""
    made = segment(op_type, kind)
    inputs = quantised(kind, generator, 4.0)
    inputs = {n: v for n, v in inputs.items() if n in INPUTS.get(op_type, ONE)}
    found = diagnose(made, inputs, {"y": planted(op_type, kind, inputs)})
    assert (found.noise, found.variant) == (
        "precision.int8_requantisation",
        "results of QLinear operators are cut off to 8 bits and wrap around",
    )
    assert found.bit_identical > 0.97


@pytest.mark.parametrize("op_type", [*INPUTS, "QLinearSigmoid", "QLinearSoftmax"])
def test_openvino_cuts_off(generator: np.random.Generator, op_type: str) -> None:
    ov = pytest.importorskip("openvino", reason="needs the [ov] extra")
    made = segment(op_type, np.uint8)
    inputs = quantised(np.uint8, generator, 0.5)
    inputs = {n: v for n, v in inputs.items() if n in INPUTS.get(op_type, ONE)}
    core, options = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    program = core.compile_model(core.read_model(made.model.SerializeToString()), "CPU", options)
    found = diagnose(made, inputs, {"y": program(inputs)[0]})
    assert found.noise == "precision.int8_requantisation"
    assert found.bit_identical > 0.97


def test_what_is_not_known_is_left_alone() -> None:
    """Softmax as before operator set 13, channels last, and operators of other names."""
    for op_type, attributes in (
        ("QLinearSoftmax", {"opset": 12}),
        ("QLinearAveragePool", {"channels_last": 1}),
        ("QLinearWhere", {}),
    ):
        model = onnx.ModelProto()
        model.CopyFrom(segment("QLinearSigmoid", np.uint8).model)
        model.graph.node[0].op_type = op_type
        model.graph.node[0].attribute.extend(
            helper.make_attribute(n, v) for n, v in attributes.items()
        )
        assert not qlinear.cut_off(model)
    assert qlinear.cut_off(segment("QLinearSigmoid", np.int8).model)
