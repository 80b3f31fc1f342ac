"""Labels: every metric against its library by hand, and labels that do not match."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.functional.classification import multiclass_jaccard_index

from auditor.errors import UsageError
from auditor.graphs import model
from auditor.pipeline import description
from auditor.pipeline import photos as folders
from auditor.pipeline.postprocessing import post, results
from auditor.pipeline.sysnoise.table import sysnoise
from auditor.pipeline.tasks import det
from auditor.ports import Silent
from auditor.records.sysnoise import SysnoiseOption, SysnoiseReport
from reports import _sysnoise as table
from tests.helpers import nodes_of

# Of the tiles, 121x150 pixels, the network sees 32x32 of 40x49, from 4, 8 on.
HIGH, WIDE = 121, 150
ROWS, COLUMNS = 40 / HIGH, 49 / WIDE
TOP, LEFT = 4, 8


def run(
    network: Path, photos: Path, text: str, labels: str | None, task: str | None, **more: Any
) -> SysnoiseReport:
    described = description.parse(text, "p.toml")
    kind = task or "cls"
    return sysnoise(
        model.load(network),
        described,
        folders.find(photos, labels, None, kind),
        [],
        keep=photos.parent / "keep.jsonl",
        threads=2,
        progress=Silent(),
        task=task,
        **more,
    )


def save(path: Path, nodes: list[Any], outputs: dict[str, list[Any]], **weights: Any) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "network",
        [value("image", TensorProto.FLOAT, [1, 3, 32, 32])],
        [value(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(w, np.float32), n) for n, w in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def tensors(photos: Path, resize: Any) -> list[np.ndarray]:
    found = []
    for path in sorted(photos.glob("*.jpg")):
        small = np.asarray(resize(Image.open(path).convert("RGB")))
        pixels = small[TOP : TOP + 32, LEFT : LEFT + 32].astype(np.float32)
        found.append(((pixels / 255 - 0.5) / 0.25).transpose(2, 0, 1)[None].astype(np.float32))
    return found


RESIZES = {
    "training": lambda image: image.resize((49, 40), Image.Resampling.BILINEAR),
    "opencv nearest": lambda image: cv2.resize(
        np.asarray(image), (49, 40), interpolation=cv2.INTER_NEAREST
    ),
}


def option(report: SysnoiseReport, name: str) -> SysnoiseOption:
    resizes = next(t for t in report.types if t.id == "preprocessing.resize")
    return next(o for o in resizes.options if o.name == name)


@pytest.fixture
def text(pipeline: Path) -> str:
    return pipeline.read_text()


# --- boxes ---------------------------------------------------------------------------------------

POST = """\
post = { kind = "boxes", output = "boxes", scores = "scores", channels_first = true, \
coding = "corner-deltas", stride = 4, cell = 12, threshold = 0.3, nms = "onnxruntime" }
"""


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A head on every fourth pixel: four deltas and two classes."""
    rng = np.random.default_rng(5)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["head"], strides=[4, 4], kernel_shape=[4, 4]),
        helper.make_node("Split", ["head", "parts"], ["deltas", "logits"], axis=1),
        helper.make_node("Tanh", ["deltas"], ["boxes"]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    made = save(
        tmp_path / "detector.onnx",
        nodes,
        {"boxes": [1, 4, 8, 8], "scores": [1, 2, 8, 8]},
        w=rng.standard_normal((6, 3, 4, 4)) * 0.12,
    )
    whole = onnx.load(made)
    whole.graph.initializer.append(numpy_helper.from_array(np.array([4, 2]), "parts"))
    onnx.save(whole, made)
    return made


def detections(detector: Path, photos: Path, made: post.Post, resize: Any) -> list[np.ndarray]:
    """By photograph x, y, width, height, score, class; in its own pixels."""
    session = ort.InferenceSession(detector, providers=["CPUExecutionProvider"])
    found = []
    for fed in tensors(photos, resize):
        values = dict(zip(("boxes", "scores"), session.run(None, {"image": fed}), strict=True))
        rows = results.result(values, made)[results.NAME][0]
        rows = rows[rows.any(axis=1)].astype(np.float64)
        x, y = ((rows[:, [0, 2]] + LEFT) / COLUMNS).T, ((rows[:, [1, 3]] + TOP) / ROWS).T
        found.append(np.column_stack([x[0], y[0], x[1] - x[0], y[1] - y[0], rows[:, 4:]]))
    return found


def coco(labels: Path, found: list[np.ndarray]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(labels))
        rows = [np.column_stack([np.full(len(f), i), f]) for i, f in enumerate(found, 1)]
        every = np.concatenate(rows)
        every[:, 6] = np.array([7, 9])[every[:, 6].astype(int)]  # the categories' ids
        evaluation = COCOeval(truth, truth.loadRes(every), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def test_average_precision_is_that_of_pycocotools(
    detector: Path,
    photos: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(det.TASK, "draws", 30)  # the interval is not what is compared here
    text += POST
    made = description.parse(text, "p.toml").training_post
    before = detections(detector, photos, made, RESIZES["training"])
    notes = []
    rng = np.random.default_rng(0)
    for image, rows in enumerate(before, 1):
        for row in rows[::2]:
            x, y, w, h = (row[:4] + rng.uniform(-1.5, 1.5, 4)).tolist()
            kind = [7, 9][int(row[5])]
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            notes.append({"id": len(notes) + 1, "image_id": image, "category_id": kind, **box})
    names = [f"{n:02d}_tile.jpg" for n in range(12)]
    sizes = {"height": HIGH, "width": WIDE}
    document = {
        "images": [{"id": i, "file_name": n, **sizes} for i, n in enumerate(names, 1)],
        "annotations": notes,
        "categories": [{"id": 9, "name": "b"}, {"id": 7, "name": "a"}],
    }
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(document))
    report = run(detector, photos, text, str(labels), "det")
    expected = coco(labels, before)
    assert 0.05 < expected < 0.95
    assert report.metric == "mAP" and report.labelled == 12
    assert report.accuracy is not None
    assert report.accuracy.value == pytest.approx(expected, abs=1e-4)
    assert report.accuracy.low < expected < report.accuracy.high
    after = coco(labels, detections(detector, photos, made, RESIZES["opencv nearest"]))
    found = option(report, "opencv nearest").effect.drop
    assert found is not None and found.value == pytest.approx(expected - after, abs=1e-4)
    assert "drop of mAP, points" in table.render(report, 120, False)

    document["images"][0]["file_name"] = "elsewhere.jpg"
    document["images"][1]["width"] = 100
    document["categories"].append({"id": 12, "name": "c"})
    labels.write_text(json.dumps(document))
    notes_of = "\n".join(folders.find(photos, str(labels), None, "det").notes)
    assert "Photographs of another size in the labels, not judged (1)" in notes_of
    assert "01_tile.jpg (121x100 in the labels, 121x150 here)" in notes_of
    assert "no photographs here (1): elsewhere.jpg" in notes_of
    assert (
        "Photographs without a label, which are only compared with training (2)" in notes_of
        and "3 categories" in notes_of
    )


# --- masks ---------------------------------------------------------------------------------------


def test_mean_iou_is_that_of_torchmetrics(photos: Path, text: str, tmp_path: Path) -> None:
    nodes = nodes_of(
        "a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, w) mask = Sigmoid(a)"
    )
    weights = np.random.default_rng(1).standard_normal((1, 3, 3, 3))
    network = save(tmp_path / "mask.onnx", nodes, {"mask": [1, 1, 32, 32]}, w=weights)
    session = ort.InferenceSession(network, providers=["CPUExecutionProvider"])

    def predicted(resize: Any) -> list[np.ndarray]:
        """Photograph's pixels to the network's, by row and by column; -1 outside."""
        v = np.floor((np.arange(HIGH) + 0.5) * ROWS - TOP).astype(int)
        h = np.floor((np.arange(WIDE) + 0.5) * COLUMNS - LEFT).astype(int)
        rows, columns = (np.flatnonzero((n >= 0) & (n < 32)) for n in (v, h))
        found = []
        for fed in tensors(photos, resize):
            mask = session.run(None, {"image": fed})[0][0, 0] > 0.5
            whole = np.full((HIGH, WIDE), -1, np.int64)
            whole[np.ix_(rows, columns)] = mask[np.ix_(v[rows], h[columns])]
            found.append(whole)
        return found

    before = predicted(RESIZES["training"])
    labels = tmp_path / "masks"
    labels.mkdir()
    rng = np.random.default_rng(2)
    truth = []
    for number, mask in enumerate(before):
        noisy = np.where(rng.random(mask.shape) < 0.1, 1, np.maximum(mask, 0)).astype(np.uint8)
        noisy[:50, 60:70] = 255
        Image.fromarray(noisy).save(labels / f"{number:02d}_tile.png")
        truth.append(noisy.astype(np.int64))

    def miou(found: list[np.ndarray]) -> float:
        pairs = [(p[p >= 0], t[p >= 0]) for p, t in zip(found, truth, strict=True)]
        p, t = (torch.from_numpy(np.concatenate(v)) for v in zip(*pairs, strict=True))
        return float(multiclass_jaccard_index(p, t, 2, ignore_index=255))

    text += 'post = { kind = "mask", threshold = 0.5 }\n'
    report = run(network, photos, text, str(labels), "seg")
    assert report.accuracy is not None and report.metric == "mIoU"
    assert report.accuracy.value == pytest.approx(miou(before), abs=1e-6)
    drop = option(report, "opencv nearest").effect.drop
    expected = miou(before) - miou(predicted(RESIZES["opencv nearest"]))
    assert drop is not None and drop.value == pytest.approx(expected, abs=1e-6) and drop.value > 0

    Image.new("L", (3, 4)).save(labels / "03_tile.png")
    Image.new("RGB", (WIDE, HIGH)).save(labels / "04_tile.png")
    Image.new("L", (3, 4)).save(labels / "elsewhere.png")
    (labels / "05_tile.png").unlink()
    whole = (labels / "06_tile.png").read_bytes()
    (labels / "06_tile.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    report = run(network, photos, text, str(labels), "seg")
    notes = "\n".join(report.notes)
    assert "not used (2)" in notes and "03_tile.png (4x3, its photograph 121x150)" in notes
    assert "04_tile.png (mode RGB" in notes and "belong to no photograph (1): elsewhere" in notes
    assert "only compared with training (3)" in notes
    assert [g.subject for g in report.left_out] == ["06_tile.jpg"]
    assert "its mask 06_tile.png cannot be read" in report.left_out[0].reason
    assert report.labelled == 8 and report.photos == 11


# --- embeddings ----------------------------------------------------------------------------------


def test_recall_is_that_of_a_search_by_hand(photos: Path, text: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    nodes = nodes_of(
        "a = Conv <kernel_shape = [3, 3], strides = [3, 3]> (image, w) b = Relu(a) "
        "c = GlobalAveragePool(b) embedding = Flatten(c)"
    )
    weights = rng.standard_normal((16, 3, 3, 3))
    network = save(tmp_path / "embed.onnx", nodes, {"embedding": [1, 16]}, w=weights)
    session = ort.InferenceSession(network, providers=["CPUExecutionProvider"])
    labels = tmp_path / "labels.txt"
    truth = np.arange(12) // 3  # three parts of each picture
    labels.write_text("".join(f"{n:02d}_tile.jpg {c}\n" for n, c in enumerate(truth)))

    def vectors(resize: Any) -> np.ndarray:
        found = [session.run(None, {"image": fed})[0][0] for fed in tensors(photos, resize)]
        return np.stack([v / np.linalg.norm(v) for v in found])

    gallery = vectors(RESIZES["training"])

    def recall(queries: np.ndarray) -> float:
        closeness = queries @ gallery.T
        np.fill_diagonal(closeness, -1)
        return float(np.mean(truth[closeness.argmax(axis=1)] == truth))

    report = run(network, photos, text, str(labels), "embed")
    assert report.metric == "recall at 1" and report.accuracy is not None
    assert report.accuracy.value == pytest.approx(recall(gallery))
    assert 0.2 < report.accuracy.value < 1
    drop = option(report, "opencv nearest").effect.drop
    expected = recall(gallery) - recall(vectors(RESIZES["opencv nearest"]))
    assert drop is not None and drop.value == pytest.approx(expected)


# --- what does not fit ---------------------------------------------------------------------------


def test_a_task_that_the_result_is_not_of_is_refused(
    network: Path, photos: Path, text: str
) -> None:
    with pytest.raises(UsageError, match="read as boxes, but `logits` is read as scores") as error:
        run(network, photos, text, None, "det")
    assert 'post = { kind = "boxes"' in error.value.hint


def test_a_missing_library_is_named_before_any_work(
    detector: Path, photos: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "00_tile.jpg"}],
                "annotations": [],
                "categories": [{"id": 1}],
            }
        )
    )
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "faster_coco_eval" else real(n, *a)
    )
    with pytest.raises(UsageError, match="needs faster-coco-eval for mAP") as error:
        run(detector, photos, text + POST, str(labels), "det")
    assert "sysnoise-auditor[metrics]" in error.value.hint


@pytest.mark.parametrize(
    ("task", "made", "said"),
    [
        ("det", "{", "is no COCO file"),
        ("det", '{"images": [], "annotations": []}', "KeyError 'categories'"),
        (
            "det",
            '{"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1}], "annotations": '
            '[{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}]}',
            "is no COCO file",
        ),
        ("det", '{"images": [], "annotations": [], "categories": []}', "no label for any"),
        ("det", None, "cannot read --labels"),
        ("seg", "x", "is no folder"),
    ],
)
def test_labels_of_another_kind_are_refused(
    task: str, made: str | None, said: str, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "labels"
    if made is not None:
        path.write_text(made)
    with pytest.raises(UsageError, match=said):
        folders.find(photos, str(path), None, task)
