"""The program that TensorRT's builder describes, and which ONNX nodes each layer came from.

Source: TensorRT documentation, "Engine Inspector".
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from auditor.records.backend import Kernel, Skipped
from backends._shared import node_key, read_by

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx


# The engine's spellings of a type ("Datatype: Float", "Format/Datatype: ... FP32 format"); one
# that contains another comes first.
_PRECISIONS = (
    *(("BFloat16", "bf16"), ("BF16", "bf16"), ("Half", "f16"), ("FP16", "f16")),
    *(("FP8", "f8"), ("FP4", "f4"), ("Float", "f32"), ("FP32", "f32")),
    *(("UInt8", "u8"), ("UINT8", "u8"), ("Int8", "i8"), ("INT8", "i8"), ("Int4", "i4")),
    *(("INT4", "i4"), ("Int32", "i32"), ("INT32", "i32"), ("Int64", "i64"), ("INT64", "i64")),
    ("Bool", "bool"),
)
_NARROW_FIRST = ("f4", "f8", "f16", "bf16", "f32")
# Operators whose FP32 products TensorRT may compute in TF32 (BuilderFlag.TF32).
_PRODUCTS = frozenset(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention", "LSTM", "GRU", "RNN")
)
# Stands for a kernel that TensorRT for RTX picks on the user's GPU, when the engine is loaded.
LATE_TACTIC = "__myelin_CASK_STUB"


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """A tensor of the engine: its internal name, its shape and its precision (``f32``)."""

    name: str
    shape: tuple[int, ...]
    precision: str


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of a built engine; ``origins`` are names of ONNX nodes, as in its metadata."""

    name: str
    type: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    tactic: str
    origins: tuple[str, ...]


_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), "
    r"Inputs: \[(?P<inputs>| ?\{.*?\})\], "
    r"(?:Constants: \[(?P<constants>| ?\{.*?\})\], )?"
    r"Outputs: \[(?P<outputs>| ?\{.*?\})\](?P<rest>.*)"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?"
    r"Dimensions: \[(?P<shape>[-\d,]*)\](?:.*?Datatype: (?P<type>[^,}]*))?.*?\}"
)
ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*(?:\[|\x1e|$))")


def parse_layers(text: str) -> tuple[EngineLayer, ...]:
    """Read the one-line-per-layer description that ends a VERBOSE build.

    Synchronisation between streams and jumps produce nothing and are left out.

    Args:
        text: the log message that starts with ``Layers:``, at ``ProfilingVerbosity.DETAILED``;
            ``EngineInspector`` returns the same (``LayerInformationFormat.ONELINE``).
    """
    found = (_LAYER.match(line) for line in text.splitlines())
    layers = tuple(
        EngineLayer(
            match["name"],
            match["type"],
            _tensors(match["inputs"]),
            _tensors(match["constants"] or ""),
            _tensors(match["outputs"]),
            _after("TacticName", match["rest"]),
            tuple(ORIGIN.findall(match["rest"])),
        )
        for match in found
        if match
    )
    return tuple(layer for layer in layers if layer.outputs)


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(
            match["name"],
            tuple(int(size) for size in match["shape"].split(",") if size),
            _precision(match["type"] or ""),
        )
        for match in _TENSOR.finditer(text)
    )


def _after(label: str, text: str) -> str:
    match = re.search(rf"{label}: ([^,]*)", text)
    return match[1].strip() if match else ""


def _precision(type_text: str) -> str:
    """``f32`` for ``Float`` or ``... FP32 format``; "" for a spelling not met before."""
    return next((name for part, name in _PRECISIONS if part in type_text), "")


