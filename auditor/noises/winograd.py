"""3x3 convolutions by Winograd's minimal filtering, with transformed operands in half precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from auditor.graphs import surgery
from auditor.noises import bf16, fp16
from auditor.noises._cause import Cause
from auditor.ports import Array, SegmentGraph, Variant
from auditor.replays import kernel_layout
from auditor.replays.editor import Editor
from auditor.replays.writer import Format

# Cast knows bfloat16 from here on.
_OPSET = 13


@dataclass(frozen=True, slots=True)
class _Algorithm:
    """F(m×m, 3×3): m×m outputs of a 3x3 filter from a tile of (m + 2)×(m + 2) inputs.

    Attributes:
        size: m.
        data, filter, inverse: Bᵀ, G times ``divisor``, and Aᵀ of Lavin and Gray, sec. 4. They are
            integers, so that transforming half-precision operands is exact but for one division.
    """

    size: int
    data: Array
    filter: Array
    divisor: int
    inverse: Array

    @property
    def name(self) -> str:
        """The name of the algorithm in the literature."""
        return f"F({self.size}x{self.size}, 3x3)"

    @property
    def tile(self) -> int:
        """Width of a tile of inputs."""
        return self.size + 2


_ALGORITHMS = (
    _Algorithm(
        2,
        np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
        np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]),
        2,
        np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    ),
    _Algorithm(
        4,
        np.array(
            [
                [4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ]
        ),
        np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]),
        24,
        np.array(
            [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
        ),
    ),
)
_FORMATS = (fp16.FORMAT, bf16.FORMAT)


def _name(algorithm: _Algorithm, to: Format) -> str:
    return f"{algorithm.name}, transformed operands in {to.name}, sums in float32"


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with every convolution that can be by each algorithm, in each format."""
    model = segment.model
    if surgery.opset(model) < _OPSET:
        return
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    found = {
        i: shapes[n.input[1]]
        for i, n in surgery.find(model, ("Conv",))
        if _applies(n, shapes.get(n.input[1], ()))
    }
    if not found:
        return
    types = surgery.types(model)
    halves = all(types.get(model.graph.node[i].input[0]) == TensorProto.FLOAT16 for i in found)
    for to in _formats(segment, halves=halves):
        written = any(k.output_precision in to.stated for k in segment.kernels)
        for algorithm in _ALGORITHMS:
            editor = Editor(model)
            for index, node in enumerate(model.graph.node):
                if index in found:
                    kind = types.get(node.output[0], TensorProto.FLOAT)
                    filters, channels, *_ = found[index]
                    value = _convolution(editor, node, (filters, channels), algorithm, to)
                    editor.cast(
                        _rounded(editor, value, to) if written else value, kind, node.output[0]
                    )
                else:
                    editor.copy(node)
            yield Variant(_name(algorithm, to), editor.model)


