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

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor.errors import reason
from auditor.pipeline.postprocessing.heads import activated, candidates, misdescribed, output
from auditor.pipeline.postprocessing.masks import enlarged
from auditor.pipeline.postprocessing.post import several

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from auditor.pipeline.postprocessing.post import Post
    from auditor.pipeline.preprocessing.stages import Placement
    from auditor.ports import Array, Arrays

NAME = "result"  # under which the result stands among outputs


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
            raise misdescribed(f"the charset {where} cannot be read: {reason(error)}") from error
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
    from onnx import TensorProto, helper

    from auditor.replays.sessions import session

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
    return session(model, 1)
