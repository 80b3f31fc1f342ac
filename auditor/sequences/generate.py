"""Greedy text of a decoder, on the reference and on backends: where it parts, and why.

A decoder's answer is a chain of decisions, so the size of an error matters less than whether it
turns one of them. The reference writes its greedy text first. A backend is then given that very
text (*forced*), which shows at every step how far its distribution is from the reference's and
whether it would have gone on otherwise, and writes a text of its own (*free*).

The text is written by plain re-runs of one program with a fixed length: the tokens so far, and
padding behind them. That a decoder does not look at what is behind is checked on the reference
with two paddings; it is also why one forced run shows all steps.

Why a decision turned is told by the margin at that step, the reference's token over the backend's:
each layer's own error (what its segments introduced, frozen) is put into the reference alone.
Which layers to keep in full precision is found by leaving their errors out of all of them, most
harmful first, until every decision is the reference's again; then the model is really built in
pieces, those layers with the engine's option that avoids the cause, and run.

A decoder that keeps caches is run as it is deployed instead: see ``auditor.sequences.cached``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from auditor import discovery, divergence, pieces, summary
from auditor import model as models
from auditor.analysis import Analysis
from auditor.audit import AuditOptions, BackendSpec, reference_of, request_for
from auditor.errors import BackendError, UsageError
from auditor.impact import Chain
from auditor.processes.worker import workers
from auditor.records.backend import Gap
from auditor.records.generation import (
    Generation,
    GenerationReport,
    GenerationStep,
    KeptLayers,
    LayerEffect,
)
from auditor.records.measured import CategoryShare
from auditor.replays.replay import Patch, ReplayError, add
from auditor.trace import Tracer
from auditor.training import origins

if TYPE_CHECKING:
    from auditor.model import Model, TensorSpec
    from auditor.ports import Arrays, Noise, Progress
    from auditor.replays.replay import Reference
    from auditor.segments import Cut

Tokens = list[int]
Logits = NDArray[np.float64]  # [steps, vocabulary]
# Of the reference's margin at a step that a backend turned, the part that must be left for the step
# to be out of reach; elsewhere the decision alone must hold.
RESERVE = 0.5
_NUMBERED = re.compile(r"^\D*\d+")


@dataclass(frozen=True, slots=True)
class Decoder:
    """How a model takes and gives tokens.

    Attributes:
        ids, mask, positions: names of its inputs; the latter two may be missing.
        logits: name of the output, ``[1, length, vocabulary]``.
        types: numpy types of the inputs.
        length: tokens that one run takes.
        pad: the token behind the text.
    """

    ids: str
    mask: str | None
    positions: str | None
    logits: str
    types: dict[str, np.dtype[Any]]
    length: int
    pad: int = 0

    def feeds(self, tokens: Sequence[int], pad: int | None = None) -> Arrays:
        """The inputs of a run on some tokens."""
        row = np.full((1, self.length), self.pad if pad is None else pad)
        row[0, : len(tokens)] = tokens
        feeds: Arrays = {self.ids: row.astype(self.types[self.ids])}
        if self.mask:
            seen = np.arange(self.length)[None] < len(tokens)
            feeds[self.mask] = seen.astype(self.types[self.mask])
        if self.positions:
            places = np.arange(self.length)[None]
            feeds[self.positions] = places.astype(self.types[self.positions])
        return feeds


def decoder_of(model: Model, prompt: int, tokens: int) -> Decoder:
    """Find a decoder's inputs and output.

    Raises:
        UsageError: the model is none, or is too short for so many tokens.
    """
    places: dict[str, TensorSpec] = {}
    for spec in model.inputs:
        name = spec.name.lower()
        kind = "mask" if "mask" in name else "positions" if "position" in name else "ids"
        if len(spec.shape) != 2 or spec.dtype.kind not in "iub" or kind in places:
            hint = "Give a decoder: token ids, a mask and positions if any, and caches if any."
            raise UsageError(f"{model.path} takes {spec}, which is no sequence of tokens", hint)
        places[kind] = spec
    if "ids" not in places:
        raise UsageError(f"{model.path} takes no token ids", "Give a decoder.")
    declared = {d for spec in places.values() for d in spec.shape[1:] if isinstance(d, int)}
    length = max(declared, default=prompt + tokens)
    if length < prompt + tokens:
        raise UsageError(
            f"{model.path} takes {length} tokens, the prompt and the text have {prompt + tokens}",
            f"Give --tokens {max(length - prompt, 1)}, or export it with an open length.",
        )
    found = {kind: spec.name for kind, spec in places.items()}
    logits = next((n for n in model.outputs if "logits" in n.lower()), model.outputs[0])
    return Decoder(
        found["ids"],
        found.get("mask"),
        found.get("positions"),
        logits,
        {spec.name: spec.dtype for spec in places.values()},
        length,
    )


# --- writing ------------------------------------------------------------------------------------


def greedy(
    run: Callable[[Arrays], Arrays], decoder: Decoder, text: Sequence[int], count: int
) -> Tokens:
    """The ``count`` tokens that go on after ``text``, the most likely one each."""
    written = list(text)
    for _ in range(count):
        logits = run(decoder.feeds(written))[decoder.logits]
        written.append(int(logits[0, len(written) - 1].argmax()))
    return written[len(text) :]


def steps_of(outputs: Arrays, decoder: Decoder, prompt: int, count: int) -> Logits:
    """The logits that decide each of the ``count`` tokens after a prompt, of one forced run."""
    return outputs[decoder.logits][0, prompt - 1 : prompt - 1 + count].astype(np.float64)


def divergence_nats(reference: Logits, other: Logits) -> NDArray[np.float64]:
    """Kullback-Leibler divergence from the reference's distribution at each step, in nats."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


