"""Executes a pipeline: from a file's bytes to the network's input tensor."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

from auditor.pipeline.preprocessing import libraries
from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.pipeline.preprocessing.stages import Colour, Decode, Pipeline, Placement, Resize, Size
from auditor.ports import Array

_ORIENTATION = 0x0112  # EXIF tag (CIPA DC-008)
_KEPT = 2  # images of each kind kept for the next pipeline of the same photograph


K = TypeVar("K")
V = TypeVar("V")


class FirstAndLatest(Generic[K, V]):
    """The first value, which is the training side's, and the latest of the others."""

    def __init__(self, most: int, size: Callable[[V], int] = lambda _: 1) -> None:
        """Hold none.

        Args:
            most: what the values' sizes may add up to; two of any size are kept.
            size: of a value; by default ``most`` is their number.
        """
        self._most, self._size = most, size
        self._kept: dict[K, V] = {}
        self._held = 0

    @property
    def first(self) -> tuple[K, V] | None:
        """The first value and its key, once there is one."""
        return next(iter(self._kept.items()), None)

    def get(self, key: K) -> V | None:
        """What is kept under a key, if it still is."""
        return self._kept.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value; those go that came second, third …, until there is room."""
        self._kept[key] = value
        self._held += self._size(value)
        while self._held > self._most and len(self._kept) > 2:
            self._held -= self._size(self._kept.pop(list(self._kept)[1]))


class Preparation:
    """One photograph under several pipelines; what two in a row have in common is done once.

    So is what the first one's decoder and another make alike: most decoders of today do.
    Memory: the photograph's bytes and at most two images of each stage.
    """

    def __init__(self, data: bytes) -> None:
        """``data`` are the bytes of the file."""
        self._data = data
        self._decoded = FirstAndLatest[Decode, Array](_KEPT)
        self._like: dict[Decode, Decode] = {}  # by decoder, one that gives the same pixels
        self._coloured = FirstAndLatest[tuple[Decode, Colour | None], Array](_KEPT)
        self._framed = FirstAndLatest[Pipeline, Array](_KEPT)
        self._sizes: dict[Decode, Size] = {}

    def pixels(self, pipeline: Pipeline) -> Array:
        """What enters normalisation: uint8, height x width x RGB; not to be written to.

        Raises:
            PhotoError: the decoder refuses the photograph, or it is too small.
        """
        decode = self._like.get(pipeline.decode) or self._decode(pipeline.decode)
        same = replace(pipeline, decode=decode)
        if (framing := self._framed.get(same)) is None:
            framing = framed(self._image(decode, pipeline.colour), pipeline)
            self._framed.put(same, framing)
        return framing

    def _decode(self, asked: Decode) -> Decode:
        """Decode, and say which decoder gave these pixels first."""
        decode, image = asked, decoded(self._data, asked)
        self._sizes[asked] = image.shape[0], image.shape[1]
        first = self._decoded.first
        if first is not None and np.array_equal(image, first[1]):
            decode = first[0]
        else:
            self._decoded.put(decode, image)
        self._like[asked] = decode
        return decode

    def _image(self, decode: Decode, colour: Colour | None) -> Array:
        """The decoded photograph after its colour conversion."""
        if (image := self._coloured.get((decode, colour))) is None:
            if (plain := self._decoded.get(decode)) is None:
                plain = decoded(self._data, decode)
                self._decoded.put(decode, plain)
            image = coloured(plain, colour)
            self._coloured.put((decode, colour), image)
        return image

    def tensor(self, pipeline: Pipeline) -> Array:
        """The network's input, its first axis of length 1; raises as ``pixels`` does."""
        return normalised(self.pixels(pipeline), pipeline)

    def place(self, pipeline: Pipeline) -> Placement:
        """Where ``tensor`` is in the photograph; that must have been made with this decoder."""
        return placed(self._sizes[pipeline.decode], pipeline)


def decoded(data: bytes, step: Decode) -> Array:
    """Pixels, turned upright if the step says so: uint8, height x width x RGB.

    Raises:
        PhotoError: the decoder refuses the photograph.
    """
    image = libraries.decoder(step.library).decode(data, step.variant)
    return upright(image, orientation(data)) if step.orientation == "apply" else image


def orientation(data: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # image parsers raise anything on bad data; the decoder says it better
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Array, value: int) -> Array:
    """Turn and mirror an image as its EXIF orientation says: no pixel changes its value."""
    if value in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if value in (3, 4, 7, 8):
        image = image[::-1]
    if value in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def coloured(image: Array, step: Colour | None) -> Array:
    """Through YUV 4:2:0 and back; an odd side is extended by its last row or column meanwhile."""
    if step is None:
        return image
    height, width = image.shape[:2]
    even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    converted = libraries.converter(step.library).convert(even, step.conversion)
    return np.ascontiguousarray(converted[:height, :width])


def framed(image: Array, pipeline: Pipeline) -> Array:
    """The part and size of an image that a pipeline uses; uint8, height x width x 3.

    Raises:
        PhotoError: the image is smaller than the crop.
    """
    if pipeline.precrop is not None:
        side = max(1, int(pipeline.precrop * min(image.shape[:2])))
        image = centre(image, (side, side))
    if pipeline.resize is not None:
        image = resized(image, pipeline.resize)
    return image if pipeline.crop is None else centre(image, pipeline.crop)


