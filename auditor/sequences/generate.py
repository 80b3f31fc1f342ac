"""Greedy text of a decoder, on the reference and on backends: where it parts, and why.

A decoder's answer is a chain of decisions, so the size of an error matters less than whether it
turns one of them. The reference writes its greedy text first. A backend is then given that very
text (*forced*), which shows at every step how far its distribution is from the reference's and
whether it would have gone on otherwise, and writes a text of its own (*free*).

A decoder that keeps caches is run as it is deployed (``auditor.sequences.cached``), another at a
fixed length (``auditor.sequences.rerun``).

Why a decision turned is told by the margin at that step, the reference's token over the backend's:
each layer's own error (what its segments introduced, frozen) is put into the reference alone.
Which layers to keep in full precision is found by leaving their errors out of all of them, most
harmful first, until every decision is the reference's again; then the model is really built in
pieces, those layers with the engine's option that avoids the cause, and run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.records.generation import GenerationReport
from auditor.sequences import cached, rerun
from auditor.sequences.caches import caches_of, checked, logits_of
from auditor.sequences.runs import Harness

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.ports import Arrays


def generate(
    path: Path,
    prompt: Sequence[int],
    count: int,
    harness: Harness,
    *,
    caches: Mapping[str, str] | None = None,
    given: Arrays | None = None,
) -> GenerationReport:
    """Compare the greedy text of every backend with the reference's.

    Args:
        path: the decoder.
        prompt: token ids.
        count: how many tokens to write.
        harness: the backends, and what all runs share.
        caches: outputs by the inputs that they are fed back to, where names do not tell.
        given: inputs that are the same in every run, such as what an encoder made.

    Raises:
        UsageError: the model is no decoder, or the prompt does not fit it.
    """
    model = models.load(path)
    _check_prompt(model, prompt)
    fixed = checked(model, given or {})
    if kept := caches_of(model, caches or {}, fixed):
        return cached.generate(model, kept, prompt, count, harness, fixed)
    return rerun.generate(model, prompt, count, harness, fixed)


def _check_prompt(model: Model, prompt: Sequence[int]) -> None:
    logits = next(o for o in model.proto.graph.output if o.name == logits_of(model))
    vocabulary = [d.dim_value for d in logits.type.tensor_type.shape.dim][-1:]
    if vocabulary and 0 < vocabulary[0] <= max(prompt):
        raise UsageError(
            f"token {max(prompt)} of the prompt is not in the model's vocabulary, which ends at "
            f"{vocabulary[0] - 1}",
            "Take token ids of this model's own tokenizer.",
        )
