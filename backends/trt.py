"""NVIDIA TensorRT, and TensorRT for RTX where that is what is installed: one Python API.

Without a GPU it parses and builds, and the final engine is read from the builder's own
description of it; with one it also runs, and observes the tensors that survive fusion through
TensorRT's debug listener.

Source: TensorRT documentation, "Python API" (``Builder``, ``OnnxParser``, ``IDebugListener``,
``INetworkDefinition.mark_unfused_tensors_as_debug_tensors``) and "Engine Inspector".
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import Availability, Device, Kernel, Probe, Provenance, Skipped, Switch
from backends import _trt_plan
from backends._trt_cuda import (
    Cuda,
    engine,
    engine_name,
    logger,
    storage_dtype,
    visible_gpus,
    widened,
)
from backends._trt_layers import LATE_TACTIC, ORIGIN, Graph, attribute, node_key, parse_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx

    from auditor.ports import Build, Instrumented
    from auditor.records.backend import BuildRequest


_ON_OFF = {"on": True, "off": False}
# Builder flags that change numbers: the factor to leave out, its option, the causes it can bring.
# Source: ``BuilderFlag`` in TensorRT's Python API.
_FACTORS = {
    ("TF32", True): ("TF32 products", {"tf32": "off"}, ("precision.tf32",)),
    ("STRICT_NANS", False): (
        "fusions that do not keep NaN",
        {"strict-nans": "on"},
        ("implementation.nonfinite",),
    ),
}


# --- options -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Options:
    """Builder flags to set or clear, by name, and the compute capability to build for."""

    flags: dict[str, bool]
    capability: str | None


def _options(given: Mapping[str, str]) -> _Options:
    """Read the user's options.

    Raises:
        UsageError: this TensorRT has no such option, or not with that value.
    """
    trt = engine()
    known = set(_members(trt.BuilderFlag))
    capabilities = [n for n in _members(getattr(trt, "ComputeCapability", None)) if n != "NONE"]
    flags = {}
    capability = None
    for name, value in given.items():
        member = name.upper().replace("-", "_")
        if member == "COMPUTE_CAPABILITY" and capabilities:
            capability = value.upper()
            if capability not in capabilities:
                raise UsageError(
                    f"{engine_name()} does not build for compute capability `{value}`",
                    f"It builds for: {', '.join(capabilities)}.",
                )
        elif member in known:
            if value.lower() not in _ON_OFF:
                raise UsageError(f"trt.{name} is `on` or `off`, not `{value}`")
            flags[member] = _ON_OFF[value.lower()]
        else:
            valid = [flag.lower().replace("_", "-") for flag in sorted(known)]
            valid += ["compute-capability"] if capabilities else []
            raise UsageError(
                f"{engine_name()} has no option `{name}`", f"Options: {', '.join(valid)}."
            )
    return _Options(flags, capability)


def _switches(trt: Any, config: Any) -> tuple[Switch, ...]:
    """The factors that a builder configuration has on."""
    known = trt.BuilderFlag.__members__
    return tuple(
        Switch(factor, options, noises)
        for (flag, on), (factor, options, noises) in _FACTORS.items()
        if flag in known and config.get_flag(known[flag]) == on
    )


def _members(enum: Any) -> tuple[str, ...]:
    return tuple(sorted(enum.__members__)) if enum else ()


# --- building ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Compiled:
    """One compilation: the serialised engine, its description, and the network it came from.

    Attributes:
        types: TensorRT's type of every network input and output.
        shapes: shape of every tensor of the parsed network; −1 where dynamic.
        profiled: shape of the inputs that were specialised.
    """

    plan: Any
    layers: str
    tf32: bool
    switches: tuple[Switch, ...]
    strongly_typed: bool
    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    profiled: dict[str, tuple[int, ...]]

    @property
    def program(self) -> str:
        """The layers' text alone, what two builds of the same program share."""
        return self.layers.split("\n\n")[0]


