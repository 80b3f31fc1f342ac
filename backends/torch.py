"""PyTorch eager: the training side, at the head of the chain.

It runs the very module that the model was exported from (``--source``) as it stands, operation by
operation, so whatever is between its values and the ONNX graph's is what the export changed.

How it observes without changing the program: a ``TorchDispatchMode`` sees each operation's result
just before the module's next line gets it, and copies it. Under ``torch.inference_mode`` it sees
operations as the module calls them (``conv2d``, ``layer_norm``), the smallest units that have a
value. That this changed nothing is proved by the profiler: both runs executed the same kernels.
(It can: with parameters that require gradients, a mode makes ``matmul`` choose another kernel.)

Which value is which ONNX tensor is found by evaluating the graph beside it
(``auditor.training.pairing``).

Sources: ``torch/utils/_python_dispatch.py``, ``torch/autograd/profiler.py`` and
``torch/nn/modules/module.py`` (global hooks) of pytorch/pytorch.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture
from auditor.records.backend import Availability, Device, Kernel, Origin, Probe, Provenance, Skipped
from backends import _export, _source
from backends._shared import cpu_name, first_line

if TYPE_CHECKING:
    import onnx

    from auditor.records.backend import BuildRequest, ExportRequest
    from auditor.training.pairing import Pairing, Value

_ENGINE: Final = "PyTorch"
_REMEDY: Final = "pip install torch"
_OPTIONS: Final = ("matmul_precision", "cudnn_tf32", "mha_fastpath")
# What reading a tensor and watching a call add to a profile, and what only allocates or views.
_BOOKKEEPING: Final = frozenset(
    [
        *("detach", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::to"),
        *("aten::_to_copy", "aten::resolve_conj", "aten::resolve_neg"),
        *("aten::as_strided", "aten::empty", "aten::empty_strided", "PythonDispatchMode"),
    ]
)
_WORKER: Final = str(Path("auditor", "processes", "worker.py"))  # calls of the module begin there
# Operations whose result is their argument.
_SAME: Final = frozenset(("aten.detach.default", "aten.alias.default", "aten.lift_fresh.default"))


class TorchBackend:
    """PyTorch eager, on the CPU or on a GPU."""

    title = _ENGINE
    sources = _source.FORMS
    exporters = _export.EXPORTERS

    def availability(self) -> Availability:
        """Whether torch imports here, its version and devices; never raises."""
        # The auditor runs its reference beside it: threads that spin would starve that. OpenMP
        # reads this when it is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            import torch

            version = str(torch.__version__)
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            names = [torch.cuda.get_device_name(i) for i in range(gpus)]
        except Exception as error:  # a broken wheel raises more than ImportError
            return Availability(False, _ENGINE, reason=first_line(error), remedy=_REMEDY)
        devices = (Device("", cpu_name()), *(Device(f"cuda:{i}", n) for i, n in enumerate(names)))
        return Availability(True, _ENGINE, version, devices)

    def build(self, request: BuildRequest) -> TorchBuild:
        """Load the module that the model was exported from.

        Options: ``matmul_precision`` (highest, high, medium), ``cudnn_tf32`` and ``mha_fastpath``
        (0, 1).

        Raises:
            UsageError: there is no source, or an unknown option or device.
            BackendError: torch is missing, or the user's own code failed.
        """
        if request.source is None:
            raise UsageError(
                "The torch backend runs what a model was exported from, which is not said.",
                f"Add --source: {'; '.join(_source.FORMS)}.",
            )
        try:
            import torch
        except Exception as error:
            raise BackendError(first_line(error), _REMEDY, stage="start") from error
        _configure(torch, request)
        device = _device(torch, request.device)
        _interpret()
        source = _source.load(request.source, trusted=request.trusted)
        module = source.module
        # Parameters that want gradients make some kernels choose another way when watched.
        module.requires_grad_(False).to(device)
        return TorchBuild(request, source, device)

    def export(self, request: ExportRequest, feeds: Mapping[str, Array]) -> tuple[str, ...]:
        """Export the source, loaded anew: an exporter may leave traces in a module.

        Raises:
            UsageError: there is no such source.
            BackendError: torch is missing, or the module or the exporter failed.
        """
        source = _source.load(request.source, trusted=request.trusted)
        return _export.export(source.module, request, feeds)


BACKEND = TorchBackend()


def _configure(torch: Any, request: BuildRequest) -> None:
    for key, value in request.options.items():
        if key == "matmul_precision" and value in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(value)
        elif key == "cudnn_tf32" and value in ("0", "1"):
            torch.backends.cudnn.allow_tf32 = value == "1"
        elif key == "mha_fastpath" and value in ("0", "1"):
            torch.backends.mha.set_fastpath_enabled(value == "1")
        else:
            raise UsageError(
                f"The torch backend has no option {key}={value}.",
                f"Use one of {', '.join(_OPTIONS)}, with a value that `torch` knows.",
            )
    if request.threads is not None:
        torch.set_num_threads(request.threads)


def _interpret() -> None:
    """Have what the source hands to ``torch.compile`` run as it is written.

    A compiled function has no operations to be seen, and is another program while it is watched.
    The compiler reads the variable when it is loaded, which takes seconds.
    """
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    if compiler := sys.modules.get("torch._dynamo"):
        compiler.config.disable = True


def _device(torch: Any, name: str | None) -> Any:
    try:
        device = torch.device((name or "cpu").lower())
        torch.empty(1, device=device)
    except Exception as error:
        raise UsageError(
            f"The torch backend has no device {name!r}: {first_line(error)}",
            "`audit backends` lists the devices.",
        ) from error
    return device


@dataclass(slots=True)
class TorchBuild:
    """A module in its trained state."""

    request: BuildRequest
    source: _source.Source
    device: Any
    blocked: str | None = None
    provenance: Provenance = field(init=False)
    _inputs: tuple[str, ...] = field(init=False)
    _outputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Say what was loaded."""
        import torch

        from auditor.graphs import weights

        graph = weights.read(self.request.model_path).graph
        held = {t.name for t in graph.initializer}
        self._inputs = tuple(i.name for i in graph.input if i.name not in held)
        self._outputs = tuple(o.name for o in graph.output)
        on_gpu = self.device.type == "cuda"
        self.provenance = Provenance(
            engine=f"{_ENGINE} eager",
            version=str(torch.__version__),
            device=torch.cuda.get_device_name(self.device) if on_gpu else cpu_name(),
            options={"source": str(self.request.source), **self.request.options},
            notes=self.source.notes,
        )

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Call the module: its results under the ONNX outputs' names, by their order.

        Raises:
            BackendError: it fails on these inputs, or returns fewer tensors.
        """
        import torch

        arguments, named = self.arguments(feeds)
        with torch.inference_mode():
            results = self.call(arguments, named)
        return {n: _array(t) for n, t in self.outputs(results).items()}

    def constants(self) -> Arrays:
        """The module's own values of the ONNX file's constants, as far as they are recognised."""
        from auditor.graphs import weights
        from auditor.training import origins
        from backends import _parameters

        proto = weights.read(self.request.model_path)
        folder = self.request.model_path.resolve().parent
        large = weights.detach(proto, folder)
        held = {t.name: _initializer(t, large, folder) for t in proto.graph.initializer}
        floats = {n: v for n, v in held.items() if v is not None and v.dtype.kind == "f"}
        return _parameters.constants(self.source.module, floats, origins.readers(proto))

    def instrument(self, feeds: Mapping[str, Array]) -> TorchInstrumented:
        """Watch one run, and find out which of its values are tensors of the model.

        Raises:
            BackendError: the module fails on these inputs.
            UsageError: the model cannot be read.
        """
        return TorchInstrumented(self, feeds)

    def arguments(self, feeds: Mapping[str, Array]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments by name where the module has these names, else by their order."""
        given = {name: self._given(feeds[name]) for name in self._inputs}
        with contextlib.suppress(ValueError, TypeError):
            known = inspect.signature(self.source.module.forward).parameters
            if given.keys() <= known.keys():
                if not self.source.exported:
                    return [], given
                by_name = {n: given.pop(n) for n in self.source.keywords if n in given}
                return [given[n] for n in known if n in given], by_name
        return list(given.values()), {}

    def _given(self, array: Array) -> Any:
        """An input on the module's device, in the module's own precision."""
        tensor = _tensor(array, self.device)
        kinds = (p.dtype for p in self.source.module.parameters() if p.is_floating_point())
        kind = next(kinds, tensor.dtype)
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    def call(
        self,
        arguments: list[Any],
        named: dict[str, Any],
        watch: Callable[[Any], None] | None = None,
    ) -> Any:
        """Call the module; ``watch`` is told of the nodes of an exported program.

        Raises:
            BackendError: it fails.
        """
        try:
            if watch is None or not self.source.exported:
                return self.source.module(*arguments, **named)
            return _interpreted(self.source.module, arguments, named, watch)
        except Exception as error:  # the user's own code
            import traceback

            traceback.print_exception(error)  # into the worker's log
            raise BackendError(
                f"the module failed on the audited inputs: {type(error).__name__}: "
                f"{first_line(error)}",
                "Give the inputs that it takes with --data or --shape.",
                stage="run",
            ) from error

    def outputs(self, results: Any) -> dict[str, Any]:
        """The module's results by ONNX output.

        Raises:
            BackendError: it returns fewer tensors than the model has outputs.
        """
        tensors = list(_export.tensors(results))
        if len(tensors) < len(self._outputs):
            raise BackendError(
                f"the module returns {len(tensors)} tensors, the model has "
                f"{len(self._outputs)} outputs",
                "Name a factory whose module returns what was exported, in the same order.",
                stage="run",
            )
        if isinstance(results, Mapping) and set(self._outputs) <= results.keys():
            return {name: results[name] for name in self._outputs}
        return dict(zip(self._outputs, tensors, strict=False))


