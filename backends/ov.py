"""OpenVINO: default properties are what people ship; probes are accepted only with proof.

Observing a tensor means compiling the model again with one more ``Result``. That is only
harmless where the engine still makes the same program, so every instrumented program is
compared with the plain one, kernel by kernel and output bit by output bit. A tensor that the
engine overwrites in place (the second operand of a fused Convolution + Add) cannot be observed
that way: the one kernel that makes it is compiled by itself, fed with the bits that the real
program fed it, and believed only if it is the same kernel and the tensor, fed to a kernel that
reads it, gives the very bits that the real program computed.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import (
    Availability,
    BuildRequest,
    Device,
    Probe,
    Provenance,
    Skipped,
    Switch,
)
from backends import _int8, _ov_int8, _ov_kept
from backends._ov_apart import Apart
from backends._ov_probes import Probing, Trial
from backends._ov_program import Executed, Program, branches, candidates_of, kernel_of
from backends._ov_read import engine, onnx_names, read, require_same, stored
from backends._ov_session import Cut, Plain, Session, reason_of
from backends._ov_source import TOKEN, Source

_DEFAULT_DEVICE = "CPU"
_CHANGED = "observing it would change the program, and its kernel could not be run apart"
_ANEW = "compiled again without a probe, the program gives other outputs: none can be proved"
_PRECISION = "INFERENCE_PRECISION_HINT"
_MODE = "EXECUTION_MODE_HINT"
_DENIED = "{} was asked for; this device computes in {} instead."
_FOREIGN = (
    "Tensors of the compiled program that the ONNX graph does not have, audited with what reads "
    "them: {}."
)
_DYNAMIC = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
_REPORTED = (_PRECISION, _MODE, "PERFORMANCE_HINT", "NUM_STREAMS")
# Properties beside the precision that change numbers: the value that turns them off, the factor,
# the causes it can bring. Sources: OpenVINO's documentation, "Precision Control", "CPU Device".
_FACTORS = {
    _DYNAMIC: (
        "0",
        "dynamic quantisation of activations",
        ("precision.int8_dynamic",),
    ),
    "CPU_DENORMALS_OPTIMIZATION": (
        "NO",
        "denormals taken as zero",
        ("implementation.denormals",),
    ),
}


# --- build and instrumentation -------------------------------------------------------------


@dataclass(slots=True)
class _Instrumented:
    """The program with probes; see ``auditor.ports.Instrumented``."""

    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    _plain: Plain
    rebuilt: bool
    _trial: Trial
    _cuts: tuple[Cut, ...]

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """Run the instrumented program, then the kernels compiled apart on what it captured.

        Raises:
            BackendError: the engine failed.
        """
        outputs, tensors = self._plain.capture(self._trial.session, self._trial.probes, feeds)
        known = {**feeds, **outputs, **tensors}
        for cut, wanted in self._cuts:
            made = cut.run(known, wanted)
            tensors |= made
            known |= made
        return Capture(outputs, {p.tensor: tensors[p.tensor] for p in self.probes})


@dataclass(slots=True)
class _Build:
    """A compiled model; see ``auditor.ports.Build``."""

    provenance: Provenance
    _plain: Plain
    _skipped: tuple[Skipped, ...]
    switches: tuple[Switch, ...]
    _quantised: _int8.Quantised | None
    _onnx: Path | None  # the model that an artefact was made of
    blocked: str | None = None
    shared_threads: bool = True  # oneTBB's

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Run the plain program.

        Raises:
            BackendError: the engine failed.
        """
        return self._plain.capture(self._plain.session, (), feeds)[0]

    def constants(self) -> Arrays:
        """The model's constants as it was read, by the names that they had in ONNX."""
        from auditor.graphs import weights

        source = self._plain.source
        named = self._quantised.weights if self._quantised else source.constants()
        return source.placed(weights.read(self._onnx).graph) | named if self._onnx else named

    def grids(self) -> Arrays:
        """What activations are rounded to, where the model was quantised, here or before."""
        return self._quantised.grids if self._quantised else {}

    def instrument(self, feeds: Mapping[str, Array]) -> _Instrumented:
        """Observe all that can be observed with proof; ``feeds`` is used for the proofs.

        Raises:
            BackendError: the engine failed.
        """
        plain = self._plain
        trial = Probing(plain, feeds).observe()
        outputs, tensors = plain.capture(trial.session, trial.probes, feeds)
        observed = [c for c in trial.probes if c not in trial.aside]
        probed = {*trial.probes, *trial.shown}
        missing = [c for c in plain.candidates if c not in probed]
        known = {**feeds, **outputs, **{c.tensor: tensors[c.tensor] for c in observed}}
        cuts, found = Apart(plain).tensors(missing, observed, known) if observed else ([], set())
        reasons = {c: "the engine would compute it for the probe alone" for c in trial.aside}
        reasons |= {c: _CHANGED if trial.repeats else _ANEW for c in missing if c not in found}
        return _Instrumented(
            probes=(
                *(Probe(c.tensor) for c in observed),
                *(Probe(c.tensor, "cone-proved") for c in missing if c in found),
            ),
            skipped=(*self._skipped, *(Skipped(c.tensor, why) for c, why in reasons.items())),
            program_unchanged=trial.proved,  # without a probe it is the plain program itself
            rebuilt=trial.session is not plain.session,
            _plain=plain,
            _trial=trial,
            _cuts=tuple(cuts),
        )


