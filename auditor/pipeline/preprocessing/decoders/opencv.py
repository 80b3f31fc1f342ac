"""OpenCV: ``cv2.imdecode(..., IMREAD_COLOR)``, which applies the EXIF orientation."""

from __future__ import annotations

import numpy as np

from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.ports import Array


class OpenCV:
    """JPEG by the libjpeg-turbo that OpenCV was built with; today the same bits as Pillow."""

    package = "opencv-python-headless"
    variants = ("default",)
    turns = True

    def version(self) -> str:
        """OpenCV and the JPEG library it was built with."""
        import cv2

        lines = (line.split(":", 1) for line in cv2.getBuildInformation().splitlines())
        jpeg = next((p[1].strip() for p in lines if p[0].strip() == "JPEG" and len(p) > 1), "?")
        return f"OpenCV {cv2.__version__} ({jpeg})"

    def decode(self, data: bytes, variant: str) -> Array:
        """Pixels as stored: the orientation is applied by the caller, losslessly, if at all."""
        import cv2

        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error as error:
            raise PhotoError(f"OpenCV cannot decode it: {error.err}") from error
        if image is None:
            raise PhotoError("OpenCV cannot decode it")
        return np.ascontiguousarray(image[:, :, ::-1])


LIBRARY = OpenCV()
