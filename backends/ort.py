"""ONNX Runtime on the CPU, at the optimisation level users deploy.

How it observes without changing the program: the session that runs plainly also writes its
optimised graph (``SessionOptions.optimized_model_filepath``). That graph is loaded again with
the optimiser off and every surviving tensor as an extra output. The loaded session writes its
own graph too, and the two must be equal node by node. Marking the outputs in the user's file
instead, as other tools do, stops the fusions and measures another program.

The layout optimiser of ``ORT_ENABLE_ALL`` renames tensors and stores them blocked (NCHWc) or
channels-last; ``_ort_names`` derives their ONNX names from the two graphs, and how to bring a
value back to its ONNX layout.

Sources: https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html and
``onnxruntime_session_options_config_keys.h``, ``nchwc_transformer.cc`` of microsoft/onnxruntime.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from auditor.errors import BackendError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import Availability, Device, Probe, Provenance, Skipped
from backends import _int8, _ort_int8, _ort_providers
from backends._ort_graph import (
    Graph,
    attribute_of,
    drop_folded_inputs,
    fingerprint,
    stay_outside,
    unique_local_names,
)
from backends._ort_names import Layout, Names, block_size, channels_of, unblock
from backends._ort_provenance import kernels, notes, primitive, stored, switches
from backends._ort_session import (
    COMPARABLE,
    ENGINE,
    FOLDER,
    LEVELS,
    MAPS,
    OWN_KEYS,
    Options,
    outputs_of,
    run,
)
from backends._shared import cpu_name, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx

    from auditor.records.backend import BuildRequest

_REMEDY: Final = "pip install onnxruntime"


class OrtBackend:
    """ONNX Runtime's CPU execution provider."""

    title = ENGINE
    artifacts = (".onnx", ".ort")

    def availability(self) -> Availability:
        """Whether onnxruntime imports here, its version and the CPU's name; never raises."""
        try:
            import onnxruntime as ort

            version = str(ort.__version__)
        except Exception as error:  # a broken wheel raises more than ImportError
            return Availability(False, ENGINE, reason=first_line(error), remedy=_REMEDY)
        others = _ort_providers.devices(ort.get_available_providers())
        return Availability(True, ENGINE, version, (Device("", cpu_name()), *others))

    def build(self, request: BuildRequest) -> OrtBuild | OpaqueBuild:
        """Compile the user's file as it stands, at the level users deploy.

        A file that ONNX Runtime optimised before (``request.artifact``) is loaded with the
        optimiser off, as its documentation asks for, unless a level is given.

        Options: ``quantize=int8`` (after training, see ``_ort_int8``), ``level`` (all, extended,
        basic, disable; default all) and raw session configuration entries such as
        ``session.disable_prepacking``; ``provider.KEY`` is an option of the execution provider that
        the device names.

        Raises:
            UsageError: an unknown option, level or device.
            BackendError: ONNX Runtime refused the model, or it or the provider is not installed.
        """
        usual = "all" if request.artifact is None else "disable"
        quantise, request = _int8.asked(request)
        quantised = None
        if quantise:
            path = Path(tempfile.mkdtemp(prefix="int8-", dir=request.workdir)) / "int8.onnx"
            quantised = _ort_int8.write(request, path)
            request = replace(request, artifact=path)
        options = Options.parse(request.options, request.threads, usual, request.device)
        options = replace(options, custom_ops=request.custom_ops)
        try:
            return OrtBuild(request, options, quantised)
        except BackendError as error:
            if not _ort_providers.compiles(error):
                raise
            return OpaqueBuild(request, options)

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """A session with the same level and configuration."""
        _int8.refuse(options)
        made = Options.parse(options, threads, device=device)
        lines = [f"options.intra_op_num_threads = {made.threads}"] if made.threads else []
        lines += [f"options.add_session_config_entry({k!r}, {v!r})" for k, v in made.config.items()]
        source = _SCRIPT.format(
            level=LEVELS[made.level],
            more="".join(f"    {line}\n" for line in lines),
            providers=_ort_providers.listed(made.provider, made.provider_options),
        )
        return Script("ONNX Runtime", "onnxruntime", source)


