"""The standards' equations, in real arithmetic rounded to 8 bits, or as hardware has them.

RGB to YUV by the luma weights of ITU-R BT.601 and BT.709; for BT.601 in limited range these are
eq. 5 and 6 of SysNoise (Wang et al., MLSys 2023), and ``integer`` is its eq. 7. Chroma is the
rounded mean of 2x2 pixels, and is repeated on the way back.
"""

from __future__ import annotations

import numpy as np

from auditor.pipeline.preprocessing.libraries import Conversion, Matrix, Range
from auditor.ports import Array

_WEIGHTS: dict[Matrix, tuple[float, float]] = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
# By range: the black level of luma, and the spans of luma and of chroma.
_LEVELS: dict[Range, tuple[int, float, float]] = {"limited": (16, 219, 224), "full": (0, 255, 255)}


class Formula:
    """Needs no library but NumPy."""

    package = "numpy"

    @property
    def conversions(self) -> tuple[Conversion, ...]:
        """Both matrices in both ranges; the integer form exists for BT.601, limited."""
        matrices: tuple[Matrix, ...] = ("bt601", "bt709")
        ranges: tuple[Range, ...] = ("limited", "full")
        exact = tuple(Conversion(m, r, "rounded") for m in matrices for r in ranges)
        return (*exact, Conversion("bt601", "limited", "integer"))

    def version(self) -> str:
        """Says what it is."""
        return "ITU-R equations, evaluated with NumPy"

    def convert(self, image: Array, conversion: Conversion) -> Array:
        """RGB to YUV 4:2:0 to RGB."""
        kr, kb = _WEIGHTS[conversion.matrix]
        black, luma, chroma = _LEVELS[conversion.range]
        r, g, b = (image[..., i].astype(np.float64) for i in range(3))
        brightness = kr * r + (1 - kr - kb) * g + kb * b
        y = _bytes(brightness * luma / 255 + black)
        u = _bytes((b - brightness) / (2 * (1 - kb)) * chroma / 255 + 128)
        v = _bytes((r - brightness) / (2 * (1 - kr)) * chroma / 255 + 128)
        c = y.astype(np.int32) - black
        # One sample of chroma for 2x2 pixels: its part is computed once for the four.
        d, e = (_halved(plane).astype(np.int32) - 128 for plane in (u, v))
        if conversion.arithmetic == "integer":
            shifts = (409 * e, -100 * d - 208 * e, 516 * d)
            sums = (_spread_on(298 * c + 128, shift) for shift in shifts)
            return np.stack([np.clip(p >> 8, 0, 255).astype(np.uint8) for p in sums], axis=-1)
        bright = c * (255 / luma)
        from_b = d * (2 * (1 - kb) * 255 / chroma)
        from_r = e * (2 * (1 - kr) * 255 / chroma)
        mixed = -(kb * from_b + kr * from_r) / (1 - kr - kb)
        parts = (from_r, mixed, from_b)
        return np.stack([_bytes(_spread_on(bright, part)) for part in parts], axis=-1)


def _bytes(values: Array) -> Array:
    """Rounded, halves up, and clipped; the argument is overwritten."""
    np.add(values, 0.5, out=values)
    np.floor(values, out=values)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _halved(plane: Array) -> Array:
    """The mean of every 2x2 pixels, halves rounded up."""
    rows = plane[::2].astype(np.uint16) + plane[1::2]
    means: Array = ((rows[:, ::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)
    return means


def _spread_on(luma: Array, chroma: Array) -> Array:
    """Luma plus the sample of chroma that stands for it and three others."""
    wide = chroma.repeat(2, axis=1)
    total = np.empty_like(luma)
    np.add(luma[::2], wide, out=total[::2])
    np.add(luma[1::2], wide, out=total[1::2])
    return total


LIBRARY = Formula()
