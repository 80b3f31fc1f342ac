"""Equal values put in another order, and values on a threshold counted on its other side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import onnx

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import SegmentGraph, Variant

_OPSET = 11  # TopK and NonMaxSuppression have their present form, Slice has steps
_SELECTIONS = ("ArgMax", "ArgMin", "TopK", "NonMaxSuppression")
_BOXES = ("NonMaxSuppression",)
_HEAPED = 1 << 14  # values of a row that go through a heap at once, one after another
_MOST = 1 << 20  # values at most of which some do
_CONSTANTS = """back = Constant <value = int64[1] {-1}> ()
    far = Constant <value = int64[1] {-9223372036854775807}> ()"""


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with ties and boundaries of its selections decided the other way."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return
    forms: tuple[tuple[str, tuple[str, ...], Callable[[onnx.NodeProto], str | None]], ...] = (
        ("equal values are taken in the opposite order", _SELECTIONS, _last),
        ("equal values are taken as a heap leaves them", ("TopK",), _heap(model)),
        ("an overlap equal to the limit suppresses a box", _BOXES, _suppressing),
        ("an overlap a rounding error above the limit is kept", _BOXES, _keeping),
        ("boxes are listed by score across classes", _BOXES, _by_score),
        ("halves are rounded away from zero", ("Round",), _away),
    )
    for name, op_types, body in forms:
        yield from rewritten(model, name, surgery.find(model, op_types), body)


def _last(node: onnx.NodeProto) -> str:
    """A selection from the reversed axis, its indices turned back."""
    options = surgery.options(node)
    axis = surgery.attributes(node).get("axis", -1 if node.op_type == "TopK" else 0)
    if node.op_type == "NonMaxSuppression":
        rest = [f"i{position}" for position in range(2, len(node.input))]
        inputs = ", ".join(["rb", "rs", *rest])
        return f"""({", ".join(["boxes", "scores", *rest])}) => (y) {{
            {_CONSTANTS} {_reversed("boxes", "rb", 1)} {_reversed("scores", "rs", 2)}
            picked = NonMaxSuppression {options} ({inputs}) shape = Shape(scores)
            two = Constant <value = int64[1] {{2}}> () three = Constant <value = int64[1] {{3}}> ()
            zero = Constant <value = int64[1] {{0}}> () one = Constant <value = int64[1] {{1}}> ()
            count = Gather(shape, two) last = Sub(count, one)
            head = Slice(picked, zero, two, one) box = Slice(picked, two, three, one)
            index = Sub(last, box) y = Concat <axis = 1> (head, index) }}"""
    size = f"""shape = Shape(x) at = Constant <value = int64 {{{axis}}}> () rank = Size(shape)
        zero = Sub(at, at) below = Less(at, zero) wrapped = Add(at, rank)
        which = Where(below, wrapped, at) count = Gather(shape, which)
        one = Constant <value = int64 {{1}}> () last = Sub(count, one)"""
    if node.op_type == "TopK":
        return f"""(x, k) => (values, indices) {{ {_CONSTANTS} {_reversed("x", "r", axis)} {size}
            values, turned = TopK {options} (r, k) indices = Sub(last, turned) }}"""
    return f"""(x) => (y) {{ {_CONSTANTS} {_reversed("x", "r", axis)} {size}
        turned = {node.op_type} {options} (r) y = Sub(last, turned) }}"""


def _heap(model: onnx.ModelProto) -> Callable[[onnx.NodeProto], str | None]:
    """A selection by a heap of the largest so far, as OpenVINO's: its least at the top.

    It is built of the first values, any larger one takes the top's place, and at the end the top
    is taken off until none is left. Which of equal values moves depends on where they stand. Of
    many values, those behind the first ``_HEAPED`` that are not larger than the top is by then
    are left out: they cannot enter.
    """
    shapes = surgery.shapes(model)

    def body(node: onnx.NodeProto) -> str | None:
        given, shape = surgery.attributes(node), shapes.get(node.input[0], ())
        if not shape or math.prod(shape) > _MOST or not given.get("sorted", 1):
            return None
        if given.get("axis", -1) not in (-1, len(shape) - 1):
            return None
        turn = "Identity" if given.get("largest", 1) else "Neg"
        return f"""(x, k) => (values, indices) {{
            {_HEAP_CONSTANTS} shape = Shape(x) n = Gather(shape, minus) wide = Reshape(n, one)
            rows = Concat <axis = 0> (minus, wide) flat = Reshape(x, rows)
            exact = Cast <to = {onnx.TensorProto.DOUBLE}> (flat) turned = {turn}(exact)
            size = Squeeze(k) top = Sub(size, i1) half = Div(size, i2)
            many = Constant <value = int64[1] {{{_HEAPED}}}> () limited = Min(wide, many)
            known = Max(limited, k) front_end = Squeeze(known)
            places = Scan <num_scan_inputs = 1, body = row (double[] r) => (int64[chosen] px) {{
                v0 = Slice(r, zero, k) x0 = Range(i0, size, i1)
                b, v1, x1 = Loop <body = build (int64 t, bool on, int64 s, double[] v, int64[] p)
                    => (bool go, int64 s1, double[] w, int64[] q) {{
                    back = Sub(half, t) at = Sub(back, i1) go = Identity(on) s1 = Identity(s)
                    {_sift("at", "size", "on", "v", "p")} }}> (half, yes, i0, v0, x0)
                head = Slice(r, zero, known) tail = Slice(r, known, wide)
                best, nowhere = TopK(head, k) least = Slice(best, minus, wide)
                larger = Greater(tail, least) found = NonZero(larger) line = Reshape(found, minus)
                behind = Add(line, known) before = Range(size, front_end, i1)
                queue = Concat <axis = 0> (before, behind) length = Size(queue)
                u, v2, x2 = Loop <body = fill (int64 t, bool on, int64 s, double[] v, int64[] p)
                    => (bool go, int64 s1, double[] w, int64[] q) {{
                    j = Gather(queue, t) new = Gather(r, j)
                    old = Gather(v, i0) enters = Less(old, new)
                    kept = Gather(p, i0) first = Where(enters, new, old)
                    place = Where(enters, j, kept) f1 = Unsqueeze(first, zero)
                    p1 = Unsqueeze(place, zero) v3 = ScatterElements(v, zero, f1)
                    p3 = ScatterElements(p, zero, p1) go = Identity(on) s1 = Identity(s)
                    {_sift("i0", "size", "enters", "v3", "p3")} }}> (length, yes, i0, v1, x1)
                e, v4, px = Loop <body = take (int64 t, bool on, int64 s, double[] v, int64[] p)
                    => (bool go, int64 s1, double[] w, int64[] q) {{
                    end = Sub(top, t) e1 = Unsqueeze(end, zero) both = Concat <axis = 0> (zero, e1)
                    swapped = Concat <axis = 0> (e1, zero)
                    va = Gather(v, swapped) pa = Gather(p, swapped)
                    v3 = ScatterElements(v, both, va) p3 = ScatterElements(p, both, pa)
                    go = Identity(on) s1 = Identity(s)
                    {_sift("i0", "end", "on", "v3", "p3")} }}> (top, yes, i0, v2, x2)
                }}> (turned)
            front = Slice(shape, zero, minus) full = Concat <axis = 0> (front, k)
            indices = Reshape(places, full) values = GatherElements <axis = -1> (x, indices) }}"""

    return body


_HEAP_CONSTANTS = """i0 = Constant <value = int64 {0}> () i1 = Constant <value = int64 {1}> ()
    i2 = Constant <value = int64 {2}> () zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> () minus = Constant <value = int64[1] {-1}> ()
    yes = Constant <value = bool {1}> ()"""


def _sift(start: str, size: str, moves: str, values: str, places: str) -> str:
    """Moves one of the first ``size`` values down a heap; gives ``w`` and ``q``."""
    return f"""last = Sub({size}, i1)
        z, w, q = Loop <body = sift (int64 t2, bool on2, int64 i, double[] hv, int64[] hp)
            => (bool down, int64 to, double[] nv, int64[] np) {{
            twice = Mul(i, i2) left = Add(twice, i1) right = Add(left, i1)
            has = LessOrEqual(left, last) pair = LessOrEqual(right, last)
            l = Min(left, last) m = Min(right, last)
            vl = Gather(hv, l) vm = Gather(hv, m) vi = Gather(hv, i)
            less = Less(vm, vl) other = And(pair, less) c = Where(other, m, l)
            vc = Gather(hv, c) lower = Less(vc, vi) down = And(has, lower) to = Where(down, c, i)
            ia = Unsqueeze(i, zero) ta = Unsqueeze(to, zero)
            here = Concat <axis = 0> (ia, ta) there = Concat <axis = 0> (ta, ia)
            sv = Gather(hv, there) sp = Gather(hp, there)
            nv = ScatterElements(hv, here, sv) np = ScatterElements(hp, here, sp)
            }}> (, {moves}, {start}, {values}, {places})"""


def _reversed(of: str, name: str, axis: int) -> str:
    return f"""{name}_axis = Constant <value = int64[1] {{{axis}}}> ()
        {name} = Slice({of}, back, far, {name}_axis, back)"""


def _suppressing(node: onnx.NodeProto) -> str | None:
    """Non-maximum suppression with the largest limit below the given one."""
    return _moved(node, "Sub")


def _keeping(node: onnx.NodeProto) -> str | None:
    """Non-maximum suppression with a limit a few rounding errors above the given one."""
    return _moved(node, "Add")


def _moved(node: onnx.NodeProto, direction: str) -> str | None:
    """The overlap limit moved by two units in the last place: engines' overlaps differ by those."""
    signature, arguments = _boxes(node)
    if "limit" not in arguments:
        return None
    moved = arguments.replace("limit", "moved")
    return f"""({signature}) => (y) {{
        unit = Constant <value = float {{2.4e-07}}> () shift = Mul(limit, unit)
        moved = {direction}(limit, shift)
        y = NonMaxSuppression {surgery.options(node)} ({moved}) }}"""


