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
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from backends._ov_program import (
    Candidate,
    Executed,
    Program,
    Twins,
    branches,
    candidates_of,
    kernel_of,
)
from backends._ov_session import Cut, CutOut, Session, as_shown, reason_of, same_bits
from backends._ov_source import FLOATS, MOVEMENT, TOKEN, Copy, Port, Source

_DEFAULT_DEVICE = "CPU"
_PRECISION = "INFERENCE_PRECISION_HINT"
_MODE = "EXECUTION_MODE_HINT"
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
_LOSSY = frozenset({"Reduce", "Pooling"})

_RETRIES = 6  # compilations that drop what a lost kernel depends on, before bisecting
_RINGS = 4  # kernels in a row away from a lost one, where nothing nearer is observed
_BISECTIONS = 12  # compilations at most when bisecting
_NEAR = 3  # kernels in a row that make a tensor; where they prove nothing, its whole cone may
_CONES = 16  # compilations at most of whole ancestor cones
_REFUSALS = 2  # at most so many more that prove nothing than that do, and tensors in a row given up

# Elements of tensors that kernels compiled apart may make beyond what they are compiled for.
_TOGETHER = 1 << 18


# --- build and instrumentation -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trial:
    """A compilation of the whole model with probes.

    Attributes:
        suspects: makers of the tensors whose probes may have changed the program.
        proved: whether it is the plain program and gave the same outputs, bit by bit.
        aside: probes whose tensor is computed for the probe alone.
    """

    session: Session
    probes: tuple[Candidate, ...] = ()
    suspects: frozenset[int] = frozenset()
    proved: bool = False
    aside: frozenset[Candidate] = frozenset()


