"""float64 models computed in float32."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import surgery
from auditor.graphs.weights import inside
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant

# Attributes that name an element type.
_NAME = "everything in float32"
_LIMITED = "everything in float32, whose largest number stands for what is beyond it"
_LARGEST = np.finfo(np.float32)
_LIMITS = ("float32/least", "float32/most")
_CLIP = 11  # its limits are inputs from here on
_TYPE_ATTRIBUTES = ("to", "dtype", "stash_type")


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with float32 in place of float64; its inputs and outputs keep their types."""
    if _holds(segment.model):
        whole = inside(segment.model, segment.weights)
        yield Variant(_NAME, _narrowed(whole))
        fed = {value.type.tensor_type.elem_type for value in whole.graph.input}
        if surgery.opset(whole) >= _CLIP and TensorProto.DOUBLE in fed:  # else none is beyond it
            yield Variant(_LIMITED, _narrowed(whole, limited=True))


def _holds(model: onnx.ModelProto) -> bool:
    """Whether the segment has anything of type float64."""
    graph = model.graph
    return (
        any(i.type.tensor_type.elem_type == TensorProto.DOUBLE for i in graph.input)
        or any(t.data_type == TensorProto.DOUBLE for t in graph.initializer)
        or any(_narrow_attribute(a, try_only=True) for n in graph.node for a in n.attribute)
    )


def _narrowed(model: onnx.ModelProto, *, limited: bool = False) -> onnx.ModelProto:
    types = surgery.types(model)
    result = surgery.copied(model)
    graph = result.graph
    renamed: dict[str, str] = {}
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    for entry in graph.input:
        if entry.type.tensor_type.elem_type == TensorProto.DOUBLE:
            inside = renamed[entry.name] = _inside(entry.name)
            made = _wide(inside) if limited else inside
            before.append(helper.make_node("Cast", [entry.name], [made], to=TensorProto.FLOAT))
            if limited:
                before.append(helper.make_node("Clip", [made, *_LIMITS], [inside]))
    for entry in graph.output:
        if types.get(entry.name) == TensorProto.DOUBLE:
            inside = renamed[entry.name] = _inside(entry.name)
            read = _wide(inside) if limited else inside
            if limited:
                after.append(helper.make_node("Clip", [inside, *_LIMITS], [read]))
            after.append(helper.make_node("Cast", [read], [entry.name], to=TensorProto.DOUBLE))
    _narrow(graph)
    if limited:
        ends = (np.array(end, np.float32) for end in (_LARGEST.min, _LARGEST.max))
        graph.initializer.extend(map(numpy_helper.from_array, ends, _LIMITS))
    for node in graph.node:
        _rename(node, renamed)
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _wide(name: str) -> str:
    return f"{name}/beyond"


def _inside(name: str) -> str:
    return f"{name}/float32"


def _narrow(graph: onnx.GraphProto) -> None:
    """Turn a graph's constants and type attributes from float64 into float32."""
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.DOUBLE:
            tensor.CopyFrom(_single(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            _narrow_attribute(attribute)


def _narrow_attribute(attribute: onnx.AttributeProto, *, try_only: bool = False) -> bool:
    """Narrow one attribute; returns whether there was something to narrow."""
    if attribute.HasField("g"):
        if not try_only:
            _narrow(attribute.g)
            for value in (*attribute.g.output, *attribute.g.value_info):
                if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT
        return any(
            _narrow_attribute(a, try_only=True) for n in attribute.g.node for a in n.attribute
        )
    if attribute.HasField("t") and attribute.t.data_type == TensorProto.DOUBLE:
        if not try_only:
            attribute.t.CopyFrom(_single(attribute.t))
        return True
    if attribute.name in _TYPE_ATTRIBUTES and attribute.i == TensorProto.DOUBLE:
        if not try_only:
            attribute.i = TensorProto.FLOAT
        return True
    return False


def _single(tensor: TensorProto) -> TensorProto:
    with np.errstate(over="ignore"):
        values = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(values, tensor.name)


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Rename tensors that a node reads or writes, those in its subgraphs included."""
    for listed in (node.input, node.output):
        for position, name in enumerate(listed):
            listed[position] = names.get(name, name)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                _rename(inner, names)
            for output in attribute.g.output:
                output.name = names.get(output.name, output.name)


NOISE = Cause(
    id="precision.double_as_float",
    type="data precision",
    title="float64 values are computed in float32",
    cause=(
        "Inference engines have few float64 kernels and convert to float32 (24 significant bits "
        "of 53) inside, while inputs and outputs may keep their type."
    ),
    applies="anything of type float64",
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; IEEE 754-2019, binary32 "
        "and binary64; OpenVINO documentation, CPU device, supported data types; TensorRT "
        "documentation, ONNX parser (DOUBLE is cast to FLOAT)"
    ),
    advice=(
        "export the model in float32 and validate it there, or compute the listed layers "
        "outside the model"
    ),
    forms=(_NAME, _LIMITED),
    variants=_variants,
)
