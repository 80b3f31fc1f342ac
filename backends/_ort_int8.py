"""Quantising after training with ONNX Runtime's own tool, ``quantize_static``.

Its defaults: QuantizeLinear and DequantizeLinear around each operator, signed 8 bits, one scale for
a tensor, calibrated by the smallest and largest values seen; before that the model is optimised
and its shapes are inferred, as the tool asks for.
Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.errors import BackendError
from backends import _int8

if TYPE_CHECKING:
    import onnx

    from auditor.ports import Arrays
    from auditor.records import BuildRequest

# What the tool appends to the names of tensors.
_SUFFIXES = ("_DequantizeLinear_Output", "_QuantizeLinear_Input")


def write(request: BuildRequest, path: Path) -> _int8.Quantised:
    """Write the quantised model; returns what was chosen.

    Raises:
        BackendError: the tool failed.
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime's quantisation cannot be imported: {error}",
            "pip install onnx onnxruntime",
        ) from error

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = _int8.samples(request)

        def get_next(self) -> Any:
            return next(self._left, None)

    import onnx

    prepared = path.with_name("prepared.onnx")
    logging.disable(logging.WARNING)
    try:
        quant_pre_process(str(request.model_path), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(path), Reader())
    except Exception as error:  # it raises anything
        raise BackendError(f"ONNX Runtime cannot quantise the model: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
    weights, grids = _chosen(onnx.load(path).graph)
    note = (
        f"Quantised to 8 bits by onnxruntime.quantization.quantize_static with its defaults, on "
        f"{_int8.count(request)} calibration samples: {len(weights)} constants, {len(grids)} "
        "activations."
    )
    return _int8.Quantised(weights, grids, note)


def _chosen(graph: onnx.GraphProto) -> tuple[Arrays, Arrays]:
    from onnx import numpy_helper

    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    weights: Arrays = {}
    grids: Arrays = {}
    for node in graph.node:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if node.op_type == "DequantizeLinear" and all(n in stored for n in node.input):
            integers, scale, zero = (stored[n] for n in node.input)
            across = [1] * integers.ndim
            if scale.size > 1:
                across[axis] = -1
            offset = zero.astype(np.int32).reshape(across)
            real = (integers.astype(np.int32) - offset) * scale.reshape(across)
            weights[_plain(node.output[0])] = real.astype(np.float32)
        elif node.op_type == "QuantizeLinear" and all(n in stored for n in node.input[1:]):
            scale, zero = (stored[n] for n in node.input[1:])
            if scale.size == 1 and zero.dtype.itemsize == 1:
                limits = np.iinfo(zero.dtype)
                ends = [
                    (float(end) - float(zero)) * float(scale) for end in (limits.min, limits.max)
                ]
                grids[_plain(node.input[0])] = np.array([*ends, 256.0])
    return weights, grids


def _plain(name: str) -> str:
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name
