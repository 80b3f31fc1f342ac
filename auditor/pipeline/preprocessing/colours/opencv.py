"""OpenCV: ``cv2.cvtColor`` to I420 and back, which holds the samples of NV12 in another order."""

from __future__ import annotations

from auditor.pipeline.preprocessing.libraries import Conversion
from auditor.ports import Array


class OpenCV:
    """BT.601 in limited range, in fixed point; chroma is the first pixel of each 2x2."""

    package = "opencv-python-headless"
    conversions = (Conversion("bt601", "limited", "rounded"),)

    def version(self) -> str:
        """OpenCV."""
        import cv2

        return f"OpenCV {cv2.__version__}"

    def convert(self, image: Array, conversion: Conversion) -> Array:
        """RGB to I420 to RGB."""
        import cv2

        planes = cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420)
        back: Array = cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_I420)
        return back


LIBRARY = OpenCV()
