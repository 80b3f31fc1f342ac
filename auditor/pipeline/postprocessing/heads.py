"""From a detector's outputs to its candidates: boxes in pixels, each with a score and a class.

A head has one output for everything (YOLO), one for boxes and one for scores (SSD), or several
levels of each (RetinaNet, FCOS, PicoDet). Every level is a grid, whose cells are ``stride`` pixels
apart; candidates follow each other by level, row, column, and anchor of the cell.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from auditor.errors import UsageError, reason
from auditor.pipeline.postprocessing.post import BEHIND, Activation, Names, Shapes, several

if TYPE_CHECKING:
    from auditor.pipeline.postprocessing.post import Post
    from auditor.pipeline.preprocessing.stages import Placement
    from auditor.ports import Array, Arrays


def misdescribed(message: str) -> UsageError:
    """An error about a ``post`` that does not fit the network."""
    return UsageError(
        message,
        'Change `post` of the pipeline to what the network gives, or say post = "none" '
        "(docs/pipeline.md).",
    )


def output(outputs: Arrays, name: str) -> Array:
    """One output by its name; the first one for "".

    Raises:
        UsageError: the network has none of that name.
    """
    if name and name not in outputs:
        raise misdescribed(
            f"the network has no output `{name}`; its outputs: {', '.join(sorted(outputs))}"
        )
    return outputs[name] if name else next(iter(outputs.values()))


def activated(values: Array, activation: Activation, axis: int) -> Array:
    """Scores through their activation."""
    if activation == "softmax":
        shifted = np.exp(values - values.max(axis=axis, keepdims=True))
        made: Array = shifted / shifted.sum(axis=axis, keepdims=True)
        return made
    if activation == "sigmoid":
        with np.errstate(over="ignore"):
            made = 1 / (1 + np.exp(-values))
        return made
    return values


def candidates(
    outputs: Arrays, post: Post, place: Placement | None = None
) -> tuple[Array, Array, Array, int]:
    """Every box before any is left out.

    Args:
        outputs: the network's, by name.
        post: how they are read.
        place: knows the height and width of the network's input, from which the grids of levels
            without axes of their own, and the size of ``parts``, follow.

    Returns:
        Corners ``[candidates, 4]``, best scores and their classes ``[candidates]``, and how many
        classes there are.

    Raises:
        UsageError: the outputs are not what the description says.
    """
    levels = _named(outputs, post.output)
    per_cell = [_per_cell(values, post) for values in levels]
    rows = _rows(levels, per_cell, post)
    after = 4
    if post.coding == "dfl":
        after = 4 * post.bins or rows.shape[1]
    behind, objectness = rows[:, after:], None
    if post.objectness == BEHIND:
        objectness, behind = behind[:, :1], behind[:, 1:]
    elif post.objectness:
        objectness = _rows(_named(outputs, post.objectness), per_cell, post)
    scores = _rows(_named(outputs, post.scores), per_cell, post) if post.scores else behind
    if rows.shape[1] < 4 or len(scores) != len(rows) or scores.shape[1] == 0:
        where = f"output `{post.output}`" if post.output else "the first output"
        raise misdescribed(
            f"{where} makes {len(rows)} boxes of {rows.shape[1]} numbers, with "
            f"{len(scores)} scores of {scores.shape[1]} classes"
        )
    scores = activated(scores, post.activation, axis=1)
    if post.background is not None:
        scores = np.delete(scores, post.background, axis=1)
    best, kind = scores.max(axis=1), scores.argmax(axis=1)
    if objectness is not None:
        if objectness.shape != (len(rows), 1):
            raise misdescribed(f"{objectness.size} values of objectness for {len(rows)} boxes")
        if post.activation == "sigmoid":
            objectness = activated(objectness, "sigmoid", axis=1)
        best = best * objectness[:, 0]
        best = np.sqrt(best) if post.join == "root" else best
    corners = _corners(rows[:, :after], post, [v.shape for v in levels], place)
    if post.clip is not None:
        height, width = post.clip
        most = np.array([width, height, width, height], np.float32) - post.offset
        corners = np.clip(corners, 0, most)
    if post.rounding != "none":
        corners = np.rint(corners) if post.rounding == "nearest" else np.floor(corners)
    return corners, best, kind, scores.shape[1]


# --- from outputs to rows ------------------------------------------------------------------------


def _named(outputs: Arrays, names: Names) -> list[Array]:
    return [output(outputs, name) for name in several(names)]


def _per_cell(values: Array, post: Post) -> int:
    """How many anchors share the axis of columns: those of a cell, in a map of cells."""
    if values.ndim != 4 or post.coding == "dfl":
        return 1
    if post.scores:
        columns: int = values.shape[1 if post.channels_first else -1]
        return max(1, columns // 4)
    return len(next(iter(_shapes(post)), "1"))


def _rows(levels: list[Array], per_cell: list[int], post: Post) -> Array:
    """[candidates, columns] of one photograph, level after level."""
    if len(levels) != len(per_cell):
        raise misdescribed(f"{len(levels)} outputs of scores for {len(per_cell)} of boxes")
    found = []
    for given, many in zip(levels, per_cell, strict=True):
        values = np.moveaxis(given, 1, -1) if post.channels_first and given.ndim >= 3 else given
        if values.shape[0] != 1 and values.ndim > 2:
            raise misdescribed(f"boxes of {values.shape[0]} photographs at once: one was expected")
        columns = values.shape[-1] // many if values.ndim == 4 else values.shape[-1]
        found.append(values.reshape(-1, columns).astype(np.float32, copy=False))
    return _joined(found)


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# --- from rows to corners ------------------------------------------------------------------------


def _corners(
    rows: Array, post: Post, shapes: list[tuple[int, ...]], place: Placement | None
) -> Array:
    """x1, y1, x2, y2 in pixels of the network's input."""
    numbers = rows[:, :4]
    far = np.float32(post.offset)
    if post.coding in ("distances", "dfl") or post.unit == "strides":
        points, strides = _points(post, shapes, len(rows), place)
    if post.coding == "dfl":
        numbers = _expected(rows) * strides
    elif post.unit == "strides":
        numbers = numbers * strides
    if post.coding == "corners":
        found = numbers
    elif post.coding == "centre":
        found = _around(numbers[:, :2], numbers[:, 2:], far)
    elif post.coding in ("distances", "dfl"):
        found = np.concatenate([points - numbers[:, :2], points + numbers[:, 2:] - far], axis=1)
    else:
        found = _from_anchors(numbers, _anchors(post, shapes, len(rows), place), post)
    if post.unit == "parts":
        height, width = _input(place)
        found = found * np.array([width, height, width, height], np.float32)
    return found


