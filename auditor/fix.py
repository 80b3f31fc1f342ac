"""The smallest change that brings a backend within its limit, verified by building it.

Changes are engine options, and equivalent ways to write the layers to blame (``auditor.fixes``).
Layers are taken in the order of their measured effect, so that few builds are needed; the outputs
of every changed model are compared with those of the *original* reference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from auditor import discovery, metrics, weights
from auditor import model as models
from auditor.audit import audit, model_of, reference_of, request_for, stimulus_of
from auditor.errors import BackendError, UsageError
from auditor.fixes._view import MARK, View
from auditor.ports import Keeping
from auditor.processes.worker import workers
from auditor.records.fix import FixAttempt, FixReport
from auditor.replays import replay, surgery
from auditor.replays.rounding import upgraded
from auditor.trace import Tracer

if TYPE_CHECKING:
    from auditor.audit import AuditOptions, BackendSpec
    from auditor.model import Model
    from auditor.ports import Arrays, Fix, Progress
    from auditor.records.measured import Segment
    from auditor.records.report import AuditReport, BackendReport, Finding
    from auditor.replays.replay import Reference

BUILDS = 6
SAMPLES = 4
COMPARABLE = 1e-3  # the limit where nothing can be compared as it is, in shape or finiteness
SAME = 1e-5  # a rewrite must keep the reference's outputs within this relative L2
_MIXED = 4  # builds at most with single layers in float32
_NARROW = ("precision.bf16", "precision.fp16")  # what these help against
_NARROW_TYPES = ("bf16", "f16")
_OPSETS = (13, 17, 18, 21)
_FASTER = 1.03  # a latency that is this much lower decides between two changes


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to the model or to its build.

    Attributes:
        name: in words.
        options: engine options, as after ``--option ID.``.
        nodes: labels of the nodes that are written otherwise.
        findings: ranks of the findings that it is meant for.
        model: the changed model; None where the file stays.
        kept: the segments that stay in float32.
    """

    name: str
    findings: tuple[int, ...]
    options: dict[str, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    model: onnx.ModelProto | None = None
    kept: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """A change, and what came of it; fields as in ``FixAttempt``."""

    change: Change
    after: float | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    failure: str | None = None
    artifact: Path | None = None  # the engine's own file that was built

    @property
    def form(self) -> str | None:
        """The ending of the file that the change makes."""
        if self.artifact is not None:
            return self.artifact.suffix
        return None if self.change.model is None else ".onnx"

    @property
    def slower(self) -> float:
        """How many times as long a run takes."""
        if not self.latency_before or self.latency_after is None:
            return math.inf
        return self.latency_after / self.latency_before

    def report(self) -> FixAttempt:
        """Without the model."""
        c = self.change
        return FixAttempt(
            c.name,
            c.findings,
            c.options,
            c.nodes,
            c.model is not None,
            self.after,
            self.latency_before,
            self.latency_after,
            self.failure,
            len(c.kept) or None,
        )


@dataclass(frozen=True, slots=True)
class Fixing:
    """The result of a search, and the model to write where the chosen change makes one."""

    report: FixReport
    model: onnx.ModelProto | None
    artifact: Path | None = None  # in the folder that was given to ``fix``


def fix(
    report: AuditReport,
    backend: BackendReport,
    options: AuditOptions,
    limit: float | None,
    folder: Path,
    progress: Progress,
    form: str | None = None,
) -> Fixing:
    """Search the smallest change that brings a backend's divergence to ``limit``.

    Args:
        report: the audit's report.
        backend: its part about the backend to fix.
        options: the options of that audit.
        limit: relative L2 of the outputs; None for a tenth of what it is, or for ``COMPARABLE``.
        folder: for the files that are made, the chosen one among them.
        progress: told what is being done.
        form: the ending of the file to make; of the changes within the limit those that make one
            are preferred.

    Raises:
        UsageError: the model has changed, or there is nothing to fix.
    """
    spec = next((s for s in options.backends if s.label == backend.id), None)
    if spec is None or options.candidate is not None:
        raise UsageError(
            f"{backend.id} of this report cannot be built again alone",
            "Audit the model itself on a backend of this machine.",
        )
    if spec.label in options.artifacts:
        raise UsageError(
            f"{spec.label} audited {options.artifacts[spec.label].name}, which cannot be rewritten",
            "Follow the remedies in the report, make the file anew, and audit it again.",
        )
    model = model_of(report, options)
    found = [f for f in report.findings if f.backend == backend.id]
    with Bench(model, spec, replace(options, traces=()), folder, progress) as bench:
        search = _Search(backend, found, bench, limit, form)
        if bench.before <= search.limit:
            told = FixReport(backend.id, bench.before, search.limit, (), None, None, ())
            return Fixing(told, None)
        return search.run()


# --- the search ----------------------------------------------------------------------------------


class _Search:
    """What was tried so far, and the limit that it is held against."""

    def __init__(
        self,
        backend: BackendReport,
        found: Sequence[Finding],
        bench: Bench,
        limit: float | None,
        form: str | None,
    ) -> None:
        self._backend = backend
        self._found = found
        self._bench = bench
        self._author = _Author(bench, found)
        self._asked = limit
        self._form = form
        self._attempts: list[Attempt] = []
        before = bench.before
        tenth = before / 10 if math.isfinite(before) else COMPARABLE
        self.limit = tenth if limit is None else limit

    def run(self) -> Fixing:
        """Search, and choose."""
        before = self._bench.before
        self._mixed(self._backend.segments, self._found, before)
        if not self._reached():
            made = self._tried(self._author.layers(_needed(self._found, before, self.limit)))
            if self._within(made):
                assert made is not None
                self._fewer(made.change)
            elif made is not None:
                self._on_top(made)
        for change in _by_options(self._backend, self._found, self._bench.spec.id):
            if self._within(self._tried(change)):
                break
        if not self._reached():
            for more in self._author.wider():
                if self._within(self._tried(more)):
                    break
        return self._chosen()

    def _tried(self, change: Change | None) -> Attempt | None:
        if change is None or len(self._attempts) >= BUILDS:
            return None
        if any(_alike(change, a.change) for a in self._attempts):
            return None
        self._attempts.append(self._bench.attempt(change))
        return self._attempts[-1]

    def _within(self, attempt: Attempt | None) -> bool:
        return attempt is not None and attempt.after is not None and attempt.after <= self.limit

    def _reached(self) -> bool:
        return any(map(self._within, self._attempts))

    def _chosen(self) -> Fixing:
        before, attempts = self._bench.before, self._attempts
        good = [i for i, a in enumerate(attempts) if self._within(a)]
        good = [i for i in good if self._form and attempts[i].form == self._form] or good
        usable = [i for i, a in enumerate(attempts) if _nearer(a, before)]
        chosen = min(good, key=lambda i: _cost(attempts[i]), default=None)
        best = min(usable, key=lambda i: attempts[i].after or 0.0, default=None)
        notes = list(self._author.notes)
        if len(attempts) >= BUILDS:
            notes.append(f"No more than {BUILDS} builds are tried.")
        told = FixReport(
            backend=self._backend.id,
            before=before,
            limit=self.limit,
            attempts=tuple(a.report() for a in attempts),
            chosen=chosen,
            best=best,
            notes=tuple(notes),
        )
        if chosen is None:
            return Fixing(told, None)
        return Fixing(told, attempts[chosen].change.model, attempts[chosen].artifact)

    def _on_top(self, made: Attempt) -> None:
        """Where rewriting alone is not enough: the same with layers in float32, or an option."""
        if not _nearer(made, self._bench.before):
            return
        self._mixed_on_top(made)
        for change in _by_options(self._backend, self._found, self._bench.spec.id):
            if self._reached():
                return
            name = f"{made.change.name}; {change.name}"
            self._tried(replace(made.change, name=name, options=change.options))

    def _mixed_on_top(self, made: Attempt) -> None:
        """What each layer's error does in a rewritten model is another question than before.

        The outputs may not even have been numbers. So the rewritten model is audited.
        """
        narrow = any(map(_is_narrow, self._backend.segments))
        if not narrow or not isinstance(discovery.backend(self._bench.spec.id), Keeping):
            return
        assert made.after is not None
        said = f"Build {len(self._attempts)} was audited, for what each of its layers does."
        if not math.isfinite(self._bench.before) and self._asked is None:
            self.limit = made.after / 10
            said += " The limit is a tenth of its divergence: the program as it is has none."
        self._author.notes.append(said)
        report = self._bench.audited(made.change)
        self._mixed(report.backends[0].segments, report.findings, made.after, made.change)

    def _mixed(
        self,
        segments: Sequence[Segment],
        found: Sequence[Finding],
        before: float,
        base: Change | None = None,
    ) -> None:
        """Search the fewest segments to keep in float32, where a precision is what is to blame.

        Segments are taken by what each one's error alone does to the outputs. Such errors are
        nearly independent, so squares add up to a prediction, which every build then corrects.
        Builds that are left try to do without single other layers: which of several outputs a
        layer changes is not in that order.
        """
        if not isinstance(discovery.backend(self._bench.spec.id), Keeping):
            return
        if not math.isfinite(before) or not any(f.noise in _NARROW for f in found):
            return
        order = sorted(filter(_is_narrow, segments), key=lambda s: -_alone(s))
        squares = [_alone(s) ** 2 for s in order]
        whole = sum(_alone(s) ** 2 for s in segments)
        if not whole > 0:
            return
        left = [whole - sum(squares[:number]) for number in range(len(order) + 1)]
        predicted = [before * math.sqrt(max(rest, 0.0) / whole) for rest in left]
        if predicted[-1] > self.limit:  # most is of another cause
            return
        low, high, off = 0, len(order) + 1, 1.0
        best, builds = math.inf, 0  # ``best``: the divergence with the first ``high`` kept
        while builds < _MIXED:
            fitting = (n for n in range(low + 1, high) if predicted[n] * off <= self.limit)
            number = next(fitting, None)
            if number is None:  # by the last build's correction: one fewer than enough, or far more
                number = high - 1 if high <= len(order) else (low + high) // 2
            if not low < number < high:
                break
            made = self._tried(_keeping(order[:number], segments, found, base))
            if made is None or made.after is None:
                return
            builds += 1
            if made.after <= self.limit:
                high, best = number, made.after
            else:
                low = number
            if predicted[number] > 0:
                off = made.after / predicted[number]
        kept = order[:high]
        for spare in order[: high - 1][::-1]:
            if builds >= _MIXED or math.hypot(best, before * _alone(spare)) > self.limit:
                return
            fewer = [segment for segment in kept if segment is not spare]
            made = self._tried(_keeping(fewer, segments, found, base))
            builds += 1
            if made is not None and made.after is not None and made.after <= self.limit:
                kept, best = fewer, made.after

    def _fewer(self, change: Change) -> None:
        """Halve the number of layers written otherwise as long as the limit holds."""
        low, high = 0, len(change.findings)
        while high - low > 1:
            middle = (low + high) // 2
            smaller = self._author.layers(middle)
            if smaller is None:
                return
            made = self._tried(smaller)
            if made is None:
                return
            low, high = (low, middle) if self._within(made) else (middle, high)


def _alone(segment: Segment) -> float:
    return segment.leave_one_in or 0.0


def _is_narrow(segment: Segment) -> bool:
    """Whether float32 may help; its precision is that of the last of its kernels only."""
    if _alone(segment):
        return segment.noise is None or segment.noise in _NARROW
    return any(name in segment.precision for name in _NARROW_TYPES)


def _alike(a: Change, b: Change) -> bool:
    return (a.name, a.nodes, a.options) == (b.name, b.nodes, b.options)


def _nearer(made: Attempt, before: float) -> bool:
    """Whether it diverges less than the plain program, which may give no numbers."""
    return made.after is not None and not made.after >= before


def _keeping(
    taken: Sequence[Segment],
    segments: Sequence[Segment],
    found: Sequence[Finding],
    base: Change | None,
) -> Change:
    """``taken`` in float32, on top of ``base``."""
    kept = _with_passive(taken, segments)
    nodes = tuple(label for segment in kept for label in segment.nodes)
    name = f"{len(kept)} of {sum(map(_is_narrow, segments))} layers in float32"
    if base is not None:
        return replace(base, name=f"{base.name}; {name}", nodes=base.nodes + nodes, kept=kept)
    ranks = {key: f.rank for f in reversed(found) for key in f.nodes}
    about = tuple(sorted({ranks[label] for label in nodes if label in ranks}))
    return Change(name, about, {}, nodes, kept=kept)


def _cost(attempt: Attempt) -> tuple[float, int]:
    """Latency in steps that matter, then how much is changed."""
    slower = attempt.slower
    steps = math.ceil(math.log(slower, _FASTER)) if 0 < slower < math.inf else math.inf
    return max(steps, 0), len(attempt.change.nodes)


def _needed(found: Sequence[Finding], before: float, limit: float) -> int:
    """How many findings must go, if their errors add up as independent ones do."""
    left = before**2
    for number, finding in enumerate(found, 1):
        effect = finding.effect
        if effect is None or not math.isfinite(effect) or not math.isfinite(left):
            continue
        left -= effect**2
        if left <= limit**2:
            return number
    return len(found)


def _by_options(backend: BackendReport, found: Sequence[Finding], id: str) -> Iterator[Change]:
    """Options that leave a cause out: those that the audit tried, then those of the catalogue."""
    ranks = {f.noise: f.rank for f in reversed(found)}
    helped = [c for c in backend.counterfactuals if (c.removed or 0.0) > 0 and c.after is not None]
    for made in sorted(helped, key=lambda c: c.after or 0.0):
        about = tuple(sorted(ranks[n] for n in made.noises if n in ranks))
        yield Change(f"without {made.factor}", about, dict(made.options))
    catalogue = {noise.id: noise for noise in discovery.noises()}
    for noise, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if noise in catalogue and (options := catalogue[noise].ablations.get(id)):
            yield Change(f"without {noise}", (rank,), dict(options))


def _with_passive(taken: Sequence[Segment], segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """``taken``, and the layers that only hand on what those make, such as a pooling.

    They show no error of their own where they are fed narrow values, and round wide ones.
    """
    ids = {segment.id for segment in taken}
    made = {name for segment in taken for name in segment.outputs}
    for segment in segments:
        passive = _is_narrow(segment) and not _alone(segment)
        if passive and made.intersection(segment.inputs):
            ids.add(segment.id)
            made.update(segment.outputs)
    return tuple(segment for segment in segments if segment.id in ids)


# --- rewriting -----------------------------------------------------------------------------------


class _Author:
    """Writes the model anew, layer by layer, and keeps only what the reference agrees with."""

    def __init__(self, bench: Bench, found: Sequence[Finding]) -> None:
        self.notes: list[str] = []
        if bench.whole is None:
            self.notes.append("The model's weights exceed 2 GB: it is not rewritten.")
        self._bench = bench
        self._found = found
        self._fixes = discovery.fixes()

    def layers(self, number: int, *, around: bool = False) -> Change | None:
        """The model with the layers of the first ``number`` findings written otherwise.

        Each in the way that suits its cause; None where there is none. With ``around`` the nodes
        that read from these layers too: a value may overflow on its way between them.
        """
        model = self._bench.whole
        if model is None:
            return None
        keys = {key: f for f in self._found[:number] for key in self._bench.keys_of(f)}
        if around:
            made = {
                n: keys[models.key(node)]
                for node in model.graph.node
                if models.key(node) in keys
                for n in node.output
            }
            for node in model.graph.node:
                source = next((made[n] for n in node.input if n in made), None)
                if source is not None:
                    keys.setdefault(models.key(node), source)
        view = View(model, self._bench.values)
        replaced: dict[int, list[onnx.NodeProto]] = {}
        names: dict[str, None] = {}
        nodes, ranks = [], set()
        theirs = [
            (index, node, keys[models.key(node)])
            for index, node in enumerate(model.graph.node)
            if models.key(node) in keys
        ]
        # Where a way that suits the cause exists, a finding's other nodes are left as they are.
        suited = {
            finding.rank
            for _, node, finding in theirs
            for fix in self._fixes
            if finding.noise in fix.noises and fix.rewrite(node, View(model, self._bench.values))
        }
        for index, node, finding in theirs:
            for fix in self._suiting(finding):
                if finding.rank in suited and finding.noise not in fix.noises:
                    continue
                if (written := fix.rewrite(node, view)) is not None:
                    replaced[index] = written
                    names[fix.title] = None
                    nodes.append(self._bench.label(node))
                    ranks.add(finding.rank)
                    break
        if not replaced:
            return None
        changed = surgery.copied(model)
        del changed.graph.node[:]
        for index, node in enumerate(model.graph.node):
            changed.graph.node.extend(replaced.get(index, [node]))
        changed.graph.initializer.extend(view.initializers)
        _without_round_trips(changed)
        if (why := self._bench.disagrees(changed)) is not None:
            self.notes.append(f"{', '.join(names)}: not tried, {why}.")
            return None
        return Change("; ".join(names), tuple(sorted(ranks)), {}, tuple(nodes), changed)

    def wider(self) -> Iterator[Change | None]:
        """What is left to try: all layers, their neighbours too, and newer operator sets."""
        yield self.layers(len(self._found))
        yield self.layers(len(self._found), around=True)
        yield from self.newer(self._found)

    def _suiting(self, finding: Finding) -> list[Fix]:
        """Rewrites for its cause, the particular ones first; then all others, for causes overlap.

        None can do harm: each is checked on the reference, and counts by what its build shows.
        """
        return sorted(
            self._fixes, key=lambda f: (finding.noise not in f.noises, len(f.noises), f.id)
        )

    def newer(self, taken: Sequence[Finding]) -> Iterator[Change]:
        """The model in newer operator sets, which runtimes import in other ways."""
        model = self._bench.whole
        if model is None:
            return
        ranks = tuple(f.rank for f in taken)
        for opset in (o for o in _OPSETS if o > surgery.opset(model)):
            for changed in upgraded(model, opset):
                if self._bench.disagrees(changed) is None:
                    yield Change(f"operator set {opset}", ranks, {}, (), changed)
                    break


def _without_round_trips(model: onnx.ModelProto) -> None:
    """Neighbours computed in float32 hand it over: no cast to float16 and back in between."""
    narrowed = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Cast" and surgery.attributes(node)["to"] == onnx.TensorProto.FLOAT16
    }
    wide: dict[str, str] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = wide.get(name, name)
        if node.op_type == "Cast" and surgery.attributes(node)["to"] == onnx.TensorProto.FLOAT:
            source = narrowed.get(node.input[0])
            if source is not None and MARK in source:  # a cast that a rewrite put there
                wide[node.output[0]] = source
    finals = {o.name for o in model.graph.output}
    for index in reversed(range(len(model.graph.node))):  # what reads a dead cast may be dead too
        node = model.graph.node[index]
        read = any(node.output[0] in other.input for other in model.graph.node)
        if node.op_type == "Cast" and not read and node.output[0] not in finals:
            del model.graph.node[index]


# --- building and measuring ----------------------------------------------------------------------


class Bench:
    """The backend with the plain program, beside which changed ones are built."""

    def __init__(
        self,
        model: Model,
        spec: BackendSpec,
        options: AuditOptions,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self.spec = spec
        self._model = model
        self._options = options
        self._scratch = scratch
        self._progress = progress
        self._files = 0
        self._stack = ExitStack()
        self._tracer: Tracer | None = None
        stimulus = stimulus_of(model, options)
        self._feeds = [stimulus.sample(i) for i in range(min(len(stimulus), SAMPLES))]
        self._threads = options.threads or os.cpu_count() or 1
        self._reference, _ = reference_of(model, self._threads, scratch)
        self._expected = [self._reference.run(feeds) for feeds in self._feeds]
        self.whole = _together(model)
        self.values: Arrays = {}
        if self.whole is not None:
            self.values = replay.inside(self.whole, self._threads, self._feeds[0])
        self.before = math.nan

    def __enter__(self) -> Bench:
        """Build the plain program and measure it."""
        self._build()
        self.before = self._apart([self._plainly(feeds) for feeds in self._feeds])
        return self

    def __exit__(self, *_: object) -> None:
        """End the backend's process."""
        self._stack.close()

    def label(self, node: onnx.NodeProto) -> str:
        """What a person calls a node."""
        return self._model.labels.get(models.key(node), node.name)

    def keys_of(self, finding: Finding) -> tuple[str, ...]:
        """Keys of the nodes that a finding is about."""
        by_label = {label: key for key, label in self._model.labels.items()}
        return tuple(by_label[label] for label in finding.nodes if label in by_label)

    def disagrees(self, changed: onnx.ModelProto) -> str | None:
        """Why a changed model is not the same to the reference; None where it is."""
        try:
            reference = self._as_reference(changed)
            values = [reference.run(feeds) for feeds in self._feeds]
        except UsageError as error:
            return f"the reference refuses it: {error.message}"
        distance = self._apart(values)
        return None if distance <= SAME else f"the reference itself differs by {distance:.1e}"

    def attempt(self, change: Change) -> Attempt:
        """Build a change beside the plain program; its divergence and latency, or why not."""
        try:
            after, artifact = self.distance(change)
            tracer = self._tracer
            assert tracer is not None
            before, latency = tracer.race(self._feeds[0])
        except (BackendError, UsageError) as error:
            self._end()  # its process may be gone
            return Attempt(change, failure=error.message)
        return Attempt(change, after, before, latency, artifact=artifact)

    def distance(self, change: Change) -> tuple[float, Path | None]:
        """Build a change beside the plain program; its divergence, and the file it was built of.

        Raises:
            BackendError, UsageError: it could not be built or run.
        """
        path = self._model.path if change.model is None else self._saved(change.model)
        tracer = self._tracer or self._build()
        assert tracer.request is not None
        options = tracer.request.options | change.options
        request = replace(tracer.request, model_path=path, options=options)
        artifact = None
        if change.kept:
            backend = discovery.backend(self.spec.id)
            assert isinstance(backend, Keeping)
            self._files += 1
            artifact = self._scratch / f"{self._files}{backend.keeps}"
            keys = tuple(key for segment in change.kept for key in segment.node_keys)
            request = replace(request, artifact=artifact, kept=keys)
        tracer.beside(request)
        return self._apart([tracer.contrast(feeds)[1] for feeds in self._feeds]), artifact

    def audited(self, change: Change) -> AuditReport:
        """An audit of the changed model on this backend, with the changed model's own reference.

        Raises:
            UsageError: it cannot be loaded.
        """
        assert change.model is not None
        asked = replace(
            self._options, backends=(self.spec,), confirm=False, latency=False, pictures=False
        )
        noises = discovery.noises()
        return audit(self._saved(change.model), asked, noises=noises, progress=self._progress)

    def _build(self) -> Tracer:
        options = self._options
        (worker,) = self._stack.enter_context(workers([self.spec.id], options.limits))
        tracer = Tracer(self.spec.label, worker, options.timeout, self._progress)
        if tracer.start():
            tracer.build(
                request_for(self.spec, options, self._model, self._feeds[0], worker.workdir)
            )
        if tracer.gap is not None:
            raise UsageError(
                f"{self.spec.label} no longer builds the model: {tracer.gap.reason}",
                "Audit it again.",
            )
        self._tracer = tracer
        return tracer

    def _end(self) -> None:
        self._stack.close()
        self._stack = ExitStack()
        self._tracer = None

    def _plainly(self, feeds: Arrays) -> Arrays:
        assert self._tracer is not None
        found = self._tracer.plain(feeds)
        if found is None:
            assert self._tracer.gap is not None
            raise UsageError(
                f"{self.spec.label} no longer runs the model: {self._tracer.gap.reason}",
                "Audit it again.",
            )
        return found

    def _apart(self, outputs: Sequence[Arrays]) -> float:
        """The largest relative L2 of any output on any sample."""
        return max(
            metrics.relative_l2(self._reference.wide(found), expected, (name,))
            for found, expected in zip(outputs, self._expected, strict=True)
            for name in expected
        )

    def _as_reference(self, changed: onnx.ModelProto) -> Reference:
        loaded = models.load(self._saved(changed))
        return reference_of(loaded, self._threads, self._scratch)[0]

    def _saved(self, model: onnx.ModelProto) -> Path:
        self._files += 1
        path = self._scratch / f"{self._files}.onnx"
        onnx.save(model, path)
        return path


def _together(model: Model) -> onnx.ModelProto | None:
    """The model with its weights inside; None where they are too large for one file."""
    whole = surgery.copied(model.proto)
    if sum(value.nbytes for value in model.weights.values()) >= onnx.checker.MAXIMUM_PROTOBUF:
        return None
    for tensor in whole.graph.initializer:
        tensor.CopyFrom(weights.attach(tensor, model.weights))
    return whole
