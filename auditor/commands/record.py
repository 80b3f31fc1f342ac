"""``audit record``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import (
    Data,
    EngineOptions,
    Model,
    Samples,
    Seed,
    Shapes,
    Threads,
    Timeout,
    backend_specs,
    engine_options,
    parse_shape,
)
from auditor.commands._output import check_writable, drafted, emit
from auditor.commands._stop import displayed_progress
from auditor.errors import UsageError


@app.command(
    "record",
    short_help="Record what a backend computes, to audit it elsewhere.",
    epilog=examples("record model.onnx --backend ov --data inputs.npz -o ov.npz"),
)
def _record(
    model: Model,
    backend: Annotated[
        str, typer.Option(metavar="ID[:DEVICE]", help="The backend, such as ort or ov:GPU.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.npz", help="The trace to write.")
    ],
    data: Data = None,
    seed: Seed = 0,
    samples: Samples = None,
    shape: Shapes = None,
    option: EngineOptions = None,
    threads: Threads = None,
    timeout: Timeout = 600.0,
) -> int:
    """Record the inputs, the captured tensors and the proofs of one backend in a trace.

    `audit MODEL --trace FILE` on another machine compares it there, beside other backends.
    """
    if output.suffix.lower() != ".npz":
        raise UsageError(f"-o {output} does not end in .npz", "A trace is a .npz file.")
    check_writable(output)
    if any(path and path.resolve() == output.resolve() for path in (model, data)):
        raise UsageError(f"-o {output} would overwrite an input", "Choose another file.")
    specs = backend_specs([backend])
    if len(specs) != 1:
        raise UsageError("--backend names several backends", "Record one at a time.")
    options = engine_options(option, specs)
    shapes = dict(parse_shape(text) for text in shape or ())

    from auditor.audit import record
    from auditor.options import AuditOptions

    asked = AuditOptions(
        backends=specs,
        data=data,
        seed=seed,
        samples=samples,
        shapes=shapes,
        timeout=timeout,
        threads=threads,
        options=options,
    )
    with drafted(output) as draft:
        with displayed_progress() as progress:
            gap = record(model, asked, draft, progress)
        if gap is None:
            draft.replace(output)
    if gap is not None:
        from reports._progress import print_error

        why = f"nothing recorded: {gap.subject}, {gap.stage}: {gap.reason}"
        print_error(why, gap.remedy or "")
        return 3
    emit(f"{output}: {specs[0].label} recorded\n")
    return 0
