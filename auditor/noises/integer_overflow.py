"""Integer results beyond their type's range: wrapped around, or clipped to the nearest limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import SegmentGraph, Variant

# Range of each integer type that int64 can hold.
_LIMITS: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 2**8 - 1),
    TensorProto.INT8: (-(2**7), 2**7 - 1),
    TensorProto.UINT16: (0, 2**16 - 1),
    TensorProto.INT16: (-(2**15), 2**15 - 1),
    TensorProto.UINT32: (0, 2**32 - 1),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
}
_ARITHMETIC = ("Add", "Sub", "Mul", "Neg", "Abs", "BitShift")  # shifts to the left
_REAL = frozenset((TensorProto.FLOAT, TensorProto.DOUBLE))
_INTEGERS = frozenset((TensorProto.INT64, *_LIMITS))
_UNWRAPPED = "arithmetic and casts in 32 bits do not wrap around"
# Min and Max know integers from here on.
_OPSET = 12


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with integer arithmetic and casts that clip, or wrap."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return
    operators = list(surgery.find(model, (*_ARITHMETIC, "Cast", "QuantizeLinear")))
    if not operators:
        return
    types = surgery.types(model)

    def target(node: onnx.NodeProto) -> int:
        return types.get(node.output[0], TensorProto.UNDEFINED)

    def body(node: onnx.NodeProto, *, clip: bool = True) -> str | None:
        kind = target(node)
        if kind not in _LIMITS or _to_the_right(node):
            return None
        if node.op_type == "Cast":
            return _cast(types.get(node.input[0], TensorProto.UNDEFINED), kind, clip=clip)
        return _wrapping(node, kind) if node.op_type == "QuantizeLinear" else _clipped(node, kind)

    arithmetic, casts, quantised = (
        [(i, n) for i, n in operators if n.op_type in kinds]
        for kinds in (_ARITHMETIC, ("Cast",), ("QuantizeLinear",))
    )
    both = any(body(n) for _, n in arithmetic) and any(body(n) for _, n in casts)
    for name, nodes, changed in (
        ("arithmetic saturates", arithmetic, body),
        ("casts saturate", casts, body),
        ("arithmetic and casts saturate", [*arithmetic, *casts] if both else [], body),
        (_UNWRAPPED, _narrow(model, types), _unwrapped),
        ("casts wrap around", casts, partial(body, clip=False)),
        ("quantised values wrap around", quantised, body),
    ):
        yield from rewritten(model, name, nodes, changed)


def _narrow(
    model: onnx.ModelProto, types: Mapping[str, int]
) -> Iterator[tuple[int, onnx.NodeProto]]:
    """Arithmetic on and casts to 16 bits that only casts read."""
    seen = {o.name for o in model.graph.output}
    seen |= {n for node in model.graph.node if node.op_type != "Cast" for n in node.input}
    for index, node in surgery.find(model, (*_ARITHMETIC, "BitwiseNot", "Cast")):
        short = types.get(node.output[0]) in (TensorProto.INT16, TensorProto.UINT16)
        if short and node.output[0] not in seen and not _to_the_right(node):
            yield index, node


def _unwrapped(node: onnx.NodeProto) -> str:
    """Arithmetic whose result stays in 32 bits."""
    return _computed(node, TensorProto.INT32, "y = Identity(r)")


def _to_the_right(node: onnx.NodeProto) -> bool:
    """Whether a node is a shift that loses no leading digits."""
    return bool(surgery.attributes(node).get("direction") == "RIGHT")


def _clipped(node: onnx.NodeProto, kind: int) -> str:
    """An operator computed in int64, whose result is clipped."""
    clip = f"{_between(kind)} y = Cast <to = {kind}> (m)"
    return _computed(node, TensorProto.INT64, clip)


def _computed(node: onnx.NodeProto, kind: int, then: str) -> str:
    """An operator on operands of another type, and what becomes of its result ``r``."""
    names = ["a", "b"][: len(node.input)]
    wide = " ".join(f"w{n} = Cast <to = {kind}> ({n})" for n in names)
    result = f"{node.op_type}({', '.join(f'w{n}' for n in names)})"
    if node.op_type == "Cast":
        result = "Identity(wa)"
    elif node.op_type == "BitShift":
        two = f"c = Constant <value = int64 {{2}}> () two = Cast <to = {kind}> (c)"
        wide, result = f"{wide} {two} factor = Pow(two, wb)", "Mul(wa, factor)"
    return f"({', '.join(names)}) => (y) {{ {wide} r = {result} {then} }}"


def _cast(source: int, kind: int, *, clip: bool) -> str | None:
    """A Cast by way of int64, whose range real numbers are kept in; None where it is the same."""
    if source in _REAL:
        whole = (
            "most = Constant <value = float {9e18}> () least = Neg(most) k = Cast <to = $T> (most) "
            "l = Cast <to = $T> (least) c = Max(x, l) d = Min(c, k) r = Cast <to = 7> (d)"
        )
    elif clip and source in _INTEGERS and source != kind:
        whole = "r = Cast <to = 7> (x)"
    else:
        return None
    last = f"{_between(kind)} y = Cast <to = {kind}> (m)" if clip else f"y = Cast <to = {kind}> (r)"
    return f"(x) => (y) {{ {whole} {last} }}"


def _between(kind: int) -> str:
    """The text of ``m``: ``r``, an int64 tensor, clipped to a type's range."""
    low, high = _LIMITS[kind]
    return (
        f"lo = Constant <value = int64 {{{low}}}> () hi = Constant <value = int64 {{{high}}}> () "
        f"n = Max(r, lo) m = Min(n, hi)"
    )


