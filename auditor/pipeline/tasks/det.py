"""Detection: mean average precision as COCO defines it (mAP, IoU 0.5 to 0.95).

By faster-coco-eval, pycocotools' evaluation in C++: intervals take hundreds of accumulations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from auditor.errors import UsageError
from auditor.pipeline.labels import match
from auditor.pipeline.scoring import Case, Label, Labels, Verdict, listed
from auditor.ports import Array
from auditor.records.terms import OutputKind

_NUMBERS = 6  # of a detection: x, y, width, height, score, class
_MOST = 100  # detections of a photograph, as COCO has it


@dataclass(frozen=True, slots=True)
class Box:
    """One object: COCO's box (left, top, width, height), the class's index, and what to do with it.

    Attributes:
        box: in pixels of the photograph.
        kind: the class, counted from 0 in the order of COCO's category ids.
        crowd: a box around many; area: as annotated.
    """

    box: tuple[float, float, float, float]
    kind: int
    crowd: bool
    area: float


class Detection:
    """Boxes with scores, in the photograph's pixels."""

    metric = "mAP"
    kind: OutputKind = "boxes"
    packages = {"faster_coco_eval": "faster-coco-eval"}  # noqa: RUF012 - never changed
    labels = "a COCO file (images, annotations, categories), whose categories, ordered by id, are "
    labels += "the network's classes"
    draws = 200  # each sorts all detections again
    gallery = False

    def read(self, folder: Path, names: Sequence[str], source: str) -> Labels:
        """The annotations by photograph, and what of them does not match."""
        from PIL import Image

        images, kinds = _document(Path(source), self.labels)
        matched, unused = match(names, images)
        notes = []
        values: dict[str, Label] = {}
        odd = []
        for name, (size, boxes) in matched.items():
            try:
                with Image.open(folder / name) as photo:
                    real = (photo.height, photo.width)
            except Exception:  # parsers raise anything; the decoder says what is wrong with it
                real = size or (0, 0)
            if size is not None and size != real:
                odd.append(f"{name} ({size[0]}x{size[1]} in the labels, {real[0]}x{real[1]} here)")
                continue
            values[name] = boxes
        if odd:
            notes.append(listed("Photographs of another size in the labels, not judged", odd))
        if unused:
            notes.append(
                listed(f"Labelled images of {source} that are no photographs here", unused)
            )
        empty = sum(not boxes for boxes in values.values())
        notes.append(
            f"{sum(map(len, values.values()))} objects of {kinds} categories; photographs "
            f"without any: {empty}."
        )
        return Labels(values, tuple(notes))

    def judge(self, value: Array, case: Case) -> Verdict | None:
        """Six numbers a detection: left, top, width, height, score, class."""
        rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
        rows = rows[rows.any(axis=1)]
        if value.shape[-1] < _NUMBERS - 1:
            return None  # boxes without scores have no order
        rows = rows[np.argsort(-rows[:, 4], kind="stable")][:_MOST]
        kinds = rows[:, 5] if value.shape[-1] >= _NUMBERS else np.zeros(len(rows))
        scale, shift = np.array(case.place.scale[::-1]), np.array(case.place.shift[::-1])
        start, end = ((rows[:, at] - shift) / scale for at in ([0, 1], [2, 3]))
        found = np.column_stack([start, end - start, rows[:, 4], kinds])
        return [float(v) for v in found.ravel()]

    def score(self, verdicts: Sequence[Verdict], labels: Sequence[Label], weights: Array) -> Array:
        """COCO's first figure, on the photographs of each draw."""
        from faster_coco_eval.faster_eval_api_cpp import COCOevalAccumulate

        evaluation = _evaluation(verdicts, labels)
        alone = list(evaluation._evalImgs_cpp)  # by class, then photograph
        photos = len(verdicts)
        found = []
        for row in weights:
            drawn = np.repeat(np.arange(photos), row.astype(np.int64))
            again = [alone[at + i] for at in range(0, len(alone), photos) for i in drawn]
            # It only counts the photographs by now.
            evaluation._paramsEval.imgIds = list(range(len(drawn)))
            precision = np.array(
                COCOevalAccumulate(evaluation._paramsEval, again)["precision"] if again else ()
            )
            known = precision[precision > -1]
            found.append(float(known.mean()) if known.size else np.nan)
        return np.array(found)


def _document(path: Path, expected: str) -> tuple[dict[str, Any], int]:
    """Each file's size (None where not given) and boxes; and how many categories there are."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        ids = sorted(category["id"] for category in document["categories"])
        by_id: dict[Any, list[Box]] = {image["id"]: [] for image in document["images"]}
        for note in document["annotations"]:
            x, y, w, h = (float(v) for v in note["bbox"])
            crowd, area = bool(note.get("iscrowd", 0)), float(note.get("area", w * h))
            by_id[note["image_id"]].append(
                Box((x, y, w, h), ids.index(note["category_id"]), crowd, area)
            )
        images = {}
        for image in document["images"]:
            size = (image["height"], image["width"]) if "height" in image else None
            images[str(image["file_name"])] = size, tuple(by_id[image["id"]])
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read --labels {path}: {error}", f"--task det takes {expected}."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"--labels {path} is no COCO file of boxes: {type(error).__name__} {error}",
            f"--task det takes {expected}.",
        ) from error
    return images, len(ids)


def _evaluation(verdicts: Sequence[Verdict], labels: Sequence[Label]) -> Any:
    """COCO's evaluation, done for each photograph and class, not yet accumulated."""
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO()
    photos = range(1, len(verdicts) + 1)
    every = [(photo, box) for photo, boxes in zip(photos, labels, strict=True) for box in boxes]
    rows = [
        np.column_stack([np.full(len(v) // _NUMBERS, photo), np.reshape(v, (-1, _NUMBERS))])
        for photo, v in zip(photos, verdicts, strict=True)
    ]
    detections = np.concatenate(rows)
    kinds = {box.kind for _, box in every} | set(detections[:, 6].astype(int).tolist())
    truth.dataset = {
        "images": [{"id": photo} for photo in photos],
        "categories": [{"id": kind} for kind in sorted(kinds)],
        "annotations": [
            {
                **{"id": number, "image_id": photo, "category_id": box.kind},
                **{"bbox": list(box.box), "area": box.area, "iscrowd": int(box.crowd)},
            }
            for number, (photo, box) in enumerate(every, 1)
        ],
    }
    truth.createIndex()
    if len(detections):
        found = truth.loadRes(detections)
    else:  # which loadRes cannot read
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    evaluation = COCOeval_faster(
        truth, found, "bbox", print_function=lambda *_: None, separate_eval=True
    )
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.params.maxDets = [_MOST]
    evaluation.evaluate()
    return evaluation


TASK = Detection()
