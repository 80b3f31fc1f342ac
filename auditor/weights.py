"""A model's large constants, held once beside its graph and handed to every session.

The reference runs as one session for the whole graph and one per segment. With the weights inside
each model they would be serialised and parsed for each; here they are arrays handed over as they
are (``SessionOptions.add_external_initializers``; ONNX Runtime 1.32 still makes its own copy, once
for the whole graph and once over all segments). Weights in external files are mapped into memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.ports import Array, Arrays

# Smaller constants stay in the graph: shapes and axes must be visible to shape inference.
_SMALL = 1024  # bytes
_DETACHED = "detached"  # a location that is never opened: ONNX Runtime is handed the array
_T = onnx.TensorProto
_FLOATS = (_T.FLOAT, _T.DOUBLE, _T.FLOAT16)
_SIGNED = (_T.INT8, _T.INT16, _T.INT32, _T.INT64)
_UNSIGNED = (_T.UINT8, _T.UINT16, _T.UINT32, _T.UINT64)
_PLAIN = frozenset((*_FLOATS, *_SIGNED, *_UNSIGNED))  # types that numpy has too


def detach(proto: onnx.ModelProto, folder: Path) -> tuple[onnx.ModelProto, Arrays]:
    """Take the large initialisers of the main graph out of a model.

    Args:
        proto: the model, with initialisers inline or in external files; consumed.
        folder: where external files lie; every location was found to be inside it.

    Returns:
        The model with stubs in their place, and the arrays by name, read-only. Large Constant
        nodes have become initialisers.

    Raises:
        ValueError: a tensor's values are not there, or not as many as its shape says.
    """
    graph = proto.graph
    if proto.ir_version >= 4:  # before, every initialiser had to be a graph input as well
        _constants_to_initializers(graph)
    arrays: Arrays = {}
    for tensor in graph.initializer:
        if tensor.data_type not in _PLAIN or _size(tensor) < _SMALL:
            continue
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        try:
            values = _mapped(tensor, folder) if external else numpy_helper.to_array(tensor)
        except (ValueError, OSError) as error:
            raise ValueError(f"tensor `{tensor.name}`: {error}") from error
        arrays[tensor.name] = values
        tensor.CopyFrom(_stub(tensor))
    # Protobuf frees a message's memory only with the message: make another without the weights.
    return onnx.ModelProto.FromString(proto.SerializeToString()), arrays


def is_detached(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor is the stub of a detached one."""
    return any(e.key == "location" and e.value == _DETACHED for e in tensor.external_data)


def attach(tensor: onnx.TensorProto, arrays: Mapping[str, Array]) -> onnx.TensorProto:
    """An initialiser with its values inside, whether it was detached or not."""
    if tensor.name in arrays and is_detached(tensor):
        return numpy_helper.from_array(arrays[tensor.name], tensor.name)
    return tensor


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Some exporters write weights as Constant nodes: the same values under the same names."""
    kept = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        if node.op_type == "Constant" and value is not None and _size(value) >= _SMALL:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _stub(tensor: onnx.TensorProto) -> onnx.TensorProto:
    stub = onnx.TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    stub.external_data.add(key="location", value=_DETACHED)
    return stub


def _mapped(tensor: onnx.TensorProto, folder: Path) -> Array:
    """An external tensor as a read-only view of its file (ONNX external data format)."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        folder / where["location"],
        dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<"),
        mode="r",
        offset=int(where.get("offset", 0)),
        shape=tuple(tensor.dims),
    )


def _size(tensor: onnx.TensorProto) -> int:
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * itemsize
