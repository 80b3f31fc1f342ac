"""Rules for a release: read strictly, applied exactly, proposed from a first report."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from datetime import date
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auditor.errors import UsageError
from auditor.records.measured import CategoryShare, Latency
from auditor.records.report import AuditReport
from auditor.verdict import policy
from auditor.verdict.judgement import judged
from auditor.verdict.policy import load
from auditor.verdict.proposal import proposed
from reports import json_v1
from tests.helpers import audit_in as audit
from tests.helpers import scaled

TODAY = date(2026, 11, 24)


WRONG = ("m.onnx", "--candidate", "off.onnx", "--backends", "ort", "--no-confirm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another export with a weight one per cent off, and the report of both."""
    folder = tmp_path_factory.mktemp("policy")
    onnx.save(scaled(1.0), folder / "m.onnx")
    onnx.save(scaled(1.01), folder / "off.onnx")
    done = audit(folder, *WRONG, "-o", "off.json")
    assert done.returncode == 1, done.stderr
    return folder


@pytest.fixture
def report(made: Path) -> AuditReport:
    return json_v1.load(made / "off.json")


def rules(folder: Path, text: str) -> policy.Policy:
    (folder / "rules.toml").write_text(text, encoding="utf-8")
    return load(folder / "rules.toml")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", 1),
        ('fail_on = "critical"', 1),  # --fail-on is in the report already
        ("[tolerance]\nrelative_l2 = 0.02", 0),
        ("[tolerance]\nrelative_l2 = 0.005", 1),
        ("[tolerance]\nrelative_l2 = 0.005\n[tolerance.ort]\nrelative_l2 = 0.02", 0),
        ("[tolerance.ort]\nrelative_l2 = 1\n[tolerance.ort.outputs.y]\nrelative_l2 = 1e-4", 1),
        ("[tolerance]\nrelative_l2 = 0.02\nsqnr_db = 30", 0),
        ("[tolerance]\nrelative_l2 = 0.02\nsqnr_db = 60", 1),
        ("[tolerance]\nrelative_l2 = 0.02\nmax_ulp = 1e9", 0),
        ("[tolerance]\nrelative_l2 = 0.02\nmax_ulp = 4", 1),
        ("[tolerance]\nrelative_l2 = 0.02\ncosine = 0.999999\ntop1_flips = 0", 0),
        ("[tolerance]\nrelative_l2 = 0.02\niou = 0.5", 1),  # not a mask: not measured
        ("[tolerance.ov]\nrelative_l2 = 1e-9\n[tolerance.ort]\nrelative_l2 = 0.02", 0),
    ],
)
def test_tolerances(report: AuditReport, tmp_path: Path, text: str, code: int) -> None:
    found = judged(report, rules(tmp_path, text), TODAY)
    assert found.exit_code == code
    assert found.judgement is not None
    assert bool(found.judgement.broken) == (code == 1)


def test_a_latency_is_limited_by_its_ratio(report: AuditReport, tmp_path: Path) -> None:
    limited = rules(tmp_path, "[tolerance]\nrelative_l2 = 0.02\nlatency_ratio = 1.5")
    assert limited.limits_latency
    assert not rules(tmp_path, "[tolerance]\nrelative_l2 = 0.02").limits_latency

    def broken(latency: Latency | None) -> list[str]:
        backends = tuple(replace(b, latency=latency) for b in report.backends)
        judgement = judged(replace(report, backends=backends), limited, TODAY).judgement
        assert judgement is not None
        return [rule.sentence for rule in judgement.broken]

    assert broken(Latency(1.4e-3, 1e-3)) == []
    assert broken(Latency(1.6e-3, 1e-3)) == ["ort: latency_ratio is 1.6, and its tolerance 1.5"]
    assert broken(None) == ["ort: latency_ratio has a tolerance, and was not measured there"]
    with pytest.raises(UsageError, match="latency_ratio"):
        rules(tmp_path, "[tolerance.ort.outputs.y]\nlatency_ratio = 1")


