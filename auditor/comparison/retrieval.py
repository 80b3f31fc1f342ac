"""What a search over a model's embeddings finds, before and after a change of the numbers.

Each vector is the query once, all others are what is searched, and the cosine similarity ranks
them, with the reference's vectors and with the other side's. Where an output has vectors for
tokens, a text's is their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from auditor.ports import Array

# Vectors that are kept and searched: a few MB, and a table of a million similarities.
MOST = 1000


@dataclass(slots=True)
class Retrieval:
    """The embeddings of the first samples, up to ``MOST``."""

    _kept: list[tuple[Array, Array]] = field(default_factory=list)

    def add(self, observed: Array, reference: Array) -> None:
        """Add one sample's vectors: [texts, width] or [texts, tokens, width], of one shape."""
        for b, r in zip(_texts(observed), _texts(reference), strict=True):
            if len(self._kept) < MOST:
                self._kept.append((b, r))

    def result(self) -> tuple[int, int, int] | None:
        """How many vectors were searched for, for how many the nearest, or any rank, changed.

        None for fewer than three vectors: there is nothing to rank.
        """
        if len(self._kept) < 3 or len({r.shape for _, r in self._kept}) > 1:
            return None
        after, before = (_ranks(np.stack(side)) for side in zip(*self._kept, strict=True))
        changed = after != before
        return len(changed), int(changed[:, 0].sum()), int(changed.any(axis=1).sum())


def _texts(values: Array) -> Array:
    """[texts, width] in float32."""
    rows = values.reshape(-1, *values.shape[-2:]).mean(axis=1) if values.ndim > 2 else values
    return np.atleast_2d(rows).astype(np.float32)


def _ranks(vectors: Array) -> Array:
    """[vectors, vectors − 1]: the others from the nearest on, equal ones as they came."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -np.inf)
    ranks: Array = np.argsort(-alike, axis=1, kind="stable")[:, :-1]
    return ranks
