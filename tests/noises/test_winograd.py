"""Winograd convolutions planted tile by tile in double precision, from interpolation points."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from auditor.noises import winograd
from auditor.ports import Array
from auditor.records.backend import Kernel
from tests.segments import conv, diagnose, make_segment

ID = "implementation.winograd"
POINTS = {2: [0, 1, -1], 4: [0, 1, -1, 2, -2]}
HALF = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def narrow(values: Array, kind: str) -> Array:
    return values.astype(np.float32).astype(HALF[kind]).astype(np.float64)


def toom_cook(size: int) -> tuple[Array, Array, Array]:
    """Bᵀ, G and Aᵀ from evaluation points and infinity (Toom-Cook)."""
    points = [float(p) for p in POINTS[size]]
    tile = size + 2
    scale = [np.prod([p - q for q in points if q != p]) for p in points]
    g = [[p**k / n for k in range(3)] for p, n in zip(points, scale, strict=True)] + [[0, 0, 1]]
    a = [[p**k for p in points] + [float(k == size - 1)] for k in range(size)]
    b = [[*np.poly([q for q in points if q != p])[::-1].tolist(), 0] for p in points]
    b.append(np.poly(points)[::-1].tolist())
    assert len(b[0]) == tile
    return np.array(b), np.array(g), np.array(a)


def planted(x: Array, w: Array, pads: tuple[int, int, int, int], size: int, kind: str) -> Array:
    bt, g, at = toom_cook(size)
    top, left, bottom, right = pads
    x, w = narrow(x, kind), narrow(w, kind)
    height, width = x.shape[2] + top + bottom - 2, x.shape[3] + left + right - 2
    edge = ((0, 0), (0, 0), (top, bottom + size), (left, right + size))
    x = np.pad(x, edge)
    u = narrow(np.einsum("ia,ocab,jb->ocij", g, w, g), kind)
    y = np.zeros((len(x), len(w), height + size, width + size))
    for i in range(0, height, size):
        for j in range(0, width, size):
            d = x[:, :, i : i + size + 2, j : j + size + 2]
            v = narrow(np.einsum("ia,ncab,jb->ncij", bt, d, bt), kind)
            m = np.einsum("ocij,ncij->noij", u, v)
            y[:, :, i : i + size, j : j + size] = np.einsum("ai,noij,bj->noab", at, m, at)
    return y[:, :, :height, :width]


def segment_of(w: Array, b: Array, pads: tuple[int, ...], **given: Any) -> Any:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=list(pads))
    return make_segment([node], {"w": w, "b": b}, ["x"], ["y"], **given)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 2, 1, 0)])
def test_every_algorithm(
    generator: np.random.Generator, size: int, kind: str, pads: tuple[int, int, int, int]
) -> None:
    x = generator.standard_normal((2, 5, 11, 10)).astype(np.float32)
    w = generator.standard_normal((7, 5, 3, 3)).astype(np.float32)
    b = generator.standard_normal(7).astype(np.float32)
    segment = segment_of(w, b, pads)
    y = planted(x, w, pads, size, kind) + b[:, None, None]
    found = diagnose(segment, {"x": x}, {"y": y.astype(np.float32)})
    assert found.noise == ID and found.explained > 0.999
    assert found.variant.startswith(f"F({size}x{size}, 3x3)") and kind in found.variant


def test_float16_tensors(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 8, 12, 12)).astype(np.float16)
    w = generator.standard_normal((6, 8, 3, 3)).astype(np.float16)
    b = np.zeros(6, np.float16)
    segment = segment_of(w, b, (1, 1, 1, 1), kind=TensorProto.FLOAT16)
    y = planted(x, w, (1, 1, 1, 1), 4, "fp16").astype(np.float16)
    found = diagnose(segment, {"x": x}, {"y": y})
    assert found.noise == ID and found.explained > 0.99 and "F(4x4" in found.variant


def test_results_are_rounded_where_the_engine_says_so(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 5, 9, 9)).astype(np.float32)
    w = generator.standard_normal((7, 5, 3, 3)).astype(np.float32)
    said = (Kernel("k", "Convolution", ("y",), ("y",), "winograd", "bf16", "bf16"),)
    segment = segment_of(w, np.zeros(7, np.float32), (1, 1, 1, 1), kernels=said)
    y = narrow(planted(x, w, (1, 1, 1, 1), 2, "bf16"), "bf16").astype(np.float32)
    found = diagnose(segment, {"x": x}, {"y": y})
    assert found.noise == ID and found.explained > 0.99 and found.bit_identical > 0.9


@pytest.mark.parametrize("what", ["direct", "swapped", "scaled"])
def test_look_alikes_are_not_named(generator: np.random.Generator, what: str) -> None:
    x = generator.standard_normal((1, 6, 9, 9)).astype(np.float32)
    w = generator.standard_normal((5, 6, 3, 3)).astype(np.float32)
    segment = segment_of(w, np.zeros(5, np.float32), (0, 0, 0, 0))
    if what == "direct":
        half = (narrow(v, "fp16").astype(np.float32) for v in (x, w))
        assert diagnose(segment, {"x": x}, {"y": conv(*half)}).noise != ID
        return
    changed = w * np.float32(1.001) if what == "scaled" else w[:, [1, 0, 2, 3, 4, 5]]
    assert diagnose(segment, {"x": x}, {"y": conv(x, changed)}).noise is None


def test_where_it_does_not_apply(generator: np.random.Generator) -> None:
    w = generator.standard_normal((4, 4, 3, 3)).astype(np.float32)
    for given in ({"strides": [2, 2]}, {"dilations": [2, 2]}, {"group": 4}):
        weights = w[:, :1] if "group" in given else w
        node = helper.make_node("Conv", ["x", "w"], ["y"], **given)
        segment = make_segment([node], {"w": weights}, ["x"], ["y"])
        assert list(winograd.NOISE.variants(segment)) == []
    stated = (Kernel("k", "Convolution", ("y",), ("y",), "jit", "f32", "f32"),)
    segment = segment_of(w, np.zeros(4, np.float32), (0, 0, 0, 0), kernels=stated)
    assert list(winograd.NOISE.variants(segment)) == []
