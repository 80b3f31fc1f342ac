"""One process per backend: a crash, a hang or a full memory becomes a named gap.

The parent talks to ``python -m auditor.processes.worker ID`` in JSON lines over the child's
standard input and output; arrays travel in safetensors files inside a private folder. Whatever
the engine prints goes to a log file, whose last lines are kept with the gap.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from auditor.errors import AuditError, BackendError, UsageError
from auditor.processes import memory
from auditor.processes.limits import Limits, apply, physical_memory
from auditor.records.backend import Availability

if TYPE_CHECKING:
    from auditor.ports import Arrays
    from auditor.processes.wire import Sent

# -P keeps the user's current folder from shadowing the engines' modules.
_COMMAND = (sys.executable, "-P", "-X", "faulthandler", "-m", "auditor.processes.worker")
_LOG_LINES = 12
# What faulthandler and TVM's own handler say before the stack of a crash.
_CRASHES = ("Fatal Python error", "!!!!!!! Segfault encountered")
_POLL = 0.25  # seconds between looks at whether it still runs
_LOG_BYTES = 1 << 16  # of the log's end are read
_GRACE = 2.0  # seconds a worker may take to end by itself after its input is closed
_ROOM = 1 << 16  # bytes; a disk that has no more is full
MAKE_ROOM = "Make room in the folder for temporary files, or set TMPDIR to another one."
_PAUSE = 0.05  # seconds after which another program's threads sleep
_TURN, _TURN_SECONDS = 3, 0.1  # runs in a turn of a race, fewer once so much time is over
_ANSWER = 1 << 28  # bytes of one answer: far more than the largest models need

# What reading an answer raises that is not what it should be.
_UNUSABLE = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError),
    *(TypeError, ValueError),
)
_FIRST = "availability"  # what any worker is asked first

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a worker says of a step that it could not do."""

    kind: Literal["usage", "backend"]
    message: str
    hint: str
    stage: str


