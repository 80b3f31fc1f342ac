"""Which segments' errors to follow to the outputs, where there are too many to follow each.

What a segment's error does there is its size times how much of it arrives. The size is known, and
how much arrives changes slowly from one segment to the next of the same operators: so a few that
are spread over the network are followed first, then those that promise most by what arrived of
their neighbours, a few at a time. Every number reported is measured; only the choice is a guess.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

SPREAD = 8  # segments followed at first, and at least one of every kind
ROUND = 4  # … and then at a time
# How far around a segment its neighbours count, as a part of the network (of a Gaussian).
REACH = 0.1
_TINY = 1e-30  # nothing arrives


class Screening:
    """A choice of segments, in rounds: follow those of ``more``, ``add`` what came of each."""

    def __init__(self, kinds: Sequence[Hashable], sizes: Sequence[float], most: int) -> None:
        """Begin.

        Args:
            kinds: of every segment in topological order, what it has in common with its like.
            sizes: of every segment, the norm of its error; what is not finite is followed first.
            most: how many to follow in all.
        """
        named = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        self._kinds = np.asarray([named[kind] for kind in kinds])
        self._sizes = np.nan_to_num(np.asarray(sizes, np.float64), nan=np.inf, posinf=np.inf)
        self._most = most
        self._gains: dict[int, float] = {}  # logarithms
        self._asked = set[int]()

    def more(self) -> list[int]:
        """Positions of the segments to follow next; none when enough are."""
        if self._asked:
            ranked = np.argsort(-self._promise(), kind="stable")
            chosen = [int(i) for i in ranked if int(i) not in self._asked][:ROUND]
        else:
            chosen = [int(i) for i in np.flatnonzero(np.isinf(self._sizes))]
            chosen += [i for i in self._spread() if i not in chosen]
        chosen = chosen[: self._most - len(self._asked)]
        self._asked.update(chosen)
        return chosen

    def add(self, position: int, effect: float) -> None:
        """Say what a segment's error does to the outputs (any norm, the same for all)."""
        size = self._sizes[position]
        if np.isfinite(effect) and 0 < size < np.inf:
            self._gains[position] = float(np.log(max(effect, _TINY) / size))

    def _spread(self) -> list[int]:
        """Choose some segments of every kind, the commonest first, evenly over the network."""
        found: list[int] = []
        kinds, counts = np.unique(self._kinds, return_counts=True)
        for kind in kinds[np.argsort(-counts, kind="stable")]:
            own = np.flatnonzero(self._kinds == kind)
            count = min(len(own), max(1, round(SPREAD * len(own) / len(self._kinds))))
            found += [int(i) for i in own[np.linspace(0, len(own) - 1, count).round().astype(int)]]
        return found

    def _promise(self) -> NDArray[np.float64]:
        """Logarithm of what each segment's error may do."""
        with np.errstate(divide="ignore"):
            sizes = np.log(self._sizes)
        known = np.asarray(sorted(self._gains), np.int64)
        if not len(known):
            return sizes
        gains = np.asarray([self._gains[i] for i in known.tolist()])
        place = np.arange(len(sizes)) / len(sizes)
        result = np.empty(len(sizes))
        for kind in np.unique(self._kinds):
            own = self._kinds == kind
            like = own[known] if own[known].any() else np.ones(len(known), bool)
            away = (place[own][:, None] - place[known[like]]) / REACH
            near = np.exp(-0.5 * away**2) + 1e-9
            result[own] = sizes[own] + (near * gains[like]).sum(1) / near.sum(1)
        return result