def placed(photo: Size, pipeline: Pipeline) -> Placement:
    """Where in a photograph of this height and width the network's input is."""
    size, scale, shift = photo, (1.0, 1.0), (0.0, 0.0)
    if pipeline.precrop is not None:
        side = max(1, int(pipeline.precrop * min(photo)))
        size = side, side
        shift = _less((0.0, 0.0), _corner(photo, size))
    if pipeline.resize is not None:
        to = target(size, pipeline.resize)
        scale = to[0] / size[0], to[1] / size[1]
        shift = shift[0] * scale[0], shift[1] * scale[1]
        size = to
        if pipeline.resize.letterbox is not None:
            begin = _letter(pipeline.resize, pipeline.resize.letterbox, to)
            shift = shift[0] + begin[0], shift[1] + begin[1]
            size = pipeline.resize.letterbox
    if pipeline.crop is not None:
        shift = _less(shift, _corner(size, pipeline.crop))
        size = pipeline.crop
    return Placement(scale, shift, photo, size)


def _less(shift: tuple[float, float], corner: Size) -> tuple[float, float]:
    return shift[0] - corner[0], shift[1] - corner[1]


def resized(image: Array, step: Resize) -> Array:
    """The image at the size that the step asks for; uint8, height x width x 3."""
    size = target(image.shape[:2], step)
    resizer = libraries.resizer(step.library)
    if image.shape[:2] != size:
        image = resizer.resize(
            np.ascontiguousarray(image), size, step.interpolation, step.antialias
        )
    if step.letterbox is None:
        return image
    letter = np.full((*step.letterbox, 3), step.pad, np.uint8)
    top, left = _letter(step, step.letterbox, size)
    letter[top : top + size[0], left : left + size[1]] = image
    return letter


def _letter(step: Resize, whole: Size, part: Size) -> Size:
    """Where in a letterbox the image begins; half a pixel goes to the lower right (Ultralytics)."""
    if step.place == "corner":
        return 0, 0
    return round((whole[0] - part[0]) / 2 - 0.1), round((whole[1] - part[1]) / 2 - 0.1)


def target(shape: tuple[int, ...], step: Resize) -> Size:
    """The size at which an image leaves the step, before a letterbox fills it up."""
    height, width = shape
    if step.size is not None:
        size = step.size
    elif step.short_side is not None:  # the other side is cut off, as torchvision does
        short = min(height, width)
        size = (step.short_side * height // short, step.short_side * width // short)
        if step.long_side is not None and max(size) > step.long_side:  # rounded, as for DETR
            ratio = step.long_side / max(height, width)
            size = (round(height * ratio), round(width * ratio))
    elif step.height is not None:
        size = step.height, max(1, math.ceil(step.height * width / height))
    elif step.letterbox is not None:
        ratio = min(step.letterbox[0] / height, step.letterbox[1] / width)
        size = (round(height * ratio), round(width * ratio))
    else:
        ratio = min(1.0, (step.long_side or 1) / max(height, width))
        size = (int(height * ratio), int(width * ratio))
    m = step.multiple
    return max(m, round(size[0] / m) * m), max(m, round(size[1] / m) * m)


def centre(image: Array, size: Size) -> Array:
    """The centred part of an image; halves round as torchvision's CenterCrop does.

    Raises:
        PhotoError: the image is smaller.
    """
    height, width = image.shape[:2]
    if height < size[0] or width < size[1]:
        raise PhotoError(f"{height}x{width} pixels are fewer than the crop of {size[0]}x{size[1]}")
    top, left = _corner((height, width), size)
    return image[top : top + size[0], left : left + size[1]]


def _corner(whole: Size, part: Size) -> Size:
    return round((whole[0] - part[0]) / 2), round((whole[1] - part[1]) / 2)


def normalised(image: Array, pipeline: Pipeline) -> Array:
    """The tensor: channels ordered, (x · scale − mean) / std in float32, laid out and typed."""
    if pipeline.channels == "bgr":
        image = image[..., ::-1]
    if pipeline.layout == "nchw":
        image = image.transpose(2, 0, 1)
    if pipeline.dtype == "uint8":
        return np.ascontiguousarray(image)[None]
    levels = _levels(pipeline.scale, pipeline.mean, pipeline.std, pipeline.dtype)
    tensor = np.empty((1, *image.shape), levels.dtype)
    for channel in range(3):  # looked up: there are only 256 values
        where = (0, channel) if pipeline.layout == "nchw" else (0, ..., channel)
        tensor[where] = levels[channel].take(image[where[1:]])
    return tensor


@lru_cache(maxsize=16)
def _levels(scale: float, mean: tuple[float, ...], std: tuple[float, ...], dtype: str) -> Array:
    """What normalisation makes of each pixel level: [3, 256]."""
    pixels = np.arange(256, dtype=np.uint8)[:, None]
    over, under = (np.array(v, np.float32) for v in (mean, std))
    made: Array = ((pixels * np.float32(scale) - over) / under).astype(dtype).T
    return np.ascontiguousarray(np.broadcast_to(made, (3, 256)))
