"""A finished TVM library (``tvm=lib.so``): observed like a fresh build, named by its values.

A library keeps no ONNX names. Its virtual machine calls the same instrument as any other, so
every kernel's arguments and results are seen; which ONNX tensor a result is, is found by value:
the library and the ONNX model (on ONNX Runtime, unoptimised) run on the same arbitrary inputs,
and a result gets the name of the one tensor that it is near to. Such names are marked as derived,
so the audit confirms each on the user's own inputs before it believes it.

Source: ``tvm.runtime.load_module`` and ``relax.VirtualMachine.set_instrument`` of apache/tvm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture
from auditor.records.backend import BuildRequest, Kernel, Probe, Provenance, Skipped
from backends._shared import node_key
from backends._tvm_import import last_line
from backends._tvm_observer import Observer, Step, as_array

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

_BUILTIN = "vm.builtin."
_ALLOCATION = "vm.builtin.alloc_tensor"
_RESHAPE = "vm.builtin.reshape"
_DTYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "int8": "i8", "uint8": "u8"}
# A result is a tensor that it is as near to, in relative L2: float16 stays well below.
_NEAR = 0.1
# The next tensor must be this many times as far, or nothing is claimed.
_APART = 4.0
# A constant may have been changed on its way: it is the nearest of its size within this.
_RESEMBLES = 0.5


@dataclass(slots=True)
class _Event:
    """A kernel's call on the arbitrary inputs: its results, and the constants it took."""

    symbol: str
    written: tuple[int, ...]
    results: list[Array]
    constants: list[Array]
    precision: str


