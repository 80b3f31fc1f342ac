"""``audit fix``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from auditor.commands._app import app
from auditor.commands._asked import again, asked_for
from auditor.commands._options import Report
from auditor.commands._output import check_writable, emit, screen
from auditor.commands._stop import StoppableProgress
from auditor.errors import UsageError


@app.command("fix", short_help="Search and verify the smallest change within a limit.")
def _fix(
    report: Report,
    backend: Annotated[
        str | None,
        typer.Option(metavar="ID[:DEVICE]", help="The backend; the one that diverges most."),
    ] = None,
    to: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="L2",
            help="Relative L2 of the outputs to reach; the policy's tolerance when not given, or a "
            "tenth of what it is.",
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Whose tolerance to reach; ./audit.toml or [tool.auditor] in ./pyproject.toml "
            "when not given.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.onnx", help="Write the model that the change makes."
        ),
    ] = None,
) -> int:
    """Search the smallest change that brings a backend near the reference, and build it.

    Tried are engine options that leave a cause out, and equivalent ways to write the layers to
    blame, in the order of their effect, six builds at most. A rewritten model must compute the
    same on the reference. Exit code 0 when the limit is reached, 1 when not.
    """
    import onnx

    from auditor import policy as rulebook
    from auditor.fix import fix
    from reports import _fix as table
    from reports import json_v1
    from reports.terminal import LiveProgress

    if output is not None:
        check_writable(output.resolve())
        if output.suffix.lower() != ".onnx" or output.exists():
            raise UsageError(f"-o {output} is no new .onnx file", "Choose another name.")
    loaded = json_v1.load(report)
    audited = [b for b in loaded.backends if b.status == "audited" and b.outputs]
    worst = {b.id: max(o.distance.relative_l2 for o in b.outputs) for b in audited}
    name = backend or max(worst, key=worst.__getitem__, default="")
    chosen = next((b for b in audited if b.id == name), None)
    if chosen is None:
        raise UsageError(
            f"the report compares no backend `{name}`", f"It has: {', '.join(worst) or 'none'}."
        )
    rules = rulebook.load(policy) if policy else rulebook.find(Path())
    limit = to
    if limit is None and rules is not None:
        limit = rulebook.tolerance(rules, chosen.id, [o.name for o in chosen.outputs])
    options = asked_for(again(loaded.command).params, None)
    progress = StoppableProgress(LiveProgress())
    try:
        found = fix(loaded, chosen, options, limit, progress)
    finally:
        progress.close()
    emit(table.render(found.report, *screen()))
    if output is not None and found.model is not None:
        draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        onnx.save(found.model, draft)
        draft.replace(output)
        emit(f"{output}: the model so changed")
    reached = found.report.chosen is not None or found.report.before <= found.report.limit
    return 0 if reached else 1
