"""Integer products that are exact on every processor.

MLAS, ONNX Runtime's kernels, multiplies uint8 by int8 with VPMADDUBSW where an x86 processor has
no VNNI: two products are added in 16 bits, and the sum is clipped. The operators' meaning is exact,
and so is what the same kernels make of uint8 weights: 128 added to an integer and to its zero point
leaves every product as it is.
Source: Intel SDM vol. 2, PMADDUBSW; ONNX Runtime documentation, Quantize ONNX models (U8S8, U8U8).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import surgery, weights
from auditor.graphs.segments import bodies_of
from auditor.ports import Array

# Set as a node's doc_string: leave it to this processor's kernels.
KERNEL = "auditor: computed as this processor's kernels do"
# In the same place, before a number: run on so many threads, 0 for as many as the engine takes.
_THREADS = "auditor: on so many threads: "
# Operators whose result depends on it: each thread quantises its part of the batch by its range.
_OWN = "com.microsoft"
_BY_THREAD = frozenset(((_OWN, "DynamicQuantizeLSTM"),))
# Where operators have their weights, these weights' zero point, and the zero point of what they
# multiply, which int8 × int8 is told by; None where uint8 weights suit both.
_Operands = tuple[tuple[int, int, int | None], ...]
_OPERANDS: dict[tuple[str, str], _Operands] = {
    ("", "MatMulInteger"): ((1, 3, None),),
    ("", "ConvInteger"): ((1, 3, None),),
    ("", "QLinearConv"): ((3, 5, 2),),
    ("", "QLinearMatMul"): ((3, 5, 2),),
    (_OWN, "MatMulIntegerToFloat"): ((1, 5, None),),
    (_OWN, "DynamicQuantizeMatMul"): ((1, 3, None),),
    (_OWN, "QGemm"): ((3, 5, 2),),
    (_OWN, "QAttention"): ((1, 7, 6),),
    (_OWN, "DynamicQuantizeLSTM"): ((1, 9, None), (2, 11, None)),
}
# Bytes of weights that a model takes in; a message of protobuf ends at 2 GiB.
_HELD = 2**30


def _operands(node: onnx.NodeProto) -> _Operands:
    """Where an integer product has its weights; empty for other operators."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return _OPERANDS.get((domain, node.op_type), ())


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's kernels clip sums of uint8 × int8 on this processor, by trying."""
    import onnxruntime as ort

    shapes = {"a": (TensorProto.UINT8, [1, 4]), "y": (TensorProto.INT32, [1, 16])}
    a, y = (helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items())
    w = numpy_helper.from_array(np.full((4, 16), 127, np.int8), "w")
    node = helper.make_node("MatMulInteger", ["a", "w"], ["y"])
    model = helper.make_model(
        helper.make_graph([node], "g", [a], [y], [w]),
        opset_imports=[helper.make_opsetid("", 10)],
        ir_version=5,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"a": np.full((1, 4), 255, np.uint8)})
    return bool((found != 4 * 255 * 127).any())


def concerns(model: onnx.ModelProto) -> bool:
    """Whether a model has products that this processor's kernels may clip."""
    return any(map(_clips, _nodes(model.graph))) and saturates()


def exact(model: onnx.ModelProto, folder: Path | None = None) -> onnx.ModelProto:
    """The model with uint8 weights where this processor clips sums of products with int8 ones.

    Args:
        model: any model; it is left alone.
        folder: where the files of its detached weights are.

    Returns:
        The model itself where nothing clips.
    """
    if not concerns(model):
        return model
    changed = surgery.copied(model)
    kinds = surgery.types(model)
    _Exact(kinds, folder).change(changed.graph, {})
    return changed


