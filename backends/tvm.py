"""TVM Relax on the host CPU: one build, observed from outside while it runs.

The virtual machine calls an instrument after every kernel, so nothing is compiled again to
look at a tensor: the observed program is the plain program's own executable.

TVM forgets ONNX names when it imports a model. They are carried over in three steps. The
importer's table gives the Relax variable of each ONNX tensor; the passes up to constant folding
keep variable objects, so the same variables name the unfused kernels; and numbering the values
of the unfused and the fused program alike (same function, same arguments, same number) says
which of them each fused kernel writes. Kernels run in the order of the fused program's bindings,
which ties them to the instrument's events.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import (
    Availability,
    BuildRequest,
    Device,
    Kernel,
    Probe,
    Provenance,
    Skipped,
    Switch,
)
from backends._tvm_library import Library, as_array

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

_ENGINE = "Apache TVM"
_OPTIONS = ("mcpu", "fast-math", "opt-level")
_OPT_LEVEL = 2  # TVM's own default
_MAX_OPT_LEVEL = 4
_BOOLEANS = {"true": True, "false": False}

# Causes that LLVM's fast-math flags (LLVM Language Reference, "Fast-Math Flags") and the fused
# multiply-add of wider instruction sets can bring.
_INSTRUCTIONS = ("implementation.fp32_rounding", "implementation.accumulation")
_FAST_MATH = (
    "implementation.approximation",
    "implementation.nonfinite",
    "implementation.denormals",
    *_INSTRUCTIONS,
)
# LLVM's name of the processor every one of an architecture is compatible with.
_BASELINES = {"x86_64": "x86-64", "aarch64": "generic"}

# Operators that the importer handles outside its table of converters.
_BUILT_IN = frozenset({"If", "Constant"})
# The importer looks operators up by name alone; in other domains a name may mean anything.
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})

# The snapshots taken while the default pipeline runs.
_UNFUSED = "FoldConstant"
_FUSED = "FuseOps"
_EXECUTED = "RewriteDataflowReshape"  # the last pass before calls are taken apart

_DESTINATION_PASSING = frozenset({"relax.call_tir", "relax.call_dps_packed"})
_RESHAPE = "vm.builtin.reshape"
_DTYPES = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
    "bool": "bool",
}
_FLOATS = ("bf16", "f16", "f32", "f64")  # from the narrowest mantissa to the widest


# --- options --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Options:
    """What ``--option tvm.KEY=VALUE`` asks for.

    Attributes:
        mcpu: processor to compile for, by LLVM's name (``-mcpu``).
        fast_math: LLVM's fast floating-point mathematics, all flags.
        opt_level: ``PassContext(opt_level=…)``; at 0 nothing is fused.
    """

    mcpu: str
    fast_math: bool
    opt_level: int

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> _Options:
        for key in given:
            if key not in _OPTIONS:
                raise UsageError(
                    f"TVM has no option {key!r} here.", f"It has {', '.join(_OPTIONS)}."
                )
        fast_math = given.get("fast-math", "false").lower()
        if fast_math not in _BOOLEANS:
            raise UsageError(f"tvm.fast-math is {fast_math!r}.", "Give true or false.")
        opt_level = given.get("opt-level", str(_OPT_LEVEL))
        if not opt_level.isdecimal() or int(opt_level) > _MAX_OPT_LEVEL:
            raise UsageError(
                f"tvm.opt-level is {opt_level!r}.", f"Give a number from 0 to {_MAX_OPT_LEVEL}."
            )
        return cls(_mcpu(given.get("mcpu")), _BOOLEANS[fast_math], int(opt_level))

    def target(self) -> Any:
        import tvm

        return tvm.target.Target({"kind": "llvm", "mcpu": self.mcpu, "fast-math": self.fast_math})

    def switches(self) -> Iterator[Switch]:
        """The factors that are on: fast mathematics, the processor's instructions, fusion."""
        if self.fast_math:
            yield Switch("fast mathematics", {"fast-math": "false"}, _FAST_MATH)
        if (plain := _baseline()) not in ("", self.mcpu):
            yield Switch(
                f"instructions of {self.mcpu} beyond {plain}", {"mcpu": plain}, _INSTRUCTIONS
            )
        if self.opt_level:
            yield Switch("fusion and passes above level 0", {"opt-level": "0"})

    def as_dict(self) -> dict[str, str]:
        return {
            "mcpu": self.mcpu,
            "fast-math": str(self.fast_math).lower(),
            "opt-level": str(self.opt_level),
        }


