"""The table: against the libraries by hand, with bad photographs, interrupted, by command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from auditor import discovery
from auditor.errors import UsageError
from auditor.graphs import model
from auditor.pipeline import description
from auditor.pipeline import photos as folders
from auditor.pipeline.preprocessing import libraries
from auditor.pipeline.sysnoise.table import sysnoise
from auditor.ports import Silent
from auditor.records.sysnoise import (
    Interval,
    SysnoiseEffect,
    SysnoiseOption,
    SysnoiseReport,
    SysnoiseType,
)
from reports import _plots
from reports import _sysnoise as table
from tests.helpers import ROOT, audit_in, conforms, jpeg


def run(
    network: Path,
    photos: Path,
    pipeline: Path | str,
    *,
    labels: str | None = None,
    noises: tuple[str, ...] = (),
    progress: Any = None,
    threads: int = 2,
) -> SysnoiseReport:
    return sysnoise(
        model.load(network),
        description.load(str(pipeline)),
        folders.find(photos, labels, None),
        [discovery.noise(id) for id in noises],
        keep=photos.parent / "keep.jsonl",
        threads=threads,
        progress=progress or Silent(),
    )


def option(report: SysnoiseReport, type: str, name: str) -> SysnoiseOption:
    (found,) = (t for t in report.types if t.id == type)
    return next(o for o in found.options if o.name == name)


def answers(network: Path, photos: Path, resize: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Top-1 and logits of the training pipeline by hand, with another resize."""
    session = ort.InferenceSession(network, providers=["CPUExecutionProvider"])
    logits = []
    for path in sorted(photos.glob("*.jpg")):
        small = resize(Image.open(path).convert("RGB"), (49, 40))  # the tiles are 150x121
        pixels = np.asarray(small)[4:36, 8:40].astype(np.float32)
        fed = ((pixels / 255 - 0.5) / 0.25).transpose(2, 0, 1)[None]
        logits.append(session.run(None, {"image": fed.astype(np.float32)})[0][0])
    return np.argmax(logits, axis=1), logits


def pillow(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BILINEAR)


def test_figures_are_those_of_the_libraries_run_by_hand(
    network: Path, photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    before, expected = answers(network, photos, pillow)
    labels = tmp_path / "labels.txt"
    truth = np.where(np.arange(12) % 3 == 0, before + 1, before)  # wrong on every third
    labels.write_text("".join(f"{n:02d}_tile.jpg {c}\n" for n, c in enumerate(truth)))
    report = run(network, photos, pipeline, labels=str(labels))
    assert report.photos == report.labelled == 12
    assert report.accuracy is not None and report.accuracy.value == pytest.approx(8 / 12)

    by_hand = {
        "opencv nearest": lambda i, s: cv2.resize(
            np.asarray(i), s, interpolation=cv2.INTER_NEAREST
        ),
        "opencv bilinear": lambda i, s: cv2.resize(np.asarray(i), s),
        "pillow lanczos": lambda i, s: i.resize(s, Image.Resampling.LANCZOS),
    }
    flipped = 0
    for name, resize in by_hand.items():
        after, logits = answers(network, photos, resize)
        found = option(report, "preprocessing.resize", name)
        assert found.effect.changed.value == pytest.approx(np.mean(after != before))
        drop = np.mean(before == truth) - np.mean(after == truth)
        assert found.effect.drop.value == pytest.approx(drop)
        both = zip(logits, expected, strict=True)
        far = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in both]
        assert found.effect.relative_l2.value == pytest.approx(np.mean(far), rel=1e-3)
        flips = [f for f in report.flips if f.option == f"preprocessing.resize: {name}"]
        assert [(f.before, f.after) for f in flips] == [
            (b, a) for b, a in zip(before, after, strict=True) if a != b
        ]
        flipped += len(flips)
    assert flipped  # or this test would compare zeros
    same = option(report, "preprocessing.decoder", "opencv")
    assert same.same == same.photos == 12
    (resizes,) = (t for t in report.types if t.id == "preprocessing.resize")
    every = [o.effect.relative_l2.value for o in resizes.options]
    assert resizes.max.relative_l2.value == max(every)
    assert resizes.mean.relative_l2.value == pytest.approx(np.mean(every))