def _expected(rows: Array) -> Array:
    """Distances as means of distributions over 0, 1, 2, … (Li et al. 2020, eq. 3 and 4)."""
    if rows.shape[1] % 4:
        raise misdescribed(f"{rows.shape[1]} numbers of a box are no four distributions")
    bins = rows.reshape(len(rows), 4, -1)
    mean: Array = activated(bins, "softmax", axis=2) @ np.arange(bins.shape[2], dtype=np.float32)
    return mean


def _from_anchors(numbers: Array, anchors: Array, post: Post) -> Array:
    if anchors.shape != numbers.shape:
        raise misdescribed(f"{len(anchors)} anchors for {len(numbers)} boxes")
    position, extent = post.variances
    size = anchors[:, 2:] - anchors[:, :2] + np.float32(post.offset)
    if post.coding == "corner-deltas":
        return anchors + numbers * np.float32(position) * np.tile(size, 2)
    middle = anchors[:, :2] + np.float32(0.5) * size
    middle = middle + numbers[:, :2] * np.float32(position) * size
    with np.errstate(over="ignore"):
        size = size * np.exp(numbers[:, 2:] * np.float32(extent))
    return _around(middle, size, np.float32(post.offset))


def _around(middle: Array, size: Array, offset: np.float32) -> Array:
    half = np.float32(0.5) * size
    return np.concatenate([middle - half, middle + half - offset], axis=1)


