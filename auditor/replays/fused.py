"""Operators that an optimiser fused before deployment: what they compute, in ONNX's own operators.

ONNX Runtime's transformer optimiser writes files with operators of the domain ``com.microsoft``
(Attention, SkipLayerNormalization, BiasGelu …; see ContribOperators.md). Other runtimes read these
files and take the operators apart again, so that roundings inside of them can be replayed only
where the reference is written out as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import onnx

from auditor.ports import SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays import surgery
from auditor.replays.quantised import Editor

_DOMAIN = "com.microsoft"
_OPSET = 17  # LayerNormalization exists
_Shapes = dict[str, tuple[int, ...]]
# Kernel types that multiply with weights, and that normalise.
_PROJECTING, _NORMALISING = "FullyConnected", "MVN"


@dataclass(frozen=True, slots=True)
class _Written:
    """An operator written out.

    Attributes:
        first: the tensor that ends the first kernel of several, "" where there is but one.
        kind: by the type of a kernel, whether that is the first.
        upto: whether all kernels before one of that type are the first, instead.
    """

    first: str = ""
    kind: str = ""
    upto: bool = False


def written_out(segment: SegmentGraph) -> SegmentGraph:
    """The segment with such operators as ONNX has them, so that noises see inside.

    Equal up to the order of sums. Those stay that read or write more than is written out here:
    a cache, or statistics.
    """
    model = segment.model
    if surgery.opset(model) < _OPSET or not any(n.domain == _DOMAIN for n in model.graph.node):
        return segment
    editor = Editor(model)
    shapes = surgery.shapes(model) | {t.name: tuple(t.dims) for t in model.graph.initializer}
    kernels = list(segment.kernels)
    for node in model.graph.node:
        write = _WRITTEN.get(node.op_type) if node.domain == _DOMAIN else None
        written = write(node, editor, shapes) if write else None
        if written is None:
            editor.copy(node)
        elif written.first:
            kernels = list(_divided(kernels, node.output[0], written))
    return replace(segment, model=editor.model, kernels=tuple(kernels))


def _divided(kernels: list[Kernel], key: str, written: _Written) -> Iterator[Kernel]:
    """The kernels, of which those that end at ``written.first`` say so."""
    passed = False
    for kernel in kernels:
        passed |= written.upto and kernel.type == written.kind and key in kernel.nodes
        first = not passed if written.upto else kernel.type == written.kind
        if first and key in kernel.nodes:
            nodes = tuple(written.first if name == key else name for name in kernel.nodes)
            yield replace(kernel, nodes=nodes)
        else:
            yield kernel


def _given(node: onnx.NodeProto, position: int) -> str:
    return node.input[position] if position < len(node.input) else ""


def _attention(node: onnx.NodeProto, editor: Editor, shapes: _Shapes) -> _Written | None:
    """Self-attention with its projections in one product."""
    given = surgery.attributes(node)
    x, weights, bias, mask, past, added = (_given(node, i) for i in range(6))
    own = {"num_heads", "mask_filter_value", "scale", "unidirectional"}
    rank, width = len(shapes.get(mask, ())), shapes.get(weights, (0, 0))[1]
    if past or given.get("unidirectional") or not own.issuperset(given) or len(node.output) > 1:
        return None
    if not bias or not width or (mask and rank not in (1, 2)):
        return None
    projected = editor.add("Add", editor.add("MatMul", x, weights), bias)
    parts = editor.split("Split", projected, outputs=3, axis=-1)
    heads = given["num_heads"]
    q, k, v = (_in_heads(part, heads, editor) for part in parts)
    scores = editor.add("MatMul", q, editor.add("Transpose", k, perm=[0, 1, 3, 2]))
    scale = given.get("scale") or 1 / math.sqrt(width / 3 / heads)
    scores = editor.add("Mul", scores, editor.constant(scale))
    if mask:
        masked = _mask(mask, rank, x, given.get("mask_filter_value", -10000.0), editor)
        scores = editor.add("Add", scores, masked)
    if added:
        scores = editor.add("Add", scores, added)
    mixed = editor.add("MatMul", editor.add("Softmax", scores, axis=-1), v)
    together = editor.add("Transpose", mixed, perm=[0, 2, 1, 3])
    editor.add("Reshape", together, editor.constant([0, 0, -1], "int64"), to=node.output[0])
    return _Written(projected, _PROJECTING)


def _in_heads(tensor: str, heads: int, editor: Editor) -> str:
    split = editor.add("Reshape", tensor, editor.constant([0, 0, heads, -1], "int64"))
    return editor.add("Transpose", split, perm=[0, 2, 1, 3])


def _mask(mask: str, rank: int, x: str, least: float, editor: Editor) -> str:
    """What is added to scores: lengths of the sequences, or one for what may be attended to."""
    last = editor.constant([1], "int64")
    kept = editor.cast(mask, onnx.TensorProto.INT64)
    if rank == 1:
        size = editor.add("Squeeze", editor.add("Shape", x, start=1, end=2))
        zero, one = editor.constant(0, "int64"), editor.constant(1, "int64")
        places = editor.add("Range", zero, size, one)
        off = editor.add("GreaterOrEqual", places, editor.add("Unsqueeze", kept, last))
    else:
        off = editor.add("Less", kept, editor.constant(1, "int64"))
    added = editor.add("Where", off, editor.constant(least), editor.constant(0.0))
    return editor.add("Unsqueeze", added, editor.constant([1, 2], "int64"))


def _skip(node: onnx.NodeProto, editor: Editor, shapes: _Shapes) -> _Written | None:
    """A sum and its normalisation."""
    if any(node.output[1:3]):
        return None
    x, skip, gamma = node.input[:3]
    if bias := _given(node, 4):
        x = editor.add("Add", x, bias)
    total = editor.add("Add", x, skip, to=node.output[3] if len(node.output) > 3 else "")
    inputs = filter(None, (total, gamma, _given(node, 3)))
    epsilon = surgery.attributes(node).get("epsilon", 1e-12)
    editor.add("LayerNormalization", *inputs, to=node.output[0], epsilon=epsilon)
    return _Written(total, _NORMALISING, upto=True)


def _gelu(node: onnx.NodeProto, editor: Editor, shapes: _Shapes) -> _Written | None:
    """A value times the share of a normal distribution below it, or an approximation."""
    x = node.input[0]
    if bias := _given(node, 1):
        x = editor.add("Add", x, bias)
    half, one = editor.constant(0.5), editor.constant(1.0)
    if node.op_type == "QuickGelu":
        alpha = editor.constant(surgery.attributes(node).get("alpha", 1.702))
        share = editor.add("Sigmoid", editor.add("Mul", x, alpha))
        editor.add("Mul", x, share, to=node.output[0])
        return _Written()
    if node.op_type == "FastGelu":
        cube = editor.add("Mul", editor.add("Mul", x, x), x)
        inner = editor.add("Add", x, editor.add("Mul", cube, editor.constant(0.044715)))
        factor = editor.constant(math.sqrt(2 / math.pi))
        curve = editor.add("Tanh", editor.add("Mul", inner, factor))
    else:
        curve = editor.add("Erf", editor.add("Div", x, editor.constant(math.sqrt(2))))
    share = editor.add("Mul", editor.add("Add", curve, one), half)
    editor.add("Mul", x, share, to=node.output[0])
    return _Written()


_WRITTEN: dict[str, Callable[[onnx.NodeProto, Editor, _Shapes], _Written | None]] = {
    "Attention": _attention,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "Gelu": _gelu,
    "QuickGelu": _gelu,
    "SkipLayerNormalization": _skip,
}
