"""What comes after the network: from its outputs to the result that an application uses.

Four kinds of result, each one array:

* ``scores``: the output through an activation.
* ``mask``: 1 where the output is above the threshold, else 0; or the best class of each pixel
  ([1, 1, height, width]); of the network's size, or enlarged to the photograph's.
* ``text``: [1, steps, classes]: a row for each character in its order, 1 at its class; rows of
  zeros behind the last one.
* ``boxes``: [1, candidates, 5 or 6]: corners in pixels of the network's input, score and (with
  several classes) class of every detection; a candidate that is none is a row of zeros, so that
  the results of two systems have one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from auditor.pipeline.heads import (
    Activation,
    Coding,
    Joining,
    Lengths,
    Names,
    Shapes,
    Sizes,
    Unit,
    activated,
    candidates,
    misdescribed,
    output,
    several,
)
from auditor.pipeline.masks import Enlarger, Enlarging

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from auditor.pipeline.steps import Placement
    from auditor.ports import Array, Arrays

Kind = Literal["scores", "mask", "boxes", "text"]
Rounding = Literal["none", "nearest", "floor"]
Suppression = Literal["none", "onnxruntime", "opencv"]
Masking = Literal["threshold", "argmax"]
Order = Literal["resize", "decide"]
Spelling = Literal["ctc", "argmax"]

NAME = "result"  # under which the result stands among outputs


@dataclass(frozen=True, slots=True)
class Post:
    """One side's way from outputs to the result.

    Attributes:
        kind: of the result.
        output: the model's output for scores and masks, that of the boxes' numbers otherwise, or
            one for each level; "" for the first one.
        scores: the output with the boxes' scores, [.., candidates, classes], or one for each level;
            "" where they follow the numbers of each box (YOLO).
        objectness: outputs with the score that there is any object, [.., candidates, 1]; "behind"
            where it follows the numbers of each box (YOLOX); "" without one.
        join: a score is its product with the objectness, or the root of that (FCOS).
        channels_first: boxes' numbers and scores are on axis 1 instead of the last (heads of
            convolutions: [1, columns, candidates] or [1, columns, height, width]).
        activation: of the scores.
        background: the class that is no object; None without one.
        threshold: lowest score of a detection; value above which a mask is set.
        coding: ``corners`` x1 y1 x2 y2; ``centre`` x y width height; both in pixels, or as
            changes of anchors: each corner by a part of the size, or the centre by a part of the
            size and the size by an exponential (R-CNN, SSD); ``distances`` from a point to left,
            top, right and bottom (FCOS), or their distributions over 0, 1, 2, … strides, ``dfl``
            (PicoDet).
        bins: how long each distribution is; 0 where nothing follows them.
        unit: of the numbers: ``strides`` of their level, or ``parts`` of the input's sides.
        stride: how far the cells of each level's grid are apart; one or by level.
        shift: where in a cell its point is, and the middle of its anchors, as a part of the stride.
        cell: the anchors are the cells, each this wide; one or by level.
        anchors: file (.npy, [candidates, 4] corners) with the anchors, or by level the width and
            height of each anchor of a cell; "" for others.
        sizes, ratios: by level, roots of the anchors' areas, and their heights by their widths.
        variances: by which deltas are multiplied: those of positions, those of sizes.
        offset: a box from x1 to x2 is ``x2 - x1 + offset`` wide (SysNoise, sec. 3.3: 0 or 1).
        clip: height and width that boxes are cut to; None for none.
        rounding: of corners.
        nms: what suppresses overlapping boxes, and above which overlap (``iou``).
        iou_offset: the offset with which overlaps are measured.
        class_aware: only boxes of one class suppress each other.
        top_k: most detections, the best first.
        mask: how a pixel is decided: above a threshold, or the best of several classes.
        channels_last: the classes of a mask are on the last axis instead of axis 1.
        resize, interpolation: what enlarges a mask to the photograph, and how; ``none`` leaves it.
        order: what comes first, ``resize`` or ``decide``.
        text: how characters are read off the steps: ``ctc`` merges repeated classes and drops the
            blank, ``argmax`` drops the blank only.
        blank: the class that is no character.
        charset: file with a character a line, ``model`` for what the model's metadata name under
            ``character`` (PaddleOCR), or "".
    """

    kind: Kind
    output: Names = ""
    scores: Names = ""
    objectness: Names = ""
    join: Joining = "product"
    channels_first: bool = False
    activation: Activation = "none"
    background: int | None = None
    threshold: float = 0.5
    coding: Coding = "corners"
    bins: int = 0
    unit: Unit = "pixels"
    stride: Lengths = 0
    shift: float = 0.5
    cell: Lengths = 0
    anchors: str | Shapes = ""
    sizes: Sizes = ()
    ratios: tuple[float, ...] = (1.0,)
    variances: tuple[float, float] = (1.0, 1.0)
    offset: int = 0
    clip: tuple[int, int] | None = None
    rounding: Rounding = "none"
    nms: Suppression = "none"
    iou: float = 0.5
    iou_offset: int = 0
    class_aware: bool = True
    top_k: int = 100
    mask: Masking = "threshold"
    channels_last: bool = False
    resize: Enlarger = "none"
    interpolation: Enlarging = "bilinear"
    order: Order = "resize"
    text: Spelling = "ctc"
    blank: int = 0
    charset: str = ""

    def steps(self) -> dict[str, str]:
        """Every step in words, by its name; only those that this kind of result has."""
        where = " ".join(several(self.output)) or "first output"
        said = {"result": f"{self.kind} of {where}"}
        if self.kind in ("scores", "boxes"):
            said["activation"] = "no activation" if self.activation == "none" else self.activation
        if self.kind in ("mask", "boxes"):
            said["threshold"] = f"threshold {self.threshold:g}"
        if self.kind == "mask":
            if self.mask == "argmax":
                last = ", classes on the last axis" if self.channels_last else ""
                said["threshold"] = f"best class{last}"
            said["mask_resize"] = (
                "not enlarged"
                if self.resize == "none"
                else f"{self.resize} {self.interpolation}, {self.order} first"
            )
        if self.kind == "text":
            said["text_decode"] = f"{self.text}, blank {self.blank}"
        if self.kind == "boxes":
            said["box_decode"] = self._decoding(where)
            said["box_offset"] = f"offset {self.offset}"
            rounding = "not rounded" if self.rounding == "none" else f"rounded: {self.rounding}"
            clip = (
                "not clipped" if self.clip is None else f"clipped to {self.clip[0]}x{self.clip[1]}"
            )
            said["box_rounding"] = f"{rounding}, {clip}"
            by = "each class" if self.class_aware else "all classes together"
            said["nms"] = (
                f"{self.nms}, IoU {self.iou:g} with offset {self.iou_offset}, {by}, "
                f"top {self.top_k}"
            )
        return said

    def _decoding(self, where: str) -> str:
        """How boxes are read off the outputs, in words."""
        scores = " ".join(several(self.scores)) or "behind them"
        said = [f"{self.coding} of {where}", f"scores {scores}"]
        if self.objectness:
            said.append(f"objectness {' '.join(several(self.objectness))} by {self.join}")
        if self.unit != "pixels":
            said.append(f"in {self.unit}")
        if self.bins:
            said.append(f"{self.bins} bins")
        anchors = self.anchors if isinstance(self.anchors, str) else _listed(self.anchors)
        if not anchors and self.stride:
            anchors = f"grid {_listed(self.stride)}/{_listed(self.cell)}"
        elif anchors and self.stride:
            anchors += f", grid {_listed(self.stride)}"
        if self.sizes:
            anchors += f", sizes {_listed(self.sizes)}, ratios {_listed(self.ratios)}"
        if self.shift != 0.5:
            anchors += f", points at {self.shift:g}"
        said.append(f"anchors {anchors or 'none'}")
        said.append(f"variances {_listed(self.variances)}")
        if self.channels_first:
            said.append("channels first")
        if self.background is not None:
            said.append(f"class {self.background} is none")
        return ", ".join(said)


def _listed(numbers: float | tuple[Any, ...]) -> str:
    """Nested numbers: ``8 16/32 64``, levels apart."""
    if not isinstance(numbers, tuple):
        return f"{numbers:g}"
    apart = " " if any(isinstance(number, tuple) for number in numbers) else "/"
    return apart.join(map(_listed, numbers))


@dataclass(frozen=True, slots=True)
class Step:
    """One step after the network, and the first side with this step of the second."""

    name: str
    take: Callable[[Post, Post], Post]

    @property
    def noise(self) -> str:
        """Id of the cause."""
        return f"postprocessing.{self.name}"


def _taking(*fields: str) -> Callable[[Post, Post], Post]:
    return lambda p, d: replace(p, **{field: getattr(d, field) for field in fields})


# In the order of execution.
STEPS = (
    Step("activation", _taking("activation")),
    Step(
        "box_decode",
        _taking(
            *("output", "scores", "objectness", "join", "channels_first", "background"),
            *("coding", "bins", "unit", "stride", "shift", "cell", "anchors", "sizes", "ratios"),
            "variances",
        ),
    ),
    Step("box_offset", _taking("offset")),
    Step("box_rounding", _taking("clip", "rounding")),
    Step("threshold", _taking("threshold", "mask", "channels_last")),
    Step("mask_resize", _taking("resize", "interpolation", "order")),
    Step("text_decode", _taking("text", "blank")),
    Step("nms", _taking("nms", "iou", "iou_offset", "class_aware", "top_k")),
)


def differing(training: Post, deployment: Post) -> tuple[Step, ...]:
    """The steps in which the two sides differ, in the order of execution."""
    return tuple(step for step in STEPS if step.take(training, deployment) != training)


def between(training: Post, deployment: Post) -> tuple[tuple[str, Post], ...]:
    """From one side to the other a step at a time, each with the id of its cause ("" first)."""
    reached = [("", training)]
    for step in differing(training, deployment):
        reached.append((step.noise, step.take(reached[-1][1], deployment)))
    return tuple(reached)


def result(outputs: Arrays, post: Post, place: Placement | None = None) -> Arrays:
    """The result, under ``NAME``.

    Args:
        outputs: the network's final outputs by name.
        post: what to do with them.
        place: where in the photograph the network's input is; only for a mask that is enlarged.

    Raises:
        UsageError: the outputs are not what the description says.
    """
    if post.kind == "boxes":
        try:
            return {NAME: _boxes(outputs, post, place)[None]}
        except (ValueError, IndexError) as error:  # of numpy, where the shapes do not fit
            raise misdescribed(f"boxes cannot be read off the outputs: {error}") from error
    values = output(outputs, several(post.output)[0])
    if post.kind == "mask":
        return {NAME: _mask(values, post, place)}
    if post.kind == "text":
        return {NAME: _text(values, post)}
    return {NAME: activated(values, post.activation, axis=-1)}


def _mask(values: Array, post: Post, place: Placement | None) -> Array:
    if post.mask == "threshold" and post.resize == "none":
        return (values > post.threshold).astype(np.float32)
    if values.ndim == 4 and post.channels_last:
        values = np.moveaxis(values, -1, 1)
    if values.ndim < 2 or values.size == 0 or (values.ndim == 4 and values.shape[0] != 1):
        raise misdescribed(f"a mask cannot be read off an output of shape {values.shape}")
    planes = values.reshape(-1, *values.shape[-2:]).astype(np.float32, copy=False)
    if post.mask == "threshold" and len(planes) != 1:
        raise misdescribed(f"a threshold decides about one channel, but there are {len(planes)}")
    if post.mask == "argmax" and len(planes) < 2:
        raise misdescribed("the best class of one channel is always the same")

    def decided(maps: Array) -> Array:
        if post.mask == "argmax":
            best: Array = maps.argmax(axis=0)[None].astype(np.float32)
            return best
        above: Array = (maps > post.threshold).astype(np.float32)
        return above

    if post.resize == "none":
        return decided(planes)[None]
    if place is None:
        raise misdescribed("a mask is enlarged to the photograph's size, which is not known here")
    from auditor.pipeline.masks import enlarged

    if post.order == "resize":
        made = decided(enlarged(planes, place, post.resize, post.interpolation))
        if post.mask == "threshold" and post.threshold < 0:  # what was not seen is 0, not above it
            seen = enlarged(np.ones_like(planes), place, post.resize, "nearest")
            made = made * seen
        return made[None]
    whole = decided(planes)
    if post.mask == "argmax":
        return enlarged(whole, place, post.resize, "nearest")[None]
    pixels = (whole * 255).astype(np.uint8)
    made = enlarged(pixels, place, post.resize, post.interpolation)
    return (made > 127).astype(np.float32)[None]


def _text(values: Array, post: Post) -> Array:
    if values.ndim == 0 or values.shape[-1] == 0:
        raise misdescribed(f"a text cannot be read off an output of shape {values.shape}")
    steps = values.reshape(-1, values.shape[-1])
    if values.ndim > 2 and values.shape[0] != 1:
        raise misdescribed(f"texts of {values.shape[0]} photographs at once: one was expected")
    if post.blank >= steps.shape[1]:
        raise misdescribed(f"class {post.blank} is the blank, but there are {steps.shape[1]}")
    best = steps.argmax(axis=1) if steps.size else np.zeros(0, np.int64)
    kept = best != post.blank
    if post.text == "ctc":
        kept[1:] &= best[1:] != best[:-1]
    made = np.zeros((1, *steps.shape), np.float32)
    codes = best[kept]
    made[0, np.arange(len(codes)), codes] = 1
    return made


def text(value: Array, characters: Sequence[str]) -> str:
    """A result of kind ``text`` as a string; class numbers where characters are not known."""
    rows = value[0]
    codes = rows[rows.any(axis=1)].argmax(axis=1).tolist()
    if characters:
        return "".join(characters[code] if code < len(characters) else "\ufffd" for code in codes)
    return " ".join(map(str, codes))


def characters(post: Post, metadata: Mapping[str, str], classes: int) -> tuple[str, ...]:
    """The character of each class of a text; the blank's is "".

    Args:
        post: its ``charset`` says where they are; without one the result is empty.
        metadata: the model's own.
        classes: how many there are: characters in the order of the file, the blank in its place,
            and a space as the last one where one is left (PaddleOCR's ``use_space_char``).

    Raises:
        UsageError: there are none, or not as many as classes.
    """
    if not post.charset:
        return ()
    if post.charset == "model":
        found = metadata.get("character", "")
        where = "the model's metadata `character`"
    else:
        where = post.charset
        try:
            found = Path(post.charset).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise misdescribed(f"the charset {where} cannot be read: {error}") from error
    lines = found.split("\n")
    while lines and lines[-1].rstrip("\r") == "":
        del lines[-1]
    every = [line.rstrip("\r") for line in lines]
    every.insert(min(post.blank, len(every)), "")
    if len(every) + 1 == classes:
        every.append(" ")
    if len(every) != classes or not found:
        raise misdescribed(f"{where} has {len(lines)} characters for {classes} classes")
    return tuple(every)


def _boxes(outputs: Arrays, post: Post, place: Placement | None) -> Array:
    corners, best, kind, classes = candidates(outputs, post, place)
    made = np.zeros((len(best), 6 if classes > 1 else 5), np.float32)
    kept = left(corners, best, kind, post)
    made[kept, :4], made[kept, 4] = corners[kept], best[kept]
    if classes > 1:
        made[kept, 5] = kind[kept]
    return made


def left(corners: Array, best: Array, kind: Array, post: Post) -> Array:
    """Indices of the detections among candidates, the best first."""
    kept = np.flatnonzero(best >= post.threshold)
    kept = kept[np.argsort(-best[kept], kind="stable")]
    found: Array = kept[_suppressed(corners[kept], best[kept], kind[kept], post)][: post.top_k]
    return found


def _suppressed(corners: Array, best: Array, kind: Array, post: Post) -> Array:
    """Indices of the boxes that are left, in the order given: the best first."""
    if post.nms == "none" or len(corners) == 0:
        return np.arange(len(corners))
    ends = corners.copy()
    ends[:, 2:] += post.iou_offset
    if post.class_aware:  # apart from those of other classes, they cannot overlap (torchvision)
        ends += (kind * (np.abs(ends).max() * 2 + 1))[:, None].astype(np.float32)
    if post.nms == "opencv":
        import cv2

        rectangles = np.concatenate([ends[:, :2], ends[:, 2:] - ends[:, :2]], axis=1)
        by_opencv = cv2.dnn.NMSBoxes(rectangles.tolist(), best.tolist(), 0.0, post.iou)
        return np.sort(np.asarray(by_opencv, np.int64).reshape(-1))
    return np.sort(_by_operator(ends, best, post.iou))


def _by_operator(ends: Array, best: Array, iou: float) -> Array:
    """ONNX Runtime's NonMaxSuppression."""
    feeds = {
        "boxes": ends[None],
        "scores": best[None, None],
        "most": np.array([len(ends)]),
        "iou": np.array([iou], np.float32),
    }
    left: Array = _operator().run(None, feeds)[0]
    return left[:, 2]


@cache
def _operator() -> Any:
    """The session of that operator: made once, since making one takes longer than running it."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    names = ("boxes", "scores", "most", "iou")
    node = helper.make_node("NonMaxSuppression", names, ["left"])
    inputs = [
        value("boxes", TensorProto.FLOAT, [1, None, 4]),
        value("scores", TensorProto.FLOAT, [1, 1, None]),
        value("most", TensorProto.INT64, [1]),
        value("iou", TensorProto.FLOAT, [1]),
    ]
    graph = helper.make_graph([node], "nms", inputs, [value("left", TensorProto.INT64, [None, 3])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
