"""OpenVINO: default properties are what people ship; probes are accepted only with proof.

Observing a tensor means compiling the model again with one more ``Result``. That is only
harmless where the engine still makes the same program, so every instrumented program is
compared with the plain one, kernel by kernel and output bit by output bit. A tensor that the
engine overwrites in place (the second operand of a fused Convolution + Add) cannot be observed
that way: the one kernel that makes it is compiled by itself, fed with the bits that the real
program fed it, and believed only if it is the same kernel and the tensor, fed to a kernel that
reads it, gives the very bits that the real program computed.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import (
    Availability,
    BuildRequest,
    Device,
    Kernel,
    Probe,
    Provenance,
    Skipped,
    Switch,
)
from backends import _int8, _ov_int8, _ov_kept

_DEFAULT_DEVICE = "CPU"
_PRECISION = "INFERENCE_PRECISION_HINT"
_MODE = "EXECUTION_MODE_HINT"
_REPORTED = (_PRECISION, _MODE, "PERFORMANCE_HINT", "NUM_STREAMS")
# Properties beside the precision that change numbers: the value that turns them off, the factor,
# the causes it can bring. Sources: OpenVINO's documentation, "Precision Control", "CPU Device".
_FACTORS = {
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": (
        "0",
        "dynamic quantisation of activations",
        ("precision.int8",),
    ),
    "CPU_DENORMALS_OPTIMIZATION": (
        "NO",
        "denormals taken as zero",
        ("implementation.denormals",),
    ),
}

# Layer types of the executed graph that compute nothing.
_PASSIVE = frozenset({"Const", "Reorder", "Input", "Output", "ShapeOf"})
_MOVEMENT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})
# What a DequantizeLinear becomes; a probe on an 8-bit tensor goes to the end of this chain.
_DEQUANTIZE = frozenset({"Convert", "Subtract", "Multiply"})
# Operations that each begin a kernel of their own, and the layer types of such kernels.
_HEAVY = frozenset({"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"})
_HEAVY_LAYERS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
_LOSSY = frozenset({"Reduce", "Pooling"})
_FLOATS = frozenset({"f32", "bf16", "f16", "f64"})

_RETRIES = 3  # compilations that drop what a lost kernel depends on, before bisecting
_BISECTIONS = 12  # compilations at most when bisecting
_NEAR = 3  # kernels in a row that make a tensor; where they prove nothing, its whole cone may
_CONES = 16  # compilations at most of whole ancestor cones
_REFUSALS = 2  # at most so many more that prove nothing than that do, and tensors in a row given up

# Elements of tensors that kernels compiled apart may make beyond what they are compiled for.
_TOGETHER = 1 << 18

# Operations are renamed ``#12#`` before compiling, because ONNX node names may be empty,
# repeated or contain the commas that separate ``originalLayersNames``.
_TOKEN = re.compile(r"#(\d+)#")
_DIGITS = re.compile(r"\d+")

_Port = tuple[int, int]  # operation's number, output index


# --- the executed program ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Executed:
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
        return _TOKEN.match(self.original.rstrip(",").split(",")[index]) is not None

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


class _Program:
    """The executed graph of a compiled model, as the engine states it."""

    def __init__(self, compiled: Any, source: _Source) -> None:
        self.nodes: dict[str, _Executed] = {}
        self._by_friendly_name: dict[str, str] = {}
        for op in compiled.get_runtime_model().get_ordered_ops():
            info = {key: value.astype(str) for key, value in op.get_rt_info().items()}
            parents = tuple(i.get_source_output().get_node().get_name() for i in op.inputs())
            kind = info.get("layerType", op.get_type_name())
            node = _Executed(
                name=op.get_friendly_name(),
                type=kind,
                original=info.get("originalLayersNames", ""),
                primitive=info.get("primitiveType", ""),
                precision=info.get("runtimePrecision", "").lower(),
                outputs=tuple(info.get("outputPrecisions", "").lower().split(",")),
                layouts=info.get("outputLayouts", ""),
                operations=tuple(
                    int(i) for i in _TOKEN.findall(info.get("originalLayersNames", ""))
                ),
                parents=parents,
                varying=kind == "Input" or any(self.nodes[p].varying for p in parents),
            )
            self.nodes[op.get_name()] = node
            self._by_friendly_name[node.name] = op.get_name()
        self._attribute(source)

    def kernels(self) -> list[_Executed]:
        """What computes something from the inputs, in topological order."""
        return [n for n in self.nodes.values() if n.varying and not n.passive]

    def reach(self, results: Iterable[str]) -> list[_Executed]:
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

    def reading(self, node: _Executed) -> Counter[tuple[str, ...]]:
        """Precisions of what it reads that depends on the inputs."""
        return Counter(self.nodes[p].outputs for p in node.parents if self.nodes[p].varying)

    def sources(self, node: _Executed) -> Iterator[_Executed]:
        """The nearest kernels that feed it."""
        return self._sources(node, frozenset())

    def aside(
        self, candidates: Iterable[_Candidate], results: Iterable[str]
    ) -> frozenset[_Candidate]:
        """The probes that show nothing a kernel on the way to ``results`` wrote.

        The engine computes the tensors of these for the probe alone.
        """
        useful = {kernel.name for kernel in self.reach(results)}
        return frozenset(c for c in candidates if not self._reads(c, useful))

    def _reads(self, candidate: _Candidate, useful: Collection[str]) -> bool:
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

    def _attribute(self, source: _Source) -> None:
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
        for key, node in self.nodes.items():
            if node.varying and not node.passive and not node.named(-1):
                base = node.operations or tuple(
                    max(p.operations) for p in self.parents(node) if p.operations
                )
                found = source.following(base, owned)
                ends = [n for n in found if not source.read_by(n) <= found]
                if len(ends) != 1 or all(source.type(n) in _MOVEMENT for n in found):
                    found = set()  # a tensor that the model does not have, or several
                owned |= found
                self.nodes[key] = replace(
                    node, operations=(*node.operations, *sorted(found)), ends_unnamed=not found
                )

    def parents(self, node: _Executed) -> Iterator[_Executed]:
        """The nearest kernels that feed it, those that only move data and what is before."""
        return self._sources(node, _MOVEMENT)

    def _sources(self, node: _Executed, through: Collection[str]) -> Iterator[_Executed]:
        todo = list(node.parents)
        while todo:
            parent = self.nodes[todo.pop()]
            if parent.passive or parent.type in through:
                todo += parent.parents
            if parent.varying and not parent.passive:
                yield parent


# --- the model, read once ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A tensor of the executed program that a probe could observe.

    Attributes:
        port: where its value is in the model.
        element: element type that the model declares.
        precision: element type in which the program holds it.
        maker: operation by which its kernel is found.
        path: operations between the kernel's output and ``port``.
        dequantised: whether the program holds it in 8 bits and the probe as floats.
    """

    tensor: str
    port: _Port
    element: str
    precision: str
    maker: int
    path: tuple[int, ...]
    dequantised: bool

    @property
    def probe(self) -> str:
        """Friendly name of the Result that observes it."""
        return "probe {}.{}".format(*self.port)


