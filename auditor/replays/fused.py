"""Operators that stand for many: what they compute, in simpler ones.

ONNX has Attention from operator set 23 on, and ONNX Runtime's transformer optimiser writes files
with operators of the domain ``com.microsoft`` (Attention, SkipLayerNormalization, BiasGelu …; see
ContribOperators.md). Runtimes take them apart again, so that roundings inside of them can be
replayed only where the reference is written out as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.ports import SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays.editor import Editor

_DOMAIN = "com.microsoft"
_OPSET = 17  # LayerNormalization exists
# Kernel types that multiply with weights, that normalise, and that may be all of an attention.
_PROJECTING, _NORMALISING, _WHOLE = "FullyConnected", "MVN", "Subgraph"
_AXES_OPSET = 18  # ReduceMean takes its axes as an input
_CLIP_OPSET = 11  # Clip takes its limits as inputs
_ACTIVATED = ("FusedConv", "FusedGemm")
# What the numbers are that an activation is given, where these are attributes.
_NUMBERS = {"LeakyRelu": ("alpha",), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
_FLOAT = onnx.TensorProto.FLOAT
_OTHER = ""  # kernels of any other type


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Shapes and ONNX element types of a segment's tensors, where known."""

    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]

    def rank(self, name: str) -> int:
        """How many axes one has; 0 where unknown."""
        return len(self.shapes.get(name, ()))


@dataclass(frozen=True, slots=True)
class _Written:
    """An operator written out.

    Attributes:
        ends: in the order of their kernels, where several compute it: what type these have, and
            which tensor they end in. Kernels behind the last of them end in the operator's result.
        whole: these, where not all of those types are there.
    """

    ends: tuple[tuple[str, str], ...] = ()
    whole: tuple[tuple[str, str], ...] = ()


def written_out(segment: SegmentGraph) -> SegmentGraph:
    """The segment with such operators in simpler ones, so that noises see inside.

    Equal up to the order of sums. Those stay that read or write more than is written out here, such
    as statistics.
    """
    model = segment.model
    version = surgery.opset(model)
    if not any(_writer(node, version) for node in model.graph.node):
        return segment
    editor = Editor(model)
    shapes = surgery.shapes(model) | {t.name: tuple(t.dims) for t in model.graph.initializer}
    tensors = _Tensors(shapes, surgery.types(model))
    kernels = list(segment.kernels)
    for node in model.graph.node:
        write = _writer(node, version)
        written = write(node, editor, tensors) if write else None
        if written is None:
            editor.copy(node)
        elif written.ends:
            kernels = list(_divided(kernels, node.output[0], written))
    return replace(segment, model=editor.model, kernels=tuple(kernels))


def _divided(kernels: list[Kernel], key: str, written: _Written) -> Iterator[Kernel]:
    """The kernels, of which each says in which tensor it ends."""
    named = {kernel.type for kernel in kernels if key in kernel.nodes}
    ends = written.ends if {kind for kind, _ in written.ends} <= {*named, _OTHER} else written.whole
    types = [kind for kind, _ in ends]
    following = 0
    for kernel in kernels:
        if key not in kernel.nodes:
            yield kernel
            continue
        if kernel.type in types[following:]:
            here = types.index(kernel.type, following)
            following = here + 1
        elif types[following : following + 1] == [_OTHER]:
            here = following
        else:
            yield kernel
            continue
        end = ends[here][1]
        nodes = tuple(end if name == key else name for name in kernel.nodes)
        yield replace(kernel, nodes=nodes, outputs=(end,))


def _given(node: onnx.NodeProto, position: int) -> str:
    return node.input[position] if position < len(node.input) else ""


def _projected_attention(
    node: onnx.NodeProto, editor: Editor, tensors: _Tensors
) -> _Written | None:
    """Self-attention with its projections in one product."""
    given = surgery.attributes(node)
    x, weights, bias, mask, past, added = (_given(node, i) for i in range(6))
    own = {"num_heads", "mask_filter_value", "scale", "unidirectional"}
    rank, width = tensors.rank(mask), tensors.shapes.get(weights, (0, 0))[1]
    if past or given.get("unidirectional") or not own.issuperset(given) or len(node.output) > 1:
        return None
    if not bias or not width or (mask and rank not in (1, 2)):
        return None
    projected = editor.add("Add", editor.add("MatMul", x, weights), bias)
    parts = editor.split("Split", projected, outputs=3, axis=-1)
    heads = given["num_heads"]
    q, k, v = (_in_heads(part, heads, editor) for part in parts)
    biases = [_mask(mask, rank, x, given, editor)] if mask else []
    scores = _Scores(given.get("scale") or 1 / math.sqrt(width / 3 / heads), [*biases, added])
    scores.attend(q, k, v, editor, heads=node.output[0])
    return _Written(((_PROJECTING, projected),))


