"""Padding convention: how much goes to which end, and what a padded cell counts as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays.quantised import QuantisedLayout

_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
_POOLS = ("MaxPool", "AveragePool", "LpPool")
_AMOUNTS = 11  # Pad takes its amounts as an input from this opset on
_VALUE = 2  # position of Pad's input that says what it is filled with
_LOWEST = float(np.finfo(np.float32).min)
_SAME = {"SAME_UPPER": "SAME_LOWER", "SAME_LOWER": "SAME_UPPER"}

# Attributes to set (None removes) on a node with these attributes; None changes nothing.
Attributes = dict[str, Any]


def _swapped(given: Attributes) -> Attributes | None:
    """What was padded at the end is padded at the beginning."""
    if given.get("auto_pad") in _SAME:
        return {"auto_pad": _SAME[given["auto_pad"]]}
    begin, end = _halves(given)
    return {"pads": end + begin} if begin != end else None


def _same(auto_pad: str) -> Callable[[Attributes], Attributes | None]:
    """Explicit padding replaced by as much as makes output size × stride the input size."""

    def change(given: Attributes) -> Attributes | None:
        begin, end = _halves(given)
        strided = any(stride > 1 for stride in given.get("strides", ()))
        if "output_shape" in given:
            return {"auto_pad": auto_pad} if given.get("auto_pad") not in _SAME else None
        if not any(begin + end) or not (strided or begin != end):
            return None
        return {"auto_pad": auto_pad, "pads": None}

    return change


def _ignored(given: Attributes) -> Attributes | None:
    """No padding at all."""
    pads = given.get("pads", ())
    if given.get("auto_pad") in _SAME:
        return {"auto_pad": None}
    return {"pads": [0] * len(pads)} if any(pads) else None


def _symmetric(given: Attributes) -> Attributes | None:
    """The padding of the beginning at both ends."""
    begin, end = _halves(given)
    return {"pads": begin + begin} if begin != end else None


def _one_end(given: Attributes, *, last: bool) -> Attributes | None:
    """All of every axis's padding at its end, or at its beginning."""
    begin, end = _halves(given)
    all_of_it = [b + e for b, e in zip(begin, end, strict=True)]
    none = [0] * len(begin)
    pads = none + all_of_it if last else all_of_it + none
    return {"pads": pads} if pads != begin + end else None


def _axis_by_axis(given: Attributes) -> Attributes | None:
    """``pads`` read as beginning and end of the first axis, then of the next."""
    pads = list(given.get("pads", ()))
    other = pads[::2] + pads[1::2]
    return {"pads": other} if other != pads else None


def _counted(given: Attributes) -> Attributes | None:
    """An average divides by the padded cells too, or no longer does."""
    if given.get("auto_pad") in _SAME or any(given.get("pads", ())):
        return {"count_include_pad": 1 - given.get("count_include_pad", 0)}
    return None


def _mode(mode: str) -> Callable[[Attributes], Attributes | None]:
    """A Pad filled in another way."""
    return lambda given: {"mode": mode} if given.get("mode", "constant") != mode else None


def _zero(given: Attributes) -> Attributes | None:
    """A Pad with zeros instead of its own value."""
    return {"value": None} if given.get("value") else None


_STORED = "padded cells are the integer 0, not the zero point"
_ANY = (*_CONVOLUTIONS, *_POOLS)
# Forms, most likely first, with the operators that have them.
_FORMS: tuple[tuple[str, tuple[str, ...], Callable[[Attributes], Attributes | None]], ...] = (
    ("beginning and end are swapped", _ANY, _swapped),
    ("padded as auto_pad=SAME_UPPER", _ANY, _same("SAME_UPPER")),
    ("padded as auto_pad=SAME_LOWER", _ANY, _same("SAME_LOWER")),
    ("count_include_pad is the other way", ("AveragePool",), _counted),
    ("padding is ignored", _ANY, _ignored),
    ("the padding of the beginning is put at both ends", _ANY, _symmetric),
    ("all padding is put at the end", _ANY, partial(_one_end, last=True)),
    ("all padding is put at the beginning", _ANY, partial(_one_end, last=False)),
    ("pads are read axis by axis", _ANY, _axis_by_axis),
    ("padded with zeros", ("Pad",), _zero),
    ("padded with the edge", ("Pad",), _mode("edge")),
    ("padded by reflection", ("Pad",), _mode("reflect")),
    ("padded with a constant", ("Pad",), _mode("constant")),
)


