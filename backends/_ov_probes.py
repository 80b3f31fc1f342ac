"""The whole program with as many probes as leave it what it is: compiled, compared, bisected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from auditor.errors import BackendError
from auditor.ports import Array
from backends._ov_program import Candidate, Executed, Program
from backends._ov_session import Plain, Session, result, same_bits
from backends._ov_source import FLOATS, MOVEMENT

_FUSING = frozenset({"Convolution", "Deconvolution"})
_NARROW = frozenset({"bf16", "f16"})
_RETRIES = 6  # compilations that drop what a lost kernel depends on, before bisecting
_RINGS = 4  # kernels in a row away from a lost one, where nothing nearer is observed
_DOUBTS = 2  # times that the plain program is compiled anew, where probes changed outputs alone
_BISECTIONS = 16  # compilations at most when bisecting
_MORE = 2  # and for what is observed beside, at most


@dataclass(frozen=True, slots=True)
class Trial:
    """A compilation of the whole model with probes.

    Attributes:
        suspects: makers of the tensors whose probes may have changed the program.
        proved: whether it is the plain program and gave the same outputs, bit by bit.
        aside: probes whose tensor is computed for the probe alone.
        shown: tensors that a probe shows in another shape, as they are read.
        repeats: whether the plain program, compiled again, gives its outputs' bits.
    """

    session: Session
    probes: tuple[Candidate, ...] = ()
    suspects: frozenset[int] = frozenset()
    proved: bool = False
    aside: frozenset[Candidate] = frozenset()
    shown: frozenset[Candidate] = frozenset()
    repeats: bool = True


class Probing:
    """The search for probes that change nothing, on one stimulus."""

    def __init__(self, plain: Plain, feeds: Mapping[str, Array]) -> None:
        """Run the plain program, whose outputs every other is compared with."""
        self._plain = plain
        self._program, self._source = plain.program, plain.source
        self._feeds = feeds
        self._expected, _ = plain.capture(plain.session, (), feeds)
        self._doubts = _DOUBTS
        self._changing: dict[frozenset[object], Trial] = {}  # what was compiled in vain

    def observe(self) -> Trial:
        """Compile with as many probes as leave the program unchanged.

        Raises:
            BackendError: the engine failed.
        """
        overwritten = {
            p for k in self._program.kernels() for p in self._source.operands(k.operations)
        }
        # A kernel that also widens 8 bits is another one where these are observed.
        leave = self._altering() | {
            c.maker for c in self._plain.candidates if c.grid and c.maker in c.grid.steps
        }
        kept = [
            c.whole
            for c in self._plain.candidates
            if (c.maker, 0) not in overwritten and c.maker not in leave
        ]
        try:
            return self._observed(kept)
        except _DiffersAnewError:
            return Trial(self._plain.session, proved=True, repeats=False)

    def _observed(self, kept: Sequence[Candidate]) -> Trial:
        trial = self._shrink([c for c in kept if not c.midway])
        lost = [c for c in kept if not c.midway and c not in trial.probes]
        trial = self._with(trial, [c for c in kept if c.midway])
        return self._as_read(trial, lost)

    def _shrink(self, kept: Sequence[Candidate]) -> Trial:
        """Leave out of ``kept`` what changes the program.

        Where it was moved to, it is observed along with the rest: a compilation of its own would
        cost as much as any. What may do harm there is left out first, and tried again in the end.
        """
        moved: list[Candidate] = []
        for _ in range(_RETRIES):
            trial = self._try((*kept, *moved))
            if trial.proved:
                return trial
            harmless = self._outside(moved, trial.suspects)
            if len(harmless) < len(moved):
                moved = harmless
                continue
            suspects = self._with_sums(trial.suspects)
            for _ in range(_RINGS):
                if any(c.maker in suspects for c in kept):
                    break
                suspects = self._around(suspects)
            fewer = [c for c in kept if c.maker not in suspects]
            if len(fewer) in (0, len(kept)):
                if not moved:
                    break
                moved, fewer = [], [*kept]
            moved += [m for c in kept if c.maker in suspects and (m := self._moved(c))]
            kept = fewer
        return self._bisect(kept)

    def _as_read(self, trial: Trial, lost: Sequence[Candidate]) -> Trial:
        """Observe what is ``lost`` where it was moved to, and only that is read.

        OpenVINO makes one transposition of two, that after a recurrent layer and the model's own:
        what lies between them is nowhere in the program.
        """
        moved = {c: later for c in lost if (later := self._moved(c))}
        more = self._with(trial, [c for c in moved.values() if c not in trial.probes])
        return replace(more, shown=frozenset(c for c in moved if moved[c] in more.probes))

    def _with(self, trial: Trial, more: Sequence[Candidate]) -> Trial:
        """Observe as many of ``more`` beside as leave the program what it is."""
        for _ in range(_MORE if more else 0):
            wider = self._try((*trial.probes, *more))
            if wider.proved:
                return wider
            fewer = self._outside(more, wider.suspects)
            if len(fewer) in (0, len(more)):
                break
            more = fewer
        return trial

    def _outside(self, probes: Sequence[Candidate], suspects: frozenset[int]) -> list[Candidate]:
        """The probes made by kernels that make nothing that is suspected."""
        kernels = (frozenset(k.operations) for k in self._program.kernels())
        lost = frozenset[int]().union(*(k for k in kernels if k & suspects))
        return [c for c in probes if c.maker not in lost]

    def _moved(self, candidate: Candidate) -> Candidate | None:
        """The last tensor that a candidate only was moved to, and that the program holds.

        None where there is none.
        """
        finals = {c.port for c in self._plain.finals}
        held = {n for k in self._program.kernels() if k.type in MOVEMENT for n in k.operations}
        port, path, found = candidate.port, candidate.path, None
        while (onward := self._source.onward(port)) and onward not in finals:
            port, path = onward, (*path, onward[0])
            if port[0] in held:
                found = replace(candidate, tensor=self._source.tensors[port], port=port, path=path)
        return found

    def _altering(self) -> set[int]:
        """Makers of tensors whose observation is known to change the program.

        OpenVINO makes a reduction compute in the type in which its result is asked for, and what it
        reads with it. An element-wise kernel that was left alone to be fused with a convolution,
        and was not in the end, becomes a subgraph where the convolution is observed.
        """
        found = set[int]()
        for kernel in self._program.kernels():
            if kernel.operations and kernel.widens:
                found.add(max(kernel.operations))
            apart = kernel.type == "Eltwise" and kernel.precision in FLOATS
            for parent in self._program.parents(kernel) if apart else ():
                if parent.type in _FUSING and parent.operations:
                    found.add(max(parent.operations))
        return found

    def _with_sums(self, suspects: frozenset[int]) -> frozenset[int]:
        """The suspects, and the sums over what they make.

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
        """The suspects, and what the kernels that read them or feed them make."""
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
        that it no longer has was fused with what reads it. One that is computed in float32 now was
        widened for something observed in that. One of several outputs was split if parts of it are
        kernels of their own now.
        """
        probed = {c.maker for c in probes}
        same = {kernel.key for kernel in changed.kernels()}
        ends = {kernel.end for kernel in changed.kernels() if kernel.type not in MOVEMENT}
        wide = {kernel.end for kernel in changed.kernels() if kernel.precision == "f32"}
        suspects = set[int]()
        for kernel in self._program.kernels():
            if kernel.key in same:
                continue
            widened = kernel.precision in _NARROW and kernel.end in wide
            if widened and (widening := self._widening(kernel, probes)):
                suspects |= widening
                continue
            read = {max(k.operations) for k in self._program.parents(kernel) if k.operations}
            own = {max(kernel.operations)} if kernel.operations else set()
            suspects |= (read & probed or own) if kernel.end in ends else own
        known = {kernel.end for kernel in self._program.kernels()}
        parts = {n for k in changed.kernels() if k.end not in known for n in k.operations}
        split = {
            max(kernel.operations)
            for kernel in self._program.kernels()
            if parts & {*kernel.operations}
        }
        return frozenset(suspects or split & probed) or self._crossed(changed, probed)

    def _widening(self, kernel: Executed, probes: Sequence[Candidate]) -> set[int]:
        """Makers of what is observed in a wider type and needs what ``kernel`` gives or reads.

        OpenVINO may compute a kernel in float32 for such a Result, even if that needs no more than
        its shape, as positions do in a program of open lengths.
        """
        near = (kernel, *self._program.sources(kernel))
        made = {(number, 0) for one in near for number in one.operations}
        return {
            c.maker
            for c in probes
            if c.precision not in _NARROW and self._source.needs(c.port, made)
        }

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

    def _bisect(self, kept: Sequence[Candidate]) -> Trial:
        """Add probes by halves, keeping those that change nothing, within a few compilations."""
        best = self._try(())
        todo = [kept] if kept else []
        for _ in range(_BISECTIONS):
            if not todo:
                break
            part = todo.pop()
            trial = self._try((*best.probes, *part))
            if trial.proved:
                best = trial
            elif len(part) > 1:
                half = len(part) // 2
                todo += [part[half:], part[:half]]
        return best

    def _try(self, probes: Sequence[Candidate]) -> Trial:
        """Compile with ``probes``, and compare with the plain program and its outputs."""
        if not probes:
            return Trial(self._plain.session, proved=True)
        asked = frozenset((c.written, c.precision, c.narrow, c.lifted, c.convolved) for c in probes)
        if asked in self._changing:
            return self._changing[asked]
        model, ops = self._source.clone()
        # The engine numbers operations from the last Result on and fuses in that order: before the
        # model's own, probes leave it as it is.
        own = model.get_results()
        model.add_results([result(ops, c) for c in probes])
        for each in own:
            model.remove_result(each)
        model.add_results(own)
        try:
            session, program = self._plain.compiled(model)
        except BackendError:  # a defect of the engine's: fewer probes may do
            return Trial(self._plain.session)
        results = self._source.results
        expected, made = (p.fingerprint(results) for p in (self._program, program))
        if made != expected:
            # Not its session: the next one would be compiled beside it.
            trial = Trial(self._plain.session, tuple(probes), self._suspects(program, probes))
            self._changing[asked] = trial
            return trial
        proved = self._same(session, probes)
        if not proved and self._doubts:
            self._doubts -= 1
            if not self._same(self._plain.compiled(self._source.clone()[0])[0], ()):
                raise _DiffersAnewError
        return Trial(
            session,
            tuple(probes),
            proved=proved,
            aside=program.aside(probes, results),
        )

    def _same(self, session: Session, probes: Sequence[Candidate]) -> bool:
        """Whether a program gives the plain one's outputs, bit by bit."""
        outputs, _ = self._plain.capture(session, probes, self._feeds)
        return all(same_bits(outputs[name], value) for name, value in self._expected.items())


class _DiffersAnewError(Exception):
    """Compiled again, the plain program itself gives other outputs."""
