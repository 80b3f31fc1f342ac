"""The smallest model, inputs and script that show one finding without the auditor.

A segment is cut out of the model and fed what the backend itself fed to it. Built alone it is
another program, in which a difference may be gone: so every cut is built and run on the backend
before it is kept, and then made smaller while the difference stays.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx

from auditor import discovery
from auditor.capture.trace import Tracer
from auditor.comparison import metrics
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.graphs.segments import Cut, Graph
from auditor.ports import Script, Scriptable
from auditor.processes.limits import Limits, physical_memory
from auditor.processes.worker import module_path, workers
from auditor.records.backend import Provenance
from auditor.records.terms import PIPELINE
from auditor.replays import sessions
from auditor.subject import model_of, reference_of, request_for, stimulus_of

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.options import AuditOptions, BackendSpec
    from auditor.ports import Array, Arrays, Progress
    from auditor.records.measured import Segment
    from auditor.records.report import AuditReport, Finding

MODEL, INPUTS, EXPECTED = "model.onnx", "inputs.safetensors", "expected.safetensors"
SCRIPT, ISSUE = "repro.py", "ISSUE.md"

KEPT = 0.5  # a smaller cut must show this part of the difference that the segment makes
_TRIALS = 24  # builds at most while a cut is made smaller
_SECONDS = 600.0  # for the script that is written, on this machine


@dataclass(frozen=True, slots=True)
class Reproducer:
    """What was written.

    Attributes:
        place: of what the model was cut out, in words.
        nodes, of: how many nodes it has, and how many the finding's segment has.
        relative_l2: how far the backend's outputs are from the reference's in the cut.
        shown: whether the script, run here, showed the difference; ``said`` is what it printed.
        trials: how many models were built to get there.
    """

    place: str
    nodes: int
    of: int
    relative_l2: float
    shown: bool
    said: str
    trials: int


@dataclass(frozen=True, slots=True)
class _Case:
    """A model with its inputs, and what the two sides make of them."""

    model: onnx.ModelProto
    feeds: Arrays
    expected: Arrays
    relative_l2: float
    reference: str  # what computed ``expected``


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
        lab = _Lab(spec, options, Path(scratch), progress)
        values, provenance = _captured(model, spec, options, segment, progress)
        case, place = _smallest(model, segment, values, lab)
    script = backend.script(spec.device, options.threads, options.options.get(spec.id, {}))
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        part = KEPT * case.relative_l2
        _write(draft, case, script, max(segment.floor, part if part < math.inf else 0.0))
        shown, said = _run(draft, options.limits)
        nodes = len(case.model.graph.node)
        made = Reproducer(
            place, nodes, len(segment.nodes), case.relative_l2, shown, said, lab.trials
        )
        text = _issue(made, case, finding, report, provenance)
        (draft / ISSUE).write_text(text, encoding="utf-8")
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
    with workers([spec.id], options.limits) as (worker,):
        tracer = Tracer(spec.label, worker, options.timeout, progress)
        trace = None
        if tracer.start():
            tracer.build(request_for(spec, options, model, feeds, worker.workdir))
        if tracer.gap is None:
            trace = tracer.sample(feeds, last=True)
        if trace is None or tracer.provenance is None:
            reason = tracer.gap.reason if tracer.gap else "it was not built"
            raise UsageError(f"{spec.label} no longer runs the model: {reason}", "Audit it again.")
        return feeds | trace.tensors, tracer.provenance


class _Lab:
    """Runs models on the backend and on the reference, each build in a process of its own."""

    def __init__(
        self, spec: BackendSpec, options: AuditOptions, scratch: Path, progress: Progress
    ) -> None:
        self._spec = spec
        self._options = options
        self._scratch = scratch
        self._progress = progress
        self.trials = 0

    def case(self, model: onnx.ModelProto, feeds: Arrays) -> _Case | None:
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
        return _Case(model, feeds, expected, distance, f"{info.engine} {info.version}")

    def _observed(self, model: Model, feeds: Arrays) -> Arrays | None:
        options = self._options
        with workers([self._spec.id], options.limits) as (worker,):
            tracer = Tracer(self._spec.label, worker, options.timeout, self._progress)
            if not tracer.start():
                return None
            tracer.build(request_for(self._spec, options, model, feeds, worker.workdir))
            return tracer.plain(feeds) if tracer.gap is None else None


# --- the smallest cut ----------------------------------------------------------------------------


def _smallest(model: Model, segment: Segment, values: Arrays, lab: _Lab) -> tuple[_Case, str]:
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


def _case(graph: Graph, cut: Cut, values: Arrays, model: Model, lab: _Lab) -> _Case | None:
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


def _shrunk(case: _Case, lab: _Lab) -> _Case:
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
        cut = _cut(graph, part, values)
        if cut is None:
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


def _cut(graph: Graph, part: Sequence[int], values: Arrays) -> Cut | None:
    """These nodes as a cut; None where a tensor that enters has no value to feed."""
    inside = set(part)
    made = [name for i in part for name in graph.nodes[i].output if name]
    reads = dict.fromkeys(n for i in part for n in graph.reads[i] if n not in made)
    inputs = tuple(n for n in reads if not graph.is_constant(n))
    others = (i for i in range(len(graph.nodes)) if i not in inside)
    used = {*graph.outputs, *(n for i in others for n in graph.reads[i])}
    outputs = tuple(n for n in made if n in used)
    if not inputs or not outputs or any(n not in values for n in inputs):
        return None
    constants, pending = set[int](), [n for n in reads if graph.is_constant(n)]
    while pending:
        source = graph.producer.get(pending.pop())
        if source is not None and source not in constants:
            constants.add(source)
            pending += graph.reads[source]
    return Cut("part", tuple(part), tuple(sorted(constants)), inputs, outputs)


# --- what is written -----------------------------------------------------------------------------

_SCRIPT = '''\
"""Shows where {engine} differs from ONNX: exit code 1 while it does, 0 once it does not.