class _Compiler:
    """Compiles one request, plainly or with its unfused tensors marked for observation."""

    def __init__(self, request: BuildRequest) -> None:
        import onnx

        self._request = request
        self._options = _options(request.options)
        self.model = onnx.load(request.model_path, load_external_data=False)
        self.graph = Graph(self.model.graph)
        # Node names may be empty or repeated; the engine refers to nodes by name alone.
        for node in self.model.graph.node:
            node.name = node_key(node)
        self.split_symbols = _split_symbols(self.model.graph, request.shapes)
        self._timings = b""

    def compile(self, *, observed: bool) -> _Compiled:
        """Compile; ``observed`` marks the tensors that survive fusion as debug tensors.

        Raises:
            BackendError: TensorRT refused the model.
        """
        trt, log, request = engine(), logger(), self._request
        log.reset()
        builder = trt.Builder(log)
        if builder is None:
            raise BackendError("TensorRT did not start", stage="build", log=tuple(log.errors))
        if request.threads:
            builder.max_threads = request.threads
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        # The path tells where external weights lie; the file itself is not read again.
        if not parser.parse(self.model.SerializeToString(), str(request.model_path.resolve())):
            raise self._refused(parser, log.parsing)
        if observed and not network.mark_unfused_tensors_as_debug_tensors():
            raise BackendError("TensorRT cannot observe this network", stage="instrument")
        config = self._configure(trt, builder.create_builder_config())
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        profiled = self._specialise(builder, config, inputs)
        timings = self._share_timings(trt, config)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._not_built(network, log.errors)
        if timings is not None:
            self._timings = bytes(timings.serialize())
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return _Compiled(
            plan=plan,
            layers=log.layers,
            tf32=config.get_flag(trt.BuilderFlag.TF32),
            switches=_switches(trt, config),
            strongly_typed=network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            types={tensor.name: tensor.dtype.name for tensor in (*inputs, *outputs)},
            shapes=_network_shapes(network),
            profiled=profiled,
        )

    def _configure(self, trt: Any, config: Any) -> Any:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for name, on in self._options.flags.items():
            flag = getattr(trt.BuilderFlag, name)
            (config.set_flag if on else config.clear_flag)(flag)
        if self._options.capability:
            config.num_compute_capabilities = 1
            wanted = getattr(trt.ComputeCapability, self._options.capability)
            if not config.set_compute_capability(wanted, 0):
                raise UsageError(f"TensorRT cannot build for compute capability {wanted.name} here")
        return config

    def _specialise(
        self, builder: Any, config: Any, inputs: Sequence[Any]
    ) -> dict[str, tuple[int, ...]]:
        """Fix every dynamic input at the request's shape, by an optimisation profile."""
        for tensor in inputs:
            if tensor.is_shape_tensor:
                raise BackendError(
                    f"input `{tensor.name}` sets shapes: TensorRT needs its values at build time",
                    "Export the model with those values as constants.",
                )
        dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
        if dynamic:
            profile = builder.create_optimization_profile()
            for name in dynamic:
                shape = self._request.shapes[name]
                profile.set_shape(name, shape, shape, shape)
            config.add_optimization_profile(profile)
        return {name: self._request.shapes[name] for name in dynamic}

    def _share_timings(self, trt: Any, config: Any) -> Any:
        """Make later builds choose the tactics of the first; RTX times nothing."""
        if trt.__name__ != "tensorrt":
            return None
        timings = config.create_timing_cache(self._timings)
        config.set_timing_cache(timings, ignore_mismatch=False)
        return timings

    def _refused(self, parser: Any, last: str) -> BackendError:
        """Every node that the parser cannot convert, with its reason.

        An error may name no node: then it is the ``last`` one that the parser turned to.
        """
        reasons: dict[str, str] = {}
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            key = self.graph.resolve(error.node_name() or last.rsplit(" [", 1)[0])
            subject = self._label(key) if key else error.node_operator() or "this model"
            reasons.setdefault(subject, _reason(error.desc()) or "unsupported operator")
        problems = [f"{subject}: {reason}" for subject, reason in reasons.items()]
        return _unsupported(bool(problems), problems or ["this model: no reason given"], ())

    def _not_built(self, network: Any, errors: Sequence[str]) -> BackendError:
        """The nodes behind the layers that the builder's errors mention."""
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        named = [layer for layer in layers if _mentions(errors, layer.name)]
        origins = [name for layer in named for name in ORIGIN.findall(layer.metadata)]
        keys = dict.fromkeys(filter(None, map(self.graph.resolve, origins)))
        reason = _reason(errors[0]) if errors else "no reason given"
        nodes = ", ".join(map(self._label, keys)) or "this model"
        return _unsupported(bool(keys), [f"{nodes}: {reason}"], tuple(errors))

    def _label(self, key: str) -> str:
        return f"{self.graph.operators[key]} `{key}`"


