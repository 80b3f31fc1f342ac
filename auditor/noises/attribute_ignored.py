"""An attribute or optional input that has no effect, as if the model had not set it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import SegmentGraph, Variant

# Attributes that other noises vary, or that do not change the result by themselves.
_ATTRIBUTES_ELSEWHERE = frozenset(
    {
        *("approximate", "auto_pad", "axes", "ceil_mode", "count_include_pad", "epsilon", "group"),
        *("hidden_size", "keepdims", "kernel_shape", "layout", "momentum"),
        *("noop_with_empty_axes", "pads", "round_mode", "saturate", "select_last_index"),
        *("stash_type", "to", "training_mode"),
    }
)
_OPERATORS_ELSEWHERE = frozenset(
    {
        *("Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "Dropout", "Hardmax", "If"),
        *("LogSoftmax", "Loop", "Pad", "QLinearConv", "QuantizeLinear", "Resize", "Scan"),
        *("Slice", "Softmax", "Split", "Squeeze", "Unsqueeze", "Upsample"),
    }
)
# Attributes on which the shape of the result depends.
_SHAPING = frozenset(
    {
        *("axis", "dilations", "end", "num_outputs", "output_height", "output_padding"),
        *("output_shape", "output_width", "perm", "start", "strides"),
    }
)
# How many are tried per segment, for each costs a replay.
_MOST = 8
_MOST_ALONE = 4  # nodes of one operator that are tried one by one
# Limits of these are lost where they are computed; a constant one is only met by ties.
_TIED = ("NonMaxSuppression",)
_OWN = "com.microsoft"
_INPUT = "input"  # marks what is not an attribute
_OPTIONAL = ("LayerNormalization",)
_CHANNEL_SLOPE = "PRelu: slope along the channels, not the last axis"
_NO_OUTPUTS = "optional outputs are not computed"
_RECURRENT = ("GRU", "LSTM", "RNN")
_EVERY = "all attributes ignored"
_ONE_DIRECTION = "activations of the first direction in both"
_SLOPE = """(x, slope) => (y) {
    shape = Shape(x) rank = Shape(shape) count = Shape(slope)
    one = Constant <value = int64[1] {1}> () two = Constant <value = int64[1] {2}> ()
    axes = Sub(rank, two) ones = ConstantOfShape <value = int64[1] {1}> (axes)
    first = Concat <axis = 0> (count, ones) last = Concat <axis = 0> (ones, count)
    channels = Gather(shape, one) same = Equal(channels, count) across = Where(same, first, last)
    s = Reshape(slope, across) y = PRelu(x, s) }"""

_Change = Callable[[onnx.NodeProto], None]


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with each attribute at its default and each optional input left out."""
    model = segment.original or segment.model
    slopes = [(i, n) for i, n in surgery.find(model, ("PRelu",)) if _flat(model, n)]
    yield from rewritten(model, _CHANNEL_SLOPE, slopes, lambda _: _SLOPE)
    once = surgery.copied(model)
    if any([_use_first(node) for _, node in surgery.find(once, _RECURRENT)]):
        yield Variant(_ONE_DIRECTION, once)
    changes: dict[str, list[tuple[int, _Change]]] = {}
    constants = surgery.constants(model)
    for index, node in enumerate(model.graph.node):
        for name, change in _changes(model, node, constants):
            changes.setdefault(name, []).append((index, change))
    # Attributes first: biases, the commonest optional inputs, are rarely lost.
    for name in sorted(changes, key=lambda n: _INPUT in n)[:_MOST]:
        yield Variant(name, _changed(model, changes[name]))
        if len(changes[name]) > 1:  # kernels that were fused into one may differ in this
            for one in changes[name][:_MOST_ALONE]:
                node = model.graph.node[one[0]]
                label = node.name or node.output[0]
                yield Variant(f"{name} at {label} alone", _changed(model, [one]))
    every = [change for name in changes if _INPUT not in name for change in changes[name]]
    if len(every) > len({index for index, _ in every}):
        yield Variant(_EVERY, _changed(model, every))
    if unset := _without_outputs(model):
        yield Variant(_NO_OUTPUTS, unset)


def _changed(model: onnx.ModelProto, changes: Sequence[tuple[int, _Change]]) -> onnx.ModelProto:
    changed = surgery.copied(model)
    for index, change in changes:
        change(changed.graph.node[index])
    return changed


