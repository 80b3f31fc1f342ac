"""Greedy text of a decoder that keeps caches, run as it is deployed.

One run takes the whole prompt and leaves the caches of its tokens (*prefill*); then one token a
run goes in with the caches of all before it. Each backend has its own: what is wrong in them stays,
and is read again at every later step. So an error may grow along a text, and a step's difference
has two parts, which one run of the reference on the backend's caches tells apart: what came with
the caches, and what the step adds.

Inputs and outputs are paired by the names that optimum and transformers give them, else by their
order. That this is right is checked on the reference: the text in steps must give the logits that
it gives in one run.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from auditor import metrics, pieces, summary
from auditor import model as models
from auditor.analysis import Analysis
from auditor.audit import AuditOptions, BackendSpec, reference_of, request_for
from auditor.errors import BackendError, UsageError
from auditor.processes.worker import workers
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
from auditor.sequences.generate import (
    Frozen,
    Logits,
    Tokens,
    avoiding_options,
    compared,
    numbered,
    plain_runs,
)
from auditor.trace import Tracer

if TYPE_CHECKING:
    from auditor.model import Model, TensorSpec
    from auditor.ports import Array, Arrays, Noise, Progress
    from auditor.replays.replay import Reference
    from auditor.segments import Cut

Run = Callable[["Arrays"], "Arrays"]

_PAST = re.compile(r"^past(_key_values?)?[._]")
_PRESENT = re.compile(r"^present(_key_values?)?[._]")
# Relative L2 between the last logits of a text in steps and in one run. Rounding alone makes some
# 1e-6; with a cache in another's place, or positions that do not go on, everything differs.
_CONSISTENT = 1e-2


@dataclass(frozen=True, slots=True)
class Cache:
    """An input that takes what an output of the run before gave.

    Attributes:
        present: name of the output.
        axis: the axis that grows with the text; None for a state of one size.
        length: tokens of what an encoder read, where it holds those: the first run writes it, and
            it stays. None for one that grows.
    """

    past: TensorSpec
    present: str
    axis: int | None
    length: int | None = None

    def empty(self) -> Array:
        """What it is before the first run: without a token, or zeros; for a batch of one."""
        dims = [d if isinstance(d, int) else 1 for d in self.past.shape]
        if self.axis is not None:
            dims[self.axis] = self.length or 0
        return np.zeros(dims, self.past.dtype)


def checked(model: Model, given: Arrays) -> Arrays:
    """Inputs that are the same in every run, in the model's types.

    Raises:
        UsageError: the model has no such input, or it has another rank.
    """
    inputs = {spec.name: spec for spec in model.inputs}
    for name, value in given.items():
        if name not in inputs or value.ndim != len(inputs[name].shape):
            raise UsageError(
                f"--data has `{name}` of shape {models.shown(value.shape)}, which is no input of "
                f"{model.path}",
                f"Its inputs: {', '.join(map(str, inputs.values()))}.",
            )
    return {name: value.astype(inputs[name].dtype, copy=False) for name, value in given.items()}


def caches_of(
    model: Model, named: Mapping[str, str], given: Arrays | None = None
) -> tuple[Cache, ...]:
    """Pair the inputs that are caches with the outputs that they come from.

    Args:
        model: any model.
        named: outputs by input, as far as the user says it.
        given: inputs that are the same in every run, such as what an encoder made.

    Returns:
        One for every input of floats, or named as caches are; none where there is no such input.

    Raises:
        UsageError: a cache that has no output, or an axis that has no size.
    """
    given = given or {}
    read = {
        d: size
        for spec in model.inputs
        if spec.name in given
        for d, size in zip(spec.shape[1:], given[spec.name].shape[1:], strict=False)
        if isinstance(d, str)
    }
    inputs = {spec.name: spec for spec in model.inputs if spec.name not in given}
    models.check_pairs(model, named, "--cache")
    pasts = [
        n for n, s in inputs.items() if n in named or _PAST.match(n) or s.dtype.kind not in "iub"
    ]
    pairs = dict(named)
    free = [n for n in model.outputs if n != _logits(model) and n not in named.values()]
    suffixes = {_PRESENT.sub("", n): n for n in free if _PRESENT.match(n)}
    for name in pasts:
        if name not in pairs and _PAST.match(name) and (found := suffixes.get(_PAST.sub("", name))):
            pairs[name] = found
            free.remove(found)
    left = [name for name in pasts if name not in pairs]
    if len(left) > len(free):
        raise UsageError(
            f"no output of {model.path} is fed back to its input {inputs[left[0]]}",
            "Export the decoder with use_cache=True, or name it: --cache PAST=PRESENT; what stays "
            "the same in every run, such as an encoder's result, is given with --data FILE.npz.",
        )
    pairs |= dict(zip(left, free, strict=False))
    caches = (Cache(inputs[n], pairs[n], _axis(inputs[n])) for n in pasts)
    return tuple(
        replace(c, length=read.get(str(c.past.shape[c.axis]))) if c.axis is not None else c
        for c in caches
    )


def _logits(model: Model) -> str:
    return next((n for n in model.outputs if "logits" in n.lower()), model.outputs[0])


def _axis(spec: TensorSpec) -> int | None:
    """The axis of a cache that grows: the one that is open beside the batch."""
    found = [
        axis
        for axis, size in enumerate(spec.shape)
        if axis and not isinstance(size, int) and not models.BATCH_NAME.search(size or "")
    ]
    if len(found) > 1 or len(spec.shape) < 2:
        raise UsageError(
            f"input {spec} is no cache, which leaves open its batch and its length only",
            "Give a decoder that takes token ids and caches, with numbers for their other sizes.",
        )
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Decoder:
    """How a model takes and gives tokens and caches.

    Attributes:
        ids, mask: inputs; the mask, of all tokens so far, may be missing.
        positions: inputs that say where the new tokens are.
        branch: input of a decoder that is two in one (``use_cache_branch``), which says whether
            there are caches yet; may be missing.
        given: inputs that are the same in every run.
        logits: the output, ``[1, new tokens or 1, vocabulary]``.
    """

    ids: TensorSpec
    mask: TensorSpec | None
    positions: tuple[TensorSpec, ...]
    logits: str
    caches: tuple[Cache, ...]
    branch: TensorSpec | None = None
    given: Arrays = field(default_factory=dict)

    def feeds(self, tokens: Sequence[int], before: int, outputs: Arrays | None) -> Arrays:
        """The inputs of a run.

        Args:
            tokens: the new ones.
            before: how many there were.
            outputs: of the run before; None for the first.
        """
        feeds: Arrays = {self.ids.name: np.asarray([tokens], self.ids.dtype), **self.given}
        if self.mask:
            feeds[self.mask.name] = np.ones((1, before + len(tokens)), self.mask.dtype)
        for spec in self.positions:
            places = np.arange(before, before + len(tokens)).astype(spec.dtype)
            feeds[spec.name] = places if len(spec.shape) == 1 else places[None]
        if self.branch:
            feeds[self.branch.name] = np.full(len(self.branch.shape) * (1,), outputs is not None)
        for cache in self.caches:
            value = outputs[cache.present] if outputs else cache.empty()
            feeds[cache.past.name] = value.astype(cache.past.dtype, copy=False)
        return feeds

    def after(self, outputs: Arrays, earlier: Arrays | None) -> Arrays:
        """A run's outputs, with the caches that stay as the run before left them."""
        stay = [c.present for c in self.caches if c.length is not None]
        return outputs if earlier is None else outputs | {n: earlier[n] for n in stay}

    def last(self, outputs: Arrays) -> Logits:
        """The logits that decide the next token, ``[1, vocabulary]``.

        Raises:
            UsageError: the output is no distribution over tokens.
        """
        logits = outputs[self.logits]
        if logits.ndim != 3 or logits.shape[0] != 1 or logits.dtype.kind != "f":
            raise UsageError(
                f"output `{self.logits}` has the shape {models.shown(logits.shape)}, not "
                "1xTOKENSxVOCABULARY",
                "Give a decoder that returns logits.",
            )
        return logits[0, -1:].astype(np.float64)

    def kept(self, outputs: Arrays) -> Arrays:
        """The caches among a run's outputs."""
        return {cache.present: outputs[cache.present] for cache in self.caches}


