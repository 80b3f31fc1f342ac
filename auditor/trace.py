"""Drives one backend's worker through build, plain runs, instrumentation and captures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auditor.errors import BackendError
from auditor.ports import Arrays, Progress
from auditor.records import BuildRequest, Gap, Probe, Provenance, Skipped
from auditor.wire import decode, encode, load, save
from auditor.worker import Worker, availability

_REPEATS = 3  # plain runs of the first sample: enough to see a program that is not repeatable


@dataclass(frozen=True, slots=True)
class SampleTrace:
    """What one backend did with one sample.

    Attributes:
        outputs: final outputs of the plain program, by ONNX name.
        tensors: captured tensors by ONNX name, final outputs included.
        again: a second capture, made only when the program does not repeat its own bits.
        bitwise_equal: whether the instrumented run's outputs had the plain run's very bits.
        difference: relative L2 between the two where they had not.
        run_to_run: largest relative L2 between repeated plain runs.
    """

    outputs: Arrays
    tensors: Arrays
    again: Arrays | None
    bitwise_equal: bool
    difference: float
    run_to_run: float


@dataclass(slots=True)
class Tracer:
    """One backend under audit; its methods run in a thread of their own.

    ``gap`` is set as soon as something ends this backend's part of the audit.
    """

    id: str  # as the user named it: "ov" or "ov:GPU"
    worker: Worker
    timeout: float
    progress: Progress
    provenance: Provenance | None = None
    probes: tuple[Probe, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    program_unchanged: bool = False
    rebuilt: bool = False
    gap: Gap | None = None
    built_only: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    _instrumented: bool = False
    _files: int = 0

    def start(self) -> bool:
        """Import the engine; False (with ``gap`` set) when it cannot be used here."""
        self.progress.update(self.id, "start")
        begun = time.perf_counter()
        answer = availability(self.worker, self.timeout)
        self.seconds["start"] = time.perf_counter() - begun
        if not answer.available:
            self.gap = Gap(self.id, "start", answer.reason or "not available", answer.remedy)
        return answer.available

    def build(self, request: BuildRequest) -> None:
        """Compile; sets ``provenance``, or ``gap``.

        Raises:
            UsageError: an option or a device that this engine does not have.
        """
        try:
            answer = self._call("build", request=encode(request))
        except BackendError as error:
            self._fail(error)
            return
        self.provenance = decode(Provenance, answer["provenance"])
        if answer["blocked"]:
            self.built_only = True
            self.gap = Gap(
                self.id,
                "run",
                f"built, not run: {answer['blocked']}",
                "Run this audit on a machine that has the device.",
            )

    def sample(self, feeds: Arrays) -> SampleTrace | None:
        """Run plainly and with probes; None (with ``gap`` set) when the backend fails."""
        first = not self._instrumented
        stored = self._store(feeds)
        try:
            plain = self._call("run", feeds=stored, repeats=_REPEATS if first else 1)
            outputs = self._fetch(plain["outputs"])
            if first:
                made = self._call("instrument", feeds=stored)
                self.probes = decode(tuple[Probe, ...], made["probes"])
                self.skipped = decode(tuple[Skipped, ...], made["skipped"])
                self.program_unchanged = made["program_unchanged"]
                self.rebuilt = made["rebuilt"]
                self._instrumented = True
            answer = self._call("capture", feeds=stored)
            again = None
            if plain["run_to_run"] > 0:
                again = self._fetch(self._call("capture", feeds=stored)["tensors"])
        except BackendError as error:
            self._fail(error)
            return None
        finally:
            Path(stored["path"]).unlink(missing_ok=True)
        return SampleTrace(
            outputs=outputs,
            # Outputs come from the plain run: that is the program that ships.
            tensors=self._fetch(answer["tensors"]) | outputs,
            again=again,
            bitwise_equal=answer["outputs_bitwise_equal"],
            difference=answer["difference"],
            run_to_run=plain["run_to_run"],
        )

    def _call(self, stage: str, **arguments: Any) -> Any:
        self.progress.update(self.id, stage)
        begun = time.perf_counter()
        try:
            return self.worker.call(stage, timeout=self.timeout, **arguments)
        finally:
            elapsed = time.perf_counter() - begun
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed

    def _fail(self, error: BackendError) -> None:
        self.gap = Gap(self.id, error.stage, error.message, error.hint or None, error.log)

    def _store(self, feeds: Arrays) -> dict[str, Any]:
        self._files += 1
        path = self.worker.workdir / f"to-worker-{self._files}.safetensors"
        return {"path": str(path), "names": save(path, feeds)}

    def _fetch(self, message: dict[str, Any]) -> Arrays:
        return load(Path(message["path"]), message["names"])
