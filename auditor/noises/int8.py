"""A float model quantised to 8 bits by its backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx

from auditor.graphs import artefact, surgery
from auditor.graphs.weights import inside
from auditor.noises import _calibrated, _levels, bf16, int8_dynamic
from auditor.noises._calibrated import Fit
from auditor.noises._cause import Cause
from auditor.ports import Array, Arrays, SegmentGraph, Variant
from auditor.replays import recurrent, rounding, sessions
from auditor.replays.editor import Editor
from auditor.replays.kernel_layout import stated
from auditor.replays.layout import Layout

RECURRENT = "; what LSTM layers read, too, by its range in each step"
RUNNING = "; what products read, too, while the model runs, "
_STATED = frozenset(("i8", "u8", "int8", "uint8", "I8", "INT8"))
# Operators with weights.
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QUANTISED = (
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
)
# DynamicQuantizeLinear exists from here on.
_LARGEST = float(np.finfo(np.float32).max) / 4  # a range of weights is finite
_OPSET = 11
_SOME = 4096
_ON_GRID = "outputs rounded to the 256 values that they lie on"
_ON_GRID_INSIDE = "a tensor before the outputs rounded to the 256 values that it must lie on"


@dataclass(frozen=True, slots=True)
class _Scheme:
    """What is rounded to 256 values, and how those are laid out.

    Attributes:
        name: said to the user.
        per_channel: one scale for each output channel of a weight, or one for all.
        weights: symmetric around 0 with 255 values, or spanning minimum to maximum with 256.
        inputs: the same for what products read; None leaves it alone.
        outputs: the same for what they write.
    """

    name: str
    per_channel: bool
    weights: Literal["symmetric", "asymmetric"]
    inputs: Literal["symmetric", "asymmetric"] | None = None
    outputs: Literal["symmetric", "asymmetric"] | None = None


SCHEMES = (
    _Scheme("weights per channel", True, "symmetric"),
    _Scheme("weights per tensor", False, "symmetric"),
    _Scheme("weights per channel, with zero points", True, "asymmetric"),
    _Scheme("weights per tensor, inputs by their range", False, "symmetric", "asymmetric"),
    _Scheme("weights per channel, inputs by their range", True, "symmetric", "asymmetric"),
    _Scheme("weights per channel, inputs by their largest", True, "symmetric", "symmetric"),
    _Scheme("weights per tensor with zero point, inputs by range", False, *("asymmetric",) * 2),
    _Scheme(
        "weights per channel, inputs and outputs by range", True, "symmetric", *("asymmetric",) * 2
    ),
)


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """A float segment with its products quantised by each of ``SCHEMES``.

    Scales come from the values themselves; ``_fitted`` has those of a calibration.
    """
    for variant in artefact.variants(segment, "8 bits"):
        yield variant
        while_running = recurrent.quantising(replace(segment, model=variant.model))
        if while_running is not None:
            yield Variant(variant.name + RECURRENT, while_running)
        if not segment.grids:  # of a calibration
            stored = {n for n, c in segment.compiled.items() if c.storage == "8 bits"}
            around = replace(segment, model=variant.model)
            for read in int8_dynamic.reading(around, stored.__contains__):
                yield Variant(variant.name + RUNNING + read.name, read.model)
    layout = Layout(segment.model, segment.weights)
    weighted = _weighted(layout)
    if weighted:
        for scheme in SCHEMES:
            yield Variant(scheme.name, _quantised(layout, weighted, scheme))


def _fitted(segment: SegmentGraph, inputs: Arrays, observed: Arrays) -> Iterable[Variant]:
    """Outputs, or one product, on the grids that the backend's own tensors speak for."""
    layout = Layout(segment.model, segment.weights)
    weighted = _weighted(layout)
    plain = sessions.inside(segment.model, 1, inputs, set(observed))
    found = {n: _levels.grid(v, plain[n]) for n, v in observed.items() if n in plain}
    if grids := {name: body for name, body in found.items() if body is not None}:
        yield from _on_grids(segment.model, segment.weights, grids, _ON_GRID)
    for model, inner in _levels.inside(segment.model, inputs, observed):
        yield from _on_grids(model, segment.weights, inner, _ON_GRID_INSIDE)
    if weighted:
        whole = inside(segment.model, segment.weights)
        rounded: Iterator[Variant] = iter(())
        if stated(segment.kernels, bf16.FORMAT.stated):
            rounded = rounding.variants(replace(segment, model=whole), bf16.FORMAT, bf16.SITES[2:])
        narrow = next((v.model for v in rounded), None)
        for fit in _calibrated.fits(whole, weighted, inputs, observed, narrow=narrow):
            yield Variant(fit.name, _with(layout, fit))


