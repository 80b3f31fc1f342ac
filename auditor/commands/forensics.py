"""``audit forensics``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from auditor.commands._app import app, examples
from auditor.commands._output import check_writable, emit, screen, write
from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.pipeline.description import Description
    from auditor.ports import Array
    from auditor.records.forensics import ResultForensics


@app.command(
    "forensics",
    short_help="Find which decoder, resizer, colour … made a tensor.",
    epilog=examples(
        "forensics --pipeline imagenet-torchvision --image photo.jpg --deployed-input fed.npy"
    ),
)
def _forensics(
    pipeline: Annotated[
        str,
        typer.Option(
            metavar="FILE|PRESET",
            help="Whose sizes and crops were used: a pipeline.toml, a preprocessor_config.json, or "
            "a preset such as imagenet-torchvision.",
        ),
    ],
    deployed_input: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy", help="What the device fed to the network for the photograph."
        ),
    ] = None,
    deployed_result: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy",
            help="What the application made of the network's outputs: boxes, a mask, scores, or a "
            "text's class numbers; with --outputs, or with --model and --image.",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="The photograph.")] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="The network's outputs for --deployed-result."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL.onnx", help="The network, where its outputs were not kept."),
    ] = None,
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
    names the closest one, those that cannot be told from it, and how far the next one is. With
    --deployed-result the same for what comes after the network.
    """
    if (deployed_input is None) == (deployed_result is None):
        raise UsageError(
            "forensics needs either --deployed-input or --deployed-result",
            "Give the tensor that the device fed to the network, or what it made of the outputs.",
        )
    if output is not None:
        check_writable(output.resolve())

    from auditor.pipeline import description
    from auditor.pipeline.forensics import inputs as forensics
    from auditor.pipeline.preprocessing.libraries import PhotoError
    from reports import _forensics as answer

    described = description.load(pipeline)
    try:
        if deployed_input is not None:
            data = _photo(image)
            found = forensics.identify(
                _tensor(deployed_input, "--deployed-input"), data, described.training
            )
            text, said = answer.to_json(found), answer.render(found, *screen())
        else:
            assert deployed_result is not None
            made = _result(
                _tensor(deployed_result, "--deployed-result"), described, image, outputs, model
            )
            text, said = answer.result_to_json(made), answer.render_result(made, *screen())
    except PhotoError as error:
        raise UsageError(f"{image}: {error.message}", "Give the photograph itself.") from error
    if output is not None:
        write(output, text)
    emit(text if format == "json" else said)
    return 0


def _photo(path: Path | None) -> bytes:
    if path is None:
        raise UsageError("forensics needs --image here", "Give the photograph.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "Give a photograph.") from error


def _result(
    recorded: Array,
    described: Description,
    image: Path | None,
    outputs: Path | None,
    model: Path | None,
) -> ResultForensics:
    """What made a recorded result of outputs that were recorded, or are computed."""
    import numpy as np

    from auditor.pipeline.forensics import results as result_forensics
    from auditor.pipeline.preprocessing.steps import Preparation

    post = described.training_post
    if post is None:
        raise UsageError(
            f"{described.source} does not say what comes after the network",
            "Describe `post` (docs/pipeline.md): it says which output is what.",
        )
    if (outputs is None) == (model is None):
        raise UsageError(
            "--deployed-result needs the network's outputs",
            "Give --outputs with what was recorded, or --model and --image to compute them.",
        )
    place = tensor = None
    if image is not None or model is not None:
        prepared = Preparation(_photo(image))
        tensor = prepared.tensor(described.training)
        place = prepared.place(described.training)
    if outputs is not None:
        try:
            with np.load(outputs, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, AttributeError, TypeError) as error:
            raise UsageError(
                f"cannot read {outputs} as arrays by name: {error}", "Save it with numpy.savez."
            ) from error
    else:
        from auditor.graphs import model as models
        from auditor.pipeline.sysnoise.networks import network_input
        from auditor.replays.reference import Reference

        assert model is not None and tensor is not None
        loaded = models.load(model)
        name = network_input(loaded, tensor)
        values = Reference(loaded, 1).run({name: tensor})
    return result_forensics.identify(recorded, values, post, place)


def _tensor(path: Path, option: str) -> Array:
    from auditor import datafiles

    stored = datafiles.read(path, option)
    if len(stored) > 1:
        raise UsageError(f"{path} holds several arrays", "Save one array with numpy.save.")
    return next(iter(stored.values())).read(None)
