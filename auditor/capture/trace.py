"""Drives one backend's worker through build, plain runs, instrumentation and captures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from auditor.errors import BackendError
from auditor.ports import Arrays, Progress
from auditor.processes.wire import Sent, encode, save
from auditor.processes.worker import MAKE_ROOM, Worker
from auditor.records.backend import (
    Availability,
    BuildRequest,
    Gap,
    Kernel,
    Origin,
    Probe,
    Provenance,
    Skipped,
    Switch,
)

T = TypeVar("T")

_REPEATS = 3  # plain runs of the first sample: enough to see a program that is not repeatable
# A program without one of its factors may be slow; it gets this many times as long as the plain
# one took, and some seconds more.
_PATIENCE = 10.0
_LEAST_PATIENCE = 30.0
_ROUNDS = 2  # turns of each program from whose runs a median latency is taken,
_ROUNDS_SECONDS = 5.0  # and the time after which there are fewer


# What a worker answers; it runs the engine, so whatever it says is checked against these.


@dataclass(frozen=True, slots=True)
class _Built:
    provenance: Provenance
    blocked: str | None
    switches: tuple[Switch, ...]


@dataclass(frozen=True, slots=True)
class _Ran:
    run_to_run: float
    outputs: Sent


@dataclass(frozen=True, slots=True)
class _Instrumented:
    probes: tuple[Probe, ...]
    skipped: tuple[Skipped, ...]
    program_unchanged: bool
    rebuilt: bool
    origins: tuple[Origin, ...]
    kernels: tuple[Kernel, ...] | None


@dataclass(frozen=True, slots=True)
class _Captured:
    outputs_bitwise_equal: bool
    difference: float
    noisy: bool
    tensors: Sent


@dataclass(frozen=True, slots=True)
class _Ablated:
    blocked: str | None


@dataclass(frozen=True, slots=True)
class _Contrasted:
    bitwise_equal: bool
    plain: Sent
    ablated: Sent


@dataclass(frozen=True, slots=True)
class SampleTrace:
    """What one backend did with one sample.

    Attributes:
        outputs: final outputs of the plain program, by ONNX name.
        tensors: captured tensors by ONNX name, final outputs included: the plain program's, or
            where it does not repeat its own bits those of the run that was captured.
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


def denied(id: str, made: Provenance | None) -> Gap | None:
    """What a backend's options ask for and its device does not do: that is not audited.

    Args:
        id: as the user named the backend.
        made: what was built.
    """
    if made is None or not made.denied:
        return None
    remedy = (
        "Audit it on a machine whose device does. Without the option, the audit here is complete: "
        "the program is the same."
    )
    return Gap(id, "build", " ".join(made.denied), remedy)


