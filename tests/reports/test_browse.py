"""``audit browse``, with Textual's own pilot, and by command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from textual.pilot import Pilot
from textual.widgets import DataTable, Input, Static

from auditor.records.report import AuditReport
from reports import json_v1
from reports._browse import Browser
from tests.helpers import audit_in

ROOT = Path(__file__).resolve().parents[2]


def browsed(report: AuditReport, act: Callable[[Browser, Pilot[None]], Awaitable[None]]) -> None:
    async def run() -> None:
        app = Browser(report)
        async with app.run_test(size=(140, 40)) as pilot:
            await pilot.pause()
            await act(app, pilot)

    asyncio.run(run())


def rows(app: Browser) -> list[str]:
    table = app.query_one(DataTable)
    return [" ".join(map(str, table.get_row_at(i))) for i in range(table.row_count)]


def detail(app: Browser) -> str:
    return str(app.query_one("#detail", Static).content)


def test_findings_segments_and_one_in_full(report: AuditReport) -> None:
    async def act(app: Browser, pilot: Pilot[None]) -> None:
        first, second = report.findings[:2]
        assert len(rows(app)) == len(report.findings)
        assert f"segment {first.segment}" in detail(app)
        await pilot.press("down")
        await pilot.pause()
        assert f"segment {second.segment}" in detail(app)
        await pilot.press("s")
        await pilot.pause()
        backends = [b for b in report.backends if b.segments]
        assert len(rows(app)) == len(backends[0].segments)
        await pilot.press("b")
        await pilot.pause()
        following = backends[1 % len(backends)]
        assert app.sub_title == f"segments of {following.id}"
        assert f"{following.id}, segment {following.segments[0].id}" in detail(app)
        await pilot.press("f")
        await pilot.pause()
        assert app.sub_title == "findings"

    browsed(report, act)


def test_a_filter(report: AuditReport) -> None:
    async def act(app: Browser, pilot: Pilot[None]) -> None:
        wanted = report.findings[-1].segment
        node = report.findings[-1].nodes[0]
        await pilot.press("slash")
        app.query_one(Input).value = node
        await pilot.pause()
        assert 0 < len(rows(app)) <= len(report.findings)
        assert f"segment {wanted}" in detail(app) or len(rows(app)) > 1
        await pilot.press("escape")
        await pilot.pause()
        assert len(rows(app)) == len(report.findings)
        app.query_one(Input).value = "no such thing"
        await pilot.pause()
        assert rows(app) == [] and "Nothing to show" in detail(app)

    browsed(report, act)


def test_names_are_no_markup(report: AuditReport) -> None:
    evil = "[red]x[/red]\x1b[2J"
    finding = replace(report.findings[0], nodes=(evil,))
    hostile = replace(report, findings=(finding,), model=replace(report.model, path=evil))

    async def act(app: Browser, pilot: Pilot[None]) -> None:
        assert r"[red]x[/red]\x1b[2J" in rows(app)[0]
        assert r"[red]x[/red]\x1b[2J" in str(app.query_one("#head", Static).content)

    browsed(hostile, act)


def test_a_report_without_anything(report: AuditReport) -> None:
    empty = replace(report, findings=(), backends=())

    async def act(app: Browser, pilot: Pilot[None]) -> None:
        for key in ("s", "b", "f", "slash", "escape"):
            await pilot.press(key)
        assert rows(app) == []

    browsed(empty, act)


def test_it_needs_a_terminal(report: AuditReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json_v1.dump(report)))
    done = audit_in(ROOT, "browse", path)
    assert done.returncode == 2 and "needs a terminal" in done.stderr