@dataclass(slots=True)
class _Operation:
    """One result of one operation, and where its copy lies in the spool."""

    name: str
    module: str
    place: str | None
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class TorchInstrumented:
    """A module whose operations are watched."""

    rebuilt = False

    def __init__(self, build: TorchBuild, feeds: Mapping[str, Array]) -> None:
        """Run once with everything copied, pair, and keep what is paired."""
        from auditor.training import pairing

        self._build = build
        spool = build.request.workdir / "values.bin"
        plain = self._profiled(feeds, None)[1]
        with spool.open("wb") as file:
            recorder = _Recorder(build, file)
            outputs, watched = self._profiled(feeds, recorder)
        self.program_unchanged = plain == watched
        self._sequence = [o.name for o in recorder.operations]
        stored: Array = np.zeros(0, np.uint8)
        if spool.stat().st_size:
            stored = np.memmap(spool, np.uint8, "r")

        def fetch(index: int) -> Array:
            o = recorder.operations[index]
            size = int(np.prod(o.shape, dtype=np.int64)) * o.dtype.itemsize
            return stored[o.start : o.start + size].view(o.dtype).reshape(o.shape)

        values = [
            pairing.Value(pairing.Sketch.of(fetch(i)), o.name, o.module, o.place)
            for i, o in enumerate(recorder.operations)
        ]
        found = pairing.pair(
            build.request.model_path,
            feeds,
            values,
            {n: i for n, i in recorder.returned.items() if n in outputs},
            fetch,
            threads=build.request.threads or _threads(),
            folder=build.request.workdir,
        )
        spool.unlink()
        self._wanted = {pair.index for pair in found.pairs.values()}
        self._pairs = found.pairs
        finals = outputs.keys()
        self.probes = tuple(
            Probe(name, inferred=pair.how == "name")
            for name, pair in found.pairs.items()
            if name not in finals
        )
        self.skipped = tuple(Skipped(n, reason) for n, reason in found.unpaired.items())
        self.origins: tuple[Origin, ...] = found.origins
        self.kernels = tuple(_kernels(found, values))

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """Run with the paired operations' results copied.

        Raises:
            BackendError: the module fails, or took another path than on the first sample.
        """
        recorder = _Recorder(self._build, None, self._wanted)
        outputs = recorder.run(feeds)
        if recorder.sequence != self._sequence:
            raise BackendError(
                "the module executed other operations than on the first sample: what it does "
                "depends on its inputs",
                "Audit samples of one shape and one path at a time.",
                stage="capture",
            )
        tensors = {name: recorder.kept[pair.index] for name, pair in self._pairs.items()}
        return Capture(outputs, tensors | outputs)

    def _profiled(
        self, feeds: Mapping[str, Array], recorder: _Recorder | None
    ) -> tuple[Arrays, list[str]]:
        """Outputs, and the kernels that were executed."""
        from torch.autograd.profiler import profile

        with profile() as profiled:
            outputs = recorder.run(feeds) if recorder else self._build.run(feeds)
        events = profiled.function_events or ()
        leaves = [e.name for e in events if not e.cpu_children and e.name not in _BOOKKEEPING]
        return outputs, leaves


