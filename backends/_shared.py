"""What several backends say alike: of the machine, of errors, of nodes."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx


@functools.cache
def cpu_name() -> str:
    """The processor's own name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(error).strip().splitlines() or [repr(error)])[0][:300]


def node_key(node: onnx.NodeProto) -> str:
    """A node's key, its first named output; empty where it has none."""
    return next(filter(None, node.output), "")


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor of the enclosing graph that ``node`` reads, its subgraphs' included."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        local = {i.name for i in graph.input} | {i.name for i in graph.initializer}
        for inner in graph.node:
            yield from (name for name in read_by(inner) if name not in local)
            local.update(inner.output)
        yield from (o.name for o in graph.output if o.name not in local)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
