"""OpenCV: ``cv2.resize``, which samples without filtering (``area`` averages)."""

from __future__ import annotations

from auditor.ports import Array

_METHODS = {
    "bilinear": "INTER_LINEAR",
    "nearest": "INTER_NEAREST",
    "area": "INTER_AREA",
    "bicubic": "INTER_CUBIC",
    "lanczos": "INTER_LANCZOS4",
}


class OpenCV:
    """The five interpolations of the paper."""

    package = "opencv-python-headless"

    @property
    def interpolations(self) -> dict[str, tuple[bool, ...]]:
        """Only area takes every source pixel into account."""
        return {name: (name == "area",) for name in _METHODS}

    def version(self) -> str:
        """OpenCV."""
        import cv2

        return f"OpenCV {cv2.__version__}"

    def resize(
        self, image: Array, size: tuple[int, int], interpolation: str, antialias: bool
    ) -> Array:
        """``cv2.resize`` on 8-bit pixels."""
        import cv2

        height, width = size
        resized: Array = cv2.resize(
            image, (width, height), interpolation=getattr(cv2, _METHODS[interpolation])
        )
        return resized


LIBRARY = OpenCV()
