"""In which narrow format a constant was stored, told by its values alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from auditor.ports import Array, Storage

# Elements of tensors looked at together. Products of longer vectors in double precision OpenBLAS
# shares among all cores, which takes ten times as long.
_PIECE = 1 << 13
# Steps of an 8-bit grid, and how near to its points values must lie, in steps.
_STEPS, _NEAR = 256, 0.01
_HALF = 2.0**-11  # a file may keep in half precision what was rounded by in single
# Any few numbers lie on some grid.
_LEVELS = 4
# Up to so many levels, 8 bits are not what they are stored in; with more than four and up to six
# bits no format is known.
_FOUR_BITS, _SIX_BITS = 16, 64
# So many values of a row are looked at first, since most are on no grid.
_GLANCE = 4096
FLOATS: dict[Storage, int] = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
# Sizes of blocks that share a scale, and how many blocks are looked at first.
_BLOCKS, _FEW = (32, 64, 128, 16, 256), 64
# Part of the square norm that channels may have which are on no grid.
_NOTHING = 1e-6
# Part that blocks may have which say nothing.
_TOO_MANY = 0.1


def storage_of(original: Array, value: Array) -> Storage | None:
    """The narrow format that the original's values were stored in."""
    if original.dtype != np.float32:
        return None
    for name, kind in FLOATS.items():
        if _is_neighbour(original, value, helper.tensor_dtype_to_np_dtype(kind)):
            return name
    levels = _levels(original, value)
    if levels is None or _FOUR_BITS < levels <= _SIX_BITS:
        return None
    return "8 bits" if levels > _SIX_BITS else "4 bits"


def _is_neighbour(original: Array, value: Array, narrow: np.dtype[Any]) -> bool:
    """Whether every value is one of the two of a narrower format around its original.

    Which of them is the converter's choice: the nearest, the one towards zero (bfloat16 as the
    upper half of the bits), the largest that is finite; zero for what would be subnormal.
    """
    return all(_are_neighbours(a, b, narrow) for a, b in pieces(original, value))


def _are_neighbours(original: Array, value: Array, narrow: np.dtype[Any]) -> bool:
    with np.errstate(over="ignore"):
        nearest = original.astype(narrow)
    back = nearest.astype(np.float32)
    same = value == back
    if same.all():
        return True
    same |= np.isnan(value) & np.isnan(back)
    same |= (value == 0) & (np.abs(original) < ml_dtypes.finfo(narrow).tiny)  # type: ignore[no-untyped-call]
    if same.all():
        return True
    other = np.nextafter(nearest, np.copysign(np.float32(np.inf), original - back).astype(narrow))
    return bool((same | ((back != original) & (value == other.astype(np.float32)))).all())


def pieces(a: Array, b: Array) -> Iterator[tuple[Array, Array]]:
    """Two arrays of one shape as pairs of vectors that stay in a core's cache."""
    a, b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, _PIECE):
        yield a[start : start + _PIECE], b[start : start + _PIECE]


def _levels(original: Array, value: Array) -> int | None:
    """Levels of the 8-bit grids that values lie on, next to their originals; None if on none.

    One grid, one per channel, or one per block of a channel. Channels without weight in the sum,
    which round to nothing, need no grid.
    """
    whole = (v.reshape(1, -1) for v in (original, value))
    if (levels := _levels_of(*whole)) is not None or value.ndim < 2:
        return levels
    for axis in (0, -1):
        rows = (np.moveaxis(v, axis, 0).reshape(v.shape[axis], -1) for v in (original, value))
        if (levels := _levels_of(*rows)) is not None:
            return levels
    # A convolution's as the matrix that quantisers make of them, a row for each filter.
    matrices = [v if v.ndim == 2 else v.reshape(len(v), -1) for v in (original, value)]
    for block in _BLOCKS:
        for axis in (0, 1) if value.ndim == 2 else (1,):
            a, b = (in_blocks(v, axis, block) for v in matrices)
            if len(a) == matrices[0].shape[1 - axis]:
                continue  # whole channels
            some = slice(None, None, -(-len(a) // _FEW))  # most weights are in no blocks
            if _levels_of(a[some], b[some], few=True) is None:
                continue
            if (levels := _levels_of(a, b, few=True)) is not None:
                return levels
    return None


def in_blocks(values: Array, axis: int, block: int) -> Array:
    """Rows of one block each; the last of an axis is filled up with its last value."""
    last = np.moveaxis(values, axis, -1)
    short = -last.shape[-1] % block
    filled = np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, short)], mode="edge")
    return filled.reshape(-1, block)


