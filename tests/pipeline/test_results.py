"""Masks that are enlarged and texts that are read, against libraries and definitions by hand."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw, ImageFont

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import UsageError
from auditor.graphs import model
from auditor.pipeline import description
from auditor.pipeline import photos as folders
from auditor.pipeline.postprocessing import results
from auditor.pipeline.postprocessing.masks import enlarged
from auditor.pipeline.postprocessing.post import Post
from auditor.pipeline.postprocessing.results import NAME
from auditor.pipeline.preprocessing import steps
from auditor.pipeline.preprocessing.stages import Placement
from auditor.pipeline.sysnoise.table import sysnoise
from auditor.pipeline.tasks.seg import seen
from auditor.ports import Silent

RNG = np.random.default_rng(7)
WHOLE = Placement((0.5, 0.25), (0.0, 0.0), (48, 160), (24, 40))


# --- texts ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 3))
def test_connectionist_decoding_is_its_definition(path: list[int], blank: int) -> None:
    """Graves 2006, sec. 3.1: remove repeats, then blanks."""
    scores = np.full((1, len(path), 4), -1, np.float32)
    scores[0, np.arange(len(path)), path] = 2
    for how, expected in (
        ("ctc", [c for c, _ in itertools.groupby(path) if c != blank]),
        ("argmax", [c for c in path if c != blank]),
    ):
        made = results.result({"s": scores}, Post("text", text=how, blank=blank))[NAME]
        assert made.shape == scores.shape
        assert results.text(made, ()) == " ".join(map(str, expected))
        assert results.text(made, "abcd") == "".join("abcd"[c] for c in expected)


@pytest.mark.parametrize(
    ("lines", "blank", "classes", "expected"),
    [
        ("a\nb\n", 0, 3, ("", "a", "b")),
        ("a\nb\n", 2, 3, ("a", "b", "")),
        ("a\r\nb\r\n", 0, 4, ("", "a", "b", " ")),
        ("a\n \nb", 0, 4, ("", "a", " ", "b")),
        ("a\nb\n", 0, 9, None),
    ],
)
def test_characters_stand_at_their_classes(
    lines: str, blank: int, classes: int, expected: tuple[str, ...] | None, tmp_path: Path
) -> None:
    made = Post("text", blank=blank, charset="model")
    path = tmp_path / "keys.txt"
    path.write_bytes(lines.encode())
    for one, metadata in (
        (made, {"character": lines}),
        (Post("text", blank=blank, charset=str(path)), {}),
    ):
        if expected is None:
            with pytest.raises(UsageError, match="2 characters for 9 classes"):
                results.characters(one, metadata, classes)
        else:
            assert results.characters(one, metadata, classes) == expected


def test_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="class 4 is the blank, but there are 4"):
        results.result({"s": np.zeros((1, 2, 4), np.float32)}, Post("text", blank=4))
    with pytest.raises(UsageError, match="texts of 2 photographs"):
        results.result({"s": np.zeros((2, 2, 4), np.float32)}, Post("text"))
    with pytest.raises(UsageError, match="metadata `character` has 0 characters"):
        results.characters(Post("text", charset="model"), {}, 5)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photographs of written lines, and what is written."""
    folder = tmp_path_factory.mktemp("lines")
    texts = {"a.jpg": "Invoice No. 7781", "b.jpg": "total 149.95", "c.jpg": "quick brown fox"}
    for name, text in texts.items():
        font = ImageFont.load_default(26)
        image = Image.new("RGB", (int(font.getlength(text)) + 20, 44), (230, 225, 210))
        ImageDraw.Draw(image).text((10, 6), text, font=font, fill=(40, 30, 60))
        image.save(folder / name, quality=80)
    labels = folder.parent / "labels.tsv"
    texts["c.jpg"] = "quick brown fix!"  # two edits: one changed, one added
    labels.write_text("".join(f"{n}\t{t}\n" for n, t in texts.items()))
    return folder, labels


