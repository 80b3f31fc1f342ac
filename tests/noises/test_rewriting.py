"""Arithmetic that an optimiser rewrote, worked out with numpy in the rewritten order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from auditor.ports import Array
from tests.segments import conv, diagnose, make_segment

ID = "implementation.rewriting"
F = np.float32


def node(op_type: str, *names: str, **attributes: Any) -> Any:
    return helper.make_node(op_type, names[:-1], names[-1:], **attributes)


SUM = [node("Add", "x", "a", "s"), node("Sub", "s", "a", "y")]
PRODUCT = [node("Mul", "x", "a", "s"), node("Mul", "s", "small", "y")]
INVERSE = [node("Div", "one", "x", "s"), node("Mul", "s", "a", "y")]
NEGATION = [
    node("Greater", "x", "a", "g"),
    node("Not", "g", "n"),
    helper.make_node("Cast", ["n"], ["y"], to=1),
]
SOFTPLUS = [node("Exp", "x", "e"), node("Add", "e", "one", "s"), node("Log", "s", "y")]


@pytest.mark.parametrize(
    ("nodes", "x", "a", "planted"),
    [
        (SUM, [0.1, -2.7, 5.3], F(1e8), [0.1, -2.7, 5.3]),
        (PRODUCT, [4.1, -2.3, 0.7], F(1e38), [4.1e18, -2.3e18, 0.7e18]),
        ([node("Mul", "x", "a", "y")], [np.inf, 3.0, np.nan], F(0), [0.0, 0.0, 0.0]),
        ([node("Sub", "x", "x", "y")], [np.inf, 3.0, np.nan], F(0), [0.0, 0.0, 0.0]),
        ([node("Div", "x", "x", "y")], [0.0, 3.0, np.nan], F(0), [1.0, 1.0, 1.0]),
        ([node("Exp", "x", "e"), node("Log", "e", "y")], [150, -120, 2], F(0), [150, -120, 2]),
        (SOFTPLUS, [150.0, 89.0, -1.0], F(0), [150.0, 89.0, np.log1p(np.exp(-1.0))]),
        (NEGATION, [np.nan, 3.0, -1.0], F(1), [0.0, 0.0, 1.0]),
        (INVERSE, [4, 7, -9], np.int32(20), [5, 2, -2]),
    ],
    ids=(
        "sum",
        "product",
        "zero",
        "difference",
        "quotient",
        "log",
        "softplus",
        "not",
        "inverse",
    ),
)
def test_arithmetic(nodes: Any, x: Any, a: Any, planted: Any) -> None:
    kind = np.asarray(a).dtype
    constants = {"a": np.asarray(a), "one": np.ones((), kind)}
    constants["small"] = np.asarray(1e-20).astype(kind)
    used = {name for n in nodes for name in n.input}
    constants = {name: value for name, value in constants.items() if name in used}
    segment = make_segment(nodes, constants, ["x"], ["y"], kind=1 if kind == F else 6)
    found = diagnose(segment, {"x": np.array([x], kind)}, {"y": np.array([planted], kind)})
    assert found.noise == ID and found.explained > 0.999


def test_factors_in_weights(generator: np.random.Generator) -> None:
    """Where a result overflows, and weights that took the factors in do not."""
    x = generator.normal(size=(1, 3, 6, 6)).astype(F)
    w = generator.normal(size=(4, 3, 3, 3)).astype(F)
    up, down = F(1e38), np.full((4, 1, 1), 1e-20, F)
    nodes = [
        node("Conv", "x", "w", "c"),
        node("Mul", "c", "up", "u"),
        node("Mul", "u", "down", "y"),
    ]
    segment = make_segment(nodes, {"w": w, "up": up, "down": down}, ["x"], ["y"])
    planted: Array = conv(x, w * F(1e18))
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and found.explained > 0.999999


def test_a_batch_normalisation_without_variance(generator: np.random.Generator) -> None:
    """Infinite only behind the convolution; taken into its weights, inf - inf is no number."""
    x = generator.normal(size=(1, 2, 5, 5)).astype(F)
    constants = {
        "w": generator.normal(size=(3, 2, 3, 3)).astype(F),
        "s": np.ones(3, F),
        "b": np.zeros(3, F),
        "m": np.array([-100, 0.5, 1], F),
        "v": np.array([0, 0.25, 4], F),
    }
    nodes = [
        node("Conv", "x", "w", "c"),
        node("BatchNormalization", "c", "s", "b", "m", "v", "y", epsilon=0.0),
    ]
    segment = make_segment(nodes, constants, ["x"], ["y"])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    product = np.einsum("nchwij,ocij->nohw", windows.astype(np.float64), constants["w"])
    deviation = np.sqrt(constants["v"].astype(np.float64))[:, None, None]
    with np.errstate(all="ignore"):
        planted = (product - constants["m"][:, None, None]) / deviation
    planted[:, 0] = np.nan
    found = diagnose(segment, {"x": x}, {"y": planted.astype(F)})
    assert found.noise == ID and "taken into the layer" in (found.variant or "")


@pytest.mark.parametrize("to", [17, 19])
def test_casts_there_and_back(generator: np.random.Generator, to: int) -> None:
    segment = make_segment(f"n = Cast <to = {to}> (x) y = Cast <to = 1> (n)", opset=19)
    x = generator.normal(size=(1, 200)).astype(F)
    found = diagnose(segment, {"x": x}, {"y": x})
    assert (found.noise, found.bit_identical) == (ID, 1.0)


def test_a_chain_of_factors_and_shifts() -> None:
    """(10⁸ − x) · ½ − 5·10⁷ is 0 in float32, and −x / 2 by joined constants."""
    x = np.linspace(-3, 3, 24, dtype=F).reshape(4, 6)
    nodes = [
        node("Sub", "large", "x", "a"),
        node("Mul", "a", "half", "b"),
        node("Sub", "b", "shift", "y"),
    ]
    constants = {"large": F(1e8), "half": F(0.5), "shift": F(5e7)}
    constants = {name: np.asarray(value) for name, value in constants.items()}
    found = diagnose(make_segment(nodes, constants, ["x"], ["y"]), {"x": x}, {"y": x * F(-0.5)})
    assert found.noise == ID and found.bit_identical == 1.0
    assert "chains of constant" in (found.variant or "")


@pytest.mark.parametrize("division", [False, True])
def test_a_factor_behind_the_product(division: bool) -> None:
    """Scaled first, the operand is infinite and so is not a number in the product."""
    x = np.linspace(-3, 3, 24, dtype=F).reshape(4, 6) + F(0.1)
    w = np.linspace(1, -1.5, 18, dtype=F).reshape(6, 3)
    scale = [node("Div", "x", "c", "s")] if division else [node("Mul", "x", "c", "s")]
    c = np.asarray(F(1e-38) if division else F(1e38)) * F(0.5 if division else 2)
    segment = make_segment([*scale, node("MatMul", "s", "w", "y")], {"w": w, "c": c}, ["x"], ["y"])
    with np.errstate(over="ignore"):
        planted = (x @ w) * (1 / c if division else c)
    found = diagnose(segment, {"x": x}, {"y": planted.astype(F)})
    assert found.noise == ID and "taken out of the product" in (found.variant or "")


def test_exponentials_over_their_sum() -> None:
    """As written they are infinite from 88.7 on; a softmax is not."""
    x = np.linspace(-150, 150, 24, dtype=F).reshape(4, 6)[:, ::-1].copy()
    nodes = [
        node("Exp", "x", "e"),
        node("ReduceSum", "e", "axes", "s", keepdims=1),
        node("Div", "e", "s", "y"),
    ]
    shifted = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    planted = (shifted / shifted.sum(1, keepdims=True)).astype(F)
    segment = make_segment(nodes, {"axes": np.array([-1])}, ["x"], ["y"])
    found = diagnose(segment, {"x": x}, {"y": planted})
    assert found.noise == ID and "softmax" in (found.variant or "")
