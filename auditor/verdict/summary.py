"""One backend's part of the report, from what was measured on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from auditor.capture.trace import denied
from auditor.decomposition.floor import draws
from auditor.graphs import model
from auditor.noises import fp32_rounding
from auditor.records.backend import Kernel
from auditor.records.measured import CategoryShare, Consequence, EndToEnd, FidelityProof, Segment
from auditor.records.report import BackendReport
from auditor.records.terms import Fidelity, severity

if TYPE_CHECKING:
    from auditor.analysis import Analysis
    from auditor.comparison.metrics import Running
    from auditor.graphs.segments import Cut

# Outside this range of Σ leave-one-in², contributions do not add.
ADDITIVE = (0.5, 2.0)
# What makes an error so many times as large is said to make it grow; the worst few are named.
_GROWS = 10.0
_GROWN = 3


def report(measured: Analysis, device: str) -> BackendReport:
    """The backend's part of the report.

    Args:
        measured: what was measured on all samples.
        device: the device asked for, said where the engine did not come to name its own.
    """
    tracer, ledger = measured.tracer, measured.ledger
    provenance = tracer.stated()
    if provenance is not None and measured.cuts:
        provenance = replace(provenance, kernels=measured.alignment.all_kernels())
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
    blank = replace(blank, gap=tracer.unobserved or denied(tracer.id, provenance))
    booked = {
        group[0].id: share
        for group, share in zip(ledger.groups, ledger.shares, strict=True)
        if len(group) == 1 and share.count
    }
    segments = tuple(_segment(measured, cut, booked.get(cut.id)) for cut in measured.cuts)
    return replace(
        blank,
        status="audited",
        fidelity=None if tracer.unobserved else _proof(measured),
        outputs=tuple(meter.report() for meter in measured.outputs.values()),
        categories=_categories(measured),
        unexplained_share=_unexplained(measured),
        unexplained_spread=ledger.unexplained.spread(),
        segments=segments,
        booked=tuple(
            (group[-1].id if len(group) == 1 else f"{group[0].id}–{group[-1].id}", running.mean)
            for group, running in zip(ledger.groups, ledger.shares, strict=True)
            if running.count
        ),
        booked_samples=max((running.count for running in ledger.shares), default=0),
        additivity=_additivity(measured),
        input_control=measured.control,
        warnings=tuple(_sentences(measured, segments)),
        end_to_end=_end_to_end(measured),
    )


def _end_to_end(measured: Analysis) -> EndToEnd | None:
    if not measured.system_outputs:
        return None
    pool = measured.system
    sums = pool.named | ({fp32_rounding.NOISE.id: pool.rounding} if pool.samples else {})
    shares = (
        CategoryShare(noise, measured.noises[noise].stage, pool.share(part))
        for noise, part in sums.items()
    )
    return EndToEnd(
        outputs=tuple(meter.report() for meter in measured.system_outputs.values()),
        shares=tuple(sorted((s for s in shares if s.share != 0), key=lambda s: -s.share)),
        unexplained_share=pool.share(pool.unexplained),
        samples=pool.samples,
    )


def _categories(measured: Analysis) -> tuple[CategoryShare, ...]:
    """Each cause's share; what is left when every flagged segment is repaired is rounding."""
    shares = dict(measured.ledger.named)
    rounding = measured.ledger.rounding
    if rounding.count:
        shares[fp32_rounding.NOISE.id] = rounding
    return tuple(
        CategoryShare(noise, measured.noises[noise].stage, running.mean, running.spread())
        for noise, running in sorted(shares.items(), key=lambda item: -item[1].mean)
        if running.mean != 0
    )


def _unexplained(measured: Analysis) -> float:
    """The share that no cause reproduced; NaN where the books could not be kept on any sample."""
    if measured.ledger.unexplained.count:
        return measured.ledger.unexplained.mean
    apart = any(meter.diverges for meter in measured.outputs.values())
    return math.nan if apart else 0.0


