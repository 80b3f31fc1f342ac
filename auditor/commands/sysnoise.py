"""``audit sysnoise``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import Cores, Model
from auditor.commands._output import check_writable, emit, make_folder, screen, write
from auditor.commands._stop import displayed_progress
from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.pipeline.description import Description


@app.command(
    "sysnoise",
    short_help="What decoders, resizers, colours … do to a model's answers.",
    epilog=examples(
        "sysnoise model.onnx --images photos --pipeline imagenet-torchvision --samples 100"
    ),
)
def _sysnoise(
    model: Model,
    images: Annotated[
        Path, typer.Option(metavar="DIR", help="Photographs, as the application gets them.")
    ],
    pipeline: Annotated[
        str,
        typer.Option(
            metavar="FILE|PRESET",
            help="What turns a photograph into the input: a pipeline.toml, a "
            "preprocessor_config.json, or a preset such as imagenet-torchvision.",
        ),
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|from-folder|from-name",
            help="The truth. cls, embed: lines `photo.jpg,17`, the folders, or the number that "
            "each name begins with; det: a COCO file; seg: a folder of masks; ocr: lines "
            "`photo.jpg,text`. Without, results are compared with the training pipeline's.",
        ),
    ] = None,
    task: Annotated[
        Literal["cls", "det", "seg", "embed", "ocr"] | None,
        typer.Option(help="What the model is for; told by its result when not given."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many photographs; all when not given."),
    ] = None,
    noise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID,…",
            help="Causes to simulate in the network, or none; ceil mode, upsample, FP16, BF16 and "
            "INT8 when not given.",
        ),
    ] = None,
    threads: Cores = None,
    format: Annotated[
        Literal["terminal", "json"] | None,
        typer.Option(help="What is printed; -o writes JSON."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the table to FILE, as JSON."),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write pictures into DIR: effects.svg, accumulation.svg, resize.svg and "
            "pixels.png.",
        ),
    ] = None,
) -> int:
    """The table of the SysNoise paper for one model, on the ONNX Runtime reference.

    Switches each decoder, resizer and colour conversion alone, and puts data precisions, ceil
    mode and upsampling into the network; then adds up the worst of each. A sweep that was
    interrupted goes on where it was when the same command is run again.
    """
    from auditor import discovery

    if output is not None:
        check_writable(output.resolve())
    if plots is not None:
        _check_plots(plots)
    given = [id.strip() for text in noise or () for id in text.split(",")]

    from auditor.graphs import model as models
    from auditor.pipeline import description, photos
    from auditor.pipeline.sysnoise import networks
    from auditor.pipeline.sysnoise.table import pixels, sysnoise
    from reports import _sysnoise as table
    from reports._progress import print_error

    ids = given if noise else list(networks.PAPER)
    noises = [discovery.noise(id) for id in ids if ids != ["none"]]
    described = description.load(pipeline)
    found = photos.find(images, labels, samples, task or _kind(described))
    keep = _kept_in(model, images, output)
    try:
        with displayed_progress() as progress:
            progress.update("reference", "load")
            report = sysnoise(
                models.load(model),
                described,
                found,
                noises,
                keep=keep,
                threads=threads,
                progress=progress,
                task=task,
            )
    except SystemExit:
        if keep.is_file():
            print_error(
                "stopped before the end",
                f"What was measured is in {keep}: the same command goes on from there.",
            )
        raise
    if output is not None:
        write(output, table.to_json(report))
    if plots is not None:
        from reports import _plots

        pictures = _plots.draw(report, pixels(described, found), plots)
        typer.echo(f"written: {', '.join(map(str, pictures))}", err=True)
    if format == "json":
        emit(table.to_json(report))
    else:
        emit(table.render(report, *screen()))
    return 0


def _kind(described: Description) -> str:
    """The task that a described result is of; classification where nothing is described."""
    from auditor.pipeline import scoring

    post = described.training_post
    return (scoring.reading(post.kind) if post is not None else None) or "cls"


def _check_plots(folder: Path) -> None:
    """Refuse, before any work is done, what could not be drawn."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plots needs matplotlib", "Install it: pip install 'sysnoise-auditor[plots]'."
        )
    make_folder(folder, "effects.svg", "Choose another folder.")


def _kept_in(model: Path, images: Path, output: Path | None) -> Path:
    """The file for what was measured: beside the output, else in the user's cache."""
    import hashlib
    import os

    if output is not None:
        return output.with_name(f"{output.name}.partial")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = f"{model.resolve()}\n{images.resolve()}".encode()
    return cache / "sysnoise-auditor" / f"{hashlib.sha256(place).hexdigest()[:16]}.jsonl"
