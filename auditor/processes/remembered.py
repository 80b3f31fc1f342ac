"""A tracer that remembers what the same program did with the same inputs before.

Kept are each sample's tensors with the proofs that were made then, the build's provenance, and what
leaving single factors out did. The key holds everything that decides a program and its numbers: the
model's bytes, the inputs' bits, the shapes, the device, options, threads, environment variables of
the engines, the processor, the engine's version with every library and module that its process has
loaded, and the auditor's own code. An engine's own file (``--artifact``) is never remembered.

Nothing is built unless something is missing. A sample that is missing after an interruption is
traced anew; should that build be another program than the remembered one, the backend has a gap.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auditor.capture.trace import SampleTrace, Tracer
from auditor.errors import BackendError
from auditor.processes import machine
from auditor.processes.wire import decode, encode
from auditor.records.backend import BuildRequest, Gap, Probe, Provenance, Skipped, Switch

if TYPE_CHECKING:
    from auditor.ports import Arrays, Progress
    from auditor.processes.cache import Store
    from auditor.processes.worker import Worker

_FORMAT = 1
# Environment variables that the engines, their kernels or their thread pools read.
_VARIABLES = (
    *("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_", "TBB_", "LD_"),
    *("ORT_", "ONNXRUNTIME_", "OV_", "OPENVINO_", "TVM_", "CUDA_", "NVIDIA_", "TRT_", "PYTHONPATH"),
)


@dataclass(frozen=True, slots=True)
class _Build:
    """A build as it is remembered."""

    provenance: Provenance
    switches: tuple[Switch, ...]
    blocked: str | None
    made: str  # the day


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample as it is remembered, without its tensors; fields as in ``SampleTrace``."""

    outputs: tuple[str, ...]
    tensors: tuple[str, ...]
    again: tuple[str, ...] | None
    bitwise_equal: bool
    difference: float
    run_to_run: float
    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    rebuilt: bool