# --- one model ----------------------------------------------------------------------------------


def generate(
    path: Path,
    prompt: Sequence[int],
    count: int,
    options: AuditOptions,
    *,
    noises: Sequence[Noise],
    progress: Progress,
    scratch: Path,
    caches: Mapping[str, str] | None = None,
    given: Arrays | None = None,
) -> GenerationReport:
    """Compare the greedy text of every backend with the reference's.

    Args:
        path: the decoder.
        prompt: token ids.
        count: how many tokens to write.
        options: of an audit: backends, their options, threads, timeout.
        noises: the catalogue.
        progress: told what is being done.
        scratch: a folder for temporary files.
        caches: outputs by the inputs that they are fed back to, where names do not tell.
        given: inputs that are the same in every run of a decoder with caches, such as what an
            encoder made.

    Raises:
        UsageError: the model is no decoder, or the prompt does not fit it.
    """
    import os

    from auditor.sequences import cached  # it builds on this module

    model = models.load(path)
    fixed = cached.checked(model, given or {})
    if kept := cached.caches_of(model, caches or {}, fixed):
        return cached.generate(
            model,
            kept,
            prompt,
            count,
            options,
            noises=noises,
            progress=progress,
            scratch=scratch,
            given=fixed,
        )
    if fixed:
        hint = "Export it with use_cache=True."
        raise UsageError(f"{path} keeps no caches: --data is for decoders that do", hint)
    decoder = decoder_of(model, len(prompt), count)
    progress.update("reference", "run")
    reference, _ = reference_of(model, options.threads or os.cpu_count() or 1, scratch)
    _check_causal(reference, decoder, prompt)

    def run(feeds: Arrays) -> Arrays:
        progress.update("reference", "write")
        return reference.run(feeds)

    text = greedy(run, decoder, prompt, count)
    forced = decoder.feeds([*prompt, *text[:-1]])
    expected = reference.run(forced)
    reference.release()
    truth = _Truth(model, reference, decoder, list(prompt), text, forced, expected)
    parts = [_one(spec, truth, options, noises, progress, scratch) for spec in options.backends]
    return GenerationReport(
        model=model.info,
        prompt=tuple(prompt),
        text=tuple(text),
        length=decoder.length,
        backends=tuple(parts),
    )


def _check_causal(reference: Reference, decoder: Decoder, prompt: Sequence[int]) -> None:
    """Refuse a model that looks at what is behind the text.

    Raises:
        UsageError: it does, or its output is no distribution over tokens for each place.
    """
    first = reference.run(decoder.feeds(prompt))[decoder.logits]
    if first.ndim != 3 or first.shape[:2] != (1, decoder.length) or first.dtype.kind != "f":
        shape = models.shown(first.shape)
        raise UsageError(
            f"output `{decoder.logits}` has the shape {shape}, not 1x{decoder.length}xVOCABULARY",
            "Give a decoder that returns logits for every place.",
        )
    other = reference.run(decoder.feeds(prompt, pad=1))[decoder.logits]
    if not np.array_equal(first[0, : len(prompt)], other[0, : len(prompt)]):
        raise UsageError(
            "what stands behind the text changes the logits before it: the model is not causal",
            "Give a decoder; encoders are audited with audit MODEL.",
        )


