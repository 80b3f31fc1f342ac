"""Distances between a tensor and its reference, in one pass and mergeable over samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.ports import Array, Arrays

if TYPE_CHECKING:  # workers compare bits, and need no records for that: a twentieth of their start
    from auditor.records.measured import Concentration, Distance, Spread

# float32 dot products lose nothing that matters here unless squares leave this range.
_SAFE_SQUARE = (1e-30, 1e37)

# Tensors are compared in pieces of so many elements, which stay in a core's cache with what is
# computed from them: each byte comes from memory once, and no temporary is as large as a tensor.
_BLOCK = 1 << 15
# Up to so many float64 a product of vectors is one thread's work: OpenBLAS shares more among all
# cores, whose threads then wait for one another longer than they compute, and the sum's last bits
# depend on their number.
_ALONE = 1 << 13

# Scores at or below this may be masked: kept out of a softmax by -1e4, -1e9 or the lowest number
# added to them. They are, where their squares are so many times those of the others.
_MASKED, _APART = -5e3, 1e4

# Bins of relative error, a factor of 8 wide.
_BINARY_EDGES = tuple(range(-30, 4, 3))
HISTOGRAM_EDGES = tuple(e * math.log10(2) for e in _BINARY_EDGES)


@dataclass(slots=True)
class Moments:
    """Running sums over samples from which a ``Distance`` is read.

    With d = b − r: ``reference`` is Σr², ``cross`` Σrd, ``error`` Σd²; Σb² and Σrb follow from
    them, so that a tensor is read as few times as possible. ``ordinary`` and ``off`` are Σr² and
    Σd² without what may be masked in either.
    """

    reference: float = 0.0
    cross: float = 0.0
    error: float = 0.0
    max_abs: float = 0.0
    mismatch: str | None = None
    ordinary: float = 0.0
    off: float = 0.0

    @property
    def observed(self) -> float:
        """Σb²."""
        return max(0.0, self.reference + 2 * self.cross + self.error)

    def add(self, observed: Array, reference: Array) -> None:
        """Add one sample's tensor; the two may have any shape and numeric or bool dtype."""
        if observed.shape != reference.shape:
            self.mismatch = self.mismatch or (
                f"shape {_dims(observed.shape)} instead of {_dims(reference.shape)}"
            )
            self.error = self.max_abs = math.inf
            return
        if reference.size == 0:
            return
        self.merge(_compared(observed, reference))

    def merge(self, other: Moments) -> None:
        """Add everything that was added to ``other``."""
        self.reference += other.reference
        self.cross += other.cross
        self.error += other.error
        self.max_abs = max(self.max_abs, other.max_abs)
        self.mismatch = self.mismatch or other.mismatch
        self.ordinary += other.ordinary
        self.off += other.off

    def relative_to(self, whole: Moments) -> float:
        """Σd² over the Σr² of other moments; infinite where that is 0.

        What is masked counts by its own norm, beside which no error of the others could be seen.
        """
        if self.error == 0:
            return 0.0
        if 0 < _APART * whole.ordinary < whole.reference and math.isfinite(self.error):
            masked = max(0.0, self.error - self.off) / (whole.reference - whole.ordinary)
            return self.off / whole.ordinary + masked
        scale = whole.reference or self.observed or self.reference
        return self.error / scale if scale > 0 else math.inf

    def distance(self) -> Distance:
        """The distance over everything added so far."""
        from auditor.records.measured import Distance

        if self.error == 0.0:
            return Distance(0.0, 0.0, math.inf, 1.0, self.mismatch)
        scale = self.reference if self.reference > 0 else self.observed
        if not math.isfinite(self.error) or scale == 0.0:
            return Distance(math.inf, self.max_abs, -math.inf, 0.0, self.mismatch)
        relative = math.sqrt(self.error / scale)
        norm = math.sqrt(self.reference) * math.sqrt(self.observed)
        cosine = (self.reference + self.cross) / norm if norm > 0 else 0.0
        cosine = max(-1.0, min(1.0, cosine))
        return Distance(relative, self.max_abs, -20 * math.log10(relative), cosine, self.mismatch)