def _baseline() -> str:
    """LLVM's name of the plainest processor of this architecture, "" where not known."""
    return _BASELINES.get(platform.machine(), "")


def _mcpu(given: str | None) -> str:
    """LLVM's name of the processor to compile for: the host's, unless one is given."""
    import tvm
    from tvm.target import codegen

    if given is None:
        return str(codegen.llvm_get_system_cpu())
    # LLVM itself compiles for a generic processor when it does not know the name.
    if given not in set(codegen.llvm_get_cpu_archlist(tvm.target.Target("llvm"))):
        raise UsageError(
            f"LLVM knows no processor {given!r}.",
            f"Leave tvm.mcpu out to compile for this one, {codegen.llvm_get_system_cpu()}.",
        )
    return given


# --- import from ONNX -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Imported:
    """A Relax module with what the importer knows about its names.

    Attributes:
        inputs: ONNX names of ``main``'s parameters, in their order.
        outputs: ONNX names of its results, in their order.
        tensors: ONNX name → the Relax expression the importer made for it.
        graph: the ONNX graph imported, which may be a folded one.
    """

    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, Any]
    graph: onnx.GraphProto


def _import(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> _Imported:
    """What ``relax.frontend.onnx.from_onnx`` does, keeping the importer's table of tensors."""
    from tvm import relax
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    _require_converters(model.graph)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    importer = ONNXGraphImporter({name: list(shape) for name, shape in shapes.items()}, "float32")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module = importer.from_onnx(model.graph, opset)
    except Exception as error:  # the importer raises whatever its converters raise
        # The failing operator is only ever printed.
        operator = re.search(r"Error converting operator (\w+)", printed.getvalue())
        where = f" {operator[1]}" if operator else " the model"
        raise BackendError(
            f"TVM could not import{where}: {_last_line(error)}",
            "Export with fixed shapes and constant parameters, or leave TVM out of --backends.",
        ) from error
    return _Imported(
        module=module,
        inputs=tuple(n for n, e in importer._inputs.items() if isinstance(e, relax.Var)),
        outputs=tuple(o.name for o in model.graph.output),
        tensors=dict(importer._nodes),
        graph=model.graph,
    )


def _require_converters(graph: onnx.GraphProto) -> None:
    """Refuse a graph if the importer cannot convert some operator, naming all of them.

    Raises:
        BackendError: with the operators of the graph and its subgraphs that have no converter.
    """
    from tvm.relax.frontend.onnx import onnx_frontend

    known = onnx_frontend._get_convert_map().keys() | _BUILT_IN
    found = set()
    for node in _all_nodes(graph):
        if node.domain not in _DOMAINS:
            found.add(f"{node.domain}::{node.op_type}")
        elif node.op_type not in known:
            found.add(node.op_type)
    if found:
        raise BackendError(
            f"TVM has no converter for {', '.join(sorted(found))}.",
            "Export the model without these operators, or leave TVM out of --backends.",
        )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(subgraph)


def _fold(request: BuildRequest) -> onnx.ModelProto:
    """The model with fixed input shapes, after ONNX Runtime's basic graph optimisation.

    Raises:
        BackendError: ONNX Runtime does not load the model.
    """
    import onnx
    import onnxruntime as ort

    model = onnx.load(str(request.model_path), load_external_data=False)
    for value in model.graph.input:
        if value.name in request.shapes:
            dims = value.type.tensor_type.shape.dim
            del dims[:]
            for size in request.shapes[value.name]:
                dims.add().dim_value = size
    folded: Path = request.workdir / "folded.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, text in {
        "session.model_external_initializers_file_folder_path": str(request.model_path.parent),
        # Or a model above protobuf's 2 GB could not be saved.
        "session.optimized_model_external_initializers_file_name": "folded.bin",
    }.items():
        options.add_session_config_entry(key, text)
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise BackendError(
            f"ONNX Runtime could not fold the model for TVM: {_last_line(error)}"
        ) from error
    return onnx.load(str(folded))


