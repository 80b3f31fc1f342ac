"""Pillow: ``Image.resize``, whose filters grow with the scale, so that it always antialiases."""

from __future__ import annotations

import numpy as np

from auditor.ports import Array

_FILTERS = ("bilinear", "nearest", "box", "hamming", "bicubic", "lanczos")


class Pillow:
    """The six filters of ``PIL.Image.Resampling``."""

    package = "pillow"

    @property
    def interpolations(self) -> dict[str, tuple[bool, ...]]:
        """All antialiased but nearest."""
        return {name: (name != "nearest",) for name in _FILTERS}

    def version(self) -> str:
        """Pillow."""
        import PIL

        return f"Pillow {PIL.__version__}"

    def resize(
        self, image: Array, size: tuple[int, int], interpolation: str, antialias: bool
    ) -> Array:
        """``Image.resize`` in 8-bit fixed point."""
        from PIL import Image

        height, width = size
        method = Image.Resampling[interpolation.upper()]
        return np.asarray(Image.fromarray(image).resize((width, height), method))


LIBRARY = Pillow()