def kernels(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy that is computed as this processor's kernels do; None where that is the same."""
    if not concerns(model):
        return None
    changed = surgery.copied(model)
    for node in filter(_clips, _nodes(changed.graph)):
        node.doc_string += KERNEL
    return changed


def threaded(model: onnx.ModelProto, threads: int) -> onnx.ModelProto | None:
    """A copy that runs on so many threads; None where no result depends on their number."""
    if threads == 1 or not any(map(_by_thread, _nodes(model.graph))):
        return None
    changed = surgery.copied(model)
    for node in filter(_by_thread, _nodes(changed.graph)):
        node.doc_string += f"{_THREADS}{threads} "
    return changed


def threads(model: onnx.ModelProto) -> int | None:
    """The threads that ``threaded`` asks for, if it does."""
    said = (n.doc_string for n in _nodes(model.graph) if _THREADS in n.doc_string)
    return next((int(text.split(_THREADS)[1].split()[0]) for text in said), None)


def _by_thread(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) in _BY_THREAD and _THREADS not in node.doc_string


def _clips(node: onnx.NodeProto) -> bool:
    return bool(_operands(node)) and KERNEL not in node.doc_string


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of those inside."""
    for node in graph.node:
        yield node
        for inner in bodies_of(node):
            yield from _nodes(inner)


class _Exact:
    """Makes int8 weights of integer products uint8, in a copy."""

    def __init__(self, kinds: dict[str, int], folder: Path | None) -> None:
        self._kinds, self._folder = kinds, folder
        self._held = self._count = 0

    def change(self, graph: onnx.GraphProto, outer: dict[str, onnx.TensorProto]) -> None:
        """Change a graph in place; ``outer``: the constants that it sees of graphs around it."""
        given = {value.name for value in graph.input}
        seen = {name: t for name, t in outer.items() if name not in given}
        seen |= {t.name: t for t in graph.initializer if t.name not in given}
        nodes = list(graph.node)
        del graph.node[:]
        for node in nodes:
            for inner in bodies_of(node):
                self.change(inner, seen)
            for operand in _operands(node) if _clips(node) else ():
                self._operand(graph, node, seen, operand)
            graph.node.append(node)

    def _operand(
        self,
        graph: onnx.GraphProto,
        node: onnx.NodeProto,
        seen: dict[str, onnx.TensorProto],
        operand: tuple[int, int, int | None],
    ) -> None:
        at, zero_at, multiplied = operand
        if self._kind(node.input[at], seen) != TensorProto.INT8:
            return
        if multiplied is not None:
            other = node.input[multiplied] if len(node.input) > multiplied else ""
            if other and self._kind(other, seen) != TensorProto.UINT8:
                return
        while len(node.input) <= zero_at:
            node.input.append("")
        node.input[at] = self._unsigned(graph, node.input[at], seen)
        if node.input[zero_at]:
            node.input[zero_at] = self._unsigned(graph, node.input[zero_at], seen)
        else:
            node.input[zero_at] = self._constant(graph, np.asarray(128, np.uint8))

    def _kind(self, name: str, seen: dict[str, onnx.TensorProto]) -> int:
        return seen[name].data_type if name in seen else self._kinds.get(name, 0)

    def _unsigned(
        self, graph: onnx.GraphProto, name: str, seen: dict[str, onnx.TensorProto]
    ) -> str:
        """What int8 integers are as uint8, 128 above."""
        if (values := self._values(seen.get(name))) is not None:
            return self._constant(graph, values.view(np.uint8) ^ np.uint8(128))
        wide, moved, made = (self._name() for _ in range(3))
        offset = self._constant(graph, np.asarray(128, np.int32))
        graph.node.extend(
            (
                helper.make_node("Cast", [name], [wide], to=TensorProto.INT32),
                helper.make_node("Add", [wide, offset], [moved]),
                helper.make_node("Cast", [moved], [made], to=TensorProto.UINT8),
            )
        )
        return made

    def _values(self, tensor: onnx.TensorProto | None) -> Array | None:
        """A constant's values, unless they are too many to take in."""
        if tensor is None or self._held + weights.size_of(tensor) > _HELD:
            return None
        if not weights.is_detached(tensor):
            values = numpy_helper.to_array(tensor)
        elif self._folder is not None:
            values = weights.mapped(tensor, self._folder)
        else:
            return None
        self._held += values.nbytes
        return values

    def _constant(self, graph: onnx.GraphProto, values: Array) -> str:
        name = self._name()
        graph.initializer.append(numpy_helper.from_array(np.array(values, order="C"), name))
        return name

    def _name(self) -> str:
        self._count += 1
        return f"~unsigned/{self._count}"