def _proof(measured: Analysis) -> FidelityProof:
    tracer, graph = measured.tracer, measured.reference.graph
    proved = measured.equal and tracer.program_unchanged
    kinds = [p.fidelity for p in measured.alignment.probes.values()] if proved else []
    finals = [n for n in graph.outputs if n not in measured.alignment.probes]
    finals = [n for n in finals if measured.reference.computes(n)]
    return FidelityProof(
        outputs_bitwise_equal=measured.equal and tracer.unproved is None,
        program_unchanged=tracer.program_unchanged,
        candidates=len(measured.alignment.probes) + len(finals) + len(measured.alignment.skipped),
        # A final output is what the plain program itself returns: nothing was added to see it.
        output_proved=kinds.count("output-proved") + len(finals),
        cone_proved=kinds.count("cone-proved"),
        perturbing=kinds.count("perturbing") if proved else len(measured.alignment.probes),
        run_to_run=measured.run_to_run,
        rebuild=measured.rebuild if tracer.rebuilt else None,
        skipped=tuple(measured.alignment.skipped),
        cached=tracer.recalled,
    )


def _segment(measured: Analysis, cut: Cut, booked: Running | None) -> Segment:
    meter = measured.meters[cut.id]
    nodes = [measured.reference.graph.nodes[i] for i in cut.nodes]
    kernels = measured.alignment.kernels(cut)
    found = measured.verdict(cut.id)
    introduced = meter.relative(meter.introduced)
    varied = measured.leave_one_in.shares.get(cut.id)
    rounding = meter.unmeasured is None and found is None and meter.narrow is None
    return Segment(
        id=cut.id,
        nodes=tuple(measured.reference.labels[model.key(n)] for n in nodes),
        node_keys=tuple(model.key(n) for n in nodes),
        op_types=tuple(n.op_type for n in nodes),
        inputs=cut.inputs,
        outputs=cut.outputs,
        kernel=" + ".join(dict.fromkeys(_describe(k) for k in kernels)),
        precision="/".join(dict.fromkeys(k.precision for k in kernels if k.precision)),
        fidelity=_fidelity(measured, cut),
        accumulated=meter.relative(meter.accumulated),
        introduced=introduced,
        inherited=meter.relative(meter.inherited),
        amplification=meter.amplification,
        leave_one_in=measured.leave_one_in.impact(cut.id),
        leave_one_in_spread=varied.spread() if varied else None,
        impact_share=booked.mean if booked else None,
        impact_share_spread=booked.spread() if booked else None,
        floor=meter.floor,
        noise=found.noise if found else fp32_rounding.NOISE.id if rounding else None,
        explained=found.explained if found else None,
        explained_spread=found.spread if found else None,
        explained_on=found.sample if found else None,
        contradicted=found.contradicted if found else 0,
        constants=measured.constants.get(cut.id, ()),
        bit_identical=(
            found.bit_identical
            if found is not None and found.noise is not None
            else meter.identical / meter.samples
        ),
        residual=found.residual * introduced if found else introduced,
        hypotheses=found.hypotheses if found else (),
        tensors=(
            *(replace(measured.tensors[n], role="input") for n in cut.inputs),
            *(
                replace(measured.tensors[n], distance=meter.accumulated[n].distance())
                for n in cut.outputs
            ),
        ),
        concentration=measured.concentrated.get(cut.id),
        unmeasured=meter.unmeasured,
        one_step=meter.steps.fraction,
        consequences=_consequences(measured, cut),
        picture=measured.pictures.get(cut.id),
    )


def _consequences(measured: Analysis, cut: Cut) -> tuple[Consequence, ...]:
    made = (meter.result() for meter in measured.leave_one_in.tasks.get(cut.id, {}).values())
    return tuple(one for one in made if one is not None)


def _fidelity(measured: Analysis, cut: Cut) -> Fidelity:
    if not (measured.equal and measured.tracer.program_unchanged):
        return "perturbing"
    probes = measured.alignment.probes
    kinds = {probes[n].fidelity for n in (*cut.inputs, *cut.outputs) if n in probes}
    return next(
        (k for k in ("perturbing", "cone-proved", "output-proved") if k in kinds),
        "output-proved",
    )


def _describe(kernel: Kernel) -> str:
    return " ".join(part for part in (kernel.type, kernel.primitive) if part)


def _additivity(measured: Analysis) -> float | None:
    """Σ leave-one-in², where flagged segments make up the divergence and all were measured."""
    flagged = [m for m in measured.meters.values() if m.flagged]
    if not flagged or any(m.cut.id not in measured.leave_one_in.shares for m in flagged):
        return None
    if not (measured.ledger.rounding.count and abs(measured.ledger.rounding.mean) < 0.1):
        return None
    total = sum(running.mean**2 for running in measured.leave_one_in.shares.values())
    return total if math.isfinite(total) else None


