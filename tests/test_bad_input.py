"""Bad input through the command line: one message, a hint, exit 2, and nothing left behind."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

import auditor
from auditor.capture import recording
from auditor.comparison import texts
from auditor.errors import UsageError
from auditor.fleet import worklist
from auditor.graphs import model as models
from reports import json_v1
from tests.helpers import audit_in, onnx_model

ROOT = Path(auditor.__file__).parent.parent
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "auditor", *arguments]


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200"} | extra


def linear() -> onnx.ModelProto:
    return onnx_model(
        "(float[n, 4] x) => (float[n, 3] y) { h = MatMul(x, w) y = Relu(h) }",
        {"w": np.ones((4, 3), np.float32)},
    )


# --- models --------------------------------------------------------------------------------------


def missing(model: Path) -> None:
    pass


def a_directory(model: Path) -> None:
    model.mkdir()


def empty(model: Path) -> None:
    model.touch()


def not_onnx(model: Path) -> None:
    model.write_text("This is a text file, not a model.\n" * 20)


def truncated(model: Path) -> None:
    data = (LIGHT / "light_squeezenet.onnx").read_bytes()
    model.write_bytes(data[: len(data) * 2 // 3])


def no_graph(model: Path) -> None:
    model.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())


def fails_the_checker(model: Path) -> None:
    proto = linear()
    proto.graph.node[1].op_type = "Frobnicate"
    model.write_bytes(proto.SerializeToString())


def from_the_future(model: Path) -> None:
    proto = linear()
    proto.ir_version = 999
    model.write_bytes(proto.SerializeToString())


def external(model: Path, location: str) -> None:
    proto = linear()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    model.write_bytes(proto.SerializeToString())


def external_missing(model: Path) -> None:
    external(model, "weights.bin")


def external_outside(model: Path) -> None:
    model.parent.parent.joinpath("secret.bin").write_bytes(bytes(48))
    external(model, "../secret.bin")


def external_link(model: Path) -> None:
    model.parent.parent.joinpath("secret.bin").write_bytes(bytes(48))
    model.with_name("link.bin").symlink_to("../secret.bin")
    external(model, "link.bin")


def unknown_domain(model: Path) -> None:
    proto = linear()
    proto.graph.node[1].domain = "com.acme"
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))
    model.write_bytes(proto.SerializeToString())


BAD_MODELS = [
    (missing, "does not exist"),
    (a_directory, "is a directory"),
    (empty, "is empty"),
    (not_onnx, "not an ONNX model"),
    (truncated, "not an ONNX model, or is truncated"),
    (no_graph, "no ONNX graph"),
    (fails_the_checker, "Frobnicate"),
    (from_the_future, "not a valid ONNX model"),
    (external_missing, "`weights.bin` of m.onnx is missing"),
    (external_outside, "outside the model's folder"),
    (external_link, "outside the model's folder"),
    (unknown_domain, "unknown domain `com.acme`"),
]


# --- data ----------------------------------------------------------------------------------------


def arrays(**named: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "d.npz", **{k: np.asarray(v) for k, v in named.items()})
        return folder / "d.npz"

    return write


def text(content: bytes, name: str = "d.npz") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


GOOD = np.zeros((2, 4), np.float32)
BAD_DATA = [
    (lambda folder: folder / "none.npz", "does not exist"),
    (text(b""), "is empty"),
    (text(b"junk" * 50), "not a valid .npz file"),
    (text(b"1,2,3,4", "d.csv"), "not a .npz, .npy or .safetensors file"),
    (arrays(X=GOOD), "`X`, which is not an input"),
    (arrays(x=np.zeros((2, 5), np.float32)), "dimension 1 is fixed at 4"),
    (arrays(x=np.zeros((2, 4), np.int64)), "int64, but the model takes float32"),
    (arrays(x=np.array([[1, 2, np.nan, 4]], np.float32)), "NaN or infinite"),
    (arrays(x=np.array([[1, 2, np.inf, 4]], np.float32)), "NaN or infinite"),
    (arrays(x=np.array([[{"a": 1}, 2, 3, 4]], dtype=object)), "pickled"),
]

BAD_ARGUMENTS = [
    (["--backends", "orrt"], "no backend `orrt`", "Did you mean `ort`?"),
    (["--backends", "ort,"], "no backend ``", "Backends:"),
    (["--backends", "ort,ort"], "`ort` twice", "once"),
    (["--format", "jsn"], "no report format `jsn`", "Did you mean `json`?"),
    (["--shape", "x:1x0"], "--shape `x:1x0`", "1x3x224x224"),
    (["--shape", "z:1x4"], "`z`, which is not an input", "`x` (float32, nx4)"),
    (["--option", "ov.X=1", "--backends", "ort"], "no audited backend `ov`", "Audited: ort"),
    (["--shape", "x:1x5"], "dimension 1 is fixed at 4", "symbolic"),
    (["--option", "ort.level"], "ID.KEY=VALUE", "--option"),
    (["--option", "ov.X=1"], "`ov`", "ort"),
    (["--seed", "pi"], "--seed", "--help"),
    (["--nonsense"], "--nonsense", "--help"),
    (["--candidate", "nowhere.onnx"], "nowhere.onnx does not exist", "path"),
    (
        ["--candidate", "wide.onnx"],
        "takes `x` (float32, nx5)",
        "The model takes `x` (float32, nx4)",
    ),
    (["-o", "nowhere/report.json"], "nowhere does not exist", "Create"),
    (["-o", "."], "not a regular file", "-o"),
    (["-o", "/dev/null"], "not a regular file", "-o"),
    (["-o", "m.onnx"], "overwrite", "another file"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder inside a private one, so that things can lie outside it."""
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def model(folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(linear().SerializeToString())
    return path


def refused(folder: Path, *arguments: str) -> str:
    """Run in ``folder``; check what every refusal has in common and return its message."""
    scratch = folder.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    result = audit_in(folder, *arguments, COLUMNS="200", TMPDIR=str(scratch))
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert sorted(folder.rglob("*")) == before, "something was written"
    assert list(scratch.glob("audit-*")) == [], "temporary files were left"
    message = " ".join(result.stderr.split())
    assert len(message) < 800, "one message, not a stream"
    assert "hint" in message.lower()
    return message


@pytest.mark.parametrize(("make", "words"), BAD_MODELS, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_model(folder: Path, make: Callable[[Path], None], words: str) -> None:
    make(folder / "m.onnx")
    assert words in refused(folder, "m.onnx", "--backends", "ort", "-o", "report.json")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("m.XML", "--artifact ID=FILE"),
        ("m.ort", "--artifact ID=FILE"),
        ("m.pt2", "audit export"),
        ("m.tflite", "tf2onnx"),
        ("m.zip", "another format"),
    ],
)
def test_models_of_other_formats(tmp_path: Path, name: str, hint: str) -> None:
    not_onnx(tmp_path / name)
    with pytest.raises(UsageError, match="not an ONNX model") as refusal:
        models.load(tmp_path / name)
    assert hint in refusal.value.hint


