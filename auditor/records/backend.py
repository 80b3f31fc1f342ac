"""What is asked of a backend, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from auditor.records.terms import Fidelity


@dataclass(frozen=True, slots=True)
class Device:
    """One piece of hardware, or one way to use it, as ``audit backends`` lists it.

    Attributes:
        id: what follows the colon in ``--backends ov:GPU``; "" for the default device.
        name: its own full name.
        precisions: that it computes in, as its engine states them; none where it does not.
        reason: why it cannot be used here; None where it can. ``remedy``: how to get it.
    """

    id: str
    name: str
    precisions: tuple[str, ...] = ()
    reason: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a backend can be used here, or why not and how to get it.

    Attributes:
        unlimited: limits that could not be put on its process here, in words.
    """

    available: bool
    engine: str  # "OpenVINO"
    version: str | None = None
    devices: tuple[Device, ...] = ()
    reason: str | None = None
    remedy: str | None = None
    unlimited: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One compilation to make.

    Attributes:
        model_path: the ONNX file exactly as the user gave it (external data beside it).
        shapes: concrete shape of every graph input; differs from the model's own declaration
            only where that is symbolic.
        dynamic: whether any input of the model has a symbolic dimension.
        calibration: folder of ``.npz`` files to quantise by, one a sample, with an array for each
            of ``shapes``; None where nothing is to be quantised.
        open: whether symbolic dimensions stay open in the program, which then runs at any sizes;
            else it is made for ``shapes``.
        device: the engine's device id, or None for its default.
        threads: worker threads of the engine, or None for the engine's own default.
        options: engine options as given on the command line (``ov.KEY=VALUE`` → KEY: VALUE).
        workdir: private folder for temporary files of this build.
        artifact: the engine's own file to load instead of compiling ``model_path``, which then
            only says what its tensors are called.
        custom_ops: libraries of operators for ONNX Runtime.
        kept: keys of nodes; where there are any, ``artifact`` is first written from the model, with
            these in float32 whatever the rest is computed in.
        source: what ``model_path`` was exported from, as after ``--source``; only the training
            side is given it.
        trusted: whether the user allowed to load a source that can run code of its own.
    """

    model_path: Path
    shapes: dict[str, tuple[int, ...]]
    dynamic: bool
    device: str | None
    threads: int | None
    options: dict[str, str]
    workdir: Path
    artifact: Path | None = None
    source: str | None = None
    trusted: bool = False
    kept: tuple[str, ...] = ()
    custom_ops: tuple[Path, ...] = ()
    open: bool = False
    calibration: Path | None = None


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """One export to make of what a model is made from.

    Attributes:
        source: as after ``--source``; ``trusted``: whether it may run code of its own.
        exporter: one of the training side's exporters.
        opset: operator set of the file; the exporter's own choice when None.
        dynamic: open dimensions: by input, the symbol of an axis, whose number is a string.
        path: the file to write.
    """

    source: str
    trusted: bool
    exporter: str
    opset: int | None
    dynamic: dict[str, dict[str, str]]
    path: Path


@dataclass(frozen=True, slots=True)
class Kernel:
    """One executed primitive of a compiled program, as the engine itself states it.

    Attributes:
        name: the engine's own name for it.
        type: the engine's layer type (``Convolution``, ``FullyConnected`` …).
        nodes: keys of the ONNX nodes fused into it; empty when the engine does not say.
        outputs: ONNX names of the tensors it produces, where known.
        primitive: the implementation chosen (``brgconv_avx512_amx``); "" when not stated.
        precision: the precision it computes in (``f32``, ``bf16``, ``f16``, ``i8``, ``tf32``);
            "" when not stated.
        output_precision: the precision it writes; "" when not stated.
    """

    name: str
    type: str
    nodes: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    primitive: str = ""
    precision: str = ""
    output_precision: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where in the training code an ONNX node comes from.

    Attributes:
        node: the node's key.
        module: path of the module (``layer3.2.conv2``); "" for the model itself or where unknown.
        place: file and line that called it (``resnet.py:104``), None where unknown.
    """

    node: str
    module: str
    place: str | None = None

    def __str__(self) -> str:
        """``layer3.2.conv2 (resnet.py:104)``; empty where neither is known."""
        if self.place is None:
            return self.module
        return f"{self.module} ({self.place})" if self.module else self.place


@dataclass(frozen=True, slots=True)
class Provenance:
    """What was built, by what, for what: enough to build it again.

    Attributes:
        backend: the id of the backend that made it, as in ``--backends``, also in a trace that it
            recorded elsewhere; "" where another runtime dumped its tensors.
        notes: compile-time facts a deployment engineer must know (narrowed types, specialised
            shapes, folded graphs); each a full sentence.
        denied: what the options ask for and the device does not do; each a full sentence. The
            report says it as a gap.
    """

    engine: str
    version: str
    device: str
    options: dict[str, str] = field(default_factory=dict)
    kernels: tuple[Kernel, ...] = ()
    notes: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Switch:
    """A factor of a build that its engine can leave out, for a counterfactual.

    Attributes:
        factor: what is left out, in words ("fusion of quantised operators").
        options: the engine options, as in ``--option``, that leave it out and nothing else.
        noises: ids of the causes that the factor can bring; empty when it may bring any.
        kernels: primitives (``Kernel.primitive``) that exist because of it; empty when it concerns
            the whole program.
    """

    factor: str
    options: dict[str, str]
    noises: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """A tensor observed in a build, by the ONNX name it was mapped to.

    Attributes:
        inferred: the name was not given by the engine but derived (fused node names, order);
            the auditor confirms such mappings by value and drops those that fail.
    """

    tensor: str
    fidelity: Fidelity = "output-proved"
    inferred: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor of the compiled program that is not observed, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Anything that was not audited, with the reason."""

    subject: str  # a backend id, a tensor, a segment, "stimulus" …
    stage: str
    reason: str
    remedy: str | None = None
    log: tuple[str, ...] = ()
