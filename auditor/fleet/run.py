"""From a work list to one report: every cell once, whatever happens to the machines."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

from auditor import __version__
from auditor.errors import UsageError
from auditor.fleet.node import Outcome
from auditor.fleet.worklist import Cell
from auditor.records.backend import Gap
from auditor.records.fleet import FleetAttempt, FleetCell, FleetNode, FleetReport
from auditor.records.report import AuditReport
from auditor.records.terms import SEVERITIES, Verdict

_TICK = 2.0  # seconds after which it is looked again which nodes there are
_BUG = 4  # exit code of an internal error
# What an exit code is worth: findings win over what could not be audited, as in an audit.
_WORST_LAST = (0, 3, 2, 1, _BUG)


class LostError(Exception):
    """Nothing came of a job: its node or its process is gone. The message says what happened."""

    def __init__(self, message: str, node: str = "") -> None:
        """``node`` is where that was, if it is known."""
        super().__init__(message)
        self.node = node


class Pool(Protocol):
    """Machines. A job is whatever ``start`` returned."""

    @property
    def address(self) -> str | None:
        """Where the cluster is; None for this machine alone."""

    def nodes(self) -> tuple[FleetNode, ...]:
        """Every machine seen so far."""

    def misses(self, cell: Cell) -> str | None:
        """Why no machine that is there now can take the cell; None where one can."""

    def start(self, cell: Cell) -> Any:
        """Queue a cell."""

    def ended(self, jobs: Collection[Any], seconds: float) -> Collection[Any]:
        """The jobs that have ended, as soon as there is one or the time is over."""

    def outcome(self, job: Any) -> Outcome:
        """What an ended job gave.

        Raises:
            LostError: nothing.
        """

    def cancel(self, job: Any) -> None:
        """End a job, or take it back."""

    def ship(self, cell: Cell) -> None:
        """From now on give the cell's files along with it."""

    def close(self) -> None:
        """End everything that is running."""


