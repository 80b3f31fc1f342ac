"""NaN and infinity treated as numbers: a comparison drops a NaN, a clamp turns it into a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.graphs.surgery import number
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import Array, SegmentGraph, Variant

# Operators made of comparisons or clamps, with what a NaN must be to lose each of them.
_LOSES = {
    **dict.fromkeys(("Relu", "Clip", "Max", "ReduceMax", "ArgMax"), -math.inf),
    **dict.fromkeys(("MaxPool", "GlobalMaxPool", "QuantizeLinear"), -math.inf),
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "Tanh", "Erf", "Exp", "Softplus"), -math.inf),
    **dict.fromkeys(("Elu", "Selu", "Celu", "PRelu", "LeakyRelu", "HardSwish"), -math.inf),
    **dict.fromkeys(("Min", "ReduceMin", "ArgMin"), math.inf),
}
_ZEROED = (
    *("Sign", "Round", "Floor", "Ceil", "Cast", "ReduceSum", "ReduceMean", "CumSum"),
    *("Elu", "Selu", "Celu"),
)
# Operators in which the reference itself drops a NaN, as its kernels happen to compare.
_DROPPING = ("ReduceMax", "ReduceMin", "MaxPool", "GlobalMaxPool", "ThresholdedRelu")
_MASKED = ("Relu", "ThresholdedRelu", "Shrink", "Where")
_RANKED = ("ArgMax", "ArgMin")
_REDUCED = ("ReduceMax", "ReduceMin", "GlobalMaxPool")
# Of two operands a machine's instruction gives one and the same where either is NaN.
_OF_TWO = ("Max", "Min")
# Operators whose results are infinite or undefined for extreme operands.
_EXTREME = (
    *("Cast", "Exp", "Div", "Reciprocal", "Log", "Pow", "Sqrt", "Softmax", "LogSoftmax"),
    *("Gelu", "HardSwish", "Softsign", "Mish", "Swish", "Erf", "ReduceLogSumExp"),
    *("ReduceMax", "ReduceMin"),
)
_SEARCHED = "a search for the largest begins at the lowest finite number"
_EXPONENTIAL = "in a softmax, the exponential of NaN is infinite"
_OPEN = "infinity passes a Clip without a limit on its side"
# First operator sets with IsInf and CumSum.
_ISINF, _CUMSUM = 10, 11
_SOFTMAX = 13  # along one axis from here on

_HIGHEST = float(np.finfo(np.float32).max)
# IsInf takes no float16 before operator set 20.
_FINITE = f"""(x) => (y) {{
    wide = Cast <to = 1> (x) infinite = IsInf(wide) s = Sign(x) {number("k", _HIGHEST)}
    limit = Mul(s, k) y = Where(infinite, limit, x) }}"""


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with NaN or infinity replaced where kernels are known to do so."""
    model, version = segment.model, surgery.opset(segment.model)
    losing = {i: _LOSES[n.op_type] for i, n in surgery.find(model, _LOSES)}
    if losing:
        yield Variant("NaN loses every comparison", _read_as(model, losing))
        winning = {i: -value for i, value in losing.items()}
        yield Variant("NaN wins every comparison", _read_as(model, winning))
    if zeroed := {i: 0.0 for i, _ in surgery.find(model, _ZEROED)}:
        yield Variant("NaN is read as zero", _read_as(model, zeroed))
    begun_again = _begun_again(surgery.constants(model))
    for name, op_types, body in (
        ("NaN is passed on", _DROPPING, _passed_on),
        ("a choice is a product with a mask", _MASKED, _masked),
        ("a comparison with NaN takes the later value", (*_RANKED, *_OF_TWO), _later),
        ("a comparison with NaN takes the later value", _REDUCED, begun_again),
        (_SEARCHED, ("MaxPool", *_REDUCED), _searched),
        ("a comparison with NaN takes the earlier value", _OF_TWO, _earlier),
    ):
        if version < _CUMSUM and body in (_later, begun_again):
            continue
        nodes = [(i, n) for i, n in surgery.find(model, op_types) if len(n.output) == 1]
        kinds = surgery.types(model) if nodes else {}
        yield from rewritten(model, name, [(i, n) for i, n in nodes if _is_real(n, kinds)], body)
    softmaxes = surgery.find(model, ("Softmax",)) if version >= _SOFTMAX else ()
    yield from rewritten(model, _EXPONENTIAL, softmaxes, partial(_exponentials, version=version))
    yield from rewritten(model, _OPEN, surgery.find(model, ("Clip",)), _one_sided)
    extreme = dict(surgery.find(model, _EXTREME))
    if extreme and version >= _ISINF:
        reads = {(i, p): _FINITE for i, n in extreme.items() for p in range(len(n.input))}
        yield Variant(
            "infinite operands become the largest finite number",
            surgery.passing(model, reads),
        )
        yield Variant(
            "infinite results become the largest finite number",
            surgery.passing(model, {}, dict.fromkeys(extreme, _FINITE)),
        )


