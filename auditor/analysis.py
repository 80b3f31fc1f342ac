"""Everything measured on one backend, collected sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from auditor import attribution, divergence, impact, metrics, model
from auditor.divergence import Local, Meter
from auditor.impact import Books, Chain
from auditor.metrics import Moments
from auditor.noises import fp32_rounding
from auditor.ports import Array, Arrays, Noise, SegmentGraph
from auditor.records import (
    BackendReport,
    CategoryShare,
    Concentration,
    Distance,
    Fidelity,
    FidelityProof,
    Gap,
    Kernel,
    OutputDistance,
    Probe,
    Segment,
    Skipped,
    TensorStats,
)
from auditor.replay import Reference, ReplayError, difference
from auditor.segments import Cut
from auditor.trace import SampleTrace, Tracer

# Leave-one-in is averaged over this many samples (it was stable from four on) and measured for
# this many segments, those with the largest introduced error.
IMPACT_SAMPLES = 4
IMPACT_SEGMENTS = 64
# The segments whose cause is also tested against rival causes, and where the error's place
# inside the tensor is reported.
TOP = 10
# A derived tensor name is believed when the values have at least this cosine similarity.
CONFIRMED = 0.9
# Above this part of the divergence, what cutting the reference changed is a gap.
SEAM = 0.1
# Outside this range of Σ leave-one-in², contributions do not add.
ADDITIVE = (0.5, 2.0)


class Analysis:
    """One backend's divergence from the reference.

    Attributes:
        effects: by segment id, the mean relative L2 that its error alone causes in the outputs.
    """

    def __init__(
        self,
        tracer: Tracer,
        reference: Reference,
        rename: Mapping[str, str],
        noises: Sequence[Noise],
    ) -> None:
        """Prepare for samples.

        Args:
            tracer: the backend's tracer, which knows what was built and probed.
            reference: the reference model.
            rename: compiled model's tensor names → the reference's.
            noises: the catalogue of hypotheses.
        """
        self.tracer = tracer
        self.reference = reference
        self.rename = rename
        self.noises = {noise.id: noise for noise in noises}
        self.effects: dict[str, float] = {}
        self._cuts: tuple[Cut, ...] = ()
        self._probes: dict[str, Probe] = {}
        self._skipped: list[Skipped] = []
        self._meters: dict[str, Meter] = {}
        self._outputs: dict[str, Moments] = {}
        self._top1: dict[str, list[float]] = {}
        self._equal = True
        self._run_to_run = 0.0
        self._rebuild = 0.0
        self._effects: dict[str, list[float]] = {}
        self._loi: dict[str, list[float]] = {}
        self._booked: list[tuple[str, tuple[Cut, ...], float]] = []
        self._books = Books({}, 0.0, 0.0)
        self._control: float | None = None
        self._explained: dict[str, attribution.Explanation] = {}
        self._tensors: dict[str, TensorStats] = {}
        self._concentrated: dict[str, Concentration | None] = {}
        self._all_kernels: tuple[Kernel, ...] | None = None
        self._warnings: list[str] = []
        self._gaps: dict[Gap, None] = {}  # in order, each once

    # --- measuring ---------------------------------------------------------------------------

    def add(self, index: int, feeds: Arrays, expected: Arrays, trace: SampleTrace) -> None:
        """Measure one sample.

        Args:
            index: the sample's number, from 0.
            feeds: the stimulus by the reference's input names.
            expected: the reference's final outputs.
            trace: what the backend did.
        """
        captured = feeds | self._renamed(trace.tensors)
        self._equal &= trace.bitwise_equal
        self._run_to_run = max(self._run_to_run, trace.run_to_run)
        self._rebuild = max(self._rebuild, trace.difference)
        for name, value in expected.items():
            if name not in captured:
                self._gap("run", f"output `{name}` is missing from the compiled program")
            else:
                self._outputs.setdefault(name, Moments()).add(captured[name], value)
                if (agreement := _top1(captured[name], value)) is not None:
                    self._top1.setdefault(name, []).append(agreement)
        if index == 0:
            base = self._cut(feeds, captured)
            self._check_seams(base, expected, captured)
        else:
            base = self.reference.replayer.walk(self._cuts, feeds)
        outputs = tuple(n for n in expected if self.reference.computes(n))
        chain = Chain(self.reference.replayer, self._cuts, feeds, base, captured, outputs)
        flagged: dict[str, Local] = {}
        for cut in self._cuts:
            meter = self._meters.setdefault(cut.id, Meter(cut))
            local = None
            try:
                local = divergence.replay(self.reference.replayer, cut, captured)
            except ReplayError as error:
                meter.unmeasured = meter.unmeasured or error.message
            meter.add(local, captured, base)
            if local is not None:
                if index == 0:
                    self._set_floor(meter, local, base, trace.again)
                if meter.flagged:  # only these are needed again
                    flagged[cut.id] = local
        if index < IMPACT_SAMPLES:
            self._add_impact(chain, flagged)
        if index == 0:
            self._explain(chain, flagged)

    def _check_seams(self, base: Arrays, expected: Arrays, captured: Arrays) -> None:
        """Say what running the reference in pieces changed: that belongs to no segment.

        It happens with float16 models, whose tensors ONNX Runtime keeps in float32 between
        operators but not between segments.
        """
        names = tuple(n for n in expected if n in base)
        if metrics.bitwise_equal({n: base[n] for n in names}, {n: expected[n] for n in names}):
            return
        seam = metrics.relative_l2(base, expected, names)
        self._warnings.append(
            f"The reference cut at this backend's tensors differs from the whole reference by "
            f"{seam:.1e}; introduced errors near that are less certain."
        )
        whole = metrics.relative_l2(captured, expected, tuple(n for n in names if n in captured))
        if seam > SEAM * whole:
            self._gap(
                "compare",
                f"{seam:.1e} of relative L2 is in no segment: between layers the model's narrow "
                "types round or overflow, and the whole reference does not",
            )

    def _renamed(self, tensors: Arrays) -> Arrays:
        return {self.rename[n]: v for n, v in tensors.items() if n in self.rename}

    def _cut(self, feeds: Arrays, captured: Arrays) -> Arrays:
        """Choose the segments; returns the reference's tensors on the first sample."""
        graph, replayer = self.reference.graph, self.reference.replayer
        self._probes = {
            self.rename[p.tensor]: p for p in self.tracer.probes if p.tensor in self.rename
        }
        self._skipped = list(self.tracer.skipped)
        self._skipped += [
            Skipped(p.tensor, "has no counterpart in the reference model")
            for p in self.tracer.probes
            if p.tensor not in self.rename
        ]
        known = {*self._probes, *graph.outputs} & captured.keys()
        self._cuts = graph.cut(known)
        base = replayer.walk(self._cuts, feeds)
        doubtful = self._unconfirmed(captured, base)
        if doubtful:
            for name in doubtful:
                probe = self._probes.pop(name)
                self._skipped.append(
                    Skipped(probe.tensor, "its derived name was not confirmed by its values")
                )
            self._cuts = graph.cut(known - doubtful)
            base = replayer.walk(self._cuts, feeds)
        return base

    def _unconfirmed(self, captured: Arrays, base: Arrays) -> set[str]:
        """Probes under a derived name whose values are neither the reference's nor a replay's."""
        doubtful = set[str]()
        for cut in self._cuts:
            names = [n for n in cut.outputs if n in self._probes and self._probes[n].inferred]
            wrong = {n for n in names if _cosine(captured[n], base[n]) < CONFIRMED}
            if wrong:
                try:
                    replayed = self.reference.replayer.run(cut, captured)
                    wrong = {n for n in wrong if _cosine(captured[n], replayed[n]) < CONFIRMED}
                except ReplayError:
                    pass
            doubtful |= wrong
        return doubtful

    def _set_floor(self, meter: Meter, local: Local, base: Arrays, again: Arrays | None) -> None:
        meter.floor = fp32_rounding.floor(0.0)
        if meter.flagged or again is not None:
            renamed = self._renamed(again) if again is not None else None
            meter.floor = divergence.floor(self.reference.replayer, meter.cut, local, base, renamed)

    def _add_impact(self, chain: Chain, flagged: Mapping[str, Local]) -> None:
        whole = metrics.relative_l2(chain.captured, chain.base, chain.outputs)
        cuts = [cut for cut in self._cuts if cut.id in flagged]
        for cut in sorted(cuts, key=self._introduced, reverse=True)[:IMPACT_SEGMENTS]:
            self.tracer.progress.update("reference", f"impact of {cut.id} on {self.tracer.id}")
            effect = impact.leave_one_in(chain, cut, flagged[cut.id])
            self._effects.setdefault(cut.id, []).append(effect)
            if 0 < whole < math.inf:
                self._loi.setdefault(cut.id, []).append(effect / whole)
        self.effects = {s: sum(e) / len(e) for s, e in self._effects.items()}

    def _explain(self, chain: Chain, flagged: Mapping[str, Local]) -> None:
        """Causes, book-keeping and what the drill-down shows, all on the first sample."""
        self.tracer.progress.update("reference", f"causes on {self.tracer.id}")
        top = set(sorted(self.effects, key=self.effects.__getitem__, reverse=True)[:TOP])
        parts: dict[str, dict[str, Arrays]] = {}
        prior: attribution.Prior = {}
        for cut in self._cuts:
            if cut.id not in flagged:
                continue
            local = flagged[cut.id]
            explanation = attribution.explain(
                SegmentGraph(chain.replayer.model(cut), self._kernels(cut)),
                local.inputs,
                local.observed,
                local.replayed,
                tuple(self.noises.values()),
                threads=chain.replayer.threads,
                prior=prior,
                thorough=cut.id in top,
            )
            self._explained[cut.id] = explanation
            for failure in explanation.failures:
                self._gap("explain", failure)
            if explanation.noise is not None:
                part = difference(explanation.outputs, local.replayed)
                parts.setdefault(explanation.noise, {})[cut.id] = part
        if metrics.relative_l2(chain.captured, chain.base, chain.outputs) > 0:
            self._books = impact.by_category(chain, flagged, parts)
        elif any(m.error > 0 for m in self._outputs.values()):
            self._books = Books({}, 1.0, 0.0)  # all of it lies between the segments
        alone = {c.id for c in self._cuts if c.id in flagged or self._meters[c.id].unmeasured}
        groups = _groups(self._cuts, alone)
        shares = impact.telescope(chain, groups)
        self._booked = [
            (group[-1].id if len(group) == 1 else f"{group[0].id}–{group[-1].id}", group, share)
            for group, share in zip(groups, shares, strict=True)
        ]
        if flagged:
            self._control = impact.input_control(chain, chain.base)
        same = Moments().distance()
        for name, value in chain.feeds.items():
            self._tensors[name] = _stats(name, value, value, same)
        for meter in self._meters.values():
            for name, moments in meter.accumulated.items():
                self._tensors[name] = _stats(
                    name, chain.captured[name], chain.base[name], moments.distance()
                )
        finals = set(chain.outputs)
        for cut in self._cuts:
            if cut.id in top or finals & set(cut.outputs):
                name = cut.outputs[0]
                self._concentrated[cut.id] = metrics.concentration(
                    chain.captured[name], chain.base[name]
                )

    def _introduced(self, cut: Cut) -> float:
        meter = self._meters[cut.id]
        return meter.relative(meter.introduced)

    def _kernels(self, cut: Cut) -> tuple[Kernel, ...]:
        """What the engine says it ran for a segment, in execution order, by reference names."""
        if self._all_kernels is None:
            kernels = self.tracer.provenance.kernels if self.tracer.provenance else ()
            self._all_kernels = tuple(
                replace(
                    kernel,
                    nodes=tuple(self.rename[n] for n in kernel.nodes if n in self.rename),
                    outputs=tuple(self.rename[n] for n in kernel.outputs if n in self.rename),
                )
                for kernel in kernels
            )
        keys = {model.key(self.reference.graph.nodes[i]) for i in cut.nodes}
        return tuple(k for k in self._all_kernels if keys & set(k.nodes))

    # --- reporting ---------------------------------------------------------------------------

    def report(self, device: str) -> BackendReport:
        """The backend's part of the report."""
        tracer = self.tracer
        provenance = tracer.provenance
        if provenance is not None and self._all_kernels is not None:
            provenance = replace(provenance, kernels=self._all_kernels)
        blank = BackendReport(
            id=tracer.id,
            device=provenance.device if provenance else device,
            status="built" if tracer.built_only else "gap",
            gap=tracer.gap,
            provenance=provenance,
            seconds=dict(tracer.seconds),
        )
        if tracer.gap is not None:
            return blank
        segments = tuple(self._segment(cut) for cut in self._cuts)
        return replace(
            blank,
            status="audited",
            fidelity=self._proof(),
            outputs=tuple(
                OutputDistance(
                    name,
                    moments.distance(),
                    sum(self._top1[name]) / len(self._top1[name]) if name in self._top1 else None,
                )
                for name, moments in self._outputs.items()
            ),
            categories=self._categories(),
            unexplained_share=self._books.unexplained,
            segments=segments,
            booked=tuple((label, share) for label, _, share in self._booked),
            additivity=self._additivity(),
            input_control=self._control,
            warnings=tuple(self._sentences(segments)),
        )

    def _categories(self) -> tuple[CategoryShare, ...]:
        shares = dict(self._books.named)
        rounding = fp32_rounding.NOISE.id
        shares[rounding] = shares.get(rounding, 0.0) + self._books.rounding
        return tuple(
            CategoryShare(noise, self.noises[noise].stage, share)
            for noise, share in sorted(shares.items(), key=lambda item: -item[1])
            if share != 0 and math.isfinite(share)
        )

    def gaps(self) -> list[Gap]:
        """What of this backend was not audited."""
        own = [self.tracer.gap] if self.tracer.gap else []
        unmeasured = [
            Gap(self.tracer.id, "compare", meter.unmeasured)
            for meter in self._meters.values()
            if meter.unmeasured
        ]
        return own + unmeasured + list(self._gaps)

    def _gap(self, stage: str, reason: str) -> None:
        self._gaps.setdefault(Gap(self.tracer.id, stage, reason))

    def _proof(self) -> FidelityProof:
        proved = self._equal and self.tracer.program_unchanged
        kinds = [p.fidelity for p in self._probes.values()] if proved else []
        finals = [n for n in self.reference.graph.outputs if n not in self._probes]
        finals = [n for n in finals if self.reference.computes(n)]
        return FidelityProof(
            outputs_bitwise_equal=self._equal,
            program_unchanged=self.tracer.program_unchanged,
            candidates=len(self._probes) + len(finals) + len(self._skipped),
            # A final output is what the plain program itself returns: nothing was added to see it.
            output_proved=kinds.count("output-proved") + len(finals),
            cone_proved=kinds.count("cone-proved"),
            perturbing=kinds.count("perturbing") if proved else len(self._probes),
            run_to_run=self._run_to_run,
            rebuild=self._rebuild if self.tracer.rebuilt else None,
            skipped=tuple(self._skipped),
        )

    def _segment(self, cut: Cut) -> Segment:
        meter = self._meters[cut.id]
        nodes = [self.reference.graph.nodes[i] for i in cut.nodes]
        kernels = self._kernels(cut)
        found = self._explained.get(cut.id)
        introduced = meter.relative(meter.introduced)
        loi = self._loi.get(cut.id)
        booked = [share for _, group, share in self._booked if group == (cut,)]
        rounding = meter.unmeasured is None and found is None
        return Segment(
            id=cut.id,
            nodes=tuple(self.reference.labels[model.key(n)] for n in nodes),
            node_keys=tuple(model.key(n) for n in nodes),
            op_types=tuple(n.op_type for n in nodes),
            inputs=cut.inputs,
            outputs=cut.outputs,
            kernel=" + ".join(dict.fromkeys(_describe(k) for k in kernels)),
            precision="/".join(dict.fromkeys(k.precision for k in kernels if k.precision)),
            fidelity=self._fidelity(cut),
            accumulated=meter.relative(meter.accumulated),
            introduced=introduced,
            inherited=meter.relative(meter.inherited),
            amplification=meter.amplification,
            leave_one_in=sum(loi) / len(loi) if loi else None,
            impact_share=booked[0] if booked and math.isfinite(booked[0]) else None,
            floor=meter.floor,
            noise=found.noise if found else fp32_rounding.NOISE.id if rounding else None,
            explained=found.explained if found else None,
            bit_identical=(found.bit_identical if found else meter.identical / meter.samples),
            residual=found.residual * introduced if found else introduced,
            hypotheses=found.hypotheses if found else (),
            tensors=(
                *(replace(self._tensors[n], role="input") for n in cut.inputs),
                *(
                    replace(self._tensors[n], distance=meter.accumulated[n].distance())
                    for n in cut.outputs
                ),
            ),
            concentration=self._concentrated.get(cut.id),
            unmeasured=meter.unmeasured,
        )

    def _fidelity(self, cut: Cut) -> Fidelity:
        if not (self._equal and self.tracer.program_unchanged):
            return "perturbing"
        kinds = {self._probes[n].fidelity for n in (*cut.inputs, *cut.outputs) if n in self._probes}
        return next(
            (k for k in ("perturbing", "cone-proved", "output-proved") if k in kinds),
            "output-proved",
        )

    def _additivity(self) -> float | None:
        """Σ leave-one-in², where flagged segments make up the divergence and all were measured."""
        flagged = [m for m in self._meters.values() if m.flagged]
        if not flagged or any(m.cut.id not in self._loi for m in flagged):
            return None
        if not abs(self._books.rounding) < 0.1:
            return None
        means = [sum(values) / len(values) for values in self._loi.values()]
        total = sum(v * v for v in means)
        return total if math.isfinite(total) else None

    def _sentences(self, segments: Sequence[Segment]) -> list[str]:
        """What the reader must not miss."""
        said = list(self._warnings)
        if not self._equal:
            said.append(
                "The instrumented run's outputs differ from the plain run's: captures may not "
                "show the program that ships."
            )
        elif not self.tracer.program_unchanged:
            said.append("Observing this program could not be proved to leave it unchanged.")
        if self._run_to_run > 0:
            said.append(
                f"The program does not repeat its own bits (relative L2 {self._run_to_run:.1e} "
                "between runs)."
            )
        total = self._additivity()
        if total is not None and not ADDITIVE[0] <= total <= ADDITIVE[1]:
            said.append(
                f"Contributions do not add here (sum of squared impacts {total:.2f}, 1 where "
                "errors are independent): repairing several segments helps "
                f"{'less' if total > 1 else 'more'} than their impacts suggest."
            )
        unranked = [m for m in self._meters.values() if m.flagged and m.cut.id not in self._effects]
        if unranked:
            said.append(
                f"Impact was measured for the {len(self._effects)} segments with the largest "
                f"introduced error; {len(unranked)} smaller ones are listed without it."
            )
        finals = set(self.reference.graph.outputs)
        for segment in segments:
            place = segment.concentration
            if place is not None and finals & set(segment.outputs):
                said.append(
                    f"{place.share:.0%} of the error of output `{segment.outputs[0]}` sits at "
                    f"index {place.index} of axis {place.axis} (size {place.axis_size})."
                )
        if self._control is not None and self._control > 10:
            said.append(
                f"The model itself amplifies relative noise on its input {self._control:.0f} "
                "times: small differences anywhere become large ones at the output."
            )
        return said


