"""From what was measured on every backend to a report: ranked, confirmed, judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from auditor import __version__
from auditor import subject as subjects
from auditor.processes import machine
from auditor.records.backend import Gap
from auditor.records.report import AuditReport, NoiseInfo, PipelineReport
from auditor.training import origins, second_shape
from auditor.verdict import confirm, latency, ranking, summary

if TYPE_CHECKING:
    from auditor.analysis import Analysis
    from auditor.capture.trace import Tracer
    from auditor.comparison.agreement import Agreements
    from auditor.options import AuditOptions
    from auditor.ports import Arrays, Noise
    from auditor.subject import References, Subject


class Conclusion:
    """What an audit says, step by step; ``report`` comes last.

    Attributes:
        reports: what was measured on each backend, in the order asked for.
        findings: ranked.
    """

    def __init__(
        self,
        subject: Subject,
        options: AuditOptions,
        noises: Sequence[Noise],
        tracers: Sequence[Tracer],
        analyses: Mapping[str, Analysis],
    ) -> None:
        """Rank what was measured.

        Args:
            subject: what was audited.
            options: what was asked for.
            noises: the catalogue.
            tracers: the backends that run here, still with their builds.
            analyses: by backend or recording, what was measured.
        """
        self._subject, self._options = subject, options
        self._tracers = {tracer.id: tracer for tracer in tracers}
        self._catalogue = {noise.id: noise for noise in noises}
        devices = {spec.label: spec.device or "" for spec in options.backends}
        reports = tuple(summary.report(a, devices.get(who, "")) for who, a in analyses.items())
        measured = [origin for tracer in tracers for origin in tracer.origins]
        self._origins = origins.merged(origins.of(subject.model.proto), measured)
        self.reports = origins.attached(reports, self._origins)
        effects = {
            (who, id): analysis.leave_one_in.effect(id)
            for who, analysis in analyses.items()
            for id in analysis.leave_one_in.effects
        }
        files = {(who, s) for who, a in analyses.items() for s in a.causes.of_the_file()[0]}
        self.findings = ranking.findings(self.reports, effects, self._catalogue, files)
        self._analyses = analyses
        self._gaps: list[Gap] = []  # of the steps below

    def try_other_shapes(self, against: References) -> bool:
        """Find what the file computes at the audited shape only; whether there was a module."""
        modules = [
            t for t in self._tracers.values() if t.id in self._subject.training and t.gap is None
        ]
        sample = self._subject.stimulus.sample(0)
        for module in modules:
            report = next(r for r in self.reports if r.id == module.id)
            more, gaps = second_shape.tried(
                module, report, against.exported, against.truth, sample, self._origins
            )
            self.findings = ranking.with_more(self.findings, more)
            self._gaps += gaps
        return bool(modules)

    def confirm(self, expected: Sequence[Arrays]) -> None:
        """Build what diverged again without single factors; ``expected`` has the reference's."""
        samples = self._subject.samples
        self.reports, self.findings, unconfirmed = confirm.confirm(
            self.reports,
            self.findings,
            self._tracers,
            self._subject.rename,
            [confirm.Case(samples.feeds(i), e) for i, e in enumerate(expected)],
            own_file=self._subject.compiled is not self._subject.model,
        )
        self.findings = ranking.tried(self.findings, self.reports, self._catalogue)
        self._gaps += unconfirmed

    def time(self) -> None:
        """Time what is deployed."""
        feeds = self._subject.samples.feeds(0)
        self.reports, untimed = latency.timed(self.reports, self._tracers, feeds)
        self._gaps += untimed

    def report(
        self,
        against: References,
        digest: str,
        agreements: Agreements,
        laps: dict[str, float],
    ) -> AuditReport:
        """The report, with a verdict.

        Args:
            against: what was compared with.
            digest: the SHA-256 of the inputs.
            agreements: how far outputs are from each other.
            laps: seconds by stage; read when the report is written.
        """
        subject, options = self._subject, self._options
        pipeline = subject.photographs.report() if subject.photographs else None
        if pipeline is not None:
            self.findings = ranking.with_steps(self.findings, pipeline, self._catalogue)
        requested = [*self._tracers] if options.requested else []
        requested += [recording.id for recording in subject.recordings]
        verdict, exit_code = ranking.verdict(
            self.reports, self.findings, requested, options.fail_on
        )
        candidate = str(options.candidate) if options.candidate else None
        stimulus = subject.stimulus.info
        pairs = agreements.pairs()
        return AuditReport(
            tool_version=__version__,
            model=replace(subject.model.info, candidate=candidate),
            stimulus=replace(
                stimulus,
                sha256=digest,
                notes=(*stimulus.notes, *subjects.handed(subject, options)),
            ),
            reference=against.reference.info,
            backends=self.reports,
            findings=self.findings,
            agreement=pairs,
            outlier=ranking.outlier(pairs),
            gaps=tuple(self._all_gaps()),
            verdict=verdict,
            exit_code=exit_code,
            timing=laps,
            fail_on=options.fail_on,
            requested=tuple(requested),
            noises=self._named(pipeline),
            pipeline=pipeline,
            machine=machine.here(),
            threads=options.threads,
        )

    def _all_gaps(self) -> Iterator[Gap]:
        """What was not audited."""
        for why in self._subject.model.unread:
            yield Gap("model", "outputs", f"{why}.")
        for name in dict.fromkeys(n for a in self._analyses.values() for n in a.outputs):
            meters = (a.outputs[name] for a in self._analyses.values() if name in a.outputs)
            if all(meter.empty for meter in meters):
                why = f"output `{name}` has no elements on any sample: there was nothing to compare"
                hint = "Give inputs for which it has some, with --data."
                yield Gap("model", "outputs", f"{why}.", hint)
        kinds = {meter.kind for a in self._analyses.values() for meter in a.outputs.values()}
        if self._options.tokens and kinds and "text" not in kinds:
            hint = "Say which one is, with --output-kind NAME:text."
            yield Gap("model", "outputs", "--tokens: no output is read as a text.", hint)
        if self._subject.photographs:
            yield from self._subject.photographs.gaps
        for analysis in self._analyses.values():
            yield from analysis.gaps()
        yield from self._gaps

    def _named(self, pipeline: PipelineReport | None) -> tuple[NoiseInfo, ...]:
        """What the catalogue says of the causes named, ordered by id."""
        ids = {s.noise for b in self.reports for s in b.segments if s.noise}
        ids |= {c.noise for b in self.reports for c in b.categories}
        ids |= {f.noise for f in self.findings if f.noise}
        ids |= {step.noise for step in pipeline.steps} if pipeline else set()
        return tuple(
            NoiseInfo(n.id, n.stage, n.type, n.title, n.cause, n.source)
            for id, n in sorted(self._catalogue.items())
            if id in ids
        )
