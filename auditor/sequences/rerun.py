"""Greedy text of a decoder without caches, by runs of a fixed length.

The text is written by plain re-runs of one program with a fixed length: the tokens so far, and
padding behind them. That a decoder does not look at what is behind is checked on the reference
with two paddings; it is also why one forced run shows all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from auditor import pieces
from auditor.analysis import Analysis
from auditor.capture.trace import denied
from auditor.errors import BackendError, UsageError
from auditor.graphs import model as models
from auditor.options import BackendSpec
from auditor.records.backend import Gap
from auditor.records.generation import (
    Generation,
    GenerationReport,
    GenerationStep,
    KeptLayers,
    LayerEffect,
)
from auditor.records.measured import CategoryShare
from auditor.replays.replay import ReplayError
from auditor.sequences.decisions import Logits, Tokens, compared, judged, lead
from auditor.sequences.layers import Frozen, avoiding_options
from auditor.sequences.runs import Harness, Program, built
from auditor.verdict import summary

if TYPE_CHECKING:
    from auditor.graphs.model import Model, TensorSpec
    from auditor.graphs.segments import Cut
    from auditor.ports import Arrays, Progress
    from auditor.replays.reference import Reference

# Of the reference's margin at a step that a backend turned, the part that must be left for the step
# to be out of reach; elsewhere the decision alone must hold.
_RESERVE = 0.5
_PRUNED = 12  # with more layers than this it is not tried whether one of them can be left out


@dataclass(frozen=True, slots=True)
class Decoder:
    """How a model takes and gives tokens.

    Attributes:
        ids, mask, positions: names of its inputs; the latter two may be missing.
        logits: name of the output, ``[1, length, vocabulary]``.
        types: numpy types of the inputs.
        length: tokens that one run takes.
        pad: the token behind the text.
        given: inputs that are the same in every run.
    """

    ids: str
    mask: str | None
    positions: str | None
    logits: str
    types: dict[str, np.dtype[Any]]
    length: int
    pad: int = 0
    given: Arrays = field(default_factory=dict)

    def feeds(self, tokens: Sequence[int], pad: int | None = None) -> Arrays:
        """The inputs of a run on some tokens."""
        row = np.full((1, self.length), self.pad if pad is None else pad)
        row[0, : len(tokens)] = tokens
        feeds: Arrays = {self.ids: row.astype(self.types[self.ids]), **self.given}
        if self.mask:
            seen = np.arange(self.length)[None] < len(tokens)
            feeds[self.mask] = seen.astype(self.types[self.mask])
        if self.positions:
            places = np.arange(self.length)[None]
            feeds[self.positions] = places.astype(self.types[self.positions])
        return feeds


def decoder_of(model: Model, prompt: int, tokens: int, given: Arrays | None = None) -> Decoder:
    """Find a decoder's output, and its inputs beside what is ``given``.

    Raises:
        UsageError: the model is none, or is too short for so many tokens.
    """
    given = given or {}
    places: dict[str, TensorSpec] = {}
    for spec in (s for s in model.inputs if s.name not in given):
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
        given=given,
    )


# --- writing --------------------------------------------------------------------------------------


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


# --- one model ------------------------------------------------------------------------------------


def generate(
    model: Model,
    prompt: Sequence[int],
    count: int,
    harness: Harness,
    given: Arrays,
) -> GenerationReport:
    """Compare the greedy text of every backend with the reference's (see ``generate``).

    Raises:
        UsageError: the model is no decoder, or the prompt does not fit it.
    """
    decoder = decoder_of(model, len(prompt), count, given)
    harness.progress.update("reference", "run")
    reference = harness.reference(model)
    _check_causal(reference, decoder, prompt)

    def run(feeds: Arrays) -> Arrays:
        harness.progress.update("reference", "write")
        return reference.run(feeds)

    text = greedy(run, decoder, prompt, count)
    forced = decoder.feeds([*prompt, *text[:-1]])
    expected = reference.run(forced)
    reference.release()
    truth = _Truth(model, reference, decoder, list(prompt), text, forced, expected)
    parts = [_one(spec, truth, harness) for spec in harness.options.backends]
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


def _one(spec: BackendSpec, truth: _Truth, harness: Harness) -> Generation:
    """One backend's text, and what turned it."""
    forced = truth.forced
    with built(spec, harness, truth.model, forced) as program:
        tracer = program.tracer
        try:
            ours, theirs = truth.steps(truth.expected), truth.steps(program.run(forced))
            steps = compared(truth.text, ours, theirs)
            turned = [s.number for s in steps if not s.same]
            own = list(truth.text)
            if turned:  # up to there both wrote the same, so both saw the same
                at = turned[0]
                own[at] = int(theirs[at].argmax())
                done = [*truth.prompt, *own[: at + 1]]
                own[at + 1 :] = greedy(program.run, truth.decoder, done, len(own) - at - 1)
            analysis, tensors = program.analysed(truth.reference, forced, truth.expected, last=True)
        except BackendError:
            return Generation(spec.label, gap=tracer.gap)
        part = summary.report(analysis, spec.device or "")
        effects: tuple[LayerEffect, ...] = ()
        kept, gap = None, denied(spec.label, tracer.provenance)
        if turned:
            try:
                emulated = _Emulated(truth, analysis, tensors, _turned(steps))
                effects = emulated.effects(harness.progress)
                kept = emulated.kept(effects, harness.progress)
                kept = _built(kept, emulated, truth, program, part.categories)
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


# --- which layers ---------------------------------------------------------------------------------


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
            least = _RESERVE * lead(self._ours[number], token) if number in self.turned else 0.0
            if lead(steps[number], token) <= least:
                return False
        return True

    def nodes(self, layers: Sequence[str]) -> set[int]:
        """Indices of the nodes of some layers."""
        return {i for name in layers for cut in self.layers[name] for i in cut.nodes}

    def _margin(self, steps: Logits, number: int) -> float:
        return float(steps[number, self._truth.text[number]] - steps[number, self.turned[number]])


def _turned(steps: Sequence[GenerationStep]) -> dict[int, int]:
    return {step.number: step.other for step in steps if not step.same}


# --- built in pieces ------------------------------------------------------------------------------


def _built(
    kept: KeptLayers,
    emulated: _Emulated,
    truth: _Truth,
    program: Program,
    categories: Sequence[CategoryShare],
) -> KeptLayers:
    """Build the model in pieces, the kept layers with the option that avoids the cause, and run."""
    avoiding = avoiding_options(program.tracer, categories, program.spec)
    if avoiding is None:
        return replace(kept, failure="the backend has no option that avoids the causes named")
    reference, values = truth.reference, dict(truth.forced)
    made = pieces.split(reference.graph, emulated.nodes(kept.layers))
    kept = replace(kept, options=avoiding, pieces=len(made))
    replayer = reference.replayer
    replayer.walk([piece.cut for piece in made], truth.forced)  # learns types and shapes

    def reads(cut: Cut, _: int) -> Arrays:
        return {name: values[name] for name in cut.inputs}

    try:
        failure = program.in_pieces(reference, made, replayer.shapes, avoiding, [values], reads)
    except (UsageError, ReplayError) as error:
        failure = error.message
    if failure is not None:
        return replace(kept, failure=failure)
    return judged(kept, compared(truth.text, truth.steps(truth.expected), truth.steps(values)))
