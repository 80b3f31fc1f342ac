"""The command works in a child process, and this one sees it end.

The reference runs a stranger's model inside native code, in the auditor's own process, and large
files are mapped into its memory: a crash there, or a file that somebody shortens meanwhile, must
end in one sentence too. So the process that the user started only waits. It holds the folder for
temporary files, ends whatever outlives the child, removes the folder, and tells how it ended. A
second Ctrl-C ends the child at once, whatever native code it is in.

A folder whose owner was killed itself is removed by the next command.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PREFIX = "audit-"
_LOCK = ".lock"  # in the folder, locked as long as its owner lives
_CRASH = "crash.txt"  # in the folder: what Python's faulthandler says
_NOTE = 256  # bytes of what the child is doing
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl.h
_PATIENCE = 5.0  # seconds in which killed processes are gone

Tell = Callable[[str, str, int], int]  # prints a message and a hint; returns the exit code


class Guard:
    """Runs the command in a child process and cleans up after it."""

    def __init__(self) -> None:
        """Nothing happens before ``run``."""
        self.outside = tempfile.gettempdir  # the user's folder for temporary files
        self._child = 0
        self._asked: list[int] = []  # signals that came, in order
        self._note: mmap.mmap | None = None

    def note(self, doing: str) -> None:
        """Remember what the command is doing, for the case that it ends here."""
        if self._note is not None:
            self._note[:] = doing.encode()[: _NOTE - 1].ljust(_NOTE, b"\0")

    def run(self, work: Callable[[], int], tell: Tell) -> NoReturn:
        """End this process with the exit code of ``work``, done in a child.

        Where there is no ``fork`` the work is done here.

        Args:
            work: what to do; it installs signal handlers of its own.
            tell: says why the child died, when it did.
        """
        if sys.platform != "linux":
            sys.exit(work())
        folder = _own_folder()
        self._note = mmap.mmap(-1, _NOTE)
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what outlives the child becomes ours to end
        # Not a moment in which a signal could meet the wrong handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        parent = os.getpid()
        outer = tempfile.gettempdir() if folder else ""
        self._child = os.fork()
        if self._child == 0:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before that
                os._exit(1)
            self.outside = lambda: outer
            _work(work, folder)
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        _end_orphans()
        crash = _innermost(folder)
        if folder:
            _remove(folder)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            code = self._died(-code, crash, tell)
        sys.stdout.flush()
        os._exit(code)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Hand a signal on; end the child at the second, for native code hears none."""
        self._asked.append(number)
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, number if len(self._asked) == 1 else signal.SIGKILL)

    def _died(self, number: int, crash: str, tell: Tell) -> int:
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # the progress display hides the cursor
        if self._asked:
            return 128 + self._asked[0]
        note = self._note[:].rstrip(b"\0").decode("utf-8", "ignore") if self._note else ""
        name = signal.Signals(number).name
        if number == signal.SIGKILL:
            return tell(
                f"the audit was killed{_during(note)}, which is how Linux ends a process when "
                "memory runs out",
                "Give smaller inputs with --shape or --data, or fewer backends at a time.",
                2,
            )
        if number == signal.SIGBUS:
            return tell(
                f"a file was shortened while it was being read{_during(note)}, or its disk failed",
                "Let nothing write to the model, its weights, data and traces, and have room for "
                "temporary files; then run it again.",
                2,
            )
        if note.startswith("reference"):
            return tell(
                f"the reference, ONNX Runtime without optimisation, was ended by {name}"
                f"{_during(note)}{crash}",
                "This model crashes it: nothing can be compared with. Try a newer onnxruntime.",
                2,
            )
        return tell(
            f"internal error: ended by {name}{_during(note)}{crash}",
            "This is a bug in the auditor or in a library of it. Please report it.",
            4,
        )


def _during(note: str) -> str:
    return f" ({note})" if note else ""


def _work(work: Callable[[], int], folder: Path | None) -> NoReturn:
    """The child's life."""
    import faulthandler
    import traceback

    from auditor.processes import memory

    memory.one_heap()
    if folder:
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None  # look at TMPDIR again
        with contextlib.suppress(OSError):
            faulthandler.enable((folder / _CRASH).open("w"), all_threads=False)
    code = 4
    try:
        code = work()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except KeyboardInterrupt:  # before its own handlers were there
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        # Engines' own code for the end crashes now and then; nothing is left to save.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def _own_folder() -> Path | None:
    """A private folder for temporary files; None where none can be made."""
    import fcntl

    try:
        _sweep(Path(tempfile.gettempdir()))
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        draft = folder / f"{_LOCK}.draft"
        # Never closed: the lock is held until this process and its child are gone.
        lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        draft.rename(folder / _LOCK)
    except OSError:  # full or read-only: what needs the folder will say so
        return None
    return folder


def _sweep(where: Path) -> None:
    """Remove the folders of earlier commands that were killed."""
    import fcntl

    for folder in where.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError while its owner lives
                _remove(folder)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder that processes which are being killed may still write to."""
    deadline = time.monotonic() + _PATIENCE
    while folder.exists() and time.monotonic() < deadline:
        for place, _, _ in os.walk(folder):  # a worker may have locked its own
            with contextlib.suppress(OSError):
                os.chmod(place, 0o700)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.05)


def _end_orphans() -> None:
    """Kill every process that came to this one when its own parent died."""
    deadline = time.monotonic() + _PATIENCE
    children = Path("/proc/self/task", str(os.getpid()), "children")
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for number in children.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            time.sleep(0.01)


def _innermost(folder: Path | None) -> str:
    """Where in the auditor's own code a crash was, from what faulthandler wrote."""
    if folder is None:
        return ""
    with contextlib.suppress(OSError):
        for line in (folder / _CRASH).read_text("utf-8", "replace").splitlines():
            if "/auditor/" in line and " in " in line:
                return f" in {line.rpartition(' in ')[2]}"
    return ""


guard = Guard()
