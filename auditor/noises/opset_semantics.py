"""An operator computed by another version of its definition than the model's operator set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import onnx

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import SegmentGraph, Variant

_SOFTMAXES = ("Softmax", "LogSoftmax", "Hardmax")
_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "ArgMax", "ArgMin"),
)
# Reductions that change their input also where they reduce nothing.
_ELEMENTWISE = ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceSumSquare")
_IDLE = "a reduction over no axes gives its input as it is"
_SIGNED = frozenset((onnx.TensorProto.INT32, onnx.TensorProto.INT64))
_PER_AXIS = 13  # softmaxes work along one axis from here on; before, on two dimensions
_ALONG = "softmax along its axis alone, as from opset 13"
_LAST = "softmax along the last axis, opset 13's default"
_BEHIND = "softmax over its axis and all behind, as before opset 13"
_FROM_ONE = "softmax over all axes from 1, opset 12's default"
_ONE_SAMPLE = "RoiAlign: one sample in each bin, not as many as the region is large"
_LARGEST = "RoiAlign: the largest interpolated sample, not corner value"
_FROM_ZERO = "NonMaxSuppression: scores below zero are left out where no threshold is given"
_LARGEST_EARLY = f"{_LARGEST}, half a pixel taken off before scaling"
_OTHER_SETS = "RoiAlign: coordinates of the other operator sets"
_BEFORE_SCALING = "RoiAlign: half a pixel is taken off before scaling"
_DOWN = "integers are divided by rounding down, not toward zero"
_KEPT = "DFT of real numbers to one side keeps their last axis"
_OF_DFT = ("x", "size", "axis")
_INNER = "DFT: a negative axis is counted without the last one"
_EXCHANGED = "MaxPool with storage_order 1: indices counted by rows, and then transposed"
_MODE = "coordinate_transformation_mode"
_HALF_PIXEL = 16  # RoiAlign shifts its coordinates by half a pixel from here on


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with operators read as other versions define them."""
    yield from _softmaxes(segment.model)
    yield from _reductions(segment.model)
    yield from _shapes(segment.model)
    yield from _regions(segment.model)
    yield from _divisions(segment.model)
    yield from _transforms(segment.model)
    for name, operator, body in (
        (_EXCHANGED, "MaxPool", _by_rows),
        (_FROM_ZERO, "NonMaxSuppression", _from_zero),
    ):
        yield from rewritten(segment.model, name, surgery.find(segment.model, (operator,)), body)


def _softmaxes(model: onnx.ModelProto) -> Iterable[Variant]:
    found = dict(surgery.find(model, _SOFTMAXES))
    if not found:
        return
    version = surgery.opset(model)
    if version < _PER_AXIS:

        def axis_of(node: onnx.NodeProto) -> int:
            return int(surgery.attributes(node).get("axis", 1))

        default = [(i, n) for i, n in found.items() if axis_of(n) == 1]
        along = partial(_along, version=version)
        yield from rewritten(model, _ALONG, found.items(), lambda n: along(n, axis_of(n)))
        yield from rewritten(model, _LAST, default, partial(along, axis=-1))
        return
    flattens = {o: n for _, n in surgery.find(model, ("Flatten",)) for o in n.output}
    reshaped = {n.input[0] for _, n in surgery.find(model, ("Reshape",))}
    # What a version converter makes of an older softmax: Flatten, Softmax, Reshape.
    converted = {
        i: flattens[n.input[0]]
        for i, n in found.items()
        if n.input[0] in flattens and n.output[0] in reshaped
    }
    axes = {i: surgery.attributes(n).get("axis", 1) for i, n in converted.items()}
    if converted:
        yield Variant(_ALONG, _rejoined(model, converted, axes))
    if last := {i: -1 for i, axis in axes.items() if axis == 1}:
        yield Variant(_LAST, _rejoined(model, converted, last))
    stated = {
        i: axis for i, n in found.items() if (axis := surgery.attributes(n).get("axis", -1)) != -1
    }
    if stated:
        changed = surgery.copied(model)
        for index in stated:
            surgery.set_attributes(changed.graph.node[index], axis=-1)
        yield Variant(_LAST, changed)
        bodies = {i: _flattened(found[i], axis) for i, axis in stated.items()}
        yield Variant(_BEHIND, surgery.substituted(model, bodies))
    plain = [(i, n) for i, n in found.items() if not n.attribute]
    yield from rewritten(model, _FROM_ONE, plain, partial(_flattened, axis=1))


