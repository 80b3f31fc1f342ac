"""A plan that was built before: what it tells without a GPU, and its outputs with one.

TensorRT itself reads a plan on a CUDA device only. But the file begins with a header (magic,
size, version), and a plan built with detailed verbosity carries its layers' metadata as text,
``[ONNX Layer: name]``. Nothing here is an interface that NVIDIA documents: what is not found is
called unknown, and no comparison rests on it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture
from auditor.records.backend import Kernel, Probe, Provenance, Skipped
from backends._shared import node_key
from backends._trt_cuda import Cuda, engine, engine_name, index_of, visible_gpus
from backends._trt_layers import Graph, parse_layers
from backends._trt_run import Runner

if TYPE_CHECKING:
    from auditor.records.backend import BuildRequest

_MAGIC = {b"ptrt": "TensorRT", b"vtrt": "TensorRT for RTX"}
_SIZE, _VERSION = 16, 24  # offsets: of a 64-bit length, and of four bytes
_ORIGIN = re.compile(rb"\[ONNX Layer: ([^\]\x00-\x1f]{1,512})\]")
_TARGET = re.compile(rb"accelerators=\{(sm\d+)")


class Finished:
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
        written = _read(data)
        if written.product is None or not written.whole:
            why = "is no TensorRT plan" if written.product is None else "is cut off"
            raise BackendError(f"{file.name} {why}", "Give what trtexec --saveEngine wrote.")
        graph = onnx.load(request.model_path, load_external_data=False).graph
        constants = {i.name for i in graph.initializer}
        inputs = [i.name for i in graph.input if i.name not in constants]
        outputs = [o.name for o in graph.output]
        gpus, why = visible_gpus()
        index = index_of(request.device, gpus)
        self.blocked: str | None = None if gpus else f"no CUDA device ({why})"
        self._runner: Runner | None = None
        kernels: tuple[Kernel, ...] = ()
        if gpus:
            try:
                self._runner = Runner(data, Cuda(index))
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
            notes=_sentences(file.name, data, written, nodes, outputs),
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

    def __init__(self, plan: Finished) -> None:
        self._plan = plan

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """One run: the outputs alone."""
        return Capture(self._plan.run(feeds), {})


@dataclass(frozen=True, slots=True)
class _Written:
    """What is written in a plan.

    Attributes:
        product: what made it; None where the file is no plan.
        version: its version; "" where the header has another form.
        origins: names of the ONNX nodes in the layers' metadata.
        target: the compute capability that it was built for; "" where not stated.
        whole: whether the file is as long as its header says, as far as that is known.
    """

    product: str | None
    version: str
    origins: frozenset[str]
    target: str
    whole: bool


def _read(data: bytes) -> _Written:
    """Read a plan's header and the text in it."""
    product = _MAGIC.get(data[:4])
    length, version = 0, ""
    if product is not None and len(data) >= _VERSION + 4:
        (length,) = struct.unpack_from("<Q", data, _SIZE)
        if length == len(data):
            version = ".".join(map(str, data[_VERSION : _VERSION + 4]))
    origins = frozenset(m.decode("utf-8", "replace") for m in _ORIGIN.findall(data))
    target = _TARGET.search(data)
    return _Written(
        product,
        version,
        origins,
        target[1].decode() if target else "",
        product != "TensorRT for RTX" or length == len(data),  # the one layout that was seen
    )


def _sentences(
    name: str, data: bytes, written: _Written, nodes: Collection[str], outputs: Sequence[str]
) -> tuple[str, ...]:
    """What there is to say of a plan beside the model that it shall have been made of.

    Args:
        name: of the file.
        data: what is in it.
        written: what ``_read`` made of that.
        nodes: names of the model's nodes, and of what they make.
        outputs: names of the model's outputs.
    """
    version = f" {written.version}" if written.version else ""
    target = f", for {written.target}" if written.target else ""
    said = [
        f"{name} was loaded instead of compiling the ONNX file: {len(data)} bytes written by "
        f"{written.product}{version}{target}."
    ]
    if written.origins:
        known = sum(o.rsplit(" | ", 1)[-1].rsplit(" (", 1)[0] in nodes for o in written.origins)
        said.append(
            f"It names {len(written.origins)} ONNX nodes in its layers; {known} are the model's."
        )
    else:
        said.append(
            "It does not say which ONNX nodes its layers come from: it was built without "
            "ProfilingVerbosity.DETAILED."
        )
    said += [
        f"The model's output `{output}` is not written in it."
        for output in outputs
        if output.encode() not in data
    ]
    return tuple(said)
