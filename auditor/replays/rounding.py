"""Rounds chosen tensors of a segment to a narrower float format, inside its ONNX graph.

A narrow-precision kernel differs from the FP32 reference only in *where* values are rounded: as
they enter, in the weights and biases, between operators, in the running sums, as they leave. A
``Sites`` says where; ``rounded`` inserts the roundings, and all arithmetic stays FP32. That is
how the hardware itself works: products of two 8- or 11-bit significands are exact in FP32, and
matrix units accumulate in FP32 (Intel SDM, TDPBF16PS; NVIDIA PTX ISA, mma).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.graphs.model import key
from auditor.ports import SegmentGraph, Variant
from auditor.replays import algebra
from auditor.replays.layout import (
    INTEGERS,
    MOVES,
    NARROW,
    Group,
    Layout,
    Scope,
    stated,
    subgraphs,
)
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
_CONVOLUTIONS = ("Conv", "ConvTranspose")
# Operators after which rounded values are still rounded.
_KEEP = MOVES | {"Relu", "MaxPool"}
# Operators whose constant inputs describe a shape, a table or a limit rather than a factor.
_STRUCTURAL = MOVES | {"Clip", "Resize", "Upsample", "Range", "ConstantOfShape", "Where"}
# Operators whose result of integers OpenVINO scales, rather than their operand.
_MEANS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
# What rounds to 8 bits by itself reads its operand as it is.
_QUANTISERS = ("DynamicQuantizeLinear", "QuantizeLinear")
# LogSoftmax works along one axis from here on; before, on two dimensions.
_SOFTMAX_ALONG = 13
# ReduceMean and ReduceMax take their axes as an input from here on.
_AXES_OPSET = 18
_DEFAULT_DOMAIN = ("", "ai.onnx")
# Kernel types that convolve.
_CONVOLVING = {"Convolution"}


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


_FLOAT32 = Format("float32", frozenset(), TensorProto.FLOAT, 6, 24)
_IN_ORDER = Sites("sums of products in order", "operator", sums=True)


def variants(segment: SegmentGraph, to: Format, sites: Sequence[Sites]) -> Iterator[Variant]:
    """The segment rounded at each of ``sites`` in turn, without repeating equal graphs.

    Sites that speak of the engine's kernels are left out where the engine names none, those
    that take the whole segment for one kernel where it does. Narrow running sums cost much to
    replay and are tested only where the engine does not report another precision.
    """
    segment = _biases_apart(segment)
    plain = Layout(segment)
    spread = algebra.distributed(segment.model)
    seen: list[list[onnx.NodeProto]] = []
    for where in sites:
        layout = plain
        if where.distributed:
            if spread is None:
                continue
            layout = Layout(replace(segment, model=spread[0]), alone=spread[1])
        if where.scope == ("segment" if layout.kernels else "kernel"):
            continue
        if where.sums and layout.reports and not stated(layout.kernels, to.stated):
            continue
        model = _Surgery(layout, to, where).apply()
        nodes = list(model.graph.node)
        if len(nodes) > len(segment.model.graph.node) and nodes not in seen:
            seen.append(nodes)
            yield Variant(where.name, model)


def _biases_apart(segment: SegmentGraph) -> SegmentGraph:
    """A segment with the biases of convolutions added by nodes of their own, where a kernel does.

    An engine that computes every other element of a convolution and then leaves out some (OpenVINO
    moves the strides of a pointwise convolution ahead) adds the bias behind that, and so does one
    that multiplies 8-bit integers: the convolution is named by two kernels, and what it hands over
    is rounded.
    """
    by_key = Counter(key for kernel in segment.kernels for key in {*kernel.nodes})
    starts = {k for kernel in segment.kernels if kernel.type in _CONVOLVING for k in kernel.nodes}
    split = [
        (index, node)
        for index, node in surgery.find(segment.model, ("Conv",))
        if len(node.input) > 2 and node.input[2] and key(node) in starts and by_key[key(node)] > 1
    ]
    if not split:
        return segment
    model = surgery.copied(segment.model)
    nodes = list(model.graph.node)
    shapes = surgery.shapes(model)
    made: dict[str, str] = {}
    for index, node in reversed(split):
        rank = len(shapes.get(node.input[1], ()))
        if not rank:
            continue
        conv, whole = nodes[index], key(node)
        bare, bias, shape = (f"{whole}/{part}" for part in ("bare", "bias", "shape"))
        sizes = helper.make_tensor(shape, TensorProto.INT64, [rank - 1], [-1] + [1] * (rank - 2))
        model.graph.initializer.append(sizes)
        add = helper.make_node("Add", [bare, bias], [whole])
        nodes[index : index + 1] = [
            helper.make_node("Reshape", [node.input[2], shape], [bias]),
            conv,
            add,
        ]
        del conv.input[2:]
        conv.output[0] = bare
        made[whole] = bare
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kernels = tuple(
        replace(kernel, nodes=tuple(made.get(name, name) for name in kernel.nodes))
        if kernel.type in _CONVOLVING
        else kernel
        for kernel in segment.kernels
    )
    return replace(segment, model=model, kernels=kernels)


def in_order(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A segment that adds up its sums of products one after another; None where it has none.

    It has every product and every running sum as ``Sites.sums`` orders them, all in float32.
    """
    layout = Layout(SegmentGraph(model, ()))
    result = _Surgery(layout, _FLOAT32, _IN_ORDER).apply()
    return result if len(result.graph.node) > len(model.graph.node) else None