def _on_grids(
    model: onnx.ModelProto, weights: Mapping[str, Array], grids: Mapping[str, str], name: str
) -> Iterator[Variant]:
    """A segment with tensors on grids: alone, and with its products quantised."""
    yield Variant(name, _rounded(model, grids))
    layout = Layout(model, weights)
    weighted = _weighted(layout)
    for scheme in SCHEMES if weighted else ():
        if scheme.outputs is None:
            quantised = _quantised(layout, weighted, scheme)
            yield Variant(f"{scheme.name}, {name}", _rounded(quantised, grids))


def _rounded(model: onnx.ModelProto, grids: Mapping[str, str]) -> onnx.ModelProto:
    written = {i: n.output[0] for i, n in enumerate(model.graph.node)}
    return surgery.passing(model, {}, {i: grids[o] for i, o in written.items() if o in grids})


def _weighted(layout: Layout) -> dict[int, Array]:
    """Weights of the products that can be quantised, by the position of their node."""
    model = layout.model
    if surgery.opset(model) < _OPSET or any(True for _ in surgery.find(model, _QUANTISED)):
        return {}
    weighted = {}
    for index, node in surgery.find(model, _WEIGHTED):
        weights = layout.constant(node.input[1])
        if weights is None or weights.dtype != np.float32 or weights.ndim < 2:
            continue
        if weights.size and _most(weights) <= _LARGEST:  # NaN and infinity have no 8 bits
            weighted[index] = weights
    return weighted


def _with(layout: Layout, fit: Fit) -> onnx.ModelProto:
    editor = Editor(layout.model)
    for index, node in enumerate(layout.nodes):
        if index != fit.index:
            editor.copy(node)
            continue
        x, original, *others = node.input
        if fit.operand is not None:
            step = editor.constant(fit.operand.step)
            zero = editor.constant(-fit.operand.low, np.uint8)
            integers = editor.add("QuantizeLinear", x, step, zero)
            x = editor.add("DequantizeLinear", integers, step, zero)
        weights = fit.weights
        if (trained := layout.constant(original)) is not None:
            weights = _stored(weights, trained)
        inputs = (x, editor.constant(weights), *others)
        editor.add(node.op_type, *inputs, to=node.output[0], **surgery.attributes(node))
    return editor.model


def _quantised(layout: Layout, weighted: dict[int, Array], scheme: _Scheme) -> onnx.ModelProto:
    editor = Editor(layout.model)
    for index, node in enumerate(layout.nodes):
        if index not in weighted:
            editor.copy(node)
            continue
        axis = _channel(node, weighted[index]) if scheme.per_channel else None
        x, *others = node.input
        if scheme.inputs:
            x = _activation(editor, x, scheme.inputs)
        weights = _stored(_weights(weighted[index], axis, scheme.weights), weighted[index])
        inputs = (x, editor.constant(weights), *others[1:])
        if scheme.outputs is None:
            editor.add(node.op_type, *inputs, to=node.output[0], **surgery.attributes(node))
        else:
            plain = editor.add(node.op_type, *inputs, **surgery.attributes(node))
            editor.add("Identity", _activation(editor, plain, scheme.outputs), to=node.output[0])
    return editor.model


def _channel(node: onnx.NodeProto, weights: Array) -> int:
    """Axis of a weight along which its outputs lie."""
    if node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not surgery.attributes(node).get("transB", 0)
    ):
        return weights.ndim - 1
    return 1 if node.op_type == "ConvTranspose" else 0


