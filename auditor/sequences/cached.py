"""Greedy text of a decoder that keeps caches, run as it is deployed.

One run takes the whole prompt and leaves the caches of its tokens (*prefill*); then one token a
run goes in with the caches of all before it. Each backend has its own: what is wrong in them stays,
and is read again at every later step. So an error may grow along a text, and a step's difference
has two parts, which one run of the reference on the backend's caches tells apart: what came with
the caches, and what the step adds.

That caches are paired rightly is checked on the reference: the text in steps must give the logits
that it gives in one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from auditor import pieces
from auditor.analysis import Analysis
from auditor.capture.trace import denied
from auditor.comparison import metrics
from auditor.errors import BackendError, UsageError
from auditor.records.backend import Gap
from auditor.records.generation import (
    Carried,
    Generation,
    GenerationReport,
    GenerationStep,
    KeptLayers,
    LayerEffect,
)
from auditor.replays.replay import ReplayError
from auditor.sequences.caches import Cache, Decoder, Run, Step, decoder_of, steps
from auditor.sequences.decisions import Logits, Tokens, compared, judged
from auditor.sequences.layers import Frozen, avoiding_options, numbered
from auditor.sequences.runs import Harness, Program, built
from auditor.verdict import summary

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.graphs.segments import Cut
    from auditor.ports import Arrays, Progress
    from auditor.replays.reference import Reference


# Relative L2 between the last logits of a text in steps and in one run. Rounding alone makes some
# 1e-6; with a cache in another's place, or positions that do not go on, everything differs.
_CONSISTENT = 1e-2


@dataclass(frozen=True, slots=True)
class _Truth:
    """The reference's side."""

    model: Model
    reference: Reference
    decoder: Decoder
    prompt: Tokens
    text: Tokens


def generate(
    model: Model,
    caches: tuple[Cache, ...],
    prompt: Sequence[int],
    count: int,
    harness: Harness,
    given: Arrays,
) -> GenerationReport:
    """Compare the greedy text of every backend with the reference's (see ``generate``).

    Raises:
        UsageError: the model is no decoder, its caches are paired wrongly, or the prompt does not
            fit it.
    """
    decoder = decoder_of(model, caches, given)
    harness.progress.update("reference", "write")
    reference = harness.reference(model)
    text: Tokens = []
    for step in steps(reference.run, decoder, prompt, count):
        text.append(step.token)
    _check(reference, decoder, [*prompt, *text[:-1]], step.logits)
    truth = _Truth(model, reference, decoder, list(prompt), text)
    prefill = decoder.feeds(truth.prompt, 0, None)
    parts = []
    for spec in harness.options.backends:
        with built(spec, harness, model, prefill, open=True) as program:
            parts.append(_Backend(program, truth).generation())
    return GenerationReport(
        model=model.info,
        prompt=tuple(prompt),
        text=tuple(text),
        length=len(prompt) + count,
        backends=tuple(parts),
        caches=len(caches),
    )


def _check(reference: Reference, decoder: Decoder, tokens: Tokens, stepped: Logits) -> None:
    """Refuse a model whose steps do not do what one run over all tokens does."""
    whole = decoder.last(reference.run(decoder.feeds(tokens, 0, None)))
    apart = _relative(stepped - whole, whole)
    if not apart <= _CONSISTENT:
        pairs = ", ".join(f"{c.past.name}={c.present}" for c in decoder.caches[:2])
        raise UsageError(
            f"in steps, the reference's logits are {apart:.1e} (relative L2) from those of one run "
            f"over the same {len(tokens)} tokens: its caches are not fed back as they should be",
            f"They were paired {pairs}, …: name the pairs with --cache PAST=PRESENT.",
        )


def _relative(part: Logits, whole: Logits) -> float:
    return float(np.linalg.norm(part) / np.linalg.norm(whole))


@dataclass(frozen=True, slots=True)
class _Forced:
    """A backend on the reference's text, and both sides of the step that is looked at."""

    steps: tuple[GenerationStep, ...]
    number: int
    ours: Step
    theirs: Step
    relative_l2: float


