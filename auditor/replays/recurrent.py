"""Recurrent layers as OpenVINO's bfloat16 kernels compute them, step by step.

Measured on OpenVINO 2026.4 with AMX, bit for bit: the sequence and the hidden state are rounded to
bfloat16 in every step, bias, gates and cell state stay in float32, and GRU's reset hidden state is
rounded before it is multiplied. Weights are converted by OpenVINO itself, which rounds to nearest
only where the last bit that is kept is odd, and truncates where it is even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.graphs.storage import grid_steps
from auditor.ports import Array, SegmentGraph
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

# Scan, Squeeze and Cast with bfloat16 as they are written here.
_OPSET = 13
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
# Functions of gates that have parameters.
_WITH_BETA = ("Affine", "HardSigmoid", "ScaledTanh")
_WITH_ALPHA = (*_WITH_BETA, "Elu", "LeakyRelu", "ThresholdedRelu")


def in_bfloat16(segment: SegmentGraph) -> onnx.ModelProto | None:
    """A segment with its recurrent layers in bfloat16; None where it has none like these."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return None
    layout = Layout(model, segment.weights)
    editor = Editor(model)
    for node in layout.nodes:
        layer = _layer(layout, node) if node.op_type in GATES else None
        if layer is None:
            editor.copy(node)
        else:
            layer.emit(editor)
    return editor.changed


def quantising(segment: SegmentGraph) -> onnx.ModelProto | None:
    """A segment whose LSTM layers multiply 8 bits; None where no layer's weights lie on such grids.

    ONNX Runtime's DynamicQuantizeLSTM (ContribOperators.md): the sequence and the hidden state are
    quantised in each step, by their range.
    """
    layout = Layout(segment.model, segment.weights)
    editor = Editor(segment.model)
    for node in layout.nodes:
        names = [*node.input, *[""] * (8 - len(node.input))]
        layered = _is_lstm(node)
        w, r = (_on_grid(layout.constant(n)) if layered else None for n in names[1:3])
        if w is None or r is None:
            editor.copy(node)
            continue
        names[1:3] = (editor.constant(integers, integers.dtype) for integers in (w[0], r[0]))
        parameters = [editor.constant(value, value.dtype) for value in (*w[1:], *r[1:])]
        made = helper.make_node("DynamicQuantizeLSTM", [*names, *parameters], list(node.output))
        made.domain = "com.microsoft"
        made.attribute.extend(node.attribute)
        editor.put(made)
    if editor.changed is None:
        return None
    if all(entry.domain != "com.microsoft" for entry in editor.model.opset_import):
        editor.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return editor.model


def unquantised(segment: SegmentGraph) -> onnx.ModelProto | None:
    """A segment whose LSTM layers of 8 bits read real numbers; None where it has none.

    Of DynamicQuantizeLSTM only the weights are on a grid then: OpenVINO has no other LSTM.
    """
    if all(node.op_type != "DynamicQuantizeLSTM" for node in segment.model.graph.node):
        return None
    layout = Layout(segment.model, segment.weights)
    editor = Editor(segment.model)
    for node in layout.nodes:
        if node.op_type == "DynamicQuantizeLSTM":
            given = [layout.constant(name) if name else None for name in node.input]
            w, r = _real(given[1], *given[8:10]), _real(given[2], *given[10:12])
            if w is not None and r is not None:
                names = [*node.input[:8]]
                names[1:3] = (editor.constant(weights) for weights in (w, r))
                made = helper.make_node("LSTM", names, list(node.output), name=node.name)
                made.attribute.extend(node.attribute)
                editor.put(made)
                continue
        editor.copy(node)
    return editor.changed


def _is_lstm(node: onnx.NodeProto) -> bool:
    return node.op_type == "LSTM" and not surgery.attributes(node).get("layout", 0)


def _on_grid(weights: Array | None) -> tuple[Array, Array, Array] | None:
    """Weights ``[directions, rows, columns]`` of 8 bits, transposed, their scales and zeros."""
    if weights is None or weights.dtype != np.float32:
        return None
    rows = weights.reshape(len(weights), -1)
    steps = grid_steps(rows)
    if not np.isfinite(steps).all():
        return None
    integers = np.rint(rows / steps[:, None])
    largest = np.abs(integers).max(axis=1)
    # The step to its last bit: what the largest value is a multiple of.
    scales = (np.abs(rows).max(axis=1) / np.maximum(largest, 1)).astype(np.float32)
    signed = integers.min() >= -128 and integers.max() <= 127
    zeros = np.zeros(len(rows)) if signed else -integers.min(axis=1)
    kind = np.int8 if signed else np.uint8
    stored = (integers + zeros[:, None]).astype(kind).reshape(weights.shape)
    return np.ascontiguousarray(stored.transpose(0, 2, 1)), scales, zeros.astype(kind)


