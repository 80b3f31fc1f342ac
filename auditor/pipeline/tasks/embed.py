"""Embeddings: is the nearest photograph of a gallery one of the same class (recall at 1)?

The gallery is what the training pipeline makes of the other photographs: an index that was built
before the deployment, searched with what the deployment makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from auditor.pipeline import labels
from auditor.pipeline.scoring import Case, Label, Labels, Verdict
from auditor.pipeline.tasks.cls import mean
from auditor.ports import Array
from auditor.records.terms import OutputKind


class Embedding:
    """One vector for each photograph; several (tokens, patches) are taken as one long one."""

    metric = "recall at 1"
    kind: OutputKind = "embedding"
    packages: dict[str, str] = {}  # noqa: RUF012 - never changed
    labels = "classes or identities: from-folder, from-name, or lines such as photo.jpg,17"
    draws = 1000
    gallery = True

    def read(self, folder: Path, names: Sequence[str], source: str) -> Labels:
        """Class indices."""
        return labels.classes(names, source)

    def judge(self, value: Array, case: Case) -> Verdict | None:
        """1 where the closest other photograph, by cosine, has the same label."""
        gallery = case.gallery
        if gallery is None or len(gallery.names) < 2:
            return None
        closeness = gallery.vectors @ unit(value)
        if case.photo in gallery.names:
            closeness[gallery.names.index(case.photo)] = -np.inf
        return [float(gallery.labels[int(closeness.argmax())] == case.label)]

    def score(self, verdicts: Sequence[Verdict], labels: Sequence[Label], weights: Array) -> Array:
        """The mean of the verdicts."""
        return mean(verdicts, weights)


def unit(value: Array) -> Array:
    """A result as one vector of unit length, float32."""
    flat = value.reshape(-1).astype(np.float32)
    length = float(np.linalg.norm(flat))
    return flat / np.float32(length) if length > 0 else flat


TASK = Embedding()
