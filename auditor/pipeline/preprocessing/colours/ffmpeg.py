"""FFmpeg's swscale, through PyAV: RGB to NV12 and back."""

from __future__ import annotations

import numpy as np

from auditor.pipeline.preprocessing.libraries import Conversion
from auditor.ports import Array

_SPACE = {"bt601": "ITU601", "bt709": "ITU709"}
_RANGE = {"limited": "MPEG", "full": "JPEG"}


class FFmpeg:
    """Bilinear filtering of chroma both ways, swscale's default in PyAV."""

    package = "av"
    conversions = tuple(
        Conversion(matrix, span, "rounded")
        for matrix in ("bt601", "bt709")
        for span in ("limited", "full")
    )

    def version(self) -> str:
        """PyAV and the swscale inside."""
        import av

        swscale = ".".join(map(str, av.library_versions["libswscale"]))
        return f"PyAV {av.__version__} (libswscale {swscale})"

    def convert(self, image: Array, conversion: Conversion) -> Array:
        """RGB to NV12 to RGB."""
        from av import VideoFrame
        from av.video.reformatter import ColorRange, Colorspace

        space = Colorspace[_SPACE[conversion.matrix]]
        span = ColorRange[_RANGE[conversion.range]]
        full = ColorRange.JPEG
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        planes = frame.reformat(
            format="nv12",
            src_colorspace=space,
            dst_colorspace=space,
            src_color_range=full,
            dst_color_range=span,
        )
        back = planes.reformat(
            format="rgb24",
            src_colorspace=space,
            dst_colorspace=space,
            src_color_range=span,
            dst_color_range=full,
        )
        return np.ascontiguousarray(back.to_ndarray())


LIBRARY = FFmpeg()
