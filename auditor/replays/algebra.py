"""Segments rewritten by rules of algebra that compilers use: equal in exact arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from auditor.graphs import surgery
from auditor.ports import Array, SegmentGraph
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout
from auditor.replays.linear import Line, line

# What is left of an operator: its type, or the constant that it is, and its operands.
_Left = tuple[str, list[str]]

_NARROW = frozenset(
    onnx.TensorProto.DataType.Value(name)
    for name in ("FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2")
)
_ALONG = 13  # the first operator set whose softmax is along one axis
_COMPARISONS = 12  # the first operator set with all four
# Comparisons, and what their negation is between numbers.
_OPPOSITES = {
    "Greater": "LessOrEqual",
    "Less": "GreaterOrEqual",
    "LessOrEqual": "Greater",
    "GreaterOrEqual": "Less",
}


def distributed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]] | None:
    """The segment with ``c·(k ± x)`` computed as ``c·k ± c·x``; None where it has no such product.

    Compilers turn chains of constant factors and shifts into one multiply-add (OpenVINO's
    PowerStatic, for instance). It shows where c·x is rounded and c·k is not: an attention mask,
    ``(1 − mask) · lowest float``, no longer cancels where nothing is masked.

    Args:
        model: a segment; ``c`` and ``k`` are float32 constants of one element.

    Returns:
        The rewritten segment, and which of its tensors are the ``c·x``.
    """
    constants = surgery.constants(model)
    scalars = {n: v for n, v in constants.items() if v.size == 1 and v.dtype == np.float32}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(o.name for o in model.graph.output)
    result = surgery.copied(model)
    sums = {
        node.output[0]: node
        for _, node in surgery.find(result, ("Add", "Sub"))
        if uses[node.output[0]] == 1 and _operands(node, scalars)
    }
    products = set[str]()
    for _, product in surgery.find(result, ("Mul",)):
        factor, total = _operands(product, scalars) or ("", "")
        if total not in sums:
            continue
        inner = sums[total]
        shift, x = _operands(inner, scalars) or ("", "")
        scaled, moved = scalars[factor], scalars[factor] * scalars[shift]
        if inner.op_type == "Sub" and inner.input[0] == shift:
            scaled = -scaled
        elif inner.op_type == "Sub":
            moved = -moved
        names = (f"{total}/factor", f"{total}/shift")
        for name, value in zip(names, (scaled, moved), strict=True):
            result.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        inner.CopyFrom(helper.make_node("Mul", [x, names[0]], [total], inner.name))
        product.CopyFrom(
            helper.make_node("Add", [total, names[1]], list(product.output), product.name)
        )
        products.add(total)
    return (result, frozenset(products)) if products else None


def _operands(node: onnx.NodeProto, scalars: Container[str]) -> tuple[str, str] | None:
    """A binary node's one constant operand, and the other."""
    a, b = node.input
    if (a in scalars) == (b in scalars):
        return None
    return (a, b) if a in scalars else (b, a)


def taken_in(segment: SegmentGraph) -> onnx.ModelProto | None:
    """The segment with factors and shifts behind a layer in its weights and bias; None without any.

    Args:
        segment: one with Conv, Gemm or MatMul nodes whose float32 weights are constants. A batch
            normalisation behind a convolution is a factor and a shift.
    """
    layout = Layout(segment.model, segment.weights)
    editor = Editor(segment.model)
    gone: dict[int, str] = {}  # what a layer took in, and what it reads
    for index, node in enumerate(layout.nodes):
        if index in gone:
            editor.add("Identity", gone[index], to=node.output[0])
            continue
        layer = _layer(layout, node)
        if layer is None:
            editor.copy(node)
            continue
        name, behind = node.output[0], layout.reader(node.output[0])
        taken = len(gone)
        while behind is not None and (step := _behind(layout, layout.nodes[behind])):
            if step.base != name or not layer.takes(step):
                break
            gone[behind] = name
            name = layout.nodes[behind].output[0]
            behind = layout.reader(name)
        if len(gone) > taken:
            layer.emit(editor)
        else:
            editor.copy(node)
    return editor.changed


def taken_out(segment: SegmentGraph) -> onnx.ModelProto | None:
    """The segment with ``(c·a) @ b`` as ``c·(a @ b)``, on either side; None without any.

    Args:
        segment: one with MatMul nodes; c are float32 constants of one element, or what divides.
    """
    layout = Layout(segment.model, segment.weights)
    editor = Editor(segment.model)
    for node in layout.nodes:
        operands, factors = list(node.input), list[Array]()
        for position, name in enumerate(operands if node.op_type == "MatMul" else ()):
            source = layout.source(name)
            step = None if source is None else line(layout, source)
            if step is not None and step.scales and step.factor.size == 1:
                operands[position] = step.base
                factors.append(step.factor.reshape(()))
        if not factors:
            editor.copy(node)
            continue
        with np.errstate(all="ignore"):
            factor = editor.constant(np.prod(factors, dtype=np.float32))
        editor.add("Mul", editor.add("MatMul", *operands), factor, to=node.output[0])
    return editor.changed


