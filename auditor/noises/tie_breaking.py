"""Equal values put in another order, and values on a threshold counted on its other side."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx

from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays import surgery

_OPSET = 11  # TopK and NonMaxSuppression have their present form, Slice has steps
_SELECTIONS = ("ArgMax", "ArgMin", "TopK", "NonMaxSuppression")
_BOXES = ("NonMaxSuppression",)
_CONSTANTS = """back = Constant <value = int64[1] {-1}> ()
    far = Constant <value = int64[1] {-9223372036854775807}> ()"""


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with ties and boundaries of its selections decided the other way."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return
    forms: tuple[tuple[str, tuple[str, ...], Callable[[onnx.NodeProto], str | None]], ...] = (
        ("equal values are taken in the opposite order", _SELECTIONS, _last),
        ("an overlap equal to the limit suppresses a box", _BOXES, _suppressing),
        ("an overlap a rounding error above the limit is kept", _BOXES, _keeping),
        ("boxes are listed by score across classes", _BOXES, _by_score),
        ("halves are rounded away from zero", ("Round",), _away),
    )
    for name, op_types, body in forms:
        found = surgery.find(model, op_types)
        if bodies := {i: text for i, n in found if (text := body(n))}:
            yield Variant(name, surgery.substituted(model, bodies))


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
    return """(x) => (y) {
        half = Constant <value = float {0.5}> () k = Cast <to = $T> (half)
        a = Abs(x) up = Add(a, k) whole = Floor(up) s = Sign(x) y = Mul(s, whole) }"""


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
    forms=(
        "equal values are taken in the opposite order",
        "an overlap equal to the limit suppresses a box",
        "an overlap a rounding error above the limit is kept",
        "boxes are listed by score across classes",
        "halves are rounded away from zero",
    ),
    variants=_variants,
)
