"""Options to switch: alone, in pairs, and the worst of them all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from auditor.pipeline.sysnoise import networks, options
from auditor.pipeline.sysnoise.networks import Form, Networks
from auditor.pipeline.sysnoise.options import PostSwitch, Switch
from auditor.pipeline.sysnoise.sweep import Trial
from auditor.records.sysnoise import SysnoiseEffect, SysnoiseType


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of one type, before or inside the network.

    Attributes:
        type: of the table; ``group`` is that of the combinations.
    """

    type: str
    group: str
    name: str
    tool: str
    change: Switch | Form | PostSwitch

    @property
    def trial(self) -> str:
        """Name of the trial that switches it alone."""
        return f"{self.type}: {self.name}"


def size_of(effect: SysnoiseEffect) -> tuple[float, float, float]:
    """What options and types are ordered by: accuracy, then readings, then numbers.

    A drop that may be chance counts as none, or it would decide between options at random.
    """
    drop = effect.drop.value if effect.drop and effect.drop.low > 0 else 0.0
    changed = effect.changed.value if effect.changed else 0.0
    return drop, changed, effect.relative_l2.value


def worst_of(choices: Sequence[Choice], types: Sequence[SysnoiseType]) -> list[Choice]:
    """The worst option of every group that changes anything, in the order of execution."""
    sizes = {
        (type.id, option.name): size_of(option.effect) for type in types for option in type.options
    }
    best: dict[str, Choice] = {}
    for choice in choices:
        size = sizes.get((choice.type, choice.name))
        if size is None or size[2] == 0:
            continue
        other = best.get(choice.group)
        if other is None or size > sizes[other.type, other.name]:
            best[choice.group] = choice
    before = [best[t] for t in options.TITLES if t in best]
    inside = {c.change: c for c in best.values() if isinstance(c.change, Form)}
    after = [best[t] for t in options.AFTER if t in best]
    return [*before, *(inside[form] for form in networks.in_order(inside)), *after]


def together(worst: Sequence[Choice], nets: Networks) -> list[tuple[Choice, ...]]:
    """Every pair, and what an accumulation adds up to, of those that can be put together."""
    wanted = [*combinations(worst, 2), *(tuple(worst[:n]) for n in range(3, len(worst) + 1))]
    return [c for c in wanted if nets.combine(_forms(c))]


def trial_of(choices: Sequence[Choice], base: Trial) -> Trial:
    """The training side with some choices."""
    pipeline, post = base.pipeline, base.post
    for choice in choices:
        if isinstance(choice.change, Switch):
            pipeline = choice.change.apply(pipeline)
        elif isinstance(choice.change, PostSwitch) and post is not None:
            post = choice.change.apply(post)
    return Trial(name_of(choices), pipeline, _forms(choices), post)


def _forms(choices: Sequence[Choice]) -> networks.Forms:
    return networks.in_order(c.change for c in choices if isinstance(c.change, Form))


def name_of(choices: Sequence[Choice]) -> str:
    """Name of the trial with some choices."""
    return " + ".join(choice.trial for choice in choices)
