"""How a decoder that keeps caches is run: which output is fed back to which input, step by step.

Inputs and outputs are paired by the names that optimum and transformers give them, else by their
order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.graphs.shapes import BATCH_NAME
from auditor.sequences.decisions import Logits

if TYPE_CHECKING:
    from auditor.graphs.model import Model, TensorSpec
    from auditor.ports import Array, Arrays

Run = Callable[["Arrays"], "Arrays"]

_PAST = re.compile(r"^past(_key_values?)?[._]")
_PRESENT = re.compile(r"^present(_key_values?)?[._]")


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
    free = [n for n in model.outputs if n != logits_of(model) and n not in named.values()]
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


def logits_of(model: Model) -> str:
    """The output with a number for each token of the vocabulary."""
    return next((n for n in model.outputs if "logits" in n.lower()), model.outputs[0])


def _axis(spec: TensorSpec) -> int | None:
    """The axis of a cache that grows: the one that is open beside the batch."""
    found = [
        axis
        for axis, size in enumerate(spec.shape)
        if axis and not isinstance(size, int) and not BATCH_NAME.search(size or "")
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
    return Decoder(ids[0], mask, tuple(positions), logits_of(model), caches, branch, given)


# --- writing --------------------------------------------------------------------------------------


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
