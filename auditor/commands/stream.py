"""``audit stream``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import (
    Backends,
    EngineOptions,
    JsonOutput,
    Model,
    Seed,
    Shapes,
    Threads,
    Timeout,
    backend_specs,
    engine_options,
    parse_pair,
    parse_shape,
)
from auditor.commands._output import check_writable, emit, exit_code, screen, write
from auditor.commands._stop import displayed_progress
from auditor.errors import UsageError


@app.command(
    "stream",
    short_help="Feed a model its states back, step by step, on each backend.",
    epilog=examples(
        "stream vad.onnx --wave speech.wav --frame 512 --context 64 --set sr=16000 --backends ov",
        "stream model.onnx --data steps.npz --state h0=h1",
    ),
)
def _stream(
    model: Model,
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=OUTPUT",
            help="Both ends of a state, where names do not tell; repeatable.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The inputs that are no states (.npz or .safetensors), steps stacked on the first "
            "axis, or one array for all steps.",
        ),
    ] = None,
    wave: Annotated[
        Path | None, typer.Option(metavar="FILE.wav", help="A sound, cut into frames.")
    ] = None,
    frame: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="New samples of the sound in each step.")
    ] = None,
    context: Annotated[
        int, typer.Option(min=0, metavar="N", help="Samples of the step before, ahead of them.")
    ] = 0,
    value: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="INPUT=NUMBER", help="One number for an input, such as sr=16000."
        ),
    ] = None,
    output_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The output to decide by; the first that is no state otherwise."
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="P", help="What a single probability must exceed.")
    ] = 0.5,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps at most.")] = 64,
    seed: Seed = 0,
    shape: Shapes = None,
    backends: Backends = None,
    option: EngineOptions = None,
    save_step: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Write the inputs of the step that is looked at, for audit MODEL --data.",
        ),
    ] = None,
    output: JsonOutput = None,
    threads: Threads = None,
    timeout: Timeout = 600.0,
) -> int:
    """Run a stream through a model that keeps a state, on the reference and on each backend.

    Each side gets its own states back, from zeros on. Says how far outputs and states are apart at
    every step, which decisions turn, how much of an error came with the states and how much a step
    adds, and what causes the latter. Exit code 0 when all decisions are the same, 1 when not, 3
    when a named backend gave none.
    """
    for path in filter(None, (output, save_step)):
        check_writable(path.resolve())
    if data is not None and wave is not None:
        raise UsageError("--data and --wave both say what is fed", "Give one of them.")
    specs = backend_specs(backends)
    engine = engine_options(option, specs)
    named = dict(parse_pair("--state", text, "--state h=hn") for text in state or ())
    given = (parse_pair("--set", text, "--set sr=16000") for text in value or ())
    numbers = {name: _number(text) for name, text in given}

    from auditor import discovery
    from auditor.options import AuditOptions
    from auditor.sequences import streaming
    from auditor.sequences.runs import Harness
    from reports import _stream as table

    asked = streaming.Asked(
        data=data,
        wave=wave,
        frame=frame,
        context=context,
        values=numbers,
        shapes=dict(parse_shape(text) for text in shape or ()),
        output=output_name,
        steps=steps,
        seed=seed,
        threshold=threshold,
    )
    options = AuditOptions(backends=specs, options=engine, threads=threads, timeout=timeout)
    with (
        TemporaryDirectory(prefix="audit-stream-") as scratch,
        displayed_progress() as progress,
    ):
        harness = Harness(options, discovery.noises(), progress, Path(scratch))
        report = streaming.stream(model, asked, named, harness, save=save_step)
    if output is not None:
        write(output, table.render_json(report))
    emit(table.render(report, *screen()))
    turned = any(not step.same for part in report.backends for step in part.steps)
    return exit_code(turned, [part.complete for part in report.backends], bool(backends))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"--set `{text}` is no number", "Such as --set sr=16000.") from error
