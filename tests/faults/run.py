"""Make every backend fail, at every stage, in every way, and look at what becomes of the audit.

``python -m tests.faults.run`` runs one audit for each backend, stage and kind of fault; ``--sample
N`` a seeded choice of them. The faults are real: ``hook/sitecustomize.py`` brings them about inside
the worker. Each audit must end by itself, name the gap with its stage, its signal and the engine's
last words, leave the other backend's part as it is without the fault, and leave nothing behind: no
process, no temporary file, no shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.helpers import nodes_of, unused

HOOK = Path(__file__).parent / "hook"
ROOT = HOOK.parents[2]
LAST_WORDS = "the engine's last words"
BACKENDS = ("ort", "ov", "tvm", "trt")
STAGES = (
    *("availability", "build", "constants", "run", "instrument", "capture"),
    *("ablate", "contrast", "race"),
)
_LATE = ("ablate", "contrast", "race")  # after the comparison, which must survive
_LOAD_FILES = ("ov",)  # backends that take --artifact
_ENDS = 90  # seconds after which an audit counts as hanging
_DISK = 16 << 20


# --- kinds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One way to fail.

    Attributes:
        says: what the gap must say, as a pattern.
        stages: where it can be brought about.
        moments: before the engine's work, amid it from another thread, or after it.
        disk: the private folder is a small file system of its own.
        unprivileged: permissions must bind the audit.
    """

    says: str
    stages: tuple[str, ...] = STAGES
    moments: tuple[str, ...] = ("before", "amid", "after")
    disk: bool = False
    unprivileged: bool = False


_WITH_FILES = ("constants", "run", "capture", "contrast")
_UNUSABLE = r"answer cannot be used"
KINDS = {
    "SIGSEGV": Kind(r"killed by SIGSEGV"),
    "SIGKILL": Kind(r"killed by SIGKILL"),
    "SIGABRT": Kind(r"killed by SIGABRT"),
    "SIGBUS": Kind(r"killed by SIGBUS"),
    "SIGILL": Kind(r"killed by SIGILL"),
    "SIGFPE": Kind(r"killed by SIGFPE"),
    "memory": Kind(r"out of memory", moments=("before",)),
    "hang": Kind(r"did not answer within", moments=("before", "after")),
    "exception": Kind(r"RuntimeError: injected", moments=("before", "after")),
    "exit": Kind(r"exit code 7"),
    "grandchild": Kind(r"killed by SIGKILL", moments=("before",)),
    "cut answer": Kind(_UNUSABLE, moments=("after",)),
    "wrong answer": Kind(_UNUSABLE, moments=("after",)),
    "flood": Kind(r"more than 256 MiB", moments=("after",)),
    "short file": Kind(_UNUSABLE, _WITH_FILES, ("after",)),
    "foreign file": Kind(_UNUSABLE, _WITH_FILES, ("after",)),
    # An artefact may hold no constants at all.
    "missing tensors": Kind(_UNUSABLE, ("run", "capture", "contrast"), ("after",)),
    "full disk": Kind(r"[Nn]o space left", moments=("before",), disk=True),
    "read-only folder": Kind(
        r"Permission denied|os error 13", moments=("before",), unprivileged=True
    ),
}
# What happens to the auditor itself while a backend is at a stage.
OUTSIDE = ("auditor killed", "Ctrl-C", "Ctrl-C twice", "SIGTERM")


@dataclass(frozen=True)
class Case:
    """One fault."""

    backend: str
    stage: str
    kind: str
    moment: str = "before"

    def __str__(self) -> str:
        return f"{self.backend} {self.stage} {self.kind} ({self.moment})"


def cases(draw: random.Random, backends: tuple[str, ...] = BACKENDS) -> list[Case]:
    """Every backend, stage and kind; the moment is drawn."""
    made = [
        Case(backend, stage, name, draw.choice(kind.moments))
        for backend in backends
        for name, kind in KINDS.items()
        for stage in kind.stages
    ]
    made += [Case(b, s, kind) for b in backends for kind in OUTSIDE for s in STAGES]
    return [case for case in made if case.stage != "constants" or case.backend in _LOAD_FILES]