def _around(name: str, kind: int) -> str:
    """The text of ``m``, an int64 tensor wrapped around into a type's range.

    A Cast would not do: ONNX Runtime merges it with the one before.
    """
    low, high = _LIMITS[kind]
    return (
        f"lo = Constant <value = int64 {{{low}}}> () "
        f"all = Constant <value = int64 {{{high - low + 1}}}> () "
        f"up = Sub({name}, lo) mod = Mod(up, all) m = Add(mod, lo)"
    )


def _wrapping(node: onnx.NodeProto, kind: int) -> str:
    """A QuantizeLinear without saturation."""
    zero = "w = Cast <to = 7> (z) t = Add(i, w)" if len(node.input) > 2 else "t = Identity(i)"
    return (
        f"({', '.join(('x', 's', 'z')[: len(node.input)])}) => (y) {{ q = Div(x, s) r = Round(q) "
        f"i = Cast <to = 7> (r) {zero} {_around('t', kind)} y = Cast <to = {kind}> (m) }}"
    )


_WIDE = "cast the listed layers' inputs to int32 and compute there"
NOISE = Cause(
    id="precision.integer_overflow",
    type="data precision",
    title="Integers that leave their type's range saturate instead of wrapping, or the reverse",
    cause=(
        "Integer arithmetic wraps around in most languages, vector units offer saturating forms, "
        "and engines that compute in a wider type clip on the way back; ONNX leaves overflow "
        "open."
    ),
    applies=(
        "Add, Sub, Mul, Neg, Abs and BitShift to the left of integers of up to 32 bits, Cast to "
        "them, and QuantizeLinear; operator set 12 or later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; ONNX operators Cast (out "
        "of range) and QuantizeLinear (saturation); Intel SDM vol. 2, PADDUSB and PACKUSWB"
    ),
    advice=_WIDE,
    remedies={
        "ov": f"{_WIDE}: OpenVINO's CPU kernels for 8- and 16-bit types saturate",
    },
    forms=(
        "arithmetic saturates",
        "casts saturate",
        "arithmetic and casts saturate",
        _UNWRAPPED,
        "casts wrap around",
        "quantised values wrap around",
    ),
    variants=_variants,
)