def _split_symbols(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Drop the names of symbolic dimensions that stand for several sizes, and return them.

    Some exporters write every unknown dimension as ``?``; TensorRT takes one name for one size.
    """
    named = [
        (dimension, size)
        for value in graph.input
        for dimension, size in zip(
            value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False
        )
        if dimension.dim_param
    ]
    sizes: dict[str, set[int]] = {}
    for dimension, size in named:
        sizes.setdefault(dimension.dim_param, set()).add(size)
    split = tuple(name for name, found in sizes.items() if len(found) > 1)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in split:
                dimension.ClearField("dim_param")
    return split


def _unsupported(nodes: bool, problems: Sequence[str], log: tuple[str, ...]) -> BackendError:
    """``nodes`` is whether the problems name any."""
    hint = "Replace these operators in the export, or leave them to code after the network."
    return BackendError(
        f"{engine_name()} {engine().__version__} cannot build {'; '.join(problems)}",
        hint if nodes else "",
        stage="build",
        log=log,
    )


def _network_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        for tensor in (layer.get_output(i) for i in range(layer.num_outputs)):
            try:
                shapes[tensor.name] = tuple(tensor.shape)
            except ValueError:  # the rank itself is unknown
                continue
    return shapes


def _reason(text: str) -> str:
    """The part of an error of TensorRT that says why; "" when it says nothing."""
    quoted = re.search(r'"([^"]* [^"]*)"', text) if '&& "' in text else None
    cuda = re.search(r"\((cudaError \d+: [^)]*)\)", text)
    coded = re.search(r"Error Code \d+: [^(]*\((.*?)(?: ?\bIn \w+ at |$)", text, re.MULTILINE)
    found = quoted or (None if coded and coded[1] else cuda) or coded
    plain = "" if text == "false" else text.splitlines()[0] if text else ""
    return (found[1] if found else plain)[:300].rstrip(". ")


def _mentions(errors: Sequence[str], name: str) -> bool:
    whole = re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.])")
    return any(whole.search(error) for error in errors)


def _notes(compiler: _Compiler, compiled: _Compiled, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Compile-time facts that a deployment engineer must know, as sentences."""
    import onnx

    elements = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8"}
    graph = compiler.model.graph
    declared = {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.output)
        if value.name in compiled.types
    }
    notes = [
        f"`{name}` is {kind} in the model and {compiled.types[name]} in the engine: its values "
        "are converted without a warning."
        for name, kind in declared.items()
        if elements.get(kind, kind) != compiled.types[name]
    ]
    doubles = [
        tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.DOUBLE
    ]
    if doubles:
        notes.append(
            f"{len(doubles)} DOUBLE constants (`{doubles[0]}` first) are computed with in FLOAT."
        )
    if not kernels:
        notes.append("The engine did not describe its layers: no kernel or precision is known.")
    wide = [name for name, kind in compiled.types.items() if kind == "INT64"]
    if wide:
        notes.append(f"The engine keeps INT64 at {', '.join(wide)}: bind 8-byte integers.")
    if compiled.strongly_typed:
        notes.append(
            "Strongly typed: the engine computes in the model's types, no precision flag applies."
        )
    products = sum(k.precision in ("", "tf32") and bool(k.nodes) for k in kernels)
    if compiled.tf32 and products:
        notes.append(
            f"TF32 is allowed (TensorRT's default): {products} kernels may round the factors of "
            "FP32 products to 10 mantissa bits; `--option trt.tf32=off` forbids it."
        )
    notes += [
        f"The symbol `{name}` names dimensions of different sizes, which TensorRT refuses: each "
        "was made independent for this build, do the same before you ship."
        for name in compiler.split_symbols
    ]
    if compiled.profiled:
        shapes = ", ".join(f"{n}:{'x'.join(map(str, s))}" for n, s in compiled.profiled.items())
        notes.append(f"Dynamic dimensions are specialised by an optimisation profile at {shapes}.")
    late = sum(layer.tactic == LATE_TACTIC for layer in parse_layers(compiled.layers))
    if late:
        notes.append(f"The implementation of {late} kernels is chosen on the GPU, at load time.")
    placed = {key for kernel in kernels for key in kernel.nodes}
    folded = [
        k for k, op in compiler.graph.operators.items() if k not in placed and op != "Constant"
    ]
    if folded:
        notes.append(
            f"{len(folded)} of {len(compiler.graph.operators)} nodes are in no kernel: folded, or "
            f"done by a layout (`{folded[0]}` first)."
        )
    return tuple(notes)


