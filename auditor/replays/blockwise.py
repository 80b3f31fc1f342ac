"""Products with weights of few bits in blocks: what they compute exactly, in ONNX's own operators.

Decoders are deployed with weights of 4 bits, one scale for each block of 32 or 128 of them (ONNX
Runtime's contrib operator ``com.microsoft.MatMulNBits``; see ContribOperators.md). Its attribute
``accuracy_level`` lets a kernel round what it multiplies with, down to 8 bits: a deployment's
choice, which the reference does not make.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto

from auditor.graphs import packed, surgery
from auditor.graphs.model import Model
from auditor.graphs.segments import reads_of
from auditor.ports import SegmentGraph
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

_LEVEL = "accuracy_level"
_OPSET = 13  # DequantizeLinear has an axis from here on


def exact(model: Model) -> Model:
    """The model without leave to round what products read; nodes keep their names."""
    if not any(_allows(node) for node in model.proto.graph.node):
        return model
    proto = surgery.copied(model.proto)
    for node in filter(_allows, proto.graph.node):
        surgery.set_attributes(node, **{_LEVEL: None})
    return replace(model, proto=proto)


def written_out(segment: SegmentGraph) -> SegmentGraph:
    """The segment with such products as DequantizeLinear and MatMul, so that noises see them.

    Equal up to the order of sums. Those stay whose weights are no constants, or are laid out in a
    way that one scale for each block does not describe.
    """
    model = segment.model
    if surgery.opset(model) < _OPSET or not any(map(packed.is_packed, model.graph.node)):
        return segment
    layout, editor = Layout(model, segment.weights), Editor(model)
    for node in layout.nodes:
        weights = packed.unpacked(node, layout.constant) if packed.is_packed(node) else None
        if weights is None:
            editor.copy(node)
        else:
            _write_out(node, weights, editor)
    _forget_unread(editor.model)
    return replace(segment, model=editor.model)


def with_narrow_scales(segment: SegmentGraph, kind: int) -> SegmentGraph | None:
    """The segment with the scales of constant integers rounded to an ONNX float type.

    An engine that keeps such weights as they are multiplies by scales in the type it computes in.
    None where there are none.
    """
    layout, editor = Layout(segment.model, segment.weights), Editor(segment.model)
    for node in layout.nodes:
        if node.op_type == "DequantizeLinear" and layout.constant(node.input[0]) is not None:
            narrow = editor.cast(node.input[1], kind)
            inputs = [node.input[0], editor.cast(narrow, TensorProto.FLOAT), *node.input[2:]]
            options = surgery.attributes(node)
            editor.add("DequantizeLinear", *inputs, to=node.output[0], **options)
        else:
            editor.copy(node)
    return None if editor.changed is None else replace(segment, model=editor.changed)


def _allows(node: onnx.NodeProto) -> bool:
    return packed.is_packed(node) and bool(surgery.attributes(node).get(_LEVEL))


def _write_out(node: onnx.NodeProto, weights: packed.Blocks, editor: Editor) -> None:
    integers = editor.constant(weights.integers, np.uint8)
    zeros = editor.constant(weights.zeros, np.uint8)
    scales = editor.constant(weights.scales)
    values = editor.add("DequantizeLinear", integers, scales, zeros, axis=0)
    shape = editor.constant([weights.outputs, -1], np.int64)
    matrix = editor.add("Reshape", values, shape)
    if weights.integers.size != weights.outputs * weights.inputs:  # the last block is not full
        start, end, axis = (editor.constant([i], np.int64) for i in (0, weights.inputs, 1))
        matrix = editor.add("Slice", matrix, start, end, axis)
    matrix = editor.add("Transpose", matrix, perm=[1, 0])
    bias = node.input[5] if len(node.input) > 5 else ""
    product = editor.add("MatMul", node.input[0], matrix, to="" if bias else node.output[0])
    if bias:
        editor.add("Add", product, bias, to=node.output[0])


def _forget_unread(model: onnx.ModelProto) -> None:
    read = {output.name for output in model.graph.output}
    read.update(name for node in model.graph.node for name in reads_of(node))
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
