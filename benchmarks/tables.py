"""The SysNoise table of several networks, as the Markdown of docs/sysnoise-tables.md.

``python -m benchmarks.tables --table docs/sysnoise-tables.md [--images DIR] [--photos N] [MODEL…]``
runs ``audit sysnoise`` for each network on pictures that are made from what packages ship
(``benchmarks/sets.py``); classifier and face detector use ``--images`` where it is given, whose
names begin with the class's number. Results are kept in ``.zoo/tables``; a model whose table is
there for the same number of pictures is not measured again, and an interrupted sweep goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import compare, sets, zoo

_LITE1 = """\
[training]
preset = "efficientnet-lite"
resize = { library = "pillow", interpolation = "bicubic", short_side = 272 }
crop = 240
"""
_DETECT = """\
[training]
decoder = "pillow"
resize = { library = "pillow", interpolation = "bilinear", size = [225, 301] }
normalise = { scale = 1.0, mean = 127.5, std = 128.0 }
post = { kind = "boxes", output = "boxes", scores = "scores", channels_first = true, \
background = 0, threshold = 0.6, coding = "corner-deltas", stride = 2, cell = 12, offset = 1, \
nms = "onnxruntime", iou = 0.5 }
"""
_SEGMENT = """\
[training]
preset = "ppocr-det"
resize = { library = "opencv", interpolation = "bilinear", size = [320, 480] }
post = { kind = "mask", threshold = 0.3, resize = "opencv", interpolation = "bilinear" }
"""
_TURNED = """\
[training]
decoder = "opencv"
resize = { library = "opencv", interpolation = "bilinear", size = [48, 192] }
channels = "bgr"
normalise = { scale = 0.00784313725490196, mean = 1.0, std = 1.0 }
post = { kind = "scores" }
"""


@dataclass(frozen=True)
class Subject:
    """One network, its pipeline, and its pictures."""

    title: str
    pipeline: str
    task: str
    make: Callable[[Path, int], Path | None]
    share: float = 1.0  # of the number of pictures asked for
    note: str = ""  # what there is to say of the table


SUBJECTS = {
    "efficientnet_lite0": Subject(
        "Classifier: EfficientNet-Lite0", "efficientnet-lite", "cls", sets.photographs
    ),
    "efficientnet_lite1": Subject(
        "Second classifier: EfficientNet-Lite1", _LITE1, "cls", sets.photographs
    ),
    "ppocr_cls": Subject(
        "Small classifier: PP-OCR's direction of writing (MobileNetV3)",
        _TURNED,
        "cls",
        sets.turned,
        0.2,
    ),
    "mtcnn_p": Subject(
        "Detector: MTCNN's P-Net, proposals of faces", _DETECT, "det", sets.photographs, 0.1
    ),
    "ppocr_det": Subject(
        "Segmentation: PP-OCRv4 text detection",
        _SEGMENT,
        "seg",
        sets.scenes,
        0.032,
        "What FP16 does here is one constant: the variances of `p2o.BatchNormalization.1` are "
        "1.0e7 to 9.8e7, and float16 ends at 65504. As IEEE has it they become infinite (as by "
        "PyTorch's `half()`), the layer puts out its bias, and nothing is left of the mask; at "
        "most 65504, as converters store them, the layer is up to 39 times too loud. Checked on "
        "four pictures of 480x320 with tools that share no code with the simulation: 1 − IoU is "
        "65.8, 86.5, 83.8 and 69.4 % of the model that ONNX Runtime's float16 converter makes, "
        "65.9, 86.5, 83.8 and 69.4 % on OpenVINO with its f16 hint, and 65.8, 86.5, 83.8 and "
        "69.4 % in the form *at most 65504*. Forms that leave this constant alone lose 0.1 %.",
    ),
    "ppocr_rec": Subject("Text: PP-OCRv4 recognition", "ppocr-rec", "ocr", sets.lines, 0.1),
}
# The columns of the paper's tables, and what else is after the network here.
COLUMNS = {
    "preprocessing.decoder": "decoder",
    "preprocessing.resize": "resize",
    "preprocessing.colour": "colour",
    "inference.ceil_mode": "ceil mode",
    "inference.upsample": "upsample",
    "precision.fp16": "FP16",
    "precision.bf16": "BF16",
    "precision.int8": "INT8",
    "postprocessing.box_offset": "box offset",
    "postprocessing.box_rounding": "box rounding",
    "postprocessing.nms": "suppression",
    "postprocessing.mask_resize": "mask resize",
}
READINGS = {
    "scores": "top-1 flips",
    "boxes": "boxes lost",
    "mask": "1 − IoU",
    "text": "texts that differ",
    "embedding": "1 − cosine",
}


def measure(name: str, model: Path, photos: int, images: Path | None, end: float) -> Path | None:
    """The table's file; None when the time was over before."""
    subject = SUBJECTS[name]
    count = max(2, round(photos * subject.share))
    folder = zoo.ROOT / ".zoo" / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    real = images is not None and subject.make is sets.photographs
    source = folder / (images.name if real and images else subject.make.__name__)
    labels: str | None = None
    if real and images:
        source, labels = images, "from-name" if subject.task == "cls" else None
    else:
        made = sets.made(source, subject.make, count)
        labels = str(made) if made else None
    pipeline = subject.pipeline
    if pipeline.startswith("["):
        path = folder / f"{name}.toml"
        path.write_text(pipeline)
        pipeline = str(path)
    table = folder / f"{name}-{source.name}-{count}.json"
    if table.is_file():
        return table
    command = [sys.executable, "-m", "auditor", "sysnoise", str(model), "--images", str(source)]
    command += ["--pipeline", pipeline, "--task", subject.task, "--samples", str(count)]
    command += ["-o", str(table), "--format", "json"]
    command += ["--labels", labels] if labels else []
    child = subprocess.Popen(command, cwd=zoo.ROOT, stdout=subprocess.DEVNULL)
    try:
        code = child.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.send_signal(2)  # as Ctrl-C: it keeps what was measured
        child.wait()
        return None
    if code:
        raise SystemExit(f"{name}: exit code {code}")
    return table


