"""How far the participants' final outputs are from one another, summed over samples."""

from __future__ import annotations

from itertools import combinations

from auditor.comparison.metrics import Moments
from auditor.ports import Arrays
from auditor.records.report import Agreement


class Agreements:
    """Distances between every two participants: the backends and the reference."""

    def __init__(self) -> None:
        """Start with no samples."""
        self._pairs: dict[tuple[str, str], dict[str, Moments]] = {}

    def add(self, outputs: dict[str, Arrays]) -> None:
        """Add one sample: each participant's final outputs by the reference's names."""
        for (a, of_a), (b, of_b) in combinations(outputs.items(), 2):
            pair = self._pairs.setdefault((a, b), {})
            for name in of_a.keys() & of_b.keys():
                pair.setdefault(name, Moments()).add(of_b[name], of_a[name])

    def pairs(self) -> tuple[Agreement, ...]:
        """The worst output's relative L2 for every pair seen."""
        return tuple(
            Agreement(a, b, max((m.distance().relative_l2 for m in pair.values()), default=0.0))
            for (a, b), pair in self._pairs.items()
        )
