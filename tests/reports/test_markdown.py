"""Markdown, rendered by GitHub's own parser: the story, its limits, and names that stay names."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import cmarkgfm
import pytest
from cmarkgfm.cmark import Options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auditor.records.backend import Gap
from auditor.records.measured import Consequence
from auditor.records.report import AuditReport
from reports import _words as words
from reports.markdown import LIMIT, RENDERER

_GITHUB = 65_536  # characters of a comment
# What the report itself uses; anything else would come from a name.
_TAGS = {"h2", "h3", "p", "ul", "li", "code", "strong", "details", "summary"} | {
    *("table", "thead", "tbody", "tr", "th", "td")
}


class _Page(HTMLParser):
    """What a reader sees: the tags, the text, and what is set as code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.plain = ""  # outside code, where GitHub looks for mentions and references
        self.codes: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(cmarkgfm.github_flavored_markdown_to_html(text, Options.CMARK_OPT_UNSAFE))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert all(name == "align" for name, _ in attrs)
        self.tags.append(tag)
        self._open.append(tag)
        if tag == "code":
            self.codes.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "code" in self._open:
            self.codes[-1] += data
        else:
            self.plain += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data


def _page(report: AuditReport) -> _Page:
    text = RENDERER.render(report, width=None, color=False)
    assert len(text.encode()) <= LIMIT < _GITHUB
    page = _Page(text)
    assert set(page.tags) <= _TAGS
    assert page.tags.count("details") <= 1
    return page


def _shown(name: str) -> str:
    """A name as its code span shows it."""
    return words.visible(name).replace("`", r"\x60").replace("|", r"\x7c")


# --- the story -----------------------------------------------------------------------------------


def test_the_verdict_comes_first(report: AuditReport) -> None:
    page = _page(report)
    assert page.text.startswith("❌ FAIL: efficientnet_lite0.onnx\nExit code 1: largest divergence")
    assert words.headline(report) in page.text


def test_every_backend_has_its_divergence_and_proof(report: AuditReport) -> None:
    rows = {row[0]: row for row in _page(report).rows}
    proof = report.backends[1].fidelity
    assert proof
    assert rows["ov"][1:4] == ["Softmax:0", "1.2e-2", "0.0096"]
    assert rows["ov"][7:] == [words.causes(report.backends[1]), f"✅ {words.proof(proof)}"]
    assert rows["tvm"][1] == "⚠️ TVM is not installed"
    assert rows["trt"][1] == "⚠️ built, not run: no CUDA device"
    assert len({len(row) for row in rows.values()}) == 2, "two tables, no broken row"


def test_findings_are_ranked_and_the_rest_is_folded_away(report: AuditReport) -> None:
    page = _page(report)
    ranked = [row for row in page.rows if row[0].isdecimal()]
    assert [row[0] for row in ranked] == [str(n) for n in range(1, 11)]
    first = report.findings[0]
    assert ranked[0][1:7] == ["medium", "ov", "38.3%", "4.1e-3", "99.98%", "precision.bf16"]
    assert first.nodes[0] in ranked[0][7] and ranked[2][6] == "unexplained"
    for finding in report.findings:
        assert f"{finding.rank}. {finding.severity}, ov, segment {finding.segment}" in page.text
    assert first.evidence[0] in page.text and first.remedy and first.remedy in page.text


def test_gaps_and_warnings_are_listed(report: AuditReport) -> None:
    page = _page(report)
    for gap in report.gaps:
        assert f"{gap.subject}, {gap.stage}: {gap.reason}. Remedy: {gap.remedy}" in page.text
    assert "1 of 51 tensors not observed, such as blocks_9/Add:0" in page.text
    assert f"ov, note: {report.backends[1].warnings[0]}" in page.text
    alone = replace(report, gaps=(), backends=report.backends[:1])
    assert "No gaps: everything asked for was compared." in _page(alone).text


def test_what_is_read_off_an_output_is_told(report: AuditReport) -> None:
    flips = Consequence("Softmax:0", "scores", 2, 2, 1, 1, sentence="top-1 flips in 1 of 2 rows")
    output = replace(report.backends[1].outputs[0], kind="scores", consequence=flips)
    page = _page(replace(report, backends=(replace(report.backends[1], outputs=(output,)),)))
    assert "ov, note: Softmax:0, read as scores (assumed): top-1 flips in 1 of 2 rows" in page.text


