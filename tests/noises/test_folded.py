"""Constants of half-precision models, folded in half precision before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from auditor.noises import fp16
from auditor.ports import Array, Arrays, CompiledConstant, SegmentGraph
from auditor.replays import folded
from tests.segments import explain, make_segment, run


def half(values: Array) -> Array:
    return np.asarray(values).astype(np.float16).astype(np.float32)


def of_half(nodes: Any, constants: Arrays) -> SegmentGraph:
    """A segment of a float16 model."""
    return replace(make_segment(nodes, constants, ["x"], ["y"]), half=True)


def convolved(x: Array, weights: Array) -> Array:
    """A pointwise convolution in float64."""
    return np.einsum("nchw,oc->nohw", x.astype(float), weights[:, :, 0, 0].astype(float))


@pytest.fixture
def drawn(generator: np.random.Generator) -> Arrays:
    return {
        "x": generator.standard_normal((1, 12, 6, 6)).astype(np.float32),
        "w": half(generator.standard_normal((8, 12, 1, 1)) / 3),
        "b": half(generator.standard_normal(8)),
        "c": half(generator.uniform(0.3, 2, (1, 8, 1, 1))),
        "d": half(generator.standard_normal(1)),
    }


def test_a_factor_and_a_shift_behind_a_convolution(drawn: Arrays) -> None:
    segment = of_half(
        "p = Conv(x, w, b) q = Mul(p, c) y = Add(d, q)", {n: drawn[n] for n in "wbcd"}
    )
    factor = drawn["c"].reshape(8)
    bias = half(half(drawn["b"] * factor) + drawn["d"])
    planted = convolved(drawn["x"], half(drawn["w"] * drawn["c"].reshape(8, 1, 1, 1)))
    planted = (planted + bias.reshape(1, 8, 1, 1)).astype(np.float32)
    found = explain(segment, {"x": drawn["x"]}, {"y": planted})
    assert (found.noise, found.variant) == (fp16.NOISE.id, fp16.FOLDED)
    assert found.explained > 0.9999


@pytest.mark.parametrize(
    "reference",
    [
        "of half precision",
        "of half precision, with a bias",
        "of single precision",
        "of single precision, in nodes",
    ],
)
def test_each_step_of_a_batch_normalisation(
    reference: str, drawn: Arrays, generator: np.random.Generator
) -> None:
    """In a model of half precision, or in the file that is compared with one of single."""
    own = {
        "scale": generator.uniform(0.5, 2, 8).astype(np.float32),
        "shift": generator.standard_normal(8).astype(np.float32),
        "mean": generator.standard_normal(8).astype(np.float32),
        "variance": generator.uniform(0.2, 2, 8).astype(np.float32),
    }
    stored = {name: half(value) for name, value in own.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["p"]),
        helper.make_node("BatchNormalization", ["p", *stored], ["y"], epsilon=1e-3),
    ]
    before = [n for n in "b" if "bias" in reference]
    nodes[0].input.extend(before)
    constants = {"w": drawn["w"], **stored} | {n: drawn[n] for n in before}
    segment = of_half(nodes, constants)
    if "single" in reference:
        constants = {"w": drawn["w"], **own}
        if "nodes" in reference:
            values = ((n, numpy_helper.from_array(v)) for n, v in constants.items())
            written = [helper.make_node("Constant", [], [n], value=v) for n, v in values]
            nodes, constants = [*written, *nodes], {}
        segment = replace(
            make_segment(nodes, constants, ["x"], ["y"]),
            compiled={n: CompiledConstant(v, 1e-4, "float16", None) for n, v in stored.items()},
        )
    factor = half(stored["scale"] / half(np.sqrt(half(stored["variance"] + half(1e-3)))))
    bias = half(stored["shift"] - half(stored["mean"] * factor))
    if before:
        bias = half(half(half(drawn["b"] - stored["mean"]) * factor) + stored["shift"])
    planted = convolved(drawn["x"], half(drawn["w"] * factor.reshape(8, 1, 1, 1)))
    planted = (planted + bias.reshape(1, 8, 1, 1)).astype(np.float32)
    found = explain(segment, {"x": drawn["x"]}, {"y": planted})
    assert (found.noise, found.variant) == (fp16.NOISE.id, fp16.FOLDED)
    assert found.explained > 0.9999


def test_a_batch_normalisation_that_no_convolution_takes_in(generator: np.random.Generator) -> None:
    """As in a DenseNet: a factor and a shift, each step of half precision."""
    x = generator.standard_normal((2, 8, 3, 4)).astype(np.float32)
    scale, shift, mean = (half(generator.standard_normal(8)) for _ in range(3))
    variance = half(generator.uniform(0.2, 2, 8))
    segment = of_half(
        "r = Reshape(x, size) y = BatchNormalization(r, scale, shift, mean, variance)",
        {"scale": scale, "shift": shift, "mean": mean, "variance": variance}
        | {"size": np.array([2, 8, 3, 4])},
    )
    factor = half(scale / half(np.sqrt(half(variance + half(1e-5)))))
    offset = half(shift - half(mean * factor))
    planted = x.astype(float) * factor[:, None, None] + offset[:, None, None]
    found = explain(segment, {"x": x}, {"y": planted.astype(np.float32)})
    assert (found.noise, found.variant) == (fp16.NOISE.id, fp16.FOLDED)
    assert found.explained > 0.9999


def test_attributes_and_divisors() -> None:
    divisors = np.array([3, 5, 7, 9, 11, 13, 1.5, 6], np.float32)
    constants = {"d": divisors, "one": np.array([1])}  # a number of elements stays an integer
    segment = of_half(
        "h = HardSigmoid <alpha = 0.16666666666666666> (x) n = Shape(h) k = Div(n, one) "
        "z = Reshape(h, k) y = Div(z, d)",
        constants,
    )
    x = np.linspace(-2, 2, 8, dtype=np.float32)
    gate = x.astype(float) * half(np.float32(1 / 6)) + 0.5
    plain, inverted = (folded.in_half(segment, divisors=d) for d in (False, True))
    assert plain is not None and inverted is not None
    assert np.allclose(run(plain.model, {"x": x})["y"], gate / divisors, rtol=1e-6)
    assert np.allclose(run(inverted.model, {"x": x})["y"], gate * half(1 / divisors), rtol=1e-6)


def test_an_attribute_tells_nothing_of_the_models_precision() -> None:
    """A layer without constants belongs to a float16 model all the same."""
    segment = of_half("y = HardSigmoid(x)", {})
    x = np.linspace(-2, 2, 40, dtype=np.float32)
    planted = np.clip(x.astype(float) * half(np.float32(0.2)) + 0.5, 0, 1).astype(np.float32)
    assert explain(segment, {"x": x}, {"y": planted}).variant == fp16.FOLDED


def test_models_of_single_precision_are_left_alone() -> None:
    weights = half(np.linspace(-1, 1, 96)).reshape(8, 12, 1, 1)
    assert folded.in_half(make_segment("p = Conv(x, w) y = LeakyRelu(p)", {"w": weights})) is None
