"""NVIDIA DALI: its image decoder on the processor, by nvImageCodec; needs no GPU.

What DALI decodes on a GPU (``device="mixed"``, nvJPEG) has other bits, and is not in the catalogue.
"""

from __future__ import annotations

import numpy as np

from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.ports import Array


class Dali:
    """JPEG by libjpeg-turbo: ``default`` has the same bits as Pillow's today."""

    package = "nvidia-dali-cuda130"
    variants = ("default", "fastdct")
    turns = True

    def version(self) -> str:
        """DALI, and where it decodes."""
        import nvidia.dali
        import nvidia.dali.experimental.dynamic  # older versions lack it

        return f"DALI {nvidia.dali.__version__} (CPU, libjpeg-turbo)"

    def decode(self, data: bytes, variant: str) -> Array:
        """Pixels as stored: the orientation is applied by the caller, if at all."""
        import nvidia.dali.experimental.dynamic as dali

        try:
            image = dali.decoders.image(
                np.frombuffer(data, np.uint8),
                device="cpu",
                adjust_orientation=False,
                use_fast_idct=variant == "fastdct",
            )
            return np.array(image)  # evaluated here: DALI is lazy
        except (RuntimeError, ValueError) as error:
            # DALI answers with a number; nvImageCodec writes the reason to standard error.
            raise PhotoError(f"DALI cannot decode it: {str(error).strip(' :')}") from error


LIBRARY = Dali()
