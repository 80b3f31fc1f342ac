"""``audit browse``."""

from __future__ import annotations

import sys

from auditor.commands._app import app, examples
from auditor.commands._options import Report
from auditor.errors import UsageError


@app.command(
    "browse",
    short_help="Move about in a saved report, in the terminal.",
    epilog=examples("browse report.json"),
)
def _browse(report: Report) -> int:
    """Move about in a saved report: the ranking, the segments of a backend, one in full."""
    from reports import json_v1

    loaded = json_v1.load(report)
    try:
        from reports._browse import Browser
    except ImportError as error:
        raise UsageError(
            f"textual cannot be imported: {error}",
            "Install it: pip install 'sysnoise-auditor[browse]'.",
        ) from error
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "audit browse needs a terminal", "`audit show` prints the report, `-o x.html` draws it."
        )
    Browser(loaded).run()
    return 0
