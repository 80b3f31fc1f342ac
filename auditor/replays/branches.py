"""A segment without the branches that it does not take on given inputs.

What an engine makes of an ``If`` (the branch alone, where it knows the condition, with kernels of
its own) can only be replayed on the nodes inside. So the branch that the reference takes is written
out in the ``If``'s place, whatever then depends on constants alone becomes one, and the result must
give the segment's outputs bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from auditor.graphs import surgery
from auditor.graphs.segments import bodies_of, reads_of, rename
from auditor.ports import Arrays
from auditor.replays.recurrent import GATES

Run = Callable[[onnx.ModelProto, Sequence[str]], Arrays]


def inner_names(nodes: Collection[onnx.NodeProto]) -> Iterator[str]:
    """Tensors that the nodes of subgraphs make, at any depth."""
    for node in nodes:
        for body in bodies_of(node):
            yield from (name for inner in body.node for name in inner.output if name)
            yield from inner_names(body.node)


def taken(model: onnx.ModelProto, inputs: Arrays, run: Run) -> onnx.ModelProto | None:
    """A copy with the branches taken written out and constants folded.

    Args:
        model: the segment.
        inputs: its inputs.
        run: runs a model on these and gives the named outputs.

    Returns:
        None where there is no ``If`` and no recurrent layer whose weights are computed.
    """
    result = surgery.copied(model)
    changed = False
    while branching := [n for n in result.graph.node if n.op_type == "If" and not n.domain]:
        asked = {node.input[0] for node in branching}
        values = inputs | _values(result, run, sorted(asked - inputs.keys()))
        nodes = list(result.graph.node)
        used = {name for node in nodes for name in node.output}
        del result.graph.node[:]
        for node in nodes:
            if node not in branching:
                result.graph.node.append(node)
                continue
            name = "then_branch" if bool(np.all(values[node.input[0]])) else "else_branch"
            _write_out(result.graph, node, surgery.attributes(node)[name], used)
        changed = True
    if not changed and not _computed_weights(result.graph):
        return None
    _fold(result, run)
    return result


def _values(model: onnx.ModelProto, run: Run, names: Collection[str]) -> Arrays:
    """What some tensors of a model are on the segment's inputs."""
    if not names:
        return {}
    probed = surgery.copied(model)
    known = {o.name for o in probed.graph.output}
    probed.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    return run(probed, list(names))


def _write_out(
    graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto, used: set[str]
) -> None:
    """Append a branch's nodes; names that another has are marked."""
    own = {t.name for t in body.initializer} | {n for o in body.node for n in o.output if n}
    used.update(t.name for t in graph.initializer)
    renamed = {name: f"{node.output[0]}/{name}" for name in own & used}
    used |= own
    for tensor in body.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
        graph.initializer.append(tensor)
    rename(body.node, renamed)
    graph.node.extend(body.node)
    for result, output in zip(node.output, body.output, strict=True):
        if result:
            source = renamed.get(output.name, output.name)
            graph.node.append(helper.make_node("Identity", [source], [result]))


def _computed_weights(graph: onnx.GraphProto) -> bool:
    """Whether a recurrent layer's weights are made of constants by nodes."""
    derived = _derived(graph)
    layers = (node for node in graph.node if node.op_type in GATES)
    return any(name in derived for node in layers for name in node.input[1:4])


def _derived(graph: onnx.GraphProto) -> set[str]:
    """Tensors that nodes compute from constants alone."""
    constants = {t.name for t in graph.initializer}
    derived = set[str]()
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
        elif (reads := reads_of(node)) and all(n in constants or n in derived for n in reads):
            derived.update(name for name in node.output if name)
    return derived


def _fold(model: onnx.ModelProto, run: Run) -> None:
    """Turn what is computed from constants alone, and read by others, into constants."""
    graph = model.graph
    derived = _derived(graph)
    left = [n for n in graph.node if not derived.issuperset(filter(None, n.output))]
    read = {name for node in left for name in reads_of(node)}
    needed = sorted(derived & (read | {output.name for output in graph.output}))
    if not needed:
        return
    values = _values(model, run, needed)
    del graph.node[:]
    graph.node.extend(left)
    graph.initializer.extend(numpy_helper.from_array(values[n], n) for n in needed)