def inverted(segment: SegmentGraph) -> onnx.ModelProto | None:
    """The segment with ``x / c`` as ``x · (1 / c)``, which may be infinite; None without any."""
    layout = Layout(segment.model, segment.weights)
    editor = Editor(segment.model)
    for node in layout.nodes:
        step = line(layout, node) if node.op_type == "Div" else None
        if step is None:
            editor.copy(node)
            continue
        editor.add("Mul", step.base, editor.constant(step.factor), to=node.output[0])
    return editor.changed


def softened(segment: SegmentGraph) -> onnx.ModelProto | None:
    """The segment with ``eˣ / Σ eˣ`` as a softmax, which takes the largest x off first; or None."""
    layout, editor = Layout(segment.model), Editor(segment.model)
    for node in layout.nodes:
        power, total = map(layout.source, node.input[:2]) if node.op_type == "Div" else (None, None)
        written = power is not None and total is not None and power.op_type == "Exp"
        axes = _summed(layout, total, node.input[0]) if total is not None and written else []
        if len(axes) != 1 or power is None or surgery.opset(segment.model) < _ALONG:
            editor.copy(node)
            continue
        editor.add("Softmax", power.input[0], to=node.output[0], axis=axes[0])
    return editor.changed


def _summed(layout: Layout, node: onnx.NodeProto, of: str) -> list[int]:
    """The axes along which a node adds up a tensor and keeps them; none for other nodes."""
    given = surgery.attributes(node)
    if node.op_type != "ReduceSum" or node.input[0] != of or not given.get("keepdims", 1):
        return []
    axes = layout.constant(node.input[1]) if len(node.input) > 1 else None
    return [int(axis) for axis in given.get("axes", () if axes is None else axes.reshape(-1))]


def cancelled(segment: SegmentGraph) -> onnx.ModelProto | None:
    """The segment without what cancels for every real number; None where nothing does.

    NaN, infinity, −0, and what exponentials lose or overflow do not cancel: x − x, x / x and x · 0
    are constants, x + 0 is x, log(exp(x)) is x, log(exp(x) + 1) a Softplus, a product with an
    inverse, (1 / a) · b, the quotient b / a, and what is not greater is less or equal. A cast to
    half precision and back, which rounds, is left out as well.
    """
    layout, editor = Layout(segment.model), Editor(segment.model)
    kinds = surgery.types(segment.model)
    for node in layout.nodes:
        instead = _without(layout, node)
        if instead is None:
            editor.copy(node)
            continue
        op_type, operands = instead
        if op_type in ("0", "1") and kinds.get(node.output[0]) != onnx.TensorProto.FLOAT:
            editor.copy(node)
        elif op_type in ("0", "1"):  # in the shape of the result
            zero = editor.add("Sub", *operands)
            shape = editor.add("Shape", zero)
            value = numpy_helper.from_array(np.array([float(op_type)], np.float32))
            editor.add("ConstantOfShape", shape, to=node.output[0], value=value)
        elif op_type == "Cast":
            editor.cast(operands[0], onnx.TensorProto.FLOAT, to=node.output[0])
        else:
            editor.add(op_type, *operands, to=node.output[0])
    return editor.changed


def _to(cast: onnx.NodeProto) -> int:
    return int(surgery.attributes(cast)["to"])


def _without(layout: Layout, node: onnx.NodeProto) -> _Left | None:
    """What is left of an operator that cancels."""
    cancels = _CANCELS.get(node.op_type)
    return cancels(layout, node) if cancels is not None else None


def _without_log(layout: Layout, node: onnx.NodeProto) -> _Left | None:
    inner = layout.source(node.input[0])
    if inner is not None and inner.op_type == "Add":  # log(exp(x) + 1)
        a, b = (layout.source(name) for name in inner.input)
        one = (layout.constant(name) for name in inner.input)
        if any(v is not None and v.size == 1 and v.item() == 1 for v in one):
            inner = next((n for n in (a, b) if n is not None and n.op_type == "Exp"), None)
            return ("Softplus", [inner.input[0]]) if inner else None
    return ("Identity", [inner.input[0]]) if inner and inner.op_type == "Exp" else None


def _without_cast(layout: Layout, node: onnx.NodeProto) -> _Left | None:
    inner = layout.source(node.input[0])
    narrow = inner is not None and inner.op_type == "Cast" and _to(inner) in _NARROW
    if inner is not None and narrow and _to(node) == onnx.TensorProto.FLOAT:
        return "Cast", [inner.input[0]]
    return None