def _forced(run: Run, truth: _Truth, progress: Progress) -> _Forced:
    """Give a backend the reference's text; each side keeps its own caches."""
    decoder, count = truth.decoder, len(truth.text)
    ours_theirs = (
        steps(side, decoder, truth.prompt, count, truth.text) for side in (truth.reference.run, run)
    )
    made: list[GenerationStep] = []
    error = scale = 0.0
    chosen: tuple[int, Step, Step] | None = None
    for number, (ours, theirs) in enumerate(zip(*ours_theirs, strict=True)):
        progress.update("reference", f"token {number + 1} of {count}")
        (step,) = compared([truth.text[number]], ours.logits, theirs.logits)
        kept = decoder.kept(ours.outputs)
        apart = metrics.relative_l2(theirs.outputs, kept, tuple(kept))
        made.append(replace(step, number=number, caches=apart))
        # The first that turned is looked at, else the furthest from the reference's.
        best = made[chosen[0]] if chosen else None
        if best is None or (best.same and (not step.same or step.kl > best.kl)):
            chosen = number, ours, theirs
        error += float(np.square(theirs.logits - ours.logits).sum())
        scale += float(np.square(ours.logits).sum())
    assert chosen is not None
    return _Forced(tuple(made), *chosen, math.sqrt(error / scale))


@dataclass(frozen=True, slots=True)
class _Written:
    """One run of a backend, captured and analysed.

    Attributes:
        feeds: its inputs.
        outputs: those whose error was analysed.
        analysis: what was found.
        tensors: what was captured.
    """

    feeds: Arrays
    outputs: tuple[str, ...]
    analysis: Analysis
    tensors: Arrays

    def frozen(self, truth: _Truth) -> Frozen:
        """The reference with the errors that single layers made in this run."""
        wide = truth.reference.wide(self.feeds)
        cuts = self.analysis.cuts
        return Frozen(truth.model, truth.reference, cuts, wide, self.tensors, self.outputs)


