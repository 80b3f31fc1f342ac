"""``audit init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import Report
from auditor.commands._output import check_writable, emit, write
from auditor.errors import UsageError


@app.command(
    "init",
    short_help="Write a policy for releases from a first report.",
    epilog=examples("init report.json"),
)
def _init(
    report: Report,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The policy file to write.")
    ] = Path("audit.toml"),
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file if it is there already.")
    ] = False,
) -> int:
    """Write a commented policy: tolerances a little above what a first audit measured.

    `audit` finds audit.toml in the current folder by itself.
    """
    from auditor.verdict.proposal import proposed
    from reports import json_v1

    output = output.resolve()
    if output.exists() and not force:
        raise UsageError(f"{output} is there already", "Give --force to replace it, or another -o.")
    check_writable(output)
    write(output, proposed(json_v1.load(report), str(report)))
    emit(f"wrote {output}\n")
    return 0
