"""What each segment's own error does to the final outputs.

*Ranking*: leave-one-in, the reference with only one segment's introduced error added.
*Book-keeping*: telescoping, the reference with segments 1..k replaced by the backend's tensors;
the differences between successive k sum to the whole divergence exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Container, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from operator import or_

import numpy as np

from auditor.comparison import metrics
from auditor.comparison.metrics import Moments, Running
from auditor.decomposition.divergence import Local, replay
from auditor.decomposition.floor import draws
from auditor.graphs.segments import Cut
from auditor.noises import fp32_rounding
from auditor.ports import Array, Arrays
from auditor.replays.replay import Block, Patch, Replayer, ReplayError, add, difference

CONTROL_NOISE = 1e-3  # relative noise put on the stimulus alone by ``input_control``


@dataclass(frozen=True, slots=True)
class Chain:
    """One backend's cut of the model on one sample.

    Attributes:
        base: the reference's tensors; ``captured``: the backend's; both with the stimulus.
        outputs: the final outputs that segments compute (a constant output has no segment).
        blocks: runs of segments that may be run as one (``Replayer.blocks``).
    """

    replayer: Replayer
    cuts: tuple[Cut, ...]
    feeds: Arrays
    base: Arrays
    captured: Arrays
    outputs: tuple[str, ...]
    blocks: Mapping[str, Block] = field(default_factory=dict)

    def final(self, patches: Mapping[str, Patch]) -> Arrays:
        """The final outputs of the reference with some segments' outputs replaced."""
        return self.replayer.walk(
            self.cuts, self.feeds, self.base, patches, self.outputs, self.blocks
        )

    def following(self, cuts: Sequence[Cut]) -> Arrays:
        """The final outputs of the reference with the backend's tensors up to some segments.

        Args:
            cuts: the segments that remain to be run.
        """
        left = {name for cut in cuts for name in cut.outputs}
        known = {n: self.captured[n] for c in self.cuts for n in c.outputs if n not in left}
        return self.replayer.walk(
            cuts, self.feeds | known, self.base, wanted=self.outputs, blocks=self.blocks
        )

    def apart(self, name: str) -> Moments:
        """How far the backend's tensor is from the reference's."""
        found = Moments()
        found.add(self.captured[name], self.base[name])
        return found

    def pick(self, values: Arrays) -> Arrays:
        """The final outputs among ``values``."""
        return {name: values[name] for name in self.outputs}


def leave_one_in(chain: Chain, cut: Cut, local: Local) -> tuple[float, Arrays]:
    """What only this segment's introduced error does to the final outputs.

    Returns:
        Their relative L2, and the outputs themselves. Infinity and nothing when the reference
        cannot go on from that tensor (a wrong shape).
    """
    patch = frozen(local.error, local.observed)
    try:
        values = chain.final({cut.id: patch})
    except ReplayError:
        return math.inf, {}
    return metrics.relative_l2(values, chain.base, chain.outputs), values


def deciding(chain: Chain) -> Cut | None:
    """The segment from which on NaN or infinity differ in the final outputs.

    It is found by halving: the reference goes on from the backend's tensors up to some segment. An
    error far below any norm is enough, such as a zero for 1e-42 of which a logarithm is taken.

    Returns:
        None where NaN and infinity are the same in both, where that segment does what the
        reference does or draws random numbers, and where rounding its result would do as much.

    Raises:
        ReplayError: the reference cannot go on from the backend's tensors.
    """

    def odd(values: Arrays) -> bool:
        return math.isinf(metrics.relative_l2(values, chain.base, chain.outputs))

    if not odd(chain.pick(chain.captured)):
        return None
    position = bisect_left(
        range(1, len(chain.cuts)), True, key=lambda k: odd(chain.following(chain.cuts[k:]))
    )
    cut = chain.cuts[position]
    if draws(chain.replayer.graph.nodes[i] for i in cut.nodes):
        return None
    local = replay(chain.replayer, cut, chain.captured)
    if metrics.bitwise_equal(local.observed, local.replayed):
        return None
    generator = np.random.default_rng(0)
    rounded = {n: fp32_rounding.jitter(v, generator) for n, v in local.replayed.items()}
    patch = frozen(difference(rounded, local.replayed), local.observed)
    return None if odd(chain.final({cut.id: patch})) else cut


