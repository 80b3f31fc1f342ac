"""How large a segment's introduced error is, and how much of it other outputs leave.

An error is a sum over outputs of squared distances, each divided by the output's own squared norm,
so that no output outweighs another because its numbers are larger. Infinities, NaN and outputs of
another shape need rules of their own, which are all here.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from auditor.comparison import metrics
from auditor.decomposition.divergence import Local
from auditor.ports import Array, Arrays

# From this part of a type's largest number on, a value stands for infinity. A maximum over nothing
# gives the lowest number of the kernel's type, for instance, which may be that of bfloat16.
EXTREME = 0.99


class SegmentError:
    """The introduced error of one segment on one sample.

    Attributes:
        observed: out_b, what the backend computed.
        replayed: h(in_b), what the reference computes from the backend's inputs.
        reshaped: the outputs whose shapes differ between the two.
        different: how many elements differ; those of reshaped outputs are not counted.
        turned: how many elements differ in outputs that are no floats, such as indices and masks;
            all elements of those that are reshaped.
        total: Σ over outputs of ‖out_b − h‖² / ‖h‖².
    """

    def __init__(self, local: Local) -> None:
        """Measure the error of ``local``."""
        self.observed, self.replayed = local.observed, local.replayed
        self.reshaped = frozenset(
            name
            for name, value in self.replayed.items()
            if self.observed[name].shape != value.shape
        )
        self.different = self.turned = 0
        self._scales: dict[str, float] = {}
        self._weights: dict[str, float] = {}  # of one non-finite element
        for name, value in self.replayed.items():
            observed = self.observed[name]
            if name in self.reshaped:
                turned = observed.size
                extreme = int(np.count_nonzero(~(abs(observed) < _limit(observed))))
                self._scales[name] = _scale(observed)
                self._weights[name] = 1 / max(1, extreme)
            else:
                turned = int(np.count_nonzero(observed != value))
                self.different += turned
                self._scales[name] = _scale(value)
                self._weights[name] = 1.0
            if observed.dtype.kind != "f":
                self.turned += turned
        self.total = self.left_by(self.replayed)

    @property
    def explainable(self) -> bool:
        """Whether there is a finite error."""
        return 0 < self.total < math.inf

    @property
    def counted(self) -> bool:
        """Whether an output is no float: there one huge value outweighs all others in any norm."""
        return any(value.dtype.kind != "f" for value in self.observed.values())

    @cached_property
    def finite(self) -> float:
        """The part of ``total`` that comes from values that are finite on both sides."""
        return self.finite_left_by(self.replayed)

    def left_by(self, outputs: Arrays) -> float:
        """Σ over outputs of ‖out_b − outputs‖² / ‖h‖²; infinite where a shape is wrong.

        An element that is NaN or infinite on one side only counts as an error as large as the
        whole tensor. For a reshaped output ‖out_b‖ stands for ‖h‖, whatever has a wrong shape is
        an error as large as that, and all non-finite elements together count as much as all
        others.
        """
        total = 0.0
        for name, value in outputs.items():
            observed = self.observed[name]
            if observed.shape == value.shape:
                total += _square_error(observed, value, self._scales[name], self._weights[name])
            elif name in self.reshaped:
                total += 1.0
            else:
                return math.inf
        return total

    def finite_left_by(self, outputs: Arrays) -> float:
        """The part of ``left_by`` that comes from values that are finite on both sides."""
        return sum(
            _finite_square_error(self.observed[name], value) / self._scales[name]
            for name, value in outputs.items()
            if value.dtype.kind == "f"
        )


def _finite_square_error(observed: Array, value: Array) -> float:
    """The squared error of elements that are finite, and no stand-in for infinity, in both."""
    if observed.shape != value.shape:
        return metrics.square_sum(metrics.to_float(observed))  # a shape is seen at once
    b, r, limit = metrics.to_float(observed), metrics.to_float(value), _limit(observed)
    with np.errstate(over="ignore", invalid="ignore"):
        error = b - r
    return metrics.square_sum(np.where((abs(b) < limit) & (abs(r) < limit), error, 0))


def _square_error(observed: Array, value: Array, scale: float, weight: float) -> float:
    """The squared error over ``scale``, plus ``weight`` for each element extreme on one side."""
    b, r = metrics.to_float(observed), metrics.to_float(value)
    limit = _limit(observed)
    with np.errstate(over="ignore", invalid="ignore"):
        error = b - r
        squares = metrics.square_sum(error)
    if squares < limit:  # so no element is extreme, or it is the same in both
        return squares / scale
    ordinary = (abs(b) < limit) & (abs(r) < limit)
    extreme = np.isfinite(error) & (np.minimum(abs(b), abs(r)) >= limit)
    # Two finite stand-ins for one infinity agree, whatever type's lowest number they are.
    agree = (b == r) | (np.isnan(b) & np.isnan(r)) | extreme
    squares = metrics.square_sum(np.where(ordinary, error, 0))
    return squares / scale + weight * float(np.count_nonzero(~ordinary & ~agree))


def _scale(values: Array) -> float:
    """‖values‖² of what is finite and no stand-in for infinity; 1 where that is 0."""
    wide, limit = metrics.to_float(values), _limit(values)
    squares = metrics.square_sum(wide)
    if not squares < limit:
        squares = metrics.square_sum(np.where(abs(wide) < limit, wide, 0))
    return squares or 1.0


def _limit(values: Array) -> float:
    """The absolute value from which on a number of this type stands for infinity."""
    return EXTREME * float(np.finfo(values.dtype).max) if values.dtype.kind == "f" else math.inf
