"""Forms of a cause in which operators run another function body."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import onnx

from auditor.graphs import surgery
from auditor.ports import Variant


def rewritten(
    model: onnx.ModelProto,
    name: str,
    nodes: Iterable[tuple[int, onnx.NodeProto]],
    body: Callable[[onnx.NodeProto], str | None],
) -> Iterator[Variant]:
    """One variant with the bodies that nodes have in their place; none where no node has one.

    Args:
        model: the segment.
        name: the form's.
        nodes: which of its nodes, with their positions.
        body: the function body of a node (``auditor.graphs.surgery``), None or "" for no other.
    """
    if bodies := {index: text for index, node in nodes if (text := body(node))}:
        yield Variant(name, surgery.substituted(model, bodies))
