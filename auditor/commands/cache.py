"""``audit cache``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from auditor.commands._app import app, examples
from auditor.commands._output import emit
from auditor.errors import UsageError


@app.command(
    "cache",
    short_help="Show, clear or limit what audits remember.",
    epilog=examples("cache", "cache limit 8G", "cache clear"),
)
def _cache(
    action: Annotated[
        Literal["show", "clear", "limit"],
        typer.Argument(help="show what is there, clear it, or limit its size."),
    ] = "show",
    size: Annotated[
        str | None, typer.Argument(metavar="[SIZE]", help="With limit: such as 8G or 500M.")
    ] = None,
) -> int:
    """Show, clear or limit the cache of builds and traces.

    Audits of the same model, inputs, engine, options, threads and processor take what was traced
    before from there, with its proof, and say so; `--no-cache` leaves it out. SYSNOISE_CACHE names
    another folder, or `off`.
    """
    from auditor.processes import cache

    if (size is None) == (action == "limit"):
        raise UsageError(
            "audit cache limit takes a size" if size is None else f"`{action}` takes no size",
            "Write audit cache limit 8G." if size is None else f"Write audit cache {action}.",
        )
    folder = cache.folder()
    if folder is None:
        emit("The cache is off (SYSNOISE_CACHE, or no home folder).")
        return 0
    store = cache.Store(folder)
    if action == "clear":
        emit(f"{_size(store.clear())} freed in {folder}")
        return 0
    if size is not None:
        store.set_limit(cache.parse_size(size))
    used = store.usage()
    entries = "1 entry" if used.entries == 1 else f"{used.entries} entries"
    emit(f"{used.folder}: {entries}, {_size(used.size)} of at most {_size(used.limit)}")
    return 0


def _size(bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if bytes >= unit:
            return f"{bytes / unit:.1f} {name}"
    return f"{bytes} bytes"