@dataclass(slots=True)
class _Instrumented:
    """The program with probes; see ``auditor.ports.Instrumented``."""

    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    _build: _Build
    rebuilt: bool
    _trial: _Trial
    _cuts: tuple[Cut, ...]

    def run(self, feeds: Mapping[str, Array]) -> Capture:
        """Run the instrumented program, then the kernels compiled apart on what it captured.

        Raises:
            BackendError: the engine failed.
        """
        outputs, tensors = self._build.capture(self._trial.session, self._trial.probes, feeds)
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
    _compile: Callable[[Any], Any]
    _source: Source
    _session: Session
    _program: Program
    _inputs: tuple[str, ...]
    _outputs: tuple[tuple[str, int], ...]  # ONNX name, index among the engine's results
    _candidates: tuple[Candidate, ...]
    _finals: tuple[Candidate, ...]
    _skipped: tuple[Skipped, ...]
    switches: tuple[Switch, ...]
    _quantised: _int8.Quantised | None
    blocked: str | None = None
    shared_threads: bool = True  # oneTBB's

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """Run the plain program.

        Raises:
            BackendError: the engine failed.
        """
        return self.capture(self._session, (), feeds)[0]

    def constants(self) -> Arrays:
        """The model's constants as it was read, by the names that they had in ONNX."""
        return self._quantised.weights if self._quantised else self._source.constants()

    def grids(self) -> Arrays:
        """What activations are rounded to, where the model was quantised here."""
        return self._quantised.grids if self._quantised else {}

    def capture(
        self, session: Session, probes: Sequence[Candidate], feeds: Mapping[str, Array]
    ) -> tuple[Arrays, Arrays]:
        """Final outputs, and the values of ``probes``, the results that follow them."""
        results = len(self._source.results)
        values = session.infer([feeds[n] for n in self._inputs], range(results + len(probes)))
        return (
            {name: values[index] for name, index in self._outputs},
            {c.tensor: as_shown(v, c) for c, v in zip(probes, values[results:], strict=True)},
        )

    def instrument(self, feeds: Mapping[str, Array]) -> _Instrumented:
        """Observe all that can be observed with proof; ``feeds`` is used for the proofs.

        Raises:
            BackendError: the engine failed.
        """
        trial = self._observe(feeds)
        outputs, tensors = self.capture(trial.session, trial.probes, feeds)
        observed = [c for c in trial.probes if c not in trial.aside]
        missing = [c for c in self._candidates if c not in trial.probes]
        known = {**feeds, **outputs, **{c.tensor: tensors[c.tensor] for c in observed}}
        cuts, found = self._apart(missing, observed, known) if observed else ([], set())
        reasons = {c: "the engine would compute it for the probe alone" for c in trial.aside}
        reasons |= {
            c: "observing it would change the program, and its kernel could not be run apart"
            for c in missing
            if c not in found
        }
        return _Instrumented(
            probes=(
                *(Probe(c.tensor) for c in observed),
                *(Probe(c.tensor, "cone-proved") for c in missing if c in found),
            ),
            skipped=(*self._skipped, *(Skipped(c.tensor, why) for c, why in reasons.items())),
            program_unchanged=trial.proved,  # without a probe it is the plain program itself
            rebuilt=trial.session is not self._session,
            _build=self,
            _trial=trial,
            _cuts=tuple(cuts),
        )

    # --- probes in the whole program ---

    def _observe(self, feeds: Mapping[str, Array]) -> _Trial:
        """Compile with as many probes as leave the program unchanged."""
        plain = self.run(feeds)
        overwritten = {
            p for k in self._program.kernels() for p in self._source.operands(k.operations)
        }
        # A kernel that also widens 8 bits is another one where these are observed.
        leave = self._altering() | {
            c.maker for c in self._candidates if c.grid and c.maker in c.grid.steps
        }
        kept = [
            c for c in self._candidates if (c.maker, 0) not in overwritten and c.maker not in leave
        ]
        for _ in range(_RETRIES):
            trial = self._try(kept, plain, feeds)
            if trial.proved:
                return trial
            suspects = self._with_sums(trial.suspects)
            for _ in range(_RINGS):
                if any(c.maker in suspects for c in kept):
                    break
                suspects = self._around(suspects)
            fewer = [c for c in kept if c.maker not in suspects]
            if len(fewer) == len(kept):
                break
            kept = fewer
        return self._bisect(kept, plain, feeds)

    def _altering(self) -> set[int]:
        """Makers of tensors whose observation is known to change the program.

        OpenVINO makes a reduction compute in the type in which its result is asked for, and what it
        reads with it. An element-wise kernel that was left alone to be fused with a deconvolution,
        and was not in the end, becomes a subgraph where the deconvolution is observed.
        """
        found = set[int]()
        for kernel in self._program.kernels():
            if kernel.operations and kernel.widens:
                found.add(max(kernel.operations))
            for parent in self._program.parents(kernel) if kernel.type == "Eltwise" else ():
                if parent.type == "Deconvolution" and parent.operations:
                    found.add(max(parent.operations))
        return found

    def _with_sums(self, suspects: frozenset[int]) -> frozenset[int]:
        """With them, the sums over what they make.

        With only a sum observed, OpenVINO leaves off rounding what it reads.
        """
        return suspects | {
            max(kernel.operations)
            for kernel in self._program.kernels()
            if kernel.type == "Reduce" and kernel.operations
            for parent in self._program.parents(kernel)
            if suspects & {*parent.operations}
        }

    def _around(self, suspects: frozenset[int]) -> frozenset[int]:
        """With them, what the kernels that read them or feed them make."""
        found = set(suspects)
        for kernel in self._program.kernels():
            for parent in self._program.parents(kernel):
                pair = [k for k in (kernel, parent) if k.operations]
                if any(suspects & {*k.operations} for k in pair):
                    found |= {max(k.operations) for k in pair}
        return frozenset(found)

    def _suspects(self, changed: Program, probes: Sequence[Candidate]) -> frozenset[int]:
        """Which kernels' outputs to leave alone for the program to stay as it is.

        A kernel that ``changed`` still has in another form was fused with what it reads; one
        that it no longer has was fused with what reads it.
        """
        probed = {c.maker for c in probes}
        same = {kernel.key for kernel in changed.kernels()}
        ends = {kernel.end for kernel in changed.kernels() if kernel.type not in MOVEMENT}
        suspects = set[int]()
        for kernel in self._program.kernels():
            if kernel.key not in same:
                read = {max(k.operations) for k in self._program.parents(kernel) if k.operations}
                own = {max(kernel.operations)} if kernel.operations else set()
                suspects |= (read & probed or own) if kernel.end in ends else own
        return frozenset(suspects) or self._crossed(changed, probed)

    def _crossed(self, changed: Program, probed: Collection[int]) -> frozenset[int]:
        """Observed operations that a kernel moved past, in a program with the same kernels.

        OpenVINO moves attention's scale from the keys to where they were repeated for all heads, or
        not, depending on whether what lies between is read by others.
        """
        results = self._source.results
        plain, other = self._program.reads(results), changed.reads(results)
        moved = {key for key in (*plain, *other) if plain[key] != other[key]}
        ends = {
            end for key in moved for end in (plain[key] - other[key]) | (other[key] - plain[key])
        }
        kernels = self._program.kernels()
        corners = {k.name for k in kernels if k.key in moved or k.end in ends}
        between = {
            max(step.operations)
            for kernel in kernels
            if kernel.name in corners
            for source in self._program.sources(kernel)
            for step in self._chain(source, corners)
            if step.operations
        }
        found = between & set(probed)
        return frozenset(found) or frozenset(
            max(k.operations) for k in kernels if k.operations and k.end in ends
        )

    def _chain(self, kernel: Executed, ends: Collection[str]) -> list[Executed]:
        """A kernel and what is above it, up to one of ``ends``; nothing where several feed one."""
        chain = []
        while kernel.name not in ends:
            above = list(self._program.sources(kernel))
            if len(above) != 1:
                return []
            chain.append(kernel)
            kernel = above[0]
        return chain

    def _bisect(
        self, kept: Sequence[Candidate], plain: Arrays, feeds: Mapping[str, Array]
    ) -> _Trial:
        """Add probes by halves, keeping those that change nothing, within a few compilations."""
        best = self._try((), plain, feeds)
        todo = [kept] if kept else []
        for _ in range(_BISECTIONS):
            if not todo:
                break
            part = todo.pop()
            trial = self._try((*best.probes, *part), plain, feeds)
            if trial.proved:
                best = trial
            elif len(part) > 1:
                half = len(part) // 2
                todo += [part[half:], part[:half]]
        return best

    def _try(
        self, probes: Sequence[Candidate], plain: Arrays, feeds: Mapping[str, Array]
    ) -> _Trial:
        """Compile with ``probes``, and compare with the plain program and its outputs."""
        if not probes:
            return _Trial(self._session, proved=True)
        model, ops = self._source.clone()
        model.add_results([_result(ops, c) for c in probes])
        session, program = self._compiled(model)
        results = self._source.results
        expected, made = (p.fingerprint(results) for p in (self._program, program))
        if made != expected:
            return _Trial(session, tuple(probes), self._suspects(program, probes))
        outputs, _ = self.capture(session, probes, feeds)
        return _Trial(
            session,
            tuple(probes),
            proved=all(same_bits(outputs[name], plain[name]) for name in plain),
            aside=program.aside(probes, results),
        )

    # --- probes on kernels compiled apart ---

    def _apart(
        self,
        missing: Sequence[Candidate],
        observed: Sequence[Candidate],
        known: Mapping[str, Array],
    ) -> tuple[list[Cut], set[Candidate]]:
        """Make ``missing`` outside the whole program: each kernel alone, else with what feeds it.

        Returns:
            What to run, in order, and the candidates whose values it is proved to give.
        """
        if not missing:
            return [], set()
        cuts, found, faithful = self._alone(missing, observed, known)
        cones = refused = strayed = 0
        copy = Copy(self._source)
        rest = [c for c in missing if c not in found]
        # What ran as another kernel when it was alone mostly does so at the end of its cone, and a
        # reduction reads what nothing else asks for in another precision.
        last = {c: self._maker(c).type in _LOSSY for c in rest}
        for candidate in sorted(rest, key=lambda c: (last[c], c not in faithful)):
            cut = None
            if strayed < _REFUSALS:
                cut = self._near(candidate, observed, known, copy)
                strayed += 1 if cut is None else -1
            if cut is None and cones < _CONES and not self._maker(candidate).widens:
                cones += 1
                cut = self._cone(candidate, observed, known)
            if cut is not None:
                cuts.append((cut, (candidate,)))
                found.add(candidate)
                refused = 0
            elif (refused := refused + 1) == _REFUSALS:
                break
        return cuts, found

    def _alone(
        self,
        missing: Sequence[Candidate],
        observed: Sequence[Candidate],
        known: Mapping[str, Array],
    ) -> tuple[list[Cut], set[Candidate], Collection[Candidate]]:
        """Compile the kernels that make ``missing``, each fed with captured values.

        A tensor is accepted when its kernel is the plain program's, and what reads it makes
        from it the very bits that the whole program made (or another tensor accepted so).

        Returns:
            What to run, what is accepted, and whose kernel is the plain program's.
        """
        stops = {port: name for port, name in self._source.tensors.items() if name in known}
        stops |= {c.port: c.tensor for c in (*missing, *observed)}
        apart = {c.port for c in missing}
        twins = Twins(self._program, self._candidates)
        cuts: list[Cut] = []
        known = dict(known)
        faithful: list[Candidate] = []
        copy = Copy(self._source)
        for levels in self._together(self._levels(missing, stops), stops):
            together = self._cut_out([c for level in levels for c in level], stops, copy)
            for level in levels:
                parts = defaultdict(list)
                for candidate in level:
                    cut = self._faithful(candidate, together, twins, stops, apart)
                    parts[cut or together].append(candidate)
                    faithful += [candidate] if cut else []
                for cut, wanted in parts.items():
                    known |= cut.run(known, wanted)
                    cuts.append((cut, tuple(wanted)))
        reading = self._readers()
        readers = {c: reading.get(c.maker, set()) for c in faithful}
        # One reader each is proof enough; one that sums over its input is the worst, because
        # its own rounding depends on the layout it is given.
        lossy = {
            max(k.operations) for k in self._program.kernels() if k.operations and k.type in _LOSSY
        }
        witnesses = []
        for makers in readers.values():
            able = [c for c in (*observed, *self._finals) if c.maker in makers]
            witnesses += sorted(able, key=lambda c: (c.maker in lossy, c.port))[:1]
        unique = tuple(dict.fromkeys(witnesses))
        proved = {c.maker for c in self._witnessed(unique, stops, known)}
        for candidate in sorted(readers, key=lambda c: c.port, reverse=True):
            if readers[candidate] & proved:
                proved.add(candidate.maker)
        return cuts, {c for c in readers if c.maker in proved}, readers.keys()

    def _faithful(
        self,
        candidate: Candidate,
        cut: CutOut,
        twins: Twins,
        stops: Mapping[Port, str],
        apart: Collection[Port],
    ) -> CutOut | None:
        """What makes a candidate by the plain program's kernels: ``cut``, or else one kernel more.

        How OpenVINO adds up 8 bits depends on whether a convolution feeds the sum.
        """
        if twins.make(candidate, cut.program):
            return cut
        if candidate.grid is None:
            return None
        before = self._source.needs(candidate.port, stops).intersection(apart)
        for port in sorted(before, reverse=True):
            wider = self._cut_out([candidate], {p: n for p, n in stops.items() if p != port})
            if twins.make(candidate, wider.program):
                return wider
        return None

    def _levels(
        self, missing: Sequence[Candidate], stops: Mapping[Port, str]
    ) -> list[list[Candidate]]:
        """``missing`` in groups, each of which reads tensors of earlier groups only."""
        levels: list[list[Candidate]] = []
        depth: dict[Port, int] = {}
        for candidate in sorted(missing, key=lambda c: c.port):  # operations are in order
            needs = self._source.needs(candidate.port, stops)
            depth[candidate.port] = level = max((depth.get(p, -1) for p in needs), default=-1) + 1
            if level == len(levels):
                levels.append([])
            levels[level].append(candidate)
        return levels

    def _together(
        self, levels: Sequence[list[Candidate]], stops: Mapping[Port, str]
    ) -> Iterator[list[list[Candidate]]]:
        """Levels in a row to compile as one model, which runs once for each of them.

        They share no operation, and are so small that running all of them each time costs less than
        compiling them one by one.
        """
        part: list[list[Candidate]] = []
        size = 0
        used = set[int]()
        for level in levels:
            behind = self._behind(level, stops)
            more = sum(self._elements(c) for c in level)
            if part and ((len(part) + 1) * (size + more) > _TOGETHER or used & behind):
                yield part
                part, size, used = [], 0, set()
            part.append(level)
            size += more
            used |= behind
        if part:
            yield part

    def _elements(self, candidate: Candidate) -> int:
        shape = self._source.shape(candidate.port)
        return math.prod(shape.to_shape()) if shape.is_static else _TOGETHER

    def _witnessed(
        self,
        witnesses: Sequence[Candidate],
        stops: Mapping[Port, str],
        known: Mapping[str, Array],
    ) -> list[Candidate]:
        """Those whose operations, compiled alone, give the captured bits."""
        if not witnesses:
            return []
        cut = self._cut_out(witnesses, stops)
        values = cut.run(known, witnesses)
        return [c for c in witnesses if same_bits(values[c.tensor], known[c.tensor])]

    def _near(
        self,
        candidate: Candidate,
        observed: Sequence[Candidate],
        known: Mapping[str, Array],
        copy: Copy,
    ) -> CutOut | None:
        """Compile the last few kernels on the way to ``candidate``, fed with captured values.

        Accepted when they are the plain program's, in its layouts (a kernel alone may be given
        another, and a sum then rounds otherwise), read the same precisions, and every probe among
        them gives the captured bits.
        """
        near = {candidate.maker}
        rim = [self._maker(candidate)]
        for _ in range(_NEAR - 1):
            rim = [p for k in rim for p in self._program.parents(k) if p.operations]
            near |= {max(k.operations) for k in rim}
        stops = {c.port: c.tensor for c in observed if c.maker not in near}
        checks = [c for c in observed if c.maker in near]
        if not checks:
            return None
        cut = self._cut_out((*checks, candidate), stops, copy)
        plain = {kernel.key: kernel for kernel in self._program.kernels()}
        for kernel in cut.program.reach([candidate.probe]):
            twin = plain.get(kernel.key)
            if twin is None or twin.layouts != kernel.layouts:
                return None
            if cut.program.reading(kernel) != self._program.reading(twin):
                return None
            read = Counter(p.end for p in cut.program.sources(kernel))
            if not read <= Counter(p.end for p in self._program.sources(twin)):
                return None
        return self._checked(cut, checks, known)

    def _cone(
        self, candidate: Candidate, observed: Sequence[Candidate], known: Mapping[str, Array]
    ) -> CutOut | None:
        """Compile the whole ancestor cone of ``candidate`` without what follows it.

        Accepted when its kernels are the plain program's and every upstream probe in it gives
        the captured bits.
        """
        maker = self._maker(candidate)
        upstream = {max(k.operations) for k in self._program.reach([maker.name]) if k.operations}
        checks = [c for c in observed if c.maker in upstream]
        cut = self._cut_out((*checks, candidate), {})
        cone = self._program.fingerprint([maker.name])
        if cut.program.fingerprint([candidate.probe]) != cone:
            return None
        return self._checked(cut, checks, known)

    def _maker(self, candidate: Candidate) -> Executed:
        return next(k for k in self._program.kernels() if candidate.maker in k.operations)

    def _checked(
        self, cut: CutOut, checks: Sequence[Candidate], known: Mapping[str, Array]
    ) -> CutOut | None:
        """A cut-out, if what it makes of ``checks`` are the captured bits."""
        values = cut.run(known, checks)
        return cut if all(same_bits(values[c.tensor], known[c.tensor]) for c in checks) else None

    def _readers(self) -> dict[int, set[int]]:
        """By operation, the makers (see ``Candidate``) of the kernels that read what it makes.

        What makes no tensor of the ONNX graph is seen through.
        """
        known = {c.maker for c in (*self._candidates, *self._finals)}
        readers: dict[int, set[int]] = {}
        for kernel in reversed(self._program.kernels()):
            made = max(kernel.operations, default=-1)
            makers = {made} if made in known else readers.get(made, {made})
            for parent in self._program.parents(kernel) if kernel.operations else ():
                for number in parent.operations:
                    readers.setdefault(number, set()).update(makers)
        return readers

    def _cut_out(
        self,
        targets: Sequence[Candidate],
        stops: Mapping[Port, str],
        copy: Copy | None = None,
    ) -> CutOut:
        """Compile what makes ``targets`` from the tensors ``stops`` and the model's inputs.

        ``copy`` lends its operations to several cut-outs as long as they share none.
        """
        import openvino as ov
        from openvino import opset13 as opset

        needed = self._behind(targets, stops)
        ops = (copy or Copy(self._source)).lend(needed)
        # What is widened from 8 bits is fed as these: else the engine does not compute in 8 bits.
        grids = {c.tensor: c.grid for c in self._candidates if c.grid and c.port in stops}
        names: list[str] = []
        parameters: list[Any] = []
        seen: set[int] = set()
        for target in targets:
            # A second reader of a parameter would keep the engine from overwriting it in place:
            # each target has its own.
            values: dict[Port, Any] = {}
            todo = [target.written[0]]
            while todo:
                number = todo.pop()
                if number in seen:
                    continue
                seen.add(number)
                for index, port in enumerate(self._source.inputs(number)):
                    entry = self._source.type(port[0]) == "Parameter"
                    if not entry and port not in stops:
                        todo.append(port[0])
                        continue
                    if port not in values:
                        element = self._source.element_type(port)
                        names.append(self._source.tensors[port] if entry else stops[port])
                        grid = None if entry else grids.get(names[-1])
                        held = element if entry or element not in FLOATS else "f32"
                        held = grid.element if grid else held
                        made = opset.parameter(self._source.shape(port), _ov_type(held))
                        parameters.append(made)
                        if grid:
                            made = _widened(made, [ops[step] for step in grid.steps])
                        elif held != element:
                            made = opset.convert(made, _ov_type(element))
                        values[port] = made.output(0)
                    ops[number].input(index).replace_source_output(values[port])
        results = [_result(ops, c) for c in targets]
        session, program = self._compiled(ov.Model(results, parameters, "apart"))
        return CutOut(session, program, tuple(names), tuple(targets), grids)

    def _behind(self, targets: Sequence[Candidate], stops: Mapping[Port, str]) -> set[int]:
        """The operations that make ``targets`` from ``stops`` and the model's inputs."""
        found = {target.written[0] for target in targets}
        todo = list(found)
        while todo:
            for port in self._source.inputs(todo.pop()):
                entry = self._source.type(port[0]) == "Parameter"
                if not entry and port not in stops and port[0] not in found:
                    found.add(port[0])
                    todo.append(port[0])
        return found

    def _compiled(self, model: Any) -> tuple[Session, Program]:
        try:
            compiled = self._compile(model)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO failed to compile the model with probes: {reason_of(error)}",
                stage="instrument",
            ) from error
        return Session(compiled), Program(compiled, self._source)