def _rejoined(
    model: onnx.ModelProto, flattens: Mapping[int, onnx.NodeProto], axes: Mapping[int, int]
) -> onnx.ModelProto:
    """The segment with softmaxes of flattened tensors along one axis of the tensors themselves."""
    changed = surgery.copied(model)
    for index, axis in axes.items():
        node = changed.graph.node[index]
        node.input[0] = flattens[index].input[0]
        surgery.set_attributes(node, axis=axis)
    return changed


def _along(node: onnx.NodeProto, axis: int, version: int) -> str:
    """A softmax along one axis, out of older operators."""
    if node.op_type == "Hardmax":
        return f"""(x) => (y) {{
            largest = ArgMax <axis = {axis}, keepdims = 0> (x) shape = Shape(x)
            at = Constant <value = int64 {{{axis}}}> () axes = Size(shape) zero = Sub(at, at)
            below = Less(at, zero) wrapped = Add(at, axes) which = Where(below, wrapped, at)
            depth = Gather(shape, which) pair = Constant <value = float[2] {{0, 1}}> ()
            hot = OneHot <axis = {axis}> (largest, depth, pair) y = Cast <to = $T> (hot) }}"""
    last = "l = Log(sum) y = Sub(d, l)" if node.op_type == "LogSoftmax" else "y = Div(e, sum)"
    return f"""(x) => (y) {{
        {surgery.reduction("top", "ReduceMax", "x", [axis], version)}
        d = Sub(x, top) e = Exp(d)
        {surgery.reduction("sum", "ReduceSum", "e", [axis], version)}
        {last} }}"""


def _flattened(node: onnx.NodeProto, axis: int) -> str:
    """A softmax over a matrix, everything from its axis on in one row."""
    return f"""(x) => (y) {{
        shape = Shape(x) rows = Flatten <axis = {axis}> (x)
        soft = {node.op_type} <axis = -1> (rows) y = Reshape(soft, shape) }}"""


def _reductions(model: onnx.ModelProto) -> Iterable[Variant]:
    found = list(surgery.find(model, _REDUCTIONS))
    if not found:
        return
    kinds = dict.fromkeys(n.op_type for _, n in found)
    for name, change in _CHANGES.items():
        yield from _changed(model, name, change, kinds)
        for kind in kinds if len(kinds) > 1 else ():
            yield from _changed(model, f"{name}, {kind} alone", change, (kind,))
    constants = surgery.constants(model)
    idle = {
        i: f"({', '.join(('x', 'axes')[: len(n.input)])}) => (y) {{ y = Identity(x) }}"
        for i, n in found
        if n.op_type in _ELEMENTWISE
        and surgery.attributes(n).get("noop_with_empty_axes", 0) == 1
        and (len(n.input) == 1 or (n.input[1] in constants and not constants[n.input[1]].size))
    }
    if idle:
        yield Variant(_IDLE, surgery.substituted(model, idle))


def _changed(
    model: onnx.ModelProto,
    name: str,
    change: Callable[[onnx.NodeProto], bool],
    kinds: Iterable[str],
) -> Iterable[Variant]:
    """The segment with a change to the operators of these types, if there is one."""
    changed = surgery.copied(model)
    if any([change(node) for _, node in surgery.find(changed, kinds)]):
        yield Variant(name, changed)


def _without_axes(node: onnx.NodeProto) -> bool:
    given = surgery.attributes(node)
    if not (given.get("axes") or (len(node.input) > 1 and node.input[1])):
        return False
    del node.input[1:]
    surgery.set_attributes(node, axes=None, noop_with_empty_axes=None)
    return True


def _with_dims(node: onnx.NodeProto) -> bool:
    changed = bool(surgery.attributes(node).get("keepdims", 1) == 0)
    surgery.set_attributes(node, keepdims=None)
    return changed


def _with_work(node: onnx.NodeProto) -> bool:
    changed = bool(surgery.attributes(node).get("noop_with_empty_axes", 0) == 1)
    surgery.set_attributes(node, noop_with_empty_axes=None)
    return changed


