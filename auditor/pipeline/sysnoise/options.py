"""Everything that can be switched before the network: one option at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from auditor.pipeline.postprocessing.masks import Enlarger, Enlarging
from auditor.pipeline.postprocessing.post import Order, Post, Rounding, Suppression
from auditor.pipeline.preprocessing import libraries
from auditor.pipeline.preprocessing.stages import Colour, Decode, Orientation, Pipeline, Resize
from auditor.records.backend import Gap

DECODER = "preprocessing.decoder"
ORIENTATION = "preprocessing.orientation"
COLOUR = "preprocessing.colour"
RESIZE = "preprocessing.resize"
OFFSET = "postprocessing.box_offset"
ROUNDING = "postprocessing.box_rounding"
NMS = "postprocessing.nms"
MASK = "postprocessing.mask_resize"

# In the order of execution.
TITLES = {
    DECODER: "decoder",
    ORIENTATION: "EXIF orientation",
    COLOUR: "colour space",
    RESIZE: "resize",
}
AFTER = {
    OFFSET: "box offset",
    ROUNDING: "box rounding",
    NMS: "suppression",
    MASK: "mask resize",
}


@dataclass(frozen=True, slots=True)
class Switch:
    """One step of the pipeline replaced.

    Attributes:
        type: one of ``TITLES``.
        name: the option, as in a description.
        tool: the library and its version.
        step: what takes the place of the training side's.
    """

    type: str
    name: str
    tool: str
    step: Decode | Colour | Resize | Literal["rgb", "turned"]

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this step; a decoder leaves the orientation as it is."""
        if isinstance(self.step, Decode):
            turned = replace(self.step, orientation=pipeline.decode.orientation)
            return replace(pipeline, decode=turned)
        if isinstance(self.step, Colour):
            return replace(pipeline, colour=self.step)
        if isinstance(self.step, Resize):
            return replace(pipeline, resize=self.step)
        if self.step == "rgb":
            return replace(pipeline, colour=None)
        other: Orientation = "ignore" if pipeline.decode.orientation == "apply" else "apply"
        return replace(pipeline, decode=replace(pipeline.decode, orientation=other))


@dataclass(frozen=True, slots=True)
class PostSwitch:
    """One step after the network replaced.

    Attributes:
        type: one of ``AFTER``.
        name: the option; ``tool`` the library that does it.
        changes: fields of the post-processing, and their values.
    """

    type: str
    name: str
    tool: str
    changes: tuple[tuple[str, object], ...]

    def apply(self, post: Post) -> Post:
        """The post-processing with this step."""
        changed: dict[str, Any] = dict(self.changes)
        return replace(post, **changed)


def post_switches(post: Post | None) -> tuple[PostSwitch, ...]:
    """Every option after the network that differs from the training side's."""
    if post is not None and post.kind == "mask" and post.resize != "none":
        return tuple(_enlargings(post))
    if post is None or post.kind != "boxes":
        return ()
    own = "numpy"
    found = [PostSwitch(OFFSET, f"offset {1 - post.offset}", own, (("offset", 1 - post.offset),))]
    for how in get_args(Rounding):
        if how != post.rounding:
            name = "not rounded" if how == "none" else f"rounded: {how}"
            found.append(PostSwitch(ROUNDING, name, own, (("rounding", how),)))
    for by in get_args(Suppression) if post.nms != "none" else ():
        for offset in (0, 1):
            if by != "none" and (by, offset) != (post.nms, post.iou_offset):
                changes = (("nms", by), ("iou_offset", offset))
                found.append(PostSwitch(NMS, f"{by}, IoU with offset {offset}", by, changes))
    return tuple(found)


def _enlargings(post: Post) -> Iterator[PostSwitch]:
    """Every other way to enlarge a mask."""
    own = post.resize, post.interpolation, post.order
    for by in get_args(Enlarger):
        for how in get_args(Enlarging) if by != "none" else ():
            for order in get_args(Order):
                one = by, how, order
                if one == own or (order == "decide" and post.mask == "argmax" and how != "nearest"):
                    continue  # classes have no values in between
                changes = tuple(zip(("resize", "interpolation", "order"), one, strict=True))
                yield PostSwitch(MASK, f"{by} {how}, {order} first", by, changes)


def switches(pipeline: Pipeline) -> tuple[tuple[Switch, ...], tuple[Gap, ...]]:
    """Every option that differs from the training side, and the libraries that are missing.

    Args:
        pipeline: the training side.
    """
    found: list[Switch] = []
    gaps: list[Gap] = []
    for kind, type, steps in (
        ("decoders", DECODER, _decoders),
        ("colours", COLOUR, _colours),
        ("resizers", RESIZE, _resizes),
    ):
        for name in libraries.names(kind):
            library = libraries.load(kind, name)
            if (reason := libraries.missing(library)) is not None:
                install = f"pip install {library.package}"
                gaps.append(Gap(f"{TITLES[type]} {name}", "start", reason, install))
                continue
            found += [
                Switch(type, str(step), library.version(), step)
                for step in steps(name, library, pipeline)
                if step not in (pipeline.decode, pipeline.colour, pipeline.resize)
            ]
        if kind == "decoders":
            other = "ignore" if pipeline.decode.orientation == "apply" else "apply"
            found.append(Switch(ORIENTATION, f"orientation {other}", "EXIF tag 0x0112", "turned"))
    if pipeline.colour is not None:
        found.append(Switch(COLOUR, "rgb", "no conversion", "rgb"))
    return tuple(found), tuple(gaps)


def _decoders(name: str, library: libraries.Decoder, pipeline: Pipeline) -> Iterator[Decode]:
    for variant in library.variants:
        yield Decode(name, variant, pipeline.decode.orientation)


def _colours(name: str, library: libraries.Converter, pipeline: Pipeline) -> Iterator[Colour]:
    for conversion in library.conversions:
        yield Colour(name, conversion)


def _resizes(name: str, library: libraries.Resizer, pipeline: Pipeline) -> Iterator[Resize]:
    if pipeline.resize is None:
        return
    for interpolation, choices in library.interpolations.items():
        for antialias in choices:
            yield replace(
                pipeline.resize, library=name, interpolation=interpolation, antialias=antialias
            )