class Fleet:
    """One run of a work list.

    A cell has one job at a time, and a job that is given up is never asked again for what it
    gave: no cell can come into the report twice.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        pool: Pool,
        keep: Callable[[Cell, str], AuditReport],
        tell: Callable[[FleetCell, int, float | None], None],
        *,
        retries: int,
        patience: float,
    ) -> None:
        """Nothing is started yet.

        Args:
            cells: what to audit.
            pool: on which machines.
            keep: stores a cell's report, given as JSON, and reads it; raises UsageError where it
                is no report.
            tell: is given each finished cell, how many are left and for how many seconds.
            retries: how often a cell is started again that was lost with its node.
            patience: seconds to wait for a node, once nothing else is running.
        """
        self._cells = cells
        self._pool = pool
        self._keep = keep
        self._tell = tell
        self._retries = retries
        self._patience = patience
        self._attempts: dict[Cell, list[FleetAttempt]] = defaultdict(list)
        self._done: dict[Cell, FleetCell] = {}
        self._begin = time.monotonic()

    def run(self) -> None:
        """Audit every cell; returns when each has a report or a gap."""
        held = list(self._cells)  # in the order of the list
        running: dict[Any, tuple[Cell, float]] = {}
        idle_since: float | None = None
        while held or running:
            now = time.monotonic()
            lacking = {cell: self._pool.misses(cell) for cell in held}
            for cell in [cell for cell in held if lacking[cell] is None]:
                running[self._pool.start(cell)] = cell, now
                held.remove(cell)
            if not running:
                idle_since = idle_since or now
                if now - idle_since >= self._patience:
                    for cell in held:
                        self._finish(cell, gap=_unscheduled(cell, lacking[cell]))
                    return
                time.sleep(min(_TICK, self._patience))
                continue
            idle_since = None
            ended = self._pool.ended(tuple(running), _TICK)
            for job in ended:
                cell, start = running.pop(job)
                held += self._ended(cell, job, start)
            for job, (cell, _) in list(running.items()):
                if not ended and self._pool.misses(cell) is not None:  # it waits in vain
                    self._pool.cancel(job)
                    del running[job]
                    held.append(cell)

    def report(self, source: str) -> FleetReport:
        """Everything so far; a cell that has not come to an end is a gap."""
        stopped = Gap("fleet", "run", "the fleet was stopped before this cell", "Run it again.")
        cells = tuple(self._done.get(cell) or self._cell(cell, gap=stopped) for cell in self._cells)
        codes = [3 if cell.exit_code is None else cell.exit_code for cell in cells]
        code = max(codes, key=lambda c: _WORST_LAST.index(c if c in _WORST_LAST else _BUG))
        verdict: Verdict = "pass" if code == 0 else "fail" if code == 1 else "incomplete"
        return FleetReport(
            tool_version=__version__,
            source=source,
            cluster=self._pool.address,
            nodes=self._pool.nodes(),
            cells=cells,
            verdict=verdict,
            exit_code=code,
            seconds=time.monotonic() - self._begin,
        )

    def _ended(self, cell: Cell, job: Any, start: float) -> list[Cell]:
        """Take what a job gave; the cell again where it has to be started again."""
        attempts = self._attempts[cell]
        try:
            outcome = self._pool.outcome(job)
            if outcome.code < 0:
                raise LostError(f"its audit was ended by signal {-outcome.code}", outcome.node)
        except LostError as error:
            lost = FleetAttempt(error.node, time.monotonic() - start, str(error))
            attempts.append(lost)
            if sum(attempt.lost is not None for attempt in attempts) <= self._retries:
                return [cell]
            tried = f"{len(attempts)} times, and was lost each time"
            remedy = "Look at that node's log and memory; --retries allows more attempts."
            gap = Gap("fleet", "node", f"started {tried}: {error}", remedy)
            self._finish(cell, gap=gap)
            return []
        if outcome.lacking:
            self._pool.ship(cell)
            return [cell]
        attempts.append(FleetAttempt(outcome.node, outcome.seconds))
        if outcome.report is None or outcome.code not in (0, 1, 3):
            self._finish(cell, code=outcome.code, gap=_failed(outcome))
            return []
        try:
            report = self._keep(cell, outcome.report)
        except UsageError as error:
            gap = Gap("fleet", "report", f"its report is lost: {error.message}", error.hint)
            self._finish(cell, gap=gap)
            return []
        self._done[cell] = self._summed_up(cell, outcome.code, report)
        self._told(cell)
        return []

    def _finish(self, cell: Cell, gap: Gap, code: int | None = None) -> None:
        self._done[cell] = self._cell(cell, gap=gap, code=code)
        self._told(cell)

    def _told(self, cell: Cell) -> None:
        left = [other for other in self._cells if other not in self._done]
        self._tell(self._done[cell], len(left), self._time_left(left))

    def _time_left(self, cells: Sequence[Cell]) -> float | None:
        """Seconds for what is left, at the rate of what is done; None where nothing was run."""
        spent: dict[str, list[float]] = defaultdict(list)
        for cell in self._done:
            spent[cell.column] += [attempt.seconds for attempt in self._attempts[cell]]
        every = [seconds for column in spent.values() for seconds in column]
        if not every:
            return None
        usual = sum(every) / len(every)
        rate = sum(every) / max(time.monotonic() - self._begin, 1e-3)  # audits at a time
        ahead = (spent.get(cell.column) or [usual] for cell in cells)
        return sum(sum(column) / len(column) for column in ahead) / rate

    def _cell(self, cell: Cell, *, gap: Gap | None = None, code: int | None = None) -> FleetCell:
        return FleetCell(
            model=cell.model,
            column=cell.column,
            backend=cell.backend,
            options=dict(cell.options),
            exit_code=code,
            gap=gap,
            attempts=tuple(self._attempts[cell]),
        )

    def _summed_up(self, cell: Cell, code: int, report: AuditReport) -> FleetCell:
        backend = next((b for b in report.backends if b.id == cell.backend), None)
        distances = [output.distance for output in backend.outputs] if backend else []
        worst = max(distances, key=lambda distance: distance.relative_l2, default=None)
        shares = backend.categories if backend else ()
        cause = max(shares, key=lambda share: share.share, default=None)
        findings = [finding.severity for finding in report.findings]
        first = report.findings[0] if report.findings else None
        return replace(
            self._cell(cell, code=code, gap=backend.gap if backend else None),
            verdict=report.verdict,
            report=cell.report,
            sha256=report.model.sha256,
            relative_l2=worst.relative_l2 if worst else None,
            mismatch=worst.mismatch if worst else None,
            findings={s: findings.count(s) for s in reversed(SEVERITIES) if s in findings},
            noise=cause.noise if cause else None,
            share=cause.share if cause else None,
            offender=first.nodes[0] if first and first.nodes else None,
            gaps=len(report.gaps),
        )


def _unscheduled(cell: Cell, why: str | None) -> Gap:
    declared = ", ".join(f'"{name}": 1' for name in cell.needs)
    remedy = f"Give --address of a cluster with a node that has it: --resources='{{{declared}}}'."
    return Gap("fleet", "schedule", f"no machine can take it: {why}", remedy)


def _failed(outcome: Outcome) -> Gap:
    """Why an audit gave no report, in its own words."""
    said: dict[str, list[str]] = {"error": [], "hint": []}
    into: list[str] | None = None
    for line in outcome.said.splitlines():
        label, colon, text = line.partition(": ")
        if colon and label in said:
            into = said[label]
            into.append(text)
        elif into is not None and line.startswith("  "):
            into.append(line.strip())
        else:
            into = None
    reason = " ".join(said["error"]) or f"it ended with exit code {outcome.code}"
    log = tuple(outcome.said.splitlines()[-20:])
    return Gap("fleet", "audit", reason, " ".join(said["hint"]) or None, log)
