"""A segment's nodes in the order in which the engine's kernels compute them, if that is another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.graphs.model import key
from auditor.ports import SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays.kernel_layout import KernelLayout
from auditor.replays.rounder import CONVOLVING


def rearranged(segment: SegmentGraph) -> SegmentGraph:
    """The segment, equal in exact arithmetic, and its kernels by the names of its nodes."""
    return _averages_first(_biases_apart(segment))


def _biases_apart(segment: SegmentGraph) -> SegmentGraph:
    """A segment with the biases of convolutions added by nodes of their own, where a kernel does.

    An engine that computes every other element of a convolution and then leaves out some (OpenVINO
    moves the strides of a pointwise convolution ahead) adds the bias behind that, and so does one
    that multiplies 8-bit integers: the convolution is named by two kernels, and what it hands over
    is rounded.
    """
    by_key = Counter(key for kernel in segment.kernels for key in {*kernel.nodes})
    starts = {k for kernel in segment.kernels if kernel.type in CONVOLVING for k in kernel.nodes}
    split = [
        (index, node)
        for index, node in surgery.find(segment.model, ("Conv",))
        if len(node.input) > 2 and node.input[2] and key(node) in starts and by_key[key(node)] > 1
    ]
    if not split:
        return segment
    model = surgery.copied(segment.model)
    nodes = list(model.graph.node)
    shapes = surgery.shapes(model)
    made: dict[str, str] = {}
    for index, node in reversed(split):
        rank = len(shapes.get(node.input[1], ()))
        if not rank:
            continue
        conv, whole = nodes[index], key(node)
        bare, bias, shape = (f"{whole}/{part}" for part in ("bare", "bias", "shape"))
        sizes = helper.make_tensor(shape, TensorProto.INT64, [rank - 1], [-1] + [1] * (rank - 2))
        model.graph.initializer.append(sizes)
        add = helper.make_node("Add", [bare, bias], [whole])
        nodes[index : index + 1] = [
            helper.make_node("Reshape", [node.input[2], shape], [bias]),
            conv,
            add,
        ]
        del conv.input[2:]
        conv.output[0] = bare
        made[whole] = bare
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kernels = tuple(
        replace(kernel, nodes=tuple(made.get(name, name) for name in kernel.nodes))
        if kernel.type in CONVOLVING
        else kernel
        for kernel in segment.kernels
    )
    return replace(segment, model=model, kernels=kernels)


def _averages_first(segment: SegmentGraph) -> SegmentGraph:
    """A segment that averages before it scales and shifts, where the engine's kernels do.

    OpenVINO takes factors of channels behind a pooling once a file rounds anything to 8 bits.
    """
    if not any(True for _ in surgery.find(segment.model, ("AveragePool",))):
        return segment
    layout = KernelLayout(segment)
    moved = _scaled_later(layout, segment.kernels)
    if not moved:
        return segment
    model, names = surgery.copied(segment.model), dict[str, str]()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    inside = {index for chain in moved.values() for index in chain}
    for index, node in enumerate(nodes):
        if index in moved:
            whole, before = node.output[0], moved[index]
            names |= {key(node): f"{whole}/averaged", key(nodes[before[0]]): whole}
            first = nodes[before[-1]]
            node.input[0] = next(n for n in first.input if n not in layout.constants)
            node.output[0] = last = f"{whole}/averaged"
            model.graph.node.append(node)
            for position in reversed(before):
                step = nodes[position]
                varying = next(i for i, n in enumerate(step.input) if n not in layout.constants)
                step.input[varying] = last
                last = whole if position == before[0] else step.output[0]
                step.output[0] = last
                model.graph.node.append(step)
        elif index not in inside:
            model.graph.node.append(node)
    kernels = tuple(
        replace(
            kernel,
            nodes=tuple(names.get(n, n) for n in kernel.nodes),
            outputs=tuple(names.get(n, n) for n in kernel.outputs),
        )
        for kernel in segment.kernels
    )
    return replace(segment, model=model, kernels=kernels)


def _scaled_later(layout: KernelLayout, kernels: Sequence[Kernel]) -> dict[int, list[int]]:
    """By pooling, the nodes that scale and shift before it in kernels behind it, the last first."""
    turn = {k: i for i, kernel in enumerate(kernels) for k in kernel.nodes}
    moved: dict[int, list[int]] = {}
    for pool, node in surgery.find(layout.model, ("AveragePool",)):
        source, chain = node.input[0], list[int]()
        padded = any(surgery.attributes(node).get("pads", ()))
        while (index := layout.producer.get(source)) is not None and layout.reader(source):
            step = layout.nodes[index]
            later = turn.get(key(step), -1) > turn.get(key(node), len(turn))
            factors = [n for n in step.input if n in layout.constants]
            if not later or step.op_type not in ("Add", "Mul") or len(factors) != 1:
                break
            sizes = layout.constants[factors[0]]
            if sizes is None or set(sizes[-2:]) - {1} or (padded and step.op_type == "Add"):
                break
            chain.append(index)
            source = next(n for n in step.input if n != factors[0])
        if chain:
            moved[pool] = chain
    return moved
