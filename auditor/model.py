"""The model under audit: an ONNX file, checked before anything else touches it."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from auditor import custom_ops, weights
from auditor.errors import UsageError
from auditor.ports import Arrays
from auditor.records.model import ModelInfo
from auditor.replays import surgery
from auditor.segments import reads_of

# What ONNX itself defines, and the domain of the contributed operators that ONNX Runtime, our
# reference, can run.
_KNOWN_DOMAINS = frozenset(
    {
        "",
        "ai.onnx",
        "ai.onnx.ml",
        "ai.onnx.preview",
        "ai.onnx.preview.training",
        "com.microsoft",
    }
)
_NUMERIC = frozenset(onnx.helper.get_all_tensor_dtypes()) - {onnx.TensorProto.STRING}
_PACKED = {4: ("INT4", "UINT4", "FLOAT4E2M1"), 2: ("INT2", "UINT2")}  # several to a byte
_BITS = {
    onnx.TensorProto.DataType.Value(name): bits
    for bits, names in _PACKED.items()
    for name in names
    if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118 (protobuf's own type)
}
_PROTOBUF_LIMIT = (1 << 31) - 1
_LFS = b"version https://git-lfs"

_BATCH, _CHANNELS, _IMAGE_SIDE, _SEQUENCE = 1, 3, 224, 16
_SEQUENCE_NAME = re.compile(r"seq|len|token|time|frame|past|step", re.IGNORECASE)
BATCH_NAME = re.compile(r"batch|^n$|^b$", re.IGNORECASE)
_SIDE_NAME = re.compile(r"height|width|^h$|^w$", re.IGNORECASE)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph input as the model declares it.

    Attributes:
        dtype: numpy type of its elements (``ml_dtypes`` for those numpy lacks; ``str`` for texts).
        shape: a number per fixed dimension, a name per symbolic one, None per unnamed one.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        """Name, type and shape as messages show them."""
        return f"`{self.name}` ({self.dtype.name}, {shown(self.shape)})"


@dataclass(frozen=True, slots=True)
class Model:
    """A checked model.

    Attributes:
        path: the file as the user gave it; backends compile this file.
        proto: the model for analysis: model-local functions inlined, and large weights left in
            their files (``auditor.weights``).
        weights: the large weights by name, mapped into memory.
        folder: where the files with these weights are.
        inputs: what must be fed: the graph inputs that are not initialisers.
        outputs: names of the graph outputs that are numeric tensors; ``proto`` has no others.
        unread: the others, as sentences.
    """

    path: Path
    proto: onnx.ModelProto
    weights: Arrays
    folder: Path
    info: ModelInfo
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    unread: tuple[str, ...] = ()

    @property
    def dynamic(self) -> bool:
        """Whether any input has a symbolic dimension."""
        return any(not isinstance(d, int) for spec in self.inputs for d in spec.shape)

    @property
    def labels(self) -> dict[str, str]:
        """A label a person recognises for every node, by key.

        It is the node's own name where no other node has it, else its operator and key.
        """
        nodes = self.proto.graph.node
        counts = Counter(node.name for node in nodes)
        return {
            key(node): node.name
            if node.name and counts[node.name] == 1
            else f"{node.op_type} → {key(node)}"
            for node in nodes
        }


def load(path: Path) -> Model:
    """Read and check a model.

    Raises:
        UsageError: it is missing, unreadable, truncated, invalid, refers to files outside its
            folder, uses operators nobody here knows, or cannot be fed.
    """
    _check_file(path)
    home = path.resolve()  # a link's own name is not where the values are
    proto = _parse(path, home)
    _check_text(path, proto)
    files = _external_files(path, proto, home)
    if files and home.parent != path.parent.resolve():
        home = path.parent.resolve() / path.name  # data files lie beside the link
        proto = _parse(path, None)
    digest = hashlib.sha256()
    for file in (path, *files):
        _hash(file, digest)
    _check_names(path, proto.graph)
    _check_domains(path, proto)
    _check_types(path, proto)
    inputs = _inputs(path, proto.graph)
    outputs, unread = _outputs(path, proto.graph)
    packed = _packed(proto.graph)
    info = ModelInfo(
        path=str(path),
        sha256=digest.hexdigest(),
        opset=surgery.opset(proto),
        nodes=len(proto.graph.node),
        parameters=sum(_size(t) * packed.get(t.name, 1) for t in _tensors(proto)),
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
    )
    try:
        arrays = weights.detach(proto, home.parent) if _encodable(home) else {}
        _embed(home.parent, proto, arrays)
    except ValueError as error:
        raise UsageError(
            f"weights of {path} cannot be read: {error}",
            "A data file is not the one this model was exported with: copy or export it again.",
        ) from error
    _sort(proto.graph)
    _check(path, proto, arrays)
    if proto.functions:
        import onnx.inliner

        proto = onnx.inliner.inline_local_functions(proto)
    kept = [o for o in proto.graph.output if o.name in outputs]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    return Model(path, proto, arrays, home.parent, info, inputs, outputs, unread)


def key(node: onnx.NodeProto) -> str:
    """The node's identity: the name of its first non-empty output."""
    return next((name for name in node.output if name), "")


