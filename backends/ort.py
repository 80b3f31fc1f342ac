"""ONNX Runtime on the CPU, at the optimisation level users deploy.

How it observes without changing the program: the session that runs plainly also writes its
optimised graph (``SessionOptions.optimized_model_filepath``). That graph is loaded again with
the optimiser off and every surviving tensor as an extra output. The loaded session writes its
own graph too, and the two must be equal node by node. Marking the outputs in the user's file
instead, as other tools do, stops the fusions and measures another program.

The layout optimiser of ``ORT_ENABLE_ALL`` renames tensors and stores them blocked (NCHWc) or
channels-last; ``_Names`` derives their ONNX names from the two graphs, and ``_Seat`` says how to
bring a value back to its ONNX layout.

Sources: https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html and
``onnxruntime_session_options_config_keys.h``, ``nchwc_transformer.cc`` of microsoft/onnxruntime.
"""

from __future__ import annotations

import functools
import itertools
import platform
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import Availability, Device, Kernel, Probe, Provenance, Skipped, Switch
from backends import _int8, _ort_int8, _ort_providers
from backends._ort_graph import (
    Graph,
    attribute_of,
    drop_folded_inputs,
    fingerprint,
    node_key,
    unique_local_names,
)
from backends._ort_names import NCHWC, TOKEN, Layout, Names, block_size, channels_of, unblock

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    import onnx

    from auditor.records.backend import BuildRequest


_ENGINE: Final = "ONNX Runtime"
_REMEDY: Final = "pip install onnxruntime"

_LEVELS: Final = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disable": "ORT_DISABLE_ALL",
}
# Prefixes of the keys in onnxruntime_session_options_config_keys.h. ONNX Runtime accepts any key
# in silence, so a mistyped one must be caught here.
_CONFIG_PREFIXES: Final = ("session.", "optimization.", "mlas.", "memory.", "ep.")
_OWN_KEYS: Final = "session.optimized_model_external_initializers"

_DISABLED: Final = "optimization.disable_specified_optimizers"  # names, by semicolons
_SATURATING: Final = "session.x64quantprecision"
_KEEP_PAIRS: Final = "session.disable_double_qdq_remover"
# What MatMulNBits reads where the optimiser makes it: 4, the default, allows 8 bits, 1 does not.
_ACCURACY: Final = "session.qdq_matmulnbits_accuracy_level"
_FEW_BITS: Final = "com.microsoft.MatMulNBits"
_SATURATES: Final = "precision.int8_saturation"
_QUANTISED: Final = re.compile(r"(.*\.)?(QLinear\w+|QGemm|MatMulIntegerToFloat)")
_GELU: Final = ("implementation.approximation",)
_NORMALISATION: Final = ("implementation.normalisation",)
# Kernels that an optimiser makes: what it does, its names, the causes that it can bring.
# Source: the names under which onnxruntime/core/optimizer registers its optimisers.
_FUSIONS: Final[dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
    "com.microsoft.Gelu": ("fusion of Gelu", ("GeluFusionL1", "GeluFusionL2"), _GELU),
    "com.microsoft.BiasGelu": ("fusion of bias and Gelu", ("BiasGeluFusion",), _GELU),
    "com.microsoft.FastGelu": ("fusion of fast Gelu", ("FastGeluFusion",), _GELU),
    "com.microsoft.QuickGelu": ("fusion of quick Gelu", ("QuickGeluFusion",), _GELU),
    "LayerNormalization": (
        "fusion of layer normalisation",
        ("LayerNormFusionL1", "LayerNormFusionL2"),
        _NORMALISATION,
    ),
    "SimplifiedLayerNormalization": (
        "fusion of RMS normalisation",
        ("SimplifiedLayerNormFusion",),
        _NORMALISATION,
    ),
    "com.microsoft.SkipLayerNormalization": (
        "fusion of addition and layer normalisation",
        ("SkipLayerNormFusion",),
        _NORMALISATION,
    ),
    "com.microsoft.FusedMatMul": (
        "fusion of scale or transposition into MatMul",
        ("MatMulScaleFusion", "MatmulTransposeFusion"),
        (),
    ),
    "com.microsoft.FusedGemm": ("fusion of Gemm and activation", ("GemmActivationFusion",), ()),
    "com.microsoft.FusedConv": (
        "fusion of Conv and activation",
        ("ConvActivationFusion", "ConvAddActivationFusion"),
        (),
    ),
    "com.microsoft.nchwc.Conv": ("blocked layout (NCHWc)", ("NchwcTransformer",), ()),
}
# Session entries that change numbers where the user turned them on. Not
# ``session.set_denormal_as_zero``: the first session of a process decides it for all on its thread.
_ENTRIES: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("optimization.enable_gelu_approximation", "approximation of Gelu by tanh", _GELU),
    (
        "mlas.enable_gemm_fastmath_arm64_bfloat16",
        "bfloat16 matrix products (MLAS)",
        ("precision.bf16",),
    ),
)
# Other types (sequences, strings, bfloat16, 4 bits) do not come out of its Python API as arrays.
_COMPARABLE: Final = re.compile(r"tensor\((float|double|float16|bool|u?int(8|16|32|64))\)")

