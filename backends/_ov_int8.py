"""Quantising after training with NNCF, OpenVINO's own tool, with its defaults.

Source: https://docs.openvino.ai/, "Basic Quantization Flow".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.errors import BackendError
from backends import _int8

if TYPE_CHECKING:
    from auditor.ports import Array, Arrays
    from auditor.records.backend import BuildRequest

_PRODUCTS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
_MOVES = ("Reshape", "Convert", "Unsqueeze", "Squeeze")


def write(model: Any, request: BuildRequest, path: Path) -> _int8.Quantised:
    """Write the quantised model; returns what was chosen.

    Args:
        model: the ``openvino.Model`` as read.
        request: says where the calibration samples are.
        path: the .xml file.

    Raises:
        BackendError: NNCF is missing or failed.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise BackendError(
            f"NNCF, which quantises for OpenVINO, cannot be imported: {error}",
            "pip install 'sysnoise-auditor[nncf]'",
        ) from error
    originals = _originals(model)
    many = _int8.count(request)
    try:
        data = nncf.Dataset(list(_int8.samples(request)))
        made = nncf.quantize(model, data, subset_size=many)
        openvino.save_model(made, str(path), compress_to_fp16=False)
    except Exception as error:  # it raises anything
        raise BackendError(f"NNCF cannot quantise the model: {error}") from error
    weights, grids = _weights(made, originals), _grids(made)
    note = (
        f"Quantised to 8 bits by nncf.quantize {nncf.__version__} with its defaults, on {many} "
        f"calibration samples: {len(weights)} weights, {len(grids)} activations."
    )
    return _int8.Quantised(weights, grids, note)


def _originals(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By product, the name and shape of its constant weights."""
    found = {}
    for op in model.get_ops():
        if op.get_type_name() in _PRODUCTS:
            constant = _through(op.input_value(1).get_node())
            if constant.get_type_name() == "Constant":
                shape = tuple(constant.get_output_shape(0))
                found[op.get_friendly_name()] = constant.get_friendly_name(), shape
    return found


def _through(op: Any) -> Any:
    while op.get_type_name() in _MOVES:
        op = op.input_value(0).get_node()
    return op


def _weights(model: Any, originals: dict[str, tuple[str, tuple[int, ...]]]) -> Arrays:
    found: Arrays = {}
    for op in model.get_ops():
        name, shape = originals.get(op.get_friendly_name(), ("", ()))
        real = _real(_through(op.input_value(1).get_node())) if name else None
        if real is not None and real.size == int(np.prod(shape)):
            found[name] = real.reshape(shape)
    return found


def _real(op: Any) -> Array | None:
    """The value of (integers − zero point) × scale."""
    if op.get_type_name() != "Multiply":
        return None
    first, scale = (_constant(op.input_value(i).get_node()) for i in (0, 1))
    inner = op.input_value(0).get_node()
    if first is None and inner.get_type_name() == "Subtract":
        integers, zero = (_constant(inner.input_value(i).get_node()) for i in (0, 1))
        first = integers - zero if integers is not None and zero is not None else None
    return np.asarray(first * scale) if first is not None and scale is not None else None


def _constant(op: Any) -> Array | None:
    while op.get_type_name() == "Convert":
        op = op.input_value(0).get_node()
    return np.array(op.data, np.float32) if op.get_type_name() == "Constant" else None


def _grids(model: Any) -> Arrays:
    found: Arrays = {}
    for op in model.get_ops():
        if op.get_type_name() == "FakeQuantize":
            low, high = (np.array(op.input_value(i).get_node().data, np.float64) for i in (1, 2))
            levels = np.full_like(low, op.get_attributes()["levels"])
            for name in op.input_value(0).get_names():
                found[name] = np.stack([low, high, levels])
    return found
