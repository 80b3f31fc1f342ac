"""jpeglib: the generations of the Independent JPEG Group's libjpeg, and of its forks.

From version 7 on, libjpeg up-samples chroma inside the inverse DCT, so its pixels are not those
of libjpeg-turbo and of libjpeg 6b.
"""

from __future__ import annotations

import tempfile
import threading
from importlib import metadata

import numpy as np

from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.ports import Array

_LOCK = threading.Lock()  # the version is a global of the library
_GENERATIONS = ("6b", "7", "8d", "9f", "turbo210", "mozjpeg403")


class JpegLib:
    """JPEG only."""

    package = "jpeglib"
    variants = _GENERATIONS
    turns = False

    def version(self) -> str:
        """jpeglib; the variant is the version of the codec."""
        import jpeglib  # noqa: F401

        return f"jpeglib {metadata.version('jpeglib')}"

    def decode(self, data: bytes, variant: str) -> Array:
        """Pixels as stored."""
        import jpeglib
        from PIL import Image

        # Its C code reads on after an error: what is no whole JPEG never reaches it.
        if not (data.startswith(b"\xff\xd8") and b"\xff\xd9" in data[-4096:]):
            raise PhotoError("jpeglib cannot decode it: it is no complete JPEG")
        with _LOCK, tempfile.NamedTemporaryFile(suffix=".jpg") as file:
            file.write(data)
            file.flush()
            try:
                with Image.open(file.name) as header:
                    if header.mode == "CMYK":  # it would tell standard error, and no more
                        raise ValueError("it does not turn CMYK into RGB")
                with jpeglib.version(variant):
                    read = jpeglib.read_spatial(file.name, jpeglib.JCS_RGB)
                    image = np.asarray(read.spatial)
            except (OSError, RuntimeError, ValueError) as error:
                why = str(error).replace(file.name, "the file")
                raise PhotoError(f"libjpeg {variant} cannot decode it: {why}") from error
        if image.ndim != 3 or image.shape[2] != 3:
            raise PhotoError(f"libjpeg {variant} gives no RGB image for it")
        return image


LIBRARY = JpegLib()
