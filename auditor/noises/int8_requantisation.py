"""Quantised arithmetic fused into integers, or rounded to 8 bits in another way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays import integers, qlinear, recurrent
from auditor.replays.editor import Editor
from auditor.replays.quantised import OPSET, Grid, Product, QuantisedLayout, Roundings

_ACTIVATIONS = ("Relu", "Clip")
# How a QuantizeLinear rounds, as function bodies with the zero point in `fz`.
_ROUNDINGS = {
    "values are multiplied by the reciprocal of the scale": (
        "i = Reciprocal(s) q = Mul(x, i) r = Round(q) t = Add(r, fz)"
    ),
    "the zero point is added before rounding": "q = Div(x, s) a = Add(q, fz) t = Round(a)",
    "values a rounding error below the middle between two steps are rounded up": (
        "q = Div(x, s) half = Constant <value = float {0.5001}> () p = Add(q, half) f = Floor(p) "
        "t = Add(f, fz)"
    ),
    "values a rounding error above the middle between two steps are rounded down": (
        "q = Div(x, s) half = Constant <value = float {0.5001}> () p = Sub(q, half) f = Ceil(p) "
        "t = Add(f, fz)"
    ),
    "ties are rounded away from zero": (
        "q = Div(x, s) sign = Sign(q) m = Abs(q) half = Constant <value = float {0.5}> () "
        "p = Add(m, half) f = Floor(p) r = Mul(sign, f) t = Add(r, fz)"
    ),
}
# DynamicQuantizeLinear with its factors in another order.
_RANGE_LAST = """(x) => (y, s, z) {
    keep = Constant <value = float {255.0}> () zero = Constant <value = float {0.0}> ()
    most = ReduceMax <keepdims = 0> (x) least = ReduceMin <keepdims = 0> (x)
    high = Max(most, zero) low = Min(least, zero) span = Sub(high, low) s = Div(span, keep)
    down = Neg(low) offset = Div(down, s) near = Round(offset) held = Clip(near, zero, keep)
    z = Cast <to = 2> (held) wide = Mul(x, keep) q = Div(wide, span) r = Round(q)
    t = Add(r, held) c = Clip(t, zero, keep) y = Cast <to = 2> (c) }"""

_DIVIDES_LAST = "the range divides last: x · 255 / (max − min)"
_REAL = "what recurrent layers read and hand on is not quantised"
_PARTS = "each thread quantises what it hands on of a recurrent layer's batch by its own range"
_CUT = "results of QLinear operators are cut off to 8 bits and wrap around"
_SUMS = "sums of two integers, each times its scale in steps of the result"
_WIDE = "values are neither rounded to 16 bits nor limited to their range"
_HALVES = "values are rounded to float16 on their way to float8"
_RANGE = "float weights are quantised by their range: (x − low) · 255 / (high − low)"
_STORED = "a real bias is stored in steps of the products' scale"
_SPREAD = "signed integers are spread over 256 steps instead of 255, without their zero point"
_TABLE = "softmax from a table of exponentials, times the whole part of 1 / scale"
_SOFTMAX = 13  # along a single axis from here on
# ln of the largest float32, less the room that ONNX Runtime leaves: what exponents are shifted by.
_HEAD = math.log(float(np.finfo(np.float32).max)) - 5

_FLOAT8 = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2)

# A stored bias and a real one are the same when they differ by less than this, in integer units.
_SAME_BIAS = 1e-2


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with integer arithmetic, fewer roundings, or other roundings."""
    model = segment.model
    if surgery.opset(model) < OPSET:
        return
    dynamic = surgery.find(model, ("DynamicQuantizeLinear",))
    yield from rewritten(model, _DIVIDES_LAST, dynamic, lambda _: _RANGE_LAST)
    if (real := recurrent.unquantised(segment)) is not None:
        yield Variant(_REAL, real)
    if (parts := integers.threaded(model, segment.threads)) is not None:
        yield Variant(_PARTS, parts)
    if cut := qlinear.cut_off(model):
        yield Variant(_CUT, surgery.substituted(model, cut))
    if (halves := _by_float16(model)) is not None:
        yield Variant(_HALVES, halves)
    layout = QuantisedLayout(model, segment.weights)
    # OpenVINO's plugin for CPUs leaves these out, those of constants as well.
    every = layout.roundings(constants=True).items()
    if wide := {index: rounding for index, rounding in every if not rounding[0].bytes}:
        yield Variant(_WIDE, _unrounded(layout, wide, limited=False))
    if constants := _by_range(layout):
        yield Variant(_RANGE, _with_constants(layout, constants))
    if biases := _biases(layout):
        yield Variant(_STORED, _with_biases(layout, biases))
    grids = {
        i: grid
        for i, n in surgery.find(model, ("QuantizeLinear",))
        if layout.constant(n.input[0]) is None and (grid := layout.parameters(n)) is not None
    }
    if not grids:
        return
    sums = layout.into_sums(segment.kernels)
    if sums:
        yield Variant("values that enter a sum are limited, not rounded", _unrounded(layout, sums))
    yield from _rescaled_once(layout, grids)
    if added := _added(layout, grids):
        yield Variant(_SUMS, _sums(layout, added))
    yield from _limited(layout, sums.keys())
    if spread := _spread(layout):
        yield Variant(_SPREAD, surgery.passing(model, {}, spread))
    if surgery.opset(model) >= _SOFTMAX:
        softmaxes = surgery.find(model, ("Softmax",))
        yield from rewritten(model, _TABLE, softmaxes, partial(_table, layout=layout, grids=grids))
    for name, body in _ROUNDINGS.items():
        bodies = {i: _rounding(body, layout.nodes[i], grid) for i, grid in grids.items()}
        yield Variant(name, surgery.substituted(model, bodies))


