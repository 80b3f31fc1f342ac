"""Accumulated, introduced and inherited error of every segment, summed over samples.

With a backend's captured inputs in_b and outputs out_b of a segment, the reference's out_r, and
h(in_b), the reference segment run on the backend's own inputs::

    accumulated = ‖out_b − out_r‖ / ‖out_r‖      what the tensor is off by
    introduced  = ‖out_b − h(in_b)‖ / ‖out_r‖    what this segment itself did
    inherited   = ‖h(in_b) − out_r‖ / ‖out_r‖    what it was handed and passed on
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from auditor.comparison import metrics
from auditor.comparison.metrics import Moments, Steps
from auditor.graphs.segments import Cut
from auditor.ports import Arrays
from auditor.replays.replay import Replayer, difference
from auditor.replays.writer import Format


@dataclass(frozen=True, slots=True)
class Local:
    """One segment on one sample: the reference on the backend's inputs, and what is left."""

    inputs: Arrays  # in_b, in the model's types
    observed: Arrays  # out_b
    replayed: Arrays  # h(in_b)

    @property
    def error(self) -> Arrays:
        """What the segment introduced: out_b − h(in_b)."""
        return difference(self.observed, self.replayed)


@dataclass(slots=True)
class Meter:
    """Running sums of one segment over samples."""

    cut: Cut
    accumulated: dict[str, Moments] = field(default_factory=dict)
    introduced: dict[str, Moments] = field(default_factory=dict)
    inherited: dict[str, Moments] = field(default_factory=dict)
    entering: dict[str, Moments] = field(default_factory=dict)
    floor: float = 0.0
    single: float = 0.0  # what float32 does of it, and ``own`` the format that does the rest
    own: Format | None = None
    identical: float = 0.0
    samples: int = 0
    unmeasured: str | None = None
    steps: Steps = field(default_factory=Steps)  # of integer outputs, against the replay

    def add(
        self,
        local: Local | None,
        captured: Arrays,
        reference: Arrays,
        known: dict[str, Moments] | None = None,
    ) -> None:
        """Add one sample; ``local`` is None where the segment could not be replayed.

        ``known`` keeps this sample's distance between backend and reference by tensor: what leaves
        one segment enters others.
        """
        known = {} if known is None else known

        def apart(name: str) -> Moments:
            if name not in known:
                known[name] = Moments()
                known[name].add(captured[name], reference[name])
            return known[name]

        for name in self.cut.inputs:
            _moments(self.entering, name).merge(apart(name))
        self.samples += 1
        same = 0.0
        for name in self.cut.outputs:
            off = apart(name)
            _moments(self.accumulated, name).merge(off)
            if local is None:
                continue
            introduced, inherited = (_moments(m, name) for m in (self.introduced, self.inherited))
            identical = metrics.bit_identical(captured[name], local.replayed[name])
            if identical == 1:  # it passed on what it was handed: both are known
                introduced.merge(Moments(reference=off.observed))
                inherited.merge(off)
            else:
                introduced.add(captured[name], local.replayed[name])
                inherited.add(local.replayed[name], reference[name])
            self.steps.add(captured[name], local.replayed[name])
            same += identical
        self.identical += same / len(self.cut.outputs)

    def relative(self, of: dict[str, Moments]) -> float:
        """Error against the *reference's* norm, as root mean square over the outputs."""
        total = 0.0
        for name, moments in of.items():
            if not math.isfinite(moments.error):
                return math.inf
            total += moments.relative_to(self.accumulated[name])
        return math.sqrt(total / len(of)) if of else 0.0

    @property
    def flagged(self) -> bool:
        """Whether the introduced error is above everything rounding and repetition can do."""
        return self.relative(self.introduced) > self.floor

    @property
    def narrow(self) -> Format | None:
        """The format whose rounding alone explains the error: the model's own, below float32's."""
        return self.own if self.single < self.relative(self.introduced) <= self.floor else None

    @property
    def exact(self) -> bool:
        """Whether the segment did just what the reference does on what it was handed."""
        return self.unmeasured is None and all(m.error == 0 for m in self.introduced.values())

    @property
    def amplification(self) -> float | None:
        """Accumulated error out over accumulated error in; None when the inputs carry none."""
        entering = [m.distance().relative_l2 for m in self.entering.values()]
        into = math.sqrt(sum(e * e for e in entering) / len(entering)) if entering else 0.0
        out = self.relative(self.accumulated)
        return out / into if 0 < into < math.inf and math.isfinite(out) else None


def replay(replayer: Replayer, cut: Cut, captured: Arrays) -> Local:
    """Run one reference segment on the backend's captured tensors.

    Raises:
        ReplayError: the reference cannot take them (a wrong shape, mostly).
    """
    return Local(
        inputs={name: replayer.typed(name, captured[name]) for name in cut.inputs},
        observed={name: captured[name] for name in cut.outputs},
        replayed=replayer.run(cut, captured),
    )


def _moments(of: dict[str, Moments], name: str) -> Moments:
    return of.setdefault(name, Moments())
