"""Finds the quantised sums of products in a segment.

Quantised models say ``DequantizeLinear → Conv → QuantizeLinear`` and mean integer arithmetic
(ONNX operators QuantizeLinear and DequantizeLinear, "QDQ format"). Here such a group is read
back: integer weights, scales, zero points, bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper

from auditor.graphs import surgery
from auditor.ports import Array
from auditor.records.backend import Kernel
from auditor.replays import decisions
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

# Round and Clip with limits as inputs exist from here on.
OPSET = 11
# How near to the middle between two steps, in steps, rounding decides on which side a value falls:
# three millionths, the smallest floor, of half the range of 8 bits …
_MIDDLE = 4e-4
# … or what a sum of n terms may lose: λ√n·u of the sum of their sizes, with λ = √(2 ln 2N) so that
# of N sums none is expected to lose more (Higham and Mary, A New Approach to Probabilistic Rounding
# Error Analysis, SIAM J. Sci. Comput. 41, 2019).
_UNIT = 2.0**-24
# Steps that an integer times its scale, in float32, is off.
_OFF_GRID = 1e-3

# Operators between a DequantizeLinear and its reader that leave every value on its grid.
_MOVES = frozenset(
    ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose")
) | {"Unsqueeze", "Gather", "Expand", "DepthToSpace", "SpaceToDepth"}
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16)


@dataclass(frozen=True, slots=True)
class Grid:
    """The values a quantised tensor can have: scale × (integer − zero point).

    Attributes:
        scale: one float32 value, or one per channel.
        zero: zero points of the same shape; None where the segment does not hold them.
        kind: of the integers: int8, uint8, int16 or uint16.
    """

    scale: Array
    zero: Array | None
    kind: np.dtype[Any]

    @property
    def bytes(self) -> bool:
        """Whether the integers have 8 bits."""
        return self.kind.itemsize == 1

    @property
    def signed(self) -> bool:
        """Whether the integers are signed."""
        return self.kind.kind == "i"

    @property
    def count(self) -> int:
        """How many integers there are."""
        return 1 << (8 * self.kind.itemsize)

    def ends(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return int(np.iinfo(self.kind).min), int(np.iinfo(self.kind).max)

    @property
    def type(self) -> int:
        """ONNX's element type of the integers."""
        return helper.np_dtype_to_tensor_dtype(self.kind)

    def limits(self) -> tuple[Array, Array]:
        """Smallest and largest real value, where the zero point is known."""
        assert self.zero is not None
        (least, most), zero = self.ends(), self.zero.astype(np.float32)
        with np.errstate(over="ignore"):  # a mask of the smallest number: its range has no end
            return self.scale * (least - zero), self.scale * (most - zero)


# By the position of a QuantizeLinear: its grid, and the positions of the DequantizeLinear nodes
# that alone read it.
Roundings = dict[int, tuple[Grid, list[int]]]


@dataclass(frozen=True, slots=True)
class Product:
    """One Conv, MatMul or Gemm of a quantised tensor and quantised constant weights.

    Attributes:
        index: position of its node.
        node: the node; its first input is the dequantised tensor.
        grid: what that tensor's values are; its scale is one number.
        weights: integers, [outputs, inputs / group, *kernel] for Conv, else [inputs, outputs].
        weight_grid: their grid; one scale, or one per output.
        bias: real value of the bias, one per output; None where there is none.
        stored_bias: its int32 form where the model holds one.
    """

    index: int
    node: onnx.NodeProto
    grid: Grid
    weights: Array
    weight_grid: Grid
    bias: Array | None
    stored_bias: Array | None