def read_by_hand(network: Path, folder: Path) -> dict[str, str]:
    """What the network reads: the definition of its decoding, PaddleOCR's order of characters."""
    session = ort.InferenceSession(network, providers=["CPUExecutionProvider"])
    keys = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    characters = ["", *keys, " "]
    found = {}
    for path in sorted(folder.glob("*.jpg")):
        image = cv2.imread(path)
        image = cv2.resize(image, (math.ceil(48 * image.shape[1] / image.shape[0]), 48))
        fed = (image.astype(np.float32) / 255 - 0.5) / 0.5
        (scores,) = session.run(None, {"x": fed.transpose(2, 0, 1)[None]})
        codes = [c for c, _ in itertools.groupby(scores[0].argmax(axis=1).tolist())]
        found[path.name] = "".join(characters[c] for c in codes if c)
    return found


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_a_real_recogniser_is_judged_by_its_characters(
    zoo_model: object, lines: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, labels = lines
    report = sysnoise(
        model.load(zoo_model("ppocr_rec")),  # type: ignore[operator]
        description.load("ppocr-rec"),
        folders.find(folder, str(labels), None, "ocr"),
        [],
        keep=tmp_path / "keep.jsonl",
        threads=2,
        progress=Silent(),
        task="ocr",
    )
    assert (report.kind, report.metric, report.labelled) == ("text", "character accuracy", 3)
    assert report.accuracy is not None
    read = read_by_hand(zoo_model("ppocr_rec"), folder)  # type: ignore[operator]
    truth = dict(line.split("\t") for line in labels.read_text().splitlines())
    edits = sum(distance(read[name], truth[name]) for name in truth)
    assert 2 <= edits <= 5  # two are planted
    assert report.accuracy.value == pytest.approx(1 - edits / (16 + 12 + 16))
    for flip in report.flips:
        assert isinstance(flip.before, str) and flip.before != flip.after
        assert flip.before == read[flip.photo] and flip.label == truth[flip.photo]
    resizes = next(t for t in report.types if t.id == "preprocessing.resize")
    for option in resizes.options:
        flips = [f for f in report.flips if f.option == f"preprocessing.resize: {option.name}"]
        assert option.effect.changed is not None
        assert option.effect.changed.value == pytest.approx(len(flips) / 3)


# --- masks ---------------------------------------------------------------------------------------

_BY_HAND = {
    ("opencv", "bilinear"): lambda m: cv2.resize(m, (160, 48), interpolation=cv2.INTER_LINEAR),
    ("opencv", "nearest"): lambda m: cv2.resize(m, (160, 48), interpolation=cv2.INTER_NEAREST),
    ("opencv", "bicubic"): lambda m: cv2.resize(m, (160, 48), interpolation=cv2.INTER_CUBIC),
    ("pillow", "bilinear"): lambda m: np.asarray(
        Image.fromarray(m).resize((160, 48), Image.Resampling.BILINEAR)
    ),
    ("torch", "bilinear"): lambda m: torch.nn.functional.interpolate(
        torch.from_numpy(m)[None, None], (48, 160), mode="bilinear"
    )[0, 0].numpy(),
}


@pytest.mark.parametrize("way", _BY_HAND)
def test_masks_are_enlarged_by_the_libraries_themselves(way: tuple[str, str]) -> None:
    mask = RNG.random((24, 40), np.float32)
    made = enlarged(mask[None], WHOLE, *way)[0]  # type: ignore[arg-type]
    np.testing.assert_array_equal(made, _BY_HAND[way](mask))
    one = Post("mask", threshold=0.4, resize=way[0], interpolation=way[1])  # type: ignore[arg-type]
    result = results.result({"m": mask[None, None]}, one, WHOLE)[NAME]
    np.testing.assert_array_equal(result[0, 0], _BY_HAND[way](mask) > 0.4)


def test_the_order_of_enlarging_and_deciding_matters() -> None:
    mask = RNG.random((1, 1, 24, 40), np.float32)
    first, then = (
        results.result(
            {"m": mask}, Post("mask", threshold=0.7, resize="opencv", order=order), WHOLE
        )[NAME]
        for order in ("resize", "decide")
    )
    by_hand = cv2.resize((mask[0, 0] > 0.7).astype(np.uint8) * 255, (160, 48)) > 127
    np.testing.assert_array_equal(then[0, 0], by_hand)
    assert (first != then).any()


def test_the_best_class_of_several_maps() -> None:
    maps = RNG.random((1, 5, 24, 40), np.float32)
    one = Post("mask", mask="argmax")
    made = results.result({"m": maps}, one)[NAME]
    np.testing.assert_array_equal(made[0, 0], maps[0].argmax(axis=0))
    last = results.result(
        {"m": np.moveaxis(maps, 1, -1)}, Post("mask", mask="argmax", channels_last=True)
    )
    np.testing.assert_array_equal(last[NAME], made)
    big = results.result({"m": maps}, Post("mask", mask="argmax", resize="opencv"), WHOLE)[NAME]
    planes = np.stack([cv2.resize(plane, (160, 48)) for plane in maps[0]])
    np.testing.assert_array_equal(big[0, 0], planes.argmax(axis=0))
    with pytest.raises(UsageError, match="one channel, but there are 5"):
        results.result({"m": maps}, Post("mask", resize="opencv"), WHOLE)
    with pytest.raises(UsageError, match="not known here"):
        results.result({"m": maps[:, :1]}, Post("mask", resize="opencv"))
    with pytest.raises(UsageError, match="no values in between"):
        description.parse(
            '[training]\ndecoder = "pillow"\n'
            'post = { kind = "mask", mask = "argmax", resize = "opencv", order = "decide" }\n',
            "p.toml",
        )


_GEOMETRIES = (
    'resize = { library = "pillow", interpolation = "nearest", short_side = 40 }\ncrop = 32\n',
    'resize = { library = "pillow", interpolation = "nearest", size = [24, 64] }\n',
    'resize = { library = "pillow", interpolation = "nearest", letterbox = 64, pad = 0 }\n',
    'precrop = 0.8\nresize = { library = "pillow", interpolation = "nearest", size = 32 }\n',
    "crop = [30, 50]\n",
)


@given(
    hnp.arrays(np.uint8, (6, 8), elements=st.sampled_from([0, 255])), st.sampled_from(_GEOMETRIES)
)
@settings(max_examples=30)
def test_what_the_network_saw_comes_back_to_where_it_was(blocks: np.ndarray, keys: str) -> None:
    """Blocks of 20 pixels: but for their edges every pixel that was seen is itself again."""
    photo = np.repeat(np.repeat(blocks, 20, axis=0), 20, axis=1)
    pipeline = description.parse(f'[training]\ndecoder = "pillow"\n{keys}', "p.toml").training
    place = steps.placed(photo.shape, pipeline)
    fed = steps.framed(np.repeat(photo[..., None], 3, axis=2), pipeline)[..., 0]
    assert fed.shape == place.tensor
    middle = (np.indices(photo.shape) % 20 >= 4) & (np.indices(photo.shape) % 20 < 16)
    inner = middle.all(axis=0)
    back = enlarged(fed[None], place, "opencv", "nearest")[0]
    at = seen(fed[None, None], place, photo.shape)
    inside = inner & (at >= 0)
    assert inside.sum() > 100
    np.testing.assert_array_equal(at[inside], photo[inside])
    eroded = cv2.erode((at >= 0).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    np.testing.assert_array_equal(back[inner & eroded], photo[inner & eroded])
    np.testing.assert_array_equal(
        back[cv2.dilate((at >= 0).astype(np.uint8), np.ones((5, 5))) == 0], 0
    )


def test_enlarging_is_an_offender_of_an_audit_and_a_column_of_the_table(
    ppocr_det: Path, tmp_path: Path
) -> None:
    pictures = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(pictures / "page.png") as page:
        for number, top in enumerate((0, 60)):
            part = page.convert("RGB").crop((0, top, 300, top + 130))
            part.save(folder / f"{number}.jpg", quality=90)
    text = (
        '[training]\npreset = "ppocr-det"\n'
        'resize = { library = "opencv", interpolation = "bilinear", size = [128, 320] }\n'
        'post = { kind = "mask", threshold = 0.3, resize = "opencv" }\n'
        '[deployment]\npost = { order = "decide" }\n'
    )
    pipeline = tmp_path / "p.toml"
    pipeline.write_text(text)
    asked = AuditOptions(
        (BackendSpec("ort"),), images=folder, pipeline=str(pipeline), confirm=False
    )
    report = audit(ppocr_det, asked, noises=discovery.noises(), progress=Silent())
    assert report.findings[0].noise == "postprocessing.mask_resize"
    whole = report.backends[0].end_to_end
    assert whole is not None
    shares = {s.noise: s.share for s in whole.shares}
    assert shares["postprocessing.mask_resize"] == pytest.approx(1, abs=1e-2)
    table = sysnoise(
        model.load(ppocr_det),
        description.load(str(pipeline)),
        folders.find(folder, None, None),
        [discovery.noise("inference.upsample")],
        keep=tmp_path / "keep.jsonl",
        threads=2,
        progress=Silent(),
    )
    types = {t.id: t for t in table.types}
    assert "inference.upsample" in types and len(types["postprocessing.mask_resize"].options) == 17
    assert table.kind == "mask" and table.deployment is not None
    same = next(
        o
        for o in types["postprocessing.mask_resize"].options
        if o.name == "opencv bilinear, decide first"
    )
    assert table.deployment.effect == same.effect
