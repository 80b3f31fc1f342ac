"""Pairs of 8-bit products that saturate at 16 bits before they are added up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays import integers
from auditor.replays.editor import Editor
from auditor.replays.quantised import Product, QuantisedLayout

_LOWEST, _HIGHEST = -(2**15), 2**15 - 1
_UNSIGNED = 255  # the largest uint8, which an activation may be
# Scan without its batch axis exists from here on, and ReduceSum's axes are an input from 13 on.
_OPSET = 13

_KERNELS = "integer operators as this processor's kernels add them"

# By position of a node: its product, and the pairs of it that can leave 16 bits.
_Losses = dict[int, tuple[Product, tuple[Array, Array]]]


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment's quantised products with what saturation would take away from them."""
    model = segment.model
    if surgery.opset(model) >= _OPSET:
        layout = QuantisedLayout(model, segment.weights)
        products = [p for p in layout.products() if _can_saturate(p)]
        padded = any(_channels(p) % 2 and p.weights[0, 0].size > 1 for p in products)
        for apart, name in (
            (False, "pairs along kernel position, then channel"),
            (True, "pairs of channels at each kernel position"),
        ):
            losses = {
                p.index: (p, pairs)
                for p in products
                if (pairs := _pairs(p, apart=apart)) is not None
            }
            if losses and (padded or not apart):
                yield Variant(name, _saturated(layout, losses))
    if (kept := integers.kernels(segment.model)) is not None:
        yield Variant(_KERNELS, kept)


def _can_saturate(product: Product) -> bool:
    """Signed weights, and more than one product to a sum."""
    terms = product.weights[0].size if product.node.op_type == "Conv" else len(product.weights)
    return (
        product.weights.dtype == np.int8
        and product.grid.zero is not None
        and (product.node.op_type != "Conv" or not _depthwise(product))
        and terms > 1
    )


def _depthwise(product: Product) -> bool:
    """One input and one output channel to a group: engines use other instructions there."""
    group = surgery.attributes(product.node).get("group", 1)
    return _channels(product) == 1 and product.weights.shape[0] == group


def _channels(product: Product) -> int:
    """Input channels that one output sums over; even where there is no kernel."""
    return product.weights.shape[1] if product.node.op_type == "Conv" else 2


def _pairs(product: Product, *, apart: bool) -> tuple[Array, Array] | None:
    """The pairs whose products can leave 16 bits.

    Returns:
        Positions of both members of each pair in the list of summands, and their weights, both
        [pairs, 2, outputs]; outputs with fewer pairs are filled up with weights of zero.
        None where no pair can.
    """
    if product.node.op_type == "Conv":
        weights, position = _conv_summands(product)
    else:
        weights = product.weights.T.astype(np.int32)
        position = np.broadcast_to(np.arange(weights.shape[1]), weights.shape)
    if apart and product.node.op_type == "Conv" and (channels := product.weights.shape[1]) % 2:
        fill = ((0, 0), (0, 0), (0, 1))
        weights = np.pad(weights.reshape(len(weights), -1, channels), fill)
        position = np.pad(position.reshape(len(position), -1, channels), fill)
        weights, position = (a.reshape(len(a), -1) for a in (weights, position))
    if weights.shape[1] % 2:
        weights, position = (np.pad(a, ((0, 0), (0, 1))) for a in (weights, position))
    weights, position = (a.reshape(len(a), -1, 2) for a in (weights, position))
    above = np.maximum(weights, 0).sum(axis=2) * _UNSIGNED > _HIGHEST
    below = np.minimum(weights, 0).sum(axis=2) * _UNSIGNED < _LOWEST
    able = above | below
    most = int(able.sum(axis=1).max())
    if not most:
        return None
    first = np.argsort(~able, axis=1, kind="stable")[:, :most, None]
    weights = np.take_along_axis(weights * able[:, :, None], first, axis=1)
    position = np.take_along_axis(position, first, axis=1)
    return position.transpose(1, 2, 0), weights.transpose(1, 2, 0)


def _conv_summands(product: Product) -> tuple[Array, Array]:
    """Weights in order of summation, and each one's place in the patches [channel, kernel]."""
    outputs, channels = product.weights.shape[:2]
    kernel = product.weights[0, 0].size
    group = surgery.attributes(product.node).get("group", 1)
    weights = product.weights.reshape(outputs, channels, kernel).astype(np.int32)
    first = np.arange(outputs) // (outputs // group) * channels  # channel of each output's group
    channel = first[:, None, None] + np.arange(channels)[None, :, None]
    position = channel * kernel + np.arange(kernel)
    return (a.transpose(0, 2, 1).reshape(outputs, -1) for a in (weights, position))  # type: ignore[return-value]


def _saturated(layout: QuantisedLayout, losses: _Losses) -> onnx.ModelProto:
    """The segment with every product less the part of its sums beyond 16 bits."""
    editor = Editor(layout.model)
    for index, node in enumerate(layout.nodes):
        if index in losses:
            _less(editor, *losses[index])
        else:
            editor.copy(node)
    return editor.model


def _less(editor: Editor, product: Product, pairs: tuple[Array, Array]) -> None:
    """Add a product, and take off what its pairs have beyond 16 bits."""
    node = product.node
    convolution = node.op_type == "Conv"
    plain = editor.add(node.op_type, *node.input, **surgery.attributes(node))
    summands = _patches(editor, product) if convolution else _rows(editor, product)
    lost = _lost(editor, summands, *pairs, axis=1 if convolution else -1)
    scale = product.grid.scale * product.weight_grid.scale
    real = editor.add("Mul", lost, editor.constant(scale.reshape(-1, 1) if convolution else scale))
    real = editor.add("Reshape", real, editor.add("Shape", plain))
    editor.add("Sub", plain, real, to=node.output[0])


