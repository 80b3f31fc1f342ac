"""The program that OpenVINO executes: its kernels, and the tensors that survive between them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from auditor.records.backend import Kernel, Skipped
from backends._ov_source import BYTES, FLOATS, MOVEMENT, TOKEN, Grid, Port, Source

# Layer types of the executed graph that compute nothing.
_PASSIVE = frozenset({"Const", "Reorder", "Input", "Output", "ShapeOf"})
# Those of kernels that begin with an operation of their own.
_HEAVY_LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
_SMALL = BYTES | {"boolean"}
_UNREAD = frozenset({"f8e4m3", "f8e5m2", "f8e8m0", "f4e2m1", "nf4", "i4", "u4"})
_SHARED = 2  # readers of a tensor, from which on one of them may be served by another
_WRAPPED = frozenset({"i16", "u16", "u32", "u64"})
# What is read of what the engine says of each.
_TOLD = (
    *("layerType", "originalLayersNames", "primitiveType", "runtimePrecision"),
    *("outputPrecisions", "outputLayouts"),
)
_DIGITS = re.compile(r"\d+")
_PLACED = re.compile(r"#\d+#/[^,]*")  # an operation that the engine put before one of the model's
_ANEW = re.compile(r"([A-Za-z]\w*)_\d+")  # an operation that the engine made: its type and a number
SHOWING = "/shown"  # in the names of operations that only show a tensor
_SHOWN = re.compile(rf"#\d+#{SHOWING}[^,]*")
_NARROWED = re.compile(r"_compressed_to_f16(\.\d+)?$")


@dataclass(frozen=True, slots=True)
class Executed:
    """One node of the executed graph.

    Attributes:
        original: names of the operations fused into it, as the engine states them.
        outputs, layouts: precisions and memory layouts of its outputs.
        operations: numbers of the model's operations fused into it.
        parents: the executed nodes it reads.
        varying: whether it depends on the inputs.
        branches: where it has several outputs, their precisions and the executed nodes that read
            each.
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
    branches: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ends_unnamed: bool = False

    def named(self, index: int) -> bool:
        """Whether the operation at ``index`` of those fused has a name the model gave it."""
        return TOKEN.match(self.original.rstrip(",").split(",")[index]) is not None

    @property
    def passive(self) -> bool:
        """Whether it computes nothing; conversions that the engine inserted count as reorders."""
        if self.type in _PASSIVE or all(map(_SHOWN.fullmatch, self.original.split(","))):
            return True
        return self.type == "Convert" and not self.operations

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
        # The engine lists an output once for each reader.
        return (self.type, self.end, self.primitive, self.precision, *dict.fromkeys(self.outputs))