Needs {packages}.
Inputs are those that {engine} had inside the whole model; the expected values are those of
ONNX Runtime without optimisation.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
LIMIT = {limit!r}  # relative L2 from which on the two count as different

{source}

def relative_l2(observed, expected):
    if observed.shape != expected.shape:
        print(f"  shape {{observed.shape}} instead of {{expected.shape}}")
        return np.inf
    o, e = (np.asarray(v, np.float64) for v in (observed, expected))
    finite = np.isfinite(e)
    alike = np.array_equal(o[~finite], e[~finite], equal_nan=True)
    if not alike or not np.isfinite(o[finite]).all():
        print(f"  NaN or infinity: {{o.ravel()[:8]}} instead of {{e.ravel()[:8]}}")
        return np.inf
    return np.linalg.norm((o - e)[finite]) / (np.linalg.norm(e[finite]) or 1.0)


def main():
    expected = load_file(HERE / "{expected}")
    feeds = load_file(HERE / "{inputs}")
    observed = run(str(HERE / "{model}"), {{name: feeds[name] for name in {order!r}}})
    print(version())
    worst = 0.0
    for name, value in expected.items():
        print(repr(name))
        distance = relative_l2(np.asarray(observed[name]), value)
        if np.isfinite(distance):
            apart = np.abs(np.asarray(observed[name], np.float64) - np.asarray(value, np.float64))
            at = np.unravel_index(int(np.nanargmax(apart)), apart.shape) if apart.size else ()
            got = np.asarray(observed[name])[at] if apart.size else None
            print(f"  relative L2 {{distance:.3e}}, farthest at {{tuple(map(int, at))}}:", end=" ")
            print(f"{{got!r}} instead of {{value[at] if apart.size else None!r}}")
        worst = max(worst, distance)
    print(f"{{'DIFFERENT' if worst >= LIMIT else 'alike'}}: {{worst:.3e}}, limit {{LIMIT:.3e}}")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
