"""The photographs of a folder: their order, their labels, and what is unusual about them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from auditor.errors import UsageError
from auditor.pipeline import steps
from auditor.pipeline.libraries import PhotoError

_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".jp2", ".avif"),
)
_ORDINARY = ("RGB", "YCbCr")
_WORDS = {"L": "greyscale", "1": "greyscale", "CMYK": "CMYK", "P": "palette"}


@dataclass(frozen=True, slots=True)
class Photos:
    """What is in a folder.

    Attributes:
        folder: where they are.
        names: paths relative to the folder, with ``/``, sorted.
        labels: by name, the index of the true class; empty without labels.
        notes: what of the folder or of the labels is not used, as sentences.
    """

    folder: Path
    names: tuple[str, ...]
    labels: dict[str, int]
    notes: tuple[str, ...]

    def read(self, name: str) -> bytes:
        """The bytes of a photograph.

        Raises:
            PhotoError: the file cannot be read.
        """
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise PhotoError(f"it cannot be read: {error.strerror}") from error


def find(folder: Path, labels: str | None, samples: int | None) -> Photos:
    """List a folder and everything below it.

    Args:
        folder: the folder; files whose names do not end like a picture's are not used.
        labels: ``from-folder``, ``from-name``, or a file; see ``_labelled``.
        samples: how many to use, spread evenly over the sorted names; None for all.

    Raises:
        UsageError: the folder has no photographs, or the labels do not belong to them.
    """
    if not folder.is_dir():
        raise UsageError(f"--images {folder} is no folder", "Give a folder with photographs.")
    files = [
        Path(root, name).relative_to(folder).as_posix()
        for root, _, inside in os.walk(folder)
        for name in inside
    ]
    found = sorted(n for n in files if n.lower().endswith(_ENDINGS) and not _hidden(n))
    if not found:
        raise UsageError(
            f"--images {folder} has no photographs ({len(files)} other files)",
            f"Used are {', '.join(_ENDINGS)}.",
        )
    notes = []
    if others := len(files) - len(found):
        notes.append(f"{others} files in {folder} are not pictures by their names.")
    known = _labelled(found, labels, notes) if labels else {}
    if samples is not None and samples < len(found):
        found = [found[i * len(found) // samples] for i in range(samples)]
        notes.append(f"{samples} photographs are used, spread evenly over the sorted names.")
    chosen = {name: known[name] for name in found if name in known}
    if labels and not chosen:
        raise UsageError(
            f"--labels {labels} has no label for any photograph in {folder}",
            "Its names must be those of the files, relative to the folder or without folders.",
        )
    if labels and (without := len(found) - len(chosen)):
        notes.append(f"{without} photographs have no label: they count for flips only.")
    return Photos(folder, tuple(found), chosen, tuple(notes))


def oddities(data: bytes, name: str) -> tuple[str, ...]:
    """What is unusual about a photograph, by its header alone; nothing where it has none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, form, size = image.mode, image.format or "", image.size
            transparent = "A" in image.getbands() or "transparency" in image.info
    except Exception:  # parsers raise anything on bad data; the decoder says what is wrong
        return ()
    found = []
    if mode.startswith(("I", "F")):
        found.append("16 bits or more a channel")
    elif mode not in _ORDINARY and mode not in ("RGBA", "LA"):
        found.append(_WORDS.get(mode, f"mode {mode}"))
    if transparent:
        found.append("transparency")
    if (turned := steps.orientation(data)) != 1:
        found.append(f"EXIF orientation {turned}")
    ending = Path(name).suffix.lower()
    if Image.registered_extensions().get(ending, form) not in (form, _family(form)):
        found.append(f"{form} named {ending}")
    if min(size) < 32:
        found.append("smaller than 32 pixels")
    return tuple(found)


def _family(form: str) -> str:
    return "JPEG" if form == "MPO" else form  # a JPEG with more pictures behind it


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _labelled(names: Sequence[str], source: str, notes: list[str]) -> dict[str, int]:
    """Class indices by photograph.

    ``from-folder``: the folder a photograph is in; its number if all folders are numbers, else its
    place among the sorted names (torchvision's ImageFolder). ``from-name``: the number that the
    file's name begins with. A file: a name and an index per line, separated by a comma, a tab
    or spaces.
    """
    if source == "from-folder":
        inside = {n: n.rpartition("/")[0] for n in names}
        classes = sorted(set(inside.values()))
        if classes == [""]:
            raise UsageError(
                "--labels from-folder, but the photographs are not in folders by class",
                "Give a file with a name and a class index per line.",
            )
        if all(c.isdecimal() for c in classes):
            return {n: int(c) for n, c in inside.items()}
        return {n: classes.index(c) for n, c in inside.items()}
    if source == "from-name":
        numbers = {n: re.match(r"\d+", n.rpartition("/")[2]) for n in names}
        return {n: int(found[0]) for n, found in numbers.items() if found}
    return _from_file(names, Path(source), notes)


def _from_file(names: Sequence[str], path: Path, notes: list[str]) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read --labels {path}: {error}", "Or say from-folder or from-name."
        ) from error
    given: dict[str, int] = {}
    for at, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        row = next(csv.reader([line])) if "," in line else line.rsplit(None, 1)
        index = row[-1].strip() if len(row) == 2 else ""
        if not index.isdecimal():
            if at == 1:  # a header
                continue
            raise UsageError(
                f"{path}, line {at}: `{line[:60]}` is not a name and a class index",
                "Write lines such as photo.jpg,17.",
            )
        given[row[0].strip()] = int(index)
    short: dict[str, str] = {}
    for name in names:
        short.setdefault(name.rpartition("/")[2], name)
    matched = {name: given[name] for name in names if name in given}
    for name, number in given.items():
        if name not in matched and name in short:
            matched.setdefault(short[name], number)
    if unused := len(given) - len(matched):
        notes.append(f"{unused} labels in {path} belong to no photograph.")
    return matched
