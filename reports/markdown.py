r"""The report as Markdown: a comment on a pull request, or the summary of a job.

Written for GitHub Flavored Markdown, and below the 65,536 characters that GitHub allows a comment:
what does not fit is counted, and the JSON report has it.

Names and messages come from model files and engines. Names are code spans, in which GFM interprets
nothing and GitHub looks for neither mentions nor references; the two characters that could end one
or a table's cell, ` and |, are written \x60 and \x7c. In sentences every character that Markdown,
HTML or GitHub gives a meaning is escaped.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from reports import _words as words

if TYPE_CHECKING:
    from auditor.records.backend import Gap
    from auditor.records.report import AuditReport, Finding, PipelineStep

LIMIT = 65_000  # bytes, hence characters too; leaves room for a marker that a bot adds

_TOP = 10  # findings shown without unfolding
_MOST_OUTPUTS = 4
_MOST_EVIDENCE = 4
_NAME = 100  # characters of a name
_TEXT = 600  # characters of a message

_MARKS = {"pass": "✅", "fail": "❌", "incomplete": "⚠️"}


class _Markdown:
    """Report format ``markdown``."""

    name = "markdown"
    suffixes = (".md", ".markdown")

    def render(self, report: AuditReport, *, width: int | None, color: bool) -> str:
        """The report, the verdict first, as far as a comment has room."""
        report = words.visible(report)
        page = _Page()
        page.add(_verdict(report))
        if report.pipeline:
            page.add(_STEPS, map(_step_row, report.pipeline.steps), what="steps", most=LIMIT // 10)
        page.add(_BACKENDS, _backends(report), what="outputs", most=LIMIT * 3 // 10)
        if report.findings:
            top = map(_finding_row, report.findings[:_TOP])
            page.add(_FINDINGS, top, what="findings", most=LIMIT * 2 // 10)
        else:
            page.add("\nNo segment introduced an error above its floor.\n")
        notes = list(_notes(report))
        none = "No gaps: everything asked for was compared.\n"
        page.add(
            "\n### Not audited, and notes\n\n" + ("" if notes else none),
            notes,
            what="gaps and notes",
            most=LIMIT * 3 // 10,
        )
        if report.findings:
            found = words.count(len(report.findings), "finding")
            page.add(
                f"\n<details><summary>{found} with evidence</summary>\n",
                map(_evidence, report.findings),
                "\n</details>\n",
                what="findings",
            )
        return page.text()


RENDERER = _Markdown()


class _Page:
    """Markdown that stays below ``LIMIT`` bytes."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._size = 0

    def text(self) -> str:
        """Everything added."""
        return "".join(self._parts)

    def add(
        self, head: str, rows: Iterable[str] = (), tail: str = "", *, what: str = "", most: int = 0
    ) -> None:
        """A section: its head, as many rows as there is room for, how many are missing, its tail.

        Args:
            head: text before the rows.
            rows: whole lines, the most important first.
            tail: text after the rows.
            what: the word for the rows.
            most: bytes that the section may take; all that are left when 0.
        """
        room = (
            min(most or LIMIT, LIMIT - self._size) - _bytes(head + tail) - _bytes(_more(9**9, what))
        )
        kept: list[str] = []
        left = 0
        for row in rows:
            room -= _bytes(row)
            if left or room < 0:
                left += 1
            else:
                kept.append(row)
        part = "".join([head, *kept, _more(left, what) if left else "", tail])
        self._parts.append(part)
        self._size += _bytes(part)


def _bytes(text: str) -> int:
    return len(text.encode())


def _more(number: int, what: str) -> str:
    return f"\n{number} more {what} in the JSON report (`-o report.json`).\n"


# --- the sections --------------------------------------------------------------------------------


