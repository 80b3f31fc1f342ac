from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.attribution import cause as attribution
from auditor.attribution.cause import Explanation
from auditor.noises import bf16, fp16, tf32
from auditor.ports import Array, Arrays, SegmentGraph
from auditor.records.backend import Kernel
from auditor.replays import sessions

NOISES = (bf16.NOISE, fp16.NOISE, tf32.NOISE)

MakeSegment = Callable[..., SegmentGraph]
Explain = Callable[..., Explanation]


@pytest.fixture
def make_segment() -> MakeSegment:
    """Builds a segment from nodes, as the auditor cuts them: typed inputs without shapes.

    Nodes may be in ONNX's text syntax. Inputs and outputs are, when not given, what no node makes
    and what none reads.
    """

    def make(
        nodes: str | Sequence[onnx.NodeProto],
        constants: Arrays | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        kernels: Sequence[Kernel] = (),
        opset: int = 17,
        kind: int = TensorProto.FLOAT,
    ) -> SegmentGraph:
        if isinstance(nodes, str):
            nodes = onnx.parser.parse_graph(f"g () => () {{ {nodes} }}").node
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
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )
        return SegmentGraph(model, tuple(kernels))

    return make


@pytest.fixture
def run() -> Callable[[onnx.ModelProto, Arrays], Arrays]:
    """Runs a model as the auditor does."""

    def run(model: onnx.ModelProto, feeds: Arrays) -> Arrays:
        names = [o.name for o in model.graph.output]
        return dict(zip(names, sessions.session(model, 1).run(names, feeds), strict=True))

    return run


@pytest.fixture
def explain(run: Callable[[onnx.ModelProto, Arrays], Arrays]) -> Explain:
    """Explains what a backend is said to have observed, testing rivals too."""

    def explain(
        segment: SegmentGraph, inputs: Arrays, observed: Arrays, **options: Any
    ) -> Explanation:
        options.setdefault("thorough", True)
        replayed = run(segment.model, inputs)
        return attribution.explain(segment, inputs, observed, replayed, NOISES, **options)

    return explain


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def conv() -> Callable[[Array, Array], Array]:
    """A convolution without padding, summed in double: no code shared with the surgery."""

    def conv(x: Array, w: Array) -> Array:
        size = w.shape[2:]
        windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), size, (2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, w.astype(np.float64)).astype(np.float32)

    return conv


@pytest.fixture
def diagnose(run: Callable[[onnx.ModelProto, Arrays], Arrays]) -> Explain:
    """Explains what a backend is said to have observed, with the whole catalogue."""

    def diagnose(segment: SegmentGraph, inputs: Arrays, observed: Arrays) -> Explanation:
        replayed = run(segment.model, inputs)
        catalogue = tuple(discovery.noises())
        return attribution.explain(segment, inputs, observed, replayed, catalogue, thorough=True)

    return diagnose