_NARROWED = re.compile(r"_compressed_to_f16(\.\d+)?$")
_COMPRESSED = "_compressed"  # what OpenVINO appends to the names of constants stored in float16


class _Source:
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
        self.tensors: dict[_Port, str] = {}
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
                    program = _Program(compile_model(body.clone()), self)
                except RuntimeError:  # it may not fit these shapes: a branch never taken
                    continue
                yield from (_kernel(kernel, self) for kernel in program.kernels())
                found += 1
        if found:
            notes.append(
                f"What runs inside If and loops is stated by {found} of their bodies compiled "
                "alone, as the program does not say it."
            )

    def needs(self, port: _Port, stops: Collection[_Port]) -> set[_Port]:
        """The ports among ``stops`` that the operation at ``port`` is computed from."""
        found = set[_Port]()
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
                if n in owned and self.type(n) in _MOVEMENT:
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

    def clone(self) -> tuple[Any, dict[int, Any]]:
        """A copy to change, and its operations by number."""
        copy = self.model.clone()
        numbered = {}
        for op in copy.get_ops():
            if match := _TOKEN.fullmatch(op.get_friendly_name()):
                numbered[int(match[1])] = op
        return copy, numbered

    def inputs(self, number: int) -> list[_Port]:
        """The ports that an operation reads."""
        sources = (i.get_source_output() for i in self._ops[number].inputs())
        return [(self._number[s.get_node().get_name()], s.get_index()) for s in sources]

    def shape(self, port: _Port) -> Any:
        """A port's shape as the model declares it (openvino.PartialShape)."""
        return self._ops[port[0]].output(port[1]).get_partial_shape()

    def type(self, number: int) -> str:
        """An operation's type."""
        name: str = self._ops[number].get_type_name()
        return name

    def element_type(self, port: _Port) -> str:
        """A port's element type as the model declares it."""
        name: str = self._ops[port[0]].output(port[1]).get_element_type().get_type_name()
        return name

    def types(self) -> set[str]:
        """Element types of the tensors that depend on the inputs."""
        return {self.element_type(port) for port in self.tensors if port[0] in self._varying}

    def display(self, name: str) -> str:
        """An engine's name with the model's own names put back."""
        return _TOKEN.sub(lambda m: self.names[int(m[1])], name)

    def outputs(self, kernel: _Executed) -> list[tuple[_Port, str]]:
        """Ports of the model where a kernel's outputs are, with the precisions it writes.

        Numbers are topological, so the last operation of a fusion group is where it ends.
        """
        if not kernel.operations:
            return []
        last = max(kernel.operations)
        count = len(self._ops[last].outputs())
        precisions = (kernel.outputs + kernel.outputs[-1:] * count)[:count]
        return [((last, i), precision) for i, precision in enumerate(precisions)]

    def read(self, port: _Port) -> bool:
        """Whether anything reads a port."""
        return bool(self._ops[port[0]].output(port[1]).get_target_inputs())

    def observable(self, port: _Port) -> tuple[_Port, tuple[int, ...]] | None:
        """The port whose value shows what is computed at ``port``, under an ONNX name.

        Seen through data movement; for an 8-bit tensor, its dequantised value. With it, the
        operations in between.
        """
        quantized = self.element_type(port) in ("u8", "i8")
        steps = _MOVEMENT | _DEQUANTIZE if quantized else _MOVEMENT
        path: list[int] = []
        while port not in self.tensors or (quantized and self.element_type(port) not in _FLOATS):
            readers = self._readers(self._ops[port[0]].output(port[1]))
            following = [n for n in readers if self.type(n) in steps]
            if not following:
                return None
            path.append(following[0])
            port = (following[0], 0)
        return port, tuple(path)

    def operands(self, kernel: _Executed) -> Iterator[_Port]:
        """Ports added in place by a fused Add: where its other operand comes from."""
        inside = set(kernel.operations)
        for number in kernel.operations:
            if self.type(number) != "Add" or number == min(kernel.operations):
                continue
            for port in self.inputs(number):
                origin = port
                while self.type(origin[0]) in _MOVEMENT:
                    origin = self.inputs(origin[0])[0]
                if origin[0] not in inside:
                    yield origin

    def _readers(self, port: Any) -> list[int]:
        # What nothing of the model needs still reads: the converter leaves it hanging.
        names = (i.get_node().get_name() for i in port.get_target_inputs())
        return sorted(self._number[name] for name in names if name in self._number)


class _Copy:
    """A copy of the model whose operations are lent out, each once; then another copy.

    Copying takes time in proportion to the whole model, and a deep one is cut into hundreds of
    parts.
    """

    def __init__(self, source: _Source) -> None:
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


def _candidates(
    source: _Source, program: _Program, outputs: Collection[str], reduced: bool
) -> tuple[list[_Candidate], list[_Candidate], list[Skipped], list[str]]:
    """The tensors that survive in ``program``.

    Returns:
        Those to observe, the final outputs, those that cannot be observed, and the kernels
        whose output is no tensor of the ONNX graph.
    """
    found: dict[str, _Candidate] = {}
    finals: dict[str, _Candidate] = {}
    skipped: dict[str, Skipped] = {}
    foreign: list[str] = []
    for kernel in program.kernels():
        if kernel.type in _MOVEMENT:
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
            if reduced and not final and element not in _FLOATS:
                reason = f"{element} tensor in a program that computes in less than f32"
                skipped[tensor] = Skipped(tensor, reason)
                continue
            dequantised = bool(path) and source.element_type(made) != element
            held = element if dequantised else precision
            candidate = _Candidate(tensor, port, element, held, made[0], path, dequantised)
            (finals if final else found).setdefault(tensor, candidate)
    return list(found.values()), list(finals.values()), list(skipped.values()), foreign


