"""Which layers of a decoder matter: every segment's error frozen, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from auditor import discovery
from auditor.capture.trace import Tracer
from auditor.decomposition import divergence
from auditor.decomposition.impact import Chain, frozen
from auditor.graphs import model as models
from auditor.options import BackendSpec
from auditor.records.measured import CategoryShare
from auditor.replays.replay import Patch
from auditor.training import origins

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.graphs.segments import Cut
    from auditor.ports import Arrays
    from auditor.replays.reference import Reference

_NUMBERED = re.compile(r"^\D*\d+")


class Frozen:
    """The backend as the reference with every segment's own error added, frozen.

    With all errors it gives the backend's tensors; without those of some layers it says what
    computing these exactly would bring.

    Attributes:
        chain: the segments; ``patches``: their errors, by id; ``layers``: them by layer.
    """

    def __init__(
        self,
        model: Model,
        reference: Reference,
        cuts: tuple[Cut, ...],
        feeds: Arrays,
        tensors: Arrays,
        finals: tuple[str, ...],
    ) -> None:
        """Measure every segment's error.

        Args:
            model: what was audited.
            reference: the reference.
            cuts: the segments.
            feeds: what the backend was fed, in the reference's types.
            tensors: what was captured then.
            finals: the outputs to look at.

        Raises:
            ReplayError: the reference cannot follow the backend's tensors.
        """
        replayer = reference.replayer
        captured = feeds | reference.wide(tensors)
        base = replayer.walk(cuts, feeds)
        self.chain = Chain(replayer, cuts, feeds, base, captured, finals)
        self.patches: dict[str, Patch] = {}
        for cut in cuts:
            local = divergence.replay(replayer, cut, captured)
            self.patches[cut.id] = frozen(local.error, local.observed)
        self.layers: dict[str, list[Cut]] = {}
        name = _Names(model, reference)
        for cut in cuts:
            self.layers.setdefault(name.of(cut), []).append(cut)

    def alone(self, layer: str) -> Arrays:
        """The outputs that the reference gives with the errors of one layer."""
        return self.chain.final({cut.id: self.patches[cut.id] for cut in self.layers[layer]})


class _Names:
    """Which layer a segment belongs to: its module, or its node's name, up to the first number."""

    def __init__(self, model: Model, reference: Reference) -> None:
        self._graph = reference.graph
        self._labels = reference.labels
        self._origins = origins.of(model.proto)

    def of(self, cut: Cut) -> str:
        keys = [models.key(self._graph.nodes[i]) for i in reversed(cut.nodes)]
        module = next((o.module for k in keys if (o := self._origins.get(k)) and o.module), None)
        return numbered(module or self._labels.get(keys[0], keys[0]))


def numbered(name: str) -> str:
    """A name up to the first number in it, which is that of the layer."""
    found = _NUMBERED.match(name)
    return found[0] if found else name


def avoiding_options(
    tracer: Tracer, categories: Sequence[CategoryShare], spec: BackendSpec
) -> dict[str, str] | None:
    """Engine options that leave out the cause with the largest share that has any, not set yet."""
    catalogue = {noise.id: noise for noise in discovery.noises()}
    built = tracer.provenance.options if tracer.provenance else {}
    for category in sorted(categories, key=lambda c: -c.share):
        about = [s for s in tracer.switches if category.noise in s.noises]
        if about:
            return dict(min(about, key=lambda s: len(s.noises)).options)
        found = catalogue[category.noise].ablations.get(spec.id, {})
        if not found.items() <= built.items():
            return dict(found)
    return None