class _Backend:
    """One backend, built: its text, and where its difference came from."""

    def __init__(self, program: Program, truth: _Truth) -> None:
        self._program, self._truth = program, truth
        self._spec, self._tracer = program.spec, program.tracer
        self._prefill = truth.decoder.feeds(truth.prompt, 0, None)

    def generation(self) -> Generation:
        """What the report says of the backend."""
        spec, tracer, truth = self._spec, self._tracer, self._truth
        decoder, run = truth.decoder, self._program.run
        before: _Written | None = None
        try:
            forced = _forced(run, truth, tracer.progress)
            own = _own_text(run, truth, forced)
            carried = _carried(truth.reference, decoder, forced)
            if forced.number:
                caches = tuple(c.present for c in decoder.caches)
                before = self._audited(self._prefill, caches, last=False)
                prompt = summary.report(before.analysis, spec.device or "")
                carried = replace(
                    carried,
                    categories=prompt.categories,
                    unexplained_share=prompt.unexplained_share,
                )
            step = self._audited(forced.theirs.feeds, (decoder.logits,), last=True)
        except BackendError:
            return Generation(spec.label, gap=tracer.gap)
        part = summary.report(step.analysis, spec.device or "")
        turned = not forced.steps[forced.number].same
        result = Generation(
            spec.label,
            text=tuple(own),
            steps=forced.steps,
            first=forced.number if turned else None,
            relative_l2=forced.relative_l2,
            categories=part.categories,
            unexplained_share=part.unexplained_share,
            fidelity=part.fidelity,
            provenance=tracer.provenance,
            carried=carried,
            gap=denied(spec.label, tracer.provenance),
        )
        if not turned:
            return result
        avoiding = avoiding_options(tracer, part.categories, spec)
        return self._with_layers(result, forced, carried, step, before, avoiding)

    def _audited(self, feeds: Arrays, names: tuple[str, ...], *, last: bool) -> _Written:
        """Capture one run, and find what causes the error of some outputs."""
        reference = self._truth.reference
        expected = reference.run(feeds)
        wanted = {name: expected[name] for name in names}
        analysis, tensors = self._program.analysed(reference, feeds, wanted, last=last)
        return _Written(feeds, names, analysis, tensors)

    def _with_layers(
        self,
        result: Generation,
        forced: _Forced,
        carried: Carried,
        step: _Written,
        before: _Written | None,
        avoiding: dict[str, str] | None,
    ) -> Generation:
        """The same with what single layers did to the decision that turned.

        Args:
            result: all else.
            forced: the step.
            carried: what the caches did to it.
            step: the step, captured.
            before: the run that wrote the prompt's caches, unless it is the step itself.
            avoiding: options that avoid the causes named.
        """
        truth, progress = self._truth, self._tracer.progress
        kept = None
        effects: tuple[LayerEffect, ...] = ()
        try:
            frozen = step.frozen(truth)
            effects = _effects(frozen, truth, forced, carried, progress)
            harm = {effect.layer: effect.harm for effect in effects}
            if before is not None:
                harm = _harm(before.frozen(truth), truth, forced, carried, harm, progress)
            names = sorted(frozen.layers, key=lambda name: -harm.get(name, 0.0))
            kept = self._kept(names, frozen, avoiding)
        except ReplayError as error:
            reason = f"which layers matter is not known: {error.message}"
            result = replace(result, gap=Gap(self._spec.label, "layers", reason))
        return replace(result, effects=effects, kept=kept)

    def _kept(
        self, names: Sequence[str], frozen: Frozen, avoiding: dict[str, str] | None
    ) -> KeptLayers:
        """The fewest of the most harmful layers that must be exact for every decision to hold.

        Found by building: the errors of all steps are not known apart, and caches carry them on.
        """
        if avoiding is None:
            return KeptLayers(
                tuple(names),
                len(names),
                failure="the backend has no option that avoids the causes named",
            )
        low, high, best = 0, len(names), None
        while high - low > 1 or best is None:
            middle = high if best is None else (low + high) // 2
            self._tracer.progress.update(self._tracer.id, f"build with {middle} layers exact")
            nodes = {i for name in names[:middle] for cut in frozen.layers[name] for i in cut.nodes}
            tried = KeptLayers(tuple(names[:middle]), len(names), options=avoiding)
            tried = self._in_pieces(tried, nodes)
            if tried.turned == 0:
                high, best = middle, tried
            elif best is None:
                return tried
            else:
                low = middle
        return best

    def _in_pieces(self, kept: KeptLayers, chosen: set[int]) -> KeptLayers:
        """Build the model in pieces, and give it the reference's text, step by step."""
        truth, reference, decoder = self._truth, self._truth.reference, self._truth.decoder
        made = pieces.split(reference.graph, chosen)
        kept = replace(kept, pieces=len(made))
        pasts = {cache.past.name: cache for cache in decoder.caches}
        ours = list(steps(reference.run, decoder, truth.prompt, len(truth.text), truth.text))
        values = [{n: v for n, v in step.feeds.items() if n not in pasts} for step in ours]

        def reads(cut: Cut, number: int) -> Arrays:
            found: Arrays = {}
            for name in cut.inputs:
                if name not in pasts:
                    found[name] = values[number][name]
                elif number:
                    found[name] = values[number - 1][pasts[name].present]
                else:
                    found[name] = pasts[name].empty()
            return found

        cuts = [piece.cut for piece in made]
        walk = reference.replayer.walk
        ends = [walk(cuts, reference.wide(s.feeds)) for s in (ours[0], ours[-1])]
        shapes = {
            name: _open(*(end[name].shape for end in ends)) for cut in cuts for name in cut.inputs
        }
        try:
            failure = self._program.in_pieces(reference, made, shapes, kept.options, values, reads)
        except (UsageError, ReplayError) as error:
            failure = error.message
        if failure is not None:
            return replace(kept, failure=failure)
        logits = [
            np.concatenate([decoder.last(v) for v in side])
            for side in ([step.outputs for step in ours], values)
        ]
        return judged(kept, compared(truth.text, *logits))


