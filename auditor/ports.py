"""What the domain expects of the outside: backends, noises, renderers, progress.

A new backend, noise or report format is one new file that satisfies one of these Protocols
and exports it under the constant's name given there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

    from auditor.records.backend import (
        Availability,
        BuildRequest,
        ExportRequest,
        Kernel,
        Origin,
        Probe,
        Provenance,
        Skipped,
        Switch,
    )
    from auditor.records.report import AuditReport
    from auditor.records.terms import Stage

# A tensor's type is only known at run time, so arithmetic on it cannot be checked statically.
Array = NDArray[Any]
Arrays = dict[str, Array]  # tensors by ONNX name


@dataclass(frozen=True, slots=True)
class Capture:
    """One instrumented run: the final outputs, and every probe's value by ONNX name.

    Values are float32 (or the tensor's own integer, bool, float16 or float64 type), contiguous
    and owned by the caller; bfloat16 is widened to float32, exactly.
    """

    outputs: Arrays
    tensors: Arrays


class Instrumented(Protocol):
    """A build together with probes that have been checked against its program."""

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The tensors this instrumentation observes."""

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Tensors of the compiled program left unobserved, each with its reason."""

    @property
    def program_unchanged(self) -> bool:
        """Whether the instrumented program has the plain one's kernels, precisions, fusions."""

    @property
    def rebuilt(self) -> bool:
        """Whether instrumenting compiled the model again (so equal outputs prove rebuilds)."""

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """Run once on ``feeds`` and return outputs and captures."""


class Build(Protocol):
    """One compiled model inside a worker process."""

    @property
    def provenance(self) -> Provenance:
        """What was built, by what, with which kernels."""

    @property
    def blocked(self) -> str | None:
        """Why it cannot run here ("no CUDA device"); None when it can."""

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Run the plain program: every graph output by its ONNX name."""

    def instrument(self, feeds: Mapping[str, Array]) -> Instrumented:
        """Add probes; ``feeds`` is a sample for proofs that need a run."""


class Backend(Protocol):
    """A runtime. Exported as ``BACKEND``; its file's stem is its id."""

    @property
    def title(self) -> str:
        """The runtime's name as its vendor writes it."""

    def availability(self) -> Availability:
        """Whether it can be used here; imports the engine, never raises."""

    def build(self, request: BuildRequest) -> Build:
        """Compile.

        Raises:
            BackendError: the engine refused the model, named by operator where it says so.
            UsageError: an option or device that this engine does not have.
        """


@dataclass(frozen=True, slots=True)
class Script:
    """Python source that runs a model on one engine, for a reproducer.

    Attributes:
        engine: its name; ``packages``: what to install, as for pip.
        source: defines ``run(path, feeds)``, the outputs by name of the model at ``path`` on the
            arrays ``feeds`` (by input name, in the model's order), and ``version()``.
    """

    engine: str
    packages: str
    source: str


@runtime_checkable
class Loadable(Protocol):
    """A backend that can audit a file of its engine (``BuildRequest.artifact``)."""

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The endings of such files' names, with the dot."""


@runtime_checkable
class Keeping(Protocol):
    """A backend that can keep single nodes in float32 (``BuildRequest.kept``)."""

    @property
    def keeps(self) -> str:
        """The ending of the name of the file that such a program is written to, with the dot."""


@runtime_checkable
class Holding(Protocol):
    """A build of an engine's own file that can read the file's constants."""

    def constants(self) -> Arrays:
        """The file's constants under the ONNX model's names, as far as they are recognised."""


@runtime_checkable
class Gridded(Protocol):
    """A build of a quantised program that knows what activations are rounded to.

    The program may be quantised for this build (``BuildRequest.calibration``) or before.
    """

    def grids(self) -> Arrays:
        """The values that activations are rounded to, by ONNX name; none where not quantised.

        ``[3, …]``: the smallest, the largest and how many, each for all or broadcast.
        """


@runtime_checkable
class Scriptable(Protocol):
    """A backend whose programs can also be made by a short script."""

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """The source that builds and runs as ``Backend.build`` does with these options."""


@runtime_checkable
class Training(Protocol):
    """A backend that runs what a model was exported from (``BuildRequest.source``).

    It takes part where the user names a source, and only there.
    """

    @property
    def sources(self) -> tuple[str, ...]:
        """What it can run, in words."""


@runtime_checkable
class Exporting(Training, Protocol):
    """A training side that can export what it runs."""

    @property
    def exporters(self) -> tuple[str, ...]:
        """Their names, the one to prefer first."""

    def export(self, request: ExportRequest, feeds: Mapping[str, Array]) -> tuple[str, ...]:
        """Write ``request.path``; ``feeds`` are the arguments it is captured with, by name.

        Returns:
            Lines of code whose decisions and numbers this run made constants of the file.

        Raises:
            BackendError: the module or the exporter failed.
            UsageError: there is no such source.
        """


@runtime_checkable
class Traced(Protocol):
    """An instrumentation that knows where in the training code tensors come from."""

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The origin of each ONNX node whose first output it observes."""

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What was executed, in order, known only now that it has run."""


@runtime_checkable
class Switchable(Protocol):
    """A build that knows which of its factors the engine can leave out."""

    @property
    def switches(self) -> tuple[Switch, ...]:
        """The factors that are on in this build, of those that can change its numbers."""


@runtime_checkable
class Sharing(Protocol):
    """A build that says whether it shares its threads with its engine's other builds."""

    @property
    def shared_threads(self) -> bool:
        """Whether all builds in a process run on the same threads, so that no others spin."""


@runtime_checkable
class Releasable(Protocol):
    """A build that can free its program while the instrumented one runs."""

    def release(self) -> None:
        """Free the plain program; the next ``run`` compiles it again."""


Storage = Literal["float16", "bfloat16", "8 bits", "4 bits"]


@dataclass(frozen=True, slots=True)
class CompiledConstant:
    """A constant whose values differ between the reference and another file or module.

    Attributes:
        values: the other's, in the reference's type and shape; a module's in its own type.
        relative_l2: how far they are from the reference's; of integers, the fraction that differ.
        storage: the narrow format in which these are the reference's values, or of a module, in
            which its values are the reference's; None when they are not, or when no format is
            recognised.
        factor: what the reference's values are multiplied by, where that is all there is to it; of
            a module, what its values are multiplied by to give the reference's.
        quantised: whether a quantiser chose these: the reference's values, rounded to a grid.
    """

    values: Array
    relative_l2: float
    storage: Storage | None
    factor: float | None
    quantised: bool = False


@dataclass(frozen=True, slots=True)
class SegmentGraph:
    """One segment as a stand-alone ONNX model, for noises to transform.

    Attributes:
        model: inputs are the segment's boundary tensors, outputs its captured tensors, all
            under their ONNX names; constants are initialisers or Constant nodes inside. Treat
            as read-only: copy before changing.
        kernels: what the engine says it ran for these nodes, in execution order; may be empty.
        compiled: constants that the compiled file has otherwise, by their names here.
        trained: those that the module has otherwise which the model was exported from.
        grids: what activations are rounded to in the compiled program (``Gridded``), by name.
        weights: values of the initialisers that lie in files (``auditor.graphs.weights``), by name;
        folder: where these files are.
        threads: that the backend may use; 0 for its own choice.
        original: the segment as the file has it, where ``model`` has some operators written out in
            simpler ones.
        half: whether the model's own tensors here are float16; ``model`` has float32 all the same.
    """

    model: onnx.ModelProto
    kernels: tuple[Kernel, ...]
    compiled: Mapping[str, CompiledConstant] = field(default_factory=dict)
    trained: Mapping[str, CompiledConstant] = field(default_factory=dict)
    grids: Mapping[str, Array] = field(default_factory=dict)
    weights: Mapping[str, Array] = field(default_factory=dict)
    folder: Path | None = None
    threads: int = 0
    original: onnx.ModelProto | None = None
    half: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """One executable form of a hypothesis: a model with the segment's inputs and outputs."""

    name: str
    model: onnx.ModelProto


class Surroundings(Protocol):
    """What a rewrite may know of the model around a node, and what it may add to it."""

    @property
    def opset(self) -> int:
        """Version of the default operator set."""

    def constant(self, name: str) -> Array | None:
        """The value of a constant; None where it is computed."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a tensor has at the audited inputs; None where unknown."""

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """The type of a tensor; None where unknown."""

    def fresh(self, name: str) -> str:
        """A tensor name that the model does not have."""

    def add(self, name: str, value: Array) -> str:
        """Add a constant; returns its name."""


class Fix(Protocol):
    """An equivalent way to write an operator. Exported as ``FIX`` by a file of auditor/fixes."""

    @property
    def id(self) -> str:
        """A short name."""

    @property
    def title(self) -> str:
        """What it does, in words."""

    @property
    def noises(self) -> frozenset[str]:
        """Ids of the causes that it avoids."""

    def rewrite(self, node: onnx.NodeProto, view: Surroundings) -> list[onnx.NodeProto] | None:
        """Nodes with the same outputs by name, to stand in its place; None where it has none."""


class Noise(Protocol):
    """A SysNoise cause as an executable change of the reference. Exported as ``NOISE``."""

    @property
    def id(self) -> str:
        """``family.name``, for instance ``precision.bf16``."""

    @property
    def stage(self) -> Stage:
        """SysNoise stage (paper, Table 1)."""

    @property
    def type(self) -> str:
        """SysNoise type (paper, Table 1), for instance ``data precision``."""

    @property
    def title(self) -> str:
        """What it is, in one sentence."""

    @property
    def cause(self) -> str:
        """Why deployments differ here, in one or two sentences."""

    @property
    def applies(self) -> str:
        """The operators, types and operator sets on which it can be replayed, in words."""

    @property
    def source(self) -> str:
        """Where it is documented: paper section, operator specification, vendor page."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Names of its variants; words in capitals differ from segment to segment."""

    @property
    def significand(self) -> int | None:
        """Bits that a format keeps of every floating-point number; None where it is no format."""

    @property
    def convention(self) -> bool:
        """Whether it is another definition of an operator.

        A backend follows one to rounding or not at all: an error that such a noise explains only in
        part has another cause.
        """

    @property
    def cancelling(self) -> tuple[str, ...]:
        """Beginnings of the names of those forms of a convention that may explain a part.

        These forms subtract numbers that nearly cancel, so that rounding decides what is left.
        """

    @property
    def advice(self) -> str:
        """What to do about it on a backend of which ``remedies`` says nothing."""

    @property
    def remedies(self) -> Mapping[str, str]:
        """What to do about it on particular backends, by their ids."""

    @property
    def ablations(self) -> Mapping[str, Mapping[str, str]]:
        """The options that switch it off, by backend id; none where a backend has no switch."""

    def remedy(self, backend: str, options: Mapping[str, str] = MappingProxyType({})) -> str:
        """What to do about it on this backend, concretely.

        Args:
            backend: its id.
            options: what the program was built with; what it has already is no remedy.
        """

    def stated_by(self, kernels: tuple[Kernel, ...]) -> bool:
        """Whether the engine itself says it does this here: evidence, never a substitute."""

    def variants(self, segment: SegmentGraph) -> Iterable[Variant]:
        """The forms to replay on this segment, most likely first; empty when not applicable.

        Raises:
            NoiseError: the segment should be replayable but is not.
        """

    def simulations(self, model: onnx.ModelProto) -> Iterable[Variant]:
        """The forms in a whole model, weights inside; empty when deployments do not choose it.

        Raises:
            NoiseError: the model should be simulable but is not.
        """


@runtime_checkable
class Fitting(Protocol):
    """A noise some of whose forms have numbers that only the backend knows, such as scales."""

    def fits(self, segment: SegmentGraph, inputs: Arrays, observed: Arrays) -> Iterable[Variant]:
        """Forms with the numbers that explain the backend's tensors best, to be replayed.

        Args:
            segment: as for ``Noise.variants``.
            inputs: the backend's own tensors at the segment's inputs.
            observed: what it made of them, at the segment's outputs.
        """


class Progress(Protocol):
    """Where the audit says what it is doing. Implementations write to standard error."""

    def update(self, who: str, stage: str) -> None:
        """``who`` (a backend id or ``reference``) has entered ``stage``."""

    def close(self) -> None:
        """Remove the display and restore the terminal."""


class Silent:
    """The progress that is shown nowhere."""

    def update(self, who: str, stage: str) -> None:
        """Say nothing."""

    def close(self) -> None:
        """There is nothing to remove."""


class Renderer(Protocol):
    """A report format. Exported as ``RENDERER``; its file's stem is its name in --format."""

    @property
    def name(self) -> str:
        """The name in ``--format``."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The endings of a file's name that mean this format, such as ``.json``."""

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The whole report as text."""
