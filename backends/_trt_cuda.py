"""TensorRT's module, its log, and the CUDA driver through which buffers are allocated."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array


@cache
def engine() -> Any:
    """NVIDIA's ``tensorrt`` where it is installed, else ``tensorrt_rtx``."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError:
        return importlib.import_module("tensorrt_rtx")


def engine_name() -> str:
    return "TensorRT" if engine().__name__ == "tensorrt" else "TensorRT for RTX"


@cache
def logger() -> Any:
    """The process's logger: TensorRT keeps the first it is given and ignores later ones."""
    trt = engine()

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        """Keeps the engine's description, and what went wrong."""

        def __init__(self) -> None:
            super().__init__()
            self.reset()

        def reset(self) -> None:
            self.layers = ""
            self.parsing = ""  # the node being parsed, "KEY [Operator]"
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.layers = message
            elif message.startswith("Parsing node: "):
                self.parsing = message.removeprefix("Parsing node: ")

    return Log()


def reason_in(text: str) -> str:
    """The part of an error of TensorRT that says why; "" when it says nothing."""
    quoted = re.search(r'"([^"]* [^"]*)"', text) if '&& "' in text else None
    cuda = re.search(r"\((cudaError \d+: [^)]*)\)", text)
    coded = re.search(r"Error Code \d+: [^(]*\((.*?)(?: ?\bIn \w+ at |$)", text, re.MULTILINE)
    found = quoted or (None if coded and coded[1] else cuda) or coded
    plain = "" if text == "false" else text.splitlines()[0] if text else ""
    return (found[1] if found else plain)[:300].rstrip(". ")


def _driver() -> ctypes.CDLL:
    """The CUDA driver, initialised.

    Raises:
        OSError: there is none, or it has no device.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    if code := driver.cuInit(0):
        raise OSError(f"cuInit returned {code}, {_cuda_error(driver, code)}")
    return driver


def _cuda_error(driver: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(name))
    return (name.value or b"an unknown error").decode()


def visible_gpus() -> tuple[tuple[str, ...], str]:
    """Names of the CUDA devices, and why there are none."""
    try:
        driver = _driver()
    except OSError as error:
        return (), str(error)
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode())
    return tuple(names), "" if names else "the driver lists none"


def index_of(device: str | None, gpus: Sequence[str]) -> int:
    """Which GPU a device id stands for; the first by default.

    Raises:
        UsageError: there is no such GPU.
    """
    ids = [str(index) for index in range(len(gpus))]
    if device and device not in ids:
        listed = f"GPUs: {', '.join(map(' '.join, zip(ids, gpus, strict=True)))}." if gpus else ""
        raise UsageError(f"there is no CUDA device `{device}`", listed)
    return int(device or 0)


class Cuda:
    """The CUDA driver calls that a run needs, on one device and one stream of its own.

    Source: CUDA Driver API, "Primary Context", "Memory Management" and "Stream Management". The
    primary context is the one the runtime API, and so TensorRT, works in.
    """

    def __init__(self, index: int) -> None:
        self._driver = _driver()
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        # A blocking stream: it waits for uploads, which go through the default stream.
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream = stream.value or 0

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, array: Array) -> None:
        source = ctypes.c_void_p(array.ctypes.data)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, size)

    def download(self, array: Array, address: int) -> None:
        target = ctypes.c_void_p(array.ctypes.data)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), size)

    def wait(self, stream: int) -> None:
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def _call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._driver, function)(*arguments):
            raise BackendError(f"{function} failed: {_cuda_error(self._driver, code)}", stage="run")


def storage_dtype(type_name: str) -> np.dtype[Any] | None:
    """The numpy dtype of an element in memory, or None where elements share bytes (4 bits).

    Args:
        type_name: member of TensorRT's ``DataType`` (``FLOAT``, ``BF16`` …).
    """
    import ml_dtypes

    return {
        "FLOAT": np.dtype(np.float32),
        "HALF": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
        "E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "INT8": np.dtype(np.int8),
        "UINT8": np.dtype(np.uint8),
        "INT32": np.dtype(np.int32),
        "INT64": np.dtype(np.int64),
        "BOOL": np.dtype(np.bool_),
    }.get(type_name)


def widened(array: Array) -> Array:
    """Types that numpy does not have (bfloat16, float8) as float32, exactly; others as is."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array
