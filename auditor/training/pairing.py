"""Pairs the values of another program of the same model with the tensors of its ONNX graph.

The other program is what the model was exported from. It has no ONNX names, its operators are
fused or split otherwise, and where the export is faulty its values differ from the graph's from
there on. So the graph is evaluated node by node, and each result is looked up among the program's
values; where one agrees, *the program's* value goes on to the next node. No error accumulates, and
behind a faulty node the two find each other again:

* ``value``: the graph's node, fed with the program's values, computes this value;
* ``context``: it does not, but the nodes behind it do once they are fed with this value;
* ``name``: neither; the exporter's names say that it is this one (to be confirmed);
* ``position``: a final output, which is known by its position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from auditor.comparison import metrics
from auditor.graphs import model as models
from auditor.graphs.segments import Cut, Graph
from auditor.ports import Array, Arrays
from auditor.records.backend import Origin
from auditor.replays import widening
from auditor.replays.replay import Replayer, ReplayError
from auditor.training import origins

How = Literal["value", "context", "name", "position"]

# Relative L2 up to which two values are certainly the same: no rounding of one node goes beyond.
CERTAIN = 2e-5
# … and up to which one value may be several tensors: what computes one twice. What a node adds or
# scales by less is another value, in spite of its being that close: scores behind a mask of -100.
TWICE = 2e-6
# Up to here they are the same where no node behind computes that value more closely: a product
# before a small bias is added is not the sum. Pairing decides where tensors are compared, not what
# is reported: what such a pair is apart shows as that node's error.
SAME = 1e-3
SAME_NARROW = 1e-2  # in a model of float16 or bfloat16
_CLOSEST = 8  # values that are compared element by element
_TRIED = 8  # values tried in the place of a node's result that was found nowhere,
_AHEAD = 12  # and how many of the nodes behind it are run to see whether it was that one
_RUNS = 4000  # nodes run for that in all
_NEXT = 3  # nodes behind a value that is nearly the same, of which one may fit it better
_CLOSER = 0.9
_PERIOD = 997  # of the weights in a sketch: prime, so that no usual shape divides it
# Nodes that move values about: what follows one of them proves nothing.
_MOVES = frozenset(
    [
        *("Cast", "Concat", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad"),
        *("Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    ]
)
_SHAPES = frozenset(("Shape", "Size"))


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is kept of a value to find it by: its shape, kind, norm and a weighted sum."""

    shape: tuple[int, ...]
    kind: str
    norm: float
    mark: float

    @classmethod
    def of(cls, value: Array) -> Sketch:
        """Sketch a value; non-finite elements count as zero."""
        kind = "i" if value.dtype.kind in "iu" else value.dtype.kind
        flat = metrics.to_float(value).ravel()
        if not np.isfinite(flat).all():
            flat = np.where(np.isfinite(flat), flat, 0)
        whole = len(flat) // _PERIOD * _PERIOD
        folded = flat[:whole].reshape(-1, _PERIOD).sum(axis=0, dtype=np.float64)
        folded[: len(flat) - whole] += flat[whole:]
        norm = float(np.sqrt(np.dot(flat, flat)))
        return cls(tuple(value.shape), kind, norm, float(np.dot(folded, _WEIGHTS)))

    def apart(self, other: Sketch) -> float:
        """How far apart two values of one shape are at least, as far as the sketches say."""
        return max(abs(self.norm - other.norm), abs(self.mark - other.mark))


@dataclass(frozen=True, slots=True)
class Value:
    """One result of an operation of the other program, in the order of execution.

    Attributes:
        sketch: what it looks like.
        operation: what computed it (``aten.conv2d``).
        module, place: where in the training code, as in ``Origin``.
    """

    sketch: Sketch
    operation: str
    module: str
    place: str | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor's value in the other program, by its position there, and how it was found."""

    index: int
    how: How


@dataclass(frozen=True, slots=True)
class Pairing:
    """The result.

    Attributes:
        pairs: by ONNX tensor.
        unpaired: the other tensors that the stimulus decides, with the reason; without those
            that only say what shape another has, which no value stands for in the training code.
        origins: of every node, as far as known.
    """

    pairs: dict[str, Pair]
    unpaired: dict[str, str]
    origins: tuple[Origin, ...]