def shows(chain: Chain, cut: Cut, local: Local) -> bool:
    """Whether a segment's error alone moves the final outputs further than rounding does.

    Of booleans and texts any other one does, of integers one further off than sums in float32 are.
    """
    patch = frozen(difference(local.observed, local.replayed), local.observed)
    try:
        moved = chain.final({cut.id: patch})
    except ReplayError:  # such as an index that is out of range
        return True
    if any(_is_another(moved[name], chain.base[name]) for name in chain.outputs):
        return True
    return metrics.relative_l2(moved, chain.base, chain.outputs) > fp32_rounding.floor(0.0)


def _is_another(moved: Array, base: Array) -> bool:
    """Whether an output that is not real holds another value, beyond rounding in float32."""
    if base.dtype.kind in "iu" and moved.shape == base.shape:
        close = np.isclose(moved.astype(float), base.astype(float), fp32_rounding.floor(0.0), 0)
        return not close.all()
    return base.dtype.kind not in "fcV" and not np.array_equal(moved, base)


def telescope(
    chain: Chain, groups: Sequence[Sequence[Cut]], exact: Container[str] = ()
) -> list[float]:
    """Share of the final difference that enters with each group of segments.

    Args:
        chain: the backend's chain.
        groups: all its segments in topological order, split into consecutive groups.
        exact: ids of segments that do just what the reference does: nothing enters with them.

    Returns:
        One share per group; they sum to 1 up to rounding. NaN where the divergence is zero or
        the reference cannot follow the backend's tensors.
    """
    whole = difference(chain.pick(chain.captured), chain.pick(chain.base))
    shares: list[float] = []
    before = chain.pick(chain.base)
    adds = [any(cut.id not in exact for cut in group) for group in groups]
    rest = ([c for group in groups[k:] for c in group] for k, more in enumerate(adds, 1) if more)
    afters = chain.replayer.walking(chain.following, rest)
    try:
        for more in adds:
            after = next(afters) if more else before
            part = difference(after, before)
            shares.append(metrics.projection(part, whole, chain.base, chain.outputs))
            before = after
    except ReplayError:
        return [math.nan] * len(groups)
    return shares


@dataclass(frozen=True, slots=True)
class Books:
    """Where a backend's whole divergence came from; the three parts sum to 1.

    Attributes:
        named: share by noise.
        unexplained: share of the flagged segments' errors that no noise reproduced.
        rounding: share that remains when every flagged segment is repaired.
    """

    named: dict[str, float]
    unexplained: float
    rounding: float


@dataclass(frozen=True, slots=True)
class Parts:
    """The final difference taken apart: what each step of switching causes on adds to the outputs.

    Attributes:
        named: by noise; ``rest``: the flagged segments' errors that no noise reproduced. What is
            missing to the whole difference is rounding.
    """

    named: dict[str, Arrays]
    rest: Arrays | None


def parts_by_category(
    chain: Chain, flagged: Mapping[str, Local], explained: Mapping[str, Mapping[str, Arrays]]
) -> Parts:
    """What each noise adds to the final outputs.

    Noises are switched on one after another: a flagged segment's output is the reference's plus
    the part of its frozen error that replaying those noises reproduced. Then the rest of the
    flagged errors is switched on, and what is still missing is rounding everywhere else.

    Args:
        chain: the backend's chain.
        flagged: by id, the local divergence of every segment above its floor.
        explained: by noise, then by segment id: the reproduced part of the segment's error.

    Raises:
        ReplayError: the reference cannot follow the errors.
    """
    if not flagged:
        return Parts({}, None)

    def switched_on(errors: Mapping[str, Arrays]) -> Arrays:
        return chain.final({s: frozen(e, flagged[s].observed) for s, e in errors.items()})

    whole = {s: local.error for s, local in flagged.items()}
    steps = [*accumulate(explained.values(), or_), whole]
    before = chain.pick(chain.base)
    added: list[Arrays] = []
    for after in chain.replayer.walking(switched_on, steps):
        added.append(difference(after, before))
        before = after
    return Parts(dict(zip(explained, added, strict=False)), added[-1])


def booked(
    parts: Parts, whole: Arrays, reference: Arrays, names: tuple[str, ...], *, rounding: bool = True
) -> Books:
    """The share of each part in a whole difference, by projection on it.

    Args:
        parts: what the whole was taken apart into.
        whole: the difference of the final outputs.
        reference: the outputs that it is a difference from.
        names: the final outputs.
        rounding: whether what is missing can only be rounding; else nothing explains it.
    """
    shares = {
        noise: metrics.projection(part, whole, reference, names)
        for noise, part in parts.named.items()
    }
    rest = 0.0
    if parts.rest is not None:
        rest = metrics.projection(parts.rest, whole, reference, names)
    missing = 1.0 - sum(shares.values()) - rest
    return Books(shares, rest, missing) if rounding else Books(shares, rest + missing, 0.0)