def _input(place: Placement | None) -> tuple[int, int]:
    if place is None:
        raise UsageError(
            "these boxes follow from the size of the network's input, which is not known here",
            "Give the photograph (--image).",
        )
    return place.tensor


def _grids(
    post: Post, shapes: list[tuple[int, ...]], place: Placement | None
) -> list[tuple[int, int, int]]:
    """Height, width and stride of each level, in cells and pixels."""
    strides = several(post.stride)
    if len(shapes) not in (1, len(strides)):
        raise misdescribed(f"{len(shapes)} outputs of boxes for {len(strides)} strides")
    if len(shapes) == len(strides) and all(len(shape) == 4 for shape in shapes):
        cells = [shape[2:] if post.channels_first else shape[1:3] for shape in shapes]
    else:
        whole = _input(place)
        cells = [tuple(-(-side // stride) for side in whole) for stride in strides]
    return [(*size, stride) for size, stride in zip(cells, strides, strict=True)]


def _points(
    post: Post, shapes: list[tuple[int, ...]], boxes: int, place: Placement | None
) -> tuple[Array, Array]:
    """X and y of every cell's point, ``[boxes, 2]``, and its stride, ``[boxes, 1]``."""
    grids = _grids(post, shapes, place)
    points = [_middles(*grid, post.shift) for grid in grids]
    strides = [np.full((len(p), 1), g[2], np.float32) for p, g in zip(points, grids, strict=True)]
    if sum(map(len, points)) != boxes:
        raise misdescribed(f"{sum(map(len, points))} cells for {boxes} boxes")
    return _joined(points), _joined(strides)


def _anchors(
    post: Post, shapes: list[tuple[int, ...]], boxes: int, place: Placement | None
) -> Array:
    """Corners of every anchor."""
    if isinstance(post.anchors, str) and post.anchors:
        try:
            found = np.load(Path(post.anchors), allow_pickle=False)
            return np.asarray(found, np.float32).reshape(-1, 4)
        except (OSError, ValueError) as error:
            raise misdescribed(
                f"the anchors {post.anchors} cannot be read: {reason(error)}"
            ) from error
    grids = _grids(post, shapes, place)
    if post.cell:
        cells = several(post.cell)
        return _joined([_cells(*g, c - post.offset) for g, c in zip(grids, cells, strict=True)])
    made = []
    for (height, width, stride), level in zip(grids, _shapes(post), strict=True):
        middle = _middles(height, width, stride, post.shift)[:, None]
        size = np.array(level, np.float32)[None]
        start = middle - np.float32(0.5) * size
        corners = np.concatenate([start, start + size - np.float32(post.offset)], axis=2)
        made.append(corners.reshape(-1, 4))
    return _joined(made)


def _shapes(post: Post) -> Shapes:
    """Width and height of each anchor of a cell, by level: ratios first, as torchvision has it."""
    if isinstance(post.anchors, tuple):
        return post.anchors
    return tuple(
        tuple((size / ratio**0.5, size * ratio**0.5) for ratio in post.ratios for size in level)
        for level in post.sizes
    )


@lru_cache(maxsize=16)
def _middles(height: int, width: int, stride: int, shift: float) -> Array:
    """X and y in every cell of a grid; read-only: every photograph of this size shares it."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    found = ((np.stack([x, y], axis=-1).reshape(-1, 2) + shift) * stride).astype(np.float32)
    found.flags.writeable = False
    return found


@lru_cache(maxsize=16)
def _cells(height: int, width: int, stride: int, extent: int) -> Array:
    """Corners of the cells of a grid, as above."""
    start = _middles(height, width, stride, 0.0)
    found = np.concatenate([start, start + np.float32(extent)], axis=1)
    found.flags.writeable = False
    return found
