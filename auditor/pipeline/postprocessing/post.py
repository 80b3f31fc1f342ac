"""What one side does with the network's outputs, as a record, and the steps in which two differ.

``auditor.pipeline.postprocessing.results`` executes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from auditor.pipeline.postprocessing.masks import Enlarger, Enlarging
from auditor.pipeline.preprocessing.stages import Step, differing, taking

Activation = Literal["none", "softmax", "sigmoid"]
Coding = Literal["corners", "centre", "corner-deltas", "centre-deltas", "distances", "dfl"]
Unit = Literal["pixels", "strides", "parts"]
Joining = Literal["product", "root"]
Names = str | tuple[str, ...]  # one output, or one for each level
Lengths = int | tuple[int, ...]
Sizes = tuple[tuple[float, ...], ...]  # by level
Shapes = tuple[tuple[tuple[float, float], ...], ...]  # by level, width and height
Kind = Literal["scores", "mask", "boxes", "text"]
Rounding = Literal["none", "nearest", "floor"]
Suppression = Literal["none", "onnxruntime", "opencv"]
Masking = Literal["threshold", "argmax"]
Order = Literal["resize", "decide"]
Spelling = Literal["ctc", "argmax"]

BEHIND = "behind"  # where an objectness is that follows the four numbers


def several(value: Names | Lengths) -> tuple[Any, ...]:
    """One value for each level, where one may have been given for all."""
    return value if isinstance(value, tuple) else (value,)


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


# In the order of execution.
STEPS: tuple[Step[Post], ...] = (
    Step("postprocessing.activation", taking("activation")),
    Step(
        "postprocessing.box_decode",
        taking(
            *("output", "scores", "objectness", "join", "channels_first", "background"),
            *("coding", "bins", "unit", "stride", "shift", "cell", "anchors", "sizes", "ratios"),
            "variances",
        ),
    ),
    Step("postprocessing.box_offset", taking("offset")),
    Step("postprocessing.box_rounding", taking("clip", "rounding")),
    Step("postprocessing.threshold", taking("threshold", "mask", "channels_last")),
    Step("postprocessing.mask_resize", taking("resize", "interpolation", "order")),
    Step("postprocessing.text_decode", taking("text", "blank")),
    Step("postprocessing.nms", taking("nms", "iou", "iou_offset", "class_aware", "top_k")),
)


def between(training: Post, deployment: Post) -> tuple[tuple[str, Post], ...]:
    """The sides from training to deployment, one step at a time, each with its cause's id."""
    reached = [("", training)]
    for step in differing(STEPS, training, deployment):
        reached.append((step.noise, step.take(reached[-1][1], deployment)))
    return tuple(reached)
