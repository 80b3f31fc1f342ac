"""What nearly is a known function, computed as that function with numpy and by OpenVINO."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from auditor.ports import Array
from auditor.replays import sessions
from tests.segments import diagnose, make_segment

ID = "implementation.near_match"
F = np.float32


def node(op_type: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, names[:-1], names[-1:], **attributes)


NEARLY_GELU = [
    node("Pow", "x", "three", "p"),
    node("Mul", "p", "cubic", "q"),
    node("Add", "x", "q", "r"),
    node("Mul", "r", "root", "u"),
    node("Tanh", "u", "t"),
    node("Add", "t", "one", "v"),
    node("Mul", "x", "half", "h"),
    node("Mul", "h", "v", "y"),
]
CONSTANTS = {"three": 3.0, "cubic": 0.0447, "root": 0.8, "one": 1.0, "half": 0.5}
UNEVEN = [
    node("Slice", "x", "from", "parts", "axis", "a"),
    node("Slice", "x", "parts", "end", "axis", "b"),
    node("Neg", "b", "n"),
    node("Concat", "n", "a", "r", axis=-1),
    node("Mul", "x", "cos", "f"),
    node("Mul", "r", "sin", "g"),
    node("Add", "f", "g", "y"),
]
PARTS = {"from": 0, "parts": 5, "end": np.iinfo(np.int64).max, "axis": -1}


def rotated(x: Array, cos: Array, sin: Array, n: int) -> Array:
    """The first 2n elements rotated, and the rest as it was."""
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    both = x[..., : 2 * n] * cos[..., : 2 * n] + np.concatenate([-b, a], -1) * sin[..., : 2 * n]
    return np.concatenate([both, rest], -1)


def embedding(generator: np.random.Generator) -> dict[str, Array]:
    angle = generator.uniform(0.5, 2.5, (6, 16))
    given = {name: np.array([value]) for name, value in PARTS.items()}
    return given | {"cos": np.cos(angle).astype(F), "sin": np.sin(angle).astype(F)}


def test_constants_of_gelu() -> None:
    x = np.linspace(-4, 4, 60, dtype=F).reshape(6, 10)
    constants = {name: np.asarray(F(value)) for name, value in CONSTANTS.items()}
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)
    planted = (x / 2 * (1 + np.tanh(inner))).astype(F)
    found = diagnose(make_segment(NEARLY_GELU, constants, ["x"], ["y"]), {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.9999999


def test_other_constants_stay_unexplained() -> None:
    """They are near, but the backend computed with others than the known ones."""
    x = np.linspace(-4, 4, 60, dtype=F).reshape(6, 10)
    constants = {name: np.asarray(F(value)) for name, value in CONSTANTS.items()}
    inner = 0.81 * (x + 0.0447 * x.astype(np.float64) ** 3)
    planted = (x / 2 * (1 + np.tanh(inner))).astype(F)
    found = diagnose(make_segment(NEARLY_GELU, constants, ["x"], ["y"]), {"x": x}, {"y": planted})
    assert found.noise is None


def test_an_uneven_rotation(generator: np.random.Generator) -> None:
    x = generator.standard_normal((2, 6, 16)).astype(F)
    given = embedding(generator)
    segment = make_segment(UNEVEN, given, ["x"], ["y"])
    found = diagnose(segment, {"x": x}, {"y": rotated(x, given["cos"], given["sin"], 5)})
    assert found.noise == ID and found.bit_identical > 0.99


@pytest.mark.parametrize("nearly", ["gelu", "rotation"])
def test_openvino_takes_them(generator: np.random.Generator, nearly: str) -> None:
    """Behind a product, as in a network; what it computes is what the form says."""
    ov = pytest.importorskip("openvino", reason="needs the [ov] extra")
    constants: dict[str, Array] = {"w": generator.standard_normal((16, 16)).astype(F)}
    nodes = NEARLY_GELU if nearly == "gelu" else UNEVEN
    if nearly == "gelu":
        constants |= {name: np.asarray(F(value)) for name, value in CONSTANTS.items()}
    else:
        constants |= embedding(generator)
    whole = make_segment([node("MatMul", "z", "w", "x"), *nodes], constants, ["z"], ["x", "y"])
    z = generator.standard_normal((1, 6, 16)).astype(F)
    model = onnx.ModelProto()
    model.CopyFrom(whole.model)
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(helper.make_tensor_value_info(value.name, 1, [1, 6, 16]))
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    build = ov.Core().compile_model(ov.Core().read_model(model.SerializeToString()), "CPU", exact)
    seen = build({"z": z})
    x, y = (np.array(seen[name]) for name in ("x", "y"))
    del constants["w"]
    segment = make_segment(nodes, constants, ["x"], ["y"])
    plain = sessions.session(segment.model, 1).run(["y"], {"x": x})[0]
    assert np.abs(plain - y).max() > 1e-4, "OpenVINO no longer takes it for the function"
    found = diagnose(segment, {"x": x}, {"y": y})
    assert found.noise == ID and found.explained > 0.9999
