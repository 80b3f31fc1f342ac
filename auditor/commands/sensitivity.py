"""``audit sensitivity``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import Cores, Data, Model, Samples, Seed, Shapes, parse_shape
from auditor.commands._output import emit, screen
from auditor.commands._stop import displayed_progress


@app.command(
    "sensitivity",
    short_help="Rank what each cause would do to a model's outputs.",
    epilog=examples(
        "sensitivity model.onnx --data inputs.npz",
        "sensitivity model.onnx --noise precision.bf16,precision.fp16",
    ),
)
def _sensitivity(
    model: Model,
    noise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID,…",
            help="Simulate these causes only, and show each of their forms; all causes when not "
            "given.",
        ),
    ] = None,
    data: Data = None,
    seed: Seed = 0,
    samples: Samples = None,
    shape: Shapes = None,
    threads: Cores = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds that one run may take.")
    ] = 60.0,
) -> int:
    """Rank what each cause would do to a model's outputs if its deployment had it.

    Puts every form of every cause into the whole reference model, one after another, and compares
    its outputs with the reference's. Needs no backend and says nothing about any.
    """
    from auditor import discovery

    catalogue = discovery.noises()
    shapes = dict(parse_shape(text) for text in shape or ())
    ids = [id.strip() for text in noise or () for id in text.split(",")]
    chosen = [discovery.noise(id) for id in ids] if ids else catalogue

    from auditor import sensitivity
    from auditor import stimulus as stimuli
    from auditor.graphs import model as models
    from reports._lists import render_sensitivities

    with displayed_progress() as progress:
        progress.update("reference", "load")
        loaded = models.load(model)
        stimulus = stimuli.load(loaded, data, seed, samples, shapes)
        rows = list(
            sensitivity.simulated(
                loaded,
                stimulus,
                chosen,
                threads=threads or os.cpu_count() or 1,
                seconds=timeout,
                progress=progress,
            )
        )
    notes = sensitivity.notes(loaded, stimulus.info, chosen, rows)
    emit(render_sensitivities(rows, notes, *screen(), every=bool(ids)))
    return 0
