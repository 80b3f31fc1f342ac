"""Graphs that ONNX Runtime saved: what made what, what reads what, and a program's fingerprint."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from backends._shared import node_key, read_by, subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import onnx


_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
    | {"Multinomial", "Bernoulli"}
)
# Operators whose weights are not laid out anew, types that the CPU computes in float32, and bytes
# of other weights that may lie inside a saved graph.
_AS_THEY_ARE: Final = frozenset({"Gather", "Gemm", "MatMul", "MatMulNBits"})
_WIDENED: Final = frozenset({10, 16})  # float16, bfloat16
_HELD: Final = 64 << 20


class Graph:
    """Lookups on one ONNX graph; constant tensors are told from computed ones."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.outputs = [o.name for o in graph.output]
        self.constants = {i.name for i in graph.initializer}
        self.constants |= {i.values.name for i in graph.sparse_initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.constants]
        self.int8 = {i.name for i in graph.initializer if i.data_type == 3}
        self.ranks = {i.name: len(i.dims) for i in graph.initializer}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.reads: dict[int, list[str]] = {}
        self._index: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            reads = list(read_by(node))
            self.reads[id(node)] = reads
            for name in dict.fromkeys(reads):
                self.consumers[name].append(node)
            for name in filter(None, node.output):
                self.producer[name] = node
                self._index[name] = index
            if _foldable(node) and self.constants.issuperset(reads):
                self.constants.update(node.output)

    def variables(self, node: onnx.NodeProto) -> list[str]:
        """The tensors a node reads that are not constants, in order."""
        return [name for name in self.reads[id(node)] if name not in self.constants]

    def op_type(self, tensor: str) -> str:
        """Operator that produces ``tensor``; "" for an input or initialiser."""
        node = self.producer.get(tensor)
        return "" if node is None else str(node.op_type)

    def live(self) -> set[str]:
        """The tensors on which an output depends, the outputs included."""
        found = set(self.outputs)
        for node in reversed(self.nodes):
            if found.intersection(node.output):
                found.update(self.reads[id(node)])
        return found

    def cone(self, outputs: Iterable[str], stop: set[str]) -> list[str]:
        """Keys of the non-constant nodes behind ``outputs``, up to the tensors of ``stop``."""
        found: set[int] = set()
        stack = list(outputs)
        while stack:
            index = self._index.get(stack.pop())
            if index is None or index in found:
                continue
            found.add(index)
            stack += (name for name in self.variables(self.nodes[index]) if name not in stop)
        return [node_key(self.nodes[index]) for index in sorted(found)]


def _foldable(node: onnx.NodeProto) -> bool:
    return node.op_type not in _RANDOM and not any(True for _ in subgraphs(node))


def attribute_of(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def drop_folded_inputs(graph: onnx.GraphProto, required: set[str]) -> None:
    """Remove inputs whose initialiser was folded away (IR below 4 lists initialisers as inputs).

    Without its initialiser such an input would have to be fed when the graph is loaded again.
    """
    kept = required.union(i.name for i in graph.initializer)
    for value in [v for v in graph.input if v.name not in kept]:
        graph.input.remove(value)


def unique_local_names(graph: onnx.GraphProto) -> None:
    """Rename tensors defined inside subgraphs where a name is used twice in the whole model.

    ONNX Runtime writes graphs whose branches both define ``reorder_token_0``; ONNX requires
    names to be unique across a graph and its subgraphs, and loading may refuse them.
    """
    taken: set[str] = set()
    fresh = itertools.count()

    def defined(scope: onnx.GraphProto) -> Iterator[str]:
        yield from (i.name for i in scope.input)
        yield from (i.name for i in scope.initializer)
        for node in scope.node:
            yield from filter(None, node.output)

    def visit(scope: onnx.GraphProto, renamed: dict[str, str], *, top: bool) -> None:
        own = dict.fromkeys(defined(scope))
        renamed = {k: v for k, v in renamed.items() if k not in own}
        if not top:
            clashes = taken.intersection(own)
            renamed |= {name: f"{name}__{next(fresh)}" for name in own if name in clashes}
        taken.update(own)
        for value in itertools.chain(scope.input, scope.output, scope.initializer):
            value.name = renamed.get(value.name, value.name)
        for info in scope.value_info:
            info.name = renamed.get(info.name, info.name)
        for node in scope.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = renamed.get(name, name)
            for inner in subgraphs(node):
                visit(inner, renamed, top=False)

    visit(graph, {}, top=True)


def stay_outside(graph: onnx.GraphProto, file: Path) -> bool:
    """Whether optimisers leave the weights that a model has in other files as they are, mostly.

    Then the graph that ONNX Runtime saves says where they lie, and need not hold them once more.
    Of what it makes of others it would hold the values, and a graph is 2 GB at most.

    Args:
        graph: the model's, its large weights detached (``auditor.graphs.weights``).
        file: where it was read from.
    """
    from auditor.graphs import weights

    outside = [t for t in graph.initializer if _location(t) not in ("", file.name)]
    read = {name for node in graph.node if node.op_type not in _AS_THEY_ARE for name in node.input}
    changed = (t for t in outside if t.name in read or t.data_type in _WIDENED)
    return bool(outside) and sum(map(weights.size_of, changed)) <= _HELD


def _location(tensor: onnx.TensorProto) -> str:
    return next((str(e.value) for e in tensor.external_data if e.key == "location"), "")


def fingerprint(graph: onnx.GraphProto) -> list[tuple[object, ...]]:
    """Everything a graph executes, in its order: operators, names, wiring and attributes."""
    return [
        (
            node.domain,
            node.op_type,
            node.name,
            tuple(node.input),
            tuple(node.output),
            # Attributes come in the order of a hash map; subgraphs are compared as graphs.
            sorted(
                (a.name, str(fingerprint(a.g)) if a.HasField("g") else a.SerializeToString())
                for a in node.attribute
            ),
        )
        for node in graph.node
    ]