# --- running -----------------------------------------------------------------------------------


class _Runner:
    """A loaded engine with its execution context.

    Source: TensorRT Python API, ``ICudaEngine`` and ``IExecutionContext``.
    """

    def __init__(self, plan: Any, cuda: Cuda, observer: Any = None) -> None:
        trt, log = engine(), logger()
        log.reset()
        self._cuda = cuda
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine and self._engine.create_execution_context()
        if not self._context:
            why = _reason(log.errors[0]) if log.errors else "no reason given"
            raise BackendError(f"the engine does not load on this GPU: {why}", stage="run")
        if observer is not None:
            self._context.set_debug_listener(observer)
            self._context.unfused_tensors_debug_state = True
            self._context.set_all_tensors_debug_state(True)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]

    @property
    def ends(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the inputs and of the outputs."""
        return tuple(self._inputs), tuple(self._outputs)

    def description(self) -> str:
        """The engine's layers, one a line; only their names where it was built without detail."""
        trt = engine()
        inspector = self._engine.create_engine_inspector()
        text: str = inspector.get_engine_information(trt.LayerInformationFormat.ONELINE)
        return text

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Copy the inputs in, execute, copy every output out."""
        context, cuda = self._context, self._cuda
        device: dict[str, int] = {}
        try:
            # Kept until the stream is done: the engine may read small inputs from host memory.
            inputs = {
                name: np.array(feeds[name], self._dtype(name), order="C") for name in self._inputs
            }
            for name, array in inputs.items():
                context.set_input_shape(name, array.shape)
                if address := self._place(name, array, device):
                    cuda.upload(address, array)
            if unknown := context.infer_shapes():
                raise BackendError(f"the shapes of {', '.join(unknown)} are unknown", stage="run")
            outputs = {
                name: np.empty(self._shape(name), self._dtype(name)) for name in self._outputs
            }
            for name, array in outputs.items():
                self._place(name, array, device)
            log = logger()
            log.reset()
            if not context.execute_async_v3(cuda.stream):
                raise BackendError("TensorRT did not run", stage="run", log=tuple(log.errors))
            cuda.wait(cuda.stream)
            for name, array in outputs.items():
                if name in device:
                    cuda.download(array, device[name])
        finally:
            for address in device.values():
                cuda.free(address)
        return {name: widened(array) for name, array in outputs.items()}

    def _place(self, name: str, array: Array, device: dict[str, int]) -> int | None:
        """Bind a tensor to memory where the engine wants it; its address if on the device."""
        if self._engine.get_tensor_location(name) == engine().TensorLocation.HOST:
            self._context.set_tensor_address(name, array.ctypes.data)
            return None
        device[name] = self._cuda.allocate(array.nbytes)
        self._context.set_tensor_address(name, device[name])
        return device[name]

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self._engine.get_tensor_dtype(name).name
        dtype = storage_dtype(kind)
        if dtype is None:
            raise BackendError(f"`{name}` is {kind}, which has no numpy form", stage="run")
        return dtype

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if -1 in shape:
            raise BackendError(f"the shape of output `{name}` depends on data", stage="run")
        return shape


def _observer(cuda: Cuda, names: Iterable[str]) -> Any:
    """A debug listener that copies the tensors of these engine names to ``received``.

    A debug tensor is read as dense and row-major, as NVIDIA's own listeners do (trtexec and
    Polygraphy); its address holds only during the call.
    """
    trt = engine()
    wanted = frozenset(names)

    class Observer(trt.IDebugListener):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.received: Arrays = {}
            self.failed: dict[str, str] = {}

        def process_debug_tensor(
            self, addr: Any, location: Any, type: Any, shape: Any, name: str, stream: int
        ) -> bool:
            if name not in wanted:
                return True
            dtype = storage_dtype(type.name)
            if dtype is None:
                self.failed[name] = f"{type.name} has no numpy form"
                return True
            array = np.empty(tuple(shape), dtype)
            address = _address(addr)
            try:
                cuda.wait(stream)
                if location == trt.TensorLocation.HOST:
                    ctypes.memmove(array.ctypes.data, address, array.nbytes)
                else:
                    cuda.download(array, address)
            except BackendError as error:  # nothing may cross TensorRT's frames
                self.failed[name] = error.message
                return False
            self.received[name] = widened(array)
            return True

    return Observer()


def _address(capsule: Any) -> int:
    """The pointer in the unnamed capsule that stands for a ``void*`` in Python."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    pointer.restype = ctypes.c_void_p
    address: int = pointer(capsule, None)
    return address


