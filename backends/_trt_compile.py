"""What TensorRT makes of a model: options, the build, and what there is to say of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auditor.errors import BackendError, UsageError
from auditor.records.backend import Kernel, Switch
from backends._shared import node_key
from backends._trt_cuda import engine, engine_name, logger, reason_in
from backends._trt_layers import LATE_TACTIC, ORIGIN, Graph, parse_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx

    from auditor.records.backend import BuildRequest


_ON_OFF = {"on": True, "off": False}
# Builder flags that change numbers: the factor to leave out, its option, the causes it can bring.
# Source: ``BuilderFlag`` in TensorRT's Python API.
_FACTORS = {
    ("TF32", True): ("TF32 products", {"tf32": "off"}, ("precision.tf32",)),
    # Up to TensorRT 10, which may choose these types where a flag allows it.
    ("FP16", True): ("float16 kernels", {"fp16": "off"}, ("precision.fp16",)),
    ("BF16", True): ("bfloat16 kernels", {"bf16": "off"}, ("precision.bf16",)),
    ("INT8", True): ("8-bit kernels", {"int8": "off"}, ("precision.int8",)),
    ("STRICT_NANS", False): (
        "fusions that do not keep NaN",
        {"strict-nans": "on"},
        ("implementation.nonfinite",),
    ),
}


@dataclass(frozen=True, slots=True)
class Options:
    """Builder flags to set or clear, by name, and the compute capability to build for."""

    flags: dict[str, bool]
    capability: str | None


def options_of(given: Mapping[str, str]) -> Options:
    """Read the user's options.

    Raises:
        UsageError: this TensorRT has no such option, or not with that value.
    """
    trt = engine()
    known = set(_members(trt.BuilderFlag))
    capabilities = [n for n in _members(getattr(trt, "ComputeCapability", None)) if n != "NONE"]
    flags = {}
    capability = None
    for name, value in given.items():
        member = name.upper().replace("-", "_")
        if member == "COMPUTE_CAPABILITY" and capabilities:
            capability = value.upper()
            if capability not in capabilities:
                raise UsageError(
                    f"{engine_name()} does not build for compute capability `{value}`",
                    f"It builds for: {', '.join(capabilities)}.",
                )
        elif member in known:
            if value.lower() not in _ON_OFF:
                raise UsageError(f"trt.{name} is `on` or `off`, not `{value}`")
            flags[member] = _ON_OFF[value.lower()]
        else:
            valid = [flag.lower().replace("_", "-") for flag in sorted(known)]
            valid += ["compute-capability"] if capabilities else []
            raise UsageError(
                f"{engine_name()} has no option `{name}`", f"Options: {', '.join(valid)}."
            )
    return Options(flags, capability)


def _switches(trt: Any, config: Any) -> tuple[Switch, ...]:
    """The factors that a builder configuration has on."""
    known = trt.BuilderFlag.__members__
    return tuple(
        Switch(factor, options, noises)
        for (flag, on), (factor, options, noises) in _FACTORS.items()
        if flag in known and config.get_flag(known[flag]) == on
    )


def _observe(network: Any) -> None:
    """Mark what survives fusion as debug tensors.

    Raises:
        BackendError: this TensorRT, or this network, has none.
    """
    mark = "mark_unfused_tensors_as_debug_tensors"
    if not hasattr(network, mark):
        raise BackendError(
            f"{engine_name()} {engine().__version__} cannot show tensors without changing fusions",
            f"Install a later one, which has `INetworkDefinition.{mark}`.",
            stage="instrument",
        )
    if not getattr(network, mark)():
        raise BackendError("TensorRT cannot observe this network", stage="instrument")


def _members(enum: Any) -> tuple[str, ...]:
    return tuple(sorted(enum.__members__)) if enum else ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """One compilation: the serialised engine, its description, and the network it came from.

    Attributes:
        types: TensorRT's type of every network input and output.
        shapes: shape of every tensor of the parsed network; −1 where dynamic.
        profiled: shape of the inputs that were specialised.
    """

    plan: Any
    layers: str
    tf32: bool
    switches: tuple[Switch, ...]
    strongly_typed: bool
    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    profiled: dict[str, tuple[int, ...]]

    @property
    def program(self) -> str:
        """The layers' text alone, what two builds of the same program share."""
        return self.layers.split("\n\n")[0]