def _own_text(run: Run, truth: _Truth, forced: _Forced) -> Tokens:
    """What a backend writes by itself: the reference's text up to the first turned decision."""
    at, step = forced.number, forced.steps[forced.number]
    if step.same:
        return truth.text
    done = [*truth.text[:at], step.other]
    before = len(truth.prompt) + at, forced.theirs.outputs
    more = steps(run, truth.decoder, [step.other], len(truth.text) - at - 1, before=before)
    return [*done, *(step.token for step in more)]


def _rival(forced: _Forced) -> int:
    """The backend's token at the step that is looked at, or the reference's second."""
    step = forced.steps[forced.number]
    return int(np.argsort(forced.ours.logits[0])[-2]) if step.same else step.other


def _carried(reference: Reference, decoder: Decoder, forced: _Forced) -> Carried:
    """What the backend's caches do to the step that is looked at, and what the step does."""
    between = decoder.last(reference.run(forced.theirs.feeds))
    token, other = forced.steps[forced.number].token, _rival(forced)
    ours, theirs = forced.ours.logits, forced.theirs.logits
    lead, with_caches, after = (_margin(v, token, other) for v in (ours, between, theirs))
    return Carried(
        number=forced.number,
        other=other,
        lead=lead,
        by_caches=with_caches - lead,
        by_step=after - with_caches,
        inherited=_relative(between - ours, ours),
        introduced=_relative(theirs - between, ours),
    )


def _margin(logits: Logits, token: int, other: int) -> float:
    return float(logits[0, token] - logits[0, other])


def _effects(
    frozen: Frozen, truth: _Truth, forced: _Forced, carried: Carried, progress: Progress
) -> tuple[LayerEffect, ...]:
    """What single layers do to the step that is looked at, most harmful first.

    That is the error that a layer adds in this step, and by itself what its caches brought along.
    """
    decoder, reference = truth.decoder, truth.reference
    token = forced.steps[forced.number].token
    found: list[LayerEffect] = []

    def add(name: str, count: int, values: Arrays, base: float) -> None:
        change = _margin(decoder.last(values), token, carried.other) - base
        if change:
            found.append(LayerEffect(name, count, change, -change / max(carried.lead, 1e-12)))

    for layer, cuts in frozen.layers.items():
        progress.update("reference", f"effect of {layer}")
        add(layer, len(cuts), frozen.alone(layer), carried.lead + carried.by_caches)
    groups: dict[str, list[str]] = {}
    for cache in decoder.caches if forced.number else ():
        groups.setdefault(numbered(cache.past.name), []).append(cache.past.name)
    for group, names in groups.items():
        progress.update("reference", f"effect of {group}")
        feeds = forced.ours.feeds | {n: forced.theirs.feeds[n] for n in names}
        add(f"{group} (caches)", len(names), reference.run(feeds), carried.lead)
    return tuple(sorted(found, key=lambda effect: -effect.harm))


def _harm(
    wrote: Frozen,
    truth: _Truth,
    forced: _Forced,
    carried: Carried,
    harm: Mapping[str, float],
    progress: Progress,
) -> dict[str, float]:
    """What single layers do to the step that is looked at: in it, and when they wrote the prompt.

    For the latter the reference goes from caches with the error of one layer to that step.
    """
    decoder, prompt = truth.decoder, len(truth.prompt)
    found = dict(harm)
    for layer in wrote.layers:
        progress.update("reference", f"effect of {layer} on the prompt's caches")
        caches = wrote.alone(layer)
        first, *more = truth.text[: forced.number + 1]
        again = steps(truth.reference.run, decoder, [first], len(more), more, (prompt, caches))
        *_, last = again
        token = forced.steps[forced.number].token
        change = _margin(last.logits, token, carried.other) - carried.lead
        found[layer] = found.get(layer, 0.0) - change / max(carried.lead, 1e-12)
    return found


def _open(one: Sequence[int], other: Sequence[int]) -> tuple[int | None, ...]:
    """A shape that is open where two differ."""
    return tuple(a if a == b else None for a, b in zip(one, other, strict=True))