_PRECISIONS: Final = {
    1: "f32",
    2: "i8",
    3: "i8",
    6: "i32",
    7: "i64",
    9: "bool",
    10: "f16",
    11: "f64",
    16: "bf16",
}  # onnx.TensorProto.DataType
_FLOATS: Final = frozenset({"f32", "f16", "bf16", "f64"})


# --- the backend ---------------------------------------------------------------------------------


class OrtBackend:
    """ONNX Runtime's CPU execution provider."""

    title = _ENGINE
    artifacts = (".onnx", ".ort")

    def availability(self) -> Availability:
        """Whether onnxruntime imports here, its version and the CPU's name; never raises."""
        try:
            import onnxruntime as ort

            version = str(ort.__version__)
        except Exception as error:  # a broken wheel raises more than ImportError
            return Availability(False, _ENGINE, reason=_first_line(error), remedy=_REMEDY)
        others = _ort_providers.devices(ort.get_available_providers())
        return Availability(True, _ENGINE, version, (Device("", _cpu_name()), *others))

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
        options = _Options.parse(request.options, request.threads, usual, request.device)
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
        made = _Options.parse(options, threads, device=device)
        lines = [f"options.intra_op_num_threads = {made.threads}"] if made.threads else []
        lines += [f"options.add_session_config_entry({k!r}, {v!r})" for k, v in made.config.items()]
        source = _SCRIPT.format(
            level=_LEVELS[made.level],
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


@dataclass(frozen=True, slots=True)
class _Options:
    """What the user chose about a session."""

    level: str
    config: dict[str, str]
    threads: int | None
    provider: str = _ort_providers.CPU
    provider_options: dict[str, str] = field(default_factory=dict)
    custom_ops: tuple[Path, ...] = ()

    @classmethod
    def parse(
        cls,
        given: Mapping[str, str],
        threads: int | None,
        level: str = "all",
        device: str | None = None,
    ) -> _Options:
        """Read the user's options; ``level`` is the one where none is given."""
        config, special = {}, {}
        provider = _ort_providers.named(device)
        for key, value in given.items():
            if key.lower() == "level":
                level = value.lower()
            elif key.startswith(_ort_providers.OPTION) and provider != _ort_providers.CPU:
                special[key.removeprefix(_ort_providers.OPTION)] = value
            elif key.startswith(_CONFIG_PREFIXES) and not key.startswith(_OWN_KEYS):
                config[key] = value
            else:
                raise UsageError(
                    f"The ort backend has no option {key!r}.",
                    "Use level=all|extended|basic|disable, or an ONNX Runtime session "
                    "configuration entry such as session.disable_prepacking=1.",
                )
        if level not in _LEVELS:
            raise UsageError(
                f"The ort backend has no level {level!r}.", f"Use one of {', '.join(_LEVELS)}."
            )
        return cls(level, config, threads, provider, special)

    def session(
        self, model: Path, dump: Path | None, level: str, extra: Mapping[str, str], *, stage: str
    ) -> Any:
        """A session on ``model`` at ``level`` that writes the graph it executes to ``dump``."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
        if dump is not None:
            options.optimized_model_filepath = str(dump)
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            for library in self.custom_ops:
                options.register_custom_ops_library(str(library))
            for key, value in {**self.config, **extra}.items():
                options.add_session_config_entry(key, value)
            if self.provider != _ort_providers.CPU:
                options.add_session_config_entry(_ort_providers.RECORD, "1")
            providers = _ort_providers.listed(self.provider, self.provider_options)
            session = ort.InferenceSession(str(model), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise _refusal(error, stage) from error
        _ort_providers.require(session, self.provider)
        return session

    def listed(self) -> dict[str, str]:
        """The options as a report shows them."""
        threads = {} if self.threads is None else {"intra_op_num_threads": str(self.threads)}
        special = {f"{_ort_providers.OPTION}{k}": v for k, v in self.provider_options.items()}
        libraries = {"custom_ops": " ".join(map(str, self.custom_ops))} if self.custom_ops else {}
        return {"level": self.level, **threads, **self.config, **special, **libraries}


class OrtBuild:
    """One compiled model, the graph it executes and what its tensors are called in ONNX."""

    blocked: str | None = None

    def __init__(
        self, request: BuildRequest, options: _Options, quantised: _int8.Quantised | None = None
    ) -> None:
        """Compile ``request.model_path``, or load ``request.artifact``; raises ``BackendError``.

        ``quantised``: what was chosen for it, where the artifact was quantised here.
        """
        try:
            import onnx
            import onnxruntime as ort

            from auditor import weights
        except ImportError as error:
            raise BackendError(_first_line(error), _REMEDY, stage="start") from error
        ort.set_default_logger_severity(3)  # else importing a model prints warnings
        _ort_providers.check(options.provider, ort.get_available_providers())

        self._options = options
        self._quantised = quantised
        self._folder = Path(tempfile.mkdtemp(prefix="ort-", dir=request.workdir)).resolve()
        dump = self._folder / "optimised.onnx"
        # Weights beside the graph: the graph stays a few kB to parse and to load again, and
        # models over protobuf's 2 GB work.
        weights_apart = {f"{_OWN_KEYS}_file_name": "weights.bin"}
        weights_apart[f"{_OWN_KEYS}_min_size_in_bytes"] = "1024"
        file = request.artifact or request.model_path
        self._session = options.session(file, dump, options.level, weights_apart, stage="build")
        # Not with the dump: the instrumented program has those weights mapped.
        self._compile = functools.partial(
            options.session, file, None, options.level, {}, stage="run"
        )
        self._outputs = [
            o.name for o in self._session.get_outputs() if _COMPARABLE.fullmatch(o.type)
        ]
        self._compiled = onnx.load(dump, load_external_data=False)
        drop_folded_inputs(self._compiled.graph, {i.name for i in self._session.get_inputs()})
        unique_local_names(self._compiled.graph)
        compiled = Graph(self._compiled.graph)
        original = weights.read(request.model_path)
        if request.artifact is not None:
            _require_same(self._session, original.graph, request.artifact)
        names = Names(Graph(original.graph), compiled)
        self._readings = tuple(_readings(names, original))
        self._skipped = tuple(names.skipped())

        self.provenance = Provenance(
            engine=_ENGINE,
            version=str(ort.__version__),
            device=_cpu_name(),
            options=options.listed() | ({_int8.OPTION: "int8"} if quantised else {}),
            kernels=tuple(_kernels(self._compiled, compiled, names)),
            notes=(
                *((quantised.note,) if quantised else ()),
                *(_stored(self._compiled.graph, request.artifact) if request.artifact else ()),
                *_notes(self._compiled.graph, self._session),
                *_ort_providers.notes(self._session, options.provider),
            ),
        )
        own = {_primitive(node) for node in original.graph.node}
        made = {k.primitive for k in self.provenance.kernels} - own
        self.switches = tuple(_switches(options, made, Graph(original.graph)))
        if quantised:
            self.switches = (_int8.SWITCH, *self.switches)

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
        return _run(self._session, self._outputs, feeds)

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

        from auditor import weights

        requested = onnx.ModelProto()
        requested.CopyFrom(self._compiled)
        declared = {o.name for o in requested.graph.output}
        requested.graph.output.extend(
            onnx.ValueInfoProto(name=r.engine_name)
            for r in self._readings
            if r.engine_name not in declared
        )
        path = self._folder / "instrumented.onnx"
        path.write_bytes(requested.SerializeToString())
        dump = self._folder / "executed.onnx"
        # Loading a QDQ graph splits each DequantizeLinear whose value leaves it, even with the
        # optimiser off, unless QDQ handling is off too. The fusions themselves are in the graph.
        session = self._options.session(
            path,
            dump,
            "disable",
            {"session.disable_quant_qdq": "1"},
            stage="instrument",
        )
        executed = weights.read(dump)
        dump.unlink()  # as large as the model
        unchanged = fingerprint(executed.graph) == fingerprint(requested.graph)

        types = {o.name: o.type for o in session.get_outputs()}
        readings, skipped = [], list(self._skipped)
        for reading in self._readings:
            kind = types[reading.engine_name]
            if not _COMPARABLE.fullmatch(kind):
                skipped.append(Skipped(reading.tensor, f"a {kind} cannot be read as an array"))
            elif reading.layout == "blocked" and not reading.channels:
                skipped.append(
                    Skipped(reading.tensor, "stored blocked, and its channels are unknown")
                )
            else:
                readings.append(reading)
        return OrtInstrumented(session, self._outputs, readings, tuple(skipped), unchanged)


def _switches(options: _Options, made: Collection[str], original: Graph) -> Iterator[Switch]:
    """What of this session can be left out; ``made`` are the primitives that the optimiser made."""
    for key, factor, noises in _ENTRIES:
        if options.config.get(key) == "1":
            yield Switch(factor, {key: "0"}, noises)
    if options.level == "disable":
        return
    if _doubly_quantised(original) and options.config.get(_KEEP_PAIRS) != "1":
        yield Switch(
            "removal of double QDQ pairs", {_KEEP_PAIRS: "1"}, ("precision.int8_requantisation",)
        )
    if _FEW_BITS in made and options.config.get(_ACCURACY, "4") == "4":
        yield Switch(
            "8-bit activations beside weights of few bits",
            {_ACCURACY: "1"},
            ("precision.int8_dynamic",),
            (_FEW_BITS,),
        )
    off = [name for name in options.config.get(_DISABLED, "").split(";") if name]

    def without(factor: str, optimisers: Iterable[str], *about: tuple[str, ...]) -> Switch:
        return Switch(factor, {_DISABLED: ";".join([*off, *optimisers])}, *about)

    if quantised := tuple(sorted(filter(_QUANTISED.fullmatch, made))):
        if options.config.get(_SATURATING) != "1":
            # It makes signed 8-bit weights unsigned: those kernels do not add pairs in 16 bits.
            factor = "signed 8-bit weights (U8S8 kernels)"
            yield Switch(factor, {_SATURATING: "1"}, (_SATURATES,), quantised)
        yield without(
            "fusion of quantised operators",
            ("QDQSelectorActionTransformer",),
            (_SATURATES, "precision.int8_requantisation", "precision.int8"),
            quantised,
        )
    for primitive in (p for p in _FUSIONS if p in made):
        factor, optimisers, noises = _FUSIONS[primitive]
        yield without(factor, optimisers, noises, (primitive,))
    if options.level in ("all", "extended"):
        yield Switch("optimisation beyond the basic level", {"level": "basic"})
    else:
        yield Switch("graph optimisation", {"level": "disable"})


def _doubly_quantised(graph: Graph) -> bool:
    """Whether something is quantised again right after it was dequantised."""
    read = (graph.producer.get(n.input[0]) for n in graph.nodes if n.op_type == "QuantizeLinear")
    return any(node is not None and node.op_type == "DequantizeLinear" for node in read)


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


def _stored(graph: onnx.GraphProto, artifact: Path) -> Iterator[str]:
    """How the loaded file stores its weights, and what ties it to a machine."""
    counted = Counter(
        _PRECISIONS[int(i.data_type)]
        for i in graph.initializer
        if int(i.data_type) in _PRECISIONS and _PRECISIONS[int(i.data_type)] not in ("i64", "bool")
    )
    said = ", ".join(f"{count} in {kind}" for kind, count in sorted(counted.items()))
    yield (
        f"{artifact.name} was loaded instead of compiling the ONNX file; its constants: "
        f"{said or 'none'}."
    )
    blocked = sum(node.domain == NCHWC for node in graph.node)
    if blocked:
        yield (
            f"{blocked} operators are in a blocked layout, whose block depends on the processor: "
            f"{artifact.name} suits processors like the one that it was made on only."
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
        channels: true size of axis 1 of a blocked tensor; 0 where it is not known.
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
        if self.layout == "blocked":
            value = unblock(value, self.channels, block_size())
        elif self.layout is not None and len(self.layout) == value.ndim:
            value = np.transpose(value, np.argsort(self.layout))
        if self.int8 and value.dtype == np.uint8:
            value = (value ^ np.uint8(0x80)).view(np.int8)
        return np.require(value, requirements="C")  # unlike ascontiguousarray it keeps 0-d


def _readings(names: Names, original: onnx.ModelProto) -> Iterator[_Reading]:
    """One reading for every ONNX tensor that survives in the compiled graph."""
    observed = {
        tensor: (name, names.seats[name].layout) for tensor, name in names.observed().items()
    }
    blocked = [tensor for tensor, (_, layout) in observed.items() if layout == "blocked"]
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
            Probe(r.tensor, inferred=r.tensor != r.engine_name or isinstance(r.layout, tuple))
            for r in readings
        )

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """One run: the outputs and every probe in ONNX's layout; raises ``BackendError``."""
        names = dict.fromkeys([*self._outputs, *(r.engine_name for r in self._readings)])
        values = _run(self._session, list(names), feeds)
        return Capture(
            outputs={name: values[name] for name in self._outputs},
            tensors={r.tensor: r.decode(values[r.engine_name]) for r in self._readings},
        )


class OpaqueBuild:
    """A session in which a provider compiled parts of the model: only its outputs can be seen."""

    blocked: str | None = None

    def __init__(self, request: BuildRequest, options: _Options) -> None:
        """Compile; raises ``BackendError``."""
        import onnxruntime as ort

        from auditor import weights

        file = request.artifact or request.model_path
        self._session = options.session(file, None, options.level, {}, stage="build")
        self._outputs = [
            o.name for o in self._session.get_outputs() if _COMPARABLE.fullmatch(o.type)
        ]
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
            engine=_ENGINE,
            version=str(ort.__version__),
            device=options.provider,
            options=options.listed(),
            notes=tuple(_ort_providers.notes(self._session, options.provider)),
        )

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Every graph output that is a tensor, by name; raises ``BackendError``."""
        return _run(self._session, self._outputs, feeds)

    def instrument(self, feeds: Mapping[str, Array]) -> _Seen:
        """The same session: nothing can be added to it."""
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


# --- provenance ----------------------------------------------------------------------------------


def _kernels(model: onnx.ModelProto, compiled: Graph, names: Names) -> Iterator[Kernel]:
    """Every top-level node of the compiled graph as the primitive that runs it."""
    types = _types(model)
    original = names.original
    surviving = {seat.name for seat in names.seats.values()}
    produced: set[str] = set(compiled.inputs)
    for node in compiled.nodes:
        if compiled.constants.issuperset(filter(None, node.output)):
            continue
        outputs = [names.seats[name].name for name in node.output if name in names.seats]
        first = [name for name in outputs if name not in produced]
        produced.update(first)
        yield Kernel(
            # The numbers that keep ONNX Runtime's own names apart differ from run to run.
            name=TOKEN.sub("", node.name) or node_key(node),
            type=node.op_type,
            nodes=tuple(original.cone(first, surviving)),
            outputs=tuple(dict.fromkeys(outputs)),
            primitive=_primitive(node),
            precision=_precision(node, types),
            output_precision=_PRECISIONS.get(types.get(node_key(node), 0), ""),
        )


def _primitive(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _precision(node: onnx.NodeProto, types: Mapping[str, int]) -> str:
    """What a kernel computes in: 8-bit when its first input is, else its first float input."""
    given = [_PRECISIONS.get(types.get(name, 0), "") for name in node.input if name]
    if given[:1] == ["i8"]:
        return "i8"
    return next((p for p in given if p in _FLOATS), next(iter(given), ""))


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of each tensor of the compiled graph, as far as schemas determine it."""
    import onnx

    versions = {o.domain: o.version for o in model.opset_import}
    graph = model.graph
    types = {i.name: int(i.data_type) for i in graph.initializer}
    for info in itertools.chain(graph.input, graph.output, graph.value_info):
        types.setdefault(info.name, int(info.type.tensor_type.elem_type))
    for node in graph.node:
        bound: dict[str, int] = {}
        declared = ["T"] * len(node.output)
        if node.domain == "" and onnx.defs.has(node.op_type):
            try:
                schema = onnx.defs.get_schema(node.op_type, versions.get("", 1), "")
            except onnx.defs.SchemaError:  # the optimiser uses operators newer than the opset
                schema = onnx.defs.get_schema(node.op_type)
            for formal, name in zip(schema.inputs, node.input, strict=False):
                bound.setdefault(formal.type_str, types.get(name, 0))
            last = len(schema.outputs) - 1
            declared = [schema.outputs[min(i, last)].type_str for i in range(len(node.output))]
        elif node.input:
            bound["T"] = _contrib_type(node, types)
        chosen = attribute_of(node, "to") or attribute_of(node, "dtype")
        for name, type_str in zip(node.output, declared, strict=True):
            if chosen is not None:
                bound[type_str] = int(chosen.i)
            types.setdefault(name, bound.get(type_str, _NAMED_TYPES.get(type_str, 0)))
    return types