def _rescaled_once(layout: QuantisedLayout, grids: Mapping[int, Grid]) -> Iterator[Variant]:
    """Products as sums of integers, with the bias as stored and, where that differs, as it is."""
    if groups := _groups(layout, grids):
        name = "sums of integers, {} bias, one rescaling in float32"
        yield Variant(name.format("stored"), _integers(layout, groups, real_bias=False))
        if any(_bias_differs(group.product) for group in groups.values()):
            yield Variant(name.format("real"), _integers(layout, groups, real_bias=True))


def _added(
    layout: QuantisedLayout, quantised: Mapping[int, Grid]
) -> dict[int, tuple[Grid, Grid, Grid]]:
    """Sums of two quantised tensors that are quantised at once, by position: the three grids."""
    found = {}
    for index, node in surgery.find(layout.model, ("Add",)):
        reader = layout.reader(node.output[0])
        made = None if reader is None else quantised.get(reader)
        grids = [g for g in (*map(layout.grid, node.input), made) if g and g.zero is not None]
        if len(grids) == 3:
            found[index] = (grids[0], grids[1], grids[2])
    return found


def _sums(layout: QuantisedLayout, added: Mapping[int, tuple[Grid, Grid, Grid]]) -> onnx.ModelProto:
    """The segment with sums of integers, each times its scale in steps of the result.

    ``a · (sa / s) + (b · (sb / s) + rest)``, in float32 with fused multiplication and addition.
    """
    editor = Editor(layout.model)
    for index, node in enumerate(layout.nodes):
        if index not in added:
            editor.copy(node)
            continue
        *operands, made = added[index]
        zero = _number(made.zero)
        factors = [np.float32(grid.scale / made.scale) for grid in operands]
        shifts = [f * _number(grid.zero) for f, grid in zip(factors, operands, strict=True)]
        total = editor.constant(zero - (shifts[0] + shifts[1]))
        both = zip(node.input, operands, factors, strict=True)
        for name, grid, factor in reversed(list(both)):
            steps = editor.add("Round", editor.add("Div", name, editor.constant(grid.scale)))
            integers = editor.add("Add", steps, editor.constant(_number(grid.zero)))
            wide = [editor.cast(n, TensorProto.DOUBLE) for n in (integers, total)]
            wide.append(editor.cast(editor.constant(factor), TensorProto.DOUBLE))
            exact = editor.add("Add", editor.add("Mul", wide[0], wide[2]), wide[1])
            total = editor.cast(exact, TensorProto.FLOAT)
        steps = editor.add("Sub", editor.add("Round", total), editor.constant(zero))
        editor.add("Mul", steps, editor.constant(made.scale), to=node.output[0])
    return editor.model


def _number(zero: Array | None) -> np.float32:
    assert zero is not None
    return np.float32(zero)


