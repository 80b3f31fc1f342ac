"""A model that keeps a state between its runs, over a stream: where each backend's state leads.

Every step takes a piece of the stream and the states that the step before left. Each side has
states of its own, so an error stays, and grows or fades. One further run of the reference, on the
backend's states, tells the two parts of a step's error apart: what came with the states, and what
the step adds.

States are found by their names (``h``/``hn``, ``state``/``stateN``, ``past``/``present``,
``cache_in``/``cache_out``), or are named by the user. They begin as zeros.
"""

from __future__ import annotations

import re
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from auditor import datafiles, stimulus
from auditor.capture.trace import denied
from auditor.comparison import metrics, tasks
from auditor.errors import BackendError, UsageError, suggestion
from auditor.graphs import model as models
from auditor.options import BackendSpec
from auditor.records.backend import Gap
from auditor.records.stream import Streamed, StreamReport, StreamStep
from auditor.sequences.runs import Harness, built
from auditor.verdict import summary

if TYPE_CHECKING:
    from auditor.graphs.model import Model, Shape, TensorSpec
    from auditor.ports import Array, Arrays, Progress
    from auditor.replays.reference import Reference

Run = Callable[["Arrays"], "Arrays"]

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
# Words that tell the two ends of a state apart, and not which state it is.
_ENDS = {
    *("in", "input", "old", "prev", "previous", "past", "init", "initial", "last"),
    *("n", "new", "next", "out", "output", "present", "updated", "cur", "current"),
}


def states_of(model: Model, named: Mapping[str, str]) -> dict[str, str]:
    """Pair the inputs that are states with the outputs that they come from.

    Args:
        model: any model.
        named: outputs by input, as far as the user says it.

    Raises:
        UsageError: there is no such input or output, or no state at all.
    """
    models.check_pairs(model, named, "--state")
    pairs = dict(named)
    for name in (spec.name for spec in model.inputs):
        free = [output for output in model.outputs if output not in pairs.values()]
        same = [output for output in free if _of_one_state(name, output)]
        if name not in pairs and len(same) == 1:
            pairs[name] = same[0]
    if not pairs:
        outputs = ", ".join(f"`{output}`" for output in model.outputs)
        raise UsageError(
            f"no input of {model.path} looks like a state that an output gives back",
            f"Name it: --state INPUT=OUTPUT. The outputs are {outputs}.",
        )
    return pairs


def _of_one_state(name: str, output: str) -> bool:
    a, b = (_words(text) for text in (name, output))
    return name != output and (a == b != [] or output.lower() in (f"{name.lower()}n", f"n{name}"))


def _words(name: str) -> list[str]:
    return [word for word in map(str.lower, _WORDS.findall(name)) if word not in _ENDS]


