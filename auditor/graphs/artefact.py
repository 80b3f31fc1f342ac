"""Where the compiled file's constants differ from the reference model's, and in what way.

A file that is compiled instead of the reference (``--candidate``) may store its weights in fewer
bits, or be another model. Both show in its constants before anything runs. What they do to a
segment is still measured: it is replayed with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from auditor.graphs import packed, surgery
from auditor.graphs.storage import in_blocks, pieces, rounds, storage_of
from auditor.graphs.weights import attach
from auditor.ports import Array, Arrays, CompiledConstant, SegmentGraph, Storage, Variant

if TYPE_CHECKING:
    from auditor.graphs.model import Model

_FOLDED = 1e-5  # of a constant's largest value
_GRIDS = ("8 bits", "4 bits")
# A scaled constant is said to be one when this fraction of its square norm is explained by it.
_SCALED = 1 - 1e-6


def changed(
    reference: Model, compiled: Model, rename: Mapping[str, str]
) -> dict[str, CompiledConstant]:
    """The reference's constants that the compiled file has otherwise, by the reference's names.

    Constants correspond when they have the same name, or are the same input of corresponding
    nodes; a dequantised constant counts as its real values. Those of another shape, and those
    computed by other operators, are left out.

    Args:
        reference: the reference model.
        compiled: the model that the backends compile.
        rename: the compiled model's tensor names → the reference's.
    """
    ours, theirs = _Constants(reference), _Constants(compiled)
    found: dict[str, CompiledConstant] = {}
    for name, other in _pairs(ours, theirs, rename):
        if name in found:
            continue
        original, value = ours.value(name), theirs.value(other)
        if original is None or value is None or value.shape != original.shape:
            continue
        value = value.astype(original.dtype, copy=False)
        if not np.array_equal(original, value, equal_nan=original.dtype.kind == "f"):
            constant = _compared(original, value)
            storage = constant.storage or theirs.rounds(other, original)
            found[name] = replace(constant, storage=storage, quantised=storage in _GRIDS)
    return found


def held(
    reference: Model, values: Mapping[str, Array], *, quantised: bool = False
) -> dict[str, CompiledConstant]:
    """The engine's own constants that differ from the reference's of the same name.

    ``quantised`` says that the engine's side had the reference quantised.
    """
    ours = _Constants(reference)
    found: dict[str, CompiledConstant] = {}
    for name, stored in values.items():
        original = ours.value(name) if name in ours else None
        if original is None or original.shape != stored.shape:
            continue
        value = stored.astype(original.dtype, copy=False)
        if not np.array_equal(original, value, equal_nan=original.dtype.kind == "f"):
            found[name] = replace(_compared(original, value), quantised=quantised)
    return found


def trained(reference: Model, values: Mapping[str, Array]) -> dict[str, CompiledConstant]:
    """The reference's constants that differ in the module which the model was exported from.

    Args:
        reference: the reference model.
        values: the module's own, by the reference's names, in their own types.
    """
    ours = _Constants(reference)
    found: dict[str, CompiledConstant] = {}
    for name, own in values.items():
        exported = ours.value(name) if name in ours else None
        if exported is None or exported.shape != own.shape or exported.dtype.kind != "f":
            continue
        exported = exported.astype(own.dtype, copy=False)
        # The last bits are the exporter's, which folds a normalisation into a convolution.
        if np.abs(exported - own).max(initial=0) > _FOLDED * np.abs(own).max(initial=0):
            found[name] = replace(_compared(own, exported), values=own)
    return found


def sentences_of_trained(segment: SegmentGraph) -> tuple[str, ...]:
    """What there is to say of a segment's constants that the export changed."""
    names = sorted(held_by(segment.model) & segment.trained.keys())
    return tuple(
        _sentence("file", name, segment.trained[name], "module", "the module's in")
        for name in names
    )


def held_by(model: onnx.ModelProto) -> set[str]:
    """Names of a segment's constants."""
    nodes = (n.output[0] for n in model.graph.node if n.op_type == "Constant")
    return {*(t.name for t in model.graph.initializer), *nodes}


# What a quantiser's choices make of a segment, as ``quantised`` calls it.
_CHOSEN = ", as the quantiser chose"
_WHERE = {"": (True, False), ", with results": (True, True), ", results only": (False, True)}
# QuantizeLinear exists from here on.
_BYTES_OPSET = 10
CHOSEN_OF_BOTH = tuple(f"both{where}{_CHOSEN}" for where in _WHERE)
CHOSEN_FORMS = (
    f"weights{_CHOSEN}",
    *(f"activations{where}{_CHOSEN}" for where in _WHERE),
    *CHOSEN_OF_BOTH,
)


