"""Operators that compute something else: noises of inference and of implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.plants.faults.forms import (
    folded,
    last_axis,
    layer_norm,
    pad_apart,
    softmax,
    softmax_axis,
)
from benchmarks.plants.faults.site import (
    Site,
    UnsuitableError,
    plant,
)
from benchmarks.plants.network import Array, Rewrite, attributes


@plant("ceil_mode/rounded the other way", "MaxPool", expected=("inference.ceil_mode",))
def _ceil_mode(site: Site) -> None:
    rewrite = site.rewrite()
    given = attributes(site.node)
    x, y = site.values[rewrite.inputs[0]], site.values[site.key]
    kernel, strides = given["kernel_shape"], given.get("strides", [1, 1])
    pads = given.get("pads", [0] * 4)
    sides = [
        (x.shape[2 + i] + pads[i] + pads[2 + i] - kernel[i], strides[i], y.shape[2 + i])
        for i in range(2)
    ]
    if given.get("ceil_mode", 0):  # leave out the windows that hang over
        ends = [side // stride + 1 for side, stride, _ in sides]
        if ends == [y.shape[2], y.shape[3]]:
            raise UnsuitableError("nothing hangs over")
        whole = rewrite.again(*rewrite.inputs)
        rewrite.done(
            rewrite.add("Slice", whole, np.array([0, 0]), np.array(ends), np.array([2, 3]))
        )
        return
    extra = [(-side) % stride for side, stride, _ in sides]
    if not any(extra):
        raise UnsuitableError("nothing hangs over")
    lowest = np.float32(np.finfo(np.float32).min)
    amounts = np.array([0, 0, pads[0], pads[1], 0, 0, pads[2] + extra[0], pads[3] + extra[1]])
    wide = rewrite.add("Pad", rewrite.inputs[0], amounts, lowest)
    rewrite.done(rewrite.again(wide, pads=None, ceil_mode=None, auto_pad=None))


@plant("padding/at the other end", "Conv", expected=("inference.padding",))
def _padding_other_end(site: Site) -> None:
    given = attributes(site.node)
    pads, strides = given.get("pads", [0] * 4), given.get("strides", [1, 1])
    if len(pads) != 4 or max(strides) < 2 or not any(pads):
        raise UnsuitableError("not strided, or not padded")
    begin, end = pads[:2], pads[2:]
    if begin != end:
        moved = (end, begin)
    else:  # what makes output size x stride the input size, the odd cell at the end
        size, kernel = site.values[site.node.input[0]].shape[2:], given["kernel_shape"]
        total = [
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, s, k in zip(size, strides, kernel, strict=True)
        ]
        moved = ([t // 2 for t in total], [t - t // 2 for t in total])
        if moved == (begin, end):
            raise UnsuitableError("padded so already")
    pad_apart(site, *moved)


@plant("padding/a Pad at the other end", "Pad", expected=("inference.padding",))
def _pad_other_end(site: Site) -> None:
    x, y = site.values[site.node.input[0]], site.values[site.key]
    if x.ndim != 4 or x.shape == y.shape or x.shape[:2] != y.shape[:2]:
        raise UnsuitableError("pads nothing")
    name = site.node.input[1]
    amounts = site.values[name] if name in site.values else site.constant(1)
    halves = amounts.reshape(2, 4)
    if (halves[0] == halves[1]).all():
        raise UnsuitableError("symmetric")
    rewrite = site.rewrite()
    rewrite.done(
        rewrite.again(
            rewrite.inputs[0],
            site.network.constant(halves[::-1].reshape(-1).astype(np.int64)),
            *rewrite.inputs[2:],
        )
    )


def _interpolation(size: int, to: int, **options: Any) -> Array:
    """PyTorch's interpolation along one axis as a matrix, float32 [to, size]."""
    rows = torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, size)
    wide = rows.expand(size, 1, 2, size)  # a second axis, left alone
    result = torch.nn.functional.interpolate(wide, size=(2, to), **options)
    return np.asarray(result[:, 0, 0, :].T.to(torch.float32))


def _resize(name: str, **options: Any) -> None:
    @plant(f"upsample/{name}", "Resize", "Upsample", expected=("inference.upsample",))
    def resize(site: Site) -> None:
        rewrite = site.rewrite()
        x, y = site.values[rewrite.inputs[0]], site.values[site.key]
        if x.ndim != 4 or x.shape[:2] != y.shape[:2]:
            raise UnsuitableError("not an image")
        down, across = (
            _interpolation(a, b, **options) for a, b in zip(x.shape[2:], y.shape[2:], strict=True)
        )
        tall = rewrite.add("MatMul", down, rewrite.inputs[0])
        rewrite.done(rewrite.add("MatMul", tall, np.ascontiguousarray(across.T)))


