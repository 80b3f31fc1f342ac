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

import contextlib
import functools
import itertools
import platform
import re
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import Availability, Device, Kernel, Probe, Provenance, Skipped, Switch
from backends import _int8, _ort_int8, _ort_providers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    import onnx

    from auditor.records.backend import BuildRequest

_ENGINE: Final = "ONNX Runtime"
_REMEDY: Final = "pip install onnxruntime"
_NCHWC: Final = "com.microsoft.nchwc"

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

_COPIES: Final = frozenset({"ReorderInput", "ReorderOutput", "Transpose", "Identity"})
_RESHAPES: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_ACTIVATIONS: Final = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})
# Their output has another rank than their input, so a permutation does not pass through.
_RANK_CHANGING: Final = _RESHAPES | {"MatMul", "Gemm", "QGemm", "Shape", "Size"}
# Their output is laid out as what they read.
_ELEMENTWISE: Final = _ACTIVATIONS | {
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Neg", "Abs", "Exp", "Log"),
    *("Sqrt", "Erf", "Softplus", "HardSwish", "Gelu", "QuickGelu", "Cast", "Where", "Identity"),
    *("QuantizeLinear", "DequantizeLinear", "Reciprocal", "Sin", "Cos", "Ceil", "Floor", "Round"),
}
_KEEP_CHANNELS: Final = (
    _ACTIVATIONS
    | {"BatchNormalization", "Add", "Sum", "Mul", "MaxPool", "AveragePool", "GlobalAveragePool"}
    | {"GlobalMaxPool", "Resize", "Upsample", "Identity", "Dropout"}
)
_RANDOM: Final = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
    | {"Multinomial", "Bernoulli"}
)
# Other types (sequences, strings, bfloat16, 4 bits) do not come out of its Python API as arrays.
_COMPARABLE: Final = re.compile(r"tensor\((float|double|float16|bool|u?int(8|16|32|64))\)")
_TOKEN: Final = re.compile(r"(_token_\d+)+$")
_SYNTHETIC: Final = re.compile(r"gemm_(in|out)put_reshape_arg")
_CAST_PREFIX: Final = "InsertedPrecisionFreeCast_"

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
        _drop_folded_inputs(self._compiled.graph, {i.name for i in self._session.get_inputs()})
        _unique_local_names(self._compiled.graph)
        compiled = _Graph(self._compiled.graph)
        original = weights.read(request.model_path)
        if request.artifact is not None:
            _require_same(self._session, original.graph, request.artifact)
        names = _Names(_Graph(original.graph), compiled)
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
        self.switches = tuple(_switches(options, made, _Graph(original.graph)))
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
            value = _attribute(node, "value") if node.op_type == "Constant" else None
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
        unchanged = _fingerprint(executed.graph) == _fingerprint(requested.graph)

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


def _switches(options: _Options, made: Collection[str], original: _Graph) -> Iterator[Switch]:
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


def _doubly_quantised(graph: _Graph) -> bool:
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
    blocked = sum(node.domain == _NCHWC for node in graph.node)
    if blocked:
        yield (
            f"{blocked} operators are in a blocked layout, whose block depends on the processor: "
            f"{artifact.name} suits processors like the one that it was made on only."
        )


def _reconstructed(node: onnx.NodeProto, given: list[Array]) -> Array | None:
    """What a Cast or DequantizeLinear makes of constants; None for other operators."""
    if node.op_type == "Cast" and (to := _attribute(node, "to")) is not None and to.i == 1:
        return given[0].astype(np.float32)
    if node.op_type != "DequantizeLinear" or len(given) < 2 or _attribute(node, "block_size"):
        return None
    integers, scale = given[0], given[1]
    axis = _attribute(node, "axis")
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
    layout: _Layout
    channels: int
    int8: bool

    def decode(self, value: Array) -> Array:
        """The ONNX tensor: NCHW, true channels, own type.

        A permutation that ends at an operator which takes axes away is left off: such a name is
        derived, and believed only when the values agree.
        """
        if self.layout == "blocked":
            value = _unblock(value, self.channels, _block_size())
        elif self.layout is not None and len(self.layout) == value.ndim:
            value = np.transpose(value, np.argsort(self.layout))
        if self.int8 and value.dtype == np.uint8:
            value = (value ^ np.uint8(0x80)).view(np.int8)
        return np.require(value, requirements="C")  # unlike ascontiguousarray it keeps 0-d


