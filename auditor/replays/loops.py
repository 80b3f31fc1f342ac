"""What a noise does inside the bodies of loops, which engines run as kernels of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import onnx

from auditor.graphs import surgery
from auditor.graphs.segments import reads_of
from auditor.ports import SegmentGraph, Variant

_LOOPS = ("Loop", "Scan")


def inside(
    segment: SegmentGraph, variants: Callable[[SegmentGraph], Iterator[Variant]]
) -> Iterator[Variant]:
    """A segment with one variant in the bodies of its loops, and around them where it has one.

    Args:
        segment: any; without loops there is nothing to give.
        variants: those of a segment; a body is one, with what it reads from outside as inputs.
    """
    found = {
        index: {variant.name: variant.model for variant in variants(_of_body(segment, node))}
        for index, node in surgery.find(segment.model, _LOOPS)
    }
    names = dict.fromkeys(name for made in found.values() for name in made)
    for name in names:
        model = surgery.copied(segment.model)
        for index, made in found.items():
            if name in made:
                _put_back(model.graph.node[index], made[name])
        around = (v for v in variants(replace(segment, model=model)) if v.name == name)
        yield next(around, Variant(name, model))


def _of_body(segment: SegmentGraph, node: onnx.NodeProto) -> SegmentGraph:
    """A loop's body as a segment; constants from outside are put in."""
    body: onnx.GraphProto = surgery.attributes(node)["body"]
    source = segment.model
    model = onnx.ModelProto(ir_version=source.ir_version, opset_import=source.opset_import)
    model.functions.extend(source.functions)
    model.graph.CopyFrom(body)
    own = {v.name for v in (*body.input, *body.initializer)}
    own.update(name for inner in body.node for name in inner.output)
    types = surgery.types(source)
    constants = {tensor.name: tensor for tensor in source.graph.initializer}
    for name in dict.fromkeys(n for inner in body.node for n in reads_of(inner)):
        if name in own:
            continue
        if name in constants:
            model.graph.initializer.append(constants[name])
        else:
            kind = types.get(name, onnx.TensorProto.FLOAT)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return replace(segment, model=model)


def _put_back(node: onnx.NodeProto, changed: onnx.ModelProto) -> None:
    """Make a changed body a loop's; its constants, those from outside included, are its own."""
    body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
    new = onnx.GraphProto(name=body.name)
    new.input.extend(body.input)
    new.output.extend(body.output)
    new.node.extend(changed.graph.node)
    new.initializer.extend(changed.graph.initializer)
    body.CopyFrom(surgery.enclosed(new))
