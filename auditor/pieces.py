"""Splits a model into pieces that are compiled apart, so that some layers get other options."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from auditor.graphs.segments import Cut, Graph


@dataclass(frozen=True, slots=True)
class Piece:
    """Nodes that are compiled together; ``chosen``: whether they are of the chosen ones."""

    cut: Cut
    chosen: bool


def split(graph: Graph, chosen: Collection[int]) -> tuple[Piece, ...]:
    """As few pieces as an alternation of chosen and other nodes takes, in the order to run them.

    Args:
        graph: the model's graph.
        chosen: indices of nodes.
    """
    live = [i for i, n in enumerate(graph.nodes) if not all(map(graph.is_constant, n.output))]
    left = dict.fromkeys(live)
    known = set(graph.inputs)
    groups: list[tuple[list[int], bool]] = []
    kind = False
    while left:
        group: list[int] = []
        for index in list(left):  # in graph order, so one pass sees all that become ready
            reads = graph.reads[index]
            ready = all(graph.is_constant(n) or n in known for n in reads)
            if (index in chosen) == kind and ready:
                group.append(index)
                known.update(graph.nodes[index].output)
                del left[index]
        if group:
            groups.append((group, kind))
        kind = not kind
    return tuple(
        Piece(graph.joined(f"p{number}", nodes), kind)
        for number, (nodes, kind) in enumerate(groups)
    )