def pair(
    path: Path,
    feeds: Mapping[str, Array],
    values: Sequence[Value],
    outputs: Mapping[str, int],
    fetch: Callable[[int], Array],
    *,
    threads: int,
    folder: Path,
) -> Pairing:
    """Pair a run of the other program with the model at ``path``.

    Args:
        path: the ONNX file.
        feeds: the inputs of that run, by ONNX name.
        values: what it computed.
        outputs: by ONNX output, the value that it returned for it.
        fetch: the array of a value, by its position in ``values``.
        threads: threads for the nodes of the graph.
        folder: a private folder for temporary files.

    Raises:
        UsageError: the model cannot be read.
    """
    model = models.load(path)
    stated = origins.of(model.proto)
    narrow = widening.is_narrow(model)
    if narrow:
        model = widening.widened(model, folder)
    graph = Graph(model.proto)
    matcher = _Matcher(
        graph,
        Replayer(graph, threads, model.weights, model.folder),
        values,
        fetch,
        {key: origin.module for key, origin in stated.items()},
        SAME_NARROW if narrow else SAME,
        widening.wide(dict(feeds)),
    )
    matcher.walk(matcher.cuts)
    matcher.find_again(outputs)
    for name, index in outputs.items():
        if name in graph.producer and name not in matcher.pairs:
            matcher.pairs[name] = Pair(index, "position")
    return Pairing(matcher.pairs, matcher.unpaired(), tuple(_origins(matcher, stated)))


