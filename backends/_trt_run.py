"""Runs an engine, and collects the tensors that its debug listener is shown."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.errors import BackendError
from auditor.ports import Array, Arrays, Capture
from auditor.records.backend import Probe, Skipped
from backends._trt_compile import Compiled
from backends._trt_cuda import Cuda, engine, logger, reason_in, storage_dtype, widened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Runner:
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
            why = reason_in(log.errors[0]) if log.errors else "no reason given"
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


class Observed:
    """An engine whose debug tensors are collected, by ONNX name."""

    def __init__(
        self,
        compiled: Compiled,
        cuda: Cuda,
        names: Mapping[str, str],
        feeds: Mapping[str, Array],
    ) -> None:
        """``names`` are the ONNX names by engine name; ``feeds`` show what TensorRT emits."""
        self._shapes = compiled.shapes
        self._names = names
        self._observer = _observer(cuda, names)
        self.runner = Runner(compiled.plan, cuda, self._observer)
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
        outputs = self.runner.run(feeds)
        received = self._observer.received
        tensors = {
            tensor: received[name] for name, tensor in self._names.items() if name in received
        }
        return Capture(outputs, {t: self._reshaped(t, array) for t, array in tensors.items()})

    def _reshaped(self, tensor: str, array: Array) -> Array:
        """The engine drops and merges axes; ONNX's shape where it is known."""
        shape = self._shapes.get(tensor, array.shape)
        return array.reshape(shape) if np.prod(shape) == array.size else array