class Program:
    """The executed graph of a compiled model, as the engine states it."""

    def __init__(self, compiled: Any, source: Source) -> None:
        self.nodes: dict[str, Executed] = {}
        self._by_friendly_name: dict[str, str] = {}
        for op in compiled.get_runtime_model().get_ordered_ops():
            told = op.get_rt_info()
            info = {key: told[key].astype(str) for key in _TOLD if key in told}
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
                branches=_branches(op) if kind == "Subgraph" else (),
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

    def alike(self, other: Program) -> bool:
        """Whether another model was compiled to the same kernels in the same order."""
        return [(k.type, k.primitive, k.precision, k.outputs) for k in self.kernels()] == [
            (k.type, k.primitive, k.precision, k.outputs) for k in other.kernels()
        ]

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
                moves = node.type in MOVEMENT
                if node.varying and (
                    moves or set(node.operations) <= {*candidate.path, candidate.maker}
                ):
                    todo.append(self._by_friendly_name[node.name])
        return False

    def integral(self, kernel: Executed) -> bool:
        """Whether a kernel writes integers of 8 bits as floats, which are stored as such then."""
        return any(
            node.passive and node.outputs[0] in BYTES
            for node in self.nodes.values()
            if any(self.nodes[parent] is kernel for parent in node.parents)
        )

    def _attribute(self, source: Source) -> None:
        """Give kernels the operations whose names the engine lost when it fused them.

        OpenVINO names some fused operations anew (``HSwish_17``), so that part of the model
        appears in no kernel. Such operations lie between those of known kernels: a nameless
        beginning of a Convolution is the operation that starts it, a nameless end is what
        follows up to the next kernel.
        """
        for node in [n for n in self.nodes.values() if n.type in MOVEMENT]:
            self._give_back(node, source)
        owned = {i for n in self.nodes.values() for i in n.operations}
        for key, node in self.nodes.items():
            # What rounds to 8 bits and widens these is called now by the one, now by the other.
            *before, last = sorted(node.operations) or [-1]
            grid = source.grid((last, 0)) if node.operations else None
            rounds = before or node.precision in FLOATS
            if grid and rounds and grid.port[0] not in owned:
                owned.add(grid.port[0])
                self.nodes[key] = replace(node, operations=(*before, grid.port[0]))
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
                if said := self._said(node, found, source):
                    owned |= said  # no probe: where it is shown, the engine keeps what it replaced
                    self.nodes[key] = replace(
                        node, operations=(*node.operations, *sorted(said)), ends_unnamed=True
                    )
                    continue
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

    def _said(self, node: Executed, found: Collection[int], source: Source) -> set[int]:
        """The first of the operations found, where the engine's names say only their types.

        A normalisation that it fused and takes apart again is several kernels (``ReduceMean_17``,
        ``Subtract_18``).
        """
        names = node.original.rstrip(",").split(",")
        said = [m[1] for name in names if (m := _ANEW.fullmatch(name))]
        first = sorted(found)[: len(said)]
        alike = len(said) == len(names) < len(found) and said == [source.type(n) for n in first]
        return set(first) if alike else set()

    def _give_back(self, moving: Executed, source: Source) -> None:
        """Give what only moves data no operation that computes, but the kernel that feeds it.

        An activation that the engine moves to before a reshape leaves its name behind.
        """
        computing = tuple(n for n in moving.operations if source.type(n) not in MOVEMENT)
        feeding = next(self.parents(moving), None)
        if computing and feeding:
            rest = tuple(n for n in moving.operations if n not in computing)
            own = (*feeding.operations, *computing)
            for node, operations in ((moving, rest), (feeding, own)):
                key = self._by_friendly_name[node.name]
                self.nodes[key] = replace(node, operations=operations)

    def outputs(self, kernel: Executed, source: Source) -> list[tuple[Port, str]]:
        """Ports of the model where a kernel's outputs are, with the precisions it writes.

        Numbers are topological, so the last operation of a fusion group is where it ends. What it
        writes besides is the one operation that all readers of an output read.
        """
        if not kernel.operations:
            return []
        *before, last = sorted(kernel.operations)
        found = []
        for precision, readers in kernel.branches:
            reading = [self._operations(name) for name in readers]
            read = [n for n in before if all(source.read_by(n) & some for some in reading)]
            if len(read) == 1 and precision in FLOATS:
                found.append(((read[0], 0), precision))
        ports = source.ports(last)
        precisions = kernel.outputs + kernel.outputs[-1:] * len(ports)
        return [*found, *zip(ports, precisions, strict=False)]

    def _operations(self, name: str) -> frozenset[int]:
        """The operations of an executed node, of one that computes nothing those that read it."""
        node = self.nodes[name]
        if not node.passive or node.operations:
            return frozenset(node.operations)
        readers = (key for key, n in self.nodes.items() if name in n.parents)
        return frozenset[int]().union(*map(self._operations, readers))

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
class Candidate:
    """A tensor of the executed program that a probe could observe.

    Attributes:
        port: where its value is in the model.
        element: element type that the model declares.
        precision: element type in which the program holds it.
        maker: operation by which its kernel is found.
        path: operations between the kernel's output and ``port``.
        grid: how the model widens it from 8 bits, if it does and it is no output.
        integral: whether what is held as floats are the integers.
        snapped: where the widened floats are observed of what the program holds as integers.
        midway: whether its kernel goes on from it to another output.
        wide: whether a convolution wrote floats that nothing reads as integers.
        convolved: whether it is observed as another convolution reads it.
    """

    tensor: str
    port: Port
    element: str
    precision: str
    maker: int
    path: tuple[int, ...]
    grid: Grid | None = field(default=None, compare=False)
    integral: bool = field(default=False, compare=False)
    snapped: Grid | None = field(default=None, compare=False)
    midway: bool = field(default=False, compare=False)
    wide: bool = field(default=False, compare=False)
    convolved: bool = field(default=False, compare=False)

    @property
    def written(self) -> Port:
        """Where it is observed: as the 8 bits that it is widened from, if these can be.

        Asked for the model's integers, the program would hold these instead of its own.
        """
        return self.grid.port if self.grid and not self.grid.moved else self.port

    @property
    def whole(self) -> Candidate:
        """How to observe it in the whole program.

        A kernel that rounds to 8 bits and writes floats mostly widens them: they are what it
        writes. A convolution does not: of one in floats, which may leave the rounding out, other
        kernels make 8 bits where they read those.
        """
        if self.grid is None or self.precision not in FLOATS or self.maker in self.grid.steps:
            return self
        snapped = self.grid if self.integral else None
        return replace(self, grid=None, snapped=snapped, convolved=self.wide)

    @property
    def narrow(self) -> bool:
        """Whether it is observed as 8 bits, or one."""
        shown = self.grid.element if self.grid and not self.grid.moved else self.element
        return shown in _SMALL

    @property
    def lifted(self) -> bool:
        """Whether it is observed behind one more axis, lest its kernel widen it for the probe."""
        return self.narrow or bool(self.grid and self.grid.moved)

    @property
    def probe(self) -> str:
        """Friendly name of the Result that observes it."""
        return "probe {}.{}".format(*self.port)


