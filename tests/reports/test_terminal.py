"""The terminal report: complete, readable at every width, and safe with hostile names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from auditor.errors import UsageError
from auditor.records.backend import Availability, Device, Gap
from auditor.records.measured import Distance, OutputDistance
from auditor.records.report import AuditReport
from reports import _lists, _page, _progress, _segment, terminal
from reports import _words as words

_WIDTHS = (80, 120, 200)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def _render(report: AuditReport, width: int | None = 120, color: bool = False) -> str:
    return terminal.RENDERER.render(report, width=width, color=color)


def _flat(text: str) -> str:
    """The words in order, however they were wrapped."""
    return " ".join(_STYLE.sub("", text).split())


def _assert_clean(text: str, width: int) -> None:
    bare = _STYLE.sub("", text)
    lines = bare.split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [line for line in lines if cell_len(line) > width] == []
    assert [line for line in lines if line != line.rstrip()] == []


# --- the whole report ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("color", [False, True])
def test_everything_that_matters_is_there(report: AuditReport, width: int, color: bool) -> None:
    text = _render(report, width, color)
    _assert_clean(text, width)
    said = _flat(text)
    for fact in (
        "FAIL efficientnet_lite0.onnx exit code 1",
        "largest divergence of an output: 1.2e-2 relative L2 on ov",
        "16 findings (1 medium, 15 low); no comparison with tvm, trt",
        "4 recorded samples from photos.npz: images:0 1x3x224x224",
        "ort Softmax:0 2.1e-7 1.68e-7 133.6 1.000000 100%",
        "ov Softmax:0 1.2e-2 0.0096 38.4 0.999928 75.0%",
        "Softmax:0, read as scores (assumed): top-1 flips in 1 of 4 rows, first on sample 2; "
        "relative L2 7.0e-3 to 1.5e-2 over 4 samples, worst on sample 2",
        "means over samples: causes over 4 (precision.bf16 99.3% to 100%), segments' shares over 2",
        "Softmax:0: top-1 stays in all 4 rows; margin 0.71 → 0.69 impact 18.3% to 58.3% over 4",
        "precision.bf16 99.8%, precision.fp32_rounding 0.03%, unexplained 0.16%",
        "proved: 52/52 tensors, outputs bitwise equal, program unchanged",
        "proved: 50/51 tensors (9 by cone), outputs bitwise equal, program unchanged",
        "OpenVINO 2026.4.1 on CPU, 16 kernels (16 bf16)",
        "built by TensorRT-RTX 1.7.1",
        "note: TF32 is on by default.",
        "warning: Contributions do not add here (sum of squared impacts 3.78",
        "warning: 44% of the error of output `Softmax:0` sits at index 37 of axis 1",
        "1 medium ov 38.3% 37.0% 4.1e-3 99.98% 99.2%",
        "3 low ov 12.8% 9.0% 1.4e-3 - 11.0%",
        "10 low ov 3.8% -0.80% 8.2e-4 99.98% 99.2%",
        "Convolution brgconv_avx512_amx",
        "and 6 more, low at most",
        "audit show report.json --layer s0",
        "Set INFERENCE_PRECISION_HINT=f32",
        "ov 1.2e-2 2.1e-7 99.99% 99.8% 5.3 → 11.2 confirmed",
        "without inference in bf16: precision.bf16, precision.fp16",
        "--option ov.INFERENCE_PRECISION_HINT=f32",
        "ov failed without execution mode PERFORMANCE: no cause in particular",
        "the process was killed by SIGSEGV",
        "reference 2.1e-7 1.2e-2 ort 1.2e-2",
        "Outlier: ov; the others agree within 2.1e-7.",
        "tvm start: TVM is not installed remedy: pip install 'sysnoise-auditor[tvm]'",
        "trt run: built, not run: no CUDA device remedy: Run this audit on a machine",
        "log: [W] CUDA initialization failure with error: 35",
        "1 of 51 tensors not observed (blocks_9/Add:0): observing it changed the program's fusion",
        "6.5 s (measure 6.1, load 0.4, report 0.0)",
    ):
        assert fact in said, fact
    for index in range(terminal.TOP):
        assert f"…/blocks_{index}/depthwise_conv2d/depthwise + " in said
    assert f"blocks_{terminal.TOP}/" not in said
    assert said.count("high") + said.count("medium") >= terminal.TOP  # each one's confidence


@pytest.mark.parametrize("width", _WIDTHS)
def test_a_segment_says_how_its_figures_vary_over_samples(report: AuditReport, width: int) -> None:
    text = _segment.render_segment(report, "s0", width, False)
    _assert_clean(text, width)
    said = _flat(text)
    for fact in (
        "its error alone: 18.3% to 58.3% over 4 samples",
        "share: 36.0% to 38.0% over 2 samples",
        "it alone Softmax:0: top-1 stays in all 4 rows; margin 0.71 → 0.69",
        "0.32% of the integers it writes are one step off",
        "looked for on sample 1, the first above the floor",
        "score 0.8001 to 0.9999 over 4 samples, which contradicts it on 2",
    ):
        assert fact in said, fact


def test_a_remedy_is_said_once_however_causes_are_combined(report: AuditReport) -> None:
    first, second, third, *_ = report.findings
    said = _flat(
        _render(
            replace(
                report,
                findings=(
                    replace(first, noise="a.a", remedy="do this; or that"),
                    replace(second, noise="a.a", remedy="do this; or that; against b.b: rest"),
                    replace(third, noise="b.b", remedy="rest; against a.a: do this; or that"),
                ),
            )
        )
    )
    assert (
        "remedy ov, a.a (3 findings): do this; or that remedy ov, b.b (2 findings): rest " in said
    )
    assert said.count("remedy ov") == 2


def test_rare_events_are_told(report: AuditReport) -> None:
    backend = report.backends[1]
    output = replace(backend.outputs[0], nonfinite=2, first_nonfinite=7, one_step=0.01)
    backend = replace(backend, outputs=(output,))
    said = _flat(_render(replace(report, backends=(backend,))))
    assert "1.0% of its elements are one step off" in said
    assert "NaN or infinity on one side only on 2 samples, first on sample 7" in said


def test_the_verdict_comes_first_then_backends_then_offenders(report: AuditReport) -> None:
    text = _render(report)
    order = ["FAIL", "── Backends", "── Ranked", "── Agreement", "── Not audited"]
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    assert text.startswith(" FAIL ")


def test_color_only_adds_styles(report: AuditReport) -> None:
    plain, colored = _render(report), _render(report, color=True)
    assert "\x1b" not in plain
    assert _STYLE.sub("", colored) == plain
    assert _STYLE.search(colored)


def test_unknown_width_is_a_hundred_columns(report: AuditReport) -> None:
    assert _render(report, None) == _render(report, 100)


def test_color_does_not_depend_on_the_environment(
    report: AuditReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _render(report, color=True)
    for name, value in {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    assert _render(report, color=True) == expected


def test_any_report_renders_cleanly_at_any_width(any_reports: tuple[AuditReport, ...]) -> None:
    for number, report in enumerate(any_reports):
        width, color = 60 + number * 160 // len(any_reports), number % 2 == 0
        _assert_clean(_render(report, width, color), width)
        names = {n for b in report.backends for s in b.segments for n in (s.id, *s.op_types)}
        for name in sorted(names)[:2]:
            _assert_clean(_segment.render_segment(report, name, width, color), width)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("[red]x[/red]", "[red]x[/red]"),
        (":smile:", ":smile:"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\rc", r"a\nb\rc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("bad\udc80", r"bad\udc80"),
    ],
)
def test_names_cannot_speak_to_the_terminal(report: AuditReport, name: str, shown: str) -> None:
    finding = replace(report.findings[0], nodes=(name,), kernel=name)
    output = replace(report.backends[0].outputs[0], name=name)
    report = replace(
        report,
        backends=(replace(report.backends[0], outputs=(output,)), *report.backends[1:]),
        findings=(finding,),
        gaps=(Gap(name, "run", name, name, (name,)),),
        model=replace(report.model, path=name),
    )
    text = _render(report, 200)
    _assert_clean(text, 200)
    assert text.count(shown) >= 7


def test_long_names_lose_their_middle(report: AuditReport) -> None:
    name = "/".join(["encoder", *["very_long_layer_name"] * 8, "attention", "MatMul"])
    report = replace(report, findings=(replace(report.findings[0], nodes=(name,)),))
    text = _render(report, 80)
    _assert_clean(text, 80)
    assert "/attention/MatMul" in text.replace("…/MatMul", "/attention/MatMul")
    assert name not in text


def test_a_long_note_loses_its_middle(report: AuditReport) -> None:
    """An engine may name a hundred tensors that the model does not have."""
    backend = next(b for b in report.backends if b.provenance)
    assert backend.provenance is not None
    note = f"Tensors: {', '.join(f'Conv__{i}/WithoutBiases' for i in range(100))}, the last."
    made = replace(backend, provenance=replace(backend.provenance, notes=(note,)))
    text = _flat(_render(replace(report, backends=(made,)), 80))
    assert "note: Tensors: Conv__0/WithoutBiases" in text and "the last." in text
    assert "Conv__50/WithoutBiases" not in text


# --- honesty -------------------------------------------------------------------------------------


def test_an_unproved_trace_says_so(report: AuditReport) -> None:
    ort = report.backends[0]
    assert ort.fidelity
    for change, said in (
        ({"outputs_bitwise_equal": False}, "not proved: 52/52 tensors, outputs differ"),
        ({"program_unchanged": False}, "outputs bitwise equal, program changed"),
        ({"perturbing": 3, "output_proved": 49}, "not proved: 49/52 tensors, 3 perturbing"),
        ({"run_to_run": 1.1e-7}, "program unchanged, run-to-run noise 1.1e-7"),
    ):
        proof = replace(ort.fidelity, **change)
        changed = replace(report, backends=(replace(ort, fidelity=proof),))
        assert said in _flat(_render(changed))


def test_outputs_that_cannot_be_compared_say_why(report: AuditReport) -> None:
    inf = float("inf")
    unlike = OutputDistance("boxes", Distance(inf, inf, -inf, 0.0, "shape 1x4 instead of 1x5"))
    ort = replace(report.backends[0], outputs=(*report.backends[0].outputs, unlike))
    said = _flat(_render(replace(report, backends=(ort,))))
    assert "ort boxes: shape 1x4 instead of 1x5 Softmax:0 2.1e-7" in said
    assert "output boxes of ort: shape 1x4 instead of 1x5" in said


def test_shares_are_shown_as_they_are(report: AuditReport) -> None:
    first = report.backends[1].categories[0]
    ov = replace(report.backends[1], categories=(replace(first, share=0.5),), unexplained_share=0.2)
    assert "precision.bf16 50.0%, unexplained 20.0%" in _flat(
        _render(replace(report, backends=(ov,)))
    )


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "-"),
        (0.0, "0%"),
        (1.0, "100%"),
        (0.99999999, "99.99%"),
        (0.99984, "99.98%"),
        (0.9921, "99.2%"),
        (0.383, "38.3%"),
        (0.0099, "0.99%"),
        (0.00996, "1.0%"),
        (1e-6, "<0.01%"),
        (-1e-6, "<0.01%"),
        (-0.031, "-3.1%"),
        (3.78, "378%"),
        (-1e9, "-1e11%"),
        (float("nan"), "-"),
    ],
)
def test_percent_never_rounds_to_all_or_nothing(share: float | None, text: str) -> None:
    assert words.percent(share) == text


def test_an_empty_audit_renders(report: AuditReport) -> None:
    empty = replace(
        report, backends=(), findings=(), agreement=(), outlier=None, gaps=(), verdict="pass"
    )
    said = _flat(_render(empty))
    assert "PASS" in said
    assert "no backend could be compared with the reference" in said
    assert "No gaps: everything asked for was compared." in said


def test_why_there_is_no_comparison_is_cut_at_its_end(report: AuditReport) -> None:
    why = "no device: " + "the library cannot be opened, " * 9
    broken = replace(
        report.backends[0], status="gap", outputs=(), gap=Gap(report.backends[0].id, "run", why)
    )
    lines = _render(replace(report, backends=(broken,)), width=80).splitlines()
    (line,) = (line for line in lines if line.startswith(broken.id) and line.endswith("…"))
    assert "no device: the library cannot be opened" in line
    assert cell_len(line) <= 80


def test_many_participants_become_a_list(report: AuditReport) -> None:
    pairs = tuple(
        replace(report.agreement[0], a=f"backend:{i}", b=f"backend:{j}")
        for i in range(9)
        for j in range(i)
    )
    text = _render(replace(report, agreement=pairs, outlier=None), 80)
    _assert_clean(text, 80)
    assert "No outlier: nobody stands apart." in text
    assert _flat(text).count("2.1e-7") >= len(pairs)


# --- one segment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", _WIDTHS)
def test_a_segment_in_full(report: AuditReport, width: int) -> None:
    text = _segment.render_segment(report, "s3", width, False)
    _assert_clean(text, width)
    said = _flat(text)
    for fact in (
        "ort, segment s3",
        "ov, segment s3",
        "FusedBatchNormV3",
        "offender 4: low severity, high confidence",
        "Convolution, brgconv_avx512_amx, computes bf16, writes bf16",
        "captured output-proved",
        "introduced 1.0e-3 (854 times its floor 1.2e-6), inherited 1.6e-3, accumulated 1.8e-3",
        "the accumulated error leaves 1.08 times as large as it entered",
        "its error alone makes 9.6% of the final divergence",
        "44.0% of the squared error is at index 37 of axis 1 (size 112)",
        "precision.bf16 explains 99.98% of the introduced error; left over 6.4e-7",
        "input efficientnet-lite0/model/blocks_2/Relu6:0 float32 1x112x14x14",
        "values -3.14 to 5.99 in the reference, -3.14 to 6 here",
        "below 7.5e-9 3.7% █",
        "inputs+weights bf16, f32 bias, output rounded",
        "-417",
        "Set INFERENCE_PRECISION_HINT=f32",
    ):
        assert fact in said, fact


def test_histogram_bars_follow_the_counts(report: AuditReport) -> None:
    text = _segment.render_segment(report, "s3", 100, False)
    bars = [line.count("█") for line in text.splitlines() if " to " in line and "█" in line]
    assert bars and max(bars) == bars[bars.index(max(bars))] == 50
    assert "2.4e-4 to 2.0e-3" in next(x for x in text.splitlines() if x.count("█") == 50)


@pytest.mark.parametrize(
    "name",
    [
        "s7",
        "S7",
        "efficientnet-lite0/model/blocks_7/Relu6",
        "efficientnet-lite0/model/blocks_7/Relu6:0",
        "efficientnet-lite0/model/blocks_7/depthwise_conv2d/depthwise",
        "…/blocks_7/depthwise_conv2d/depthwise",
        "efficientnet-lite0/m…blocks_7/tpu_batch_normalization/FusedBatchNormV3",
    ],
)
def test_a_segment_is_found_by_any_of_its_names(report: AuditReport, name: str) -> None:
    text = _segment.render_segment(report, name, 120, False)
    assert "ort, segment s7" in text
    assert "ov, segment s7" in text
    assert "segment s8" not in text


def test_an_input_is_found_where_nothing_produces_it(report: AuditReport) -> None:
    text = _segment.render_segment(report, "images:0", 120, False)
    assert "ov, segment s0" in text


def test_an_operator_lists_its_segments_worst_first(report: AuditReport) -> None:
    text = _segment.render_segment(report, "conv", 120, False)
    _assert_clean(text, 120)
    assert "32 segments match conv" in text
    assert "…/blocks_15/depthwise_conv2d/depthwise + 2 more" in text
    assert text.splitlines()[2].startswith("ov       s0")


def test_an_unknown_name_gets_suggestions(report: AuditReport) -> None:
    with pytest.raises(UsageError, match="called `blocks_7/Relu`") as caught:
        _segment.render_segment(report, "blocks_7/Relu", 80, False)
    assert "`efficientnet-lite0/model/blocks_7/Relu6`" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        _segment.render_segment(report, "Cnv", 80, False)
    assert "Did you mean `Conv`" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        _segment.render_segment(report, "\x1b[2J", 80, False)
    assert caught.value.message.isprintable()


def test_a_report_without_segments_says_so(report: AuditReport) -> None:
    bare = replace(report, backends=report.backends[2:])
    with pytest.raises(UsageError, match="no segments"):
        _segment.render_segment(bare, "s0", 80, False)


def test_a_segment_below_its_floor_has_no_cause(report: AuditReport) -> None:
    """Whatever accounts for it in the books."""
    ort, *others = report.backends
    segment = replace(
        ort.segments[0], introduced=0.0, floor=3e-6, noise="implementation.fp32_rounding"
    )
    shown = replace(report, backends=(replace(ort, segments=(segment,)), *others), findings=())
    said = _flat(_segment.render_segment(shown, segment.nodes[0], 100, False))
    assert "cause below its floor" in said and "implementation.fp32_rounding" not in said


# --- the other lists -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", _WIDTHS)
def test_backends_are_listed_with_devices_or_remedy(width: int) -> None:
    precisions = ("f32", "bf16", "int8")
    devices = (Device("", "Intel(R) Xeon(R)", precisions), Device("GPU", "Intel(R) Arc(TM)"))
    rows = [
        ("ov", Availability(True, "OpenVINO", "2026.4.1", devices)),
        (
            "tvm",
            Availability(
                False,
                "TVM",
                reason="the package `tvm` is not installed",
                remedy="pip install 'sysnoise-auditor[tvm]'",
            ),
        ),
        (
            "trt",
            Availability(True, "TensorRT", "11", (), "no CUDA device: built, not run", "Get one"),
        ),
        ("ort", Availability(True, "ONNX Runtime", "1.32.0")),
    ]
    text = _lists.render_backends(rows, width, False)
    _assert_clean(text, width)
    said = _flat(text)
    assert "ov OpenVINO 2026.4.1 Intel(R) Xeon(R) (f32, bf16, int8) ov:GPU Intel(R) Arc(TM)" in said
    assert "tvm TVM not available reason the package `tvm` is not installed remedy pip" in said
    assert "trt TensorRT 11 - reason no CUDA device: built, not run remedy Get one" in said
    assert "ort ONNX Runtime 1.32.0" in said


def test_a_long_name_is_no_part_of_what_is_said() -> None:
    assert "".join(
        span.text for span in _page.detail("sentence_embedding", _page.Span("x"))
    ).endswith(" x")


def test_noises_are_listed_and_explained() -> None:
    noise = SimpleNamespace(
        id="precision.bf16",
        stage="inference",
        type="data precision",
        title="Tensors are rounded to bfloat16.",
        cause="Engines with AMX compute in bfloat16 by default.",
        applies="float32 tensors",
        forms=("weights in bf16", "everything in bf16"),
        advice="run the listed layers in float32",
        remedies={"ov": "set INFERENCE_PRECISION_HINT to f32"},
        ablations={"ov": {"INFERENCE_PRECISION_HINT": "f32"}},
        source="SysNoise, section 3.2",
    )
    listed = _lists.render_noises([noise], 80, False)  # type: ignore[list-item]
    shown = _lists.render_noise(noise, 80, False)  # type: ignore[arg-type]
    facts = (noise.id, noise.stage, noise.type, noise.title)
    switch = "--option ov.INFERENCE_PRECISION_HINT=f32"
    more = (noise.cause, noise.applies, *noise.forms, noise.advice, noise.source)
    for text, said in ((listed, facts), (shown, (*facts, *more, noise.remedies["ov"], switch))):
        _assert_clean(text, 80)
        assert all(fact in _flat(text) for fact in said)


# --- standard error ------------------------------------------------------------------------------


def test_errors_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    _progress.print_error("no such file: [bold]x\x1b[2J.onnx", "Check the path.")
    _progress.print_error("line one\nline two", "")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: no such file: [bold]x\\x1b[2J.onnx\nhint: Check the path.\n"
        "error: line one\n  line two\n"
    )


def test_errors_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        _progress.print_error(f"no such input: {'scope/' * 200}x", "what to do about it " * 8)
        monkeypatch.undo()
        text = os.read(reader, 4096).decode().replace("\r\n", "\n")
    os.close(reader)
    assert text.startswith("\x1b[1;31merror: \x1b[0m")
    lines = _STYLE.sub("", text).splitlines()
    assert len(lines) == 5 and max(map(cell_len, lines)) <= 80, lines
    assert lines[1].startswith("       scope/") and lines[1].endswith("/scope/x")
    assert lines[3].startswith("      ") and lines[3].split()[0] in ("what", "to", "do", "about")


def test_progress_is_silent_when_not_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    progress = _progress.LiveProgress()
    progress.update("ov", "build")
    progress.close()
    assert capfd.readouterr() == ("", "")


def test_progress_shows_each_backend_and_restores_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.openpty()
    seen = bytearray()

    def drain() -> None:
        try:
            while chunk := os.read(reader, 4096):
                seen.extend(chunk)
        except OSError:  # the other end is closed
            pass

    thread = threading.Thread(target=drain)
    thread.start()
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        progress = _progress.LiveProgress()
        callers = [
            threading.Thread(target=progress.update, args=(who, "build[red]"))
            for who in ("ort", "ov:GPU", "tvm")
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        progress.update("ov:GPU", "capture")
        time.sleep(0.5)
        progress.close()
        progress.close()
        progress.update("ort", "late")
        monkeypatch.undo()
    thread.join(timeout=5)
    os.close(reader)
    text = seen.decode()
    for word in ("ort", "ov:GPU", "tvm", "build[red]", "capture", "0:00:0"):
        assert word in text, word
    assert "late" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_importing_the_module_does_not_import_rich() -> None:
    code = "import sys, reports.terminal, reports.json_v1; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_fails_as_a_whole_though_no_segment_does_is_said(report: AuditReport) -> None:
    assert "as a whole" not in _flat(_render(report, 100, False))
    quiet = tuple(f for f in report.findings if f.severity == "low")
    text = _flat(_render(replace(report, findings=quiet), 100, False))
    assert "relative L2 on ov, high as a whole though no segment is" in text


def test_names_that_fill_lines_and_lines_take_one() -> None:
    page = _page.Page(80, color=False)
    path, name = "folder/" * 20 + "model.onnx", "scope/" * 200 + "Conv"
    page.say(_page.Span(f"{path} has no `{name}` in it"), label=_page.tag("model", 11))
    lines = page.text().splitlines()
    assert "".join(lines).replace(" ", "").startswith(f"model{path}")
    assert len(lines) == 5 and any(line.endswith("scope/Conv`") for line in lines)


@pytest.mark.parametrize("width", [39, 42, 45, 80])
def test_labels_are_whole_in_a_narrow_pane(width: int) -> None:
    """`audit browse` shows a segment in half of the terminal."""
    page = _page.Page(width, color=False)
    for name in ("rank", "relative L2", "cause"):
        page.say(_page.Span("what is said about it " * 3), label=_page.tag(name, 15))
    lines = page.text().splitlines()
    assert [n for n in ("rank", "relative L2", "cause") if any(n in x for x in lines)] == [
        *("rank", "relative L2", "cause")
    ]
    begins = {line.index("what") for line in lines if line.startswith(("rank", "rel", "cause"))}
    assert len(begins) == 1, lines


def test_only_what_holds_a_harmful_name_is_copied():
    """A deep model's report is large, and it is read through before anything is shown."""
    harmless, harmful = Device("", "EPYC", ("f32",)), Device("", "EPYC\x1b[2J", ("f32",))
    kept = Availability(True, "E", "1", (harmless,))
    assert words.visible(kept) is kept
    shown = words.visible(Availability(True, "E", "1", (harmless, harmful)))
    assert [device.name for device in shown.devices] == ["EPYC", "EPYC\\x1b[2J"]
    assert shown.devices[0] is harmless and shown.engine == "E"
    assert words.visible({"a\nb": ("c\u202e", 1.5)}) == {"a\\nb": ("c\\u202e", 1.5)}