def _sentences(measured: Analysis, segments: Sequence[Segment]) -> list[str]:
    """What the reader must not miss."""
    another = measured.another_file()
    return [
        *((another,) if another else ()),
        *measured.warnings,
        *_on_the_program(measured),
        *_on_the_ranking(measured),
        *_on_the_error(measured, segments),
    ]


def _on_the_program(measured: Analysis) -> Iterator[str]:
    """Whether what was captured is what ships, and repeats itself."""
    if measured.tracer.unproved is not None:
        yield measured.tracer.unproved
    elif not measured.equal:
        yield (
            "The instrumented run's outputs differ from the plain run's: captures may not "
            "show the program that ships."
        )
    elif not measured.tracer.program_unchanged:
        yield "Observing this program could not be proved to leave it unchanged."
    if measured.run_to_run > 0:
        yield (
            f"The program does not repeat its own bits (relative L2 {measured.run_to_run:.1e} "
            "between runs)."
        )
    graph = measured.reference.graph
    drawing = [
        measured.reference.labels[model.key(n)]
        for n in graph.nodes
        if n.op_type != "Dropout" and draws([n])
    ]
    if drawing:
        more = f" and {len(drawing) - 1} more" if len(drawing) > 1 else ""
        yield (
            f"The model draws random numbers (`{drawing[0]}`{more}): what depends on them differs "
            "in every run. Export it with these numbers as inputs to audit what is behind."
        )


def _on_the_ranking(measured: Analysis) -> Iterator[str]:
    """What impacts do not tell."""
    total = _additivity(measured)
    if total is not None and not ADDITIVE[0] <= total <= ADDITIVE[1]:
        yield (
            f"Contributions do not add here (sum of squared impacts {total:.2f}, 1 where "
            "errors are independent): repairing several segments helps "
            f"{'less' if total > 1 else 'more'} than their impacts suggest."
        )
    blind = [
        m
        for m in measured.meters.values()
        if m.relative(m.introduced) == 0 and math.isinf(m.relative(m.accumulated))
    ]
    if blind:
        one = len(blind) == 1
        entering = [[e.mismatch or "" for e in m.entering.values()] for m in blind]
        reshaped = [any(why.startswith("shape") for why in whys) for whys in entering]
        handed = ["NaN or infinity where the reference has numbers"] * (not all(reshaped))
        handed += ["a tensor of another shape than the reference's"] * any(reshaped)
        yield (
            f"{'1 segment' if one else f'{len(blind)} segments'}, from {blind[0].cut.id} on, "
            f"{'was' if one else 'were'} handed {', or '.join(handed)}, "
            "and passed it on: what else is wrong there does not show."
        )
    effects = measured.leave_one_in.effects
    unranked = [m for m in measured.meters.values() if m.flagged and m.cut.id not in effects]
    if unranked:
        yield (
            f"Impact was measured for the {len(effects)} segments with the largest "
            f"introduced error; {len(unranked)} smaller ones are listed without it."
        )


def _on_the_error(measured: Analysis, segments: Sequence[Segment]) -> Iterator[str]:
    """Where it sits, and whether the model amplifies any."""
    off = {name: meter.report().distance.relative_l2 for name, meter in measured.outputs.items()}
    seen = {name for name, error in off.items() if severity(error) != "info"}
    for segment in segments:
        place = segment.concentration
        if place is not None and seen & set(segment.outputs):
            yield (
                f"{place.share:.0%} of the error of output `{segment.outputs[0]}` sits at "
                f"index {place.index} of axis {place.axis} (size {place.axis_size})."
            )
    if seen and not any(m.flagged for m in measured.meters.values()):
        yield from _grown(segments)
    if measured.control is not None and measured.control > 10:
        yield (
            f"The model itself amplifies relative noise on its input {measured.control:.0f} "
            "times: small differences anywhere become large ones at the output."
        )


def _grown(segments: Sequence[Segment]) -> Iterator[str]:
    """Where rounding becomes a difference that shows, though no segment is above its floor."""
    # What a segment itself rounds, to half precision say, is no error that it makes larger.
    passed = [(s.amplification or 0.0, s.id) for s in segments if s.inherited > s.introduced]
    grown = {id: factor for factor, id in sorted(passed)[-_GROWN:] if factor >= _GROWS}
    if grown:
        told = [
            f"{grown[s.id]:,.0f}-fold in {s.id} ({', '.join(dict.fromkeys(s.op_types))})"
            for s in segments
            if s.id in grown
        ]
        yield (
            "No segment is above its floor. The difference is rounding that the model makes "
            f"larger: {', '.join(told)}."
        )