def _applies(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    given = surgery.attributes(node)
    return (
        len(shape) == 4
        and shape[2:] == (3, 3)
        and given.get("group", 1) == 1
        and all(v == 1 for name in ("strides", "dilations") for v in given.get(name, ()))
    )


def _formats(segment: SegmentGraph, *, halves: bool) -> Iterator[Format]:
    """What the operands may be narrowed to: what the tensors or kernels are, if they say so."""
    said = [f for f in _FORMATS if kernel_layout.stated(segment.kernels, f.stated)]
    if halves:
        yield fp16.FORMAT
    elif said or any(k.precision for k in segment.kernels):
        yield from said
    else:
        yield from _FORMATS


def _convolution(
    editor: Editor, node: onnx.NodeProto, shape: tuple[int, int], by: _Algorithm, to: Format
) -> str:
    """A convolution in float32 but for its transformed operands; returns [N, filters, H, W]."""
    filters, channels = shape
    size, tile = by.size, by.tile
    given = surgery.attributes(node)
    same = given.get("auto_pad", "NOTSET").startswith("SAME")  # one cell at each end of a 3x3
    top, left, bottom, right = [1] * 4 if same else given.get("pads", [0] * 4)
    x, w = (
        _rounded(editor, editor.cast(n, TensorProto.FLOAT), to)
        for n in (node.input[0], node.input[1])
    )
    area = _part(editor, editor.add("Shape", x), 2, 4)
    planes = editor.add("Reshape", x, _joined(editor, [-1, 1], area))
    # Every tile, transformed; one that reaches past the edge sees zeros there.
    tiles = editor.add(
        "Conv",
        planes,
        editor.constant(np.kron(by.data, by.data).reshape(-1, 1, tile, tile)),
        strides=[size, size],
        pads=[top, left, bottom + size - 1, right + size - 1],
    )
    counts = _part(editor, editor.add("Shape", tiles), 2, 4)
    data = editor.add("Reshape", tiles, _integers(editor, [0, tile**2, -1]))
    data = editor.add("Transpose", data, perm=[1, 0, 2])
    total = _part(editor, editor.add("Shape", data), 2, 3)
    data = editor.add("Reshape", data, _joined(editor, [tile**2, -1, channels], total))
    taps = editor.add("Reshape", w, _integers(editor, [-1, 9]))
    weights = editor.add("MatMul", taps, editor.constant(np.kron(by.filter, by.filter).T))
    weights = editor.add("Div", weights, editor.constant(by.divisor**2))
    weights = editor.add("Transpose", weights, perm=[1, 0])
    weights = editor.add("Reshape", weights, _integers(editor, [tile**2, 1, filters, channels]))
    products = editor.add("MatMul", _rounded(editor, weights, to), _rounded(editor, data, to))
    flat = editor.add("Reshape", products, _integers(editor, [tile**2, -1]))
    values = editor.add("MatMul", editor.constant(np.kron(by.inverse, by.inverse)), flat)
    values = editor.add("Reshape", values, _joined(editor, [size, size, -1, filters], counts))
    values = editor.add("Transpose", values, perm=[2, 3, 4, 0, 5, 1])
    covered = editor.add("Mul", counts, _integers(editor, [size, size]))
    values = editor.add("Reshape", values, _joined(editor, [-1, filters], covered))
    end = editor.add("Add", area, _integers(editor, [top + bottom - 2, left + right - 2]))
    axes = _integers(editor, [2, 3])
    values = editor.add("Slice", values, _integers(editor, [0, 0]), end, axes)
    if len(node.input) > 2 and node.input[2]:
        column = editor.add("Reshape", node.input[2], _integers(editor, [-1, 1, 1]))
        values = editor.add("Add", values, editor.cast(column, TensorProto.FLOAT))
    return values


def _rounded(editor: Editor, value: str, to: Format) -> str:
    assert to.cast is not None
    return editor.cast(editor.cast(value, to.cast), TensorProto.FLOAT)


def _integers(editor: Editor, values: list[int]) -> str:
    return editor.constant(values, np.int64)


def _part(editor: Editor, shape: str, first: int, end: int) -> str:
    return editor.add("Slice", shape, _integers(editor, [first]), _integers(editor, [end]))


def _joined(editor: Editor, sizes: list[int], rest: str) -> str:
    return editor.add("Concat", _integers(editor, sizes), rest, axis=0)


NOISE = Cause(
    id="implementation.winograd",
    type="operator implementation",
    title="A 3x3 convolution is computed by Winograd's algorithm in half precision",
    cause=(
        "Libraries trade multiplications for additions in 3x3 convolutions; the transformed "
        "operands span a wider range than the tensors, and rounding those loses more than "
        "rounding the tensors does."
    ),
    applies=(
        "Conv of constant 3x3 filters with stride, dilation and group 1, of float16 tensors or "
        "where the engine reports half precision or nothing; operator set 13 or later. In "
        "float32 what the algorithm loses is at the level of FP32 rounding"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), sec. 3.2, operator implementation; Lavin and Gray, "
        "Fast Algorithms for Convolutional Neural Networks (2016), sec. 4; NVIDIA cuDNN API, "
        "cudnnConvolutionFwdAlgo_t"
    ),
    advice="choose a direct or GEMM convolution for the listed layers, or run them in float32",
    remedies={
        "ort": "set cudnn_conv_algo_search to DEFAULT (implicit GEMM) on the CUDA provider",
        "tvm": "tune or schedule the listed layers without the Winograd schedules",
    },
    forms=tuple(_name(algorithm, to) for to in _FORMATS for algorithm in _ALGORITHMS),
    variants=_variants,
)
