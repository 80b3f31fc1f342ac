"""float64 models computed in float32."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import element_types, surgery
from auditor.graphs.segments import rename
from auditor.graphs.weights import inside
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant

_NAME = "everything in float32"
_LIMITED = "everything in float32, whose largest number stands for what is beyond it"
_LARGEST = np.finfo(np.float32)
_LIMITS = ("float32/least", "float32/most")
_CLIP = 11  # its limits are inputs from here on


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with float32 in place of float64; its inputs and outputs keep their types."""
    if TensorProto.DOUBLE in element_types.of_graph(segment.model.graph):
        whole = inside(segment.model, segment.weights)
        yield Variant(_NAME, _narrowed(whole))
        fed = {value.type.tensor_type.elem_type for value in whole.graph.input}
        if surgery.opset(whole) >= _CLIP and TensorProto.DOUBLE in fed:  # else none is beyond it
            yield Variant(_LIMITED, _narrowed(whole, limited=True))


def _narrowed(model: onnx.ModelProto, *, limited: bool = False) -> onnx.ModelProto:
    types = surgery.types(model)
    result = surgery.copied(model)
    graph = result.graph
    element_types.replace(graph, {TensorProto.DOUBLE: TensorProto.FLOAT})
    renamed: dict[str, str] = {}
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    for entry in (*graph.input, *graph.output):
        if types.get(entry.name) == TensorProto.DOUBLE:
            entry.type.tensor_type.elem_type = TensorProto.DOUBLE
            renamed[entry.name] = f"{entry.name}/float32"
    for entry in graph.input:
        if (inside := renamed.get(entry.name)) is not None:
            made = _wide(inside) if limited else inside
            before.append(helper.make_node("Cast", [entry.name], [made], to=TensorProto.FLOAT))
            if limited:
                before.append(helper.make_node("Clip", [made, *_LIMITS], [inside]))
    for entry in graph.output:
        if (inside := renamed.get(entry.name)) is not None:
            read = _wide(inside) if limited else inside
            if limited:
                after.append(helper.make_node("Clip", [inside, *_LIMITS], [read]))
            after.append(helper.make_node("Cast", [read], [entry.name], to=TensorProto.DOUBLE))
    if limited:
        ends = (np.array(end, np.float32) for end in (_LARGEST.min, _LARGEST.max))
        graph.initializer.extend(map(numpy_helper.from_array, ends, _LIMITS))
    rename(graph.node, renamed)
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _wide(name: str) -> str:
    return f"{name}/beyond"


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