def shown(shape: tuple[int | str | None, ...]) -> str:
    """A shape as people write it: ``1x3x224x224``; ``scalar`` when it has no dimension."""
    return "x".join("?" if d is None else str(d) for d in shape) or "scalar"


def check_pairs(model: Model, pairs: Mapping[str, str], option: str) -> None:
    """Check outputs by input, as a user named them with ``option``.

    Raises:
        UsageError: one of them is no input or no output of the model.
    """
    inputs = [spec.name for spec in model.inputs]
    for name, output in pairs.items():
        for wrong, known, kind in ((name, inputs, "input"), (output, model.outputs, "output")):
            if wrong not in known:
                raise UsageError(
                    f"{option} names `{wrong}`, which is no {kind} of the model",
                    suggestion(wrong, known),
                )


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """``Did you mean `x`? `` when something known resembles ``wrong``, else nothing."""
    import difflib

    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f"Did you mean `{close[0]}`? " if close else ""


def resolve_shapes(
    model: Model, given: Mapping[str, Shape], recorded: Mapping[str, Shape]
) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """Fix every dimension of every input.

    A dimension is what the model declares, else what ``given`` says, else what ``recorded``
    has, else a default; defaults give a symbol one value in the whole model.

    Args:
        model: the model whose inputs are to be fed.
        given: shapes from the user, by input.
        recorded: shapes of one recorded sample, by input.

    Returns:
        The shape of every input, and a sentence per default chosen or oddity met.

    Raises:
        UsageError: an unknown input, or a shape that contradicts the model or the recorded one.
    """
    names = [spec.name for spec in model.inputs]
    for name in given:
        if name not in names:
            raise UsageError(
                f"--shape names `{name}`, which is not an input of the model",
                suggestion(name, names) + _inputs_hint(model),
            )
    symbols: dict[str, int] = {}
    known: dict[str, Shape] = {}
    notes: list[str] = []
    for origin, shapes in (("--shape", given), ("the data", recorded)):
        for spec in model.inputs:
            if spec.name in shapes:
                shape = tuple(shapes[spec.name])
                _bind(spec, shape, symbols, origin, notes)
                if known.setdefault(spec.name, shape) != shape:
                    raise UsageError(
                        f"input `{spec.name}` is {shown(known[spec.name])} in --shape but "
                        f"{shown(shape)} in the data",
                        "Drop --shape: recorded data already fix the shape.",
                    )
    resolved = {
        spec.name: known.get(spec.name) or _default_shape(spec, symbols, notes)
        for spec in model.inputs
    }
    return resolved, tuple(notes)


# --- reading ---------------------------------------------------------------------------------


