"""The model as OpenVINO reads it: its operations numbered, and what each is called in ONNX."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from auditor.ports import Array, Arrays

MOVEMENT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
# What a DequantizeLinear becomes; a probe on an 8-bit tensor goes to the end of this chain.
_DEQUANTIZE = frozenset({"Convert", "Subtract", "Multiply"})
# Operations that each begin a kernel of their own.
# ONNX operators whose constants can be told by their places.
_PLACED = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "MatMul"})
_HEAVY = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"})
FLOATS = frozenset({"f32", "bf16", "f16", "f64"})
BYTES = frozenset({"u8", "i8"})
_OTHER = {"i8": "u8", "u8": "i8"}
_INTEGERS = BYTES | {"u4", "i4"}  # what weights are compressed to
_COMPRESSED = "_compressed"  # what OpenVINO appends to the names of constants stored in float16

# Operations are renamed ``#12#`` before compiling, because ONNX node names may be empty,
# repeated or contain the commas that separate ``originalLayersNames``.
TOKEN = re.compile(r"#(\d+)#")

Port = tuple[int, int]  # operation's number, output index


@dataclass(frozen=True, slots=True)
class Grid:
    """What a tensor of 8 bits is widened by: (integer − zero) × scale, both float32 constants.

    Attributes:
        port, element: where the integers are, and their type.
        steps: the operations that widen them, in order.
        moved: what the program adds to the integers. It holds signed ones plus 128, unsigned,
            where the processor multiplies nothing else.
    """

    port: Port
    element: str
    steps: tuple[int, ...]
    scale: Array
    zero: Array
    moved: int = 0

    @property
    def held(self) -> str:
        """The type in which the program holds the integers."""
        return _OTHER[self.element] if self.moved else self.element

    def held_in(self, element: str) -> Grid:
        """The grid in a program that holds the integers in the other of the two types."""
        offset = 128 if element == "u8" else -128
        return replace(self, moved=offset if element == _OTHER[self.element] else 0)

    def widened(self, integers: Array) -> Array:
        """What integers stand for, as the operations give it."""
        values: Array = (integers.astype(np.float32) - self.zero) * self.scale
        return values

    def integers(self, values: Array) -> Array:
        """The integers of widened values, as floats."""
        integers: Array = np.rint(values / self.scale) + self.zero
        return integers


class Source:
    """The model as read, its operations numbered, and what each is called in ONNX."""

    def __init__(self, model: Any, nodes: Mapping[str, str], inner: Mapping[str, str]) -> None:
        """Number ``model``'s operations.

        Args:
            model: an ``openvino.Model``; its friendly names are replaced.
            nodes: ONNX tensor name → key of the node that makes it, in graph order.
            inner: the same of the nodes of subgraphs, whose operations keep their names.
        """
        self.model = model
        self._rank = {tensor: i for i, tensor in enumerate(nodes)}
        self.results = [result.get_friendly_name() for result in model.get_results()]
        self.names: list[str] = []
        self.tensors: dict[Port, str] = {}
        self._ops: list[Any] = []
        self._inputs: dict[int, list[Port]] = {}
        for number, op in enumerate(model.get_ordered_ops()):
            self._ops.append(op)
            self.names.append(op.get_friendly_name())
            for port in op.outputs():
                known = [n for n in port.get_names() if n in self._rank]
                if known:
                    self.tensors[number, port.get_index()] = min(known, key=self._rank.__getitem__)
            if op.get_type_name() not in ("Parameter", "Result"):
                op.set_friendly_name(f"#{number}#")
        self._number = {op.get_name(): i for i, op in enumerate(self._ops)}
        self._nodes, self.inner = nodes, inner

    def constants(self) -> Arrays:
        """Values of the constants; float16 ones are what a compressed file stores of float32."""
        found: Arrays = {}
        for name, op in zip(self.names, self._ops, strict=True):
            # A constant without a type stands for a bias that is not there.
            if op.get_type_name() == "Constant" and not op.get_element_type().is_dynamic():
                found[name.removesuffix(_COMPRESSED)] = np.array(op.data)
        read = {port[0] for number in self._varying for port in self.inputs(number)}
        for number in read - self._varying:
            constant, value = self._widened(number)
            if value is not None and self.element_type((constant, 0)) in _INTEGERS:
                found[self.names[constant]] = value
        return found

    def placed(self, graph: Any) -> Arrays:
        """Constants that lost their names, by those that ONNX gives to the same inputs of products.

        Compression writes weights transposed, and a file loses the names of biases.

        Args:
            graph: the ONNX graph that the model was made of.
        """
        makers = {name: node for node in graph.node for name in node.output[:1]}
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        found: Arrays = {}
        for number in sorted(self._varying):
            node = makers.get(self.keys[number][0]) if self.keys[number] else None
            if node is None or node.op_type not in _PLACED:
                continue
            open_ = [n for n in node.input if n in shapes and n not in found]
            for source in (port[0] for port in self.inputs(number)):
                value = None if source in self._varying or not open_ else self._widened(source)[1]
                if value is None:
                    continue
                if self.type(number) == "MatMul" and value.ndim > 1:
                    turned = any(a.name == "transB" and a.i for a in node.attribute)
                    if turned != bool(self._ops[number].get_attributes()["transpose_b"]):
                        value = value.swapaxes(-1, -2)
                for name in open_:
                    if _alike(value.shape, shapes[name]):
                        found[name] = value.reshape(shapes[name])
                        open_.remove(name)
                        break
        return found

    def _widened(self, number: int) -> tuple[int, Array | None]:
        """Compressed weights as they are read: the number of their constant, and real values."""
        op, kind = self._ops[number], self.type(number)
        if kind == "Constant" and not op.get_element_type().is_dynamic():
            return number, np.array(op.get_data(dtype=np.float32))
        if kind not in _DEQUANTIZE and kind != "Reshape":
            return number, None
        (constant, value), *others = (self._widened(port[0]) for port in self.inputs(number))
        if value is None or kind == "Convert":
            return constant, value
        if kind == "Reshape":
            return constant, value.reshape(tuple(op.get_output_shape(0)))
        other = others[0][1]
        if other is None:
            return constant, None
        return constant, value - other if kind == "Subtract" else value * other

    @cached_property
    def keys(self) -> list[tuple[str, ...]]:
        """Per operation, keys of the ONNX nodes it belongs to.

        An operation whose outputs have no ONNX name is a step on the way to the first one
        downstream that has.
        """
        keys: list[tuple[str, ...]] = [()] * len(self._ops)
        for number in range(len(self._ops) - 1, -1, -1):
            named = [
                self._nodes[name]
                for port in self._ops[number].outputs()
                for name in sorted(port.get_names() & self._rank.keys(), key=self._rank.__getitem__)
            ]
            later = [keys[n] for port in self._ops[number].outputs() for n in self._readers(port)]
            keys[number] = tuple(dict.fromkeys(named)) or next((k for k in later if k), ())
        return keys

    def bodies(self) -> Iterator[Any]:
        """What runs inside: the branches of every If and the bodies of loops, as models."""
        for op in self._ops:
            kind = op.get_type_name()
            if kind == "If":
                yield from map(op.get_function, range(2))
            elif kind in ("Loop", "TensorIterator"):
                yield op.get_function()

    def needs(self, port: Port, stops: Collection[Port]) -> set[Port]:
        """The ports among ``stops`` that the operation at ``port`` is computed from."""
        found = set[Port]()
        seen = {port[0]}
        todo = [port[0]]
        while todo:
            for source in self.inputs(todo.pop()):
                if source in stops:
                    found.add(source)
                elif source[0] not in seen:
                    seen.add(source[0])
                    todo.append(source[0])
        return found

    @cached_property
    def _varying(self) -> set[int]:
        """Operations whose values depend on the inputs' values."""
        varying = set[int]()
        for number in range(len(self._ops)):
            kind = self.type(number)
            if kind == "Parameter" or (
                kind != "ShapeOf" and any(port[0] in varying for port in self.inputs(number))
            ):
                varying.add(number)
        return varying

    def start(self, group: Collection[int], owned: Collection[int]) -> set[int]:
        """The unowned operations before ``group`` back to the one that starts a kernel."""
        found = set[int]()
        todo = list(group)
        while todo:
            before = {port[0] for port in self.inputs(todo.pop())} & self._varying
            fresh = {
                n
                for n in before - set(owned) - found - set(group)
                if self.type(n) != "Parameter" and self.read_by(n) <= found | set(group)
            }
            found |= fresh
            todo += [n for n in fresh if self.type(n) not in _HEAVY]
        return found if any(self.type(n) in _HEAVY for n in found) else set()

    def following(self, base: Collection[int], owned: Collection[int]) -> set[int]:
        """The unowned operations computed from ``base`` alone, up to the next kernel's start.

        Seen through data movement: the engine moves reshapes past what it fuses.
        """
        found = set[int]()
        passed = set[int]()
        todo = list(base)
        while todo:
            for n in self.read_by(todo.pop()) - found - passed:
                needs = {port[0] for port in self.inputs(n)} & self._varying
                if not needs <= found | passed | set(base):
                    continue
                if n in owned and self.type(n) in MOVEMENT:
                    passed.add(n)
                    todo.append(n)
                elif n not in owned and self.type(n) not in _HEAVY | {"Result"}:
                    found.add(n)
                    todo.append(n)
        return found

    def read_by(self, number: int) -> set[int]:
        """The operations that read an operation's values."""
        readers = {n for p in self._ops[number].outputs() for n in self._readers(p)}
        return {n for n in readers if self.type(n) != "ShapeOf"}

    def read_beyond(self, number: int, group: Collection[int]) -> set[int]:
        """The operations that read an operation's values, seen through moves outside ``group``."""
        found = set[int]()
        for n in self.read_by(number):
            moves = self.type(n) in MOVEMENT and n not in group
            found |= self.read_beyond(n, group) if moves else {n}
        return found

    def leading(self, ends: Collection[int], group: Collection[int]) -> set[int]:
        """The operations of ``group`` that ``ends`` are computed from, and these themselves."""
        found, todo = set(ends), list(ends)
        while todo:
            for n, _ in self.inputs(todo.pop()):
                if n not in found and (n in group or self.type(n) in MOVEMENT):
                    found.add(n)
                    todo.append(n)
        return found & set(group)

    def clone(self) -> tuple[Any, dict[int, Any]]:
        """A copy to change, and its operations by number."""
        copy = self.model.clone()
        numbered = {}
        for op in copy.get_ops():
            if match := TOKEN.fullmatch(op.get_friendly_name()):
                numbered[int(match[1])] = op
        return copy, numbered

    def inputs(self, number: int) -> list[Port]:
        """The ports that an operation reads."""
        if (known := self._inputs.get(number)) is None:  # asking the engine takes far longer
            sources = (i.get_source_output() for i in self._ops[number].inputs())
            known = [(self._number[s.get_node().get_name()], s.get_index()) for s in sources]
            self._inputs[number] = known
        return known

    def shape(self, port: Port) -> Any:
        """A port's shape as the model declares it (openvino.PartialShape)."""
        return self._ops[port[0]].output(port[1]).get_partial_shape()

    def convolves(self, port: Port) -> bool:
        """Whether a convolution can read what is at ``port``."""
        shape = self.shape(port)
        return shape.rank.is_static and len(shape) in (3, 4, 5) and shape[1].is_static

    def type(self, number: int) -> str:
        """An operation's type."""
        name: str = self._ops[number].get_type_name()
        return name

    def element_type(self, port: Port) -> str:
        """A port's element type as the model declares it."""
        name: str = self._ops[port[0]].output(port[1]).get_element_type().get_type_name()
        return name

    def types(self) -> set[str]:
        """Element types of the tensors that depend on the inputs."""
        return {self.element_type(port) for port in self.tensors if port[0] in self._varying}

    def display(self, name: str) -> str:
        """An engine's name with the model's own names put back."""
        return TOKEN.sub(lambda m: self.names[int(m[1])], name)

    def ports(self, number: int) -> list[Port]:
        """The ports that an operation writes."""
        return [(number, port.get_index()) for port in self._ops[number].outputs()]

    def read(self, port: Port) -> bool:
        """Whether anything reads a port."""
        return bool(self._ops[port[0]].output(port[1]).get_target_inputs())

    def observable(self, port: Port) -> tuple[Port, tuple[int, ...]] | None:
        """The port whose value shows what is computed at ``port``, under an ONNX name.

        Seen through data movement; for an 8-bit tensor, its dequantised value. With it, the
        operations in between.
        """
        quantized = self.element_type(port) in BYTES or self._widens(port)
        steps = MOVEMENT | _DEQUANTIZE if quantized else MOVEMENT
        path: list[int] = []
        while port not in self.tensors or (quantized and self.element_type(port) not in FLOATS):
            readers = self._readers(self._ops[port[0]].output(port[1]))
            following = [n for n in readers if self.type(n) in steps]
            if not following:
                return None
            path.append(following[0])
            port = (following[0], 0)
        return port, tuple(path)

    def crossed(self, group: Collection[int]) -> bool:
        """Whether these operations, fused, lie on both sides of one that only moves data.

        OpenVINO moves an activation to before a transpose, so as to fuse it with a convolution.
        """
        between = {p[0] for n in group for p in self.inputs(n)} - set(group)
        moves = (n for n in between if self.type(n) in MOVEMENT)
        return any(p[0] in group for n in moves for p in self.inputs(n))

    def onward(self, port: Port) -> Port | None:
        """Where a value with one reader goes on, if that only moves it to an ONNX tensor."""
        readers = self._readers(self._ops[port[0]].output(port[1]))
        if len(readers) != 1 or self.type(readers[0]) not in MOVEMENT:
            return None
        return next((p for p in self.ports(readers[0]) if p in self.tensors), None)

    def grid(self, port: Port) -> Grid | None:
        """How the model widens what is at ``port`` from 8 bits; None where it does not."""
        scale, zero = np.ones((), np.float32), np.zeros((), np.float32)
        steps: list[int] = []
        while self.element_type(port) not in BYTES:
            number, kind = port[0], self.type(port[0])
            sources = self.inputs(number)
            if kind not in _DEQUANTIZE or not sources or sources[0][0] not in self._varying:
                return None
            if kind != "Convert":
                value = self._constant(sources[1][0])
                if value is None or (kind == "Multiply" and steps):
                    return None
                scale, zero = (value, zero) if kind == "Multiply" else (scale, value)
            steps.append(number)
            port = sources[0]
        element = self.element_type(port)
        return Grid(port, element, tuple(steps[::-1]), scale, zero) if steps else None

    def _widens(self, port: Port) -> bool:
        """Whether a value is on its way from 8 bits to what it stands for."""
        return self.type(port[0]) in ("Convert", "Subtract") and self.grid(port) is not None

    def _constant(self, number: int) -> Array | None:
        """A constant's value as float32; None of what is computed."""
        while self.type(number) == "Convert":
            number = self.inputs(number)[0][0]
        if self.type(number) != "Constant":
            return None
        return np.asarray(self._ops[number].data, np.float32)

    def operands(self, group: Collection[int]) -> Iterator[Port]:
        """Ports added in place by an Add in a fusion group: where its other operand comes from.

        Of operands in 8 bits only the last: a sum is fused with one convolution.
        """
        inside = set(group)
        for number in group:
            if self.type(number) != "Add" or number == min(group):
                continue
            origins = [self._moved(port) for port in self.inputs(number)]
            yield from (origin for origin in origins if origin[0] not in inside)
        for number in group:
            grids = [self.grid(port) for port in self.inputs(number)]
            if self.type(number) == "Add" and len(grids) > 1 and all(grids):
                yield max(grid.port for grid in grids if grid)

    def _moved(self, port: Port) -> Port:
        """Where what only was moved comes from."""
        while self.type(port[0]) in MOVEMENT:
            port = self.inputs(port[0])[0]
        return port

    def _readers(self, port: Any) -> list[int]:
        # What nothing of the model needs still reads: the converter leaves it hanging.
        names = (i.get_node().get_name() for i in port.get_target_inputs())
        return sorted(self._number[name] for name in names if name in self._number)


class Copy:
    """A copy of the model whose operations are lent out, each once; then another copy.

    Copying takes time in proportion to the whole model, and a deep one is cut into hundreds of
    parts.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ops: dict[int, Any] = {}
        self._lent: set[int] = set()

    def lend(self, needed: Collection[int]) -> dict[int, Any]:
        """Operations by number; those ``needed`` are the caller's to rewire."""
        if not self._ops or not self._lent.isdisjoint(needed):
            _, self._ops = self._source.clone()
            self._lent = set()
        self._lent |= set(needed)
        return self._ops


def _alike(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes differ by axes of length 1 at most, or by that of groups."""
    long, other = ([size for size in sizes if size != 1] for sizes in (shape, wanted))
    return long == other or (len(shape) == len(wanted) + 1 and long[2:] == other[1:] != [])
