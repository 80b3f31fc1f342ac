"""What is planted: one change of one node, made without anything that the auditor is made of.

Numbers are rounded by PyTorch, grids of a resize are PyTorch's own, functions are written out
from their definitions. Nothing here imports ``auditor``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import torch

from benchmarks.plants.network import Array, Network, Rewrite, attributes

Kind = Literal["noise", "defect", "null"]

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class UnsuitableError(Exception):
    """This node cannot carry this plant."""


@dataclass(frozen=True)
class Site:
    """A node to change.

    Attributes:
        network: the model under change.
        key: the node's first output.
        values: tensors of the unchanged model on the audited sample.
        others: the same on another sample, to calibrate with.
        random: decides whatever is free.
    """

    network: Network
    key: str
    values: Mapping[str, Array]
    others: Mapping[str, Array]
    random: np.random.Generator

    @property
    def node(self) -> onnx.NodeProto:
        """The node as it is now."""
        return self.network.node(self.key)

    def rewrite(self) -> Rewrite:
        """Start to replace the node."""
        half = self.values[self.key].dtype == np.float16
        return Rewrite(self.network, self.key, np.float16 if half else np.float32)

    def weights(self) -> Array:
        """The constant second operand of a product."""
        value = self.network.constants.get(self.node.input[1])
        if value is None or value.ndim < 2:
            raise UnsuitableError("no constant weights")
        return value

    def constant(self, position: int) -> Array:
        """A constant input."""
        node = self.node
        if len(node.input) <= position or node.input[position] not in self.network.constants:
            raise UnsuitableError("no such constant")
        return self.network.constants[node.input[position]]

    def output_axis(self) -> int:
        """Which axis of the weights counts output channels."""
        node = self.node
        if node.op_type == "Conv":
            return 0
        if node.op_type == "ConvTranspose":
            if attributes(node).get("group", 1) != 1:
                raise UnsuitableError("grouped")
            return 1
        if node.op_type == "Gemm":
            return 0 if attributes(node).get("transB", 0) else 1
        return self.weights().ndim - 1


@dataclass(frozen=True)
class Plant:
    """One thing that can be wrong, or only look different.

    Attributes:
        id: ``family/form``.
        kind: a cause of the catalogue, a defect that is none, or a rewrite that changes nothing.
        expected: ids of the causes that describe it truly; empty where none does. Several where
            two causes are the same arithmetic there (float16 and TF32 differ below 2⁻¹⁴ only).
        operators: operator types that can carry it.
        plant: makes the change.
    """

    id: str
    kind: Kind
    expected: frozenset[str]
    operators: tuple[str, ...]
    plant: Callable[[Site], None]

    @property
    def family(self) -> str:
        """What the table counts together."""
        return self.id.partition("/")[0]


PLANTS: dict[str, Plant] = {}

_Planter = Callable[[Site], None]


def _plant(
    id_: str, *operators: str, expected: Sequence[str] = (), kind: Kind = "noise"
) -> Callable[[_Planter], _Planter]:
    def register(function: _Planter) -> _Planter:
        PLANTS[id_] = Plant(id_, kind, frozenset(expected), operators, function)
        return function

    return register


def _float(values: Array, dtype: torch.dtype) -> Array:
    """Values rounded by PyTorch to a type and back to their own."""
    wide = torch.tensor(values)
    return np.asarray(wide.to(dtype).to(wide.dtype).numpy()).reshape(values.shape)


def in_bfloat16(values: Array) -> Array:
    """float32 values rounded to bfloat16 by PyTorch."""
    return _float(values, torch.bfloat16)


def _with_weights(site: Site, weights: Array) -> None:
    rewrite = site.rewrite()
    name = _hidden(site, rewrite, weights)
    rewrite.done(rewrite.again(rewrite.inputs[0], name, *rewrite.inputs[2:]))


def _hidden(site: Site, rewrite: Rewrite, weights: Array) -> str:
    """Other weights as the old ones plus a constant, which engines fold.

    So they stand nowhere in the changed file, from which the auditor reads constants.
    """
    old = site.weights()
    if old.dtype != np.float32:
        return site.network.constant(weights.astype(old.dtype))
    rest = (weights.astype(np.float64) - old).astype(np.float32)
    return rewrite.add("Add", rewrite.inputs[1], rest)


# ------------------------------------------------------------------------ precision


def rounded(rewrite: Rewrite, name: str, bits: int) -> str:
    """A float32 tensor rounded to ``bits`` significant bits by splitting (Dekker 1971)."""
    multiple = rewrite.add("Mul", name, float(2 ** (24 - bits) + 1))
    rest = rewrite.add("Sub", multiple, name)
    return rewrite.add("Sub", multiple, rest)


_FORMATS = {
    "bf16": (torch.bfloat16, 8, ("precision.bf16",)),
    "fp16": (torch.float16, 11, ("precision.fp16", "precision.tf32")),
}


def _precision(name: str) -> None:
    dtype, bits, expected = _FORMATS[name]

    @_plant(f"{name}/weights", *PRODUCTS, expected=expected)
    def weights(site: Site) -> None:
        _with_weights(site, _float(site.weights(), dtype))

    @_plant(f"{name}/operands", *PRODUCTS, expected=expected)
    def operands(site: Site) -> None:
        rewrite = site.rewrite()
        narrow = _hidden(site, rewrite, _float(site.weights(), dtype))
        x = _operand(site, rewrite, bits)
        rewrite.done(rewrite.again(x, narrow, *rewrite.inputs[2:]))

    @_plant(f"{name}/operands and result", *PRODUCTS, expected=expected[:1])
    def all_of_it(site: Site) -> None:
        rewrite = site.rewrite()
        narrow = _hidden(site, rewrite, _float(site.weights(), dtype))
        x = _operand(site, rewrite, bits)
        wide = rewrite.again(x, narrow, *rewrite.inputs[2:])
        rewrite.done(rounded(rewrite, wide, bits))


def _operand(site: Site, rewrite: Rewrite, bits: int) -> str:
    if site.values[rewrite.inputs[0]].dtype != np.float32:
        raise UnsuitableError("not float32")
    return rounded(rewrite, rewrite.inputs[0], bits)


for _name in _FORMATS:
    _precision(_name)


@_plant("tf32/operands", *PRODUCTS, expected=("precision.tf32", "precision.fp16"))
def _tf32(site: Site) -> None:
    weights = site.weights()
    if weights.dtype != np.float32:
        raise UnsuitableError("not float32")
    # As NVIDIA's cvt.rna does: ten bits of fraction, ties away from zero.
    bits = (weights.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    rewrite = site.rewrite()
    name = _hidden(site, rewrite, bits.view(np.float32))
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


@_plant("int8/weights per channel, largest", *PRODUCTS, expected=("precision.int8",))
def _int8_channels(site: Site) -> None:
    _with_weights(site, _fake_quantised(site.weights(), site.output_axis(), 100))


@_plant("int8/weights per tensor, largest", *PRODUCTS, expected=("precision.int8",))
def _int8_tensor(site: Site) -> None:
    _with_weights(site, _fake_quantised(site.weights(), None, 100))


@_plant("int8/weights per channel, percentile", *PRODUCTS, expected=("precision.int8",))
def _int8_channels_clipped(site: Site) -> None:
    _with_weights(site, _fake_quantised(site.weights(), site.output_axis(), 99.9))


@_plant("int8/weights per tensor, percentile", *PRODUCTS, expected=("precision.int8",))
def _int8_tensor_clipped(site: Site) -> None:
    _with_weights(site, _fake_quantised(site.weights(), None, 99.9))


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
    name = _hidden(site, rewrite, weights)
    operand = _quantised_operand(site, rewrite, low, high)
    rewrite.done(rewrite.again(operand, name, *rewrite.inputs[2:]))


@_plant("int8/operands, this input's range", *PRODUCTS, expected=("precision.int8",))
def _int8_dynamic(site: Site) -> None:
    _int8_operands(site, 100, site.values)


@_plant("int8/operands, percentile of another input", *PRODUCTS, expected=("precision.int8",))
def _int8_static(site: Site) -> None:
    _int8_operands(site, 99.99, site.others)


# ------------------------------------------------------------------------ pooling, padding


@_plant("ceil_mode/rounded the other way", "MaxPool", expected=("inference.ceil_mode",))
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


@_plant("padding/at the other end", "Conv", expected=("inference.padding",))
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
    _pad_apart(site, *moved)


def _pad_apart(site: Site, begin: Sequence[int], end: Sequence[int]) -> None:
    """A convolution padded by zeros glued to its input."""
    rewrite = site.rewrite()
    x = rewrite.inputs[0]
    like = site.values[x]
    shape = list(like.shape)
    for axis in (2, 3):
        parts = []
        for amount in (begin[axis - 2], None, end[axis - 2]):
            if amount is None:
                parts.append(x)
            elif amount:
                edge = [*shape[:axis], amount, *shape[axis + 1 :]]
                parts.append(site.network.constant(np.zeros(edge, like.dtype)))
        shape[axis] += begin[axis - 2] + end[axis - 2]
        x = rewrite.add("Concat", *parts, axis=axis) if len(parts) > 1 else x
    rewrite.done(rewrite.again(x, *rewrite.inputs[1:], pads=None, auto_pad=None))


@_plant("padding/a Pad at the other end", "Pad", expected=("inference.padding",))
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


# ------------------------------------------------------------------------ upsample


def _interpolation(size: int, to: int, **options: Any) -> Array:
    """PyTorch's interpolation along one axis as a matrix, float32 [to, size]."""
    rows = torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, size)
    wide = rows.expand(size, 1, 2, size)  # a second axis, left alone
    result = torch.nn.functional.interpolate(wide, size=(2, to), **options)
    return np.asarray(result[:, 0, 0, :].T.to(torch.float32))