def _check_file(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"{path} does not exist", "Check the path of the model file.")
    if path.is_dir():
        raise UsageError(f"{path} is a directory", "Give the .onnx file inside it.")
    if not path.is_file():
        raise UsageError(f"{path} is not a regular file", "Give the path of an .onnx file.")
    if path.stat().st_size > _PROTOBUF_LIMIT:
        raise UsageError(
            f"{path} is larger than 2 GiB, the limit of the ONNX file format",
            "Export it again with its weights as external data.",
        )
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty", "Export or copy the model again.")


def _parse(path: Path, home: Path | None) -> onnx.ModelProto:
    """Read a model; its large weights stay in the file ``home``, or come along if that is None."""
    hint = "The file is another format, or was cut off: export or copy the model again."
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                hint = "It is a Git LFS pointer: fetch the model itself with `git lfs pull`."
        proto = (
            weights.read(path, home.name) if home else onnx.ModelProto.FromString(path.read_bytes())
        )
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", "Check its permissions."
        ) from error
    except Exception as error:  # DecodeError of protobuf, which comes without types
        raise UsageError(f"{path} is not an ONNX model, or is truncated", hint) from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise UsageError(f"{path} holds no ONNX graph", hint)
    return proto


def _encodable(path: Path) -> bool:
    """Whether a path can be written into a model: there, names are UTF-8 (protobuf, "string")."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initialisers and attributes, subgraphs and functions included."""
    yield from proto.graph.initializer
    yield from _other_tensors(proto)


def _other_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor but the main graph's initialisers."""
    yield from _inner_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _inner_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        elif attribute.type == onnx.AttributeProto.TENSORS:
            yield from attribute.tensors
        elif attribute.type == onnx.AttributeProto.GRAPH:
            yield from attribute.g.initializer
            yield from _inner_tensors(attribute.g)
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                yield from graph.initializer
                yield from _inner_tensors(graph)


def _packed(graph: onnx.GraphProto) -> dict[str, int]:
    """How many numbers an element holds, of constants that a contrib operator keeps packed."""
    return {
        node.input[1]: 8 // surgery.attributes(node).get("bits", 4)
        for node in graph.node
        if node.op_type == "MatMulNBits" and len(node.input) > 1
    }


def _size(tensor: onnx.TensorProto) -> int:
    size = 1
    for dimension in tensor.dims:
        size *= dimension
    return size


def _hash(file: Path, digest: hashlib._Hash) -> None:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)


# --- external data -----------------------------------------------------------------------------


def external_files(path: Path) -> tuple[Path, ...]:
    """The data files of a model, all of them in its folder.

    Raises:
        UsageError: the model cannot be read, or a data file is missing or elsewhere.
    """
    _check_file(path)
    home = path.resolve()
    return _external_files(path, _parse(path, home), home)


def _external_files(path: Path, proto: onnx.ModelProto, home: Path) -> tuple[Path, ...]:
    """The files beside ``home`` itself that hold its data, by name; each is in its folder.

    A model is untrusted input: a location such as ``../../etc/passwd``, or a link that leads
    there, would copy that file into weights and from there into reports (ONNX's security
    advisory GHSA-538c-55jv-c5g9).
    """
    folder = path.parent
    files: set[Path] = set()
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if not location:
            raise UsageError(
                f"tensor `{tensor.name}` is stored outside {path.name}, which does not say where",
                "Export the model again.",
            )
        if location == home.name:
            continue
        file = folder / location
        if not _inside(folder, location):
            raise UsageError(
                f"tensor `{tensor.name}` points to `{location}`, outside the model's folder",
                "Refused: a model may only use files beside it. Copy the data file (not a link) "
                "into the model's folder and export with a relative location.",
            )
        if not os.path.isfile(file):  # Path.is_file raises where a name is too long
            raise UsageError(
                f"external data file `{location}` of {path.name} is missing",
                f"Copy it into {folder} beside the model.",
            )
        files.add(file)
    return tuple(sorted(files))


def _inside(folder: Path, location: str) -> bool:
    if os.path.isabs(location) or ".." in Path(location).parts:
        return False
    try:
        return (folder / location).resolve().is_relative_to(folder.resolve())
    except (ValueError, OSError):  # a zero byte, or longer than a name can be
        return False


