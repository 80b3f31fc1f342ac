"""Attention that the export masks otherwise than the module does."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import Arrays, SegmentGraph, Variant
from auditor.replays.editor import Editor

_CAUSAL = "no position sees a later one"
_OPEN = "without the mask that the file adds"
_KEYS = "keys to which the module gives no weight are masked"
_TRILU = 14  # the operator set that brought it
# Scores of what stands behind, as of a text whose first tokens are in caches.
_LATER = """(x) => (y) {
    size = Shape (x) one = Constant <value = int64 {1}> ()
    second = Constant <value = int64 {-2}> () queries = Gather (size, second)
    last = Constant <value = int64 {-1}> () keys = Gather (size, last)
    before = Sub (keys, queries) first = Add (before, one)
    number = Constant <value = float {-3.4028234663852886e38}> () lowest = Cast <to = $T> (number)
    all = Expand (lowest, size) later = Trilu <upper = 1> (all, first) y = Add (x, later) }"""
_SCORES = frozenset(("MatMul", "Einsum", "Mul", "Div"))


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with a causal mask, and without the mask that is added to its scores."""
    model = segment.model
    rows = _over_keys(model)
    if rows and surgery.opset(model) >= _TRILU:
        yield Variant(_CAUSAL, surgery.passing(model, {(i, 0): _LATER for i in rows}))
    makers = {name: node for node in model.graph.node for name in node.output}
    read = {model.graph.node[i].input[0] for i in rows}
    sums = [(i, n) for i, n in surgery.find(model, ("Add",)) if n.output[0] in read]

    def unmasked(node: onnx.NodeProto) -> str:
        made = [n in makers and makers[n].op_type in _SCORES for n in node.input]
        return f"(a, b) => (y) {{ y = Identity ({'b' if made == [False, True] else 'a'}) }}"

    yield from rewritten(model, _OPEN, sums, unmasked)


def _fitted(segment: SegmentGraph, inputs: Arrays, observed: Arrays) -> Iterable[Variant]:
    """The segment with those keys masked whose weights are zero in the module, in all heads."""
    rows = _over_keys(segment.model)
    editor = Editor(segment.model)
    for index, node in enumerate(segment.model.graph.node):
        weights = observed.get(node.output[0]) if index in rows else None
        if weights is None or weights.ndim < 2 or weights.dtype.kind != "f":
            editor.copy(node)
            continue
        heads = tuple(range(1, weights.ndim - 2))
        zero = (weights == 0).all(axis=heads, keepdims=True)
        if not zero.any() or zero.all(axis=-1).any():
            editor.copy(node)
            continue
        lowest = np.where(zero, np.finfo(weights.dtype).min, 0)
        mask = editor.constant(lowest, weights.dtype)
        scores = editor.add("Add", node.input[0], mask)
        editor.add("Softmax", scores, to=node.output[0], **surgery.attributes(node))
    if editor.changed is not None:
        yield Variant(_KEYS, editor.changed)


def _over_keys(model: onnx.ModelProto) -> list[int]:
    """Where each softmax over the last axis stands, which is that of the keys in attention."""
    found = surgery.find(model, ("Softmax",))
    return [i for i, node in found if surgery.attributes(node).get("axis", -1) in (-1, 3)]


NOISE = Cause(
    id="export.attention_mask",
    type="attention mask",
    title="The export masks attention otherwise than the module does",
    cause=(
        "A mask that was not among the example's inputs, an argument such as is_causal that the "
        "exporter did not follow, or another implementation of attention chosen for the export: "
        "positions see what they do not in the module, or the other way round."
    ),
    applies=(
        "Softmax over the last axis, from operator set 14 on where the mask is causal; other masks "
        "where the weights of attention are observed"
    ),
    source=(
        "PyTorch, torch.nn.functional.scaled_dot_product_attention (attn_mask, is_causal); "
        "ONNX operators Softmax-13 and Trilu-14"
    ),
    advice=(
        "export again with the mask among the example's inputs, and with the implementation of "
        "attention that the module was validated with"
    ),
    convention=True,
    forms=(_CAUSAL, _OPEN, _KEYS),
    variants=_variants,
    fitted=_fitted,
    simulated=False,
)