# --- the backend -----------------------------------------------------------------------------

_SCRIPT = """\
import onnx
import openvino


def run(path, feeds):
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), {device!r}, {properties!r})
    results = compiled([np.ascontiguousarray(value) for value in feeds.values()])
    names = [output.name for output in onnx.load(path).graph.output]
    return {{name: results[index] for index, name in enumerate(names)}}


def version():
    return f"OpenVINO {{openvino.__version__}}"
"""


class OpenVINO:
    """Intel's OpenVINO runtime on any device its Core lists."""

    title = "OpenVINO"
    artifacts = (".xml",)
    keeps = ".xml"

    def availability(self) -> Availability:
        """Whether the package is installed, and the devices it finds."""
        try:
            ov = engine()
            core = ov.Core()
            ids = sorted(core.available_devices, key=lambda d: d != _DEFAULT_DEVICE)
            devices = tuple(_listed(core, id) for id in ids)
        except (ImportError, OSError, RuntimeError) as error:
            return Availability(
                False,
                self.title,
                reason=f"openvino cannot be imported: {reason_of(error)}",
                remedy="Install it: pip install 'sysnoise-auditor[ov]'.",
            )
        return Availability(True, self.title, _version(ov), devices)

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """A script that compiles with the same properties on the same device."""
        _int8.refuse(options)
        properties: dict[str, Any] = {k: v for k, v in options.items() if k != _int8.OPTION}
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        source = _SCRIPT.format(device=device or _DEFAULT_DEVICE, properties=properties)
        return Script(self.title, "openvino, onnx", source)

    def build(self, request: BuildRequest) -> _Build:
        """Compile with OpenVINO's default properties and the options asked for.

        Raises:
            BackendError: an operator that OpenVINO does not have, or a model it refuses.
            UsageError: a device or property that is not there.
        """
        ov = engine()
        core = ov.Core()
        device = _device(core, request.device)
        quantise, request = _int8.asked(request)
        properties = _properties(core, device, request)
        if request.kept:
            _keep(core, request, device)
        quantised = None
        if quantise:
            path = request.workdir / "int8.xml"
            quantised = _ov_int8.write(read(core, request), request, path)
            request = replace(request, artifact=path)
        loaded = _load(core, request, device, quantised)

        def compile_model(changed: Any) -> Any:
            return core.compile_model(changed, device, properties)

        try:
            compiled = compile_model(loaded.model.clone())
        except RuntimeError as error:
            model = loaded.model.clone()
            raise _compile_error(error, request.options, core, model, device) from error
        effective = _effective(compiled)
        precision = effective.get(_PRECISION, "f32")
        source, session, program = (
            loaded.source,
            Session(compiled),
            Program(compiled, loaded.source),
        )
        if loaded.explicit is not None:
            source, program = _observed(source, program, loaded.explicit, compile_model)
        candidates, finals, skipped, foreign = candidates_of(
            source, program, loaded.outputs, reduced=precision != "f32"
        )
        notes = [*_unasked(request, precision, narrows=_narrows(core, device)), *loaded.notes]
        if foreign:
            notes.append(_FOREIGN.format(", ".join(dict.fromkeys(foreign))))
        kernels = [kernel_of(k, source, program) for k in program.kernels()]
        kernels += branches(source, compile_model, notes)
        wanted = request.options.get(_PRECISION, "undefined")
        denied = _PRECISION in effective and wanted not in (precision, "undefined")
        return _Build(
            provenance=Provenance(
                engine=self.title,
                version=_version(ov),
                device=core.get_property(device, "FULL_DEVICE_NAME"),
                options=({_int8.OPTION: "int8"} if quantised else {})
                | {k: _text(v) for k, v in properties.items()}
                | effective,
                kernels=tuple(kernels),
                notes=tuple(notes),
                denied=(_DENIED.format(wanted, precision),) if denied else (),
            ),
            _plain=Plain(
                compile=compile_model,
                source=source,
                session=session,
                program=program,
                inputs=_inputs(session.inputs, loaded.inputs),
                outputs=_outputs(loaded.model, loaded.outputs),
                candidates=tuple(candidates),
                finals=tuple(finals),
            ),
            _skipped=tuple(skipped),
            switches=(
                *((_int8.SWITCH,) if quantised else ()),
                *_switches(compiled, program, request.options),
            ),
            _quantised=loaded.quantised,
            _onnx=request.model_path if request.artifact else None,
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model as OpenVINO read it.

    Attributes:
        model: the ``openvino.Model``, and ``source`` its operations by their ONNX names.
        explicit: the same with its quantisation written out, where it is quantised.
        inputs, outputs: names of the ONNX model's.
        quantised: what its quantiser chose, here or before; None where that is not known.
        notes: sentences for the reader.
    """

    model: Any
    source: Source
    explicit: Source | None
    inputs: Sequence[str]
    outputs: Sequence[str]
    quantised: _int8.Quantised | None
    notes: Sequence[str]


def _load(
    core: Any, request: BuildRequest, device: str, quantised: _int8.Quantised | None
) -> _Loaded:
    """Read the ONNX model, or the artefact that was made of it.

    Args:
        core: the ``openvino.Core``.
        request: what to read.
        device: what it will be compiled for.
        quantised: what was chosen, where the artefact was quantised for this build.

    Raises:
        BackendError: a model that OpenVINO refuses, or an artefact of another model.
    """
    notes = [quantised.note] if quantised else []
    with ThreadPoolExecutor(1) as pool:
        # Reading the names overlaps with OpenVINO's own work.
        reading = pool.submit(onnx_names, request.model_path)
        model = read(core, request, notes)
        inputs, outputs, nodes, inner = reading.result()
    if request.artifact is not None:
        require_same(model, inputs, outputs, request.artifact)
    explicit = _ov_int8.explicit(model)  # before ``Source`` renames the operations
    if explicit is not None and quantised is None and request.artifact is not None:
        quantised = _choices(core, model, request, notes)
    source = Source(model, nodes, inner)
    if device == _DEFAULT_DEVICE:
        notes += _narrowed(source)
    if request.artifact is not None:
        notes.append(stored(model, request.artifact))
    shown = Source(explicit, nodes, inner) if explicit is not None else None
    return _Loaded(model, source, shown, inputs, outputs, quantised, notes)


def _effective(compiled: Any) -> dict[str, str]:
    """The properties that a program was compiled with, of those that are reported."""
    supported = compiled.get_property("SUPPORTED_PROPERTIES")
    return {name: _text(compiled.get_property(name)) for name in _REPORTED if name in supported}


def _observed(
    source: Source, program: Program, shown: Source, compile_model: Callable[[Any], Any]
) -> tuple[Source, Program]:
    """What is observed while ``program`` runs: ``shown``, where that is the same program."""
    with contextlib.suppress(RuntimeError):  # which the engine need not compile
        other = Program(compile_model(shown.model.clone()), shown)
        if program.alike(other):
            return shown, other
    return source, program


def _listed(core: Any, id: str) -> Device:
    """A device as ``audit backends`` lists it."""
    name = core.get_property(id, "FULL_DEVICE_NAME")
    return Device("" if id == _DEFAULT_DEVICE else id, name, _precisions(core, id))


def _precisions(core: Any, device: str) -> tuple[str, ...]:
    """The precisions that a device computes in, as its options name them."""
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    numeric = (c.lower() for c in capabilities if c.startswith(("FP", "BF", "INT")))
    return tuple(precision.replace("fp", "f") for precision in numeric)


def _narrows(core: Any, device: str) -> bool:
    """Whether a device computes in bf16 or f16, if it is let."""
    return not {"bf16", "f16"}.isdisjoint(_precisions(core, device))


def _unasked(request: BuildRequest, precision: str, *, narrows: bool) -> Iterator[str]:
    """Sentences on what was compiled otherwise than the model says.

    Args:
        request: what was asked for.
        precision: that the program computes in.
        narrows: whether the device computes in bf16 or f16, if it is let.
    """
    if precision != "f32" and _PRECISION not in request.options:
        yield (
            f"OpenVINO computes in {precision} by default on this device although the model "
            f"is f32; --option ov.{_PRECISION}=f32 keeps f32."
        )
    elif _PRECISION not in request.options and not narrows:
        yield (
            "This device has neither bf16 nor f16. One that has computes in it by default, which "
            "this audit does not show: `audit sensitivity` tells how far that would move the "
            f"outputs, and {_PRECISION}=f32 keeps f32 there."
        )
    if request.dynamic and not request.open:
        shapes = ", ".join(f"{n}: {'x'.join(map(str, s))}" for n, s in request.shapes.items())
        yield f"The model was compiled at these static shapes: {shapes}."


def _choices(
    core: Any, model: Any, request: BuildRequest, notes: list[str]
) -> _int8.Quantised | None:
    """What was chosen for a file that was quantised before; None, and a note, where not known."""
    try:
        plain = read(core, replace(request, artifact=None))
    except BackendError as error:
        notes.append(
            f"The file is quantised, and the ONNX model that its weights and grids are told by "
            f"cannot be read: {error.message}"
        )
        return None
    return _ov_int8.choices(model, plain)


def _switches(compiled: Any, program: Program, asked: Mapping[str, str]) -> Iterator[Switch]:
    """The factors that are on in a compiled model and change its numbers."""
    known = compiled.get_property("SUPPORTED_PROPERTIES")

    def value(name: str) -> str:
        return _text(compiled.get_property(name)) if name in known else ""

    if (precision := value(_PRECISION)) not in ("", "f32"):
        narrow = ("precision.bf16", "precision.fp16")
        without = {_PRECISION: "f32"}
        if value(_DYNAMIC) not in ("", "0") and any(map(_is_compressed, program.kernels())):
            without[_DYNAMIC] = "0"  # in f32 it would quantise what it leaves alone in bf16
        yield Switch(f"inference in {precision}", without, narrow)
    for name, (off, factor, noises) in _FACTORS.items():
        if value(name).upper() not in ("", off, "0", "NO", "FALSE"):
            yield Switch(factor, {name: off}, noises)
    if value(_MODE) == "PERFORMANCE" and _PRECISION not in asked:  # which would come before it
        yield Switch("execution mode PERFORMANCE", {_MODE: "ACCURACY"})


def _is_compressed(kernel: Executed) -> bool:
    """Whether a product reads weights of few bits."""
    return kernel.type == "FullyConnected" and kernel.precision in ("i4", "u4", "i8", "u8")


def _version(ov: Any) -> str:
    version: str = ov.get_version().split("-")[0]
    return version


def _device(core: Any, asked: str | None) -> str:
    devices = list(core.available_devices)
    device = asked or _DEFAULT_DEVICE
    if device not in devices:
        raise UsageError(
            f"OpenVINO has no device {device!r} here", f"Devices here: {', '.join(devices)}."
        )
    return device


def _properties(core: Any, device: str, request: BuildRequest) -> dict[str, Any]:
    """The properties to compile with, by name.

    Raises:
        UsageError: an option that the device does not have.
    """
    access = core.get_property(device, "SUPPORTED_PROPERTIES")
    known = sorted(name for name, mode in access.items() if mode == "RW")
    for name in request.options:
        if name not in known:
            close = difflib.get_close_matches(name.upper(), known, 3, 0.4) or known
            raise UsageError(
                f"OpenVINO's {device} device has no property {name!r} that can be set",
                f"Closest: {', '.join(close)}.",
            )
    threads = {} if request.threads is None else {"INFERENCE_NUM_THREADS": request.threads}
    return {**request.options, **threads}


def _keep(core: Any, request: BuildRequest, device: str) -> None:
    """Write the model with these nodes in float32 to ``request.artifact``."""
    assert request.artifact is not None
    model = read(core, replace(request, artifact=None, dynamic=False))
    source = Source(model, *onnx_names(request.model_path)[2:])
    wanted = set(request.kept)

    def kept(name: str) -> bool | None:
        numbers = [int(number) for number in TOKEN.findall(name)]
        return any(wanted.intersection(source.keys[n]) for n in numbers) if numbers else None

    try:
        own = device == _DEFAULT_DEVICE
        _ov_kept.write(model, request.artifact, kept, source.display, products=own)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO cannot write the model: {reason_of(error)}") from error


def _compile_error(
    error: RuntimeError, options: Mapping[str, str], core: Any, model: Any, device: str
) -> Exception:
    """What a failed compilation means: an option is to blame if the model compiles without any."""
    reason = reason_of(error)
    if wrong := [n for n, v in options.items() if n in reason or f" {v}" in reason]:
        try:
            core.compile_model(model, device)
        except RuntimeError:
            pass
        else:
            return UsageError(f"OpenVINO refused the value of {wrong[0]}: {reason}")
    offered = _PRECISION not in options and _narrows(core, device)
    wide = f"`--option ov.{_PRECISION}=f32`, " if offered else ""
    return BackendError(
        f"OpenVINO cannot compile the model: {reason}",
        f"Try {wide}another opset version, or the operator it names, if any, exported differently.",
    )


def _inputs(ports: Sequence[Any], names: Sequence[str]) -> tuple[str, ...]:
    """The ONNX names of the engine's inputs.

    An operator that OpenVINO drops leaves its output's name to its input, whose own name then is
    only the node's, or nowhere any more: what is left over keeps its order.
    """
    known = [port.get_names() | {port.get_node().get_friendly_name()} for port in ports]
    found = [next((n for n in names if n in k), None) for k in known]
    others = iter([n for n in names if n not in found])
    return tuple(n or next(others, p.get_any_name()) for n, p in zip(found, ports, strict=True))


def _outputs(model: Any, names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Which of the engine's results each ONNX output is, by name and else by position.

    Texts, which are not compared, are left out.
    """
    ports = [port.get_names() for port in model.outputs]
    found = (
        (name, next((i for i, known in enumerate(ports) if name in known), position))
        for position, name in enumerate(names)
    )
    kinds = [port.get_element_type().get_type_name() for port in model.outputs]
    return tuple((name, index) for name, index in found if kinds[index] != "string")


def _narrowed(source: Source) -> Iterator[str]:
    """What OpenVINO's CPU device computes in fewer bits than the model says."""
    types = source.types()
    if types & {"i64", "u64"}:
        yield (
            "64-bit integers are computed in 32 bits by OpenVINO's CPU device; values beyond "
            "2^31 do not survive."
        )
    if "f64" in types:
        yield "Double-precision tensors are computed in f32 by OpenVINO's CPU device."


def _text(value: Any) -> str:
    """A property's value as it would be given on the command line."""
    if hasattr(value, "get_type_name"):
        return str(value.get_type_name())
    return str(getattr(value, "name", value))


BACKEND = OpenVINO()