def _levels_of(original: Array, value: Array, *, few: bool = False) -> int | None:
    """The same of rows with a grid each; ``few``: those of a few levels say nothing.

    An outlier leaves hardly a level to the rest of its block.
    """
    squares = np.square(original, dtype=np.float64).sum(axis=1)
    levels = _on_grid(original, value)
    off = np.isnan(levels)
    if few:
        told = (np.diff(np.sort(value, axis=1), axis=1) > 0).sum(axis=1) + 1 >= _LEVELS
        if squares[off & ~told].sum() > _TOO_MANY * squares.sum():
            return None
        off &= told
    if squares[off].sum() > _NOTHING * squares.sum():
        return None
    return int(np.nanmax(levels, initial=0)) or None  # none was rounded


def _on_grid(original: Array, value: Array) -> NDArray[np.float64]:
    """Levels of each row's grid next to the originals; 0 where these are left; NaN for no grid."""
    same = np.asarray((original == value).all(axis=1))
    steps = grid_steps(value[:, :_GLANCE])
    if value.shape[1] > _GLANCE and np.isfinite(steps).any():
        steps = grid_steps(value)
    found = np.where(same, 0.0, np.nan)
    if np.isnan(steps).all():
        return found
    # What was on a grid before was changed in another way than by rounding.
    steps[np.isfinite(grid_steps(original))] = np.nan
    with np.errstate(invalid="ignore"):
        above, points = (original - value) / steps[:, None], value / steps[:, None]
        fits = np.isfinite(steps) & rounds(above, value, _NEAR + _HALF * np.abs(points)) & ~same
    found[fits] = np.rint(np.ptp(value[fits], axis=1) / steps[fits]) + 1
    return found


def rounds(steps: Array, values: Array, near: Array | float = _NEAR) -> NDArray[np.bool_]:
    """Whether each row is the originals rounded: to the nearest, downwards or towards zero.

    Args:
        steps: how far the originals are above the values, in steps of their grid.
        values: of which the largest and the smallest may be any distance from theirs.
        near: how far beyond half a step is a rounding too.
    """
    beyond = (values == values.max(axis=-1, keepdims=True)) & (steps > 0)
    beyond |= (values == values.min(axis=-1, keepdims=True)) & (steps < 0)
    found = ((np.abs(steps) <= 0.5 + near) | beyond).all(axis=-1)
    # Whole steps are a grid that was moved.
    whole = np.mean(np.abs(steps - np.rint(steps)) <= _NEAR, axis=-1)
    for over in (steps, steps * np.sign(values)):
        inside = (over >= -near) & (over <= 1 + near)
        found |= (inside | beyond).all(axis=-1) & (whole < 0.5)
    return np.asarray(found)


def grid_steps(rows: Array) -> NDArray[np.float64]:
    """The step of the 8-bit grid that each row's values lie on; NaN where they lie on none."""
    levels = np.sort(rows.astype(np.float64), axis=1)
    found = np.full(len(levels), np.nan)
    with np.errstate(over="ignore"):
        halves = 2 * _HALF if np.array_equal(rows.astype(np.float16), rows) else 0.0
    if not np.isfinite(levels).all():
        return found
    gaps = np.diff(levels, axis=1)
    distinct = (gaps > 0).sum(axis=1) + 1
    open_ = np.flatnonzero((distinct >= _LEVELS) & (distinct <= _STEPS))
    levels, gaps = levels[open_], gaps[open_]
    least = np.where(gaps > 0, gaps, np.inf).min(axis=1, initial=np.inf)
    largest = np.abs(levels).max(axis=1, initial=0)
    # The step is a part of the smallest gap; or the largest value is the last of 8 or 7 bits.
    for step in (
        *(least / n for n in (1, 2, 3, 4)),
        *(largest / n for n in (127, 128, 255, 63, 64)),
    ):
        points = levels / step[:, None]
        off = np.abs(points - np.rint(points)) - halves * np.abs(points)
        fits = (np.ptp(points, axis=1) <= _STEPS) & (off.max(axis=1) <= _NEAR)
        new = fits & np.isnan(found[open_])
        found[open_[new]] = step[new]
    return found