'''


def _write(folder: Path, case: _Case, script: Script, limit: float) -> None:
    from safetensors.numpy import save_file

    onnx.save(case.model, folder / MODEL)
    # safetensors refuses strided arrays; ascontiguousarray would turn a scalar into a vector.
    for name, values in ((INPUTS, case.feeds), (EXPECTED, case.expected)):
        save_file({n: np.asarray(v, order="C") for n, v in values.items()}, folder / name)
    text = _SCRIPT.format(
        engine=script.engine,
        packages=f"numpy, safetensors, {script.packages}",
        limit=float(f"{limit:.3g}"),
        source=script.source,
        expected=EXPECTED,
        inputs=INPUTS,
        model=MODEL,
        order=list(case.feeds),
    )
    (folder / SCRIPT).write_text(text, encoding="utf-8")


# The limits of a backend's process, then the script as if it had been called.
_BOOTSTRAP = """
import json, runpy, sys
from auditor.processes.limits import Limits, apply
apply(Limits(**json.loads(sys.argv[1])))
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def _run(folder: Path, limits: Limits | None) -> tuple[bool, str]:
    """Whether the script shows the difference, and what it printed.

    It runs a part of a model from a stranger, so it gets the limits that a backend's process has.
    """
    allowed = json.dumps(asdict(limits or Limits(physical_memory())))
    line = [sys.executable, "-c", _BOOTSTRAP, allowed, SCRIPT]
    try:
        done = subprocess.run(
            line,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": module_path()},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"the script took longer than {_SECONDS:g} s"
    said = done.stdout if "DIFFERENT" in done.stdout else done.stdout + done.stderr[-2000:]
    return done.returncode == 1 and "DIFFERENT" in done.stdout, said.strip()


def _quoted(text: str) -> str:
    """A name as Markdown shows it whatever it holds."""
    shown = "".join(c if c.isprintable() and c != "`" else ascii(c)[1:-1] for c in text)
    return f"`{shown[:300]}`"


def _nodes(number: int) -> str:
    return f"{number} node" if number == 1 else f"{number} nodes"


def _issue(
    made: Reproducer, case: _Case, finding: Finding, report: AuditReport, provenance: Provenance
) -> str:
    operators = [node.op_type for node in case.model.graph.node if node.op_type != "Constant"]
    kinds = ", ".join(dict.fromkeys(operators))
    opset = next((o.version for o in case.model.opset_import if o.domain in ("", "ai.onnx")), 1)
    inputs = ", ".join(f"{v.dtype} {list(v.shape)}" for v in case.feeds.values())
    options = ", ".join(_quoted(f"{k}={v}") for k, v in provenance.options.items()) or "none"
    model_hash = report.model.sha256[:12]
    cause = "not known: no replayed cause explains it"
    if finding.noise is not None:
        title = _quoted(finding.noise)
        share = "" if finding.explained is None else f" (explains {finding.explained:.2%} of it)"
        cause = f"{title}{share}"
    return f"""\
# {provenance.engine}: {kinds} differs from ONNX by {case.relative_l2:.1e} relative L2

`python {SCRIPT}` in this folder runs `{MODEL}` ({_nodes(made.nodes)}: {kinds}; opset {opset}) on
`{INPUTS}` ({inputs}) and compares it with `{EXPECTED}`, the values of
{case.reference}.

## Expected

Values as the ONNX operator specification defines them, up to rounding.

## What happens

```
{made.said}
```

## Environment

- {provenance.engine} {provenance.version} on {provenance.device}
- options: {options}
- Python {platform.python_version()}, {platform.platform()}

## Where it comes from

- Cut out of {_quoted(os.path.basename(report.model.path))} (sha256 {model_hash}):
  {made.place}.
- Kernel, as the engine states it: {_quoted(finding.kernel) if finding.kernel else "not stated"}
- Cause, measured by replaying it: {cause}
"""