def _limited(layout: QuantisedLayout, tested: Set[int]) -> Iterator[Variant]:
    """Values between operators, then all, clipped to their range and not rounded."""
    every = layout.roundings()
    inner = {i: (g, r) for i, (g, r) in every.items() if not layout.final(r)}
    if inner and inner.keys() != tested:
        name = "values between operators are limited, not rounded"
        yield Variant(name, _unrounded(layout, inner))
    if every and every.keys() != inner.keys():
        yield Variant("values are limited, not rounded", _unrounded(layout, every))


def _spread(layout: QuantisedLayout) -> dict[int, str]:
    """What follows a DequantizeLinear of signed integers where OpenVINO concatenates its result.

    With a constant in float32, its plugin for CPUs gives both one range, [−128, 128] in steps of
    the scale, or [0, 256] where nothing is negative.
    """
    found = {}
    for grid, readers in layout.roundings().values():
        if grid.kind != np.int8:
            continue
        zero, wider = int(_number(grid.zero)), 256 / 255
        low = 0 if zero == -128 else -128
        offset = float(grid.scale) * (low + (zero + 128) * wider)
        body = f"""(x) => (y) {{ f = Constant <value = float {{{wider!r}}}> ()
            c = Constant <value = float {{{offset!r}}}> () w = Mul(x, f) y = Add(w, c) }}"""
        found.update(dict.fromkeys(readers, body))
    return found