_resize("nearest", mode="nearest")
_resize("nearest-exact", mode="nearest-exact")
_resize("linear", mode="bilinear", align_corners=False)
_resize("linear, corners aligned", mode="bilinear", align_corners=True)
_resize("cubic", mode="bicubic", align_corners=False)


_APPROXIMATION = ("implementation.approximation",)


@plant("approximation/GELU by tanh", "Erf", expected=_APPROXIMATION)
def _gelu_tanh(site: Site) -> None:
    rewrite = site.rewrite()
    u = rewrite.inputs[0]  # x/sqrt(2)
    cube = rewrite.add("Mul", rewrite.add("Mul", u, u), u)
    linear = rewrite.add("Mul", u, float(2 / np.sqrt(np.pi)))
    bent = rewrite.add("Mul", cube, float(0.044715 * 4 / np.sqrt(np.pi)))
    rewrite.done(rewrite.add("Tanh", rewrite.add("Add", linear, bent)))


@plant("approximation/GELU by a sigmoid", "Erf", expected=_APPROXIMATION)
def _gelu_sigmoid(site: Site) -> None:
    rewrite = site.rewrite()
    inner = rewrite.add("Mul", rewrite.inputs[0], float(1.702 * np.sqrt(2) / 2))
    rewrite.done(rewrite.add("Tanh", inner))  # 2 sigmoid(2t) - 1


@plant("approximation/straight sigmoid", "Sigmoid", expected=_APPROXIMATION)
def _straight(site: Site) -> None:
    rewrite = site.rewrite()
    slope = float(site.random.choice([0.2, 1 / 6]))
    line = rewrite.add("Add", rewrite.add("Mul", rewrite.inputs[0], slope), 0.5)
    rewrite.done(rewrite.add("Min", rewrite.add("Max", line, 0.0), 1.0))


@plant("approximation/smooth for a hard sigmoid", "HardSigmoid", expected=_APPROXIMATION)
def _smooth(site: Site) -> None:
    rewrite = site.rewrite()
    half = rewrite.add("Tanh", rewrite.add("Mul", rewrite.inputs[0], 0.5))
    rewrite.done(rewrite.add("Add", rewrite.add("Mul", half, 0.5), 0.5))


@plant(
    "approximation/hard sigmoid's other slope",
    "HardSigmoid",
    expected=(*_APPROXIMATION, "implementation.attribute_ignored"),
)
def _other_slope(site: Site) -> None:
    rewrite = site.rewrite()
    given = attributes(site.node).get("alpha", 0.2)
    slope = 0.2 if given < 0.19 else 1 / 6
    line = rewrite.add("Add", rewrite.add("Mul", rewrite.inputs[0], slope), 0.5)
    rewrite.done(rewrite.add("Min", rewrite.add("Max", line, 0.0), 1.0))


def _bits_exponential(rewrite: Rewrite, x: str) -> str:
    """Schraudolph's exponential: the exponent field from a table, the fraction as it is."""
    t = rewrite.add("Mul", x, float(np.log2(np.e)))
    low = rewrite.add("Max", t, -126.0)
    whole = rewrite.add("Floor", low)
    mantissa = rewrite.add("Add", rewrite.add("Sub", low, whole), 1.0)
    powers = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
    index = rewrite.add("Cast", rewrite.add("Add", whole, 126.0), to=onnx.TensorProto.INT64)
    return rewrite.add("Mul", mantissa, rewrite.add("Gather", powers, index, axis=0))


@plant("approximation/softmax by exponent bits", "Softmax", expected=_APPROXIMATION)
def _softmax_bits(site: Site) -> None:
    axis, rewrite = softmax_axis(site), site.rewrite()
    rewrite.done(softmax(rewrite, rewrite.inputs[0], axis, lambda x: _bits_exponential(rewrite, x)))