_NAMED_TYPES: Final = {"tensor(int64)": 7, "tensor(bool)": 9, "tensor(float)": 1}


def _contrib_type(node: onnx.NodeProto, types: Mapping[str, int]) -> int:
    """Output type of an operator of ONNX Runtime's own: its first input's, or its scale's."""
    to_float = node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
    index = {"DequantizeLinear": 1, "MatMulIntegerToFloat": 2}.get(node.op_type, 0)
    if node.op_type == "QuantizeLinear" and len(node.input) > 2:
        index = 2
    if node.op_type == "QGemm" and (len(node.input) < 9 or not node.input[8]):
        return types.get(node.input[1], 0)
    return types.get(node.input[index], 1 if to_float else 0)


def _notes(graph: onnx.GraphProto, session: Any) -> Iterator[str]:
    casts = Counter(n.name.startswith("Inserted") for n in graph.node if n.op_type == "Cast")[True]
    if casts:
        yield (
            f"ONNX Runtime inserted {casts} casts: the CPU has no kernel for some operators in "
            "the model's type, so they compute in float32."
        )
    for output in session.get_outputs():
        if not _COMPARABLE.fullmatch(output.type):
            yield f"Output {output.name!r} is a {output.type}, which cannot be compared."


# --- the engine's edges --------------------------------------------------------------------------


