"""Copies of a segment in which some nodes compute something else: what noises are made of.

What a node computes instead is written as an ONNX function body in ONNX's text syntax, for
example ``(x) => (y) { y = Identity(x) }``, in the operator set of the segment. ``$T`` stands
for the element type of the tensor that the first input or output has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

P = TypeVar("P", onnx.ModelProto, onnx.NodeProto)

# Operators that take a tensor of any shape and give one of the same shape.
UNARY = frozenset(
    {
        *("Abs", "Cast", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu"),
        *("HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish"),
        *("Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus"),
        *("Softsign", "Sqrt", "Tanh", "ThresholdedRelu"),
    }
)
DOMAIN = "auditor"
SMALL = 64  # elements of a constant that may say a shape or an option
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
EXACT = frozenset(
    {
        *(TensorProto.BOOL, TensorProto.STRING, TensorProto.INT64, TensorProto.UINT64),
        *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32),
        *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32),
        *(TensorProto.INT4, TensorProto.UINT4),
    }
)
_STANDARD = ("", "ai.onnx")
# ONNX Runtime has these for integers that ONNX's own have in later operator sets only
# (ContribOperators.md); they mean the same.
_QUANTISERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def find(model: onnx.ModelProto, op_types: Iterable[str]) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Position and node of every standard operator of these types, in graph order."""
    for index, node in enumerate(model.graph.node):
        if node.op_type in op_types and (node.domain in _STANDARD or node.op_type in _QUANTISERS):
            yield index, node


