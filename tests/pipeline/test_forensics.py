"""Tensors made by the libraries themselves are traced back to what made them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image
from typer.testing import CliRunner

from auditor.cli import app
from auditor.errors import UsageError
from auditor.pipeline import description
from auditor.pipeline.forensics import inputs as forensics
from auditor.pipeline.preprocessing import stages
from tests.helpers import conforms, jpeg

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
GEOMETRY = """\
[training]
decoder = "pillow"
resize = { library = "pillow", interpolation = "bilinear", short_side = 80 }
crop = 64
"""


@pytest.fixture
def photo(tiles: list[Image.Image]) -> bytes:
    return jpeg(tiles[0])


@pytest.fixture
def geometry() -> stages.Pipeline:
    return description.parse(GEOMETRY, "p.toml").training


def cropped(image: np.ndarray) -> np.ndarray:
    """The centred 64 of 80x99: half a pixel is left over."""
    assert image.shape[:2] == (80, 99)
    return image[8:72, 18:82].astype(np.float64)


def by_pillow(photo: bytes) -> np.ndarray:
    """Pillow throughout, mean and deviation of ImageNet."""
    with Image.open(io.BytesIO(photo)) as image:
        small = np.asarray(image.resize((99, 80), Image.Resampling.BILINEAR))
    return ((cropped(small) / 255 - MEAN) / STD).transpose(2, 0, 1)[None].astype(np.float32)


def by_opencv(photo: bytes) -> np.ndarray:
    """A phone's fast decoder, OpenCV's order of channels and resize, half precision."""
    pixels = simplejpeg.decode_jpeg(photo, "BGR", fastdct=True, fastupsample=True)
    small = cv2.resize(pixels, (99, 80), interpolation=cv2.INTER_CUBIC)
    return ((cropped(small) - 127.5) / 128).astype(np.float16)[None]


def by_video(photo: bytes) -> np.ndarray:
    """FFmpeg, a trip through I420 by OpenCV, nearest neighbour, a normalisation of one's own."""
    with av.open(io.BytesIO(photo)) as container:
        pixels = next(container.decode(video=0)).to_ndarray(format="rgb24")
    even = np.pad(pixels, ((0, 1), (0, 0), (0, 0)), mode="edge")  # 121 rows
    planes = cv2.cvtColor(even, cv2.COLOR_RGB2YUV_I420)
    back = cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_I420)[:121]
    small = cv2.resize(back, (99, 80), interpolation=cv2.INTER_NEAREST)
    return ((cropped(small) * 0.0173 - [2.1, 2.0, 1.7]) / [1, 1.1, 0.9]).astype(np.float32)


@pytest.mark.parametrize(
    ("make", "expected", "channels", "layout", "normalisation"),
    [
        (
            by_pillow,
            "pillow → rgb → pillow bilinear",
            *("rgb", "nchw", "mean and deviation of ImageNet"),
        ),
        (
            by_opencv,
            "simplejpeg:fast → rgb → opencv bicubic",
            *("bgr", "nhwc", "(x − 127.5) / 128"),
        ),
        (
            by_video,
            "ffmpeg → opencv bt601 limited → opencv nearest",
            *("rgb", "nhwc", None),
        ),
    ],
)
def test_what_the_libraries_made_is_traced_back(
    make: Any,
    expected: str,
    channels: str,
    layout: str,
    normalisation: str | None,
    photo: bytes,
    geometry: stages.Pipeline,
) -> None:
    found = forensics.identify(make(photo), photo, geometry)
    assert expected in (found.best, *found.indistinguishable)
    assert found.exact and found.residual == 0
    assert found.best not in found.indistinguishable
    assert found.margin is not None and found.margin > 0
    assert (found.channels, found.layout) == (channels, layout)
    assert found.normalisation == normalisation
    if make is by_video:
        slope, offset = np.array(found.slope), np.array(found.offset)
        np.testing.assert_allclose(slope, 0.0173 / np.array([1, 1.1, 0.9]), rtol=1e-4)
        np.testing.assert_allclose(offset, -np.array([2.1, 2.0, 1.7]) / [1, 1.1, 0.9], atol=1e-3)


