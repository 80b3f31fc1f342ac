"""A fleet's report: the matrix of models and backends in a terminal, and JSON.

``fleet_v1.schema.json`` beside this file publishes the JSON.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auditor.errors import UsageError
from auditor.records.fleet import FleetAttempt, FleetCell, FleetReport
from auditor.records.terms import SEVERITIES
from reports import _words as words
from reports._codec import ERROR, MalformedError, Records, parse
from reports._page import COLORS, Column, Page, Row, Span

FORMAT = "audit-fleet/1"
_MOST = 12  # cells and gaps shown; the JSON has all of them

# Times that are not finite are infinite, not unknown.
_REPORT = Records({(FleetAttempt, "seconds"): ERROR, (FleetReport, "seconds"): ERROR}).of(
    FleetReport
)


def dump(report: FleetReport) -> str:
    """The report as JSON; numbers that are not finite are null."""
    document: Any = _REPORT.dump(report)
    return json.dumps({"format": FORMAT} | document, indent=1, ensure_ascii=False) + "\n"


def is_fleet(path: Path) -> bool:
    """Whether a file says that it is such a report."""
    try:
        with path.open("rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(200)
    except OSError:
        return False


def load(path: Path) -> FleetReport:
    """The report of a file.

    Raises:
        UsageError: it cannot be read, or is not such a report.
    """
    data = parse(path)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise UsageError(f"{path} is no report of a fleet", "Give the fleet.json of audit fleet.")
    try:
        report: FleetReport = _REPORT.load(data, "")
    except MalformedError as error:
        raise UsageError(f"{path} is malformed at {error}", "Run the fleet again.") from error
    return report


def render(report: FleetReport, folder: Path, width: int | None, color: bool) -> str:
    """The matrix as text, and where to look closer.

    Args:
        report: what came of the work list.
        folder: where it and the reports of its cells are.
        width: columns of the terminal, None where unknown.
        color: whether to use colour.
    """
    report = words.visible(report)
    page = Page(width, color)
    page.rule(f"Fleet of {report.source}")
    where = f"on {report.cluster}" if report.cluster else "on this machine"
    said = f"{len(report.cells)} cells {where} in {report.seconds:.0f} s"
    page.say(
        Span(f" {report.verdict.upper()} ", COLORS[report.verdict]),
        Span(f"  exit code {report.exit_code}; {said}"),
    )
    page.rule("Largest divergence of an output, relative L2")
    _draw_matrix(page, report)
    _draw_worst(page, report, folder)
    _draw_gaps(page, report)
    _draw_nodes(page, report)
    return page.text()


def line(cell: FleetCell) -> str:
    """One cell in a few words."""
    return words.visible(f"{cell.model} on {cell.column}: {_figure(cell)}")


def _figure(cell: FleetCell) -> str:
    if cell.verdict is None:
        return "gap"
    if cell.relative_l2 is None and cell.mismatch is None:
        return cell.verdict
    error = "n/a" if cell.mismatch else words.error(cell.relative_l2)
    return error if cell.verdict == "pass" else f"{error} {cell.verdict}"


def _style(cell: FleetCell) -> str:
    return {"pass": "green", "fail": "red"}.get(cell.verdict or "", "yellow")


def _draw_matrix(page: Page, report: FleetReport) -> None:
    names = list(dict.fromkeys(cell.column for cell in report.cells))
    rows: dict[str, dict[str, FleetCell]] = defaultdict(dict)
    for cell in report.cells:
        rows[cell.model][cell.column] = cell
    columns = (Column("model"), *(Column(name, right=True) for name in names))
    lines = [
        Row(
            (
                Span(model, "bold"),
                *(
                    Span(_figure(cells[name]), _style(cells[name])) if name in cells else Span("")
                    for name in names
                ),
            )
        )
        for model, cells in rows.items()
    ]
    page.grid(columns, lines)


def _draw_worst(page: Page, report: FleetReport, folder: Path) -> None:
    def rank(cell: FleetCell) -> tuple[bool, float]:
        return cell.mismatch is None, -(cell.relative_l2 or 0.0)

    worst = sorted((cell for cell in report.cells if cell.verdict == "fail"), key=rank)
    page.rule("Look closer")
    page.say(Span(f"audit show {folder}/MODEL/BACKEND.json [--layer NAME]", "bold"))
    for cell in worst[:_MOST]:
        counts = ", ".join(
            f"{cell.findings[s]} {s}" for s in SEVERITIES[::-1] if s in cell.findings
        )
        cause = f"{cell.noise} {words.percent(cell.share)}" if cell.noise else "unexplained"
        first = f"; first {cell.offender}" if cell.offender else ""
        page.say(
            Span(f"{cell.model} on {cell.column}", "bold"),
            Span(f": {_figure(cell)}, {cause}; {counts or 'no findings'}{first}"),
            label=Span("  • "),
        )
        if cell.report:
            page.say(Span(f"{folder}/{cell.report}", "dim"), indent=4)
    if len(worst) > _MOST:
        page.say(Span(f"and {len(worst) - _MOST} more that fail; fleet.json has all", "dim"))


def _draw_gaps(page: Page, report: FleetReport) -> None:
    found: dict[tuple[str, str, str | None], list[str]] = defaultdict(list)
    for cell in report.cells:
        if cell.gap:
            found[cell.column, cell.gap.reason, cell.gap.remedy].append(cell.model)
    if not found:
        return
    page.rule("Not audited")
    for (column, reason, remedy), models in list(found.items())[:_MOST]:
        names = ", ".join(models[:3]) + (f" and {n} more" if (n := len(models) - 3) > 0 else "")
        page.say(
            Span(f"{names} on {column}: ", "bold"),
            Span(f"{reason} ({remedy})" if remedy else reason, "dim"),
            label=Span("gap  ", "dim"),
        )
    if len(found) > _MOST:
        page.say(Span(f"and {len(found) - _MOST} more reasons; fleet.json has all", "dim"))


def _draw_nodes(page: Page, report: FleetReport) -> None:
    counted: dict[str, int] = defaultdict(int)
    lost = 0
    for cell in report.cells:
        lost += sum(attempt.lost is not None for attempt in cell.attempts)
        if cell.attempts and cell.attempts[-1].lost is None:
            counted[cell.attempts[-1].node] += 1
    page.rule("Nodes")
    for node in report.nodes:
        has = ", ".join(f"{name} {value:g}" for name, value in sorted(node.resources.items()))
        gone = "" if node.alive else ", lost"
        count = counted[node.name]
        page.say(
            Span(node.name, "bold"),
            Span(f": {words.count(count, 'cell')}{gone}; {has or 'declares nothing'}"),
        )
    if lost:
        page.say(Span(f"{words.count(lost, 'attempt')} lost and made again."))
