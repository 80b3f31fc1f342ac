"""What people read off a model's outputs, and how much of that a change of the numbers changes.

As what an output is read (``assume``), by its name and its values on the first sample:

1. A word in the name decides: ``logits``, ``prob``, ``softmax`` … are scores, ``boxes`` boxes,
   ``mask`` a mask, ``embedding``, ``hidden`` … vectors, ``landmarks``, ``keypoints`` … nothing;
   where the values do not fit the word (box offsets), nothing either.
2. Rows (last axis) that are not negative and sum to 1 are scores.
3. Four axes with all values in [0, 1] are a mask.
4. Three axes whose last one has four to seven columns, or whose one short axis has four columns
   and class probabilities behind them, are boxes if each has a positive extent.
5. Rows of unit length, and three axes with a last one of at least 32, are embeddings.
6. Two axes with three or more columns are scores (logits), but not four columns, which are as
   often coordinates, and not values that all lie in [0, 1], which are several answers at once.

Anything else, and whatever is not floating point, is read as nothing.

What is measured, where r is the reference:

* scores: rows whose arg max changes; the lead of r's best class over the best other one; the
  Kullback-Leibler divergence Σ r log(r/b), of the softmax where the rows are no distributions.
* boxes: the intersection over union of each of r's boxes with the closest other box, for the 100
  best boxes (the limit of the COCO evaluation) that score at least 0.25, if they have scores. A
  box whose best overlap is below 0.5 (the PASCAL VOC criterion) is lost; one of the other side's
  that overlaps none of r's so is new.
* mask: intersection over union of what is above 0.5 (above 0 where values leave [0, 1]: a logit).
* text, which is never assumed: as scores, a row for each step; and of the texts that are read off
  the steps (``auditor.comparison.texts``) how many change, and by how many edits.
* embedding: cosine similarity of each vector (last axis); and over at least three samples, for how
  many the nearest of the others, or their order, changes (``auditor.comparison.retrieval``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from auditor.comparison.metrics import Running, to_float
from auditor.comparison.retrieval import Retrieval
from auditor.comparison.texts import Spelling, edits
from auditor.ports import Array
from auditor.records.measured import Consequence
from auditor.records.terms import OutputKind

# Words as the common exporters put them into the names of outputs.
_WORDS: dict[str, OutputKind] = {
    **dict.fromkeys(("logit", "logits", "prob", "probs", "probabilities", "softmax"), "scores"),
    **dict.fromkeys(("box", "boxes", "bbox", "bboxes", "detections"), "boxes"),
    **dict.fromkeys(("mask", "masks"), "mask"),
    **dict.fromkeys(("embedding", "embeddings", "embeds", "hidden", "pooler"), "embedding"),
    **dict.fromkeys(("landmarks", "keypoints", "offsets", "anchors"), "none"),
}
_SUM = 1e-3  # how far a distribution's sum or a unit vector's length may be from 1
_WIDE = 32  # columns from which three axes are taken for vectors
_COORDINATES = 4
_FEW_COLUMNS = 7  # coordinates, score, class and one more
_SCORED = 0.25
_MOST_BOXES = 100
_OVERLAP = 0.5
_TINY = 1e-30  # stands for a probability of 0, whose logarithm has no number


def assume(name: str, reference: Array) -> OutputKind:
    """The kind that an output is read as; the rules are in the module's own description.

    Args:
        name: the output's ONNX name.
        reference: its value in the reference, of any shape and type.
    """
    if reference.dtype.kind != "f" or reference.size == 0 or not np.isfinite(reference).all():
        return "none"
    fits = _fitting(to_float(reference))
    for word in re.findall(r"[a-z]+", name.lower()):
        if (kind := _WORDS.get(word)) is not None:
            return kind if kind in fits else "none"
    values = to_float(reference)
    unit = bool(values.min() >= 0 and values.max() <= 1)
    if "scores" in fits and unit and _near_one(values.sum(axis=-1)):
        return "scores"
    if "mask" in fits and values.ndim == 4 and unit:
        return "mask"
    if "boxes" in fits and values.ndim == 3:
        return "boxes"
    if "embedding" in fits and _near_one(np.linalg.norm(values.astype(np.float64), axis=-1)):
        return "embedding"
    if values.ndim == 3 and values.shape[-1] >= _WIDE:
        return "embedding"
    if values.ndim == 2 and values.shape[1] >= 3 and values.shape[1] != _COORDINATES and not unit:
        return "scores"
    return "none"


def _fitting(values: Array) -> set[OutputKind]:
    """The readings that a shape (and for boxes the values) allows at all."""
    found = set[OutputKind]()
    if values.ndim >= 2 and values.shape[-1] >= 2:
        found |= {"scores", "embedding"}
    if values.ndim >= 3:
        found.add("mask")
    if values.ndim in (2, 3) and _Boxes.like(values).plausible(values):
        found.add("boxes")
    return found


def _near_one(values: Array) -> bool:
    return bool(np.all(np.abs(values - 1) <= _SUM))


class TaskMeter:
    """What a change does to one output's reading, over samples; memory does not grow with them."""

    def __init__(self, name: str, kind: OutputKind, tokens: Sequence[str] = ()) -> None:
        """Compare output ``name`` read as ``kind``; ``tokens`` are what a text's classes are."""
        self.name = name
        self.kind = kind
        self._tokens = tokens
        self._samples = 0
        self._items = 0
        self._changed = self._added = 0
        self._first_changed: int | None = None
        self._margin, self._margin_after, self._kl = Running(), Running(), Running()
        self._overlap, self._lowest = Running(), math.inf
        self._both = self._either = 0  # pixels
        self._retrieval = Retrieval()
        self._spelling: Spelling | None = None
        self._texts = self._texts_changed = self._edits = self._characters = 0
        self._example: tuple[str, str] | None = None

    def add(self, observed: Array, reference: Array, sample: int) -> None:
        """Add one sample; the two may differ in shape, which changes everything there is to read.

        Args:
            observed: the changed output.
            reference: the reference's.
            sample: the sample's index.
        """
        if self.kind == "none" or reference.size == 0:
            return
        self._samples += 1
        b, r = (to_float(v).astype(np.float64, copy=False) for v in (observed, reference))
        if self.kind == "text":  # of any number of steps on either side
            texts = self._add_texts(b, r)
        if self.kind == "text" and self._spelling and self._spelling.blank is None:
            items, changed = texts
        elif self.kind == "boxes":
            items, changed = self._add_boxes(b, r, sample)
        elif b.shape != r.shape or r.ndim == 0:
            items = changed = r.size if self.kind == "mask" else r.size // max(r.shape[-1:] or (1,))
        elif self.kind == "mask":
            items, changed = self._add_mask(b, r)
        elif self.kind in ("scores", "text"):
            items, changed = self._add_scores(_rows(b), _rows(r), sample)
        else:
            self._retrieval.add(b, r)
            items, changed = self._add_vectors(_rows(b), _rows(r), sample)
        self._items += items
        self._changed += changed
        if changed and self._first_changed is None:
            self._first_changed = sample

    def _add_scores(self, b: Array, r: Array, sample: int) -> tuple[int, int]:
        every = np.arange(len(r))
        best = r.argmax(axis=1)
        sane = np.isfinite(b).all(axis=1) & np.isfinite(r).all(axis=1)
        changed = (b.argmax(axis=1) != best) | ~sane
        for values, running in ((r, self._margin), (b, self._margin_after)):
            others = values.copy()
            others[every, best] = -np.inf
            lead = (values[every, best] - others.max(axis=1))[sane]
            if lead.size and np.isfinite(lead).all():
                running.add(float(lead.mean()), sample)
        if sane.any():
            logs = [_log_scores(v[sane], like=r[sane]) for v in (b, r)]
            kl = (np.exp(logs[1]) * (logs[1] - logs[0])).sum(axis=1).mean()
            self._kl.add(max(0.0, float(kl)), sample)
        return len(r), int(np.count_nonzero(changed))

    def _add_texts(self, b: Array, r: Array) -> tuple[int, int]:
        """How many there are, and how many change."""
        if b.ndim != r.ndim or b.shape[:-2] != r.shape[:-2] or b.shape[-1:] != r.shape[-1:]:
            return 0, 0
        before = self._texts, self._texts_changed
        self._spelling = self._spelling or Spelling.of(r, self._tokens)
        for theirs, mine in zip(self._spelling.read(b), self._spelling.read(r), strict=True):
            self._texts += 1
            self._characters += len(mine)
            if theirs != mine:
                self._texts_changed += 1
                self._edits += edits(theirs, mine)
                self._example = self._example or (
                    self._spelling.write(mine),
                    self._spelling.write(theirs),
                )
        return self._texts - before[0], self._texts_changed - before[1]

    def _add_boxes(self, b: Array, r: Array, sample: int) -> tuple[int, int]:
        layout = _Boxes.like(r)
        if b.ndim != r.ndim or r.ndim not in (2, 3):
            return 0, 0
        images, columns = layout.images(r).shape[::2]
        if layout.images(b).shape[::2] != (images, columns):
            boxes = r.size // max(columns, 1)
            return boxes, boxes
        items = lost = 0
        for pair in zip(layout.images(r), layout.images(b), strict=False):
            mine, theirs = (rows[_filled(rows)] for rows in pair)  # rows of zeros are padding
            wanted, scored = layout.best(mine)
            others = layout.scored(theirs) if scored else theirs
            overlaps = _overlaps(layout.corners(wanted), layout.corners(others))
            for overlap in overlaps:
                self._add_overlap(float(overlap), sample)
            items += len(overlaps)
            lost += int(np.count_nonzero(overlaps < _OVERLAP))
            found, counts = layout.best(theirs)
            known = layout.scored(mine) if scored else mine
            if scored == counts:  # boxes that only the other side has
                back = _overlaps(layout.corners(found), layout.corners(known))
                self._added += int(np.count_nonzero(back < _OVERLAP))
        return items, lost

    def _add_mask(self, b: Array, r: Array) -> tuple[int, int]:
        threshold = 0.5 if r.min() >= 0 and r.max() <= 1 else 0.0
        theirs, mine = b > threshold, r > threshold
        both = int(np.count_nonzero(theirs & mine))
        either = int(np.count_nonzero(theirs | mine))
        self._both += both
        self._either += either
        self._lowest = min(self._lowest, both / either if either else 1.0)
        return r.size, either - both

    def _add_vectors(self, b: Array, r: Array, sample: int) -> tuple[int, int]:
        norms = np.linalg.norm(b, axis=1) * np.linalg.norm(r, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = np.clip((b * r).sum(axis=1) / norms, -1, 1)
        alike = ~b.any(axis=1) & ~r.any(axis=1)  # padding: two vectors of zeros
        cosines = np.where(alike, 1.0, np.nan_to_num(cosines, nan=0.0))
        for cosine in cosines:
            self._add_overlap(float(cosine), sample)
        return len(r), 0

    def _add_overlap(self, value: float, sample: int) -> None:
        self._overlap.add(value, sample)
        self._lowest = min(self._lowest, value)

    def result(self) -> Consequence | None:
        """Everything added so far; None where nothing is read off this output."""
        if self._samples == 0:
            return None
        iou = None
        if self.kind == "mask" and self._lowest < math.inf:
            iou = self._both / self._either if self._either else 1.0
        elif self.kind == "boxes" and self._overlap.count:
            iou = self._overlap.mean
        searched, nearest, ranks = self._retrieval.result() or (None, None, None)
        made = Consequence(
            output=self.name,
            kind=self.kind,
            samples=self._samples,
            items=self._items,
            changed=None if self.kind == "embedding" else self._changed,
            first_changed=None if self.kind == "embedding" else self._first_changed,
            margin=_mean(self._margin),
            margin_after=_mean(self._margin_after),
            kl=_mean(self._kl),
            iou=iou,
            cosine=_mean(self._overlap) if self.kind == "embedding" else None,
            lowest=self._lowest if self._lowest < math.inf else None,
            added=self._added if self.kind == "boxes" else None,
            searched=searched,
            nearest_changed=nearest,
            ranks_changed=ranks,
            **self._read() if self.kind == "text" else {},
        )
        # Written last, from the very figures it stands beside.
        return Consequence(
            **{f: getattr(made, f) for f in made.__slots__ if f != "sentence"},
            sentence=_sentence(made),
        )

    def _read(self) -> dict[str, Any]:
        return {
            "texts": self._texts,
            "texts_changed": self._texts_changed,
            "edits": self._edits,
            "characters": self._characters,
            "blank": self._spelling.blank if self._spelling else None,
            "example": self._example,
        }


@dataclass(frozen=True, slots=True)
class _Boxes:
    """Where the coordinates are: the axis of the columns, and what the four numbers mean."""

    transposed: bool  # columns on the second last axis, as detection heads have them
    centred: bool  # centre and size instead of two corners

    @classmethod
    def like(cls, values: Array) -> _Boxes:
        """The layout under which more boxes have a positive extent."""
        rows, columns = values.shape[-2:]
        transposed = values.ndim == 3 and _COORDINATES <= rows < columns > _FEW_COLUMNS
        counts = [cls(transposed, centred)._extended(values) for centred in (False, True)]
        return cls(transposed, counts[1] > counts[0])

    def plausible(self, values: Array) -> bool:
        """Whether every row is a box."""
        rows = self.images(values).reshape(-1, self.images(values).shape[-1])
        columns = rows.shape[1]
        if columns < _COORDINATES or len(rows) < 1 or self._extended(values) < 1.0:
            return False
        if columns <= _FEW_COLUMNS:
            return not self.transposed
        classes, coordinates = rows[:, _COORDINATES:], rows[:, :_COORDINATES]
        return bool(classes.min() >= 0 and classes.max() <= 1 and coordinates.max() > 1)

    def images(self, values: Array) -> Array:
        """[images, boxes, columns]."""
        stacked = values if values.ndim == 3 else values[None]
        return np.swapaxes(stacked, 1, 2) if self.transposed else stacked

    def best(self, rows: Array) -> tuple[Array, bool]:
        """The boxes that matter, and whether that was decided by their scores."""
        if (scores := _box_scores(rows)) is None:
            return rows[:_MOST_BOXES], False
        order = np.argsort(-scores, kind="stable")[:_MOST_BOXES]
        good = order[scores[order] >= _SCORED]
        return (rows[good], True) if len(good) else (rows[order], False)

    def scored(self, rows: Array) -> Array:
        """The boxes with a score that counts."""
        scores = _box_scores(rows)
        return rows if scores is None else rows[scores >= _SCORED]

    def corners(self, rows: Array) -> Array:
        """[boxes, 4]: x1, y1, x2, y2."""
        if not self.centred:
            return rows[:, :_COORDINATES]
        middle, half = rows[:, :2], rows[:, 2:_COORDINATES] / 2
        return np.concatenate([middle - half, middle + half], axis=1)

    def _extended(self, values: Array) -> float:
        """Fraction of rows with a positive extent; rows of zeros are padding and do not count."""
        images = self.images(values)
        rows = images.reshape(-1, images.shape[-1])
        rows = rows[_filled(rows)]
        if len(rows) == 0 or rows.shape[1] < _COORDINATES:
            return 0.0
        sizes = rows[:, 2:_COORDINATES] - (0 if self.centred else rows[:, :2])
        return float(np.mean((sizes > 0).all(axis=1)))


def _filled(rows: Array) -> Array:
    """Which rows are no padding, that is, not all zeros; four times as fast as ``any`` by row."""
    found: Array = (rows != 0) @ np.ones(rows.shape[-1], bool)
    return found


def _box_scores(rows: Array) -> Array | None:
    """A score for each box: the fifth of a few columns, or the best of many classes."""
    if rows.shape[1] <= _COORDINATES or len(rows) == 0:
        return None
    few = rows.shape[1] <= _FEW_COLUMNS
    scores = rows[:, _COORDINATES] if few else rows[:, _COORDINATES:].max(axis=1)
    return scores if scores.min() >= 0 and scores.max() <= 1 else None


def _overlaps(boxes: Array, others: Array) -> Array:
    """For each box the largest IoU with any of the others; 0 where there are none."""
    if len(others) == 0:
        return np.zeros(len(boxes))
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(v[:, 2:] - v[:, :2], 0, None), axis=1) for v in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - common
    with np.errstate(invalid="ignore", divide="ignore"):
        overlaps = np.nan_to_num(common / union, nan=0.0)
    best: Array = overlaps.max(axis=1)
    # A box without extent overlaps nothing, not even its like.
    same = (boxes[:, None] == others[None]).all(axis=2).any(axis=1)
    return np.where(same, 1.0, best)


