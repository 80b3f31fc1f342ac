"""Tensors that the whole program cannot show: their kernels, compiled apart and proved."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

from auditor.errors import BackendError
from auditor.ports import Array
from backends._ov_program import Candidate, Executed, Twins
from backends._ov_session import Cut, CutOut, Plain, element_type, result, same_bits
from backends._ov_source import FLOATS, Copy, Port

# Kernels in a row that make a tensor; where the first prove nothing, more or its whole cone may.
_NEAR, _FURTHER = 3, 8
_CONES = 16  # compilations at most of whole ancestor cones
_REFUSALS = 2  # at most so many more that prove nothing than that do, and tensors in a row given up
# Elements of tensors that kernels compiled apart may make beyond what they are compiled for.
_TOGETHER = 1 << 18
_LOSSY = frozenset({"Reduce", "Pooling"})


class Apart:
    """Compiles parts of a program alone, and believes what gives the bits of the whole."""

    def __init__(self, plain: Plain) -> None:
        self._plain = plain
        self._program, self._source = plain.program, plain.source

    def tensors(
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
        cuts: list[Cut] = []
        found, faithful = set[Candidate](), frozenset[Candidate]()
        with suppress(BackendError):  # the engine need not compile parts of a program
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
                with suppress(BackendError):
                    cut = self._near(candidate, observed, known, copy, _NEAR)
                strayed += 1 if cut is None else -1
            if cut is None and cones < _CONES and not self._maker(candidate).widens:
                cones += 1
                with suppress(BackendError):
                    cut = self._near(candidate, observed, known, copy, _FURTHER)
                if cut is None:
                    with suppress(BackendError):
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
    ) -> tuple[list[Cut], set[Candidate], frozenset[Candidate]]:
        """Compile the kernels that make ``missing``, each fed with captured values.

        A tensor is accepted when its kernel is the plain program's, something that reads it makes
        from it the very bits that the whole program made (or another tensor accepted so), and
        nothing that reads it makes others.

        Returns:
            What to run, what is accepted, and whose kernel is the plain program's.
        """
        stops = {port: name for port, name in self._source.tensors.items() if name in known}
        stops |= {c.port: c.tensor for c in (*missing, *observed)}
        apart = {c.port for c in missing}
        twins = Twins(self._program, self._plain.candidates)
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
        # What sums over its input is the worst witness, because its own rounding depends on the
        # layout it is given: it is asked where nothing else reads a tensor, and never refutes.
        lossy = {
            max(k.operations) for k in self._program.kernels() if k.operations and k.type in _LOSSY
        }
        witnesses = []
        for makers in readers.values():
            able = [c for c in (*observed, *self._plain.finals) if c.maker in makers]
            witnesses += [c for c in able if c.maker not in lossy] or able[:1]
        unique = tuple(dict.fromkeys(witnesses))
        agreeing, refuting = self._witnessed(unique, stops, known, twins)
        proved = _proved(readers, agreeing, refuting - lossy)
        return cuts, {c for c in readers if c.maker in proved}, frozenset(readers)

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
        twins: Twins,
    ) -> tuple[set[int], set[int]]:
        """Their operations compiled alone.

        Returns:
            Makers of those that give the captured bits, and of those that give others although
            their kernels are the plain program's.
        """
        if not witnesses:
            return set(), set()
        cut = self._cut_out(witnesses, stops)
        values = cut.run(known, witnesses)
        agreeing = {c for c in witnesses if same_bits(values[c.tensor], known[c.tensor])}
        refuting = {c.maker for c in witnesses if c not in agreeing and twins.make(c, cut.program)}
        return {c.maker for c in agreeing}, refuting

    def _near(
        self,
        candidate: Candidate,
        observed: Sequence[Candidate],
        known: Mapping[str, Array],
        copy: Copy,
        count: int,
    ) -> CutOut | None:
        """Compile the last ``count`` kernels on the way to ``candidate``, fed with captured values.

        Accepted when they are the plain program's, in its layouts (a kernel alone may be given
        another, and a sum then rounds otherwise), read the same precisions, and every probe among
        them gives the captured bits.
        """
        near = {candidate.maker}
        rim = [self._maker(candidate)]
        for _ in range(count - 1):
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
        """The makers (see ``Candidate``) of the kernels that read what each operation makes.

        What makes no tensor of the ONNX graph is seen through.
        """
        known = {c.maker for c in (*self._plain.candidates, *self._plain.finals)}
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
        grids = {c.tensor: c.grid for c in self._plain.candidates if c.grid and c.port in stops}
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
                        held = grid.held if grid else held
                        made = opset.parameter(self._source.shape(port), element_type(held))
                        parameters.append(made)
                        if grid:
                            made = _widened(made, [ops[s] for s in grid.steps], grid.moved)
                        elif held != element:
                            made = opset.convert(made, element_type(element))
                        values[port] = made.output(0)
                    ops[number].input(index).replace_source_output(values[port])
        results = [result(ops, c) for c in targets]
        session, program = self._plain.compiled(ov.Model(results, parameters, "apart"))
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


def _proved(
    readers: Mapping[Candidate, set[int]], agreeing: Set[int], refuting: Set[int]
) -> set[int]:
    """Makers of what a reader speaks for, or one of it that is proved itself, and none against.

    A reader that makes other bits of several tensors speaks against those that are left once what
    nothing speaks for is gone.
    """
    refuted = set[int]()
    while True:
        proved = set(agreeing)
        for candidate in sorted(readers, key=lambda c: c.port, reverse=True):
            if candidate.maker not in refuted and readers[candidate] & proved:
                proved.add(candidate.maker)
        read = ({c.maker for c in readers if reader in readers[c]} for reader in refuting)
        more = set[int]().union(*(makers for makers in read if makers <= proved))
        if more <= refuted:
            return proved - refuted
        refuted |= more


def _widened(integers: Any, steps: Sequence[Any], moved: int) -> Any:
    """The operations on other integers, under the same names, which kernels are told by.

    ``moved`` is what was added to the integers.
    """
    from openvino import opset13 as opset

    made = integers
    for step in steps:
        if step.get_type_name() == "Convert":
            made = opset.convert(made, step.get_element_type())
            if moved:
                made.set_friendly_name(step.get_friendly_name())
                made = opset.subtract(made, opset.constant(moved, step.get_element_type()))
                moved = 0
        else:
            combine = opset.subtract if step.get_type_name() == "Subtract" else opset.multiply
            made = combine(made, step.input_value(1))
        made.set_friendly_name(step.get_friendly_name())
    return made
