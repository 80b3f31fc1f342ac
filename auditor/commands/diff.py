"""``audit diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from auditor.commands._app import app, examples
from auditor.commands._output import check_writable, emit, screen, write


@app.command(
    "diff",
    short_help="Say what changed from one report to another.",
    epilog=examples(
        "diff release.json next.json", "diff release.json next.json --format json -o changes.json"
    ),
)
def _diff(
    old: Annotated[
        Path, typer.Argument(metavar="OLD.json", help="The earlier report, written by audit -o.")
    ],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="The later one.")],
    format: Annotated[
        Literal["terminal", "json"], typer.Option(help="How to write the comparison.")
    ] = "terminal",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to FILE.")
    ] = None,
) -> int:
    """Say what changed from one report to another: findings, divergence, versions, kernels.

    The exit code is 1 when something is new or worse or is not compared any more, and 0 otherwise.
    """
    from auditor import diff
    from reports import json_v1
    from reports._diff import dump, render

    if output is not None:
        check_writable(output.resolve())
    comparison = diff.compare(json_v1.load(old), json_v1.load(new), str(old), str(new))
    width, color = screen()
    if format == "json":
        text = dump(comparison)
    else:
        text = render(comparison, None if output else width, color and output is None)
    if output is not None:
        write(output.resolve(), text)
    else:
        emit(text)
    return 1 if comparison.regressions else 0
