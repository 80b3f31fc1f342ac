"""Normalisations computed otherwise, with numpy in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.noises import normalisation
from auditor.ports import Array
from tests.helpers import onnx_model
from tests.segments import diagnose, make_segment

ID = "implementation.normalisation"


def normalised(
    x: Array, axes: Any, epsilon: float, *, ddof: int = 0, outside: bool = False
) -> Array:
    wide = x.astype(np.float64)
    deviation = wide.std(axes, ddof=ddof, keepdims=True)
    root = deviation + epsilon if outside else np.sqrt(deviation**2 + epsilon)
    return np.asarray((wide - wide.mean(axes, keepdims=True)) / root)


KINDS = ["LayerNormalization", "InstanceNormalization", "GroupNormalization", "written out"]


def planted_and_segment(
    generator: np.random.Generator, kind: str, **how: Any
) -> tuple[Any, Array, Array]:
    x = generator.standard_normal((2, 6, 5, 4)).astype(np.float32)
    x *= np.exp(generator.standard_normal((2, 6, 5, 1)) - 4).astype(np.float32)
    epsilon = how.pop("epsilon", 1e-5)
    if kind == "LayerNormalization":
        n = normalised(x, -1, epsilon, **how)
        g, b = (generator.standard_normal(4).astype(np.float32) for _ in range(2))
        node = helper.make_node(kind, ["x", "g", "b"], ["y"], epsilon=1e-5)
        segment = make_segment([node], {"g": g, "b": b}, ["x"], ["y"])
        return segment, x, (n * g + b).astype(np.float32)
    if kind == "written out":
        constants = {"two": np.array(2, np.float32), "e": np.array(1e-5, np.float32)}
        segment = make_segment(
            "m = ReduceMean <axes = [-1]> (x) d = Sub(x, m) p = Pow(d, two) "
            "v = ReduceMean <axes = [-1]> (p) s = Add(v, e) r = Sqrt(s) y = Div(d, r)",
            constants,
        )
        return segment, x, normalised(x, -1, epsilon, **how).astype(np.float32)
    groups = 6 if kind == "InstanceNormalization" else 3
    n = normalised(x.reshape(2, groups, -1), -1, epsilon, **how).reshape(x.shape)
    g, b = (generator.standard_normal(6).astype(np.float32) for _ in range(2))
    given: Any = {} if groups == 6 else {"num_groups": 3}
    node = helper.make_node(kind, ["x", "g", "b"], ["y"], epsilon=1e-5, **given)
    segment = make_segment([node], {"g": g, "b": b}, ["x"], ["y"], opset=21)
    column = (slice(None), None, None)
    return segment, x, (n * g[column] + b[column]).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", [1e-3, 1e-6, 1e-12])
def test_another_epsilon(generator: np.random.Generator, kind: str, epsilon: float) -> None:
    segment, x, planted = planted_and_segment(generator, kind, epsilon=epsilon)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.99
    assert f"{epsilon:g}" in (found.variant or "")


def test_one_of_two_normalisations_has_another_epsilon(generator: np.random.Generator) -> None:
    nodes, constants = [], {}
    x = planted = generator.standard_normal((2, 8, 5, 5)).astype(np.float32)
    for index, (read, made, epsilon) in enumerate((("x", "h", 1e-3), ("h", "y", 1e-5))):
        names = [f"{letter}{index}" for letter in "gbmv"]
        nodes.append(helper.make_node("BatchNormalization", [read, *names], [made], epsilon=1e-3))
        values = [generator.uniform(0.01, 0.1, 8).astype(np.float32) for _ in names]
        constants |= dict(zip(names, values, strict=True))
        g, b, m, v = (value[:, None, None] for value in values)
        planted = (planted - m) / np.sqrt(v + epsilon) * g + b
    segment = make_segment(nodes, constants, ["x"], ["y"])
    found = diagnose(segment, {"x": x}, {"y": planted.astype(np.float32)})
    assert (found.noise, found.variant) == (ID, "epsilon 1e-05, at y alone")


@pytest.mark.parametrize("kind", KINDS)
def test_variance_divided_by_one_less(generator: np.random.Generator, kind: str) -> None:
    segment, x, planted = planted_and_segment(generator, kind, ddof=1)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and "n − 1" in (found.variant or "")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_epsilon_beside_the_root(generator: np.random.Generator, kind: str) -> None:
    segment, x, planted = planted_and_segment(generator, kind, outside=True)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.99


def test_moments_in_one_pass_lose_a_large_mean(generator: np.random.Generator) -> None:
    """Exact binary values, so that only E[x²] − E[x]² itself rounds."""
    x = (4096 + generator.integers(-8, 9, (16, 64)) / 8).astype(np.float32)
    constants = {"g": np.ones(16, np.float32), "b": np.zeros(16, np.float32)}
    segment = make_segment("y = InstanceNormalization(x, g, b)", constants)
    x = x.reshape(1, 16, 8, 8)
    wide = x.astype(np.float64)
    mean = wide.mean((2, 3), keepdims=True).astype(np.float32)
    second = np.square(x).mean((2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    variance = np.maximum(second - mean * mean, 0)
    planted = ((x - mean) / np.sqrt(variance + np.float32(1e-5))).astype(np.float32)
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and "E[x²]" in (found.variant or "")


@pytest.mark.parametrize("axes", [None, [2, 3], [-1, 1]])
def test_moments_in_one_pass_in_the_order_of_the_sums(
    generator: np.random.Generator, axes: list[int] | None
) -> None:
    """As TVM computes MeanVarianceNormalization, which has no bias to move what it normalises.

    Of E[x²] − E[x]² most digits cancel; those that are left depend on the order of the sums.
    """
    x = (30 + generator.standard_normal((2, 3, 16, 24))).astype(np.float32)
    given: Any = {} if axes is None else {"axes": axes}
    node = helper.make_node("MeanVarianceNormalization", ["x"], ["y"], **given)
    along = sorted(a % 4 for a in axes or (0, 2, 3))
    kept = [a for a in range(4) if a not in along]
    turned = x.transpose(*kept, *along)
    rows = turned.reshape(*turned.shape[: len(kept)], -1)

    def mean(values: Array) -> Array:
        running = np.cumsum(values, -1, dtype=np.float32)[..., -1:]
        return np.asarray(running / np.float32(values.shape[-1]))

    variance = mean(rows * rows) - mean(rows) ** 2
    planted = ((rows - mean(rows)) / np.sqrt(variance)).reshape(turned.shape)
    planted = planted.transpose(np.argsort([*kept, *along]))
    segment = make_segment([node], {}, ["x"], ["y"])
    known = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    segment.model.graph.input[0].CopyFrom(known)  # which axes are kept depends on their number
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.99
    assert found.variant.endswith("one value after another")


@pytest.mark.parametrize("how", ["statistics", "epsilon", "outside"])
def test_batch_normalisation(generator: np.random.Generator, how: str) -> None:
    x = generator.standard_normal((2, 5, 6, 6)).astype(np.float32) * np.float32(0.1)
    g, b, m = (generator.standard_normal(5).astype(np.float32) for _ in range(3))
    v = np.exp(generator.standard_normal(5) - 5).astype(np.float32)
    segment = make_segment(
        "y = BatchNormalization(x, g, b, m, v)", {"g": g, "b": b, "m": m, "v": v}
    )
    column = (slice(None), None, None)
    if how == "statistics":
        n = normalised(x, (0, 2, 3), 1e-5)
    elif how == "epsilon":
        n = (x.astype(np.float64) - m[column]) / np.sqrt(v[column] + 1e-3)
    else:
        n = (x.astype(np.float64) - m[column]) / (np.sqrt(v[column]) + 1e-5)
    found = diagnose(segment, {"x": x}, {"y": (n * g[column] + b[column]).astype(np.float32)})
    assert found.noise == ID and found.explained > 0.99


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("version", [11, 18])
def test_openvino_adds_to_the_length_of_a_vector(
    generator: np.random.Generator, p: int, version: int
) -> None:
    """As its importer writes it: nothing else, such as a narrow format, may be the cause."""
    openvino = pytest.importorskip("openvino", reason="needs the [ov] extra")
    size = (10.0 ** generator.uniform(-4, 0, (6, 1, 5))).astype(np.float32)
    x = size * generator.standard_normal((6, 3, 5)).astype(np.float32)
    node = f"y = LpNormalization <axis = 1, p = {p}> (x)"
    model = onnx_model(f"(float[6, 3, 5] x) => (float[6, 3, 5] y) {{ {node} }}", opset=version)
    core = openvino.Core()
    loaded = core.read_model(model.SerializeToString())
    compiled = core.compile_model(loaded, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    observed = next(iter(compiled({"x": x}).values()))
    length = np.linalg.norm(x.astype(np.float64), p, 1, keepdims=True)
    if np.allclose(observed, x / length, rtol=1e-5):
        pytest.skip("this OpenVINO adds nothing to it")
    segment = make_segment(node, opset=version)
    found = diagnose(segment, {"x": x}, {"y": observed})
    assert (found.noise, found.variant) == (ID, "epsilon 1.19209e-07 in the length")
    assert found.explained > 0.9999


def test_scaled_or_swapped_parameters_are_unexplained(generator: np.random.Generator) -> None:
    segment, x, planted = planted_and_segment(generator, "LayerNormalization")
    assert diagnose(segment, {"x": x}, {"y": planted * np.float32(1.01)}).noise is None
    assert diagnose(segment, {"x": x}, {"y": planted + np.float32(0.1)}).noise is None
    assert diagnose(segment, {"x": x}, {"y": planted[..., [1, 0, 2, 3]]}).noise is None
    # Nearly what n / (n − 1) does to four elements, and yet another factor.
    (bias,) = (numpy_helper.to_array(t) for t in segment.model.graph.initializer if t.name == "b")
    scaled = (planted - bias) * np.float32(0.87) + bias
    assert diagnose(segment, {"x": x}, {"y": scaled}).noise is None


def test_segments_without_normalisation_are_not_touched() -> None:
    segment = make_segment("y = Add(x, c)", {"c": np.array(1e-5, np.float32)})
    assert list(normalisation.NOISE.variants(segment)) == []
    assert "epsilon" in normalisation.NOISE.remedy("ov")