@dataclass(slots=True)
class Pool:
    """Books of several samples as one, each weighted by its squared divergence.

    For differences that vary by orders of magnitude from sample to sample, as behind a threshold.
    The shares still sum to 1.

    Attributes:
        samples: how many were added.
        named, unexplained, rounding: weighted sums; ``share`` divides them.
    """

    samples: int = 0
    named: dict[str, float] = field(default_factory=dict)
    unexplained: float = 0.0
    rounding: float = 0.0
    _weight: float = 0.0

    def add(self, books: Books, whole: float) -> None:
        """Add one sample's books; ``whole`` is the relative L2 that they divide."""
        if not math.isfinite(books.unexplained + books.rounding + whole) or whole == 0:
            return
        weight = whole * whole
        self.samples += 1
        self._weight += weight
        for noise, share in books.named.items():
            self.named[noise] = self.named.get(noise, 0.0) + weight * share
        self.unexplained += weight * books.unexplained
        self.rounding += weight * books.rounding

    def share(self, part: float) -> float:
        """One of the sums as a share; 0 where no sample diverged."""
        return part / self._weight if self._weight else 0.0


@dataclass(slots=True)
class Ledger:
    """Books and telescoping shares as means over samples.

    Attributes:
        named, unexplained, rounding: the parts of ``Books``; each sample's sum to 1, and so do
            their means.
        groups: the segments booked together, in order, the same on every sample.
        shares: the mean share of each group.
    """

    groups: tuple[tuple[Cut, ...], ...]

    named: dict[str, Running] = field(default_factory=dict)
    unexplained: Running = field(default_factory=Running)
    rounding: Running = field(default_factory=Running)
    shares: tuple[Running, ...] = ()

    def __post_init__(self) -> None:
        self.shares = tuple(Running() for _ in self.groups)

    def book(self, books: Books, sample: int) -> None:
        """Add one sample's books; those that could not be kept (NaN) do not count."""
        if not math.isfinite(books.unexplained + books.rounding):
            return
        for noise in books.named.keys() - self.named.keys():
            self.named[noise] = Running()
            for earlier in range(self.unexplained.count):
                self.named[noise].add(0.0, earlier)
        for noise, running in self.named.items():
            running.add(books.named.get(noise, 0.0), sample)
        self.unexplained.add(books.unexplained, sample)
        self.rounding.add(books.rounding, sample)

    def telescope(self, chain: Chain, sample: int, exact: Container[str] = ()) -> None:
        """Add one sample's shares; those that are not finite do not count."""
        found = telescope(chain, self.groups, exact)
        if all(map(math.isfinite, found)):
            for running, share in zip(self.shares, found, strict=True):
                running.add(share, sample)


def grouped(cuts: Sequence[Cut], alone: Set[str]) -> tuple[tuple[Cut, ...], ...]:
    """Consecutive segments, those in ``alone`` by themselves and the stretches between joined."""
    groups: list[list[Cut]] = []
    for cut in cuts:
        if groups and alone.isdisjoint((cut.id, groups[-1][-1].id)):
            groups[-1].append(cut)
        else:
            groups.append([cut])
    return tuple(map(tuple, groups))


def input_control(chain: Chain, clean: Arrays) -> float | None:
    """How much the reference itself amplifies noise on the stimulus alone.

    Relative L2 of the outputs over ``CONTROL_NOISE``; None where no input is floating point.
    """
    generator = np.random.default_rng(0)
    if not any(v.dtype.kind == "f" for v in chain.feeds.values()):
        return None
    noisy = {
        name: _noisy(v, generator) if v.dtype.kind == "f" else v for name, v in chain.feeds.items()
    }
    values = chain.replayer.walk(chain.cuts, noisy, wanted=chain.outputs)
    return metrics.relative_l2(values, clean, chain.outputs) / CONTROL_NOISE


def _noisy(value: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A tensor with relative noise, but for numbers so large that it would make them infinite."""
    factors = 1 + CONTROL_NOISE * generator.standard_normal(value.shape)
    with np.errstate(over="ignore"):
        noisy = value * factors.astype(value.dtype)
    return np.where(np.isfinite(noisy), noisy, value)


def frozen(error: Arrays, observed: Arrays) -> Patch:
    """Adds one segment's error to its outputs, whatever its inputs are."""
    return lambda outputs, _: add(outputs, error, observed)