class Remembered(Tracer):
    """A ``Tracer`` with a memory; see there.

    Attributes:
        sha256: to be set before ``build``.
    """

    def __init__(
        self, id: str, worker: Worker, timeout: float, progress: Progress, store: Store
    ) -> None:
        """As ``Tracer``, with the ``store`` to remember in."""
        super().__init__(id, worker, timeout, progress)
        self._cache = store
        self._identity = ""
        self._environment: dict[str, Any] = {}
        self._key = ""  # of the build; "" where nothing is remembered
        self._known: _Build | None = None
        self._live = False
        self._traced = 0
        self._first = ""  # hash of the first sample's inputs
        self._switch: Switch | None = None
        self._ablated = False

    def start(self) -> bool:
        """Import the engine, and ask what of it is loaded."""
        if not super().start():
            return False
        try:
            self._identity = self._call("identity", str)
        except BackendError as error:
            self._fail(error)
            return False
        return True

    def build(self, request: BuildRequest) -> None:
        """Recall the build, or make it."""
        self.request = request
        if request.artifact is None and self._identity:
            self._environment = _environment(self, request, self._identity)
            self._key = _digest(self._environment)
            found = self._cache.get(self._key)
            self._known = None if found is None else _decoded(_Build, found[0])
        if self._known is None:
            self._really_build(request)
        else:
            known = self._known
            self.progress.update(self.id, "recall")
            self._accept(request, known.provenance, known.switches, known.blocked)
            if self.gap is not None:  # it could not run, which is worth no second build either
                self.provenance = _from_cache(known.provenance, f"This build is {_told(known)}.")

    def sample(self, feeds: Arrays, *, last: bool = False) -> SampleTrace | None:
        """Recall what was done with a sample, or do it."""
        key = self._sample_key(feeds)
        found = self._cache.get(key) if key else None
        said = None if found is None else _decoded(_Sample, found[0])
        if found is not None and said is not None and self._known is not None:
            self._traced += 1
            self.recalled += 1
            self.probes, self.skipped = said.probes, said.skipped
            self.program_unchanged, self.rebuilt = said.program_unchanged, said.rebuilt
            return _recalled(said, found[1])
        if not self._awake():
            return None
        before = (self.probes, self.skipped) if self.recalled else None
        trace = super().sample(feeds, last=last)
        if trace is None:
            return None
        if before is not None and before != (self.probes, self.skipped):
            self._differs("observes other tensors")
            return None
        self._traced += 1
        if key and self.unobserved is None:
            self._remember(key, trace)
        return trace

    def plain(self, feeds: Arrays) -> Arrays | None:
        """Run the plain program once."""
        return super().plain(feeds) if self._awake() else None

    def ablate(self, switch: Switch) -> None:
        """Leave a factor out, when the first result of that is not remembered."""
        self._switch, self._ablated = switch, False

    def contrast(self, feeds: Arrays) -> tuple[Arrays, Arrays, bool]:
        """Recall the outputs of both programs, or run them."""
        key = self._beside_key("contrast", feeds)
        if (found := self._cache.get(key) if key else None) is not None:
            tensors = found[1]
            plain = {n[1:]: v for n, v in tensors.items() if n[0] == "p"}
            return plain, {n[1:]: v for n, v in tensors.items() if n[0] == "a"}, found[0]["equal"]
        self._really_ablate()
        plain, ablated, equal = super().contrast(feeds)
        if key:
            both = {f"p{n}": v for n, v in plain.items()} | {f"a{n}": v for n, v in ablated.items()}
            self._cache.put(key, {"equal": equal}, both)
        return plain, ablated, equal

    def race(self, feeds: Arrays) -> tuple[float, float]:
        """Recall the latencies of both programs, or measure them."""
        key = self._beside_key("race", feeds)
        if (found := self._cache.get(key) if key else None) is not None:
            return float(found[0]["plain"]), float(found[0]["ablated"])
        self._really_ablate()
        plain, ablated = super().race(feeds)
        if key:
            self._cache.put(key, {"plain": plain, "ablated": ablated}, {})
        return plain, ablated

    def against(self, request: BuildRequest, backend: str, feeds: Arrays) -> tuple[float, float]:
        """Measure both programs; the machine's state today counts, so nothing is remembered."""
        self._wake_or_raise()
        self._ablated = False
        return super().against(request, backend, feeds)

    def stated(self) -> Provenance | None:
        """The provenance, with a note where something came from the cache."""
        if self.provenance is None or self._known is None or not self.recalled:
            return self.provenance
        samples = "1 sample" if self._traced == 1 else f"{self._traced} samples"
        return _from_cache(
            self.provenance,
            f"{self.recalled} of {samples}, and counterfactuals made before, come "
            f"{_told(self._known)}, with the proofs made then; --no-cache measures anew.",
        )

    # --- making what is not remembered ---------------------------------------------------------

    def _awake(self) -> bool:
        """Have the program built; False (with ``gap`` set) when that fails."""
        if self._live or self.request is None:
            return self.gap is None
        known = self._known
        self._really_build(self.request)
        if self.gap is None and known is not None and self.provenance != known.provenance:
            self._differs("has other kernels or options")
        return self.gap is None

    def _really_build(self, request: BuildRequest) -> None:
        super().build(request)
        self._live = True
        if self.provenance is not None and self._key and self._known is None:
            blocked = self.blocked
            self._known = _Build(self.provenance, self.switches, blocked, date.today().isoformat())
            self._cache.put(self._key, encode(self._known), {})

    def _really_ablate(self) -> None:
        assert self._switch is not None
        if self._ablated:
            return
        self._wake_or_raise()
        super().ablate(self._switch)
        self._ablated = True

    def _wake_or_raise(self) -> None:
        if not self._awake():
            assert self.gap is not None
            raise BackendError(self.gap.reason, self.gap.remedy or "", stage=self.gap.stage)

    def _remember(self, key: str, trace: SampleTrace) -> None:
        groups = {"o": trace.outputs, "t": trace.tensors, "g": trace.again or {}}
        # The outputs are among the tensors, and mostly the same arrays.
        arrays = {
            f"{kind}{name}": value
            for kind, tensors in groups.items()
            for name, value in tensors.items()
            if kind != "t" or value is not trace.outputs.get(name)
        }
        said = _Sample(
            tuple(trace.outputs),
            tuple(trace.tensors),
            None if trace.again is None else tuple(trace.again),
            trace.bitwise_equal,
            trace.difference,
            trace.run_to_run,
            self.probes,
            self.skipped,
            self.program_unchanged,
            self.rebuilt,
        )
        self._cache.put(key, encode(said), arrays)

    def _differs(self, how: str) -> None:
        """The program made now is another than the remembered one: forget that, and say so."""
        self._cache.forget(self._key)
        self.gap = Gap(
            self.id,
            "recall",
            f"the program built now {how} than the one in the cache, built from the same things",
            "Run the audit again: it builds anew. --no-cache leaves the cache out.",
        )

    def _sample_key(self, feeds: Arrays) -> str:
        if not self._key:
            return ""
        bits = _bits(feeds)
        self._first = self._first or bits  # a proof may rest on it; and it is run several times
        return _digest([self._key, self._first, bits, self._traced == 0])

    def _beside_key(self, what: str, feeds: Arrays) -> str:
        if not self._key or self._switch is None:
            return ""
        return _digest([self._key, what, sorted(self._switch.options.items()), _bits(feeds)])


