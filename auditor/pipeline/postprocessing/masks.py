"""Masks at the size of the photograph: each library's own way to resize one channel of floats.

Applications enlarge a mask before or after they decide what belongs to it, each with the library at
hand. Where the network did not see the photograph, nothing belongs to the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from auditor.pipeline.preprocessing.stages import Placement
    from auditor.ports import Array

Enlarger = Literal["none", "opencv", "pillow", "torch"]
Enlarging = Literal["nearest", "bilinear", "bicubic"]


def enlarged(values: Array, place: Placement, by: Enlarger, how: Enlarging) -> Array:
    """Channels taken back to the photograph's pixels.

    Args:
        values: float32 or uint8, ``[channels, height, width]`` of the network's output, which may
            be smaller than its input.
        place: where the input is in the photograph.
        by: whose resizing.
        how: its interpolation.

    Returns:
        The same type, ``[channels, height, width]`` of the photograph; 0 where it was not seen.
    """
    found = np.zeros((len(values), *place.photo), values.dtype)
    source, seen = [], []
    for axis in (0, 1):
        step = values.shape[1 + axis] / place.tensor[axis]  # of the output, per pixel of the input
        begin, end = place.shift[axis], place.photo[axis] * place.scale[axis] + place.shift[axis]
        inside = max(0.0, begin), min(float(place.tensor[axis]), end)
        first, last = round(inside[0] * step), round(inside[1] * step)
        back = [(x - place.shift[axis]) / place.scale[axis] for x in inside]
        source.append(slice(first, max(first + 1, last)))
        seen.append((round(back[0]), max(round(back[0]) + 1, round(back[1]))))
    size = (seen[0][1] - seen[0][0], seen[1][1] - seen[1][0])
    for channel, plane in zip(found, values[:, source[0], source[1]], strict=True):
        channel[slice(*seen[0]), slice(*seen[1])] = _resized(plane, size, by, how)
    return found


def _resized(plane: Array, size: tuple[int, int], by: Enlarger, how: Enlarging) -> Array:
    """One channel, ``[height, width]``, at another size."""
    plane = np.ascontiguousarray(plane)
    if by == "opencv":
        import cv2

        methods = {
            "nearest": cv2.INTER_NEAREST,
            "bilinear": cv2.INTER_LINEAR,
            "bicubic": cv2.INTER_CUBIC,
        }
        by_opencv: Array = cv2.resize(plane, (size[1], size[0]), interpolation=methods[how])
        return by_opencv
    if by == "pillow":
        from PIL import Image

        method = Image.Resampling[how.upper()]
        return np.asarray(Image.fromarray(plane).resize((size[1], size[0]), method))
    import torch

    torch.set_num_threads(1)  # photographs run beside each other: more would only wait
    whole = torch.from_numpy(plane.astype(np.float32))[None, None]
    aligned = None if how == "nearest" else False
    made = torch.nn.functional.interpolate(whole, size, mode=how, align_corners=aligned)
    by_torch: Array = made[0, 0].numpy()
    if plane.dtype == np.uint8:
        by_torch = np.clip(np.rint(by_torch), 0, 255)
    return by_torch.astype(plane.dtype)