def _run(session: Any, names: list[str], feeds: Mapping[str, Array]) -> Arrays:
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise _refusal(error, "run") from error


_BAD_OPERATOR: Final = (
    re.compile(r"implementation for (?P<op>\S+?)\(\S+\) node with name '(?P<node>[^']*)'"),
    re.compile(r"Fatal error: (?P<op>\S+?)\(\S+\) is not a registered"),
    re.compile(r"No Op registered for (?P<op>\S+)"),
    re.compile(r"Node \((?P<node>.*?)\) Op \((?P<op>.*?)\)"),
    re.compile(r"non-zero status code returned while running (?P<op>\S+) node. "
               r"Name:'(?P<node>[^']*)'", re.IGNORECASE),
)  # fmt: skip


def _refusal(error: Exception, stage: str) -> BackendError:
    """ONNX Runtime's error, with the operator it names."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", "", str(error)).strip()
    found = next((m for pattern in _BAD_OPERATOR if (m := pattern.search(text))), None)
    if found is None:
        return BackendError(
            f"ONNX Runtime failed: {text.splitlines()[0] if text else type(error).__name__}",
            "Check the model with onnx.checker and compare its opset with this version's.",
            stage=stage,
            log=tuple(text.splitlines()),
        )
    node = found.groupdict().get("node")
    where = f" (node {node!r})" if node else ""
    return BackendError(
        f"ONNX Runtime cannot run operator {found['op']}{where}: {text.splitlines()[0]}",
        "Another version of onnxruntime, or another form of this operator, may be supported.",
        stage=stage,
        log=tuple(text.splitlines()),
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@functools.cache
def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