def _is_real(node: onnx.NodeProto, kinds: Mapping[str, int]) -> bool:
    """Whether a node computes floats, by what it reads or else by what it writes."""
    read = node.input[1 if node.op_type == "Where" else 0]
    return kinds.get(read, kinds.get(node.output[0])) in surgery.FLOATS


def _one_sided(node: onnx.NodeProto) -> str | None:
    """A Clip without one of its limits, which are its type's largest and smallest numbers else."""
    given = [bool(name) for name in (*node.input, "", "")[1:3]]
    if node.attribute or given == [True, True] or len(node.input) < 2:
        return None
    names = [name for name, known in zip(("lo", "hi"), given, strict=True) if known]
    operator = {"lo": "Max", "hi": "Min"}[names[0]] if names else "Identity"
    return f"({', '.join(('x', *names))}) => (y) {{ y = {operator} ({', '.join(('x', *names))}) }}"


def _exponentials(node: onnx.NodeProto, version: int) -> str:
    """A softmax whose exponentials are clamped by comparisons: infinity less itself is NaN."""
    axes = [surgery.attributes(node).get("axis", -1)]
    return f"""(x) => (y) {{
        {surgery.reduction("m", "ReduceMax", "x", axes, version)} d = Sub(x, m) e = Exp(d)
        nan = IsNaN(d) {number("k", math.inf)}
        p = Where(nan, k, e) {surgery.reduction("s", "ReduceSum", "p", axes, version)}
        y = Div(p, s) }}"""


def _read_as(model: onnx.ModelProto, values: Mapping[int, float]) -> onnx.ModelProto:
    """The segment with NaN operands of these nodes replaced, and other operands kept."""
    reads: dict[tuple[int, int], str] = {}
    for index, value in values.items():
        body = f"(x) => (y) {{ nan = IsNaN(x) {number('k', value)} y = Where(nan, k, x) }}"
        for position in range(_operands(model.graph.node[index])):
            reads[index, position] = body
    return surgery.passing(model, reads)


def _operands(node: onnx.NodeProto) -> int:
    return len(node.input) if node.op_type in ("Max", "Min") else 1


def _passed_on(node: onnx.NodeProto) -> str:
    """An operator with the result NaN wherever it saw one."""
    same = f"{node.op_type} {surgery.options(node)}"
    if node.op_type == "ThresholdedRelu":
        return f"(x) => (y) {{ r = {same} (x) nan = IsNaN(x) y = Where(nan, x, r) }}"
    largest = "MaxPool" if node.op_type == "MaxPool" else "ReduceMax"
    axes = ", axes" if len(node.input) > 1 else ""
    return f"""(x{axes}) => (y) {{
        r = {same} (x{axes}) isnan = IsNaN(x) ones = Cast <to = 1> (isnan)
        any = {largest} {surgery.options(node)} (ones{axes}) seen = Cast <to = 9> (any)
        {number("nan", math.nan)} y = Where(seen, nan, r) }}"""


def _masked(node: onnx.NodeProto) -> str:
    """A choice as multiplication by 0 or 1."""
    if node.op_type == "Where":
        return """(c, a, b) => (y) {
            m = Cast <to = $T> (c) n = Not(c) o = Cast <to = $T> (n)
            p = Mul(m, a) q = Mul(o, b) y = Add(p, q) }"""
    if node.op_type == "Shrink":
        given = surgery.attributes(node)
        return f"""(x) => (y) {{
            {number("limit", given.get("lambd", 0.5))} {number("bias", given.get("bias", 0.0))}
            down = Neg(limit) u = Less(x, down) under = Cast <to = $T> (u)
            o = Greater(x, limit) over = Cast <to = $T> (o) up = Add(x, bias) less = Sub(x, bias)
            p = Mul(under, up) q = Mul(over, less) y = Add(p, q) }}"""
    alpha = surgery.attributes(node).get("alpha", 1.0) if node.op_type != "Relu" else 0.0
    return f"""(x) => (y) {{
        {number("k", alpha)} b = Greater(x, k) m = Cast <to = $T> (b) y = Mul(x, m) }}"""


def _later(node: onnx.NodeProto) -> str:
    """By ``best > new ? best : new``: nothing before the last NaN counts."""
    if node.op_type in _OF_TWO:
        return _folded(node, "{new}", "{best}")
    axis = surgery.attributes(node).get("axis", 0)
    worst, last = ("-inf", "-3.4e38") if node.op_type == "ArgMax" else ("inf", "3.4e38")
    return f"""(x) => (y) {{
        isnan = IsNaN(x) ones = Cast <to = 1> (isnan) axis = Constant <value = int64 {{{axis}}}> ()
        after = CumSum <exclusive = 1, reverse = 1> (ones, axis) passed = Cast <to = 9> (after)
        w = Constant <value = float {{{worst}}}> () l = Constant <value = float {{{last}}}> ()
        wide = Cast <to = 1> (x) some = Where(isnan, l, wide) seen = Where(passed, w, some)
        y = {node.op_type} {surgery.options(node)} (seen) }}"""


