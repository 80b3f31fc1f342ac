"""A half-precision model's constants, folded in half precision as OpenVINO does when it reads it.

Measured on OpenVINO 2026.4, bit for bit: a factor or a batch normalisation behind a convolution is
multiplied into its weights and bias, each step rounded to float16, whatever precision the program
then computes in; attributes become constants of the model's type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx

from auditor.graphs import surgery, weights
from auditor.ports import Array, SegmentGraph
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

# Attributes that are factors and offsets of values, and what they are where none is given.
_ATTRIBUTES = {
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "LeakyRelu": {"alpha": 0.01},
    "Elu": {"alpha": 1.0},
}


def in_half(segment: SegmentGraph, *, divisors: bool = False) -> SegmentGraph | None:
    """The segment with its constants folded; None where neither it nor the file is half precision.

    Args:
        segment: one of a float16 model, or whose constants the compiled file stores in float16.
        divisors: whether constant divisors become factors as well. Where the engine fuses what
            divides with what is before it, they do not.
    """
    layout = Layout(segment.model, segment.weights)
    if not segment.half:
        if all(constant.storage != "float16" for constant in segment.compiled.values()):
            return None
        segment = _stored_in_half(segment)
        layout = Layout(segment.model)
    folding = _Folding(layout, divisors)
    folding.run()
    if not folding.changed or (divisors and not folding.inverted):
        return None
    return replace(segment, model=folding.editor.model)


@dataclass(frozen=True, slots=True)
class _Convolution:
    """Constants of a convolution; the bias is None where it has none."""

    weights: Array
    bias: Array | None

    def fits(self, values: Array) -> bool:
        """Whether an operand behind it is one number, or one for each channel."""
        return values.size == 1 or (values.size == len(self.weights) and values.ndim > 1)

    def times(self, factor: Array) -> _Convolution:
        """The convolution with a factor multiplied in."""
        channels = np.broadcast_to(factor.reshape(-1), len(self.weights))
        weights = _half(self.weights * channels.reshape(-1, *[1] * (self.weights.ndim - 1)))
        return _Convolution(weights, None if self.bias is None else _half(self.bias * channels))

    def plus(self, shift: Array) -> _Convolution:
        """The convolution with a shift added to the bias."""
        assert self.bias is not None
        return _Convolution(self.weights, _half(self.bias + shift.reshape(-1)))


class _Folding:
    """A copy of a segment in which constants are folded."""

    def __init__(self, layout: Layout, divisors: bool) -> None:
        self.layout = layout
        self.editor = Editor(layout.model)
        self.changed = self.inverted = False
        self._divisors = divisors
        self._convolutions: dict[int, _Convolution] = {}
        self._gone = set[int]()  # nodes whose constants a convolution took in
        self._shifts: dict[int, Array] = {}  # batch normalisations, of which a shift is left

    def run(self) -> None:
        """Copy the nodes, folded."""
        for index, node in surgery.find(self.layout.model, ("Conv",)):
            weights = self.layout.constant(node.input[1])
            bias = self.layout.constant(node.input[2]) if len(node.input) > 2 else None
            if weights is not None and (bias is not None or len(node.input) < 3):
                self._look_behind(index, node, _Convolution(weights, bias))
        for index, node in enumerate(self.layout.nodes):
            self._emit(index, node)

    def _look_behind(self, index: int, node: onnx.NodeProto, made: _Convolution) -> None:
        """Take in what a convolution's result is multiplied with, and then what is added to it."""
        behind, factor = self._after(node, "Mul")
        if behind is not None and made.fits(factor):
            made = made.times(factor)
            behind_that, shift = self._after(self.layout.nodes[behind], "Add")
            self._gone.add(behind)
            if behind_that is not None and made.bias is not None and made.fits(shift):
                made = made.plus(shift)
                self._gone.add(behind_that)
            self._convolutions[index] = made
            return
        last = self.layout.reader(node.output[0])
        if last is None or self.layout.nodes[last].op_type != "BatchNormalization":
            return
        found = _normalisation(self.layout, self.layout.nodes[last])
        if found is None:
            return
        factor, mean, shift = found
        if made.bias is None:
            self._convolutions[index] = made.times(factor)
            self._shifts[last] = _half(shift - _half(mean * factor))
        else:
            self._convolutions[index] = made.plus(-mean).times(factor).plus(shift)
            self._gone.add(last)

    def _after(self, node: onnx.NodeProto, op_type: str) -> tuple[int | None, Array]:
        """The operator of this type that alone reads a node, and its constant operand."""
        index = self.layout.reader(node.output[0])
        if index is not None and self.layout.nodes[index].op_type == op_type:
            for name in self.layout.nodes[index].input:
                value = self.layout.constant(name)
                if value is not None:
                    return index, value
        return None, np.zeros(0)

    def _emit(self, index: int, node: onnx.NodeProto) -> None:
        editor, given = self.editor, surgery.attributes(node)
        if index in self._convolutions:
            made = self._convolutions[index]
            inputs = [node.input[0], editor.constant(made.weights)]
            inputs += [] if made.bias is None else [editor.constant(made.bias)]
            editor.add("Conv", *inputs, to=node.output[0], **given)
        elif index in self._gone:
            (source,) = (n for n in node.input if self.layout.constant(n) is None)
            editor.add("Identity", source, to=node.output[0])
        elif index in self._shifts:
            shape = [1, -1, *[1] * (self._rank(node) - 2)]
            shift = editor.constant(self._shifts[index].reshape(shape))
            editor.add("Add", node.input[0], shift, to=node.output[0])
        elif (found := self._alone(node)) is not None:
            factor, shift = map(editor.constant, found)
            scaled = editor.add("Mul", node.input[0], factor)
            editor.add("Add", scaled, shift, to=node.output[0])
        elif node.op_type in _ATTRIBUTES:
            narrow = {
                name: float(_half(given.get(name, default)))
                for name, default in _ATTRIBUTES[node.op_type].items()
            }
            editor.add(node.op_type, *node.input, to=node.output[0], **narrow)
        elif self._divisors and (by := self._divisor(node)) is not None:
            inverse = editor.constant(_half(1 / by))
            editor.add("Mul", node.input[0], inverse, to=node.output[0])
            self.inverted = True
        else:
            editor.copy(node)
            return
        self.changed = True

    def _alone(self, node: onnx.NodeProto) -> tuple[Array, Array] | None:
        """Factor and shift of a batch normalisation that no convolution takes in."""
        if node.op_type != "BatchNormalization" or surgery.attributes(node).get("training_mode"):
            return None
        rank = len(surgery.shapes(self.layout.model).get(node.input[0], ()))
        found = _normalisation(self.layout, node) if rank > 1 else None
        if found is None:
            return None
        factor, mean, shift = found
        across = [1, -1, *[1] * (rank - 2)]
        return factor.reshape(across), _half(shift - _half(mean * factor)).reshape(across)

    def _divisor(self, node: onnx.NodeProto) -> Array | None:
        found = self.layout.constant(node.input[1]) if node.op_type == "Div" else None
        floats = found is not None and found.dtype == np.float32  # not of a shape
        return found if floats and np.all(found) else None

    def _rank(self, node: onnx.NodeProto) -> int:
        convolution = self.layout.source(node.input[0])
        assert convolution is not None
        weights = self.layout.constant(convolution.input[1])
        assert weights is not None
        return weights.ndim


def _normalisation(layout: Layout, node: onnx.NodeProto) -> tuple[Array, Array, Array] | None:
    """Factor, mean and shift of a batch normalisation, each step of half precision."""
    values = [layout.constant(name) for name in node.input[1:5]]
    if any(value is None for value in values):
        return None
    scale, shift, mean, variance = (np.asarray(value, np.float32) for value in values)
    epsilon = surgery.attributes(node).get("epsilon", 1e-5)
    deviation = _half(np.sqrt(_half(variance + _half(epsilon))))
    return _half(scale / deviation), mean, shift


def _half(values: Array | float) -> Array:
    """Rounded to float16, as float32."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)


def _stored_in_half(segment: SegmentGraph) -> SegmentGraph:
    """A segment with every float32 constant rounded."""
    model = surgery.copied(weights.inside(segment.model, segment.weights))
    written = (a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute)
    for tensor in (*model.graph.initializer, *written):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(_half(values), tensor.name))
    return replace(segment, model=model, weights={})
