"""What the user asked of an audit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from auditor.processes.limits import GIB, Limits
from auditor.records.terms import OutputKind, Severity


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A backend as named in ``--backends``: ``ov`` or ``ov:GPU``."""

    id: str
    device: str | None = None

    @property
    def label(self) -> str:
        """The name under which the report speaks of it."""
        return f"{self.id}:{self.device}" if self.device else self.id


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """What the user asked for.

    Attributes:
        requested: whether the backends were named; unnamed ones that are missing do not make
            the audit incomplete.
        candidate: another export that the backends compile while the model stays the reference.
        images, pipeline: folder of photographs, and what turns them into the input (a file or a
            preset); instead of ``data``.
        shapes: input shapes from ``--shape``.
        nonfinite: accept recorded inputs with NaN and infinities.
        timeout: seconds that one step of one backend may take.
        threads: threads of every engine and of the reference; None for the engines' defaults.
        options: engine options by backend id.
        output_kinds: as what outputs are read, by name; assumed for the others.
        tokens: what the classes of those that are read as text stand for.
        fail_on: lowest severity that fails the audit.
        confirm: whether to build what diverged again without single factors.
        calibration: what backends with the option ``quantize`` are calibrated on; the audit's own
            inputs when not given.
        artifacts: by a backend's label, the engine's own file that it audits.
        source: what the model was exported from, for the backends that run that;
        custom_ops: libraries of operators for ONNX Runtime, which is also the reference.
        trust_source: allows one whose loading can run code that is in a file.
        traces: what was recorded elsewhere: the name to report it under, and its file.
        trace_names: names in a dump of another runtime → ONNX tensor names, where they differ.
        cache: folder in which builds and traces are remembered; None to make everything anew.
        memory: bytes of weights that the reference holds; a model with more is run in pieces.
        latency: whether to time what is deployed beside ONNX Runtime's defaults.
        pictures: whether the report keeps small pictures of the tensors that diverge.
        limits: what each backend's process may use; as much memory as the machine has, and no
            network, when not given.
    """

    backends: tuple[BackendSpec, ...]
    requested: bool = True
    candidate: Path | None = None
    data: Path | None = None
    images: Path | None = None
    pipeline: str | None = None
    seed: int = 0
    samples: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nonfinite: bool = False
    timeout: float = 600.0
    threads: int | None = None
    options: dict[str, dict[str, str]] = field(default_factory=dict)
    fail_on: Severity = "medium"
    output_kinds: dict[str, OutputKind] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    confirm: bool = True
    calibration: Path | None = None
    artifacts: dict[str, Path] = field(default_factory=dict)
    source: str | None = None
    trust_source: bool = False
    custom_ops: tuple[Path, ...] = ()
    traces: tuple[tuple[str, Path], ...] = ()
    trace_names: dict[str, str] = field(default_factory=dict)
    cache: Path | None = None
    memory: int = 2 * GIB
    latency: bool = False
    pictures: bool = True
    limits: Limits | None = None
