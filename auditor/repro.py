"""The smallest model, inputs and script that show one finding without the auditor.

A segment is cut out of the model and fed what the backend itself fed to it. Built alone it is
another program, in which a difference may be gone: so every cut is built and run on the backend
before it is kept, and then made smaller while the difference stays.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import onnx

from auditor import discovery, repro_files
from auditor.comparison import metrics
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.graphs.segments import Cut, Graph
from auditor.ports import Scriptable
from auditor.records.backend import Provenance
from auditor.records.terms import PIPELINE
from auditor.replays import sessions
from auditor.repro_files import Case, Reproducer
from auditor.subject import built, model_of, reference_of, request_for, stimulus_of

if TYPE_CHECKING:
    from auditor.capture.trace import Tracer
    from auditor.graphs.model import Model
    from auditor.options import AuditOptions, BackendSpec
    from auditor.ports import Array, Arrays, Progress
    from auditor.records.measured import Segment
    from auditor.records.report import AuditReport, Finding

KEPT = 0.5  # a smaller cut must show this part of the difference that the segment makes
_TRIALS = 24  # builds at most while a cut is made smaller


def reproduce(
    report: AuditReport, finding: Finding, options: AuditOptions, folder: Path, progress: Progress
) -> Reproducer:
    """Write the reproducer of a finding into a new folder.

    Args:
        report: the report that has the finding.
        finding: a segment on a backend.
        options: those of the audit that made the report.
        folder: to write into; it must not exist.
        progress: told what is being done.

    Raises:
        UsageError: the finding is none of a backend, the model has changed, or the difference
            does not come back.
    """
    spec, segment = _found(report, finding, options)
    backend = discovery.backend(spec.id)
    if not isinstance(backend, Scriptable):
        raise UsageError(
            f"no script can be written for the backend {spec.id}",
            "Reproducers are made for backends that run without a device of their own.",
        )
    model = model_of(report, options)
    options = replace(options, backends=(spec,), traces=(), confirm=False)
    with TemporaryDirectory(prefix="audit-repro-") as scratch:
        values, provenance = _captured(model, spec, options, segment, progress)
        with closing(_Lab(spec, options, Path(scratch), progress)) as lab:
            case, place = _smallest(model, segment, values, lab)
    script = backend.script(spec.device, options.threads, options.options.get(spec.id, {}))
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        part = KEPT * case.relative_l2
        repro_files.write(draft, case, script, max(segment.floor, part if part < math.inf else 0.0))
        shown, said = repro_files.run(draft, options.limits)
        nodes = len(case.model.graph.node)
        made = Reproducer(
            place, nodes, len(segment.nodes), case.relative_l2, shown, said, lab.trials
        )
        text = repro_files.issue(made, case, finding, report, provenance)
        (draft / repro_files.ISSUE).write_text(text, encoding="utf-8")
        draft.rename(folder)  # all of it or nothing
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return made


def _found(
    report: AuditReport, finding: Finding, options: AuditOptions
) -> tuple[BackendSpec, Segment]:
    if finding.backend == PIPELINE:
        raise UsageError(
            f"finding {finding.rank} is a step around the network, not a runtime's",
            "Its two sides are in the pipeline's description.",
        )
    if options.candidate is not None:
        raise UsageError(
            "the report compares another export with the model",
            "Audit that export alone, and take the finding from there.",
        )
    spec = next((s for s in options.backends if s.label == finding.backend), None)
    if spec is None:
        raise UsageError(
            f"finding {finding.rank} is of a trace, which cannot be run",
            "Take a finding of a backend that was compiled here.",
        )
    if spec.label in options.artifacts:
        raise UsageError(
            f"{spec.label} audited {options.artifacts[spec.label].name}, not a build of its own",
            "Audit the model without --artifact, and take the finding from there if it is there.",
        )
    segments = (s for b in report.backends if b.id == finding.backend for s in b.segments)
    segment = next((s for s in segments if s.id == finding.segment), None)
    if segment is None:
        raise UsageError(
            f"the report has no segment `{finding.segment}` on {finding.backend}, where finding "
            f"{finding.rank} is",
            "The file was changed; run the audit again.",
        )
    return spec, segment


def _captured(
    model: Model, spec: BackendSpec, options: AuditOptions, segment: Segment, progress: Progress
) -> tuple[Arrays, Provenance]:
    """What the backend made of the sample that shows the finding, its inputs included."""
    stimulus = stimulus_of(model, options)
    feeds = stimulus.sample(min(segment.explained_on or 0, len(stimulus) - 1))
    with built(spec, options, model, feeds, progress) as tracer:
        trace = tracer.sample(feeds, last=True) if tracer.gap is None else None
        if trace is None or tracer.provenance is None:
            reason = tracer.gap.reason if tracer.gap else "it was not built"
            raise UsageError(f"{spec.label} no longer runs the model: {reason}", "Audit it again.")
        return feeds | trace.tensors, tracer.provenance


class _Lab:
    """Runs models on the backend, all in one process while it lives, and on the reference."""

    def __init__(
        self, spec: BackendSpec, options: AuditOptions, scratch: Path, progress: Progress
    ) -> None:
        self._spec = spec
        self._options = options
        self._scratch = scratch
        self._progress = progress
        self._process = ExitStack()
        self._tracer: Tracer | None = None
        self.trials = 0

    def close(self) -> None:
        """End the backend's process."""
        self._tracer = None
        self._process.close()

    def case(self, model: onnx.ModelProto, feeds: Arrays) -> Case | None:
        """Both sides of a model; None where either cannot run it."""
        self.trials += 1
        path = self._scratch / f"{self.trials}.onnx"
        onnx.save(model, path)
        try:
            loaded = models.load(path)
            reference, _ = reference_of(loaded, os.cpu_count() or 1, self._scratch)
            expected = reference.run(feeds)
        except UsageError:
            return None
        observed = self._observed(loaded, feeds)
        if observed is None or expected.keys() - observed.keys():
            return None
        distance = metrics.relative_l2(reference.wide(observed), expected, tuple(expected))
        info = reference.info
        return Case(model, feeds, expected, distance, f"{info.engine} {info.version}")

    def _observed(self, model: Model, feeds: Arrays) -> Arrays | None:
        if self._tracer is None:
            self._tracer = self._process.enter_context(
                built(self._spec, self._options, model, feeds, self._progress)
            )
        else:
            workdir = self._tracer.worker.workdir
            self._tracer.build(request_for(self._spec, self._options, model, feeds, workdir))
        observed = self._tracer.plain(feeds) if self._tracer.gap is None else None
        if observed is None:
            self.close()  # its process may be gone
        return observed


