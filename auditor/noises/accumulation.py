"""Sums kept in half precision: they stall where digits run out and overflow beyond 65504."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays import kernel_layout
from auditor.replays.writer import FP16

# How a summand is made from a value, and the result from the sum.
_SUMS = {
    "ReduceSum": ("v = Identity(h)", "r = Identity(total)"),
    "ReduceMean": ("v = Identity(h)", "r = Div(total, count)"),
    "GlobalAveragePool": ("v = Identity(h)", "r = Div(total, count)"),
    "AveragePool": ("v = Identity(h)", "r = Div(total, count)"),
    "ReduceL1": ("v = Abs(h)", "r = Identity(total)"),
    "ReduceL2": ("v = Mul(h, h)", "r = Sqrt(total)"),
    "ReduceSumSquare": ("v = Mul(h, h)", "r = Identity(total)"),
    "ReduceLogSum": ("v = Identity(h)", "r = Log(total)"),
}
# What the sum was, given the exact result.
_UNDONE = {
    "r = Div(total, count)": "wide = Mul(like, count)",
    "r = Sqrt(total)": "wide = Mul(like, like)",
    "r = Log(total)": "wide = Exp(like)",
}
# ONNX Runtime computes neighbouring float16 operators in float32 and drops the conversions in
# between; it keeps the types of sequences.
_KEPT = (
    "{target}_first = Constant <value = int64 {{0}}> () {target}_held = SequenceConstruct({source})"
    " {target} = SequenceAt({target}_held, {target}_first)"
)
# Scan and Flatten take negative axes from here on.
_OPSET = 11
_NAMES = (
    "every partial sum in float16",
    "sums in float32, rounded to float16 before the last step",
    "every intermediate result in float16",
)


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with float16 sums, partial sums or intermediate results."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return
    types = surgery.types(model)
    stated = kernel_layout.stated(segment.kernels, FP16.stated)

    def narrow(name: str) -> bool:
        kind = types.get(name)
        return kind == TensorProto.FLOAT16 or (stated and kind == TensorProto.FLOAT)

    summing = {i: n for i, n in surgery.find(model, _SUMS) if narrow(n.input[0])}
    constants = surgery.constants(model) if summing else {}
    for name, body in zip(_NAMES, (_running, _total), strict=False):
        bodies = {i: b for i, n in summing.items() if (b := body(n, model, constants))}
        if bodies:
            yield Variant(name, surgery.substituted(model, bodies))
    halves = [
        i for i, n in enumerate(model.graph.node) if types.get(n.output[0]) == TensorProto.FLOAT16
    ]
    if len(halves) > 1:
        kept = f"(x) => (y) {{ {_KEPT.format(source='x', target='y')} }}"
        yield Variant(
            _NAMES[-1],
            surgery.passing(model, {}, dict.fromkeys(halves, kept)),
        )


def _running(
    node: onnx.NodeProto, model: onnx.ModelProto, constants: dict[str, Array]
) -> str | None:
    """One value after another, each partial sum rounded; None where the axes are not known."""
    values = _arranged(node, surgery.opset(model), constants)
    if values is None:
        return None
    summand, result = _SUMS[node.op_type]
    axes = ", axes" if len(node.input) > 1 else ""
    return f"""(x{axes}) => (y) {{
        like = {node.op_type} {surgery.options(node)} (x{axes}) shape = Shape(like)
        {values}
        h = Cast <to = 10> (values) {summand}
        first = Constant <value = int64 {{0}}> () one = Gather <axis = 1> (v, first)
        size = Shape(one) none = ConstantOfShape(size) zero = Cast <to = 10> (none)
        half = Scan <num_scan_inputs = 1, scan_input_axes = [1], body = add
            (float16[a, b] partial, float16[a, b] value) => (float16[a, b] next)
            {{ next = Add(partial, value) }}>
            (zero, v)
        flat = Cast <to = 1> (half) total = Reshape(flat, shape)
        {result} rounded = Cast <to = 10> (r) y = Cast <to = $T> (rounded) }}"""


def _total(node: onnx.NodeProto, model: onnx.ModelProto, constants: dict[str, Array]) -> str | None:
    """Only the whole sum is rounded, before it is divided or its root is taken."""
    result = _SUMS[node.op_type][1]
    values = _arranged(node, surgery.opset(model), constants)
    if result not in _UNDONE or values is None:
        return None
    axes = ", axes" if len(node.input) > 1 else ""
    return f"""(x{axes}) => (y) {{
        f = Cast <to = 1> (x) like = {node.op_type} {surgery.options(node)} (f{axes})
        shape = Shape(like)
        {values}
        {_UNDONE[result]} half = Cast <to = 10> (wide)
        {_KEPT.format(source="half", target="kept")} total = Cast <to = 1> (kept)
        {result} y = Cast <to = $T> (r) }}"""


def _arranged(node: onnx.NodeProto, version: int, constants: dict[str, Array]) -> str | None:
    """Text that computes ``values``, shaped [sums, summands, sums], and their ``count`` per sum."""
    given = surgery.attributes(node)
    if node.op_type == "AveragePool":
        return None if given.get("ceil_mode") else _patches(node, version)
    counted = "all = Size(x) sums = Size(like) n = Div(all, sums) count = Cast <to = 1> (n)"
    rows = "rows = Constant <value = int64[3] {0, -1, 1}> () values = Reshape(flat_x, rows)"
    if node.op_type == "GlobalAveragePool":
        lead = "lead = Constant <value = int64[3] {0, 0, -1}> () planes = Reshape(x, lead)"
        return f"{counted} {lead} flat_x = Flatten <axis = 2> (planes) {rows}"
    axes = given.get("axes")
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in constants:
            return None
        axes = constants[node.input[1]].tolist()
    if not axes:
        ignored = given.get("noop_with_empty_axes")
        return None if ignored else f"{counted} flat_x = Flatten <axis = 0> (x) {rows}"
    if sorted(axes) in (list(range(-len(axes), 0)), [2, 3]):  # the last ones, or those of images
        return f"{counted} flat_x = Flatten <axis = {min(axes)}> (x) {rows}"
    if sorted(axes) == list(range(min(axes), max(axes) + 1)):  # neighbours, such as 1 and 2 of NHWC
        listed = f"int64[{len(axes)}] {{{str(sorted(axes))[1:-1]}}}"
        return f"""{counted} flat_x = Flatten <axis = {min(axes)}> (x) whole = Shape(x)
            summed = Constant <value = {listed}> () sizes = Gather(whole, summed)
            size_n = ReduceProd(sizes)
            before = Constant <value = int64[1] {{0}}> ()
            after = Constant <value = int64[1] {{-1}}> ()
            blocks = Concat <axis = 0> (before, size_n, after) values = Reshape(flat_x, blocks)"""
    return None


def _patches(node: onnx.NodeProto, version: int) -> str:
    """Every pooling window's values along axis 1, by a convolution that picks each in turn."""
    given = surgery.attributes(node)
    size = given["kernel_shape"]
    taps = prod(size)
    options = surgery.options(node, ceil_mode=None, count_include_pad=None)
    inside = "ones = ConstantOfShape <value = float[1] {1.0}> (planar)"
    counted = (
        f"count = Constant <value = float {{{float(taps)}}}> ()"
        if given.get("count_include_pad")
        else f"""valid = Conv {options} (ones, pick)
        {surgery.reduction("number", "ReduceSum", "valid", [1], version)}
        count = Reshape(number, shape)"""
    )
    return f"""
        whole = Shape(x) two = Constant <value = int64[1] {{2}}> ()
        end = Constant <value = int64[1] {{{2 + len(size)}}}> () space = Slice(whole, two, end)
        lead = Constant <value = int64[2] {{-1, 1}}> ()
        planar_shape = Concat <axis = 0> (lead, space)
        wide_x = Cast <to = 1> (x) plane = Reshape(wide_x, planar_shape) planar = Shape(plane)
        square = Constant <value = int64[2] {{{taps}, {taps}}}> () blank = ConstantOfShape(square)
        eye = EyeLike(blank)
        filters = Constant <value = int64[{2 + len(size)}] {{{taps}, 1, {str(size)[1:-1]}}}> ()
        pick = Reshape(eye, filters) taken = Conv {options} (plane, pick)
        rows = Constant <value = int64[3] {{0, 0, -1}}> () values = Reshape(taken, rows)
        {inside} {counted}"""


_CAST = "cast the listed operators' inputs to float32 and their outputs back in the model"
NOISE = Cause(
    id="implementation.accumulation",
    type="data precision",
    title="Sums and means are accumulated in float16",
    cause=(
        "A float16 tensor says nothing of the type its sums are kept in: some kernels add up in "
        "float32 and round once, others round every partial sum."
    ),
    applies=(
        "sums, means and average poolings of float16 tensors, or of float32 ones where the "
        "engine reports half precision; operator set 11 or later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision, and sec. 3.2, operator "
        "implementation; IEEE 754-2019, binary16; Higham, Accuracy and Stability of Numerical "
        "Algorithms, ch. 4"
    ),
    advice=_CAST,
    remedies={
        "ov": f"set INFERENCE_PRECISION_HINT to f32, or {_CAST}",
        "tvm": f"{_CAST}; with ToMixedPrecision set out_dtype to float32",
    },
    ablations={"ov": {"INFERENCE_PRECISION_HINT": "f32"}, "tvm": {"fast-math": "false"}},
    forms=_NAMES,
    variants=_variants,
)
