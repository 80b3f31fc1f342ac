"""Segmentation: mean intersection over union of the classes (mIoU).

The confusion matrix of each photograph is torchmetrics'; that of a whole set is their sum, as for
Cityscapes and PASCAL VOC. Label and result meet on the label's pixels, as far as the network saw
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from auditor.errors import UsageError, reason
from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.pipeline.preprocessing.stages import Placement
from auditor.pipeline.scoring import Case, Label, Labels, Verdict, listed
from auditor.ports import Array
from auditor.records.terms import OutputKind

_IGNORED = 255  # pixels without a label (PASCAL VOC, Cityscapes)


@dataclass(frozen=True, slots=True)
class Mask:
    """A file with the class of each pixel; ``changed`` tells two states of it apart."""

    path: Path
    changed: int


class Segmentation:
    """A class for each pixel; a mask with a threshold has two of them."""

    metric = "mIoU"
    kind: OutputKind = "mask"
    packages = {"torchmetrics": "torchmetrics"}  # noqa: RUF012 - never changed
    labels = (
        "a folder with a PNG for each photograph, of the same name and size: the class of each "
    )
    labels += "pixel, 255 for none"
    draws = 1000
    gallery = False

    def read(self, folder: Path, names: Sequence[str], source: str) -> Labels:
        """The masks' files; those of another size than their photograph are not used."""
        from PIL import Image

        root = Path(source)
        if not root.is_dir():
            raise UsageError(f"--labels {source} is no folder", f"--task seg takes {self.labels}.")
        masks = {p.relative_to(root).with_suffix("").as_posix(): p for p in root.rglob("*.png")}
        values: dict[str, Label] = {}
        odd = []
        for name in names:
            stem = Path(name).with_suffix("").as_posix()
            path = masks.pop(stem, None) or masks.pop(stem.rpartition("/")[2], None)
            if path is None:
                continue
            try:
                with Image.open(path) as mask, Image.open(folder / name) as photo:
                    sizes, mode = (mask.size, photo.size), mask.mode
            except Exception:  # image parsers raise anything; who cannot be read is named elsewhere
                odd.append(f"{path.name} (it, or its photograph, cannot be opened)")
                continue
            if mode not in ("L", "P", "1"):
                odd.append(f"{path.name} (mode {mode}: no class indices)")
            elif sizes[0] != sizes[1]:
                mine, its = ("x".join(map(str, reversed(size))) for size in sizes)
                odd.append(f"{path.name} ({mine}, its photograph {its})")
            else:
                values[name] = Mask(path, path.stat().st_mtime_ns)
        notes = []
        if odd:
            notes.append(listed("Masks that do not match and are not used", odd))
        if masks:
            unused = [p.name for p in masks.values()]
            notes.append(listed(f"Masks in {source} that belong to no photograph", unused))
        return Labels(values, tuple(notes))

    def judge(self, value: Array, case: Case) -> Verdict | None:
        """Three numbers a class: it, pixels in both, pixels in either."""
        import torch
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        truth = _pixels(case.label.path)
        found = seen(value, case.place, truth.shape)
        inside = (found >= 0) & (truth != _IGNORED)
        mine, theirs = truth[inside], found[inside]
        if mine.size == 0:
            return None
        classes = max(2, int(max(mine.max(), theirs.max())) + 1)
        matrix = multiclass_confusion_matrix(
            torch.from_numpy(theirs), torch.from_numpy(mine), classes, validate_args=False
        ).numpy()
        both = matrix.diagonal()
        either = matrix.sum(axis=0) + matrix.sum(axis=1) - both
        rows = [(c, both[c], either[c]) for c in np.flatnonzero(either)]
        return [float(v) for row in rows for v in row]

    def score(self, verdicts: Sequence[Verdict], labels: Sequence[Label], weights: Array) -> Array:
        """Over the classes that a draw has, in the label or in the result."""
        classes = 1 + int(max((max(v[::3]) for v in verdicts if v), default=-1))
        both, either = np.zeros((2, len(verdicts), classes))
        for row, verdict in enumerate(verdicts):
            where = np.array(verdict[::3], np.int64)
            both[row, where], either[row, where] = verdict[1::3], verdict[2::3]
        together, all_of_them = weights @ both, weights @ either
        with np.errstate(invalid="ignore"):
            overlaps = np.where(all_of_them > 0, together / all_of_them, np.nan)
        known = np.isfinite(overlaps).sum(axis=1)
        found: Array = np.where(
            known > 0, np.nansum(overlaps, axis=1) / np.maximum(known, 1), np.nan
        )
        return found


def seen(value: Array, place: Placement, shape: tuple[int, ...]) -> Array:
    """A result on the pixels of a photograph, ``[height, width]``, -1 where it has none.

    Args:
        value: ``[1, 1, height, width]`` or fewer axes of length 1, classes.
        place: where it is in the photograph.
        shape: height and width of the photograph.
    """
    result = value.reshape(value.shape[-2:])
    indices = []
    for axis in (0, 1):
        middle = np.arange(shape[axis]) + 0.5
        at = (middle * place.scale[axis] + place.shift[axis]) * (
            result.shape[axis] / place.tensor[axis]
        )
        whole = np.floor(at).astype(np.int64)
        indices.append(np.where((whole >= 0) & (whole < result.shape[axis]), whole, -1))
    rows, columns = indices
    found: Array = result[np.ix_(rows, columns)].astype(np.int64)
    found[rows < 0] = -1
    found[:, columns < 0] = -1
    return found


def _pixels(path: Path) -> Array:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image).astype(np.int64)
    except Exception as error:  # image parsers raise anything on bad data
        raise PhotoError(f"its mask {path.name} cannot be read: {reason(error)}") from error


TASK = Segmentation()
