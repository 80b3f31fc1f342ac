"""Which tensor of a compiled graph is which of the model's, and how its values are laid out."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from auditor.ports import Array
from auditor.records.backend import Skipped
from backends._ort_graph import Graph, attribute_of
from backends._shared import node_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx


NCHWC: Final = "com.microsoft.nchwc"

_COPIES: Final = frozenset({"ReorderInput", "ReorderOutput", "Transpose", "Identity"})
_RESHAPES: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_ACTIVATIONS: Final = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})
# Their output has another rank than their input, so a permutation does not pass through.
_RANK_CHANGING: Final = _RESHAPES | {"MatMul", "Gemm", "QGemm", "Shape", "Size"}
# Their output is laid out as what they read; those that work along axes are given others.
_FOLLOWING: Final = _ACTIVATIONS | {
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Neg", "Abs", "Exp", "Log"),
    *("Sqrt", "Erf", "Softplus", "HardSwish", "Gelu", "QuickGelu", "Cast", "Where", "Identity"),
    *("QuantizeLinear", "DequantizeLinear", "Reciprocal", "Sin", "Cos", "Ceil", "Floor", "Round"),
    *("Split", "Slice", "Concat", "Pad", "Softmax", "ReduceMean", "ReduceSum", "ReduceMax"),
}
_KEEP_CHANNELS: Final = (
    _ACTIVATIONS
    | {"BatchNormalization", "Add", "Sum", "Mul", "MaxPool", "AveragePool", "GlobalAveragePool"}
    | {"GlobalMaxPool", "Resize", "Upsample", "Identity", "Dropout"}
)
TOKEN: Final = re.compile(r"(_token_\d+)+$")
_FUSED: Final = 16  # more nodes than one kernel takes over
_SYNTHETIC: Final = re.compile(r"gemm_(in|out)put_reshape_arg")
_CAST_PREFIX: Final = "InsertedPrecisionFreeCast_"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the engine holds a tensor.

    Attributes:
        order: it holds ``transpose(onnx tensor, order)``; None where no axis moved.
        stored: ``plain``, ``blocked`` (NCHWc), or ``flat``: NCHWc reshaped, so that an operator can
            read it when the shape is dynamic.
    """

    order: tuple[int, ...] | None = None
    stored: Literal["plain", "blocked", "flat"] = "plain"


AS_IN_ONNX: Final = Layout()


@dataclass(frozen=True, slots=True)
class _Seat:
    """What a tensor of the compiled graph is in ONNX.

    Attributes:
        name: ONNX name of the tensor.
        copy: the engine moved or re-laid a value that another of its tensors already holds.
    """

    name: str
    layout: Layout
    copy: bool = False