def test_what_cannot_be_told_apart_is_named(photo: bytes, geometry: stages.Pipeline) -> None:
    """Pillow, OpenCV and libjpeg-turbo decode alike."""
    found = forensics.identify(by_pillow(photo), photo, geometry)
    alike = {name.split(" → ")[0] for name in (found.best, *found.indistinguishable)}
    assert {"pillow", "opencv", "simplejpeg", "jpeglib:6b"} <= alike
    assert "ffmpeg" not in alike


def test_what_is_not_in_the_catalogue_is_not_claimed(
    photo: bytes, geometry: stages.Pipeline
) -> None:
    """A blur that no option has: the nearest one is named, without certainty."""
    image = by_pillow(photo)[0].transpose(1, 2, 0)
    blurred = cv2.GaussianBlur(image, (3, 3), 0).transpose(2, 0, 1)
    found = forensics.identify(blurred, photo, geometry)
    assert not found.exact and found.residual > 0.5


def test_orientation_is_found(tiles: list[Image.Image], geometry: stages.Pipeline) -> None:
    exif = tiles[1].getexif()
    exif[0x0112] = 3
    photo = jpeg(tiles[1], exif=exif)
    tensor = cropped_upside_down(photo)
    found = forensics.identify(tensor, photo, geometry)
    assert found.exact and "upright" in found.best
    assert all("upright" in name for name in found.indistinguishable)


def cropped_upside_down(photo: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(photo)) as image:
        turned = image.transpose(Image.Transpose.ROTATE_180)
        small = np.asarray(turned.resize((99, 80), Image.Resampling.BILINEAR))
    return (cropped(small) / 255).astype(np.float32)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (np.zeros((2, 3, 64, 64), np.float32), "but the pipeline makes 64x64 pixels"),
        (np.zeros((1, 3, 65, 64), np.float32), "but the pipeline makes 64x64 pixels"),
        (np.zeros(5, np.float32), "but the pipeline makes 64x64 pixels"),
        (np.full((3, 64, 64), np.nan, np.float32), "is not finite"),
        (np.zeros((64, 64, 3), np.uint8), "is the same everywhere"),
    ],
)
def test_other_tensors_are_refused(
    tensor: np.ndarray, why: str, photo: bytes, geometry: stages.Pipeline
) -> None:
    with pytest.raises(UsageError, match=why):
        forensics.identify(tensor, photo, geometry)


def test_the_command(photo: bytes, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("photo.jpg", "fed.npy", "p.toml", "found.json")}
    files["photo.jpg"].write_bytes(photo)
    np.save(files["fed.npy"], by_opencv(photo))
    files["p.toml"].write_text(GEOMETRY)
    arguments = ["--image", str(files["photo.jpg"]), "--pipeline", str(files["p.toml"])]
    command = ["forensics", "--deployed-input", str(files["fed.npy"]), *arguments]
    done = CliRunner().invoke(app, [*command, "-o", str(files["found.json"])])
    assert done.exit_code == 0, done.output
    assert "simplejpeg:fast → rgb → opencv bicubic" in done.output
    assert "reproduces every pixel" in done.output
    found = json.loads(files["found.json"].read_text())
    conforms(found, "forensics")
    assert found["exact"]
    for broken, said in (
        (b"", "is empty"),
        (b"\x93NUMPY", "is not a valid .npy file"),
        (b"not an array", "is not a valid .npy file: the magic string"),  # nor pickled objects
    ):
        files["fed.npy"].write_bytes(broken)
        with pytest.raises(UsageError, match=said):
            CliRunner().invoke(app, command, catch_exceptions=False)
