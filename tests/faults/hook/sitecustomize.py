"""A real fault inside a worker, at one stage of one backend. Never part of what is installed.

Python imports a module of this name at its start when its folder is on PYTHONPATH (``run.py``
puts it there). It does nothing but in the worker of the backend that ``FAULT`` names; there it
waits for the stage, and then fails in earnest: the signals, the full memory and the full disk are
the system's own.
"""

from __future__ import annotations

import json
import os
import sys

STAGES = (
    *("availability", "build", "constants", "run", "instrument", "capture"),
    *("ablate", "contrast", "race"),
)
LAST_WORDS = "the engine's last words"


def _arm(plan: dict[str, str]) -> None:
    from auditor import discovery

    found = discovery.backend

    def backend(id: str) -> object:  # the first thing that a worker's session does
        session = sys.modules["__main__"]._Session  # type: ignore[attr-defined]
        _wrap(session, plan)
        return found(id)

    discovery.backend = backend  # type: ignore[assignment]


def _wrap(session: type, plan: dict[str, str]) -> None:
    stage = plan["stage"]
    do = getattr(session, stage)
    armed = [True]

    def faulty(self: object, **request: object) -> object:
        if not armed.pop() if armed else True:
            return do(self, **request)
        print(f"{LAST_WORDS}: {plan['kind']} at {stage}", file=sys.stderr, flush=True)
        open(plan["reached"], "w").close()
        kind, moment = plan["kind"], plan["moment"]
        if kind in _ANSWERS:
            return _ANSWERS[kind](do(self, **request))
        if moment == "before":
            _FAULTS[kind]()
            return do(self, **request)  # where the fault only takes something away
        if moment == "amid":  # from another thread, while the engine is at work
            import threading

            timer = threading.Thread(target=_soon, args=(_FAULTS[kind], float(plan["delay"])))
            timer.start()
            answer = do(self, **request)
            timer.join()
            return answer
        answer = do(self, **request)
        _FAULTS[kind]()
        return answer

    setattr(session, stage, faulty)


def _soon(fault: object, delay: float) -> None:
    import time

    time.sleep(delay)
    fault()  # type: ignore[operator]


# --- what happens to the process -----------------------------------------------------------------


def _segmentation_fault() -> None:
    import ctypes

    ctypes.string_at(0)


def _abort() -> None:
    import ctypes

    ctypes.CDLL(None).abort()


def _illegal_instruction() -> None:
    import signal

    os.kill(os.getpid(), signal.SIGILL)


def _division() -> None:
    import signal

    os.kill(os.getpid(), signal.SIGFPE)


def _bus_error() -> None:
    """Read a mapped file that has been shortened meanwhile."""
    import mmap
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 16)
        mapped = mmap.mmap(file.fileno(), 1 << 16)
        file.truncate(0)
        mapped[0]


def _kill() -> None:
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def _memory() -> None:
    """Take memory until the system gives no more."""
    taken = []
    while True:
        taken.append(bytes(1 << 26))  # untouched: the limit counts it all the same


def _hang() -> None:
    """Deaf to everything that can be ignored."""
    import signal
    import time

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(3600)


def _exception() -> None:
    raise RuntimeError("injected [red]\x1b[2J<script>alert(1)</script>")


def _exit() -> None:
    os._exit(7)


def _full_disk() -> None:
    """Fill the file system of the private folder to its last byte."""
    with open(os.path.join(os.environ["TMPDIR"], "filler"), "wb", buffering=0) as file:
        try:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        finally:
            os.fsync(file.fileno())


def _read_only() -> None:
    """Nothing new can be made in the private folder."""
    os.chmod(os.environ["TMPDIR"], 0o500)


def _grandchild() -> None:
    """Leave a process behind and die."""
    if os.fork() == 0:
        import time

        while True:
            time.sleep(3600)
    _kill()


def _pause() -> None:
    """Wait to be ended from outside: for what happens to the auditor meanwhile."""
    import time

    time.sleep(3600)


_FAULTS = {
    "SIGSEGV": _segmentation_fault,
    "SIGABRT": _abort,
    "SIGILL": _illegal_instruction,
    "SIGFPE": _division,
    "SIGBUS": _bus_error,
    "SIGKILL": _kill,
    "memory": _memory,
    "hang": _hang,
    "exception": _exception,
    "exit": _exit,
    "full disk": _full_disk,
    "read-only folder": _read_only,
    "grandchild": _grandchild,
    "pause": _pause,
}


# --- what happens to an answer -------------------------------------------------------------------


def _cut(answer: object) -> object:
    """Half a line."""
    from auditor.processes import worker

    worker_json = sys.modules["__main__"].json  # type: ignore[attr-defined]
    assert worker_json is not None and worker is not None
    whole = worker_json.dumps
    worker_json.dumps = lambda value: whole(value)[:-3]
    return answer


def _of_another_type(answer: object) -> object:
    return {"result": 7, "names": None}


def _flood(answer: object) -> object:
    """Far more than any answer, without an end."""
    return "x" * (300 << 20)


def _files(answer: object) -> list[dict[str, object]]:
    """The files of tensors that an answer names."""
    held = answer.values() if isinstance(answer, dict) else ()
    named = [v for v in (answer, *held) if isinstance(v, dict) and {"path", "names"} <= v.keys()]
    return named


def _short_file(answer: object) -> object:
    for file in _files(answer):
        path = str(file["path"])
        os.truncate(path, os.path.getsize(path) // 2)
    return answer


def _foreign_file(answer: object) -> object:
    """A file that is none of its own, which must be neither read nor removed."""
    for file in _files(answer):
        path = str(file["path"])
        os.unlink(path)
        os.symlink("/etc/passwd", path)
    return answer


def _missing_tensors(answer: object) -> object:
    for file in _files(answer):
        file["names"] = []
    return answer


_ANSWERS = {
    "cut answer": _cut,
    "wrong answer": _of_another_type,
    "flood": _flood,
    "short file": _short_file,
    "foreign file": _foreign_file,
    "missing tensors": _missing_tensors,
}


_COMMAND = sys.orig_argv[-4:-1] if len(sys.orig_argv) > 4 else []
if os.environ.get("FAULT") and _COMMAND[:2] == ["-m", "auditor.processes.worker"]:
    _plan = json.loads(os.environ["FAULT"])
    if _plan["backend"] == _COMMAND[2]:
        _arm(_plan)
