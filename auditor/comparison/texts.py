"""Texts as a network for speech or lines of print gives them: a row of scores for each step.

The greedy reading of connectionist temporal classification (Graves et al., 2006): the best class
of each step, repeats merged, then the blank dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from auditor.errors import UsageError, reason
from auditor.ports import Array

# The class that is no character, as toolkits write it; padding stands for it where no other does.
_BLANKS = ("<blank>", "<blk>", "[blank]", "blank", "<eps>", "<pad>", "[PAD]")


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a text is read off scores ``[..., steps, classes]``.

    Attributes:
        blank: the class that is no character; None where the text was read before, and each row
            has a 1 at its character, or is empty behind the last one.
        tokens: what each class stands for; empty where that is not known.
    """

    blank: int | None
    tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, scores: Array, tokens: Sequence[str] = ()) -> Spelling:
        """The blank is the token that says so, else the class that is the best of most steps."""
        for blank in _BLANKS:
            if blank in tokens:
                return cls(tokens.index(blank), tuple(tokens))
        if not scores.any(axis=-1).all() and ((scores == 0) | (scores == 1)).all():
            return cls(None, tuple(tokens))
        best = scores.argmax(axis=-1).ravel()
        return cls(int(np.bincount(best, minlength=1).argmax()), tuple(tokens))

    def read(self, scores: Array) -> list[list[int]]:
        """The classes of each text, ``[..., steps, classes]`` taken as texts one after another."""
        if self.blank is None:
            rows = scores.reshape(-1, *scores.shape[-2:])
            return [text[text.any(axis=-1)].argmax(axis=-1).tolist() for text in rows]
        found = []
        for best in scores.argmax(axis=-1).reshape(-1, scores.shape[-2]):
            kept = best != self.blank
            kept[1:] &= best[1:] != best[:-1]
            found.append(best[kept].tolist())
        return found

    def write(self, classes: Sequence[int]) -> str:
        """A text as it is read; the classes' numbers where tokens are not known."""
        if not self.tokens:
            return " ".join(map(str, classes))
        words = [self.tokens[c] if c < len(self.tokens) else "\ufffd" for c in classes]
        return ("" if max(map(len, words), default=1) == 1 else " ").join(words)


def edits(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein's distance: insertions, deletions and replacements that turn one into another."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    a, b = a[start : len(a) - end], b[start : len(b) - end]
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def tokens(path: Path) -> tuple[str, ...]:
    """What each class stands for.

    Args:
        path: ``vocab.json`` of transformers, a number by token, or a token on each line in the
            order of the classes, which may have its number behind it (``tokens.txt`` of icefall).

    Raises:
        UsageError: there is no such file, or it is none of this.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            numbers = {str(token): int(number) for token, number in json.loads(text).items()}
            return _placed(numbers)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--tokens {path} cannot be read: {reason(error)}",
            "Give a token on each line, or a JSON object of numbers by token.",
        ) from error
    lines = text.removesuffix("\n").split("\n")
    pairs = [line.rsplit(None, 1) for line in lines]
    if all(len(p) == 2 and p[1] == str(i) for i, p in enumerate(pairs)):
        return tuple(p[0] for p in pairs)
    return tuple(lines)


def _placed(numbers: dict[str, int]) -> tuple[str, ...]:
    found = [""] * (max(numbers.values(), default=-1) + 1)
    for token, number in numbers.items():
        found[number] = token
    return tuple(found)