class Graph:
    """What mapping engine layers back to ONNX needs to know of a model's main graph.

    Attributes:
        operators: operator of every node by its key, in graph order.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        """Index ``graph``; its weights are not needed."""
        self.operators: dict[str, str] = {}
        self._produces: dict[str, tuple[str, ...]] = {}
        self._consumers: dict[str, set[str]] = {}
        self._outputs = {output.name for output in graph.output}
        # A finished plan speaks of nodes by the names that they had in the file.
        self._named = {node.name: node_key(node) for node in graph.node if node.name}
        for node in graph.node:
            key = node_key(node)
            self.operators[key] = node.op_type
            self._produces[key] = tuple(filter(None, node.output))
            for tensor in read_by(node):
                self._consumers.setdefault(tensor, set()).add(key)

    def resolve(self, origin: str) -> str | None:
        """Key of the main graph's node that a name in the engine's metadata stands for.

        Nodes inside an If, a Loop or a function are written ``NAME | GRAPH | KEY (If)``.
        """
        outer = origin.rsplit(" | ", 1)[-1].rsplit(" (", 1)[0]
        names = (self._named.get(name, name) for name in (origin, outer))
        return next((name for name in names if name in self.operators), None)

    def nodes(self, layer: EngineLayer) -> tuple[str, ...]:
        """Keys of the nodes fused into a layer, in graph order."""
        keys = {self.resolve(origin) for origin in layer.origins}
        return tuple(key for key in self.operators if key in keys)

    def boundaries(self, layers: Sequence[EngineLayer]) -> list[tuple[str, ...]]:
        """The ONNX tensors that each layer hands to others, or to the caller.

        A node spread over several layers is finished by the last of them.
        """
        fused = [self.nodes(layer) for layer in layers]
        last = {key: index for index, keys in enumerate(fused) for key in keys}
        return [
            tuple(
                tensor
                for key in keys
                if last[key] == index
                for tensor in self._produces[key]
                if tensor in self._outputs or self._consumers.get(tensor, set()) - set(keys)
            )
            for index, keys in enumerate(fused)
        ]

    def kernels(self, layers: Sequence[EngineLayer], tf32: bool) -> tuple[Kernel, ...]:
        """The layers as records; ``tf32`` is whether the build allowed it."""
        return tuple(
            Kernel(
                name=layer.name,
                type=layer.type,
                nodes=(nodes := self.nodes(layer)),
                outputs=outputs,
                primitive="" if layer.tactic == LATE_TACTIC else layer.tactic,
                precision=self._computes_in(layer, nodes, tf32),
                output_precision=layer.outputs[0].precision,
            )
            for layer, outputs in zip(layers, self.boundaries(layers), strict=True)
        )

    def _computes_in(self, layer: EngineLayer, nodes: Iterable[str], tf32: bool) -> str:
        if "tf32" in layer.tactic:
            return "tf32"
        seen = [tensor.precision for tensor in (*layer.inputs, *layer.constants)]
        narrowest = next((name for name in _NARROW_FIRST if name in seen), next(iter(seen), ""))
        products = any(self.operators[key] in _PRODUCTS for key in nodes)
        # With TF32 allowed, FP32 tensors say nothing of the product unless the tactic does.
        if narrowest == "f32" and products and tf32 and "f32" not in layer.tactic:
            return ""
        return narrowest


def attribute(
    layers: Sequence[EngineLayer],
    boundaries: Sequence[tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, str], tuple[Skipped, ...]]:
    """Find which ONNX tensor each engine tensor holds.

    The engine names its tensors freely, so an ONNX tensor is paired with the one output of its
    layer that has as many elements; where that is not unique nothing is claimed.

    Args:
        layers: the engine's layers.
        boundaries: the ONNX tensors that each layer hands on.
        shapes: shape of each ONNX tensor; −1 where it is only known at run time.

    Returns:
        ONNX name by engine name, and the boundary tensors left out, with the reason.
    """
    written = Counter(tensor.name for layer in layers for tensor in layer.outputs)
    names: dict[str, str] = {}
    skipped = []
    for layer, tensors in zip(layers, boundaries, strict=True):
        claims = {
            tensor: [out for out in layer.outputs if _holds(out, shapes.get(tensor))]
            for tensor in tensors
        }
        rivals = Counter(out.name for outs in claims.values() for out in outs)
        for tensor, outs in claims.items():
            if len(outs) != 1 or rivals[outs[0].name] > 1:
                skipped.append(Skipped(tensor, f"no tensor of its own in layer {layer.name}"))
            elif written[outs[0].name] > 1:
                skipped.append(Skipped(tensor, f"part of the shared tensor {outs[0].name}"))
            else:
                names[outs[0].name] = tensor
    return names, tuple(skipped)


def _holds(tensor: EngineTensor, shape: tuple[int, ...] | None) -> bool:
    known = shape is not None and min((*shape, *tensor.shape), default=0) >= 0
    return not known or np.prod(tensor.shape) == np.prod(shape or ())