def _readings(names: _Names, original: onnx.ModelProto) -> Iterator[_Reading]:
    """One reading for every ONNX tensor that survives in the compiled graph."""
    observed = {
        tensor: (name, names.seats[name].layout) for tensor, name in names.observed().items()
    }
    blocked = [tensor for tensor, (_, layout) in observed.items() if layout == "blocked"]
    channels = _channels(original, blocked)
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


# --- graphs --------------------------------------------------------------------------------------


class _Graph:
    """Lookups on one ONNX graph; constant tensors are told from computed ones."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.outputs = [o.name for o in graph.output]
        self.constants = {i.name for i in graph.initializer}
        self.constants |= {i.values.name for i in graph.sparse_initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.constants]
        self.int8 = {i.name for i in graph.initializer if i.data_type == 3}
        self.ranks = {i.name: len(i.dims) for i in graph.initializer}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.reads: dict[int, list[str]] = {}
        self._index: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            reads = list(_reads(node))
            self.reads[id(node)] = reads
            for name in dict.fromkeys(reads):
                self.consumers[name].append(node)
            for name in filter(None, node.output):
                self.producer[name] = node
                self._index[name] = index
            if _foldable(node) and self.constants.issuperset(reads):
                self.constants.update(node.output)

    def variables(self, node: onnx.NodeProto) -> list[str]:
        """The tensors a node reads that are not constants, in order."""
        return [name for name in self.reads[id(node)] if name not in self.constants]

    def op_type(self, tensor: str) -> str:
        """Operator that produces ``tensor``; "" for an input or initialiser."""
        node = self.producer.get(tensor)
        return "" if node is None else str(node.op_type)

    def cone(self, outputs: Iterable[str], stop: set[str]) -> list[str]:
        """Keys of the non-constant nodes behind ``outputs``, up to the tensors of ``stop``."""
        found: set[int] = set()
        stack = list(outputs)
        while stack:
            index = self._index.get(stack.pop())
            if index is None or index in found:
                continue
            found.add(index)
            stack += (name for name in self.variables(self.nodes[index]) if name not in stop)
        return [_key(self.nodes[index]) for index in sorted(found)]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Every tensor of the enclosing graph that ``node`` reads, its subgraphs' included."""
    yield from filter(None, node.input)
    for graph in _subgraphs(node):
        local = {i.name for i in graph.input} | {i.name for i in graph.initializer}
        for inner in graph.node:
            yield from (name for name in _reads(inner) if name not in local)
            local.update(inner.output)
        yield from (o.name for o in graph.output if o.name not in local)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _foldable(node: onnx.NodeProto) -> bool:
    return node.op_type not in _RANDOM and not any(True for _ in _subgraphs(node))


def _key(node: onnx.NodeProto) -> str:
    return next(filter(None, node.output), "")


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def _drop_folded_inputs(graph: onnx.GraphProto, required: set[str]) -> None:
    """Remove inputs whose initialiser was folded away (IR below 4 lists initialisers as inputs).

    Without its initialiser such an input would have to be fed when the graph is loaded again.
    """
    kept = required.union(i.name for i in graph.initializer)
    for value in [v for v in graph.input if v.name not in kept]:
        graph.input.remove(value)