class Library:
    """A loaded library, its kernels and the names that were found."""

    blocked: str | None = None

    def __init__(self, request: BuildRequest) -> None:
        """Load ``request.artifact``, run it once and name what it computes.

        Raises:
            BackendError: it is no such library, or not one of this model.
            UsageError: options, which a finished library does not take.
        """
        import onnx
        import tvm

        assert request.artifact is not None
        if request.options:
            raise UsageError(
                f"--option tvm.{next(iter(request.options))} cannot change a finished library",
                "Leave it out, or audit the model without --artifact.",
            )
        self._file: Path = request.artifact
        self._model = onnx.load(request.model_path)
        graph = self._model.graph
        constants = {i.name for i in graph.initializer}
        self._inputs = [i.name for i in graph.input if i.name not in constants]
        self._outputs = [o.name for o in graph.output]
        try:
            self._module = tvm.runtime.load_module(str(request.artifact))
            self._machine = self._new_machine()
        except Exception as error:  # TVM's errors have no common base
            raise BackendError(
                f"{request.artifact.name} is no library of a Relax program for this CPU: "
                f"{last_line(error)}",
                "Give what VMExecutable.export_library wrote.",
            ) from error
        feeds = _arbitrary(graph, request.shapes, self._inputs)
        events = self._observe_once(feeds)
        expected = _reference(request, self._model, feeds)
        named = iter(_name([r for e in events for r in e.results], expected))
        self._steps: list[Step] = []
        for event in events:
            names = tuple(next(named) for _ in event.results)
            self._steps.append(Step(event.symbol, event.written, names))
        self._held = _resembling([c for e in events for c in e.constants], _initialisers(graph))
        kernels = tuple(self._kernels(events))
        found = {name for step in self._steps for name in step.tensors if name is not None}
        ours = len(_initialisers(graph))
        self.provenance = Provenance(
            engine="Apache TVM",
            version=str(tvm.__version__),
            device="CPU (as the library was built)",
            options={},
            kernels=kernels,
            notes=(
                f"{request.artifact.name} was loaded instead of compiling the ONNX file. It keeps "
                f"no names: by their values, the results of {len(found)} of its {len(kernels)} "
                f"kernels are recognised, and {len(self._held)} of the model's {ours} constants.",
            ),
        )
        self._skipped = tuple(
            Skipped(kernel.name, "the library names no tensor, and no ONNX tensor is near in value")
            for kernel, step in zip(kernels, self._steps, strict=True)
            if not any(step.tensors)
        )

    def constants(self) -> Arrays:
        """What the kernels are given beside tensors, under the name of what it resembles."""
        return self._held

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Every graph output by its ONNX name."""
        return self._call(self._machine, feeds)

    def instrument(self, feeds: Mapping[str, Array]) -> _Observed:
        """A second virtual machine on the same library, with an observer."""
        return _Observed(self, self._steps, self._skipped)

    def _new_machine(self) -> Any:
        import tvm
        from tvm import relax

        return relax.VirtualMachine(self._module, tvm.cpu())

    def observed(self, observer: Any) -> Any:
        """A virtual machine that calls ``observer`` before and after every function."""
        machine = self._new_machine()
        machine.set_instrument(observer)
        return machine

    def _call(self, machine: Any, feeds: Mapping[str, Array]) -> Arrays:
        import tvm

        result = machine["main"](*(tvm.runtime.tensor(feeds[name]) for name in self._inputs))
        values = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        if len(values) < len(self._outputs):
            raise BackendError(
                f"{self._file.name} has {len(values)} outputs, the model {len(self._outputs)}",
                "Make the library anew from this ONNX model.",
                stage="build",
            )
        return {name: as_array(v) for name, v in zip(self._outputs, values, strict=False)}

    call = _call

    def _observe_once(self, feeds: Arrays) -> list[_Event]:
        """Run once, and tell every kernel's results from what it was given."""
        import tvm

        events: list[_Event] = []
        known: list[Any] = []  # handles of inputs and of all that was computed or allocated
        fresh: list[Any] = []  # allocated and not yet written
        parameters: list[Any] = []

        def observe(function: Any, symbol: str, before: bool, result: Any, *args: Any) -> int:
            if symbol == "vm.builtin.check_tensor_info" and before:
                parameters.append(args[0])
            if before:
                return 0
            tensor = isinstance(result, tvm.runtime.Tensor)
            if symbol == _ALLOCATION:
                fresh.append(result)
                return 0
            if symbol.startswith(_BUILTIN) and symbol != _RESHAPE:
                if tensor:
                    known.append(result)
                return 0
            tensors = [i for i, a in enumerate(args) if isinstance(a, tvm.runtime.Tensor)]
            written = tuple(i for i in tensors if any(args[i].same_as(f) for f in fresh))
            for position in written:
                fresh[:] = [f for f in fresh if not args[position].same_as(f)]
                known.append(args[position])
            results = [args[i] for i in written]
            if not written:
                results = [result] if tensor else list(result) if result is not None else []
                known.extend(results)
            given = [args[i] for i in tensors if i not in written]
            constants = [a for a in given if not any(a.same_as(k) for k in (*known, *parameters))]
            events.append(
                _Event(
                    symbol,
                    written,
                    [as_array(r) for r in results],
                    [as_array(c) for c in constants],
                    _narrowest(given),
                )
            )
            return 0

        try:
            self._call(self.observed(observe), feeds)
        except BackendError:
            raise
        except Exception as error:  # TVM's errors have no common base
            raise BackendError(
                f"{self._file.name} does not take this model's inputs "
                f"({', '.join(f'{n}: {v.dtype}{list(v.shape)}' for n, v in feeds.items())}): "
                f"{last_line(error)}",
                "Make the library anew from this ONNX model, for these shapes.",
            ) from error
        return events

    def _kernels(self, events: Sequence[_Event]) -> Iterator[Kernel]:
        nodes = _Cones(self._model.graph)
        seen: Counter[str] = Counter()
        found = {name for step in self._steps for name in step.tensors if name is not None}
        for event, step in zip(events, self._steps, strict=True):
            seen[event.symbol] += 1
            outputs = tuple(name for name in step.tensors if name is not None)
            yield Kernel(
                name=f"{event.symbol}#{seen[event.symbol]}",
                type=event.symbol.rpartition(".")[2],
                nodes=nodes.behind(outputs, found),
                outputs=outputs,
                precision=event.precision,
                output_precision=_short(event.results[0].dtype.name) if event.results else "",
            )


class _Observed:
    """The library under an observer: the same executable, so nothing is rebuilt."""

    program_unchanged = True
    rebuilt = False

    def __init__(
        self, library: Library, steps: Sequence[Step], skipped: tuple[Skipped, ...]
    ) -> None:
        self._library = library
        self._steps = steps
        self._observer = Observer(steps)
        self._machine = library.observed(self._observer.observe)
        self.probes = tuple(Probe(name, inferred=True) for name in self._observer.names())
        self.skipped = skipped

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """One run with every named result copied as soon as it is there."""
        tensors = self._observer.start()
        outputs = self._library.call(self._machine, feeds)
        if (missing := self._observer.missing()) is not None:
            raise BackendError(
                f"{self._steps[missing].symbol} did not run where it was expected: the "
                "order of this library's kernels depends on the data",
                stage="capture",
            )
        return Capture(outputs, tensors)