@plant(
    "opset_semantics/softmax over its axis and all behind",
    "Softmax",
    expected=("implementation.opset_semantics",),
)
def _softmax_flat(site: Site) -> None:
    axis, x = softmax_axis(site), site.values[site.node.input[0]]
    if axis in (0, x.ndim - 1):
        raise UnsuitableError("the last axis")
    rewrite = site.rewrite()
    rows = int(np.prod(x.shape[:axis]))
    flat = rewrite.add("Reshape", rewrite.inputs[0], np.array([rows, -1]))
    soft = softmax(rewrite, flat, 1, lambda v: rewrite.add("Exp", v))
    rewrite.done(rewrite.add("Reshape", soft, np.array(x.shape)))


@plant(
    "opset_semantics/softmax along the last axis",
    "Softmax",
    expected=("implementation.opset_semantics", "implementation.attribute_ignored"),
)
def _softmax_last(site: Site) -> None:
    axis, x = softmax_axis(site), site.values[site.node.input[0]]
    if axis == x.ndim - 1 or x.shape[-1] < 2:
        raise UnsuitableError("the last axis already")
    rewrite = site.rewrite()
    rewrite.done(softmax(rewrite, rewrite.inputs[0], x.ndim - 1, lambda v: rewrite.add("Exp", v)))


_NORMALISATION = ("implementation.normalisation",)


@plant("normalisation/epsilon of a layer", "LayerNormalization", expected=_NORMALISATION)
def _layer_epsilon(site: Site) -> None:
    last_axis(site)
    given = attributes(site.node).get("epsilon", 1e-5)
    choices = [e for e in (1e-6, 1e-5, 1e-4, 1e-3) if not np.isclose(e, given, rtol=0.1)]
    rewrite = site.rewrite()
    rewrite.done(layer_norm(rewrite, float(site.random.choice(choices))))


@plant("normalisation/n - 1 in a layer", "LayerNormalization", expected=_NORMALISATION)
def _layer_unbiased(site: Site) -> None:
    width = last_axis(site)
    rewrite = site.rewrite()
    epsilon = attributes(site.node).get("epsilon", 1e-5)
    rewrite.done(layer_norm(rewrite, epsilon, unbiased=True, width=width))


@plant("normalisation/n - 1, written out", "Sqrt", expected=_NORMALISATION)
def _written_unbiased(site: Site) -> None:
    """The variance that goes under a root, for n - 1 values."""
    producers = {n.output[0]: n for n in site.network.proto.graph.node if n.output}
    total = producers.get(site.node.input[0])
    if total is None or total.op_type != "Add":
        raise UnsuitableError("no epsilon")
    mean = next((producers[i] for i in total.input if i in producers), onnx.NodeProto())
    if mean.op_type != "ReduceMean":
        raise UnsuitableError("no variance")
    n = site.values[mean.input[0]].size // site.values[mean.output[0]].size
    epsilon = float(next(site.network.constants[i] for i in total.input if i != mean.output[0]))
    rewrite = site.rewrite()
    variance = rewrite.add("Mul", mean.output[0], n / (n - 1))
    rewrite.done(rewrite.add("Sqrt", rewrite.add("Add", variance, epsilon)))


@plant("normalisation/epsilon of a batch", "BatchNormalization", expected=_NORMALISATION)
def _batch_epsilon(site: Site) -> None:
    given = attributes(site.node).get("epsilon", 1e-5)
    choices = [e for e in (1e-6, 1e-5, 1e-4, 1e-3) if not np.isclose(e, given, rtol=0.1)]
    other = float(site.random.choice(choices))
    folded(site, site.constant(4).astype(np.float64) + other)


@plant("normalisation/epsilon of a batch, outside", "BatchNormalization", expected=_NORMALISATION)
def _batch_outside(site: Site) -> None:
    given = attributes(site.node).get("epsilon", 1e-5)
    folded(site, (np.sqrt(site.constant(4).astype(np.float64)) + given) ** 2)


_IGNORED = ("implementation.attribute_ignored",)


@plant("attribute_ignored/bias", "Conv", "Gemm", "ConvTranspose", expected=_IGNORED)
def _bias_ignored(site: Site) -> None:
    bias = site.constant(2)
    rewrite = site.rewrite()
    name = site.network.constant(np.zeros_like(bias))
    rewrite.done(rewrite.again(*rewrite.inputs[:2], name))


@plant("attribute_ignored/upper limit", "Clip", expected=_IGNORED)
def _limit_ignored(site: Site) -> None:
    node = site.node
    if len(node.input) < 3:
        raise UnsuitableError("no upper limit")
    rewrite = site.rewrite()
    rewrite.done(rewrite.add("Max", node.input[0], node.input[1]))
