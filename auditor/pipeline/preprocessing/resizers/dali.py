"""NVIDIA DALI: ``resize`` on the processor, with its own filters; needs no GPU."""

from __future__ import annotations

import numpy as np

from auditor.ports import Array

_METHODS = {
    "bilinear": "INTERP_LINEAR",
    "bicubic": "INTERP_CUBIC",
    "lanczos": "INTERP_LANCZOS3",
    "nearest": "INTERP_NN",
}


class Dali:
    """Close to Pillow where it filters, close to OpenCV where it does not, equal to neither."""

    package = "nvidia-dali-cuda130"

    @property
    def interpolations(self) -> dict[str, tuple[bool, ...]]:
        """Antialiasing is a switch, on by default."""
        return {name: (False,) if name == "nearest" else (True, False) for name in _METHODS}

    def version(self) -> str:
        """DALI, and where it resizes."""
        import nvidia.dali
        import nvidia.dali.experimental.dynamic  # older versions lack it

        return f"DALI {nvidia.dali.__version__} (CPU)"

    def resize(
        self, image: Array, size: tuple[int, int], interpolation: str, antialias: bool
    ) -> Array:
        """``fn.resize`` on 8-bit pixels."""
        import nvidia.dali.experimental.dynamic as dali
        from nvidia.dali import types

        resized = dali.resize(
            image,
            device="cpu",
            size=size,
            interp_type=getattr(types, _METHODS[interpolation]),
            antialias=antialias,
        )
        return np.array(resized)  # evaluated here: DALI is lazy


LIBRARY = Dali()