# --- what is fed --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stream:
    """What goes in beside the states: ``steps[i]`` by input; ``source`` says what it is."""

    steps: tuple[Arrays, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user says of the stream.

    Attributes:
        data: a file with one array for each input that is no state: steps stacked on the first
            axis, or of the input's own rank where it is the same in every step.
        wave: a sound, instead: a .wav file, cut into frames of ``frame`` samples, each behind the
            last ``context`` samples of the one before.
        values: single numbers for inputs, such as a sample rate.
        steps: how many at most.
        seed: of what is drawn for the inputs that nothing else gives.
        threshold: of a probability.
    """

    data: Path | None = None
    wave: Path | None = None
    frame: int | None = None
    context: int = 0
    values: Mapping[str, float] | None = None
    shapes: Mapping[str, Shape] | None = None
    output: str | None = None
    steps: int = 64
    seed: int = 0
    threshold: float = 0.5


def stream_of(model: Model, states: Mapping[str, str], asked: Asked) -> Stream:
    """The inputs of every step, states left out.

    Raises:
        UsageError: they don't fit the model, or nothing says what an input is.
    """
    specs = {spec.name: spec for spec in model.inputs if spec.name not in states}
    given: dict[str, Array] = {}
    source = f"seeded random numbers, seed {asked.seed}"
    for name, number in (asked.values or {}).items():
        if name not in specs:
            raise UsageError(
                f"--set names `{name}`, which is no input beside the states",
                suggestion(name, specs),
            )
        shape = [d if isinstance(d, int) else 1 for d in specs[name].shape]
        given[name] = np.full(shape, number).astype(specs[name].dtype)[None]
    if asked.data is not None:
        source = str(asked.data)
        for name, stored in datafiles.read(asked.data, "--data").items():
            if name in specs:  # what is recorded of states is not needed
                given[name] = _steps_in(specs[name], stored.read(None), asked.data)
    if asked.wave is not None:
        sound = _wave(asked.wave)
        spec = _sounding(model, [s for n, s in specs.items() if n not in given])
        given[spec.name] = _frames(spec, sound, asked)
        after = f", each after the last {asked.context} samples" if asked.context else ""
        size = given[spec.name].shape[-1] - asked.context
        source = f"{asked.wave} in frames of {size}{after}"
    lengths = {len(value) for value in given.values() if len(value) > 1}
    if len(lengths) > 1:
        raise UsageError(
            f"the inputs have {' and '.join(map(str, sorted(lengths)))} steps",
            "Record the same number of steps of every input.",
        )
    count = min(lengths.pop() if lengths else asked.steps, asked.steps)
    missing = [name for name in specs if name not in given]
    drawn = stimulus.load(model, None, asked.seed, count, asked.shapes or {}) if missing else None
    if drawn is not None and given:
        source += "; drawn: " + ", ".join(f"`{name}`" for name in missing)

    def step(number: int) -> Arrays:
        made = drawn.sample(number) if drawn is not None else {}
        fed = {name: made[name] for name in missing}
        return fed | {n: np.asarray(v[number if len(v) > 1 else 0]) for n, v in given.items()}

    return Stream(tuple(step(number) for number in range(count)), source)


def _steps_in(spec: TensorSpec, values: Array, path: Path) -> Array:
    if values.ndim not in (len(spec.shape), len(spec.shape) + 1):
        raise UsageError(
            f"{path} has `{spec.name}` of shape {models.shown(values.shape)} for input {spec}",
            "Stack the steps on a new first axis, or give one array for all steps.",
        )
    stacked = values if values.ndim > len(spec.shape) else values[None]
    return np.asarray(stacked.astype(spec.dtype))


def _sounding(model: Model, specs: Sequence[TensorSpec]) -> TensorSpec:
    """The input that takes the sound."""
    found = [s for s in specs if s.dtype.kind == "f" and s.shape]
    if len(found) != 1:
        raise UsageError(
            f"{model.path} has {len(found)} inputs of floats beside its states, so --wave is not "
            "clear",
            "Give the inputs with --data.",
        )
    return found[0]


def _wave(path: Path) -> Array:
    """A sound as float32 in [-1, 1), one channel.

    Raises:
        UsageError: it is no uncompressed .wav file.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise UsageError(
            f"--wave {path} cannot be read: {str(error) or 'it is too short'}",
            "Give an uncompressed .wav file.",
        ) from error
    types = {1: (np.uint8, 128, 128), 2: (np.int16, 0, 2**15), 4: (np.int32, 0, 2**31)}
    if width not in types:
        raise UsageError(f"--wave {path} has {8 * width} bits a sample", "Give 8, 16 or 32 bits.")
    dtype, zero, scale = types[width]
    samples = np.frombuffer(raw, dtype).reshape(-1, channels).astype(np.float64)
    return np.asarray(((samples - zero) / scale).mean(axis=1), np.float32)


def _frames(spec: TensorSpec, sound: Array, asked: Asked) -> Array:
    """``[steps, *shape]`` of an input whose last axis is time."""
    fixed, context = spec.shape[-1], asked.context
    size = asked.frame or (fixed - context if isinstance(fixed, int) else 0)
    if size <= 0 or (isinstance(fixed, int) and size + context != fixed):
        raise UsageError(
            f"input {spec} does not say how many samples a step takes",
            "Give --frame N, and --context N where each frame begins with the last of the one "
            "before.",
        )
    count = len(sound) // size
    if not count:
        raise UsageError(
            f"--wave {asked.wave} has {len(sound)} samples, less than one frame of {size}",
            "Give a longer sound.",
        )
    padded = np.concatenate([np.zeros(context, np.float32), sound])
    rows = [padded[i * size : i * size + size + context] for i in range(min(count, asked.steps))]
    shape = [1] * (len(spec.shape) - 1) + [size + context]
    return np.stack(rows).reshape(len(rows), *shape).astype(spec.dtype)


# --- one model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Truth:
    """The reference's side."""

    model: Model
    reference: Reference
    states: Mapping[str, str]
    output: str
    stream: Stream
    first: Arrays  # the states before the first step
    outputs: tuple[Arrays, ...]  # output and states after every step
    decides: Callable[[Array], tuple[tuple[int, ...], float]] | None

    def feeds(self, number: int, before: Arrays | None) -> Arrays:
        """The inputs of a step; ``before``: the outputs of the one before."""
        if before is None:
            return self.stream.steps[number] | self.first
        given = {spec.name: spec.dtype for spec in self.model.inputs}
        states = {n: before[o].astype(given[n], copy=False) for n, o in self.states.items()}
        return self.stream.steps[number] | states

    def kept(self, outputs: Arrays) -> Arrays:
        return {name: outputs[name] for name in (self.output, *self.states.values())}


def stream(
    path: Path,
    asked: Asked,
    named: Mapping[str, str],
    harness: Harness,
    *,
    save: Path | None = None,
) -> StreamReport:
    """Run a stream through the reference and every backend, each with its own states.

    Args:
        path: the model.
        asked: what is fed.
        named: outputs by the inputs that they are fed back to, where names do not tell.
        harness: the backends, and what all runs share.
        save: a .npz file for the inputs of the step that was looked at, of the last backend.

    Raises:
        UsageError: the model has no state, or the stream does not fit it.
    """
    model = models.load(path)
    states = states_of(model, named)
    fed = stream_of(model, states, asked)
    output = asked.output or next((n for n in model.outputs if n not in states.values()), "")
    if output not in model.outputs:
        raise UsageError(
            f"{path} has no output {f'`{output}`' if output else 'beside its states'}",
            suggestion(output, model.outputs) or "Name one with --output-name.",
        )
    harness.progress.update("reference", "run")
    reference = harness.reference(model)
    first = _beginning(model, reference, states, fed)
    truth = _Truth(model, reference, states, output, fed, first, (), None)
    outputs: list[Arrays] = []
    for number in range(len(fed.steps)):
        harness.progress.update("reference", f"step {number + 1} of {len(fed.steps)}")
        feeds = truth.feeds(number, outputs[-1] if outputs else None)
        outputs.append(truth.kept(reference.run(feeds)))
    decides = _decision(output, [o[output] for o in outputs], asked.threshold)
    truth = _Truth(model, reference, states, output, fed, first, tuple(outputs), decides)
    parts = [_one(spec, truth, harness, save) for spec in harness.options.backends]
    return StreamReport(model.info, tuple(states.items()), output, fed.source, tuple(parts))


def _beginning(
    model: Model, reference: Reference, states: Mapping[str, str], fed: Stream
) -> Arrays:
    """Zeros, of the sizes that the states have after a step where the model leaves them open.

    Raises:
        UsageError: what a step gives back cannot go in again.
    """
    specs = {spec.name: spec for spec in model.inputs}

    def zeros(shapes: Mapping[str, Sequence[int]]) -> Arrays:
        return {name: np.zeros(shapes[name], specs[name].dtype) for name in states}

    guess = {n: tuple(d if isinstance(d, int) else 1 for d in specs[n].shape) for n in states}
    first = zeros(guess)
    after = reference.run(fed.steps[0] | first)
    for name, output in states.items():
        shape, wanted = after[output].shape, specs[name].shape
        if len(shape) != len(wanted) or any(
            isinstance(w, int) and w != d for w, d in zip(wanted, shape, strict=True)
        ):
            raise UsageError(
                f"output `{output}` has the shape {models.shown(shape)}, which input {specs[name]} "
                "does not take back",
                "Name the pairs with --state INPUT=OUTPUT.",
            )
    return zeros({name: after[output].shape for name, output in states.items()})


def _decision(
    name: str, values: Sequence[Array], threshold: float
) -> Callable[[Array], tuple[tuple[int, ...], float]] | None:
    """How an output is read as a decision, and how far it is from another; None where it is not.

    One number between 0 and 1 is a probability; scores decide by the largest in each row.
    """
    if all(v.size == 1 and 0 <= float(v.reshape(())) <= 1 for v in values):

        def above(value: Array) -> tuple[tuple[int, ...], float]:
            p = float(value.reshape(()))
            return (int(p > threshold),), abs(p - threshold)

        return above
    if tasks.assume(name, values[0]) != "scores":
        return None

    def largest(value: Array) -> tuple[tuple[int, ...], float]:
        rows = np.sort(value.reshape(-1, value.shape[-1]).astype(np.float64))
        best = value.reshape(-1, value.shape[-1]).argmax(axis=1)
        return tuple(map(int, best)), float((rows[:, -1] - rows[:, -2]).min())

    return largest


def _one(spec: BackendSpec, truth: _Truth, harness: Harness, save: Path | None) -> Streamed:
    """One backend over the stream, and what causes the error of one step."""
    reference, names = truth.reference, (truth.output, *truth.states.values())
    with built(spec, harness, truth.model, truth.feeds(0, None)) as program:
        tracer = program.tracer
        try:
            steps, fed = _steps(program.run, truth, harness.progress)
            looked = next((s.number for s in steps if not s.same), None)
            if looked is None:
                looked = max(steps, key=lambda s: s.relative_l2).number
            expected = reference.run(fed[looked])
            wanted = {name: expected[name] for name in names}
            analysis, _ = program.analysed(reference, fed[looked], wanted, last=True)
        except BackendError as error:
            return Streamed(spec.label, gap=tracer.gap or Gap(spec.label, "run", error.message))
        if save is not None:
            np.savez(save, **fed[looked])  # type: ignore[arg-type]
        part = summary.report(analysis, spec.device or "")
        return Streamed(
            spec.label,
            steps=tuple(steps),
            looked=looked,
            categories=part.categories,
            unexplained_share=part.unexplained_share,
            fidelity=part.fidelity,
            provenance=tracer.provenance,
            gap=denied(spec.label, tracer.provenance),
        )


def _steps(run: Run, truth: _Truth, progress: Progress) -> tuple[list[StreamStep], list[Arrays]]:
    """Every step, and what the backend was fed in it."""
    found: list[StreamStep] = []
    fed: list[Arrays] = []
    theirs: Arrays | None = None
    output, kept = truth.output, tuple(truth.states.values())
    for number, ours in enumerate(truth.outputs):
        progress.update("reference", f"step {number + 1} of {len(truth.outputs)}")
        fed.append(truth.feeds(number, theirs))
        theirs = truth.kept(run(fed[-1]))
        between = truth.reference.run(fed[-1])[output].astype(np.float64)
        was, now = (v[output].astype(np.float64) for v in (ours, theirs))
        norm = float(np.linalg.norm(was)) or 1.0
        decision, margin = truth.decides(ours[output]) if truth.decides else ((), None)
        other, after = truth.decides(theirs[output]) if truth.decides else ((), None)
        found.append(
            StreamStep(
                number=number,
                decision=decision,
                other=other,
                margin=margin,
                margin_after=after if after is None or other == decision else -after,
                relative_l2=float(np.linalg.norm(now - was)) / norm,
                states=metrics.relative_l2(theirs, ours, kept),
                inherited=float(np.linalg.norm(between - was)) / norm,
                introduced=float(np.linalg.norm(now - between)) / norm,
            )
        )
    return found, fed
