"""The table of ``audit sysnoise`` as pictures: effects, accumulation, resizers, changed pixels.

The only user of matplotlib. Names come from pipelines and photographs: they are made visible, and
``$``, which matplotlib reads as mathematics, is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import _words as words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from auditor.records.sysnoise import Interval, SysnoiseEffect, SysnoiseReport

_NAME = 44
_AMPLIFIED = 8  # differences of pixels are hard to see as they are
_COLUMNS = 4


def draw(
    report: SysnoiseReport, pixels: Mapping[str, NDArray[Any]], folder: Path
) -> tuple[Path, ...]:
    """Write the pictures.

    Args:
        report: the table.
        pixels: one photograph under the training pipeline (first) and under single options, uint8,
            height x width x 3, by the option's name; those of another size are left out.
        folder: an existing one; files of the same names are replaced.

    Returns:
        What was written.
    """
    import matplotlib

    matplotlib.use("agg")
    made = [_effects(report, folder / "effects.svg")]
    if report.accumulation:
        made.append(_accumulation(report, folder / "accumulation.svg"))
    if (matrix := between(report)) is not None:
        made.append(_matrix(report, *matrix, folder / "resize.svg"))
    if len(pixels) > 1:
        made.append(_pixels(pixels, folder / "pixels.png"))
    return tuple(made)


def _measure(report: SysnoiseReport) -> str:
    if report.accuracy is not None:
        return f"drop of {report.metric}, points"
    return "relative L2" if report.kind == "none" else _flips(report.kind)


def _flips(kind: str) -> str:
    return {
        "scores": "top-1 flips, %",
        "boxes": "boxes lost, %",
        "mask": "1 - IoU of the mask, %",
        "embedding": "1 - cosine, %",
        "text": "texts that differ, %",
    }[kind]


def _value(effect: SysnoiseEffect, report: SysnoiseReport) -> tuple[float, float, float]:
    """The value and how far its interval reaches below and above."""
    found: Interval = effect.relative_l2
    scale = 1.0
    if report.accuracy is not None and effect.drop is not None:
        found, scale = effect.drop, 100.0
    elif report.kind != "none" and effect.changed is not None:
        found, scale = effect.changed, 100.0
    value, low, high = (
        scale * v if math.isfinite(v) else 0.0 for v in (found.value, found.low, found.high)
    )
    return value, max(0.0, value - low), max(0.0, high - value)


def _effects(report: SysnoiseReport, path: Path) -> Path:
    """A bar for the worst option of each type, its interval, and a tick at the mean of all."""
    from matplotlib import pyplot

    types = list(reversed(report.types))
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(types) + 1.4), layout="constrained")
    for row, kind in enumerate(types):
        worst, below, above = _value(kind.max, report)
        mean, _, _ = _value(kind.mean, report)
        axes.barh(row, worst, color="#1f5fbf", xerr=[[below], [above]], ecolor="#222222", capsize=3)
        axes.plot([mean, mean], [row - 0.4, row + 0.4], color="#f2a33c", linewidth=2)
    labels = [f"{_plain(t.title)}: {_plain(t.worst)}" for t in types]
    axes.set_yticks(range(len(types)), labels)
    axes.set_xlabel(f"{_measure(report)}: worst option with its 95 % interval; mean of all options")
    name, photos = _plain(Path(report.model).name), words.count(report.photos, "photograph")
    axes.set_title(f"SysNoise of {name}, {photos}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _accumulation(report: SysnoiseReport, path: Path) -> Path:
    """Types added one at a time (paper, Fig. 3)."""
    from matplotlib import pyplot

    steps = report.accumulation
    titles = {t.id: t.title for t in report.types}
    found = [_value(step.effect, report) for step in steps]
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    axes.errorbar(
        range(len(steps)),
        [value for value, _, _ in found],
        yerr=[[below for _, below, _ in found], [above for _, _, above in found]],
        color="#1f5fbf",
        marker="o",
        capsize=4,
    )
    names = [_plain(titles.get(step.types[-1], step.types[-1])) for step in steps]
    axes.set_xticks(range(len(steps)), [("+ " if i else "") + n for i, n in enumerate(names)])
    axes.tick_params(axis="x", rotation=25)
    axes.set_ylabel(_measure(report))
    axes.set_ylim(bottom=min(0.0, *(value - below for value, below, _ in found)))
    axes.set_title("added one at a time, each with its worst option")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def between(report: SysnoiseReport) -> tuple[list[str], NDArray[Any]] | None:
    """How often the answers after one resizer differ from those after another, in per cent.

    Returns:
        The resizers, the training pipeline's first, and the matrix ``[trained on, deployed]``;
        None where there is no other, or no answer to compare. Left out are those that
        could not process every photograph.
    """
    import numpy as np

    found = next((t for t in report.types if t.id == "preprocessing.resize"), None)
    if found is None or report.kind not in ("scores", "text"):
        return None
    names = sorted(o.name for o in found.options if o.photos == report.photos)
    answers: dict[str, dict[str, int | str]] = {name: {} for name in names}
    for flip in report.flips:
        name = flip.option.removeprefix(f"{found.id}: ")
        if name != flip.option and name in answers:
            answers[name][flip.photo] = flip.after
    for option in found.options:  # where a photograph has many answers, flips do not tell them
        told = option.effect.changed
        if option.name in answers and (
            told is None or round(told.value * report.photos) != len(answers[option.name])
        ):
            return None
    every = [{}, *answers.values()]  # of the training pipeline nothing flips

    def differ(a: dict[str, int | str], b: dict[str, int | str]) -> int:
        return sum(a.get(photo) != b.get(photo) for photo in a.keys() | b.keys())

    counts = np.array([[differ(a, b) for b in every] for a in every])
    return ["training", *names], 100 * counts / report.photos


def _matrix(report: SysnoiseReport, names: Sequence[str], rates: NDArray[Any], path: Path) -> Path:
    """Each resizer against each other (paper, Table 7, of one network)."""
    from matplotlib import pyplot

    side = 0.42 * len(names) + 2.6
    figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    shown = axes.imshow(rates, cmap="Blues", vmin=0)
    labels = [_plain(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90)
    axes.set_yticks(range(len(names)), labels)
    axes.set_xlabel("resized by")
    axes.set_ylabel("instead of")
    dark = rates.max() / 2
    for row, values in enumerate(rates):
        for column, value in enumerate(values):
            if row != column:
                colour = "white" if value > dark else "#222222"
                axes.text(
                    column, row, f"{value:.1f}", ha="center", va="center", size=6, color=colour
                )
    figure.colorbar(shown, ax=axes, shrink=0.7, label=_flips(report.kind))
    axes.set_title(f"one resizer instead of another, {words.count(report.photos, 'photograph')}")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _pixels(pixels: Mapping[str, NDArray[Any]], path: Path) -> Path:
    """The photograph, and how far each option is from it (paper, Fig. 5)."""
    import numpy as np
    from matplotlib import pyplot

    (name, plain), *others = pixels.items()
    alike = [n for n, image in others if np.array_equal(image, plain)]
    shown = [(n, i) for n, i in others if i.shape == plain.shape and n not in alike]
    rows = math.ceil((len(shown) + 1) / _COLUMNS)
    figure, grid = pyplot.subplots(
        rows, _COLUMNS, figsize=(3 * _COLUMNS, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    grid.flat[0].imshow(plain)
    grid.flat[0].set_title(_plain(name), fontsize=9)
    for axes, (option, image) in zip(grid.flat[1:], shown, strict=False):
        apart = np.abs(image.astype(np.int16) - plain)
        axes.imshow(np.clip(apart * _AMPLIFIED, 0, 255).astype(np.uint8))
        axes.set_title(f"{_plain(option)}\nlargest {int(apart.max())} levels", fontsize=9)
    figure.suptitle(
        f"differences from the training pipeline, {_AMPLIFIED} times as large; {len(alike)} other "
        "options give the same pixels"
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _plain(text: str) -> str:
    return words.elide(words.visible(text), _NAME).replace("$", r"\$")
