"""Folders: what is in them, what is unusual about it, and whose label is whose."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from auditor.errors import UsageError
from auditor.pipeline import photos as folders
from tests.helpers import jpeg


def test_photographs_are_sorted_and_spread(photos: Path) -> None:
    (photos / "notes.txt").write_text("no picture")
    (photos / ".hidden.jpg").write_bytes(b"")
    found = folders.find(photos, None, 5)
    numbers = [int(name[:2]) for name in found.names]
    assert numbers == [0, 2, 4, 7, 9]
    assert "by their names: 2." in found.notes[0]


def test_labels_from_names_folders_and_files(photos: Path, tmp_path: Path) -> None:
    by_name = folders.find(photos, "from-name", None)
    assert by_name.labels["07_tile.jpg"] == 7 and len(by_name.labels) == 12

    file = tmp_path / "labels.csv"
    file.write_text("name,class\n03_tile.jpg,30\nelse.jpg,5\n04_tile.jpg,40\n")
    found = folders.find(photos, str(file), None)
    assert found.labels == {"03_tile.jpg": 30, "04_tile.jpg": 40}
    assert any("that belong to no photograph (1)" in note for note in found.notes)
    assert any("only compared with training (10)" in note for note in found.notes)

    for name in ("cat", "ant"):
        (photos / name).mkdir()
        (photos / "00_tile.jpg").rename(photos / name / "x.jpg")
        (photos / "01_tile.jpg").replace(photos / "00_tile.jpg") if name == "cat" else None
    for left in photos.glob("*.jpg"):
        left.unlink()
    assert folders.find(photos, "from-folder", None).labels == {"ant/x.jpg": 0, "cat/x.jpg": 1}
    (photos / "cat").rename(photos / "21")
    (photos / "ant").rename(photos / "4")
    assert folders.find(photos, "from-folder", None).labels == {"21/x.jpg": 21, "4/x.jpg": 4}


@pytest.mark.parametrize(
    ("labels", "text", "said"),
    [
        ("from-folder", None, "not in folders"),
        ("{}", "else.jpg 3\n", "no label for any photograph"),
        ("{}", "a.jpg,1\nb.jpg,cat\n", "line 2: `b.jpg,cat`"),
        ("nowhere.csv", None, "cannot read --labels"),
    ],
)
def test_labels_that_do_not_belong_are_refused(
    labels: str, text: str | None, said: str, photos: Path, tmp_path: Path
) -> None:
    file = tmp_path / "labels.txt"
    file.write_text(text or "")
    with pytest.raises(UsageError, match=said):
        folders.find(photos, labels.format(file), None)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(UsageError, match="no photographs"):
        folders.find(tmp_path, None, None)
    with pytest.raises(UsageError, match="is no folder"):
        folders.find(tmp_path / "missing", None, None)


@pytest.mark.parametrize(
    ("image", "form", "name", "expected"),
    [
        (Image.new("RGB", (64, 64)), "JPEG", "a.jpg", ()),
        (Image.new("RGB", (64, 64)), "PNG", "a.jpg", ("PNG named .jpg",)),
        (Image.new("L", (64, 64)), "JPEG", "a.JPEG", ("greyscale",)),
        (Image.new("CMYK", (64, 64)), "JPEG", "a.jpg", ("CMYK",)),
        (Image.new("RGBA", (64, 64)), "PNG", "a.png", ("transparency",)),
        (
            Image.fromarray(np.zeros((64, 64), np.uint16)),
            "PNG",
            "a.png",
            ("16 bits or more a channel",),
        ),
        (Image.new("RGB", (1, 1)), "PNG", "a.png", ("smaller than 32 pixels",)),
    ],
)
def test_what_is_unusual(
    image: Image.Image, form: str, name: str, expected: tuple[str, ...]
) -> None:
    stream = io.BytesIO()
    image.save(stream, form)
    assert folders.oddities(stream.getvalue(), name) == expected


def test_a_turned_photograph_is_noticed() -> None:
    image = Image.new("RGB", (64, 48))
    exif = image.getexif()
    exif[0x0112] = 6
    assert folders.oddities(jpeg(image, exif=exif), "a.jpg") == ("EXIF orientation 6",)
    assert folders.oddities(b"nothing", "a.jpg") == ()