def _rows(editor: Editor, product: Product) -> str:
    """Every summand of every output: [rows, inputs]."""
    width = editor.constant([-1, len(product.weights)], np.int64)
    flat = editor.add("Reshape", _centred(editor, product), width)
    return editor.add("Add", flat, editor.constant(_offset(product)))


def _offset(product: Product) -> float:
    """What makes centred integers the uint8 numbers that kernels read.

    int8 activations are read with their sign bit flipped: 128 is added, and taken off the sum.
    """
    assert product.grid.zero is not None
    return float(product.grid.zero) + (128.0 if product.grid.signed else 0.0)


def _centred(editor: Editor, product: Product) -> str:
    """Integers less their zero point: padding is 0 there."""
    return editor.add(
        "Round",
        editor.add("Div", product.node.input[0], editor.constant(product.grid.scale)),
    )


def _patches(editor: Editor, product: Product) -> str:
    """Every summand of every output: [batch, channel × kernel position, output position]."""
    options = surgery.attributes(product.node)
    kernel = product.weights.shape[2:]
    channels = product.weights.shape[1] * options.get("group", 1)
    size = int(np.prod(kernel))
    picks = np.tile(np.eye(size, dtype=np.float32), (channels, 1)).reshape(-1, 1, *kernel)
    kept = {k: options[k] for k in ("auto_pad", "dilations", "pads", "strides") if k in options}
    moved = editor.add(
        "Conv", _centred(editor, product), editor.constant(picks), group=channels, **kept
    )
    flat = editor.add("Reshape", moved, editor.constant([0, channels * size, -1], np.int64))
    return editor.add("Add", flat, editor.constant(_offset(product)))


def _lost(editor: Editor, summands: str, position: Array, weights: Array, *, axis: int) -> str:
    """Σ over pairs of what lies beyond 16 bits, one pair of every output after another."""
    if axis == 1:
        weights = weights[..., None]
    columns = [
        editor.constant(a[:, i], kind)
        for a, kind in ((position, np.int64), (weights, np.float32))
        for i in (0, 1)
    ]
    zeros = editor.add("Gather", summands, editor.constant(position[0, 0], np.int64), axis=axis)
    zeros = editor.add("Mul", zeros, editor.constant(0.0))
    return editor.scan(_step(summands, axis, f"{zeros}/"), zeros, *columns)


def _step(summands: str, axis: int, mark: str) -> onnx.GraphProto:
    """Body of the Scan: one pair's products, and what clipping takes off their sum.

    Its names begin with ``mark``: ONNX wants them to differ from the outer graph's.
    """

    def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        names = [summands if n == "summands" else mark + n for n in inputs.split()]
        return helper.make_node(op_type, names, [mark + output], **attributes)

    def value(name: str, kind: int) -> onnx.ValueInfoProto:
        shape = [None] * (3 if axis == 1 else 2) if name in ("sum", "total") else None
        return helper.make_tensor_value_info(mark + name, kind, shape)

    nodes = [
        node("Gather", "summands first", "a", axis=axis),
        node("Gather", "summands second", "b", axis=axis),
        node("Mul", "a u", "c"),
        node("Mul", "b v", "d"),
        node("Add", "c d", "pair"),
        node("Clip", "pair lowest highest", "kept"),
        node("Sub", "pair kept", "over"),
        node("Add", "sum over", "total"),
    ]
    inputs = [value("sum", TensorProto.FLOAT)]
    inputs += [value(n, TensorProto.INT64) for n in ("first", "second")]
    inputs += [value(n, TensorProto.FLOAT) for n in ("u", "v")]
    limits = (("lowest", _LOWEST), ("highest", _HIGHEST))
    return helper.make_graph(
        nodes,
        "pair",
        inputs,
        [value("total", TensorProto.FLOAT)],
        [numpy_helper.from_array(np.array(v, np.float32), mark + n) for n, v in limits],
    )


_QUANTISE = "quantise weights to 7 bits (reduce_range=True)"
NOISE = Cause(
    id="precision.int8_saturation",
    type="data precision",
    title="Pairs of uint8 × int8 products saturate at 16 bits",
    cause=(
        "x86 processors without VNNI multiply 8-bit integers with VPMADDUBSW, which adds two "
        "products in 16 bits and clips the sum at ±2¹⁵; processors with VNNI, and the model, do "
        "not."
    ),
    applies=(
        "quantised Conv and MatMul with int8 weights large enough for a pair to leave 16 "
        "bits, from operator set 13 on; operators of the integer format with int8 weights, and "
        "ONNX Runtime's own, where this processor saturates"
    ),
    source=(
        "Intel SDM vol. 2, PMADDUBSW; ONNX Runtime documentation, Quantize ONNX models, "
        "reduce_range (U8S8 on AVX2 and AVX512); oneDNN developer guide, Nuances of int8 "
        "computations; SysNoise (Wang et al., MLSys 2023), Table 1, data precision"
    ),
    advice=f"{_QUANTISE}, or deploy on a processor with VNNI",
    remedies={
        "ort": (
            f"{_QUANTISE} or to uint8, or set the session option session.x64quantprecision=1, or "
            "deploy on a processor with VNNI"
        ),
        "ov": (
            f"{_QUANTISE} (NNCF: overflow_fix=OverflowFix.ENABLE), or deploy on a processor with "
            "VNNI"
        ),
    },
    ablations={"ort": {"session.x64quantprecision": "1"}},
    forms=(
        "pairs along kernel position, then channel",
        "pairs of channels at each kernel position",
        _KERNELS,
    ),
    variants=_variants,
)