_FLAT = "flat = Constant <value = int64[1] {-1}> () other = Reshape (turned, flat)"
# What a Pad does with its ``amounts``, which exporters often compute: other amounts from them.
_PADS = (
    (
        "beginning and end of a Pad are swapped",
        "shape = Constant <value = int64[2] {2, -1}> () halves = Reshape (amounts, shape) "
        "order = Constant <value = int64[2] {1, 0}> () "
        f"turned = Gather <axis = 0> (halves, order) {_FLAT}",
    ),
    ("a Pad is ignored", "other = Sub (amounts, amounts)"),
    (
        "amounts of a Pad are read axis by axis",
        "shape = Constant <value = int64[2] {-1, 2}> () pairs = Reshape (amounts, shape) "
        f"turned = Transpose <perm = [1, 0]> (pairs) {_FLAT}",
    ),
)


def _halves(given: Attributes) -> tuple[list[int], list[int]]:
    """Padding of every axis at its beginning, and at its end."""
    pads = list(given.get("pads", ()))
    return pads[: len(pads) // 2], pads[len(pads) // 2 :]


def _zeroed(node: onnx.NodeProto) -> str | None:
    """A maximum over windows in which padded cells are 0, as a function body.

    A window holds padded cells where the average of ones, padded with zeros, is below 1.
    """
    given = surgery.attributes(node)
    padded = given.get("auto_pad") in _SAME or any(given.get("pads", ()))
    if not padded or len(node.output) > 1 or any(d > 1 for d in given.get("dilations", ())):
        return None
    average = surgery.options(node, dilations=None, storage_order=None, count_include_pad=1)
    return (
        f"(x) => (y) {{ plain = MaxPool {surgery.options(node)} (x) size = Shape (x) "
        "one = Constant <value = float {1}> () ones = Expand (one, size) "
        f"inside = AveragePool {average} (ones) "
        "most = Constant <value = float {0.9999}> () edge = Less (inside, most) "
        f"{surgery.number('zero', 0)} clipped = Max (plain, zero) "
        "y = Where (edge, clipped, plain) }"
    )


def _rounded_down(node: onnx.NodeProto) -> str | None:
    """A maximum with SAME padding for ⌊input / stride⌋ windows instead of ⌈input / stride⌉.

    As a function body; less padding than none cuts cells off.
    """
    given = surgery.attributes(node)
    kernel = given["kernel_shape"]
    strides = given.get("strides", [1] * len(kernel))
    if given.get("auto_pad") not in _SAME or len(node.output) > 1 or max(strides) == 1:
        return None
    dilations = given.get("dilations", [1] * len(kernel))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    begin, end = ("more", "less") if given["auto_pad"] == "SAME_LOWER" else ("less", "more")
    return (
        "(x) => (y) { shape = Shape (x) "
        f"{_integers('first', [2])} {_integers('last', [2 + len(kernel)])} "
        f"size = Slice (shape, first, last) {_integers('stride', strides)} "
        f"{_integers('one', [1])} {_integers('reach', reach)} count = Div (size, stride) "
        "steps = Sub (count, one) between = Mul (steps, stride) covered = Add (between, reach) "
        # Integer division truncates, and this half is rounded down below zero too.
        f"total = Sub (covered, size) {_integers('large', [1 << 20])} "
        f"{_integers('half', [1 << 19])} positive = Add (total, large) "
        "double = Div (positive, first) less = Sub (double, half) more = Sub (total, less) "
        f"{_integers('none', [0, 0])} "
        f"amounts = Concat <axis = 0> (none, {begin}, none, {end}) "
        f"{surgery.number('lowest', _LOWEST)} padded = Pad (x, amounts, lowest) "
        f"y = MaxPool {surgery.options(node, auto_pad=None, ceil_mode=None)} (padded) }}"
    )


def _stored_zeros(node: onnx.NodeProto, layout: QuantisedLayout) -> str | None:
    """Padding of a quantised tensor by what the integer 0 stands for, which is not the number 0."""
    begin, end = _halves(surgery.attributes(node))
    grid = layout.grid(node.input[0]) if any(begin + end) else None
    if grid is None or grid.zero is None or not grid.zero:
        return None
    names = ", ".join(("x", "w", "b")[: len(node.input)])
    value = -float(grid.scale) * int(grid.zero)
    return (
        f"({names}) => (y) {{ {_integers('amounts', [0, 0, *begin, 0, 0, *end])} "
        f"value = Constant <value = float {{{value!r}}}> () "
        "padded = Pad (x, amounts, value) "
        f"y = {node.op_type} {surgery.options(node, pads=None)} "
        f"({names.replace('x', 'padded')}) }}"
    )


def _integers(name: str, values: list[int]) -> str:
    listed = ", ".join(map(str, values))
    return f"{name} = Constant <value = int64[{len(values)}] {{{listed}}}> ()"


def _given(node: onnx.NodeProto, known: Mapping[str, Array]) -> Attributes:
    """A node's attributes, and what a Pad is filled with where that is a constant input."""
    given = surgery.attributes(node)
    if node.op_type == "Pad" and len(node.input) > _VALUE and node.input[_VALUE] in known:
        given["value"] = known[node.input[_VALUE]].tolist()
    return given


def _set(model: onnx.ModelProto, changes: Mapping[int, Attributes]) -> onnx.ModelProto:
    """A copy with other attributes at these positions."""
    result = surgery.copied(model)
    for index, values in changes.items():
        node = result.graph.node[index]
        if "value" in values and len(node.input) > _VALUE:
            node.input[_VALUE] = ""
        surgery.set_attributes(node, **values)
    return result


def _pad(node: onnx.NodeProto, amounts: str) -> str:
    """A Pad by other amounts, as a function body."""
    names = ("x", "amounts", "value", "axes")[: len(node.input)]
    passed = ", ".join(("x", "other", *names[2:]))
    call = f"Pad {surgery.options(node)} ({passed})"
    return f"({', '.join(names)}) => (y) {{ {amounts} y = {call} }}"


def _emptied(model: onnx.ModelProto, changed: onnx.ModelProto) -> bool:
    """Whether no window fits any more: kernels crash on tensors without elements."""
    before = surgery.shapes(model)
    return any(
        0 in shape and 0 not in before.get(name, ())
        for name, shape in surgery.shapes(changed).items()
    )


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with its convolutions and poolings padded in each of the other ways."""
    model = segment.model
    found = list(surgery.find(model, (*_ANY, "Pad")))
    if not found:
        return
    modern = surgery.opset(model) >= _AMOUNTS
    pools = [(i, node) for i, node in found if node.op_type == "MaxPool"]
    if modern:
        yield from rewritten(model, "SAME padding for a size rounded down", pools, _rounded_down)
        quantised = [(i, node) for i, node in found if node.op_type in ("AveragePool", "Conv")]
        zeros = partial(_stored_zeros, layout=QuantisedLayout(model, segment.weights))
        yield from rewritten(model, _STORED, quantised, zeros)
    known = surgery.constants(model)
    nodes = [(i, node, _given(node, known)) for i, node in found]
    for name, operators, form in _FORMS:
        changes = {
            i: values
            for i, node, given in nodes
            if node.op_type in operators and (values := form(given)) is not None
        }
        if changes and not _emptied(model, changed := _set(model, changes)):
            yield Variant(name, changed)
    pads = [(i, node) for i, node in found if node.op_type == "Pad"]
    for name, amounts in _PADS if modern else ():
        yield from rewritten(model, name, pads, partial(_pad, amounts=amounts))
    yield from rewritten(model, "padded cells are 0 in a maximum", pools, _zeroed)


_COMMON = (
    "export explicit pads instead of auto_pad, and asymmetric ones as a Pad before the "
    "listed layers"
)
NOISE = Cause(
    id="inference.padding",
    type="operator implementation",
    title="Padding is put at the other end, dropped, or counts as something else",
    cause=(
        "Odd SAME padding goes to the end in TensorFlow and to the beginning elsewhere; "
        "converters drop auto_pad, make asymmetric padding symmetric, or count padded cells in a "
        "maximum or an average."
    ),
    applies=(
        "convolutions and poolings with padding, explicit or automatic, and Pad; some forms "
        "from operator set 11 on"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), sec. 3.2, operator implementation; ONNX operators "
        "Conv-11, ConvTranspose-11, MaxPool-12 and AveragePool-19 (auto_pad, pads, "
        "count_include_pad)"
    ),
    advice=_COMMON,
    remedies={
        "tvm": f"{_COMMON}: TVM's importer rounds the size of a SAME_LOWER MaxPool down",
    },
    convention=True,
    forms=(
        "SAME padding for a size rounded down",
        *(name for name, _, _ in _FORMS),
        *(name for name, _ in _PADS),
        _STORED,
        "padded cells are 0 in a maximum",
    ),
    variants=_variants,
)