# --- one audit -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How an audit ended.

    Attributes:
        code: its exit code; negative for a signal.
        report: what it wrote, if it did.
        errors: what it printed to standard error.
        left: what it left behind: processes, files, shared memory.
        seconds: how long it took.
    """

    code: int
    report: dict[str, Any] | None
    errors: str
    left: tuple[str, ...]
    seconds: float


class Bench:
    """A folder with the model to audit, and the audits of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self._soundly: dict[tuple[str, ...], Ended] = {}
        _models(folder)

    def sound(self, case: Case) -> Ended:
        """The audit of a case without its fault, made once."""
        key = (case.backend, str(case.stage == "constants"))
        if key not in self._soundly:
            self._soundly[key] = self.audit(case, None)
        return self._soundly[key]

    def audit(self, case: Case, fault: Case | None) -> Ended:
        """Run one audit, with or without a fault."""
        kind = KINDS.get(fault.kind) if fault else None
        place = Path(self.folder, uuid.uuid4().hex)
        scratch = place / "tmp"
        scratch.mkdir(parents=True)
        report, reached = place / "report.json", place / "reached"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HOOK), str(ROOT)]),
            "TMPDIR": str(scratch),
            "HOME": str(place),
            "FAULT_AUDIT": place.name,  # by which its processes are found
        }
        if fault:
            inside = "pause" if fault.kind in OUTSIDE else fault.kind
            plan = {**asdict(fault), "kind": inside, "reached": str(reached), "delay": "0.01"}
            environment["FAULT"] = json.dumps(plan)
        command = [sys.executable, "-m", "auditor", *self._arguments(case), "-o", str(report)]
        if kind and kind.disk:
            command = on_a_small_disk(command, scratch, place)
        elif kind and kind.unprivileged:
            command = bound(command)
        shared = set(os.listdir("/dev/shm"))
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        if fault and fault.kind in OUTSIDE:
            strike(process, fault.kind, reached)
        try:
            _, errors = process.communicate(timeout=_ENDS)
        except subprocess.TimeoutExpired:
            errors = "HANG"
            process.kill()
            process.wait()
        seconds = time.monotonic() - begun
        left = [f"process {p}" for p in processes(place.name)]
        if fault and fault.kind == "auditor killed":  # its folder goes with the next command
            following = [sys.executable, "-m", "auditor", "--version"]
            subprocess.run(following, env=environment, check=True, stdout=subprocess.DEVNULL)
        left += [f"file {name}" for name in remains(scratch)]
        if (place / "remains").exists():  # as seen from inside the small disk
            left += [f"file {n}" for n in (place / "remains").read_text().split()]
        left += [f"shared memory {n}" for n in unused(set(os.listdir("/dev/shm")) - shared)]
        if fault and not reached.exists():
            errors = f"NOT REACHED\n{errors}"
        made = json.loads(report.read_text()) if report.exists() else None
        for number in processes(place.name):
            os.kill(number, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)
        return Ended(process.returncode, made, errors, tuple(left), seconds)

    def _arguments(self, case: Case) -> list[str]:
        timeout = "25" if "tvm" in case.backend else "12"
        if case.stage == "constants":
            return [
                *("model.onnx", "--backends", "ov,ort", "--artifact", "ov=model.xml"),
                # What the processor's own precision does would be a finding; a gap takes it away.
                *("--option", "ov.INFERENCE_PRECISION_HINT=f32", "--timeout", timeout),
            ]
        # Another export with one weight changed: it diverges on every backend, so that the stages
        # that look for the reason are reached.
        other = "ort" if case.backend != "ort" else "ov"
        return [
            *("model.onnx", "--candidate", "other.onnx"),
            *("--backends", f"{case.backend},{other}", "--threads", "1"),
            *("--timeout", timeout, "--worker-memory", "4", "--no-cache"),
        ]


