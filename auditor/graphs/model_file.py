"""A model's file, in which nothing is taken on trust: how it is read, and what makes it invalid."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from auditor.errors import UsageError
from auditor.graphs import custom_ops, surgery, weights
from auditor.graphs.segments import reads_of

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
NUMERIC = frozenset(onnx.helper.get_all_tensor_dtypes()) - {onnx.TensorProto.STRING}
_PACKED = {4: ("INT4", "UINT4", "FLOAT4E2M1"), 2: ("INT2", "UINT2")}  # several to a byte
_BITS = {
    onnx.TensorProto.DataType.Value(name): bits
    for bits, names in _PACKED.items()
    for name in names
    if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118 (protobuf's own type)
}
_PROTOBUF_LIMIT = (1 << 31) - 1
_LFS = b"version https://git-lfs"
# Other formats that hold models, by their endings: what to do with them.
_FORMATS = (
    (
        (".xml", ".ort", ".so", ".plan", ".engine"),
        "Give the ONNX model that it was made of, and this file with --artifact ID=FILE.",
    ),
    (
        (".pt", ".pth", ".pt2"),
        "Export it first: `audit export` makes ONNX files of PyTorch modules.",
    ),
    ((".tflite", ".pb", ".keras", ".h5"), "Convert it to ONNX first, such as with tf2onnx."),
)


def check_file(path: Path) -> None:
    """Refuse what is no file, or none that ONNX could have written; raises ``UsageError``."""
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


def parse(path: Path, home: Path | None) -> onnx.ModelProto:
    """Read a model; its large weights stay in the file ``home``, or come along if that is None."""
    hint = "The file is another format, or was cut off: export or copy the model again."
    hint = next((said for ends, said in _FORMATS if path.suffix.lower() in ends), hint)
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


def encodable(path: Path) -> bool:
    """Whether a path can be written into a model: there, names are UTF-8 (protobuf, "string")."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
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


def hash_into(file: Path, digest: hashlib._Hash) -> None:
    """Add a file's bytes to a digest."""
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)


def data_files(path: Path, proto: onnx.ModelProto, home: Path) -> tuple[Path, ...]:
    """The files beside ``home`` itself that hold its data, by name; each is in its folder.

    A model is untrusted input: a location such as ``../../etc/passwd``, or a link that leads
    there, would copy that file into weights and from there into reports (ONNX's security
    advisory GHSA-538c-55jv-c5g9).
    """
    folder = path.parent
    files: set[Path] = set()
    for tensor in tensors(proto):
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


def embed(folder: Path, proto: onnx.ModelProto, mapped: Container[str]) -> None:
    """Read what is still external: constants inside nodes and subgraphs, and odd types."""
    from onnx.external_data_helper import load_external_data_for_tensor

    unmapped = (t for t in proto.graph.initializer if t.name not in mapped)
    for tensor in (*unmapped, *_other_tensors(proto)):
        if weights.is_detached(tensor):
            try:
                load_external_data_for_tensor(tensor, str(folder))
            except (ValueError, OSError, onnx.checker.ValidationError) as error:
                raise ValueError(f"tensor `{tensor.name}`: {_first(error)}") from error


def check_text(path: Path, proto: onnx.ModelProto) -> None:
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


# Operators that ONNX Runtime has in ONNX's own domain: its optimisers write them at operator sets
# in which ONNX does not have them, or not yet (LayerNormalization came with 17).
_ORT = "ONNX Runtime"
_CONTRIB = "com.microsoft"
_OWN = "ai.onnx"
_ORT_OPERATORS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})


def check_types(path: Path, proto: onnx.ModelProto) -> None:
    """What ONNX's checker lets through: weights of a type that there is not."""
    known = onnx.TensorProto.DataType.values()
    for tensor in tensors(proto):
        if tensor.data_type not in known:
            raise UsageError(
                f"{path}: tensor `{tensor.name}` has the unknown type {tensor.data_type}",
                f"Export the model again: this onnx {onnx.__version__} does not know the type.",
            )


def _check_sizes(path: Path, proto: onnx.ModelProto) -> None:
    """What ONNX's checker does not look at: as many bytes as the shape needs."""
    for tensor in tensors(proto):
        if not tensor.HasField("raw_data") or tensor.data_type not in NUMERIC:
            continue
        bits = _BITS.get(tensor.data_type)
        if bits is None:
            bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        needed = (math.prod(tensor.dims) * bits + 7) // 8
        if len(tensor.raw_data) != needed:
            raise UsageError(
                f"{path}: tensor `{tensor.name}` has {len(tensor.raw_data)} bytes, but its shape "
                f"{'x'.join(map(str, tensor.dims)) or 'scalar'} needs {needed}",
                "Export the model again.",
            )