# --- running -------------------------------------------------------------------------------


class _Session:
    """A compiled model and its one inference request."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.inputs = tuple(compiled.inputs)
        self._types = tuple(o.get_element_type().get_type_name() for o in compiled.outputs)
        self._request = compiled.create_infer_request()

    def infer(self, feeds: Sequence[Array], wanted: Sequence[int]) -> list[Array]:
        """The outputs at the indices ``wanted``, copied; bfloat16 widened to float32.

        Raises:
            BackendError: the engine failed.
        """
        try:
            for index, (port, value) in enumerate(zip(self.inputs, feeds, strict=True)):
                self._request.set_input_tensor(index, _tensor(value, port))
            self._request.infer()
            return [
                _decoded(self._request.get_output_tensor(index).data, self._types[index])
                for index in wanted
            ]
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed to run: {_reason(error)}", stage="run") from error


def _tensor(value: Array, port: Any) -> Any:
    import openvino as ov

    contiguous = np.ascontiguousarray(value).reshape(value.shape)  # 0-d stays 0-d
    if port.get_element_type() == ov.Type.bf16:
        # OpenVINO's numpy view of bfloat16 is float16 by name: hand over the bits.
        tensor = ov.Tensor(ov.Type.bf16, ov.Shape(value.shape))
        if value.dtype.itemsize != 2:
            raise BackendError(
                f"the bfloat16 input needs 16-bit values, not {value.dtype}", stage="run"
            )
        tensor.data[...] = contiguous.view(np.float16)
        return tensor
    return ov.Tensor(contiguous)


def _decoded(data: Array, kind: str) -> Array:
    """A copy of an output tensor's data; ``kind`` bf16 arrives as float16 with bfloat16's bits."""
    if kind == "bf16":
        widened: Array = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return widened
    return np.array(data)


def _same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@dataclass(frozen=True, slots=True)
class _CutOut:
    """Kernels compiled apart from the rest.

    Attributes:
        feeds: tensor fed to each parameter, in order.
        targets: what each result shows, in order.
    """

    session: _Session
    program: _Program
    feeds: tuple[str, ...]
    targets: tuple[_Candidate, ...]

    def run(self, known: Mapping[str, Array], wanted: Collection[_Candidate]) -> Arrays:
        """Values of the targets ``wanted``, by tensor name.

        Other targets may be what they are made from. While these are not known, their readers run
        on zeros, to no effect: no kernel serves two targets.
        """
        waiting = {c.tensor for c in self.targets} - known.keys()
        feeds = [
            _zeros(port) if name in waiting else _held(known[name], port)
            for name, port in zip(self.feeds, self.session.inputs, strict=True)
        ]
        indices = [i for i, c in enumerate(self.targets) if c in wanted]
        shown = [self.targets[i] for i in indices]
        values = self.session.infer(feeds, indices)
        return {c.tensor: _shown(v, c) for c, v in zip(shown, values, strict=True)}


_Cut = tuple[_CutOut, tuple[_Candidate, ...]]  # and the targets to take from it


def _held(value: Array, port: Any) -> Array:
    """A known value in the type that a parameter takes; bfloat16 stays the bits it is."""
    if port.get_element_type().get_type_name() == "bf16":
        return value
    return value.astype(port.get_element_type().to_dtype(), copy=False)


def _zeros(port: Any) -> Array:
    return np.zeros(tuple(port.get_shape()), port.get_element_type().to_dtype())


def _shown(value: Array, candidate: _Candidate) -> Array:
    """A probe's value in the model's own type; bfloat16 has none in numpy and stays float32."""
    own = {"f16": np.float16, "f32": np.float32, "bf16": np.float32, "f64": np.float64}
    return value.astype(own.get(candidate.element, value.dtype), copy=False)


# --- build and instrumentation -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trial:
    """A compilation of the whole model with probes.

    Attributes:
        suspects: makers of the tensors whose probes may have changed the program.
        proved: whether it is the plain program and gave the same outputs, bit by bit.
        aside: probes whose tensor is computed for the probe alone.
    """

    session: _Session
    probes: tuple[_Candidate, ...] = ()
    suspects: frozenset[int] = frozenset()
    proved: bool = False
    aside: frozenset[_Candidate] = frozenset()


@dataclass(slots=True)
class _Instrumented:
    """The program with probes; see ``auditor.ports.Instrumented``."""

    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    _build: _Build
    rebuilt: bool
    _trial: _Trial
    _cuts: tuple[_Cut, ...]

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """Run the instrumented program, then the kernels compiled apart on what it captured.

        Raises:
            BackendError: the engine failed.
        """
        outputs, tensors = self._build.capture(self._trial.session, self._trial.probes, feeds)
        known = {**feeds, **outputs, **tensors}
        for cut, wanted in self._cuts:
            made = cut.run(known, wanted)
            tensors |= made
            known |= made
        return Capture(outputs, {p.tensor: tensors[p.tensor] for p in self.probes})


@dataclass(slots=True)
class _Build:
    """A compiled model; see ``auditor.ports.Build``."""

    provenance: Provenance
    _compile: Callable[[Any], Any]
    _source: _Source
    _session: _Session
    _program: _Program
    _inputs: tuple[str, ...]
    _outputs: tuple[tuple[str, int], ...]  # ONNX name, index among the engine's results
    _candidates: tuple[_Candidate, ...]
    _finals: tuple[_Candidate, ...]
    _skipped: tuple[Skipped, ...]
    switches: tuple[Switch, ...]
    _quantised: _int8.Quantised | None
    blocked: str | None = None

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Run the plain program.

        Raises:
            BackendError: the engine failed.
        """
        return self.capture(self._session, (), feeds)[0]

    def constants(self) -> Arrays:
        """The model's constants as it was read, by the names that they had in ONNX."""
        return self._quantised.weights if self._quantised else self._source.constants()

    def grids(self) -> Arrays:
        """What activations are rounded to, where the model was quantised here."""
        return self._quantised.grids if self._quantised else {}

    def capture(
        self, session: _Session, probes: Sequence[_Candidate], feeds: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays]:
        """Final outputs, and the values of ``probes``, the results that follow them."""
        results = len(self._source.results)
        values = session.infer([feeds[n] for n in self._inputs], range(results + len(probes)))
        return (
            {name: values[index] for name, index in self._outputs},
            {c.tensor: _shown(v, c) for c, v in zip(probes, values[results:], strict=True)},
        )

    def instrument(self, feeds: Mapping[str, Array]) -> _Instrumented:
        """Observe all that can be observed with proof; ``feeds`` is used for the proofs.

        Raises:
            BackendError: the engine failed.
        """
        trial = self._observe(feeds)
        outputs, tensors = self.capture(trial.session, trial.probes, feeds)
        observed = [c for c in trial.probes if c not in trial.aside]
        missing = [c for c in self._candidates if c not in trial.probes]
        known = {**feeds, **outputs, **{c.tensor: tensors[c.tensor] for c in observed}}
        cuts, found = self._apart(missing, observed, known) if observed else ([], set())
        reasons = {c: "the engine would compute it for the probe alone" for c in trial.aside}
        reasons |= {
            c: "observing it would change the program, and its kernel could not be run apart"
            for c in missing
            if c not in found
        }
        return _Instrumented(
            probes=(
                *(Probe(c.tensor) for c in observed),
                *(Probe(c.tensor, "cone-proved") for c in missing if c in found),
            ),
            skipped=(*self._skipped, *(Skipped(c.tensor, why) for c, why in reasons.items())),
            program_unchanged=trial.proved,  # without a probe it is the plain program itself
            rebuilt=trial.session is not self._session,
            _build=self,
            _trial=trial,
            _cuts=tuple(cuts),
        )

    # --- probes in the whole program ---

    def _observe(self, feeds: Mapping[str, Array]) -> _Trial:
        """Compile with as many probes as leave the program unchanged."""
        plain = self.run(feeds)
        overwritten = {p for k in self._program.kernels() for p in self._source.operands(k)}
        kept = [c for c in self._candidates if (c.maker, 0) not in overwritten]
        for _ in range(_RETRIES):
            trial = self._try(kept, plain, feeds)
            if trial.proved:
                return trial
            fewer = [c for c in kept if c.maker not in self._with_sums(trial.suspects)]
            if len(fewer) == len(kept):
                break
            kept = fewer
        return self._bisect(kept, plain, feeds)

    def _with_sums(self, suspects: frozenset[int]) -> frozenset[int]:
        """With them, the sums over what they make.

        With only a sum observed, OpenVINO leaves off rounding what it reads.
        """
        return suspects | {
            max(kernel.operations)
            for kernel in self._program.kernels()
            if kernel.type == "Reduce" and kernel.operations
            for parent in self._program.parents(kernel)
            if suspects & {*parent.operations}
        }

    def _suspects(self, changed: _Program, probes: Sequence[_Candidate]) -> frozenset[int]:
        """Which kernels' outputs to leave alone for the program to stay as it is.

        A kernel that ``changed`` still has in another form was fused with what it reads; one
        that it no longer has was fused with what reads it.
        """
        probed = {c.maker for c in probes}
        same = {kernel.key for kernel in changed.kernels()}
        ends = {kernel.end for kernel in changed.kernels() if kernel.type not in _MOVEMENT}
        suspects = set[int]()
        for kernel in self._program.kernels():
            if kernel.key not in same:
                read = {max(k.operations) for k in self._program.parents(kernel) if k.operations}
                own = {max(kernel.operations)} if kernel.operations else set()
                suspects |= (read & probed or own) if kernel.end in ends else own
        return frozenset(suspects) or self._crossed(changed, probed)

    def _crossed(self, changed: _Program, probed: Collection[int]) -> frozenset[int]:
        """Observed operations that a kernel moved past, in a program with the same kernels.

        OpenVINO moves attention's scale from the keys to where they were repeated for all heads, or
        not, depending on whether what lies between is read by others.
        """
        results = self._source.results
        plain, other = self._program.reads(results), changed.reads(results)
        moved = {key for key in (*plain, *other) if plain[key] != other[key]}
        ends = {
            end for key in moved for end in (plain[key] - other[key]) | (other[key] - plain[key])
        }
        kernels = self._program.kernels()
        corners = {k.name for k in kernels if k.key in moved or k.end in ends}
        between = {
            max(step.operations)
            for kernel in kernels
            if kernel.name in corners
            for source in self._program.sources(kernel)
            for step in self._chain(source, corners)
            if step.operations
        }
        found = between & set(probed)
        return frozenset(found) or frozenset(
            max(k.operations) for k in kernels if k.operations and k.end in ends
        )

    def _chain(self, kernel: _Executed, ends: Collection[str]) -> list[_Executed]:
        """A kernel and what is above it, up to one of ``ends``; nothing where several feed one."""
        chain = []
        while kernel.name not in ends:
            above = list(self._program.sources(kernel))
            if len(above) != 1:
                return []
            chain.append(kernel)
            kernel = above[0]
        return chain

    def _bisect(
        self, kept: Sequence[_Candidate], plain: Arrays, feeds: Mapping[str, Array]
    ) -> _Trial:
        """Add probes by halves, keeping those that change nothing, within a few compilations."""
        best = self._try((), plain, feeds)
        todo = [kept] if kept else []
        for _ in range(_BISECTIONS):
            if not todo:
                break
            part = todo.pop()
            trial = self._try((*best.probes, *part), plain, feeds)
            if trial.proved:
                best = trial
            elif len(part) > 1:
                half = len(part) // 2
                todo += [part[half:], part[:half]]
        return best

    def _try(
        self, probes: Sequence[_Candidate], plain: Arrays, feeds: Mapping[str, Array]
    ) -> _Trial:
        """Compile with ``probes``, and compare with the plain program and its outputs."""
        if not probes:
            return _Trial(self._session, proved=True)
        model, ops = self._source.clone()
        model.add_results([_result(ops[c.port[0]].output(c.port[1]), c) for c in probes])
        session, program = self._compiled(model)
        results = self._source.results
        expected, made = (p.fingerprint(results) for p in (self._program, program))
        if made != expected:
            return _Trial(session, tuple(probes), self._suspects(program, probes))
        outputs, _ = self.capture(session, probes, feeds)
        return _Trial(
            session,
            tuple(probes),
            proved=all(_same_bits(outputs[name], plain[name]) for name in plain),
            aside=program.aside(probes, results),
        )

    # --- probes on kernels compiled apart ---

    def _apart(
        self,
        missing: Sequence[_Candidate],
        observed: Sequence[_Candidate],
        known: Mapping[str, Array],
    ) -> tuple[list[_Cut], set[_Candidate]]:
        """Make ``missing`` outside the whole program: each kernel alone, else with what feeds it.

        Returns:
            What to run, in order, and the candidates whose values it is proved to give.
        """
        # A kernel apart does not write 8 bits: nothing after it asks for them.
        missing = [c for c in missing if not c.dequantised]
        if not missing:
            return [], set()
        cuts, found, faithful = self._alone(missing, observed, known)
        cones = refused = strayed = 0
        copy = _Copy(self._source)
        rest = [c for c in missing if c not in found]
        # What ran as another kernel when it was alone mostly does so at the end of its cone, and a
        # reduction reads what nothing else asks for in another precision.
        last = {c: self._maker(c).type in _LOSSY for c in rest}
        for candidate in sorted(rest, key=lambda c: (last[c], c not in faithful)):
            cut = None
            if strayed < _REFUSALS:
                cut = self._near(candidate, observed, known, copy)
                strayed += 1 if cut is None else -1
            if cut is None and cones < _CONES:
                cones += 1
                cut = self._cone(candidate, observed, known)
            if cut is not None:
                cuts.append((cut, (candidate,)))
                found.add(candidate)
                refused = 0
            elif (refused := refused + 1) == _REFUSALS:
                break
        return cuts, found

    def _alone(
        self,
        missing: Sequence[_Candidate],
        observed: Sequence[_Candidate],
        known: Mapping[str, Array],
    ) -> tuple[list[_Cut], set[_Candidate], Collection[_Candidate]]:
        """Compile the kernels that make ``missing``, each fed with captured values.

        A tensor is accepted when its kernel is the plain program's, and what reads it makes
        from it the very bits that the whole program made (or another tensor accepted so).

        Returns:
            What to run, what is accepted, and whose kernel is the plain program's.
        """
        stops = {c.port: c.tensor for c in (*missing, *observed)}
        stops |= {port: name for port, name in self._source.tensors.items() if name in known}
        plain = {kernel.key for kernel in self._program.kernels()}
        cuts: list[_Cut] = []
        known = dict(known)
        faithful: list[_Candidate] = []
        copy = _Copy(self._source)
        for levels in self._together(self._levels(missing, stops), stops):
            cut = self._cut_out([c for level in levels for c in level], stops, copy)
            for level in levels:
                known |= cut.run(known, level)
                cuts.append((cut, tuple(level)))
                faithful += [
                    c for c in level if all(k.key in plain for k in cut.program.reach([c.probe]))
                ]
        reading = self._readers()
        readers = {c: reading.get(c.maker, set()) for c in faithful}
        # One reader each is proof enough; one that sums over its input is the worst, because
        # its own rounding depends on the layout it is given.
        lossy = {
            max(k.operations) for k in self._program.kernels() if k.operations and k.type in _LOSSY
        }
        witnesses = []
        for makers in readers.values():
            able = [c for c in (*observed, *self._finals) if c.maker in makers]
            witnesses += sorted(able, key=lambda c: (c.maker in lossy, c.port))[:1]
        unique = tuple(dict.fromkeys(witnesses))
        proved = {c.maker for c in self._witnessed(unique, stops, known)}
        for candidate in sorted(readers, key=lambda c: c.port, reverse=True):
            if readers[candidate] & proved:
                proved.add(candidate.maker)
        return cuts, {c for c in readers if c.maker in proved}, readers.keys()

    def _levels(
        self, missing: Sequence[_Candidate], stops: Mapping[_Port, str]
    ) -> list[list[_Candidate]]:
        """``missing`` in groups, each of which reads tensors of earlier groups only."""
        levels: list[list[_Candidate]] = []
        depth: dict[_Port, int] = {}
        for candidate in sorted(missing, key=lambda c: c.port):  # operations are in order
            needs = self._source.needs(candidate.port, stops)
            depth[candidate.port] = level = max((depth.get(p, -1) for p in needs), default=-1) + 1
            if level == len(levels):
                levels.append([])
            levels[level].append(candidate)
        return levels

    def _together(
        self, levels: Sequence[list[_Candidate]], stops: Mapping[_Port, str]
    ) -> Iterator[list[list[_Candidate]]]:
        """Levels in a row to compile as one model, which runs once for each of them.

        They share no operation, and are so small that running all of them each time costs less than
        compiling them one by one.
        """
        part: list[list[_Candidate]] = []
        size = 0
        used = set[int]()
        for level in levels:
            behind = self._behind(level, stops)
            more = sum(self._elements(c) for c in level)
            if part and ((len(part) + 1) * (size + more) > _TOGETHER or used & behind):
                yield part
                part, size, used = [], 0, set()
            part.append(level)
            size += more
            used |= behind
        if part:
            yield part

    def _elements(self, candidate: _Candidate) -> int:
        shape = self._source.shape(candidate.port)
        return math.prod(shape.to_shape()) if shape.is_static else _TOGETHER

    def _witnessed(
        self,
        witnesses: Sequence[_Candidate],
        stops: Mapping[_Port, str],
        known: Mapping[str, Array],
    ) -> list[_Candidate]:
        """Those whose operations, compiled alone, give the captured bits."""
        if not witnesses:
            return []
        cut = self._cut_out(witnesses, stops)
        values = cut.run(known, witnesses)
        return [c for c in witnesses if _same_bits(values[c.tensor], known[c.tensor])]

    def _near(
        self,
        candidate: _Candidate,
        observed: Sequence[_Candidate],
        known: Mapping[str, Array],
        copy: _Copy,
    ) -> _CutOut | None:
        """Compile the last few kernels on the way to ``candidate``, fed with captured values.

        Accepted when they are the plain program's, in its layouts (a kernel alone may be given
        another, and a sum then rounds otherwise), read the same precisions, and every probe among
        them gives the captured bits.
        """
        near = {candidate.maker}
        rim = [self._maker(candidate)]
        for _ in range(_NEAR - 1):
            rim = [p for k in rim for p in self._program.parents(k) if p.operations]
            near |= {max(k.operations) for k in rim}
        stops = {c.port: c.tensor for c in observed if c.maker not in near}
        checks = [c for c in observed if c.maker in near]
        if not checks:
            return None
        cut = self._cut_out((*checks, candidate), stops, copy)
        plain = {kernel.key: kernel for kernel in self._program.kernels()}
        for kernel in cut.program.reach([candidate.probe]):
            twin = plain.get(kernel.key)
            if twin is None or twin.layouts != kernel.layouts:
                return None
            if cut.program.reading(kernel) != self._program.reading(twin):
                return None
            read = Counter(p.end for p in cut.program.sources(kernel))
            if not read <= Counter(p.end for p in self._program.sources(twin)):
                return None
        return self._checked(cut, checks, known)

    def _cone(
        self, candidate: _Candidate, observed: Sequence[_Candidate], known: Mapping[str, Array]
    ) -> _CutOut | None:
        """Compile the whole ancestor cone of ``candidate`` without what follows it.

        Accepted when its kernels are the plain program's and every upstream probe in it gives
        the captured bits.
        """
        maker = self._maker(candidate)
        upstream = {max(k.operations) for k in self._program.reach([maker.name]) if k.operations}
        checks = [c for c in observed if c.maker in upstream]
        cut = self._cut_out((*checks, candidate), {})
        cone = self._program.fingerprint([maker.name])
        if cut.program.fingerprint([candidate.probe]) != cone:
            return None
        return self._checked(cut, checks, known)

    def _maker(self, candidate: _Candidate) -> _Executed:
        return next(k for k in self._program.kernels() if candidate.maker in k.operations)

    def _checked(
        self, cut: _CutOut, checks: Sequence[_Candidate], known: Mapping[str, Array]
    ) -> _CutOut | None:
        """A cut-out, if what it makes of ``checks`` are the captured bits."""
        values = cut.run(known, checks)
        return cut if all(_same_bits(values[c.tensor], known[c.tensor]) for c in checks) else None

    def _readers(self) -> dict[int, set[int]]:
        """By operation, the makers (see ``_Candidate``) of the kernels that read what it makes."""
        readers: dict[int, set[int]] = {}
        for kernel in self._program.kernels():
            for parent in self._program.parents(kernel) if kernel.operations else ():
                for number in parent.operations:
                    readers.setdefault(number, set()).add(max(kernel.operations))
        return readers

    def _cut_out(
        self,
        targets: Sequence[_Candidate],
        stops: Mapping[_Port, str],
        copy: _Copy | None = None,
    ) -> _CutOut:
        """Compile what makes ``targets`` from the tensors ``stops`` and the model's inputs.

        ``copy`` lends its operations to several cut-outs as long as they share none.
        """
        import openvino as ov
        from openvino import opset13 as opset

        needed = self._behind(targets, stops)
        ops = (copy or _Copy(self._source)).lend(needed)
        names: list[str] = []
        parameters: list[Any] = []
        seen: set[int] = set()
        for target in targets:
            # A second reader of a parameter would keep the engine from overwriting it in place:
            # each target has its own.
            values: dict[_Port, Any] = {}
            todo = [target.port[0]]
            while todo:
                number = todo.pop()
                if number in seen:
                    continue
                seen.add(number)
                for index, port in enumerate(self._source.inputs(number)):
                    entry = self._source.type(port[0]) == "Parameter"
                    if not entry and port not in stops:
                        todo.append(port[0])
                        continue
                    if port not in values:
                        element = self._source.element_type(port)
                        held = element if entry or element not in _FLOATS else "f32"
                        made = opset.parameter(self._source.shape(port), _ov_type(held))
                        names.append(self._source.tensors[port] if entry else stops[port])
                        parameters.append(made)
                        if held != element:
                            made = opset.convert(made, _ov_type(element))
                        values[port] = made.output(0)
                    ops[number].input(index).replace_source_output(values[port])
        results = [_result(ops[c.port[0]].output(c.port[1]), c) for c in targets]
        session, program = self._compiled(ov.Model(results, parameters, "apart"))
        return _CutOut(session, program, tuple(names), tuple(targets))

    def _behind(self, targets: Sequence[_Candidate], stops: Mapping[_Port, str]) -> set[int]:
        """The operations that make ``targets`` from ``stops`` and the model's inputs."""
        found = {target.port[0] for target in targets}
        todo = list(found)
        while todo:
            for port in self._source.inputs(todo.pop()):
                entry = self._source.type(port[0]) == "Parameter"
                if not entry and port not in stops and port[0] not in found:
                    found.add(port[0])
                    todo.append(port[0])
        return found

    def _compiled(self, model: Any) -> tuple[_Session, _Program]:
        try:
            compiled = self._compile(model)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO failed to compile the model with probes: {_reason(error)}",
                stage="instrument",
            ) from error
        return _Session(compiled), _Program(compiled, self._source)