@dataclass(frozen=True, slots=True)
class _Instrumented:
    """A second build of the same program whose surviving tensors are observed."""

    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    observed: _Observed
    rebuilt: bool = True

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        return self.observed.run(feeds)


class _Observed:
    """An engine whose debug tensors are collected, by ONNX name."""

    def __init__(
        self,
        compiled: _Compiled,
        cuda: Cuda,
        names: Mapping[str, str],
        feeds: Mapping[str, Array],
    ) -> None:
        """``names`` are the ONNX names by engine name; ``feeds`` show what TensorRT emits."""
        self._shapes = compiled.shapes
        self._names = names
        self._observer = _observer(cuda, names)
        self._runner = _Runner(compiled.plan, cuda, self._observer)
        seen = self.run(feeds).tensors
        self.probes = tuple(Probe(tensor, inferred=True) for tensor in seen)
        self.missed = tuple(
            Skipped(tensor, self._observer.failed.get(name, "TensorRT did not emit it"))
            for name, tensor in names.items()
            if tensor not in seen
        )

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """Run once with the listener."""
        self._observer.received = {}
        outputs = self._runner.run(feeds)
        received = self._observer.received
        tensors = {
            tensor: received[name] for name, tensor in self._names.items() if name in received
        }
        return Capture(outputs, {t: self._reshaped(t, array) for t, array in tensors.items()})

    def _reshaped(self, tensor: str, array: Array) -> Array:
        """The engine drops and merges axes; ONNX's shape where it is known."""
        shape = self._shapes.get(tensor, array.shape)
        return array.reshape(shape) if np.prod(shape) == array.size else array