def _shapes(model: onnx.ModelProto) -> Iterable[Variant]:
    """Squeeze without its axes."""
    squeezed = surgery.copied(model)
    changed = False
    for index, node in surgery.find(model, ("Squeeze",)):
        given = len(node.input) > 1 or "axes" in surgery.attributes(node)
        if given:
            del squeezed.graph.node[index].input[1:]
            surgery.set_attributes(squeezed.graph.node[index], axes=None)
            changed = True
    if changed:
        yield Variant("axes of Squeeze ignored: every dimension of one removed", squeezed)


def _transforms(model: onnx.ModelProto) -> Iterable[Variant]:
    found = {i: surgery.attributes(n) for i, n in surgery.find(model, ("DFT",))}
    nodes = model.graph.node
    if behind := [i for i, given in found.items() if given.get("axis", 0) < 0]:
        changed = surgery.copied(model)
        for index in behind:
            surgery.set_attributes(changed.graph.node[index], axis=found[index]["axis"] - 1)
        yield Variant(_INNER, changed)
    halves = [(i, nodes[i]) for i, given in found.items() if given.get("onesided")]
    yield from rewritten(model, _KEPT, halves, _kept_axis)


def _kept_axis(node: onnx.NodeProto) -> str:
    """A DFT whose result has one axis more."""
    names = [n for n, given in zip(_OF_DFT, node.input, strict=False) if given]
    called = ", ".join(n if n in names else "" for n in _OF_DFT)
    return (
        f"({', '.join(names)}) => (y) {{ r = DFT {surgery.options(node)} ({called.rstrip(', ')}) "
        "at = Constant <value = int64[1] {-2}> () y = Unsqueeze(r, at) }"
    )


def _by_rows(node: onnx.NodeProto) -> str | None:
    """A MaxPool with indices by columns that turns those by rows."""
    given = surgery.attributes(node)
    if not given.get("storage_order") or len(node.output) < 2 or len(given["kernel_shape"]) != 2:
        return None
    return (
        f"(x) => (y, i) {{ y, j = MaxPool {surgery.options(node, storage_order=0)} (x) "
        "i = Transpose <perm = [0, 1, 3, 2]> (j) }"
    )


def _from_zero(node: onnx.NodeProto) -> str | None:
    """A NonMaxSuppression without a threshold of scores that gets one."""
    if len(node.input) != 4 or not all(node.input):
        return None
    return (
        "(boxes, scores, most, limit) => (y) { least = Constant <value = float {0}> () "
        f"y = NonMaxSuppression {surgery.options(node)} (boxes, scores, most, limit, least) }}"
    )


def _divisions(model: onnx.ModelProto) -> Iterable[Variant]:
    found = dict(surgery.find(model, ("Div",)))
    kinds = surgery.types(model) if found else {}
    floored = """(a, b) => (y) { q = Div(a, b) p = Mul(q, b) r = Sub(a, p) zero = Sub(a, a)
        left = Less(r, zero) down = Less(b, zero) apart = Xor(left, down) even = Equal(r, zero)
        uneven = Not(even) below = And(apart, uneven) one = Cast <to = $T> (below)
        y = Sub(q, one) }"""
    signed = [(i, n) for i, n in found.items() if kinds.get(n.output[0]) in _SIGNED]
    yield from rewritten(model, _DOWN, signed, lambda _: floored)


def _regions(model: onnx.ModelProto) -> Iterable[Variant]:
    found = list(surgery.find(model, ("RoiAlign",)))
    version = surgery.opset(model)
    if adaptive := [i for i, n in found if not surgery.attributes(n).get("sampling_ratio")]:
        changed = surgery.copied(model)
        for index in adaptive:
            surgery.set_attributes(changed.graph.node[index], sampling_ratio=1)
        yield Variant(_ONE_SAMPLE, changed)
    early = [(i, n) for i, n in found if _early(n, version)]
    for name, nodes, body in (
        (_LARGEST, found, _largest_sample),
        (f"{_LARGEST}, or zero", found, partial(_largest_sample, positive=True)),
        (_LARGEST_EARLY, found if early else [], lambda n: _largest_sample(n, _early(n, version))),
        (_BEFORE_SCALING, early, lambda n: _moved(n, _early(n, version))),
        (_OTHER_SETS, found, partial(_older, version=version)),
    ):
        yield from rewritten(model, name, nodes, body)


