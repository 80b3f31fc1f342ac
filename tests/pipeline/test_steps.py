"""Executing a pipeline: against Pillow's own operations and against arithmetic by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from auditor.pipeline import description
from auditor.pipeline.preprocessing import stages, steps
from auditor.pipeline.preprocessing.libraries import PhotoError
from tests.helpers import jpeg


def side(text: str) -> stages.Pipeline:
    return description.parse(f'[training]\ndecoder = "pillow"\n{text}', "p.toml").training


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_what_pillow_makes_of_it(value: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = value
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    data = stream.getvalue()
    with Image.open(stream) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    turned = side('orientation = "apply"\n')
    assert np.array_equal(steps.Preparation(data).pixels(turned), expected)
    ignored = steps.Preparation(data).pixels(side('orientation = "ignore"\n'))
    assert np.array_equal(ignored, pixels)


def test_the_tensor_is_pillows_resize_and_crop_and_the_formula(tiles: list[Image.Image]) -> None:
    data = jpeg(tiles[0])  # 150x121
    found = side(
        'resize = { library = "pillow", interpolation = "bicubic", short_side = 40 }\n'
        "crop = [32, 30]\nnormalise = { scale = 0.5, mean = [1, 2, 3], std = [4, 5, 6] }\n"
    )
    with Image.open(io.BytesIO(data)) as image:
        small = image.resize((49, 40), Image.Resampling.BICUBIC)  # 40 * 150 / 121 = 49.6
    cropped = np.asarray(small.crop((10, 4, 40, 36))).astype(np.float64)
    expected = (cropped * 0.5 - [1, 2, 3]) / [4, 5, 6]
    tensor = steps.Preparation(data).tensor(found)
    assert (tensor.dtype, tensor.shape) == (np.float32, (1, 3, 32, 30))
    np.testing.assert_allclose(tensor[0].transpose(1, 2, 0), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "shape", "first"),
    [
        ('channels = "bgr"\ndtype = "uint8"\nlayout = "nhwc"\n', (1, 2, 3, 3), 30),
        ('dtype = "uint8"\n', (1, 3, 2, 3), 10),
        ('dtype = "float16"\nnormalise = { scale = 0.5 }\n', (1, 3, 2, 3), 5),
    ],
)
def test_layout_channels_and_type(text: str, shape: tuple[int, ...], first: float) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), (10, 20, 30)).save(stream, "PNG")
    found = side(text)
    tensor = steps.Preparation(stream.getvalue()).tensor(found)
    assert tensor.shape == shape and tensor.dtype == found.dtype and tensor.flat[0] == first


@pytest.mark.parametrize(("place", "top"), [("centre", 16), ("corner", 0)])
def test_a_letterbox_keeps_proportions_and_fills_up(place: str, top: int) -> None:
    image = np.full((50, 100, 3), 200, np.uint8)
    found = side(
        'resize = { library = "opencv", interpolation = "bilinear", letterbox = 64, pad = 7, '
        f'place = "{place}" }}\n'
    )
    framed = steps.resized(image, found.resize)
    assert framed.shape == (64, 64, 3)
    assert np.all(framed[top : top + 32] == 200) and framed.mean() == (200 + 7) / 2
    assert steps.placed((50, 100), found).shift == (top, 0)


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.sampled_from(
        (
            "short_side = 64",
            "short_side = 64\nlong_side = 96",
            "long_side = 96\nmultiple = 32",
            "letterbox = 64",
        )
    ),
)
def test_targets(shape: tuple[int, int], target: str) -> None:
    text = f'[training.resize]\nlibrary = "pillow"\ninterpolation = "box"\n{target}\n'
    size = steps.target(shape, side(text).resize)
    assert min(size) >= 1
    if "short" in target and "long" in target:
        assert max(size) <= 96 and (min(size) == 64 or max(size) == 96)
    elif "short" in target:
        assert min(size) == 64
    elif "long" in target:
        assert max(size) <= 96 and all(s % 32 == 0 for s in size)
    else:
        assert max(size) == 64


@pytest.mark.parametrize("name", ["formula", "ffmpeg", "opencv"])
def test_an_odd_size_survives_the_colour_round_trip(name: str, tiles: list[Image.Image]) -> None:
    image = np.asarray(tiles[0])[:, :149]
    colour = side(f'colour = {{ library = "{name}" }}\n').colour
    turned = steps.coloured(image, colour)
    assert turned.shape == image.shape == (121, 149, 3)
    assert 0 < np.abs(turned.astype(int) - image).mean() < 4


def test_what_two_pipelines_share_is_done_once(
    tiles: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    real = steps.decoded
    monkeypatch.setattr(steps, "decoded", lambda *a: decoded.append(a[1]) or real(*a))
    preparation = steps.Preparation(jpeg(tiles[1]))
    plain = side("")
    others = [
        description.parse(f'[training]\ndecoder = "simplejpeg:{way}"\n', "p.toml").training
        for way in ("fast", "fastdct")
    ]
    for one in (plain, *others, plain, side("crop = 9\n")):
        preparation.pixels(one)
    assert [str(step) for step in decoded] == ["pillow", "simplejpeg:fast", "simplejpeg:fastdct"]


def test_a_photograph_smaller_than_the_crop_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2)).save(stream, "PNG")
    with pytest.raises(PhotoError, match="2x3 pixels are fewer than the crop of 4x4"):
        steps.Preparation(stream.getvalue()).tensor(side("crop = 4\n"))
