"""Cuts a model's graph at the tensors that were captured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from auditor.graphs.weights import attach, size_of
from auditor.ports import Array

# Operators that leave dequantised values on their grid.
_ON_GRID = {"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_QUANTISATION_KEYS = ("SCALE_TENSOR", "ZERO_POINT_TENSOR")


@dataclass(frozen=True, slots=True)
class Cut:
    """The nodes that compute some captured tensors from other captured tensors.

    Attributes:
        id: ``s`` and the position in topological order.
        nodes: indices of the nodes whose value depends on the stimulus, in graph order.
        constants: indices of the nodes computed from weights alone that these need.
        inputs: captured tensors and graph inputs it reads, in order of first use.
        outputs: the captured tensors it computes.
    """

    id: str
    nodes: tuple[int, ...]
    constants: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph:
    """Who produces and who reads each tensor of an ONNX main graph.

    Subgraphs of If, Loop and Scan are parts of their node: what they read from outside counts
    as the node's input (ONNX IR specification, "Node Evaluation").
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        """Index ``proto``; the graph's nodes must be topologically sorted, as ONNX demands."""
        self.proto = proto
        self.nodes: Sequence[onnx.NodeProto] = proto.graph.node
        self.initializers = {t.name: t for t in proto.graph.initializer}
        self.sparse = {t.values.name: t for t in proto.graph.sparse_initializer}
        constants = self.initializers.keys() | self.sparse.keys()
        self.inputs = tuple(i.name for i in proto.graph.input if i.name not in constants)
        self.outputs = tuple(o.name for o in proto.graph.output)
        self.producer = {o: i for i, node in enumerate(self.nodes) for o in node.output if o}
        self.reads = tuple(tuple(reads_of(node)) for node in self.nodes)
        self._constant = set(constants)
        for index, node in enumerate(self.nodes):
            if _deterministic(node) and all(name in self._constant for name in self.reads[index]):
                self._constant.update(o for o in node.output if o)

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor depends on weights alone."""
        return tensor in self._constant

    def size(self, names: Iterable[str]) -> int:
        """Bytes of the initialisers among some tensors."""
        return sum(size_of(self.initializers[n]) for n in names if n in self.initializers)

    def cut(self, captured: Iterable[str]) -> tuple[Cut, ...]:
        """Segments between captured tensors, in topological order.

        Each captured tensor's segment is its backward cone up to other captured tensors, graph
        inputs and weights. Tensors with the very same cone share a segment; nodes that feed
        several captured tensors through an uncaptured one belong to each of them. Names that no
        node computes from the stimulus are ignored.
        """
        boundary = {t for t in captured if t in self.producer and not self.is_constant(t)}
        stops = boundary | set(self.inputs)
        outputs: dict[tuple[int, ...], list[str]] = {}
        cones: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[str, ...]]] = {}
        for tensor in (name for name in self.producer if name in boundary):  # graph order
            nodes, constants, inputs = self._cone(self.producer[tensor], stops)
            outputs.setdefault(nodes, []).append(tensor)
            cones[nodes] = (constants, inputs)
        return tuple(
            Cut(f"s{i}", nodes, *cones[nodes], tuple(outputs[nodes]))
            for i, nodes in enumerate(outputs)
        )

    def joined(self, id: str, nodes: Sequence[int]) -> Cut:
        """Join nodes to one cut, which reads whatever other nodes compute from the stimulus.

        Args:
            id: of the cut.
            nodes: their indices, none of what is computed from weights alone.
        """
        made = {name: None for index in nodes for name in self.nodes[index].output if name}
        constants, inputs = set[int](), dict[str, None]()
        pending = list(nodes)
        for index in pending:  # it grows by the constants that are met
            for name in self.reads[index]:
                source = self.producer.get(name)
                if not self.is_constant(name):
                    inputs |= {} if name in made else {name: None}
                elif source is not None and source not in constants:
                    constants.add(source)
                    pending.append(source)
        others = set(range(len(self.nodes))).difference(nodes)
        used = {*self.outputs, *(name for index in others for name in self.reads[index])}
        outputs = tuple(name for name in made if name in used)
        return Cut(id, tuple(nodes), tuple(sorted(constants)), tuple(inputs), outputs)

    def halves(self, captured: set[str]) -> set[str]:
        """Quantised tensors whose real values, before and after, are all captured.

        Whether a program rounds there shows across the pair only: a segment that begins at the
        integers is told what they are.
        """
        found: dict[str, bool] = {}
        for node in self.nodes:
            if node.op_type == "QuantizeLinear" and node.input[0] in captured:
                found[node.output[0]] = node.output[0] not in self.outputs
        for node, reads in zip(self.nodes, self.reads, strict=True):
            restored = node.op_type == "DequantizeLinear" and node.output[0] in captured
            for name in found.keys() & reads:
                found[name] &= restored
        return {name for name, inner in found.items() if inner}

    def _cone(
        self, root: int, stops: set[str]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
        nodes, constants, inputs = {root}, set[int](), dict[str, None]()
        pending = [root]
        while pending:
            index = pending.pop()
            for name in self.reads[index]:
                if name in stops:
                    inputs[name] = None
                    continue
                source = self.producer.get(name)
                if source is None or source in nodes or source in constants:
                    continue
                (constants if self.is_constant(name) else nodes).add(source)
                pending.append(source)
        return tuple(sorted(nodes)), tuple(sorted(constants)), tuple(inputs)

    def extract(
        self,
        cut: Cut,
        types: Mapping[str, int],
        shapes: Mapping[str, Sequence[int | None]] | None,
        weights: Mapping[str, Array],
    ) -> onnx.ModelProto:
        """A segment as a stand-alone model with the same tensor names.

        Args:
            cut: the segment.
            types: ONNX element type of each of its inputs, and of outputs where known.
            shapes: shape of each of its inputs; None leaves them open. Some operators of ONNX
                Runtime want to know shapes before they run (cubic Resize, Scan), as they do in
                the whole model.
            weights: detached weights to put inside (``auditor.graphs.weights``); the stubs of
                others stay.
        """
        model = onnx.ModelProto(
            ir_version=self.proto.ir_version, opset_import=self.proto.opset_import
        )
        model.functions.extend(self.proto.functions)
        graph = model.graph
        graph.name = cut.id
        needed: dict[str, None] = {}
        for index in sorted((*cut.nodes, *cut.constants)):
            node = graph.node.add()
            node.CopyFrom(self.nodes[index])
            for position, name in enumerate(node.output):
                if name in cut.inputs:  # captured, while another output of this node was not
                    node.output[position] = f"{name} in {cut.id}"
            needed.update(dict.fromkeys(self.reads[index]))
        graph.initializer.extend(
            attach(self.initializers[n], weights) for n in needed if n in self.initializers
        )
        graph.sparse_initializer.extend(self.sparse[n] for n in needed if n in self.sparse)
        for name in cut.inputs:
            shape = shapes[name] if shapes is not None else None
            graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], shape))
            self._annotate(graph, name, weights)
        for name in cut.outputs:
            output = graph.output.add(name=name)
            source = self.nodes[self.producer[name]]
            if name in types and not onnx.defs.has(source.op_type, source.domain):
                output.type.tensor_type.elem_type = types[name]  # which ONNX cannot infer
        return model

    def _annotate(self, graph: onnx.GraphProto, name: str, weights: Mapping[str, Array]) -> None:
        """Note the scale and zero point of an input that was dequantised before the segment.

        Integer kernels depend on them, and the segment alone does not show them (ONNX IR
        specification, TensorAnnotation).
        """
        source = self.producer.get(name)
        while source is not None and self.nodes[source].op_type in _ON_GRID:
            source = self.producer.get(self.nodes[source].input[0])
        if source is None or self.nodes[source].op_type != "DequantizeLinear":
            return
        parameters = self.nodes[source].input[1:]
        if not all(n in self.initializers for n in parameters):
            return
        annotation = graph.quantization_annotation.add(tensor_name=name)
        present = {t.name for t in graph.initializer}
        for key, parameter in zip(_QUANTISATION_KEYS, parameters, strict=False):
            annotation.quant_parameter_tensor_names.add(key=key, value=parameter)
            if parameter not in present:
                graph.initializer.append(attach(self.initializers[parameter], weights))


def _deterministic(node: onnx.NodeProto) -> bool:
    return not node.op_type.startswith(("Random", "Multinomial", "Bernoulli"))


def reads_of(node: onnx.NodeProto) -> dict[str, None]:
    """Outer tensors a node reads, those its subgraphs read included, in order."""
    names = dict.fromkeys(name for name in node.input if name)
    for graph in bodies_of(node):
        local = {t.name for t in graph.initializer} | {i.name for i in graph.input}
        for inner in graph.node:
            names.update(dict.fromkeys(n for n in reads_of(inner) if n not in local))
            local.update(inner.output)
        names.update(dict.fromkeys(o.name for o in graph.output if o.name not in local))
    return names


def bodies_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The subgraphs of a node."""
    return [
        graph
        for attribute in node.attribute
        for graph in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
    ]


def rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Rename tensors that nodes read or write, those in their subgraphs included."""
    for node in nodes if names else ():
        for listed in (node.input, node.output):
            listed[:] = [names.get(name, name) for name in listed]
        for body in bodies_of(node):
            rename(body.node, names)
            for value in body.output:
                value.name = names.get(value.name, value.name)
