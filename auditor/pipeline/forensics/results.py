"""Which post-processing made this result? A search over the variants of a description.

The network's outputs are known, recorded or computed; the ``post`` of a pipeline says which of
them is what, and is the first way that is tried. Of boxes the steps are told apart one after
another, and what a step rules out is not tried in the next:

1. the activation, by the recorded scores alone;
2. decoding, offset, clipping and rounding, by the recorded corners;
3. suppression, its limit and the threshold, by which candidates are recorded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from auditor.comparison.texts import edits
from auditor.errors import UsageError
from auditor.graphs.model import shown
from auditor.pipeline.postprocessing import heads, results
from auditor.pipeline.postprocessing.masks import Enlarger, Enlarging
from auditor.pipeline.postprocessing.post import (
    Activation,
    Coding,
    Order,
    Post,
    Rounding,
    Spelling,
    Suppression,
    several,
)
from auditor.records.backend import Gap
from auditor.records.forensics import ResultForensics, ResultVariant

if TYPE_CHECKING:
    from auditor.pipeline.preprocessing.stages import Placement
    from auditor.ports import Array, Arrays

_LISTED = 8
_SCORE = 1e-4  # scores closer than this are the same: engines differ by less
_PIXEL = 0.01  # corners closer than this are the same
_OVERLAPS = tuple(round(0.05 * step, 2) for step in range(2, 20))
_VARIANCES = ((1.0, 1.0), (0.1, 0.2))
_PACKAGES = {"opencv": "cv2", "pillow": "PIL", "torch": "torch"}


@dataclass(frozen=True, slots=True)
class _Tried:
    post: Post
    residual: float
    limit: float  # residuals up to it, and differences below it, are rounding
    mismatched: int | None = None

    @property
    def size(self) -> tuple[float, int]:
        """What ways are ordered by."""
        steps = self.residual // self.limit if self.limit else self.residual
        return steps, self.mismatched or 0


def identify(
    recorded: Array, outputs: Arrays, described: Post, place: Placement | None
) -> ResultForensics:
    """Find what made a result of the network's outputs.

    Args:
        recorded: the result: boxes ``[detections, 5 or 6]`` (corners, score, class), a mask,
            scores, or of a text the class numbers ``[characters]``.
        outputs: the network's outputs by name.
        described: how the outputs are to be read, and the first way that is tried.
        place: where in the photograph the network's input is; for masks that were enlarged.

    Raises:
        UsageError: the record is no such result, or the outputs are not as described or not
            finite.
    """
    if recorded.dtype.kind not in "fiub" or recorded.size == 0 or not np.isfinite(recorded).all():
        raise UsageError(
            f"the recorded result is {recorded.dtype} {shown(recorded.shape)}, or not finite",
            "Save what the application made, as numbers, with numpy.save.",
        )
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise UsageError(
                f"the network's output `{name}` holds NaN or infinity",
                "A result of such outputs tells nothing about what made it; record others.",
            )
    if described.kind == "boxes":
        return _Boxes(recorded, outputs, described, place).report()
    gaps: list[Gap] = []
    limit = _SCORE if described.kind == "scores" else 0.0
    found = [
        _Tried(way, _distance(recorded, outputs, way, place), limit)
        for way in _ways(described, place, outputs, gaps)
    ]
    usable = [one for one in found if np.isfinite(one.residual)]
    if not usable:
        raise UsageError(
            f"the recorded result is {shown(recorded.shape)}: no way makes a result of this shape",
            "Give the result of one photograph, and the pipeline that belongs to it.",
        )
    unit = {"scores": "largest difference", "mask": "share of pixels", "text": "edits"}
    return _report(described, usable, unit[described.kind], len(found), 0, gaps)


def _report(
    described: Post,
    found: Sequence[_Tried],
    unit: str,
    tried: int,
    skipped: int,
    gaps: Sequence[Gap],
    threshold: tuple[float, float] | None = None,
    overlap: tuple[float, float] | None = None,
) -> ResultForensics:
    ranked = sorted(found, key=lambda one: one.size)  # stable: what is described comes first
    best = ranked[0]
    alike = [one for one in ranked[1:] if one.size == best.size]
    others = [one for one in ranked[1:] if not any(one is other for other in alike)]
    wanted, made = described.steps(), best.post.steps()
    return ResultForensics(
        kind=described.kind,
        best=_variant(best),
        unit=unit,
        exact=best.size == (0, 0),
        differs={k: (wanted[k], made[k]) for k in wanted if wanted[k] != made.get(k, wanted[k])},
        indistinguishable=tuple(dict.fromkeys(_words(one.post) for one in alike)),
        runners_up=tuple(map(_variant, others[:_LISTED])),
        threshold=threshold,
        overlap=overlap,
        tried=tried,
        skipped=skipped,
        gaps=tuple(gaps),
    )


def _variant(one: _Tried) -> ResultVariant:
    return ResultVariant(_words(one.post), one.residual, one.mismatched)


def _words(post: Post) -> str:
    said = post.steps()
    return "; ".join(words for step, words in said.items() if step != "result")


# --- one result for each photograph ----------------------------------------------------------


def _ways(post: Post, place: Placement | None, outputs: Arrays, gaps: list[Gap]) -> Iterator[Post]:
    """Every way to a result that is no list of boxes, what is described first."""
    yield post
    found: list[Post] = []
    if post.kind == "scores":
        found = [replace(post, activation=a) for a in get_args(Activation)]
    elif post.kind == "text":
        shape = heads.output(outputs, several(post.output)[0]).shape
        blanks = dict.fromkeys((post.blank, 0, shape[-1] - 1))
        found = [replace(post, text=t, blank=b) for t, b in product(get_args(Spelling), blanks)]
    else:
        found.append(replace(post, resize="none"))
        for by in get_args(Enlarger) if place is not None else ():
            if by != "none" and importlib.util.find_spec(_PACKAGES[by]) is None:
                gaps.append(Gap(f"mask resize {by}", "start", "it is not installed"))
            elif by != "none":
                orders = [o for o in get_args(Order) if post.mask == "threshold" or o == "resize"]
                found += [
                    replace(post, resize=by, interpolation=how, order=order)
                    for how, order in product(get_args(Enlarging), orders)
                ]
    yield from (one for one in found if one != post)


def _distance(recorded: Array, outputs: Arrays, post: Post, place: Placement | None) -> float:
    """How far a way's result is from the record; infinite where its shape is another."""
    value = results.result(outputs, post, place)[results.NAME]
    if post.kind == "text":
        rows = value[0]
        codes = rows[rows.any(axis=1)].argmax(axis=1)
        return float(edits(codes.tolist(), recorded.reshape(-1).astype(np.int64).tolist()))
    if value.size != recorded.size:
        return float("inf")
    given = recorded.reshape(value.shape).astype(np.float64)
    if post.kind == "scores":
        return float(np.abs(value - given).max())
    if post.mask == "threshold":
        above = given > given.max() / 2 if given.max() > 1 else given > 0
        return float(np.mean((value > 0) != above))
    return float(np.mean(value != given))


