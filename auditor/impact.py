"""What each segment's own error does to the final outputs.

*Ranking*: leave-one-in, the reference with only one segment's introduced error added.
*Book-keeping*: telescoping, the reference with segments 1..k replaced by the backend's tensors;
the differences between successive k sum to the whole divergence exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from auditor import metrics
from auditor.divergence import Local
from auditor.ports import Arrays
from auditor.replay import Patch, Replayer, ReplayError, add, difference
from auditor.segments import Cut

CONTROL_NOISE = 1e-3  # relative noise put on the stimulus alone by ``input_control``


@dataclass(frozen=True, slots=True)
class Chain:
    """One backend's cut of the model on one sample.

    Attributes:
        base: the reference's tensors; ``captured``: the backend's; both with the stimulus.
        outputs: the final outputs that segments compute (a constant output has no segment).
    """

    replayer: Replayer
    cuts: tuple[Cut, ...]
    feeds: Arrays
    base: Arrays
    captured: Arrays
    outputs: tuple[str, ...]

    def final(self, patches: Mapping[str, Patch], base: Arrays | None = None) -> Arrays:
        """Every tensor of the reference with some segments' outputs replaced."""
        return self.replayer.walk(self.cuts, self.feeds, base or self.base, patches)

    def pick(self, values: Arrays) -> Arrays:
        """The final outputs among ``values``."""
        return {name: values[name] for name in self.outputs}


def leave_one_in(chain: Chain, cut: Cut, local: Local) -> float:
    """Relative L2 of the final outputs when only this segment's introduced error is added.

    Infinite when the reference cannot go on from that tensor (a wrong shape).
    """
    patch = _frozen(local.error, local.observed)
    try:
        values = chain.final({cut.id: patch})
    except ReplayError:
        return math.inf
    return metrics.relative_l2(values, chain.base, chain.outputs)


def telescope(chain: Chain, groups: Sequence[Sequence[Cut]]) -> list[float]:
    """Share of the final difference that enters with each group of segments.

    Args:
        chain: the backend's chain.
        groups: all its segments in topological order, split into consecutive groups.

    Returns:
        One share per group; they sum to 1 up to rounding. NaN where the divergence is zero or
        the reference cannot follow the backend's tensors.
    """
    whole = difference(chain.pick(chain.captured), chain.pick(chain.base))
    shares: list[float] = []
    before = chain.base
    try:
        for group in groups:
            patches = {cut.id: _replaced(chain.captured) for cut in group}
            after = chain.final(patches, before)
            part = difference(chain.pick(after), chain.pick(before))
            shares.append(metrics.projection(part, whole, chain.base, chain.outputs))
            before = after
    except ReplayError:
        return [math.nan] * len(groups)
    return shares


def by_category(
    chain: Chain,
    locals_: Mapping[str, Local],
    explained: Mapping[str, Mapping[str, Arrays]],
) -> tuple[dict[str, float], float]:
    """Share of the final difference that each noise accounts for, and the rest.

    Noises are switched on one after another: each segment's output is the reference's plus the
    part of its frozen error that replaying those noises reproduced. The rest is what is still
    missing once all of them are on.

    Args:
        chain: the backend's chain.
        locals_: local divergence by segment id.
        explained: by noise, then by segment id: the reproduced part of the segment's error.

    Returns:
        Shares by noise and the unexplained share; together they sum to 1.
    """
    whole = difference(chain.pick(chain.captured), chain.pick(chain.base))
    shares: dict[str, float] = {}
    errors: dict[str, Arrays] = {}
    before = chain.base
    try:
        for noise, parts in explained.items():
            for segment, part in parts.items():
                held = errors.get(segment)
                errors[segment] = part if held is None else {n: held[n] + part[n] for n in part}
            after = chain.final(
                {s: _frozen(e, locals_[s].observed) for s, e in errors.items()}
            )
            part = difference(chain.pick(after), chain.pick(before))
            shares[noise] = metrics.projection(part, whole, chain.base, chain.outputs)
            before = after
    except ReplayError:
        return {}, math.nan
    return shares, 1.0 - sum(shares.values())


def input_control(chain: Chain, clean: Arrays) -> float | None:
    """How much the reference itself amplifies noise on the stimulus alone.

    Relative L2 of the outputs over ``CONTROL_NOISE``; None where no input is floating point.
    """
    generator = np.random.default_rng(0)
    if not any(v.dtype.kind == "f" for v in chain.feeds.values()):
        return None
    noisy = {
        name: v * (1 + CONTROL_NOISE * generator.standard_normal(v.shape)).astype(v.dtype)
        if v.dtype.kind == "f"
        else v
        for name, v in chain.feeds.items()
    }
    values = chain.replayer.walk(chain.cuts, noisy)
    return metrics.relative_l2(values, clean, chain.outputs) / CONTROL_NOISE


def _frozen(error: Arrays, observed: Arrays) -> Patch:
    return lambda outputs, _: add(outputs, error, observed)


def _replaced(captured: Arrays) -> Patch:
    return lambda outputs, _: {name: captured[name] for name in outputs}
