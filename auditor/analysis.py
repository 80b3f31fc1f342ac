"""Everything measured on one backend, collected sample by sample.

What is kept does not grow with the number of samples. What rests on how many of them is said
beside each number in the report: distances on all; impact and book-keeping on the first few;
causes on the sample on which a segment is first above its floor, and tested again on later ones;
value ranges and histograms on the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from auditor.attribution import evidence, witness
from auditor.attribution.causes import Attribution, Causes
from auditor.capture.alignment import Alignment
from auditor.capture.recording import Source
from auditor.capture.trace import SampleTrace, denied
from auditor.comparison import metrics, pictures
from auditor.comparison.metrics import Moments
from auditor.comparison.outputs import OutputMeter
from auditor.comparison.tasks import TaskMeter
from auditor.decomposition import floor as floors
from auditor.decomposition import impact, leave_one_in
from auditor.decomposition.divergence import Local
from auditor.decomposition.flagging import Flagging
from auditor.decomposition.impact import Books, Chain, Ledger, Parts, Pool
from auditor.errors import UsageError
from auditor.graphs import model, surgery
from auditor.graphs.segments import Cut
from auditor.noises import bf16, fp16
from auditor.options import AuditOptions
from auditor.ports import Array, Arrays, CompiledConstant, Noise, SegmentGraph
from auditor.records.backend import Gap
from auditor.records.measured import Concentration, Picture, TensorStats
from auditor.replays.reference import Reference
from auditor.replays.replay import Block, ReplayError, difference
from auditor.replays.writer import FP16

if TYPE_CHECKING:
    from auditor.pipeline.upstream import Upstream

# Telescoping costs half a reference run per group of segments: it is done on the first sample and
# on as many of the next as keep within this many groups in all.
BOOKED_GROUPS = 60
# With more groups than this, only the segments that matter most are booked by themselves: booking
# thousands would take thousands of half runs.
MOST_GROUPS = 150
ALONE = 20
# The segments whose cause is also tested against rival causes and on every later sample, and
# where the error's place inside the tensor is reported.
TOP = 10
# What rounding to a model's own narrow type is called.
_NARROW = (fp16.NOISE.id, bf16.NOISE.id)
# Above this part of the divergence, what cutting the reference changed is a gap.
SEAM = 0.1


class Analysis:
    """One backend's divergence from the reference.

    Attributes:
        tracer: the backend's tracer, which knows what was built and probed.
        reference: the reference model.
        noises: the catalogue of hypotheses by id.
        alignment: the backend's tensors and kernels by the reference's names.
        meters: the segments' running sums, once the first sample was added.
        outputs: the final outputs' divergence by name.
        equal: whether every instrumented run had the plain run's very outputs.
        run_to_run, rebuild: largest relative L2 between plain runs, and between two builds.
        leave_one_in: what each segment's error alone does to the outputs.
        causes: of the segments that were above their floor on some sample.
        roundings: of the segments in which the model's own narrow type may do what float32 cannot.
        constants: what there is to say of those segments' constants in the compiled file.
        ledger: where the whole divergence came from.
        system, system_outputs: the same of the whole system, with the pipeline around the
            network, where there is one.
        control: how much the reference itself amplifies noise on its input.
        tensors, concentrated: what the drill-down shows, of the first sample.
        pictures: by segment, of the first sample on which it is above its floor.
        warnings: sentences the reader must not miss.
    """

    def __init__(
        self,
        tracer: Source,
        reference: Reference,
        rename: Mapping[str, str],
        noises: Sequence[Noise],
        options: AuditOptions,
        samples: int = 1,
    ) -> None:
        """Prepare for samples.

        Args:
            tracer: the backend's tracer.
            reference: the reference model.
            rename: compiled model's tensor names → the reference's.
            noises: the catalogue of hypotheses.
            options: what the user asked for.
            samples: how many samples will be added.
        """
        self.tracer = tracer
        self.reference = reference
        self.alignment = Alignment(tracer, reference, rename)
        self.noises = {noise.id: noise for noise in noises}
        self._flagging = Flagging(reference)
        self.meters = self._flagging.meters
        self.outputs: dict[str, OutputMeter] = {}
        self.equal = True
        self._random = False
        self.run_to_run = 0.0
        self.rebuild = 0.0
        self.leave_one_in = leave_one_in.LeaveOneIn(
            lambda id: tracer.progress.update("reference", f"impact of {id} on {tracer.id}")
        )
        replayer = reference.replayer
        self.causes = Causes(noises, replayer.threads, later=samples > 1, beside=replayer.beside)
        own = [noise for noise in noises if noise.id in _NARROW]
        self.roundings = Causes(own, replayer.threads, later=samples > 1)
        self.constants: dict[str, tuple[str, ...]] = {}
        self.ledger = Ledger(())
        self.system = Pool()
        self.system_outputs: dict[str, OutputMeter] = {}
        self.control: float | None = None
        self.tensors: dict[str, TensorStats] = {}
        self.concentrated: dict[str, Concentration | None] = {}
        self.pictures: dict[str, Picture] = {}
        self.warnings: list[str] = []
        self._options = options
        self._compiled: Mapping[str, CompiledConstant] = {}
        self._grids: Mapping[str, Array] = {}
        self._trained: Mapping[str, CompiledConstant] = {}
        self._blocks: Mapping[str, Block] | None = None
        self._gaps: dict[Gap, None] = {}  # in order, each once

    def hold(
        self,
        compiled: Mapping[str, CompiledConstant],
        grids: Mapping[str, Array] | None = None,
        *,
        other_file: bool = False,
    ) -> None:
        """Say what the engine's own file has otherwise; before the first sample.

        Args:
            compiled: constants.
            grids: of a model quantised for the build, what activations are rounded to.
            other_file: whether its tensors may have other shapes under the same names.
        """
        self._compiled, self._grids = compiled, grids or {}
        self.alignment.other_file |= other_file
        self.alignment.constants = {n: c.values for n, c in compiled.items()}

    def hold_trained(self, trained: Mapping[str, CompiledConstant]) -> None:
        """Say which constants the module has otherwise; before the first sample."""
        self._trained = trained

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The segments, once the first sample was added."""
        return self.alignment.cuts

    # --- one sample ----------------------------------------------------------------------------

    def add(
        self,
        index: int,
        feeds: Arrays,
        expected: Arrays,
        trace: SampleTrace,
        upstream: Upstream | None = None,
    ) -> None:
        """Measure one sample.

        Args:
            index: the sample's number, from 0.
            feeds: the stimulus by the reference's input names, in the reference's types.
            expected: the reference's final outputs.
            trace: what the backend did.
            upstream: the sample in the pipeline around the network, where there is one.
        """
        captured = feeds | self.alignment.tensors(trace.tensors)
        self.equal &= trace.bitwise_equal
        self.run_to_run = max(self.run_to_run, trace.run_to_run)
        self.rebuild = max(self.rebuild, trace.difference)
        shipped = captured | self.alignment.tensors(trace.outputs)
        diverges = self._add_outputs(index, expected, shipped)
        if upstream is not None:
            self._add_system(index, upstream, [n for n in expected if n in shipped], shipped)
        try:
            if index == 0:
                base = self.alignment.cut(feeds, captured)
                self._check_seams(base, expected, captured)
            else:
                base = self.reference.replayer.walk(self.cuts, feeds)
        except ReplayError as error:
            self._gap("compare", f"sample {index} is compared at the outputs only: {error.message}")
            return
        captured = self.alignment.fitted(captured, base)
        outputs = tuple(n for n in expected if self.reference.computes(n) and n in captured)
        chain = Chain(self.reference.replayer, self.cuts, feeds, base, captured, outputs)
        again = None
        if trace.again is not None:
            again = self.alignment.fitted(self.alignment.tensors(trace.again), base)
        flagged = self._flagging.add(chain, again, first=index == 0)
        if flagged and self._blocks is None:
            self._blocks = self.reference.replayer.blocks(self.cuts, base, outputs)
        chain = replace(chain, blocks=self._blocks or {})
        read = partial(_read, upstream) if upstream is not None else None
        self.leave_one_in.add(index, chain, flagged, partial(self._task, upstream), read)
        if self._options.pictures:
            self._add_pictures(index, chain, flagged)
        # The search for causes keeps one core busy, and following the backend's tensors the others.
        with ThreadPoolExecutor(1) as aside:
            telescoped = aside.submit(self._telescope, index, chain, flagged)
            parts = self._add_causes(index, chain, flagged)
            telescoped.result()
        if index < leave_one_in.SAMPLES:
            try:
                self._keep_books(index, chain, flagged, parts, diverges, upstream)
            except ReplayError as error:
                self._gap("impact", f"sample {index} is not in the shares: {error.message}")
        if self.control is None and flagged:
            with contextlib.suppress(ReplayError):  # an input that takes no noise, such as a scale
                self.control = impact.input_control(chain, chain.base)
        if index == 0:
            self._describe(chain)

    def _add_outputs(self, index: int, expected: Arrays, captured: Arrays) -> bool:
        """Compare the final outputs; whether any of them diverges on this sample."""
        diverges = False
        for name, value in expected.items():
            if name not in captured:
                self._gap("run", f"output `{name}` is missing from the compiled program")
                continue
            if name not in self.outputs:
                self.outputs[name] = OutputMeter(
                    name, self._options.output_kinds.get(name), value, self._options.tokens
                )
                self._check_type(name, captured[name], value)
            diverges |= self.outputs[name].add(captured[name], value, index) > 0
        return diverges

    def _task(self, upstream: Upstream | None, name: str) -> TaskMeter:
        """A meter for an output, or for what the pipeline around the network makes of it."""
        if upstream is not None and (kind := upstream.kinds.get(name)):
            return TaskMeter(name, kind, upstream.characters or self._options.tokens)
        return self.outputs[name].alone()

    def _check_type(self, name: str, captured: Array, expected: Array) -> None:
        """Say where an output is of another kind: what reads it will not find what it looks for."""
        if "V" not in (both := {captured.dtype.kind, expected.dtype.kind}) and len(both) > 1:
            self.warnings.append(
                f"Output `{name}` is {captured.dtype}, where the model says {expected.dtype}."
            )

    def _add_system(
        self, index: int, upstream: Upstream, names: Sequence[str], captured: Arrays
    ) -> None:
        """Compare what the deployed system gives with what the training system does."""
        try:
            deployed = upstream.deployed({name: captured[name] for name in names})
        except UsageError as error:  # the reference's outputs fit: the backend's are the odd ones
            self._gap("compare", f"sample {index} has no result: {error.message}")
            return
        for name, value in upstream.origin(names).items():
            if name not in self.system_outputs:
                kind = upstream.kinds.get(name) or self._options.output_kinds.get(name)
                spelt = upstream.characters or self._options.tokens
                self.system_outputs[name] = OutputMeter(name, kind, value, spelt)
            self.system_outputs[name].add(deployed[name], value, index)

    def _check_seams(self, base: Arrays, expected: Arrays, captured: Arrays) -> None:
        """Say what running the reference in pieces changed: that belongs to no segment.

        It happens with float16 models, whose tensors ONNX Runtime keeps in float32 between
        operators but not between segments.
        """
        names = tuple(n for n in expected if n in base)
        if metrics.bitwise_equal({n: base[n] for n in names}, {n: expected[n] for n in names}):
            return
        seam = metrics.relative_l2(base, expected, names)
        self.warnings.append(
            f"The reference cut at this backend's tensors differs from the whole reference by "
            f"{seam:.1e}; introduced errors near that are less certain."
        )
        whole = metrics.relative_l2(captured, expected, tuple(n for n in names if n in captured))
        if seam > SEAM * whole:
            self._random = floors.draws(self.reference.graph.nodes)
            why = (
                "the model draws random numbers"
                if self._random
                else "between layers the model's narrow types round or overflow, and the whole "
                "reference does not"
            )
            self._gap("compare", f"{seam:.1e} of relative L2 is in no segment: {why}")

    def _add_pictures(self, index: int, chain: Chain, flagged: Mapping[str, Local]) -> None:
        """Keep a picture of the segments that matter most, as long as there is room for more."""
        effects = self.leave_one_in.effects
        wanted = [id for id in flagged if id in effects]
        for id in sorted(wanted, key=lambda id: effects[id].mean, reverse=True):
            if id in self.pictures or len(self.pictures) == pictures.MOST:
                continue
            local, introduced = flagged[id], self.meters[id].introduced
            name = max(introduced, key=lambda n: introduced[n].distance().relative_l2)
            made = pictures.picture(
                name, index, local.observed[name], local.replayed[name], chain.base[name]
            )
            if made is not None:
                self.pictures[id] = made

    def _add_causes(
        self, index: int, chain: Chain, flagged: Mapping[str, Local]
    ) -> dict[str, dict[str, Arrays]]:
        """Look for causes, or test those found before; what each reproduces, by segment."""
        self.tracer.progress.update("reference", f"causes on {self.tracer.id}")
        top = self.leave_one_in.top(TOP)
        cuts = [c for c in self.cuts if c.id in flagged]
        known = [c.id for c in cuts if c.id in self.causes]
        if index >= leave_one_in.SAMPLES:
            known = [id for id in known if id in top]
        again = chain.replayer.beside(lambda id: self.causes.again(id, flagged[id], index), known)
        found = dict(zip(known, again, strict=True))
        for cut in cuts:
            if cut.id not in self.causes:
                found[cut.id] = self._look(index, chain, cut, flagged[cut.id], cut.id in top)
        parts: dict[str, dict[str, Arrays]] = {}
        for cut in cuts:
            part, noise = found.get(cut.id), self.causes.noise(cut.id)
            if part is not None and noise is not None:
                parts.setdefault(noise, {})[cut.id] = part
        return parts

    def _look(
        self, index: int, chain: Chain, cut: Cut, local: Local, thorough: bool
    ) -> Arrays | None:
        """Look for the cause of one segment's error; the part of it that the cause reproduces."""
        segment = self._segment(chain, cut, local)
        part, failures = self.causes.look(
            cut.id, segment, local, index, thorough=thorough, floor=self.meters[cut.id].floor
        )
        for failure in failures:
            self._gap("explain", failure)
        if self._grids or self._compiled or self._trained:
            threads = self.reference.replayer.threads
            self.constants[cut.id] = evidence.of_constants(segment, local, threads)
        if thorough and self.causes.noise(cut.id) is None and cut.id not in self.constants:
            said = witness.sides_with(segment, local.inputs, local.observed, local.replayed)
            if said is not None:
                self.constants[cut.id] = (said,)
                nodes = ", ".join(model.key(self.reference.graph.nodes[i]) for i in cut.nodes)
                self.warnings.append(f"At {nodes}: {said}.")
        return part

    def _segment(self, chain: Chain, cut: Cut, local: Local) -> SegmentGraph:
        """A segment as causes are tried on it."""
        return SegmentGraph(
            surgery.without_copies(chain.replayer.model(cut, local.inputs)),
            self.alignment.kernels(cut),
            self._compiled,
            self._trained,
            self._grids,
            chain.replayer.weights,
            chain.replayer.folder,
            self._options.threads or 0,
            half=self.reference.own_type(cut) == FP16,
        )

    def _telescope(self, index: int, chain: Chain, flagged: Mapping[str, Local]) -> None:
        """Where this sample's whole divergence came from, by segment.

        A segment that only a later sample flags stays booked together with its neighbours, so
        that every share rests on the same samples and their means sum to 1.
        """
        if index == 0:
            unmeasured = {id for id, meter in self.meters.items() if meter.unmeasured}
            groups = impact.grouped(self.cuts, flagged.keys() | unmeasured)
            if len(groups) > MOST_GROUPS:
                groups = impact.grouped(self.cuts, self.leave_one_in.top(ALONE))
            self.ledger = Ledger(groups)
        booked = (index + 1) * len(self.ledger.groups)
        if index == 0 or (index < leave_one_in.SAMPLES and booked <= BOOKED_GROUPS):
            exact = {id for id, meter in self.meters.items() if meter.exact}
            self.ledger.telescope(chain, index, exact)

    def _keep_books(
        self,
        index: int,
        chain: Chain,
        flagged: Mapping[str, Local],
        parts: Mapping[str, Mapping[str, Arrays]],
        diverges: bool,
        upstream: Upstream | None,
    ) -> None:
        """Where this sample's whole divergence came from, by cause."""
        base, captured = chain.pick(chain.base), chain.pick(chain.captured)
        apart = metrics.relative_l2(captured, base, chain.outputs) > 0
        network = Parts({}, None)
        # What no flagged segment brings is rounding where every other one was measured.
        rounding = not self._random and not any(
            meter.unmeasured and meter.relative(meter.accumulated) > meter.floor
            for meter in self.meters.values()
        )
        if apart:
            with contextlib.suppress(ReplayError):  # without books the share is said to be unknown
                errors, named = self._with_roundings(index, chain, flagged, parts)
                network = impact.parts_by_category(chain, errors, named)
                whole = difference(captured, base)
                books = impact.booked(network, whole, base, chain.outputs, rounding=rounding)
                self.ledger.book(books, index)
        elif diverges:
            self.ledger.book(Books({}, 1.0, 0.0), index)  # all of it lies between the segments
        if upstream is not None:
            with contextlib.suppress(UsageError):  # said when the outputs were compared
                origin = upstream.origin(chain.outputs)
                system = upstream.parts(network, base, captured)
                last, names = upstream.deployed(captured), tuple(origin)
                off = difference(last, origin)
                books = impact.booked(system, off, origin, names, rounding=rounding)
                self.system.add(books, metrics.relative_l2(last, origin, names))

    def _with_roundings(
        self,
        index: int,
        chain: Chain,
        flagged: Mapping[str, Local],
        parts: Mapping[str, Mapping[str, Arrays]],
    ) -> tuple[dict[str, Local], dict[str, dict[str, Arrays]]]:
        """The segments that are booked, and what each noise reproduces of their errors.

        Beside those flagged, the ones in which the model's own narrow type may do what float32
        cannot. They are no findings, but that it does is tried like any other cause.
        """
        errors, named = dict(flagged), {noise: dict(by_id) for noise, by_id in parts.items()}
        for cut in (c for c in self.cuts if c.id in self._flagging.narrow):
            local = errors[cut.id] = self._flagging.narrow[cut.id]
            if cut.id in self.roundings:
                part = self.roundings.again(cut.id, local, index)
            else:
                segment = self._segment(chain, cut, local)
                part, failures = self.roundings.look(cut.id, segment, local, index, thorough=False)
                for failure in failures:
                    self._gap("explain", failure)
            if part is not None and (noise := self.roundings.noise(cut.id)):
                named.setdefault(noise, {})[cut.id] = part
        return errors, named

    def _describe(self, chain: Chain) -> None:
        """What the drill-down shows of the tensors."""
        seen: list[tuple[str, Array, Array, Moments]] = []
        for name, value in chain.feeds.items():
            same = Moments()
            same.add(value, value)
            seen.append((name, value, value, same))
        for meter in self.meters.values():
            for name, moments in meter.accumulated.items():
                seen.append((name, chain.captured[name], chain.base[name], moments))
        for stats in chain.replayer.beside(lambda tensor: _stats(*tensor), seen):
            self.tensors[stats.name] = stats
        finals, top = set(chain.outputs), self.leave_one_in.top(TOP)
        for cut in self.cuts:
            if cut.id in top or finals & set(cut.outputs):
                name = cut.outputs[0]
                self.concentrated[cut.id] = metrics.concentration(
                    chain.captured[name], chain.base[name]
                )

    # --- what the report asks for --------------------------------------------------------------

    def verdict(self, id: str) -> Attribution | None:
        """What is known of the cause of a segment's error; None where none was looked for.

        A segment that one sample flagged may be below its floor over all of them.
        """
        meter = self.meters[id]
        if meter.flagged:
            return self.causes.verdict(id) if id in self.causes else None
        return self.roundings.verdict(id) if meter.narrow and id in self.roundings else None

    def another_file(self) -> str | None:
        """A sentence on the compiled file's other weights; None where they make no error."""
        made, segments = self.causes.of_the_file()
        return evidence.of_another_file(self._compiled, len(made), segments)

    def gaps(self) -> list[Gap]:
        """What of this backend was not audited."""
        tracer = self.tracer
        unlike = None if tracer.gap else denied(tracer.id, tracer.stated())
        own = [gap for gap in (tracer.gap, tracer.unobserved, unlike) if gap]
        unmeasured = [
            Gap(self.tracer.id, "compare", meter.unmeasured)
            for meter in self.meters.values()
            if meter.unmeasured
        ]
        return own + unmeasured + list(self._gaps)

    def _gap(self, stage: str, reason: str) -> None:
        self._gaps.setdefault(Gap(self.tracer.id, stage, reason))


def _read(upstream: Upstream, outputs: Arrays) -> Arrays:
    """What the training side makes of outputs; nothing where their shapes do not fit it."""
    try:
        return upstream.read(outputs)
    except UsageError:
        return {}


def _stats(name: str, observed: Array, reference: Array, moments: Moments) -> TensorStats:
    """What the drill-down shows of a tensor; ``moments``: of these two."""
    return TensorStats(
        name=name,
        dtype=str(reference.dtype),
        shape=tuple(reference.shape),
        role="output",
        reference_range=metrics.value_range(reference),
        backend_range=metrics.value_range(observed),
        distance=moments.distance(),
        histogram=metrics.histogram(observed, reference, moments),
        histogram_edges=metrics.HISTOGRAM_EDGES,
    )