def _biased_attention(node: onnx.NodeProto, editor: Editor, tensors: _Tensors) -> _Written | None:
    """Attention to what other operators projected, to which it may add their biases."""
    given = surgery.attributes(node)
    q, k, v, bias, mask, added, *cached = (_given(node, i) for i in range(10))
    own = {"num_heads", "mask_filter_value", "scale"}
    rank, width = tensors.rank(mask), tensors.shapes.get(q, (0,))[-1]
    if any(cached) or not own.issuperset(given) or any(node.output[1:]):
        return None
    if any(tensors.rank(x) != 3 for x in (q, k, v)) or (mask and rank not in (1, 2)):
        return None
    if bias:
        sizes = editor.constant([tensors.shapes[x][-1] for x in (q, k, v)], "int64")
        biases = editor.split("Split", bias, sizes, outputs=3, axis=0)
        q, k, v = (editor.add("Add", *pair) for pair in zip((q, k, v), biases, strict=True))
    heads = given["num_heads"]
    biases = [_mask(mask, rank, k, given, editor)] if mask else []
    scores = _Scores(given.get("scale") or 1 / math.sqrt(width / heads), [*biases, added])
    q, k, v = (_in_heads(x, heads, editor) for x in (q, k, v))
    return scores.attend(q, k, v, editor, heads=node.output[0])


def _attention(node: onnx.NodeProto, editor: Editor, tensors: _Tensors) -> _Written | None:
    """Attention as ONNX has it: of any number of heads, with a cache of keys and values."""
    given = surgery.attributes(node)
    q, k, v, mask, past_key, past_value, lengths = (_given(node, i) for i in range(7))
    shapes, rank = tensors.shapes, tensors.rank(q)
    precision = given.get("softmax_precision", _FLOAT)
    if rank not in (3, 4) or not shapes.get(k) or lengths or precision != _FLOAT:
        return None
    y, *more = [*node.output, "", "", ""][:4]
    heads, groups = shapes[q][1], shapes[k][1]
    if rank == 3:
        heads, groups = given["q_num_heads"], given["kv_num_heads"]
        q, k, v = (_in_heads(*of, editor) for of in ((q, heads), (k, groups), (v, groups)))
    width = shapes[node.input[0]][-1] // (heads if rank == 3 else 1)
    rows, columns = (shapes[node.input[i]][-2] for i in (0, 1))
    cached: tuple[tuple[str, str], ...] = ()
    if past_key:
        before = shapes.get(past_key, ())
        if not before:
            return None
        columns += before[2]
        k = editor.add("Concat", past_key, k, to=more[0], axis=2)
        v = editor.add("Concat", past_value, v, to=more[1], axis=2)
        cached = (("Concatenation", k), ("Concatenation", v))
    else:
        for tensor, name in ((k, more[0]), (v, more[1])):
            if name:
                editor.add("Identity", tensor, to=name)
    k, v = (_repeated(x, heads, groups, editor) for x in (k, v))
    added = []
    if mask and shapes.get(mask, (0,))[-1] != columns:
        return None
    if mask and tensors.types.get(mask) == onnx.TensorProto.BOOL:
        mask = editor.add("Where", mask, editor.constant(0.0), editor.constant(-math.inf))
    if given.get("is_causal"):
        seen = np.tri(rows, columns, columns - rows if past_key else 0, dtype=bool)
        added.append(editor.constant(np.where(seen, 0.0, -math.inf)))
    scores = _Scores(
        given.get("scale") or 1 / math.sqrt(width),
        [mask, *added],
        given.get("softcap", 0.0),
        empty=bool(mask),
    )
    to = {"heads": y} if rank == 3 else {"mixed": y}
    if more[2]:
        to[_STEPS[given.get("qk_matmul_output_mode", 0)]] = more[2]
    written = scores.attend(q, k, v, editor, **to)
    return _Written((*cached, *written.ends), (*cached, *written.whole))


