"""Small pictures of a tensor on both sides, for the drill-down.

A tensor is shown by one plane: the last two of its axes that are longer than 1, where the others
have the index at which the segment's own error is largest. Of feature maps that is the worst
channel, of attention the worst head, of tokens all features. Planes larger than a picture are
divided into cells: values are means over a cell, a difference is the one farthest from zero in it,
so that a single wrong element still shows.
"""

from __future__ import annotations

import math

import numpy as np

from auditor.comparison import metrics
from auditor.ports import Array
from auditor.records.measured import Picture

MOST = 40  # pictures kept of one backend: 256 KiB, and a third more in JSON
SIDE = 40  # cells along an axis; more columns where there are few rows,
_CELLS = SIDE * SIDE  # but never more cells than this, of one byte each
_LONGEST = 160  # columns
_ZERO, _TOP = 128, 255  # levels of no difference, and of the largest; 0 is no finite number


def picture(
    name: str, sample: int, observed: Array, replayed: Array, reference: Array
) -> Picture | None:
    """The picture of one output of a segment; None where shapes differ or there is one value only.

    Args:
        name: the tensor's.
        sample: the sample's index.
        observed: what the backend has, of any shape and type.
        replayed: the reference segment on the backend's own inputs.
        reference: the reference's tensor.
    """
    shape = observed.shape
    axes = [axis for axis, size in enumerate(shape) if size > 1][-2:]
    if not axes or observed.size == 0 or not shape == replayed.shape == reference.shape:
        return None
    rows, columns = [1, *(shape[axis] for axis in axes)][-2:]
    planes = [v.reshape(-1, rows, columns) for v in (observed, replayed, reference)]
    with np.errstate(over="ignore", invalid="ignore"):  # numbers that are not finite show as such
        error = metrics.to_float(planes[0]) - metrics.to_float(planes[1])
        worst = int(np.einsum("ijk,ijk->i", error, error).argmax())
        b, h, r = (plane[worst].astype(np.float64) for plane in planes)
        deployed, expected = _means(b), _means(r)
        accumulated, introduced = _extremes(b - r), _extremes(b - h)
    place = np.unravel_index(worst * rows * columns, shape)
    both = np.concatenate([deployed, expected])
    low, high = metrics.value_range(both)
    return Picture(
        tensor=name,
        sample=sample,
        plane=f"[{', '.join(':' if a in axes else str(i) for a, i in enumerate(place))}]",
        size=(rows, columns),
        cells=(deployed.shape[0], deployed.shape[1]),
        range=(low, high),
        most_accumulated=_most(accumulated),
        most_introduced=_most(introduced),
        reference=_levels(expected, low, high - low),
        deployed=_levels(deployed, low, high - low),
        accumulated=_signed(accumulated),
        introduced=_signed(introduced),
    )


def _edges(rows: int, columns: int) -> tuple[list[int], list[int]]:
    """Where the cells of a plane begin."""
    down = min(rows, SIDE)
    across = min(columns, max(SIDE, min(_LONGEST, _CELLS // down)))
    return [i * rows // down for i in range(down)], [i * columns // across for i in range(across)]


def _means(plane: Array) -> Array:
    down, across = _edges(*plane.shape)
    sums = np.add.reduceat(np.add.reduceat(plane, down, axis=0), across, axis=1)
    sizes = np.outer(np.diff([*down, plane.shape[0]]), np.diff([*across, plane.shape[1]]))
    made: Array = sums / sizes
    return made


def _extremes(plane: Array) -> Array:
    """In each cell the number farthest from zero; NaN where there is one."""
    down, across = _edges(*plane.shape)
    high = np.maximum.reduceat(np.maximum.reduceat(plane, down, axis=0), across, axis=1)
    low = np.minimum.reduceat(np.minimum.reduceat(plane, down, axis=0), across, axis=1)
    return np.where(high >= -low, high, low)


def _most(cells: Array) -> float:
    """The largest finite distance from zero."""
    return float(np.abs(cells[np.isfinite(cells)]).max(initial=0.0))


def _levels(cells: Array, low: float, span: float) -> bytes:
    """Numbers from ``low`` on as levels from 1 to 255."""
    part = (cells - low) / span if 0 < span < math.inf else np.zeros_like(cells)
    return _bytes(cells, 1 + part * (_TOP - 1))


def _signed(cells: Array) -> bytes:
    """Numbers of either sign as levels from 1 to 255, with zero at 128."""
    most = _most(cells)
    part = cells / most if most > 0 else np.zeros_like(cells)
    return _bytes(cells, _ZERO + part * (_TOP - _ZERO))


def _bytes(cells: Array, levels: Array) -> bytes:
    return np.where(np.isfinite(cells), np.nan_to_num(levels).round(), 0).astype(np.uint8).tobytes()