def upgraded(model: onnx.ModelProto, opset: int) -> Iterator[onnx.ModelProto]:
    """The segment at a later opset: relabelled, then converted; check each by running it.

    Between opsets most operators only gained types, so that a new label is usually enough and a
    tenth of the converter's price.
    """
    relabelled = onnx.ModelProto()
    relabelled.CopyFrom(model)
    for entry in relabelled.opset_import:
        if entry.domain in _DEFAULT_DOMAIN:
            entry.version = opset
    yield relabelled
    from onnx import version_converter

    try:
        yield version_converter.convert_version(model, opset)
    except Exception:  # the converter raises whatever its C++ threw; there is no common base
        return


class _Surgery(Writer):
    """One pass over a segment's nodes that inserts roundings."""

    def __init__(self, layout: Layout, to: Format, sites: Sites) -> None:
        super().__init__(layout, to)
        self.sites = sites
        self.groups = layout.groups(sites.scope)
        self.raw: dict[str, str] = {}  # tensor → its value before it was written out
        self.replaced = set[int]()  # nodes folded into another
        self.unscaled: dict[int, int] = {}  # product → the node that its own kernel lost
        self.scaled: dict[str, tuple[str, str]] = {}  # tensor → operator and factor before writing
        # What may be written out in several kernels: whether it was.
        self._splits = {
            "Col2Im": self._sum_columns,
            "GroupNormalization": self._split_groups,
            "LogSoftmax": self._split_log_softmax,
        }
        if sites.scope == "kernel" and sites.scales != "product":
            self._move_scales()

    def apply(self) -> onnx.ModelProto:
        """The transformed model."""
        # Constants first: a factor moved to an earlier kernel is needed before its own place.
        self.nodes += [self.at.nodes[index] for index in sorted(self.at.derived)]
        for index, node in enumerate(self.at.nodes):
            if index not in self.at.derived and index not in self.replaced:
                self._emit(index, node)
        source = self.at.model
        model = onnx.ModelProto(ir_version=source.ir_version, opset_import=source.opset_import)
        model.functions.extend(source.functions)
        model.graph.name = source.graph.name
        model.graph.input.extend(source.graph.input)
        model.graph.output.extend(source.graph.output)
        model.graph.initializer.extend(source.graph.initializer)
        model.graph.initializer.extend(self.initializers)
        model.graph.sparse_initializer.extend(source.graph.sparse_initializer)
        model.graph.node.extend(self.nodes)
        return model

    # --- one node ------------------------------------------------------------------------------

    def _emit(self, index: int, node: onnx.NodeProto) -> None:
        group = self.groups[index]
        new = onnx.NodeProto()
        new.CopyFrom(node)
        if subgraphs(node) or not self._applies(group):
            for position, name in enumerate(new.input):
                if self._inside(name, group):
                    new.input[position] = self.raw.get(name, name)
            self.nodes.append(new)
            return
        if node.op_type in _MEANS and self._average_steps(new, group):
            return
        if self.sites.scope == "kernel" and self._reduced(group):
            if node.op_type in _CONVOLUTIONS:
                self._fold_scale(new, group)
            elif index in self.unscaled:
                new.output[0] = self.at.nodes[self.unscaled[index]].output[0]
                self.replaced.add(self.unscaled[index])
            elif node.op_type == "Gemm":
                self._fold_gemm(new, group)
            elif node.op_type == "MatMul" and self._has_weights(index):
                if (shift := self._fold_factors(new, group)) is not None:
                    self._finish(new, group)
                    self._finish(shift, group)
                    return
            elif node.op_type == "MatMul" and self.sites.scales != "product":
                self._move_scale(new, group)
            elif node.op_type == "LayerNormalization":
                self._split_normalization(new, group)
                return
            elif node.op_type == "ReduceSumSquare":
                self._sum_squares(new, group)
                return
            elif (split := self._splits.get(node.op_type)) is not None and split(new, group):
                return
        self._finish(new, group)

    def _finish(self, node: onnx.NodeProto, group: Group) -> None:
        shape = self.constants.get(node.input[1]) if node.op_type == "Conv" else None
        half = bool(node.input) and node.input[0] in self.at.halves
        for position, name in enumerate(node.input):
            node.input[position] = self._input(node, position, name, group)
        if self.sites.sums and self.casts and surgery.opset(self.at.model) >= OPSET_OF_SUMS:
            self._sum_narrowly(node, shape, half)
        self._outputs(node, group)

    def _applies(self, group: Group) -> bool:
        return not self.sites.products or self._multiplies(group)

    def _multiplies(self, group: Group) -> bool:
        """Whether a kernel is made of sums of products."""
        return any(self.at.nodes[i].op_type in _CONTRACTIONS for i in group.nodes)

    def _input(self, node: onnx.NodeProto, position: int, name: str, group: Group) -> str:
        if name not in self.floats:
            return name
        operands, _ = _CONTRACTIONS.get(node.op_type, ((), -1))
        if name in self.constants:
            if not self._rounds_constant(node, position, name, group):
                return name
            return self._round(self._saturated(name) if self.sites.saturates else name)
        if self._inside(name, group):
            operand = position in operands and not self._integral(name, group)
            rounds = self.sites.inputs and (operand or self._normalized(name, group))
            name = self.raw.get(name, name)
            return self._round(name) if rounds else name
        if not (self.sites.inputs and self._reduced(group)) or node.op_type in _QUANTISERS:
            return name
        enters = name not in self.at.producer
        if position not in operands and (
            self.sites.products or (enters and not self.sites.entering)
        ):
            return name
        if position not in operands and self._convolves(group) and not self._writes(group):
            return name  # what a convolution adds in place has the precision of its result
        return self._round(name)

    def _convolves(self, group: Group) -> bool:
        return group.kernel is not None and group.kernel.type in _CONVOLVING

    def _integral(self, name: str, group: Group) -> bool:
        """Whether a kernel for integers multiplies a tensor as the 8-bit integers that it is."""
        kernel = group.kernel
        if kernel is None or kernel.precision not in INTEGERS:
            return False
        return self.at.grid(name) is not None

    def _rounds_constant(
        self, node: onnx.NodeProto, position: int, name: str, group: Group
    ) -> bool:
        if not self._reduced(group):
            return False
        operands, bias = _CONTRACTIONS.get(node.op_type, ((), -1))
        if position in operands:
            return self.sites.weights
        if position == bias or self._adds_bias(node, group):
            if self.sites.bias == "fully-connected":
                return node.op_type not in _CONVOLUTIONS and self._writes(group)
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
            i is not None and self.at.nodes[i].op_type == "MatMul" and self._has_weights(i)
            for i in sources
        )

    def _has_weights(self, index: int) -> bool:
        return any(n in self.constants for n in self.at.nodes[index].input)

    def _outputs(self, new: onnx.NodeProto, group: Group) -> None:
        self.nodes.append(new)
        moved = new.op_type in _KEEP and all(
            n in self.exact for n in new.input if n in self.floats or n in self.exact
        )
        for position, name in enumerate(new.output):
            if name not in self.floats:
                continue
            if moved:
                self.exact.add(name)
            elif not self._writes(group) or self._widens(new, group):
                continue
            elif self.sites.outputs and self._leaves(name, group):
                new.output[position] = self.raw[name] = f"{self.mark}{name}/unrounded"
                written = self.raw[name]
                if name in self.scaled:
                    operator, factor = self.scaled[name]
                    written = self._new(operator, written, factor)
                tail = self._tail(name, group) if self.sites.cuts else None
                if new.op_type == "Cast" and self._plain_code(group):
                    self.nodes.extend(self._biased(written, name))
                elif tail is None:
                    self.nodes.extend(self._rounding(written, name))
                else:
                    self.nodes.extend(self._cut(written, name, tail))
                self.exact.add(name)

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
        within = self._inside(node.input[0], group)
        return not within or (bool(writes) and node.output[0] not in writes)

    def _inside(self, name: str, group: Group) -> bool:
        source = self.at.producer.get(name)
        return source is not None and self.groups[source] is group

    def _leaves(self, name: str, group: Group) -> bool:
        return name in self.at.outputs or any(
            self.groups[reader] is not group for reader in self.at.readers.get(name, ())
        )

    def _reduced(self, group: Group) -> bool:
        """Whether a kernel reads this format; all do where the engine states no narrow one."""
        if self.sites.scope != "kernel" or not self.at.reduced:
            return True
        return group.kernel is not None and group.kernel.precision in NARROW

    def _writes(self, group: Group) -> bool:
        if self.sites.scope != "kernel" or not self.at.reduced:
            return True
        if group.kernel is None:
            return False
        return (group.kernel.output_precision or group.kernel.precision) in NARROW

    # --- what fusion does to the arithmetic ------------------------------------------------------

    def _fold_scale(self, conv: onnx.NodeProto, group: Group) -> None:
        """Factors and shifts after a convolution go into its weights and bias beforehand."""
        chain = self._affine_chain(conv, group)
        weights = self.constants.get(conv.input[1])
        if not chain or weights is None or conv.input[1] not in self.floats:
            return
        axis = 0
        if conv.op_type == "ConvTranspose":
            if any(a.name == "group" and a.i != 1 for a in conv.attribute):
                return
            axis = 1
        bias = conv.input[2] if len(conv.input) > 2 else ""
        scale, bias = self._compose(chain, "", bias)
        conv.output[0] = self.at.nodes[chain[-1]].output[0]
        if scale:
            shape = [1] * len(weights)
            shape[axis] = -1
            factor = self._new("Reshape", scale, self._integers(shape))
            conv.input[1] = self._new("Mul", conv.input[1], factor)
        if bias:
            bias = self._new("Expand", bias, self._integers([weights[axis]]))
            del conv.input[2:]
            conv.input.append(bias)

    def _fold_factors(self, product: onnx.NodeProto, group: Group) -> onnx.NodeProto | None:
        """Factors after a product with weights go into these beforehand, and into the bias.

        Returns:
            The addition of the bias; None where there is no factor, and nothing was changed.
        """
        weights = self.constants.get(product.input[1])
        if not weights or len(weights) != 2 or product.input[1] not in self.floats:
            return None
        chain = self._affine_chain(product, group, last=True)
        if self._only_shifts(chain):
            return None
        scale, shift = self._compose(chain, "", "")
        product.input[1] = self._new("Mul", product.input[1], scale)
        output = self.at.nodes[chain[-1]].output[0]
        return helper.make_node("Add", [product.output[0], shift or self._scalar(0.0)], [output])

    def _fold_gemm(self, gemm: onnx.NodeProto, group: Group) -> None:
        """Factors and shifts after a Gemm, and its own alpha, go into its weights and bias."""
        options = surgery.attributes(gemm)
        alpha, beta = options.get("alpha", 1.0), options.get("beta", 1.0)
        bias = gemm.input[2] if len(gemm.input) > 2 else ""
        if not self.constants.get(gemm.input[1]) or gemm.input[1] not in self.floats:
            return
        if bias and not self._per_channel(bias, 2, "Add", last=False):
            return
        chain = self._affine_chain(gemm, group)
        if alpha == 1 and self._only_shifts(chain):
            return
        scale = self._scalar(alpha) if alpha != 1 else ""
        if bias and beta != 1:
            bias = self._new("Mul", bias, self._scalar(beta))
        scale, bias = self._compose(chain, scale, bias)
        if chain:
            gemm.output[0] = self.at.nodes[chain[-1]].output[0]
        shape = self._integers([-1, 1] if options.get("transB") else [1, -1])
        gemm.input[1] = self._new("Mul", gemm.input[1], self._new("Reshape", scale, shape))
        gemm.input[2:] = [bias] if bias else []
        surgery.set_attributes(gemm, alpha=None, beta=None)

    def _only_shifts(self, chain: list[int]) -> bool:
        return all(self.at.nodes[index].op_type in ("Add", "Sub") for index in chain)

    def _compose(self, chain: list[int], scale: str, shift: str) -> tuple[str, str]:
        """Factor and shift of per-channel affine nodes behind x · scale + shift; "" for neither."""
        for index in chain:
            factor, more = self._affine(self.at.nodes[index])
            if factor:
                scale = self._new("Mul", scale, factor) if scale else factor
                shift = self._new("Mul", shift, factor) if shift else ""
            if more:
                shift = self._new("Add", shift, more) if shift else more
        self.replaced.update(chain)
        return scale, shift

    def _affine_chain(
        self, product: onnx.NodeProto, group: Group, *, last: bool = False
    ) -> list[int]:
        """Indices of the per-channel affine nodes fused behind a product.

        ``last`` says that its channels are the last axis; else they are the second.
        """
        rank = len(self.constants.get(product.input[1]) or ())
        chain: list[int] = []
        tensor = product.output[0]
        while (index := self.at.reader(tensor)) is not None and self.groups[index] is group:
            node = self.at.nodes[index]
            others = [n for n in node.input if n != tensor]
            if node.op_type not in ("BatchNormalization", "Mul", "Div", "Add", "Sub") or any(
                not self._per_channel(n, rank, node.op_type, last) for n in others
            ):
                break
            if node.input[0] != tensor and node.op_type in ("Div", "Sub"):
                break
            chain.append(index)
            tensor = node.output[0]
        return chain

    def _per_channel(self, name: str, rank: int, op_type: str, last: bool) -> bool:
        shape = self.constants.get(name)
        if shape is None or name not in self.floats:
            return False
        if op_type == "BatchNormalization":
            return not last
        if last:
            return all(d == 1 for d in shape[:-1])
        aligned = (1,) * (rank - len(shape)) + shape
        return len(aligned) == rank and all(d == 1 for i, d in enumerate(aligned) if i != 1)

    def _affine(self, node: onnx.NodeProto) -> tuple[str, str]:
        """Factor and shift of a per-channel affine node, as 1-d tensors; "" for neither."""
        if node.op_type == "BatchNormalization":
            gamma, beta, mean, variance = node.input[1:5]
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            width = self._new("Sqrt", self._new("Add", variance, self._scalar(epsilon)))
            factor = self._new("Div", gamma, width)
            return factor, self._new("Sub", beta, self._new("Mul", mean, factor))
        constant = next(n for n in node.input if n in self.constants)
        flat = self._new("Reshape", constant, self._integers([-1]))
        if node.op_type == "Mul":
            return flat, ""
        if node.op_type == "Div":
            return self._new("Reciprocal", flat), ""
        return "", flat if node.op_type == "Add" else self._new("Neg", flat)

    def _move_scale(self, product: onnx.NodeProto, group: Group) -> None:
        """Attention's scale is multiplied into the keys before they are rounded.

        Fused attention reads them rounded, unless ``Sites.scales`` says otherwise; else a kernel of
        its own multiplies what is there.
        """
        index = self._scale_of(product, group)
        if index is None:
            return
        keys = product.input[1]
        entered = self.raw.get(keys, keys)
        rounded = self._has_softmax(group) and self.sites.scales != "keys"
        if rounded and not self._inside(keys, group):
            entered = self._round(keys)
        operator, factor = self._scaling(index, product.output[0])
        product.input[1] = self._new(operator, entered, factor)
        product.output[0] = self.at.nodes[index].output[0]
        self.replaced.add(index)

    def _move_scales(self) -> None:
        """Attention's scale is applied by the kernel that projects the keys, if one does.

        OpenVINO multiplies it in there before the keys are written out, rounded, and the kernel
        of the product no longer has it: where attention is not fused, and with AMX where it is.
        So does, with AMX, any kernel that writes the keys; the scale may be one for each head.
        """
        for index, product in enumerate(self.at.nodes):
            if product.op_type != "MatMul" or index in self.at.derived:
                continue
            group = self.groups[index]
            scale = self._scale_of(product, group)
            fused = self._has_softmax(group) and self.sites.scales != "keys"
            if scale is None or fused:
                continue
            keys = product.input[1]
            single = self._is_single(self._scaling(scale, product.output[0])[1])
            for move in self.at.moves(keys):
                if not single and not _swaps_last(self.at.nodes[move]):
                    break
                keys = self.at.nodes[move].input[0]
            source = self.at.producer.get(keys)
            if source is None or self.at.reader(keys) is None:
                continue
            projection = self.groups[source]
            if (
                projection is not group
                and self._writes(projection)
                and (
                    self.sites.scales == "keys"
                    or any(
                        self.at.nodes[i].op_type == "MatMul" and self._has_weights(i)
                        for i in projection.nodes
                    )
                )
            ):
                self.scaled[keys] = self._scaling(scale, product.output[0])
                self.unscaled[index] = scale

    def _scale_of(self, product: onnx.NodeProto, group: Group) -> int | None:
        """The node that scales a product of two activations, whole or by head, if fused."""
        index = self.at.reader(product.output[0])
        if (
            index is None
            or self.groups[index] is not group
            or any(n in self.constants for n in product.input)
        ):
            return None
        node = self.at.nodes[index]
        other = [n for n in node.input if n != product.output[0]]
        shape = self.constants.get(other[0]) if len(other) == 1 else None
        heads = shape is not None and all(size == 1 for size in shape[-2:])
        return index if heads and node.op_type in ("Mul", "Div") else None

    def _is_single(self, constant: str) -> bool:
        return self.constants.get(constant) in ((), (1,))

    def _scaling(self, index: int, product: str) -> tuple[str, str]:
        node = self.at.nodes[index]
        return node.op_type, next(n for n in node.input if n != product)

    def _has_softmax(self, group: Group) -> bool:
        return any(self.at.nodes[i].op_type == "Softmax" for i in group.nodes)

    def _split_normalization(self, node: onnx.NodeProto, group: Group) -> None:
        """The normalised value is rounded before gamma and beta are applied to it."""
        gamma = node.input[1]
        shape = self.constants.get(gamma)
        output = node.output[0]
        if shape is None or len([o for o in node.output if o]) > 1:
            self._finish(node, group)
            return
        options = surgery.attributes(node)
        axes = list(range(options.get("axis", -1), 0))  # a positive one says no number of axes
        if self.sites.steps and axes:
            x = self._input(node, 0, node.input[0], group)
            centred = self._round(
                self._new("Sub", x, self._round(self._reduce("ReduceMean", x, axes)))
            )
            square = self._reduce("ReduceMean", self._new("Mul", centred, centred), axes)
            epsilon = self._scalar(options.get("epsilon", 1e-5))
            width = self._new("Sqrt", self._new("Add", square, epsilon))
            scaled = self._new("Mul", self._new("Div", centred, width), gamma)
            self._shift_normalized(self._round(scaled), node, group)
            return
        if self.at.filled(gamma, 1) and all(self.at.filled(beta, 0) for beta in node.input[2:]):
            self._finish(node, group)  # an engine leaves both out, and fuses what comes next
            return
        ones = f"{self.mark}{output}/ones"
        self._initializer(ones, TensorProto.FLOAT, shape, [1.0] * math.prod(shape))
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        del plain.input[2:]
        plain.input[1] = ones
        plain.output[0] = f"{self.mark}{output}/normalized"
        plain.input[0] = self._input(node, 0, node.input[0], group)
        self.nodes.append(plain)
        value = self._round(plain.output[0])
        self._shift_normalized(self._new("Mul", value, gamma), node, group)

    def _split_groups(self, node: onnx.NodeProto, group: Group) -> bool:
        """Like a layer normalisation; gamma and beta are one number for each channel."""
        x, gamma, beta = node.input
        shape, rank = self.constants.get(gamma), len(self.at.shapes.get(x, ()))
        if shape is None or not rank:
            return False
        ones, zeros = (
            self._initializer(
                f"{self.mark}{value} {shape}", TensorProto.FLOAT, shape, [value] * shape[0]
            )
            for value in (1.0, 0.0)
        )
        across = self._integers([-1, *[1] * (rank - 2)])
        x = self._input(node, 0, x, group)
        plain = self._new("GroupNormalization", x, ones, zeros, **surgery.attributes(node))
        scaled = self._new("Mul", self._round(plain), self._new("Reshape", gamma, across))
        shift = self._new("Reshape", beta, across)
        self._outputs(helper.make_node("Add", [scaled, shift], node.output), group)
        return True

    def _split_log_softmax(self, node: onnx.NodeProto, group: Group) -> bool:
        """OpenVINO makes six kernels of it: the exponentials are summed as they were rounded."""
        version, given = surgery.opset(self.at.model), surgery.attributes(node)
        axes = [given.get("axis", -1)]
        if version < _SOFTMAX_ALONG:
            rank = len(self.at.shapes.get(node.input[0], ()))
            axes = list(range(given.get("axis", 1) % max(rank, 1), rank))
        if not (axes and self.sites.outputs and self._writes(group)):
            return False
        x = self._input(node, 0, node.input[0], group)
        below = self._new("Sub", x, self._reduce("ReduceMax", self._round(x), axes))
        total = self._reduce("ReduceSum", self._round(self._new("Exp", below)), axes)
        last = self._round(self._new("Log", total))
        result = helper.make_node("Sub", [self._round(below), last], node.output)
        self._outputs(result, group)
        return True

    def _sum_squares(self, node: onnx.NodeProto, group: Group) -> None:
        """OpenVINO's frontend makes a multiplication and a sum of it: two kernels.

        The first squares what it computed itself as it is; without axes there is no second.
        """
        x, kernel = node.input[0], group.kernel
        squares = (k for k in self.at.kernels if k is not kernel and key(node) in k.nodes)
        within = any(x in k.nodes for k in squares)
        x = self.raw.get(x, x) if within else self._input(node, 0, x, group)
        square = self._new("Mul", x, x)
        node.op_type = "ReduceSum"
        apart = self.sites.outputs and (kernel is None or kernel.type == "Reduce")
        node.input[0] = self._round(square) if apart else square
        axes = surgery.attributes(node).get("axes")
        if axes is not None and surgery.opset(self.at.model) >= OPSET_OF_SUMS:
            node.input.append(self._integers(axes))
            kept = [a for a in node.attribute if a.name != "axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
        self._outputs(node, group)

    def _sum_columns(self, node: onnx.NodeProto, group: Group) -> bool:
        """OpenVINO adds up overlapping blocks in the type it writes: one element of all at once."""
        shape = self.at.shapes.get(node.input[0])
        block = self.at.values.get(node.input[2])
        if not (shape and block is not None and self.sites.outputs and self._writes(group)):
            return False
        count, rows = math.prod(block.tolist()), shape[-2]
        columns = self._input(node, 0, node.input[0], group)
        total = ""
        for element in range(count):
            chosen = [float(row % count == element) for row in range(rows)]
            mask = self._initializer(
                f"{self.mark}element {element} of {count} in {rows}",
                TensorProto.FLOAT,
                (rows, 1),
                chosen,
            )
            part = self._new(
                "Col2Im",
                self._new("Mul", columns, mask),
                *node.input[1:],
                **surgery.attributes(node),
            )
            if total:
                added = self._new("Add", total, part)
                part = f"{added}/{self.to.name}"
                self.nodes.extend(self._biased(added, part))
            total = part
        self.nodes.append(helper.make_node("Identity", [total], node.output))
        self.exact.add(node.output[0])
        return True

    def _average_steps(self, node: onnx.NodeProto, group: Group) -> bool:
        """OpenVINO averages 8-bit integers as they are; what widens them comes behind that.

        Where it is a kernel of its own, it reads the average of the integers rounded.
        """
        kernel, grid = group.kernel, self.at.grid(node.input[0])
        if kernel is None or kernel.precision not in INTEGERS or kernel.nodes != (key(node),):
            return False
        if grid is None or grid.zero is None or grid.scale.size != 1:
            return False
        if not (self.at.reduced and self.sites.inputs and self.sites.outputs):
            return False
        scale, zero = self._scalar(grid.scale.item()), self._scalar(grid.zero.item())
        x, *others = node.input
        counted = self._new("Add", self._new("Div", x, scale), self._scalar(0.5))
        mean = self._new(
            node.op_type, self._new("Floor", counted), *others, **surgery.attributes(node)
        )
        steps = self._round(self._new("Add", mean, zero))
        real = self._new("Mul", self._new("Sub", steps, zero), scale)
        self.nodes.extend(self._rounding(real, node.output[0]))
        self.exact.add(node.output[0])
        return True

    def _reduce(self, op_type: str, tensor: str, axes: list[int]) -> str:
        since = OPSET_OF_SUMS if op_type == "ReduceSum" else _AXES_OPSET
        if surgery.opset(self.at.model) < since:
            return self._new(op_type, tensor, axes=axes)
        return self._new(op_type, tensor, self._integers(axes))

    def _shift_normalized(self, scaled: str, node: onnx.NodeProto, group: Group) -> None:
        """Beta of a layer normalisation, if it has one."""
        beta = node.input[2:]
        last = helper.make_node("Add" if beta else "Identity", [scaled, *beta], node.output[:1])
        self._outputs(last, group)

    def _normalized(self, name: str, group: Group) -> bool:
        """Whether a value inside a kernel is (x − mean) / deviation of a spelt-out LayerNorm."""
        if self.sites.scope != "kernel" or group.kernel is None:
            return False
        node = self.at.nodes[self.at.producer[name]]
        if node.op_type != "Div" or node.input[1] not in self.at.producer:
            return False
        return self.at.nodes[self.at.producer[node.input[1]]].op_type == "Sqrt"


def _swaps_last(node: onnx.NodeProto) -> bool:
    """Whether a node leaves all axes but the last two where they are."""
    order = surgery.attributes(node).get("perm", ())
    return node.op_type == "Transpose" and list(order[:-2]) == list(range(len(order) - 2))