def _repeated(tensor: str, heads: int, groups: int, editor: Editor) -> str:
    """Each head as often as others attend to it."""
    if heads == groups:
        return tensor
    apart = editor.add("Unsqueeze", tensor, editor.constant([2], "int64"))
    times = editor.constant([1, 1, heads // groups, 1, 1], "int64")
    shape = editor.add("Shape", tensor)
    last = editor.add("Slice", shape, editor.constant([2], "int64"), editor.constant([4], "int64"))
    first = editor.constant([0, heads], "int64")
    return editor.add(
        "Reshape", editor.add("Expand", apart, times), editor.add("Concat", first, last, axis=0)
    )


# What ONNX's Attention can give of its scores, by ``qk_matmul_output_mode``.
_STEPS = ("scaled", "capped", "masked", "softmax")


@dataclass(frozen=True, slots=True)
class _Scores:
    """How scores become weights.

    Attributes:
        scale: what products of queries and keys are multiplied with.
        added: what is added to them then; "" for nothing.
        cap: the limit that they approach before that; 0 for none.
        empty: whether nothing may be left to attend to, which gives zeros.
    """

    scale: float
    added: list[str]
    cap: float = 0.0
    empty: bool = False

    def attend(self, q: str, k: str, v: str, editor: Editor, **to: str) -> _Written:
        """Add attention to an editor, for queries, keys and values ``[batch, heads, row, width]``.

        ``to`` names tensors: one of ``_STEPS``, ``mixed``, or ``heads``, these beside each other.
        """
        product = editor.add("MatMul", q, editor.add("Transpose", k, perm=[0, 1, 3, 2]))
        factor = editor.constant(self.scale)
        first = scores = editor.add("Mul", product, factor, to=to.get("scaled", ""))
        if self.cap:
            cap = editor.constant(self.cap)
            curve = editor.add("Tanh", editor.add("Div", scores, cap))
            scores = editor.add("Mul", curve, cap, to=to.get("capped", ""))
            if "scaled" not in to:
                first = scores
        elif "capped" in to:
            editor.add("Identity", scores, to=to["capped"])
        added = [name for name in self.added if name]
        for position, name in enumerate(added):
            last = position == len(added) - 1
            scores = editor.add("Add", scores, name, to=to.get("masked", "") if last else "")
        if not added and "masked" in to:
            editor.add("Identity", scores, to=to["masked"])
        given = to.get("softmax", "")
        weights = safe = editor.add("Softmax", scores, to="" if self.empty else given, axis=-1)
        if self.empty:
            nothing = editor.add("IsNaN", weights)
            safe = editor.add("Where", nothing, editor.constant(0.0), weights, to=given)
        mixed = editor.add("MatMul", safe, v)
        if "mixed" in to:
            editor.add("Identity", mixed, to=to["mixed"])
        else:
            together = editor.add("Transpose", mixed, perm=[0, 2, 1, 3])
            editor.add("Reshape", together, editor.constant([0, 0, -1], "int64"), to=to["heads"])
        return _Written(
            (
                ("MatMul", first),
                (_OTHER, scores),
                ("Softmax", weights),
                (_OTHER, safe),
                ("MatMul", mixed),
            ),
            ((_WHOLE, mixed),),
        )


def _in_heads(tensor: str, heads: int, editor: Editor) -> str:
    split = editor.add("Reshape", tensor, editor.constant([0, 0, heads, -1], "int64"))
    return editor.add("Transpose", split, perm=[0, 2, 1, 3])


def _mask(mask: str, rank: int, x: str, given: dict[str, Any], editor: Editor) -> str:
    """What is added to scores: lengths of the sequences, or one for what may be attended to."""
    least = given.get("mask_filter_value", -10000.0)
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


def _skip(node: onnx.NodeProto, editor: Editor, tensors: _Tensors) -> _Written | None:
    """A sum and its normalisation."""
    if any(node.output[1:3]):
        return None
    simple = node.op_type == "SkipSimplifiedLayerNormalization"
    x, skip, gamma = node.input[:3]
    if bias := _given(node, 3 if simple else 4):
        x = editor.add("Add", x, bias)
    total = editor.add("Add", x, skip, to=node.output[3] if len(node.output) > 3 else "")
    if simple:
        return _scaled(node, total, editor)
    return _normalised(node, total, gamma, _given(node, 3), editor)


def _embedding(node: onnx.NodeProto, editor: Editor, tensors: _Tensors) -> _Written | None:
    """The sum of what tables have of words, places and segments, and its normalisation."""
    ids, segments, words, places, parts, gamma, beta = (_given(node, i) for i in range(7))
    shape = tensors.shapes.get(ids)
    if _given(node, 8) or shape is None or not beta or any(node.output[2:]):
        return None
    total = editor.add("Gather", words, ids)
    ends = [("Gather", total)]
    first = editor.constant(range(shape[1]), "int64")
    total = editor.add("Add", total, editor.add("Gather", places, first))
    if segments:
        part = editor.add("Gather", parts, segments)
        total = editor.add("Add", total, part)
        ends.append(("Gather", part))
    written = _normalised(node, total, gamma, beta, editor)
    return _Written((*ends, *written.ends), written.ends)


def _normalised(
    node: onnx.NodeProto, total: str, gamma: str, beta: str, editor: Editor
) -> _Written:
    epsilon = surgery.attributes(node).get("epsilon", 1e-12)
    inputs = filter(None, (total, gamma, beta))
    editor.add("LayerNormalization", *inputs, to=node.output[0], epsilon=epsilon)
    return _Written(((_OTHER, total), (_NORMALISING, node.output[0])))


def _scaled(node: onnx.NodeProto, total: str, editor: Editor) -> _Written:
    """A sum divided by the root of its mean square."""
    square = editor.add("Mul", total, total)
    if surgery.opset(editor.model) < _AXES_OPSET:
        mean = editor.add("ReduceMean", square, axes=[-1])
    else:
        mean = editor.add("ReduceMean", square, editor.constant([-1], "int64"))
    epsilon = editor.constant(surgery.attributes(node).get("epsilon", 1e-12))
    width = editor.add("Sqrt", editor.add("Add", mean, epsilon))
    value = editor.add("Mul", total, editor.add("Reciprocal", width))
    editor.add("Mul", value, node.input[2], to=node.output[0])
    return _Written(((_OTHER, total), ("RMS", node.output[0])))


def _product(node: onnx.NodeProto, editor: Editor, tensors: _Tensors) -> _Written | None:
    """A product of matrices that may be transposed, times a number."""
    given = surgery.attributes(node)
    operands = []
    for name, which in zip(node.input, ("A", "B"), strict=True):
        if given.get(f"transBatch{which}"):
            return None
        if given.get(f"trans{which}"):
            axes = list(range(tensors.rank(name)))
            if len(axes) < 2:
                return None
            order = [*axes[:-2], axes[-1], axes[-2]]
            operands.append(editor.add("Transpose", name, perm=order))
        else:
            operands.append(name)
    alpha = editor.constant(given.get("alpha", 1.0))
    editor.add("Mul", editor.add("MatMul", *operands), alpha, to=node.output[0])
    return _Written()


def _activated(node: onnx.NodeProto, editor: Editor, tensors: _Tensors) -> _Written | None:
    """A sum of products, to which a convolution may add another tensor, and an activation."""
    given = surgery.attributes(node)
    own = {name: value for name, value in given.items() if not name.startswith("activation")}
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    numbers = given.get("activation_params") or [given[name] for name in names if name in given]
    activation = given["activation"]
    first, last = (3, 4) if node.op_type == "FusedConv" else (len(node.input), 0)
    total = editor.add(node.op_type[5:], *filter(None, node.input[:first]), **own)
    for other in filter(None, node.input[first:last]):
        total = editor.add("Add", total, other)
    if activation == "Clip":
        editor.add("Clip", total, *map(editor.constant, numbers), to=node.output[0])
    else:
        options = dict(zip(_NUMBERS.get(activation, ()), numbers, strict=False))
        editor.add(activation, total, to=node.output[0], **options)
    return _Written()


def _gelu(node: onnx.NodeProto, editor: Editor, tensors: _Tensors) -> _Written | None:
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


_WRITTEN: dict[tuple[str, str], Callable[[onnx.NodeProto, Editor, _Tensors], _Written | None]] = {
    ("", "Attention"): _attention,
    (_DOMAIN, "Attention"): _projected_attention,
    (_DOMAIN, "BiasGelu"): _gelu,
    (_DOMAIN, "EmbedLayerNormalization"): _embedding,
    (_DOMAIN, "FastGelu"): _gelu,
    (_DOMAIN, "FusedConv"): _activated,
    (_DOMAIN, "FusedGemm"): _activated,
    (_DOMAIN, "FusedMatMul"): _product,
    (_DOMAIN, "Gelu"): _gelu,
    (_DOMAIN, "MultiHeadAttention"): _biased_attention,
    (_DOMAIN, "QuickGelu"): _gelu,
    (_DOMAIN, "SkipLayerNormalization"): _skip,
    (_DOMAIN, "SkipSimplifiedLayerNormalization"): _skip,
}


def _writer(
    node: onnx.NodeProto, version: int
) -> Callable[[onnx.NodeProto, Editor, _Tensors], _Written | None] | None:
    if version < (_CLIP_OPSET if node.op_type in _ACTIVATED else _OPSET):
        return None
    return _WRITTEN.get((node.domain, node.op_type))