# --- boxes -----------------------------------------------------------------------------------


class _Boxes:
    """The search for what made a list of boxes."""

    def __init__(
        self, recorded: Array, outputs: Arrays, described: Post, place: Placement | None
    ) -> None:
        rows = recorded.reshape(-1, recorded.shape[-1]).astype(np.float64)
        rows = rows[rows.any(axis=1)]
        if rows.ndim != 2 or rows.shape[1] not in (5, 6) or len(rows) == 0:
            raise UsageError(
                f"the recorded boxes are {shown(recorded.shape)}",
                "Save [detections, 5 or 6]: left, top, right, bottom, score and class.",
            )
        self._corners, self._scores = rows[:, :4], rows[:, 4]
        self._kinds = rows[:, 5].astype(np.int64) if rows.shape[1] == 6 else None
        self._outputs = outputs
        self._described = described
        self._place = place
        self._tried = self._skipped = 0
        self._others: list[_Tried] = []
        self._gaps: list[Gap] = []

    def report(self) -> ResultForensics:
        """The answer."""
        decoded = self._decoded(self._activated())
        found: list[_Tried] = []
        for way, residual, rows in decoded:
            found += self._suppressed(way, residual, rows)
        found.sort(key=lambda one: one.size)
        best = found[0]
        alike = [f for f in found if f.size == best.size]
        described = next(
            (f for f in alike if _same_but(f.post, self._described, "threshold")), None
        )
        if described is not None:  # the description explains it as well as any other
            found.remove(described)
            found.insert(0, described)
            best = described
        threshold, overlap = self._limits(best, found)
        found += self._others
        numbers = self._tried, self._skipped
        return _report(self._described, found, "pixels", *numbers, self._gaps, threshold, overlap)

    def _activated(self) -> list[Post]:
        """Ways whose scores are those of the record."""
        found = []
        for activation in _first(self._described.activation, get_args(Activation)):
            way = replace(self._described, activation=activation)
            best = np.sort(heads.candidates(self._outputs, way, self._place)[1].astype(np.float64))
            at = np.clip(np.searchsorted(best, self._scores), 1, len(best) - 1)
            near = np.minimum(np.abs(best[at - 1] - self._scores), np.abs(best[at] - self._scores))
            found.append((float(near.max()), way))
            self._tried += 1
        least = min(far for far, _ in found)
        kept = [way for far, way in found if far <= max(_SCORE, least)]
        self._skipped += len(found) - len(kept)
        return kept

    def _decoded(self, ways: Sequence[Post]) -> list[tuple[Post, float, Array]]:
        """Ways whose corners are the closest to the record, and which candidates it holds."""
        found: list[tuple[Post, float, Array]] = []
        for way in (other for one in ways for other in self._codings(one)):
            try:
                corners, best, kind, _ = heads.candidates(self._outputs, way, self._place)
            except UsageError as error:
                self._gaps.append(Gap(_words(way), "run", error.message))
                continue
            self._tried += 1
            found.append((way, *self._matched(corners, best, kind)))
        least = min(residual for _, residual, _ in found)
        kept = [one for one in found if one[1] <= max(_PIXEL, least)]
        others = sorted((o for o in found if o[1] > max(_PIXEL, least)), key=lambda o: o[1])
        self._others = [_Tried(way, far, _PIXEL) for way, far, _ in others[:_LISTED]]
        self._skipped += len(found) - len(kept)
        return kept

    def _codings(self, way: Post) -> Iterator[Post]:
        anchored = bool(way.anchors or way.sizes or way.cell)
        possible = {
            "corners": True,
            "centre": True,
            "corner-deltas": anchored,
            "centre-deltas": anchored,
            "distances": bool(way.stride),
            "dfl": False,  # another number of numbers
        }
        codings = [c for c in get_args(Coding) if possible[c] and way.coding != "dfl"]
        clips = [None] if way.clip is None else [way.clip, None]
        for coding, offset, rounding, clip in product(
            _first(way.coding, codings),
            _first(way.offset, (0, 1)),
            _first(way.rounding, get_args(Rounding)),
            clips,
        ):
            deltas = coding.endswith("deltas")
            pointed = coding in ("distances", "dfl") or (deltas and way.stride and not way.cell)
            for pair, shift in product(
                _first(way.variances, _VARIANCES) if deltas else [way.variances],
                _first(way.shift, (0.0, 0.5)) if pointed else [way.shift],
            ):
                yield replace(
                    way,
                    coding=coding,
                    offset=offset,
                    rounding=rounding,
                    clip=clip,
                    variances=pair,
                    shift=shift,
                )

    def _matched(self, corners: Array, best: Array, kind: Array) -> tuple[float, Array]:
        """Root mean square distance of the recorded corners, and the candidates they are."""
        matches = []
        squares = 0.0
        for row in range(len(self._scores)):
            near = np.abs(best - self._scores[row])
            close = np.flatnonzero(near <= max(_SCORE, float(near.min())))
            if self._kinds is not None and (kind[close] == self._kinds[row]).any():
                close = close[kind[close] == self._kinds[row]]
            far = ((corners[close].astype(np.float64) - self._corners[row]) ** 2).sum(axis=1)
            at = int(far.argmin())
            matches.append(int(close[at]))
            squares += float(far[at])
        return float(np.sqrt(squares / (4 * len(self._scores)))), np.unique(matches)

    def _suppressed(self, way: Post, residual: float, rows: Array) -> Iterator[_Tried]:
        """Every suppression after one decoding."""
        corners, best, kind, classes = heads.candidates(self._outputs, way, self._place)
        lowest = float(self._scores.min()) - _SCORE
        recorded = set(rows.tolist())
        thresholds = [way.threshold] if way.threshold <= lowest + 2 * _SCORE else []
        aware = _first(way.class_aware, (True, False)) if classes > 1 else [way.class_aware]
        for by in _first(way.nms, get_args(Suppression)):
            if by == "opencv" and importlib.util.find_spec("cv2") is None:
                self._gaps.append(Gap("suppression by opencv", "start", "it is not installed"))
                continue
            grid: list[tuple[int, bool, float]] = [(way.iou_offset, way.class_aware, way.iou)]
            if by != "none":
                grid = list(
                    product(_first(way.iou_offset, (0, 1)), aware, _first(way.iou, _OVERLAPS))
                )
            for (offset, own, iou), threshold in product(grid, (*thresholds, lowest)):
                one = replace(
                    way, nms=by, iou_offset=offset, class_aware=own, iou=iou, threshold=threshold
                )
                kept = set(results.left(corners, best, kind, one).tolist())
                self._tried += 1
                yield _Tried(one, residual, _PIXEL, len(kept ^ recorded))

    def _limits(
        self, best: _Tried, found: Sequence[_Tried]
    ) -> tuple[tuple[float, float], tuple[float, float] | None]:
        """Between which thresholds, and which limits of overlaps, the record says the same."""
        lower = replace(best.post, threshold=best.post.threshold / 2, top_k=10**9)
        corners, scores, kind, _ = heads.candidates(self._outputs, lower, self._place)
        kept = scores[results.left(corners, scores, kind, lower)]
        lowest = float(self._scores.min())
        under = kept[kept < lowest - _SCORE]
        begin = float(under.max()) if under.size else float(lower.threshold)
        if best.post.nms == "none":
            return (begin, lowest), None
        same = [
            one.post.iou
            for one in found
            if one.size == best.size and _same_but(one.post, best.post, "iou", "threshold")
        ]
        return (begin, lowest), (min(same), max(same))


def _same_but(a: Post, b: Post, *fields: str) -> bool:
    taken: dict[str, Any] = {field: getattr(b, field) for field in fields}
    return replace(a, **taken) == b


def _first(own: Any, others: Sequence[Any]) -> list[Any]:
    """What is described, then the others."""
    return [own, *(other for other in others if other != own)]