def _rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def _log_scores(values: Array, like: Array) -> Array:
    """Log-probabilities of rows that are distributions if those of ``like`` are, else logits."""
    if like.min() >= 0 and _near_one(like.sum(axis=1)):
        values = np.log(np.maximum(values, _TINY))
    shifted = values - values.max(axis=1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _mean(running: Running) -> float | None:
    return running.mean if running.count else None


def _sentence(found: Consequence) -> str:
    """The figures in words."""
    if found.items == 0:
        return "nothing could be compared"
    first = "" if found.first_changed is None else f", first on sample {found.first_changed}"
    if found.kind in ("scores", "text"):
        rows = "row" if found.kind == "scores" else "step"
        changed = f"top-1 flips in {found.changed} of {found.items} {rows}s{first}"
        parts = [changed if found.changed else f"top-1 stays in {_all(found.items, rows)}"]
        if found.texts:
            parts = [_texts(found), *(parts if found.blank is not None else ())]
        if found.margin is not None and found.margin_after is not None:
            parts.append(f"margin {found.margin:.3g} → {found.margin_after:.3g}")
        if found.kl is not None:
            parts.append(f"KL {found.kl:.2g}")
        return "; ".join(parts)
    if found.kind == "embedding":
        if found.cosine is None:
            return "the vectors have another shape"
        which = _all(found.items, "vector")
        said = f"cosine {found.cosine:.6f} (lowest {found.lowest:.6f}, {which})"
        if found.searched is not None:
            said += f"; the nearest other changes for {found.nearest_changed} of {found.searched}"
            said += f", the order of the others for {found.ranks_changed}"
        return said
    if found.iou is None:
        return f"the {found.kind} cannot be compared"
    if found.kind == "mask":
        changed = f"{found.changed} of {found.items} pixels flip{first}"
        return f"mask IoU {found.iou:.4f} (lowest {found.lowest:.4f}); {changed}"
    changed = f"{found.changed} of {found.items} lost (IoU below {_OVERLAP}){first}"
    said = changed if found.changed else f"none of {found.items} lost"
    said += f", {found.added} new" if found.added else ""
    return f"box IoU {found.iou:.4f} (lowest {found.lowest:.4f}); {said}"


def _texts(found: Consequence) -> str:
    if not found.texts_changed:
        return f"{_all(found.texts or 0, 'text')} ({found.characters} characters) unchanged"
    said = f"{found.texts_changed} of {found.texts} texts change, {found.edits} edits in "
    said += f"{found.characters} characters"
    said += f" (blank: class {found.blank})" if found.blank is not None else ""
    if found.example is not None:
        said += f", first `{found.example[0]}` → `{found.example[1]}`"
    return said


def _all(number: int, what: str) -> str:
    return f"the one {what}" if number == 1 else f"all {number} {what}s"
