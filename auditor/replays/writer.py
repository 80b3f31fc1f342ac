"""Writes arithmetic of its own into a segment's graph, rounded to a narrower float format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.replays.editor import unused_mark
from auditor.replays.kernel_layout import INTEGERS, Group, KernelLayout

_REDUCTIONS = {
    *("GlobalAveragePool", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
    *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
}
_VECTOR = 16  # float32 values in a vector register of 512 bits
# Unsqueeze and ReduceSum take their axes as an input from here on.
OPSET_OF_SUMS = 13
_LARGEST = 65504.0  # of float16
_OPSET_OF_LIMITS = 8  # from which Min and Max broadcast


@dataclass(frozen=True, slots=True)
class Format:
    """A float format narrower than float32.

    Attributes:
        name: as people write it, ``bf16``.
        stated: how engines write it in ``Kernel.precision``.
        cast: ONNX element type whose Cast rounds to it exactly, or None.
        opset: the first ONNX opset whose Cast knows that type.
        bits: bits of its significand, the implicit one included.
    """

    name: str
    stated: frozenset[str]
    cast: int | None
    opset: int
    bits: int


BF16 = Format("bf16", frozenset({"bf16", "bfloat16"}), TensorProto.BFLOAT16, opset=13, bits=8)
FP16 = Format(
    "fp16", frozenset({"f16", "fp16", "float16", "half"}), TensorProto.FLOAT16, opset=6, bits=11
)


class Writer:
    """The nodes and initialisers of a graph that is written anew, and how values are rounded.

    Attributes:
        nodes, initializers: what was written so far.
        exact: tensors whose values already fit the format.
    """

    def __init__(self, layout: KernelLayout, to: Format) -> None:
        self.at = layout
        self.to = to
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._rounded: dict[str, str] = {}
        self.exact = set[str]()
        self.constants = dict(layout.constants)
        self.floats = set(layout.floats)
        self.mark = unused_mark(layout.model)
        self.casts = to.cast is not None and surgery.opset(layout.model) >= to.opset

    def sum_narrowly(self, node: onnx.NodeProto, shape: tuple[int, ...] | None, half: bool) -> None:
        """Replace a sum of products by a loop that rounds each product and each running sum."""
        if half and self.to.cast != TensorProto.FLOAT16:
            return
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        reduced: Callable[..., tuple[str, list[int]]]
        if node.op_type == "Conv" and shape is not None:
            reduced = self._convolve
        elif node.op_type == "MatMul" or (
            node.op_type == "Gemm" and options.get("alpha", 1) == options.get("beta", 1) == 1
        ):
            reduced = self._multiply
        else:
            return
        inputs = [self.new("Cast", n, to=TensorProto.FLOAT) if half else n for n in node.input]
        total, across = reduced(inputs[0], inputs[1], shape or (), options)
        bias = inputs[2] if len(inputs) > 2 else ""
        if bias:
            if across:
                bias = self.new("Reshape", bias, self.integers(across))
            total = self.new("Add", total, bias)
        final = helper.make_node("Identity", [total], list(node.output))
        if half:
            final = helper.make_node("Cast", [total], list(node.output), to=TensorProto.FLOAT16)
        node.CopyFrom(final)

    def _multiply(
        self, a: str, b: str, shape: tuple[int, ...], options: dict[str, Any]
    ) -> tuple[str, list[int]]:
        """A matrix product with its leading axes made one; its bias needs no other shape."""
        a = self.new("Transpose", a) if options.get("transA") else a
        b = self.new("Transpose", b) if options.get("transB") else b
        like = self.new("MatMul", a, b)
        matrices = [self._matrices(tensor) for tensor in (a, b, like)]
        total = self.in_order(*matrices, rank=3)
        return self.new("Reshape", total, self.new("Shape", like)), []

    def _matrices(self, tensor: str) -> str:
        matrix = self.new("Gather", self.new("Shape", tensor), self.integers([-2, -1]))
        return self.new("Reshape", tensor, self.new("Concat", self.integers([-1]), matrix, axis=0))

    def _convolve(
        self, x: str, w: str, shape: tuple[int, ...], options: dict[str, Any]
    ) -> tuple[str, list[int]]:
        """A convolution as a product of its weights with the patches; its bias's shape."""
        groups = options.get("group", 1)
        filters, channels, *size = shape
        taps = math.prod(size)
        columns = [groups, channels * taps]
        one_hot = [
            float(i == t)
            for _ in range(groups * channels)
            for t in range(taps)
            for i in range(taps)
        ]
        picker = self.initializer(
            f"{self.mark}{w}/taps", TensorProto.FLOAT, (math.prod(columns), 1, *size), one_hot
        )
        patches = self.new("Conv", x, picker, **{**options, "group": groups * channels})
        like = self.new("Conv", x, w, **options)
        total = self.in_order(
            self.new("Reshape", w, self.integers([1, groups, filters // groups, columns[1]])),
            self.new("Reshape", patches, self.integers([0, *columns, -1])),
            self.new("Reshape", like, self.integers([0, groups, filters // groups, -1])),
            rank=4,
        )
        return self.new("Reshape", total, self.new("Shape", like)), [-1, *(1 for _ in size)]

    def in_order(self, a: str, b: str, like: str, *, rank: int) -> str:
        """Σₖ a[…, k] ⊗ b[…, k, :] in order, everything rounded; shaped as ``like``."""
        zeros = self.new("ConstantOfShape", self.new("Shape", like))
        return self.new(
            "Scan", zeros, a, b, body=self._step(rank), num_scan_inputs=2, scan_input_axes=[-1, -2]
        )

    def _step(self, rank: int) -> onnx.GraphProto:
        """One step of the loop: sum ← round(sum + round(a ⊗ b))."""
        nodes = [
            helper.make_node("Constant", [], ["last"], value_ints=[-1]),
            helper.make_node("Constant", [], ["second"], value_ints=[-2]),
            helper.make_node("Unsqueeze", ["a", "last"], ["a1"]),
            helper.make_node("Unsqueeze", ["b", "second"], ["b1"]),
            helper.make_node("Mul", ["a1", "b1"], ["exact"]),
            *self.rounding("exact", "product"),
            helper.make_node("Add", ["sum", "product"], ["wide"]),
            *self.rounding("wide", "total"),
        ]

        def value(name: str, dims: int) -> onnx.ValueInfoProto:
            # No names for the sizes: ONNX Runtime takes equal ones in all loops for equal sizes.
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * dims)

        inputs = [value("sum", rank), value("a", rank - 1), value("b", rank - 1)]
        body = helper.make_graph(nodes, "step", inputs, [value("total", rank)])
        return surgery.enclosed(body)

    def new(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Emit an FP32 node of the surgery's own and return its output."""
        output = f"{self.mark}{inputs[0]}/{op_type}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        self.floats.add(output)
        if all(name in self.constants for name in inputs):
            self.constants[output] = None
        return output

    def integers(self, values: Sequence[int]) -> str:
        """A constant of int64."""
        name = f"{self.mark}int64 {list(values)}"
        return self.initializer(name, TensorProto.INT64, (len(values),), values)

    def scalar(self, value: float) -> str:
        """A constant of one float32."""
        return self.initializer(f"{self.mark}float {value!r}", TensorProto.FLOAT, (), [value])

    def initializer(
        self, name: str, kind: int, shape: Sequence[int], values: Sequence[float]
    ) -> str:
        """A constant of a name that says what it holds: it is written once."""
        if all(t.name != name for t in self.initializers):
            self.initializers.append(helper.make_tensor(name, kind, shape, values))
            self.constants[name] = tuple(shape)
        return name

    # --- rounding ------------------------------------------------------------------------------

    def round(self, name: str) -> str:
        """A copy of a tensor in the format; itself where it already fits."""
        if name in self.exact:
            return name
        if name not in self._rounded:
            target = self._rounded[name] = f"{self.mark}{name}/{self.to.name}"
            self.nodes.extend(self.rounding(name, target))
            self.exact.add(target)
        return self._rounded[name]

    def saturated(self, name: str) -> str:
        """A constant within what float16 holds."""
        value = self.at.values.get(name)
        if value is None or not np.any(np.abs(value) > _LARGEST):
            return name
        if surgery.opset(self.at.model) < _OPSET_OF_LIMITS:
            return name
        least, most = self.scalar(-_LARGEST), self.scalar(_LARGEST)
        return self.new("Max", self.new("Min", name, most), least)

    def rounding(self, source: str, target: str) -> list[onnx.NodeProto]:
        """Nodes that round ``source`` to nearest, into ``target``."""
        if self.casts:
            narrow = f"{self.mark}{target}/narrow"
            return [
                helper.make_node("Cast", [source], [narrow], to=self.to.cast),
                helper.make_node("Cast", [narrow], [target], to=TensorProto.FLOAT),
            ]
        return self._split(source, target)

    def tail(self, name: str, group: Group) -> str | None:
        """Which elements of a reduction's result lie beyond whole vectors of their row.

        Of 8-bit integers, OpenVINO scales each channel's result by itself: no row has several.
        """
        shape = self.at.shapes.get(name)
        if not shape or not any(self.at.nodes[i].op_type in _REDUCTIONS for i in group.nodes):
            return None
        first = 2 if group.kernel and group.kernel.precision in INTEGERS else 0
        longer = (i for i, size in enumerate(shape) if size > 1 and i >= first)
        axis = max(longer, default=len(shape) - 1)
        size, broadcast = shape[axis], [1] * len(shape)
        if size % _VECTOR == 0:
            return None
        broadcast[axis] = size
        beyond = [i >= size - size % _VECTOR for i in range(size)]
        return self.initializer(f"{self.mark}tail {broadcast}", TensorProto.BOOL, broadcast, beyond)

    def cut(self, source: str, target: str, where: str) -> list[onnx.NodeProto]:
        """Rounds, and where it is so said towards zero: what was rounded up goes back one step.

        A share 2⁻ᵇ of a value with b significant bits is half a step to one step of its own, so
        that what is left rounds to the value before it, whichever of two binades that is in.
        """
        marked = f"{self.mark}{target}"
        near, less, below = f"{marked}/near", f"{marked}/less", f"{marked}/below"
        sizes = (f"{marked}/size", f"{marked}/true size")
        up, back = f"{marked}/up", f"{marked}/back"
        return [
            *self.rounding(source, near),
            helper.make_node("Mul", [near, self.scalar(1 - 2.0**-self.to.bits)], [less]),
            *self.rounding(less, below),
            helper.make_node("Abs", [near], [sizes[0]]),
            helper.make_node("Abs", [source], [sizes[1]]),
            helper.make_node("Greater", sizes, [up]),
            helper.make_node("And", [up, where], [back]),
            helper.make_node("Where", [back, below, near], [target]),
        ]

    def biased(self, source: str, target: str) -> list[onnx.NodeProto]:
        """Rounds as OpenVINO's own bfloat16 does outside of compiled kernels: seldom up.

        It adds half a step to values whose last bit is set and cuts the others off
        (``ov::bfloat16::round_to_nearest_even``), so that what would be rounded up to an odd last
        bit is not.
        """
        marked = f"{self.mark}{target}"
        near, coarse = f"{marked}/nearest", f"{marked}/coarse"
        even, odd = f"{marked}/even", f"{marked}/odd"
        return [
            *self.rounding(source, near),
            *self._split(near, coarse, self.to.bits - 1),
            helper.make_node("Equal", [near, coarse], [even]),
            helper.make_node("Not", [even], [odd]),
            *self.cut(source, target, odd),
        ]

    def _split(self, source: str, target: str, bits: int = 0) -> list[onnx.NodeProto]:
        """Veltkamp's splitting: rounds to nearest with FP32 arithmetic alone.

        Exact below 2¹²⁸⁻ˢ and except for ties, which a tensor that was not rounded before
        almost never has (Dekker 1971, "A floating-point technique for extending the available
        precision"; Boldo 2006).
        """
        shift = 24 - (bits or self.to.bits)
        factor = self.scalar(float(2**shift + 1))
        scaled, rest = f"{self.mark}{target}/scaled", f"{self.mark}{target}/rest"
        return [
            helper.make_node("Mul", [source, factor], [scaled]),
            helper.make_node("Sub", [scaled, source], [rest]),
            helper.make_node("Sub", [scaled, rest], [target]),
        ]
