"""Operands and weights in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from benchmarks.plants.faults.site import (
    PRODUCTS,
    Site,
    UnsuitableError,
    as_type,
    hidden,
    plant,
    rounded,
    with_weights,
)
from benchmarks.plants.network import Array, Rewrite

_FORMATS = {
    "bf16": (torch.bfloat16, 8, ("precision.bf16",)),
    "fp16": (torch.float16, 11, ("precision.fp16", "precision.tf32")),
}


def _precision(name: str) -> None:
    dtype, bits, expected = _FORMATS[name]

    @plant(f"{name}/weights", *PRODUCTS, expected=expected)
    def weights(site: Site) -> None:
        with_weights(site, as_type(site.weights(), dtype))

    @plant(f"{name}/operands", *PRODUCTS, expected=expected)
    def operands(site: Site) -> None:
        rewrite = site.rewrite()
        narrow = hidden(site, rewrite, as_type(site.weights(), dtype))
        x = _operand(site, rewrite, bits)
        rewrite.done(rewrite.again(x, narrow, *rewrite.inputs[2:]))

    @plant(f"{name}/operands and result", *PRODUCTS, expected=expected[:1])
    def all_of_it(site: Site) -> None:
        rewrite = site.rewrite()
        narrow = hidden(site, rewrite, as_type(site.weights(), dtype))
        x = _operand(site, rewrite, bits)
        wide = rewrite.again(x, narrow, *rewrite.inputs[2:])
        rewrite.done(rounded(rewrite, wide, bits))


def _operand(site: Site, rewrite: Rewrite, bits: int) -> str:
    if site.values[rewrite.inputs[0]].dtype != np.float32:
        raise UnsuitableError("not float32")
    return rounded(rewrite, rewrite.inputs[0], bits)


for _name in _FORMATS:
    _precision(_name)


@plant("tf32/operands", *PRODUCTS, expected=("precision.tf32", "precision.fp16"))
def _tf32(site: Site) -> None:
    weights = site.weights()
    if weights.dtype != np.float32:
        raise UnsuitableError("not float32")
    # As NVIDIA's cvt.rna does: ten bits of fraction, ties away from zero.
    bits = (weights.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    rewrite = site.rewrite()
    name = hidden(site, rewrite, bits.view(np.float32))
    x = _operand(site, rewrite, 11)
    rewrite.done(rewrite.again(x, name, *rewrite.inputs[2:]))


def _fake_quantised(weights: Array, axis: int | None, percentile: float) -> Array:
    """Weights on 255 steps, the range being a percentile of their magnitudes."""
    wide = torch.tensor(weights.astype(np.float32))
    if axis is None:
        limit = float(np.percentile(np.abs(weights), percentile))
        return np.asarray(
            torch.fake_quantize_per_tensor_affine(wide, max(limit, 1e-9) / 127, 0, -127, 127)
        )
    rest = tuple(i for i in range(weights.ndim) if i != axis)
    limits = np.percentile(np.abs(weights.astype(np.float64)), percentile, axis=rest)
    scales = torch.from_numpy(np.maximum(limits, 1e-9).astype(np.float32) / np.float32(127))
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return np.asarray(torch.fake_quantize_per_channel_affine(wide, scales, zeros, axis, -127, 127))


@plant("int8/weights per channel, largest", *PRODUCTS, expected=("precision.int8",))
def _int8_channels(site: Site) -> None:
    with_weights(site, _fake_quantised(site.weights(), site.output_axis(), 100))


@plant("int8/weights per tensor, largest", *PRODUCTS, expected=("precision.int8",))
def _int8_tensor(site: Site) -> None:
    with_weights(site, _fake_quantised(site.weights(), None, 100))


@plant("int8/weights per channel, percentile", *PRODUCTS, expected=("precision.int8",))
def _int8_channels_clipped(site: Site) -> None:
    with_weights(site, _fake_quantised(site.weights(), site.output_axis(), 99.9))


@plant("int8/weights per tensor, percentile", *PRODUCTS, expected=("precision.int8",))
def _int8_tensor_clipped(site: Site) -> None:
    with_weights(site, _fake_quantised(site.weights(), None, 99.9))


def _quantised_operand(site: Site, rewrite: Rewrite, low: float, high: float) -> str:
    """QuantizeLinear and DequantizeLinear with the range of a calibration.

    The scale is a sum that engines fold, so that it stands nowhere in the changed file either.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
    half, zero_name = (site.network.constant(np.asarray(v)) for v in (scale / 2, zero))
    scale_name = rewrite.add("Add", half, half)
    narrow = rewrite.add("QuantizeLinear", rewrite.inputs[0], scale_name, zero_name)
    return rewrite.add("DequantizeLinear", narrow, scale_name, zero_name)


def _int8_operands(site: Site, percentile: float, values: Mapping[str, Array]) -> None:
    weights = _fake_quantised(site.weights(), site.output_axis(), 100)
    rewrite = site.rewrite()
    x = values[rewrite.inputs[0]]
    if x.dtype != np.float32 or not np.ptp(x) > 0:
        raise UnsuitableError("not float32")
    low, high = (float(v) for v in np.percentile(x, [100 - percentile, percentile]))
    if not high > low:
        raise UnsuitableError("no range")
    name = hidden(site, rewrite, weights)
    operand = _quantised_operand(site, rewrite, low, high)
    rewrite.done(rewrite.again(operand, name, *rewrite.inputs[2:]))


@plant("int8/operands, this input's range", *PRODUCTS, expected=("precision.int8",))
def _int8_dynamic(site: Site) -> None:
    _int8_operands(site, 100, site.values)


@plant("int8/operands, percentile of another input", *PRODUCTS, expected=("precision.int8",))
def _int8_static(site: Site) -> None:
    _int8_operands(site, 99.99, site.others)


_REQUANTISED = ("precision.int8_requantisation",)


@plant("int8_requantisation/no rounding", "DequantizeLinear", expected=_REQUANTISED)
def _not_rounded(site: Site) -> None:
    source = next(
        (n for n in site.network.proto.graph.node if site.node.input[0] in n.output), None
    )
    if source is None or source.op_type != "QuantizeLinear":
        raise UnsuitableError("a constant")
    rewrite = site.rewrite()
    scale, zero = float(site.constant(1)), site.constant(2)
    limits = np.iinfo(zero.dtype)
    low = rewrite.add("Max", source.input[0], scale * (limits.min - int(zero)))
    rewrite.done(rewrite.add("Min", low, scale * (limits.max - int(zero))))