def _older(node: onnx.NodeProto, version: int) -> str | None:
    """A RoiAlign with the coordinates of the other operator sets."""
    given = surgery.attributes(node)
    if version < _HALF_PIXEL:
        return _moved(node, -0.5 / given.get("spatial_scale", 1.0))
    if given.get(_MODE, "half_pixel") != "half_pixel":
        return None
    older = surgery.options(node, **{_MODE: "output_half_pixel"})
    return f"(x, rois, batch) => (y) {{ y = RoiAlign {older} (x, rois, batch) }}"


def _early(node: onnx.NodeProto, version: int) -> float:
    """How far regions are off that are moved by half a pixel before they are scaled."""
    given = surgery.attributes(node)
    scaled = version >= _HALF_PIXEL and given.get(_MODE, "half_pixel") == "half_pixel"
    return 0.5 / given.get("spatial_scale", 1.0) - 0.5 if scaled else 0.0


def _moved(node: onnx.NodeProto, by: float) -> str:
    """A RoiAlign of regions that are elsewhere."""
    return f"""(x, rois, batch) => (y) {{
        {_elsewhere(by)} y = RoiAlign {surgery.options(node)} (x, moved, batch) }}"""


def _elsewhere(by: float) -> str:
    return f"{surgery.number('by', by)} moved = Add(rois, by)"


def _largest_sample(node: onnx.NodeProto, by: float = 0.0, positive: bool = False) -> str | None:
    """The maximum of interpolated values; ONNX Runtime takes that of weighted corner values.

    Args:
        node: the RoiAlign.
        by: how far regions are moved.
        positive: whether it is looked for from zero on.
    """
    given = surgery.attributes(node)
    ratio = given.get("sampling_ratio", 0)
    if given.get("mode", "avg") != "max" or ratio < 1:
        return None
    finer = surgery.options(
        node,
        mode="avg",
        sampling_ratio=1,
        output_height=given.get("output_height", 1) * ratio,
        output_width=given.get("output_width", 1) * ratio,
    )
    window = [ratio, ratio]
    return f"""(x, rois, batch) => (y) {{
        {_elsewhere(by)} samples = RoiAlign {finer} (x, moved, batch)
        largest = MaxPool <kernel_shape = {window}, strides = {window}> (samples)
        y = {"Relu" if positive else "Identity"} (largest) }}"""


# What is done to reductions, by its name.
_CHANGES: dict[str, Callable[[onnx.NodeProto], bool]] = {
    "axes ignored: reduced over all of them": _without_axes,
    "keepdims at its default": _with_dims,
    "noop_with_empty_axes ignored": _with_work,
}
NOISE = Cause(
    id="implementation.opset_semantics",
    type="operator implementation",
    title="An operator follows another version or reading of its definition",
    cause=(
        "Operators change their meaning between operator sets (softmax axis, axes as attribute or "
        "as input), and importers that know one version apply it to all."
    ),
    applies=(
        "Softmax, LogSoftmax and Hardmax, reductions, ArgMax and ArgMin, Squeeze, RoiAlign, Div of "
        "signed integers, DFT, MaxPool with storage_order, and NonMaxSuppression without a "
        "threshold of scores"
    ),
    source=(
        "ONNX operator changelog: Softmax-11 and -13, ReduceSum-11 and -13, ReduceL1-13 and -18, "
        "Squeeze-11 and -13, RoiAlign-10 and -16, Div-14 (truncates); "
        "openvino#37826 (sampling_ratio's default)"
    ),
    advice=(
        "write axis, axes, keepdims and sampling_ratio explicitly; where the model is older, "
        "export at operator set 13 or later for softmaxes, 18 or later for reductions"
    ),
    convention=True,
    forms=(
        _ALONG,
        _LAST,
        _BEHIND,
        _FROM_ONE,
        *(f"{change}{which}" for change in _CHANGES for which in ("", ", OPERATOR alone")),
        _IDLE,
        "axes of Squeeze ignored: every dimension of one removed",
        _ONE_SAMPLE,
        _LARGEST,
        f"{_LARGEST}, or zero",
        _LARGEST_EARLY,
        _BEFORE_SCALING,
        _OTHER_SETS,
        _DOWN,
        _INNER,
        _KEPT,
        _EXCHANGED,
        _FROM_ZERO,
    ),
    variants=_variants,
)
