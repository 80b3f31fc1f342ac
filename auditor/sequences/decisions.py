"""The decisions of a decoder, which token comes next, beside those of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from auditor.records.generation import GenerationStep, KeptLayers

Tokens = list[int]
Logits = NDArray[np.float64]  # [steps, vocabulary]


def compared(text: Sequence[int], ours: Logits, theirs: Logits) -> list[GenerationStep]:
    """A backend's decisions beside those that made a text, step by step."""
    kl = divergence_nats(ours, theirs)
    found = []
    for number, token in enumerate(text):
        other = int(theirs[number].argmax())
        best = np.sort(ours[number])[-2:]
        found.append(
            GenerationStep(
                number,
                token,
                other,
                float(best[1] - best[0]),
                lead(theirs[number], token),
                float(kl[number]),
                float(np.linalg.norm(theirs[number] - ours[number]) / np.linalg.norm(ours[number])),
            )
        )
    return found


def judged(kept: KeptLayers, steps: Sequence[GenerationStep]) -> KeptLayers:
    """What a model whose layers were kept does, by its decisions."""
    return replace(
        kept, turned=sum(not step.same for step in steps), kl=max(step.kl for step in steps)
    )


def lead(logits: NDArray[np.float64], token: int) -> float:
    """How far a token's logit is above all others'."""
    others = np.delete(logits, token)
    return float(logits[token] - others.max())


def divergence_nats(reference: Logits, other: Logits) -> NDArray[np.float64]:
    """Kullback-Leibler divergence from the reference's distribution at each step, in nats."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
