"""Every decoder, resizer and converter on a real photograph, against what is known of it."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from auditor.errors import UsageError
from auditor.pipeline.preprocessing import libraries


@pytest.fixture(scope="module")
def photo():
    """A photograph with 4:2:0 chroma, as cameras store it."""
    stream = io.BytesIO()
    package = Path(importlib.util.find_spec("skimage").origin).parent
    picture = Image.open(package / "data" / "astronaut.png").convert("RGB")
    picture.save(stream, "JPEG", quality=90, subsampling="4:2:0")
    return stream.getvalue()


def _decoded(name, variant, photo):
    return libraries.decoder(name).decode(photo, variant).astype(int)


@pytest.mark.parametrize("name", libraries.names("decoders"))
def test_every_variant_decodes_the_photograph(name, photo):
    decoder = libraries.decoder(name)
    assert any(c.isdigit() for c in decoder.version())
    reference = _decoded("pillow", "default", photo)
    for variant in decoder.variants:
        image = decoder.decode(photo, variant)
        assert (image.dtype, image.shape) == (np.uint8, (512, 512, 3))
        assert np.abs(image - reference).mean() < 3  # decoders differ, by little


@pytest.mark.parametrize(
    ("name", "variant", "same"),
    [
        ("opencv", "default", True),
        ("simplejpeg", "default", True),
        ("jpeglib", "6b", True),
        ("dali", "default", True),
        ("dali", "fastdct", False),
        ("simplejpeg", "fastdct", False),
        ("simplejpeg", "fastupsample", False),
        ("jpeglib", "8d", False),
        ("ffmpeg", "default", False),
    ],
)
def test_which_decoders_are_the_same_program(name, variant, same, photo):
    image, reference = _decoded(name, variant, photo), _decoded("pillow", "default", photo)
    assert np.array_equal(image, reference) == same


@pytest.mark.parametrize("name", libraries.names("decoders"))
@pytest.mark.parametrize("broken", [b"", b"not a picture", b"\xff\xd8\xff\xe0garbage"])
def test_what_is_no_picture_is_refused_by_name(name, broken):
    decoder = libraries.decoder(name)
    with pytest.raises(libraries.PhotoError):
        decoder.decode(broken, decoder.variants[0])


@pytest.mark.parametrize("name", libraries.names("resizers"))
def test_a_constant_image_stays_constant(name):
    resizer = libraries.resizer(name)
    image = np.full((61, 83, 3), 77, np.uint8)
    for interpolation, filtered in resizer.interpolations.items():
        for antialias in filtered:
            resized = resizer.resize(image, (20, 30), interpolation, antialias)
            assert (resized.dtype, resized.shape) == (np.uint8, (20, 30, 3))
            assert np.all(resized == 77)


def test_the_same_interpolation_is_two_results_in_two_libraries(photo):
    image = libraries.decoder("pillow").decode(photo, "default")
    pillow, opencv, antialiased, plain = (
        libraries.resizer(name).resize(image, (96, 96), "bilinear", antialias).astype(int)
        for name, antialias in (
            ("pillow", True),
            ("opencv", False),
            ("torch", True),
            ("torch", False),
        )
    )
    assert np.abs(antialiased - pillow).max() <= 1
    assert np.abs(plain - opencv).max() <= 1
    assert np.abs(opencv - pillow).max() > 20


@pytest.mark.parametrize("name", libraries.names("colours"))
def test_grey_survives_every_conversion(name):
    converter = libraries.converter(name)
    image = np.full((8, 8, 3), 128, np.uint8)
    for conversion in converter.conversions:
        assert np.abs(converter.convert(image, conversion).astype(int) - 128).max() <= 3


def test_the_formula_is_the_papers_equations():
    """SysNoise eq. 5 to 7, on one colour per 2x2 pixels so that chroma is not averaged."""
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    image = colours.repeat(2, axis=0).repeat(2, axis=1)
    r, g, b = (colours[..., i].astype(float) for i in range(3))
    c = np.round(0.256788 * r + 0.504129 * g + 0.097906 * b)
    d = np.round(-0.148223 * r - 0.290993 * g + 0.439216 * b)
    e = np.round(0.439216 * r - 0.367788 * g - 0.071427 * b)
    rounded = (
        1.164383 * c + 1.596027 * e,
        1.164383 * c - 0.391762 * d - 0.812968 * e,
        1.164383 * c + 2.017232 * d,
    )
    c, d, e = (plane.astype(int) for plane in (c, d, e))
    integer = (
        (298 * c + 409 * e + 128) >> 8,
        (298 * c - 100 * d - 208 * e + 128) >> 8,
        (298 * c + 516 * d + 128) >> 8,
    )
    formula = libraries.converter("formula")
    for arithmetic, planes in (("rounded", rounded), ("integer", integer)):
        expected = np.stack([np.clip(np.round(p), 0, 255) for p in planes], axis=-1)
        conversion = libraries.Conversion("bt601", "limited", arithmetic)
        result = formula.convert(image, conversion)[::2, ::2].astype(int)
        assert np.abs(result - expected).max() <= 1  # ties
        assert np.mean(result == expected) > 0.999


def test_a_missing_library_is_named(monkeypatch):
    class Absent:
        package = "no-such-decoder"

        def version(self):
            raise ImportError("No module named 'no_such_decoder'")

    monkeypatch.setattr(libraries, "load", lambda kind, name: Absent())
    with pytest.raises(UsageError, match="no-such-decoder is not installed"):
        libraries.decoder("absent")