class Worker:
    """The parent's end of one backend process."""

    def __init__(self, backend: str, workdir: Path, limits: Limits) -> None:
        """Start the process; it begins to import its engine at once.

        Args:
            backend: the backend's id.
            workdir: a private folder for this worker's files.
            limits: what the process may use.
        """
        self.backend = backend
        self.workdir = workdir
        self.limits = limits
        self._importing = False  # whether it was asked early whether its engine can be used
        self._rest = b""  # what it said after its last answer
        self._log = workdir / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_COMMAND, backend, json.dumps(asdict(limits))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"TMPDIR": str(workdir), "PYTHONPATH": module_path()},
                # Its own group: Ctrl-C reaches the parent alone, which then ends the children.
                start_new_session=True,
            )

    def call(self, do: str, kind: type[T], *, timeout: float, **arguments: Any) -> T:
        """Have the worker do one thing and return its answer, a ``kind``.

        Raises:
            BackendError: it failed, crashed, ran out of time, or its answer makes no sense.
            UsageError: it says the user asked for something impossible.
        """
        deadline = time.monotonic() + timeout
        try:
            if self._importing and do != _FIRST:
                self._read_line(do, deadline, timeout)
            if not (self._importing and do == _FIRST):
                self._ask(do, **arguments)
            self._importing = False
            line = self._read_line(do, deadline, timeout)
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._crashed(do)
        from auditor.processes.wire import decode

        with self._believed(do):
            answer = json.loads(line)
            if "error" not in answer:
                result: T = decode(kind, answer["result"])
                return result
            error = decode(_Failure, answer["error"])
        if error.kind == "usage":
            raise UsageError(error.message, error.hint)
        raise self._failed(error.message, error.stage or do, error.hint)

    def import_engine(self) -> None:
        """Have it import its engine; the answer waits for the first ``call``."""
        with contextlib.suppress(BrokenPipeError):  # said then
            self._ask(_FIRST)
            self._importing = True

    def _ask(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()

    def fetch(self, stage: str, sent: Sent, needed: Collection[str] = ()) -> Arrays:
        """The tensors of an answer, whose file is removed.

        Raises:
            BackendError: they are damaged, or a ``needed`` one is missing.
        """
        from auditor.processes.wire import load

        with self._believed(stage):  # never a file outside its own folder, whatever it says
            if missing := sorted(set(needed).difference(sent.names)):
                raise LookupError(f"without {', '.join(missing[:4])}")
            return load(self.workdir / Path(sent.path).name, sent.names)

    @contextlib.contextmanager
    def _believed(self, stage: str) -> Iterator[None]:
        """Turn what is wrong with an answer into a gap; nothing else is asked of that process."""
        try:
            yield
        except _UNUSABLE as error:
            self.kill()
            what = f"its answer cannot be used ({type(error).__name__}: {error})"[:500]
            raise self._failed(what, stage) from error

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process and everything it started, within moments."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self.kill()
        if self._process.stdout:
            self._process.stdout.close()

    def kill(self) -> None:
        """End the process group at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read_line(self, stage: str, deadline: float, timeout: float) -> bytes:
        """One line of its output without the end; nothing where it has ended."""
        assert self._process.stdout
        descriptor = self._process.stdout.fileno()
        line = bytearray()
        chunk = self._rest
        while (end := chunk.find(b"\n")) < 0:
            line += chunk
            if len(line) > _ANSWER:
                raise self._stopped(f"answered with more than {_ANSWER >> 20} MiB", stage)
            if time.monotonic() > deadline:
                hint = "Raise --timeout if the model is large."
                raise self._stopped(f"did not answer within {timeout:g} s", stage, hint)
            ended = not self.alive
            if select.select([descriptor], [], [], 0 if ended else _POLL)[0]:
                chunk = os.read(descriptor, 1 << 16)
                if not chunk:
                    return b""
                continue
            if ended:  # a process that it started may still hold its output open
                return b""
            chunk = b""
        self._rest = chunk[end + 1 :]
        return bytes(line + chunk[:end])

    def _stopped(self, why: str, stage: str, hint: str = "") -> BackendError:
        self.kill()
        return self._failed(f"{why} and was stopped", stage, hint)

    def _failed(self, why: str, stage: str, hint: str = "") -> BackendError:
        if self._disk_full():  # engines rarely say so
            why, hint = f"{why}; no space left in its temporary folder", MAKE_ROOM
        return BackendError(why, hint, stage=stage, log=self._log_tail())

    def _disk_full(self) -> bool:
        try:
            disk = os.statvfs(self.workdir)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize < _ROOM

    def _crashed(self, stage: str) -> BackendError:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            memory = ", which is how Linux ends a process when memory runs out"
            reason = f"the process was killed by {name}{memory if name == 'SIGKILL' else ''}"
        else:
            reason = f"the process ended with exit code {code}"
        return self._failed(reason, stage)

    def _log_tail(self) -> tuple[str, ...]:
        """The engine's last words; after a crash also the innermost part of its stack."""
        lines: list[str] = []
        with contextlib.suppress(OSError):
            text = self._log.read_bytes()[-_LOG_BYTES:].decode("utf-8", "replace")
            lines = [line for line in text.splitlines() if line.strip()]
        fatal = (i for i, line in enumerate(lines) if line.startswith(_CRASHES))
        crash = next(fatal, None)
        if crash is None:
            return tuple(lines[-_LOG_LINES:])
        # Whole stacks, of every thread, would push the words out: the innermost place will do.
        stack = [line for line in lines[crash:] if line.startswith('  File "')][:2]
        said = lines[: crash + 1][-_LOG_LINES + len(stack) :]
        return (*said, *stack)


_early: list[Worker] = []  # started before anybody asked for them


def start_early(backends: Sequence[str]) -> None:
    """Start workers that ``workers`` may soon ask for, without ``limits`` of its own.

    Understanding a command line takes about as long as importing an engine: so they need not wait
    for one another. The calling thread must live as long as they shall.
    """
    for backend in backends:
        worker = Worker(backend, Path(mkdtemp(prefix="audit-")), Limits(physical_memory()))
        worker.import_engine()
        _early.append(worker)


def _started_early(backend: str, limits: Limits) -> Worker | None:
    for worker in _early:
        if (worker.backend, worker.limits) == (backend, limits):
            _early.remove(worker)
            return worker
    return None


@contextlib.contextmanager
def workers(backends: Sequence[str], limits: Limits | None = None) -> Iterator[tuple[Worker, ...]]:
    """One running worker per entry of ``backends``, each with a private folder.

    Without ``limits``, each may use as much memory as the machine has.

    However the block is left, Ctrl-C included, no process and no file stays behind. The
    processes belong to the calling thread: Linux ends them should that thread die.
    """
    limits = limits or Limits(physical_memory())
    started: list[Worker] = []
    with TemporaryDirectory(prefix="audit-", ignore_cleanup_errors=True) as root:
        try:
            for index, backend in enumerate(backends):
                if (worker := _started_early(backend, limits)) is None:
                    folder = Path(root) / f"{index}-{backend}"
                    folder.mkdir()
                    worker = Worker(backend, folder, limits)
                started.append(worker)
            for worker in _early:  # nobody needs them, nor waits for their imports
                worker.kill()
            _end(_early)
            yield tuple(started)
        except BaseException:
            for worker in started:
                worker.kill()
            raise
        finally:
            _end(started)


def _end(ending: list[Worker]) -> None:
    """Close workers, and remove their folders."""
    while ending:
        worker = ending.pop()
        worker.close()
        shutil.rmtree(worker.workdir, ignore_errors=True)


def module_path() -> str:
    """Where the child finds this very package, installed or run from a checkout."""
    inherited = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, inherited] if inherited else [here])