def _index(device: str | None, gpus: Sequence[str]) -> int:
    """Which GPU a device id stands for; the first by default.

    Raises:
        UsageError: there is no such GPU.
    """
    ids = [str(index) for index in range(len(gpus))]
    if device and device not in ids:
        listed = f"GPUs: {', '.join(map(' '.join, zip(ids, gpus, strict=True)))}." if gpus else ""
        raise UsageError(f"there is no CUDA device `{device}`", listed)
    return int(device or 0)


class _Build:
    """A compiled model, loaded where a CUDA device allows."""

    def __init__(self, request: BuildRequest) -> None:
        gpus, why = visible_gpus()
        index = _index(request.device, gpus)
        # TensorRT builds for, and loads on, the device that is current.
        cuda = Cuda(index) if gpus else None
        self._compiler = _Compiler(request)
        self._compiled = self._compiler.compile(observed=False)
        self._layers = parse_layers(self._compiled.layers)
        kernels = self._compiler.graph.kernels(self._layers, self._compiled.tf32)
        self._provenance = Provenance(
            engine=engine_name(),
            version=engine().__version__,
            device=gpus[index] if gpus else "no CUDA device",
            options={"tf32": "on" if self._compiled.tf32 else "off"} | request.options,
            kernels=kernels,
            notes=_notes(self._compiler, self._compiled, kernels),
        )
        self._blocked = None if gpus else f"no CUDA device ({why})"
        self._loaded: tuple[_Runner, Cuda] | None = None
        if cuda is not None:
            try:
                self._loaded = _Runner(self._compiled.plan, cuda), cuda
            except BackendError as error:
                self._blocked = error.message

    @property
    def provenance(self) -> Provenance:
        return self._provenance

    @property
    def switches(self) -> tuple[Switch, ...]:
        return self._compiled.switches

    @property
    def blocked(self) -> str | None:
        return self._blocked

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        return self._runnable()[0].run(feeds)

    def instrument(self, feeds: Mapping[str, Array]) -> Instrumented:
        """Compile again with the surviving tensors observable, and see which ones arrive."""
        cuda = self._runnable()[1]
        marked = self._compiler.compile(observed=True)
        boundaries = self._compiler.graph.boundaries(self._layers)
        names, skipped = attribute(self._layers, boundaries, self._compiled.shapes)
        observed = _Observed(marked, cuda, names, feeds)
        # No description, no proof.
        unchanged = bool(self._layers) and marked.program == self._compiled.program
        return _Instrumented(observed.probes, skipped + observed.missed, unchanged, observed)

    def _runnable(self) -> tuple[_Runner, Cuda]:
        if self._loaded is None:
            raise BackendError(
                f"built, not run: {self._blocked}",
                "Run it on a machine with an NVIDIA GPU and its driver.",
                stage="run",
            )
        return self._loaded


