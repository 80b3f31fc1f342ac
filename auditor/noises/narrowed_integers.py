"""Integers computed with fewer bits than they have: in int32, or in float32."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import SegmentGraph, Variant
from auditor.replays import linear
from auditor.replays.layout import Layout

# What int32 does not hold.
_WIDE = frozenset((TensorProto.INT64, TensorProto.UINT64, TensorProto.UINT32))
_INTEGERS = _WIDE | {TensorProto.INT32}
_REAL = frozenset((TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16))
_BINARY = ("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Min", "Max", "Sum", "BitShift")
_BITWISE = ("BitwiseAnd", "BitwiseOr", "BitwiseXor")
_COMPARING = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_SUMMING = ("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceMean", "CumSum", "MatMul")
_UNARY = ("Neg", "Abs", "Sign", "Clip", "TopK", "ArgMax", "ArgMin", "Cast", "BitwiseNot")
# Operators that hand on what they are given.
_MOVES = ("Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Flatten")
_ALL, _FIRST = range(2**31), range(1)
# Which of their inputs are numbers rather than shapes, axes or indices; the ends of a Slice, which
# mean "all" where they are large, are numbers if they are computed.
_NUMBERS: dict[str, Sequence[int]] = (
    dict.fromkeys((*_BINARY, *_BITWISE, *_COMPARING, "MatMul"), _ALL)
    | dict.fromkeys((*_SUMMING[:-1], *_UNARY, *_MOVES), _FIRST)
    | {"Where": _ALL, "Clip": _ALL, "Pad": (0, 2), "Slice": (0, 1, 2)}
    | dict.fromkeys(("ScatterElements", "ScatterND"), (0, 2))
)
# Operators computed in float32 where an engine has no integer kernel.
_DIVIDING = ("Div", "Mod")
_IN_FLOAT = (*_DIVIDING, "Mul", "Add", "Sub", "Pow", *_SUMMING[:-1])
# Results that count, rather than carry, values.
_COUNTS = frozenset(("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "Equal", "IsNaN"))
# Min and Max know integers from here on.
_OPSET = 12

_WRAPPED = "converted to 32 bits by wrapping around"
# Constants are folded in 64 bits, and clipped when the program comes to hold them.
_HELD = "constants joined before and clipped"
_LOST = "converted to 32 bits, beyond which they become -2³¹"
_FOLDED = (_WRAPPED, f"{_WRAPPED}, divided in float32")

# How a tensor {s} becomes {t}, int64 within the range of int32. Casts alone would not do: ONNX
# Runtime merges a chain of them.
_WRAP = (
    "{t}_long = Cast <to = 7> ({s}) {t}_all = Constant <value = int64 {{4294967296}}> () "
    "{t}_half = Constant <value = int64 {{2147483648}}> () "
    "{t}_up = Add({t}_long, {t}_half) {t}_mod = Mod({t}_up, {t}_all) {t} = Sub({t}_mod, {t}_half)"
)
_INDEFINITE = (
    "{t}_long = Cast <to = 7> ({s}) {t}_lo = Constant <value = int64 {{-2147483648}}> () "
    "{t}_hi = Constant <value = int64 {{2147483647}}> () {t}_up = Less({t}_hi, {t}_long) "
    "{t}_down = Less({t}_long, {t}_lo) {t}_out = Or({t}_up, {t}_down) "
    "{t} = Where({t}_out, {t}_lo, {t}_long)"
)
_CLIP = (
    "{t}_long = Cast <to = 7> ({s}) {t}_lo = Constant <value = int64 {{-2147483648}}> () "
    "{t}_hi = Constant <value = int64 {{2147483647}}> () "
    "{t}_up = Max({t}_long, {t}_lo) {t} = Min({t}_up, {t}_hi)"
)
_NONZERO = (  # a divisor that narrowing made 0 becomes 1: dividing by it would end the process
    "one = Constant <value = int64 {{1}}> () none = Sub(one, one) void = Equal({s}, none) "
    "{t} = Where(void, one, {s})"
)
_SHIFTS = {  # ONNX Runtime's shifts know no sign
    "LEFT": "{y} = Mul({a}, factor)",
    "RIGHT": "rest = Mod({a}, factor) whole = Sub({a}, rest) {y} = Div(whole, factor)",
}


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with its 64-bit arithmetic and casts narrowed."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return
    yield from _narrowed(model)
    joined = linear.collapsed(Layout(model), np.int64) or model
    held = _within(joined)
    if held is not None:
        for variant in _narrowed(held):
            if variant.name in _FOLDED:
                yield replace(variant, name=f"{variant.name}, {_HELD}")


def _within(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The segment with its constants clipped to 32 bits; None where all are within them."""
    limits, changed = np.iinfo(np.int32), surgery.copied(model)
    held = 0
    for tensor in changed.graph.initializer:
        if tensor.data_type != TensorProto.INT64 or np.prod(tensor.dims) > surgery.SMALL:
            continue
        value = numpy_helper.to_array(tensor)
        clipped = np.clip(value, limits.min, limits.max)
        if not np.array_equal(clipped, value):
            tensor.CopyFrom(numpy_helper.from_array(clipped, tensor.name))
            held += 1
    return changed if held else None


