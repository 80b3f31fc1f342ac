"""Segments of a few nodes, and what the catalogue says of what was planted in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.attribution.explainer import Explainer, Explanation
from auditor.decomposition.divergence import Local
from auditor.noises import bf16, fp16, tf32
from auditor.noises._cause import Cause
from auditor.ports import Array, Arrays, Noise, SegmentGraph, Variant
from auditor.records.backend import Kernel
from auditor.replays import sessions
from tests.helpers import nodes_of

NOISES = (bf16.NOISE, fp16.NOISE, tf32.NOISE)


def make_segment(
    nodes: str | Sequence[onnx.NodeProto],
    constants: Arrays | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    kernels: Sequence[Kernel] = (),
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> SegmentGraph:
    """A segment of nodes, as the auditor cuts them: typed inputs without shapes.

    Args:
        nodes: may be in ONNX's text syntax.
        constants: initialisers by name.
        inputs: when not given, what no node makes.
        outputs: when not given, what no node reads.
        kernels: what an engine says that it ran.
        opset: of the standard operators.
        kind: element type of the inputs.
    """
    if isinstance(nodes, str):
        nodes = nodes_of(nodes)
    constants = constants or {}
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    made = dict.fromkeys(name for node in nodes for name in node.output if name)
    inputs = inputs or [n for n in read if n not in made and n not in constants]
    outputs = outputs or [n for n in made if n not in read]
    for index, node in enumerate(nodes):
        node.name = node.name or f"node {index}"  # as exporters name them
    graph = helper.make_graph(
        nodes,
        "s0",
        [helper.make_tensor_value_info(n, kind, None) for n in inputs],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return SegmentGraph(model, tuple(kernels))


def run(model: onnx.ModelProto, feeds: Arrays) -> Arrays:
    """A model's outputs by name, as the auditor runs it."""
    names = [o.name for o in model.graph.output]
    return dict(zip(names, sessions.session(model, 1).run(names, feeds), strict=True))


def explain(
    segment: SegmentGraph,
    inputs: Arrays,
    observed: Arrays,
    noises: Sequence[Noise] = NOISES,
    *,
    thorough: bool = True,
    floor: float = math.inf,
    **settings: Any,
) -> Explanation:
    """What noises say of what a backend is said to have observed, rivals too.

    ``settings`` are those of ``Explainer``.
    """
    local = Local(inputs, observed, run(segment.model, inputs))
    return Explainer(noises, **settings).explain(segment, local, thorough=thorough, floor=floor)


def made_up(id: str, variants: Callable[[SegmentGraph], Iterable[Variant]], **stated: Any) -> Cause:
    """A cause that exists in a test only; ``stated``: what it states beside its words."""
    words = dict.fromkeys(("type", "title", "cause", "applies", "source", "advice"), "-")
    return Cause(id=id, variants=variants, **words, **stated)


def diagnose(segment: SegmentGraph, inputs: Arrays, observed: Arrays) -> Explanation:
    """The same of the whole catalogue."""
    return explain(segment, inputs, observed, tuple(discovery.noises()))


def explained(
    noises: Sequence[Noise], segment: SegmentGraph, feeds: Arrays, observed: Array
) -> Explanation:
    """What ``noises`` say of a segment whose output ``y`` a plant changed."""
    assert not np.array_equal(run(segment.model, feeds)["y"], observed), "the plant changed nothing"
    return explain(segment, feeds, {"y": observed}, noises)


def conv(x: Array, w: Array) -> Array:
    """A convolution without padding, summed in double: no code shared with the surgery."""
    size = w.shape[2:]
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), size, (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w.astype(np.float64)).astype(np.float32)