def _by_score(node: onnx.NodeProto) -> str:
    """Boxes of all classes and images sorted by score, the first of equals first."""
    signature, arguments = _boxes(node)
    return f"""({signature}) => (y) {{
        picked = NonMaxSuppression {surgery.options(node)} ({arguments})
        reached = GatherND(scores, picked) count = Shape(reached)
        sorted, order = TopK <axis = 0> (reached, count) y = Gather <axis = 0> (picked, order) }}"""


def _boxes(node: onnx.NodeProto) -> tuple[str, str]:
    """The inputs of a NonMaxSuppression as a function's parameters, and those that are given."""
    names = ["boxes", "scores", "most", "limit", "least"][: len(node.input)]
    return ", ".join(names), ", ".join(n if node.input[i] else "" for i, n in enumerate(names))


def _away(node: onnx.NodeProto) -> str:
    """Rounding as C's ``round`` does."""
    return f"""(x) => (y) {{ {surgery.number("half", 0.5)}
        a = Abs(x) up = Add(a, half) whole = Floor(up) s = Sign(x) y = Mul(s, whole) }}"""


NOISE = Cause(
    id="implementation.tie_breaking",
    type="operator implementation",
    title="Ties and values exactly on a threshold are decided the other way",
    cause=(
        "Which of two equal values comes first, and whether a box whose overlap equals the limit "
        "survives, is left open or read differently; quantised scores tie often."
    ),
    applies="ArgMax, ArgMin, TopK, NonMaxSuppression and Round; operator set 11 or later",
    source=(
        "SysNoise (Wang et al., MLSys 2023), sec. 3.3 and Table 1, detection proposal; ONNX "
        "operators ArgMax (select_last_index), TopK, NonMaxSuppression, Round"
    ),
    advice=(
        "break ties in the model (add a small multiple of the index to the scores), move "
        "thresholds off attainable values, or run the selection outside of the network"
    ),
    convention=True,
    forms=(
        "equal values are taken in the opposite order",
        "equal values are taken as a heap leaves them",
        "an overlap equal to the limit suppresses a box",
        "an overlap a rounding error above the limit is kept",
        "boxes are listed by score across classes",
        "halves are rounded away from zero",
    ),
    variants=_variants,
)