def _narrowed(model: onnx.ModelProto) -> Iterable[Variant]:
    operators = dict(surgery.find(model, _NUMBERS))
    if not operators:
        return
    constants = surgery.constants(model)
    ends = {n for _, node in surgery.find(model, ("Slice",)) for n in node.input[1:3]}
    types = {n: t for n, t in surgery.types(model).items() if n not in ends & constants.keys()}
    # A real number to the power of an integer is real.
    roots = {
        i for i, n in operators.items() if n.op_type == "Pow" and types.get(n.input[0]) in _REAL
    }
    operators = {i: n for i, n in operators.items() if i not in roots}
    large = _large(model, types) & types.keys()
    exposed = {
        i: n for i, n in operators.items() if any(t in large for t in (*_numbers(n), *n.output))
    }
    long = {i: n for i, n in exposed.items() if _touches(n, types, _WIDE)}
    casts = {
        i: n for i, n in long.items() if n.op_type == "Cast" and types.get(n.input[0]) in _REAL
    }
    floats = {
        i: n for i, n in exposed.items() if n.op_type in _IN_FLOAT and _touches(n, types, _INTEGERS)
    }
    divided = {i: n for i, n in floats.items() if n.op_type in _DIVIDING}

    def having(op_types: Container[str]) -> dict[int, onnx.NodeProto]:
        return long if any(n.op_type in op_types for n in long.values()) else {}

    others = frozenset(_IN_FLOAT) - frozenset(_DIVIDING)
    for name, nodes, body in (
        ("real numbers beyond 32 bits become -2³¹", casts, _indefinite),
        (f"{_WRAPPED}, divided in float32", having(_DIVIDING), _through(_WRAP, _DIVIDING)),
        (f"{_WRAPPED}, computed in float32", having(others), _through(_WRAP, _IN_FLOAT)),
        (_WRAPPED, long, _through(_WRAP)),
        ("converted to 32 bits by clipping", long, _through(_CLIP)),
        (f"{_LOST}, computed in float32", having(others), _through(_INDEFINITE, _IN_FLOAT)),
        (_LOST, long, _through(_INDEFINITE)),
        ("computed in float32", floats, _in_float),
        ("divided in float32", divided if divided != floats else {}, _in_float),
    ):
        yield from rewritten(model, name, nodes.items(), partial(body, types=types))


def _large(model: onnx.ModelProto, types: dict[str, int]) -> set[str]:
    """Integer tensors that may hold large numbers: not shapes and small constants."""
    constants = surgery.constants(model)
    large = {i.name for i in model.graph.input if types.get(i.name) in _INTEGERS}
    large |= {
        n
        for n, v in constants.items()
        if v.dtype.kind in "iu" and v.size and np.abs(v.astype(np.float64)).max() >= 2.0**31
    }
    for node in model.graph.node:
        if node.op_type in _COUNTS:
            continue
        converts = node.op_type == "Cast" and types.get(node.input[0]) in _REAL
        if converts or any(name in large for name in _numbers(node)):
            large.update(o for o in node.output if types.get(o) in _INTEGERS)
    return large


def _numbers(node: onnx.NodeProto) -> list[str]:
    """The inputs that are numbers; of an operator that is not known, the first."""
    known = _NUMBERS.get(node.op_type, _FIRST)
    return [name for i, name in enumerate(node.input) if i in known]


def _touches(node: onnx.NodeProto, types: dict[str, int], kinds: frozenset[int]) -> bool:
    names = (*_numbers(node), *node.output)
    return any(types.get(name) in kinds for name in names)


_Body = Callable[..., str]  # of a node and the segment's ``types``