# --- the smallest cut ----------------------------------------------------------------------------


def _smallest(model: Model, segment: Segment, values: Arrays, lab: _Lab) -> tuple[Case, str]:
    """The smallest model that shows the segment's difference, and what it was cut out of.

    Raises:
        UsageError: not even the whole model shows it.
    """
    graph = Graph(model.proto)
    wanted = KEPT * segment.introduced
    cuts = graph.cut({*segment.inputs, *segment.outputs})
    cut = next((c for c in cuts if set(c.outputs) == set(segment.outputs)), None)
    if cut is None or not values.keys() >= {*cut.inputs}:
        raise UsageError(
            f"{segment.id} is no segment of this model on this machine any more",
            "Audit it again: the engine may be another version, and fuse other nodes.",
        )
    alone = _case(graph, cut, values, model, lab)
    if alone is not None and alone.relative_l2 >= wanted:
        return _shrunk(alone, lab), "the segment alone"
    for larger, place in (
        (
            graph.cut(segment.outputs[-1:])[0],
            "everything up to the segment: alone it computes something else",
        ),
        (_whole(graph), "the whole model: a part of it computes something else"),
    ):
        found = _case(graph, larger, values, model, lab)
        if found is not None and found.relative_l2 > segment.floor:
            return found, place
    raise UsageError(
        "the difference does not come back when the model is built alone on this machine",
        "It may depend on the machine, or on chance: audit again, and see whether it is there.",
    )


def _whole(graph: Graph) -> Cut:
    inside = [i for i, node in enumerate(graph.nodes) if not _constant(graph, node)]
    constants = tuple(i for i in range(len(graph.nodes)) if i not in set(inside))
    return Cut("model", tuple(inside), constants, graph.inputs, graph.outputs)


def _constant(graph: Graph, node: onnx.NodeProto) -> bool:
    return all(graph.is_constant(name) for name in node.output if name)


def _case(graph: Graph, cut: Cut, values: Arrays, model: Model, lab: _Lab) -> Case | None:
    """A cut as a model of its own, on the values that the backend itself had there."""
    declared = {v.name: v for v in (*model.proto.graph.input, *model.proto.graph.value_info)}
    feeds: Arrays = {}
    for name in cut.inputs:
        kind = declared[name].type.tensor_type.elem_type if name in declared else 0
        value = values[name]
        if kind and value.dtype.kind == "f":  # a runtime may keep float16 in float32
            value = value.astype(onnx.helper.tensor_dtype_to_np_dtype(kind), copy=False)
        feeds[name] = value
    return lab.case(_extracted(graph, cut, feeds, model.weights), feeds)


def _extracted(
    graph: Graph, cut: Cut, feeds: Arrays, weights: Mapping[str, Array]
) -> onnx.ModelProto:
    types = {n: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for n, v in feeds.items()}
    shapes = {n: v.shape for n, v in feeds.items()}
    made = graph.extract(cut, types, shapes, weights)
    del made.graph.quantization_annotation[:]
    inferred = onnx.shape_inference.infer_shapes(made)
    del inferred.graph.value_info[:]
    return inferred


def _shrunk(case: Case, lab: _Lab) -> Case:
    """Fewer nodes, as long as they show enough of the difference: first one, then a part."""
    graph = Graph(case.model)
    inside = [i for i, node in enumerate(graph.nodes) if not _constant(graph, node)]
    if len(inside) < 2:
        return case
    values = sessions.inside(case.model, 1, case.feeds)
    wanted = KEPT * case.relative_l2
    limit = lab.trials + _TRIALS
    for part in _parts(inside):
        if lab.trials >= limit:
            break
        cut = graph.joined("part", part)
        if not cut.inputs or not cut.outputs or not values.keys() >= {*cut.inputs}:
            continue
        feeds = {name: values[name] for name in cut.inputs}
        smaller = lab.case(_extracted(graph, cut, feeds, {}), feeds)
        if smaller is not None and smaller.relative_l2 >= wanted:
            return smaller
    return case


def _parts(nodes: Sequence[int]) -> Iterator[Sequence[int]]:
    """Runs of neighbouring nodes, the shortest first."""
    for length in range(1, len(nodes)):
        for start in range(len(nodes) - length + 1):
            yield nodes[start : start + length]