@dataclass(slots=True)
class Running:
    """Mean and spread of a number over samples, in constant memory.

    Welford, "Note on a method for calculating corrected sums of squares and products" (1962).
    One infinite value makes mean and deviation infinite.
    """

    count: int = 0
    _mean: float = 0.0
    _squares: float = 0.0  # Σ(v − mean)²
    _low: float = math.inf
    _high: float = -math.inf
    _low_at: int = 0
    _high_at: int = 0

    def add(self, value: float, sample: int) -> None:
        """Add one sample's value; ``sample`` is its index.

        Raises:
            ValueError: the value is not a number.
        """
        if math.isnan(value):
            raise ValueError("a mean over samples takes numbers only")
        self.count += 1
        if self.count == 1 or value < self._low:
            self._low, self._low_at = value, sample
        if self.count == 1 or value > self._high:
            self._high, self._high_at = value, sample
        if math.isinf(value) or math.isinf(self._mean):
            self._mean, self._squares = math.inf, math.inf
            return
        before = value - self._mean
        self._mean += before / self.count
        self._squares += before * (value - self._mean)

    @property
    def mean(self) -> float:
        """The mean; 0 where nothing was added."""
        return self._mean

    def spread(self) -> Spread | None:
        """What is known of the number; None where nothing was added."""
        if self.count == 0:
            return None
        from auditor.records.measured import Spread

        return Spread(
            samples=self.count,
            mean=self._mean,
            deviation=math.sqrt(self._squares / self.count),
            low=self._low,
            high=self._high,
            low_at=self._low_at,
            high_at=self._high_at,
        )


@dataclass(slots=True)
class Steps:
    """How many elements of integer tensors are off by exactly one step, over samples."""

    elements: int = 0
    ones: int = 0

    def add(self, observed: Array, reference: Array) -> None:
        """Add one sample's tensor; what is no integer, or of another shape, does not count."""
        if reference.dtype.kind not in "iu" or observed.shape != reference.shape:
            return
        self.elements += reference.size
        if observed.dtype.kind in "iu":
            low, high = np.minimum(observed, reference), np.maximum(observed, reference)
            with np.errstate(over="ignore"):  # of a scalar; a difference that wraps is not 1
                self.ones += int(np.count_nonzero(high - low == 1))

    @property
    def fraction(self) -> float | None:
        """Fraction of the elements; None where there are none."""
        return self.ones / self.elements if self.elements else None


def distance(observed: Array, reference: Array) -> Distance:
    """Distance of one tensor from its reference."""
    moments = Moments()
    moments.add(observed, reference)
    return moments.distance()


def steps_apart(observed: Array, reference: Array) -> float | None:
    """How many numbers of the reference's type lie between two tensors, at most.

    Args:
        observed: any shape and numeric dtype; cast to the reference's.
        reference: float16, float32 or float64.

    Returns:
        None for other types; infinite where shapes differ, or NaN is on one side only.
    """
    if reference.dtype.kind != "f":
        return None
    if observed.shape != reference.shape:
        return math.inf
    with np.errstate(over="ignore"):
        observed = observed.astype(reference.dtype)
    nan = np.isnan(reference)
    if not np.array_equal(nan, np.isnan(observed)):
        return math.inf
    one, other = _ordinal(observed)[~nan], _ordinal(reference)[~nan]
    # Unsigned differences are exact where signed ones of float64 would overflow.
    high, low = (f(one, other).astype(np.uint64) for f in (np.maximum, np.minimum))
    return float((high - low).max(initial=0))


def _ordinal(values: Array) -> Array:
    """Position among the numbers of its type; both zeros are 0."""
    bits = np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
    magnitude = (bits & np.iinfo(bits.dtype).max).astype(np.int64)
    signed: Array = np.where(bits < 0, -magnitude, magnitude)
    return signed


def relative_l2(observed: Arrays, reference: Arrays, names: tuple[str, ...]) -> float:
    """Relative L2 over several tensors, each normalised by its own reference norm.

    Several outputs of one model may differ in scale by orders of magnitude (boxes in pixels
    beside scores in [0, 1]), so each counts by its own relative error: the root mean square
    over the outputs. Infinite where any of them cannot be compared.
    """
    if not names:
        return 0.0
    total = 0.0
    for name in names:
        total += distance(observed[name], reference[name]).relative_l2 ** 2
    return math.sqrt(total / len(names))