@dataclass(slots=True)
class _Matcher:
    """Finds the tensors of an ONNX graph among the values that the module computed.

    Attributes:
        graph: the ONNX graph, and ``replayer`` its nodes, ready to run.
        values: what the module computed, in order; ``fetch`` gives the array of one by its index.
        modules: by node key, the module that the exporter states.
        same: relative L2 up to which a tensor and a value are the same.
        feeds: the graph's inputs, by name.
        pairs: what was found, by tensor.
        computed: what was found nowhere, as the graph computes it, by tensor.
        failed: why a tensor could not be computed.
        cuts: the graph's nodes, one a cut, in order.
    """

    graph: Graph
    replayer: Replayer
    values: Sequence[Value]
    fetch: Callable[[int], Array]
    modules: Mapping[str, str]
    same: float
    feeds: Arrays
    pairs: dict[str, Pair] = field(default_factory=dict)
    computed: Arrays = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()
    _dtypes: dict[str, np.dtype[np.generic]] = field(default_factory=dict)
    _by_shape: dict[tuple[str, tuple[int, ...]], list[int]] = field(default_factory=dict)
    _before: dict[str, int] = field(default_factory=dict)  # last value that a tensor rests on
    _shapes: set[str] = field(default_factory=set)
    _taken: set[int] = field(default_factory=set)  # values that are tensors already
    _runs: int = _RUNS

    def __post_init__(self) -> None:
        for index, value in enumerate(self.values):
            key = (value.sketch.kind, value.sketch.shape)
            self._by_shape.setdefault(key, []).append(index)
        for index, node in enumerate(self.graph.nodes):
            reads = [n for n in self.graph.reads[index] if not self.graph.is_constant(n)]
            if node.op_type in _SHAPES or (reads and all(n in self._shapes for n in reads)):
                self._shapes.update(name for name in node.output if name)
        every = [n for n in self.graph.producer if not self.graph.is_constant(n)]
        self.cuts = self.graph.cut(every)

    def walk(self, cuts: Iterable[Cut]) -> int:
        """Evaluate nodes in order, looking up what is not paired; how many were found."""
        found = 0
        for cut in cuts:
            wanted = [name for name in cut.outputs if name not in self.pairs]
            if not wanted:
                continue
            try:
                results = self.replayer.run(cut, _Lookup(self, cut.inputs))
            except (ReplayError, KeyError) as error:
                reason = error.message if isinstance(error, ReplayError) else "not reached"
                self.failed.update(dict.fromkeys(wanted, reason))
                continue
            before = max((self._before.get(n, -1) for n in cut.inputs), default=-1)
            for name in wanted:
                self.failed.pop(name, None)
                self._dtypes[name] = results[name].dtype
                self.computed[name], self._before[name] = results[name], before
                match = self._look_up(name, results[name], before)
                if match is not None and not self._fits_better_behind(name, *match):
                    self._take(name, Pair(match[0], "value"))
                    found += self._op(name) not in _MOVES
        return found

    def _fits_better_behind(self, name: str, index: int, distance: float) -> bool:
        """Whether a node behind a tensor computes that value more closely than the tensor is."""
        if distance <= CERTAIN:
            return False
        local = {name: self.computed[name]}
        for cut in self._behind(name)[:_NEXT]:
            try:
                results = self.replayer.run(cut, _Lookup(self, cut.inputs, local))
            except (ReplayError, KeyError):
                continue
            for result in results.values():
                if result.shape == self.values[index].sketch.shape:
                    closer = metrics.distance(self.fetch(index), result).relative_l2
                    if closer < _CLOSER * distance:
                        return True
            local |= results
        return False

    def find_again(self, outputs: Mapping[str, int]) -> None:
        """Find the results of faulty nodes: those behind which nothing was found any more."""
        tried = set[str]()
        while self._runs > 0:
            lost = self._lost(outputs)
            name = next((c for cut in self.cuts for c in cut.outputs if c in lost - tried), None)
            if name is None:
                return
            tried.add(name)
            behind = self._behind(name)
            for index in self._candidates(name):
                if self._leads_on(name, index, behind):
                    self._take(name, Pair(index, "context"))
                    self.walk(behind)
                    break
            else:
                self._take_by_name(name, behind)

    def unpaired(self) -> dict[str, str]:
        """The reason for every tensor without a pair."""
        reasons = {}
        for name in (n for cut in self.cuts for n in cut.outputs):
            if name in self.pairs or name in self._shapes:
                continue
            module = self.modules.get(self._key(name), "")
            inside = f", inside `{module}`" if module else ""
            reasons[name] = self.failed.get(name) or f"the module computes no such value{inside}"
        return reasons

    def value(self, name: str) -> Array:
        """A tensor as the other program has it, or as computed from what it has."""
        if name in self.feeds:
            return self.feeds[name]
        if name in self.pairs:
            return self._fetched(name, self.pairs[name].index)
        return self.computed[name]

    def _take(self, name: str, pair: Pair) -> None:
        self.pairs[name] = pair
        self._taken.add(pair.index)
        self.computed.pop(name, None)
        self._before[name] = max(self._before.get(name, -1), pair.index)

    def _fetched(self, name: str, index: int) -> Array:
        return self.fetch(index).astype(self._dtypes[name], copy=False)

    def _look_up(self, name: str, result: Array, before: int) -> tuple[int, float] | None:
        """The value that a result is, if there is one: the closest, then by name, then by order.

        Its position, and how far apart they are.
        """
        sketch = Sketch.of(result)
        limit = self.same * sketch.norm
        near = [
            index
            for index in self._by_shape.get((sketch.kind, sketch.shape), ())
            if abs(self.values[index].sketch.norm - sketch.norm) <= limit
        ]
        near.sort(key=lambda i: self.values[i].sketch.apart(sketch))
        fits = {}
        for index in near[:_CLOSEST]:
            distance = metrics.distance(self.fetch(index), result).relative_l2
            most = TWICE if index in self._taken else self.same
            if distance <= most or (sketch.norm == 0 and distance == 0):
                fits[index] = distance
        if not fits:
            return None
        least = 2 * min(fits.values()) + 1e-7
        module = self.modules.get(self._key(name), "")
        best = min(
            (i for i, distance in fits.items() if distance <= least),
            key=lambda i: (self.values[i].module != module, i < before, i),
        )
        return best, fits[best]

    def _lost(self, outputs: Mapping[str, int]) -> set[str]:
        """Tensors without a pair on the way to outputs that no node computed as they should be."""
        lost = set[str]()
        pending = [name for name in outputs if name in self.graph.producer]
        while pending:
            name = pending.pop()
            if name in lost or name in self.pairs or name in self._shapes:
                continue
            if name in self.graph.producer and not self.graph.is_constant(name):
                lost.add(name)
                pending.extend(self.graph.reads[self.graph.producer[name]])
        return lost

    def _behind(self, name: str) -> tuple[Cut, ...]:
        """The nodes that depend on a tensor, in order."""
        touched, found = {name}, []
        for cut in self.cuts:
            if not touched.isdisjoint(cut.inputs):
                touched.update(cut.outputs)
                found.append(cut)
        return tuple(found)

    def _candidates(self, name: str) -> Iterator[int]:
        """Values that may be a node's result: of its shape, else of its rank and near by."""
        result = self.computed.get(name)
        if result is None:
            return
        sketch, before = Sketch.of(result), self._before.get(name, -1)
        module = self.modules.get(self._key(name), "")
        alike = [i for i in self._by_shape.get((sketch.kind, sketch.shape), ()) if i >= before]
        alike.sort(key=lambda i: (not module or self.values[i].module != module, i))
        yield from alike[:_TRIED]
        if not alike:  # it has another shape there
            rank = len(sketch.shape)
            later = range(max(before, 0), len(self.values))
            near = (
                i
                for i in later
                if len(self.values[i].sketch.shape) == rank
                and self.values[i].sketch.kind == sketch.kind
            )
            yield from (i for i, _ in zip(near, range(_TRIED), strict=False))

    def _leads_on(self, name: str, index: int, behind: Sequence[Cut]) -> bool:
        """Whether the nodes behind a tensor compute the program's values once it is this one."""
        local: Arrays = {name: self._fetched(name, index)}
        for cut in behind[:_AHEAD]:
            if self._runs <= 0:
                return False
            self._runs -= 1
            try:
                results = self.replayer.run(cut, _Lookup(self, cut.inputs, local))
            except (ReplayError, KeyError):
                continue
            for output, result in results.items():
                if output in self.pairs:
                    continue
                self._dtypes.setdefault(output, result.dtype)
                match = self._look_up(output, result, index)
                if match is not None and match[0] > index and self._op(output) not in _MOVES:
                    return True
                local[output] = result
        return False

    def _take_by_name(self, name: str, behind: Sequence[Cut]) -> None:
        """Take what the exporter's names point to, where that is one value."""
        module = self.modules.get(self._key(name), "")
        if not module or self._op(name) in _MOVES or name not in self.computed:
            return
        shape, before = self.computed[name].shape, self._before.get(name, -1)
        own = [
            i
            for i, value in enumerate(self.values)
            if value.module == module and value.sketch.shape == shape and i >= before
        ]
        if len(own) != 1:
            return
        self._take(name, Pair(own[0], "name"))
        if self.walk(behind):
            self.pairs[name] = Pair(own[0], "context")

    def _key(self, name: str) -> str:
        return models.key(self.graph.nodes[self.graph.producer[name]])

    def _op(self, name: str) -> str:
        return str(self.graph.nodes[self.graph.producer[name]].op_type)