def _load(request: BuildRequest, original: onnx.GraphProto) -> tuple[_Imported, tuple[str, ...]]:
    """Import the model directly where TVM can, folded otherwise; with notes for the user."""
    import onnx

    reason = "its input shapes are symbolic"
    if not request.dynamic:
        try:
            return _import(onnx.load(str(request.model_path)), request.shapes), ()
        except BackendError as error:
            reason = f"the model cannot be imported as it stands ({error.message.rstrip('.')})"
    try:
        folded = _fold(request)
    except BackendError:
        _require_converters(original)  # says more than ONNX Runtime's refusal, where it applies
        raise
    imported = _import(folded, request.shapes)
    shapes = ", ".join(
        f"{name}:{'x'.join(map(str, shape))}" for name, shape in request.shapes.items()
    )
    note = (
        "Before TVM compiled the model, ONNX Runtime's basic optimisation folded it for the "
        f"fixed input shapes {shapes}, because {reason}."
    )
    return imported, (note,)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# --- compilation ------------------------------------------------------------------------------


def _compile(module: Any, options: _Options) -> tuple[Any, dict[str, Any]]:
    """Build with TVM's default CPU pipeline, and keep the program as it was after some passes."""
    import tvm
    from tvm import relax
    from tvm.ir.instrument import pass_instrument

    snapshots: dict[str, Any] = {}

    @pass_instrument
    class Recorder:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name in (_UNFUSED, _FUSED, _EXECUTED):
                snapshots[info.name] = module

    target = options.target()
    level = options.opt_level
    try:
        with (
            tvm.transform.PassContext(opt_level=level, instruments=[Recorder()]),
            _each_function_built_once(),
        ):
            lowered = relax.get_default_pipeline(target)(module)
        with tvm.transform.PassContext(opt_level=level):
            return relax.build(lowered, target=target, relax_pipeline=None), snapshots
    except Exception as error:  # TVM raises its own, ValueError, TypeError and others
        raise BackendError(f"TVM could not compile the model: {_last_line(error)}") from error


@contextlib.contextmanager
def _each_function_built_once() -> Iterator[None]:
    """Let constant folding build equal functions once.

    ``FoldConstant`` compiles the function of every constant call anew (a reshape per bias), which
    was most of the compile time of a convolutional network (EfficientNet-Lite0: 182 builds of 18
    functions). The folded constants, and so the program, stay the same.
    """
    import tvm
    import tvm_ffi

    structural_key: Any = tvm_ffi.StructuralKey  # its stub misstates the constructor
    build = tvm.get_global_func("tirx.build")
    built: dict[Any, Any] = {}

    def build_once(function: Any, target: Any) -> Any:
        key = structural_key(function)
        if key not in built:
            built[key] = build(function, target)
        return built[key]

    tvm.register_global_func("tirx.build", build_once, override=True)
    try:
        yield
    finally:
        tvm.register_global_func("tirx.build", build, override=True)


# --- names ------------------------------------------------------------------------------------