_SCRIPT = """\
import onnxruntime


def run(path, feeds):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.{level}
{more}    session = onnxruntime.InferenceSession(path, options, providers={providers})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds)))


def version():
    return f"ONNX Runtime {{onnxruntime.__version__}}"
"""

BACKEND = OrtBackend()

# ONNX Runtime writes weights of more bytes than that to this file, beside the optimised graph.
_BESIDE = {f"{OWN_KEYS}_file_name": "weights.bin", f"{OWN_KEYS}_min_size_in_bytes": "1024"}


class OrtBuild:
    """One compiled model, the graph it executes and what its tensors are called in ONNX."""

    blocked: str | None = None

    def __init__(
        self, request: BuildRequest, options: Options, quantised: _int8.Quantised | None = None
    ) -> None:
        """Compile ``request.model_path``, or load ``request.artifact``; raises ``BackendError``.

        ``quantised``: what was chosen for it, where the artifact was quantised here.
        """
        try:
            import onnx
            import onnxruntime as ort

            from auditor.graphs import weights
        except ImportError as error:
            raise BackendError(first_line(error), _REMEDY, stage="start") from error
        ort.set_default_logger_severity(3)  # else importing a model prints warnings
        _ort_providers.check(options.provider, ort.get_available_providers())

        self._options = options
        self._quantised = quantised
        self._folder = Path(tempfile.mkdtemp(prefix="ort-", dir=request.workdir)).resolve()
        dump = self._folder / "optimised.onnx"
        original = weights.read(request.model_path)
        # Weights beside the graph: the graph stays a few kB to parse and to load again, and
        # models over protobuf's 2 GB work. Those in other files can stay there.
        outside = request.artifact is None and stay_outside(original.graph, request.model_path)
        self._weights = request.model_path.parent if outside else self._folder
        weights_apart = {} if outside else _BESIDE
        file = self._file = request.artifact or request.model_path
        try:
            self._session = options.session(file, dump, options.level, weights_apart, stage="build")
        except BackendError as error:
            raise options.blamed(error, file) from error
        # Not with the dump: the instrumented program has those weights mapped.
        self._compile = functools.partial(
            options.session, file, None, options.level, {}, stage="run"
        )
        self._outputs = outputs_of(self._session)
        self._compiled = onnx.load(dump, load_external_data=False)
        drop_folded_inputs(self._compiled.graph, {i.name for i in self._session.get_inputs()})
        unique_local_names(self._compiled.graph)
        compiled = Graph(self._compiled.graph)
        if request.artifact is not None:
            _require_same(self._session, original.graph, request.artifact)
        names = Names(Graph(original.graph), compiled)
        self._readings = tuple(_readings(names, original))
        self._skipped = tuple(names.skipped())

        self.provenance = Provenance(
            engine=ENGINE,
            version=str(ort.__version__),
            device=cpu_name(),
            options=options.listed() | ({_int8.OPTION: "int8"} if quantised else {}),
            kernels=tuple(kernels(self._compiled, compiled, names)),
            notes=tuple(self._notes(request.artifact)),
        )
        own = {primitive(node) for node in original.graph.node}
        run = {k.primitive for k in self.provenance.kernels}
        self.switches = tuple(switches(options, run, Graph(original.graph), own))
        if quantised:
            self.switches = (_int8.SWITCH, *self.switches)

    def _notes(self, artifact: Path | None) -> Iterator[str]:
        """Sentences on the build for the reader; ``artifact``: the engine's file, where loaded."""
        if self._quantised:
            yield self._quantised.note
        if artifact:
            yield from stored(self._compiled.graph, artifact)
        yield from notes(self._compiled.graph, self._session)
        yield from _ort_providers.notes(self._session, self._options.provider)

    def grids(self) -> Arrays:
        """What activations are rounded to, where the model was quantised here."""
        return self._quantised.grids if self._quantised else {}

    def constants(self) -> Arrays:
        """The loaded file's constants, dequantised and widened ones under their result's name."""
        import onnx

        if self._quantised:
            return self._quantised.weights

        model = onnx.load(self._folder / "optimised.onnx")
        found = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        for node in model.graph.node:
            value = attribute_of(node, "value") if node.op_type == "Constant" else None
            if value is not None:
                found[node.output[0]] = onnx.numpy_helper.to_array(value.t)
            elif node.input and all(name in found for name in node.input):
                made = _reconstructed(node, [found[name] for name in node.input])
                if made is not None:
                    found[node.output[0]] = made
        return found

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Every graph output that is a tensor, by name; raises ``BackendError``."""
        self._session = self._session or self._compile()
        try:
            return run(self._session, self._outputs, feeds)
        except BackendError as error:
            raise self._options.blamed(error, self._file, feeds) from error

    def release(self) -> None:
        """Free the session; the next run makes another."""
        self._session = None

    def instrument(self, feeds: Mapping[str, Array]) -> OrtInstrumented:
        """The compiled program with its surviving tensors as extra outputs.

        Args:
            feeds: not needed: the proof is the equality of the two executed graphs.

        Raises:
            BackendError: ONNX Runtime refused the graph that it had written itself.
        """
        import onnx

        from auditor.graphs import weights

        requested = onnx.ModelProto()
        requested.CopyFrom(self._compiled)
        declared = {o.name for o in requested.graph.output}
        requested.graph.output.extend(
            onnx.ValueInfoProto(name=r.engine_name)
            for r in self._readings
            if r.engine_name not in declared
        )
        dump = self._folder / "executed.onnx"
        # Loading a QDQ graph splits each DequantizeLinear whose value leaves it, even with the
        # optimiser off, unless QDQ handling is off too. The fusions themselves are in the graph.
        session = self._options.session(
            requested.SerializeToString(),
            dump,
            "disable",
            {"session.disable_quant_qdq": "1", FOLDER: str(self._weights)},
            stage="instrument",
        )
        executed = weights.read(dump)
        dump.unlink()  # as large as the model
        unchanged = fingerprint(executed.graph) == fingerprint(requested.graph)

        types = {o.name: o.type for o in session.get_outputs()}
        readings, skipped = [], list(self._skipped)
        for reading in self._readings:
            kind = types[reading.engine_name]
            if MAPS.fullmatch(kind):
                continue  # an output, which is compared whatever else is
            if not COMPARABLE.fullmatch(kind):
                skipped.append(Skipped(reading.tensor, f"a {kind} cannot be read as an array"))
            elif reading.layout.stored == "blocked" and not reading.channels:
                skipped.append(
                    Skipped(reading.tensor, "stored blocked, and its channels are unknown")
                )
            else:
                readings.append(reading)
        return OrtInstrumented(session, self._outputs, readings, tuple(skipped), unchanged)


def _require_same(session: Any, graph: onnx.GraphProto, artifact: Path) -> None:
    """Refuse a file that was not made of the ONNX model.

    Raises:
        BackendError: it has other inputs, or lacks an output.
    """
    constants = {i.name for i in graph.initializer}
    for what, ports, names in (
        ("input", session.get_inputs(), [i.name for i in graph.input if i.name not in constants]),
        ("output", session.get_outputs(), [o.name for o in graph.output]),
    ):
        has = [port.name for port in ports]
        missing = next((name for name in names if name not in has), None)
        added = next((name for name in has if name not in names), None)
        if missing is not None or (what == "input" and added is not None):
            says = f"no {what} `{missing}`" if missing is not None else f"one more input, `{added}`"
            raise BackendError(
                f"{artifact.name} has {says}; its {what}s: {', '.join(has)}",
                "Make the file anew from this ONNX model.",
            )


def _reconstructed(node: onnx.NodeProto, given: list[Array]) -> Array | None:
    """What a Cast or DequantizeLinear makes of constants; None for other operators."""
    if node.op_type == "Cast" and (to := attribute_of(node, "to")) is not None and to.i == 1:
        return given[0].astype(np.float32)
    if node.op_type != "DequantizeLinear" or len(given) < 2 or attribute_of(node, "block_size"):
        return None
    integers, scale = given[0], given[1]
    axis = attribute_of(node, "axis")
    across = [1] * integers.ndim
    if scale.size > 1:
        across[1 if axis is None else axis.i] = -1
    zero = given[2].astype(np.int32).reshape(across) if len(given) > 2 else 0
    result: Array = (integers.astype(np.int32) - zero) * scale.reshape(across)
    return result


@dataclass(frozen=True, slots=True)
class _Reading:
    """How to read one ONNX tensor out of the instrumented session.

    Attributes:
        channels: true number of channels of a blocked tensor; 0 where it is not known.
        int8: it is signed in ONNX, whereas the engine may have made it unsigned by adding 128.
    """

    tensor: str
    engine_name: str
    layout: Layout
    channels: int
    int8: bool

    def decode(self, value: Array) -> Array:
        """The ONNX tensor: NCHW, true channels, own type.

        A permutation that ends at an operator which takes axes away is left off: such a name is
        derived, and believed only when the values agree.
        """
        if self.layout.stored == "blocked":
            value = unblock(value, self.channels, block_size())
        if self.layout.order is not None and len(self.layout.order) == value.ndim:
            value = np.transpose(value, np.argsort(self.layout.order))
        if self.int8 and value.dtype == np.uint8:
            value = (value ^ np.uint8(0x80)).view(np.int8)
        return np.require(value, requirements="C")  # unlike ascontiguousarray it keeps 0-d


def _readings(names: Names, original: onnx.ModelProto) -> Iterator[_Reading]:
    """One reading for every ONNX tensor that survives in the compiled graph."""
    observed = {
        tensor: (name, names.seats[name].layout) for tensor, name in names.observed().items()
    }
    blocked = {
        tensor: layout.order[1] if layout.order else 1
        for tensor, (_, layout) in observed.items()
        if layout.stored == "blocked"
    }
    channels = channels_of(original, blocked)
    for tensor, (name, layout) in observed.items():
        yield _Reading(tensor, name, layout, channels.get(tensor, 0), tensor in names.int8)


class OrtInstrumented:
    """The compiled program with extra outputs."""

    rebuilt = False

    def __init__(
        self,
        session: Any,
        outputs: list[str],
        readings: list[_Reading],
        skipped: tuple[Skipped, ...],
        unchanged: bool,
    ) -> None:
        """Hold the session and how to read each probe out of it."""
        self._session = session
        self._outputs = outputs
        self._readings = readings
        self.skipped = skipped
        self.program_unchanged = unchanged
        self.probes = tuple(
            Probe(r.tensor, inferred=r.tensor != r.engine_name or r.layout.order is not None)
            for r in readings
        )

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """One run: the outputs and every probe in ONNX's layout; raises ``BackendError``."""
        names = dict.fromkeys([*self._outputs, *(r.engine_name for r in self._readings)])
        values = run(self._session, list(names), feeds)
        return Capture(
            outputs={name: values[name] for name in self._outputs},
            tensors={r.tensor: r.decode(values[r.engine_name]) for r in self._readings},
        )