def _result(port: Any, candidate: _Candidate) -> Any:
    """A Result in the precision that the program holds: another would change the program."""
    from openvino import opset13 as opset

    element = port.get_element_type().get_type_name()
    if candidate.precision in _FLOATS and candidate.precision != element:
        port = opset.convert(port, _ov_type(candidate.precision)).output(0)
    result = opset.result(port)
    result.set_friendly_name(candidate.probe)
    return result


def _ov_type(name: str) -> Any:
    import openvino as ov

    return getattr(ov.Type, name if name != "bool" else "boolean")


# --- the backend -----------------------------------------------------------------------------


_SCRIPT = """\
import onnx
import openvino


def run(path, feeds):
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), {device!r}, {properties!r})
    results = compiled([np.ascontiguousarray(value) for value in feeds.values()])
    names = [output.name for output in onnx.load(path).graph.output]
    return {{name: results[index] for index, name in enumerate(names)}}


def version():
    return f"OpenVINO {{openvino.__version__}}"
"""


class OpenVINO:
    """Intel's OpenVINO runtime on any device its Core lists."""

    title = "OpenVINO"
    artifacts = (".xml",)
    keeps = ".xml"

    def availability(self) -> Availability:
        """Whether the package is installed, and the devices it finds."""
        try:
            ov = _import()
            core = ov.Core()
            ids = sorted(core.available_devices, key=lambda d: d != _DEFAULT_DEVICE)
            devices = tuple(
                Device("" if d == _DEFAULT_DEVICE else d, core.get_property(d, "FULL_DEVICE_NAME"))
                for d in ids
            )
        except (ImportError, OSError, RuntimeError) as error:
            return Availability(
                False,
                self.title,
                reason=f"openvino cannot be imported: {_reason(error)}",
                remedy="Install it: pip install 'sysnoise-auditor[ov]'.",
            )
        return Availability(True, self.title, _version(ov), devices)

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """The same properties on the same device."""
        _int8.refuse(options)
        properties: dict[str, Any] = {k: v for k, v in options.items() if k != _int8.OPTION}
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        source = _SCRIPT.format(device=device or _DEFAULT_DEVICE, properties=properties)
        return Script(self.title, "openvino, onnx", source)

    def build(self, request: BuildRequest) -> _Build:
        """Compile with OpenVINO's default properties and the options asked for.

        Raises:
            BackendError: an operator that OpenVINO does not have, or a model it refuses.
            UsageError: a device or property that is not there.
        """
        ov = _import()
        core = ov.Core()
        device = _device(core, request.device)
        quantise, request = _int8.asked(request)
        properties: dict[str, Any] = dict(_checked(core, device, request.options))
        if request.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = request.threads
        if request.kept:
            _keep(core, request, device)
        quantised = None
        if quantise:
            path = request.workdir / "int8.xml"
            quantised = _ov_int8.write(_read(core, request), request, path)
            request = replace(request, artifact=path)
        with ThreadPoolExecutor(1) as pool:
            # Reading the names overlaps with OpenVINO's own work.
            reading = pool.submit(_onnx_names, request.model_path)
            notes: list[str] = []
            model = _read(core, request, notes)
            inputs, outputs, nodes, inner = reading.result()
        if request.artifact is not None:
            _require_same(model, inputs, outputs, request.artifact)
        source = _Source(model, nodes, inner)
        notes += _narrowed(source) if device == _DEFAULT_DEVICE else ()
        if request.artifact is not None:
            notes.append(_stored(model, request.artifact))
        if quantised:
            notes.insert(0, quantised.note)

        def compile_model(changed: Any) -> Any:
            return core.compile_model(changed, device, properties)

        try:
            compiled = compile_model(model.clone())
        except RuntimeError as error:
            raise _compile_error(error, request.options) from error
        effective = {
            name: _text(compiled.get_property(name))
            for name in _REPORTED
            if name in compiled.get_property("SUPPORTED_PROPERTIES")
        }
        precision = effective.get(_PRECISION, "f32")
        session, program = _Session(compiled), _Program(compiled, source)
        if request.dynamic and not request.open:
            shapes = ", ".join(f"{n}: {'x'.join(map(str, s))}" for n, s in request.shapes.items())
            notes.insert(0, f"The model was compiled at these static shapes: {shapes}.")
        if precision != "f32" and _PRECISION not in request.options:
            notes.insert(
                0,
                f"OpenVINO computes in {precision} by default on this device although the model "
                f"is f32; --option ov.{_PRECISION}=f32 keeps f32.",
            )
        asked = request.options.get(_PRECISION, precision)
        if asked not in (precision, "undefined"):
            notes.insert(0, f"{asked} was asked for; this device computes in {precision} instead.")
        candidates, finals, skipped, foreign = _candidates(
            source, program, outputs, reduced=precision != "f32"
        )
        if foreign:
            notes.append(
                f"{len(foreign)} of the compiled program's tensors are no tensor of the ONNX graph "
                f"and are audited together with what reads them: {', '.join(foreign)}."
            )
        return _Build(
            provenance=Provenance(
                engine=self.title,
                version=_version(ov),
                device=core.get_property(device, "FULL_DEVICE_NAME"),
                options=({_int8.OPTION: "int8"} if quantised else {})
                | {k: _text(v) for k, v in properties.items()}
                | effective,
                kernels=(
                    *(_kernel(k, source) for k in program.kernels()),
                    *source.branches(compile_model, notes),
                ),
                notes=tuple(notes),
            ),
            _compile=compile_model,
            _source=source,
            _session=session,
            _program=program,
            _inputs=tuple(_name(port, inputs) for port in session.inputs),
            _outputs=_outputs(model, outputs),
            _candidates=tuple(candidates),
            _finals=tuple(finals),
            _skipped=tuple(skipped),
            switches=(
                *((_int8.SWITCH,) if quantised else ()),
                *_switches(compiled, request.options),
            ),
            _quantised=quantised,
        )