class _Values:
    """Numbers the values of Relax programs: the same computation gets the same number.

    Two programs numbered by one instance can be compared, because ``FuseOps`` moves calls into
    new functions but leaves what they call, their arguments and the constants as they are. A
    computation that a program repeats is numbered once per time. The number of a tuple is the
    Python tuple of its elements' numbers.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._arguments: dict[int, tuple[Any, ...]] = {}
        self._dtypes: dict[int, str] = {}
        self._times: Counter[Hashable] = Counter()
        self._used: set[int] = set()

    def program(self, module: Any) -> dict[Any, _Computed]:
        """Number what each variable bound in ``main`` holds."""
        self._times.clear()
        main = module["main"]
        environment: dict[Any, Any] = {
            parameter: self._number(("input", i)) for i, parameter in enumerate(main.params)
        }
        computed = {}
        for binding in _bindings(main):
            parts: list[int] = []
            value = self._evaluate(binding.value, environment, module, parts)
            environment[binding.var] = value
            computed[binding.var] = _Computed(tuple(_flat(value)), tuple(parts))
        return computed

    def arguments(self, number: int) -> Iterable[int]:
        """The numbers that a call's result was computed from; none if it is not a call's."""
        return _flat(self._arguments.get(number, ()))

    def dtypes(self, numbers: Iterable[int]) -> set[str]:
        """The element types of those of the numbers that are tensors computed by calls."""
        return {self._dtypes[number] for number in numbers if number in self._dtypes}

    def is_used(self, number: int) -> bool:
        """Whether some call takes it; Dropout's mask, for one, goes nowhere."""
        return number in self._used

    def is_call(self, number: int) -> bool:
        """Whether a number stands for a call's result."""
        return number in self._arguments

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _evaluate(
        self, expression: Any, environment: dict[Any, Any], module: Any, parts: list[int]
    ) -> Any:
        from tvm import ir, relax

        if isinstance(expression, relax.Var):
            return environment[expression]
        if isinstance(expression, relax.Tuple):
            return tuple(
                self._evaluate(field, environment, module, parts) for field in expression.fields
            )
        if isinstance(expression, relax.TupleGetItem):
            value = self._evaluate(expression.tuple_value, environment, module, parts)
            index = expression.index
            return value[index] if isinstance(value, tuple) else self._number((value, index))
        if isinstance(expression, relax.ShapeExpr | ir.GlobalVar):
            return self._number(str(expression))
        if not isinstance(expression, ir.Call):
            # Constants are the same objects in every program; anything else is only itself.
            return self._number(expression)
        arguments = tuple(
            self._evaluate(argument, environment, module, parts) for argument in expression.args
        )
        if isinstance(expression.op, ir.GlobalVar):
            function = module[expression.op]
            local = dict(zip(function.params, arguments, strict=True))
            for binding in _bindings(function):
                local[binding.var] = self._evaluate(binding.value, local, module, parts)
            return self._evaluate(function.body.body, local, module, parts)
        call = (_callee(expression), arguments, str(expression.attrs))
        self._times[call] += 1
        self._used.update(_flat(arguments))
        numbers = []
        for index, ty in enumerate(_fields(expression.ty)):
            number = self._number((call, self._times[call], index))
            self._arguments[number] = arguments
            self._dtypes[number] = _dtype(ty)
            numbers.append(number)
        parts.extend(numbers)
        return tuple(numbers) if isinstance(expression.ty, relax.TupleType) else numbers[0]


@dataclass(frozen=True, slots=True)
class _Computed:
    """What one binding computes: the numbers it yields, and all that it computed for them."""

    results: tuple[int, ...]
    parts: tuple[int, ...]


def _bindings(function: Any) -> Iterator[Any]:
    for block in function.body.blocks:
        yield from block.bindings


def _callee(call: Any) -> str:
    return str(getattr(call.op, "name", None) or getattr(call.op, "global_symbol", call.op))


def _fields(ty: Any) -> tuple[Any, ...]:
    """The types of a tuple's fields, or a single type by itself."""
    from tvm import relax

    return tuple(ty.fields) if isinstance(ty, relax.TupleType) else (ty,)


def _dtype(ty: Any) -> str:
    """A tensor type's element type as Kernel records write it; "" for other types."""
    dtype = str(getattr(ty, "dtype", ""))
    return _DTYPES.get(dtype, dtype)


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


@dataclass(frozen=True, slots=True)
class _Names:
    """ONNX names of numbered values.

    Attributes:
        tensors: number → the ONNX tensor it is.
        owners: number → key of the ONNX node that it is computed for.
    """

    tensors: dict[int, str]
    owners: dict[int, str]