class OpaqueBuild:
    """A session in which a provider compiled parts of the model: only its outputs can be seen."""

    blocked: str | None = None

    def __init__(self, request: BuildRequest, options: Options) -> None:
        """Compile; raises ``BackendError``."""
        import onnxruntime as ort

        from auditor.graphs import weights

        file = request.artifact or request.model_path
        self._session = options.session(file, None, options.level, {}, stage="build")
        self._outputs = outputs_of(self._session)
        graph = weights.read(request.model_path).graph
        finals = {o.name for o in graph.output}
        why = f"{options.provider} compiles parts of the model, and shows nothing inside them"
        self.skipped = tuple(
            Skipped(name, why)
            for node in graph.node
            if node.op_type != "Constant"
            for name in node.output
            if name and name not in finals
        )
        self.provenance = Provenance(
            engine=ENGINE,
            version=str(ort.__version__),
            device=options.provider,
            options=options.listed(),
            notes=tuple(_ort_providers.notes(self._session, options.provider)),
        )

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Every graph output that is a tensor, by name; raises ``BackendError``."""
        return run(self._session, self._outputs, feeds)

    def instrument(self, feeds: Mapping[str, Array]) -> _Seen:
        """Give the same session back: nothing can be added to it."""
        return _Seen(self)


class _Seen:
    """A session as it is, as an instrumented one."""

    probes: tuple[Probe, ...] = ()
    program_unchanged = True
    rebuilt = False

    def __init__(self, build: OpaqueBuild) -> None:
        self._build = build
        self.skipped = build.skipped

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """One run; raises ``BackendError``."""
        outputs = self._build.run(feeds)
        return Capture(outputs, dict(outputs))
