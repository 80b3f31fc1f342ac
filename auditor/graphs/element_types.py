"""The element types that a graph names: of its tensors, constants and what its nodes make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs.segments import bodies_of

# Attributes that hold an element type (ONNX operators; com.microsoft's follow the same names).
_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype", "stash_type")


def of_graph(graph: onnx.GraphProto) -> Iterator[int]:
    """Every ONNX element type in a graph, those of its subgraphs included; some several times."""
    yield from (tensor.data_type for tensor in graph.initializer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.type.tensor_type.elem_type
    for node in graph.node:
        yield from of_node(node)


def of_node(node: onnx.NodeProto) -> Iterator[int]:
    """The element types in a node's attributes and subgraphs."""
    for attribute in node.attribute:
        if attribute.name in _ATTRIBUTES:
            yield attribute.i
        yield from (tensor.data_type for tensor in _tensors(attribute))
    for body in bodies_of(node):
        yield from of_graph(body)


def replace(graph: onnx.GraphProto, kinds: Mapping[int, int]) -> None:
    """Put other element types in the place of some, in a graph and its subgraphs."""
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        _convert(tensor, kinds)
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if kind.elem_type in kinds:  # nothing is written where no type is declared
            kind.elem_type = kinds[kind.elem_type]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _ATTRIBUTES and attribute.i in kinds:
                attribute.i = kinds[attribute.i]
            for tensor in _tensors(attribute):
                _convert(tensor, kinds)
        for body in bodies_of(node):
            replace(body, kinds)


def _convert(tensor: TensorProto, kinds: Mapping[int, int]) -> None:
    if tensor.data_type in kinds:
        kind = helper.tensor_dtype_to_np_dtype(kinds[tensor.data_type])
        with np.errstate(over="ignore"):
            values = numpy_helper.to_array(tensor).astype(kind)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _tensors(attribute: onnx.AttributeProto) -> list[TensorProto]:
    return [attribute.t] if attribute.HasField("t") else list(attribute.tensors)