class _Cones:
    """The ONNX nodes that lie between tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._producer = {o: i for i, node in enumerate(graph.node) for o in node.output if o}
        self._nodes = list(graph.node)

    def behind(self, outputs: Sequence[str], stop: set[str]) -> tuple[str, ...]:
        """Keys of the nodes that compute ``outputs`` from the tensors of ``stop``, in order."""
        found: set[int] = set()
        todo = list(outputs)
        while todo:
            index = self._producer.get(todo.pop())
            if index is None or index in found:
                continue
            found.add(index)
            todo += [n for n in self._nodes[index].input if n and n not in stop]
        return tuple(node_key(self._nodes[i]) for i in sorted(found))


def _short(name: str) -> str:
    return _DTYPES.get(name, name)


def _narrowest(tensors: Sequence[Any]) -> str:
    kinds = {_short(str(t.dtype)) for t in tensors}
    return next(
        (k for k in ("bfloat16", "f16", "f32", "f64") if k in kinds), min(kinds, default="")
    )


def _arbitrary(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
) -> Arrays:
    """Inputs to tell tensors apart by: normal floats, and integers that any table has."""
    import onnx

    rng = np.random.default_rng(0)
    kinds = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    feeds: Arrays = {}
    for name in names:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds[name])
        if dtype.kind == "f":
            feeds[name] = rng.standard_normal(shapes[name]).astype(dtype)
        else:
            feeds[name] = np.ones(shapes[name], dtype)
    return feeds


def _reference(request: BuildRequest, model: onnx.ModelProto, feeds: Arrays) -> Arrays:
    """Every tensor of the model's main graph, on ONNX Runtime without optimisation.

    Raises:
        BackendError: ONNX Runtime is not installed, or cannot run the model.
    """
    import onnx

    try:
        import onnxruntime as ort

        marked = onnx.ModelProto()
        marked.CopyFrom(model)
        declared = {o.name for o in marked.graph.output}
        made = [n for node in marked.graph.node for n in node.output if n and n not in declared]
        marked.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys(made))
        path = request.workdir / "named.onnx"
        onnx.save(marked, path, save_as_external_data=True, location="named.bin")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs() if o.type.startswith("tensor(")]
        values = session.run(names, feeds)
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise BackendError(
            f"a TVM library is named by comparing it with ONNX Runtime, which failed: "
            f"{last_line(error)}",
            "pip install onnxruntime",
        ) from error
    return {n: v for n, v in zip(names, values, strict=True) if isinstance(v, np.ndarray)}


def _name(results: Sequence[Array], expected: Arrays) -> list[str | None]:
    """The ONNX tensor that each result is, or None; each tensor is the result nearest to it.

    A product before its bias is near to what it is after it, where the bias is small: what is
    nearest to another tensor's result has no second choice.
    """
    near = [
        {
            name: distance
            for name, other in expected.items()
            if other.shape == value.shape and (distance := _distance(value, other)) <= _NEAR
        }
        for value in results
    ]
    pairs = [(d, index, name) for index, found in enumerate(near) for name, d in found.items()]
    named: list[str | None] = [None] * len(results)
    taken: set[str] = set()
    # Of copies of one tensor (Identity, Dropout), equally near, the first in graph order.
    for distance, index, name in sorted(pairs, key=lambda pair: pair[:2]):
        if named[index] is not None or name in taken or distance > min(near[index].values()):
            continue
        rivals = [
            d
            for other, d in near[index].items()
            if not np.array_equal(expected[other], expected[name])
        ]
        if not rivals or min(rivals) >= _APART * distance:
            named[index] = name
            taken.add(name)
    return named


def _distance(value: Array, other: Array) -> float:
    """Relative L2, infinite where the kinds differ or something is not finite."""
    if (value.dtype.kind == "f") != (other.dtype.kind == "f"):
        return float("inf")
    if value.dtype.kind != "f":
        return 0.0 if np.array_equal(value, other) else float("inf")
    with np.errstate(all="ignore"):
        error = float(np.linalg.norm(value.astype(np.float64).ravel() - other.ravel()))
        norm = float(np.linalg.norm(other.astype(np.float64).ravel()))
    if not np.isfinite(error) or not np.isfinite(norm):
        return float("inf")
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def _initialisers(graph: onnx.GraphProto) -> Arrays:
    from onnx import numpy_helper

    found = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                found[node.output[0]] = numpy_helper.to_array(attribute.t)
    return {
        name: value for name, value in found.items() if value.dtype.kind == "f" and value.size > 1
    }


def _resembling(constants: Sequence[Array], ours: Arrays) -> Arrays:
    """Constants of the library under the name, and in the shape, of the model's nearest one."""
    found: Arrays = {}
    distances: dict[str, float] = {}
    for value in constants:
        if value.dtype.kind != "f" or value.size < 2:
            continue
        for name, mine in ours.items():
            for form in (value, value.T) if value.ndim == 2 else (value,):
                if form.size != mine.size or _squeezed(form) != _squeezed(mine):
                    continue
                shaped = np.ascontiguousarray(form).reshape(mine.shape)
                distance = _distance(shaped, mine)
                if distance <= min(_RESEMBLES, distances.get(name, _RESEMBLES)):
                    found[name], distances[name] = shaped, distance
    return found


def _squeezed(value: Array) -> tuple[int, ...]:
    return tuple(size for size in value.shape if size != 1)