def _groups(cuts: Sequence[Cut], alone: Set[str]) -> list[tuple[Cut, ...]]:
    """Consecutive segments, those in ``alone`` by themselves and the stretches between joined."""
    groups: list[tuple[Cut, ...]] = []
    stretch: list[Cut] = []
    for cut in cuts:
        if cut.id not in alone:
            stretch.append(cut)
            continue
        if stretch:
            groups.append(tuple(stretch))
            stretch = []
        groups.append((cut,))
    if stretch:
        groups.append(tuple(stretch))
    return groups


def _describe(kernel: Kernel) -> str:
    return " ".join(part for part in (kernel.type, kernel.primitive) if part)


def _cosine(a: Array, b: Array) -> float:
    return metrics.distance(a, b).cosine


def _stats(name: str, observed: Array, reference: Array, distance: Distance) -> TensorStats:
    return TensorStats(
        name=name,
        dtype=str(reference.dtype),
        shape=tuple(reference.shape),
        role="output",
        reference_range=metrics.value_range(reference),
        backend_range=metrics.value_range(observed),
        distance=distance,
        histogram=metrics.histogram(observed, reference),
        histogram_edges=metrics.HISTOGRAM_EDGES,
    )


def _top1(observed: Array, reference: Array) -> float | None:
    """Fraction of rows with the same arg max, where the tensor looks like scores.

    Scores are floating point, of rank 2 and have at least three classes.
    """
    if reference.ndim != 2 or reference.shape[1] < 3 or reference.dtype.kind != "f":
        return None
    if observed.shape != reference.shape:
        return None
    return float(np.mean(observed.argmax(axis=1) == reference.argmax(axis=1)))