class _Recorder:
    """Copies the results of operations: all of them into a spool file, or some into memory."""

    def __init__(
        self, build: TorchBuild, spool: IO[bytes] | None, wanted: Collection[int] = ()
    ) -> None:
        self._build = build
        self._spool = spool
        self._wanted = wanted
        self._written = 0
        self._scope = [""]
        self._place: str | None = None  # of the node that an exported program is at
        module = build.source.module
        self._names = {id(m): name for name, m in module.named_modules()}
        self._weights = {
            t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())
        }
        self.sequence: list[str] = []  # names of all recorded operations
        self.operations: list[_Operation] = []  # those in the spool
        self.kept: dict[int, Array] = {}
        self.returned: dict[str, int] = {}  # which of them are the model's outputs

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Call the module under watch; its outputs by ONNX name."""
        import torch

        build = self._build
        arguments, named = build.arguments(feeds)
        with torch.inference_mode(), self._scopes(), _mode(self):
            results = build.call(arguments, named, self._at)
        outputs = build.outputs(results)
        self.returned = {n: t.audit_index for n, t in outputs.items() if hasattr(t, "audit_index")}
        return {n: _array(t) for n, t in outputs.items()}

    def add(self, operation: str, tensor: Any) -> None:
        """Copy one result."""
        if operation in _SAME or not _readable(tensor):
            return
        if tensor.untyped_storage().data_ptr() in self._weights:
            return  # a view of a weight
        index = len(self.sequence)
        self.sequence.append(operation)
        tensor.audit_index = index
        if self._spool is None:
            if index in self._wanted:
                self.kept[index] = _array(tensor)
            return
        array = _array(tensor)
        place = self._place or _caller()
        self.operations.append(
            _Operation(operation, self._scope[-1], place, array.dtype, array.shape, self._written)
        )
        self._written += self._spool.write(array.tobytes())

    def _at(self, node: Any) -> None:
        """An exported program is at this node of its graph."""
        from auditor.training.origins import place_of

        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self._scope = [str(stack[-1][0]).removeprefix("L['self'].") if stack else ""]
        self._place = place_of(node.meta.get("stack_trace") or "")

    @contextlib.contextmanager
    def _scopes(self) -> Iterator[None]:
        """Know which module is being called."""
        from torch.nn.modules import module as hooks

        def enter(module: Any, arguments: Any) -> None:
            self._scope.append(self._names.get(id(module), self._scope[-1]))

        def leave(module: Any, arguments: Any, results: Any) -> None:
            self._scope.pop()

        if self._build.source.exported:  # its nodes say so themselves
            yield
            return
        handles = (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mode(recorder: _Recorder) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def dispatch(mode: Any, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            recorder.add(str(operation), leaf)
        return results

    method = {"__torch_dispatch__": dispatch}
    # PyTorch keeps its compiler out of the method of a new class, and loads it for that: 2 s, in
    # vain where nothing is compiled. A method that comes later is left as it is.
    compiles = "torch._dynamo" in sys.modules
    watch: Any = type("Watch", (TorchDispatchMode,), method if compiles else {})
    if not compiles:
        watch.__torch_dispatch__ = dispatch
    return watch()


def _interpreted(module: Any, given: list[Any], named: Any, watch: Callable[[Any], None]) -> Any:
    """Run an exported program node by node: the same operations as calling it."""
    from torch.fx import Interpreter

    def run_node(interpreter: Any, node: Any) -> Any:
        watch(node)
        return Interpreter.run_node(interpreter, node)

    watched: Any = type("Watched", (Interpreter,), {"run_node": run_node})
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    return watched(module).run(*given, *(named[n] for n in names[len(given) :] if n in named))


def _kernels(found: Pairing, values: Sequence[Value]) -> Iterator[Kernel]:
    """The operations that were paired, with the ONNX tensors that they compute."""
    tensors: dict[int, list[str]] = {}
    for name, pair in found.pairs.items():
        tensors.setdefault(pair.index, []).append(name)
    for index in sorted(tensors):
        value, names = values[index], tuple(tensors[index])
        yield Kernel(value.module, value.operation.removesuffix(".default"), names, names)


def _readable(value: Any) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_complex()
    )


def _tensor(array: Array, device: Any) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(np.array(array)).to(device)


def _array(tensor: Any) -> Array:
    """A copy; bfloat16 widened to float32."""
    import torch

    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.array(tensor.cpu().numpy())


def _caller() -> str | None:
    """``resnet.py:104``: the innermost line that is neither PyTorch's nor ours."""
    import torch

    own = (str(Path(torch.__file__).parent) + os.sep, __file__)
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(own) and not file.startswith("<"):
            return None if _WORKER in file else f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _initializer(tensor: onnx.TensorProto, large: Arrays, folder: Path) -> Array | None:
    """An initialiser's values, from ``folder`` if need be; None for types that numpy lacks."""
    from onnx import numpy_helper

    if tensor.name in large:
        return large[tensor.name]
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
        return np.asarray(numpy_helper.to_array(tensor, str(folder)))
    return None


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())