def _unique_local_names(graph: onnx.GraphProto) -> None:
    """Rename tensors defined inside subgraphs where a name is used twice in the whole model.

    ONNX Runtime writes graphs whose branches both define ``reorder_token_0``; ONNX requires
    names to be unique across a graph and its subgraphs, and loading may refuse them.
    """
    taken: set[str] = set()
    fresh = itertools.count()

    def defined(scope: onnx.GraphProto) -> Iterator[str]:
        yield from (i.name for i in scope.input)
        yield from (i.name for i in scope.initializer)
        for node in scope.node:
            yield from filter(None, node.output)

    def visit(scope: onnx.GraphProto, renamed: dict[str, str], *, top: bool) -> None:
        own = dict.fromkeys(defined(scope))
        renamed = {k: v for k, v in renamed.items() if k not in own}
        if not top:
            clashes = taken.intersection(own)
            renamed |= {name: f"{name}__{next(fresh)}" for name in own if name in clashes}
        taken.update(own)
        for value in itertools.chain(scope.input, scope.output, scope.initializer):
            value.name = renamed.get(value.name, value.name)
        for info in scope.value_info:
            info.name = renamed.get(info.name, info.name)
        for node in scope.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = renamed.get(name, name)
            for inner in _subgraphs(node):
                visit(inner, renamed, top=False)

    visit(graph, {}, top=True)


def _fingerprint(graph: onnx.GraphProto) -> list[tuple[object, ...]]:
    """Everything a graph executes, in its order: operators, names, wiring and attributes."""
    return [
        (
            node.domain,
            node.op_type,
            node.name,
            tuple(node.input),
            tuple(node.output),
            # Attributes come in the order of a hash map; subgraphs are compared as graphs.
            sorted(
                (a.name, str(_fingerprint(a.g)) if a.HasField("g") else a.SerializeToString())
                for a in node.attribute
            ),
        )
        for node in graph.node
    ]


# --- names and layouts ---------------------------------------------------------------------------

# None: as in ONNX. "blocked": NCHWc. "flat": NCHWc reshaped, so that an operator can read it when
# the shape is dynamic. A tuple p: the engine's tensor is transpose(onnx tensor, p).
_Layout = str | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Seat:
    """What a tensor of the compiled graph is in ONNX.

    Attributes:
        name: ONNX name of the tensor.
        copy: the engine moved or re-laid a value that another of its tensors already holds.
    """

    name: str
    layout: _Layout
    copy: bool = False