class _Lookup(dict[str, Array]):
    """The inputs of one node."""

    def __init__(
        self, matcher: _Matcher, names: Iterable[str], local: Mapping[str, Array] | None = None
    ) -> None:
        """Take them from ``local`` first.

        Raises:
            KeyError: one of them could not be computed.
        """
        local = local or {}
        super().__init__({n: local[n] if n in local else matcher.value(n) for n in names})


def _origins(matcher: _Matcher, stated: Mapping[str, Origin]) -> Iterator[Origin]:
    """Every node's module and line.

    The module that the exporter states comes first: it may have folded the next one into it. Its
    line is where that module was seen to be called. What it calls ``act_1`` is no module where
    that is only the second call of ``act``.
    """
    places: dict[str, str] = {}
    for value in matcher.values:
        if value.place is not None:
            places[value.module] = value.place
    for cut in matcher.cuts:
        key = models.key(matcher.graph.nodes[cut.nodes[-1]])
        known = stated.get(key)
        paired = [matcher.values[matcher.pairs[n].index] for n in cut.outputs if n in matcher.pairs]
        if known is not None and known.module and (known.module in places or not paired):
            seen = next((v.place for v in paired if v.module == known.module), None)
            yield Origin(key, known.module, known.place or seen or places.get(known.module))
        elif paired:
            yield Origin(key, paired[0].module, paired[0].place)


_WEIGHTS = np.random.default_rng(0).standard_normal(_PERIOD)
