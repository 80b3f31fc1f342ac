"""The smallest change that brings a backend within its limit, verified by building it.

Changes are engine options, and equivalent ways to write the layers to blame (``auditor.fixes``).
Layers are taken in the order of their measured effect, so that few builds are needed; the outputs
of every changed model are compared with those of the *original* reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from auditor import discovery
from auditor.errors import UsageError
from auditor.fixes._author import Author
from auditor.fixes._bench import Attempt, Bench, Change
from auditor.ports import Keeping
from auditor.records.backend import Provenance
from auditor.records.fix import FixReport
from auditor.records.report import severity_of_output
from auditor.subject import model_of

if TYPE_CHECKING:
    from auditor.options import AuditOptions
    from auditor.ports import Progress
    from auditor.records.measured import Segment
    from auditor.records.report import AuditReport, BackendReport, Finding

BUILDS = 6
COMPARABLE = 1e-3  # the limit where nothing can be compared as it is, in shape or finiteness
_MIXED = 4  # builds at most with single layers in float32
_NARROW = ("precision.bf16", "precision.fp16")  # what these help against
_NARROW_TYPES = ("bf16", "f16")
_FASTER = 1.03  # a latency that is this much lower decides between two changes


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
        limit: relative L2 of the outputs; None for a tenth of what it is, or for ``COMPARABLE``;
            nothing is built where the report has nothing against the backend.
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
    apart = max(o.distance.relative_l2 for o in backend.outputs)
    levels = [severity_of_output(backend, o) for o in backend.outputs]
    if limit is None and not found and set(levels) == {"info"}:
        note = "The report has nothing against it: name what to reach with --to or a tolerance."
        return Fixing(FixReport(backend.id, apart, apart, (), None, None, (note,)), None)
    with Bench(model, spec, replace(options, traces=()), folder, progress) as bench:
        search = _Search(backend, found, bench, limit, form)
        notes = tuple(_otherwise(backend.provenance, bench.built))
        if bench.before <= search.limit:
            told = FixReport(backend.id, bench.before, search.limit, (), None, None, notes)
            return Fixing(told, None)
        fixing = search.run()
        return replace(fixing, report=replace(fixing.report, notes=notes + fixing.report.notes))


def _otherwise(reported: Provenance | None, built: Provenance | None) -> Iterator[str]:
    """A sentence where the program is another one than the report's, so that figures differ.

    So it is on another processor, where an engine has another default.
    """
    if reported is None or built is None:
        return
    was, now = reported.options, built.options
    if apart := sorted(k for k in was.keys() & now.keys() if was[k] != now[k]):
        changes = ", ".join(f"{k}={now[k]} instead of {was[k]}" for k in apart)
        where = f" on {reported.device}" if reported.device != built.device else ""
        yield (
            f"Built here with {changes}: this is not the program of the report{where}, and what "
            "follows is not about its divergence."
        )


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
        self._author = Author(bench, found)
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
    built = backend.provenance.options if backend.provenance else {}
    for noise, rank in sorted(ranks.items(), key=lambda item: item[1]):
        options = catalogue[noise].ablations.get(id, {}) if noise in catalogue else {}
        if not options.items() <= built.items():
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