def availability(worker: Worker, timeout: float) -> Availability:
    """Whether a worker's backend can be used here; a crash is an answer too."""
    try:
        return worker.call("availability", Availability, timeout=timeout)
    except BackendError as error:
        last = f" ({error.log[-1].strip()})" if error.log else ""
        return Availability(
            False, worker.backend, reason=error.message + last, remedy=error.hint or None
        )


def probe(backends: Sequence[str]) -> list[tuple[str, Availability]]:
    """Ask each backend, in a process of its own, whether it can be used here: two minutes each."""
    with workers(backends) as started, ThreadPoolExecutor() as pool:
        answers = [pool.submit(availability, worker, 120.0) for worker in started]
        try:
            return [(w.backend, a.result()) for w, a in zip(started, answers, strict=True)]
        except BaseException:
            for worker in started:  # or leaving the pool would wait for their answers
                worker.kill()
            raise


# --- the child's end ---------------------------------------------------------------------------


class _Session:
    """What a worker holds between requests."""

    def __init__(self, backend: str, unlimited: tuple[str, ...]) -> None:
        from auditor import discovery

        self.backend = discovery.backend(backend)
        self.unlimited = unlimited
        self.built: Any = None
        self.instrumented: Any = None
        self.ablated: Any = None
        self.plain: Any = None
        self.noisy = False  # whether any two plain runs on the same inputs differed
        self.files = 0

    def availability(self) -> Any:
        from auditor.processes.wire import encode

        return encode(replace(self.backend.availability(), unlimited=self.unlimited))

    def identity(self) -> str:
        """Hash of every library and module in this process: path, size and time; "" if unknown."""
        import hashlib

        found = {str(getattr(m, "__file__", None) or "") for m in list(sys.modules.values())}
        try:
            for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
                path = line.partition("/")[2]
                if ".so" in path:
                    found.add(f"/{path}")
            stats = [(p, os.stat(p)) for p in sorted(found) if p and os.path.exists(p)]
        except OSError:  # not Linux
            return ""
        digest = hashlib.sha256()
        for path, stat in stats:
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def build(self, request: Any) -> Any:
        from auditor.ports import Switchable
        from auditor.processes.wire import decode, encode
        from auditor.records.backend import BuildRequest

        self.built = self.backend.build(decode(BuildRequest, request))
        memory.give_back()  # what compiling took and left
        switches = self.built.switches if isinstance(self.built, Switchable) else ()
        return {
            "provenance": encode(self.built.provenance),
            "blocked": self.built.blocked,
            "switches": encode(switches),
        }

    def export(self, request: Any, feeds: Any) -> Any:
        """Write an ONNX file of the source."""
        from auditor.ports import Exporting
        from auditor.processes.wire import decode
        from auditor.records.backend import ExportRequest

        assert isinstance(self.backend, Exporting)
        frozen = self.backend.export(decode(ExportRequest, request), self._load(feeds))
        return {"frozen": list(frozen)}

    def constants(self) -> Any:
        """The constants of the file that was loaded."""
        from auditor.ports import Holding

        return self._save(self.built.constants() if isinstance(self.built, Holding) else {})

    def grids(self) -> Any:
        """What activations are rounded to, of a model that was quantised for the build."""
        from auditor.ports import Gridded

        return self._save(self.built.grids() if isinstance(self.built, Gridded) else {})

    def run(self, feeds: Any, repeats: int) -> Any:
        """Run the plain program ``repeats`` times; the first run's outputs are kept."""
        from auditor.comparison import metrics

        inputs = self._load(feeds)
        self.plain = self.built.run(inputs)
        noise = 0.0
        for _ in range(repeats - 1):
            again = self.built.run(inputs)
            if not metrics.bitwise_equal(again, self.plain):
                noise = max(noise, metrics.relative_l2(again, self.plain, tuple(self.plain)))
        self.noisy |= noise > 0
        return {"run_to_run": noise, "outputs": self._save(self.plain)}

    def instrument(self, feeds: Any, last: bool) -> Any:
        """Add probes; ``last``: no other sample will be run plainly."""
        from auditor.ports import Releasable, Traced
        from auditor.processes.wire import encode

        if last and isinstance(self.built, Releasable):
            self.built.release()  # or two programs would be in memory
        self.instrumented = self.built.instrument(self._load(feeds))
        memory.give_back()
        made = self.instrumented
        return {
            "probes": encode(made.probes),
            "skipped": encode(made.skipped),
            "program_unchanged": made.program_unchanged,
            "rebuilt": made.rebuilt,
            "origins": encode(made.origins if isinstance(made, Traced) else ()),
            "kernels": encode(made.kernels if isinstance(made, Traced) else None),
        }

    def capture(self, feeds: Any, last: bool) -> Any:
        """Run with probes and compare the final outputs with the last plain run's, bit by bit.

        Of a program that does not repeat its own bits the tensors are sent with the final outputs
        of their own run. ``last``: nothing else will be captured, so that the program with probes
        can go.
        """
        from auditor.comparison import metrics

        capture = self.instrumented.run(self._load(feeds))
        equal = metrics.bitwise_equal(capture.outputs, self.plain)
        names = () if equal else tuple(self.plain)
        answer = {
            "outputs_bitwise_equal": equal,
            "difference": metrics.relative_l2(capture.outputs, self.plain, names),
            "noisy": self.noisy,
            "tensors": self._save(capture.tensors | (capture.outputs if self.noisy else {})),
        }
        if last:
            self.instrumented = self.plain = None
            del capture
            memory.give_back()
        return answer

    def ablate(self, request: Any, backend: str | None) -> Any:
        """Build another program beside the plain one; what was built so before is dropped.

        ``backend``: the one to build it, when it is another.
        """
        from auditor import discovery
        from auditor.processes.wire import decode
        from auditor.records.backend import BuildRequest

        self.instrumented = self.ablated = None  # never three programs in memory
        maker = discovery.backend(backend) if backend else self.backend
        self.ablated = maker.build(decode(BuildRequest, request))
        return {"blocked": self.ablated.blocked}

    def contrast(self, feeds: Any) -> Any:
        """Run the plain program and the ablated one."""
        from auditor.comparison import metrics

        inputs = self._load(feeds)
        plain, ablated = self.built.run(inputs), self.ablated.run(inputs)
        return {
            "bitwise_equal": metrics.bitwise_equal(ablated, plain),
            "plain": self._save(plain),
            "ablated": self._save(ablated),
        }

    def race(self, feeds: Any, rounds: int, seconds: float) -> Any:
        """Median wall seconds of one run of the plain program and of the ablated one.

        They take turns, so that whatever else the machine does slows both alike; no new round
        begins once ``seconds`` are over. A turn is a few runs: threads of a program go on spinning
        for a while after its run (OpenVINO took four times as long right after ONNX Runtime), so
        each turn begins with a pause, unless both have the same threads, and a run that does not
        count.
        """
        import statistics
        import time

        from auditor.ports import Sharing

        inputs = self._load(feeds)
        same = type(self.built) is type(self.ablated) and isinstance(self.built, Sharing)
        pause = 0.0 if same and self.built.shared_threads else _PAUSE
        taken: tuple[list[float], list[float]] = ([], [])
        begun = time.perf_counter()
        for number in range(rounds):
            if number and time.perf_counter() - begun > seconds:
                break
            for build, times in zip((self.built, self.ablated), taken, strict=True):
                time.sleep(pause)
                build.run(inputs)
                turn = time.perf_counter()
                for _ in range(_TURN):
                    start = time.perf_counter()
                    build.run(inputs)
                    times.append(time.perf_counter() - start)
                    if time.perf_counter() - turn > _TURN_SECONDS:
                        break
        return [statistics.median(times) for times in taken]

    def _save(self, tensors: Any) -> Any:
        from auditor.processes.wire import save

        self.files += 1
        path = Path(os.environ["TMPDIR"]) / f"from-worker-{self.files}.safetensors"
        return {"path": str(path), "names": save(path, tensors)}

    @staticmethod
    def _load(message: Any) -> Any:
        from safetensors.numpy import load_file

        from auditor.processes.wire import named

        # The parent's file stays: other requests read it again.
        stored = load_file(message["path"], backend="pread")
        return named(stored, message["names"])


