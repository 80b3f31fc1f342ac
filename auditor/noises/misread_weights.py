"""Weights laid out for whole blocks of channels, and read as if these were packed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery
from auditor.graphs.weights import inside
from auditor.noises import bf16
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays import kernel_layout, rounding

_BLOCK = 32  # bfloat16 values of one row of a tile register
_WIDTHS = (16, 32)  # filters that are computed, and laid out, together


def _name(width: int) -> str:
    return f"weights padded to {_BLOCK} channels and read packed, {width} filters together, in bf16"


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with every such convolution's weights as they are read."""
    if not kernel_layout.stated(segment.kernels, bf16.FORMAT.stated):
        return
    shapes = {t.name: tuple(t.dims) for t in segment.model.graph.initializer}
    found = {
        node.input[1]
        for _, node in surgery.find(segment.model, ("Conv",))
        if _applies(node, shapes.get(node.input[1], ()))
    }
    if not found:
        return
    for width in _WIDTHS:
        model = surgery.copied(inside(segment.model, segment.weights))
        for tensor in model.graph.initializer:
            if tensor.name in found:
                read = misread(numpy_helper.to_array(tensor), width)
                tensor.CopyFrom(numpy_helper.from_array(read, tensor.name))
        changed = replace(segment, model=model)
        for variant in rounding.variants(changed, bf16.FORMAT, bf16.SITES[:1]):
            yield Variant(_name(width), variant.model)


def _applies(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """Whether taps fill whole blocks, and more than one, with channels that do not."""
    return (
        len(shape) == 4
        and shape[1] < _BLOCK < shape[1] * shape[3]
        and shape[1] * shape[3] % _BLOCK == 0
        and surgery.attributes(node).get("group", 1) == 1
    )


def misread(weights: Array, width: int) -> Array:
    """What a convolution multiplies by that takes padded weights for packed ones.

    Args:
        weights: [filters, channels, rows, columns], float32.
        width: filters computed together.

    Returns:
        The same shape and type. Filters beyond the last whole ``width`` are as if zeros followed.
    """
    filters, channels, *taps = weights.shape
    count = taps[0] * taps[1]
    blocks = -(-filters // width)
    stored = np.zeros((blocks * width, count, _BLOCK), np.float32)
    stored[:filters, :, :channels] = weights.reshape(filters, channels, count).transpose(0, 2, 1)
    # One block of filters after another: its taps, their padded channels, then its filters.
    rows = stored.reshape(blocks, width, count * _BLOCK).transpose(0, 2, 1).reshape(-1, width)
    read = rows[: blocks * count * channels].reshape(blocks, count, channels, width)
    packed = read.transpose(0, 3, 2, 1).reshape(blocks * width, channels, *taps)
    return np.ascontiguousarray(packed[:filters])


NOISE = Cause(
    id="implementation.misread_weights",
    type="implementation",
    title="A convolution takes its padded weights for packed ones",
    cause=(
        "Matrix units multiply blocks of 32 bfloat16 values. OpenVINO pads each tap's weights to a "
        "block, and with fewer than 32 input channels some kernels read them as if they were "
        "packed like the tensor: taps meet other taps' weights, or zeros (2026.4.1, with AMX)."
    ),
    applies=(
        "2-d convolutions of one group with fewer than 32 input channels, whose channels times "
        "kernel columns are a multiple of 32 beyond 32, in kernels that state bfloat16"
    ),
    source="measured: one impulse for each tap shows which weight it meets",
    advice="run the listed layers in float32, or pad their input channels to 32 with zeros",
    remedies={
        "ov": (
            "set INFERENCE_PRECISION_HINT to f32 (audit with --option "
            "ov.INFERENCE_PRECISION_HINT=f32), or pad the input channels to 32 with zeros"
        ),
    },
    ablations={"ov": {"INFERENCE_PRECISION_HINT": "f32"}},
    forms=tuple(_name(width) for width in _WIDTHS),
    variants=_variants,
    simulated=False,
)
