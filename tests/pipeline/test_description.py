"""Descriptions: what they mean, what a side inherits, and where a mistake is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditor.errors import UsageError
from auditor.pipeline import description

MINIMAL = '[training]\ndecoder = "pillow"\n'


def refused(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        description.parse(text, "p.toml")
    return caught.value


@pytest.mark.parametrize("name", description.presets())
def test_presets_are_valid_and_say_every_step(name: str) -> None:
    found = description.load(name)
    assert found.training == found.deployment
    assert "?" not in "".join(found.training.steps().values())


def test_deployment_inherits_what_it_does_not_name() -> None:
    found = description.parse(
        '[training]\npreset = "imagenet-torchvision"\ncolour = { library = "opencv" }\n'
        '[deployment]\ncolour = "rgb"\ndecoder = "opencv"\n'
        'resize = { library = "opencv", interpolation = "bicubic" }\n',
        "p.toml",
    )
    training, deployment = found.training, found.deployment
    assert training.decode.library == "pillow" and deployment.decode.library == "opencv"
    # A decoder that is exchanged brings its own habit; OpenCV turns photographs upright.
    assert (training.decode.orientation, deployment.decode.orientation) == ("ignore", "apply")
    assert training.colour is not None and deployment.colour is None
    assert deployment.resize.short_side == training.resize.short_side == 256
    assert (training.resize.antialias, deployment.resize.antialias) == (True, False)
    assert deployment.mean == training.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("size = [224, 300]", "224x300"),
        ("short_side = 300\nlong_side = 400", "short side 300, long side at most 400"),
    ],
)
def test_another_target_takes_the_place_of_the_inherited_one(target: str, said: str) -> None:
    found = description.parse(
        f'[training]\npreset = "imagenet-torchvision"\n[deployment.resize]\n{target}\n', "p.toml"
    )
    assert found.deployment.steps()["resize"] == f"pillow bilinear, {said}"


def test_what_a_preset_says_of_the_result_may_be_left_out() -> None:
    found = description.parse('[training]\npreset = "yolov8"\npost = "none"\n', "p.toml")
    assert found.training_post is None
    of_preset = description.load("yolov8").training_post
    assert of_preset is not None and of_preset.kind == "boxes"


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("[training\n", "line 1", "pipeline.md"),
        ("", "no [training] side", ""),
        ('[training]\ndecoder = "pilow"\n', "line 2: `pilow`", "mean `pillow`"),
        (MINIMAL + "\n[deploymnt]\n", "line 4: `deploymnt`", ""),
        (MINIMAL + "lay_out = 3\n", "line 3: `lay_out`", "mean `layout`"),
        (MINIMAL + 'layout = "nchv"\n', "line 3: `nchv`", "mean `nchw`"),
        (MINIMAL + 'preset = "imagenet"\n', "line 3: `imagenet`", "imagenet-t"),
        (MINIMAL + "[training.normalise]\nstd = [1, 0, 1]\n", "line 4: `normalise.std`", "0"),
        (MINIMAL + "normalise = { maen = 1 }\n", "line 3: `normalise.maen`", "mean `mean`"),
        (MINIMAL + "normalise = 3\n", "line 3: `normalise`", "scale"),
        (MINIMAL + "precrop = 1.5\n", "line 3: `precrop`", "fraction"),
        (MINIMAL + "crop = -1\n", "line 3: `crop`", "[height, width]"),
        (MINIMAL + "crop = true\n", "line 3: `crop`", "[height, width]"),
        (
            MINIMAL + 'resize = { library = "opencv", interpolation = "box", size = 3 }\n',
            "line 3: `box`",
            "area",
        ),
        (
            MINIMAL + 'resize = { library = "pillow", interpolation = "box" }\n',
            "line 3: `resize` names 0 targets",
            "short_side",
        ),
        (
            MINIMAL + 'resize = { library = "torch", interpolation = "nearest", size = 9, '
            "antialias = true }\n",
            "line 3: `resize.antialias` is true",
            "Drop",
        ),
        (
            MINIMAL + 'resize = { library = "pillow", interpolation = "box", size = 9 }\ncrop=10\n',
            "line 4: `crop` is larger",
            "",
        ),
        (
            MINIMAL + 'colour = { library = "opencv", matrix = "bt709" }\n',
            "line 3: `colour`: opencv has no bt709",
            "bt601 limited",
        ),
        (MINIMAL + 'dtype = "uint8"\nnormalise = { scale = 2 }\n', "line 3: `dtype`", "float32"),
        (MINIMAL + 'post = { kind = "boxes", offset = 2 }\n', "line 3: `post.offset`", "0 or 1"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, said: str, hint: str) -> None:
    error = refused(text)
    assert "p.toml" in error.message and said in error.message
    assert hint in error.hint


@given(st.lists(st.sampled_from(("", "# a comment", "# crop = 3 = [x]")), max_size=9))
def test_the_line_is_right_whatever_stands_around_it(padding: list[str]) -> None:
    lines = [*padding, "[training]", *padding, 'decoder = "pillow"', *padding, "crop = 0"]
    assert f"p.toml, line {len(lines)}: `crop`" in refused("\n".join(lines)).message


def test_a_name_that_is_nothing_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        description.load("imagenet-torchvison")
    assert "Did you mean `imagenet-torchvision`?" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "resize", "crop"),
    [
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            "pillow bilinear, short side 256",
            (224, 224),
        ),
        ({"size": {"height": 384, "width": 300}, "do_center_crop": False}, "384x300", None),
        ({"size": 224, "do_center_crop": False, "resample": 3}, "pillow bicubic, 224x224", None),
        ({"size": 224, "crop_size": 224, "resample": 1}, "lanczos, short side 224", (224, 224)),
        (  # ResNet and ConvNeXt before sizes had names
            {"size": 224, "crop_pct": 0.875, "do_center_crop": False},
            "short side 256",
            (224, 224),
        ),
        (  # DETR, and before sizes had names; it pads a batch to its largest
            {"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_pad": True},
            "short side 800, long side at most 1333",
            None,
        ),
        (
            {"size": 800, "max_size": 1333, "format": "coco", "pad_size": None, "do_pad": False},
            "short side 800, long side at most 1333",
            None,
        ),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "do_center_crop": False},
            "short side 256",
            (224, 224),
        ),
    ],
)
def test_hugging_face(
    config: dict[str, object], resize: str, crop: tuple[int, int] | None, tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    base = {"do_center_crop": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    path.write_text(json.dumps(base | config))
    found = description.load(str(path)).training
    assert resize in found.steps()["resize"]
    assert found.crop == crop
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert found.scale == pytest.approx(1 / 255)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": {"longest_edge": 9}},
        {"size": 224, "do_pad": True},
        {"size": None},
        {"size": 224, "keep_aspect_ratio": True},
        {"size": 224, "rescale_offset": True},
        {"size": 224, "image_mean": [0, 0, 0], "image_std": [1, 0, 1]},
    ],
)
def test_hugging_face_steps_that_cannot_be_described_are_refused(
    config: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"preprocessor_config\.json(?!, line)"):
        description.load(str(path))