class Compiler:
    """Compiles one request, plainly or with its unfused tensors marked for observation."""

    def __init__(self, request: BuildRequest) -> None:
        import onnx

        self._request = request
        self._options = options_of(request.options)
        self.model = onnx.load(request.model_path, load_external_data=False)
        self.graph = Graph(self.model.graph)
        # Node names may be empty or repeated; the engine refers to nodes by name alone.
        for node in self.model.graph.node:
            node.name = node_key(node)
        self.split_symbols = _split_symbols(self.model.graph, request.shapes)
        self._timings = b""

    def compile(self, *, observed: bool) -> Compiled:
        """Compile; ``observed`` marks the tensors that survive fusion as debug tensors.

        Raises:
            BackendError: TensorRT refused the model.
        """
        trt, log, request = engine(), logger(), self._request
        log.reset()
        builder = trt.Builder(log)
        if builder is None:
            raise BackendError("TensorRT did not start", stage="build", log=tuple(log.errors))
        if request.threads:
            builder.max_threads = request.threads
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        # The path tells where external weights lie; the file itself is not read again.
        if not parser.parse(self.model.SerializeToString(), str(request.model_path.resolve())):
            raise self._refused(parser, log.parsing)
        if observed:
            _observe(network)
        config = self._configure(trt, builder.create_builder_config())
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        profiled = self._specialise(builder, config, inputs)
        timings = self._share_timings(trt, config)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._not_built(network, log.errors)
        if timings is not None:
            self._timings = bytes(timings.serialize())
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return Compiled(
            plan=plan,
            layers=log.layers,
            tf32=config.get_flag(trt.BuilderFlag.TF32),
            switches=_switches(trt, config),
            strongly_typed=network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            types={tensor.name: tensor.dtype.name for tensor in (*inputs, *outputs)},
            shapes=_network_shapes(network),
            profiled=profiled,
        )

    def _configure(self, trt: Any, config: Any) -> Any:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for name, on in self._options.flags.items():
            flag = getattr(trt.BuilderFlag, name)
            (config.set_flag if on else config.clear_flag)(flag)
        if self._options.capability:
            config.num_compute_capabilities = 1
            wanted = getattr(trt.ComputeCapability, self._options.capability)
            if not config.set_compute_capability(wanted, 0):
                raise UsageError(f"TensorRT cannot build for compute capability {wanted.name} here")
        return config

    def _specialise(
        self, builder: Any, config: Any, inputs: Sequence[Any]
    ) -> dict[str, tuple[int, ...]]:
        """Fix every dynamic input at the request's shape, by an optimisation profile."""
        for tensor in inputs:
            if tensor.is_shape_tensor:
                raise BackendError(
                    f"input `{tensor.name}` sets shapes: TensorRT needs its values at build time",
                    "Export the model with those values as constants.",
                )
        dynamic = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
        if dynamic:
            profile = builder.create_optimization_profile()
            for name in dynamic:
                shape = self._request.shapes[name]
                profile.set_shape(name, shape, shape, shape)
            config.add_optimization_profile(profile)
        return {name: self._request.shapes[name] for name in dynamic}

    def _share_timings(self, trt: Any, config: Any) -> Any:
        """Make later builds choose the tactics of the first; RTX times nothing."""
        if trt.__name__ != "tensorrt":
            return None
        timings = config.create_timing_cache(self._timings)
        config.set_timing_cache(timings, ignore_mismatch=False)
        return timings

    def _refused(self, parser: Any, last: str) -> BackendError:
        """Every node that the parser cannot convert, with its reason.

        An error may name no node: then it is the ``last`` one that the parser turned to.
        """
        reasons: dict[str, str] = {}
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            key = self.graph.resolve(error.node_name() or last.rsplit(" [", 1)[0])
            subject = self._label(key) if key else error.node_operator() or "this model"
            reasons.setdefault(subject, reason_in(error.desc()) or "unsupported operator")
        problems = [f"{subject}: {reason}" for subject, reason in reasons.items()]
        return _unsupported(bool(problems), problems or ["this model: no reason given"], ())

    def _not_built(self, network: Any, errors: Sequence[str]) -> BackendError:
        """The nodes behind the layers that the builder's errors mention."""
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        named = [layer for layer in layers if _mentions(errors, layer.name)]
        origins = [name for layer in named for name in ORIGIN.findall(layer.metadata)]
        keys = dict.fromkeys(filter(None, map(self.graph.resolve, origins)))
        reason = reason_in(errors[0]) if errors else "no reason given"
        nodes = ", ".join(map(self._label, keys)) or "this model"
        return _unsupported(bool(keys), [f"{nodes}: {reason}"], tuple(errors))

    def _label(self, key: str) -> str:
        return f"{self.graph.operators[key]} `{key}`"