def test_a_policys_latency_is_measured(made: Path, tmp_path: Path) -> None:
    (tmp_path / "fast.toml").write_text(
        "[tolerance]\nrelative_l2 = 1\n[tolerance.ov]\nlatency_ratio = 1e-9", "utf-8"
    )
    asked = ("--backends", "ort,ov", "--no-confirm", "--policy", "fast.toml", "-o", "r.json")
    for _ in range(2):  # the second time everything but the latency is in the cache
        done = audit(tmp_path, str(made / "m.onnx"), *asked)
        assert done.returncode == 1, done.stderr
        said = json_v1.load(tmp_path / "r.json")
        assert said.judgement is not None
        assert [(rule.backend, rule.output) for rule in said.judgement.broken] == [("ov", None)]
        assert "latency_ratio" in said.judgement.broken[0].sentence
        for backend in said.backends:
            assert backend.latency is not None
            assert backend.latency.seconds > 0
        assert "latency" in done.stdout
    written = tomllib.loads(proposed(said, "r.json"))
    assert written["tolerance"]["ov"]["latency_ratio"] > 0


def test_acceptances_expire(report: AuditReport, tmp_path: Path) -> None:
    (finding,) = report.findings
    text = (
        "[tolerance.ort.outputs.y]\nsqnr_db = 1\nrelative_l2 = 0.5\n"
        f'[[accept]]\nfingerprint = "{finding.fingerprint}"\nreason = "known"\n'
        "expires = 2026-11-24\n"
        '[[accept]]\nfingerprint = "0"\nreason = "gone"\n'
    )
    accepted = rules(tmp_path, text)
    now = judged(report, accepted, TODAY).judgement
    later = judged(report, accepted, date(2026, 11, 25)).judgement
    assert now and later
    assert [w.fingerprint for w in now.waived] == [finding.fingerprint]
    assert later.waived == ()
    assert any("ended on 2026-11-24" in note for note in later.notes)
    assert any("fingerprint 0" in note for note in now.notes)


def test_an_allowed_category_takes_its_share_of_the_divergence(
    report: AuditReport, tmp_path: Path
) -> None:
    (backend,) = report.backends
    (finding,) = report.findings
    named = replace(finding, noise="precision.bf16")
    for share, code in ((1.0, 0), (0.5, 1)):
        category = CategoryShare("precision.bf16", "inference", share)
        changed = replace(
            report,
            findings=(named,),
            backends=(replace(backend, categories=(category,)),),
        )
        allowed = rules(tmp_path, '[categories]\n"precision.bf16" = "allow"')
        assert judged(changed, allowed, TODAY).exit_code == code