def render(tables: dict[str, dict[str, Any]], command: str) -> str:
    """The whole document."""
    facts = compare.machine()
    packages = ", ".join(f"{k} {v}" for k, v in facts["packages"].items() if k != "polygraphy")
    today = datetime.datetime.now(datetime.UTC).date()
    parts = [
        "# SysNoise of some networks",
        "",
        f"What `audit sysnoise` measures for networks of several tasks. Generated by `{command}`; "
        "which networks, pipelines and pictures: `benchmarks/tables.py` and `sets.py`. How to "
        "read it: [pipeline.md](pipeline.md).",
        "",
        f"{today}, {facts['cpu']}, {facts['cores']} cores. {packages}.",
        "",
        "In per cent, with 95 % bootstrap intervals over pictures. *Drop*: points of the metric "
        "that are lost against labels; *mean* and *max* over a type's options. A dash: the type "
        "does not exist in this network or pipeline.",
        "",
    ]
    for name, table in tables.items():
        parts += _section(name, table)
    return "\n".join(parts)


def _section(name: str, table: dict[str, Any]) -> list[str]:
    metric, kind = table["metric"], table["output"]["kind"]
    photos = table["photos"]
    said = f"{photos['measured']} pictures; {table['pipeline']['training']['resize']}."
    if metric:
        said += f" {metric} after the training pipeline: {_figure(table['accuracy'])}."
    drops = [f"drop of {metric}: mean", "max"] if metric else []
    head = ["type", "options", *drops, f"{READINGS[kind]}: mean", "max", "worst option"]
    lines = ["## " + SUBJECTS[name].title, "", said, "", _row(head), _row(["---"] * len(head))]
    types = {t["id"]: t for t in table["types"]}
    for id, title in COLUMNS.items():
        if (found := types.pop(id, None)) is None:
            if id.startswith(("inference.", "precision.")) or (
                id == "postprocessing.box_offset" and kind == "boxes"
            ):
                lines.append(_row([title, *["–"] * (len(head) - 1)]))
            continue
        lines.append(_row(_cells(title, found, bool(metric))))
    for found in types.values():
        lines.append(_row(_cells(found["title"], found, bool(metric))))
    if table["accumulation"]:
        last = table["accumulation"][-1]
        cells = ["**combined**, worst of each", str(len(last["types"]))]
        cells += ["", _figure(last["effect"]["drop"])] if metric else []
        lines.append(_row([*cells, "", _figure(last["effect"]["changed"]), ""]))
    lines += ["", *_pairs(table, metric), ""]
    if note := SUBJECTS[name].note:
        lines += [note, ""]
    for gap in table["gaps"]:
        lines.append(f"- Left out: {gap['subject']}: {gap['reason']}")
    return [*lines, "", *_options(table, metric, READINGS[kind]), ""]