class _Names:
    """The ONNX name of each tensor of a compiled graph.

    A tensor keeps its name unless the engine changed its layout or type. The name of a renamed
    one is derived, in this order, from the name of its node, from the node of the original graph
    that reads the same tensors with the same operator, and from the node that reads it.
    """

    def __init__(self, original: _Graph, compiled: _Graph) -> None:
        self.original = original
        self._compiled = compiled
        self._layouts = _layouts(original, compiled)
        self._by_stem: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in original.nodes:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                for stem in {self._stem(name) for name in original.variables(node)}:
                    self._by_stem[stem].append(node)
        self.seats = {name: _Seat(name, None) for name in compiled.inputs}
        self._original_of: dict[int, onnx.NodeProto] = {}
        known = -1
        while known < len(self.seats):
            known = len(self.seats)
            for node in compiled.nodes:
                self._forward(node)
            for node in reversed(compiled.nodes):
                self._backward(node)
        self.int8 = {
            name
            for node in original.nodes
            if node.op_type == "QuantizeLinear"
            and len(node.input) > 2
            and node.input[2] in original.int8
            for name in node.output
        }

    def observed(self) -> dict[str, str]:
        """Engine tensor that stands for each observable ONNX tensor, in execution order."""
        best: dict[str, tuple[bool, bool, str]] = {}
        for name, seat in self.seats.items():
            known = seat.name in self.original.producer
            if known and seat.layout != "flat" and seat.name not in self.original.constants:
                rank = (name != seat.name, seat.copy, name)
                best[seat.name] = min(best.get(seat.name, rank), rank, key=lambda r: r[:2])
        order = (name for node in self._compiled.nodes for name in node.output)
        chosen = {engine: onnx_name for onnx_name, (_, _, engine) in best.items()}
        return {chosen[name]: name for name in order if name in chosen}

    def skipped(self) -> Iterator[Skipped]:
        """Tensors of the compiled program that have no counterpart in the ONNX file."""
        for node in self._compiled.nodes:
            for name in filter(None, node.output):
                if (
                    name not in self.seats
                    and name not in self._compiled.constants
                    and not _SYNTHETIC.match(name)
                ):
                    made = "inside an ONNX function" if "_inlfunc_" in name else "by the optimiser"
                    yield Skipped(name, f"made {made} ({node.op_type}); it has no ONNX name")

    # Each rule answers with a name or None: it never guesses between two candidates.

    def _forward(self, node: onnx.NodeProto) -> None:
        for index, name in enumerate(node.output):
            if name and name not in self.seats and name not in self._compiled.constants:
                seat = self._seat(node, index, name)
                if seat is not None:
                    self.seats[name] = seat

    def _seat(self, node: onnx.NodeProto, index: int, name: str) -> _Seat | None:
        layout = self._layouts[name]
        producer = self.original.producer
        if name in producer and layout is None:
            return _Seat(name, None)
        if name.removeprefix(_CAST_PREFIX) in producer and name.startswith(_CAST_PREFIX):
            return _Seat(name.removeprefix(_CAST_PREFIX), layout)
        plain = _TOKEN.sub("", name).replace("/duplicated", "")
        if node.op_type == "DequantizeLinear" and plain != name and plain in producer:
            return _Seat(plain, layout, copy=True)
        source = self.seats.get(node.input[0]) if node.input else None
        inserted_cast = node.op_type == "Cast" and node.name.startswith("Inserted")
        reblocked = node.op_type == "Reshape" and layout in ("blocked", "flat")
        if node.op_type in _COPIES or inserted_cast or reblocked:
            return None if source is None else _Seat(source.name, layout, copy=True)
        derived = self._from_node_name(node) if node.domain == _NCHWC else None
        derived = derived or self._from_structure(node, index)
        return None if derived is None else _Seat(derived, layout)

    def _from_node_name(self, node: onnx.NodeProto) -> str | None:
        """The NCHWc transformer names a node ``<its output's ONNX name>_nchwc``."""
        stem, found, _ = node.name.rpartition("_nchwc")
        if not found:
            return None
        stem = stem.removeprefix(_CAST_PREFIX)
        names = (stem, stem.removesuffix("_bn"))
        tensor = next((name for name in names if name in self.original.producer), None)
        if tensor is not None and len(node.input) > 3 and node.input[3]:
            tensor = self._after_sum(tensor, node.input[3])
        return None if tensor is None else self._after_activation(tensor, node)

    def _after_sum(self, tensor: str, addend: str) -> str | None:
        """The Conv took over the Add that followed it; its fourth input is the other addend."""
        seat = self.seats.get(addend)
        sums = [
            node
            for node in self.original.consumers[tensor]
            if node.op_type in ("Add", "Sum") and seat is not None and seat.name in node.input
        ]
        return str(sums[0].output[0]) if len(sums) == 1 else None

    def _after_activation(self, tensor: str, node: onnx.NodeProto) -> str | None:
        """The tensor behind the activation that ``node`` took over, if it did."""
        activation = _attribute(node, "activation")
        wanted = "" if activation is None else activation.s.decode()
        if not wanted or self.original.op_type(tensor) == wanted:
            return tensor
        following = [n for n in self.original.consumers[tensor] if n.op_type == wanted]
        return str(following[0].output[0]) if len(following) == 1 else None

    def _after_silu(self, name: str) -> str | None:
        """The Mul of ``x * Sigmoid(alpha * x)``, fused into QuickGelu."""
        seat = self.seats.get(name)
        consumers = [] if seat is None else self.original.consumers[seat.name]
        gated = [
            node
            for node in consumers
            if node.op_type == "Mul" and "Sigmoid" in map(self.original.op_type, node.input)
        ]
        return str(gated[0].output[0]) if len(gated) == 1 else None

    def _from_structure(self, node: onnx.NodeProto, index: int) -> str | None:
        if node.op_type == "QuickGelu":
            return self._after_silu(node.input[0])
        origin = self._origin(node)
        if origin is None or index >= len(origin.output):
            return None
        tensor = str(origin.output[index])
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return tensor
        if self._is_quantised(node):
            return self._quantised(tensor)
        return self._after_activation(tensor, node)

    def _is_quantised(self, node: onnx.NodeProto) -> bool:
        if node.op_type.startswith("QLinear"):
            return True
        if node.op_type == "QGemm":
            return len(node.input) > 8 and bool(node.input[8])
        seats = [self.seats[name] for name in node.input if name in self.seats]
        return any(self.original.op_type(seat.name) == "QuantizeLinear" for seat in seats)

    def _quantised(self, tensor: str) -> str | None:
        """The output of the QuantizeLinear behind ``tensor``, past a fused activation."""
        while True:
            consumers = self.original.consumers[tensor]
            quantised = [n for n in consumers if n.op_type == "QuantizeLinear"]
            if len(quantised) == 1:
                return str(quantised[0].output[0])
            if len(consumers) != 1 or consumers[0].op_type not in _ACTIVATIONS:
                return None
            tensor = consumers[0].output[0]

    def _origin(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The original node that reads the same tensors with the same operator."""
        if id(node) in self._original_of:
            return self._original_of[id(node)]
        reads = self._compiled.variables(node)
        if not reads or any(name not in self.seats for name in reads):
            return None
        names = [self.seats[name].name for name in reads]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            candidates = [n for n in self.original.consumers[names[0]] if n.op_type == node.op_type]
        else:
            stems = sorted(map(self._stem, names))
            candidates = [
                n
                for n in self._by_stem[stems[0]]
                if n.op_type == _core(node.op_type)
                and sorted(map(self._stem, self.original.variables(n))) == stems
            ]
        origin = self._tie_break(candidates, node)
        if origin is not None:
            self._original_of[id(node)] = origin
        return origin

    def _tie_break(
        self, candidates: list[onnx.NodeProto], node: onnx.NodeProto
    ) -> onnx.NodeProto | None:
        if len(candidates) > 1:
            name = _TOKEN.sub("", node.name)
            named = [n for n in candidates if name and n.name == name]
            constants = set(node.input) & self._compiled.constants
            shared = [n for n in candidates if constants & self._constant_sources(n)]
            candidates = named or shared
        return candidates[0] if len(candidates) == 1 else None

    def _constant_sources(self, node: onnx.NodeProto) -> set[str]:
        """Constants a node reads, and those behind their DequantizeLinear."""
        direct = set(node.input) & self.original.constants
        producers = (self.original.producer.get(name) for name in direct)
        return direct.union(*(p.input for p in producers if p is not None))

    def _stem(self, tensor: str) -> str:
        """The tensor behind QuantizeLinear, DequantizeLinear and Identity."""
        skip = ("QuantizeLinear", "DequantizeLinear", "Identity")
        while self.original.op_type(tensor) in skip:
            tensor = self.original.producer[tensor].input[0]
        return tensor

    def _backward(self, node: onnx.NodeProto) -> None:
        """Name the unnamed tensors that ``node`` reads from what it computes."""
        reads = self._compiled.variables(node)
        unnamed = [name for name in reads if name not in self.seats]
        seat = self.seats.get(_key(node))
        if not unnamed or seat is None:
            return
        if self._moves(node, seat.name):
            self._claim(unnamed[0], seat.name)
            return
        producer = self._first_fused(node, seat.name)
        if producer is not None:
            sources = self.original.variables(producer)
            if len(sources) == len(reads):
                for name, source in zip(reads, sources, strict=True):
                    self._claim(name, source)

    def _first_fused(self, node: onnx.NodeProto, result: str) -> onnx.NodeProto | None:
        """The original node of ``node``'s operator, behind what was fused after it."""
        producer = self.original.producer.get(result)
        while producer is not None and producer.op_type != _core(node.op_type):
            behind = self.original.variables(producer)
            producer = self.original.producer.get(behind[0]) if len(behind) == 1 else None
        if producer is not None and node.op_type == "Transpose":
            # A permutation merged with another one moves a different tensor.
            return producer if _attribute(producer, "perm") == _attribute(node, "perm") else None
        return producer

    def _moves(self, node: onnx.NodeProto, result: str) -> bool:
        """Whether ``node`` was inserted to move ``result`` without computing anything."""
        made_by = self.original.op_type(result)
        if node.domain == _NCHWC:
            return node.op_type in ("ReorderInput", "ReorderOutput") and made_by != "Transpose"
        return (node.op_type == "Transpose" and made_by != "Transpose") or (
            node.op_type == "Reshape" and made_by not in _RESHAPES
        )

    def _claim(self, name: str, onnx_name: str) -> None:
        """Give ``name`` its ONNX name; a reshaped one is known but cannot be observed."""
        if name not in self.seats and onnx_name in self.original.producer:
            copy = bool(_SYNTHETIC.match(name))
            self.seats[name] = _Seat(onnx_name, self._layouts[name], copy=copy)


def _core(op_type: str) -> str:
    """The ONNX operator a fused or re-laid one stands for."""
    if op_type == "QGemm":
        return "Gemm"
    for prefix in ("QLinear", "Nhwc", "Fused"):
        op_type = op_type.removeprefix(prefix)
    return op_type


def _layouts(original: _Graph, compiled: _Graph) -> dict[str, _Layout]:
    """Layout of every tensor of the compiled graph, relative to the tensor it is in ONNX."""
    layouts: dict[str, _Layout] = defaultdict(lambda: None)
    # A transpose of quantised values keeps its name, but what it makes is called otherwise.
    permutations = {_permutation(n) for n in original.nodes if n.op_type == "Transpose" and n.name}
    named = {n.name: n for n in original.nodes if n.name}
    for node in compiled.nodes:
        given = next((p for n in node.input if (p := layouts[n]) is not None), None)
        layout: _Layout = None
        if node.op_type == "ReorderOutput" and node.domain == _NCHWC:
            layout = None
        elif node.domain == _NCHWC:
            layout = "blocked"
        elif node.op_type == "Transpose":
            order = _attribute(node, "perm")
            own = node.output[0] in original.producer or _permutation(node) in permutations
            if not own and order is not None:
                before = given if isinstance(given, tuple) else range(len(order.ints))
                layout = _composed(before, order.ints)
        elif _channels_last(node):
            layout = (0, *range(2, _rank(node, compiled)), 1)
        elif node.op_type == "Reshape" and given in ("blocked", "flat"):
            layout = "flat" if given == "blocked" else "blocked"
        elif node.op_type not in _RANK_CHANGING:
            layout = given
            origin = original.producer.get(node.output[0]) or named.get(node.name)
            taken = origin and _taken_out(origin, original, compiled)
            if taken and (given or node.op_type in _ELEMENTWISE):
                before = given if isinstance(given, tuple) else range(len(taken))
                if not isinstance(given, str) and len(before) == len(taken):
                    layout = _composed(np.argsort(taken).tolist(), before)
        for name in node.output:
            layouts[name] = layout
    return layouts


def _composed(first: Sequence[int], second: Sequence[int]) -> _Layout:
    """The permutation that does one and then the other; None where nothing moves."""
    both = tuple(int(first[axis]) for axis in second)
    return None if both == tuple(range(len(both))) else both


def _taken_out(origin: onnx.NodeProto, original: _Graph, compiled: _Graph) -> Sequence[int] | None:
    """The permutation of the transpose before ``origin`` that the optimiser took out.

    It moves transposes past operators until two of them meet; what lies between is computed the
    other way round. None where there is none, or several that differ.
    """
    before = [original.producer[name] for name in origin.input if name in original.producer]
    orders = {
        _permutation(node)[1]
        for node in before
        if node.op_type == "Transpose"
        and node.output[0] not in original.constants
        and node.output[0] not in compiled.producer
    }
    return orders.pop() if len(orders) == 1 else None


def _permutation(node: onnx.NodeProto) -> tuple[str, tuple[int, ...]]:
    order = _attribute(node, "perm")
    return _TOKEN.sub("", node.name), () if order is None else tuple(order.ints)


def _rank(node: onnx.NodeProto, graph: _Graph) -> int:
    """Rank of what a convolution or pooling reads; 4 where the file does not say."""
    given = (_attribute(node, name) for name in ("kernel_shape", "strides", "dilations"))
    spatial = next((len(found.ints) for found in given if found is not None), None)
    if spatial is not None:
        return spatial + 2
    return max([r for name in node.input if (r := graph.ranks.get(name, 0)) > 2], default=4)


def _channels_last(node: onnx.NodeProto) -> bool:
    flag = _attribute(node, "channels_last")
    return node.op_type.startswith("Nhwc") or (flag is not None and flag.i == 1)


def _channels(model: onnx.ModelProto, tensors: list[str]) -> dict[str, int]:
    """True channel count (axis 1) of tensors stored padded; 0 where it is not known.

    Changes ``model``: weights are dropped before inferring shapes, which only needs their sizes.
    """
    if not tensors:
        return {}
    import onnx

    counted = _count_channels(model.graph, tensors)
    if not all(counted.values()):
        for weight in model.graph.initializer:
            if len(weight.raw_data) > 1024:
                weight.ClearField("raw_data")
        with contextlib.suppress(Exception):  # out of the inference's reach: 0 stays 0
            counted = _count_channels(onnx.shape_inference.infer_shapes(model).graph, tensors)
    return counted


def _count_channels(graph: onnx.GraphProto, tensors: Iterable[str]) -> dict[str, int]:
    """Channels from declared shapes, else from the weights of the convolution behind."""
    producer = {name: node for node in graph.node for name in node.output}
    weights = {i.name: tuple(i.dims) for i in graph.initializer}
    for node in graph.node:
        value = _attribute(node, "value") if node.op_type == "Constant" else None
        if value is not None:
            weights[node.output[0]] = tuple(value.t.dims)
    shapes = (
        (v.name, v.type.tensor_type.shape.dim)
        for v in itertools.chain(graph.value_info, graph.input, graph.output)
    )
    counted = {name: int(dims[1].dim_value) for name, dims in shapes if len(dims) > 1}

    def count(tensor: str) -> int:
        """Walk back through operators that keep the channels, to a convolution."""
        seen = []
        while not counted.get(tensor) and (node := producer.get(tensor)) is not None:
            seen.append(tensor)
            if node.op_type == "Conv" and node.input[1] in weights:
                counted[tensor] = weights[node.input[1]][0]
            elif node.op_type == "Concat":
                parts = [count(name) for name in node.input]
                counted[tensor] = sum(parts) if all(parts) else 0
                break
            elif node.op_type in _KEEP_CHANNELS and node.input:
                tensor = next((name for name in node.input if name not in weights), "")
            else:
                break
        counted.update(dict.fromkeys(seen, counted.get(tensor, 0)))
        return counted.get(tensor, 0)

    return {tensor: count(tensor) for tensor in tensors}


def _unblock(value: Array, channels: int, block: int) -> Array:
    """NCHW from NCHWc: ``[N, C/c, H, W, c]`` in memory, declared as ``[N, C, H, W]``."""
    n, padded, h, w = value.shape
    blocks = value.reshape(n, padded // block, h, w, block)
    return blocks.transpose(0, 1, 4, 2, 3).reshape(n, padded, h, w)[:, :channels]


@functools.cache
def _block_size() -> int:
    """The c of NCHWc on this CPU (16 with AVX-512, 8 with AVX2), which ONNX Runtime keeps private.

    Measured: in the blocked form of a tensor with two pixels the first channel's second pixel
    comes after one whole block.
    """
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    channels = 64
    graph = helper.make_graph(
        [helper.make_node("ReorderInput", ["x"], ["y"], domain=_NCHWC)],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 1, 2])],
        [onnx.ValueInfoProto(name="y")],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(_NCHWC, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.arange(channels * 2, dtype=np.float32).reshape(1, channels, 1, 2)
    return int(np.flatnonzero(session.run(None, {"x": pixels})[0].ravel() == 1)[0])


# --- provenance ----------------------------------------------------------------------------------


def _kernels(model: onnx.ModelProto, compiled: _Graph, names: _Names) -> Iterator[Kernel]:
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
            name=_TOKEN.sub("", node.name) or _key(node),
            type=node.op_type,
            nodes=tuple(original.cone(first, surviving)),
            outputs=tuple(dict.fromkeys(outputs)),
            primitive=_primitive(node),
            precision=_precision(node, types),
            output_precision=_PRECISIONS.get(types.get(_key(node), 0), ""),
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
        chosen = _attribute(node, "to") or _attribute(node, "dtype")
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