@pytest.mark.parametrize("read", [worklist.load, recording.read_names, texts.tokens])
def test_a_file_that_is_not_there_is_named_once(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(UsageError) as refusal:
        read(tmp_path / "none.x")
    said = refusal.value.message
    assert said.endswith("cannot be read: No such file or directory") and said.count("none.x") == 1


@pytest.mark.parametrize(("make", "words"), BAD_DATA)
def test_bad_data(folder: Path, model: Path, make: Callable[[Path], Path], words: str) -> None:
    data = make(folder)
    message = refused(
        folder, model.name, "--backends", "ort", "--data", data.name, "-o", "report.json"
    )
    assert words in message


@pytest.mark.parametrize(
    ("arguments", "words", "hint"), BAD_ARGUMENTS, ids=lambda v: "=".join(v) if v else ""
)
def test_bad_arguments(
    folder: Path, model: Path, arguments: list[str], words: str, hint: str
) -> None:
    if "wide.onnx" in arguments:
        wide = linear()
        wide.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
        del wide.graph.node[:], wide.graph.initializer[:]
        wide.graph.node.append(helper.make_node("Identity", ["x"], [wide.graph.output[0].name]))
        (folder / "wide.onnx").write_bytes(wide.SerializeToString())
    backends = [] if "--backends" in arguments else ["--backends", "ort"]
    message = refused(folder, model.name, *backends, *arguments)
    assert words in message
    assert hint in message


def test_too_few_recorded_samples(folder: Path, model: Path) -> None:
    arrays(x=np.zeros((3, 2, 4), np.float32))(folder)
    message = refused(folder, model.name, "--backends", "ort", "--data", "d.npz", "--samples", "9")
    assert "asks for 9 samples, but d.npz holds 3" in message


def test_existing_report_in_a_folder_without_write_permission(folder: Path, model: Path) -> None:
    locked = folder.parent / "locked"
    locked.mkdir()
    report = locked / "report.json"
    report.write_text("old")
    locked.chmod(0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere but on some file systems
        locked = Path("/proc")
        report = locked / "report.json"
    message = refused(folder, model.name, "--backends", "ort", "-o", str(report))
    assert f"cannot write to {locked}" in message
    if locked != Path("/proc"):
        assert report.read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_unreadable_model(folder: Path, model: Path) -> None:
    model.chmod(0)
    assert "cannot be read" in refused(folder, model.name, "--backends", "ort")


def test_no_arguments(folder: Path) -> None:
    assert "MODEL" in refused(folder)


def test_a_mistyped_command(folder: Path) -> None:
    assert "Did you mean `audit show`?" in refused(folder, "shwo", "report.json")


def test_the_hint_names_the_help_page_of_the_verb(folder: Path) -> None:
    assert "`audit cache --help` explains" in refused(folder, "cache", "limitt")
    assert "`audit --help` explains" in refused(folder, "m.onnx", "--nonsense")


def test_closed_standard_streams(folder: Path, model: Path) -> None:
    """As a service may be started: what is opened first must not become its standard output."""
    line = command(model.name, "--backends", "ort", "--no-confirm", "-o", "report.json")
    for streams, wrong in ((">&-", []), ("<&- >&- 2>&-", []), ("<&- >&- 2>&-", ["--nonsense"])):
        script = f'exec "$@" {streams}'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *line, *wrong], cwd=folder, env=environment(),
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (2 if wrong else 0, "", "")
        assert wrong or json_v1.load(folder / "report.json").verdict == "pass"


# --- interruption --------------------------------------------------------------------------------


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def at_work(process: subprocess.Popen[str]) -> str:
    """What the process that does the work has mapped; the one that was started only waits."""
    try:
        (worker,) = psutil.Process(process.pid).children()
        return Path(f"/proc/{worker.pid}/maps").read_text()
    except (OSError, ValueError, psutil.NoSuchProcess):
        return ""


@pytest.mark.parametrize(
    ("library", "seconds", "stop"),
    [
        ("_multiarray_umath", 0.0, signal.SIGINT),  # the workers are starting
        ("onnx_cpp2py_export", 0.0, signal.SIGINT),  # the model is being loaded
        ("onnxruntime_pybind11_state", 0.0, signal.SIGINT),  # the reference is being made
        ("onnxruntime_pybind11_state", 1.5, signal.SIGINT),  # measuring
        ("onnxruntime_pybind11_state", 0.5, signal.SIGTERM),
    ],
)
def test_interrupted(folder: Path, library: str, seconds: float, stop: signal.Signals) -> None:
    """Whatever stage it is in: no process, no temporary file and no report stays behind.

    It is stopped that many seconds after it has loaded a library, which tells its stage.
    """
    scratch = folder / "tmp"
    scratch.mkdir(exist_ok=True)
    process = subprocess.Popen(
        command(
            str(LIGHT / "light_densenet121.onnx"),
            *("--backends", "ort,ov", "--samples", "50", "-o", "report.json"),
        ),
        cwd=folder,
        env=environment(TMPDIR=str(scratch)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while library not in at_work(process):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(seconds)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + stop, err
    assert out == ""
    assert "Traceback" not in err
    assert gone(children)
    assert sorted(p.name for p in folder.iterdir()) == ["tmp"]
    assert list(scratch.iterdir()) == []


def test_children_die_with_a_killed_audit(folder: Path) -> None:
    process = subprocess.Popen(
        command(str(LIGHT / "light_densenet121.onnx"), "--backends", "ort,ov", "--samples", "50"),
        cwd=folder,
        env=environment(TMPDIR=str(folder)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children: list[psutil.Process] = []
    while len(children) < 2:
        assert process.poll() is None
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert gone(children)


def test_terminal_is_restored(folder: Path) -> None:
    """On a terminal, Ctrl-C as typed there leaves the cursor visible."""
    main, child = pty.openpty()
    process = subprocess.Popen(
        command(str(LIGHT / "light_densenet121.onnx"), "--backends", "ort", "--samples", "50"),
        cwd=folder,
        env=environment(TERM="xterm"),
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    os.close(child)
    seen = b""
    deadline = time.monotonic() + 20
    while b"\x1b[?25l" not in seen and time.monotonic() < deadline:
        seen += read(main)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    while chunk := read(main):
        seen += chunk
    assert process.wait(60) == 130
    os.close(main)
    assert b"\x1b[?25l" in seen, "the progress display never appeared"
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l")
    assert b"Traceback" not in seen


def read(descriptor: int) -> bytes:
    """What arrives within 5 s; nothing at the end, which a pseudo-terminal reports as EIO."""
    if not select.select([descriptor], [], [], 5)[0]:
        return b""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
