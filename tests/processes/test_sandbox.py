"""``--sandbox``: what is not needed can neither be read, written nor reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import auditor
import auditor.errors
from auditor.processes import sandbox
from tests.helpers import untimed

ROOT = Path(auditor.__file__).parent.parent

needs_landlock = pytest.mark.skipif(sandbox.version() == 0, reason="this system has no Landlock")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return tmp_path


def ran(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def audited(folder: Path, *more: str, before: tuple[str, ...] = ()) -> Any:
    report = folder / "out" / "report.json"
    command = [sys.executable, "-m", "auditor", str(folder / "in" / "model.onnx"), "--no-cache"]
    done = ran([*before, *command, "--backends", "ort,ov", "-o", str(report), *more])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in report.parent.iterdir()] == ["report.json"]
    return untimed(json.loads(report.read_text()))


def network_namespace() -> tuple[str, ...]:
    return ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")


@needs_landlock
def test_an_audit_is_the_same_inside(folder: Path) -> None:
    assert audited(folder, "--sandbox") == audited(folder)


def test_an_audit_needs_no_network(folder: Path) -> None:
    if ran([*network_namespace(), "true"]).returncode != 0:
        pytest.skip("no network namespace can be made here")
    assert audited(folder, before=network_namespace()) == audited(folder)


@needs_landlock
def test_what_is_closed(folder: Path) -> None:
    """What a model that has taken over an engine would try."""
    secret, scratch = folder / "secret.txt", folder / "scratch"
    secret.write_text("secret")
    scratch.mkdir()
    (folder / "in" / "link").symlink_to(secret)
    code = f"""
import os, signal, socket, subprocess
from pathlib import Path
from auditor.processes import sandbox

folder = Path({str(folder)!r})
sandbox.enter([folder / "in"], [folder / "out"])

def tried(what, do):
    try:
        do()
    except (OSError, subprocess.CalledProcessError):
        print("closed", what)
    else:
        print("open", what)

tried("read beside", (folder / "secret.txt").read_text)
tried("read by a link", (folder / "in" / "link").read_text)
tried("read by a program", lambda: subprocess.run(["cat", str(folder / "secret.txt")],
      check=True, stderr=subprocess.DEVNULL))
tried("list", lambda: os.listdir(folder))
tried("shadow", Path("/etc/shadow").read_text)
tried("write to the model's folder", lambda: (folder / "in" / "x").write_text("x"))
tried("change the model", lambda: (folder / "in" / "model.onnx").open("r+b"))
tried("cut the model", lambda: os.truncate(folder / "in" / "model.onnx", 0))
tried("remove the model", (folder / "in" / "model.onnx").unlink)
tried("write elsewhere", lambda: Path("/tmp/sandbox-escape").write_text("x"))
tried("connect", lambda: socket.create_connection(("127.0.0.1", {os.getpid() % 1000 + 9000}), 2))
tried("look at another process", lambda: Path("/proc/{os.getpid()}/environ").read_bytes())
tried("signal another process", lambda: os.kill({os.getpid()}, 0))
tried("read the model", (folder / "in" / "model.onnx").read_bytes)
tried("write the report", lambda: (folder / "out" / "x").write_text("x"))
tried("use the temporary folder", lambda: (folder / "scratch" / "x").write_text("x"))
"""
    done = ran([sys.executable, "-c", code], TMPDIR=str(scratch))
    assert done.returncode == 0, done.stderr
    said = dict(reversed(line.split(" ", 1)) for line in done.stdout.splitlines())
    opened = {what for what, state in said.items() if state == "open"}
    wanted = {"read the model", "write the report", "use the temporary folder"}
    if sandbox.version() < 6:
        opened.discard("signal another process")
    if sandbox.version() < 3:
        opened.discard("cut the model")
    assert opened == wanted
    assert len(said) == 16


def test_it_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never silently an audit without it."""
    monkeypatch.setattr(sandbox, "version", lambda: 0)
    with pytest.raises(auditor.errors.UsageError, match="no Landlock"):
        sandbox.enter([tmp_path], [])