def _name(imported: _Imported, unfused: Any, values: _Values, original: onnx.GraphProto) -> _Names:
    """Find the ONNX tensors among the unfused program's values.

    An ONNX node owns the values that only lead to its outputs.
    """
    variables: dict[Any, Any] = {}
    for binding in _bindings(imported.module["main"]):
        variables[binding.value] = variables[binding.var] = binding.var
    computed = values.program(unfused)
    keys = {output: _key(node) for node in original.node for output in node.output if output}
    tensors: dict[int, str] = {}
    owners: dict[int, str] = {}
    for node in imported.graph.node:
        for output in node.output:
            variable = variables.get(imported.tensors.get(output))
            if output not in keys or variable not in computed:
                continue
            waiting = list(computed[variable].results)
            if len(waiting) == 1:  # more are a sequence, which is no tensor
                # The first name wins: later ones are copies (Identity, Dropout).
                tensors.setdefault(waiting[0], output)
            while waiting:
                number = waiting.pop()
                if number not in owners and values.is_call(number):
                    owners[number] = keys[output]
                    waiting.extend(values.arguments(number))
    return _Names(tensors, owners)


def _absorbed(original: onnx.GraphProto, imported: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """Key of each node → the keys of the nodes that folding merged into it, itself last."""
    alive = {output for node in imported.node for output in node.output}
    alive |= {tensor.name for tensor in imported.initializer}
    groups: dict[str, tuple[str, ...]] = {}
    made_by = {output: node for node in original.node for output in node.output if output}
    for node in original.node:
        before: dict[str, None] = {}
        pending = [node]
        while pending:
            for name in pending.pop().input:
                producer = made_by.get(name)
                if producer is not None and name not in alive and _key(producer) not in before:
                    before[_key(producer)] = None
                    pending.append(producer)
        groups[_key(node)] = (*reversed(before), _key(node))
    return groups


def _key(node: onnx.NodeProto) -> str:
    return next((output for output in node.output if output), "")


# --- kernels ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """One kernel as the virtual machine's instrument will report it.

    Attributes:
        symbol: the function's name.
        writes: how many of its last arguments are results; 0 when it returns its results.
        tensors: the ONNX tensor that each result is, or None.
    """

    symbol: str
    writes: int
    tensors: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """The compiled program: its kernels, and the order in which they report."""

    steps: tuple[_Step, ...]
    kernels: tuple[Kernel, ...]
    skipped: tuple[Skipped, ...]


def _plan(
    executed: Any,
    fused: Any,
    values: _Values,
    names: _Names,
    absorbed: Mapping[str, tuple[str, ...]],
) -> _Plan:
    """List the kernels of ``main`` up to its first branch, with the ONNX nodes in each."""
    from tvm import relax

    steps: list[_Step] = []
    kernels: list[Kernel] = []
    skipped: list[Skipped] = []
    computed = values.program(fused)
    order = {key: position for position, key in enumerate(absorbed)}
    calls: Counter[str] = Counter()
    for binding in _bindings(executed["main"]):
        if isinstance(binding.value, relax.If):
            reason = "it runs in or after an If, where the order of kernels depends on the data"
            skipped.append(Skipped("everything after the first If", reason))
            break
        if (call := _kernel_call(binding.value)) is None:
            continue
        symbol, operands, writes = call
        calls[symbol] += 1
        name = f"{symbol}#{calls[symbol]}"
        made = computed.get(binding.var, _Computed((), ()))
        results = _fields(binding.var.ty)
        tensors = tuple(names.tensors.get(number) for number in made.results)
        tensors = tensors if len(tensors) == len(results) else (None,) * len(results)
        lost = not any(tensors) or any(
            number not in names.tensors and values.is_used(number) for number in made.results
        )
        keys = dict.fromkeys(names.owners[n] for n in made.parts if n in names.owners)
        if lost:
            inside = f"inside ONNX node {', '.join(keys)}" if keys else "not in the ONNX graph"
            skipped.append(Skipped(name, inside))
        steps.append(_Step(symbol, writes, tensors))
        kernels.append(
            Kernel(
                name=name,
                type=symbol.rpartition(".")[2],
                nodes=tuple(sorted({n for k in keys for n in absorbed[k]}, key=order.__getitem__)),
                outputs=tuple(tensor for tensor in tensors if tensor is not None),
                precision=_precision(
                    values.dtypes(made.parts), _dtype(operands[0].ty) if operands else ""
                ),
                output_precision=_dtype(results[0]),
            )
        )
    return _Plan(tuple(steps), tuple(kernels), tuple(skipped))


def _kernel_call(value: Any) -> tuple[str, Sequence[Any], int] | None:
    """The symbol, operands and number of written results of a call that computes tensors."""
    from tvm import ir

    if not isinstance(value, ir.Call):
        return None
    callee = _callee(value)
    if callee in _DESTINATION_PASSING:
        return _symbol(value.args[0]), value.args[1].fields, len(_fields(value.ty))
    if callee == "relax.call_pure_packed":
        return _symbol(value.args[0]), value.args[1:], 0
    if callee == "relax.reshape":
        return _RESHAPE, value.args[:1], 0
    return None


def _symbol(function: Any) -> str:
    """The linker's name of a ``GlobalVar`` or an ``ExternFunc``."""
    return str(getattr(function, "name_hint", None) or function.global_symbol)


def _precision(dtypes: set[str], operand: str) -> str:
    """The narrowest float among the values a kernel computes; else what its data is."""
    return next((dtype for dtype in _FLOATS if dtype in dtypes), operand)


# --- the port ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Program:
    """An executable, and the ONNX names of what goes into and comes out of it."""

    executable: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def machine(self) -> Any:
        import tvm
        from tvm import relax

        return relax.VirtualMachine(self.executable, tvm.cpu())

    def run(self, machine: Any, feeds: Mapping[str, Array]) -> Arrays:
        import tvm

        result = machine["main"](*(tvm.runtime.tensor(feeds[name]) for name in self.inputs))
        values = (result,) if len(self.outputs) == 1 else tuple(result)
        return {name: as_array(v) for name, v in zip(self.outputs, values, strict=True)}


class _Instrumented:
    """A second virtual machine on the plain run's executable, with an observer."""

    program_unchanged = True  # it is the same executable
    rebuilt = False

    def __init__(self, program: _Program, plan: _Plan) -> None:
        self._program = program
        self._plan = plan
        self._machine = program.machine()
        self._machine.set_instrument(self._observe)
        self._position = 0
        self._tensors: Arrays = {}
        named = dict.fromkeys(t for step in plan.steps for t in step.tensors if t is not None)
        self.probes = tuple(Probe(tensor) for tensor in named)
        self.skipped = plan.skipped

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        self._position, self._tensors = 0, {}
        outputs = self._program.run(self._machine, feeds)
        if self._position != len(self._plan.steps):
            missing = self._plan.kernels[self._position].name
            raise BackendError(
                f"The kernel {missing} was not seen where it was expected.", stage="capture"
            )
        return Capture(outputs, self._tensors)

    def _observe(self, function: Any, symbol: str, before: bool, result: Any, *args: Any) -> int:
        """Copy a kernel's results as soon as it has run: its storage is used again."""
        steps = self._plan.steps
        if before or self._position == len(steps) or symbol != steps[self._position].symbol:
            return 0
        step = steps[self._position]
        self._position += 1
        if step.writes:
            results = args[-step.writes :]
        else:
            results = (result,) if len(step.tensors) == 1 else tuple(result)
        for tensor, value in zip(step.tensors, results, strict=True):
            if tensor is not None:
                self._tensors[tensor] = as_array(value)
        return 0


class _Build:
    """One TVM executable and its plan."""

    blocked = None

    def __init__(
        self, program: _Program, plan: _Plan, provenance: Provenance, switches: tuple[Switch, ...]
    ) -> None:
        self.provenance = provenance
        self.switches = switches
        self._program = program
        self._plan = plan
        self._machine = program.machine()

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        return self._program.run(self._machine, feeds)

    def instrument(self, feeds: Mapping[str, Array]) -> _Instrumented:
        return _Instrumented(self._program, self._plan)


_SCRIPT = """\
{threads}import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx


def run(path, feeds):
    model = onnx.load(path)
    module = from_onnx(model, {{name: list(value.shape) for name, value in feeds.items()}})
    target = tvm.target.Target({target!r})
    with tvm.transform.PassContext(opt_level={level}):
        lowered = relax.get_default_pipeline(target)(module)
        built = relax.build(lowered, target=target, relax_pipeline=None)
    machine = relax.VirtualMachine(built, tvm.cpu())
    results = machine["main"](*(tvm.runtime.tensor(value) for value in feeds.values()))
    names = [output.name for output in model.graph.output]
    results = [results] if len(names) == 1 else list(results)
    return {{name: value.numpy() for name, value in zip(names, results)}}


def version():
    return f"TVM {{tvm.__version__}}"
"""
_THREADS = """\
import os

os.environ["TVM_NUM_THREADS"] = "{}"  # read once, by the first kernel

"""


class TVM:
    """TVM's Relax compiler for the host CPU, with LLVM."""

    title = _ENGINE
    artifacts = (".so", ".dylib", ".dll")

    def availability(self) -> Availability:
        """Whether TVM is installed with its ONNX importer and LLVM."""
        remedy = 'Install it with: pip install "sysnoise-auditor[tvm]"'
        try:
            import tvm
            from tvm.relax.frontend import onnx as _importer  # noqa: F401
            from tvm.target import codegen
        except ImportError as error:
            return Availability(False, _ENGINE, reason=f"{error}", remedy=remedy)
        except Exception as error:  # its native library may fail in any way while loading
            reason = f"TVM does not load: {_last_line(error)}"
            return Availability(False, _ENGINE, reason=reason, remedy=remedy)
        version = str(tvm.__version__)
        if not tvm.runtime.enabled("llvm"):
            reason = "this build of TVM has no LLVM, so it cannot compile for the CPU"
            return Availability(False, _ENGINE, version, reason=reason, remedy=remedy)
        cpu = Device("", f"LLVM {codegen.llvm_version_major()} CPU ({_mcpu(None)})")
        return Availability(True, _ENGINE, version, (cpu,))

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """The same target and default pipeline."""
        made = _Options.parse(options)
        source = _SCRIPT.format(
            threads="" if threads is None else _THREADS.format(threads),
            target={"kind": "llvm", "mcpu": made.mcpu, "fast-math": made.fast_math},
            level=made.opt_level,
        )
        return Script(_ENGINE, "apache-tvm, onnx", source)

    def build(self, request: BuildRequest) -> _Build | Library:
        """Import, compile once with the default CPU pipeline, and trace the names.

        A model with symbolic shapes, or one that TVM cannot import as it stands, is first
        folded by ONNX Runtime for the request's shapes; the provenance says so. A library that was
        built before (``request.artifact``) is loaded instead.

        Raises:
            BackendError: an operator has no converter, or TVM fails to import or compile.
            UsageError: an unknown option, value or device.
        """
        if request.open:
            raise BackendError(
                "TVM's programs are compiled here for fixed shapes, and this must run at several",
                "Export the decoder without caches, for one length.",
            )
        if (request.device or "cpu").lower() != "cpu":
            raise UsageError(
                f"TVM has no device {request.device!r} here.",
                "Leave the device out: TVM compiles for this CPU.",
            )
        if request.threads is not None:
            # TVM reads it once, when a kernel first asks for threads.
            os.environ["TVM_NUM_THREADS"] = str(request.threads)
        if request.artifact is not None:
            return Library(request)
        import tvm

        from auditor import weights

        options = _Options.parse(request.options)
        original = weights.read(request.model_path).graph
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imported, notes = _load(request, original)
            executable, snapshots = _compile(imported.module, options)
        values = _Values()
        names = _name(imported, snapshots[_UNFUSED], values, original)
        absorbed = _absorbed(original, imported.graph)
        plan = _plan(snapshots[_EXECUTED], snapshots[_FUSED], values, names, absorbed)
        provenance = Provenance(
            engine=_ENGINE,
            version=str(tvm.__version__),
            device=f"CPU ({options.mcpu})",
            options=options.as_dict(),
            kernels=plan.kernels,
            notes=notes,
        )
        program = _Program(executable, imported.inputs, imported.outputs)
        return _Build(program, plan, provenance, tuple(options.switches()))


BACKEND = TVM()
