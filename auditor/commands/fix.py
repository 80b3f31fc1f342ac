"""``audit fix``."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._asked import again, asked_for
from auditor.commands._options import Report
from auditor.commands._output import check_writable, emit, screen
from auditor.commands._stop import displayed_progress
from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.fix import Fixing


@app.command(
    "fix",
    short_help="Search and verify the smallest change within a limit.",
    epilog=examples("fix report.json --backend ov -o model.xml", "fix report.json --to 1e-3"),
)
def _fix(
    report: Report,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="ID[:DEVICE]", help="The backend; the one that diverges most when not given."
        ),
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
            "--output",
            "-o",
            metavar="FILE",
            help="Write what the change makes: a FILE.onnx, or for layers "
            "kept in float32 OpenVINO's FILE.xml and FILE.bin.",
        ),
    ] = None,
) -> int:
    """Search the smallest change that brings a backend near the reference, and build it.

    Tried are the layers to blame in float32 where OpenVINO computes in fewer bits, engine options
    that leave a cause out, and equivalent ways to write the layers, in the order of their effect,
    six builds at most. A rewritten model must compute the same on the reference. Exit code 0 when
    the limit is reached, 1 when not.
    """
    from auditor.fix import fix
    from auditor.verdict import policy as rulebook
    from reports import _fix as table
    from reports import json_v1

    if output is not None:
        check_writable(output.resolve())
        if output.suffix.lower() not in (".onnx", ".xml") or output.exists():
            raise UsageError(f"-o {output} is no new .onnx or .xml file", "Choose another name.")
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
        limit = rules.tolerance(chosen.id, [o.name for o in chosen.outputs])
    options = asked_for(again(loaded.command).params, None)
    form = output.suffix.lower() if output else None
    with TemporaryDirectory(prefix="audit-fix-") as scratch:
        with displayed_progress() as progress:
            found = fix(loaded, chosen, options, limit, Path(scratch), progress, form)
        told = found.report
        others = {f.backend for f in loaded.findings} & worst.keys() - {name}
        if backend is None and others:
            note = f"Findings on {', '.join(sorted(others))} are left: --backend ID is for those."
            told = replace(told, notes=(*told.notes, note))
        emit(table.render(told, *screen()))
        if output is not None:
            emit(_written(found, output))
    reached = found.report.chosen is not None or found.report.before <= found.report.limit
    return 0 if reached else 1


def _written(found: Fixing, output: Path) -> str:
    """Write what the chosen change makes; what was done, or why nothing was."""
    import onnx

    draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    if found.artifact is not None:
        if output.suffix.lower() != found.artifact.suffix:
            return f"{output} was not written: this change needs -o FILE{found.artifact.suffix}"
        weights = output.with_suffix(".bin")
        if weights.exists():
            return f"{output} was not written: {weights} exists"
        shutil.move(found.artifact.with_suffix(".bin"), weights)
        shutil.move(found.artifact, draft)
    elif found.model is not None and output.suffix.lower() == ".onnx":
        onnx.save(found.model, draft)
    else:
        return f"{output} was not written: no change that makes such a file was chosen"
    draft.replace(output)
    return f"{output}: the model so changed"