def projection(part: Arrays, whole: Arrays, reference: Arrays, names: tuple[str, ...]) -> float:
    """⟨part, whole⟩ / ‖whole‖² over several outputs, each normalised by its reference norm.

    ``part`` and ``whole`` are differences in the outputs; with parts that sum to the whole the
    projections sum to 1. A part of another shape than the whole is not yet on the way to it and
    counts 0. NaN where a value is not finite or the whole is zero.
    """
    above = below = 0.0
    for name in names:
        scale = square_sum(to_float(reference[name])) or 1.0
        w = to_float(whole[name])
        if part[name].shape == w.shape:
            above += _dot(to_float(part[name]), w) / scale
        below += square_sum(w) / scale
    return (
        above / below if below > 0 and math.isfinite(above) and math.isfinite(below) else math.nan
    )


def bit_identical(observed: Array, reference: Array) -> float:
    """Fraction of elements with the same value and type (NaN equals NaN; ±0 are the same)."""
    if observed.shape != reference.shape:
        return 0.0
    if reference.size == 0:
        return 1.0
    floats = is_float(reference.dtype) and is_float(observed.dtype)
    count = 0
    for a, b in _blocks(observed, reference):
        same = a == b
        found = int(np.count_nonzero(same))
        if floats and found < same.size and (odd := np.isnan(a)).any():
            found += int(np.count_nonzero(odd & np.isnan(b)))
        count += found
    return count / reference.size