def _through(step: str, real: Container[str] = ()) -> _Body:
    """Operators whose operands and results pass int32.

    Args:
        step: how.
        real: operators that are computed in float32 in between, and truncated.
    """

    def body(node: onnx.NodeProto, types: dict[str, int]) -> str:
        inputs = [f"a{i}" if name else "" for i, name in enumerate(node.input)]
        outputs = [f"y{i}" if name else "" for i, name in enumerate(node.output)]
        steps = []
        operands, results = list(inputs), list(outputs)
        for i, name in enumerate(node.input):
            if i in _NUMBERS[node.op_type] and types.get(name, 0) in _WIDE:
                operands[i] = f"o{i}"
                steps.append(step.format(s=f"a{i}", t=f"o{i}"))
        if node.op_type in _DIVIDING and operands[1] != inputs[1]:
            steps.append(_NONZERO.format(s="o1", t="d1"))
            operands[1] = "d1"
        narrowed = [i for i, name in enumerate(node.output) if types.get(name, 0) in _WIDE]
        for i in narrowed:
            results[i] = f"r{i}"
        steps.append(_called(node, operands, results, real))
        for i in narrowed:
            steps.append(step.format(s=f"r{i}", t=f"n{i}"))
            steps.append(f"y{i} = Cast <to = {types[node.output[i]]}> (n{i})")
        return (
            f"({', '.join(n for n in inputs if n)}) => ({', '.join(n for n in outputs if n)}) {{ "
            f"{' '.join(steps)} }}"
        )

    return body


def _called(
    node: onnx.NodeProto, operands: Sequence[str], results: Sequence[str], real: Container[str]
) -> str:
    """A node's operator on int64 operands, by operators that know int64."""
    if node.op_type == "BitShift":
        shift = _SHIFTS[surgery.attributes(node)["direction"]].format(a=operands[0], y=results[0])
        return f"two = Constant <value = int64 {{2}}> () factor = Pow(two, {operands[1]}) {shift}"
    if node.op_type in real:
        return f"{_real(node, operands)} {results[0]} = Cast <to = 7> (real)"
    return f"{', '.join(results)} = {node.op_type} {surgery.options(node)} ({', '.join(operands)})"


def _indefinite(node: onnx.NodeProto, types: dict[str, int]) -> str:
    """A Cast by CVTTPS2DQ, which gives one and the same number for all it cannot hold."""
    return f"""(x) => (y) {{
        f = Cast <to = 11> (x) h = Constant <value = double {{2147483648.0}}> () l = Neg(h)
        below = Less(f, h) under = Less(f, l) over = Not(under) inside = And(below, over)
        safe = Where(inside, f, l) y = Cast <to = {types[node.output[0]]}> (safe) }}"""


def _in_float(node: onnx.NodeProto, types: dict[str, int]) -> str:
    """An operator on integers computed in float32 and truncated."""
    names = [f"a{i}" for i in range(len(node.input))]
    kind = types[node.output[0]]
    return f"({', '.join(names)}) => (y) {{ {_real(node, names)} y = Cast <to = {kind}> (real) }}"


def _real(node: onnx.NodeProto, names: Sequence[str]) -> str:
    """The text of ``real``: an operator on integers of these names, in float32."""
    numbers = [name for i, name in enumerate(names) if i in _NUMBERS[node.op_type]]
    wide = " ".join(f"f{n} = Cast <to = 1> ({n})" for n in numbers)
    operands = [f"f{n}" if n in numbers else n for n in names]
    if node.op_type == "Mod":
        a, b = operands
        down = "w = Floor(q)"
        if surgery.attributes(node).get("fmod", 0):  # toward zero
            down = "s = Sign(q) m = Abs(q) f = Floor(m) w = Mul(f, s)"
        return f"{wide} q = Div({a}, {b}) {down} p = Mul(w, {b}) real = Sub({a}, p)"
    return f"{wide} real = {node.op_type} {surgery.options(node)} ({', '.join(operands)})"


_SMALL = "keep integers below 2³¹ (hash, rescale or split them before the model)"
NOISE = Cause(
    id="precision.narrowed_integers",
    type="data precision",
    title="Integers are computed with fewer bits than they have",
    cause=(
        "Many engines have no 64-bit integer kernels and convert to int32, or to float32 for "
        "division, without a warning; numbers from 2³¹ (or 2²⁴) on are lost."
    ),
    applies=(
        "arithmetic, comparisons, reductions, casts, Pad, Slice and Scatter on integers of 64 bits "
        "and unsigned ones of 32, and on all of 32 in float32, that may be large; shapes and small "
        "constants are left out; operator set 12 or later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; OpenVINO issues 35896 and "
        "37766; TensorRT documentation, INT64 support; Intel SDM vol. 2, CVTTPS2DQ (the "
        "indefinite integer)"
    ),
    advice=_SMALL,
    remedies={
        "ov": f"{_SMALL}: OpenVINO's CPU plugin turns i64, u64 and u32 into i32",
        "trt": f"{_SMALL}, or use an engine version with INT64 support",
    },
    forms=(
        "real numbers beyond 32 bits become -2³¹",
        f"{_WRAPPED}, divided in float32",
        f"{_WRAPPED}, computed in float32",
        _WRAPPED,
        "converted to 32 bits by clipping",
        f"{_LOST}, computed in float32",
        _LOST,
        "computed in float32",
        "divided in float32",
        *(f"{form}, {_HELD}" for form in _FOLDED),
    ),
    variants=_variants,
)
