"""The photographs of a folder: their order, their labels, and what is unusual about them."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

from auditor.errors import UsageError
from auditor.pipeline import scoring
from auditor.pipeline.preprocessing import steps
from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.pipeline.scoring import Label, Labels

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
        labels: by name, the truth, as the task reads it; empty without labels.
        notes: what of the folder or of the labels is not used, as sentences.
    """

    folder: Path
    names: tuple[str, ...]
    labels: dict[str, Label]
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


def find(folder: Path, labels: str | None, samples: int | None, task: str = "cls") -> Photos:
    """List a folder and everything below it.

    Args:
        folder: the folder; files whose names do not end like a picture's are not used.
        labels: what the task's ``read`` takes; None without labels.
        samples: how many to use, spread evenly over the sorted names; None for all.
        task: whose labels they are; one of ``scoring.names``.

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
        notes.append(f"Files in {folder} that are no pictures by their names: {others}.")
    known = scoring.load(task).read(folder, found, labels) if labels else Labels({})
    notes += known.notes
    if samples is not None and samples < len(found):
        used = f"{samples} of {len(found)}"
        notes.append(f"Photographs used: {used}, spread evenly over the sorted names.")
        found = [found[i * len(found) // samples] for i in range(samples)]
    chosen = {name: known.values[name] for name in found if name in known.values}
    if labels and not chosen:
        raise UsageError(
            f"--labels {labels} has no label for any photograph in {folder}",
            "Its names must be those of the files, relative to the folder or without folders.",
        )
    if labels and (without := [name for name in found if name not in chosen]):
        what = "Photographs without a label, which are only compared with training"
        notes.append(scoring.listed(what, without))
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
