"""8-bit models as NNCF makes them, OpenVINO's own tool: quantising, and where the 8 bits are.

Source: https://docs.openvino.ai/, "Basic Quantization Flow" and "FakeQuantize".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.errors import BackendError
from backends import _int8

if TYPE_CHECKING:
    from auditor.ports import Array, Arrays
    from auditor.records.backend import BuildRequest

_PRODUCTS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")
# Levels, and the first integer where the range is that of signed ones.
_SIGNED = {256: -128, 255: -127}
_WHOLE = 1e-3  # of a step
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


def choices(model: Any, plain: Any) -> _int8.Quantised:
    """What was chosen for a model that was quantised elsewhere; its other constants too.

    Args:
        model: the ``openvino.Model`` with its FakeQuantize.
        plain: the same without, whose operations and constants have the same names.
    """
    others = {
        op.get_friendly_name(): np.array(op.data)
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and not op.get_element_type().is_dynamic()
    }
    return _int8.Quantised(others | _weights(model, _originals(plain)), _grids(model), "")


def explicit(model: Any) -> Any | None:
    """A copy that says what OpenVINO makes of FakeQuantize: 8 bits, and how these are widened.

    A FakeQuantize hides the integers that the program holds; this form, which a QuantizeLinear of
    ONNX has too, shows them. Only one grid for a whole tensor is written so. A tensor that nothing
    else reads gives its name to what it is widened to, but for inputs.

    Args:
        model: the ``openvino.Model`` as read; it stays as it is.

    Returns:
        The copy, or None where nothing is to be written so.
    """
    copy = model.clone()
    quantising = [op for op in copy.get_ordered_ops() if op.get_type_name() == "FakeQuantize"]
    written = [_write_out(op) for op in quantising]
    return copy if any(written) else None


def _write_out(op: Any) -> bool:
    """Replace a FakeQuantize by a rounding to 8 bits and what widens it; whether it could be."""
    from openvino import Type, opset13

    source, levels = op.input_value(0), op.get_attributes()["levels"]
    ends = [_constant(op.input_value(i).get_node()) for i in range(1, 5)]
    if levels not in _SIGNED or source.get_element_type() != Type.f32:
        return False
    single = [float(end.reshape(())) for end in ends if end is not None and end.size == 1]
    if _constant(source.get_node()) is not None or len(single) != len(ends):
        return False
    low, high, *results = single
    with np.errstate(over="ignore"):
        scale = np.float32(np.float32(high) - np.float32(low)) / np.float32(levels - 1)
    if results != [low, high] or not 0 < scale < np.inf:
        return False
    signed = abs(low / scale - _SIGNED[levels]) < _WHOLE
    first = _SIGNED[levels] if signed else 0
    rounded = opset13.fake_quantize(
        source,
        op.input_value(1),
        op.input_value(2),
        np.float32(first),
        np.float32(first + levels - 1),
        levels,
    )
    rounded.set_friendly_name(op.get_friendly_name())
    value = opset13.convert(opset13.convert(rounded, "i8" if signed else "u8"), "f32")
    if zero := round(first - low / float(scale)):
        value = opset13.subtract(value, np.float32(zero))
    value = opset13.multiply(value, scale)
    named = source.get_node().get_type_name() != "Parameter"
    if named and len(source.get_target_inputs()) == 2:  # the FakeQuantize, and what stands for it
        value.output(0).get_tensor().set_names(source.get_names())
        source.get_tensor().set_names(set())
    op.output(0).replace(value.output(0))
    return True


def _originals(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The name and shape of each product's constant weights."""
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
    """The value of (integers − zero point) × scale, or of a FakeQuantize of a constant."""
    if op.get_type_name() == "FakeQuantize":
        ends = [_constant(_through(op.input_value(i).get_node())) for i in range(5)]
        shape = tuple(op.get_input_shape(0))
        return _rounded(shape, ends, op.get_attributes()["levels"])
    if op.get_type_name() != "Multiply":
        return None
    first, scale = (_constant(op.input_value(i).get_node()) for i in (0, 1))
    inner = op.input_value(0).get_node()
    if first is None and inner.get_type_name() == "Subtract":
        integers, zero = (_constant(inner.input_value(i).get_node()) for i in (0, 1))
        first = integers - zero if integers is not None and zero is not None else None
    return np.asarray(first * scale) if first is not None and scale is not None else None


def _rounded(shape: tuple[int, ...], ends: Sequence[Array | None], levels: int) -> Array | None:
    """FakeQuantize, by its definition, of values in this shape."""
    values, *known = [end for end in ends if end is not None]
    if len(known) != 4:
        return None
    low, high, least, most = known
    span = np.where(high > low, high - low, 1)  # of a channel without values
    step = np.rint((np.clip(values.reshape(shape), low, high) - low) / span * (levels - 1))
    return np.asarray(step / (levels - 1) * (most - least) + least, np.float32)


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
