"""FP32 rounding: the same arithmetic summed in another order, or fused into one instruction."""

from __future__ import annotations

import math

import numpy as np

from auditor.noises._cause import Cause
from auditor.ports import Array

# A segment is above rounding when its introduced error exceeds JITTER_FACTOR times what moving
# its inputs by their last bit does, and SMALLEST. Measured on 7 models: none of 1,210 clean
# segments is above, and every planted fault was found (docs/method.md).
JITTER_FACTOR = 20.0
SMALLEST = 3e-6
# … and REORDER_FACTOR times what summing in reverse order does. Against FP64, a backend was at most
# 3.03 times as far off as the reference.
REORDER_FACTOR = 5.0
# … and EXACT_FACTOR times what evaluating its exponentials exactly does: a runtime may be as far
# from the truth as the reference, on the other side of it.
EXACT_FACTOR = 2.0
# … and what a sum of n terms is expected to lose: λ√n·u with λ = 2 and u = 2⁻²⁴ (Higham and Mary,
# A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41, 2019). It
# matters where equal terms make rounding errors add up instead of cancelling.
SUM_FACTOR = 2 * 2.0**-24
# The same for segments that hand over float16: four times the unit roundoff of 2⁻¹¹. Chosen, not
# measured.
SMALLEST_HALF = 2e-3
# … and of those that compute in float64, whose unit roundoff is 2⁻⁵³.
_DOUBLE = 2.0**-29


def jitter(values: Array, generator: np.random.Generator, unit: float | None = None) -> Array:
    """``values`` × (1 + ε·U(−1, 1)); ε is ``unit``, or the unit in the last place at 1.

    Monte Carlo arithmetic (Parker 1997) restricted to a segment's inputs: what the outputs move
    by is what rounding alone can do there. Tensors that are not floating point stay as they are,
    and masks of zeros and ones: they are exact, and attention multiplies what is left of one minus
    such a mask with the lowest float.
    """
    if values.dtype.kind != "f" or _mask(values):
        return values
    unit = unit or float(np.finfo(values.dtype).eps)
    wide = np.float64 if values.dtype == np.float64 else np.float32
    noise = generator.uniform(-unit, unit, values.shape).astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        jittered: Array = values * (1 + noise)
    return jittered.astype(values.dtype, copy=False)


def _mask(values: Array) -> bool:
    few = values.flat[:64]  # most tensors' first values tell
    return all(bool(((v == 0) | (v == 1)).all()) for v in (few, values))


def scaled(values: Array) -> Array:
    """``values`` × (1 + ε): the last bit of every element moved the same way.

    Independent jitter averages out over a long sum. Rounding a folded constant does not: one
    rounded batch normalisation scale moves all products alike, and where the shift then cancels
    most of the sum, that is what remains. Only for float32 and wider: a whole unit of float16 would
    hide what sums in half precision lose.
    """
    if values.dtype.kind != "f" or values.dtype.itemsize < 4 or _mask(values):
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        moved: Array = values * (1 + np.finfo(values.dtype).eps)
    return moved.astype(values.dtype, copy=False)


def shifted(boxes: Array) -> Array:
    """Boxes [n, 4] that are moved as a whole, by the last bit of their largest coordinate.

    Their sizes stay as they are: an operator that takes as many samples as a box is long decides
    how many on them.
    """
    if boxes.dtype.kind != "f" or not boxes.size:
        return boxes
    moved: Array = boxes + np.spacing(np.abs(boxes).max(axis=-1, keepdims=True))
    return moved


def floor(
    jittered: float,
    reordered: float = 0.0,
    terms: int = 1,
    *,
    double: bool = False,
    exact: float = 0.0,
) -> float:
    """Introduced error (relative L2) that rounding explains.

    Args:
        jittered: relative L2 by which the outputs move when the inputs do (the larger of
            ``jitter`` and ``scaled``).
        reordered: relative L2 by which they move when every sum is added up in reverse order.
        terms: number of terms of the longest sum.
        double: whether all that is computed is float64.
        exact: relative L2 by which they move when functions are evaluated in double precision, or
            when the positions that are interpolated at move in their last bit: two runtimes may
            each round the scale and the position by half of that.
    """
    unit = _DOUBLE if double else 1.0
    expected = SUM_FACTOR * math.sqrt(terms) * unit
    moved = max(JITTER_FACTOR * jittered, REORDER_FACTOR * reordered, EXACT_FACTOR * exact)
    return max(moved, expected, SMALLEST * unit)


def furthest(jittered: float, terms: int) -> float:
    """Introduced error (relative L2) beyond which no order of a sum of ``terms`` terms leads.

    Each addition rounds by half a last bit at most, and ``jittered`` is what the last bit of every
    input does.
    """
    return terms * max(jittered, float(np.finfo(np.float32).eps))


NOISE = Cause(
    id="implementation.fp32_rounding",
    type="operator implementation",
    title="The same FP32 arithmetic in another order",
    cause=(
        "Kernels sum in another order, fuse multiply and add, or approximate exponentials; each "
        "result is as right as the other to about seven digits."
    ),
    applies=(
        "every segment: it is named where the introduced error is at or below the segment's "
        "floor, and nothing is replayed"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), sec. 3.2, operator implementation; Parker, Monte "
        "Carlo Arithmetic, UCLA CSD-970002 (1997)"
    ),
    advice="none needed: the difference is at the level of FP32 rounding",
    stated=frozenset({"f32", "fp32", "float32"}),
)
