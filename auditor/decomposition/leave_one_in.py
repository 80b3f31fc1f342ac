"""Leave-one-in over samples: what each segment's own error, alone, does to the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from auditor.comparison import metrics
from auditor.comparison.metrics import Running
from auditor.comparison.tasks import TaskMeter
from auditor.decomposition import impact
from auditor.decomposition.divergence import Local
from auditor.decomposition.impact import Chain
from auditor.decomposition.screening import Screening
from auditor.graphs.segments import Cut
from auditor.ports import Arrays

# It is averaged over this many samples (it was stable from four on) and measured for this many
# segments, chosen by ``screening`` where there are more; on the later samples for the first few
# alone.
SAMPLES = 4
SEGMENTS = 64
AGAIN = 20


class LeaveOneIn:
    """What was measured of each segment.

    Attributes:
        effects: by segment, the relative L2 that its error alone causes.
        shares: the same relative to the sample's whole divergence, for the spread over samples.
        tasks: by segment and output, what its error alone does to what is read off the output.
    """

    def __init__(self, told: Callable[[str], None]) -> None:
        """Nothing is measured yet; ``told`` is told every segment that was."""
        self.effects: dict[str, Running] = {}
        self.shares: dict[str, Running] = {}
        self._whole = Running()  # the backend's divergence on every sample
        self._wholes: dict[str, Running] = {}  # the same on the samples of each segment
        self.tasks: dict[str, dict[str, TaskMeter]] = {}
        self._told = told

    def impact(self, id: str) -> float | None:
        """A segment's mean effect over the mean divergence on the same samples.

        None where it was not measured, or where no divergence is finite and above 0.
        """
        if id not in self.shares:
            return None
        effect, whole = self.effects[id], self._wholes[id]
        # Where a sample diverges infinitely, its effect is no part of anything.
        return effect.mean / whole.mean if whole.count == effect.count else self.shares[id].mean

    def effect(self, id: str) -> float:
        """The relative L2 that a measured segment's error alone causes, by which it is ranked.

        Not every segment is measured on every sample, and on some all diverges more. So its impact
        is taken of the divergence over all samples (a ratio estimate), which gives the same
        ranking as the impacts.
        """
        impact = self.impact(id)
        return self.effects[id].mean if impact is None else impact * self._whole.mean

    def top(self, count: int) -> set[str]:
        """The segments with the largest effects."""
        ranked = sorted(self.effects, key=self.effect, reverse=True)
        return set(ranked[:count])

    def add(
        self,
        index: int,
        chain: Chain,
        flagged: Mapping[str, Local],
        meter: Callable[[str], TaskMeter],
        read: Callable[[Arrays], Arrays] | None = None,
    ) -> None:
        """Measure flagged segments: once, and those that matter on a few more samples.

        Args:
            index: of the sample.
            chain: the backend's chain.
            flagged: the local divergence of every segment above its floor, by id.
            meter: makes one for an output, or for what is made of the outputs.
            read: what a post-processing makes of the outputs, on which all is measured then;
                nothing of those that do not fit it.
        """
        base, captured = chain.pick(chain.base), chain.pick(chain.captured)
        if read is not None and (result := read(base)):
            base, captured = result, read(captured)
        else:  # without all outputs there is no result to measure on
            read = None
        whole = metrics.relative_l2(captured, base, tuple(base)) if captured else math.inf
        if whole < math.inf:
            self._whole.add(whole, index)

        def alone(cut: Cut) -> tuple[float, Arrays]:
            effect, values = impact.leave_one_in(chain, cut, flagged[cut.id])
            if not values or read is None:
                return effect, values
            values = read(values)
            return metrics.relative_l2(values, base, tuple(base)) if values else math.inf, values

        def measure(chosen: Sequence[Cut]) -> list[float]:
            effects = []
            results = chain.replayer.walking(alone, chosen)
            for cut, (effect, values) in zip(chosen, results, strict=True):
                self._note(cut.id, index, effect, whole)
                meters = self.tasks.setdefault(cut.id, {})
                for name, value in values.items():
                    if name not in meters:
                        meters[name] = meter(name)
                    meters[name].add(value, base[name], index)
                effects.append(effect)
            return effects

        known, top = self.effects.copy(), self.top(AGAIN)
        cuts = [cut for cut in chain.cuts if cut.id in flagged]
        measure([c for c in cuts if c.id in top and known[c.id].count < SAMPLES])
        new = [c for c in cuts if c.id not in known]
        room = SEGMENTS - len(known)
        if len(new) <= room:
            measure(new)
            return
        nodes = chain.replayer.graph.nodes
        kinds = [tuple(nodes[i].op_type for i in cut.nodes) for cut in new]
        screening = Screening(kinds, [_norm(flagged[cut.id].error) for cut in new], room)
        while chosen := screening.more():
            for position, effect in zip(chosen, measure([new[i] for i in chosen]), strict=True):
                screening.add(position, effect)

    def _note(self, id: str, sample: int, effect: float, whole: float) -> None:
        """Keep one segment's effect on a sample, beside the sample's whole divergence."""
        self._told(id)
        self.effects.setdefault(id, Running()).add(effect, sample)
        if whole < math.inf:
            self._wholes.setdefault(id, Running()).add(whole, sample)
        if 0 < whole < math.inf:
            self.shares.setdefault(id, Running()).add(effect / whole, sample)


def _norm(tensors: Arrays) -> float:
    return math.sqrt(sum(metrics.square_sum(metrics.to_float(v)) for v in tensors.values()))