class Twins:
    """A program's kernels, to be recognised where parts of it are compiled apart.

    Whether or not a kernel also widens the 8 bits that it gives: every type holds them exactly.
    What only moves a value to where it is shown is no part of what computes it.
    """

    def __init__(self, program: Program, candidates: Iterable[Candidate]) -> None:
        grids = [c.grid for c in candidates if c.grid]
        self._widening = frozenset(n for grid in grids for n in grid.steps)
        self._narrow = frozenset(grid.port[0] for grid in grids)
        self._keys = {self._key(kernel) for kernel in program.kernels()}

    def make(self, candidate: Candidate, apart: Program) -> bool:
        """Whether only such kernels make a candidate in another program."""
        return all(
            self._key(kernel) in self._keys
            or self._widening.issuperset(kernel.operations)
            or (kernel.type in MOVEMENT and set(candidate.path).issuperset(kernel.operations))
            for kernel in apart.reach([candidate.probe])
        )

    def _key(self, kernel: Executed) -> tuple[str, ...]:
        kept = tuple(n for n in kernel.operations if n not in self._widening)
        outputs = () if kept and max(kept) in self._narrow else kernel.outputs
        return replace(kernel, operations=kept, outputs=outputs).key


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
            # What it goes on to compute is for one reader; the others read the model's own tensor.
            if not kernel.operations or len(source.read_by(max(kernel.operations))) < _SHARED:
                continue
        for made, precision in program.outputs(kernel, source):
            if not source.read(made):
                continue
            one = _candidate(source, program, (kernel, made, precision), outputs, reduced)
            if one is None:
                foreign.append(source.display(kernel.name))
            elif isinstance(one, Skipped):
                skipped[one.tensor] = one
            else:
                (finals if one.tensor in outputs else found).setdefault(one.tensor, one)
    return list(found.values()), list(finals.values()), list(skipped.values()), foreign


