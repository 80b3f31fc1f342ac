"""A model under change: one node replaced by others, everything else and every name kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]


class Network:
    """A copy of a model whose nodes can be replaced.

    A node is identified by its *key*, the name of its first output.

    Attributes:
        proto: the model; its initialisers only grow.
        constants: values of initialisers and Constant nodes by tensor name.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        """Copy ``proto``."""
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        graph = self.proto.graph
        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                (attribute,) = node.attribute
                value = helper.get_attribute_value(attribute)
                if isinstance(value, onnx.TensorProto):
                    value = numpy_helper.to_array(value)
                self.constants[node.output[0]] = np.asarray(value)
        self._fresh = 0

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        versions = {o.domain: int(o.version) for o in self.proto.opset_import}
        return versions[""] if "" in versions else versions["ai.onnx"]

    def node(self, key: str) -> onnx.NodeProto:
        """The node that writes ``key``."""
        nodes: list[onnx.NodeProto] = list(self.proto.graph.node)
        return next(n for n in nodes if n.output and n.output[0] == key)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Nodes that read a tensor."""
        return [n for n in self.proto.graph.node if tensor in n.input]

    def fresh(self) -> str:
        """A tensor name that the model does not have."""
        self._fresh += 1
        return f"planted/{self._fresh}"

    def constant(self, value: Array) -> str:
        """The name of a new initialiser."""
        array = np.asarray(value)
        name = self.fresh()
        self.proto.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        )
        self.constants[name] = array
        return name

    def replace(self, key: str, nodes: list[onnx.NodeProto]) -> None:
        """Put ``nodes``, the last of which writes ``key``, in the place of the node ``key``."""
        old = list(self.proto.graph.node)
        at = next(i for i, n in enumerate(old) if n.output and n.output[0] == key)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend([*old[:at], *nodes, *old[at + 1 :]])

    def save(self, path: Path) -> None:
        """Write the model."""
        onnx.save(self.proto, path)


class Rewrite:
    """The nodes that take one node's place, written one after the other."""

    def __init__(self, network: Network, key: str, real: Any = np.float32) -> None:
        """Begin with no node; ``real`` is the type that Python floats become."""
        self.network = network
        self.real = real
        self.original = onnx.NodeProto()
        self.original.CopyFrom(network.node(key))
        self.key = key
        self.nodes: list[onnx.NodeProto] = []

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the original node reads."""
        return tuple(self.original.input)

    def add(self, op_type: str, *inputs: Any, **attributes: Any) -> str:
        """One node with one output; inputs that are not names become constants."""
        target = self.network.fresh()
        typed = [np.asarray(i, self.real) if isinstance(i, float) else i for i in inputs]
        names = [i if isinstance(i, str) else self.network.constant(i) for i in typed]
        self.nodes.append(helper.make_node(op_type, names, [target], target, **attributes))
        return target

    def again(self, *inputs: str, **changed: Any) -> str:
        """The original node with other inputs (all of them) and other attributes (None removes)."""
        given = {a.name: helper.get_attribute_value(a) for a in self.original.attribute}
        given = {k: v for k, v in (given | changed).items() if v is not None}
        return self.add(self.original.op_type, *inputs, **given)

    def done(self, result: str) -> None:
        """Let ``result`` be what the original node's output was."""
        last = self.nodes[-1] if self.nodes else None
        if last is not None and last.output[0] == result:
            last.output[0] = self.key
        else:
            self.nodes.append(helper.make_node("Identity", [result], [self.key]))
        self.network.replace(self.key, self.nodes)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def values(proto: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    """Every tensor of the model as written, by ONNX Runtime without optimisation."""
    observed = onnx.ModelProto()
    observed.CopyFrom(proto)
    known = {o.name for o in proto.graph.output}
    observed.graph.output.extend(
        onnx.ValueInfoProto(name=o)
        for n in proto.graph.node
        for o in n.output
        if o and o not in known
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        observed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return feeds | dict(zip(names, session.run(names, feeds), strict=True))


def change(observed: Array, reference: Array) -> float:
    """Relative L2 of two tensors in double precision; infinite where shapes differ."""
    if observed.shape != reference.shape:
        return float("inf")
    a, b = observed.astype(np.float64), reference.astype(np.float64)
    scale = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / scale if scale > 0 else float(np.any(a != b))
