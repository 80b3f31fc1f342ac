"""A segment whose choices are made on the tensors that were observed, whatever else is moved.

What rounding can do in a segment is measured by moving its inputs in their last bit. But what a
comparison, a rounding to integers or a search for the largest value decides on a tensor *as it was
observed* is the same in every runtime, and bfloat16 numbers lie on thresholds and tie all the time:
moved inputs would turn choices that no rounding turns, and hide every fault behind them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.graphs.segments import bodies_of
from auditor.ports import Array

# Operators that hand on values they were given, unchanged.
_PASSING = frozenset(
    {
        *("Abs", "Clip", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements"),
        *("GatherND", "GlobalMaxPool", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad"),
        *("ReduceMax", "ReduceMin", "Relu", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze"),
        *("Tile", "TopK", "Transpose", "Unsqueeze", "Where"),
    }
)
# Operators that decide: with real results (the rest of a division is exact), and with integers or
# booleans.
_ROUNDING = frozenset({"Ceil", "Floor", "Hardmax", "Mod", "Round", "Sign"})
_DECIDING = frozenset(
    {
        *("ArgMax", "ArgMin", "Cast", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN"),
        *("Less", "LessOrEqual", "NonZero"),
    }
)
_SCALING = ("QuantizeLinear", "DequantizeLinear")
OBSERVED = "/observed"


def decided(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy with one more input ``NAME/observed`` for each real input that decisions are made on.

    None where no decision rests on the segment's inputs by way of operators that compute nothing.
    """
    kinds = surgery.types(model)
    made: dict[str, str] = {t.name: t.name for t in model.graph.initializer}
    made |= {
        v.name: v.name + OBSERVED * (kinds.get(v.name) not in surgery.EXACT)
        for v in model.graph.input
    }
    nodes: list[onnx.NodeProto] = []
    decisions = False
    constants = surgery.constants(model)
    for node in model.graph.node:
        exact = {o for o in node.output if o and kinds.get(o) in surgery.EXACT}
        if not _passes(node, exact, kinds, constants) or not all(
            n in made for n in node.input if n
        ):
            nodes.append(node)
            continue
        observed = _copied(node, {n: made[n] for n in node.input if n}, node.output)
        moved = [n for n in node.input if n and made[n] != n]
        real = [o for o in node.output if o and o not in exact]
        if node.op_type in _ROUNDING:
            exact, real = set(node.output), []
        decisions |= bool(moved and exact)
        if moved and real:
            nodes.append(_copied(node, {}, [o + "/moved" * (o in exact) for o in node.output]))
            outputs = [o + OBSERVED * (o in real) for o in node.output]
            observed = _copied(observed, {}, outputs)
            made |= {o: o + OBSERVED for o in real}
        else:
            made |= {o: o for o in real}
        made |= {o: o for o in exact}
        nodes.append(observed)
    if not decisions:
        return None
    result = surgery.copied(model)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    for value in model.graph.input:
        if made[value.name] != value.name:
            result.graph.input.add().CopyFrom(value)
            result.graph.input[-1].name = made[value.name]
    return result


def untouched(model: onnx.ModelProto) -> frozenset[str]:
    """Tensors that are the same in every runtime: inputs and constants, passed on or decided on."""
    kinds, constants = surgery.types(model), surgery.constants(model)
    known = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    for node in model.graph.node:
        exact = {o for o in node.output if o and kinds.get(o) in surgery.EXACT}
        if _passes(node, exact, kinds, constants) and known.issuperset(filter(None, node.input)):
            known.update(node.output)
    return frozenset(known)


def _passes(
    node: onnx.NodeProto, exact: set[str], kinds: dict[str, int], constants: dict[str, Array]
) -> bool:
    """Whether a node computes nothing that a runtime could round."""
    if node.domain not in ("", "ai.onnx") or bodies_of(node):
        return False
    if node.op_type in _SCALING:
        return node.input[1] in constants and is_power_of_two(constants[node.input[1]])
    if node.op_type in _DECIDING:
        return bool(exact)  # a Cast between real types rounds
    names = (*node.input, *node.output)
    whole = all(kinds.get(n) in surgery.EXACT for n in names if n)
    return whole or node.op_type in _PASSING or node.op_type in _ROUNDING


def is_power_of_two(scale: Array) -> bool:
    """Whether dividing by a scale rounds nothing."""
    return scale.dtype.kind == "f" and bool((np.frexp(scale)[0] == 0.5).all())


def _copied(node: onnx.NodeProto, reads: dict[str, str], outputs: Iterable[str]) -> onnx.NodeProto:
    result = surgery.copied(node)
    result.name = ""  # or two would share one
    result.input[:] = [reads.get(n, n) for n in node.input]
    result.output[:] = outputs
    return result
