"""FFmpeg, through PyAV: its own JPEG decoder, and swscale from YUV to RGB."""

from __future__ import annotations

import io

import numpy as np

from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.ports import Array


class FFmpeg:
    """Chroma is up-sampled by swscale, by default with its bicubic filter."""

    package = "av"
    variants = ("default",)
    turns = False

    def version(self) -> str:
        """PyAV and the FFmpeg libraries inside."""
        import av

        inside = ", ".join(
            f"{name} {'.'.join(map(str, av.library_versions[name]))}"
            for name in ("libavcodec", "libswscale")
        )
        return f"PyAV {av.__version__} ({inside})"

    def decode(self, data: bytes, variant: str) -> Array:
        """The first frame of the file as RGB."""
        import av

        try:
            with av.open(io.BytesIO(data), mode="r") as container:
                for frame in container.decode(video=0):
                    return np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
        # FFmpegError for bad data; the others for files without a picture in them.
        except (av.FFmpegError, IndexError, ValueError) as error:
            raise PhotoError(f"FFmpeg cannot decode it: {error}") from error
        raise PhotoError("FFmpeg finds no picture in it")


LIBRARY = FFmpeg()