def check(path: Path, proto: onnx.ModelProto, mapped: Container[str]) -> None:
    """ONNX's own checker, on the model with its mapped weights as inputs."""
    _check_sizes(path, proto)
    light = surgery.copied(proto)
    # Before version 4 of the format initialisers had to be inputs too. Tools that take them away
    # there forget to raise the version, and engines do not mind.
    light.ir_version = max(light.ir_version, 4)
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
    light.opset_import.append(onnx.helper.make_opsetid(_ORT, 1))
    opset = surgery.opset(light)
    for node in _nodes(light):
        known = node.domain or surgery.defined(node.op_type, opset)
        if node.op_type in _ORT_OPERATORS and not known:
            node.domain = _ORT  # of which the checker knows nothing
    try:
        onnx.checker.check_model(light)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{path} is not a valid ONNX model: {_first(error)}",
            "Export the model again, or convert it with onnx.version_converter if it is too new "
            f"(this onnx {onnx.__version__} knows IR version up to {onnx.IR_VERSION} and opset "
            f"up to {onnx.defs.onnx_opset_version()}).",
        ) from error


def spell_alike(proto: onnx.ModelProto) -> None:
    """Write ONNX's own domain as an empty name, of which ``ai.onnx`` is the other spelling.

    ONNX Runtime takes both (ONNX IR specification, "Operator sets"), the checker the empty one. A
    graph without a name engines take as well.
    """
    for node in _nodes(proto):
        node.domain = "" if node.domain == _OWN else node.domain
    for holder in (proto, *proto.functions):
        versions = {o.domain: o.version for o in holder.opset_import}
        if _OWN in versions:
            own = versions.pop(_OWN)
            del holder.opset_import[:]
            holder.opset_import.extend(
                onnx.helper.make_opsetid(*o) for o in ({"": own} | versions).items()
            )
    proto.graph.name = proto.graph.name or "graph"


def import_contrib(proto: onnx.ModelProto) -> None:
    """Import ONNX Runtime's own operators where a model uses some and forgot to.

    ONNX Runtime does so itself (``Model::Model``), which hides it: NNCF writes no import.
    """
    imported = {o.domain for o in proto.opset_import}
    if _CONTRIB not in imported and any(n.domain == _CONTRIB for n in _nodes(proto)):
        proto.opset_import.append(onnx.helper.make_opsetid(_CONTRIB, 1))


def sort(graph: onnx.GraphProto) -> None:
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


def unzip(graph: onnx.GraphProto) -> None:
    """Make outputs that ZipMap writes, a map for each row, tables in the order of their keys.

    scikit-learn's converter ends classifiers so. The numbers are the same.
    """
    table = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [None, None])
    made = zipped(graph)
    for output in graph.output:
        if output.name in made:
            output.type.CopyFrom(table)
    for node in graph.node:
        if node.output[0] not in made:
            continue
        keys = next((list(a.ints or a.strings) for a in node.attribute if a.ints or a.strings), [])
        order = sorted(range(len(keys)), key=keys.__getitem__)
        columns = onnx.numpy_helper.from_array(np.array(order, np.int64), f"{node.output[0]}.keys")
        graph.initializer.append(columns)
        gather = onnx.helper.make_node(
            "Gather", [node.input[0], columns.name], node.output, node.name, axis=1
        )
        node.CopyFrom(gather)


def zipped(graph: onnx.GraphProto) -> frozenset[str]:
    """Names of the outputs that ZipMap makes."""
    made = {node.output[0] for node in graph.node if node.op_type == "ZipMap"}
    return frozenset(o.name for o in graph.output if o.name in made)


def clear_repeated(graph: onnx.GraphProto) -> None:
    """Take away the names that several nodes have.

    ONNX lets them, and most engines; ONNX Runtime, which computes the reference, does not.
    """
    counts = Counter(node.name for node in graph.node)
    for node in graph.node:
        if counts[node.name] > 1:
            node.name = ""


def _first(error: Exception) -> str:
    """An exception's first line, and the node it is about, without the rest of the stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    context = next((li.removeprefix("==> Context: ") for li in lines[1:] if "==>" in li), "")
    text = lines[0].rstrip(".") if lines else type(error).__name__
    return f"{text} ({context})" if context else text


def check_names(path: Path, graph: onnx.GraphProto) -> None:
    """Refuse names that stand for several things; raises ``UsageError``."""
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


def check_domains(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse operators that nobody here knows; raises ``UsageError``."""
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