def _resize(name: str, **options: Any) -> None:
    @_plant(f"upsample/{name}", "Resize", "Upsample", expected=("inference.upsample",))
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


# ------------------------------------------------------------------------ implementation

_APPROXIMATION = ("implementation.approximation",)


@_plant("approximation/GELU by tanh", "Erf", expected=_APPROXIMATION)
def _gelu_tanh(site: Site) -> None:
    rewrite = site.rewrite()
    u = rewrite.inputs[0]  # x/sqrt(2)
    cube = rewrite.add("Mul", rewrite.add("Mul", u, u), u)
    linear = rewrite.add("Mul", u, float(2 / np.sqrt(np.pi)))
    bent = rewrite.add("Mul", cube, float(0.044715 * 4 / np.sqrt(np.pi)))
    rewrite.done(rewrite.add("Tanh", rewrite.add("Add", linear, bent)))


@_plant("approximation/GELU by a sigmoid", "Erf", expected=_APPROXIMATION)
def _gelu_sigmoid(site: Site) -> None:
    rewrite = site.rewrite()
    inner = rewrite.add("Mul", rewrite.inputs[0], float(1.702 * np.sqrt(2) / 2))
    rewrite.done(rewrite.add("Tanh", inner))  # 2 sigmoid(2t) - 1