def _recalled(said: _Sample, arrays: Arrays) -> SampleTrace:
    outputs = {name: arrays[f"o{name}"] for name in said.outputs}
    tensors = {n: arrays[f"t{n}"] if f"t{n}" in arrays else outputs[n] for n in said.tensors}
    again = None if said.again is None else {n: arrays[f"g{n}"] for n in said.again}
    return SampleTrace(
        outputs, tensors, again, said.bitwise_equal, said.difference, said.run_to_run
    )


def _decoded(kind: Any, data: Any) -> Any:
    """A record, or None where the entry holds something else."""
    try:
        return decode(kind, data)
    except (TypeError, ValueError, AttributeError, KeyError):
        return None


def _told(known: _Build) -> str:
    return f"from the cache, recorded from {known.made} on under the same conditions"


def _from_cache(provenance: Provenance, note: str) -> Provenance:
    return replace(provenance, notes=(*provenance.notes, note))


def _environment(tracer: Remembered, request: BuildRequest, identity: str) -> dict[str, Any]:
    """Everything that decides what a build computes."""
    here = machine.here()
    return {
        "format": _FORMAT,
        "code": _own_code(),
        "backend": tracer.worker.backend,
        "engine": identity,
        "model": tracer.sha256,
        "shapes": {name: list(shape) for name, shape in sorted(request.shapes.items())},
        "dynamic": request.dynamic,
        "open": request.open,
        "device": request.device,
        "threads": request.threads,
        "options": sorted(request.options.items()),
        "custom operators": [_hash_of(library) for library in request.custom_ops],
        "cpu": [here.cpu, *here.flags],
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "system": here.system,
        "variables": sorted(i for i in os.environ.items() if i[0].startswith(_VARIABLES)),
    }


@cache
def _own_code() -> str:
    """Hash of the code that makes and reads traces."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted((*root.glob("auditor/**/*.py"), *root.glob("backends/*.py"))):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _hash_of(library: Path) -> str:
    with library.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _bits(feeds: Mapping[str, Any]) -> str:
    """Hash of the inputs by name."""
    digest = hashlib.sha256()
    for name in sorted(feeds):
        value = feeds[name]
        digest.update(f"{name}\0{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