@dataclass(frozen=True, slots=True)
class _Truth:
    """The reference's side."""

    model: Model
    reference: Reference
    decoder: Decoder
    prompt: Tokens
    text: Tokens
    forced: Arrays  # the inputs with its whole text
    expected: Arrays

    def steps(self, outputs: Arrays) -> Logits:
        return steps_of(outputs, self.decoder, len(self.prompt), len(self.text))


def _one(
    spec: BackendSpec,
    truth: _Truth,
    options: AuditOptions,
    noises: Sequence[Noise],
    progress: Progress,
    scratch: Path,
) -> Generation:
    """One backend's text, and what turned it."""
    model, decoder = truth.model, truth.decoder
    with workers([spec.id], options.limits) as (worker,):
        tracer = Tracer(spec.label, worker, options.timeout, progress)
        if tracer.start():
            tracer.build(request_for(spec, options, model, truth.forced, worker.workdir))
        outputs = None if tracer.gap else tracer.plain(truth.forced)
        if outputs is None:
            return Generation(spec.label, gap=tracer.gap)
        ours, theirs = truth.steps(truth.expected), truth.steps(outputs)
        steps = compared(truth.text, ours, theirs)
        turned = [s.number for s in steps if not s.same]
        own = list(truth.text)
        if turned:  # up to there both wrote the same, so both saw the same
            at = turned[0]
            own[at] = int(theirs[at].argmax())
            try:
                done = [*truth.prompt, *own[: at + 1]]
                own[at + 1 :] = greedy(plain_runs(tracer), decoder, done, len(own) - at - 1)
            except BackendError:
                return Generation(spec.label, gap=tracer.gap)
        trace = tracer.sample(truth.forced, last=True)
        if trace is None:
            return Generation(spec.label, gap=tracer.gap)
        analysis = Analysis(
            tracer, truth.reference, {n: n for n in truth.reference.graph.producer}, noises
        )
        analysis.add(0, truth.forced, truth.expected, trace)
        part = summary.report(analysis, spec.device or "")
        effects: tuple[LayerEffect, ...] = ()
        kept, gap = None, None
        if turned:
            try:
                emulated = _Emulated(truth, analysis, trace.tensors, _turned(steps))
                effects = emulated.effects(progress)
                kept = emulated.kept(effects, progress)
                kept = _built(
                    kept, emulated, truth, tracer, part.categories, spec, options, scratch
                )
            except ReplayError as error:
                gap = Gap(
                    spec.label, "layers", f"which layers matter is not known: {error.message}"
                )
        return Generation(
            spec.label,
            text=tuple(own),
            steps=tuple(steps),
            first=turned[0] if turned else None,
            relative_l2=part.outputs[0].distance.relative_l2 if part.outputs else None,
            categories=part.categories,
            unexplained_share=part.unexplained_share,
            fidelity=part.fidelity,
            provenance=tracer.provenance,
            effects=effects,
            kept=kept,
            gap=gap,
        )


def plain_runs(tracer: Tracer) -> Callable[[Arrays], Arrays]:
    """Runs of a backend's plain program; they raise ``BackendError`` once the backend has a gap."""

    def run(feeds: Arrays) -> Arrays:
        outputs = None if tracer.gap else tracer.plain(feeds)
        if outputs is None:
            raise BackendError(tracer.gap.reason if tracer.gap else "", stage="run")
        return outputs

    return run


def compared(text: Sequence[int], ours: Logits, theirs: Logits) -> list[GenerationStep]:
    """A backend's decisions beside those that made a text, step by step."""
    kl = divergence_nats(ours, theirs)
    found = []
    for number, token in enumerate(text):
        other = int(theirs[number].argmax())
        best = np.sort(ours[number])[-2:]
        found.append(
            GenerationStep(
                number,
                token,
                other,
                float(best[1] - best[0]),
                _lead(theirs[number], token),
                float(kl[number]),
                float(np.linalg.norm(theirs[number] - ours[number]) / np.linalg.norm(ours[number])),
            )
        )
    return found


