"""TVM Relax on the host CPU: one build, observed from outside while it runs.

The virtual machine calls an instrument after every kernel, so nothing is compiled again to
look at a tensor: the observed program is the plain program's own executable. Which ONNX tensor
each kernel writes is worked out from the program as it was between passes (``_tvm_plan``).
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from auditor.errors import BackendError, UsageError
from auditor.ports import Array, Arrays, Capture, Script
from auditor.records.backend import Availability, BuildRequest, Device, Probe, Provenance, Switch
from backends._tvm_import import last_line, load
from backends._tvm_library import Library
from backends._tvm_observer import Observer, as_array
from backends._tvm_plan import STAGES, Plan, planned

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
            if info.name in STAGES:
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
        raise BackendError(f"TVM could not compile the model: {last_line(error)}") from error


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

    def __init__(self, program: _Program, plan: Plan) -> None:
        self._program = program
        self._plan = plan
        self._observer = Observer(plan.steps)
        self._machine = program.machine()
        self._machine.set_instrument(self._observer.observe)
        self.probes = tuple(map(Probe, self._observer.names()))
        self.skipped = plan.skipped

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        tensors = self._observer.start()
        outputs = self._program.run(self._machine, feeds)
        if (missing := self._observer.missing()) is not None:
            raise BackendError(
                f"The kernel {self._plan.kernels[missing].name} was not seen where it was "
                "expected.",
                stage="capture",
            )
        return Capture(outputs, tensors)


class _Build:
    """One TVM executable and its plan."""

    blocked = None

    def __init__(
        self, program: _Program, plan: Plan, provenance: Provenance, switches: tuple[Switch, ...]
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


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """TVM imports PyTorch wherever it is installed: two thirds of its start, for nothing used here.

    What is already imported stays.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


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
            with _without_torch():
                import tvm
                from tvm.relax.frontend import onnx as _importer  # noqa: F401
                from tvm.target import codegen
        except ImportError as error:
            return Availability(False, _ENGINE, reason=f"{error}", remedy=remedy)
        except Exception as error:  # its native library may fail in any way while loading
            reason = f"TVM does not load: {last_line(error)}"
            return Availability(False, _ENGINE, reason=reason, remedy=remedy)
        version = str(tvm.__version__)
        if not tvm.runtime.enabled("llvm"):
            reason = "this build of TVM has no LLVM, so it cannot compile for the CPU"
            return Availability(False, _ENGINE, version, reason=reason, remedy=remedy)
        cpu = Device("", f"LLVM {codegen.llvm_version_major()} CPU ({_mcpu(None)})")
        return Availability(True, _ENGINE, version, (cpu,))

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """A script with the same target and default pipeline."""
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

        from auditor.graphs import weights

        options = _Options.parse(request.options)
        original = weights.read(request.model_path).graph
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imported, notes = load(request, original)
            executable, snapshots = _compile(imported.module, options)
        plan = planned(imported, snapshots, original)
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
