"""Which nodes of a segment one kernel computes, as the engine says or as its graph shows."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.graphs.model import key
from auditor.graphs.segments import bodies_of
from auditor.ports import Array, SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays.portions import PRODUCTS
from auditor.replays.quantised import QuantisedLayout

# Operators that only move values.
MOVES = {
    *("Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements"),
    *("GatherND", "Identity", "Pad", "Reshape", "ReverseSequence", "Slice", "SpaceToDepth"),
    *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
# How engines write the formats in which a kernel's tensors can be narrower than float32.
NARROW = frozenset({"bf16", "bfloat16", "f16", "fp16", "float16", "half"})
# How they write that a kernel reads 8-bit integers.
INTEGERS = frozenset({"i8", "int8", "s8", "u8", "uint8"})
# Kernel types that stand for tensors rather than work.
_NOT_COMPUTING = {"Const", "Constant", "Input", "Output", "Parameter", "Reorder", "Result"}

Scope = Literal["kernel", "operator", "segment"]


@dataclass(slots=True)
class Group:
    """One kernel: what the engine says about its edges."""

    kernel: Kernel | None
    nodes: list[int] = field(default_factory=list)


class KernelLayout(QuantisedLayout):
    """A segment, and which of its nodes one kernel computes, whatever format it rounds to."""

    def __init__(self, segment: SegmentGraph, alone: Set[str] = frozenset()) -> None:
        """``alone`` are tensors that kernels of their own write."""
        super().__init__(segment.model, segment.weights)
        self.alone = alone
        self.constants: dict[str, tuple[int, ...] | None] = {  # with their shapes where known
            t.name: tuple(t.dims) for t in segment.model.graph.initializer
        }
        self.derived = set[int]()  # nodes computed from constants alone
        for index, node in enumerate(self.nodes):
            if all(n in self.constants for n in node.input if n) and not bodies_of(node):
                self.derived.add(index)
                self.constants.update((o, _constant_shape(node)) for o in node.output)
        if any(self.constants[o] is None for i in self.derived for o in self.nodes[i].output):
            shapes = surgery.shapes(segment.model)
            self.constants.update((n, shapes[n]) for n in self.constants if n in shapes)
        types = surgery.types(segment.model)
        self.floats = {n for n, t in types.items() if t == TensorProto.FLOAT}
        self.halves = {n for n, t in types.items() if t == TensorProto.FLOAT16}
        self.kernels = tuple(k for k in segment.kernels if k.nodes and k.type not in _NOT_COMPUTING)
        self.reports = any(k.precision for k in self.kernels)
        self.reduced = stated(self.kernels, NARROW)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors whose whole shape is known."""
        return surgery.shapes(self.model)

    @cached_property
    def values(self) -> dict[str, Array]:
        """The constants with few values."""
        return surgery.constants(self.model)

    def filled(self, name: str, number: float) -> bool:
        """Whether a constant is one number throughout."""
        value = self.constant(name)
        return value is not None and bool(np.all(value == number))

    def groups(self, scope: Scope) -> list[Group]:
        """The group of every node, by node index."""
        if scope == "segment":
            return [Group(None, list(range(len(self.nodes))))] * len(self.nodes)
        if scope == "operator":
            return [Group(None, [i]) for i in range(len(self.nodes))]
        owner: dict[str, Group] = {}
        # The last one writes the tensor; but what two kernels compute, each for itself, is here the
        # work of the one that leads to this segment's outputs.
        for kernel in sorted(self.kernels, key=lambda k: not self.outputs.isdisjoint(k.nodes)):
            group = Group(kernel)
            owner.update(dict.fromkeys(kernel.nodes, group))
        found = [owner.get(key(node)) for node in self.nodes]
        if any(kernel.outputs for kernel in self.kernels):
            self._continue(found)
        for index in reversed(range(len(self.nodes))):  # engines name the last node they fused
            if found[index] is None:
                readers = (i for o in self.nodes[index].output for i in self.readers.get(o, ()))
                found[index] = next((found[i] for i in readers if found[i] is not None), None)
        for index, node in enumerate(self.nodes):
            if found[index] is None:
                sources = (self.producer.get(name) for name in node.input)
                found[index] = next((found[i] for i in sources if i is not None), None)
        result = [group or Group(None) for group in found]
        for index, node in enumerate(self.nodes):
            if key(node) in self.alone:
                result[index] = Group(result[index].kernel)
        self._join_moves(result)
        for index, group in enumerate(result):
            group.nodes.append(index)
        return result

    def _join_moves(self, groups: list[Group]) -> None:
        """Give a kernel the nodes that only move a value between two of its own nodes."""
        inside: dict[int, set[int]] = {}
        for index, group in enumerate(groups):
            inside.setdefault(id(group), set()).add(index)
        for index, group in enumerate(list(groups)):
            for name in self.nodes[index].input:
                moves = self.moves(name, inside[id(group)])
                source = self.producer.get(self.nodes[moves[-1]].input[0]) if moves else None
                if source is not None and groups[source] is group:
                    for move in moves:
                        groups[move] = group

    def _continue(self, found: list[Group | None]) -> None:
        """Give a kernel that writes no tensor of the model the nodes behind it that none names.

        It ends before a product, with which another kernel begins.
        """
        for index, node in enumerate(self.nodes):
            free = found[index] is None and node.op_type not in PRODUCTS | {"Einsum"}
            for name in node.input if free else ():
                source = self.producer.get(name)
                group = None if source is None else found[source]
                if group and group.kernel and not group.kernel.outputs:
                    found[index] = group

    def moves(self, name: str, readers: Set[int] = frozenset()) -> list[int]:
        """The nodes that only moved values on their way to ``name``; last first.

        For one reader of each, or for some of ``readers`` and nothing else.
        """
        moves: list[int] = []
        while (
            (index := self.producer.get(name)) is not None
            and self.nodes[index].op_type in MOVES
            and (self.reader(name) is not None or self._read_by(name, readers))
        ):
            moves.append(index)
            name = self.nodes[index].input[0]
        return moves

    def _read_by(self, tensor: str, readers: Set[int]) -> bool:
        return tensor not in self.outputs and readers >= set(self.readers.get(tensor, ()))


def stated(kernels: Sequence[Kernel], names: frozenset[str]) -> bool:
    """Whether an engine says that one of these kernels computes or writes in a format."""
    return any(k.precision in names or k.output_precision in names for k in kernels)


def _constant_shape(node: onnx.NodeProto) -> tuple[int, ...] | None:
    """Shape of a Constant node's value; None for other nodes and where it is not stated."""
    if node.op_type != "Constant":
        return None
    attribute = node.attribute[0]
    if attribute.HasField("t"):
        return tuple(attribute.t.dims)
    return () if attribute.name == "value_float" else None