def _switches(compiled: Any, asked: Mapping[str, str]) -> Iterator[Switch]:
    """The factors that are on in a compiled model and change its numbers."""
    known = compiled.get_property("SUPPORTED_PROPERTIES")

    def value(name: str) -> str:
        return _text(compiled.get_property(name)) if name in known else ""

    if (precision := value(_PRECISION)) not in ("", "f32"):
        narrow = ("precision.bf16", "precision.fp16")
        yield Switch(f"inference in {precision}", {_PRECISION: "f32"}, narrow)
    for name, (off, factor, noises) in _FACTORS.items():
        if value(name).upper() not in ("", off, "0", "NO", "FALSE"):
            yield Switch(factor, {name: off}, noises)
    if value(_MODE) == "PERFORMANCE" and _PRECISION not in asked:  # which would come before it
        yield Switch("execution mode PERFORMANCE", {_MODE: "ACCURACY"})


def _import() -> Any:
    """Import openvino without its model converter, which nothing here uses.

    The converter brings openvino_telemetry with it and takes a third of the import's time;
    openvino's own ``__init__`` goes on without it.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    converter = "openvino.tools.ovc"
    sys.modules[converter] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules[converter]
    return openvino


def _version(ov: Any) -> str:
    version: str = ov.get_version().split("-")[0]
    return version


def _device(core: Any, asked: str | None) -> str:
    devices = list(core.available_devices)
    device = asked or _DEFAULT_DEVICE
    if device not in devices:
        raise UsageError(
            f"OpenVINO has no device {device!r} here", f"Devices here: {', '.join(devices)}."
        )
    return device


def _checked(core: Any, device: str, options: Mapping[str, str]) -> Mapping[str, str]:
    access = core.get_property(device, "SUPPORTED_PROPERTIES")
    known = sorted(name for name, mode in access.items() if mode == "RW")
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name.upper(), known, 3, 0.4) or known
            raise UsageError(
                f"OpenVINO's {device} device has no property {name!r} that can be set",
                f"Closest: {', '.join(close)}.",
            )
    return options


def _onnx_names(path: Path) -> tuple[list[str], list[str], dict[str, str], dict[str, str]]:
    """Input names, output names, and for each tensor the key of the node that makes it.

    Those that nodes of subgraphs make come apart, last, with the names of the nodes too.
    """
    from auditor import weights

    graph = weights.read(path).graph
    inputs = [i.name for i in graph.input]
    inner: dict[str, str] = {}

    def named(nodes: Any) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in nodes:
            names = [name for name in node.output if name]
            found |= dict.fromkeys(names, names[0]) if names else {}
            for body in (a.g for a in node.attribute if a.HasField("g")):
                inner.update(named(body.node))
                inner.update({n.name: n.output[0] for n in body.node if n.name and n.output})
        return found

    nodes = {name: name for name in inputs} | named(graph.node)
    return inputs, [o.name for o in graph.output], nodes, inner


# The two ways in which OpenVINO's ONNX front end lists what it cannot convert.
_UNCONVERTED = re.compile(
    r"(?:No conversion rule found for operations?|Conversion is failed for): (.+)"
)


def _require_same(
    model: Any, inputs: Sequence[str], outputs: Sequence[str], artifact: Path
) -> None:
    """Refuse a file that was not made of the ONNX model.

    Raises:
        BackendError: an input or an output is missing, or stands elsewhere.
    """
    for what, ports, names in (
        ("input", model.inputs, inputs),
        ("output", model.outputs, outputs),
    ):
        for position, name in enumerate(names):
            if position >= len(ports) or name not in ports[position].get_names():
                has = ", ".join(min(port.get_names(), default="?") for port in ports)
                raise BackendError(
                    f"{artifact.name} has no {what} `{name}` at place {position + 1}; its {what}s: "
                    f"{has}",
                    "Convert the file anew from this ONNX model.",
                )


def _stored(model: Any, artifact: Path) -> str:
    """How the file stores its weights, as a sentence."""
    kinds: dict[str, int] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type().get_type_name()
            if kind.startswith(("f", "bf")) or kind in ("i8", "u8", "i4", "u4"):
                kinds[kind] = kinds.get(kind, 0) + 1
    said = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    return f"{artifact.name} was loaded instead of compiling the ONNX file; its constants: {said}."


def _read(core: Any, request: BuildRequest, notes: list[str] | None = None) -> Any:
    """The model as OpenVINO reads it, at the request's shapes; ``notes`` gets what is to be said.

    Some models convert only where the shapes are known from the start: what depends on them, an If
    for instance, has no rank before.
    """
    shapes = request.shapes if request.dynamic and not request.open else {}
    try:
        model = core.read_model(request.artifact or request.model_path)
        names = {name for port in model.inputs for name in port.get_names()}
        if shapes:
            model.reshape({n: list(s) for n, s in shapes.items() if n in names})
        return model
    except RuntimeError as error:
        if shapes and request.artifact is None:
            with contextlib.suppress(Exception):  # the front end's errors have no other base
                model = _read_at(request.model_path, shapes)
                if notes is not None:
                    notes.append(
                        "OpenVINO converts this model only with the shapes of its inputs given "
                        "beforehand, as openvino.convert_model(..., input=...) does."
                    )
                return model
        if match := _UNCONVERTED.search(str(error)):
            raise BackendError(
                f"OpenVINO has no conversion for {match[1].strip()} as it is used here",
                "Export the model without it, or rewrite it with standard operators.",
            ) from error
        raise BackendError(f"OpenVINO cannot read the model: {_reason(error)}") from error


def _read_at(path: Path, shapes: Mapping[str, Sequence[int]]) -> Any:
    """The model converted at these shapes of its inputs; raises what the front end does."""
    ov = _import()
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    model = frontend.load(str(path))
    for place in model.get_inputs():
        name = next((n for n in place.get_names() if n in shapes), None)
        if name is not None:
            model.set_partial_shape(place, ov.PartialShape(list(shapes[name])))
    return frontend.convert(model)


def _keep(core: Any, request: BuildRequest, device: str) -> None:
    """Write the model with these nodes in float32 to ``request.artifact``."""
    assert request.artifact is not None
    model = _read(core, replace(request, artifact=None, dynamic=False))
    source = _Source(model, *_onnx_names(request.model_path)[2:])
    wanted = set(request.kept)

    def kept(name: str) -> bool | None:
        numbers = [int(number) for number in _TOKEN.findall(name)]
        return any(wanted.intersection(source.keys[n]) for n in numbers) if numbers else None

    try:
        own = device == _DEFAULT_DEVICE
        _ov_kept.write(model, request.artifact, kept, source.display, products=own)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot write the model: {_reason(error)}") from error


def _compile_error(error: RuntimeError, options: Mapping[str, str]) -> Exception:
    reason = _reason(error)
    if wrong := [n for n, v in options.items() if n in reason or f" {v}" in reason]:
        return UsageError(f"OpenVINO refused the value of {wrong[0]}: {reason}")
    return BackendError(
        f"OpenVINO cannot compile the model: {reason}",
        "Export the operator it names differently, or give another opset version.",
    )


def _reason(error: BaseException) -> str:
    """What an OpenVINO exception says, without the source lines it passed through."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [x for x in lines if x and not x.startswith(("Exception from", "Check '"))]
    return " ".join(kept)[:1000] or type(error).__name__