def test_a_missing_backend_is_incomplete(report: AuditReport, tmp_path: Path) -> None:
    wide = rules(tmp_path, "[tolerance]\nrelative_l2 = 1")
    asked = replace(report, requested=("ort", "tvm"))
    assert judged(asked, wide, TODAY).exit_code == 3
    assert judged(replace(report, backends=(), findings=()), wide, TODAY).exit_code == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fail_onn = 'low'", "Did you mean `fail_on`?"),
        ("fail_on = 'severe'", "fail_on"),
        ("backends = 'ov'", "backends"),
        ("[tolerance]\nrelativ_l2 = 1", "relative_l2"),
        ("[tolerance]\nrelative_l2 = 'x'", "relative_l2"),
        ("[tolerance]\nrelative_l2 = nan", "relative_l2"),
        ("[tolerance.ov]\noutputs = 3", "outputs"),
        ("[tolerance.ov.outputs.y]\nrelative = 1", "tolerance.ov.outputs.y.relative"),
        ("[categories]\n'precision.bf16' = 'deny'", "allow"),
        ("accept = 3", "accept"),
        ("[[accept]]\nfingerprint = ''\nreason = 'x'", "fingerprint"),
        ("[[accept]]\nfingerprint = 'x'\nreason = 'x'\nexpires = '2026'", "expires"),
        ("[[accept]]\nfingerprint = 'x'\nreason = 'x'\nby = 'me'", "accept.by"),
        ("fail_on = ", "cannot be read"),
    ],
)
def test_bad_policies(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        rules(tmp_path, text)
    assert words in caught.value.message + caught.value.hint


def test_what_would_never_apply_is_refused(tmp_path: Path) -> None:
    for text in ("[tolerance.openvino]\ncosine = 1", "[categories]\n'precision.bf61' = 'allow'"):
        with pytest.raises(UsageError, match="unknown") as refused:
            policy.check(rules(tmp_path, text), ["ov"], ["precision.bf16"])
    assert "Did you mean `precision.bf16`?" in refused.value.hint


def test_one_policy_at_most(tmp_path: Path) -> None:
    assert policy.find(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text('[tool.auditor]\nfail_on = "low"')
    found = policy.find(tmp_path)
    assert found and found.fail_on == "low"
    (tmp_path / "audit.toml").write_text("")
    with pytest.raises(UsageError, match="both"):
        policy.find(tmp_path)


@given(
    names=st.lists(st.text(min_size=1), min_size=1, max_size=3),
    error=st.floats(1e-9, 10),
    alone=st.floats(1e-9, 10),  # of the result, where there is a pipeline
)
def test_a_proposal_passes(names: list[str], error: float, alone: float) -> None:
    from auditor.records.measured import Distance, OutputDistance
    from auditor.records.report import BackendReport

    outputs = tuple(
        OutputDistance(name, Distance(error, error, 10.0, 0.9)) for name in dict.fromkeys(names)
    )
    empty = _EMPTY[0]
    report = replace(
        empty,
        backends=(BackendReport("ov:GPU", "", "audited", None, outputs=outputs),),
        findings=tuple(
            replace(empty.findings[0], backend=id, effect=alone) for id in ("ov:GPU", "pipeline")
        ),
    )
    text = proposed(report, "first.json\n[tolerance]")
    document = tomllib.loads(text)
    limits = [o["relative_l2"] for o in document["tolerance"]["ov:GPU"]["outputs"].values()]
    assert all(limit >= error for limit in limits)
    assert all(limit <= max(4.1 * error, 1.1e-5) for limit in limits)
    judgement = judged(report, policy._policy(document, "p"), date.today()).judgement
    assert judgement is not None and not judgement.broken


def test_a_proposal_lists_the_first_findings_and_counts_the_others(report: AuditReport) -> None:
    many = replace(report, findings=report.findings[:1] * 12)
    text = proposed(many, "first.json")
    assert text.count("# [[accept]]") == 10 and "And 2 more findings" in text
    offered = "\n".join(line.removeprefix("# ") for line in text.splitlines()[-6:-2])
    (taken,) = tomllib.loads(offered)["accept"]
    assert taken["expires"] > date.today()


_EMPTY: list[AuditReport] = []


@pytest.fixture(autouse=True)
def _one_report(report: AuditReport) -> None:
    _EMPTY[:] = [report]


def test_from_first_audit_to_baseline(made: Path, tmp_path: Path) -> None:
    for name in ("m.onnx", "off.onnx"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    assert audit(tmp_path, *WRONG, "-o", "first.json").returncode == 1
    written = audit(tmp_path, "init", "first.json")
    assert (written.returncode, written.stderr) == (0, "")
    again = audit(tmp_path, "init", "first.json")
    assert again.returncode == 2 and "--force" in again.stderr
    passed = audit(tmp_path, *WRONG)
    assert passed.returncode == 0, passed.stdout
    assert "every rule holds" in passed.stdout
    text = (tmp_path / "audit.toml").read_text()
    tight = text.replace("relative_l2 = 0.02 ", "relative_l2 = 1e-6 ")
    assert tight != text
    (tmp_path / "audit.toml").write_text(tight)
    failed = audit(tmp_path, *WRONG)
    assert failed.returncode == 1
    assert "tolerance 1e-06" in failed.stdout
    known = audit(tmp_path, *WRONG, "--baseline", "first.json")
    assert known.returncode == 0, known.stdout
    assert "1 finding waived (first.json)" in known.stdout
    onnx.save(scaled(1.1), tmp_path / "off.onnx")
    worse = audit(tmp_path, *WRONG, "--baseline", "first.json", "-o", "worse.json")
    assert worse.returncode == 1
    judgement = json_v1.load(tmp_path / "worse.json").judgement
    assert judgement and any("worse" in rule.sentence for rule in judgement.broken)
