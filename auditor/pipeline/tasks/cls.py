"""Classification: the fraction of photographs whose best class is the label (top-1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from auditor.pipeline import labels
from auditor.pipeline.scoring import Case, Label, Labels, Verdict
from auditor.ports import Array
from auditor.records.terms import OutputKind


class Classification:
    """One row of scores for each photograph."""

    metric = "top-1"
    kind: OutputKind = "scores"
    packages: dict[str, str] = {}  # noqa: RUF012 - never changed
    labels = "from-folder, from-name, or a file with lines such as photo.jpg,17"
    draws = 1000
    gallery = False

    def read(self, folder: Path, names: Sequence[str], source: str) -> Labels:
        """Class indices."""
        return labels.classes(names, source)

    def judge(self, value: Array, case: Case) -> Verdict | None:
        """1 where the best class is the label."""
        return [float(int(value.argmax()) == case.label)]

    def score(self, verdicts: Sequence[Verdict], labels: Sequence[Label], weights: Array) -> Array:
        """The mean of the verdicts."""
        return mean(verdicts, weights)


def mean(verdicts: Sequence[Verdict], weights: Array) -> Array:
    """The first number's weighted mean over photographs, ``[draws]``."""
    right = np.array([v[0] for v in verdicts])
    with np.errstate(invalid="ignore"):
        found: Array = (weights @ right) / weights.sum(axis=1)
    return found


TASK = Classification()