def _models(folder: Path) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    numbers = np.random.default_rng(0)
    weights = {
        "w1": numbers.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "w2": numbers.standard_normal((4, 8, 3, 3)).astype(np.float32) / 8,
    }

    def save(name: str) -> None:
        graph = helper.make_graph(
            nodes_of(
                "[first] a = Conv(x, w1) [relu] b = Relu(a) [second] c = Conv(b, w2) "
                "[pool] d = GlobalAveragePool(c) [softmax] y = Softmax <axis = 1> (d)"
            ),
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 1, 1])],
            [numpy_helper.from_array(value, key) for key, value in weights.items()],
        )
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / name)

    save("model.onnx")
    code = "import openvino as ov, sys; ov.save_model(ov.convert_model(sys.argv[1]), sys.argv[2])"
    convert = [sys.executable, "-c", code, "model.onnx", "model.xml"]
    subprocess.run(convert, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    weights["w1"] = weights["w1"] * np.float32(1.25)
    save("other.onnx")


def on_a_small_disk(command: list[str], scratch: Path, place: Path) -> list[str]:
    """The command in a mount namespace in which its temporary folder is a small file system."""
    script = (
        f'mount -t tmpfs -o size={_DISK} none "$1" || exit 99; here="$2"; shift 2; '
        '"$@"; code=$?; ls -A "$TMPDIR" > "$here/remains"; exit $code'
    )
    namespace = ["unshare", "--mount" if os.geteuid() == 0 else "--map-root-user --mount"]
    inside = ["sh", "-c", script, "sh", str(scratch), str(place), *command]
    return [*" ".join(namespace).split(), *inside]


def strike(process: subprocess.Popen[str], kind: str, reached: Path) -> None:
    """Do to the auditor what ``kind`` says, once the backend is at its stage."""
    deadline = time.monotonic() + _ENDS
    while not reached.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is not None:
        return
    match kind:
        case "auditor killed":
            process.kill()
        case "SIGTERM":
            process.terminate()
        case _:
            process.send_signal(signal.SIGINT)
            if kind == "Ctrl-C twice":
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)


def processes(mark: str, patience: float = 5.0) -> list[int]:
    """Processes of an audit that are still there after some seconds."""
    deadline = time.monotonic() + patience
    while found := list(_running(mark)):
        if time.monotonic() > deadline:
            return found
        time.sleep(0.05)
    return []


def _running(mark: str) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if f"FAULT_AUDIT={mark}".encode() in (folder / "environ").read_bytes():
                    yield int(folder.name)
            except OSError:
                continue


def remains(scratch: Path) -> list[str]:
    """What an audit left in its temporary folder."""
    return sorted(path.name for path in scratch.iterdir())


# --- judging it ----------------------------------------------------------------------------------


def wrong(case: Case, sound: Ended, ended: Ended) -> list[str]:
    """What is not as it must be after a fault; nothing where all is well."""
    if "NOT REACHED" in ended.errors:
        return ["not reached"]
    found = [f"left behind: {what}" for what in ended.left]
    if ended.errors.startswith("HANG"):
        return ["the audit did not end", *found]
    if "Traceback" in ended.errors or "internal error" in ended.errors:
        found.append(f"traceback: {ended.errors[-600:]}")
    if case.kind in OUTSIDE:
        code = {"auditor killed": -signal.SIGKILL, "SIGTERM": 128 + signal.SIGTERM}.get(
            case.kind, 128 + signal.SIGINT
        )
        if ended.code != code:
            found.append(f"exit code {ended.code} instead of {code}: {ended.errors[-300:]}")
        if ended.report is not None:
            found.append("wrote a report")
        return found
    if ended.report is None:
        return [f"no report, exit code {ended.code}: {ended.errors[-600:]}", *found]
    assert sound.report is not None
    kind = KINDS[case.kind]
    expected = sound.code if case.stage in _LATE else 1 if sound.code == 1 else 3
    # Backends share the disk: where it is full, the other may be a gap too.
    if ended.code != expected and not (kind.disk and ended.code == 3):
        found.append(f"exit code {ended.code} instead of {expected}")
    named = [
        gap
        for gap in ended.report["gaps"]
        if gap["subject"] == case.backend and re.search(kind.says, gap["reason"])
    ]
    stage = "start" if case.stage == "availability" else case.stage
    if kind.disk or kind.unprivileged:  # what comes next may need no file
        named = named or ([{}] if _part(ended, case.backend) == _part(sound, case.backend) else [])
        if not named:
            found.append(f"no gap says why: {ended.report['gaps']}")
    elif not named:
        found.append(f"no gap says {kind.says!r}: {ended.report['gaps']}")
    elif named[0]["stage"] != stage:
        found.append(f"the gap names the stage {named[0]['stage']}")
    elif not any(LAST_WORDS in line for line in named[0]["log"]):
        found.append(f"the gap has lost the engine's last words: {named[0]['log']}")
    others = [b["id"] for b in sound.report["backends"] if b["id"] != case.backend]
    for other in others:
        whole = _part(ended, other) == _part(sound, other)
        excused = kind.disk and any(g["subject"] == other for g in ended.report["gaps"])
        if not whole and not excused:
            found.append(f"the part of {other} is not what it is without the fault")
    if case.stage in _LATE and _compared(ended, case.backend) != _compared(sound, case.backend):
        found.append("the comparison made before the fault is lost")
    return found


