"""Which tensor of the candidate model corresponds to which tensor of the reference model."""

from __future__ import annotations

import difflib

from auditor.graphs.segments import Graph
from auditor.replays import qdq


def match(reference: Graph, candidate: Graph) -> dict[str, str]:
    """Map the candidate's tensors to the reference's, by name and then by place in the graph.

    Equal names correspond. Of what is left, nodes are aligned as sequences of operator types
    (longest matching blocks, Ratcliff and Obershelp) and their outputs paired by position.
    Graph inputs and outputs that differ in name correspond by position. What an Identity gives a
    name of the reference's is that tensor, too. Names that a quantiser
    moved are moved back (``auditor.replays.qdq``).

    Returns:
        Candidate tensor name → reference tensor name; what has no counterpart is left out.
    """
    known = _tensors(reference)
    mapping = {name: name for name in _tensors(candidate) if name in known}
    if candidate is not reference:
        mapping |= qdq.original_names(candidate.proto.graph, reference.proto.graph)
        for node in candidate.nodes:  # which engines leave out, with the name that it gives
            if node.op_type == "Identity" and node.output[0] in mapping:
                mapping.setdefault(node.input[0], mapping[node.output[0]])
    if len(mapping) == len(known):
        return mapping
    pairs = [
        *zip(candidate.inputs, reference.inputs, strict=False),
        *zip(candidate.outputs, reference.outputs, strict=False),
        *_aligned(reference, candidate),
    ]
    taken = set(mapping.values())
    for theirs, ours in pairs:
        if theirs not in mapping and ours not in taken:
            mapping[theirs] = ours
            taken.add(ours)
    return mapping


def _aligned(reference: Graph, candidate: Graph) -> list[tuple[str, str]]:
    blocks = difflib.SequenceMatcher(
        None,
        [n.op_type for n in candidate.nodes],
        [n.op_type for n in reference.nodes],
        autojunk=False,
    ).get_matching_blocks()
    return [
        (theirs, ours)
        for block in blocks
        for i in range(block.size)
        for theirs, ours in zip(
            candidate.nodes[block.a + i].output, reference.nodes[block.b + i].output, strict=False
        )
        if theirs and ours
    ]


def _tensors(graph: Graph) -> set[str]:
    # Outputs too: one that is a constant is an output of the compiled program all the same.
    return {*graph.inputs, *graph.producer, *graph.outputs}
