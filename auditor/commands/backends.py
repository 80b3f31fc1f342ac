"""``audit backends``."""

from __future__ import annotations

from auditor.commands._app import app, examples
from auditor.commands._output import emit, screen


@app.command(
    "backends",
    short_help="List what is available here, or how to get it.",
    epilog=examples("backends"),
)
def _backends() -> int:
    """List the backends and their devices here, or why one is missing and how to get it."""
    from auditor import discovery
    from auditor.processes import worker
    from reports._lists import render_backends

    rows = worker.probe(discovery.backend_ids())
    width, color = screen()
    emit(render_backends(rows, width, color))
    return 0
