"""``audit rerun``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditor.commands._app import UNRULED, app, examples
from auditor.commands._asked import again
from auditor.commands._options import Format, Report


@app.command(
    "rerun",
    short_help="Run the audit of a saved report again.",
    epilog=examples("rerun report.json --baseline"),
)
def _rerun(
    report: Report,
    format: Format = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the new report to FILE."),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Fail only on what is new or worse than in REPORT.json."),
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Build and measure everything anew.")
    ] = False,
) -> int:
    """Run the audit that made a report again, with the same arguments, in the same folder.

    Models, data and policies are read from where the report's command names them; what the
    command wrote is not written again, and a policy of the folder counts only if one did before.
    """
    from reports import json_v1

    earlier = json_v1.load(report)
    context = again(earlier.command)
    # A policy that lies here by now is none of the audit that is made again.
    context.meta[UNRULED] = earlier.judgement is None
    context.params.update(format=format, output=output)
    if no_cache:
        context.params["cache"] = False
    if baseline:
        context.params["baseline"] = report
    with context:
        return int(context.command.invoke(context) or 0)