def _embed(folder: Path, proto: onnx.ModelProto, mapped: Container[str]) -> None:
    """Read what is still external: constants inside nodes and subgraphs, and odd types."""
    from onnx.external_data_helper import load_external_data_for_tensor

    unmapped = (t for t in proto.graph.initializer if t.name not in mapped)
    for tensor in (*unmapped, *_other_tensors(proto)):
        if weights.is_detached(tensor):
            try:
                load_external_data_for_tensor(tensor, str(folder))
            except (ValueError, OSError, onnx.checker.ValidationError) as error:
                raise ValueError(f"tensor `{tensor.name}`: {_first(error)}") from error


# --- checks ------------------------------------------------------------------------------------


def _check_text(path: Path, proto: onnx.ModelProto) -> None:
    """What no parser of the format looks at: strings that are UTF-8, as Protobuf demands."""
    for message in _messages(proto):
        for field in _fields(message.DESCRIPTOR)[0]:
            value = getattr(message, field)
            for text in (value,) if isinstance(value, str | bytes) else value:
                if isinstance(text, bytes):  # how Protobuf hands out what it cannot decode
                    raise UsageError(
                        f"{path} is damaged: a {field} is not UTF-8 but {text[:40]!r}",
                        "Export or copy the model again.",
                    )


def _messages(message: Any) -> Iterator[Any]:
    """A message and all inside it."""
    yield message
    for field in _fields(message.DESCRIPTOR)[1]:
        value = getattr(message, field)
        if not hasattr(value, "DESCRIPTOR"):
            for item in value:
                yield from _messages(item)
        elif message.HasField(field):
            yield from _messages(value)


@functools.cache
def _fields(descriptor: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a message type's fields of text, and of those that hold messages."""
    fields = descriptor.fields
    return (
        tuple(f.name for f in fields if f.type == f.TYPE_STRING),
        tuple(f.name for f in fields if f.type == f.TYPE_MESSAGE),
    )


def _check_types(path: Path, proto: onnx.ModelProto) -> None:
    """What ONNX's checker lets through: weights of a type that there is not."""
    known = onnx.TensorProto.DataType.values()
    for tensor in _tensors(proto):
        if tensor.data_type not in known:
            raise UsageError(
                f"{path}: tensor `{tensor.name}` has the unknown type {tensor.data_type}",
                f"Export the model again: this onnx {onnx.__version__} does not know the type.",
            )


def _check_sizes(path: Path, proto: onnx.ModelProto) -> None:
    """What ONNX's checker does not look at: as many bytes as the shape needs."""
    for tensor in _tensors(proto):
        if not tensor.HasField("raw_data") or tensor.data_type not in _NUMERIC:
            continue
        bits = _BITS.get(tensor.data_type)
        if bits is None:
            bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        needed = (math.prod(tensor.dims) * bits + 7) // 8
        if len(tensor.raw_data) != needed:
            raise UsageError(
                f"{path}: tensor `{tensor.name}` has {len(tensor.raw_data)} bytes, but its shape "
                f"{shown(tuple(tensor.dims))} needs {needed}",
                "Export the model again.",
            )


def _check(path: Path, proto: onnx.ModelProto, mapped: Container[str]) -> None:
    """ONNX's own checker, on the model with its mapped weights as inputs."""
    _check_sizes(path, proto)
    light = surgery.copied(proto)
    fed = {value.name for value in light.graph.input}
    kept = []
    for tensor in light.graph.initializer:
        if tensor.name not in mapped:
            kept.append(tensor)
        elif tensor.name not in fed:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del light.graph.initializer[:]
    light.graph.initializer.extend(kept)
    for value in light.graph.output:  # engines infer the shape where a file has none
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(light)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{path} is not a valid ONNX model: {_first(error)}",
            "Export the model again, or convert it with onnx.version_converter if it is too new "
            f"(this onnx {onnx.__version__} knows IR version up to {onnx.IR_VERSION} and opset "
            f"up to {onnx.defs.onnx_opset_version()}).",
        ) from error


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes behind those they read from, as ONNX demands; a cycle stays for the checker.

    Engines do not mind, and converters to float16 are known for appending their casts at the end.
    """
    made = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    order: dict[int, None] = {}
    for start in range(len(graph.node)):
        pending, seen = [start], {start}
        while pending:
            sources = (made.get(name) for name in reads_of(graph.node[pending[-1]]))
            ahead = next((s for s in sources if s is not None and s not in order), None)
            if ahead is None:
                order[pending.pop()] = None
            elif ahead in seen:
                return
            else:
                seen.add(ahead)
                pending.append(ahead)
    if list(order) != sorted(order):
        nodes = [graph.node[index] for index in order]
        del graph.node[:]
        graph.node.extend(nodes)


def _first(error: Exception) -> str:
    """An exception's first line, and the node it is about, without the rest of the stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    context = next((li.removeprefix("==> Context: ") for li in lines[1:] if "==>" in li), "")
    text = lines[0].rstrip(".") if lines else type(error).__name__
    return f"{text} ({context})" if context else text


