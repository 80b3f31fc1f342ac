"""A segment taken apart into portions with one sum of products each, and put together again.

Where few tensors of a program can be observed, a segment holds several kernels, and a runtime may
do something to one of them alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import onnx

from auditor.graphs import surgery
from auditor.graphs.segments import Cut, Graph, bodies_of
from auditor.ports import SegmentGraph

# What ends a portion; where values are rounded to 8 bits, a portion begins there.
PRODUCTS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_ROUNDING = "QuantizeLinear"
# More portions than these would take too many replays.
MOST = 48


class Portions:
    """The portions of one segment.

    Attributes:
        quantised: whether the segment rounds to 8 bits.
    """

    def __init__(self, segment: SegmentGraph) -> None:
        """Take it apart; there is nothing to iterate over where that is not possible."""
        self._segment = segment
        self._graph = Graph(segment.model)
        nodes = segment.model.graph.node
        inner = {o for node in nodes for o in node.output}
        roundings = {n.input[0] for n in nodes if n.op_type == _ROUNDING}
        self.quantised = bool(roundings)
        seams = roundings or {n.output[0] for n in nodes if n.op_type in PRODUCTS}
        several = len(seams) > 1
        readers = Counter(name for node in nodes for name in set(node.input))
        seams |= {name for name in inner if readers[name] > 1}  # so that no two portions overlap
        cuts = self._graph.cut(seams.union(self._graph.outputs)) if several else ()
        self._cuts = cuts if 1 < len(cuts) <= MOST else ()

    def __iter__(self) -> Iterator[tuple[Cut, SegmentGraph]]:
        """Each portion as a segment of its own, the last one first."""
        if not self._cuts:
            return
        types, shapes = surgery.types(self._segment.model), surgery.shapes(self._segment.model)
        for cut in reversed(self._cuts):
            if not all(name in types for name in cut.inputs):
                continue
            known = shapes if all(name in shapes for name in cut.inputs) else None
            yield cut, replace(self._segment, model=self._graph.extract(cut, types, known, {}))

    def name(self, cut: Cut) -> str:
        """What a portion is called."""
        return f"up to {cut.outputs[0]} alone"

    def with_one(self, changed: Cut, other: onnx.ModelProto) -> onnx.ModelProto | None:
        """The segment with another model for one portion; None where they do not go together."""
        model, graph = self._segment.model, other.graph
        if any(map(bodies_of, graph.node)) or surgery.opset(other) != surgery.opset(model):
            return None
        made = surgery.copied(model)
        del made.graph.node[:]
        kept = {*changed.inputs, *changed.outputs, ""}

        def renamed(name: str) -> str:
            return name if name in kept else f"{changed.outputs[0]}/alone/{name}"

        for tensor in graph.initializer:
            made.graph.initializer.add().CopyFrom(tensor)
            made.graph.initializer[-1].name = renamed(tensor.name)
        known = {(f.domain, f.name) for f in model.functions}
        made.functions.extend(f for f in other.functions if (f.domain, f.name) not in known)
        domains = {o.domain for o in model.opset_import}
        made.opset_import.extend(o for o in other.opset_import if o.domain not in domains)
        for node in model.graph.node:
            if node.output and self._graph.is_constant(node.output[0]):
                made.graph.node.append(node)
        for cut in self._cuts:
            if cut is not changed:
                made.graph.node.extend(model.graph.node[i] for i in cut.nodes)
                continue
            for node in graph.node:
                added = made.graph.node.add()
                added.CopyFrom(node)
                added.name = ""
                added.input[:] = [renamed(name) for name in node.input]
                added.output[:] = [renamed(name) for name in node.output]
        return made