@dataclass(slots=True)
class Tracer:
    """One backend under audit; its methods run in a thread of their own.

    ``gap`` is set as soon as something ends this backend's part of the audit.
    """

    id: str  # as the user named it: "ov" or "ov:GPU"
    worker: Worker
    timeout: float
    progress: Progress
    request: BuildRequest | None = None
    provenance: Provenance | None = None
    switches: tuple[Switch, ...] = ()
    probes: tuple[Probe, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    program_unchanged: bool = False
    rebuilt: bool = False
    origins: tuple[Origin, ...] = ()  # of the training side
    unproved: str | None = None  # why nothing could ever be proved; said instead of the proofs
    gap: Gap | None = None
    unobserved: Gap | None = None  # why its outputs alone are compared
    built_only: bool = False
    blocked: str | None = None  # why the build cannot run here
    sha256: str = ""  # of the model that is compiled
    recalled: int = 0  # samples that come from the cache (see ``remembered``)
    seconds: dict[str, float] = field(default_factory=dict)
    _instrumented: bool = False
    _outputs: tuple[str, ...] = ()  # those of the first run, which no later one may lack
    _files: int = 0

    def start(self) -> bool:
        """Import the engine; False (with ``gap`` set) when it cannot be used here."""
        self.progress.update(self.id, "start")
        begun = time.perf_counter()
        try:
            answer = self.worker.call("availability", Availability, timeout=self.timeout)
        except BackendError as error:
            self._fail(error)
            return False
        finally:
            self.seconds["start"] = time.perf_counter() - begun
        if not answer.available:
            self.gap = Gap(self.id, "start", answer.reason or "not available", answer.remedy)
        return answer.available

    def build(self, request: BuildRequest) -> None:
        """Compile, in place of an earlier program; sets ``provenance``, or ``gap``.

        Raises:
            UsageError: an option or a device that this engine does not have.
        """
        self._outputs = ()
        try:
            answer = self._call("build", _Built, request=encode(request))
        except BackendError as error:
            self._fail(error)
            return
        self._accept(request, answer.provenance, answer.switches, answer.blocked)

    def stated(self) -> Provenance | None:
        """What was built, as the report says it."""
        return self.provenance

    def _accept(
        self,
        request: BuildRequest,
        provenance: Provenance,
        switches: tuple[Switch, ...],
        blocked: str | None,
    ) -> None:
        """Take over what a build says of itself; ``blocked``: why it cannot run here."""
        self.request, self.switches = request, switches
        self.provenance = replace(provenance, backend=self.id)
        self.blocked = blocked
        if blocked:
            self.built_only = True
            self.gap = Gap(
                self.id,
                "run",
                f"built, not run: {blocked}",
                "Run this audit on a machine that has the device.",
            )

    def sample(self, feeds: Arrays, *, last: bool = False) -> SampleTrace | None:
        """Run plainly and with probes; None (with ``gap`` set) when the backend fails.

        Args:
            feeds: the inputs by the compiled model's names.
            last: that no other sample follows, so that the plain program is not needed again.
        """
        first = not self._instrumented
        again = None
        try:
            with self._stored(feeds, "run") as stored:
                plain = self._call("run", _Ran, feeds=stored, repeats=_REPEATS if first else 1)
                outputs = self._final(plain.outputs)
                if plain.run_to_run > 0:
                    again = self._final(self._call("run", _Ran, feeds=stored, repeats=1).outputs)
                if first:
                    self._instrument(stored, last)
                if self.unobserved is not None:
                    return SampleTrace(outputs, outputs, None, True, 0.0, plain.run_to_run)
                answer = self._call("capture", _Captured, feeds=stored, last=last and again is None)
                if again is not None:
                    second = self._call("capture", _Captured, feeds=stored, last=last)
                    again |= self._captured(second.tensors)
                tensors = self._captured(answer.tensors)
        except BackendError as error:
            self._fail(error)
            return None
        return SampleTrace(
            outputs=outputs,
            # Outputs come from the plain run: that is the program that ships. But where no two runs
            # are alike, what is handed over and what is made of it must be of one run.
            tensors=outputs | tensors if answer.noisy else tensors | outputs,
            again=again,
            bitwise_equal=answer.outputs_bitwise_equal,
            difference=answer.difference,
            run_to_run=plain.run_to_run,
        )

    def _instrument(self, stored: dict[str, Any], last: bool) -> None:
        """Add probes; sets ``unobserved`` where the engine refuses every program with probes.

        Raises:
            BackendError: it crashed or hung.
        """
        self._instrumented = True
        try:
            made = self._call("instrument", _Instrumented, feeds=stored, last=last)
        except BackendError as error:
            if not self.worker.alive:
                raise
            self.unobserved = Gap(
                self.id,
                error.stage,
                f"compared at its outputs only: {error.message}",
                error.hint or None,
                error.log,
            )
            self.program_unchanged = True  # the plain one
            return
        self.probes = made.probes
        self.skipped = made.skipped
        self.program_unchanged = made.program_unchanged
        self.rebuilt = made.rebuilt
        self.origins = made.origins
        if made.kernels is not None and self.provenance is not None:
            self.provenance = replace(self.provenance, kernels=made.kernels)

    def constants(self) -> Arrays:
        """The constants of the artefact or module that was loaded, by ONNX name.

        There are none where the model itself was compiled, and where the build fails.

        ``gap`` is set then.
        """
        request = self.request
        if request is None or self.gap is not None:
            return {}
        if request.artifact is None and request.source is None and request.calibration is None:
            return {}
        return self._fetched("constants")

    def grids(self) -> Arrays:
        """What activations are rounded to, in a quantised artefact too (``ports.Gridded``).

        ``gap`` is set where the build fails.
        """
        request = self.request
        if request is None or self.gap is not None:
            return {}
        if request.artifact is None and request.calibration is None:
            return {}
        return self._fetched("grids")

    def _fetched(self, what: str) -> Arrays:
        try:
            return self.worker.fetch(what, self._call(what, Sent))
        except BackendError as error:
            self._fail(error)
            return {}

    def plain(self, feeds: Arrays) -> Arrays | None:
        """Run the plain program once; None (with ``gap`` set) when the backend fails."""
        try:
            with self._stored(feeds, "run") as stored:
                answer = self._call("run", _Ran, feeds=stored, repeats=1)
                return self._final(answer.outputs)
        except BackendError as error:
            self._fail(error)
            return None

    def ablate(self, switch: Switch) -> None:
        """Build the plain program once more without one factor, beside the plain one.

        The instrumented program is given up: no sample can be traced after this.

        Raises:
            BackendError: the engine cannot, crashed, or took far longer than for the plain one.
            UsageError: it refused the options.
        """
        assert self.request is not None
        options = self.request.options | switch.options
        self.beside(replace(self.request, options=options))

    def beside(self, request: BuildRequest, backend: str | None = None) -> None:
        """Build another program beside the plain one, in place of an earlier such program.

        Args:
            request: what to build.
            backend: the id of the backend to build it, when it is another.

        Raises:
            BackendError, UsageError: as for ``ablate``.
        """
        answer = self._patiently(
            "ablate", "build", _Ablated, request=encode(request), backend=backend
        )
        if answer.blocked:
            raise BackendError(f"built, not run: {answer.blocked}", stage="ablate")

    def contrast(self, feeds: Arrays) -> tuple[Arrays, Arrays, bool]:
        """Outputs of the plain program and of the ablated one; whether they share every bit.

        Raises:
            BackendError: a run failed, crashed, or took far longer than the plain one did.
        """
        with self._stored(feeds, "contrast") as stored:
            answer = self._patiently("contrast", "run", _Contrasted, feeds=stored)
            plain, ablated = (
                self.worker.fetch("contrast", sent, self._outputs)
                for sent in (answer.plain, answer.ablated)
            )
            return plain, ablated, answer.bitwise_equal

    def race(self, feeds: Arrays) -> tuple[float, float]:
        """Median seconds of one run of the plain program and of the ablated one, run in turn.

        Raises:
            BackendError: as for ``contrast``.
        """
        with self._stored(feeds, "race") as stored:
            return self._patiently(
                "race",
                "run",
                tuple[float, float],
                feeds=stored,
                rounds=_ROUNDS,
                seconds=_ROUNDS_SECONDS,
            )

    def against(self, request: BuildRequest, backend: str, feeds: Arrays) -> tuple[float, float]:
        """Median seconds of one run of the plain program and of what another backend builds.

        No sample can be traced after this.

        Raises:
            BackendError, UsageError: as for ``ablate`` and ``race``.
        """
        self.beside(request, backend)
        return Tracer.race(self, feeds)

    def _patiently(self, stage: str, like: str, kind: type[T], **arguments: Any) -> T:
        patience = _LEAST_PATIENCE + _PATIENCE * self.seconds.get(like, 0.0)
        return self._call(stage, kind, min(patience, self.timeout), **arguments)

    def _call(self, stage: str, kind: type[T], timeout: float | None = None, **arguments: Any) -> T:
        self.progress.update(self.id, stage)
        begun = time.perf_counter()
        try:
            return self.worker.call(stage, kind, timeout=timeout or self.timeout, **arguments)
        finally:
            elapsed = time.perf_counter() - begun
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed

    def _fail(self, error: BackendError) -> None:
        stage = "start" if error.stage == "availability" else error.stage
        self.gap = Gap(self.id, stage, error.message, error.hint or None, error.log)

    @contextlib.contextmanager
    def _stored(self, feeds: Arrays, stage: str) -> Iterator[dict[str, Any]]:
        """The inputs in a file for the worker, as long as the block lasts."""
        self._files += 1
        path = self.worker.workdir / f"to-worker-{self._files}.safetensors"
        try:
            try:
                names = save(path, feeds)
            except OSError as error:
                raise BackendError(
                    f"its inputs could not be written: {error.strerror}",
                    MAKE_ROOM,
                    stage=stage,
                ) from error
            yield {"path": str(path), "names": names}
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _final(self, sent: Sent) -> Arrays:
        outputs = self.worker.fetch("run", sent, self._outputs or sent.names or ("an output",))
        self._outputs = tuple(outputs)
        return outputs

    def _captured(self, sent: Sent) -> Arrays:
        promised = [probe.tensor for probe in self.probes]
        # A branch that is not taken gives nothing; a program with probes gives something.
        needed = promised[:1] if not set(promised).intersection(sent.names) else ()
        return self.worker.fetch("capture", sent, needed)
