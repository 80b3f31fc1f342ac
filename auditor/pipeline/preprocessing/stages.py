"""What turns a photograph into the network's input: the steps of one side, as records.

``auditor.pipeline.description`` reads them from a file, ``steps`` executes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

from auditor.pipeline.preprocessing import libraries
from auditor.pipeline.preprocessing.libraries import Conversion

Orientation = Literal["apply", "ignore"]
Channels = Literal["rgb", "bgr"]
Layout = Literal["nchw", "nhwc"]
Type = Literal["float32", "float16", "uint8"]
Place = Literal["centre", "corner"]
Size = tuple[int, int]  # height, width


class Side(Protocol):
    """What one system does before or after the network."""

    def steps(self) -> dict[str, str]:
        """Every step in words, by its name."""


S = TypeVar("S", bound=Side)


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """One step in which two systems may differ.

    Attributes:
        noise: id of the cause: ``preprocessing.NAME`` or ``postprocessing.NAME``.
        take: the first side with this step of the second.
        words: keys of ``Side.steps`` that describe it; its own name where none are given.
    """

    noise: str
    take: Callable[[S, S], S]
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name that it has in a description."""
        return self.noise.partition(".")[2]

    def described(self, side: S) -> str:
        """What a side does in this step."""
        said = side.steps()
        return "; ".join(said[key] for key in self.words or (self.name,))


def taking(*fields: str) -> Callable[[Any, Any], Any]:
    """A side with some of its fields as another side has them."""
    return lambda side, other: replace(side, **{field: getattr(other, field) for field in fields})


def differing(steps: Sequence[Step[S]], one: S, other: S) -> tuple[Step[S], ...]:
    """The steps in which two sides differ, in the order of execution."""
    return tuple(step for step in steps if step.take(one, other) != one)


@dataclass(frozen=True, slots=True)
class Decode:
    """The step from a file's bytes to RGB pixels.

    Attributes:
        library, variant: one of ``decoders/``, and one of its ways to decode.
        orientation: whether the EXIF orientation is applied.
    """

    library: str
    variant: str
    orientation: Orientation

    def __str__(self) -> str:
        """The decoder as a description names it: ``simplejpeg:fast``."""
        return self.library if self.variant == "default" else f"{self.library}:{self.variant}"


@dataclass(frozen=True, slots=True)
class Colour:
    """A round trip through YUV 4:2:0, as hardware decoders and cameras hand out pixels."""

    library: str
    conversion: Conversion

    def __str__(self) -> str:
        """In words: ``formula bt601 limited``."""
        c = self.conversion
        exact = "" if c.arithmetic == "rounded" else f" {c.arithmetic}"
        return f"{self.library} {c.matrix} {c.range}{exact}"


@dataclass(frozen=True, slots=True)
class Resize:
    """How the size changes; exactly one of the five targets is given, or two for a bounded side.

    Attributes:
        library, interpolation, antialias: one of ``resizers/`` and what it is asked for.
        size: height and width, whatever the photograph's proportions.
        short_side: its proportions kept, the shorter side has this length (torchvision).
        long_side: its proportions kept, the longer side has at most this length; beside
            ``short_side`` the bound where that would make it longer (R-CNN, DETR).
        height: its proportions kept, the height is this, the width rounded up (lines of text).
        letterbox: its proportions kept, fitted into this height and width and filled up.
        pad, place: grey level that fills a letterbox, and where in it the photograph is.
        multiple: both sides are rounded to a multiple of this (text and object detectors).
    """

    library: str
    interpolation: str
    antialias: bool
    size: Size | None = None
    short_side: int | None = None
    long_side: int | None = None
    height: int | None = None
    letterbox: Size | None = None
    pad: int = 114
    place: Place = "centre"
    multiple: int = 1

    def __str__(self) -> str:
        """The library and the interpolation: ``torch bilinear antialiased``."""
        offered: libraries.Resizer = libraries.load("resizers", self.library)
        both = len(offered.interpolations[self.interpolation]) > 1
        said = " antialiased" if self.antialias else " not antialiased"
        return f"{self.library} {self.interpolation}{said if both else ''}"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One side, in the order of execution.

    Attributes:
        decode, colour, resize: as above; None leaves the step out.
        precrop: the centred square of this fraction of the shorter side, before resizing.
        crop: the centred height and width, after resizing.
        channels: order of the channels in the tensor.
        scale, mean, std: x → (x · scale − mean) / std in float32, by channel of the tensor.
        layout, dtype: of the tensor; its first axis counts samples.
    """

    decode: Decode
    colour: Colour | None
    precrop: float | None
    resize: Resize | None
    crop: Size | None
    channels: Channels
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout
    dtype: Type

    def steps(self) -> dict[str, str]:
        """Every step in words, by its key in a description."""
        return {
            "decoder": f"{self.decode}, EXIF orientation: {self.decode.orientation}",
            "colour": str(self.colour or "rgb"),
            "precrop": "none" if self.precrop is None else f"{self.precrop:g}",
            "resize": "none" if self.resize is None else f"{self.resize}, {_target(self.resize)}",
            "crop": "none" if self.crop is None else "x".join(map(str, self.crop)),
            "channels": self.channels,
            "normalise": f"scale {self.scale:g}, mean {_list(self.mean)}, std {_list(self.std)}",
            "layout": f"{self.layout} {self.dtype}",
        }


@dataclass(frozen=True, slots=True)
class Placement:
    """Where in a photograph the network's input is: tensor = photograph · scale + shift.

    Attributes:
        scale, shift: by axis, height first; in pixels, a pixel's middle is at a half.
        photo, tensor: height and width of both.
    """

    scale: tuple[float, float]
    shift: tuple[float, float]
    photo: Size
    tensor: Size


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values) if len(set(values)) > 1 else f"{values[0]:g}"


def _target(resize: Resize) -> str:
    if resize.size:
        return "x".join(map(str, resize.size))
    if resize.short_side:
        said = f"short side {resize.short_side}"
        if resize.long_side:
            said += f", long side at most {resize.long_side}"
    elif resize.height:
        said = f"height {resize.height}"
    elif resize.letterbox:
        said = f"letterbox {'x'.join(map(str, resize.letterbox))} on {resize.pad}"
        said += ", in the corner" if resize.place == "corner" else ""
    else:
        said = f"long side at most {resize.long_side}"
    return said if resize.multiple == 1 else f"{said}, multiples of {resize.multiple}"
