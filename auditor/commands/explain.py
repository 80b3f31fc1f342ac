"""``audit explain``."""

from __future__ import annotations

from typing import Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._output import emit, screen


@app.command(
    "explain",
    short_help="Explain one cause of divergence in full.",
    epilog=examples("explain precision.bf16"),
)
def _explain(
    id: Annotated[str, typer.Argument(metavar="ID", help="A cause that `audit noises` lists.")],
) -> int:
    """Explain one cause: what it is, where it applies, the forms tested, and what to do."""
    from auditor import discovery
    from reports._lists import render_noise

    emit(render_noise(discovery.noise(id), *screen()))
    return 0