class _Finished:
    """A plan that was built before: run as it is, where there is a GPU.

    Its inner tensors were not marked as debug tensors when it was built, so none can be observed;
    the audit compares its outputs, and its layers are read from the plan.
    """

    def __init__(self, request: BuildRequest) -> None:
        """Read ``request.artifact``, and load it where a CUDA device allows.

        Raises:
            BackendError: it is no plan, or has other inputs or outputs than the model.
            UsageError: there are options, which a finished plan does not take.
        """
        import onnx

        assert request.artifact is not None
        if request.options:
            raise UsageError(
                f"--option trt.{next(iter(request.options))} cannot change a finished plan",
                "Leave it out, or audit the model without --artifact.",
            )
        file = request.artifact
        data = file.read_bytes()
        written = _trt_plan.read(data)
        if written.product is None or not written.whole:
            why = "is no TensorRT plan" if written.product is None else "is cut off"
            raise BackendError(f"{file.name} {why}", "Give what trtexec --saveEngine wrote.")
        graph = onnx.load(request.model_path, load_external_data=False).graph
        constants = {i.name for i in graph.initializer}
        inputs = [i.name for i in graph.input if i.name not in constants]
        outputs = [o.name for o in graph.output]
        gpus, why = visible_gpus()
        index = _index(request.device, gpus)
        self.blocked: str | None = None if gpus else f"no CUDA device ({why})"
        self._runner: _Runner | None = None
        kernels: tuple[Kernel, ...] = ()
        if gpus:
            try:
                self._runner = _Runner(data, Cuda(index))
            except BackendError as error:
                self.blocked = error.message
            else:
                self._require_same(file.name, inputs, outputs)
                layers = parse_layers(self._runner.description())
                kernels = Graph(graph).kernels(layers, tf32=True)  # which the plan does not say
        nodes = {name for node in graph.node for name in (node.name, node_key(node)) if name}
        self.provenance = Provenance(
            engine=engine_name(),
            version=engine().__version__,
            device=gpus[index] if gpus else "no CUDA device",
            options={},
            kernels=kernels,
            notes=_trt_plan.sentences(file.name, data, written, nodes, outputs),
        )

    def _require_same(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        assert self._runner is not None
        for what, wanted, has in zip(
            ("input", "output"), (inputs, outputs), self._runner.ends, strict=True
        ):
            if missing := [n for n in wanted if n not in has]:
                raise BackendError(
                    f"{name} has no {what} `{missing[0]}`; its {what}s: {', '.join(has)}",
                    "Build the plan anew from this ONNX model.",
                )

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        if self._runner is None:
            raise BackendError(f"loaded, not run: {self.blocked}", stage="run")
        return self._runner.run(feeds)

    def instrument(self, feeds: Mapping[str, Array]) -> _OutputsOnly:
        """No probe: the plan's inner tensors cannot be observed."""
        return _OutputsOnly(self)


class _OutputsOnly:
    """A finished plan as it is."""

    probes: tuple[Probe, ...] = ()
    skipped = (
        Skipped(
            "every inner tensor",
            "a finished plan shows only tensors that were marked when it was built",
        ),
    )
    program_unchanged = True  # it is the same engine
    rebuilt = False

    def __init__(self, plan: _Finished) -> None:
        self._plan = plan

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """One run: the outputs alone."""
        return Capture(self._plan.run(feeds), {})


# --- the backend -------------------------------------------------------------------------------

_SCRIPT = """\
import ctypes

try:
    import tensorrt as trt
except ImportError:
    import tensorrt_rtx as trt

FLAGS = {flags!r}  # of the builder
CAPABILITY = {capability!r}
THREADS = {threads!r}
DEVICE = {device!r}


def plan_of(path, feeds):
    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    if THREADS:
        builder.max_threads = THREADS
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        raise SystemExit("TensorRT cannot parse it: " + parser.get_error(0).desc())
    config = builder.create_builder_config()
    for name, on in FLAGS.items():
        (config.set_flag if on else config.clear_flag)(getattr(trt.BuilderFlag, name))
    if CAPABILITY:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, CAPABILITY), 0)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    if dynamic:
        profile = builder.create_optimization_profile()
        for name in dynamic:
            profile.set_shape(name, *[feeds[name].shape] * 3)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit("TensorRT did not build it")
    return log, plan


def run(path, feeds):
    log, plan = plan_of(path, feeds)
    cuda = driver()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise SystemExit("the engine does not load on this GPU")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    device, arrays = {{}}, {{}}

    def place(name, array):
        arrays[name] = array
        if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
            context.set_tensor_address(name, array.ctypes.data)
            return
        address = ctypes.c_uint64()
        check(cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(array.nbytes, 1))))
        device[name] = address
        context.set_tensor_address(name, address.value)

    def memory(name):
        return ctypes.c_void_p(arrays[name].ctypes.data), ctypes.c_size_t(arrays[name].nbytes)

    outputs = []
    for name in names:
        if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            outputs.append(name)
            continue
        if engine.get_tensor_dtype(name) == trt.DataType.BF16:
            raise SystemExit(f"the input {{name}} is bfloat16, which numpy has not")
        array = np.array(feeds[name], stored(engine.get_tensor_dtype(name)), order="C")
        context.set_input_shape(name, array.shape)
        place(name, array)
        if name in device:
            check(cuda.cuMemcpyHtoD_v2(device[name], *memory(name)))
    if unknown := context.infer_shapes():
        raise SystemExit(f"the shapes of {{unknown}} are unknown")
    for name in outputs:
        shape = tuple(context.get_tensor_shape(name))
        place(name, np.empty(shape, stored(engine.get_tensor_dtype(name))))
    stream = ctypes.c_void_p()
    check(cuda.cuStreamCreate(ctypes.byref(stream), 0))
    if not context.execute_async_v3(stream.value or 0):
        raise SystemExit("TensorRT did not run")
    check(cuda.cuStreamSynchronize(stream))
    for name in outputs:
        if name in device:
            host, size = memory(name)
            check(cuda.cuMemcpyDtoH_v2(host, device[name], size))
    return {{name: widened(engine.get_tensor_dtype(name), arrays[name]) for name in outputs}}


def stored(kind):
    return np.uint16 if kind == trt.DataType.BF16 else trt.nptype(kind)


def widened(kind, array):
    if kind != trt.DataType.BF16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)


def driver():
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SystemExit(f"no CUDA device: {{error}}") from error
    if code := cuda.cuInit(0):
        raise SystemExit(f"no CUDA device: cuInit returned {{code}}")
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(cuda.cuDeviceGet(ctypes.byref(handle), DEVICE))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    check(cuda.cuCtxSetCurrent(context))
    return cuda


def check(code):
    if code:
        raise SystemExit(f"CUDA error {{code}}")


def version():
    return f"{{trt.__name__}} {{trt.__version__}}"
"""


class TensorRT:
    """The adapter."""

    title = "NVIDIA TensorRT"
    artifacts = (".plan", ".engine", ".trt")

    def availability(self) -> Availability:
        """Available wherever it imports: with no GPU it builds, and says that it will not run."""
        try:
            version = engine().__version__
        except (ImportError, OSError) as error:
            return Availability(
                False, self.title, reason=str(error), remedy="pip install 'sysnoise-auditor[trt]'"
            )
        gpus, why = visible_gpus()
        devices = tuple(Device(str(i) if i else "", name) for i, name in enumerate(gpus))
        blocked = None if gpus else f"no CUDA device ({why}): models are built, not run"
        remedy = None if gpus else "Run it on a machine with an NVIDIA GPU and its driver."
        return Availability(True, engine_name(), version, devices, blocked, remedy)

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """The same builder flags on the same GPU; a model with bfloat16 inputs is refused.

        Raises:
            UsageError: this TensorRT has no such option.
        """
        asked = _options(options)
        source = _SCRIPT.format(
            flags=asked.flags,
            capability=asked.capability,
            threads=threads,
            device=int(device or 0),
        )
        packages = "tensorrt" if engine_name() == "TensorRT" else "tensorrt-rtx-cu13"
        return Script(engine_name(), packages, source)

    def build(self, request: BuildRequest) -> Build:
        """Parse and build, and load the engine where a CUDA device allows."""
        if request.open:
            raise BackendError(
                "TensorRT's engines are built here for fixed shapes, and this must run at several",
                "Export the decoder without caches, for one length.",
            )
        try:
            engine()
        except (ImportError, OSError) as error:
            hint = "pip install 'sysnoise-auditor[trt]'"
            raise BackendError(f"TensorRT is not here: {error}", hint, stage="start") from error
        return _Finished(request) if request.artifact is not None else _Build(request)


BACKEND = TensorRT()
