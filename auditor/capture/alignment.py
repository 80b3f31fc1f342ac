"""What a backend shows, by the reference's names: tensors, and the segments between them; kernels.

A tensor is left out where what is known of it says that it is not what its name says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from auditor.capture import naming
from auditor.graphs import model
from auditor.ports import Array, Arrays
from auditor.records.backend import Kernel, Probe, Skipped
from auditor.replays import branches, qdq
from auditor.replays.reference import Reference
from auditor.replays.replay import ReplayError

if TYPE_CHECKING:
    from auditor.capture.recording import Source
    from auditor.graphs.segments import Cut


class Alignment:
    """One backend beside the reference.

    Attributes:
        other_file: whether the engine's tensors may have other shapes under the same names; to be
            said before the first sample.
        constants: what the engine's program has otherwise than the reference; said then, too.
        cuts: the segments, once they were chosen on the first sample.
        probes: what is observed, by the reference's names; ``skipped`` what is not.
    """

    def __init__(self, source: Source, reference: Reference, rename: Mapping[str, str]) -> None:
        """Nothing is cut yet.

        Args:
            source: what the backend was built and probed with.
            reference: the reference model.
            rename: compiled model's tensor names → the reference's.
        """
        self.other_file = False
        self.constants: Arrays = {}
        self.cuts: tuple[Cut, ...] = ()
        self.probes: dict[str, Probe] = {}
        self.skipped: list[Skipped] = []
        self._source = source
        self._reference = reference
        self._rename = rename
        self._reshaped = set[str]()  # tensors that the other file has in another shape
        self._all_kernels: tuple[Kernel, ...] | None = None
        self._by_node: dict[str, list[int]] | None = None  # positions in these, by node key

    # --- tensors -------------------------------------------------------------------------------

    def tensors(self, observed: Arrays) -> Arrays:
        """What was observed, by the reference's names and in its types."""
        named = {self._rename[n]: v for n, v in observed.items() if n in self._rename}
        return self._reference.wide(named)

    def fitted(self, captured: Arrays, base: Arrays) -> Arrays:
        """Tensors in the reference's shapes; what counts as the integers that the model says."""
        return {
            name: value.astype(base[name].dtype)
            if name in base and _floats_for_integers(value, base[name])
            else value
            for name, value in self._shaped(captured, base).items()
        }

    def _shaped(self, captured: Arrays, base: Arrays) -> Arrays:
        return captured | {
            n: captured[n].reshape(base[n].shape) for n in self._reshaped if n in base
        }

    # --- segments ------------------------------------------------------------------------------

    def cut(self, feeds: Arrays, captured: Arrays) -> Arrays:
        """Choose the segments, on the first sample.

        Returns:
            The reference's tensors.

        Raises:
            ReplayError: the reference cannot be run in pieces.
        """
        graph = self._reference.graph
        self.probes = {
            self._rename[p.tensor]: p for p in self._source.probes if p.tensor in self._rename
        }
        self.skipped = list(self._source.skipped)
        self.skipped += [
            Skipped(p.tensor, "has no counterpart in the reference model")
            for p in self._source.probes
            if p.tensor not in self._rename
        ]
        known = {*self.probes, *graph.outputs} & captured.keys()
        base = self._walk(known, feeds)
        inside = self.probes.keys() & base.keys() - set(graph.outputs)
        outputs = [n for n in graph.outputs if n in captured and n in base]
        as_said = all(captured[n].shape == base[n].shape for n in outputs)
        self._reshaped = {  # optimisers write a product of matrices with other axes
            n
            for n in inside
            if captured[n].shape != base[n].shape
            and captured[n].size == base[n].size
            and (
                self.other_file
                or (self.probes[n].inferred and merged(captured[n], base[n]))
                # An axis of one that is lost in between is an error only if outputs lose it too.
                or (as_said and _single(captured[n]) == _single(base[n]))
            )
        }
        captured = self._shaped(captured, base)
        # Of two such tensors one behind the other, the first shows once the second is left out.
        while doubtful := self._doubtful(captured, base):
            for name in [n for n in self.probes if n in doubtful]:  # in the program's order
                self.skipped.append(Skipped(self.probes.pop(name).tensor, doubtful[name]))
            known -= doubtful.keys()
            base = self._walk(known, feeds)
        return base

    def _doubtful(self, captured: Arrays, base: Arrays) -> dict[str, str]:
        """Observed tensors that are not what their names say, and why."""
        graph = self._reference.graph
        inferred = {n for n, probe in self.probes.items() if probe.inferred} | self._reshaped
        held = set[str]()
        doubtful = dict[str, str]()
        if self.other_file:
            held = self.probes.keys() & base.keys() - set(graph.outputs)
            own = {ours for theirs, ours in self._rename.items() if theirs == ours}
            for name in held - own:  # paired by its place in the graph
                if captured[name].shape != base[name].shape:
                    doubtful[name] = "its counterpart in the reference has another size"
        for name in naming.unconfirmed(
            self._reference.replayer, self.cuts, inferred, captured, base, held, self.constants
        ):
            doubtful[name] = "what is computed behind it shows that it is not what its name says"
            if name in inferred:
                doubtful[name] = "its derived name was not confirmed by its values"
        for name in self.probes.keys() & base.keys():
            if base[name].dtype.kind == "f" and captured[name].dtype.kind in "iu":
                # A quantised tensor under the name of what it stands for.
                doubtful[name] = f"the program holds {captured[name].dtype} under its name"
            elif _is_fractional(captured[name], base[name]):
                doubtful[name] = "the program holds fractions under its name"
        for name, grid in qdq.awaited(graph.proto.graph).items():
            # Rounding it once more changes nothing: what is behind shows the same.
            if name not in self.probes or name not in base:
                continue
            if qdq.lies_on(captured[name], grid) and not qdq.lies_on(base[name], grid):
                bits = round(math.log2(grid[2]))
                doubtful[name] = f"the program rounds it to {bits} bits before it has this name"
        return doubtful

    def _walk(self, known: set[str], feeds: Arrays) -> Arrays:
        """Cut the reference at ``known`` tensors and run it, at fewer where a piece cannot run.

        Raises:
            ReplayError: a piece cannot run, and is no larger without its inner boundary.
        """
        graph, replayer = self._reference.graph, self._reference.replayer
        while True:
            self.cuts = graph.cut(known - graph.halves(known))
            try:
                return replayer.walk(self.cuts, feeds)
            except ReplayError as error:
                inner = [n for n in error.inputs if n in self.probes and n not in graph.outputs]
                if known.isdisjoint(inner):
                    self.cuts = ()
                    raise
                known = known.difference(inner)
                for name in inner:
                    probe = self.probes.pop(name)
                    self.skipped.append(Skipped(probe.tensor, f"cannot be cut at: {error.message}"))

    # --- kernels -------------------------------------------------------------------------------

    def kernels(self, cut: Cut) -> tuple[Kernel, ...]:
        """What the engine says it ran for a segment, in execution order, by reference names."""
        kernels = self.all_kernels()
        if self._by_node is None:
            self._by_node = {}
            for position, kernel in enumerate(kernels):
                for node in kernel.nodes:
                    self._by_node.setdefault(node, []).append(position)
        nodes = [self._reference.graph.nodes[i] for i in cut.nodes]
        keys = (*map(model.key, nodes), *branches.inner_names(nodes))
        found = {position for key in keys for position in self._by_node.get(key, ())}
        return tuple(kernels[position] for position in sorted(found))

    def all_kernels(self) -> tuple[Kernel, ...]:
        """Every kernel of the build, by reference names."""
        if self._all_kernels is None:
            kernels = self._source.provenance.kernels if self._source.provenance else ()
            inner = {n: n for n in branches.inner_names(self._reference.graph.nodes)}
            names = {**inner, **self._rename}
            self._all_kernels = tuple(
                replace(
                    kernel,
                    nodes=tuple(names[n] for n in kernel.nodes if n in names),
                    outputs=tuple(self._rename[n] for n in kernel.outputs if n in self._rename),
                )
                for kernel in kernels
            )
        return self._all_kernels


def merged(value: Array, whole: Array) -> bool:
    """Whether one array may be another with axes in front made one, or several, as products have.

    One of as many axes was transposed instead.
    """
    return value.ndim != whole.ndim and value.shape[-1:] == whole.shape[-1:]


def _single(value: Array) -> tuple[int, ...]:
    """A shape without its axes of one."""
    return tuple(size for size in value.shape if size != 1)


def _is_fractional(value: Array, of: Array) -> bool:
    return _floats_for_integers(value, of) and not (value == value.astype(of.dtype)).all()


def _floats_for_integers(value: Array, of: Array) -> bool:
    return value.dtype.kind == "f" and of.dtype.kind in "iu"