def takes_any_shape(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether the segment is sure to run when a node's outputs get other shapes."""
    names = set(node.output)
    for reader in model.graph.node:
        if names.isdisjoint(reader.input):
            continue
        if reader.op_type not in UNARY:
            return False
        names.update(reader.output)
    return True


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name, strings decoded."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {n: v.decode() if isinstance(v, bytes) else v for n, v in given.items()}


def set_attributes(node: onnx.NodeProto, **values: Any) -> None:
    """Set a node's attributes, or remove those that are None."""
    kept = [a for a in node.attribute if a.name not in values]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(
        helper.make_attribute(name, value) for name, value in values.items() if value is not None
    )


def options(node: onnx.NodeProto, **changed: Any) -> str:
    """A node's attributes in ONNX's text syntax, some of them changed or, if None, left out."""
    values = {k: v for k, v in (attributes(node) | changed).items() if v is not None}
    written = (f"{k} = {json.dumps(v)}" for k, v in values.items())
    return f"<{', '.join(written)}>" if values else ""


def number(name: str, value: float) -> str:
    """A constant of type ``$T`` in ONNX's text syntax."""
    return (
        f"{name}_c = Constant <value = float {{{value!r}}}> () {name} = Cast <to = $T> ({name}_c)"
    )


def reduction(
    target: str, op_type: str, of: str, axes: list[int], version: int, *, keepdims: int = 1
) -> str:
    """A reduction over given axes in ONNX's text syntax, at any operator set from 7 on."""
    if version >= (13 if op_type == "ReduceSum" else 18):
        listed = f"int64[{len(axes)}] {{{', '.join(map(str, axes))}}}"
        return (
            f"{target}_axes = Constant <value = {listed}> () "
            f"{target} = {op_type} <keepdims = {keepdims}> ({of}, {target}_axes)"
        )
    return f"{target} = {op_type} <axes = {axes}, keepdims = {keepdims}> ({of})"


def opset(model: onnx.ModelProto) -> int:
    """Version of the default ONNX operator set that a model uses."""
    return next((o.version for o in model.opset_import if o.domain in _STANDARD), 1)


def defined(operator: str, opset: int) -> bool:
    """Whether ONNX has an operator in a version of its operator set."""
    try:
        onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Initialisers and Constant nodes of at most SMALL elements, by name."""
    found = {t.name: t for t in model.graph.initializer if np.prod(t.dims) <= SMALL}
    values = {name: numpy_helper.to_array(t) for name, t in found.items()}
    for _, node in find(model, ("Constant",)):
        for name, value in attributes(node).items():
            if name == "value" and np.prod(value.dims) <= SMALL:
                values[node.output[0]] = numpy_helper.to_array(value)
            elif name in ("value_float", "value_floats"):
                values[node.output[0]] = np.asarray(value, np.float32)
            elif name in ("value_int", "value_ints"):
                values[node.output[0]] = np.asarray(value, np.int64)
    return values


# Operators whose result is like what they read first.
_LIKE_INPUT = {
    *("GroupNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    *("SkipLayerNormalization", "BiasGelu", "FastGelu", "QuickGelu"),
}


def types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor whose type can be inferred."""
    return dict(_inferred(model)[0])


def is_exact(model: onnx.ModelProto) -> bool:
    """Whether all of a segment's tensors are known to be integers, booleans or texts."""
    kinds = types(model)
    made = {name for node in model.graph.node for name in node.output if name}
    return made <= kinds.keys() and set(kinds.values()) <= EXACT


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor whose whole shape can be inferred."""
    return dict(_inferred(model)[1])


# Bytes of a model up to which all of it is what its shapes are looked up by.
_SMALL_MODEL = 1 << 18
_Inferred = tuple[dict[str, int], dict[str, tuple[int, ...]]]


def _inferred(model: onnx.ModelProto) -> _Inferred:
    """Types and shapes, to be read only: of one segment they are asked for a dozen times."""
    small = model.ByteSize() <= _SMALL_MODEL  # what has no weights is encoded at once
    return _inferred_of((model if small else _light(model)).SerializeToString())


@lru_cache(16)
def _inferred_of(model: bytes) -> _Inferred:
    light = _light(onnx.ModelProto.FromString(model))
    graph = onnx.shape_inference.infer_shapes(light.SerializeToString(), data_prop=True).graph
    kinds: dict[str, int] = {}
    whole: dict[str, tuple[int, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type != onnx.TensorProto.UNDEFINED:  # outputs of custom operators have none
            kinds[value.name] = kind.elem_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            whole[value.name] = tuple(d.dim_value for d in kind.shape.dim)
    return kinds, whole


def _light(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of which ONNX infers as much as of this one, without a copy of the weights.

    They become inputs; small ones, which shapes are made of, stay.
    """
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.functions.extend(model.functions)
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    given = {value.name for value in model.graph.input}
    for t in model.graph.initializer:
        if t.name not in given:
            light.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
        if np.prod(t.dims) <= SMALL:
            light.graph.initializer.append(t)
    light.graph.output.extend(model.graph.output)
    late = {"LayerNormalization"}  # that ONNX Runtime has in every operator set
    unknown = _LIKE_INPUT | {name for name in late if not defined(name, opset(model))}
    for node in light.graph.node:
        if node.op_type in unknown:  # of which ONNX infers nothing
            node.op_type, node.domain = "Identity", ""
            del node.input[1:], node.output[1:], node.attribute[:]
        if node.op_type in _QUANTISERS:
            node.domain = ""
    return light


def upgraded(model: onnx.ModelProto, opset: int) -> Iterator[onnx.ModelProto]:
    """The segment at a later opset: relabelled, then converted; check each by running it.

    Between opsets most operators only gained types, so that a new label is usually enough and a
    tenth of the converter's price.
    """
    relabelled = copied(model)
    for entry in relabelled.opset_import:
        if entry.domain in _STANDARD:
            entry.version = opset
    yield relabelled
    from onnx import version_converter

    try:
        yield version_converter.convert_version(model, opset)
    except Exception:  # the converter raises whatever its C++ threw; there is no common base
        return


def copied(proto: P) -> P:
    """A copy to change."""
    result = type(proto)()
    result.CopyFrom(proto)
    return result


def without_copies(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without its Identity nodes, which hide what engines fuse; outputs keep theirs."""
    kept = {output.name for output in model.graph.output}
    copies: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.output[0] not in kept:
            copies[node.output[0]] = copies.get(node.input[0], node.input[0])
    if not copies or any(a.HasField("g") for n in model.graph.node for a in n.attribute):
        return model
    result = copied(model)
    del result.graph.node[:]
    for node in model.graph.node:
        if node.output[0] not in copies:
            made = result.graph.node.add()
            made.CopyFrom(node)
            for position, name in enumerate(node.input):
                made.input[position] = copies.get(name, name)
    return result


def enclosed(body: onnx.GraphProto) -> onnx.GraphProto:
    """A subgraph after renaming its own tensors, so that they meet none of the graph outside.

    ONNX wants every name once, those of subgraphs included; a model may call anything ``sum``.
    """
    from auditor.graphs.segments import rename  # which imports this module

    own = {value.name for value in (*body.input, *body.initializer)}
    own.update(name for node in body.node for name in node.output if name)
    for value in (*body.input, *body.initializer, *body.output):
        value.name = f"~body/{value.name}"
    rename(body.node, {name: f"~body/{name}" for name in own})
    return body


def substituted(model: onnx.ModelProto, bodies: Mapping[int, str]) -> onnx.ModelProto:
    """A copy in which the nodes at these positions run other function bodies.

    The bodies take the nodes' inputs and give their outputs, in order; attributes are gone.
    """
    surgery = _Surgery(model)
    for index, body in bodies.items():
        node = surgery.model.graph.node[index]
        read = node.input[1:] if node.op_type == "Where" else node.input  # the first is a bool
        surgery.call(node, body, surgery.types.get(read[0] if read else "", 0))
    return surgery.model


def passing(
    model: onnx.ModelProto,
    reads: Mapping[tuple[int, int], str],
    writes: Mapping[int, str] | None = None,
) -> onnx.ModelProto:
    """A copy in which floating-point tensors pass functions on their way.

    Args:
        model: the segment.
        reads: function body by position of a node and of its input.
        writes: function body by position of a node, for its first output.
    """
    surgery = _Surgery(model)
    for (index, position), body in reads.items():
        surgery.before(index, position, body)
    for index, body in (writes or {}).items():
        surgery.after(index, body)
    return surgery.finished()


class _Surgery:
    """A copy of a model, and the functions called in it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = copied(model)
        self.types = types(model)
        self._functions: dict[str, onnx.FunctionProto] = {}  # by their text
        self._before: dict[int, list[onnx.NodeProto]] = {}
        self._after: dict[int, list[onnx.NodeProto]] = {}
        self._copies: dict[tuple[str, str], str] = {}
        self._mark = f"{DOMAIN}{len(model.functions)}/"
        if all(o.domain != DOMAIN for o in model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))

    def call(self, node: onnx.NodeProto, body: str, kind: int) -> None:
        """Turn a node into a call of a function, of all its inputs or of those that it has."""
        text = body.replace("$T", str(kind))
        if text not in self._functions:
            name = f"{node.op_type}{len(self.model.functions)}"
            header = f'<domain: "{DOMAIN}", opset_import: ["": {opset(self.model)}]> {name} '
            self._functions[text] = onnx.parser.parse_function(header + text)
            self.model.functions.append(self._functions[text])
        function = self._functions[text]
        node.op_type, node.domain = function.name, DOMAIN
        del node.attribute[:]
        if len(function.input) < len(node.input):
            node.input[:] = filter(None, list(node.input))

    def before(self, index: int, position: int, body: str) -> None:
        """Pass what a node reads through a function."""
        node = self.model.graph.node[index]
        name = node.input[position]
        if self.types.get(name) not in FLOATS:
            return
        if (name, body) not in self._copies:
            target = self._copies[name, body] = f"{self._mark}{name}/{len(self._copies)}"
            passage = self._passage(node, name, target, body)
            self._before.setdefault(index, []).extend(passage)
        node.input[position] = self._copies[name, body]

    def after(self, index: int, body: str) -> None:
        """Pass a node's first output through a function."""
        node = self.model.graph.node[index]
        target = node.output[0]
        if self.types.get(target) not in FLOATS:
            return
        node.output[0] = f"{self._mark}{target}"
        self._after[index] = self._passage(node, node.output[0], target, body)

    def _passage(
        self, node: onnx.NodeProto, source: str, target: str, body: str
    ) -> list[onnx.NodeProto]:
        """Nodes that pass a tensor through a function, beside a node.

        What a Cast makes or reads in float16 passes in float32: ONNX Runtime has few kernels for
        float16, and beside the casts that it inserts for the others the model's own goes lost.
        """
        kind = self.types[target if target in self.types else source]
        if kind != TensorProto.FLOAT16 or node.op_type != "Cast":
            new = helper.make_node("Through", [source], [target])
            self.call(new, body, kind)
            return [new]
        wide, made = f"{target}/wide", f"{target}/made"
        new = helper.make_node("Through", [wide], [made])
        self.call(new, body, TensorProto.FLOAT)
        return [
            helper.make_node("Cast", [source], [wide], to=TensorProto.FLOAT),
            new,
            helper.make_node("Cast", [made], [target], to=kind),
        ]

    def finished(self) -> onnx.ModelProto:
        """The model with what was inserted in its place."""
        nodes = list(self.model.graph.node)
        del self.model.graph.node[:]
        for index, node in enumerate(nodes):
            self.model.graph.node.extend(self._before.get(index, ()))
            self.model.graph.node.append(node)
            self.model.graph.node.extend(self._after.get(index, ()))
        return self.model
