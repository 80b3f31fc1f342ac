"""The process that waits for the command: whatever ends the command is told in one sentence."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import auditor

ROOT = Path(auditor.__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a child on Linux only")


def guarded(
    body: str, scratch: Path, *, wait: bool = True
) -> subprocess.Popen[str] | subprocess.CompletedProcess[str]:
    """Run ``body`` as the command's work."""
    code = (
        "import ctypes, os, signal, sys, time\n"
        "from auditor.processes.guard import guard\n"
        "def tell(message, hint, code):\n"
        "    print(message, '|', hint, file=sys.stderr)\n"
        "    return code\n"
        "def work():\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "guard.run(work, tell)\n"
    )
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return 3", 3, ""),
        ("print('said'); sys.exit(1)", 1, ""),
        ("ctypes.string_at(0)", 4, "ended by SIGSEGV"),
        ("guard.note('reference: run'); ctypes.string_at(0)", 2, "the reference"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 2, "memory runs out"),
        ("raise ValueError", 4, "ValueError"),
    ],
)
def test_how_it_ends(tmp_path: Path, body: str, code: int, words: str) -> None:
    done = guarded(body, tmp_path)
    assert (done.returncode, list(tmp_path.iterdir())) == (code, [])
    assert words in done.stderr
    assert (done.stdout == "said\n") == ("said" in body)


def test_a_file_that_is_shortened_while_it_is_mapped(tmp_path: Path) -> None:
    body = (
        "import mmap\n"
        "file = open(os.environ['TMPDIR'] + '/weights', 'w+b')\n"
        "file.truncate(1 << 16)\n"
        "mapped = mmap.mmap(file.fileno(), 1 << 16)\n"
        "file.truncate(0)\n"
        "mapped[0]"
    )
    done = guarded(body, tmp_path)
    assert done.returncode == 2
    assert "a file was shortened while it was being read" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_second_interrupt_ends_native_code(tmp_path: Path) -> None:
    """A call that never returns to Python hears no signal; whatever it started ends too."""
    body = (
        "import subprocess\n"
        "subprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
        "print('now', flush=True)\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "while True:\n"
        "    ctypes.CDLL(None).pause()"
    )
    process = guarded(body, tmp_path, wait=False)
    assert isinstance(process, subprocess.Popen)
    assert process.stdout
    assert process.stdout.readline() == "now\n"
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 2
    for _ in range(2):
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    assert process.wait(30) == 128 + signal.SIGINT
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_left_goes_with_the_next(tmp_path: Path) -> None:
    body = "print(os.environ['TMPDIR'], flush=True)\ntime.sleep(3600)"
    process = guarded(body, tmp_path, wait=False)
    assert isinstance(process, subprocess.Popen)
    assert process.stdout
    left = Path(process.stdout.readline().strip())
    (child,) = psutil.Process(process.pid).children()
    assert guarded("return 0", tmp_path).returncode == 0
    assert left.exists()  # its owner lives
    process.kill()
    process.wait()
    child.wait(20)
    assert left.exists()
    assert guarded("return 0", tmp_path).returncode == 0
    assert not left.exists()


def test_folders_of_others_stay(tmp_path: Path) -> None:
    """Not those that are no such folder, nor one in which a link stands for the lock."""
    (tmp_path / "audit-report").mkdir()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / ".lock").touch()
    (tmp_path / "audit-link").symlink_to(victim)
    trap = tmp_path / "audit-trap"
    trap.mkdir()
    (trap / ".lock").symlink_to(victim / ".lock")
    held = tmp_path / "audit-held"
    held.mkdir()
    with (held / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert guarded("return 0", tmp_path).returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        *("audit-report", "victim", "audit-link", "audit-trap", "audit-held")
    }