def _verdict(report: AuditReport) -> str:
    model, stimulus, reference = report.model, report.stimulus, report.reference
    candidate = f", compared with {_code(model.candidate)}" if model.candidate else ""
    outlier = f"\n- Outlier: {_code(report.outlier)}" if report.outlier else ""
    source = f" from {_code(stimulus.source)}" if stimulus.source else ""
    seed = f", seed {stimulus.seed}" if stimulus.seed is not None else ""
    random = " ⚠️ not your data" if stimulus.kind == "synthetic" else ""
    samples = words.count(stimulus.samples, f"{stimulus.kind} sample")
    return (
        f"## {_MARKS[report.verdict]} {report.verdict.upper()}: "
        f"{_code(os.path.basename(model.path) or model.path)}\n\n"
        f"Exit code {report.exit_code}: {_prose(words.headline(report))}.\n\n"
        f"{_judgement(report)}"
        f"- Model: {_code(model.path)}, sha256 {_code(model.sha256[:12])}{candidate}\n"
        f"- Inputs: {samples}{source}{seed}{random}\n"
        f"- Reference: {_prose(words.reference(reference))}"
        f"{outlier}\n"
    )


def _judgement(report: AuditReport) -> str:
    """The rules that do not hold, as a list; that all do, where there are any."""
    judgement = report.judgement
    if judgement is None:
        return ""
    if not judgement.broken:
        return f"Every rule of {_code(judgement.source)} holds.\n\n"
    rules = [f"- {_prose(words.elide(rule.sentence, 300))}\n" for rule in judgement.broken[:_TOP]]
    more = len(judgement.broken) - len(rules)
    rest = f"- and {more} more in the JSON report\n" if more else ""
    return f"Broken rules of {_code(judgement.source)}:\n\n{''.join(rules)}{rest}\n"


_STEPS = (
    "\n### Around the network: deployment against training\n\n"
    "| step | training | deployment | introduced | effect | share |\n"
    "|---|---|---|--:|--:|--:|\n"
)


def _step_row(step: PipelineStep) -> str:
    effect = "not measured" if step.effect is None else words.error(step.effect)
    return _row(
        _code(step.name),
        _prose(step.training),
        _prose(step.deployment),
        words.error(step.introduced),
        effect,
        words.percent(step.share),
    )


_BACKENDS = (
    "\n### Backends: final divergence from the reference\n\n"
    "| backend | output | rel. L2 | max abs | SQNR dB | cosine | top-1 | causes | proof |\n"
    "|---|---|--:|--:|--:|--:|--:|---|---|\n"
)


def _backends(report: AuditReport) -> Iterator[str]:
    """A line per output of every backend, the farthest first."""
    for backend in report.backends:
        who = _code(backend.id)
        if not backend.outputs:
            reason = backend.gap.reason if backend.gap else "no output was compared"
            yield _row(who, f"⚠️ {_prose(reason)}", *[""] * 7)
            continue
        proof = backend.fidelity
        good = proof is not None and words.proved(proof)
        said = words.proof(proof) if proof else "not proved: nothing was captured"
        beside = (_prose(words.causes(backend)), f"{'✅' if good else '⚠️'} {_prose(said)}")
        worst = sorted(backend.outputs, key=lambda o: -o.distance.relative_l2)
        for number, output in enumerate(worst[:_MOST_OUTPUTS]):
            d = output.distance
            first = (who, _code(output.name)) if number == 0 else ("", _code(output.name))
            last = beside if number == 0 else ("", "")
            if math.isinf(d.relative_l2):
                reason = d.mismatch or "values cannot be compared"
                yield _row(*first, f"❌ {_prose(reason)}", *[""] * 4, *last)
                continue
            yield _row(
                *first,
                words.error(d.relative_l2),
                words.plain(d.max_abs),
                words.decibels(d.sqnr_db),
                words.cosine(d.cosine),
                words.percent(output.top1_agreement),
                *last,
            )
        if (more := len(worst) - _MOST_OUTPUTS) > 0:
            yield _row("", f"and {more} more, closer than these", *[""] * 7)


