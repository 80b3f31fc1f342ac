"""Planted misread weights, built value by value; and what impulses showed of OpenVINO's."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from auditor.noises import misread_weights
from auditor.ports import Array
from auditor.records.backend import Kernel
from tests.segments import conv, diagnose, make_segment


def r(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def read(weights: Array, width: int) -> Array:
    """Each filter's weights as a kernel finds them in memory, which it walks without the gaps."""
    filters, channels, rows, columns = weights.shape
    memory: list[float] = []
    for first in range(0, filters, width):
        for tap in np.ndindex(rows, columns):
            for channel in range(32):
                for filter in range(first, first + width):
                    there = channel < channels and filter < filters
                    memory.append(float(weights[(filter, channel, *tap)]) if there else 0.0)
    found = np.zeros_like(weights)
    at = 0
    for first in range(0, filters, width):
        for tap in np.ndindex(rows, columns):
            for channel in range(channels):
                for filter in range(first, first + width):
                    if filter < filters:
                        found[(filter, channel, *tap)] = memory[at]
                    at += 1
    return found


def test_misread_weights_are_named_in_bfloat16_alone(generator: np.random.Generator) -> None:
    x = generator.standard_normal((1, 16, 6, 6)).astype(np.float32)
    w = generator.standard_normal((24, 16, 2, 4)).astype(np.float32)

    def found(precision: str, planted: Array) -> Any:
        stated = Kernel("c", "Convolution", ("y",), ("y",), "", precision, precision)
        segment = make_segment("y = Conv(x, w)", {"w": w}, kernels=[stated])
        return diagnose(segment, {"x": x}, {"y": planted})

    misread = found("bf16", r(conv(r(x), r(read(w, 16)))))
    assert misread.noise == misread_weights.NOISE.id
    assert misread.explained > 0.9999 and misread.bit_identical > 0.98
    assert found("f32", conv(x, read(w, 16))).noise is None


def test_filters_beyond_a_block_are_read_from_those_before(generator: np.random.Generator) -> None:
    w = generator.standard_normal((40, 24, 2, 4)).astype(np.float32)
    assert (misread_weights.misread(w, 32) == read(w, 32)).all()


def test_impulses_showed_the_same_of_openvino() -> None:
    """OpenVINO 2026.4.1 with AMX, an impulse at each tap: 8x8 kernel, 16 channels, stride 8."""
    taps = np.arange(1, 65, dtype=np.float32).reshape(1, 1, 8, 8)
    seen = np.zeros((8, 8))
    seen[:, ::2] = np.arange(1, 33).reshape(8, 4)
    made = misread_weights.misread(np.broadcast_to(taps, (16, 16, 8, 8)), 16)
    assert (made == seen).all()
