"""The greedy text of a decoder (``audit generate``)."""

from __future__ import annotations

from dataclasses import dataclass, field

from auditor.records.backend import Gap, Provenance
from auditor.records.measured import CategoryShare, FidelityProof
from auditor.records.model import ModelInfo


@dataclass(frozen=True, slots=True)
class GenerationStep:
    """One token of the reference's greedy text, and what a backend makes of the same beginning.

    Attributes:
        number: from 0; ``token``: the reference's; ``other``: the backend's most likely one.
        margin: lead of the token over the next in the reference's logits; ``margin_after`` over all
            others in the backend's, negative where that decides otherwise.
        kl: Kullback-Leibler divergence from the reference's distribution, in nats.
        relative_l2: of the logits of this step.
        caches: relative L2 of the caches that the step leaves; None where the model keeps none.
    """

    number: int
    token: int
    other: int
    margin: float
    margin_after: float
    kl: float
    relative_l2: float = 0.0
    caches: float | None = None

    @property
    def same(self) -> bool:
        """Whether the backend decides alike."""
        return self.token == self.other


@dataclass(frozen=True, slots=True)
class LayerEffect:
    """What the own error of a layer, alone, does to the decisions that a backend turned.

    Attributes:
        layer: its module, or the beginning of its nodes' names.
        segments: how many segments it has.
        change: of the margin between both tokens at the first turned step, in the logits' unit.
        harm: the largest part of a turned step's margin that it takes; negative where it adds.
    """

    layer: str
    segments: int
    change: float
    harm: float


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """The layers to compute in full precision so that no decision turns.

    Attributes:
        layers: chosen on the reference with all other layers' errors, or by building where there
            are caches; ``among`` how many there are.
        options: what the kept layers were built with; ``pieces``: in how many pieces.
        turned: decisions that the model so built still turns; None where it was not built.
        kl: largest divergence of a step of it, in nats.
        failure: why it was not built.
    """

    layers: tuple[str, ...]
    among: int
    options: dict[str, str] = field(default_factory=dict)
    pieces: int = 0
    turned: int | None = None
    kl: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Carried:
    """What a step's difference owes to the caches written before it, and what to the step itself.

    The reference runs the step on the backend's caches: what differs from its own run came with
    them, what then remains is the step's own. Both parts add up to the whole.

    Attributes:
        number: of the step; ``other``: the backend's token, or the reference's second where that
            decides alike.
        lead: of the reference's token over ``other`` in the reference's logits.
        by_caches, by_step: what either part changes it by.
        inherited, introduced: relative L2 of either part of the logits.
        categories, unexplained_share: what causes the error of the caches that the prompt leaves.
    """

    number: int
    other: int
    lead: float
    by_caches: float
    by_step: float
    inherited: float
    introduced: float
    categories: tuple[CategoryShare, ...] = ()
    unexplained_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """One backend's part.

    Attributes:
        text: what it writes by itself, as long as the reference's.
        steps: the reference's text, step by step.
        first: number of the first diverging token; None where there is none.
        relative_l2: of the logits of the whole text.
        categories, unexplained_share: what causes the logits' divergence, as in an audit.
        effects: layers, the most harmful first; empty where nothing turned.
        carried: where one step's difference came from; None where the model keeps no caches. The
            causes are then those of that step, and layers are also caches by themselves.
        gap: what could not be done.
    """

    id: str
    text: tuple[int, ...] = ()
    steps: tuple[GenerationStep, ...] = ()
    first: int | None = None
    relative_l2: float | None = None
    categories: tuple[CategoryShare, ...] = ()
    unexplained_share: float = 0.0
    fidelity: FidelityProof | None = None
    provenance: Provenance | None = None
    effects: tuple[LayerEffect, ...] = ()
    kept: KeptLayers | None = None
    carried: Carried | None = None
    gap: Gap | None = None

    @property
    def complete(self) -> bool:
        """Whether it was compared as it was asked for."""
        return bool(self.steps) and self.gap is None


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """Greedy texts of one decoder.

    Attributes:
        prompt, text: token ids; the text is the reference's.
        length: tokens that each run takes, padding included; with caches, all there are in the end.
        caches: how many caches the model keeps.
    """

    model: ModelInfo
    prompt: tuple[int, ...]
    text: tuple[int, ...]
    length: int
    backends: tuple[Generation, ...]
    caches: int = 0
