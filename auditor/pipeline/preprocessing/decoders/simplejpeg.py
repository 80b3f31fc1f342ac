"""simplejpeg: libjpeg-turbo with its fast inverse DCT and its fast chroma up-sampling."""

from __future__ import annotations

from importlib import metadata

import numpy as np

from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.ports import Array


class SimpleJpeg:
    """The switches that embedded and mobile decoders set for speed; JPEG only."""

    package = "simplejpeg"
    variants = ("default", "fastdct", "fastupsample", "fast")
    turns = False

    def version(self) -> str:
        """simplejpeg; it does not tell which libjpeg-turbo is inside."""
        import simplejpeg  # noqa: F401

        return f"simplejpeg {metadata.version('simplejpeg')} (libjpeg-turbo)"

    def decode(self, data: bytes, variant: str) -> Array:
        """Pixels as stored."""
        import simplejpeg

        try:
            image = simplejpeg.decode_jpeg(
                data,
                fastdct=variant in ("fastdct", "fast"),
                fastupsample=variant in ("fastupsample", "fast"),
            )
        except ValueError as error:
            raise PhotoError(f"simplejpeg cannot decode it: {error}") from error
        return np.asarray(image)


LIBRARY = SimpleJpeg()