def _lead(logits: NDArray[np.float64], token: int) -> float:
    """How far a token's logit is above all others'."""
    others = np.delete(logits, token)
    return float(logits[token] - others.max())


# --- which layers -------------------------------------------------------------------------------


class Frozen:
    """The backend as the reference with every segment's own error added, frozen.

    With all errors it gives the backend's tensors; without those of some layers it says what
    computing these exactly would bring.

    Attributes:
        chain: the segments; ``patches``: their errors, by id; ``layers``: them by layer.
    """

    def __init__(
        self,
        model: Model,
        reference: Reference,
        cuts: tuple[Cut, ...],
        feeds: Arrays,
        tensors: Arrays,
        finals: tuple[str, ...],
    ) -> None:
        """Measure every segment's error.

        Args:
            model: what was audited.
            reference: the reference.
            cuts: the segments.
            feeds: what the backend was fed, in the reference's types.
            tensors: what was captured then.
            finals: the outputs to look at.

        Raises:
            ReplayError: the reference cannot follow the backend's tensors.
        """
        replayer = reference.replayer
        captured = feeds | reference.wide(tensors)
        base = replayer.walk(cuts, feeds)
        self.chain = Chain(replayer, cuts, feeds, base, captured, finals)
        self.patches: dict[str, Patch] = {}
        for cut in cuts:
            local = divergence.replay(replayer, cut, captured)
            self.patches[cut.id] = _frozen(local.error, local.observed)
        self.layers: dict[str, list[Cut]] = {}
        name = _Names(model, reference)
        for cut in cuts:
            self.layers.setdefault(name.of(cut), []).append(cut)

    def alone(self, layer: str) -> Arrays:
        """The outputs that the reference gives with the errors of one layer."""
        return self.chain.final({cut.id: self.patches[cut.id] for cut in self.layers[layer]})


class _Emulated(Frozen):
    """That of a whole text, with what the decisions in it need."""

    def __init__(
        self, truth: _Truth, analysis: Analysis, tensors: Arrays, turned: dict[int, int]
    ) -> None:
        """Measure; ``turned``: by step at which the backend decided otherwise, its token."""
        super().__init__(
            truth.model,
            truth.reference,
            analysis.cuts,
            truth.forced,
            tensors,
            (truth.decoder.logits,),
        )
        self.turned = turned
        self._truth = truth
        self._ours = truth.steps(truth.expected)

    def effects(self, progress: Progress) -> tuple[LayerEffect, ...]:
        """What each layer's error alone does to the turned decisions, most harmful first."""
        found = []
        for layer, cuts in self.layers.items():
            progress.update("reference", f"effect of {layer}")
            steps = self._truth.steps(self.alone(layer))
            changes = [self._margin(steps, n) - self._margin(self._ours, n) for n in self.turned]
            shares = [
                -change / max(self._margin(self._ours, n), 1e-12)
                for change, n in zip(changes, self.turned, strict=True)
            ]
            found.append(LayerEffect(layer, len(cuts), changes[0], max(shares)))
        return tuple(sorted(found, key=lambda effect: -effect.harm))

    def kept(self, effects: Sequence[LayerEffect], progress: Progress) -> KeptLayers:
        """The fewest layers, of the most harmful ones, without whose errors all decisions hold."""
        names = [effect.layer for effect in effects]
        low, high = 0, len(names)
        while high - low > 1:  # with ``low`` of them kept something turns, with ``high`` nothing
            middle = (low + high) // 2
            progress.update("reference", f"without the errors of {middle} layers")
            low, high = (low, middle) if self.holds(names[:middle]) else (middle, high)
        chosen = names[:high]
        for name in reversed(chosen[:-1] if high <= _PRUNED else ()):
            fewer = [n for n in chosen if n != name]
            if self.holds(fewer):
                chosen = fewer
        return KeptLayers(tuple(chosen), len(names))

    def holds(self, exact: Sequence[str]) -> bool:
        """Whether every decision is the reference's when these layers are exact."""
        left = {
            cut.id: self.patches[cut.id]
            for layer, cuts in self.layers.items()
            for cut in cuts
            if layer not in exact
        }
        steps = self._truth.steps(self.chain.final(left))
        for number, token in enumerate(self._truth.text):
            least = RESERVE * _lead(self._ours[number], token) if number in self.turned else 0.0
            if _lead(steps[number], token) <= least:
                return False
        return True

    def nodes(self, layers: Sequence[str]) -> set[int]:
        """Indices of the nodes of some layers."""
        return {i for name in layers for cut in self.layers[name] for i in cut.nodes}

    def _margin(self, steps: Logits, number: int) -> float:
        return float(steps[number, self._truth.text[number]] - steps[number, self.turned[number]])