def _serve(backend: str, limits: Limits) -> None:
    unlimited = apply(limits)
    # The engines print to standard output: keep the channel to ourselves, send them to the log.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session: _Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            session = session or _Session(backend, unlimited)
            answer = {"result": getattr(session, do)(**request)}
        except AuditError as error:
            answer = {"error": _error(error)}
        except MemoryError:
            answer = {"error": _error(BackendError("std::bad_alloc", stage=""))}
        except Exception as error:  # an engine may raise anything; it becomes a gap
            import traceback

            traceback.print_exception(error, limit=-2, chain=False)  # see _LOG_LINES
            message = f"{type(error).__name__}: {str(error).strip()}"[:2000]
            answer = {"error": _error(BackendError(message, stage=""))}
        channel.write(json.dumps(answer) + "\n")
    # Engines' own shutdown code crashes now and then; nothing is left to save.
    os._exit(0)


def _error(error: AuditError) -> dict[str, str]:
    kind = "usage" if isinstance(error, UsageError) else "backend"
    message, hint = error.message, error.hint
    if "bad_alloc" in message:  # as C++ says it
        message, hint = f"ran out of memory ({message})", "Raise --worker-memory if it was set."
    return {"kind": kind, "message": message, "hint": hint, "stage": getattr(error, "stage", "")}


if __name__ == "__main__":
    _serve(sys.argv[1], Limits(**json.loads(sys.argv[2])))
