"""A fleet on this machine and on a Ray cluster of one node; several nodes: benchmarks/fleet.py."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
import onnx
import psutil
import pytest
from jsonschema import Draft202012Validator

from auditor.errors import UsageError
from auditor.fleet import worklist
from tests.helpers import onnx_model

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "reports/fleet_v1.schema.json").read_text("utf-8"))
LIST = """
[audit]
samples = 1
cache = false
[[model]]
path = "good.onnx"
[[model]]
path = "cut.onnx"
backends = ["ort"]
[[backend]]
id = "ort"
[[backend]]
id = "ort"
name = "ort elsewhere"
needs = ["elsewhere"]
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A work list with a model, and the half of one."""
    weight = np.random.default_rng(0).standard_normal((8, 16), np.float32)
    model = onnx_model(
        "(float[2, 8] x) => (float[2, 16] y) { [product] y = MatMul(x, w) }", {"w": weight}
    )
    onnx.save(model, tmp_path / "good.onnx")
    whole = (tmp_path / "good.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    path = tmp_path / "fleet.toml"
    path.write_text(LIST)
    return path


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("samples = 1", "samples = 0", "line 3: `samples` is 0"),
        ("samples = 1", "data = 'x.npz'", "line 3: `data` is no key here"),
        ("cache = false", "cache = 'no'", "line 4: `cache` is 'no'"),
        ('"good.onnx"', '"none.onnx"', "line 6: `path` names"),
        ('["ort"]', '["orts"]', "line 9: `orts` names no [[backend]]"),
        ('id = "ort"', 'id = "orts"', "line 11: `orts` is no backend"),
        ("ort elsewhere", "ort", "line 14: `ort` is there twice"),
        ('["elsewhere"]', "[3]", "line 15: `needs` is [3]"),
        ("[audit]", "[audit", "cannot be read"),
    ],
)
def test_errors_name_the_line(fleet: Path, before: str, after: str, said: str) -> None:
    assert before in LIST
    fleet.write_text(LIST.replace(before, after))
    with pytest.raises(UsageError) as caught:
        worklist.load(fleet)
    assert said in caught.value.message


@contextlib.contextmanager
def running(fleet: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "auditor", "fleet", str(fleet), "--wait", "0", *arguments],
        cwd=fleet.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def kill_one(below: int, end: threading.Event) -> None:
    """Kill the first audit that is seen below a process."""
    while not end.is_set():
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(below).children(recursive=True):
                words = child.cmdline()  # a process that is yet to become an audit has -c
                if "--backends" in words and "-c" not in words and "good.onnx" in words[3]:
                    child.kill()
                    return


def wait_for_end(fleet: Path, process: subprocess.Popen[str]) -> list[dict[str, object]]:
    """What holds wherever the list was run; the attempts at its one good cell."""
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 2, printed + said  # half a model is no model
    path = fleet.parent / "fleet-report/fleet.json"
    assert path.exists(), printed + said
    report = json.loads(path.read_text("utf-8"))
    Draft202012Validator(SCHEMA).validate(report)
    good, elsewhere, cut = report["cells"]
    assert (good["verdict"], good["exit_code"], good["gap"]) == ("pass", 0, None)
    assert "cut.onnx" in cut["gap"]["reason"]
    assert cut["exit_code"] == 2
    assert "elsewhere" in elsewhere["gap"]["reason"]
    assert not elsewhere["attempts"]
    assert "[3/3]" in said
    assert "gap" in printed
    own = json.loads((fleet.parent / "fleet-report" / good["report"]).read_text("utf-8"))
    assert own["model"]["sha256"] == good["sha256"]
    return list(good["attempts"])


def test_a_killed_audit_is_made_again_and_comes_in_once(fleet: Path) -> None:
    with running(fleet) as process:
        end = threading.Event()
        killer = threading.Thread(target=kill_one, args=(process.pid, end))
        killer.start()
        lost, kept = wait_for_end(fleet, process)
        end.set()
        killer.join()
    assert "signal 9" in str(lost["lost"])
    assert kept["lost"] is None
    show = [sys.executable, "-m", "auditor", "show", str(fleet.parent / "fleet-report/fleet.json")]
    shown = subprocess.run(show, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "ort elsewhere" in shown.stdout


def test_on_a_cluster_too(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}"]
    start += ["--include-dashboard=false", "--disable-usage-stats", "--block", "--num-cpus=1"]
    start += ["--object-store-memory=80000000", '--resources={"backend_ort": 1}']
    with subprocess.Popen(
        start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as head:
        try:
            said: list[str] = []
            for line in cast("IO[str]", head.stdout):  # its port listens before it has a node
                said.append(line)
                if "Ray runtime started" in line:
                    break
            assert head.poll() is None, "".join(said)
            with running(fleet, "--address", f"127.0.0.1:{port}") as process:
                (kept,) = wait_for_end(fleet, process)
        finally:
            head.terminate()
            head.wait(30)
    assert kept["lost"] is None