class QuantisedLayout(Layout):
    """A segment in which quantised tensors and what computes on them are recognised."""

    @cached_property
    def _annotated(self) -> dict[str, onnx.TensorAnnotation]:
        """ONNX's quantisation annotations, by tensor."""
        return {a.tensor_name: a for a in self.model.graph.quantization_annotation}

    def grid(self, name: str) -> Grid | None:
        """The grid on which a real-valued tensor lies, where one number describes it.

        It is read off the DequantizeLinear before it, or off ONNX's quantisation annotation of
        a segment input (ONNX IR specification, TensorAnnotation).
        """
        node = self.source(name)
        while node is not None and (node.op_type in _MOVES or self._pads_with_zero(node)):
            name = node.input[0]
            node = self.source(name)
        if node is not None:
            return self.parameters(node) if node.op_type == "DequantizeLinear" else None
        if name in self._annotated:
            given = {p.key: p.value for p in self._annotated[name].quant_parameter_tensor_names}
            return self._grid(given.get("SCALE_TENSOR", ""), given.get("ZERO_POINT_TENSOR", ""))
        return None

    def _pads_with_zero(self, node: onnx.NodeProto) -> bool:
        """Whether a node is a Pad with zero, which is on every grid."""
        given = surgery.attributes(node)
        if node.op_type != "Pad" or given.get("mode", "constant") != "constant":
            return False
        value = (
            self.constant(node.input[2])
            if len(node.input) > 2 and node.input[2]
            else np.asarray(given.get("value", 0.0))
        )
        return value is not None and not value.any()

    def parameters(self, node: onnx.NodeProto) -> Grid | None:
        """Grid of a QuantizeLinear or DequantizeLinear with one pair of constant parameters."""
        return self._grid(node.input[1], node.input[2] if len(node.input) > 2 else "")

    def products(self) -> list[Product]:
        """Every sum of products of quantised values in the segment."""
        found = (self._product(i, n) for i, n in surgery.find(self.model, _PRODUCTS))
        return [product for product in found if product is not None]

    def steps(self, node: onnx.NodeProto) -> Array | None:
        """The step that products of a quantised tensor and constant 8-bit weights are multiples of.

        One number, or one per channel of the weights; None where either is not quantised.
        """
        grid, weights = self.grid(node.input[0]), self._weights(node.input[1])
        return None if grid is None or weights is None else grid.scale * weights[1]

    def roundings(self, *, constants: bool = False) -> Roundings:
        """Quantise–dequantise pairs of computed tensors, or of all, with one scale."""
        found: Roundings = {}
        for index, node in surgery.find(self.model, ("QuantizeLinear",)):
            constant = self.constant(node.input[0]) is not None
            grid = None if constant and not constants else self.parameters(node)
            readers = self.readers.get(node.output[0], [])
            read = readers and all(self.nodes[r].op_type == "DequantizeLinear" for r in readers)
            if grid is not None and read and node.output[0] not in self.outputs:
                found[index] = grid, readers
        return found

    def quantised(self, node: onnx.NodeProto, *, by_range: bool = False) -> Array | None:
        """The 8-bit integers that a QuantizeLinear makes of float constants; None of others.

        Args:
            node: the QuantizeLinear.
            by_range: counted from the smallest real value on, in parts of the range, as OpenVINO's
                FakeQuantize computes: what lies in the middle between two steps may go elsewhere.
        """
        values, scale = self.constant(node.input[0]), self.constant(node.input[1])
        zero = self.constant(node.input[2]) if len(node.input) > 2 else np.zeros((), np.uint8)
        if values is None or values.dtype != np.float32 or scale is None or zero is None:
            return None
        if zero.dtype not in (np.uint8, np.int8) or scale.dtype != np.float32 or scale.ndim > 1:
            return None
        shape = [1] * values.ndim
        if scale.size > 1:
            shape[surgery.attributes(node).get("axis", 1)] = -1
        grid = Grid(scale.reshape(shape), zero.reshape(shape), zero.dtype)
        least, most = grid.ends()
        if by_range:
            low, high = grid.limits()
            integers = np.rint((values - low) / (high - low) * np.float32(most - least)) + least
        else:
            integers = np.rint(values / grid.scale) + zero.reshape(shape).astype(np.float32)
        return np.asarray(np.clip(integers, least, most), zero.dtype)

    def into_sums(self, kernels: Sequence[Kernel]) -> Roundings:
        """The ``roundings`` between an operator and the sum that an engine fuses it with.

        Where the engine names no kernels, it is taken to fuse a sum with the last of its
        operands.
        """
        fused = [frozenset(k.nodes) for k in kernels if len(k.nodes) > 1]
        found: Roundings = {}
        last: dict[int, int] = {}  # by the position of a sum: its last operand
        for index, (grid, dequantised) in self.roundings().items():
            for sum_ in (r for d in dequantised for r in self.readers.get(self.first(d), [])):
                if self.nodes[sum_].op_type not in ("Add", "Sub"):
                    continue
                both = {self.first(index), self.first(sum_)}
                if any(both <= nodes for nodes in fused):
                    found[index] = grid, dequantised
                last[sum_] = index
        if fused:
            return found
        everything = self.roundings()
        return {index: everything[index] for index in last.values()}

    def _grid(self, scale_name: str, zero_name: str) -> Grid | None:
        scale = self.constant(scale_name)
        zero = self.constant(zero_name) if zero_name else np.zeros(1, np.uint8)
        if scale is None or zero is None or scale.size != 1 or zero.size != 1:
            return None
        if scale.dtype != np.float32 or zero.dtype not in _INTEGERS:
            return None
        return Grid(scale.reshape(()), zero.reshape(()), zero.dtype)

    def _product(self, index: int, node: onnx.NodeProto) -> Product | None:
        options = surgery.attributes(node)
        if node.op_type == "Gemm" and (
            options.get("transA", 0) or options.get("alpha", 1) * options.get("beta", 1) != 1
        ):
            return None
        found = self._weights(node.input[1]) or self._on_grid(node)
        if found is None:
            return None
        weights, scale, zero, axis = found
        if node.op_type == "Gemm" and options.get("transB", 0):
            weights, axis = weights.T, 1 - axis
        across = 0 if node.op_type == "Conv" else 1
        if node.op_type != "Conv" and weights.ndim != 2:
            return None
        if (scale.size > 1 and axis % weights.ndim != across) or np.unique(zero).size > 1:
            return None
        bias = stored = None
        bias_scale: Array | None = None
        if len(node.input) > 2 and node.input[2]:
            bias = self.constant(node.input[2])
            if bias is None:
                stored, bias_scale = self._stored_bias(node.input[2])
                if stored is None or bias_scale is None:
                    return None
                bias = (stored * bias_scale).astype(np.float32)
        grid = self.grid(node.input[0])
        if grid is None and bias_scale is not None:
            # Quantisers give the bias the scale of the products.
            ratio = np.unique((bias_scale / scale).astype(np.float32))
            if ratio.max() - ratio.min() <= 1e-5 * ratio.max():
                grid = Grid(np.asarray(np.median(ratio), np.float32), None, np.dtype(np.uint8))
        if grid is None or not grid.bytes:
            return None
        weight_grid = Grid(scale, zero, weights.dtype)
        return Product(index, node, grid, weights, weight_grid, bias, stored)

    def _weights(self, name: str) -> tuple[Array, Array, Array, int] | None:
        """Integers, scale, zero point and channel axis of dequantised constant weights."""
        node = self.source(name)
        if node is not None and node.op_type == "Transpose":
            found = self._weights(node.input[0])
            if found is None or found[0].ndim != 2:
                return None
            return found[0].T, found[1], found[2], 1 - found[3]
        if node is None or node.op_type != "DequantizeLinear":
            return None
        axis = surgery.attributes(node).get("axis", 1)
        scale = self.constant(node.input[1])
        zero = self.constant(node.input[2]) if len(node.input) > 2 else None
        values = self.constant(node.input[0])
        if scale is None or scale.ndim > 1 or surgery.attributes(node).get("block_size", 0):
            return None
        made = self.source(node.input[0])
        if values is None and made is not None and made.op_type == "QuantizeLinear":
            values = self.quantised(made)
        if values is None or values.dtype not in (np.uint8, np.int8):
            return None
        zero = np.zeros(1, values.dtype) if zero is None else zero
        return values, scale.reshape(-1), zero.reshape(-1), axis % values.ndim

    def _on_grid(self, node: onnx.NodeProto) -> tuple[Array, Array, Array, int] | None:
        """Like ``_weights``, of float weights that are int8 times one scale per output, or for all.

        A file that an engine quantised holds them so. Asked for only where what they multiply is
        quantised.
        """
        values = None if self.grid(node.input[0]) is None else self.constant(node.input[1])
        if values is None or values.dtype != np.float32 or values.ndim < 2 or not values.size:
            return None
        transposed = node.op_type == "Gemm" and surgery.attributes(node).get("transB", 0)
        axis = 0 if node.op_type == "Conv" or transposed else values.ndim - 1
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        scale = _scales(rows, np.abs(rows).max(axis=1))
        if scale is None:
            scale = _scales(rows.reshape(1, -1), np.abs(rows).max(keepdims=True)[0])
        if scale is None:
            return None
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        integers = np.rint(values / scale.reshape(shape)).astype(np.int8)
        return integers, scale, np.zeros(1, np.int8), axis

    def _stored_bias(self, name: str) -> tuple[Array | None, Array | None]:
        node = self.source(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None, None
        return self.constant(node.input[0]), self.constant(node.input[1])


def _scales(rows: Array, largest: Array) -> Array | None:
    """The scales of rows that are int8 times a scale each; None where one is not.

    The largest is 127 in most of them, and less where the range is held above zero.
    """
    scales = np.where(largest > 0, largest, 1) / np.float32(127)
    left = np.arange(len(rows))
    for most in range(127, 0, -1):
        scales[left] = np.where(largest[left] > 0, largest[left], 1) / np.float32(most)
        steps = rows[left] / scales[left, None]
        left = left[np.abs(steps - np.rint(steps)).max(axis=1) > _OFF_GRID]
        if not left.size:
            return np.asarray(scales)
        if 2 * left.size > len(rows):
            return None
    return None


def either_side(
    model: onnx.ModelProto, observed: Mapping[str, Array], terms: int = 1
) -> onnx.ModelProto | None:
    """The segment with values in the middle between two steps rounded to what was observed.

    Float32 decides there: two ways to add up one sum differ by a whole step. Where nothing is
    computed, as behind a Round, and the scale is a power of two, the middle is the same one
    everywhere.

    Args:
        model: the segment.
        observed: what the backend made of its outputs.
        terms: of the longest sum.

    Returns:
        None where no output is a rounding to 8 bits, quantised or dequantised again, of something
        that is computed here.
    """
    layout, editor = QuantisedLayout(model), Editor(model)
    untouched = decisions.untouched(model)
    for node in layout.nodes:
        grid = layout.parameters(node) if node.op_type == "QuantizeLinear" else None
        readers = [layout.nodes[i] for i in layout.readers.get(node.output[0], [])]
        names = [n.output[0] for n in readers if n.op_type == "DequantizeLinear"]
        seen = next((n for n in (node.output[0], *names) if n in observed), None)
        if (
            grid is None
            or grid.zero is None
            or seen is None
            or node.input[0] not in layout.producer
            or (node.input[0] in untouched and decisions.is_power_of_two(grid.scale))
        ):
            editor.copy(node)
            continue
        there = observed[seen].astype(np.float32)
        if seen != node.output[0]:
            there = np.rint(there / grid.scale) + grid.zero
        steps = editor.add("Div", node.input[0], editor.constant(grid.scale))
        zero = editor.constant(grid.zero)
        plain = editor.add("Add", editor.add("Round", steps), zero)
        side = editor.add("Sign", editor.add("Sub", editor.constant(there), plain))
        lost = math.sqrt(2 * math.log(2 * there.size) * terms) * _UNIT / float(grid.scale)
        near = editor.add("Mul", _size(layout, editor, node.input[0]), editor.constant(lost))
        near = editor.add("Max", near, editor.constant(_MIDDLE * grid.count / 256))
        moved = editor.add("Add", steps, editor.add("Mul", side, near))
        value = editor.add("Add", editor.add("Round", moved), zero)
        value = editor.add("Clip", value, *map(editor.constant, grid.ends()))
        editor.cast(value, grid.type, node.output[0])
    return editor.changed


def _size(layout: QuantisedLayout, editor: Editor, name: str) -> str:
    """Add nodes for Σ|terms| of the sum that a tensor is, or for |tensor| if it is no sum."""
    node = layout.source(name)
    while node is not None and node.op_type in ("Clip", "Identity", "Relu"):
        node = layout.source(node.input[0])
    if node is None or node.op_type not in _PRODUCTS:
        return editor.add("Abs", name)
    sizes = [editor.add("Abs", operand) for operand in node.input[:2]]
    return editor.add(node.op_type, *sizes, **surgery.attributes(node))
