"""The model under audit: an ONNX file, checked before anything else touches it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from auditor.errors import UsageError, suggestion
from auditor.graphs import model_file as files
from auditor.graphs import surgery, weights
from auditor.ports import Arrays
from auditor.records.model import ModelInfo

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
            their files (``auditor.graphs.weights``).
        weights: the large weights by name, mapped into memory.
        folder: where the files with these weights are.
        inputs: what must be fed: the graph inputs that are not initialisers.
        outputs: names of the graph outputs that are numeric tensors, or maps of numbers for each
            row (ZipMap), which are tables in ``proto``; ``proto`` has no others.
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
    files.check_file(path)
    home = path.resolve()  # a link's own name is not where the values are
    proto = files.parse(path, home)
    files.check_text(path, proto)
    data = files.data_files(path, proto, home)
    if data and home.parent != path.parent.resolve():
        home = path.parent.resolve() / path.name  # data files lie beside the link
        proto = files.parse(path, None)
    digest = hashlib.sha256()
    for file in (path, *data):
        files.hash_into(file, digest)
    files.check_names(path, proto.graph)
    files.check_domains(path, proto)
    files.check_types(path, proto)
    files.spell_alike(proto)
    inputs = _inputs(path, proto.graph)
    outputs, unread = _outputs(path, proto.graph)
    packed = _packed(proto.graph)
    info = ModelInfo(
        path=str(path),
        sha256=digest.hexdigest(),
        opset=surgery.opset(proto),
        nodes=len(proto.graph.node),
        parameters=sum(_size(t) * packed.get(t.name, 1) for t in files.tensors(proto)),
        producer=f"{proto.producer_name} {proto.producer_version}".strip(),
    )
    try:
        arrays = weights.detach(proto, home.parent) if files.encodable(home) else {}
        files.embed(home.parent, proto, arrays)
    except ValueError as error:
        raise UsageError(
            f"weights of {path} cannot be read: {error}",
            "A data file is not the one this model was exported with: copy or export it again.",
        ) from error
    files.import_contrib(proto)
    files.sort(proto.graph)
    files.clear_repeated(proto.graph)
    files.check(path, proto, arrays)
    files.unzip(proto.graph)
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


def external_files(path: Path) -> tuple[Path, ...]:
    """The data files of a model, all of them in its folder.

    Raises:
        UsageError: the model cannot be read, or a data file is missing or elsewhere.
    """
    files.check_file(path)
    home = path.resolve()
    return files.data_files(path, files.parse(path, home), home)


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
    # For "not known" some exporters write -1, or the name "?" (paddle2onnx) everywhere. 0 is
    # taken at its word, as ONNX Runtime does: a cache that is empty at the first step.
    if dimension.HasField("dim_value") and dimension.dim_value >= 0:
        return int(dimension.dim_value)
    return None if dimension.dim_param in ("", "?", "-1", "None") else str(dimension.dim_param)


def _outputs(path: Path, graph: onnx.GraphProto) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the numeric outputs, and a sentence about each other one."""
    if not graph.output:
        raise UsageError(f"{path} has no output to compare", "Export it with its outputs.")
    maps = files.zipped(graph)
    others = {
        o.name: kind
        for o in graph.output
        if o.name not in maps and (kind := _not_numeric(o)) is not None
    }
    if len(others) == len(graph.output):
        _require_tensor(path, "output", graph.output[0])
    return (
        tuple(o.name for o in graph.output if o.name not in others),
        tuple(f"output `{n}` is {kind}, which is not compared" for n, kind in others.items()),
    )


def _not_numeric(value: onnx.ValueInfoProto) -> str | None:
    """What a value is in words; None where it is a tensor of numbers."""
    kind = value.type.WhichOneof("value")
    if kind is None:
        return "a value without a type"
    if kind != "tensor_type":
        name = kind.removesuffix("_type").replace("_", " ")
        return f"an {name}" if name.startswith("o") else f"a {name}"  # optional, opaque
    type = value.type.tensor_type.elem_type
    if type in files.NUMERIC:
        return None
    return "a string" if type == onnx.TensorProto.STRING else f"a tensor of the type {type}"


def _require_tensor(path: Path, what: str, value: onnx.ValueInfoProto) -> None:
    if (text := _not_numeric(value)) is None:
        return
    raise UsageError(
        f"{path}: the {what} `{value.name}` is {text}; only numeric tensors can be audited",
        "Export the numeric part of the model, without string, sequence or optional values.",
    )
