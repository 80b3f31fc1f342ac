"""A model's large constants, left in the files where they are and mapped into memory from there.

The reference runs as one session for the whole graph and one per segment. With the weights inside
each model they would be copied for each; here a constant of the main graph is a stub that says
where its values lie (ONNX external data), be that a data file or the model file itself. ONNX
Runtime and numpy map them, so all sessions share the one copy that the system's page cache holds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery
from auditor.ports import Array, Arrays

# Smaller constants stay in the graph: shapes and axes must be visible to shape inference.
_SMALL = 1024  # bytes
_T = onnx.TensorProto
_FLOATS = (_T.FLOAT, _T.DOUBLE, _T.FLOAT16)
_SIGNED = (_T.INT8, _T.INT16, _T.INT32, _T.INT64)
_UNSIGNED = (_T.UINT8, _T.UINT16, _T.UINT32, _T.UINT64)
_PLAIN = frozenset((*_FLOATS, *_SIGNED, *_UNSIGNED))  # types that numpy has too

# Numbers of message fields in onnx.proto, along which tensors are found.
_TENSOR: dict[int, Any] = {}
_NODE = {5: {5: _TENSOR}}  # attribute, its tensor
_MODEL = {7: {1: _NODE, 5: _TENSOR}}  # graph, its nodes and initialisers
# Fields of a tensor whose values lie in the file just as in memory, on little-endian machines.
_VALUES = {9: _PLAIN, 4: frozenset({_T.FLOAT}), 10: frozenset({_T.DOUBLE})}
_OTHER_VALUES = frozenset({5, 6, 7, 11, 13})
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types


def read(path: Path, file: str | None = None) -> onnx.ModelProto:
    """Read a model file, and leave its large weights there: they become external data.

    Args:
        path: the model file.
        file: by which name the weights' locations call it; its own when not given. A name that
            is not UTF-8 cannot be written into a model: then the weights come along.

    Raises:
        OSError, ValueError: it cannot be read, or is empty.
        google.protobuf.message.DecodeError: it is no model.
    """
    with path.open("rb") as opened:
        data = mmap(opened.fileno(), 0, access=ACCESS_READ)
    encoded = None
    # What is cut off or encoded in an unusual way is left to the parser.
    with contextlib.suppress(ValueError, IndexError):
        name = (file or path.name).encode().decode()
        encoded = _slim(data, 0, len(data), _MODEL, name)
    model = onnx.ModelProto()
    model.ParseFromString(data[:] if encoded is None else encoded)
    return model


def detach(proto: onnx.ModelProto, folder: Path) -> Arrays:
    """Map the main graph's external initialisers into memory.

    Args:
        proto: the model; its large Constant nodes become initialisers.
        folder: where external files lie; every location was found to be inside it.

    Returns:
        The values of all but small ones and of types that numpy lacks, by name, read-only.

    Raises:
        ValueError: a tensor's values are not there, or not as many as its shape says.
    """
    if proto.ir_version >= 4:  # before, every initialiser had to be a graph input as well
        _constants_to_initializers(proto.graph)
    arrays: Arrays = {}
    for tensor in proto.graph.initializer:
        if is_detached(tensor) and tensor.data_type in _PLAIN and size_of(tensor) >= _SMALL:
            try:
                arrays[tensor.name] = mapped(tensor, folder)
            except (ValueError, OSError) as error:
                raise ValueError(f"tensor `{tensor.name}`: {error}") from error
    return arrays


def is_detached(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's values lie in a file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def attach(tensor: onnx.TensorProto, arrays: Mapping[str, Array]) -> onnx.TensorProto:
    """An initialiser with its values inside, whether it was detached or not."""
    if tensor.name in arrays and is_detached(tensor):
        return numpy_helper.from_array(arrays[tensor.name], tensor.name)
    return tensor


def inside(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> onnx.ModelProto:
    """A segment with all weights inside: itself, or a copy where some were detached."""
    if not any(map(is_detached, model.graph.initializer)):
        return model
    result = surgery.copied(model)
    del result.graph.initializer[:]
    result.graph.initializer.extend(attach(t, arrays) for t in model.graph.initializer)
    return result


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Turn the Constant nodes that some exporters write weights as into initialisers."""
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        if node.op_type == "Constant" and value is not None and size_of(value) >= _SMALL:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def mapped(tensor: onnx.TensorProto, folder: Path) -> Array:
    """An external tensor as a read-only view of its file (ONNX external data format)."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        folder / where["location"],
        dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<"),
        mode="r",
        offset=int(where.get("offset", 0)),
        shape=tuple(tensor.dims),
    )


def size_of(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's values, of types that take whole bytes."""
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims)) * itemsize


# --- the model file ------------------------------------------------------------------------------


def _slim(data: bytes | mmap, start: int, end: int, within: Mapping[int, Any], file: str) -> bytes:
    """An encoded message without the values of its large tensors.

    Args:
        data: the file.
        start: where in it the message begins.
        end: where it ends.
        within: the fields that hold tensors, and the like for the messages in these.
        file: the file's name.

    Raises:
        ValueError, IndexError: it is not encoded as expected.
    """
    parts = []
    for number, wire, first, value, after in _fields(data, start, end):
        inner = within.get(number)
        if inner is None or wire != _BYTES or after - value < _SMALL:
            parts.append(data[first:after])
            continue
        if inner is _TENSOR:
            message = _stub(data, value, after, file)
        else:
            message = _slim(data, value, after, inner, file)
        parts += [_varint(number << 3 | _BYTES), _varint(len(message)), message]
    return b"".join(parts)


def _stub(data: bytes | mmap, start: int, end: int, file: str) -> bytes:
    """An encoded tensor that says where its values are, instead of them; itself if it is small."""
    rest, places = [], []
    for number, wire, first, value, after in _fields(data, start, end):
        if number in _VALUES and wire == _BYTES:
            places.append((number, value, after))
        elif number in _OTHER_VALUES or number in _VALUES:
            return data[start:end]
        else:
            rest.append(data[first:after])
    if len(places) != 1:
        return data[start:end]
    ((field, value, after),) = places
    tensor = onnx.TensorProto.FromString(b"".join(rest))
    known = tensor.data_type in _VALUES[field]
    if not known or after - value < _SMALL or size_of(tensor) != after - value:
        return data[start:end]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", file), ("offset", value), ("length", after - value)):
        tensor.external_data.add(key=key, value=str(text))
    return bytes(tensor.SerializeToString())


def _fields(data: bytes | mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The fields of an encoded message: number, wire type, and where each begins and ends.

    The third number is where the field begins, the fourth where its value does (protobuf,
    "Encoding").
    """
    at = start
    while at < end:
        first = at
        key, at = _read_varint(data, at)
        wire, value = key & 7, at
        if wire == _VARINT:
            _, at = _read_varint(data, at)
        elif wire == _EIGHT_BYTES:
            at += 8
        elif wire == _FOUR_BYTES:
            at += 4
        elif wire == _BYTES:
            length, value = _read_varint(data, at)
            at = value + length
        else:
            raise ValueError(f"wire type {wire}")
        if at > end:
            raise ValueError("cut off")
        yield key >> 3, wire, first, value, at


def _read_varint(data: bytes | mmap, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