_FINDINGS = (
    "\n### Ranked offenders\n\n"
    "| # | severity | backend | impact | introduced | explained | cause | where |\n"
    "|--:|---|---|--:|--:|--:|---|---|\n"
)


def _finding_row(finding: Finding) -> str:
    return _row(
        str(finding.rank),
        finding.severity,
        _code(finding.backend),
        words.percent(finding.leave_one_in),
        words.error(finding.introduced),
        words.percent(finding.explained),
        _code(finding.noise) if finding.noise else "unexplained",
        _place(finding),
    )


def _place(finding: Finding) -> str:
    if not finding.nodes:
        return _code(finding.segment)
    more = f" and {len(finding.nodes) - 1} more" if len(finding.nodes) > 1 else ""
    kinds = finding.stage if words.of_step(finding) else ", ".join(finding.op_types)
    operators = _prose(words.elide(kinds, _NAME))
    source = words.modules(finding.modules, _NAME)
    return f"{_code(finding.nodes[0])}{more} ({operators})" + (
        f" {_code(source)}" if source else ""
    )


def _notes(report: AuditReport) -> Iterator[str]:
    """Gaps, then what was not observed, then what the reader must know about each backend."""
    for gap in report.gaps:
        yield _gap(gap)
    for backend in report.backends:
        proof = backend.fidelity
        for reason, tensors in words.by_reason(proof.skipped if proof else ()).items():
            of = f"{len(tensors)} of {proof.candidates if proof else 0} tensors not observed"
            yield f"- {_code(backend.id)}: {of}, such as {_code(tensors[0])}: {_prose(reason)}\n"
    for backend in report.backends:
        for note in words.notes(backend):
            yield f"- {_code(backend.id)}, note: {_prose(note)}\n"


def _gap(gap: Gap) -> str:
    remedy = f" Remedy: {_prose(gap.remedy)}" if gap.remedy else ""
    return (
        f"- {_code(gap.subject)}, {_prose(gap.stage)}: {_prose(gap.reason.rstrip('.'))}.{remedy}\n"
    )


def _evidence(finding: Finding) -> str:
    """A finding in full."""
    lines = [
        f"\n**{finding.rank}.** {finding.severity}, {_code(finding.backend)}, segment "
        f"{_code(finding.segment)}: {_place(finding)}\n",
        f"- Measured: {_prose(words.finding(finding))}",
    ]
    if finding.kernel:
        lines.append(f"- Ran: {_prose(finding.kernel)}")
    lines += [f"- Evidence: {_prose(line)}" for line in finding.evidence[:_MOST_EVIDENCE]]
    if more := finding.evidence[_MOST_EVIDENCE:]:
        lines.append(f"- and {len(more)} more in the JSON report")
    if finding.remedy:
        lines.append(f"- Remedy: {_prose(finding.remedy)}")
    return "\n".join(lines) + "\n"


# --- making text harmless ------------------------------------------------------------------------

_SYNTAX = re.compile(r"[\\`*_\[\]<>&~|$^]")
_LINKED = re.compile(r"(?<=www)\.|:(?=//)", re.IGNORECASE)
_REFERENCE = re.compile(r"@|#(?=\d)|:(?=[\w+-]+:)")


def _code(name: str) -> str:
    """A name as a code span."""
    text = words.elide(name, _NAME).replace("`", r"\x60").replace("|", r"\x7c")
    if not text:
        return "(no name)"
    # One space is taken from both ends of a span that has them (CommonMark 6.1).
    pad = " " if text.startswith(" ") and text.endswith(" ") and text.strip() else ""
    return f"`{pad}{text}{pad}`"


def _prose(text: str) -> str:
    """A sentence that means nothing but its characters; never at the beginning of a line."""
    text = words.elide(text, _TEXT)
    text = _SYNTAX.sub(r"\\\g<0>", text)
    text = _LINKED.sub(r"\\\g<0>", text)
    # GitHub reads these after Markdown, where an escape is gone, but never inside code.
    return _REFERENCE.sub(r"`\g<0>`", text)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
