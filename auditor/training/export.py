"""Exports a module in several ways and audits each: which file is the most faithful where it runs?

Faithful to PyTorch itself: what counts is how far a backend's outputs are from those of the module,
not from the file's own reference, for the export may be what is wrong. Each export is audited with
PyTorch at the head of the chain (``--source``), so the export's mistakes are found and named too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from auditor import datafiles
from auditor.audit import audit
from auditor.errors import BackendError, UsageError
from auditor.options import AuditOptions
from auditor.processes.limits import Limits, physical_memory
from auditor.processes.wire import encode, save
from auditor.processes.worker import Worker, availability, workers
from auditor.records.backend import ExportRequest
from auditor.records.export import ExportReport, ExportTrial
from auditor.records.report import AuditReport

if TYPE_CHECKING:
    from auditor.ports import Noise, Progress

USUAL = (("dynamo", 18), ("dynamo", 21), ("torchscript", 13), ("torchscript", 17))
# Distances that differ by less than this factor are the rounding of one run or another.
_ALIKE = 2.0


@dataclass(frozen=True, slots=True)
class Exports:
    """What was made.

    Attributes:
        report: which is best, and why.
        files: of each trial; None where there is none.
        audits: of each trial.
    """

    report: ExportReport
    files: tuple[Path | None, ...]
    audits: tuple[AuditReport | None, ...]


def compare(
    ways: Sequence[tuple[str, int | None]],
    options: AuditOptions,
    dynamic: dict[str, dict[str, str]],
    folder: Path,
    name: str,
    *,
    noises: Sequence[Noise],
    progress: Progress,
) -> Exports:
    """Export in every way, audit every file, and choose.

    Args:
        ways: exporters and operator sets.
        options: of the audits: the training side first among the backends, its source, and the
            arguments as ``data``, samples stacked on the first axis of every array.
        dynamic: open dimensions, as in ``ExportRequest``.
        folder: where the files go, each into a folder of its own.
        name: what they are called.
        noises: the catalogue.
        progress: told what is being done.

    Raises:
        UsageError: there is no such source, or the arguments cannot be read.
    """
    trials, files, audits = [], [], []
    for number, (exporter, opset) in enumerate(ways):
        home = folder / str(number)
        home.mkdir()
        path = home / name
        assert options.source is not None
        request = ExportRequest(
            options.source, options.trust_source, exporter, opset, dynamic, path
        )
        begun = time.perf_counter()
        progress.update(options.backends[0].label, f"export {exporter} {opset or ''}".rstrip())
        trial = ExportTrial(exporter, opset)
        made: AuditReport | None = None
        try:
            trial = replace(trial, frozen=_exported(request, options))
            exported = time.perf_counter()
            made = audit(path, options, noises=noises, progress=progress)
            seconds = {"export": exported - begun, "audit": time.perf_counter() - exported}
            trial = _trial(trial, made, options.backends[0].label, seconds)
        except BackendError as error:
            trial = replace(trial, failure=error.message)
        except UsageError as error:
            if not path.exists():  # nothing that another way could make better
                raise
            trial = replace(trial, failure=f"the file is not usable: {error.message}")
        trials.append(trial)
        files.append(path if made is not None else None)
        audits.append(made)
    chosen, because = _chosen(trials)
    samples = next((a.stimulus.samples for a in audits if a), 0)
    others = tuple(spec.label for spec in options.backends[1:])
    report = ExportReport(str(options.source), others, tuple(trials), chosen, because, samples)
    return Exports(report, tuple(files), tuple(audits))


def _exported(request: ExportRequest, options: AuditOptions) -> tuple[str, ...]:
    """Export in a process of its own: an exporter that crashes or hangs is one way less.

    Returns what tracing froze.
    """
    assert options.data is not None
    stored = datafiles.read(options.data, "--example")
    if "" in stored:
        raise UsageError(
            f"{options.data} does not name its array",
            "Save a .npz whose keys are the arguments of forward.",
        )
    limits = options.limits or Limits(physical_memory())
    with workers([options.backends[0].id], limits) as (worker,):
        found = availability(worker, options.timeout)
        if not found.available:
            raise UsageError(found.reason or "PyTorch is not available", found.remedy or "")
        feeds = {name: array.read(0) for name, array in stored.items()}
        return _write(worker, request, save(worker.workdir / "example", feeds), options.timeout)


def _write(
    worker: Worker, request: ExportRequest, names: list[str], timeout: float
) -> tuple[str, ...]:
    sent = {"path": str(worker.workdir / "example"), "names": names}
    said = worker.call("export", dict, timeout=timeout, request=encode(request), feeds=sent)
    return tuple(said["frozen"])


def _trial(
    trial: ExportTrial, report: AuditReport, training: str, seconds: dict[str, float]
) -> ExportTrial:
    """The figures of one audit."""
    distances = {}
    for pair in report.agreement:
        if training in (pair.a, pair.b):
            distances[pair.b if pair.a == training else pair.a] = pair.relative_l2
    mistakes = [
        f for f in report.findings if f.backend == training and f.severity not in ("info", "low")
    ]
    return replace(
        trial,
        written=report.model.opset,
        nodes=report.model.nodes,
        distances=distances,
        findings=len(mistakes),
        causes=tuple(dict.fromkeys(f.noise for f in mistakes if f.noise)),
        gaps={b.id: b.gap.reason for b in report.backends if b.gap is not None},
        seconds=seconds,
    )


def _chosen(trials: Sequence[ExportTrial]) -> tuple[int | None, str]:
    """The position of the most faithful file, and why it is that.

    A file that some backend does not run comes after those that all run; one with mistakes of the
    export after those without; then the distance of the worst backend decides. Among those that are
    alike in it: the exporter named first, with its newest operator set.
    """
    usable = [i for i, t in enumerate(trials) if t.failure is None and t.distances]
    if not usable:
        return None, "no export could be compared with PyTorch"

    def rank(index: int) -> tuple[int, int]:
        return len(trials[index].gaps), trials[index].findings

    least = min(map(rank, usable))
    left = [i for i in usable if rank(i) == least]
    nearest = min(left, key=lambda i: _worst(trials[i]))
    alike = [i for i in left if _worst(trials[i]) <= _ALIKE * _worst(trials[nearest])]
    exporters = list(dict.fromkeys(t.exporter for t in trials))
    best = min(
        alike, key=lambda i: (exporters.index(trials[i].exporter), -(trials[i].written or 0))
    )
    if len(usable) == 1:
        return best, "the only export that could be compared with PyTorch"
    reasons = []
    if any(rank(i)[0] > least[0] for i in usable):
        reasons.append("runs on more of the backends than others")
    if any(rank(i)[0] == least[0] and rank(i)[1] > least[1] for i in usable):
        reasons.append("has fewer mistakes of the export than others")
    if len(alike) < len(left):
        reasons.append("is nearer to PyTorch on its worst backend")
    if len(alike) > 1:
        others = ", ".join(trials[i].label for i in alike if i != best)
        reasons.append(
            f"of those within a factor of {_ALIKE:g} of one another (also {others}) it is the "
            "preferred exporter's newest operator set"
        )
    return best, "; ".join(reasons)


def _worst(trial: ExportTrial) -> float:
    """The largest distance of any backend, or that of the file itself where there is none."""
    others = [d for who, d in trial.distances.items() if who != "reference"]
    return max(others, default=trial.distances.get("reference", 0.0))
