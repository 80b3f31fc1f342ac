"""What the virtual machine will run, kernel by kernel, and the ONNX tensors that each one writes.

TVM forgets ONNX names when it imports a model. They are carried over in three steps. The
importer's table gives the Relax variable of each ONNX tensor; the passes up to constant folding
keep variable objects, so the same variables name the unfused kernels; and numbering the values
of the unfused and the fused program alike (same function, same arguments, same number) says
which of them each fused kernel writes. Kernels run in the order of the fused program's bindings,
which ties them to the instrument's events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auditor.records.backend import Kernel, Skipped
from backends._tvm_import import Imported
from backends._tvm_observer import Step

if TYPE_CHECKING:
    import onnx

# Passes of the default pipeline after which the module is needed.
_UNFUSED = "FoldConstant"
_FUSED = "FuseOps"
_EXECUTED = "RewriteDataflowReshape"  # the last pass before calls are taken apart
STAGES = frozenset({_UNFUSED, _FUSED, _EXECUTED})

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


@dataclass(frozen=True, eq=False, slots=True)
class _Call:
    """One call that a program makes; ``dtypes`` are those of its results."""

    function: str
    arguments: tuple[Any, ...]  # values and tuples of them
    attributes: str
    dtypes: tuple[str, ...]

    @property
    def results(self) -> tuple[_Value, ...]:
        return tuple(_Value(self, index) for index in range(len(self.dtypes)))


@dataclass(frozen=True, slots=True)
class _Value:
    """A result of a call, by its index, or what no call makes, by what it is."""

    made_by: _Call | None
    which: Hashable


class _Values:
    """Numbers the values of Relax programs: the same computation gets the same number.

    Two programs numbered by one instance can be compared, because ``FuseOps`` moves calls into
    new functions but leaves what they call, their arguments and the constants as they are. It
    does reorder them. A computation that a program repeats is therefore numbered once per time
    in the order in which ``main``'s results ask for it, arguments first. The number of a tuple is
    the Python tuple of its elements' numbers.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._arguments: dict[int, tuple[int, ...]] = {}
        self._dtypes: dict[int, str] = {}
        self._used: set[int] = set()

    def program(self, module: Any) -> dict[Any, _Computed]:
        """Number what each variable bound in ``main`` holds."""
        main = module["main"]
        environment: dict[Any, Any] = {
            parameter: _Value(None, ("input", i)) for i, parameter in enumerate(main.params)
        }
        calls: list[_Call] = []
        own: dict[Any, list[_Call]] = {}  # the calls of each binding
        for binding in _bindings(main):
            first = len(calls)
            environment[binding.var] = _evaluate(binding.value, environment, module, calls)
            own[binding.var] = calls[first:]
        values = [*_flat(_evaluate(main.body.body, environment, module, calls))]
        values += (result for call in calls for result in call.results)  # some lead nowhere
        numbers = self._numbered([*values, *_flat(tuple(environment.values()))])
        return {
            variable: _Computed(
                tuple(numbers[value] for value in _flat(environment[variable])),
                tuple(numbers[result] for call in made for result in call.results),
            )
            for variable, made in own.items()
        }

    def arguments(self, number: int) -> Iterable[int]:
        """The numbers that a call's result was computed from; none if it is not a call's."""
        return self._arguments.get(number, ())

    def dtypes(self, numbers: Iterable[int]) -> set[str]:
        """The element types of those of the numbers that are tensors computed by calls."""
        return {self._dtypes[number] for number in numbers if number in self._dtypes}

    def is_used(self, number: int) -> bool:
        """Whether some call takes it; Dropout's mask, for one, goes nowhere."""
        return number in self._used

    def is_call(self, number: int) -> bool:
        """Whether a number stands for a call's result."""
        return number in self._arguments

    def _numbered(self, values: Sequence[_Value]) -> dict[_Value, int]:
        """Number values in their order, and before each what it is computed from."""
        numbers: dict[_Value, int] = {}
        times: Counter[Hashable] = Counter()
        pending = [*reversed(values)]
        while pending:
            value = pending[-1]
            call = value.made_by
            if value not in numbers and call is not None:
                operands = [*_flat(call.arguments)]
                if missing := [operand for operand in operands if operand not in numbers]:
                    pending += reversed(missing)
                    continue
                key = (call.function, _mapped(call.arguments, numbers), call.attributes)
                times[key] += 1
                taken = tuple(numbers[operand] for operand in operands)
                self._used.update(taken)
                for result, dtype in zip(call.results, call.dtypes, strict=True):
                    number = self._number((key, times[key], result.which))
                    self._arguments[number] = taken
                    self._dtypes[number] = dtype
                    numbers[result] = number
            elif value not in numbers:
                numbers[value] = self._number(value.which)
            pending.pop()
        return numbers

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def _evaluate(expression: Any, environment: dict[Any, Any], module: Any, calls: list[_Call]) -> Any:
    """The value of an expression or the tuple of its elements' values; adds the calls it makes.

    Those of the module's own functions are made in their place.
    """
    from tvm import ir, relax

    def evaluated(part: Any) -> Any:
        return _evaluate(part, environment, module, calls)

    if isinstance(expression, relax.Var) and expression in environment:
        return environment[expression]
    if isinstance(expression, relax.Tuple):
        return tuple(map(evaluated, expression.fields))
    if isinstance(expression, relax.TupleGetItem):
        value = evaluated(expression.tuple_value)
        index = expression.index
        if isinstance(value, tuple):
            return value[index]
        return _Value(_Call("element", (value,), str(index), ("",)), 0)
    # Any other variable is a size that only a run tells.
    if isinstance(expression, relax.ShapeExpr | ir.GlobalVar | relax.Var):
        return _Value(None, str(expression))
    if not isinstance(expression, ir.Call):
        # Constants are the same objects in every program; anything else is only itself.
        return _Value(None, expression)
    arguments = tuple(map(evaluated, expression.args))
    if isinstance(expression.op, ir.GlobalVar):
        function = module[expression.op]
        local = dict(zip(function.params, arguments, strict=True))
        for binding in _bindings(function):
            local[binding.var] = _evaluate(binding.value, local, module, calls)
        return _evaluate(function.body.body, local, module, calls)
    dtypes = tuple(map(_dtype, _fields(expression.ty)))
    call = _Call(_callee(expression), arguments, str(expression.attrs), dtypes)
    calls.append(call)
    return call.results if isinstance(expression.ty, relax.TupleType) else call.results[0]


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


