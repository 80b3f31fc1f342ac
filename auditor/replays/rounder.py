"""Where one kernel rounds: what it reads, its constants, what it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import onnx

from auditor.graphs import surgery
from auditor.replays.kernel_layout import INTEGERS, MOVES, NARROW, Group, KernelLayout, Scope
from auditor.replays.writer import OPSET_OF_SUMS, Format, Writer

# Operators whose arithmetic is a sum of products, with the positions of their two operands and
# of their bias.
_CONTRACTIONS: dict[str, tuple[tuple[int, ...], int]] = {
    "Conv": ((0, 1), 2),
    "ConvTranspose": ((0, 1), 2),
    "Gemm": ((0, 1), 2),
    "MatMul": ((0, 1), -1),
    "Einsum": ((0, 1), -1),
    "LSTM": ((0, 1, 2), 3),
    "GRU": ((0, 1, 2), 3),
    "RNN": ((0, 1, 2), 3),
}
CONVOLUTIONS = ("Conv", "ConvTranspose")
# Operators after which rounded values are still rounded.
_KEEP = MOVES | {"Relu", "MaxPool"}
# Operators whose constant inputs describe a shape, a table or a limit rather than a factor.
_STRUCTURAL = MOVES | {"Clip", "Resize", "Upsample", "Range", "ConstantOfShape", "Where"}
# What rounds to 8 bits by itself reads its operand as it is.
_QUANTISERS = ("DynamicQuantizeLinear", "QuantizeLinear")
# Kernel types that convolve.
CONVOLVING = {"Convolution"}


@dataclass(frozen=True, slots=True)
class Sites:
    """Where a kernel rounds.

    Attributes:
        name: said to the user.
        scope: what one kernel is: the engine's own fusion groups, each operator by itself, or
            the whole segment.
        inputs: values that a kernel reads, and operands of sums of products inside it.
        entering: of what enters the segment, not only operands of sums of products.
        weights: constant operands of sums of products.
        bias: constants added to sums of products: none of them, those of fully connected layers
            whose output is rounded, or all.
        constants: every other constant operand.
        computed: of these, those that kernels of their own compute from constants, as an engine
            does that cannot fold an operator.
        outputs: values that a kernel writes.
        products: only kernels made of sums of products round at all.
        sums: every product and every running sum of a sum of products, in order of input
            channel, then kernel row, then kernel column.
        scales: what kernels do with the constant factor of a product of two activations,
            attention's scale: multiply it into one operand, which fused attention reads rounded,
            into the product, or into the keys before these are ever rounded.
        distributed: constant factors of sums with a constant are multiplied in, by kernels of
            their own (``algebra.distributed``).
        steps: a layer normalisation is three kernels: mean, difference, and division.
        saturates: constants beyond the format's largest value become that value, as converters
            store them, and not infinite.
        cuts: what reductions write beyond whole vectors of a row is cut off after the format's
            last bit, not rounded.
    """

    name: str
    scope: Scope
    inputs: bool = False
    entering: bool = True
    weights: bool = False
    bias: Literal["none", "fully-connected", "all"] = "none"
    constants: bool = False
    computed: bool = False
    outputs: bool = False
    products: bool = False
    sums: bool = False
    scales: Literal["operand", "product", "keys"] = "operand"
    distributed: bool = False
    steps: bool = False
    saturates: bool = False
    cuts: bool = False


# What a kernel rounds that reads, keeps and writes a format, and an operator that does all of it.
KERNEL = Sites(
    "operands and results of each kernel", "kernel", inputs=True, weights=True, outputs=True
)
OPERATOR = replace(KERNEL, scope="operator", bias="all", constants=True)


class Rounder(Writer):
    """Writes the nodes of a segment with their values rounded at the chosen sites.

    Attributes:
        sites: where kernels round.
        groups: the kernel of every node, by node index.
        raw: tensor → its value before it was written out.
        replaced: indices of nodes that others stand for.
        unscaled: product → the node that scales it, whose work an earlier kernel does.
        scaled: tensor → operator and factor that its kernel applies before it writes it out.
    """

    def __init__(self, layout: KernelLayout, to: Format, sites: Sites) -> None:
        super().__init__(layout, to)
        self.sites = sites
        self.groups = layout.groups(sites.scope)
        self.raw: dict[str, str] = {}
        self.replaced = set[int]()
        self.unscaled: dict[int, int] = {}
        self.scaled: dict[str, tuple[str, str]] = {}

    def finish(self, node: onnx.NodeProto, group: Group) -> None:
        """Write a node with its inputs and outputs rounded where its kernel rounds them."""
        shape = self.constants.get(node.input[1]) if node.op_type == "Conv" else None
        half = bool(node.input) and node.input[0] in self.at.halves
        for position, name in enumerate(node.input):
            node.input[position] = self.input(node, position, name, group)
        if self.sites.sums and self.casts and surgery.opset(self.at.model) >= OPSET_OF_SUMS:
            self.sum_narrowly(node, shape, half)
        self.write(node, group)

    def applies(self, group: Group) -> bool:
        """Whether a kernel rounds at all."""
        return not self.sites.products or self._multiplies(group)

    def _multiplies(self, group: Group) -> bool:
        """Whether a kernel is made of sums of products."""
        return any(self.at.nodes[i].op_type in _CONTRACTIONS for i in group.nodes)

    def input(self, node: onnx.NodeProto, position: int, name: str, group: Group) -> str:
        """The tensor that a node reads in place of ``name``, which is its input at ``position``."""
        if name not in self.floats:
            return name
        operands, _ = _CONTRACTIONS.get(node.op_type, ((), -1))
        if name in self.constants:
            if not self._rounds_constant(node, position, name, group):
                return name
            return self.round(self.saturated(name) if self.sites.saturates else name)
        if self.inside(name, group):
            operand = position in operands and not self._integral(name, group)
            name = self.raw.get(name, name)
            return self.round(name) if self.sites.inputs and operand else name
        if not (self.sites.inputs and self.reads_narrow(group)) or node.op_type in _QUANTISERS:
            return name
        enters = name not in self.at.producer
        if position not in operands and (
            self.sites.products or (enters and not self.sites.entering)
        ):
            return name
        if position not in operands and self._convolves(group) and not self.writes(group):
            return name  # what a convolution adds in place has the precision of its result
        return self.round(name)

    def _convolves(self, group: Group) -> bool:
        return group.kernel is not None and group.kernel.type in CONVOLVING

    def _integral(self, name: str, group: Group) -> bool:
        """Whether a kernel for integers multiplies a tensor as the 8-bit integers that it is."""
        kernel = group.kernel
        if kernel is None or kernel.precision not in INTEGERS:
            return False
        return self.at.grid(name) is not None

    def _rounds_constant(
        self, node: onnx.NodeProto, position: int, name: str, group: Group
    ) -> bool:
        if not self.reads_narrow(group):
            return False
        operands, bias = _CONTRACTIONS.get(node.op_type, ((), -1))
        if position in operands:
            return self.sites.weights
        if position == bias or self._adds_bias(node, group):
            if self.sites.bias == "fully-connected":
                return node.op_type not in CONVOLUTIONS and self.writes(group)
            return self.sites.bias == "all"
        source = self.at.producer.get(name)
        rounds = self.sites.constants or (
            self.sites.computed
            and source is not None
            and self.at.nodes[source].op_type != "Constant"
        )
        return rounds and node.op_type not in _STRUCTURAL

    def _adds_bias(self, node: onnx.NodeProto, group: Group) -> bool:
        """Whether an Add gives a MatMul of its own kernel its bias."""
        if node.op_type != "Add":
            return False
        sources = (self.at.producer.get(n) for n in node.input if n not in self.constants)
        return any(
            i is not None and self.at.nodes[i].op_type == "MatMul" and self.has_weights(i)
            for i in sources
        )

    def has_weights(self, index: int) -> bool:
        """Whether a node has a constant operand."""
        return any(n in self.constants for n in self.at.nodes[index].input)

    def write(self, new: onnx.NodeProto, group: Group) -> None:
        """Write a node whose inputs are as they should be; its outputs are rounded."""
        self.nodes.append(new)
        moved = new.op_type in _KEEP and all(
            n in self.exact for n in new.input if n in self.floats or n in self.exact
        )
        rounds = self.sites.outputs and self.writes(group) and not self._widens(new, group)
        for position, name in enumerate(new.output):
            if name not in self.floats:
                continue
            if moved:
                self.exact.add(name)
            elif rounds and self._leaves(name, group):
                new.output[position] = self.raw[name] = f"{self.mark}{name}/unrounded"
                self.nodes.extend(self._written_out(new, name, group))
                self.exact.add(name)

    def _written_out(self, new: onnx.NodeProto, name: str, group: Group) -> list[onnx.NodeProto]:
        """Nodes that make ``name`` of its value before it was written out, as its kernel does."""
        value = self.raw[name]
        if name in self.scaled:
            operator, factor = self.scaled[name]
            value = self.new(operator, value, factor)
        tail = self.tail(name, group) if self.sites.cuts else None
        if new.op_type == "Cast" and self._plain_code(group):
            return self.biased(value, name)
        return self.rounding(value, name) if tail is None else self.cut(value, name, tail)

    def _plain_code(self, group: Group) -> bool:
        """Whether OpenVINO rounds to bfloat16 by its own type, outside of compiled kernels."""
        return bool(group.kernel and group.kernel.primitive.startswith("ref_"))

    def _widens(self, node: onnx.NodeProto, group: Group) -> bool:
        """Whether a kernel widens the 8 bits that it reads, and rounds after that or not at all.

        OpenVINO writes FP32 where what is only widened is read out; kernels that read it round it.
        """
        if group.kernel is None or node.op_type != "DequantizeLinear":
            return False
        writes = group.kernel.outputs
        within = self.inside(node.input[0], group)
        return not within or (bool(writes) and node.output[0] not in writes)

    def inside(self, name: str, group: Group) -> bool:
        """Whether the same kernel computed a tensor."""
        source = self.at.producer.get(name)
        return source is not None and self.groups[source] is group

    def _leaves(self, name: str, group: Group) -> bool:
        return name in self.at.outputs or any(
            self.groups[reader] is not group for reader in self.at.readers.get(name, ())
        )

    def reads_narrow(self, group: Group) -> bool:
        """Whether a kernel reads this format; all do where the engine states no narrow one."""
        if self.sites.scope != "kernel" or not self.at.reduced:
            return True
        return group.kernel is not None and group.kernel.precision in NARROW

    def writes(self, group: Group) -> bool:
        """Whether a kernel writes this format."""
        if self.sites.scope != "kernel" or not self.at.reduced:
            return True
        if group.kernel is None:
            return False
        return (group.kernel.output_precision or group.kernel.precision) in NARROW