def _split_symbols(
    graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Drop the names of symbolic dimensions that stand for several sizes, and return them.

    Some exporters write every unknown dimension as ``?``; TensorRT takes one name for one size.
    """
    named = [
        (dimension, size)
        for value in graph.input
        for dimension, size in zip(
            value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False
        )
        if dimension.dim_param
    ]
    sizes: dict[str, set[int]] = {}
    for dimension, size in named:
        sizes.setdefault(dimension.dim_param, set()).add(size)
    split = tuple(name for name, found in sizes.items() if len(found) > 1)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in split:
                dimension.ClearField("dim_param")
    return split


def _unsupported(nodes: bool, problems: Sequence[str], log: tuple[str, ...]) -> BackendError:
    """``nodes`` is whether the problems name any."""
    hint = "Replace these operators in the export, or leave them to code after the network."
    return BackendError(
        f"{engine_name()} {engine().__version__} cannot build {'; '.join(problems)}",
        hint if nodes else "",
        stage="build",
        log=log,
    )


def _network_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        for tensor in (layer.get_output(i) for i in range(layer.num_outputs)):
            try:
                shapes[tensor.name] = tuple(tensor.shape)
            except ValueError:  # the rank itself is unknown
                continue
    return shapes


def _mentions(errors: Sequence[str], name: str) -> bool:
    whole = re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.])")
    return any(whole.search(error) for error in errors)


def notes(compiler: Compiler, compiled: Compiled, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Compile-time facts that a deployment engineer must know, as sentences."""
    import onnx

    elements = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8"}
    graph = compiler.model.graph
    declared = {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.output)
        if value.name in compiled.types
    }
    notes = [
        f"`{name}` is {kind} in the model and {compiled.types[name]} in the engine: its values "
        "are converted without a warning."
        for name, kind in declared.items()
        if elements.get(kind, kind) != compiled.types[name]
    ]
    doubles = [
        tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.DOUBLE
    ]
    if doubles:
        notes.append(
            f"{len(doubles)} DOUBLE constants (`{doubles[0]}` first) are computed with in FLOAT."
        )
    if not kernels:
        notes.append("The engine did not describe its layers: no kernel or precision is known.")
    wide = [name for name, kind in compiled.types.items() if kind == "INT64"]
    if wide:
        notes.append(f"The engine keeps INT64 at {', '.join(wide)}: bind 8-byte integers.")
    if compiled.strongly_typed:
        notes.append(
            "Strongly typed: the engine computes in the model's types, no precision flag applies."
        )
    products = sum(k.precision in ("", "tf32") and bool(k.nodes) for k in kernels)
    if compiled.tf32 and products:
        notes.append(
            f"TF32 is allowed (TensorRT's default): {products} kernels may round the factors of "
            "FP32 products to 10 mantissa bits; `--option trt.tf32=off` forbids it."
        )
    notes += [
        f"The symbol `{name}` names dimensions of different sizes, which TensorRT refuses: each "
        "was made independent for this build, do the same before you ship."
        for name in compiler.split_symbols
    ]
    if compiled.profiled:
        shapes = ", ".join(f"{n}:{'x'.join(map(str, s))}" for n, s in compiled.profiled.items())
        notes.append(f"Dynamic dimensions are specialised by an optimisation profile at {shapes}.")
    late = sum(layer.tactic == LATE_TACTIC for layer in parse_layers(compiled.layers))
    if late:
        notes.append(f"The implementation of {late} kernels is chosen on the GPU, at load time.")
    placed = {key for kernel in kernels for key in kernel.nodes}
    folded = [
        k for k, op in compiler.graph.operators.items() if k not in placed and op != "Constant"
    ]
    if folded:
        notes.append(
            f"{len(folded)} of {len(compiler.graph.operators)} nodes are in no kernel: folded, or "
            f"done by a layout (`{folded[0]}` first)."
        )
    return tuple(notes)
