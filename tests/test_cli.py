"""The command line end to end, in a process of its own."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from numpy.typing import NDArray

import auditor
from auditor import cli, discovery
from auditor.commands import _asked, _output
from auditor.commands import audit as audit_verb
from auditor.errors import UsageError
from tests.helpers import ROOT, audit_in, environment, onnx_model

Audit = Callable[..., "subprocess.CompletedProcess[str]"]


def auditing(folder: Path) -> Audit:
    return partial(audit_in, folder)


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return auditing(tmp_path)


def network(weight: NDArray[np.float32]) -> bytes:
    """Two products with a tanh between them; 8 inputs, 4 outputs."""
    rng = np.random.default_rng(1)
    proto = onnx_model(
        "(float[n, 8] x) => (float[n, 4] y) { [first] a = MatMul(x, w1) [bend] b = Tanh(a) "
        "[second] y = MatMul(b, w2) }",
        {"w1": weight, "w2": rng.standard_normal((16, 4), np.float32)},
    )
    return bytes(proto.SerializeToString())


def written(folder: Path) -> str:
    weight = np.random.default_rng(0).standard_normal((8, 16), np.float32)
    (folder / "m.onnx").write_bytes(network(weight))
    (folder / "wrong.onnx").write_bytes(network(weight * np.float32(1.5)))
    return "m.onnx"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return written(tmp_path)


class Saved(NamedTuple):
    """What an audit printed, and the folder with its ``report.json``."""

    folder: Path
    result: subprocess.CompletedProcess[str]


def saved(folder: Path, *more: str) -> Saved:
    run = auditing(folder)
    return Saved(folder, run(written(folder), "--backends", "ort", "-o", "report.json", *more))


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(tmp_path_factory.mktemp("passed"))


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved(tmp_path_factory.mktemp("failed"), "--candidate", "wrong.onnx")


# --- help and version ------------------------------------------------------------------------


def test_help_answers_at_once_and_explains_everything(audit: Audit) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = audit("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    # Processor time, for other tests may be running: 0.12 s, and 0.3 s is promised.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    for word in (
        *("Usage: audit MODEL", "--backends", "--candidate", "--data", "--seed", "--samples"),
        *("--shape", "--format", "--output", "--timeout", "--threads", "--option", "--fail-on"),
        *("--output-kind",),
        *("Exit codes", "incomplete", "noises", "explain", "show"),
    ):
        assert word in result.stdout
    assert "..." not in result.stdout, "a sentence was cut off"
    # Everyday options first; each of all of them is somewhere, once.
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", result.stdout, re.MULTILINE)
    assert listed[:5] == ["--backends", "--data", "--option", "--policy", "--output"]
    assert (
        len(listed) == len(set(listed)) == len(inspect.signature(audit_verb._audit).parameters) - 1
    )
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_every_verb_tells_its_options_and_shows_examples_that_parse() -> None:
    from typer.main import get_command

    group: Any = get_command(cli.app)
    above = group.make_context("audit", ["noises"])
    assert len(group.commands) > 15
    for name, verb in group.commands.items():
        page = verb.get_help(verb.make_context(name, [], parent=above, resilient_parsing=True))
        assert "<int" not in page and "<float" not in page, f"{name}: a number of what?"
        for option in verb.params:
            assert option.help or not hasattr(option, "help"), f"{name} {option.name}"
        examples = [x.strip() for x in verb.epilog.splitlines() if x.startswith("  audit ")]
        assert examples, f"{name} has no example"
        for line in examples:
            _, *words = shlex.split(line)
            words = words[1:] if words[:1] == [name] else words
            verb.make_context(name, words)  # raises where an option is not there


def test_any_amount_of_memory_is_an_amount() -> None:
    given = _asked.again(
        ["m.onnx", "--backends", "ort", "--memory", "inf", "--worker-memory", "9e30"]
    )
    asked = _asked.asked_for(given.params, None)
    assert asked.limits is not None
    assert asked.memory == asked.limits.memory == sys.maxsize


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from auditor.cli import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'rich', 'pydantic', 'openvino', 'tvm'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"


def test_version(audit: Audit) -> None:
    result = audit("--version")
    assert (result.returncode, result.stdout) == (0, f"audit {auditor.__version__}\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        result = subprocess.run(
            [sys.executable, "-m", "auditor", "--version"],
            env=environment(),
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_standard_output_is_named() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "auditor", "noises"],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 2 and "cannot write to standard output" in result.stderr
    assert result.stderr.count("\n") == 2, result.stderr


# --- the main job ----------------------------------------------------------------------------


def test_the_report_is_printed_and_written_beside_that_by_its_suffix(passed: Saved) -> None:
    result = passed.result
    assert result.returncode == 0, result.stderr
    assert "ort" in result.stdout
    assert "synthetic" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr, "no colour and no progress off a terminal"
    assert not result.stdout.startswith("{")
    assert json.loads((passed.folder / "report.json").read_text())["verdict"] == "pass"
    assert {p.name for p in passed.folder.iterdir()} == {"m.onnx", "wrong.onnx", "report.json"}


def test_options_may_come_first_and_the_verb_may_be_written(audit: Audit, model: str) -> None:
    first = audit("--seed", "3", "--backends", "ort", "--format", "json", model)
    written = audit("audit", model, "--seed", "3", "--backends", "ort", "--format", "json")
    assert first.returncode == written.returncode == 0, first.stderr + written.stderr
    one, other = json.loads(first.stdout), json.loads(written.stdout)
    assert one["stimulus"]["seed"] == 3
    assert one["stimulus"] == other["stimulus"]
    assert one["backends"][0]["outputs"] == other["backends"][0]["outputs"]


def test_options_without_a_model_are_told_that_it_is_missing(audit: Audit) -> None:
    """``--backends`` is no misspelt ``backends``."""
    done = audit("--backends", "ort")
    assert done.returncode == 2 and "Missing argument 'MODEL'" in done.stderr, done.stderr


def test_the_kind_of_an_output_can_be_stated(audit: Audit, model: str) -> None:
    stated = audit(
        *(model, "--backends", "ort", "--candidate", "wrong.onnx", "--format", "json"),
        *("--output-kind", "y:scores"),
    )
    (output,) = json.loads(stated.stdout)["backends"][0]["outputs"]
    assert (output["kind"], output["kind_stated"]) == ("scores", True)
    assert output["consequence"]["items"] == output["consequence"]["samples"]
    for text, said in (
        ("y:face", "`y:face` is not of the form NAME:KIND"),
        ("scores", "`scores` is not of the form NAME:KIND"),
        ("z:scores", "names `z`, which is no output of the model"),
    ):
        wrong = audit(model, "--backends", "ort", "--output-kind", text)
        assert wrong.returncode == 2
        assert said in wrong.stderr


def test_recorded_data_and_shape(audit: Audit, model: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((3, 2, 8), np.float32))
    result = audit(model, "--backends", "ort", "--data", "d.npz", "--format", "json")
    assert result.returncode == 0, result.stderr
    stimulus = json.loads(result.stdout)["stimulus"]
    assert (stimulus["kind"], stimulus["samples"]) == ("recorded", 3)
    shaped = audit(model, "--backends", "ort", "--shape", "x:5x8", "--format", "json")
    assert json.loads(shaped.stdout)["stimulus"]["shapes"] == {"x": [5, 8]}


def test_a_wrong_candidate_fails_the_audit(failed: Saved) -> None:
    assert failed.result.returncode == 1, failed.result.stderr
    report = json.loads((failed.folder / "report.json").read_text())
    assert (report["verdict"], report["exit_code"]) == ("fail", 1)
    assert "first" in report["findings"][0]["nodes"]


def test_a_requested_backend_without_comparison_is_incomplete(audit: Audit, model: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT, which cannot run without a GPU")
    if Path("/dev/nvidia0").exists():
        pytest.skip("a GPU is here: TensorRT can run")
    result = audit(model, "--backends", "ort,trt", "--format", "json")
    assert result.returncode == 3, result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"] == "incomplete"
    assert [b["status"] for b in report["backends"]] == ["audited", "built"]
    assert report["gaps"]


# --- where the report goes -------------------------------------------------------------------


def test_the_suffix_chooses_the_format(failed: Saved, tmp_path: Path) -> None:
    starts = {
        "r.sarif": '{\n  "$schema": "https://json.schemastore.org/sarif-2.1.0.json"',
        "r.sarif.json": '{\n  "$schema": "https://json.schemastore.org/sarif-2.1.0.json"',
        "r.json": '{\n  "agreement": [',
        "r.xml": '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>',
        "R.MD": "## ❌ FAIL: `m.onnx`",
        "r.other": " FAIL   m.onnx  exit code 1",
    }
    for name, start in starts.items():
        result = auditing(failed.folder)("show", "report.json", "-o", str(tmp_path / name))
        assert result.returncode == 0, result.stderr
        assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


def test_a_precision_that_was_asked_for_in_vain_is_a_gap(audit: Audit, model: str) -> None:
    """OpenVINO computes in another one then, which says nothing of the one asked for."""
    openvino = pytest.importorskip("openvino", reason="needs the [ov] extra")
    capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    lacked = [hint for hint, name in (("f16", "FP16"), ("bf16", "BF16")) if name not in capable]
    if not lacked:
        pytest.skip("this processor computes in every precision that can be asked for")
    hint = f"ov.INFERENCE_PRECISION_HINT={lacked[0]}"
    result = audit(model, "--backends", "ov", "--option", hint, "--format", "json")
    assert result.returncode == 3, result.stderr
    report = json.loads(result.stdout)
    (backend,), (gap,) = report["backends"], report["gaps"]
    assert report["verdict"] == "incomplete" and backend["status"] == "audited"
    assert gap["reason"].startswith(f"{lacked[0]} was asked for; this device computes in ")
    assert "Without the option" in gap["remedy"]


def test_the_exit_code_does_not_depend_on_the_format(audit: Audit, model: str) -> None:
    result = audit(*(model, "--candidate", "wrong.onnx", "--backends", "ort", "--format", "sarif"))
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.strip()


def test_output_with_a_format_is_all_there_is(audit: Audit, model: str, tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("old")
    result = audit(model, "--backends", "ort", "--format", "json", "-o", "report.txt")
    assert (result.returncode, result.stdout) == (0, "")
    assert json.loads((tmp_path / "report.txt").read_text())["exit_code"] == 0
    assert (tmp_path / "report.txt").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_show(passed: Saved) -> None:
    audit = auditing(passed.folder)
    shown = audit("show", "report.json")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == passed.result.stdout
    layer = audit("show", "report.json", "--layer", "y")
    assert layer.returncode == 0, layer.stderr
    assert "second" in layer.stdout
    assert json.loads(audit("show", "report.json", "--format", "json").stdout)["model"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.json",), "none.json"),
        (("m.onnx",), "m.onnx"),
        (("cut.json",), "cut.json"),
        (("report.json", "--layer", "nonesuch"), "nonesuch"),
        (("report.json", "--layer", "y", "--format", "json"), "--layer"),
        (("report.json", "-o", "report.json"), "overwrite"),
    ],
)
def test_show_refuses(passed: Saved, arguments: tuple[str, ...], words: str) -> None:
    cut = passed.folder / "cut.json"
    cut.write_text((passed.folder / "report.json").read_text()[:200])
    result = auditing(passed.folder)("show", *arguments)
    cut.unlink()
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


# --- lists -----------------------------------------------------------------------------------


def test_backends(audit: Audit) -> None:
    result = audit("backends")
    assert result.returncode == 0, result.stderr
    for id in discovery.backend_ids():
        assert id in result.stdout
    assert "ONNX Runtime" in result.stdout


def test_noises(audit: Audit) -> None:
    result = audit("noises", COLUMNS="160")
    assert result.returncode == 0, result.stderr
    for noise in discovery.noises():
        assert noise.id in result.stdout


def test_explain(audit: Audit) -> None:
    result = audit("explain", "precision.int8_saturation", COLUMNS="80")
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    noise = discovery.noise("precision.int8_saturation")
    facts = (noise.title, noise.cause, noise.applies, noise.source, noise.advice, *noise.forms)
    for fact in (*facts, *noise.remedies.values()):
        assert " ".join(fact.split()) in said
    assert max(len(line) for line in result.stdout.splitlines()) <= 80


def test_sensitivity(audit: Audit, mtcnn: tuple[Path, ...]) -> None:
    result = audit("sensitivity", str(mtcnn[0]), "--noise", "precision.tf32,precision.int8")
    assert result.returncode == 0, result.stderr
    assert "weights in tf32" in result.stdout and "weights per tensor" in result.stdout
    assert "inputs are random" in result.stdout
    unknown = audit("sensitivity", str(mtcnn[0]), "--noise", "precision.tf23")
    assert unknown.returncode == 2 and "Did you mean `precision.tf32`?" in unknown.stderr


def test_explain_suggests_what_was_meant(audit: Audit) -> None:
    result = audit("explain", "precision.bfloat16")
    assert result.returncode == 2 and not result.stdout
    assert "no cause `precision.bfloat16`" in result.stderr
    assert result.stderr.endswith("hint: Did you mean `precision.bf16`?\n")
    for said, hint in (
        ("bf16", "Did you mean `precision.bf16`?"),
        ("postprocessing", "Causes: postprocessing.activation, postprocessing.box_decode, "),
    ):
        with pytest.raises(UsageError) as refusal:
            discovery.noise(said)
        assert refusal.value.hint.startswith(hint)
        assert "precision.tf32" not in refusal.value.hint


# --- discovery -------------------------------------------------------------------------------


def test_every_module_exports_its_constant() -> None:
    for id in discovery.backend_ids():
        assert discovery.backend(id).title
    assert {"terminal", "json"} <= set(discovery.renderers())
    noises = discovery.noises()
    assert len({noise.id for noise in noises}) == len(noises) > 0


def test_unknown_backend() -> None:
    with pytest.raises(UsageError, match="no backend `orrt`") as caught:
        discovery.backend("orrt")
    assert caught.value.hint.startswith("Did you mean `ort`? Backends: ")


def test_listing_backends_imports_no_engine() -> None:
    code = (
        "import sys\n"
        "from auditor import discovery\n"
        "for id in discovery.backend_ids(): discovery.backend(id)\n"
        "engines = {'onnxruntime', 'openvino', 'tvm', 'tensorrt', 'tensorrt_rtx', 'torch'}\n"
        "print(sorted(engines & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["backends", "reports"])
def test_a_shadowed_package_is_named(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / "m.onnx").touch()
    result = subprocess.run(
        [sys.executable, "-P", "-m", "auditor", "m.onnx"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
        capture_output=True,
        text=True,
        check=False,
    )
    message = " ".join(result.stderr.split())
    assert result.returncode == 2, message
    assert f"the package `{package}` of the auditor is shadowed by" in message
    assert "Traceback" not in message


# --- our own bugs ----------------------------------------------------------------------------


def test_our_own_bug_is_exit_4_with_the_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> NoReturn:
        raise ZeroDivisionError("what never happens")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli._run() == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "ZeroDivisionError: what never happens" in captured.err
    assert "Traceback" not in captured.err
    (file,) = tmp_path.glob("audit-error-*.txt")
    assert "in broken" in file.read_text()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match="No space left"):
        _output.write(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
