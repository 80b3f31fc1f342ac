"""ONNX Runtime's execution providers: which there are, and how to get those that are not.

A build of ONNX Runtime lists the providers that it was compiled with. Whether one works is known
only when a session has it: where its libraries are missing, ONNX Runtime goes on with the CPU in
silence.

Source: https://onnxruntime.ai/docs/execution-providers/.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from auditor.errors import BackendError, UsageError
from auditor.records.backend import Device

CPU: Final = "CPUExecutionProvider"
OPTION: Final = "provider."  # prefix of options that go to the provider, such as use_tf32
RECORD: Final = "session.record_ep_graph_assignment_info"
_INSTEAD: Final = "in place of onnxruntime, in an environment of its own"
_KNOWN: Final[dict[str, tuple[str, str]]] = {
    "cuda": ("CUDAExecutionProvider", f"pip install onnxruntime-gpu, {_INSTEAD}"),
    "tensorrt": (
        "TensorrtExecutionProvider",
        f"pip install onnxruntime-gpu and TensorRT's libraries, {_INSTEAD}",
    ),
    "openvino": ("OpenVINOExecutionProvider", f"pip install onnxruntime-openvino, {_INSTEAD}"),
    "xnnpack": ("XnnpackExecutionProvider", "build ONNX Runtime with --use_xnnpack"),
    "dml": ("DmlExecutionProvider", f"on Windows: pip install onnxruntime-directml, {_INSTEAD}"),
    "coreml": ("CoreMLExecutionProvider", "use onnxruntime on macOS"),
}


def devices(available: Collection[str]) -> Iterator[Device]:
    """Every provider that can be named, with the reason where this build has it not."""
    for id, (name, remedy) in _KNOWN.items():
        if name in available:
            yield Device(id, name)
        else:
            reason = "not in this build of onnxruntime"
            yield Device(id, name, reason=reason, remedy=remedy)


def named(device: str | None) -> str:
    """The provider that a device means.

    Raises:
        UsageError: there is none of that name.
    """
    id = (device or "cpu").lower()
    if id == "cpu":
        return CPU
    if id not in _KNOWN:
        raise UsageError(
            f"The ort backend has no device {device!r}.",
            f"Use ort, or ort: and one of {', '.join(_KNOWN)}.",
        )
    return _KNOWN[id][0]


def check(provider: str, available: Collection[str]) -> None:
    """Refuse a provider that this build of ONNX Runtime does not have.

    Raises:
        BackendError: it has not, with how to get it.
    """
    if provider not in available:
        remedy = next((r for name, r in _KNOWN.values() if name == provider), "")
        raise BackendError(
            f"this build of ONNX Runtime has no {provider}", f"To get it: {remedy}.", stage="start"
        )


def listed(provider: str, options: Mapping[str, str]) -> list[Any]:
    """What a session is given: the provider, and the CPU for what it does not run."""
    if provider == CPU:
        return [CPU]
    return [(provider, dict(options)), CPU]


def require(session: Any, provider: str) -> None:
    """Refuse a session that went on without its provider.

    Raises:
        BackendError: it did.
    """
    if provider not in session.get_providers():
        raise BackendError(
            f"{provider} could not be loaded, and ONNX Runtime went on with the CPU",
            "Check the provider's libraries and driver; ONNX Runtime's documentation lists the "
            "versions that it needs.",
            stage="start",
        )


def compiles(error: BackendError) -> bool:
    """Whether a graph cannot be written because a provider compiled parts of it."""
    return "compiled node" in " ".join((error.message, *error.log)).lower()


def notes(session: Any, provider: str) -> Iterator[str]:
    """Which provider runs how many nodes, where the session says so."""
    with contextlib.suppress(Exception):  # older than 1.24, or nothing recorded
        counted = Counter[str]()
        for part in session.get_provider_graph_assignment_info():
            counted[part.ep_name] += len(part.get_nodes())
        if counted:
            said = ", ".join(f"{count} by {name}" for name, count in counted.most_common())
            yield f"Nodes of the model are run so: {said}."
            if provider not in counted:
                yield f"{provider} runs none of them: what is compared here is the CPU."
