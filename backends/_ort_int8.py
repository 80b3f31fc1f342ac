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
from auditor.replays import qdq
from backends import _int8

if TYPE_CHECKING:
    import onnx

    from auditor.ports import Arrays
    from auditor.records.backend import BuildRequest


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
    quantised = onnx.load(path)
    weights, grids = _weights(quantised.graph), qdq.grids(quantised.graph)
    before = onnx.load(prepared, load_external_data=False)
    if names := qdq.original_names(quantised.graph, before.graph):
        for node in quantised.graph.node:
            for field in (node.input, node.output):
                field[:] = [names.get(name, name) for name in field]
        del quantised.graph.value_info[:]
        onnx.save(quantised, path)
    note = (
        f"Quantised to 8 bits by onnxruntime.quantization.quantize_static with its defaults, on "
        f"{_int8.count(request)} calibration samples: {len(weights)} constants, {len(grids)} "
        "activations."
    )
    return _int8.Quantised(weights, grids, note)


def _weights(graph: onnx.GraphProto) -> Arrays:
    """The real values of the quantised constants."""
    from onnx import numpy_helper

    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    weights: Arrays = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and all(n in stored for n in node.input):
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            integers, scale, zero = (stored[n] for n in node.input)
            across = [1] * integers.ndim
            if scale.size > 1:
                across[axis] = -1
            offset = zero.astype(np.int32).reshape(across)
            real = (integers.astype(np.int32) - offset) * scale.reshape(across)
            weights[qdq.plain(node.output[0])] = real.astype(np.float32)
    return weights
