"""What is no known noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from benchmarks.plants.faults.site import (
    PRODUCTS,
    Site,
    UnsuitableError,
    deviation,
    plant,
    with_weights,
)
from benchmarks.plants.network import Rewrite


def _on_grid(site: Site, rewrite: Rewrite) -> tuple[str, float, int, Any]:
    """The input over its scale, the scale, the zero point, and the integer type."""
    scale, zero = site.constant(1), site.constant(2)
    if scale.size != 1:
        raise UnsuitableError("per axis")
    quotient = rewrite.add("Div", rewrite.inputs[0], rewrite.inputs[1])
    return quotient, float(scale), int(zero), zero.dtype


def _integers(rewrite: Rewrite, wide: str, dtype: Any) -> str:
    limits = np.iinfo(dtype)
    low = rewrite.add("Max", wide, float(limits.min))
    high = rewrite.add("Min", low, float(limits.max))
    kind = onnx.TensorProto.UINT8 if limits.min == 0 else onnx.TensorProto.INT8
    return rewrite.add("Cast", high, to=kind)


@plant("defect/weights scaled", *PRODUCTS, kind="defect")
def _scaled(site: Site) -> None:
    with_weights(site, site.weights() * site.weights().dtype.type(1.01))


@plant("defect/two channels swapped", *PRODUCTS, kind="defect")
def _swapped(site: Site) -> None:
    weights, axis = site.weights(), site.output_axis()
    if weights.shape[axis] < 2:
        raise UnsuitableError("one channel")
    order = np.arange(weights.shape[axis])
    a, b = site.random.choice(len(order), 2, replace=False)
    order[[a, b]] = order[[b, a]]
    with_weights(site, np.take(weights, order, axis=axis))


@plant("defect/wrong bias", "Conv", "Gemm", "ConvTranspose", kind="defect")
def _wrong_bias(site: Site) -> None:
    bias = site.constant(2).copy()
    at = int(site.random.integers(bias.size))
    bias.reshape(-1)[at] += bias.dtype.type(0.5 * deviation(site))
    rewrite = site.rewrite()
    rewrite.done(rewrite.again(*rewrite.inputs[:2], site.network.constant(bias)))


@plant("defect/a channel dropped", *PRODUCTS, kind="defect")
def _dropped(site: Site) -> None:
    weights, axis = site.weights().copy(), site.output_axis()
    if weights.shape[axis] < 2:
        raise UnsuitableError("one channel")
    at = [slice(None)] * weights.ndim
    at[axis] = slice(*(int(site.random.integers(weights.shape[axis])) + np.array([0, 1])))
    weights[tuple(at)] = 0
    with_weights(site, weights)


@plant("defect/taps turned", "Conv", "ConvTranspose", kind="defect")
def _turned(site: Site) -> None:
    weights = site.weights()
    if max(weights.shape[2:]) < 2:
        raise UnsuitableError("one tap")
    with_weights(site, np.ascontiguousarray(weights[..., ::-1, ::-1]))


@plant("defect/an activation scaled", "Relu", "Clip", "PRelu", "HardSigmoid", "Erf", kind="defect")
def _activation(site: Site) -> None:
    rewrite = site.rewrite()
    value = rewrite.again(*rewrite.inputs)
    factor = site.values[site.key].dtype.type(1.02)
    if site.values[site.key].dtype.kind != "f":
        raise UnsuitableError("not real numbers")
    rewrite.done(rewrite.add("Mul", value, np.asarray(factor)))


@plant("defect/a wrong limit", "Clip", kind="defect")
def _wrong_limit(site: Site) -> None:
    limit = site.constant(2)
    rewrite = site.rewrite()
    other = site.network.constant(np.asarray(limit * limit.dtype.type(0.9)))
    rewrite.done(rewrite.again(*rewrite.inputs[:2], other))


@plant("defect/rounded down", "QuantizeLinear", kind="defect")
def _floor(site: Site) -> None:
    rewrite = site.rewrite()
    quotient, _, zero, dtype = _on_grid(site, rewrite)
    whole = rewrite.add("Add", rewrite.add("Floor", quotient), float(zero))
    rewrite.done(_integers(rewrite, whole, dtype))


@plant("defect/another scale", "QuantizeLinear", kind="defect")
def _other_scale(site: Site) -> None:
    scale = site.constant(1)
    rewrite = site.rewrite()
    other = site.network.constant(np.asarray(scale * np.float32(1.02)))
    rewrite.done(rewrite.again(rewrite.inputs[0], other, *rewrite.inputs[2:]))