def decoder_of(model: Model, caches: tuple[Cache, ...], given: Arrays | None = None) -> Decoder:
    """Find what a decoder takes beside its caches and what is ``given``.

    Raises:
        UsageError: it takes no token ids, or something that is no sequence of any length.
    """
    given = given or {}
    pasts = {cache.past.name for cache in caches} | given.keys()
    ids: list[TensorSpec] = []
    masks: list[TensorSpec] = []
    positions: list[TensorSpec] = []
    branch: TensorSpec | None = None
    for spec in (s for s in model.inputs if s.name not in pasts):
        name = spec.name.lower()
        if spec.dtype.kind == "b" and len(spec.shape) <= 1:
            branch = spec
            continue
        among = masks if "mask" in name else positions if "position" in name else ids
        ranks = (1, 2) if among is positions else (2,)
        fits = spec.dtype.kind in "iub" and len(spec.shape) in ranks
        if not fits or isinstance(spec.shape[-1], int) or (among and among is not positions):
            raise UsageError(
                f"{model.path} takes {spec}, which is no sequence of tokens of any length",
                "Export the decoder with open lengths: token ids, a mask and positions if any, "
                "and caches.",
            )
        among.append(spec)
    if not ids:
        raise UsageError(f"{model.path} takes no token ids", "Give a decoder.")
    mask = masks[0] if masks else None
    return Decoder(ids[0], mask, tuple(positions), _logits(model), caches, branch, given)


