"""How the nodes of a segment hang together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery
from auditor.graphs.weights import is_detached
from auditor.ports import Array


class Layout:
    """A segment's constants, and which nodes make and read each of its tensors.

    Attributes:
        model: the segment.
        nodes: its nodes, in graph order.
        outputs: names of the tensors that leave it.
        producer: tensor → position of the node that makes it.
        readers: tensor → positions of the nodes that read it.
    """

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Array] | None = None) -> None:
        """``weights``: values of the initialisers that are detached from the segment, by name."""
        self.model = model
        self._detached = weights or {}
        self.nodes: Sequence[onnx.NodeProto] = list(model.graph.node)
        self.outputs = {o.name for o in model.graph.output}
        self.producer = {o: i for i, n in enumerate(self.nodes) for o in n.output if o}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(index)
        self._tensors = {t.name: t for t in model.graph.initializer}

    def constant(self, name: str) -> Array | None:
        """Value of an initialiser, a Constant, or a ConstantOfShape of one."""
        if name in self._tensors:
            tensor = self._tensors[name]
            return (
                self._detached.get(name) if is_detached(tensor) else numpy_helper.to_array(tensor)
            )
        node = self.source(name)
        if node is None or node.op_type not in ("Constant", "ConstantOfShape"):
            return None
        given = surgery.attributes(node)
        if node.op_type == "ConstantOfShape":
            shape = self.constant(node.input[0])
            filled = numpy_helper.to_array(given["value"]) if given else np.zeros(1, np.float32)
            return None if shape is None else np.broadcast_to(filled.reshape(()), shape.tolist())
        if "value" in given:
            return numpy_helper.to_array(given["value"])
        value = next(iter(given.values()))
        return np.asarray(value, np.float32 if isinstance(value, float) else None)

    def source(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor."""
        return self.nodes[self.producer[name]] if name in self.producer else None

    def reader(self, name: str) -> int | None:
        """The one node that reads a tensor which nothing else sees."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def final(self, nodes: Sequence[int]) -> bool:
        """Whether one of these nodes computes an output of the segment."""
        return any(self.first(i) in self.outputs for i in nodes)

    def first(self, index: int) -> str:
        """The first output of the node at a position."""
        return str(self.nodes[index].output[0])
