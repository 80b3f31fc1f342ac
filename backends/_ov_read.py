"""How OpenVINO reads a model file, and what it says where it cannot."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auditor.errors import BackendError
from auditor.records.backend import BuildRequest
from backends._ov_session import reason_of


def engine() -> Any:
    """Import openvino without its model converter, which nothing here uses.

    The converter brings openvino_telemetry with it and takes a third of the import's time;
    openvino's own ``__init__`` goes on without it.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    converter = "openvino.tools.ovc"
    sys.modules[converter] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules[converter]
    return openvino


def onnx_names(path: Path) -> tuple[list[str], list[str], dict[str, str], dict[str, str]]:
    """Input names, output names, and for each tensor the key of the node that makes it.

    Those that nodes of subgraphs make come apart, last, with the names of the nodes too.
    """
    from auditor.graphs import weights

    graph = weights.read(path).graph
    inputs = [i.name for i in graph.input]
    inner: dict[str, str] = {}

    def named(nodes: Any) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in nodes:
            names = [name for name in node.output if name]
            found |= dict.fromkeys(names, names[0]) if names else {}
            for body in (a.g for a in node.attribute if a.HasField("g")):
                inner.update(named(body.node))
                inner.update({n.name: n.output[0] for n in body.node if n.name and n.output})
        return found

    nodes = {name: name for name in inputs} | named(graph.node)
    return inputs, [o.name for o in graph.output], nodes, inner


# The two ways in which OpenVINO's ONNX front end lists what it cannot convert.
_UNCONVERTED = re.compile(
    r"(?:No conversion rule found for operations?|Conversion is failed for): (.+)"
)

# … and what the first of its translators said that gave up, the reason in the last line.
_SAID = re.compile(r"^-- .+ with a message:\n(.+?)\n\n", re.MULTILINE | re.DOTALL)
_TOLD = 300  # characters of it at most


def require_same(model: Any, inputs: Sequence[str], outputs: Sequence[str], artifact: Path) -> None:
    """Refuse a file that was not made of the ONNX model.

    Raises:
        BackendError: an input or an output is missing, or stands elsewhere.
    """
    for what, ports, names in (
        ("input", model.inputs, inputs),
        ("output", model.outputs, outputs),
    ):
        for position, name in enumerate(names):
            if position >= len(ports) or name not in ports[position].get_names():
                has = ", ".join(min(port.get_names(), default="?") for port in ports)
                raise BackendError(
                    f"{artifact.name} has no {what} `{name}` at place {position + 1}; its {what}s: "
                    f"{has}",
                    "Convert the file anew from this ONNX model.",
                )


def stored(model: Any, artifact: Path) -> str:
    """How the file stores its weights, as a sentence."""
    kinds: dict[str, int] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type().get_type_name()
            if kind.startswith(("f", "bf")) or kind in ("i8", "u8", "i4", "u4"):
                kinds[kind] = kinds.get(kind, 0) + 1
    said = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    return f"{artifact.name} was loaded instead of compiling the ONNX file; its constants: {said}."


def read(core: Any, request: BuildRequest, notes: list[str] | None = None) -> Any:
    """The model as OpenVINO reads it, at the request's shapes; ``notes`` gets what is to be said.

    Some models convert only where the shapes are known from the start: what depends on them, an If
    for instance, has no rank before.
    """
    shapes = request.shapes if request.dynamic and not request.open else {}
    try:
        model = core.read_model(request.artifact or request.model_path)
        names = {name for port in model.inputs for name in port.get_names()}
        if shapes:
            model.reshape({n: list(s) for n, s in shapes.items() if n in names})
        return model
    except RuntimeError as error:
        if shapes and request.artifact is None:
            with contextlib.suppress(Exception):  # the front end's errors have no other base
                model = _read_at(request.model_path, shapes)
                if notes is not None:
                    notes.append(
                        "OpenVINO converts this model only with the shapes of its inputs given "
                        "beforehand, as openvino.convert_model(..., input=...) does."
                    )
                return model
        if match := _UNCONVERTED.search(str(error)):
            raise BackendError(
                f"OpenVINO has no conversion for {match[1].strip()} as it is used here"
                + _said(str(error)),
                "Export the model without it, or rewrite it with standard operators.",
            ) from error
        raise BackendError(f"OpenVINO cannot read the model: {reason_of(error)}") from error


def _said(error: str) -> str:
    """Why the first operator that failed did, behind a colon; nothing if that is not said."""
    found = _SAID.search(error)
    last = found[1].strip().splitlines()[-1].strip() if found else ""
    return f": {last[:_TOLD]}" if last else ""


def _read_at(path: Path, shapes: Mapping[str, Sequence[int]]) -> Any:
    """The model converted at these shapes of its inputs; raises what the front end does."""
    ov = engine()
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    model = frontend.load(str(path))
    for place in model.get_inputs():
        name = next((n for n in place.get_names() if n in shapes), None)
        if name is not None:
            model.set_partial_shape(place, ov.PartialShape(list(shapes[name])))
    return frontend.convert(model)