def _changes(
    model: onnx.ModelProto, node: onnx.NodeProto, constants: Container[str]
) -> Iterator[tuple[str, _Change]]:
    """What can be ignored of a node: its name for the user, and what removes it."""
    schema = None if node.op_type in _OPERATORS_ELSEWHERE else _schema(model, node)
    if schema is None:
        return
    for name, value in surgery.attributes(node).items():
        known = schema.attributes.get(name)
        if known is None or known.required or name in _ATTRIBUTES_ELSEWHERE:
            continue
        if value == "bidirectional":
            continue  # its weights are for two directions
        if name == "mode" and surgery.attributes(node).get("sampling_ratio") == 1:
            continue  # RoiAlign: of one sample, the mean is the largest
        if name in _SHAPING and not surgery.takes_any_shape(model, node):
            continue
        if node.domain == _OWN and not isinstance(value, float) and value != 1:
            continue  # a size: some of these kernels read past the end where it is another one
        if value != _default(known):
            yield f"{node.op_type}: {name} ignored", partial(_unset, name=name)
    if node.op_type.startswith("Reduce") or node.domain == _OWN:
        return  # their axes; and kernels that abort the process where an input is missing
    for position, name in enumerate(node.input):
        formal = schema.inputs[min(position, len(schema.inputs) - 1)]
        optional = formal.option.name == "Optional"
        if name and optional and not (node.op_type in _TIED and name in constants):
            yield f"{node.op_type}: {_INPUT} {formal.name} ignored", partial(_drop, at=position)


def _schema(model: onnx.ModelProto, node: onnx.NodeProto) -> Any:
    """What ONNX, or ONNX Runtime of its own operators, says of one; None where neither knows it."""
    if node.domain == _OWN:
        return _own_schemas().get(node.op_type)
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return onnx.defs.get_schema(node.op_type, surgery.opset(model), "")
    except onnx.defs.SchemaError:
        return None


@cache
def _own_schemas() -> dict[str, Any]:
    """ONNX Runtime's schemas of its own operators: ``onnx.defs.OpSchema`` but for helpers."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    return {s.name: s for s in runtime.get_all_operator_schema() if s.domain == _OWN}


def _default(known: Any) -> Any:
    """An attribute's default; None where it has none, or one that is derived."""
    default = onnx.AttributeProto.FromString(known._default_value)
    if not default.type:
        return None
    value = helper.get_attribute_value(default)
    return value.decode() if isinstance(value, bytes) else value


def _unset(node: onnx.NodeProto, name: str) -> None:
    surgery.set_attributes(node, **{name: None})


def _drop(node: onnx.NodeProto, at: int) -> None:
    node.input[at] = ""
    while node.input and not node.input[-1]:
        del node.input[-1]


def _use_first(node: onnx.NodeProto) -> bool:
    """Give both directions the first one's functions; whether they had others."""
    functions = surgery.attributes(node).get("activations", [])
    first = functions[: len(functions) // 2] * 2
    both = surgery.attributes(node).get("direction") == "bidirectional" and first != functions
    if both:
        surgery.set_attributes(node, activations=first)
    return both


def _flat(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether a slope is a vector, which ONNX puts along the last axis."""
    return len(surgery.shapes(model).get(node.input[1], ())) == 1


def _without_outputs(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The segment with zero in place of optional outputs."""
    changed = surgery.copied(model)
    missing: list[str] = []
    for index, node in surgery.find(model, _OPTIONAL):
        missing += filter(None, node.output[1:])
        for position, name in enumerate(node.output):
            if name in missing:
                changed.graph.node[index].output[position] = ""
    zero = helper.make_tensor("zero", TensorProto.FLOAT, (), (0.0,))
    for name in missing:  # first, for nodes may read them
        changed.graph.node.insert(0, helper.make_node("Constant", [], [name], value=zero))
    return changed if missing else None


NOISE = Cause(
    id="implementation.attribute_ignored",
    type="operator implementation",
    title="An attribute or optional input is ignored",
    cause=(
        "An importer that does not know an attribute or an optional input of an operator often "
        "drops it without a word, and the operator runs with its default."
    ),
    applies=(
        "every standard operator with an attribute that is not at its default, or with an "
        "optional input or output, and com.microsoft's with a number or a flag that is not at its "
        "default; at most eight of them in one segment"
    ),
    source=(
        "operator schemas of ONNX and ONNX Runtime (defaults, optional inputs); for instance "
        "openvino#33371 and tvm#18598 (PRelu slope), ConvTranspose output_shape, LSTM peepholes"
    ),
    advice=(
        "write what the attribute does with operators that the backend honours (explicit "
        "padding, an Expand of the slope, a Mul by the factor), and report it to the backend"
    ),
    convention=True,
    forms=(
        _CHANNEL_SLOPE,
        _ONE_DIRECTION,
        "OPERATOR: ATTRIBUTE ignored",
        f"OPERATOR: {_INPUT} NAME ignored",
        "OPERATOR: ATTRIBUTE ignored at NODE alone",
        f"OPERATOR: {_INPUT} NAME ignored at NODE alone",
        _EVERY,
        _NO_OUTPUTS,
    ),
    variants=_variants,
    simulated=False,
)
