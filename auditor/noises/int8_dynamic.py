"""What products with compressed weights read, quantised to 8 bits while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays.editor import Editor
from auditor.replays.layout import Layout

# OpenVINO's default; what weights are grouped by, which ONNX Runtime uses; None: a whole row.
_GROUPS = (32, 128, 64, 16, 256, None)
_OPSET = 13  # the operator set in which compressed weights are written out
_MOVES = frozenset(("Cast", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"))
_SCALES = frozenset(("Mul", "Sub"))


def _name(group: int | None) -> str:
    return "by row" if group is None else f"in groups of {group}"


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with what such products read quantised, one scale for each group of a row."""
    layout = Layout(segment.model, segment.weights)
    return reading(segment, lambda name: _compressed(layout, name))


def reading(segment: SegmentGraph, compressed: Callable[[str], bool]) -> Iterator[Variant]:
    """The segment with 8-bit activations in products whose weights' names are ``compressed``."""
    if surgery.opset(segment.model) < _OPSET:
        return
    layout = Layout(segment.model, segment.weights)
    types, shapes = surgery.types(segment.model), surgery.shapes(segment.model)
    rows = {
        index: row
        for index, node in surgery.find(segment.model, ("MatMul", "Gemm", "Conv"))
        if types.get(node.input[0]) == onnx.TensorProto.FLOAT
        and (row := _row(node, shapes.get(node.input[1], ())))
        and compressed(node.input[1])
    }
    for group in _GROUPS:
        if rows and (group is None or any(row > group for row in rows.values())):
            yield Variant(_name(group), _quantised(layout, rows, group))


def _row(node: onnx.NodeProto, weights: Sequence[int]) -> int:
    """How many values of what it reads a product adds up; 0 for what is no matrix product."""
    given = surgery.attributes(node)
    if len(weights) < 2 or given.get("transA"):
        return 0
    if node.op_type == "Conv":
        # Across channels only, it is a matrix product of pixels, and OpenVINO computes it as one.
        moves = {*given.get("strides", ()), given.get("group", 1)} != {1} or any(
            given.get("pads", ())
        )
        return 0 if moves or any(size != 1 for size in weights[2:]) else weights[1]
    return weights[-1 if given.get("transB") else -2]


def _compressed(layout: Layout, name: str) -> bool:
    """Whether a tensor is dequantised integers, moved about at most."""
    node = layout.source(name)
    while node is not None and node.op_type in _MOVES | _SCALES:
        if node.op_type == "Cast" and _is_integer(layout.constant(node.input[0])):
            return True
        node = layout.source(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _is_integer(values: Array | None) -> bool:
    return values is not None and (values.dtype.kind in "iu" or "int4" in values.dtype.name)


def _quantised(layout: Layout, rows: dict[int, int], group: int | None) -> onnx.ModelProto:
    shapes = surgery.shapes(layout.model)
    editor = Editor(layout.model)
    made: dict[str, str] = {}  # several products may read one tensor
    for index, node in enumerate(layout.nodes):
        if index not in rows:
            editor.copy(node)
            continue
        x = node.input[0]
        if x not in made:
            rank = len(shapes[node.input[1]]) if node.op_type == "Conv" else 0
            last = (0, *range(2, rank), 1)
            read = editor.add("Transpose", x, perm=last) if rank else x
            rounded = _rounded(editor, read, rows[index], group or rows[index])
            back = np.argsort(last).tolist()
            made[x] = editor.add("Transpose", rounded, perm=back) if rank else rounded
        editor.copy(node)
        editor.model.graph.node[-1].input[0] = made[x]
    return editor.model


def _rounded(editor: Editor, x: str, row: int, group: int) -> str:
    """A tensor on 255 values around 0 in each group, the last of a row a shorter one.

    The largest of a group is 127.
    """
    count = -(-row // group)
    apart = editor.add("Reshape", x, editor.constant([-1, row], np.int64))
    if short := count * group - row:
        apart = editor.add("Pad", apart, editor.constant([0, 0, 0, short], np.int64))
    apart = editor.add("Reshape", apart, editor.constant([-1, count, group], np.int64))
    largest = _largest(editor, editor.add("Abs", apart))
    scale = editor.add("Div", largest, editor.constant(127))
    # What is all zeros stays so.
    some = editor.add("Max", scale, editor.constant(np.finfo(np.float32).tiny))
    steps = editor.add("Round", editor.add("Mul", apart, editor.add("Reciprocal", some)))
    made = editor.add("Mul", steps, scale)
    if short:
        made = editor.add("Reshape", made, editor.constant([-1, count * group], np.int64))
        ends = (editor.constant([value], np.int64) for value in (0, row, 1))
        made = editor.add("Slice", made, *ends)
    return editor.add("Reshape", made, editor.add("Shape", x))


def _largest(editor: Editor, values: str) -> str:
    if surgery.opset(editor.model) < 18:
        return editor.add("ReduceMax", values, axes=[-1], keepdims=1)
    return editor.add("ReduceMax", values, editor.constant([-1], np.int64), keepdims=1)


NOISE = Cause(
    id="precision.int8_dynamic",
    type="data precision",
    title="Products with compressed weights read activations quantised to 8 bits as they come",
    cause=(
        "Where weights have 4 or 8 bits, kernels multiply integers if activations are integers "
        "too: runtimes quantise those while the model runs, group by group, unless told not to. "
        "The file says nothing of it."
    ),
    applies=(
        "MatMul, Gemm and Conv of one pixel, of float32 with weights that DequantizeLinear makes "
        "of integer constants, and com.microsoft.MatMulNBits; operator set 13 or later"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, data precision; OpenVINO documentation, "
        "`ov::hint::dynamic_quantization_group_size`; ONNX Runtime, ContribOperators.md, "
        "MatMulNBits, accuracy_level"
    ),
    advice="keep activations in floating point where weights are compressed",
    remedies={
        "ov": "set DYNAMIC_QUANTIZATION_GROUP_SIZE to 0",
        "ort": (
            "remove accuracy_level from MatMulNBits; where ONNX Runtime makes it of a "
            "DequantizeLinear, set session.qdq_matmulnbits_accuracy_level to 1"
        ),
    },
    ablations={
        "ov": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"},
        "ort": {"session.qdq_matmulnbits_accuracy_level": "1"},
    },
    forms=tuple(map(_name, _GROUPS)),
    variants=_variants,
)
