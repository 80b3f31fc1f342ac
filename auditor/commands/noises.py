"""``audit noises``."""

from __future__ import annotations

from auditor.commands._app import app, examples
from auditor.commands._output import emit, screen


@app.command("noises", epilog=examples("noises"))
def _noises() -> int:
    """List the causes of divergence that can be replayed."""
    from auditor import discovery
    from reports._lists import render_noises

    width, color = screen()
    emit(render_noises(discovery.noises(), width, color))
    return 0
