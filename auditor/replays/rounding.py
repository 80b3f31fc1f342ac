"""Rounds chosen tensors of a segment to a narrower float format, inside its ONNX graph.

A narrow-precision kernel differs from the FP32 reference only in *where* values are rounded: as
they enter, in the weights and biases, between operators, in the running sums, as they leave. A
``Sites`` says where; ``rounded`` inserts the roundings, and all arithmetic stays FP32. That is
how the hardware itself works: products of two 8- or 11-bit significands are exact in FP32, and
matrix units accumulate in FP32 (Intel SDM, TDPBF16PS; NVIDIA PTX ISA, mma).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.graphs.segments import bodies_of
from auditor.ports import SegmentGraph, Variant
from auditor.replays import algebra, premultiplied, steps
from auditor.replays.kernel_layout import KernelLayout, stated
from auditor.replays.kernels import rearranged
from auditor.replays.rounder import Rounder, Sites
from auditor.replays.writer import Format

_FLOAT32 = Format("float32", frozenset(), TensorProto.FLOAT, 6, 24)
_IN_ORDER = Sites("sums of products in order", "operator", sums=True)


def variants(segment: SegmentGraph, to: Format, sites: Sequence[Sites]) -> Iterator[Variant]:
    """The segment rounded at each of ``sites`` in turn, without repeating equal graphs.

    Sites that speak of the engine's kernels are left out where the engine names none, those
    that take the whole segment for one kernel where it does. Narrow running sums cost much to
    replay and are tested only where the engine does not report another precision.
    """
    segment = rearranged(segment)
    plain = KernelLayout(segment)
    spread = algebra.distributed(segment.model)
    seen: list[list[onnx.NodeProto]] = []
    for where in sites:
        layout = plain
        if where.distributed:
            if spread is None:
                continue
            layout = KernelLayout(replace(segment, model=spread[0]), alone=spread[1])
        if where.scope == ("segment" if layout.kernels else "kernel"):
            continue
        if where.sums and layout.reports and not stated(layout.kernels, to.stated):
            continue
        model = rounded(layout, to, where)
        nodes = list(model.graph.node)
        if len(nodes) > len(segment.model.graph.node) and nodes not in seen:
            seen.append(nodes)
            yield Variant(where.name, model)


def in_order(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A segment that adds up its sums of products one after another; None where it has none.

    It has every product and every running sum as ``Sites.sums`` orders them, all in float32.
    """
    layout = KernelLayout(SegmentGraph(model, ()))
    result = rounded(layout, _FLOAT32, _IN_ORDER)
    return result if len(result.graph.node) > len(model.graph.node) else None


def rounded(layout: KernelLayout, to: Format, sites: Sites) -> onnx.ModelProto:
    """The segment with its values rounded at ``sites``."""
    rounder = Rounder(layout, to, sites)
    if sites.scope == "kernel" and sites.scales != "product":
        premultiplied.move_scales(rounder)
    # Constants first: a factor moved to an earlier kernel is needed before its own place.
    rounder.nodes += [layout.nodes[index] for index in sorted(layout.derived)]
    for index in range(len(layout.nodes)):
        if index not in layout.derived and index not in rounder.replaced:
            _emit(rounder, index)
    source = layout.model
    model = onnx.ModelProto(ir_version=source.ir_version, opset_import=source.opset_import)
    model.functions.extend(source.functions)
    model.graph.name = source.graph.name
    model.graph.input.extend(source.graph.input)
    model.graph.output.extend(source.graph.output)
    model.graph.initializer.extend(source.graph.initializer)
    model.graph.initializer.extend(rounder.initializers)
    model.graph.sparse_initializer.extend(source.graph.sparse_initializer)
    model.graph.node.extend(rounder.nodes)
    return model


def _emit(rounder: Rounder, index: int) -> None:
    """Write one node, as its kernel computes it."""
    group = rounder.groups[index]
    node = surgery.copied(rounder.at.nodes[index])
    if bodies_of(node) or not rounder.applies(group):
        for position, name in enumerate(node.input):
            if rounder.inside(name, group):
                node.input[position] = rounder.raw.get(name, name)
        rounder.nodes.append(node)
    elif not steps.written(rounder, node, group):
        for part in premultiplied.parts(rounder, index, node, group):
            rounder.finish(part, group)