def bitwise_equal(a: Arrays, b: Arrays) -> bool:
    """Whether two sets of tensors agree in names, types, shapes and every bit."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and all(x.tobytes() == y.tobytes() for x, y in _blocks(a[n], b[n]))
        for n in a
    )


def histogram(observed: Array, reference: Array, known: Moments | None = None) -> tuple[int, ...]:
    """Counts of |b − r| / rms(r) between ``HISTOGRAM_EDGES`` (log10).

    The first bin also holds everything smaller, exact zeros included, the last everything
    larger; empty where the shapes differ. ``known``: the moments of these two alone.
    """
    if observed.shape != reference.shape or reference.size == 0:
        return ()
    squares = (known or _compared(observed, reference)).reference
    rms = math.sqrt(squares / reference.size) or 1.0
    above = [reference.size, *(0 for _ in _BINARY_EDGES[1:-1]), 0]  # errors from each edge on
    for b, r in _blocks(observed, reference):
        _, d, _ = _difference(b, r)
        with np.errstate(over="ignore"):
            error = np.abs(d).astype(np.float32, copy=False) / np.float32(rms)
        largest = error.max()
        for index, edge in enumerate(_BINARY_EDGES[1:-1], 1):
            if largest < 2.0**edge:
                break
            above[index] += int(np.count_nonzero(error >= np.float32(2.0**edge)))
    return tuple(low - high for low, high in pairwise(above))


def concentration(observed: Array, reference: Array) -> Concentration | None:
    """The one slice (row, token, channel, image) that holds an outstanding share of ‖b − r‖².

    None unless that slice holds at least a quarter of the error and at least four times its
    even share.
    """
    from auditor.records.measured import Concentration

    if observed.shape != reference.shape or reference.size == 0:
        return None
    _, d, mismatch = _difference(observed, reference)
    if mismatch is not None:
        return None
    squares = np.square(d, dtype=np.float64)
    total = float(squares.sum())
    if total == 0.0 or not math.isfinite(total):
        return None
    best: Concentration | None = None
    for axis, size in enumerate(squares.shape):
        if size < 8:
            continue
        others = tuple(a for a in range(squares.ndim) if a != axis)
        shares = squares.sum(axis=others) / total
        index = int(np.argmax(shares))
        share = float(shares[index])
        if share >= max(0.25, 4 / size) and (best is None or share > best.share):
            best = Concentration(axis, index, size, share)
    return best


def value_range(values: Array) -> tuple[float, float]:
    """Smallest and largest finite value, (nan, nan) where there is none."""
    if values.size == 0:
        return (math.nan, math.nan)
    if values.dtype.kind == "U":
        return 0.0, 0.0
    low, high = float(np.min(values)), float(np.max(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            return (math.nan, math.nan)
        low, high = float(np.min(finite)), float(np.max(finite))
    return low, high


def square_sum(values: Array) -> float:
    """Σv², exact enough in float32 and redone in float64 where squares over- or underflow."""
    return _dot(values, values)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether it is a floating type, those of ``ml_dtypes`` (kind V to numpy) included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def to_float(values: Array) -> Array:
    """Numbers as float32, or as float64 where float32 would change them."""
    if values.dtype == np.float32:
        return values
    if values.dtype.kind == "U":  # only inputs are texts, and the same on both sides
        return np.zeros(values.shape, np.float32)
    if values.dtype.kind == "b" or values.dtype.itemsize <= 2:
        return values.astype(np.float32)
    return values.astype(np.float64)


def _dot(a: Array, b: Array) -> float:
    if a.dtype == np.float32 and b.dtype == np.float32:
        quick = float(np.vdot(a, b))  # no ufunc: it never warns
        if _SAFE_SQUARE[0] < abs(quick) < _SAFE_SQUARE[1]:
            return quick
        if quick == 0.0 and not (a.any() and b.any()):
            return 0.0
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        pairs = _blocks(a, b, _ALONE)
        return float(sum(np.vdot(x.astype(np.float64), y.astype(np.float64)) for x, y in pairs))


def _blocks(a: Array, b: Array, size: int = _BLOCK) -> Iterator[tuple[Array, Array]]:
    """Two arrays of one shape as pairs of short vectors, in C order."""
    a, b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, size):
        yield a[start : start + size], b[start : start + size]


def _as_floats(a: Array, b: Array) -> tuple[Array, Array]:
    """Both as floats of one type in which neither loses anything."""
    a, b = to_float(a), to_float(b)
    return (a, b) if a.dtype == b.dtype else (a.astype(np.float64), b.astype(np.float64))


def _compared(observed: Array, reference: Array) -> Moments:
    """The moments of one tensor, read in one pass."""
    found = Moments()
    with np.errstate(over="ignore", invalid="ignore"):
        for pair in _blocks(observed, reference):
            b, r = _as_floats(*pair)
            d = b - r
            error = square_sum(d)
            if not math.isfinite(error):  # NaN and infinities must be counted over the whole tensor
                return _compared_with_care(observed, reference)
            square = square_sum(r)
            found.error += error
            found.reference += square
            ordinary, off = square, error
            if 2 * (square + error) >= 0.9 * _MASKED**2:  # else all of b and r are nearer to 0
                low = np.minimum(b, r) <= _MASKED
                if low.any():
                    ordinary, off = (square_sum(np.where(low, 0, v)) for v in (r, d))
            found.ordinary += ordinary
            found.off += off
            if error > 0:
                found.cross += _dot(r, d)
                found.max_abs = max(found.max_abs, float(d.max()), -float(d.min()))
    return found


def _compared_with_care(observed: Array, reference: Array) -> Moments:
    """The moments of a tensor some of whose values, or their squares, are not finite."""
    r, d, mismatch = _difference(observed, reference)
    largest = max(float(d.max()), -float(d.min()))
    if mismatch is not None:
        return Moments(square_sum(r), _dot(r, d), math.inf, math.inf, mismatch)
    low = (r <= _MASKED) | (r + d <= _MASKED)
    ordinary, off = (square_sum(np.where(low, 0, v)) for v in (r, d))
    square = square_sum(d)
    return Moments(square_sum(r), _dot(r, d), square, largest, None, ordinary, off)


def _difference(observed: Array, reference: Array) -> tuple[Array, Array, str | None]:
    """The reference and ``observed − reference`` as floats, and what could not be compared.

    Where both have the same NaN or infinity the difference is zero; where only one has, the
    elements are left out and counted in the message.
    """
    b, r = _as_floats(observed, reference)
    with np.errstate(over="ignore", invalid="ignore"):
        d = b - r
        # Anything that is not finite in either ends up in this sum, so most tensors are read once.
        if math.isfinite(_sum(d)):
            return r, d, None
    odd = ~(np.isfinite(b) & np.isfinite(r))
    same = odd & ((b == r) | (np.isnan(b) & np.isnan(r)))
    differing = int(np.count_nonzero(odd & ~same))
    b, r = (np.where(odd, 0, v).astype(np.float64) for v in (b, r))
    if differing == 0:
        return r, b - r, None
    return r, b - r, f"{differing} of {r.size} values are NaN or infinite on one side only"


def _sum(values: Array) -> float:
    return float(np.add.reduce(values, axis=None))


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(str(d) for d in shape) or "scalar"
