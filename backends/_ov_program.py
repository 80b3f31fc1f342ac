"""The model as OpenVINO reads it, and the program that it executes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from auditor.ports import Array, Arrays
from auditor.records.backend import Kernel, Skipped

# Layer types of the executed graph that compute nothing.
_PASSIVE = frozenset({"Const", "Reorder", "Input", "Output", "ShapeOf"})
MOVEMENT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
# What a DequantizeLinear becomes; a probe on an 8-bit tensor goes to the end of this chain.
_DEQUANTIZE = frozenset({"Convert", "Subtract", "Multiply"})
# Operations that each begin a kernel of their own, and the layer types of such kernels.
_HEAVY = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"})
_HEAVY_LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
FLOATS = frozenset({"f32", "bf16", "f16", "f64"})
_UNREAD = frozenset({"f8e4m3", "f8e5m2", "f8e8m0", "f4e2m1", "nf4", "i4", "u4"})
BYTES = frozenset({"u8", "i8"})

# Operations are renamed ``#12#`` before compiling, because ONNX node names may be empty,
# repeated or contain the commas that separate ``originalLayersNames``.
TOKEN = re.compile(r"#(\d+)#")
_DIGITS = re.compile(r"\d+")
_PLACED = re.compile(r"#\d+#/[^,]*")  # an operation that the engine put before one of the model's

Port = tuple[int, int]  # operation's number, output index


@dataclass(frozen=True, slots=True)
class Executed:
    """One node of the executed graph.

    Attributes:
        original: names of the operations fused into it, as the engine states them.
        outputs, layouts: precisions and memory layouts of its outputs.
        operations: numbers of the model's operations fused into it.
        parents: the executed nodes it reads.
        varying: whether it depends on the inputs.
        ends_unnamed: whether its last operation is none of the model's.
    """

    name: str
    type: str
    original: str
    primitive: str
    precision: str
    outputs: tuple[str, ...]
    layouts: str
    operations: tuple[int, ...]
    parents: tuple[str, ...]
    varying: bool
    ends_unnamed: bool = False

    def named(self, index: int) -> bool:
        """Whether the operation at ``index`` of those fused has a name the model gave it."""
        return TOKEN.match(self.original.rstrip(",").split(",")[index]) is not None

    @property
    def passive(self) -> bool:
        """Whether it computes nothing; conversions that the engine inserted count as reorders."""
        return self.type in _PASSIVE or (self.type == "Convert" and not self.operations)

    @property
    def narrows(self) -> bool:
        """Whether it only rounds to float16, as before a Result where that is asked for."""
        names = self.original.split(",")
        return all(_NARROWED.search(name) for name in names)

    @property
    def widens(self) -> bool:
        """Whether it reduces in a narrower type than that of its result."""
        return self.type == "Reduce" and self.precision not in self.outputs

    @property
    def end(self) -> str:
        """What it computes: its last operation, or the engine's name for it."""
        if self.operations:
            return f"#{max(self.operations)}#" + "'" * self.ends_unnamed
        # The digits of names the engine makes up differ between compilations.
        return _DIGITS.sub("", self.original)

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for the same kernel in two programs."""
        return (self.type, self.end, self.primitive, self.precision, *self.outputs)


class Program:
    """The executed graph of a compiled model, as the engine states it."""

    def __init__(self, compiled: Any, source: Source) -> None:
        self.nodes: dict[str, Executed] = {}
        self._by_friendly_name: dict[str, str] = {}
        for op in compiled.get_runtime_model().get_ordered_ops():
            info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
            parents = tuple(i.get_source_output().get_node().get_name() for i in op.inputs())
            kind = info.get("layerType", op.get_type_name())
            node = Executed(
                name=op.get_friendly_name(),
                type=kind,
                original=info.get("originalLayersNames", ""),
                primitive=info.get("primitiveType", ""),
                precision=info.get("runtimePrecision", "").lower(),
                outputs=tuple(info.get("outputPrecisions", "").lower().split(",")),
                layouts=info.get("outputLayouts", ""),
                operations=_numbers(info.get("originalLayersNames", ""), kind),
                parents=parents,
                varying=kind == "Input" or any(self.nodes[p].varying for p in parents),
            )
            self.nodes[op.get_name()] = node
            self._by_friendly_name[node.name] = op.get_name()
        self._attribute(source)

    def kernels(self) -> list[Executed]:
        """What computes something from the inputs, in topological order."""
        return [n for n in self.nodes.values() if n.varying and not n.passive]

    def reach(self, results: Iterable[str]) -> list[Executed]:
        """The kernels that these Results (by friendly name) depend on."""
        todo = [self._by_friendly_name[name] for name in results]
        seen = set(todo)
        while todo:
            fresh = set(self.nodes[todo.pop()].parents) - seen
            seen |= fresh
            todo += fresh
        return [n for name, n in self.nodes.items() if name in seen and n.varying and not n.passive]

    def fingerprint(self, results: Iterable[str]) -> Counter[tuple[Any, ...]]:
        """What these Results depend on: every kernel, with the kernels it reads."""
        return Counter(
            (kernel.key, tuple(sorted(p.end for p in self.sources(kernel))))
            for kernel in self.reach(results)
        )

    def reads(self, results: Iterable[str]) -> dict[tuple[str, ...], Counter[str]]:
        """What kernels on the way to these Results read, by their key."""
        found: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        for kernel in self.reach(results):
            found[kernel.key].update(p.end for p in self.sources(kernel))
        return found

    def reading(self, node: Executed) -> Counter[tuple[str, ...]]:
        """Precisions of what it reads that depends on the inputs."""
        return Counter(self.nodes[p].outputs for p in node.parents if self.nodes[p].varying)

    def sources(self, node: Executed) -> Iterator[Executed]:
        """The nearest kernels that feed it."""
        return self._sources(node, frozenset())

    def aside(
        self, candidates: Iterable[Candidate], results: Iterable[str]
    ) -> frozenset[Candidate]:
        """The probes that show nothing a kernel on the way to ``results`` wrote.

        The engine computes the tensors of these for the probe alone.
        """
        useful = {kernel.name for kernel in self.reach(results)}
        return frozenset(c for c in candidates if not self._reads(c, useful))

    def _reads(self, candidate: Candidate, useful: Collection[str]) -> bool:
        todo = [self._by_friendly_name[candidate.probe]]
        while todo:
            for node in (self.nodes[name] for name in self.nodes[todo.pop()].parents):
                if candidate.maker in node.operations and node.name in useful:
                    return True
                if node.narrows and candidate.precision != "f16":
                    continue  # a rounded copy
                if node.varying and set(node.operations) <= {*candidate.path, candidate.maker}:
                    todo.append(self._by_friendly_name[node.name])
        return False

    def _attribute(self, source: Source) -> None:
        """Give kernels the operations whose names the engine lost when it fused them.

        OpenVINO names some fused operations anew (``HSwish_17``), so that part of the model
        appears in no kernel. Such operations lie between those of known kernels: a nameless
        beginning of a Convolution is the operation that starts it, a nameless end is what
        follows up to the next kernel.
        """
        owned = {i for n in self.nodes.values() for i in n.operations}
        for key, node in self.nodes.items():
            if node.type in _HEAVY_LAYERS and node.operations and not node.named(0):
                found = source.start(node.operations, owned)
                owned |= found
                self.nodes[key] = replace(node, operations=(*node.operations, *sorted(found)))
        readers: dict[str, set[int]] = {node.name: set() for node in self.nodes.values()}
        for node in self.nodes.values():
            for parent in self.parents(node):
                readers[parent.name].update(node.operations)
        for key, node in self.nodes.items():
            if node.varying and not node.passive and not node.named(-1):
                base = node.operations or tuple(
                    max(p.operations) for p in self.parents(node) if p.operations
                )
                found = source.following(base, owned)
                ends = [n for n in found if not source.read_beyond(n, found) <= found]
                if len(ends) > 1:  # several kernels may read the same: what reads this one tells
                    ends = [n for n in ends if source.read_beyond(n, found) & readers[node.name]]
                    found = source.leading(ends, found)
                if len(ends) != 1 or all(source.type(n) in MOVEMENT for n in found):
                    found = set()  # a tensor that the model does not have, or several
                owned |= found
                self.nodes[key] = replace(
                    node, operations=(*node.operations, *sorted(found)), ends_unnamed=not found
                )

    def parents(self, node: Executed) -> Iterator[Executed]:
        """The nearest kernels that feed it, those that only move data and what is before."""
        return self._sources(node, MOVEMENT)

    def _sources(self, node: Executed, through: Collection[str]) -> Iterator[Executed]:
        todo = list(node.parents)
        while todo:
            parent = self.nodes[todo.pop()]
            if parent.passive or parent.type in through:
                todo += parent.parents
            if parent.varying and not parent.passive:
                yield parent


def _numbers(original: str, kind: str) -> tuple[int, ...]:
    """Numbers of the operations fused into a kernel.

    A transposition that the engine puts before a product is named ``#12#/transpose_a``: it does not
    compute the product.
    """
    named = original if kind not in MOVEMENT else _PLACED.sub("", original)
    return tuple(int(i) for i in TOKEN.findall(named))


@dataclass(frozen=True, slots=True)
class Grid:
    """What a tensor of 8 bits is widened by: (integer − zero) × scale, both float32 constants.

    Attributes:
        port, element: where the integers are, and their type.
        steps: the operations that widen them, in order.
    """

    port: Port
    element: str
    steps: tuple[int, ...]
    scale: Array
    zero: Array

    def widened(self, integers: Array) -> Array:
        """What integers stand for, as the operations give it."""
        values: Array = (integers.astype(np.float32) - self.zero) * self.scale
        return values

    def integers(self, values: Array) -> Array:
        """The integers of widened values, as floats."""
        integers: Array = np.rint(values / self.scale) + self.zero
        return integers


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor of the executed program that a probe could observe.

    Attributes:
        port: where its value is in the model.
        element: element type that the model declares.
        precision: element type in which the program holds it.
        maker: operation by which its kernel is found.
        path: operations between the kernel's output and ``port``.
        grid: how the model widens it from 8 bits, if it does and it is no output.
    """

    tensor: str
    port: Port
    element: str
    precision: str
    maker: int
    path: tuple[int, ...]
    grid: Grid | None = field(default=None, compare=False)

    @property
    def written(self) -> Port:
        """Where it is observed: as the 8 bits that it is widened from, if it is."""
        return self.grid.port if self.grid else self.port

    @property
    def probe(self) -> str:
        """Friendly name of the Result that observes it."""
        return "probe {}.{}".format(*self.port)


