"""Pairs of 8-bit products that saturate at 16 bits before they are added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays import integers
from auditor.replays.editor import Editor
from auditor.replays.quantised import Grid, Product, QuantisedLayout

_LOWEST, _HIGHEST = -(2**15), 2**15 - 1
_UNSIGNED = 255  # the largest uint8, which an activation may be
# Scan without its batch axis exists from here on, and ReduceSum's axes are an input from 13 on.
_OPSET = 13

_KERNELS = "integer operators as this processor's kernels add them"

# By position of a node: what adds it, less what its pairs have beyond 16 bits.
_Losses = dict[int, Callable[[Editor], None]]


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment's quantised products with what saturation would take away from them."""
    model = segment.model
    if surgery.opset(model) >= _OPSET:
        layout = QuantisedLayout(model, segment.weights)
        products = layout.products()
        constant = {p.index for p in products}
        products = [p for p in products if _can_saturate(p)]
        padded = any(_channels(p) % 2 and p.weights[0, 0].size > 1 for p in products)
        of_tensors: _Losses = {
            index: partial(_less_of_tensors, node=node, grids=grids)
            for index, node in surgery.find(model, ("MatMul",))
            if index not in constant and (grids := _grids(layout, node)) is not None
        }
        for apart, name in (
            (False, "pairs along kernel position, then channel"),
            (True, "pairs of channels at each kernel position"),
        ):
            losses = of_tensors | {
                p.index: partial(_less, product=p, pairs=pairs)
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


def _grids(layout: QuantisedLayout, node: onnx.NodeProto) -> tuple[Grid, Grid] | None:
    """Grids of the factors of a product of two computed tensors in 8 bits.

    None of others, and where less its zero point the second is no int8.
    """
    first, second = (layout.grid(name) for name in node.input)
    if first is None or first.zero is None or not first.bytes:
        return None
    if second is None or second.zero is None or not second.bytes:
        return None
    middle = sum(second.ends()) // 2 + 1
    return (first, second) if second.zero == middle else None


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
            losses[index](editor)
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


def _less_of_tensors(editor: Editor, node: onnx.NodeProto, grids: tuple[Grid, Grid]) -> None:
    """Add a product of two tensors, and take off what pairs along its sum have beyond 16 bits."""
    plain = editor.add("MatMul", *node.input)
    rows, columns = (_centred(editor, *of) for of in zip(node.input, grids, strict=True))
    rows = editor.add("Add", rows, editor.constant(_offset(grids[0])))
    scanned = (*_halves(editor, rows, -1), *_halves(editor, columns, -2))
    # A Scan must know the rank of its state, which here is any.
    flat = editor.add("Reshape", plain, editor.constant([-1], np.int64))
    zeros = editor.add("Mul", flat, editor.constant(0.0))
    lost = editor.scan(_step_of_tensors(f"{zeros}/"), zeros, *scanned, axes=[-1, -1, -2, -2])
    real = editor.add("Mul", lost, editor.constant(grids[0].scale * grids[1].scale))
    real = editor.add("Reshape", real, editor.add("Shape", plain))
    editor.add("Sub", plain, real, to=node.output[0])


def _halves(editor: Editor, value: str, axis: int) -> tuple[str, str]:
    """Add nodes for the first and the second of each pair; one left over gets zero beside it."""

    def every_second(whole: str, first: int) -> str:
        given = ([first], [np.iinfo(np.int64).max], [axis], [2])
        return editor.add("Slice", whole, *(editor.constant(v, np.int64) for v in given))

    nothing = editor.add("Mul", every_second(value, -1), editor.constant(0.0))
    padded = editor.add("Concat", value, nothing, axis=axis)
    return every_second(value, 0), every_second(padded, 1)


def _rows(editor: Editor, product: Product) -> str:
    """Every summand of every output: [rows, inputs]."""
    width = editor.constant([-1, len(product.weights)], np.int64)
    flat = editor.add("Reshape", _centred(editor, product.node.input[0], product.grid), width)
    return editor.add("Add", flat, editor.constant(_offset(product.grid)))


def _offset(grid: Grid) -> float:
    """What makes centred integers the uint8 numbers that kernels read.

    int8 activations are read with their sign bit flipped: 128 is added, and taken off the sum.
    """
    assert grid.zero is not None
    return float(grid.zero) + (128.0 if grid.signed else 0.0)


def _centred(editor: Editor, value: str, grid: Grid) -> str:
    """Integers less their zero point: padding is 0 there."""
    return editor.add("Round", editor.add("Div", value, editor.constant(grid.scale)))


def _patches(editor: Editor, product: Product) -> str:
    """Every summand of every output: [batch, channel × kernel position, output position]."""
    options = surgery.attributes(product.node)
    kernel = product.weights.shape[2:]
    channels = product.weights.shape[1] * options.get("group", 1)
    size = int(np.prod(kernel))
    picks = np.tile(np.eye(size, dtype=np.float32), (channels, 1)).reshape(-1, 1, *kernel)
    kept = {k: options[k] for k in ("auto_pad", "dilations", "pads", "strides") if k in options}
    centred = _centred(editor, product.node.input[0], product.grid)
    moved = editor.add("Conv", centred, editor.constant(picks), group=channels, **kept)
    flat = editor.add("Reshape", moved, editor.constant([0, channels * size, -1], np.int64))
    return editor.add("Add", flat, editor.constant(_offset(product.grid)))


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
    """Body of the Scan over pairs of constant weights: each picks its summands by position."""
    picked = [
        _node(mark, "Gather", "first", "a", summands, axis=axis),
        _node(mark, "Gather", "second", "b", summands, axis=axis),
    ]
    kinds: dict[str, int] = dict.fromkeys(("first", "second"), TensorProto.INT64)
    kinds |= dict.fromkeys(("u", "v"), TensorProto.FLOAT)
    return _body(mark, picked, kinds, 3 if axis == 1 else 2)


def _step_of_tensors(mark: str) -> onnx.GraphProto:
    """Body of the Scan over pairs of two tensors: rows [..., M] times columns [..., N]."""
    nodes = [
        _node(mark, "Unsqueeze", f"{name} {axis}", factor)
        for name, axis, factor in (
            ("first", "last", "a"),
            ("second", "last", "b"),
            ("third", "before", "u"),
            ("fourth", "before", "v"),
        )
    ]
    kinds: dict[str, int] = dict.fromkeys(("first", "second", "third", "fourth"), TensorProto.FLOAT)
    return _body(mark, nodes, kinds, 1)


def _node(
    mark: str, op_type: str, inputs: str, output: str, outer: str = "", **attributes: Any
) -> onnx.NodeProto:
    """A node of a Scan's body; ``outer`` is a tensor from without, its first input.

    Names begin with ``mark``: ONNX wants them to differ from the outer graph's.
    """
    names = [*filter(None, [outer]), *(mark + n for n in inputs.split())]
    return helper.make_node(op_type, names, [mark + output], **attributes)


def _body(
    mark: str, factors: list[onnx.NodeProto], kinds: dict[str, int], rank: int
) -> onnx.GraphProto:
    """The body of a Scan that adds up what clipping takes off the sums a·u + b·v.

    Args:
        mark: what its names begin with.
        factors: nodes that make those of ``a``, ``b``, ``u`` and ``v`` that are no inputs.
        kinds: element types of what is scanned, by name.
        rank: of the sum; one of 1 takes what is clipped off as one row.
    """
    nodes = [
        *factors,
        _node(mark, "Mul", "a u", "c"),
        _node(mark, "Mul", "b v", "d"),
        _node(mark, "Add", "c d", "pair"),
        _node(mark, "Clip", "pair lowest highest", "kept"),
        _node(mark, "Sub", "pair kept", "over"),
        *([_node(mark, "Reshape", "over last", "flat")] if rank == 1 else []),
        _node(mark, "Add", f"sum {'flat' if rank == 1 else 'over'}", "total"),
    ]
    value = helper.make_tensor_value_info
    constants = {
        "lowest": np.float32(_LOWEST),
        "highest": np.float32(_HIGHEST),
        "last": np.array([-1]),
        "before": np.array([-2]),
    }
    return helper.make_graph(
        nodes,
        "pair",
        [
            value(f"{mark}sum", TensorProto.FLOAT, [None] * rank),
            *(value(mark + name, kind, None) for name, kind in kinds.items()),
        ],
        [value(f"{mark}total", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(v), mark + n) for n, v in constants.items()],
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
        "bits, and MatMul of two quantised tensors, the second symmetric, from operator set 13 "
        "on; operators of the integer format with int8 weights, and "
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
            f"{_QUANTISE} (NNCF: overflow_fix=OverflowFix.ENABLE), keep products of two computed "
            "tensors in float, or deploy on a processor with VNNI"
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