# --- writing ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One run: what went in, what came out, and the logits that decide the next token."""

    feeds: Arrays
    outputs: Arrays
    logits: Logits

    @property
    def token(self) -> int:
        """The most likely one."""
        return int(self.logits[0].argmax())


def steps(
    run: Run,
    decoder: Decoder,
    tokens: Sequence[int],
    count: int,
    given: Sequence[int] | None = None,
    before: tuple[int, Arrays] | None = None,
) -> Iterator[Step]:
    """Runs that write ``count`` tokens after ``tokens``, each with the caches of the one before.

    Args:
        run: runs the model.
        decoder: how.
        tokens: what goes into the first run.
        count: how many to write.
        given: the tokens to go on with, whatever is written; the most likely ones without.
        before: how many tokens there were, and the outputs of the run that took the last of them.
    """
    seen, outputs = before or (0, None)
    for number in range(count):
        feeds = decoder.feeds(tokens, seen, outputs)
        outputs = decoder.after(run(feeds), outputs)
        step = Step(feeds, outputs, decoder.last(outputs))
        yield step
        seen += len(tokens)
        tokens = [given[number] if given else step.token]


# --- one model ----------------------------------------------------------------------------------


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
    options: AuditOptions,
    *,
    noises: Sequence[Noise],
    progress: Progress,
    scratch: Path,
    given: Arrays | None = None,
) -> GenerationReport:
    """Compare the greedy text of every backend with the reference's (see ``generate``).

    Raises:
        UsageError: the model is no decoder, its caches are paired wrongly, or the prompt does not
            fit it.
    """
    decoder = decoder_of(model, caches, given)
    progress.update("reference", "write")
    reference, _ = reference_of(model, options.threads or os.cpu_count() or 1, scratch)
    text: Tokens = []
    for step in steps(reference.run, decoder, prompt, count):
        text.append(step.token)
    _check(reference, decoder, [*prompt, *text[:-1]], step.logits)
    truth = _Truth(model, reference, decoder, list(prompt), text)
    parts = [_one(spec, truth, options, noises, progress, scratch) for spec in options.backends]
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


def _one(
    spec: BackendSpec,
    truth: _Truth,
    options: AuditOptions,
    noises: Sequence[Noise],
    progress: Progress,
    scratch: Path,
) -> Generation:
    """One backend's text, and where its difference came from."""
    decoder, reference = truth.decoder, truth.reference
    prefill = decoder.feeds(truth.prompt, 0, None)
    with workers([spec.id], options.limits) as (worker,):
        tracer = Tracer(spec.label, worker, options.timeout, progress)
        if tracer.start():
            request = request_for(spec, options, truth.model, prefill, worker.workdir)
            tracer.build(replace(request, open=True))

        run = plain_runs(tracer)

        def audited(feeds: Arrays, names: Sequence[str], *, last: bool) -> tuple[Analysis, Arrays]:
            """Capture one run, and find what causes the error of some outputs."""
            trace = tracer.sample(feeds, last=last)
            if trace is None:
                raise BackendError(tracer.gap.reason if tracer.gap else "", stage="run")
            same = {name: name for name in reference.graph.producer}
            analysis = Analysis(tracer, reference, same, noises)
            expected = reference.run(feeds)
            wanted = {name: expected[name] for name in names}
            analysis.add(0, reference.wide(feeds), wanted, trace)
            return analysis, trace.tensors

        try:
            forced = _forced(run, truth, progress)
            own = _own_text(run, truth, forced)
            carried = _carried(reference, decoder, forced)
            if forced.number:
                caches = [c.present for c in decoder.caches]
                before, written = audited(prefill, caches, last=False)
                prompt = summary.report(before, spec.device or "")
                carried = replace(
                    carried,
                    categories=prompt.categories,
                    unexplained_share=prompt.unexplained_share,
                )
            feeds = forced.theirs.feeds
            analysis, tensors = audited(feeds, [decoder.logits], last=True)
        except BackendError:
            return Generation(spec.label, gap=tracer.gap)
        part = summary.report(analysis, spec.device or "")
        turned = not forced.steps[forced.number].same
        gap = kept = None
        effects: tuple[LayerEffect, ...] = ()
        if turned:
            wide, cuts = reference.wide(feeds), analysis.cuts
            try:
                frozen = Frozen(truth.model, reference, cuts, wide, tensors, (decoder.logits,))
                effects = _effects(frozen, truth, forced, carried, progress)
                harm = {effect.layer: effect.harm for effect in effects}
                if forced.number:
                    made = tuple(c.present for c in decoder.caches)
                    first = reference.wide(prefill)
                    wrote = Frozen(truth.model, reference, before.cuts, first, written, made)
                    harm = _harm(wrote, truth, forced, carried, harm, progress)
                names = sorted(frozen.layers, key=lambda name: -harm.get(name, 0.0))
                avoiding = avoiding_options(tracer, part.categories, spec)
                kept = _kept(names, frozen, truth, tracer, avoiding, spec, options, scratch)
            except ReplayError as error:
                reason = f"which layers matter is not known: {error.message}"
                gap = Gap(spec.label, "layers", reason)
        return Generation(
            spec.label,
            text=tuple(own),
            steps=forced.steps,
            first=forced.number if turned else None,
            relative_l2=forced.relative_l2,
            categories=part.categories,
            unexplained_share=part.unexplained_share,
            fidelity=part.fidelity,
            provenance=tracer.provenance,
            effects=effects,
            kept=kept,
            carried=carried,
            gap=gap,
        )


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