class Twins:
    """A program's kernels, to be recognised where parts of it are compiled apart.

    Whether or not a kernel also widens the 8 bits that it gives: every type holds them exactly.
    """

    def __init__(self, program: Program, candidates: Iterable[Candidate]) -> None:
        grids = [c.grid for c in candidates if c.grid]
        self._widening = frozenset(n for grid in grids for n in grid.steps)
        self._narrow = frozenset(grid.port[0] for grid in grids)
        self._keys = {self._key(kernel) for kernel in program.kernels()}

    def make(self, candidate: Candidate, apart: Program) -> bool:
        """Whether only such kernels make a candidate in another program."""
        return all(
            self._key(kernel) in self._keys or self._widening.issuperset(kernel.operations)
            for kernel in apart.reach([candidate.probe])
        )

    def _key(self, kernel: Executed) -> tuple[str, ...]:
        kept = tuple(n for n in kernel.operations if n not in self._widening)
        outputs = () if kept and max(kept) in self._narrow else kernel.outputs
        return replace(kernel, operations=kept, outputs=outputs).key


_NARROWED = re.compile(r"_compressed_to_f16(\.\d+)?$")
_COMPRESSED = "_compressed"  # what OpenVINO appends to the names of constants stored in float16


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
        return found

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

    def branches(self, compile_model: Callable[[Any], Any], notes: list[str]) -> Iterator[Kernel]:
        """Kernels of branches and of loops' bodies, compiled alone: the program hides its own."""
        found = 0
        for op in self._ops:
            kind = op.get_type_name()
            if kind not in ("If", "Loop", "TensorIterator"):
                continue
            two = kind == "If"
            for body in map(op.get_function, range(2)) if two else (op.get_function(),):
                try:
                    program = Program(compile_model(body.clone()), self)
                except RuntimeError:  # it may not fit these shapes: a branch never taken
                    continue
                yield from (kernel_of(kernel, self) for kernel in program.kernels())
                found += 1
        if found:
            notes.append(
                f"What runs inside If and loops is stated by {found} of their bodies compiled "
                "alone, as the program does not say it."
            )

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
        sources = (i.get_source_output() for i in self._ops[number].inputs())
        return [(self._number[s.get_node().get_name()], s.get_index()) for s in sources]

    def shape(self, port: Port) -> Any:
        """A port's shape as the model declares it (openvino.PartialShape)."""
        return self._ops[port[0]].output(port[1]).get_partial_shape()

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

    def outputs(self, kernel: Executed) -> list[tuple[Port, str]]:
        """Ports of the model where a kernel's outputs are, with the precisions it writes.

        Numbers are topological, so the last operation of a fusion group is where it ends.
        """
        if not kernel.operations:
            return []
        last = max(kernel.operations)
        count = len(self._ops[last].outputs())
        precisions = (kernel.outputs + kernel.outputs[-1:] * count)[:count]
        return [((last, i), precision) for i, precision in enumerate(precisions)]

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

    def operands(self, kernel: Executed) -> Iterator[Port]:
        """Ports added in place by a fused Add: where its other operand comes from.

        Of operands in 8 bits only the last: a sum is fused with one convolution.
        """
        inside = set(kernel.operations)
        for number in kernel.operations:
            if self.type(number) != "Add" or number == min(kernel.operations):
                continue
            origins = [self._moved(port) for port in self.inputs(number)]
            yield from (origin for origin in origins if origin[0] not in inside)
        for number in kernel.operations:
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


