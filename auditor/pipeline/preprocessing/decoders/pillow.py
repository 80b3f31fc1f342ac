"""Pillow: ``Image.open(...).convert("RGB")``, what torchvision and Hugging Face train on."""

from __future__ import annotations

import io

import numpy as np

from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.ports import Array


class Pillow:
    """JPEG by libjpeg-turbo: accurate DCT, smooth ("fancy") up-sampling of chroma."""

    package = "pillow"
    variants = ("default",)
    turns = False

    def version(self) -> str:
        """Pillow and the libjpeg-turbo inside."""
        import PIL
        from PIL import features

        return f"Pillow {PIL.__version__} (libjpeg-turbo {features.version('libjpeg_turbo')})"

    def decode(self, data: bytes, variant: str) -> Array:
        """Pixels as stored; transparency is dropped, CMYK and grey are converted by Pillow."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
        except UnidentifiedImageError as error:  # whose text names an address in memory
            raise PhotoError("Pillow cannot decode it: it is no image that Pillow knows") from error
        # Image formats raise whatever their parsers do.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise PhotoError(f"Pillow cannot decode it: {error}") from error


LIBRARY = Pillow()