def _name(port: Any, names: Sequence[str]) -> str:
    """The ONNX name of a graph input.

    An operator that OpenVINO drops leaves its output's name to its input, whose own name then is
    only the node's.
    """
    known = port.get_names() | {port.get_node().get_friendly_name()}
    return next((name for name in names if name in known), port.get_any_name())


def _outputs(model: Any, names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Which of the engine's results each ONNX output is, by name and else by position."""
    ports = [port.get_names() for port in model.outputs]
    return tuple(
        (name, next((i for i, known in enumerate(ports) if name in known), position))
        for position, name in enumerate(names)
    )


def _narrowed(source: _Source) -> Iterator[str]:
    """What OpenVINO's CPU device computes in fewer bits than the model says."""
    types = source.types()
    if types & {"i64", "u64"}:
        yield (
            "64-bit integers are computed in 32 bits by OpenVINO's CPU device; values beyond "
            "2^31 do not survive."
        )
    if "f64" in types:
        yield "Double-precision tensors are computed in f32 by OpenVINO's CPU device."


def _kernel(executed: _Executed, source: _Source) -> Kernel:
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


def _text(value: Any) -> str:
    """A property's value as it would be given on the command line."""
    if hasattr(value, "get_type_name"):
        return str(value.get_type_name())
    return str(getattr(value, "name", value))


BACKEND = OpenVINO()