def _begun_again(
    constants: Mapping[str, Array],
) -> Callable[[onnx.NodeProto], str | None]:
    """The same of a reduction's values: where the last one is NaN, it is the result.

    Args:
        constants: among them the axes; where they are several, or unknown, there is no text.
    """

    def body(node: onnx.NodeProto) -> str | None:
        given = surgery.attributes(node)
        planes = node.op_type == "GlobalMaxPool"
        axes, read = [2] if planes else list(given.get("axes", [])), ""
        if len(node.input) > 1 and node.input[1]:
            axes, read = constants.get(node.input[1], np.array([])).tolist(), ", axes"
        if len(axes) != 1:
            return None
        shaped = "lead = Constant <value = int64[3] {0, 0, -1}> () v = Reshape(wide, lead)"
        worst = "inf" if node.op_type == "ReduceMin" else "-inf"
        return f"""(x{read}) => (y) {{
            wide = Cast <to = 1> (x) {shaped if planes else "v = Identity(wide)"}
            isnan = IsNaN(v) ones = Cast <to = 1> (isnan)
            at = Constant <value = int64 {{{axes[0]}}}> ()
            after = CumSum <exclusive = 1, reverse = 1> (ones, at) passed = Cast <to = 9> (after)
            out = Or(passed, isnan) w = Constant <value = float {{{worst}}}> ()
            some = Where(out, w, v) whole = Shape(x) seen = Reshape(some, whole)
            kept = Not(out) one = Cast <to = 1> (kept) marks = Reshape(one, whole)
            most = {node.op_type.replace("Min", "Max")} {surgery.options(node)} (marks{read})
            any = Cast <to = 9> (most) r = {node.op_type} {surgery.options(node)} (seen{read})
            n = Constant <value = float {{nan}}> () found = Where(any, r, n)
            y = Cast <to = $T> (found) }}"""

    return body


def _searched(node: onnx.NodeProto) -> str:
    """``if (x > best) best = x``, which no NaN and no infinity of the wrong sign ever is."""
    least = node.op_type == "ReduceMin"
    worst, limit = (math.inf, _HIGHEST) if least else (-math.inf, -_HIGHEST)
    read = ", axes" if len(node.input) > 1 else ""
    return f"""(x{read}) => (y) {{
        isnan = IsNaN(x) {number("none", worst)} some = Where(isnan, none, x)
        r = {node.op_type} {surgery.options(node)} (some{read}) {number("limit", limit)}
        y = {"Min" if least else "Max"} (r, limit) }}"""


def _earlier(node: onnx.NodeProto) -> str:
    """Max or Min by ``new > best ? new : best``: nothing behind the first NaN counts."""
    return _folded(node, "{best}", "{new}")


def _folded(node: onnx.NodeProto, otherwise: str, chosen: str) -> str:
    """Max or Min of one operand after another: ``chosen`` if it is further, else ``otherwise``."""
    further = "Greater" if node.op_type == "Max" else "Less"
    names = [f"a{i}" for i in range(len(node.input))]
    steps, best = [], names[0]
    for i, new in enumerate(names[1:]):
        this, other = (text.format(best=best, new=new) for text in (chosen, otherwise))
        steps.append(f"c{i} = {further}({this}, {other}) b{i} = Where(c{i}, {this}, {other})")
        best = f"b{i}"
    return f"({', '.join(names)}) => (y) {{ {' '.join(steps)} y = Identity({best}) }}"


NOISE = Cause(
    id="implementation.nonfinite",
    type="operator implementation",
    title="NaN or infinity is treated as a number",
    cause=(
        "Kernels that compare, clamp or select by machine instructions drop a NaN or turn it into "
        "a limit, and a product with a mask turns infinity into NaN; IEEE 754 lets both happen."
    ),
    applies=(
        "operators made of comparisons or clamps (Relu, Clip, Max, MaxPool, Where and "
        "others), and operators with infinite or undefined results; it shows only where a NaN"
        " or infinity is"
    ),
    source=(
        "IEEE 754-2019, sec. 6.2 and 9.6; Intel SDM vol. 2, MAXPS and MINPS (the second operand "
        "is returned for a NaN); ONNX operators Relu, Clip, Max, ThresholdedRelu"
    ),
    advice="guard the inputs of the listed layers (IsNaN, IsInf, Where)",
    remedies={
        "ov": (
            "guard the inputs of the listed layers (IsNaN, IsInf, Where): OpenVINO's CPU kernels "
            "clamp"
        ),
        "tvm": (
            "guard the inputs of the listed layers (IsNaN, IsInf, Where): TVM lowers them to "
            "compare-and-select"
        ),
        "trt": "build with BuilderFlag.STRICT_NANS, and guard the listed layers' inputs",
    },
    ablations={"tvm": {"fast-math": "false"}, "trt": {"strict-nans": "on"}},
    forms=(
        "NaN loses every comparison",
        "NaN wins every comparison",
        "NaN is read as zero",
        "NaN is passed on",
        "a choice is a product with a mask",
        "a comparison with NaN takes the later value",
        "a comparison with NaN takes the earlier value",
        _SEARCHED,
        _EXPONENTIAL,
        _OPEN,
        "infinite operands become the largest finite number",
        "infinite results become the largest finite number",
    ),
    variants=_variants,
)
