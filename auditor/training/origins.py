"""Where in the training code an ONNX node comes from: its module's path, and a line of source.

PyTorch's exporters leave traces of it. The newer one (``dynamo=True``) writes the module's path
and the Python stack into each node's ``metadata_props`` (``pkg.torch.onnx.name_scopes`` and
``…stack_trace``, torch/onnx/_internal/exporter/_core.py); the older one names nodes after scopes,
``/layer1/layer1.0/conv1/Conv`` (torch/onnx/utils.py). Where the module itself was run
(``--source``), what it did says the same of every tensor that was paired with one of its values.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

import onnx

from auditor.graphs import model as models
from auditor.records.backend import Origin
from auditor.records.measured import Segment
from auditor.records.report import BackendReport

_SCOPES = "pkg.torch.onnx.name_scopes"
_STACK = "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+)')
# Frames of PyTorch itself say nothing about the model.
_TORCH = re.compile(r"[/\\](site|dist)-packages[/\\]torch[/\\]")
_LONGEST = 1 << 16  # characters of metadata that are looked at
# What a reader looks for last in a segment.
_MOVES = frozenset(("Cast", "Identity", "Reshape", "Shape", "Transpose", "Unsqueeze", "Squeeze"))


def of(proto: onnx.ModelProto) -> dict[str, Origin]:
    """What the exporter says of a model's nodes, by node key."""
    found = {}
    torch = proto.producer_name == "pytorch"
    for node in proto.graph.node:
        origin = _by_metadata(node) or (_by_name(node) if torch else None)
        if origin is not None:
            found[models.key(node)] = origin
    return found


def readers(proto: onnx.ModelProto) -> dict[str, str]:
    """By tensor, the module whose nodes alone read it, as far as the exporter says so."""
    stated = of(proto)
    found: dict[str, set[str]] = {}
    for node in proto.graph.node:
        origin = stated.get(models.key(node))
        for name in node.input:
            found.setdefault(name, set()).add(origin.module if origin else "")
    return {name: next(iter(paths)) for name, paths in found.items() if len(paths) == 1}


def merged(stated: Mapping[str, Origin], measured: Iterable[Origin]) -> dict[str, Origin]:
    """What exporters state, completed by what running the module showed.

    A pairing by value says which module computed a tensor, which an exporter that fuses a
    normalisation into a convolution does not; the module stated stays where none was seen.
    """
    result = dict(stated)
    for origin in measured:
        known = result.get(origin.node)
        if known is None:
            result[origin.node] = origin
        else:
            result[origin.node] = replace(
                known,
                module=origin.module or known.module,
                place=origin.place or known.place,
            )
    return result


def attached(
    reports: Sequence[BackendReport], origins: Mapping[str, Origin]
) -> tuple[BackendReport, ...]:
    """The reports with the modules of every segment."""
    return tuple(
        replace(report, segments=tuple(_attached(s, origins) for s in report.segments))
        for report in reports
    )


def place_of(stack: str) -> str | None:
    """``resnet.py:104``: the innermost frame of a Python stack that is not PyTorch's own."""
    frames = [m for m in _FRAME.finditer(stack[-_LONGEST:]) if not _TORCH.search(m["file"])]
    return f"{PurePath(frames[-1]['file']).name}:{frames[-1]['line']}" if frames else None


def _attached(segment: Segment, origins: Mapping[str, Origin]) -> Segment:
    pairs = list(zip(segment.node_keys, segment.op_types, strict=True))
    pairs.sort(key=lambda pair: pair[1] in _MOVES)
    words = [str(origins[key]) for key, _ in pairs if key in origins]
    return replace(segment, modules=tuple(dict.fromkeys(word for word in words if word)))


def _by_metadata(node: onnx.NodeProto) -> Origin | None:
    given = {p.key: p.value for p in node.metadata_props if p.key in (_SCOPES, _STACK)}
    if not given:
        return None
    return Origin(
        models.key(node), _module(given.get(_SCOPES, "")), place_of(given.get(_STACK, ""))
    )


def _module(scopes: str) -> str:
    """The module of a list such as ``['', 'layer1', 'layer1.0', 'conv2d']``: the last is the op."""
    try:
        path = ast.literal_eval(scopes) if len(scopes) <= _LONGEST else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
    if not isinstance(path, list) or len(path) < 2 or not all(isinstance(p, str) for p in path):
        return ""
    return str(path[-2])


def _by_name(node: onnx.NodeProto) -> Origin | None:
    """The module in ``/layer1/layer1.0/conv1/Conv``; members of a container repeat its name."""
    if not node.name.startswith("/"):
        return None
    path: list[str] = []
    for part in node.name.split("/")[1:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return Origin(models.key(node), ".".join(path), None)