def _real(weights: Array | None, scale: Array | None, zero: Array | None) -> Array | None:
    """float32 ``[directions, rows, columns]`` of transposed integers, scaled as a whole or by row.

    Args:
        weights: ``[directions, columns, rows]``.
        scale: ``[directions]`` or ``[directions, rows]``.
        zero: of the same shape.
    """
    if weights is None or scale is None or zero is None:
        return None
    apart = weights.astype(np.int32).transpose(0, 2, 1) - zero.reshape(len(zero), -1, 1)
    return np.asarray(apart * scale.reshape(len(scale), -1, 1), np.float32)


def _layer(layout: Layout, node: onnx.NodeProto) -> _Layer | None:
    given = surgery.attributes(node)
    names = [*node.input, *[""] * (8 - len(node.input))]
    w, r = layout.constant(names[1]), layout.constant(names[2])
    bias = layout.constant(names[3]) if names[3] else None
    if w is None or r is None or (names[3] and bias is None) or given.get("layout", 0):
        return None
    if w.dtype != np.float32:
        return None
    explicit = node.op_type == "GRU" and not given.get("linear_before_reset", 0)
    if explicit and (given.keys() & {"activations", "clip"}):
        return None
    if bias is None:
        bias = np.zeros((len(w), 2 * w.shape[1]), np.float32)
    return _Layer(node, given, names, _converted(w), _converted(r), bias, explicit)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One recurrent layer.

    Attributes:
        given, names: its attributes and inputs, "" for those that it has not.
        explicit: whether it is a GRU whose steps must be written out.
    """

    node: onnx.NodeProto
    given: dict[str, Any]
    names: Sequence[str]
    w: Array
    r: Array
    bias: Array
    explicit: bool

    @property
    def states(self) -> int:
        """How many states it hands on from step to step."""
        return 2 if self.node.op_type == "LSTM" else 1

    def emit(self, editor: Editor) -> None:
        """Add nodes that give the layer's outputs."""
        x = _rounded(editor, self.names[0])
        shape = editor.add("Shape", x)
        steps, batch = (
            editor.add("Gather", shape, editor.constant(i, np.int64), axis=0) for i in (0, 1)
        )
        zero, one = editor.constant(0, np.int64), editor.constant(1, np.int64)
        times = editor.add("Range", zero, steps, one)
        lengths = self.names[4] or editor.add("Expand", steps, self._vector(editor, batch))
        lengths = editor.cast(lengths, TensorProto.INT64)
        until = editor.add("Reshape", lengths, editor.constant([1, -1, 1], np.int64))
        results = [
            self._direction(editor, d, x, times, until, batch) for d in range(self.w.shape[0])
        ]
        axes = (1, *(0,) * self.states)
        for output, parts, axis in zip(
            self.node.output, zip(*results, strict=True), axes, strict=False
        ):
            if output:
                editor.add("Concat", *parts, to=output, axis=axis)

    def _vector(self, editor: Editor, number: str) -> str:
        return editor.add("Reshape", number, editor.constant([1], np.int64))

    def _direction(
        self, editor: Editor, d: int, x: str, times: str, until: str, batch: str
    ) -> list[str]:
        """[steps, 1, batch, hidden], and the last states [1, batch, hidden]."""
        hidden = self.r.shape[2]
        states = []
        for which in range(self.states):
            name = self.names[5 + which]
            if name:
                index = editor.constant([d], np.int64)
                value = editor.add("Gather", name, index, axis=0)
                states.append(_rounded(editor, value) if which == 0 else value)
                continue
            one = editor.constant([1], np.int64)
            width = editor.constant([hidden], np.int64)
            shape = editor.add("Concat", one, self._vector(editor, batch), width, axis=0)
            states.append(editor.add("ConstantOfShape", shape))
        backwards = d == 1 or self.given.get("direction") == "reverse"
        body = self._step(editor, d, until)
        *last, every = editor.split(
            "Scan",
            *states,
            x,
            times,
            outputs=self.states + 1,
            body=body,
            num_scan_inputs=2,
            scan_input_directions=[int(backwards)] * 2,
            scan_output_directions=[int(backwards)],
        )
        return [every, *last]

    def _step(self, editor: Editor, d: int, until: str) -> onnx.GraphProto:
        """One step: states and result from states, input and time."""
        node = helper.make_node
        nodes = [
            node("Less", ["time", until], ["during"]),
            node("Constant", [], ["zero"], value_float=0.0),
        ]
        if self.explicit:
            nodes += self._gated(editor, d)
        else:
            nodes += self._plain(editor, d)
        nodes += _narrowed("new", "h1")
        held = [("h1", "h", "h2")] + ([("new_c", "c", "c2")] if self.states > 1 else [])
        nodes += [node("Where", ["during", a, b], [to]) for a, b, to in held]
        nodes.append(node("Where", ["during", "h1", "zero"], ["y"]))

        def value(name: str, kind: int, dims: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, [None] * dims)

        inputs = [value(n, TensorProto.FLOAT, 3) for n in ("h", "c")[: self.states]]
        inputs += [value("x", TensorProto.FLOAT, 2), value("time", TensorProto.INT64, 0)]
        outputs = [value(n, TensorProto.FLOAT, 3) for n in ("h2", "c2")[: self.states]]
        outputs.append(value("y", TensorProto.FLOAT, 3))
        return surgery.enclosed(helper.make_graph(nodes, "step", inputs, outputs))

    def _plain(self, editor: Editor, d: int) -> list[onnx.NodeProto]:
        """The layer itself, over one step."""
        kept = ("hidden_size", "clip", "input_forget", "linear_before_reset")
        options = {k: v for k, v in self.given.items() if k in kept}
        options.setdefault("hidden_size", self.r.shape[2])
        functions = [f.decode() for f in self.given.get("activations", [])]
        size = len(functions) // self.w.shape[0]
        before, own = functions[: d * size], functions[d * size : (d + 1) * size]
        if own:
            options["activations"] = own
        # Each function that has the parameter takes the next value, in all directions.
        for name, having in (("activation_alpha", _WITH_ALPHA), ("activation_beta", _WITH_BETA)):
            first, count = (sum(f in having for f in part) for part in (before, own))
            if values := self.given.get(name, [])[first : first + count]:
                options[name] = values
        weights = [editor.constant(a[d : d + 1]) for a in (self.w, self.r, self.bias)]
        read = ["x1", *weights, "", "h"]
        if self.states > 1:
            read.append("c")
            if self.names[7]:
                index = editor.constant([d], np.int64)
                read.append(editor.add("Gather", self.names[7], index, axis=0))
        written = ["", "new", *(["new_c"] if self.states > 1 else [])]
        return [
            helper.make_node("Constant", [], ["first"], value_ints=[0]),
            helper.make_node("Unsqueeze", ["x", "first"], ["x1"]),
            helper.make_node(self.node.op_type, read, written, **options),
        ]

    def _gated(self, editor: Editor, d: int) -> list[onnx.NodeProto]:
        """GRU whose reset gate is applied to the hidden state before that is multiplied."""
        hidden = self.r.shape[2]
        w, r = self.w[d].T, self.r[d].T
        bias = self.bias[d, : 3 * hidden] + self.bias[d, 3 * hidden :]
        both, last = slice(None, 2 * hidden), slice(2 * hidden, None)
        node = helper.make_node
        return [
            node("MatMul", ["x", editor.constant(w)], ["wx"]),
            node("Add", ["wx", editor.constant(bias)], ["biased"]),
            node(
                "Split",
                ["biased", editor.constant([2 * hidden, hidden], np.int64)],
                ["gates", "rest"],
                axis=1,
            ),
            node("MatMul", ["h", editor.constant(r[:, both])], ["rh"]),
            node("Add", ["gates", "rh"], ["sums"]),
            node("Sigmoid", ["sums"], ["open"]),
            node(
                "Split",
                ["open", editor.constant([hidden, hidden], np.int64)],
                ["update", "reset"],
                axis=2,
            ),
            node("Mul", ["reset", "h"], ["was"]),
            *_narrowed("was", "was1"),
            node("MatMul", ["was1", editor.constant(r[:, last])], ["rr"]),
            node("Add", ["rest", "rr"], ["all"]),
            node("Tanh", ["all"], ["next"]),
            node("Mul", ["update", "h"], ["stays"]),
            node("Constant", [], ["one"], value_float=1.0),
            node("Sub", ["one", "update"], ["part"]),
            node("Mul", ["part", "next"], ["comes"]),
            node("Add", ["stays", "comes"], ["new"]),
        ]


def _narrowed(source: str, target: str) -> list[onnx.NodeProto]:
    narrow = f"{target}/narrow"
    return [
        helper.make_node("Cast", [source], [narrow], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [narrow], [target], to=TensorProto.FLOAT),
    ]


def _rounded(editor: Editor, name: str) -> str:
    return editor.cast(editor.cast(name, TensorProto.BFLOAT16), TensorProto.FLOAT)


def _converted(values: Array) -> Array:
    """float32 values as OpenVINO's ov::bfloat16 takes them over."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(1)) & np.uint32(0x8000)  # half a unit, where the last bit kept is set
    return np.asarray(((bits + odd) & np.uint32(0xFFFF0000)).view(np.float32))
