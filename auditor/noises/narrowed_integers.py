"""64-bit integers computed with fewer bits: in 32-bit integers, or in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant

_LONG = frozenset((TensorProto.INT64, TensorProto.UINT64))
_INTEGERS = _LONG | {TensorProto.INT32, TensorProto.UINT32}
_REAL = frozenset((TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16))
_BINARY = ("Add", "Sub", "Mul", "Div", "Mod", "Pow", "Min", "Max", "Sum")
_COMPARING = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_SUMMING = ("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceMean", "CumSum", "MatMul")
_UNARY = ("Neg", "Abs", "Sign", "Clip", "TopK", "ArgMax", "ArgMin", "Cast")
# Operators that hand on what they are given.
_MOVES = ("Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze", "Flatten")
# Which of their inputs are numbers rather than shapes, axes or indices.
_NUMBERS = (
    dict.fromkeys((*_BINARY, *_COMPARING, "MatMul"), 2**31)
    | dict.fromkeys((*_SUMMING[:-1], *_UNARY, *_MOVES), 1)
    | {"Where": 3}
)
# Operators computed in float32 where an engine has no integer kernel.
_IN_FLOAT = ("Div", "Mod", "Mul", "Add", "Sub", "Pow", "ReduceSum", "ReduceMean", "CumSum")
_DIVIDING = ("Div", "Mod")
# Results that count, rather than carry, values.
_COUNTS = frozenset(("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "Equal", "IsNaN"))
# Min and Max know integers from here on.
_OPSET = 12

# How a tensor {s} becomes {t}. Casts alone would not do: ONNX Runtime merges a chain of them.
_WRAP: dict[int, str] = {
    TensorProto.INT64: (
        "{t}_all = Constant <value = int64 {{4294967296}}> () "
        "{t}_half = Constant <value = int64 {{2147483648}}> () "
        "{t}_up = Add({s}, {t}_half) {t}_mod = Mod({t}_up, {t}_all) {t} = Sub({t}_mod, {t}_half)"
    ),
    TensorProto.UINT64: (
        "{t}_all = Constant <value = uint64 {{4294967296}}> () {t} = Mod({s}, {t}_all)"
    ),
}
_CLIP: dict[int, str] = {
    TensorProto.INT64: (
        "{t}_lo = Constant <value = int64 {{-2147483648}}> () "
        "{t}_hi = Constant <value = int64 {{2147483647}}> () "
        "{t}_up = Max({s}, {t}_lo) {t} = Min({t}_up, {t}_hi)"
    ),
    TensorProto.UINT64: (
        "{t}_hi = Constant <value = uint64 {{4294967295}}> () {t} = Min({s}, {t}_hi)"
    ),
}


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with its 64-bit arithmetic and casts narrowed."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return
    operators = dict(surgery.find(model, _NUMBERS))
    if not operators:
        return
    types = surgery.types(model)
    large = _large(model, types)
    exposed = {
        i: n
        for i, n in operators.items()
        if any(t in large for t in (*n.input[: _NUMBERS[n.op_type]], *n.output))
    }
    long = {i: n for i, n in exposed.items() if _touches(n, types, _LONG)}
    casts = {
        i: n for i, n in long.items() if n.op_type == "Cast" and types.get(n.input[0]) in _REAL
    }
    floats = {
        i: n for i, n in exposed.items() if n.op_type in _IN_FLOAT and _touches(n, types, _INTEGERS)
    }
    divided = {i: n for i, n in floats.items() if n.op_type in _DIVIDING}
    wrap, divide = _through(_WRAP), _through(_WRAP, real_division=True)
    divides = long if any(n.op_type == "Div" for n in long.values()) else {}
    for name, nodes, body in (
        ("real numbers beyond 32 bits become -2³¹", casts, _indefinite),
        ("converted to 32 bits by wrapping around, divided in float32", divides, divide),
        ("converted to 32 bits by wrapping around", long, wrap),
        ("converted to 32 bits by clipping", long, _through(_CLIP)),
        ("computed in float32", floats, _in_float),
        ("divided in float32", divided if divided != floats else {}, _in_float),
    ):
        if nodes:
            bodies = {i: body(n, types) for i, n in nodes.items()}
            yield Variant(name, surgery.substituted(model, bodies))


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
        if converts or any(name in large for name in node.input[: _NUMBERS.get(node.op_type, 1)]):
            large.update(o for o in node.output if types.get(o) in _INTEGERS)
    return large


def _touches(node: onnx.NodeProto, types: dict[str, int], kinds: frozenset[int]) -> bool:
    names = (*node.input[: _NUMBERS[node.op_type]], *node.output)
    return any(types.get(name) in kinds for name in names)


_Body = Callable[[onnx.NodeProto, dict[str, int]], str]


def _through(steps: Mapping[int, str], *, real_division: bool = False) -> _Body:
    """Operators whose 64-bit operands and results pass a 32-bit type.

    Args:
        steps: how, by type.
        real_division: whether to divide in float32 and truncate.
    """

    def body(node: onnx.NodeProto, types: dict[str, int]) -> str:
        inputs = [f"a{i}" if name else "" for i, name in enumerate(node.input)]
        outputs = [f"y{i}" if name else "" for i, name in enumerate(node.output)]
        before, after = [], []
        operands, results = list(inputs), list(outputs)
        for i, name in enumerate(node.input[: _NUMBERS[node.op_type]]):
            if (kind := types.get(name, 0)) in steps:
                operands[i] = f"o{i}"
                before.append(steps[kind].format(s=f"a{i}", t=f"o{i}"))
        if node.op_type in _DIVIDING and operands[1] != inputs[1]:
            before.append(_nonzero("o1", "d1", types[node.input[1]]))
            operands[1] = "d1"
        for i, name in enumerate(node.output):
            if (kind := types.get(name, 0)) in steps:
                results[i] = f"r{i}"
                after.append(steps[kind].format(s=f"r{i}", t=f"y{i}"))
        call = f"{node.op_type} {surgery.options(node)} ({', '.join(operands)})"
        if real_division and node.op_type == "Div":
            kind = types[node.output[0]]
            before += [f"f{i} = Cast <to = 1> ({name})" for i, name in enumerate(operands)]
            call = f"Cast <to = {kind}> (q)"
            before.append("q = Div(f0, f1)")
        return (
            f"({', '.join(n for n in inputs if n)}) => ({', '.join(n for n in outputs if n)}) {{ "
            f"{' '.join(before)} {', '.join(results)} = {call} {' '.join(after)} }}"
        )

    return body


def _nonzero(source: str, target: str, kind: int) -> str:
    """A divisor that narrowing made 0 becomes 1: dividing by it would end the process."""
    return (
        f"one = Constant <value = int64 {{1}}> () least = Cast <to = {kind}> (one) "
        f"none = Sub(least, least) void = Equal({source}, none) "
        f"{target} = Where(void, least, {source})"
    )


def _indefinite(node: onnx.NodeProto, types: dict[str, int]) -> str:
    """A Cast by CVTTPS2DQ, which gives one and the same number for all it cannot hold."""
    return f"""(x) => (y) {{
        f = Cast <to = 11> (x) h = Constant <value = double {{2147483648.0}}> () l = Neg(h)
        below = Less(f, h) under = Less(f, l) over = Not(under) inside = And(below, over)
        safe = Where(inside, f, l) y = Cast <to = {types[node.output[0]]}> (safe) }}"""


def _in_float(node: onnx.NodeProto, types: dict[str, int]) -> str:
    """An operator on integers computed in float32 and truncated."""
    names = [f"a{i}" for i in range(len(node.input))]
    numbers = names[: _NUMBERS[node.op_type]]
    wide = " ".join(f"f{n} = Cast <to = 1> ({n})" for n in numbers)
    operands = ", ".join(f"f{n}" if n in numbers else n for n in names)
    if node.op_type == "Mod" and not surgery.attributes(node).get("fmod", 0):
        result = "q = Div(fa0, fa1) w = Floor(q) p = Mul(w, fa1) r = Sub(fa0, p)"
    else:
        result = f"r = {node.op_type} {surgery.options(node)} ({operands})"
    return (
        f"({', '.join(names)}) => (y) {{ {wide} {result} "
        f"y = Cast <to = {types[node.output[0]]}> (r) }}"
    )


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
        "arithmetic, comparisons, reductions and casts on integers of 64 bits, and of 32 in "
        "float32, that may be large; shapes and small constants are left out; operator set 12 or "
        "later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; OpenVINO issues 35896 and "
        "37766; TensorRT documentation, INT64 support; Intel SDM vol. 2, CVTTPS2DQ (the "
        "indefinite integer)"
    ),
    advice=_SMALL,
    remedies={
        "ov": f"{_SMALL}: OpenVINO's CPU plugin turns i64 into i32",
        "trt": f"{_SMALL}, or use an engine version with INT64 support",
    },
    forms=(
        "real numbers beyond 32 bits become -2³¹",
        "converted to 32 bits by wrapping around, divided in float32",
        "converted to 32 bits by wrapping around",
        "converted to 32 bits by clipping",
        "computed in float32",
        "divided in float32",
    ),
    variants=_variants,
)
