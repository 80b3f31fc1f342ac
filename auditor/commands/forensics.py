"""``audit forensics``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from auditor.commands._app import app
from auditor.commands._output import check_writable, emit, screen, write
from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.ports import Array


@app.command("forensics", short_help="Find which decoder, resizer, colour … made a tensor.")
def _forensics(
    deployed_input: Annotated[
        Path,
        typer.Option(
            metavar="FILE.npy", help="What the device fed to the network for the photograph."
        ),
    ],
    image: Annotated[Path, typer.Option(metavar="FILE", help="The photograph.")],
    pipeline: Annotated[
        str,
        typer.Option(
            metavar="FILE|PRESET",
            help="Whose sizes and crops were used: a pipeline.toml, a preprocessor_config.json, or "
            "a preset such as imagenet-torchvision.",
        ),
    ],
    format: Annotated[
        Literal["terminal", "json"], typer.Option(help="What is printed; -o writes JSON.")
    ] = "terminal",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the answer to FILE, as JSON."),
    ] = None,
) -> int:
    """Find which decoder, colour conversion, resizer and normalisation made a tensor.

    Compares the tensor with what every combination of the catalogue makes of the photograph, and
    names the closest one, those that cannot be told from it, and how far the next one is.
    """
    if output is not None:
        check_writable(output.resolve())

    from auditor.pipeline import description, forensics
    from auditor.pipeline.libraries import PhotoError
    from reports import _forensics as answer

    geometry = description.load(pipeline).training
    tensor = _tensor(deployed_input)
    try:
        found = forensics.identify(tensor, image.read_bytes(), geometry)
    except OSError as error:
        raise UsageError(f"cannot read {image}: {error.strerror}", "Give a photograph.") from error
    except PhotoError as error:
        raise UsageError(f"{image}: {error.message}", "Give the photograph itself.") from error
    if output is not None:
        write(output, answer.to_json(found))
    emit(answer.to_json(found) if format == "json" else answer.render(found, *screen()))
    return 0


def _tensor(path: Path) -> Array:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"cannot read {path} as an array: {error}", "Save it with numpy.save, unpickled."
        ) from error
    if not isinstance(found, np.ndarray):
        raise UsageError(f"{path} holds several arrays", "Save one array with numpy.save.")
    return found
