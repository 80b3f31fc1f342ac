"""``audit show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import Format, Report
from auditor.commands._output import destination_for, emit, screen
from auditor.errors import UsageError


@app.command(
    "show",
    short_help="Show a saved report again, or one layer in full.",
    epilog=examples("show report.json --layer s3", "show report.json -o report.html"),
)
def _show(
    report: Report,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Show one segment in full, by its id or a node or tensor name."
        ),
    ] = None,
    format: Format = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it to FILE."),
    ] = None,
) -> int:
    """Show a saved report again, or one of its layers in full; needs no engine.

    The fleet.json of `audit fleet` is shown as a matrix.
    """
    from reports import _fleet, json_v1
    from reports._segment import render_segment

    if _fleet.is_fleet(report):
        if layer or format or output:
            raise UsageError(
                "this is the report of a fleet, which is shown as a whole",
                "Give the report of one cell, beside it.",
            )
        emit(_fleet.render(_fleet.load(report), report.parent, *screen()))
        return 0
    destination = destination_for(format, output, [report])
    loaded = json_v1.load(report)
    if layer is None:
        destination.deliver(loaded)
    elif format or output:
        raise UsageError("--layer cannot be used with --format or -o", "Drop the other option.")
    else:
        emit(render_segment(loaded, layer, *screen()))
    return 0