def _result(ops: Mapping[int, Any], candidate: Candidate) -> Any:
    """A Result in the precision that the program holds: another would change the program."""
    from openvino import opset13 as opset

    number, index = candidate.written
    port = ops[number].output(index)
    element = port.get_element_type().get_type_name()
    narrow = candidate.written != candidate.port  # the program holds it as its 8 bits
    if candidate.precision in FLOATS and candidate.precision != element and not narrow:
        made = opset.convert(port, _ov_type(candidate.precision))
        # In a half-precision model that the program widens nothing is left of it but its name.
        made.set_friendly_name(ops[number].get_friendly_name())
        port = made.output(0)
    result = opset.result(port)
    result.set_friendly_name(candidate.probe)
    return result


def _widened(integers: Any, steps: Sequence[Any]) -> Any:
    """The same operations on other integers; under their names, by which kernels are told."""
    from openvino import opset13 as opset

    made = integers
    for step in steps:
        if step.get_type_name() == "Convert":
            made = opset.convert(made, step.get_element_type())
        else:
            combine = opset.subtract if step.get_type_name() == "Subtract" else opset.multiply
            made = combine(made, step.input_value(1))
        made.set_friendly_name(step.get_friendly_name())
    return made


def _ov_type(name: str) -> Any:
    import openvino as ov

    return getattr(ov.Type, name if name != "bool" else "boolean")


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
            ov = _import()
            core = ov.Core()
            ids = sorted(core.available_devices, key=lambda d: d != _DEFAULT_DEVICE)
            devices = tuple(
                Device("" if d == _DEFAULT_DEVICE else d, core.get_property(d, "FULL_DEVICE_NAME"))
                for d in ids
            )
        except (ImportError, OSError, RuntimeError) as error:
            return Availability(
                False,
                self.title,
                reason=f"openvino cannot be imported: {reason_of(error)}",
                remedy="Install it: pip install 'sysnoise-auditor[ov]'.",
            )
        return Availability(True, self.title, _version(ov), devices)

    def script(self, device: str | None, threads: int | None, options: Mapping[str, str]) -> Script:
        """The same properties on the same device."""
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
        ov = _import()
        core = ov.Core()
        device = _device(core, request.device)
        quantise, request = _int8.asked(request)
        properties: dict[str, Any] = dict(_checked(core, device, request.options))
        if request.threads is not None:
            properties["INFERENCE_NUM_THREADS"] = request.threads
        if request.kept:
            _keep(core, request, device)
        quantised = None
        if quantise:
            path = request.workdir / "int8.xml"
            quantised = _ov_int8.write(_read(core, request), request, path)
            request = replace(request, artifact=path)
        with ThreadPoolExecutor(1) as pool:
            # Reading the names overlaps with OpenVINO's own work.
            reading = pool.submit(_onnx_names, request.model_path)
            notes: list[str] = []
            model = _read(core, request, notes)
            inputs, outputs, nodes, inner = reading.result()
        if request.artifact is not None:
            _require_same(model, inputs, outputs, request.artifact)
        source = Source(model, nodes, inner)
        notes += _narrowed(source) if device == _DEFAULT_DEVICE else ()
        if request.artifact is not None:
            notes.append(_stored(model, request.artifact))
        if quantised:
            notes.insert(0, quantised.note)

        def compile_model(changed: Any) -> Any:
            return core.compile_model(changed, device, properties)

        try:
            compiled = compile_model(model.clone())
        except RuntimeError as error:
            raise _compile_error(error, request.options, core, model.clone(), device) from error
        effective = {
            name: _text(compiled.get_property(name))
            for name in _REPORTED
            if name in compiled.get_property("SUPPORTED_PROPERTIES")
        }
        precision = effective.get(_PRECISION, "f32")
        session, program = Session(compiled), Program(compiled, source)
        if request.dynamic and not request.open:
            shapes = ", ".join(f"{n}: {'x'.join(map(str, s))}" for n, s in request.shapes.items())
            notes.insert(0, f"The model was compiled at these static shapes: {shapes}.")
        if precision != "f32" and _PRECISION not in request.options:
            notes.insert(
                0,
                f"OpenVINO computes in {precision} by default on this device although the model "
                f"is f32; --option ov.{_PRECISION}=f32 keeps f32.",
            )
        asked = request.options.get(_PRECISION, precision)
        if asked not in (precision, "undefined"):
            notes.insert(0, f"{asked} was asked for; this device computes in {precision} instead.")
        candidates, finals, skipped, foreign = candidates_of(
            source, program, outputs, reduced=precision != "f32"
        )
        if foreign:
            notes.append(
                f"{len(foreign)} of the compiled program's tensors are no tensor of the ONNX graph "
                f"and are audited together with what reads them: {', '.join(foreign)}."
            )
        return _Build(
            provenance=Provenance(
                engine=self.title,
                version=_version(ov),
                device=core.get_property(device, "FULL_DEVICE_NAME"),
                options=({_int8.OPTION: "int8"} if quantised else {})
                | {k: _text(v) for k, v in properties.items()}
                | effective,
                kernels=(
                    *(kernel_of(k, source) for k in program.kernels()),
                    *branches(source, compile_model, notes),
                ),
                notes=tuple(notes),
            ),
            _compile=compile_model,
            _source=source,
            _session=session,
            _program=program,
            _inputs=_inputs(session.inputs, inputs),
            _outputs=_outputs(model, outputs),
            _candidates=tuple(candidates),
            _finals=tuple(finals),
            _skipped=tuple(skipped),
            switches=(
                *((_int8.SWITCH,) if quantised else ()),
                *_switches(compiled, program, request.options),
            ),
            _quantised=quantised,
        )


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