def test_what_is_not_proved_is_said(report: AuditReport) -> None:
    ov = report.backends[1]
    assert ov.fidelity
    changed = replace(ov, fidelity=replace(ov.fidelity, program_unchanged=False))
    assert "⚠️ not proved: " in _page(replace(report, backends=(changed,))).text


# --- limits --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_counted(report: AuditReport) -> None:
    many = replace(
        report,
        findings=tuple(replace(report.findings[0], rank=n) for n in range(1, 5001)),
        gaps=tuple(Gap("ov", "compare", f"gap {n} " + "x" * 200) for n in range(5000)),
    )
    page = _page(many)
    told = page.text.count("medium, ov, segment")
    listed = page.text.count("ov, compare: gap")
    assert f"{5000 - told} more findings in the JSON report" in page.text and told > 20
    notes = 5000 + 1 + sum(len(words.notes(b)) for b in report.backends) - listed  # 1: skipped
    assert f"{notes} more gaps and notes in the JSON report" in page.text and listed > 20
    assert page.tags.count("details") == 1


@pytest.mark.parametrize("name", ["x" * 2**20, "`|\\<" * 2**14, "名" * 2**14, "@#:" * 2**14])
def test_huge_names_leave_room_for_the_rest(report: AuditReport, name: str) -> None:
    finding = replace(
        report.findings[0], nodes=(name,), op_types=(name,), kernel=name, evidence=(name,) * 5
    )
    outputs = tuple(replace(report.backends[1].outputs[0], name=name) for _ in range(5))
    ov = replace(report.backends[1], outputs=outputs, warnings=(name,) * 2)
    long = replace(report, backends=(ov,) * 30, findings=(finding,) * 30)
    page = _page(replace(long, model=replace(report.model, path=name, producer=name)))
    assert "Ranked offenders" in page.text and "30 findings with evidence" in page.text
    assert "more outputs in the JSON report" in page.text


# --- names are only names ------------------------------------------------------------------------

_UNKIND = [
    "`", "``", "a`b", "|", "a|b", "\\", "\\|", "\\\\|", "a\\", " x ", " ", "\n\n# h", "\r\n| a |",
    "<script>alert(1)</script>", "<!-- x", "</details>", "<img src=x onerror=y>", "&lt;", "&#60;",
    "[x](javascript:alert(1))", "![x](y)", "*a* _b_ ~~c~~ **d**", "$x$", "$$", "a^b", "[^1]",
    "@octocat", "me@example.org", "#1", ":x:", "https://example.org", "www.example.org", "a://b",
    "\x00\x1b[2J\ufffe", "\ud800", "\u202e", "1. x", "- x", "+ x", "===", "---", "    x", "\t",
]  # fmt: skip


@pytest.mark.parametrize("name", _UNKIND)
def test_unkind_names_are_shown_as_they_are(report: AuditReport, name: str) -> None:
    _check_name(report, name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(
        st.sampled_from("`|\\ <>&[]()!*_~$#@:w./-=1a\n") | st.characters(), max_size=40
    ).filter(lambda name: len(words.visible(name)) <= 100)  # longer ones are shortened
)
def test_any_name_is_shown_as_it_is(report: AuditReport, name: str) -> None:
    _check_name(report, name)


def _check_name(report: AuditReport, name: str) -> None:
    finding = replace(report.findings[0], nodes=(name,), op_types=(name,), evidence=(f"<{name}>",))
    output = replace(report.backends[1].outputs[0], name=name)
    ov = replace(report.backends[1], outputs=(output,), warnings=(f"<{name}>",))
    plain = _page(replace(report, backends=(report.backends[1],), findings=report.findings[:1]))
    page = _page(replace(report, backends=(ov,), findings=(finding,)))
    shown = _shown(name) or "(no name)"
    assert [len(row) for row in page.rows] == [len(row) for row in plain.rows]
    assert page.rows[1][1] == shown
    assert page.rows[3][7] == f"{shown} ({words.visible(name)})"
    assert f"note: <{words.visible(name)}>" in page.text
    assert f"Evidence: <{words.visible(name)}>" in page.text
    assert page.tags.count("li") == plain.tags.count("li") - len(report.backends[1].warnings) + 1
    # GitHub reads these in the text that Markdown leaves, except in code.
    assert "@" not in page.plain and "#1" not in page.plain and ":x:" not in page.plain


def test_any_report_is_within_limits(any_reports: tuple[AuditReport, ...]) -> None:
    for report in any_reports:
        page = _page(report)
        assert {len(row) for row in page.rows} <= {6, 8, 9}
        assert "@" not in page.plain