def _most(values: Array, **along: Any) -> Array:
    """The largest absolute values, without a tensor of all of them."""
    return np.asarray(np.maximum(values.max(**along), -values.min(**along)))


def _weights(values: Array, axis: int | None, layout: str) -> Array:
    """Weights rounded to 8 bits (eq. 9 and 10 of the paper).

    In place: layers of tens of megabytes cost more for new memory than for arithmetic.
    """
    axes = tuple(i for i in range(values.ndim) if i != axis)
    if layout == "symmetric":
        scale = _most(values, axis=axes, keepdims=True) / np.float32(127)
        scale[scale == 0] = 1
        steps = values / scale
        np.rint(steps, out=steps)
    else:
        low = np.minimum(values.min(axis=axes, keepdims=True), 0)
        high = np.maximum(values.max(axis=axes, keepdims=True), 0)
        scale = (high - low) / np.float32(255)
        scale[scale == 0] = 1
        zero = np.rint(-low / scale)
        steps = values / scale
        np.rint(steps, out=steps)
        steps += zero
        np.clip(steps, 0, 255, out=steps)
        steps -= zero
    steps *= scale
    return steps


def _stored(rounded: Array, trained: Array) -> Array:
    """Weights as a file holds them, which is in half precision where it holds the trained ones so.

    Steps times a scale are rounded once more then.
    """
    with np.errstate(over="ignore"):
        some = trained.reshape(-1)[:_SOME]  # most weights tell at once
        halves = all(np.array_equal(part.astype(np.float16), part) for part in (some, trained))
        return rounded.astype(np.float16).astype(np.float32) if halves else rounded


def _activation(editor: Editor, name: str, layout: str) -> str:
    """An activation rounded to 8 bits with a scale from its own range."""
    if layout == "asymmetric":
        integers, scale, zero = editor.split("DynamicQuantizeLinear", name, outputs=3)
        return editor.add("DequantizeLinear", integers, scale, zero)
    most = editor.add("ReduceMax", editor.add("Abs", name), keepdims=0)
    tiny = editor.constant(np.finfo(np.float32).tiny)
    scale = editor.add("Max", editor.add("Div", most, editor.constant(127.0)), tiny)
    return editor.add("Mul", editor.add("Round", editor.add("Div", name, scale)), scale)


NOISE = Cause(
    id="precision.int8",
    type="data precision",
    title="Weights, or weights and activations, are quantised to 8 bits",
    cause=(
        "Deployments quantise after training to save memory and time: values are rounded to 256 "
        "steps of one scale, and nothing in training compensates."
    ),
    applies=(
        "Conv, ConvTranspose, Gemm and MatMul with constant float32 weights, in segments "
        "without quantised operators, and float32 outputs of whatever segment that lie on 256 "
        "values; operator set 11 or later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision, and eq. 9 and 10; ONNX "
        "operator DynamicQuantizeLinear; NNCF documentation, weight compression"
    ),
    advice=(
        "calibrate on inputs as they are deployed, or leave the listed layers out of quantisation"
    ),
    remedies={
        "ort": (
            "calibrate on inputs as they are deployed, quantise weights per channel, or leave the "
            "listed layers out of quantisation (nodes_to_exclude)"
        ),
        "ov": (
            "leave the listed layers out (NNCF: ignored_scope), and set "
            "DYNAMIC_QUANTIZATION_GROUP_SIZE to 0"
        ),
        "trt": "build without INT8 for the listed layers",
    },
    ablations={"ov": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}},
    stated=_STATED,
    forms=(
        artefact.form("8 bits"),
        artefact.form("8 bits") + RECURRENT,
        *(artefact.form("8 bits") + RUNNING + name for name in int8_dynamic.NOISE.forms),
        *artefact.CHOSEN_FORMS,
        *(scheme.name for scheme in SCHEMES),
        _ON_GRID,
        _ON_GRID_INSIDE,
        *(
            f"{scheme.name}, {where}"
            for where in (_ON_GRID, _ON_GRID_INSIDE)
            for scheme in SCHEMES
            if scheme.outputs is None
        ),
        *_calibrated.FORMS,
    ),
    variants=_variants,
    fitted=_fitted,
)