def _import() -> Any:
    """Import openvino without its model converter, which nothing here uses.

    The converter brings openvino_telemetry with it and takes a third of the import's time;
    openvino's own ``__init__`` goes on without it.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    converter = "openvino.tools.ovc"
    sys.modules[converter] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules[converter]
    return openvino


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


def _checked(core: Any, device: str, options: Mapping[str, str]) -> Mapping[str, str]:
    access = core.get_property(device, "SUPPORTED_PROPERTIES")
    known = sorted(name for name, mode in access.items() if mode == "RW")
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name.upper(), known, 3, 0.4) or known
            raise UsageError(
                f"OpenVINO's {device} device has no property {name!r} that can be set",
                f"Closest: {', '.join(close)}.",
            )
    return options


def _onnx_names(path: Path) -> tuple[list[str], list[str], dict[str, str], dict[str, str]]:
    """Input names, output names, and for each tensor the key of the node that makes it.

    Those that nodes of subgraphs make come apart, last, with the names of the nodes too.
    """
    from auditor import weights

    graph = weights.read(path).graph
    inputs = [i.name for i in graph.input]
    inner: dict[str, str] = {}

    def named(nodes: Any) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in nodes:
            names = [name for name in node.output if name]
            found |= dict.fromkeys(names, names[0]) if names else {}
            for body in (a.g for a in node.attribute if a.HasField("g")):
                inner.update(named(body.node))
                inner.update({n.name: n.output[0] for n in body.node if n.name and n.output})
        return found

    nodes = {name: name for name in inputs} | named(graph.node)
    return inputs, [o.name for o in graph.output], nodes, inner


# The two ways in which OpenVINO's ONNX front end lists what it cannot convert.
_UNCONVERTED = re.compile(
    r"(?:No conversion rule found for operations?|Conversion is failed for): (.+)"
)


def _require_same(
    model: Any, inputs: Sequence[str], outputs: Sequence[str], artifact: Path
) -> None:
    """Refuse a file that was not made of the ONNX model.

    Raises:
        BackendError: an input or an output is missing, or stands elsewhere.
    """
    for what, ports, names in (
        ("input", model.inputs, inputs),
        ("output", model.outputs, outputs),
    ):
        for position, name in enumerate(names):
            if position >= len(ports) or name not in ports[position].get_names():
                has = ", ".join(min(port.get_names(), default="?") for port in ports)
                raise BackendError(
                    f"{artifact.name} has no {what} `{name}` at place {position + 1}; its {what}s: "
                    f"{has}",
                    "Convert the file anew from this ONNX model.",
                )


def _stored(model: Any, artifact: Path) -> str:
    """How the file stores its weights, as a sentence."""
    kinds: dict[str, int] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type().get_type_name()
            if kind.startswith(("f", "bf")) or kind in ("i8", "u8", "i4", "u4"):
                kinds[kind] = kinds.get(kind, 0) + 1
    said = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    return f"{artifact.name} was loaded instead of compiling the ONNX file; its constants: {said}."


def _read(core: Any, request: BuildRequest, notes: list[str] | None = None) -> Any:
    """The model as OpenVINO reads it, at the request's shapes; ``notes`` gets what is to be said.

    Some models convert only where the shapes are known from the start: what depends on them, an If
    for instance, has no rank before.
    """
    shapes = request.shapes if request.dynamic and not request.open else {}
    try:
        model = core.read_model(request.artifact or request.model_path)
        names = {name for port in model.inputs for name in port.get_names()}
        if shapes:
            model.reshape({n: list(s) for n, s in shapes.items() if n in names})
        return model
    except RuntimeError as error:
        if shapes and request.artifact is None:
            with contextlib.suppress(Exception):  # the front end's errors have no other base
                model = _read_at(request.model_path, shapes)
                if notes is not None:
                    notes.append(
                        "OpenVINO converts this model only with the shapes of its inputs given "
                        "beforehand, as openvino.convert_model(..., input=...) does."
                    )
                return model
        if match := _UNCONVERTED.search(str(error)):
            raise BackendError(
                f"OpenVINO has no conversion for {match[1].strip()} as it is used here",
                "Export the model without it, or rewrite it with standard operators.",
            ) from error
        raise BackendError(f"OpenVINO cannot read the model: {reason_of(error)}") from error


def _read_at(path: Path, shapes: Mapping[str, Sequence[int]]) -> Any:
    """The model converted at these shapes of its inputs; raises what the front end does."""
    ov = _import()
    from openvino.frontend import FrontEndManager

    frontend = FrontEndManager().load_by_framework("onnx")
    model = frontend.load(str(path))
    for place in model.get_inputs():
        name = next((n for n in place.get_names() if n in shapes), None)
        if name is not None:
            model.set_partial_shape(place, ov.PartialShape(list(shapes[name])))
    return frontend.convert(model)


def _keep(core: Any, request: BuildRequest, device: str) -> None:
    """Write the model with these nodes in float32 to ``request.artifact``."""
    assert request.artifact is not None
    model = _read(core, replace(request, artifact=None, dynamic=False))
    source = Source(model, *_onnx_names(request.model_path)[2:])
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
    return BackendError(
        f"OpenVINO cannot compile the model: {reason}",
        "Export the operator it names differently, or give another opset version.",
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
    """Which of the engine's results each ONNX output is, by name and else by position."""
    ports = [port.get_names() for port in model.outputs]
    return tuple(
        (name, next((i for i, known in enumerate(ports) if name in known), position))
        for position, name in enumerate(names)
    )


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
