"""What made a result: every planted variant is found, and what cannot be told apart is named."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from auditor.errors import UsageError
from auditor.pipeline.forensics import results as result_forensics
from auditor.pipeline.postprocessing import post, results
from auditor.pipeline.postprocessing.post import Post
from auditor.pipeline.postprocessing.results import NAME
from auditor.pipeline.preprocessing import stages
from auditor.pipeline.preprocessing.stages import Placement
from tests.helpers import ROOT, audit_in, conforms

RNG = np.random.default_rng(11)
DESCRIBED = Post(
    "boxes",
    output="boxes",
    scores="scores",
    channels_first=True,
    activation="softmax",
    background=0,
    threshold=0.55,
    coding="corner-deltas",
    stride=4,
    cell=12,
    offset=1,
    nms="onnxruntime",
    iou=0.5,
)
OUTPUTS = {
    "boxes": RNG.normal(0, 0.15, (1, 4, 12, 12)).astype(np.float32),
    "scores": RNG.normal(0, 1.5, (1, 3, 12, 12)).astype(np.float32),
}


def recorded(way: Post) -> np.ndarray:
    """What an application keeps: detections only, in its own order."""
    rows = results.result(OUTPUTS, way)[NAME][0]
    rows = rows[rows.any(axis=1)]
    return RNG.permutation(rows)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"offset": 0},
        {"rounding": "floor"},
        {"rounding": "nearest"},
        {"coding": "centre-deltas"},
        {"coding": "centre-deltas", "variances": (0.1, 0.2)},
        {"nms": "none"},
        {"iou": 0.2},
        {"iou": 0.8},
        {"iou_offset": 1, "iou": 0.35},
        {"class_aware": False},
        {"threshold": 0.7},
        {"activation": "sigmoid"},
        {"activation": "none"},
        {"offset": 0, "rounding": "floor", "iou": 0.3, "threshold": 0.6},
    ],
)
def test_a_planted_variant_is_found(change: dict[str, object]) -> None:
    made = replace(DESCRIBED, **change)  # type: ignore[arg-type]
    found = result_forensics.identify(recorded(made), OUTPUTS, DESCRIBED, None)
    assert found.exact and found.best.mismatched == 0
    assert found.threshold is not None
    assert found.threshold[0] < made.threshold <= found.threshold[1] + 1e-4
    if made.nms != "none":
        assert found.overlap is not None
        assert found.overlap[0] - 0.05 <= made.iou <= found.overlap[1] + 0.05
    elif not found.indistinguishable:
        assert "nms" in found.differs
    # The planted steps are named, or a way that gives the very same result.
    differing = {step.name for step in stages.differing(post.STEPS, DESCRIBED, made)} - {
        "threshold",
        "nms",
    }
    names = " ".join((found.best.name, *found.indistinguishable))
    for step in differing:
        assert step in found.differs or made.steps()[step] in names
    if not change:
        assert not found.differs and found.best.residual < 1e-3


def test_a_result_that_nothing_makes_is_not_claimed() -> None:
    moved = recorded(DESCRIBED)
    moved[:, :4] += RNG.normal(0, 2, (len(moved), 4))
    found = result_forensics.identify(moved, OUTPUTS, DESCRIBED, None)
    assert not found.exact and found.best.residual > 1
    fewer = result_forensics.identify(recorded(DESCRIBED)[:5], OUTPUTS, DESCRIBED, None)
    assert not fewer.exact and fewer.best.mismatched


def test_ways_to_scores_texts_and_masks() -> None:
    logits = {"s": RNG.normal(0, 3, (1, 9)).astype(np.float32)}
    for activation in ("none", "softmax", "sigmoid"):
        way = Post("scores", activation=activation)
        value = results.result(logits, way)[NAME]
        found = result_forensics.identify(value, logits, Post("scores"), None)
        assert found.exact and bool(found.differs) == (activation != "none")
    steps = {"s": RNG.normal(0, 1, (1, 30, 4)).astype(np.float32)}
    for text, blank in product(("ctc", "argmax"), (0, 3)):
        way = Post("text", text=text, blank=blank)
        rows = results.result(steps, way)[NAME][0]
        codes = rows[rows.any(axis=1)].argmax(axis=1)
        found = result_forensics.identify(codes, steps, Post("text"), None)
        assert found.exact
        assert (text, blank) == ("ctc", 0) or f"{text}, blank {blank}" in found.best.name
    place = Placement((0.5, 0.5), (-4.0, -8.0), (80, 96), (32, 32))
    maps = {"m": RNG.random((1, 1, 16, 16), np.float32)}
    described = Post("mask", resize="opencv")
    for by, how, order in product(
        ("opencv", "pillow", "torch"), ("nearest", "bilinear", "bicubic"), ("resize", "decide")
    ):
        way = replace(described, resize=by, interpolation=how, order=order)
        mask = results.result(maps, way, place)[NAME][0, 0].astype(np.uint8) * 255
        found = result_forensics.identify(mask, maps, described, place)
        names = (found.best.name, *found.indistinguishable)
        assert found.exact and any(way.steps()["mask_resize"] in name for name in names)


def test_levels_of_a_head() -> None:
    """Points in the corners of their cells instead of the middles, and boxes rounded down."""
    place = Placement((1.0, 1.0), (0.0, 0.0), (64, 64), (64, 64))
    heads = {"b8": (1, 64, 32), "b16": (1, 16, 32), "s8": (1, 64, 2), "s16": (1, 16, 2)}
    outputs = {name: RNG.normal(0, 1, shape).astype(np.float32) for name, shape in heads.items()}
    described = Post(
        "boxes", ("b8", "b16"), ("s8", "s16"), activation="sigmoid", coding="dfl", stride=(8, 16),
        threshold=0.8, nms="onnxruntime",
    )  # fmt: skip
    for change in ({"shift": 0.0}, {"rounding": "floor"}):
        rows = results.result(outputs, replace(described, **change), place)[NAME][0]
        found = result_forensics.identify(rows[rows.any(axis=1)], outputs, described, place)
        (step,) = found.differs
        assert found.exact and step == ("box_decode" if "shift" in change else "box_rounding")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros((3, 4)), "Save [detections, 5 or 6]"),
        (np.full((3, 5), np.nan), "or not finite"),
        (np.zeros((0, 5)), "or not finite"),
        (np.array(["a"]), "or not finite"),
    ],
)
def test_a_record_of_another_kind_is_refused(value: np.ndarray, said: str) -> None:
    with pytest.raises(UsageError) as error:
        result_forensics.identify(value, OUTPUTS, DESCRIBED, None)
    assert said in f"{error.value.message} {error.value.hint}"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_refused(value: float) -> None:
    broken = {**OUTPUTS, "boxes": np.full_like(OUTPUTS["boxes"], value)}
    with pytest.raises(UsageError, match="output `boxes` holds NaN or infinity"):
        result_forensics.identify(recorded(DESCRIBED), broken, DESCRIBED, None)


def test_the_command(tmp_path: Path) -> None:
    pipeline = tmp_path / "p.toml"
    pipeline.write_text(
        '[training]\ndecoder = "pillow"\npost = { kind = "boxes", output = "boxes", '
        'scores = "scores", channels_first = true, activation = "softmax", background = 0, '
        'threshold = 0.55, coding = "corner-deltas", stride = 4, cell = 12, offset = 1, '
        'nms = "onnxruntime" }\n'
    )
    np.save(tmp_path / "result.npy", recorded(replace(DESCRIBED, offset=0)))
    np.savez(tmp_path / "outputs.npz", **OUTPUTS)
    run = partial(audit_in, ROOT, "forensics", "--pipeline", pipeline)
    given = ["--deployed-result", str(tmp_path / "result.npy")]
    outputs = ["--outputs", str(tmp_path / "outputs.npz")]
    done = run(*given, *outputs, "-o", str(tmp_path / "answer.json"))
    assert done.returncode == 0, done.stderr
    assert "box_offset: described offset 1; made by offset 0" in done.stdout
    assert done.stdout.count("4/12") == 1  # of other ways only what they do otherwise
    answer = json.loads((tmp_path / "answer.json").read_text())
    conforms(answer, "result_forensics")
    assert answer["exact"]
    assert list(answer["differs"]) == ["box_offset"]
    for arguments, said in (
        ([], "either --deployed-input or --deployed-result"),
        (given, "needs the network's outputs"),
        ([*given, "--outputs", str(pipeline)], "cannot read"),
        ([*given, "--model", "x.onnx"], "needs --image"),
    ):
        refused = run(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "") and said in refused.stderr
