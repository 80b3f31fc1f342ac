"""How long what is deployed takes, beside ONNX Runtime with its default options.

A latency by itself says as much of the machine as of the program. So both programs run in turn, in
the backend's own process, on the same inputs and with the same number of threads, and the ratio is
what a policy can limit. It includes handing over the inputs and taking the outputs back, as any
caller has to. ONNX Runtime with other options is measured like every other backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from auditor.capture.trace import Tracer
from auditor.errors import AuditError, BackendError
from auditor.ports import Arrays
from auditor.records.backend import Gap
from auditor.records.measured import Latency
from auditor.records.report import BackendReport

YARDSTICK = "ort"  # id of the backend that all are held against


def timed(
    reports: Sequence[BackendReport], tracers: Mapping[str, Tracer], feeds: Arrays
) -> tuple[tuple[BackendReport, ...], tuple[Gap, ...]]:
    """The audited backends with their latency, one after another, and what could not be timed.

    Args:
        reports: the measured backends.
        tracers: the live ones, by backend id; no sample can be traced with them after this.
        feeds: one sample by the compiled model's input names.
    """
    found, gaps = [], []
    for report in reports:
        tracer = tracers.get(report.id)
        request = tracer.request if tracer else None
        if tracer is None or request is None or request.source or report.status != "audited":
            found.append(report)  # recorded elsewhere, what was exported, or a gap already
            continue
        made = None
        rival = replace(request, device=None, options={}, artifact=None, kept=())
        try:
            if not tracer.worker.alive:
                raise BackendError("the backend's process had ended before", stage="race")
            seconds, reference = tracer.against(rival, YARDSTICK, feeds)
            made = Latency(seconds, reference)
        except AuditError as error:
            stage = error.stage if isinstance(error, BackendError) else "race"
            log = error.log if isinstance(error, BackendError) else ()
            why = f"its latency is not known: {error.message}"
            gaps.append(Gap(report.id, stage, why, error.hint or None, log))
        found.append(replace(report, latency=made, seconds=dict(tracer.seconds)))
    return tuple(found), tuple(gaps)
