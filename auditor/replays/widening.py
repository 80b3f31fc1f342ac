"""The reference of a half-precision model: the same model with its narrow floats as float32.

A model in float16 or bfloat16 says that its tensors have few bits, not how they are rounded on the
way: runtimes keep what they like in float32, and ONNX Runtime on a CPU, which has few kernels for
narrow types, does so between some operators and not between others. Run as it is, it is no
reference for anything but itself. Widened, it computes what the weights and the graph say, wherever
it is cut; what rounding to the model's own types may do is a segment's floor (``own_types``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto

from auditor.graphs import element_types, surgery, weights
from auditor.graphs.model import Model
from auditor.graphs.segments import bodies_of
from auditor.ports import Array, Arrays, SegmentGraph
from auditor.replays.rounder import Sites
from auditor.replays.rounding import variants
from auditor.replays.writer import BF16, FP16, Format

FORMATS: dict[int, Format] = {TensorProto.FLOAT16: FP16, TensorProto.BFLOAT16: BF16}
_FLOATS = dict.fromkeys(FORMATS, TensorProto.FLOAT)
_ROUNDED = Sites("results of every operator", "operator", inputs=True, outputs=True)
_FILE = "widened.bin"


def is_narrow(model: Model) -> bool:
    """Whether the model computes in floats narrower than float32.

    One that only rounds to them, by a cast there and back, says where: that is part of what it
    computes in float32.
    """
    graph = model.proto.graph
    rounded = {n.output[0] for n in graph.node if n.op_type == "Cast" and _names_narrow(n)}
    values = (v for v in (*graph.input, *graph.output, *graph.value_info) if v.name not in rounded)
    if any(t.data_type in FORMATS for t in graph.initializer) or any(
        value.type.tensor_type.elem_type in FORMATS for value in values
    ):
        return True
    others = [n for n in graph.node if n.op_type != "Cast"]
    bodies = bool(rounded) and any(map(bodies_of, graph.node))
    read = rounded & {name for n in others for name in n.input}
    returned = rounded & {value.name for value in graph.output}
    return bodies or bool(read or returned) or any(map(_names_narrow, others))


def widened(model: Model, folder: Path) -> Model:
    """The model in float32.

    Nodes keep their places and names, so that a cut of one model is a cut of the other.

    Args:
        model: a model with narrow floats.
        folder: where to write the weights that are not kept inside the graph; it must stay while
            the result is used.
    """
    proto = surgery.copied(model.proto)
    with (folder / _FILE).open("wb") as file:
        for tensor in proto.graph.initializer:
            if weights.is_detached(tensor):
                _move(tensor, model.weights[tensor.name], file)
    element_types.replace(proto.graph, _FLOATS)
    return replace(model, proto=proto, weights=weights.detach(proto, folder), folder=folder)


def rounded(model: Model, wide: Model) -> Model:
    """The widened model with every result rounded, where it is read, to the type the model says.

    It is what the file asks for, operator by operator, for a side that computes in float32; and it
    runs where there are no kernels for narrow types. Nodes keep their names and outputs.

    Args:
        model: a model with narrow floats.
        wide: the same, widened.
    """
    forms = {form: kind for kind, form in FORMATS.items()}
    narrow = declared(model)
    proto = surgery.copied(wide.proto)
    nodes, read_as = [], dict[str, str]()
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            if name in read_as:
                node.input[position] = read_as[name]
        nodes.append(node)
        for name in node.output:
            form = narrow.get(name)
            if form is None:
                continue
            short, read_as[name] = f"{name} in {form.name}", f"{name} rounded to {form.name}"
            for source, made, kind in (
                (name, short, forms[form]),
                (short, read_as[name], TensorProto.FLOAT),
            ):
                nodes.append(onnx.helper.make_node("Cast", [source], [made], name=made, to=kind))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return replace(wide, proto=proto)


def in_float32(segment: SegmentGraph) -> onnx.ModelProto | None:
    """A copy of a segment, weights inside, that computes in float32; None where it does."""
    if FORMATS.keys().isdisjoint(element_types.of_graph(segment.model.graph)):
        return None
    wider = surgery.copied(weights.inside(segment.model, segment.weights))
    element_types.replace(wider.graph, _FLOATS)
    return wider


def declared(model: Model) -> dict[str, Format]:
    """The narrow format of each tensor that has one by the model's own words."""
    found = surgery.types(model.proto)
    return {name: FORMATS[kind] for name, kind in found.items() if kind in FORMATS}


def wide(tensors: Arrays) -> Arrays:
    """Tensors as the widened model has them: narrow floats as float32, exactly."""
    return {name: _wide(value) for name, value in tensors.items()}


def own_types(model: onnx.ModelProto, to: Format) -> onnx.ModelProto | None:
    """A segment with the result of every operator rounded to the type the model gives it."""
    rounded = variants(SegmentGraph(model, ()), to, (_ROUNDED,))
    return next((variant.model for variant in rounded), None)


def _wide(value: Array) -> Array:
    narrow = value.dtype == np.float16 or value.dtype.name == "bfloat16"
    return value.astype(np.float32) if narrow else value


def _move(tensor: TensorProto, values: Array, file: BinaryIO) -> None:
    """Write a weight to the file, and say where it is now."""
    values = np.ascontiguousarray(_wide(values))
    start = file.tell()
    file.write(values.data)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    del tensor.external_data[:]
    for key, text in (("location", _FILE), ("offset", start), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(text))


def _names_narrow(node: onnx.NodeProto) -> bool:
    return any(kind in FORMATS for kind in element_types.of_node(node))