def candidates_of(
    source: Source, program: Program, outputs: Collection[str], reduced: bool
) -> tuple[list[Candidate], list[Candidate], list[Skipped], list[str]]:
    """The tensors that survive in ``program``.

    Returns:
        Those to observe, the final outputs, those that cannot be observed, and the kernels
        whose output is no tensor of the ONNX graph.
    """
    found: dict[str, Candidate] = {}
    finals: dict[str, Candidate] = {}
    skipped: dict[str, Skipped] = {}
    foreign: list[str] = []
    for kernel in program.kernels():
        if kernel.type in MOVEMENT:
            continue
        if kernel.ends_unnamed or not kernel.operations:
            foreign.append(source.display(kernel.name))
            continue
        for made, precision in source.outputs(kernel):
            if not source.read(made):
                continue
            seen = source.observable(made)
            if seen is None:
                foreign.append(source.display(kernel.name))
                continue
            port, path = seen
            tensor, element = source.tensors[port], source.element_type(port)
            final = tensor in outputs
            if not final and element in _UNREAD:
                skipped[tensor] = Skipped(tensor, f"{element} tensor, which NumPy has no type for")
                continue
            if reduced and not final and element not in FLOATS:
                reason = f"{element} tensor in a program that computes in less than f32"
                skipped[tensor] = Skipped(tensor, reason)
                continue
            held = element if path and source.element_type(made) != element else precision
            grid = None if final else source.grid(port)
            candidate = Candidate(tensor, port, element, held, made[0], path, grid)
            (finals if final else found).setdefault(tensor, candidate)
    return list(found.values()), list(finals.values()), list(skipped.values()), foreign


def kernel_of(executed: Executed, source: Source) -> Kernel:
    keys = dict.fromkeys(key for i in sorted(executed.operations) for key in source.keys[i])
    # An If whose condition the engine knows is replaced by the branch when it compiles.
    inner = (source.inner.get(name) for name in executed.original.split(","))
    keys |= dict.fromkeys(key for key in inner if key is not None)
    ports = [port for port, _ in source.outputs(executed)]
    return Kernel(
        name=source.display(executed.name),
        type=executed.type,
        nodes=tuple(keys),
        outputs=tuple(source.tensors[p] for p in ports if p in source.tensors),
        primitive=executed.primitive,
        precision=executed.precision,
        output_precision=",".join(dict.fromkeys(executed.outputs)),
    )