def _mapped(value: Any, numbers: Mapping[_Value, int]) -> Any:
    if isinstance(value, tuple):
        return tuple(_mapped(part, numbers) for part in value)
    return numbers[value]


def _flat(value: Any) -> Iterator[Any]:
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


def _name(imported: Imported, unfused: Any, values: _Values, original: onnx.GraphProto) -> _Names:
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


@dataclass(frozen=True, slots=True)
class Plan:
    """The compiled program: its kernels, and the order in which they report."""

    steps: tuple[Step, ...]
    kernels: tuple[Kernel, ...]
    skipped: tuple[Skipped, ...]


def planned(imported: Imported, stages: Mapping[str, Any], original: onnx.GraphProto) -> Plan:
    """List the kernels of ``main`` up to its first branch, with the ONNX nodes in each.

    Args:
        imported: what was compiled.
        stages: its module as it was after the passes ``STAGES``, by their names.
        original: the model's own graph.
    """
    from tvm import relax

    steps: list[Step] = []
    kernels: list[Kernel] = []
    skipped: list[Skipped] = []
    values = _Values()
    names = _name(imported, stages[_UNFUSED], values, original)
    absorbed = _absorbed(original, imported.graph)
    computed = values.program(stages[_FUSED])
    order = {key: position for position, key in enumerate(absorbed)}
    calls: Counter[str] = Counter()
    for binding in _bindings(stages[_EXECUTED]["main"]):
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
            where = f"{name} in {' and '.join(keys)}" if keys else name
            inside = "inside what is one node in ONNX" if keys else "not in the ONNX graph"
            skipped.append(Skipped(where, inside))
        steps.append(Step(symbol, tuple(range(-writes, 0)), tensors))
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
    return Plan(tuple(steps), tuple(kernels), tuple(skipped))


def _kernel_call(value: Any) -> tuple[str, Sequence[Any], int] | None:
    """The symbol and operands of a call that computes tensors, and how many arguments it writes.

    Kernels pass their destinations last.
    """
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