class Names:
    """The ONNX name of each tensor of a compiled graph.

    A tensor keeps its name unless the engine changed its layout or type. The name of a renamed
    one is derived, in this order, from the name of its node, from the node of the original graph
    that reads the same tensors with the same operator, and from the node that reads it.
    """

    def __init__(self, original: Graph, compiled: Graph) -> None:
        self.original = original
        self._compiled = compiled
        self._layouts = _layouts(original, compiled)
        self._made = _made_by_name(original)
        self._by_stem: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in original.nodes:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                for stem in {self._stem(name) for name in original.variables(node)}:
                    self._by_stem[stem].append(node)
        self.seats = {name: _Seat(name, AS_IN_ONNX) for name in compiled.inputs}
        self._original_of: dict[int, onnx.NodeProto] = {}
        known = -1
        while known < len(self.seats):
            known = len(self.seats)
            for node in compiled.nodes:
                self._forward(node)
            for node in reversed(compiled.nodes):
                self._backward(node)
        self.int8 = {
            name
            for node in original.nodes
            if node.op_type == "QuantizeLinear"
            and len(node.input) > 2
            and node.input[2] in original.int8
            for name in node.output
        }

    def observed(self) -> dict[str, str]:
        """Engine tensor that stands for each observable ONNX tensor, in execution order.

        Of two copies it is the one that the other was made of: what a cast to float16 hides from
        some readers, others of the same tensor are handed.
        """
        best: dict[str, tuple[bool, bool, str]] = {}
        for name, seat in self.seats.items():
            known = seat.name in self.original.producer
            if known and seat.layout.stored != "flat" and seat.name not in self.original.constants:
                rounded = self._is_rounded(name, seat)
                rank = (name != seat.name or rounded, seat.copy or rounded, name)
                best[seat.name] = min(best.get(seat.name, rank), rank, key=lambda r: r[:2])
        live = self._compiled.live()
        order = (n for node in self._compiled.nodes for n in node.output if n in live)
        chosen = {engine: onnx_name for onnx_name, (_, _, engine) in best.items()}
        return {chosen[name]: name for name in order if name in chosen}

    def skipped(self) -> Iterator[Skipped]:
        """Tensors of the compiled program that have no counterpart in the ONNX file, or no use."""
        live = self._compiled.live()
        for node in self._compiled.nodes:
            for name in filter(None, node.output):
                if name in self.seats and name not in live:
                    yield Skipped(self.seats[name].name, "nothing in the program depends on it")
                elif (
                    name not in self.seats
                    and name not in self._compiled.constants
                    and not _SYNTHETIC.match(name)
                ):
                    made = "inside an ONNX function" if "_inlfunc_" in name else "by the optimiser"
                    yield Skipped(name, f"made {made} ({node.op_type}); it has no ONNX name")

    # Each rule answers with a name or None: it never guesses between two candidates.

    def _forward(self, node: onnx.NodeProto) -> None:
        for index, name in enumerate(node.output):
            if name and name not in self.seats and name not in self._compiled.constants:
                seat = self._seat(node, index, name)
                if seat is not None:
                    self.seats[name] = seat

    def _seat(self, node: onnx.NodeProto, index: int, name: str) -> _Seat | None:
        layout = self._layouts[name]
        producer = self.original.producer
        if name in producer and layout == AS_IN_ONNX:
            return _Seat(name, layout)
        if name.removeprefix(_CAST_PREFIX) in producer and name.startswith(_CAST_PREFIX):
            return _Seat(name.removeprefix(_CAST_PREFIX), layout)
        plain = TOKEN.sub("", name).replace("/duplicated", "")
        if node.op_type == "DequantizeLinear" and plain != name and plain in producer:
            return _Seat(plain, layout, copy=True)
        source = self.seats.get(node.input[0]) if node.input else None
        inserted_cast = node.op_type == "Cast" and node.name.startswith("Inserted")
        reblocked = node.op_type == "Reshape" and layout.stored != "plain"
        if node.op_type in _COPIES or inserted_cast or reblocked:
            return None if source is None else _Seat(source.name, layout, copy=True)
        derived = self._from_node_name(node) if node.domain == NCHWC else None
        derived = derived or self._from_structure(node, index)
        if derived is None and not self._is_quantised(node):
            # A node that the optimiser copied names its output after itself.
            derived = self._made.get(plain)
        return None if derived is None else _Seat(derived, layout)

    def _from_node_name(self, node: onnx.NodeProto) -> str | None:
        """The NCHWc transformer names a node ``<its output's ONNX name>_nchwc``."""
        stem, found, _ = node.name.rpartition("_nchwc")
        if not found:
            return None
        tensor = _named_by(stem, self.original, self._made)
        if tensor is not None and len(node.input) > 3 and node.input[3]:
            tensor = self._after_sum(tensor, node.input[3])
        return None if tensor is None else _after_activation(tensor, node, self.original)

    def _after_sum(self, tensor: str, addend: str) -> str | None:
        """The Conv took over the Add that followed it; its fourth input is the other addend."""
        seat = self.seats.get(addend)
        sums = [
            node
            for node in self.original.consumers[tensor]
            if node.op_type in ("Add", "Sum") and seat is not None and seat.name in node.input
        ]
        return str(sums[0].output[0]) if len(sums) == 1 else None

    def _after_silu(self, name: str) -> str | None:
        """The Mul of ``x * Sigmoid(alpha * x)``, fused into QuickGelu."""
        seat = self.seats.get(name)
        consumers = [] if seat is None else self.original.consumers[seat.name]
        gated = [
            node
            for node in consumers
            if node.op_type == "Mul" and "Sigmoid" in map(self.original.op_type, node.input)
        ]
        return str(gated[0].output[0]) if len(gated) == 1 else None

    def _from_structure(self, node: onnx.NodeProto, index: int) -> str | None:
        if node.op_type == "QuickGelu":
            return self._after_silu(node.input[0])
        origin = self._origin(node)
        if origin is None or index >= len(origin.output):
            return None
        tensor = str(origin.output[index])
        integers = origin.op_type == node.op_type and _on_integers(node)
        if integers or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return tensor
        if self._is_quantised(node):
            return self._quantised(tensor)
        if origin.op_type == "Conv" and _has_bias(node) and not _has_bias(origin):
            return None  # it took over the sum or the normalisation behind it
        return _after_activation(tensor, node, self.original)

    def _is_rounded(self, name: str, seat: _Seat) -> bool:
        """Whether a tensor is the same one in another type, and no output."""
        node = self._compiled.producer.get(name)
        if node is None or node.op_type != "Cast" or seat.name in self.original.outputs:
            return False
        source = self.seats.get(node.input[0])
        return source is not None and source.name == seat.name

    def _is_quantised(self, node: onnx.NodeProto) -> bool:
        if _on_integers(node):
            return True
        if node.op_type == "QGemm":
            return False
        seats = [self.seats[name] for name in node.input if name in self.seats]
        return any(self.original.op_type(seat.name) == "QuantizeLinear" for seat in seats)

    def _quantised(self, tensor: str) -> str | None:
        """The output of the QuantizeLinear behind ``tensor``, past a fused activation."""
        while True:
            consumers = self.original.consumers[tensor]
            quantised = [n for n in consumers if n.op_type == "QuantizeLinear"]
            if len(quantised) == 1:
                return str(quantised[0].output[0])
            if len(consumers) != 1 or consumers[0].op_type not in _ACTIVATIONS:
                return None
            tensor = consumers[0].output[0]

    def _origin(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The original node that reads the same tensors with the same operator."""
        if id(node) in self._original_of:
            return self._original_of[id(node)]
        reads = self._compiled.variables(node)
        if not reads or any(name not in self.seats for name in reads):
            return None
        names = [self.seats[name].name for name in reads]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            candidates = [n for n in self.original.consumers[names[0]] if n.op_type == node.op_type]
        else:
            stems = sorted(map(self._stem, names))
            candidates = [
                n
                for n in self._by_stem[stems[0]]
                if n.op_type in (node.op_type, _core(node.op_type))
                and sorted(map(self._stem, self.original.variables(n))) == stems
            ]
        origin = self._tie_break(candidates, node)
        if origin is not None:
            self._original_of[id(node)] = origin
        return origin

    def _tie_break(
        self, candidates: list[onnx.NodeProto], node: onnx.NodeProto
    ) -> onnx.NodeProto | None:
        if len(candidates) > 1:
            name = TOKEN.sub("", node.name)
            named = [n for n in candidates if name and n.name == name]
            constants = set(node.input) & self._compiled.constants
            shared = [n for n in candidates if constants & self._constant_sources(n)]
            candidates = named or shared
        return candidates[0] if len(candidates) == 1 else None

    def _constant_sources(self, node: onnx.NodeProto) -> set[str]:
        """Constants a node reads, and those behind their DequantizeLinear."""
        direct = set(node.input) & self.original.constants
        producers = (self.original.producer.get(name) for name in direct)
        return direct.union(*(p.input for p in producers if p is not None))

    def _stem(self, tensor: str) -> str:
        """The tensor behind QuantizeLinear, DequantizeLinear and Identity."""
        skip = ("QuantizeLinear", "DequantizeLinear", "Identity")
        while self.original.op_type(tensor) in skip:
            tensor = self.original.producer[tensor].input[0]
        return tensor

    def _backward(self, node: onnx.NodeProto) -> None:
        """Name the unnamed tensors that ``node`` reads from what it computes."""
        reads = self._compiled.variables(node)
        unnamed = [name for name in reads if name not in self.seats]
        seat = self.seats.get(node_key(node))
        if not unnamed or seat is None:
            return
        if self._moves(node, seat.name):
            self._claim(unnamed[0], seat.name)
            return
        producer = self._first_fused(node, seat.name)
        if producer is not None:
            sources = self.original.variables(producer)
            made_by = self.original.op_type(seat.name)
            if made_by == "QuantizeLinear" != node.op_type:  # it reads what the model dequantises
                sources = [self._before_dequantising(name) for name in sources]
            if len(sources) == len(reads):
                for name, source in zip(reads, sources, strict=True):
                    self._claim(name, source)

    def _before_dequantising(self, tensor: str) -> str:
        made_by = self.original.producer.get(tensor)
        dequantised = made_by is not None and made_by.op_type == "DequantizeLinear"
        return str(made_by.input[0]) if made_by is not None and dequantised else tensor

    def _first_fused(self, node: onnx.NodeProto, result: str) -> onnx.NodeProto | None:
        """The original node of ``node``'s operator, behind what was fused after it."""
        producer = self.original.producer.get(result)
        while producer is not None and producer.op_type != _core(node.op_type):
            behind = self.original.variables(producer)
            producer = self.original.producer.get(behind[0]) if len(behind) == 1 else None
        if producer is not None and node.op_type == "Transpose":
            # A permutation merged with another one moves a different tensor.
            return (
                producer if attribute_of(producer, "perm") == attribute_of(node, "perm") else None
            )
        return producer

    def _moves(self, node: onnx.NodeProto, result: str) -> bool:
        """Whether ``node`` was inserted to move ``result`` without computing anything."""
        made_by = self.original.op_type(result)
        if node.domain == NCHWC:
            return node.op_type in ("ReorderInput", "ReorderOutput") and made_by != "Transpose"
        return (node.op_type == "Transpose" and made_by != "Transpose") or (
            node.op_type in ("Reshape", "Squeeze") and made_by not in _RESHAPES
        )

    def _claim(self, name: str, onnx_name: str) -> None:
        """Give ``name`` its ONNX name; a reshaped one is known but cannot be observed."""
        if name not in self.seats and onnx_name in self.original.producer:
            copy = bool(_SYNTHETIC.match(name))
            self.seats[name] = _Seat(onnx_name, self._layouts[name], copy=copy)


def _on_integers(node: onnx.NodeProto) -> bool:
    """Whether an operator reads and writes quantised tensors, in the model's own format as well."""
    return node.op_type.startswith("QLinear") or (
        node.op_type == "QGemm" and len(node.input) > 8 and bool(node.input[8])
    )


def _core(op_type: str) -> str:
    """The ONNX operator a fused or re-laid one stands for."""
    if op_type == "QGemm":
        return "Gemm"
    for prefix in ("QLinear", "Nhwc", "Fused"):
        op_type = op_type.removeprefix(prefix)
    return op_type


def _made_by_name(graph: Graph) -> dict[str, str]:
    """The output of every node that has a name, and one output."""
    return {
        node.name: node.output[0] for node in graph.nodes if node.name and len(node.output) == 1
    }


def _named_by(stem: str, original: Graph, made: Mapping[str, str]) -> str | None:
    """The tensor that an NCHWc node is named after: by its name, or by that of its node."""
    stem = stem.removeprefix(_CAST_PREFIX)
    names = (stem, stem.removesuffix("_bn"), TOKEN.sub("", stem))
    known = (name if name in original.producer else made.get(name) for name in names)
    return next(filter(None, known), None)


def _after_activation(tensor: str, node: onnx.NodeProto, original: Graph) -> str | None:
    """The tensor behind the activation that ``node`` took over, if it did."""
    activation = attribute_of(node, "activation")
    wanted = "" if activation is None else activation.s.decode()
    if not wanted or original.op_type(tensor) == wanted:
        return tensor
    reading = original.consumers[tensor]
    for transpose in [n for n in reading if n.op_type == "Transpose"]:  # it may be taken out
        reading = [*reading, *original.consumers[transpose.output[0]]]
    following = [n for n in reading if n.op_type == wanted]
    return str(following[0].output[0]) if len(following) == 1 else None


def _has_bias(conv: onnx.NodeProto) -> bool:
    return len(conv.input) > 2 and bool(conv.input[2])


def _layouts(original: Graph, compiled: Graph) -> dict[str, Layout]:
    """Layout of every tensor of the compiled graph, relative to the tensor it is in ONNX."""
    layouts: dict[str, Layout] = defaultdict(Layout)
    # A transpose of quantised values keeps its name, but what it makes is called otherwise.
    permutations = {_permutation(n) for n in original.nodes if n.op_type == "Transpose" and n.name}
    named = {n.name: n for n in original.nodes if n.name}
    made = _made_by_name(original)
    for node in compiled.nodes:
        given = next((p for n in node.input if (p := layouts[n]) != AS_IN_ONNX), AS_IN_ONNX)
        layout = AS_IN_ONNX
        if node.op_type in ("ReorderInput", "ReorderOutput") and node.domain == NCHWC:
            own = node.output[0] in original.producer
            order = None if own else given.order
            layout = Layout(order, "plain" if node.op_type == "ReorderOutput" else "blocked")
        elif node.domain == NCHWC:
            stem = _named_by(node.name.rpartition("_nchwc")[0], original, made)
            tensor = stem and (_after_activation(stem, node, original) or stem)
            turned = _turned(tensor, _core(node.op_type), original) if tensor else given.order
            layout = Layout(turned, "blocked")
        elif node.op_type == "Transpose":
            order = attribute_of(node, "perm")
            own = node.output[0] in original.producer or _permutation(node) in permutations
            if not own and order is not None:
                layout = Layout(_composed(given.order or range(len(order.ints)), order.ints))
        elif _channels_last(node):
            layout = Layout((0, *range(2, _rank(node, compiled)), 1))
        elif node.op_type == "Reshape" and given.stored != "plain":
            layout = Layout(given.order, "flat" if given.stored == "blocked" else "blocked")
        elif node.op_type not in _RANK_CHANGING:
            layout = given
            known = (named.get(name) for name in (node.name, TOKEN.sub("", node.output[0])))
            origin = original.producer.get(node.output[0]) or next(filter(None, known), None)
            moved = given != AS_IN_ONNX or node.op_type in _FOLLOWING
            if origin and moved and given.stored == "plain":
                taken = _taken_out(origin, node, original, compiled)
                layout = Layout(_carried([layouts[n].order for n in node.input], taken))
        for name in node.output:
            layouts[name] = layout
    return layouts


def _turned(tensor: str, op_type: str, original: Graph) -> tuple[int, ...] | None:
    """How the output of a blocked operator lies beside the ONNX tensor that it is.

    The blocked operator holds what its own operator made, whatever transposes lie between that and
    the tensor: a network with channels last has one behind every convolution, before the bias.
    """
    walked: list[tuple[str, tuple[int, ...]]] = [(tensor, ())]
    for name, order in walked:
        node = original.producer.get(name)
        if node is None:
            continue
        if node.op_type == op_type or len(walked) > _FUSED:
            return _composed(np.argsort(order).tolist(), range(len(order))) if order else None
        if node.op_type == "Transpose":
            own = _permutation(node)[1]
            before = tuple(own[axis] for axis in order) if order else own
        else:
            before = order
        walked += ((source, before) for source in original.variables(node))
    return None


def _composed(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...] | None:
    """The permutation that does one and then the other; None where nothing moves."""
    both = tuple(int(first[axis]) for axis in second)
    return None if both == tuple(range(len(both))) else both


def _carried(
    read: Sequence[tuple[int, ...] | None], taken: Sequence[tuple[int, ...] | None]
) -> tuple[int, ...] | None:
    """The order of what an operator makes, from that of what it reads.

    The optimiser moves transposes past operators until two of them meet; what lies between is
    computed the other way round.

    Args:
        read: the order of each input.
        taken: the permutation of the transpose in front of it that was taken out.
    """
    for order, out in itertools.zip_longest(read, taken):
        if out is not None and (order is None or len(order) == len(out)):
            return _composed(np.argsort(out).tolist(), order or range(len(out)))
        if order is not None:
            return order
    return None


def _taken_out(
    origin: onnx.NodeProto, node: onnx.NodeProto, original: Graph, compiled: Graph
) -> list[tuple[int, ...] | None]:
    """The permutations of the transposes in front of ``origin`` that ``node`` does not read."""

    def before(name: str, read: str) -> tuple[int, ...] | None:
        order: Sequence[int] | None = None
        first: list[Sequence[int] | None] = []  # up to what is still there, if not for this node
        while name != read and name not in original.constants:
            if name in compiled.producer:
                first.append(order)
            source = original.producer.get(name)
            if source is None or source.op_type != "Transpose":
                break
            own = _permutation(source)[1]
            order = own if order is None else [own[axis] for axis in order]
            name = source.input[0]
        if name != read and first:
            order = first[0]
        return None if order is None else _composed(order, range(len(order)))

    return [before(name, read) for name, read in zip(origin.input, node.input, strict=False)]


def _permutation(node: onnx.NodeProto) -> tuple[str, tuple[int, ...]]:
    order = attribute_of(node, "perm")
    return TOKEN.sub("", node.name), () if order is None else tuple(order.ints)


def _rank(node: onnx.NodeProto, graph: Graph) -> int:
    """Rank of what a convolution or pooling reads; 4 where the file does not say."""
    given = (attribute_of(node, name) for name in ("kernel_shape", "strides", "dilations"))
    spatial = next((len(found.ints) for found in given if found is not None), None)
    if spatial is not None:
        return spatial + 2
    return max([r for name in node.input if (r := graph.ranks.get(name, 0)) > 2], default=4)


def _channels_last(node: onnx.NodeProto) -> bool:
    flag = attribute_of(node, "channels_last")
    return node.op_type.startswith("Nhwc") or (flag is not None and flag.i == 1)


def channels_of(model: onnx.ModelProto, tensors: Mapping[str, int]) -> dict[str, int]:
    """True channel count of tensors stored padded, by their channel axis; 0 where it is not known.

    Changes ``model``: weights are dropped before inferring shapes, which only needs their sizes.
    """
    if not tensors:
        return {}
    import onnx

    counted = _count_channels(model.graph, tensors)
    if not all(counted.values()):
        for weight in model.graph.initializer:
            if len(weight.raw_data) > 1024:
                weight.ClearField("raw_data")
        with contextlib.suppress(Exception):  # out of the inference's reach: 0 stays 0
            counted = _count_channels(onnx.shape_inference.infer_shapes(model).graph, tensors)
    return counted


def _count_channels(graph: onnx.GraphProto, tensors: Mapping[str, int]) -> dict[str, int]:
    """Channels from declared shapes, else from the weights of the convolution behind."""
    producer = {name: node for node in graph.node for name in node.output}
    weights = {i.name: tuple(i.dims) for i in graph.initializer}
    for node in graph.node:
        value = attribute_of(node, "value") if node.op_type == "Constant" else None
        if value is not None:
            weights[node.output[0]] = tuple(value.t.dims)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in itertools.chain(graph.value_info, graph.input, graph.output)
    }
    counted = {name: int(dims[1]) for name, dims in shapes.items() if len(dims) > 1}

    def count(tensor: str) -> int:
        """Walk back through operators that keep the channels, to a convolution."""
        seen = []
        while not counted.get(tensor) and (node := producer.get(tensor)) is not None:
            seen.append(tensor)
            if node.op_type == "Conv" and node.input[1] in weights:
                counted[tensor] = weights[node.input[1]][0]
            elif node.op_type == "Concat":
                parts = [count(name) for name in node.input]
                counted[tensor] = sum(parts) if all(parts) else 0
                break
            elif node.op_type in _KEEP_CHANNELS and node.input:
                tensor = next((name for name in node.input if name not in weights), "")
            else:
                break
        counted.update(dict.fromkeys(seen, counted.get(tensor, 0)))
        return counted.get(tensor, 0)

    def declared(tensor: str, axis: int) -> int:
        dims = shapes.get(tensor, [])
        return int(dims[axis]) if axis < len(dims) else 0

    return {t: count(t) if axis == 1 else declared(t, axis) for t, axis in tensors.items()}


def unblock(value: Array, channels: int, block: int) -> Array:
    """NCHW from NCHWc: ``[N, C/c, H, W, c]`` in memory, declared as ``[N, C, H, W]``."""
    n, padded, h, w = value.shape
    blocks = value.reshape(n, padded // block, h, w, block)
    return blocks.transpose(0, 1, 4, 2, 3).reshape(n, padded, h, w)[:, :channels]


@functools.cache
def block_size() -> int:
    """The c of NCHWc on this CPU (16 with AVX-512, 8 with AVX2), which ONNX Runtime keeps private.

    Measured: in the blocked form of a tensor with two pixels the first channel's second pixel
    comes after one whole block.
    """
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    channels = 64
    graph = helper.make_graph(
        [helper.make_node("ReorderInput", ["x"], ["y"], domain=NCHWC)],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 1, 2])],
        [onnx.ValueInfoProto(name="y")],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(NCHWC, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.arange(channels * 2, dtype=np.float32).reshape(1, channels, 1, 2)
    return int(np.flatnonzero(session.run(None, {"x": pixels})[0].ravel() == 1)[0])