def test_noises_in_the_network_and_everything_together(
    network: Path, photos: Path, pipeline: Path
) -> None:
    report = run(
        network,
        photos,
        pipeline,
        noises=("inference.ceil_mode", "precision.int8", "precision.bf16"),
    )
    ids = {t.id for t in report.types}
    assert {"inference.ceil_mode", "precision.int8", "precision.bf16"} < ids
    last = report.accumulation[-1]
    # BF16 and INT8 are options of one type in the paper: a deployment has one of them.
    assert last.types == (
        *("preprocessing.decoder", "preprocessing.colour", "preprocessing.resize"),
        *("inference.ceil_mode", "precision.int8"),
    )
    assert len(report.pairs) == 10
    assert [len(step.types) for step in report.accumulation] == [1, 2, 3, 4, 5]
    pair = next(p for p in report.pairs if p.types == report.accumulation[1].types)
    assert pair.effect == report.accumulation[1].effect
    sizes = {t.id: t.max.relative_l2.value for t in report.types}
    alone = sizes["preprocessing.decoder"] + sizes["preprocessing.colour"]
    assert pair.surplus is not None
    expected = pair.effect.relative_l2.value - alone
    assert pair.surplus.relative_l2.value == pytest.approx(expected, abs=1e-6)


def test_a_deployment_side_is_measured_as_described(
    network: Path, photos: Path, pipeline: Path
) -> None:
    with pipeline.open("a") as file:
        file.write('[deployment.resize]\nlibrary = "opencv"\ninterpolation = "nearest"\n')
    report = run(network, photos, pipeline)
    alone = option(report, "preprocessing.resize", "opencv nearest")
    assert report.deployment is not None and report.deployment.effect == alone.effect