def _part(ended: Ended, backend: str) -> object:
    assert ended.report is not None
    (part,) = (b for b in ended.report["backends"] if b["id"] == backend)
    return _untimed(part)


def _compared(ended: Ended, backend: str) -> object:
    part = _part(ended, backend)
    assert isinstance(part, dict)
    return part["outputs"], part["segments"]


def _untimed(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k != "seconds" and "latency" not in k}
    return [_untimed(v) for v in value] if isinstance(value, list) else value


def possible() -> dict[str, str]:
    """Kinds of fault that cannot be brought about here, and why."""
    missing = {}
    with TemporaryDirectory() as folder:
        trial = on_a_small_disk(["true"], Path(folder), Path(folder))
        done = subprocess.run(
            trial, check=False, capture_output=True, env=os.environ | {"TMPDIR": folder}
        )
    if done.returncode != 0:
        missing["full disk"] = "no file system can be mounted here"
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o500)
        write = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", f"{folder}/file"]
        if subprocess.run(bound(write), check=False, capture_output=True).returncode == 0:
            missing["read-only folder"] = "permissions bind nobody here"
    return missing


def bound(command: list[str]) -> list[str]:
    """The command run so that permissions bind it, though root starts it (capabilities(7))."""
    if os.geteuid() != 0:
        return command
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]


# --- many of them --------------------------------------------------------------------------------


def tried(chosen: list[Case], bench: Bench, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Try faults one after another."""
    missing = possible()
    results = []
    for case in chosen:
        if case.kind in missing:
            outcome = [f"impossible here: {missing[case.kind]}"]
            seconds = 0.0
        else:
            sound = bench.sound(case)
            ended = bench.audit(case, case)
            outcome, seconds = wrong(case, sound, ended), ended.seconds
        results.append({**asdict(case), "wrong": outcome, "seconds": round(seconds, 2)})
        state = "ok" if not outcome else "; ".join(outcome)
        tell(f"{case!s:<60}{seconds:>6.1f} s  {state}")
    return results


def verdict(result: dict[str, Any]) -> str:
    """``survived``, ``failed``, ``not reached`` or ``impossible here``."""
    first = result["wrong"][0] if result["wrong"] else "survived"
    if first == "not reached" or first.startswith("impossible here"):
        return str(first.split(":")[0])
    return "failed" if result["wrong"] else "survived"


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--kind", choices=(*KINDS, *OUTSIDE), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="only so many, chosen by the seed")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    asked = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    draw = random.Random(asked.seed)
    chosen = [
        case
        for case in cases(draw)
        if (not asked.backend or case.backend in asked.backend)
        and (not asked.stage or case.stage in asked.stage)
        and (not asked.kind or case.kind in asked.kind)
    ]
    if asked.sample:
        chosen = draw.sample(chosen, min(asked.sample, len(chosen)))
    with TemporaryDirectory(prefix="faults-") as folder:
        results = tried(chosen, Bench(Path(folder)), lambda line: print(line, flush=True))
    if asked.json:
        earlier = json.loads(asked.json.read_text()) if asked.json.exists() else []
        asked.json.write_text(json.dumps(earlier + results, indent=1))
    tally = Counter(map(verdict, results))
    print(", ".join(f"{count} {what}" for what, count in tally.items()))
    return 1 if tally["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