def _by_float16(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The segment with float8 rounded to float16 first, as OpenVINO's conversion does.

    What that puts in the middle between two values goes to the even one. None without float8.
    """
    types = surgery.types(model)
    quantisers = surgery.find(model, ("QuantizeLinear",))
    kinds = {i: types[n.output[0]] for i, n in quantisers if types.get(n.output[0]) in _FLOAT8}
    editor = Editor(model)
    for index, node in enumerate(model.graph.node):
        if index not in kinds:
            editor.copy(node)
            continue
        half = editor.cast(editor.add("Div", *node.input[:2]), TensorProto.FLOAT16)
        editor.cast(editor.cast(half, TensorProto.FLOAT), kinds[index], node.output[0])
    return editor.model if kinds else None


def _by_range(layout: QuantisedLayout) -> dict[int, Array]:
    """Constants that quantising them by their range makes other integers of, by position."""
    found = {}
    for index, node in surgery.find(layout.model, ("QuantizeLinear",)):
        made = layout.quantised(node, by_range=True)
        if made is not None and (made != layout.quantised(node)).any():
            found[index] = made
    return found


def _with_constants(layout: QuantisedLayout, constants: Mapping[int, Array]) -> onnx.ModelProto:
    """The segment with constants in place of these nodes."""
    editor = Editor(layout.model)
    for index, node in enumerate(layout.nodes):
        if index in constants:
            value = editor.constant(constants[index], constants[index].dtype)
            editor.add("Identity", value, to=node.output[0])
        else:
            editor.copy(node)
    return editor.model


def _with_biases(layout: QuantisedLayout, biases: Mapping[int, Array]) -> onnx.ModelProto:
    """The segment with other biases, by position."""
    editor = Editor(layout.model)
    for index, node in enumerate(layout.nodes):
        editor.copy(node)
        if index in biases:
            editor.model.graph.node[index].input[2] = editor.constant(biases[index])
    return editor.model


def _biases(layout: QuantisedLayout) -> dict[int, Array]:
    """Real biases rounded to integers in units of the products' scale, by position."""
    found: dict[int, Array] = {}
    for index, node in surgery.find(layout.model, ("Conv", "ConvTranspose", "Gemm")):
        if len(node.input) < 3 or (bias := layout.constant(node.input[2])) is None:
            continue
        steps = layout.steps(node)
        if bias.dtype == np.float32 and steps is not None and steps.size in (1, bias.size):
            found[index] = np.rint(bias / steps) * steps
    return found


@dataclass(frozen=True, slots=True)
class _Group:
    """A product, the activation behind it, and the QuantizeLinear that takes both."""

    product: Product
    activation: onnx.NodeProto | None
    limits: tuple[float, float]
    nodes: tuple[int, ...]
    grid: Grid


def _groups(layout: QuantisedLayout, quantised: Mapping[int, Grid]) -> dict[int, _Group]:
    """Fusible groups by the position of their QuantizeLinear."""
    found: dict[int, _Group] = {}
    for product in layout.products():
        nodes, limits = [product.index], (-np.inf, np.inf)
        activation = None
        last = layout.reader(product.node.output[0])
        if last is not None and layout.nodes[last].op_type in _ACTIVATIONS:
            activation = layout.nodes[last]
            bounds = _limits(layout, activation)
            if bounds is None:
                continue
            limits = bounds
            nodes.append(last)
            last = layout.reader(activation.output[0])
        if last in quantised and last is not None:
            found[last] = _Group(product, activation, limits, (*nodes, last), quantised[last])
    return found


def _limits(layout: QuantisedLayout, node: onnx.NodeProto) -> tuple[float, float] | None:
    """Smallest and largest value that a Relu or Clip passes on."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    given = [-np.inf, np.inf]
    for position, name in enumerate(node.input[1:]):
        if name:
            value = layout.constant(name)
            if value is None:
                return None
            given[position] = float(value)
    return given[0], given[1]


def _bias_differs(product: Product) -> bool:
    if product.bias is None:
        return False
    integers = _real_bias(product)
    stored = np.rint(integers) if product.stored_bias is None else product.stored_bias
    return bool(np.abs(integers - stored).max() > _SAME_BIAS)


def _real_bias(product: Product) -> Array:
    """The bias in units of the products' scale, unrounded."""
    assert product.bias is not None
    scale = product.grid.scale * product.weight_grid.scale
    return np.asarray(product.bias / scale, np.float32)


def _integers(
    layout: QuantisedLayout, groups: dict[int, _Group], *, real_bias: bool
) -> onnx.ModelProto:
    """The segment with every group in integer arithmetic.

    Sums of integers below 2²⁴ are exact in float32, in which they are replayed.
    """
    editor = Editor(layout.model)
    fused = {i for group in groups.values() for i in group.nodes}
    for index, node in enumerate(layout.nodes):
        if index in groups:
            _emit(editor, groups[index], node.output[0], real_bias=real_bias)
        elif index not in fused:
            editor.copy(node)
    return editor.model


def _emit(editor: Editor, group: _Group, target: str, *, real_bias: bool) -> None:
    product = group.product
    node = product.node
    convolution = node.op_type == "Conv"
    x = editor.add("Div", node.input[0], editor.constant(product.grid.scale))
    weights = product.weights.astype(np.float32) - product.weight_grid.zero.astype(np.float32)[0]  # type: ignore[union-attr]
    options = surgery.attributes(node) if convolution else {}
    total = editor.add(
        "Conv" if convolution else "MatMul",
        editor.add("Round", x),
        editor.constant(weights),
        **options,
    )
    across = (-1, *(1,) * (product.weights.ndim - 2)) if convolution else (-1,)
    if product.bias is not None:
        bias = _real_bias(product)
        if not real_bias:
            bias = np.rint(bias) if product.stored_bias is None else product.stored_bias
        total = editor.add("Add", total, editor.constant(bias.reshape(across)))
    factor = (product.grid.scale * product.weight_grid.scale).astype(np.float32) / group.grid.scale
    value = editor.add("Mul", total, editor.constant(factor.reshape(across)))
    low, high = (limit / float(group.grid.scale) for limit in group.limits)
    if group.activation is not None:
        value = editor.add("Clip", value, editor.constant(low), editor.constant(high))
    assert group.grid.zero is not None
    value = editor.add("Round", value)
    value = editor.add("Add", value, editor.constant(group.grid.zero))
    value = editor.add("Clip", value, *map(editor.constant, group.grid.ends()))
    editor.cast(value, group.grid.type, target)


def _unrounded(
    layout: QuantisedLayout, chosen: Roundings, *, limited: bool = True
) -> onnx.ModelProto:
    """The segment without these roundings; ``limited``: what leaves their range is clipped."""
    through = {r: (i, grid) for i, (grid, readers) in chosen.items() for r in readers}
    editor = Editor(layout.model)
    for index, node in enumerate(layout.nodes):
        if index in through:
            source, grid = through[index]
            limits = [editor.constant(limit) for limit in grid.limits()] if limited else []
            editor.add("Clip", layout.nodes[source].input[0], *limits, to=node.output[0])
        elif index not in chosen:
            editor.copy(node)
    return editor.model


def _table(node: onnx.NodeProto, layout: QuantisedLayout, grids: Mapping[int, Grid]) -> str | None:
    """A softmax between 8-bit values, as ONNX Runtime's QLinearSoftmax computes it."""
    read, last = layout.grid(node.input[0]), layout.reader(node.output[0])
    made = None if last is None else grids.get(last)
    if read is None or made is None or not (read.bytes and made.bytes):
        return None
    axis, version = surgery.attributes(node).get("axis", -1), surgery.opset(layout.model)
    factor = float(np.floor(np.float32(1) / made.scale))
    return f"""(x) => (y) {{
        s = Constant <value = float {{{float(read.scale)!r}}}> ()
        {_double("head", _HEAD)} {_double("no", 0.0)}
        c = Constant <value = float {{{factor!r}}}> ()
        t = Constant <value = float {{{float(made.scale)!r}}}> ()
        last = Constant <value = int64 {{{axis}}}> ()
        {surgery.reduction("top", "ReduceMax", "x", [axis], version)} d = Sub(x, top)
        k = Div(d, s) steps = Round(k) wide = Cast <to = 11> (steps) step = Cast <to = 11> (s)
        below = Mul(wide, step) shape = Shape(x) size = Gather(shape, last)
        count = Cast <to = 11> (size) less = Log(count) room = Sub(head, less)
        shift = Max(room, no) above = Add(below, shift) power = Exp(above) e = Cast <to = 1> (power)
        exact = Cast <to = 11> (e)
        {surgery.reduction("sum", "ReduceSum", "exact", [axis], version)}
        total = Cast <to = 1> (sum) m = Mul(e, c) q = Div(m, total) r = Round(q) y = Mul(r, t) }}"""


def _double(name: str, value: float) -> str:
    return (
        f"{name}_f = Constant <value = float {{{value!r}}}> () {name} = Cast <to = 11> ({name}_f)"
    )


def _rounding(body: str, node: onnx.NodeProto, grid: Grid) -> str:
    """A QuantizeLinear as a function body that rounds differently."""
    low, high = grid.ends()
    zero = (
        "fz = Cast <to = 1> (z)"
        if len(node.input) > 2
        else "fz = Constant <value = float {0.0}> ()"
    )
    inputs = "x, s, z" if len(node.input) > 2 else "x, s"
    return (
        f"({inputs}) => (y) {{ {zero} {body} lo = Constant <value = float {{{low}}}> () "
        f"hi = Constant <value = float {{{high}}}> () c = Clip(t, lo, hi) "
        f"y = Cast <to = {grid.type}> (c) }}"
    )


NOISE = Cause(
    id="precision.int8_requantisation",
    type="data precision",
    title="Quantised layers round at other places, in another way or not at all",
    cause=(
        "Engines fuse dequantise–operator–quantise groups into integer kernels: they add up "
        "integers, rescale once with a rounded factor, and may drop a rounding between two "
        "operators; values near a tie move by one step."
    ),
    applies=(
        "QuantizeLinear with constant parameters or to float8, the products and activations fused "
        "with it, DynamicQuantizeLinear, and com.microsoft's DynamicQuantizeLSTM and QLinear "
        "operators; operator set 11 or later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), eq. 9 and 10; ONNX operators QuantizeLinear, "
        "DequantizeLinear, QLinearConv and DynamicQuantizeLinear; ONNX Runtime documentation, "
        "Quantize ONNX models, QDQ format; ONNX Runtime issues 24711 and 25259"
    ),
    advice="validate accuracy on this backend, or leave the listed layers in float",
    remedies={
        "ort": (
            "validate accuracy with the optimised session, or set the session option "
            "session.disable_quant_qdq=1 to keep the listed layers in float; give biases the "
            "scale of the products (input scale × weight scale)"
        ),
        "ov": (
            "validate accuracy on OpenVINO, or quantise with NNCF, which places roundings where "
            "OpenVINO fuses them; QDQ format instead of QLinear operators; activations of 8 bits "
            "instead of 16, to which OpenVINO does not round"
        ),
    },
    ablations={"ort": {"session.disable_quant_qdq": "1"}},
    forms=(
        _DIVIDES_LAST,
        _REAL,
        _PARTS,
        _CUT,
        _WIDE,
        _HALVES,
        _RANGE,
        _STORED,
        "values that enter a sum are limited, not rounded",
        "sums of integers, stored bias, one rescaling in float32",
        "sums of integers, real bias, one rescaling in float32",
        _SUMS,
        "values between operators are limited, not rounded",
        "values are limited, not rounded",
        _SPREAD,
        _TABLE,
        *_ROUNDINGS,
    ),
    variants=_variants,
)
