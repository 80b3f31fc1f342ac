"""Text recognition: 1 − character error rate, whose edits rapidfuzz counts (Levenshtein)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from auditor.pipeline import labels
from auditor.pipeline.postprocessing import results
from auditor.pipeline.scoring import Case, Label, Labels, Verdict
from auditor.ports import Array
from auditor.records.terms import OutputKind


class Recognition:
    """One line of text for each photograph."""

    metric = "character accuracy"
    kind: OutputKind = "text"
    packages = {"rapidfuzz": "rapidfuzz"}  # noqa: RUF012 - never changed
    labels = "a file with lines such as photo.jpg,text"
    draws = 1000
    gallery = False

    def read(self, folder: Path, names: Sequence[str], source: str) -> Labels:
        """Texts."""
        return labels.from_file(names, Path(source), _some, "a name and a text", "photo.jpg,text")

    def judge(self, value: Array, case: Case) -> Verdict | None:
        """The edits between text and label, and the label's length."""
        from rapidfuzz.distance import Levenshtein

        text = results.text(value, case.characters)
        return [float(Levenshtein.distance(text, case.label)), float(len(case.label))]

    def score(self, verdicts: Sequence[Verdict], labels: Sequence[Label], weights: Array) -> Array:
        """Over all characters of a draw; below 0 where there are more edits than characters."""
        edits, length = (weights @ np.array([v[i] for v in verdicts]) for i in (0, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = np.where(length > 0, 1 - edits / length, np.nan)
        return found


def _some(text: str) -> str | None:
    return text or None


TASK = Recognition()