_PRUNED = 12  # with more layers than this it is not tried whether one of them can be left out


class _Names:
    """Which layer a segment belongs to: its module, or its node's name, up to the first number."""

    def __init__(self, model: Model, reference: Reference) -> None:
        self._graph = reference.graph
        self._labels = reference.labels
        self._origins = origins.of(model)

    def of(self, cut: Cut) -> str:
        keys = [models.key(self._graph.nodes[i]) for i in reversed(cut.nodes)]
        module = next((o.module for k in keys if (o := self._origins.get(k)) and o.module), None)
        return numbered(module or self._labels.get(keys[0], keys[0]))


def numbered(name: str) -> str:
    """A name up to the first number in it, which is that of the layer."""
    found = _NUMBERED.match(name)
    return found[0] if found else name


def _frozen(error: Arrays, observed: Arrays) -> Patch:
    return lambda outputs, _: add(outputs, error, observed)


def _turned(steps: Sequence[GenerationStep]) -> dict[int, int]:
    return {step.number: step.other for step in steps if not step.same}


# --- built in pieces ----------------------------------------------------------------------------


def _built(
    kept: KeptLayers,
    emulated: _Emulated,
    truth: _Truth,
    tracer: Tracer,
    categories: Sequence[CategoryShare],
    spec: BackendSpec,
    options: AuditOptions,
    scratch: Path,
) -> KeptLayers:
    """Build the model in pieces, the kept layers with the option that avoids the cause, and run."""
    avoiding = avoiding_options(tracer, categories, spec)
    if avoiding is None:
        return replace(kept, failure="the backend has no option that avoids the causes named")
    made = pieces.split(truth.reference.graph, emulated.nodes(kept.layers))
    kept = replace(kept, options=avoiding, pieces=len(made))
    replayer, values = truth.reference.replayer, dict(truth.forced)
    seen = replayer.walk([piece.cut for piece in made], truth.forced)  # learns types and shapes
    try:
        for piece in made:
            cut = piece.cut
            proto = truth.reference.graph.extract(
                cut, replayer.types, replayer.shapes, truth.model.weights
            )
            path = scratch / f"{spec.id}-{cut.id}.onnx"
            onnx.save(proto, path)
            request = request_for(
                spec, options, truth.model, {n: seen[n] for n in cut.inputs}, tracer.worker.workdir
            )
            given = request.options | (avoiding if piece.chosen else {})
            run = Tracer(tracer.id, tracer.worker, tracer.timeout, tracer.progress)
            run.build(replace(request, model_path=path, dynamic=False, options=given))
            outputs = None if run.gap else run.plain({n: values[n] for n in cut.inputs})
            path.unlink()
            if outputs is None:
                reason = run.gap.reason if run.gap else ""
                return replace(kept, failure=f"piece {cut.id} of {len(made)}: {reason}")
            values |= truth.reference.wide(outputs)
    except (UsageError, ReplayError) as error:
        return replace(kept, failure=error.message)
    steps = compared(truth.text, truth.steps(truth.expected), truth.steps(values))
    return replace(
        kept,
        turned=sum(not step.same for step in steps),
        kl=max(step.kl for step in steps),
    )


def avoiding_options(
    tracer: Tracer, categories: Sequence[CategoryShare], spec: BackendSpec
) -> dict[str, str] | None:
    """Engine options that leave out the cause with the largest share that has any."""
    catalogue = {noise.id: noise for noise in discovery.noises()}
    for category in sorted(categories, key=lambda c: -c.share):
        about = [s for s in tracer.switches if category.noise in s.noises]
        if about:
            return dict(min(about, key=lambda s: len(s.noises)).options)
        if found := catalogue[category.noise].ablations.get(spec.id):
            return dict(found)
    return None