def _without_not(layout: Layout, node: onnx.NodeProto) -> _Left | None:
    inner = layout.source(node.input[0])
    opposite = _OPPOSITES.get(inner.op_type) if inner is not None else None
    known = surgery.opset(layout.model) >= _COMPARISONS
    return (opposite, list(inner.input)) if inner is not None and opposite and known else None


def _without_arithmetic(layout: Layout, node: onnx.NodeProto) -> _Left | None:
    a, b = node.input
    if a == b and node.op_type in ("Sub", "Div"):
        return ("0" if node.op_type == "Sub" else "1", [a, b])
    for one, other in ((a, b), (b, a)):
        constant = layout.constant(one)
        if constant is None and node.op_type == "Mul":
            inverse = layout.source(one)
            if inverse is not None and (of := _inverted(layout, inverse)):
                return "Div", [other, of]
        if constant is None or constant.size != 1:
            continue
        value = float(constant.reshape(-1)[0])
        if value == 0 and node.op_type == "Mul" and constant.dtype == np.float32:
            return "0", [one, other]
        if value == 0 and node.op_type == "Add" and constant.ndim == 0:
            return "Identity", [other]
    return None


_CANCELS: dict[str, Callable[[Layout, onnx.NodeProto], _Left | None]] = {
    "Log": _without_log,
    "Cast": _without_cast,
    "Not": _without_not,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _without_arithmetic),
}


def _inverted(layout: Layout, node: onnx.NodeProto) -> str:
    """What 1 is divided by, if that is what a node does."""
    if node.op_type == "Reciprocal":
        return str(node.input[0])
    one = layout.constant(node.input[0]) if node.op_type == "Div" else None
    return str(node.input[1]) if one is not None and one.size == 1 and one.item() == 1 else ""


def _behind(layout: Layout, node: onnx.NodeProto) -> Line | None:
    """What a node multiplies a tensor with and adds to it, if that is constant."""
    if node.op_type != "BatchNormalization":
        return line(layout, node)
    given, found = surgery.attributes(node), [layout.constant(n) for n in node.input[1:]]
    values = [v for v in found if v is not None and v.dtype == np.float32]
    source = layout.source(node.input[0])
    if len(values) < len(found) or given.get("training_mode") or source is None:
        return None
    if source.op_type != "Conv" or len(node.output) > 1:
        return None
    weights = layout.constant(source.input[1])
    scale, shift, mean, variance = values
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + np.float32(given.get("epsilon", 1e-5)))
        shift = shift - mean * factor
    shape = (-1, *[1] * (2 if weights is None else weights.ndim - 2))
    return Line(node.input[0], factor.reshape(shape), shift.reshape(shape))


@dataclass(slots=True)
class _Layer:
    """A layer whose constants take in what is behind it."""

    node: onnx.NodeProto
    weights: Array
    bias: Array | None
    axis: int  # of the output channels, in the weights

    def takes(self, step: Line) -> bool:
        """Take in a factor and a shift, if each is one number or one for each channel."""
        channels = self.weights.shape[self.axis]
        # Channels are the second axis of what a convolution gives, and the last of a product.
        behind = self.weights.ndim - 2 if self.node.op_type == "Conv" else 0
        shape = (channels, *[1] * behind)
        for value in (step.factor, step.shift):
            if value.size > 1 and (value.size != channels or value.shape[-len(shape) :] != shape):
                return False
        if not step.scales and self.node.op_type == "MatMul":
            return False
        factor, shift = (
            np.broadcast_to(v.reshape(-1), channels) for v in (step.factor, step.shift)
        )
        beside = [1] * self.weights.ndim
        beside[self.axis] = channels
        with np.errstate(all="ignore"):
            self.weights = self.weights * factor.reshape(beside)
            self.bias = None if self.bias is None else self.bias * factor
            if not step.scales:
                self.bias = shift if self.bias is None else self.bias + shift
        return True

    def emit(self, editor: Editor) -> None:
        """Add the layer with the constants that it has now."""
        node = self.node
        inputs = [node.input[0], editor.constant(self.weights)]
        inputs += [] if self.bias is None else [editor.constant(self.bias)]
        editor.add(node.op_type, *inputs, to=node.output[0], **surgery.attributes(node))


def _layer(layout: Layout, node: onnx.NodeProto) -> _Layer | None:
    given = surgery.attributes(node)
    if node.op_type not in ("Conv", "Gemm", "MatMul") or not all(
        given.get(name, 1.0) == 1.0 for name in ("alpha", "beta")
    ):
        return None
    weights = layout.constant(node.input[1])
    biased = len(node.input) > 2 and bool(node.input[2])
    bias = layout.constant(node.input[2]) if biased else None
    if weights is None or weights.dtype != np.float32 or weights.ndim < 2:
        return None
    if biased and (bias is None or bias.ndim != 1):
        return None
    first = node.op_type == "Conv" or given.get("transB", 0)
    return _Layer(node, weights, bias, 0 if first else weights.ndim - 1)
