"""``audit fleet``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from auditor.commands._app import app, examples
from auditor.commands._output import emit, make_folder, screen, write

if TYPE_CHECKING:
    from auditor.fleet.run import Pool
    from auditor.fleet.worklist import Cell
    from auditor.records.fleet import FleetCell, FleetReport
    from auditor.records.report import AuditReport


@app.command(
    "fleet",
    short_help="Audit many models on many backends, here or on a cluster.",
    epilog=examples("fleet fleet.toml --jobs 2 -o night", "fleet fleet.toml --address auto"),
)
def _fleet(
    worklist: Annotated[
        Path, typer.Argument(metavar="FLEET.toml", help="Which models on which backends.")
    ],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A Ray cluster: auto, host:port or ray://host:port; this machine when not given.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder of fleet.json and of every cell's own report.",
        ),
    ] = Path("fleet-report"),
    jobs: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Without a cluster: how many audits at a time."),
    ] = 1,
    retries: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="How often to start a cell again that was lost."),
    ] = 3,
    wait: Annotated[
        float,
        typer.Option(
            min=0, metavar="S", help="How long to wait for nodes, once nothing else is running."
        ),
    ] = 10.0,
    format: Annotated[
        Literal["terminal", "json"], typer.Option(help="What is printed; -o has the JSON.")
    ] = "terminal",
) -> int:
    """Audit a work list, model by model and backend by backend, and report it as one matrix.

    Every cell is an audit of its own. A cell whose node is lost is started again on another; one
    that no node can take is a gap. The exit code is the worst of the audits': 4, 1, 2, 3, 0.
    """
    from auditor.fleet import worklist as lists

    cells = lists.load(worklist)
    make_folder(output, "fleet.json", "Choose another with -o.")

    from auditor.fleet.run import Fleet
    from reports import _fleet as table
    from reports import json_v1

    def keep(cell: Cell, text: str) -> AuditReport:
        path = output / cell.report
        make_folder(path.parent, path.name, "Choose another with -o.")
        write(path, text)
        return json_v1.load(path)

    def tell(cell: FleetCell, left: int, seconds: float | None) -> None:
        done = len(cells) - left
        where = next((f" on {a.node}" for a in cell.attempts[-1:] if a.node), "")
        took = f", {sum(a.seconds for a in cell.attempts):.1f} s" if cell.attempts else ""
        ahead = f"; about {_spoken(seconds)} left" if left and seconds is not None else ""
        save()
        typer.echo(f"[{done}/{len(cells)}] {table.line(cell)}{took}{where}{ahead}", err=True)

    def save() -> FleetReport:
        report = fleet.report(str(worklist))
        write(output / "fleet.json", table.dump(report))
        return report

    pool = _pool(address, jobs)
    fleet = Fleet(cells, pool, keep, tell, retries=retries, patience=wait)
    try:
        fleet.run()
    finally:  # what was measured before a Ctrl-C is kept, and the rest is named
        report = save()
        pool.close()
    emit(table.dump(report) if format == "json" else table.render(report, output, *screen()))
    return report.exit_code


def _pool(address: str | None, jobs: int) -> Pool:
    if address is not None:
        from auditor.fleet.cluster import Cluster

        return Cluster(address)
    from auditor.fleet.local import Local

    return Local(jobs)


def _spoken(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