def _options(table: dict[str, Any], metric: str | None, reading: str) -> list[str]:
    """Every option alone, folded."""
    head = ["type", "option", *([f"drop of {metric}"] if metric else []), reading, "same bits"]
    lines = ["<details><summary>Every option</summary>", "", _row(head)]
    lines.append(_row(["---"] * len(head)))
    for found in table["types"]:
        for option in found["options"]:
            effect = option["effect"]
            cells = [found["title"], option["name"]]
            cells += [_figure(effect["drop"])] if metric else []
            cells += [_figure(effect["changed"]), f"{option['same']} of {option['photos']}"]
            lines.append(_row(cells))
    return [*lines, "", "</details>"]


def _cells(title: str, found: dict[str, Any], labelled: bool) -> list[str]:
    cells = [title, str(len(found["options"]))]
    if all(option["same"] == option["photos"] for option in found["options"]):
        return [*cells, *[""] * (4 if labelled else 2), "none: the same bits on every picture"]
    for reading in (*(("drop",) if labelled else ()), "changed"):
        cells += [_figure(found[which][reading]) for which in ("mean", "max")]
    return [*cells, found["worst"]]


def _pairs(table: dict[str, Any], metric: str | None) -> list[str]:
    """Pairs that do more, or less, together than alone, beyond chance."""
    titles = {t["id"]: t["title"] for t in table["types"]}
    decided = []
    for pair in table["pairs"]:
        surplus = pair["surplus"]["drop" if metric else "changed"]
        if surplus and surplus["low"] is not None and (surplus["low"] > 0 or surplus["high"] < 0):
            decided.append((surplus, pair["types"]))
    of = metric or READINGS[table["output"]["kind"]]
    if not decided:
        every = len(table["pairs"])
        return [f"None of {every} pairs differs from the sum of its parts by more than chance."]
    decided.sort(key=lambda one: -abs(one[0]["value"]))
    said = [f"{titles[a]} and {titles[b]} {_figure(surplus)}" for surplus, (a, b) in decided[:4]]
    return [
        f"Together beyond the sum of each alone, points of {of} ({len(decided)} of "
        f"{len(table['pairs'])} pairs by more than chance): {'; '.join(said)}."
    ]


def _figure(interval: dict[str, float | None] | None) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    value, low, high = (100 * (interval[k] or 0.0) for k in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} … {high:.1f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(SUBJECTS))
    parser.add_argument("--table", type=Path, help="write the document to this file")
    parser.add_argument("--images", type=Path, help="photographs, named by their class")
    parser.add_argument("--photos", type=int, default=500, help="pictures for a classifier")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="stop after so long; go on later"
    )
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    names = arguments.models or list(SUBJECTS)
    tables = {}
    for name, path in zip(names, zoo.obtain(names), strict=True):
        if time.monotonic() > end:
            print(f"{name}: not measured, the time is over", file=sys.stderr)
            continue
        found = measure(name, path, arguments.photos, arguments.images, end)
        if found is None:
            print(f"{name}: not finished, the time is over", file=sys.stderr)
            continue
        tables[name] = json.loads(found.read_text())
        print(f"{name}: {tables[name]['seconds']}", flush=True)
    if arguments.table and len(tables) == len(names):
        given = "".join(f" {name}" for name in arguments.models)
        given += " --images DIR" if arguments.images else ""
        command = f"python -m benchmarks.tables{given} --photos {arguments.photos}"
        text = render(tables, f"{command} --table docs/sysnoise-tables.md")
        arguments.table.write_text(text + os.linesep, encoding="utf-8")
    return int(len(tables) < len(names))


if __name__ == "__main__":
    raise SystemExit(main())
