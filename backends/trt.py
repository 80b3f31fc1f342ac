"""NVIDIA TensorRT, and TensorRT for RTX where that is what is installed: one Python API.

Without a GPU it parses and builds, and the final engine is read from the builder's own
description of it; with one it also runs, and observes the tensors that survive fusion through
TensorRT's debug listener.

Source: TensorRT documentation, "Python API" (``Builder``, ``OnnxParser``, ``IDebugListener``,
``INetworkDefinition.mark_unfused_tensors_as_debug_tensors``) and "Engine Inspector".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from auditor.errors import BackendError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import Availability, Device, Probe, Provenance, Skipped, Switch
from backends._trt_compile import Compiled, Compiler, notes, options_of
from backends._trt_cuda import Cuda, engine, engine_name, index_of, visible_gpus
from backends._trt_layers import attribute, parse_layers
from backends._trt_plan import Finished
from backends._trt_run import Observed, Runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from auditor.ports import Build, Instrumented
    from auditor.records.backend import BuildRequest


@dataclass(frozen=True, slots=True)
class _Instrumented:
    """A second build of the same program whose surviving tensors are observed."""

    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    observed: Observed
    rebuilt: bool = True

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        return self.observed.run(feeds)


class _Build:
    """A compiled model, loaded where a CUDA device allows."""

    def __init__(self, request: BuildRequest) -> None:
        gpus, why = visible_gpus()
        index = index_of(request.device, gpus)
        # TensorRT builds for, and loads on, the device that is current.
        cuda = Cuda(index) if gpus else None
        self._compiler = Compiler(request)
        self._compiled = self._compiler.compile(observed=False)
        self._blocked = None if gpus else f"no CUDA device ({why})"
        self._loaded: tuple[Runner, Cuda] | None = None
        if cuda is not None:
            try:
                runner = Runner(self._compiled.plan, cuda)
            except BackendError as error:
                self._blocked = error.message
            else:
                self._loaded = runner, cuda
                self._compiled = _described(self._compiled, runner)
        self._layers = parse_layers(self._compiled.layers)
        kernels = self._compiler.graph.kernels(self._layers, self._compiled.tf32)
        self._provenance = Provenance(
            engine=engine_name(),
            version=engine().__version__,
            device=gpus[index] if gpus else "no CUDA device",
            options={"tf32": "on" if self._compiled.tf32 else "off"} | request.options,
            kernels=kernels,
            notes=notes(self._compiler, self._compiled, kernels),
        )

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
        observed = Observed(marked, cuda, names, feeds)
        marked = _described(marked, observed.runner)
        # No description, no proof.
        unchanged = bool(self._layers) and marked.program == self._compiled.program
        return _Instrumented(observed.probes, skipped + observed.missed, unchanged, observed)

    def _runnable(self) -> tuple[Runner, Cuda]:
        if self._loaded is None:
            raise BackendError(
                f"built, not run: {self._blocked}",
                "Run it on a machine with an NVIDIA GPU and its driver.",
                stage="run",
            )
        return self._loaded


def _described(compiled: Compiled, runner: Runner) -> Compiled:
    """A plan with its layers as the loaded engine tells them, where the builder did not."""
    return compiled if compiled.layers else replace(compiled, layers=runner.description())


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
        """A script with the same builder flags and GPU; a model with bfloat16 inputs is refused.

        Raises:
            UsageError: this TensorRT has no such option.
        """
        asked = options_of(options)
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
        return Finished(request) if request.artifact is not None else _Build(request)


BACKEND = TensorRT()