def test_a_missing_library_is_a_gap(
    network: Path, photos: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries._find.cache_clear()
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    report = run(network, photos, pipeline)
    gaps = {gap.subject: gap for gap in report.gaps}
    assert "not installed" in gaps["decoder ffmpeg"].reason
    assert gaps["colour space ffmpeg"].remedy == "pip install av"
    assert not any("ffmpeg" in o.name for t in report.types for o in t.options)


def test_bad_photographs_are_named_and_never_fatal(
    network: Path, photos: Path, pipeline: Path, tiles: list[Image.Image]
) -> None:
    whole = (photos / "03_tile.jpg").read_bytes()
    (photos / "a_cut.jpg").write_bytes(whole[: len(whole) // 3])
    (photos / "b_nothing.jpg").write_bytes(b"")
    (photos / "c_text.png").write_bytes(b"not a picture")
    tiles[0].save(photos / "d_png.jpg", "PNG")
    tiles[1].convert("CMYK").save(photos / "e_cmyk.jpg", "JPEG")
    tiles[2].convert("L").save(photos / "f_grey.jpg", "JPEG")
    tiles[3].convert("RGBA").save(photos / "g_alpha.png")
    deep = np.asarray(tiles[4].convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(photos / "h_deep.png")
    exif = tiles[5].getexif()
    exif[0x0112] = 6
    (photos / "i_turned.jpg").write_bytes(jpeg(tiles[5], exif=exif))
    Image.new("RGB", (1, 1), (9, 9, 9)).save(photos / "j_dot.png")
    labels = photos.parent / "labels.csv"
    labels.write_text("00_tile.jpg,3\n01_tile.jpg,10\n")  # of ten classes
    report = run(network, photos, pipeline, labels=str(labels))
    assert any("none of the 10 of the network (1): 01_tile.jpg" in note for note in report.notes)
    assert not any("0x" in gap.reason for gap in report.left_out)
    named = {gap.subject for gap in report.left_out}
    assert {"b_nothing.jpg", "c_text.png"} <= named <= {"a_cut.jpg", "b_nothing.jpg", "c_text.png"}
    assert report.photos == 22 - len(named)
    assert {
        *("PNG named .jpg", "CMYK", "greyscale", "transparency", "16 bits or more a channel"),
        *("EXIF orientation 6", "smaller than 32 pixels"),
    } <= report.oddities.keys()
    # A JPEG decoder says which photographs it cannot read, and is judged on the others.
    simple = option(report, "preprocessing.decoder", "simplejpeg")
    assert simple.refused >= 4 and simple.photos + simple.refused == report.photos
    assert any(gap.subject == "preprocessing.decoder: simplejpeg" for gap in report.gaps)
    turned = option(report, "preprocessing.orientation", "orientation apply")
    assert turned.same == turned.photos - 1
    said = table.render(report, 100, False)
    assert "left out" in said and "preprocessing.decoder: jpeglib:6b" in said
    assert all(f"jpeglib:{version}" in said for version in ("7", "8d"))  # alike, or each by itself


def test_advice_names_the_mildest_option_of_every_type_that_matters() -> None:
    def effect(flips: float, far: float) -> SysnoiseEffect:
        return SysnoiseEffect(None, Interval(flips, flips / 2, 2 * flips), Interval(far, far, far))

    def option(name: str, flips: float) -> SysnoiseOption:
        return SysnoiseOption(name, "tool", 9, 0, 0, effect(flips, 0.1))

    def type(id: str, title: str, *options: SysnoiseOption) -> SysnoiseType:
        worst = options[0].effect
        return SysnoiseType(id, title, options, worst, worst, options[0].name)

    types = (
        type("precision.int8", "INT8", option("per tensor", 0.2), option("per channel", 0)),
        type("postprocessing.nms", "suppression", option("a", 0.3), option("b", 0.1)),
    )
    head = ("0", "m.onnx", "p.toml", {}, 9, 0, "out", "scores", None, None, None)
    report = SysnoiseReport(*head, types, (), (), (), (), {}, (), (), {}, {})
    said = table._advice(report)
    assert "INT8: no reading differs beyond chance with per channel." in said
    assert any(text.startswith("Suppression: every option") and "b least" in text for text in said)
    quiet = replace(report, types=(type("precision.int8", "INT8", option("per tensor", 0)),))
    assert "INT8 (1.0e-1)" in table._advice(quiet)[0]


def test_nothing_left_is_an_error(network: Path, tmp_path: Path, pipeline: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no photograph can be used of 1: a\.jpg"):
        run(network, folder, pipeline)


def test_a_pipeline_that_does_not_fit_the_network_is_refused(network: Path, photos: Path) -> None:
    with pytest.raises(UsageError, match="1x3x224x224, but the model takes `image`"):
        run(network, photos, "imagenet-torchvision")


class Interrupting(Silent):
    """Stops the sweep as Ctrl-C would, once some photographs have been measured."""

    def update(self, who: str, stage: str) -> None:
        if stage.startswith("photograph"):
            raise SystemExit(130)


def test_an_interrupted_sweep_goes_on_and_gives_the_same_table(
    network: Path, photos: Path, pipeline: Path
) -> None:
    keep = photos.parent / "keep.jsonl"
    expected = run(network, photos, pipeline, noises=("precision.bf16",))
    assert not keep.exists()
    with pytest.raises(SystemExit):
        run(network, photos, pipeline, noises=("precision.bf16",), progress=Interrupting())
    measured = len(keep.read_text().splitlines()) - 1
    assert 1 <= measured < 12
    again = run(network, photos, pipeline, noises=("precision.bf16",))
    assert f"not measured again: {measured}." in again.notes[-1]
    for field in ("types", "accumulation", "pairs", "flips", "photos", "left_out"):
        assert getattr(again, field) == getattr(expected, field)


def test_threads_do_not_change_the_table(network: Path, photos: Path, pipeline: Path) -> None:
    one, two = (run(network, photos, pipeline, threads=n) for n in (1, 2))
    assert one.types == two.types


def test_a_photograph_is_read_as_often_by_one_decoder_as_there_are_passes(
    network: Path, photos: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all options alone, and once more for what is put together, and no more."""
    decoder = libraries.decoder("ffmpeg")
    calls = []
    real = type(decoder).decode
    monkeypatch.setattr(
        type(decoder), "decode", lambda self, data, v: calls.append(data) or real(self, data, v)
    )
    run(network, photos, pipeline, threads=1)
    assert 12 <= len(calls) <= 24


def command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "auditor", "sysnoise", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cwd)},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_prints_a_table_writes_json_and_draws(
    network: Path, photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    line = ["sysnoise", network, "--images", photos, "--pipeline", pipeline, "--noise", "none"]
    folder = tmp_path / "plots" / "here"
    done = audit_in(tmp_path, *line, "-o", "table.json", "--plots", folder)
    assert done.returncode == 0, done.stderr
    for words in ("resize, mean of 22", "opencv nearest", "Added one at a time", "What to do"):
        assert words in done.stdout
    found = json.loads((tmp_path / "table.json").read_text())
    conforms(found, "sysnoise_table")
    assert {t["id"] for t in found["types"]} == {
        *("preprocessing.decoder", "preprocessing.colour", "preprocessing.resize"),
    }
    assert found["photos"]["measured"] == 12 and found["flips"]
    assert not list(tmp_path.glob("*.partial"))
    drawn_by_lines = {"effects.svg", "accumulation.svg", "resize.svg"}
    assert {f.name for f in folder.iterdir()} == {*drawn_by_lines, "pixels.png"}
    for name in drawn_by_lines:
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    with Image.open(folder / "pixels.png") as drawn:
        assert np.asarray(drawn.convert("RGB")).std() > 10
    (tmp_path / "taken").write_text("mine")
    refused = audit_in(tmp_path, *line, "--plots", "taken")
    assert refused.returncode == 2 and "cannot make the folder" in refused.stderr
    assert (tmp_path / "taken").read_text() == "mine"


def test_ctrl_c_keeps_what_was_measured_and_says_so(
    network: Path, tiles: list[Image.Image], pipeline: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    files = [jpeg(tile) for tile in tiles]
    for number in range(1000):
        (folder / f"{number}.jpg").write_bytes(files[number % 12])
    arguments = [str(network), "--images", str(folder), "--pipeline", str(pipeline)]
    process = command(*arguments, "--noise", "none", "-o", "table.json", cwd=tmp_path)
    keep = tmp_path / "table.json.partial"
    limit = time.monotonic() + 100
    while not (keep.is_file() and keep.read_text().count("\n") > 5):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "table.json.partial" in error and "Traceback" not in error
    assert keep.read_text().count("\n") > 5 and not (tmp_path / "table.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pipeline", "imagenet-torchvison"], "imagenet-torchvision"),
        (["--pipeline", "{pipeline}", "--labels", "from-folder"], "not in folders"),
        (["--pipeline", "{pipeline}", "--noise", "precision.fp15"], "precision.fp16"),
        (["--pipeline", "{pipeline}", "-o", "missing/table.json"], "does not exist"),
    ],
)
def test_wrong_usage_is_one_message(
    arguments: list[str], said: str, network: Path, photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    given = [a.format(pipeline=pipeline) for a in arguments]
    done = audit_in(tmp_path, "sysnoise", network, "--images", photos, *given)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_resizers_are_held_against_each_other(network: Path, photos: Path, pipeline: Path) -> None:
    found = _plots.between(run(network, photos, pipeline))
    assert found is not None
    names, rates = found
    assert names[0] == "training" and np.array_equal(rates, rates.T) and not np.diag(rates).any()
    by_hand = {
        "training": answers(network, photos, pillow)[0],
        "opencv nearest": answers(
            network,
            photos,
            lambda i, s: cv2.resize(np.asarray(i), s, interpolation=cv2.INTER_NEAREST),
        )[0],
        "pillow lanczos": answers(
            network, photos, lambda i, s: i.resize(s, Image.Resampling.LANCZOS)
        )[0],
    }
    told = 0.0
    for a, mine in by_hand.items():
        for b, theirs in by_hand.items():
            rate = rates[names.index(a), names.index(b)]
            assert rate == pytest.approx(100 * np.mean(mine != theirs))
            told += rate
    assert told > 0  # or this test would compare zeros


def test_pictures_of_hostile_names_and_nothing_to_add(
    network: Path, photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    report = run(network, photos, pipeline)
    evil = "$\\frac{1}{0$ <script>\x1b[2J"
    kinds = tuple(replace(kind, title=evil, worst=evil) for kind in report.types)
    bare = replace(report, types=kinds, accumulation=(), model=f"/x/{evil}.onnx")
    image = np.zeros((8, 8, 3), np.uint8)
    made = _plots.draw(bare, {evil: image, f"{evil} 2": image + 3}, tmp_path)
    assert [p.name for p in made] == ["effects.svg", "resize.svg", "pixels.png"]
    ElementTree.parse(made[0])