def variants(segment: SegmentGraph, storage: Storage) -> Iterator[Variant]:
    """The segment with those constants of the compiled file that store the model's in a format."""
    if segment.grids and storage == "8 bits":
        for what, model in quantised(segment).items():
            yield Variant(what + _CHOSEN, model)
        return
    values = {n: c.values for n, c in segment.compiled.items() if c.storage == storage}
    changed = replaced(segment.model, values)
    if changed is not None:
        yield Variant(form(storage), changed)


def quantised(segment: SegmentGraph) -> dict[str, onnx.ModelProto]:
    """A segment with what a quantiser chose: its weights, its activations, and both.

    Activations are rounded where nodes read them; with results, also those that leave it; results
    only, not those inside it, as OpenVINO leaves out the rounding between a product and a sum.
    """
    chosen = {
        n: c.values for n, c in segment.compiled.items() if c.quantised or c.storage in _GRIDS
    }
    weights = replaced(segment.model, chosen)
    found = {}
    for what, base in (("weights", weights), ("activations", segment.model), ("both", weights)):
        if what == "weights" and base is not None:
            found[what] = base
        elif what != "weights" and base is not None:
            for where, (inside, results) in _WHERE.items():
                made = _on_their_grids(base, segment.grids, inside=inside, results=results)
                if made is not None and made not in found.values():
                    found[what + where] = made
    return found


def _on_their_grids(
    model: onnx.ModelProto, grids: Mapping[str, Array], *, inside: bool, results: bool
) -> onnx.ModelProto | None:
    """A copy whose tensors are rounded to their grids; None where none has one.

    Args:
        model: a segment.
        grids: by tensor.
        inside: also what nodes make and others of the segment read.
        results: also what leaves it.
    """
    made = surgery.copied(model)
    graph = made.graph
    finals = {o.name for o in graph.output}
    read = {n for node in graph.node for n in node.input}
    nodes = list(graph.node)
    del graph.node[:]
    integers = surgery.opset(model) >= _BYTES_OPSET
    renamed: dict[str, str] = {}

    def round_for_readers(name: str) -> None:
        renamed[name] = f"{name}/rounded"
        _add_rounding(graph, grids[name], name, renamed[name], integers=integers)

    for value in graph.input:
        if value.name in grids and value.name in read:
            round_for_readers(value.name)
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        graph.node.append(node)
        for i, name in enumerate(node.output):
            if name not in grids:
                continue
            if name in finals and results:
                plain = graph.node[-1].output[i] = f"{name}/plain"
                _add_rounding(graph, grids[name], plain, name, integers=integers)
            elif name in read and inside:
                round_for_readers(name)
    return made if len(graph.node) > len(nodes) else None


def _add_rounding(
    graph: onnx.GraphProto, grid: Array, source: str, to: str, *, integers: bool
) -> None:
    """Add nodes to a graph that round a tensor to its grid.

    Args:
        graph: the nodes are appended to it.
        grid: the smallest value, the largest and how many.
        source: the tensor.
        to: the rounded one.
        integers: whether 8-bit grids may be written with QuantizeLinear, which forms that read
            integers look for.
    """
    low, high, levels = grid
    step = np.maximum((high - low) / (levels - 1), np.finfo(np.float32).tiny)
    first, last = np.rint(low / step), np.rint(high / step)
    constants: Arrays = {"step": np.asarray(step, np.float32)}
    steps: tuple[tuple[str, tuple[str, ...], str], ...]
    if integers and step.size == 1 and last - first == 255 and -255 <= first <= 0:
        constants["step"] = constants["step"].reshape(())
        constants["zero"] = np.asarray(-first, np.uint8).reshape(())
        steps = (
            ("QuantizeLinear", (source, f"{to}/step", f"{to}/zero"), f"{to}/whole"),
            ("DequantizeLinear", (f"{to}/whole", f"{to}/step", f"{to}/zero"), to),
        )
    else:
        constants["low"] = np.asarray(first, np.float32)
        constants["high"] = np.asarray(last, np.float32)
        steps = (
            ("Div", (source, f"{to}/step"), f"{to}/steps"),
            ("Round", (f"{to}/steps",), f"{to}/whole"),
            ("Max", (f"{to}/whole", f"{to}/low"), f"{to}/above"),
            ("Min", (f"{to}/above", f"{to}/high"), f"{to}/within"),
            ("Mul", (f"{to}/within", f"{to}/step"), to),
        )
    graph.initializer.extend(
        numpy_helper.from_array(value, f"{to}/{key}") for key, value in constants.items()
    )
    graph.node.extend(helper.make_node(kind, list(given), [out]) for kind, given, out in steps)


