"""Pictures with a known truth, made from what packages ship: nothing is stored, seeds are fixed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TEXT = (
    "the quick brown fox jumps over lazy dogs while seven wizards mix liquor total 149.95 invoice "
    "No. 7781 Street, London platform departure 12:45 exit open closed daily 2026 coffee window"
)
_WORDS = _TEXT.split()
_PICTURES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


def photographs(folder: Path, count: int) -> None:
    """Parts of scikit-image's photographs at 500x375 and more or less enlarged, as JPEG."""
    rng = np.random.default_rng(1)
    whole = [_picture(name) for name in _PICTURES]
    for number in range(count):
        image = whole[number % len(whole)]
        part = rng.uniform(0.5, 0.95)
        width, height = int(image.width * part), int(image.width * part * 0.75)
        height = min(height, image.height)
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        tile = image.crop((left, top, left + width, top + height)).resize((500, 375))
        tile.save(folder / f"{number:04d}.jpg", quality=int(rng.integers(75, 96)))


def lines(folder: Path, count: int) -> Path:
    """Written lines in several sizes and colours; returns the file that says what they say."""
    rng = np.random.default_rng(2)
    rows = []
    for number in range(count):
        text = " ".join(rng.choice(_WORDS, 4))
        _line(text, rng).save(folder / f"{number:04d}.jpg", quality=int(rng.integers(50, 95)))
        rows.append(f"{number:04d}.jpg\t{text}\n")
    labels = folder.with_name(f"{folder.name}.tsv")
    labels.write_text("".join(rows), encoding="utf-8")
    return labels


def turned(folder: Path, count: int) -> Path:
    """Written lines, every other one upside down; returns the file with 0 or 1 for each."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(count):
        image = _line(" ".join(rng.choice(_WORDS, 4)), rng)
        if number % 2:
            image = image.rotate(180)
        image.save(folder / f"{number:04d}.jpg", quality=int(rng.integers(50, 95)))
        rows.append(f"{number:04d}.jpg,{number % 2}\n")
    labels = folder.with_name(f"{folder.name}.csv")
    labels.write_text("".join(rows), encoding="utf-8")
    return labels


def scenes(folder: Path, count: int) -> Path:
    """Writing on photographs at 720x480; returns the folder with masks of the written lines."""
    rng = np.random.default_rng(4)
    masks = folder.with_name(f"{folder.name}-masks")
    masks.mkdir(exist_ok=True)
    whole = [_picture(name) for name in _PICTURES]
    for number in range(count):
        image = whole[number % len(whole)].resize((720, 480))
        mask = Image.new("L", image.size)
        for row in range(4):
            text = " ".join(rng.choice(_WORDS, int(rng.integers(1, 4))))
            font = ImageFont.load_default(int(rng.integers(24, 54)))
            at = int(rng.integers(8, 180)), 22 + row * 112 + int(rng.integers(0, 30))
            ink = (20, 20, 30) if rng.random() < 0.4 else (245, 245, 235)
            ImageDraw.Draw(image).text(at, text, font=font, fill=ink)
            box = ImageDraw.Draw(image).textbbox(at, text, font=font)
            ImageDraw.Draw(mask).rectangle(box, fill=1)
        image.save(folder / f"{number:04d}.jpg", quality=int(rng.integers(70, 95)))
        mask.save(masks / f"{number:04d}.png")
    return masks


def made(folder: Path, make: Callable[[Path, int], Path | None], count: int) -> Path | None:
    """The folder filled by ``make`` with so many pictures, unless it is already; its labels."""
    note = folder.with_name(f"{folder.name}.json")
    if note.is_file() and (known := json.loads(note.read_text()))["count"] == count:
        return folder.with_name(Path(known["labels"]).name) if known["labels"] else None
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    labels = make(folder, count)
    note.write_text(json.dumps({"count": count, "labels": str(labels) if labels else None}))
    return labels


def _picture(name: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image's photographs are needed: make zoo")
    with Image.open(Path(spec.origin).parent / "data" / name) as image:
        return image.convert("RGB")


def _line(text: str, rng: np.random.Generator) -> Image.Image:
    font = ImageFont.load_default(int(rng.integers(16, 40)))
    paper, ink = rng.integers(180, 255, 3).tolist(), rng.integers(0, 90, 3).tolist()
    size = int(font.getlength(text)) + 20, int(font.size * 1.7)
    image = Image.new("RGB", size, tuple(paper))
    ImageDraw.Draw(image).text((10, font.size * 0.2), text, font=font, fill=tuple(ink))
    return image