def _check_names(path: Path, graph: onnx.GraphProto) -> None:
    for what, names in (
        ("input", [v.name for v in graph.input]),
        ("output", [v.name for v in graph.output]),
        ("initializer", [t.name for t in graph.initializer]),
        ("node output", [name for node in graph.node for name in node.output if name]),
    ):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UsageError(
                f"{path} has more than one {what} named `{repeated[0]}`",
                "Names must be unique in an ONNX graph: export the model again.",
            )


def _check_domains(path: Path, proto: onnx.ModelProto) -> None:
    if custom_ops.used():  # whether they have every operator is seen when the reference loads it
        return
    local = {(function.domain, function.name) for function in proto.functions}
    unknown = {
        node.domain: node.op_type
        for node in _nodes(proto)
        if node.domain not in _KNOWN_DOMAINS and (node.domain, node.op_type) not in local
    }
    for domain, operator in unknown.items():
        raise UsageError(
            f"{path} uses operator `{operator}` of the unknown domain `{domain}`",
            "Name the library that has it with --custom-ops, or export the model with standard "
            "ONNX operators or with this one as a model-local function.",
        )


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    def walk(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            yield node
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    yield from walk(iter(attribute.g.node))
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    for graph in attribute.graphs:
                        yield from walk(iter(graph.node))

    yield from walk(iter(proto.graph.node))
    for function in proto.functions:
        yield from walk(iter(function.node))


def _inputs(path: Path, graph: onnx.GraphProto) -> tuple[TensorSpec, ...]:
    stored = {tensor.name for tensor in graph.initializer}
    stored |= {sparse.values.name for sparse in graph.sparse_initializer}
    specs = tuple(_spec(path, value) for value in graph.input if value.name not in stored)
    if not specs:
        raise UsageError(f"{path} has no input to feed", "Export it with its inputs as inputs.")
    return specs


def _spec(path: Path, value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    texts = tensor.elem_type == onnx.TensorProto.STRING
    if not texts:
        _require_tensor(path, "input", value)
    shape = tuple(_dimension(d) for d in tensor.shape.dim)
    numbers = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(value.name, np.dtype(str) if texts else numbers, shape)


def _dimension(dimension: onnx.TensorShapeProto.Dimension) -> int | str | None:
    # For "not known" some exporters write 0 or -1, or the name "?" (paddle2onnx) everywhere.
    if dimension.HasField("dim_value") and dimension.dim_value > 0:
        return int(dimension.dim_value)
    return None if dimension.dim_param in ("", "?", "-1", "None") else str(dimension.dim_param)


def _outputs(path: Path, graph: onnx.GraphProto) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the numeric outputs, and a sentence about each other one."""
    if not graph.output:
        raise UsageError(f"{path} has no output to compare", "Export it with its outputs.")
    others = {o.name: kind for o in graph.output if (kind := _not_numeric(o)) is not None}
    if len(others) == len(graph.output):
        _require_tensor(path, "output", graph.output[0])
    return (
        tuple(o.name for o in graph.output if o.name not in others),
        tuple(f"output `{n}` is a {kind}, which is not compared" for n, kind in others.items()),
    )


def _not_numeric(value: onnx.ValueInfoProto) -> str | None:
    """What a value is in words; None where it is a tensor of numbers."""
    kind = value.type.WhichOneof("value") or "untyped"
    if kind != "tensor_type":
        return kind.removesuffix("_type").replace("_", " ")
    type = value.type.tensor_type.elem_type
    if type in _NUMERIC:
        return None
    return "string" if type == onnx.TensorProto.STRING else f"type {type}"


def _require_tensor(path: Path, what: str, value: onnx.ValueInfoProto) -> None:
    if (text := _not_numeric(value)) is None:
        return
    raise UsageError(
        f"{path} has a {text} {what}, `{value.name}`; only numeric tensors can be audited",
        "Export the numeric part of the model, without string, sequence or optional values.",
    )


# --- shapes ------------------------------------------------------------------------------------


def _bind(
    spec: TensorSpec, shape: Shape, symbols: dict[str, int], origin: str, notes: list[str]
) -> None:
    """Check a shape against the declaration and note what it makes each symbol."""
    declared = spec.shape
    if len(shape) != len(declared):
        raise UsageError(
            f"{origin} gives {shown(shape)} for input {spec}: {len(declared)} dimensions needed",
            "Write one number per dimension, such as 1x3x224x224.",
        )
    for axis, (wanted, got) in enumerate(zip(declared, shape, strict=True)):
        if isinstance(wanted, int) and wanted != got:
            raise UsageError(
                f"{origin} gives {shown(shape)} for input {spec}: dimension {axis} is fixed at "
                f"{wanted}",
                "Only symbolic dimensions can be chosen.",
            )
        if isinstance(wanted, str) and symbols.setdefault(wanted, got) != got:
            # Engines do not mind, and some exporters give unrelated dimensions one name.
            notes.append(
                f"input `{spec.name}`: dimension `{wanted}` is {got} here and "
                f"{symbols[wanted]} elsewhere, though one name should mean one size"
            )


def _default_shape(spec: TensorSpec, symbols: dict[str, int], notes: list[str]) -> Shape:
    shape: list[int] = []
    for axis, declared in enumerate(spec.shape):
        if isinstance(declared, int):
            shape.append(declared)
        elif declared in symbols:
            shape.append(symbols[declared])
        else:
            shape.append(_sum_of(declared, symbols) or _default(spec, axis))
            if declared:
                symbols[declared] = shape[-1]
            name = f"`{declared}`" if declared else f"{axis} (unnamed)"
            notes.append(f"input `{spec.name}`: dimension {name} set to {shape[-1]}")
    return tuple(shape)


def _sum_of(expression: str | None, symbols: Mapping[str, int]) -> int | None:
    """Value of ``past + 1`` and the like, which exporters write, once the terms are known."""
    terms = [term.strip() for term in (expression or "").split("+")]
    if not all(term.isdecimal() or term in symbols for term in terms):
        return None
    return sum(int(t) if t.isdecimal() else symbols[t] for t in terms)


def _default(spec: TensorSpec, axis: int) -> int:
    shape = spec.shape
    name = str(shape[axis] or "")
    for pattern, value in (
        (BATCH_NAME, _BATCH),
        (_SIDE_NAME, _IMAGE_SIDE),
        (_SEQUENCE_NAME, _SEQUENCE),
    ):
        if pattern.search(name):
            return value
    if axis == 0 and len(shape) > 1:
        return _BATCH
    if len(shape) == 4:
        channels_last = shape[3] in (1, 3, 4) and not isinstance(shape[1], int)
        return _CHANNELS if axis == (3 if channels_last else 1) else _IMAGE_SIDE
    return _SEQUENCE


def _inputs_hint(model: Model) -> str:
    return "The inputs are " + ", ".join(str(spec) for spec in model.inputs) + "."