def _candidate(
    source: Source,
    program: Program,
    made_by: tuple[Executed, Port, str],
    outputs: Collection[str],
    reduced: bool,
) -> Candidate | Skipped | None:
    """How one output of a kernel could be observed; None where it is no tensor of the ONNX graph.

    Args:
        source: the model as read.
        program: what is executed.
        made_by: the kernel, the port that it computes, and the precision that it writes.
        outputs: names of the final outputs, which are always observed.
        reduced: whether the program computes in less than f32.
    """
    kernel, made, precision = made_by
    if (seen := source.observable(made)) is None:
        return None
    port, path = seen
    moved = source.onward(port) if source.crossed(kernel.operations) else None
    if moved:  # observed before it is moved, it would be computed there
        port, path = moved, (*path, moved[0])
    tensor, element = source.tensors[port], source.element_type(port)
    final = tensor in outputs
    if not final and (reason := _unobservable(element, precision, reduced)) is not None:
        return Skipped(tensor, reason)
    grid = None if final else source.grid(port)
    if grid and precision in BYTES and not reduced:
        grid = grid.held_in(precision)
    own = not path or grid or source.element_type(made) == element
    held = precision if own else element
    if reduced and not (final or grid or held in FLOATS or element in _SMALL):
        reason = f"{element} tensor, of which the program holds what it is widened from"
        return Skipped(tensor, reason)
    integral = grid is not None and precision in FLOATS and program.integral(kernel)
    wide = grid is not None and precision in FLOATS and not integral
    wide = wide and kernel.type == "Convolution" and source.convolves(port)
    return Candidate(
        *(tensor, port, element, held, made[0], path, grid, integral),
        midway=made[0] != max(kernel.operations),
        wide=wide,
    )


def _unobservable(element: str, precision: str, reduced: bool) -> str | None:
    """Why a tensor between kernels cannot be observed, by its type; None where it can.

    Args:
        element: the type that the model gives it.
        precision: the type that the program holds it in.
        reduced: whether the program computes in less than f32.
    """
    if element in _WRAPPED and precision == "i32":
        return f"{element} tensor, which the program holds in i32: a probe would wrap it"
    if element in _UNREAD:
        return f"{element} tensor, which NumPy has no type for"
    if reduced and element not in FLOATS | _SMALL:
        return f"{element} tensor in a program that computes in less than f32"
    return None


def kernel_of(executed: Executed, source: Source, program: Program) -> Kernel:
    ports = [port for port, _ in program.outputs(executed, source)]
    operations = sorted(executed.operations)
    if len(ports) == 1 and executed.outputs[0] in FLOATS and (seen := source.observable(ports[0])):
        end, path = seen
        if source.grid(end) and not program.integral(executed):  # it widens what it rounds
            ports, operations = [end], [*operations, *path]
    keys = dict.fromkeys(key for i in operations for key in source.keys[i])
    # An If whose condition the engine knows is replaced by the branch when it compiles.
    inner = (source.inner.get(name) for name in executed.original.split(","))
    keys |= dict.fromkeys(key for key in inner if key is not None)
    # What is stated for a product is the type of what it reads, or of its compressed weights.
    computed = executed.primitive.rpartition("_")[2]
    widened = computed in FLOATS and (
        executed.precision not in FLOATS or (computed == "f32" and executed.type in _HEAVY_LAYERS)
    )
    return Kernel(
        name=source.display(executed.name),
        type=executed.type,
        nodes=tuple(keys),
        outputs=tuple(source.tensors[p] for p in ports if p in source.tensors),
        primitive=executed.primitive,
        precision=computed if widened else executed.precision,
        output_precision=",".join(dict.fromkeys(executed.outputs)),
    )


def _branches(op: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The outputs of an executed node that has several."""
    if len(op.outputs()) < 2:
        return ()
    return tuple(
        (
            port.get_element_type().get_type_name(),
            tuple(reader.get_node().get_name() for reader in port.get_target_inputs()),
        )
        for port in op.outputs()
    )


def branches(
    source: Source, compile_model: Callable[[Any], Any], notes: list[str]
) -> Iterator[Kernel]:
    """Kernels of branches and of loops' bodies, compiled alone: the program hides its own."""
    found = 0
    for body in source.bodies():
        try:
            program = Program(compile_model(body.clone()), source)
        except RuntimeError:  # it may not fit these shapes: a branch never taken
            continue
        yield from (kernel_of(kernel, source, program) for kernel in program.kernels())
        found += 1
    if found:
        notes.append(
            f"What runs inside If and loops is stated by {found} of their bodies compiled "
            "alone, as the program does not say it."
        )
