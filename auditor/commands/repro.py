"""``audit repro``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._asked import again, asked_for
from auditor.commands._options import Report
from auditor.commands._output import emit
from auditor.commands._stop import displayed_progress
from auditor.errors import UsageError


@app.command(
    "repro",
    short_help="A small model and script that show one finding.",
    epilog=examples("repro report.json --finding 1 -o repro"),
)
def _repro(
    report: Report,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it must be new."),
    ],
    finding: Annotated[
        int, typer.Option(min=1, metavar="N", help="The finding, by its rank in the report.")
    ] = 1,
) -> int:
    """Write the smallest model, inputs and expected values that show a finding, and a script.

    The segment is cut out of the model and fed what the backend fed to it; each smaller part is
    built and run before it is kept. The script needs the backend alone, and is run once here:
    exit code 3 if it does not show the difference.
    """
    from auditor.repro import reproduce
    from auditor.repro_files import ISSUE, SCRIPT
    from reports import json_v1
    from reports._words import count

    loaded = json_v1.load(report)
    chosen = next((f for f in loaded.findings if f.rank == finding), None)
    if chosen is None:
        raise UsageError(
            f"the report has no finding {finding}", f"It has {len(loaded.findings)} findings."
        )
    if output.exists():
        raise UsageError(f"{output} exists", "Give -o a folder that does not exist yet.")
    options = asked_for(again(loaded.command).params, None)
    try:
        with displayed_progress() as progress:
            made = reproduce(loaded, chosen, options, output, progress)
    except OSError as error:
        raise UsageError(
            f"cannot write {output}: {error.strerror}", "Choose another folder."
        ) from error
    emit(
        f"{output}: a model of {count(made.nodes, 'node')} (the segment has {made.of}) shows a "
        f"relative L2 of {made.relative_l2:.1e} ({made.place}; "
        f"{count(made.trials, 'model')} tried)\n"
        f"{made.said}\n"
        f"Run it: python {output / SCRIPT}; text for an issue: {output / ISSUE}"
    )
    if not made.shown:
        emit("The script does not show the difference: the engine computes otherwise inside it.")
    return 0 if made.shown else 3