@_plant("approximation/straight sigmoid", "Sigmoid", expected=_APPROXIMATION)
def _straight(site: Site) -> None:
    rewrite = site.rewrite()
    slope = float(site.random.choice([0.2, 1 / 6]))
    line = rewrite.add("Add", rewrite.add("Mul", rewrite.inputs[0], slope), 0.5)
    rewrite.done(rewrite.add("Min", rewrite.add("Max", line, 0.0), 1.0))


@_plant("approximation/smooth for a hard sigmoid", "HardSigmoid", expected=_APPROXIMATION)
def _smooth(site: Site) -> None:
    rewrite = site.rewrite()
    half = rewrite.add("Tanh", rewrite.add("Mul", rewrite.inputs[0], 0.5))
    rewrite.done(rewrite.add("Add", rewrite.add("Mul", half, 0.5), 0.5))


@_plant(
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


def _softmax(rewrite: Rewrite, x: str, axis: int, exponential: Callable[[str], str]) -> str:
    """A softmax along one axis, written out."""
    network = rewrite.network
    top = rewrite.add("ReduceMax", x, axes=[axis], keepdims=1)
    power = exponential(rewrite.add("Sub", x, top))
    total = (
        rewrite.add("ReduceSum", power, np.array([axis]), keepdims=1)
        if network.opset >= 13
        else rewrite.add("ReduceSum", power, axes=[axis], keepdims=1)
    )
    return rewrite.add("Div", power, total)


def _softmax_axis(site: Site) -> int:
    """The axis of a softmax; before opset 13 only where that reading changes nothing."""
    node, x = site.node, site.values[site.node.input[0]]
    old = site.network.opset < 13
    axis = int(attributes(node).get("axis", 1 if old else -1)) % x.ndim
    if old and np.prod(x.shape[axis + 1 :]) > 1:
        raise UnsuitableError("over several axes")
    return axis


@_plant("approximation/softmax by exponent bits", "Softmax", expected=_APPROXIMATION)
def _softmax_bits(site: Site) -> None:
    axis, rewrite = _softmax_axis(site), site.rewrite()
    rewrite.done(
        _softmax(rewrite, rewrite.inputs[0], axis, lambda x: _bits_exponential(rewrite, x))
    )


@_plant(
    "opset_semantics/softmax over its axis and all behind",
    "Softmax",
    expected=("implementation.opset_semantics",),
)
def _softmax_flat(site: Site) -> None:
    axis, x = _softmax_axis(site), site.values[site.node.input[0]]
    if axis in (0, x.ndim - 1):
        raise UnsuitableError("the last axis")
    rewrite = site.rewrite()
    rows = int(np.prod(x.shape[:axis]))
    flat = rewrite.add("Reshape", rewrite.inputs[0], np.array([rows, -1]))
    soft = _softmax(rewrite, flat, 1, lambda v: rewrite.add("Exp", v))
    rewrite.done(rewrite.add("Reshape", soft, np.array(x.shape)))


@_plant(
    "opset_semantics/softmax along the last axis",
    "Softmax",
    expected=("implementation.opset_semantics", "implementation.attribute_ignored"),
)
def _softmax_last(site: Site) -> None:
    axis, x = _softmax_axis(site), site.values[site.node.input[0]]
    if axis == x.ndim - 1 or x.shape[-1] < 2:
        raise UnsuitableError("the last axis already")
    rewrite = site.rewrite()
    rewrite.done(_softmax(rewrite, rewrite.inputs[0], x.ndim - 1, lambda v: rewrite.add("Exp", v)))


_NORMALISATION = ("implementation.normalisation",)


def _layer_norm(rewrite: Rewrite, epsilon: float, *, unbiased: bool = False, width: int = 0) -> str:
    """LayerNormalization over the last axis, written out."""
    x, scale, *bias = rewrite.inputs
    centred = rewrite.add("Sub", x, rewrite.add("ReduceMean", x, axes=[-1], keepdims=1))
    square = rewrite.add("Mul", centred, centred)
    variance = rewrite.add("ReduceMean", square, axes=[-1], keepdims=1)
    if unbiased:
        variance = rewrite.add("Mul", variance, width / (width - 1))
    root = rewrite.add("Sqrt", rewrite.add("Add", variance, float(epsilon)))
    result = rewrite.add("Mul", rewrite.add("Div", centred, root), scale)
    return rewrite.add("Add", result, *bias) if bias else result


def _last_axis(site: Site) -> int:
    if attributes(site.node).get("axis", -1) not in (-1, site.values[site.key].ndim - 1):
        raise UnsuitableError("several axes")
    if len(site.node.output) > 1:
        raise UnsuitableError("several outputs")
    return int(site.values[site.key].shape[-1])


@_plant("normalisation/epsilon of a layer", "LayerNormalization", expected=_NORMALISATION)
def _layer_epsilon(site: Site) -> None:
    _last_axis(site)
    given = attributes(site.node).get("epsilon", 1e-5)
    choices = [e for e in (1e-6, 1e-5, 1e-4, 1e-3) if not np.isclose(e, given, rtol=0.1)]
    rewrite = site.rewrite()
    rewrite.done(_layer_norm(rewrite, float(site.random.choice(choices))))


@_plant("normalisation/n - 1 in a layer", "LayerNormalization", expected=_NORMALISATION)
def _layer_unbiased(site: Site) -> None:
    width = _last_axis(site)
    rewrite = site.rewrite()
    epsilon = attributes(site.node).get("epsilon", 1e-5)
    rewrite.done(_layer_norm(rewrite, epsilon, unbiased=True, width=width))


@_plant("normalisation/n - 1, written out", "Sqrt", expected=_NORMALISATION)
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


@_plant("normalisation/epsilon of a batch", "BatchNormalization", expected=_NORMALISATION)
def _batch_epsilon(site: Site) -> None:
    given = attributes(site.node).get("epsilon", 1e-5)
    choices = [e for e in (1e-6, 1e-5, 1e-4, 1e-3) if not np.isclose(e, given, rtol=0.1)]
    other = float(site.random.choice(choices))
    _folded(site, site.constant(4).astype(np.float64) + other)


@_plant("normalisation/epsilon of a batch, outside", "BatchNormalization", expected=_NORMALISATION)
def _batch_outside(site: Site) -> None:
    given = attributes(site.node).get("epsilon", 1e-5)
    _folded(site, (np.sqrt(site.constant(4).astype(np.float64)) + given) ** 2)


def _folded(site: Site, variance: Array) -> None:
    """A batch normalisation as one factor and one summand for each channel."""
    scale, shift, mean = (site.constant(i).astype(np.float64) for i in (1, 2, 3))
    rewrite = site.rewrite()
    factor = scale / np.sqrt(variance)
    across = (-1, *(1,) * (site.values[rewrite.inputs[0]].ndim - 2))
    dtype = site.values[rewrite.inputs[0]].dtype
    product = rewrite.add("Mul", rewrite.inputs[0], factor.reshape(across).astype(dtype))
    summand = (shift - mean * factor).reshape(across).astype(dtype)
    rewrite.done(rewrite.add("Add", product, summand))


_IGNORED = ("implementation.attribute_ignored",)


@_plant("attribute_ignored/bias", "Conv", "Gemm", "ConvTranspose", expected=_IGNORED)
def _bias_ignored(site: Site) -> None:
    bias = site.constant(2)
    rewrite = site.rewrite()
    name = site.network.constant(np.zeros_like(bias))
    rewrite.done(rewrite.again(*rewrite.inputs[:2], name))


@_plant("attribute_ignored/upper limit", "Clip", expected=_IGNORED)
def _limit_ignored(site: Site) -> None:
    node = site.node
    if len(node.input) < 3:
        raise UnsuitableError("no upper limit")
    rewrite = site.rewrite()
    rewrite.done(rewrite.add("Max", node.input[0], node.input[1]))


# ------------------------------------------------------------------------ 8-bit graphs

_REQUANTISED = ("precision.int8_requantisation",)


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


@_plant("int8_requantisation/no rounding", "DequantizeLinear", expected=_REQUANTISED)
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


# ------------------------------------------------------------------------ defects


@_plant("defect/weights scaled", *PRODUCTS, kind="defect")
def _scaled(site: Site) -> None:
    _with_weights(site, site.weights() * site.weights().dtype.type(1.01))


@_plant("defect/two channels swapped", *PRODUCTS, kind="defect")
def _swapped(site: Site) -> None:
    weights, axis = site.weights(), site.output_axis()
    if weights.shape[axis] < 2:
        raise UnsuitableError("one channel")
    order = np.arange(weights.shape[axis])
    a, b = site.random.choice(len(order), 2, replace=False)
    order[[a, b]] = order[[b, a]]
    _with_weights(site, np.take(weights, order, axis=axis))


def _spread(site: Site) -> float:
    """Standard deviation of what the node writes; float16 cannot add the squares up."""
    return float(site.values[site.key].std(dtype=np.float64))


@_plant("defect/wrong bias", "Conv", "Gemm", "ConvTranspose", kind="defect")
def _wrong_bias(site: Site) -> None:
    bias = site.constant(2).copy()
    at = int(site.random.integers(bias.size))
    bias.reshape(-1)[at] += bias.dtype.type(0.5 * _spread(site))
    rewrite = site.rewrite()
    rewrite.done(rewrite.again(*rewrite.inputs[:2], site.network.constant(bias)))


@_plant("defect/a channel dropped", *PRODUCTS, kind="defect")
def _dropped(site: Site) -> None:
    weights, axis = site.weights().copy(), site.output_axis()
    if weights.shape[axis] < 2:
        raise UnsuitableError("one channel")
    at = [slice(None)] * weights.ndim
    at[axis] = slice(*(int(site.random.integers(weights.shape[axis])) + np.array([0, 1])))
    weights[tuple(at)] = 0
    _with_weights(site, weights)


@_plant("defect/taps turned", "Conv", "ConvTranspose", kind="defect")
def _turned(site: Site) -> None:
    weights = site.weights()
    if max(weights.shape[2:]) < 2:
        raise UnsuitableError("one tap")
    _with_weights(site, np.ascontiguousarray(weights[..., ::-1, ::-1]))


@_plant("defect/an activation scaled", "Relu", "Clip", "PRelu", "HardSigmoid", "Erf", kind="defect")
def _activation(site: Site) -> None:
    rewrite = site.rewrite()
    value = rewrite.again(*rewrite.inputs)
    factor = site.values[site.key].dtype.type(1.02)
    if site.values[site.key].dtype.kind != "f":
        raise UnsuitableError("not real numbers")
    rewrite.done(rewrite.add("Mul", value, np.asarray(factor)))


@_plant("defect/a wrong limit", "Clip", kind="defect")
def _wrong_limit(site: Site) -> None:
    limit = site.constant(2)
    rewrite = site.rewrite()
    other = site.network.constant(np.asarray(limit * limit.dtype.type(0.9)))
    rewrite.done(rewrite.again(*rewrite.inputs[:2], other))


@_plant("defect/rounded down", "QuantizeLinear", kind="defect")
def _floor(site: Site) -> None:
    rewrite = site.rewrite()
    quotient, _, zero, dtype = _on_grid(site, rewrite)
    whole = rewrite.add("Add", rewrite.add("Floor", quotient), float(zero))
    rewrite.done(_integers(rewrite, whole, dtype))


@_plant("defect/another scale", "QuantizeLinear", kind="defect")
def _other_scale(site: Site) -> None:
    scale = site.constant(1)
    rewrite = site.rewrite()
    other = site.network.constant(np.asarray(scale * np.float32(1.02)))
    rewrite.done(rewrite.again(rewrite.inputs[0], other, *rewrite.inputs[2:]))


# ------------------------------------------------------------------------ nulls


@_plant("null/identity", *PRODUCTS, "Relu", "Clip", "Add", "Mul", "PRelu", kind="null")
def _identity(site: Site) -> None:
    rewrite = site.rewrite()
    rewrite.done(rewrite.add("Identity", rewrite.again(*rewrite.inputs)))


@_plant("null/transposed twice", *PRODUCTS, "Relu", "Clip", "Add", kind="null")
def _twice(site: Site) -> None:
    rank = site.values[site.key].ndim
    if rank < 2:
        raise UnsuitableError("a vector")
    turn = site.random.permutation(rank)
    rewrite = site.rewrite()
    turned = rewrite.add("Transpose", rewrite.again(*rewrite.inputs), perm=turn.tolist())
    rewrite.done(rewrite.add("Transpose", turned, perm=np.argsort(turn).tolist()))


def _scaled_back(site: Site, factor: float) -> None:
    dtype = site.weights().dtype.type
    rewrite = site.rewrite()
    names = [site.network.constant(site.weights() * dtype(factor))]
    if len(rewrite.inputs) > 2 and rewrite.inputs[2]:
        names.append(site.network.constant(site.constant(2) * dtype(factor)))
    large = rewrite.again(rewrite.inputs[0], *names)
    rewrite.done(rewrite.add("Mul", large, np.asarray(dtype(1 / factor))))


@_plant("null/weights by 2, result by 1/2", *PRODUCTS, kind="null")
def _by_two(site: Site) -> None:
    _scaled_back(site, 2.0)


@_plant("null/weights by 3, result by 1/3", *PRODUCTS, kind="null")
def _by_three(site: Site) -> None:
    _scaled_back(site, 3.0)


@_plant("null/split by outputs", "Conv", kind="null")
def _split_outputs(site: Site) -> None:
    weights = site.weights()
    if attributes(site.node).get("group", 1) != 1 or weights.shape[0] < 2:
        raise UnsuitableError("grouped")
    rewrite, half, parts = site.rewrite(), len(weights) // 2, []
    for part in (slice(None, half), slice(half, None)):
        names = [site.network.constant(weights[part])]
        if len(rewrite.inputs) > 2:
            names.append(site.network.constant(site.constant(2)[part]))
        parts.append(rewrite.again(rewrite.inputs[0], *names))
    rewrite.done(rewrite.add("Concat", *parts, axis=1))


@_plant("null/split by inputs", "Conv", kind="null")
def _split_inputs(site: Site) -> None:
    weights = site.weights()
    if attributes(site.node).get("group", 1) != 1 or weights.shape[1] < 2:
        raise UnsuitableError("grouped")
    rewrite, half = site.rewrite(), weights.shape[1] // 2
    x = rewrite.inputs[0]
    parts = []
    for begin, end in ((0, half), (half, weights.shape[1])):
        piece = rewrite.add("Slice", x, np.array([begin]), np.array([end]), np.array([1]))
        name = site.network.constant(np.ascontiguousarray(weights[:, begin:end]))
        bias = rewrite.inputs[2:] if begin == 0 else ()
        parts.append(rewrite.again(piece, name, *bias))
    rewrite.done(rewrite.add("Add", *parts))


@_plant("null/Gemm as MatMul and Add", "Gemm", kind="null")
def _matmul_add(site: Site) -> None:
    given = attributes(site.node)
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1:
        raise UnsuitableError("scaled")
    weights = site.weights()
    rewrite = site.rewrite()
    turned = np.ascontiguousarray(weights.T) if given.get("transB", 0) else weights
    product = rewrite.add("MatMul", rewrite.inputs[0], turned)
    rewrite.done(rewrite.add("Add", product, rewrite.inputs[2]))


@_plant("null/batch normalisation folded", "BatchNormalization", kind="null")
def _fold(site: Site) -> None:
    epsilon = attributes(site.node).get("epsilon", 1e-5)
    _folded(site, site.constant(4).astype(np.float64) + epsilon)


@_plant("null/batch normalisation unfolded", "Conv", kind="null")
def _unfold(site: Site) -> None:
    weights = site.weights()
    channels = weights.shape[0]
    spread = np.asarray(site.random.uniform(0.5, 2.0, channels))
    across = (-1, *(1,) * (weights.ndim - 1))
    rewrite = site.rewrite()
    bias = site.constant(2) if len(rewrite.inputs) > 2 else np.zeros(channels)
    shift = bias.astype(np.float64)
    mean = site.random.normal(size=channels) * _spread(site)
    dtype = weights.dtype
    plain = rewrite.again(
        rewrite.inputs[0],
        site.network.constant((weights.astype(np.float64) / spread.reshape(across)).astype(dtype)),
    )
    numbers = (spread, shift + mean * spread, mean, np.full(channels, 1 - 1e-5))
    names = [site.network.constant(np.asarray(n, dtype)) for n in numbers]
    rewrite.done(rewrite.add("BatchNormalization", plain, *names, epsilon=1e-5))


@_plant("null/layer normalisation written out", "LayerNormalization", kind="null")
def _layer_written(site: Site) -> None:
    _last_axis(site)
    rewrite = site.rewrite()
    rewrite.done(_layer_norm(rewrite, attributes(site.node).get("epsilon", 1e-5)))


@_plant("null/softmax written out", "Softmax", kind="null")
def _softmax_written(site: Site) -> None:
    axis, rewrite = _softmax_axis(site), site.rewrite()
    rewrite.done(_softmax(rewrite, rewrite.inputs[0], axis, lambda x: rewrite.add("Exp", x)))


@_plant("null/padded apart", "Conv", kind="null")
def _padded_apart(site: Site) -> None:
    pads = attributes(site.node).get("pads", [0] * 4)
    if len(pads) != 4 or not any(pads):
        raise UnsuitableError("not padded")
    _pad_apart(site, pads[:2], pads[2:])


@_plant("null/divided by multiplying", "Div", kind="null")
def _reciprocal(site: Site) -> None:
    divisor = site.constant(1)
    if divisor.dtype.kind != "f":
        raise UnsuitableError("integers")
    rewrite = site.rewrite()
    inverse = (1 / divisor.astype(np.float64)).astype(divisor.dtype)
    rewrite.done(rewrite.add("Mul", rewrite.inputs[0], np.asarray(inverse)))