# --- which layers to keep exact -----------------------------------------------------------------


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


def _kept(
    names: Sequence[str],
    frozen: Frozen,
    truth: _Truth,
    tracer: Tracer,
    avoiding: dict[str, str] | None,
    spec: BackendSpec,
    options: AuditOptions,
    scratch: Path,
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
        tracer.progress.update(tracer.id, f"build with {middle} layers exact")
        nodes = {i for name in names[:middle] for cut in frozen.layers[name] for i in cut.nodes}
        tried = KeptLayers(tuple(names[:middle]), len(names), options=avoiding)
        tried = _in_pieces(tried, nodes, truth, tracer, spec, options, scratch)
        if tried.turned == 0:
            high, best = middle, tried
        elif best is None:
            return tried
        else:
            low = middle
    return best


def _in_pieces(
    kept: KeptLayers,
    chosen: set[int],
    truth: _Truth,
    tracer: Tracer,
    spec: BackendSpec,
    options: AuditOptions,
    scratch: Path,
) -> KeptLayers:
    """Build the model in pieces, and give it the reference's text, step by step.

    One piece after the other takes all steps: each is compiled once, and only it is loaded.
    """
    reference, decoder = truth.reference, truth.decoder
    made = pieces.split(reference.graph, chosen)
    kept = replace(kept, pieces=len(made))
    pasts = {cache.past.name: cache for cache in decoder.caches}
    ours = list(steps(reference.run, decoder, truth.prompt, len(truth.text), truth.text))
    values = [{n: v for n, v in step.feeds.items() if n not in pasts} for step in ours]

    def inputs(cut: Cut, number: int) -> Arrays:
        """What a piece reads in a step."""
        found: Arrays = {}
        for name in cut.inputs:
            if name not in pasts:
                found[name] = values[number][name]
            elif number:
                found[name] = values[number - 1][pasts[name].present]
            else:
                found[name] = pasts[name].empty()
        return found

    replayer = reference.replayer
    cuts = [piece.cut for piece in made]
    ends = [replayer.walk(cuts, reference.wide(s.feeds)) for s in (ours[0], ours[-1])]
    path = scratch / f"{spec.id}-piece.onnx"
    try:
        for piece in made:
            cut = piece.cut
            shapes = {n: _open(ends[0][n].shape, ends[1][n].shape) for n in cut.inputs}
            onnx.save(
                reference.graph.extract(cut, replayer.types, shapes, truth.model.weights), path
            )
            feeds = inputs(cut, 0)
            request = request_for(spec, options, truth.model, feeds, tracer.worker.workdir)
            given = request.options | (kept.options if piece.chosen else {})
            run = Tracer(tracer.id, tracer.worker, tracer.timeout, tracer.progress)
            run.build(replace(request, model_path=path, dynamic=True, open=True, options=given))
            for number in range(len(ours)):
                outputs = None if run.gap else run.plain(inputs(cut, number))
                if outputs is None:
                    reason = run.gap.reason if run.gap else ""
                    return replace(kept, failure=f"piece {cut.id} of {len(made)}: {reason}")
                values[number] |= reference.wide(outputs)
    except KeyError as error:  # a cache that a later piece writes
        return replace(kept, failure=f"{error} is written by a later piece than reads it")
    except (UsageError, ReplayError) as error:
        return replace(kept, failure=error.message)
    logits = [
        np.concatenate([decoder.last(v) for v in side])
        for side in ([step.outputs for step in ours], values)
    ]
    done = compared(truth.text, *logits)
    return replace(
        kept, turned=sum(not step.same for step in done), kl=max(step.kl for step in done)
    )


def _open(one: Sequence[int], other: Sequence[int]) -> tuple[int | None, ...]:
    """A shape that is open where two differ."""
    return tuple(a if a == b else None for a, b in zip(one, other, strict=True))