def others(constants: Mapping[str, CompiledConstant]) -> Arrays:
    """The values of those constants that are no rounding of the reference's."""
    return {n: c.values for n, c in constants.items() if c.storage is None and not c.quantised}


def form(storage: Storage) -> str:
    """Name of such a variant."""
    return f"constants as the compiled file stores them, in {storage}"


def replaced(model: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto | None:
    """A copy of a segment with other constants; None where it has none of these."""
    kept = {t.name: i for i, t in enumerate(model.graph.initializer)}
    nodes = {n.output[0]: i for i, n in surgery.find(model, ("Constant",))}
    if values.keys().isdisjoint(kept.keys() | nodes.keys()):
        return None
    result = surgery.copied(model)
    for name, value in values.items():
        if name in kept:
            tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
            result.graph.initializer[kept[name]].CopyFrom(tensor)
        elif name in nodes:
            tensor = numpy_helper.from_array(np.ascontiguousarray(value))
            node = result.graph.node[nodes[name]]
            del node.attribute[:]
            surgery.set_attributes(node, value=tensor)
    return result


def sentence(name: str, constant: CompiledConstant) -> str:
    """What there is to say of one changed constant."""
    return _sentence("compiled file", name, constant, "model", "the same values stored in")


def _sentence(holder: str, name: str, constant: CompiledConstant, of: str, rounded: str) -> str:
    how = ""
    if constant.storage:
        how = f": {rounded} {constant.storage}"
    elif constant.factor is not None:
        how = f": {constant.factor:.6g} times the {of}'s"
    return (
        f"the {holder}'s constant `{name}` differs from the {of}'s by "
        f"{constant.relative_l2:.1e} relative L2{how}"
    )


class _Constants:
    """A model's constants by name."""

    def __init__(self, model: Model) -> None:
        self._arrays = model.weights
        self._tensors = {t.name: t for t in model.proto.graph.initializer}
        self.nodes = {o: n for n in model.proto.graph.node for o in n.output if o}
        for node in model.proto.graph.node:
            self._name_dequantised(node)

    def _name_dequantised(self, node: onnx.NodeProto) -> None:
        """Write what quantisers make of layers as reading constants that are dequantised."""
        made: dict[int, onnx.NodeProto] = {}
        if node.op_type == "DequantizeLinear":
            reader = self.nodes.get(node.input[0])
            if reader is None or reader.op_type != "Gather" or reader.input[0] not in self._tensors:
                return
            made[0] = helper.make_node(node.op_type, [reader.input[0], *node.input[1:]], [""])
        elif node.op_type == "DynamicQuantizeLSTM":  # the axes of its weights are swapped
            reader = helper.make_node("LSTM", list(node.input[:8]), list(node.output))
            for position, first in ((1, 8), (2, 10)):
                inputs = [node.input[position], *node.input[first : first + 2]]
                made[position] = helper.make_node("DequantizeLinear", inputs, [""])
                surgery.set_attributes(made[position], axis=0, perm=[0, 2, 1])
        elif packed.is_packed(node):
            reader = helper.make_node("MatMul", list(node.input[:2]), list(node.output))
            made[1] = node
        else:
            return
        whole = surgery.copied(reader)
        for position, constant in made.items():
            name = f"{reader.input[position]}, dequantised"
            self.nodes[name] = constant
            whole.input[position] = name
        self.nodes.update((o, whole) for o in node.output if o)

    def __contains__(self, name: str) -> bool:
        node = self.nodes.get(name)
        if node is None:
            return name in self._tensors
        quantised = node.op_type == "DequantizeLinear" and all(n in self for n in node.input)
        return node.op_type == "Constant" or quantised or packed.is_packed(node)

    def names(self) -> Iterator[str]:
        """Every initialiser and Constant."""
        yield from self._tensors
        yield from (o for o, n in self.nodes.items() if n.op_type == "Constant")

    def value(self, name: str) -> Array | None:
        """A constant's values, dequantised ones included; None for what is computed otherwise."""
        if name in self._arrays:
            return self._arrays[name]
        if name in self._tensors:
            return numpy_helper.to_array(attach(self._tensors[name], self._arrays))
        node = self.nodes[name]
        if packed.is_packed(node):
            blocks = packed.unpacked(node, self.value)
            return None if blocks is None else blocks.values()
        if node.op_type == "Constant":
            tensor = surgery.attributes(node).get("value")
            return None if tensor is None else numpy_helper.to_array(tensor)
        return self._dequantised(node)

    def rounds(self, name: str, original: Array) -> Storage | None:
        """The bits of a dequantised constant whose steps are the nearest to other values.

        The ends of the grid may be farther from theirs. None where it does not, and for others.
        """
        node = self.nodes.get(name)
        if node is None or original.dtype.kind != "f":
            return None
        if packed.is_packed(node):
            blocks = packed.unpacked(node, self.value)
            if blocks is None or (blocks.inputs, blocks.outputs) != original.shape:
                return None
            axis, block, bits = 0, blocks.integers.shape[1], blocks.bits
            scale = blocks.scales.reshape(blocks.outputs, -1).T
            value, step = blocks.values(), scale.repeat(block, axis=0)[: blocks.inputs]
        elif node.op_type == "DequantizeLinear":
            integers, scales = (self.value(n) for n in node.input[:2])
            dequantised = self._dequantised(node)
            if integers is None or scales is None or dequantised is None:
                return None
            given = surgery.attributes(node)
            laid = _along(scales, integers, given)
            if dequantised.shape != original.shape or laid is None:
                return None
            value, step = dequantised, laid
            axis, block = given.get("axis", 1), given.get("block_size", 0)
            bits = 4 if "int4" in integers.dtype.name else 8
        else:
            return None
        above = np.asarray((original - value) / np.abs(step))
        if block:
            above, value = (in_blocks(v, axis, block) for v in (above, value))
        else:
            above, value = above.ravel(), value.ravel()
        if not rounds(above, value).all():
            return None
        return "4 bits" if bits <= 4 else "8 bits"

    def _dequantised(self, node: onnx.NodeProto) -> Array | None:
        given = surgery.attributes(node)
        integers, scale, *zero = (self.value(name) for name in node.input)
        if integers is None or scale is None:
            return None
        steps = _along(scale, integers, given)
        if steps is None:
            return None
        value = integers.astype(np.int32)
        if zero and zero[0] is not None:
            starts = _along(zero[0].astype(np.int32), integers, given)
            if starts is None:
                return None
            value = value - starts
        value = np.asarray(value * steps)
        return value.transpose(given["perm"]) if "perm" in given else value


def _along(scale: Array, integers: Array, given: Mapping[str, Any]) -> Array | None:
    """Scales or zeros of a DequantizeLinear, laid out as its integers; None if they do not fit."""
    axis, block = given.get("axis", 1), given.get("block_size", 0)
    if block:
        if scale.ndim != integers.ndim:
            return None
        return scale.repeat(block, axis).take(range(integers.shape[axis]), axis)
    across = [1] * integers.ndim
    if scale.size > 1:
        across[axis] = -1
        if scale.size != integers.shape[axis]:
            return None
    return scale.reshape(across)


def _pairs(
    ours: _Constants, theirs: _Constants, rename: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Corresponding constants: the reference's name, then the compiled file's."""
    yield from ((name, name) for name in ours.names() if name in theirs)
    for output, node in theirs.nodes.items():
        mine = ours.nodes.get(rename.get(output, ""))
        if mine is None or mine.op_type != node.op_type:
            continue
        for name, other in zip(mine.input, node.input, strict=False):
            if name and other and name != other and name in ours and other in theirs:
                yield name, other


def _compared(original: Array, value: Array) -> CompiledConstant:
    if original.dtype.kind != "f":
        same = float(np.mean(original != value))
        return CompiledConstant(value, same, None, None)
    square = product = error = 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # a value may be infinite
        for a, b in _wide(original, value):
            square += float(np.dot(a, a))
            product += float(np.dot(a, b))
            error += float(np.dot(b - a, b - a))
        factor = product / square if square else 0.0
        rest = (b - factor * a for a, b in _wide(original, value))
        left = accumulate(float(np.dot(r, r)) for r in rest)
        scaled = error > 0 and all(so_far <= (1 - _SCALED) * error for so_far in left)
    return CompiledConstant(
        values=value,
        relative_l2=math.sqrt(error / square) if square else math.inf,
        storage=storage_of(original, value),
        factor=factor if scaled else None,
    )


def _wide(original: Array, value: Array) -> Iterator[tuple[Array, Array]]:
    """Pieces of both in double precision."""
    return ((a.astype(np.float64), b.astype(np.float64)) for a, b in pieces(original, value))
