"""The table of the SysNoise paper for one model and one folder of photographs.

Wang et al., MLSys 2023, sec. 4: every option of every type is switched alone, against the training
pipeline on the ONNX Runtime reference; then the worst options are put together (Fig. 3, sec. 4.2).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from auditor import __version__
from auditor.comparison.tasks import assume
from auditor.errors import UsageError
from auditor.pipeline import networks, options, scoring
from auditor.pipeline.checkpoint import Checkpoint
from auditor.pipeline.libraries import PhotoError
from auditor.pipeline.networks import Form, Networks
from auditor.pipeline.options import PostSwitch, Switch
from auditor.pipeline.photos import oddities
from auditor.pipeline.results import NAME, characters, result
from auditor.pipeline.statistics import Drawn, Means, weights
from auditor.pipeline.steps import Preparation
from auditor.pipeline.sweep import BASE, Read, Sweep, Table, Trial
from auditor.records.backend import Gap
from auditor.records.sysnoise import (
    Interval,
    SysnoiseEffect,
    SysnoiseFlip,
    SysnoiseOption,
    SysnoiseReport,
    SysnoiseStep,
    SysnoiseType,
)

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.pipeline.description import Description
    from auditor.pipeline.photos import Photos
    from auditor.pipeline.post import Post
    from auditor.pipeline.scoring import Task, Verdict
    from auditor.pipeline.stages import Pipeline
    from auditor.ports import Array, Arrays, Noise, Progress
    from auditor.records.terms import OutputKind

_DEPLOYMENT = "deployment"
_CHANCE = 5  # times the accuracy of guessing: below it the labels are not the model's
_ENOUGH = 20  # photographs for that judgement


@dataclass(frozen=True, slots=True)
class _Choice:
    """One option of one type, before or inside the network.

    Attributes:
        type: of the table; ``group`` is that of the combinations.
    """

    type: str
    group: str
    name: str
    tool: str
    change: Switch | Form | PostSwitch

    @property
    def trial(self) -> str:
        return f"{self.type}: {self.name}"


def sysnoise(
    model: Model,
    description: Description,
    photos: Photos,
    noises: Sequence[Noise],
    *,
    keep: Path,
    threads: int | None,
    progress: Progress,
    task: str | None = None,
) -> SysnoiseReport:
    """Measure the table.

    Args:
        model: the network; an image is its only input.
        description: the pipeline; options are switched against its training side.
        photos: what to measure on.
        noises: causes to simulate in the network.
        keep: file for what was measured; removed when all is.
        threads: photographs to process beside each other; None for one a core.
        progress: told how far it is.
        task: what the network is for; None to tell by its result.

    Raises:
        UsageError: no photograph can be used, the network does not take the pipeline's tensor, or
            its result is not what the task needs.
    """
    clock = [time.perf_counter()]
    training = description.training
    first = _first(photos, training)
    tensor = first.tensor(training)
    nets = Networks(model, noises, tensor, progress)
    switches, gaps = options.switches(training)  # loads the libraries
    clock.append(time.perf_counter())
    processor = time.process_time()
    values, post = nets.run((), tensor), description.training_post
    if post is not None:  # or the description does not fit the network
        values = result(values, post, first.place(training))
    read = _read(values, post, task, labelled=bool(photos.labels))
    if read.kind == "text" and post is not None:
        metadata = {entry.key: entry.value for entry in model.proto.metadata_props}
        named = characters(post, metadata, values[NAME].shape[-1])
        read = replace(read, characters=named)
    after = options.post_switches(description.training_post)
    choices = [
        *(_Choice(s.type, s.type, s.name, s.tool, s) for s in switches),
        *(_Choice(f.noise, f.group, f.variant, "simulated", f) for f in nets.forms),
        *(_Choice(s.type, s.type, s.name, s.tool, s) for s in after),
    ]
    base = Trial(BASE, training, post=description.training_post)
    trials = [base, *(_trial([choice], base) for choice in choices)]
    deployed = Trial(_DEPLOYMENT, description.deployment, post=description.deployment_post)
    differs = replace(deployed, name=BASE) != base
    if differs:
        trials.append(deployed)
    checkpoint = Checkpoint(keep, _key(model, description, choices, read))
    finished = False
    try:
        sweep = Sweep(photos, nets, read, checkpoint, threads or os.cpu_count() or 1, progress)
        if read.task is not None and read.task.gallery:
            sweep.collect(base)
        alone = sweep.run(trials)
        if len(alone.failed) == len(photos.names):
            raise UsageError(
                f"no photograph can be used of {len(photos.names)}: {alone.failed[0]}",
                "The training side's decoder must be able to read them.",
            )
        clock.append(time.perf_counter())
        measured = _Measured(alone, photos, read)
        types = measured.types(choices)
        worst = _worst(choices, types)
        together = _together(worst, nets)
        both = sweep.run([base, *(_trial(c, base) for c in together)])
        clock.append(time.perf_counter())
        joint = _Measured(both, photos, read, measured)
        finished = True
    finally:
        checkpoint.close(finished=finished)
    steps = {group: joint.step(group) for group in (*((c,) for c in worst), *together)}
    order = (tuple(worst[:n]) for n in range(1, len(worst) + 1))
    deployment = None
    if differs:
        deployment = measured.option(_DEPLOYMENT, "as described", description.source)
    seconds = dict(zip(("prepare", "alone", "together"), np.diff(clock).tolist(), strict=True))
    seconds["network, all threads"] = sweep.network_seconds
    seconds["processor, all threads"] = time.process_time() - processor
    return SysnoiseReport(
        tool_version=__version__,
        model=str(model.path),
        pipeline=description.source,
        steps=training.steps() | (base.post.steps() if base.post else {}),
        photos=measured.used,
        labelled=measured.labelled,
        output=read.output,
        kind=read.kind,
        metric=read.task.metric if read.task is not None else None,
        accuracy=measured.accuracy,
        deployment=deployment,
        types=types,
        accumulation=tuple(steps[key] for key in order if key in steps),
        pairs=tuple(step for key, step in steps.items() if len(key) == 2),
        flips=measured.flips(choices),
        left_out=tuple(
            Gap(photos.names[i], "decode", why) for i, why in sorted(alone.failed.items())
        ),
        oddities=_oddities(photos, alone),
        gaps=(*gaps, *nets.gaps, *measured.refusals()),
        notes=(
            *description.notes,
            *photos.notes,
            *_remarks(nets, checkpoint),
            *_strangers(photos, values, read),
            *measured.doubts(read),
        ),
        network_runs={networks.name(forms): n for forms, n in sweep.runs.items()},
        seconds=seconds,
    )


def pixels(description: Description, photos: Photos) -> dict[str, Array]:
    """What every single option makes of the first photograph that can be used.

    Returns:
        Title of the option to pixels, as ``Preparation.pixels``; the training side's first.

    Raises:
        UsageError: no photograph can be used.
    """
    training = description.training
    prepared = _first(photos, training)
    made = {"training": prepared.pixels(training)}
    for switch in options.switches(training)[0]:
        with contextlib.suppress(PhotoError):
            title = f"{options.TITLES[switch.type]}: {switch.name}"
            made[title] = prepared.pixels(switch.apply(training))
    return made


class _Measured:
    """Figures from a table, all with intervals from the same draws of photographs."""

    def __init__(
        self,
        table: Table,
        photos: Photos,
        read: Read,
        before: _Measured | None = None,
    ) -> None:
        """Draw; the columns of ``before`` stand beside the table's."""
        self._photos = photos
        self._table: Table = table
        self._scores: dict[tuple[tuple[int, ...], bytes], Drawn] = before._scores if before else {}
        tables = [table, before._table] if before is not None else [table]
        self._columns: dict[str, int] = {}
        offset = 0
        for each in tables:
            for name, column in each.columns.items():
                self._columns.setdefault(name, offset + column)
            offset += len(each.columns)
        self._valid = np.array([i for i in range(len(photos.names)) if i not in table.failed])
        self._changed, self._relative, self._top1 = (
            np.concatenate([getattr(t, field) for t in tables], axis=1)[self._valid]
            for field in ("changed", "relative_l2", "top1")
        )
        self.used = len(self._valid)
        self._l2 = Means(self._relative.astype(np.float64))
        self._moved = Means(self._changed.astype(np.float64)) if read.kind != "none" else None
        self._drop: Drawn | None = None
        self.accuracy: Interval | None = None
        self.labelled = 0
        if read.task is not None:
            columns = [t.verdicts[name].get() for t in tables for name in t.columns]
            self.labelled = len(columns[0])
            if self.labelled:
                base, self._drop = self._scored(read.task, columns)
                self.accuracy = base.interval(0)

    def _scored(self, task: Task, columns: Sequence[dict[int, Verdict]]) -> tuple[Drawn, Drawn]:
        """The metric of the training pipeline, and what every column loses of it.

        A column is compared with the training pipeline on the photographs that it could process.
        """
        place = {int(photo): row for row, photo in enumerate(self._valid)}
        names, labels = self._photos.names, self._photos.labels

        def score(column: dict[int, Verdict], photos: tuple[int, ...]) -> Drawn:
            verdicts = [column[photo] for photo in photos]
            key = photos, hashlib.blake2b(repr(verdicts).encode()).digest()
            if key not in self._scores:  # many options judge alike, and drawing is slow
                self._scores[key] = draw(verdicts, photos)
            return self._scores[key]

        def draw(verdicts: Sequence[Verdict], photos: tuple[int, ...]) -> Drawn:
            truth = [labels[names[photo]] for photo in photos]
            rows = [place[photo] for photo in photos]
            value = task.score(verdicts, truth, np.ones((1, len(photos))))
            drawn = [
                task.score(verdicts, truth, part[:, rows])
                for part in weights(self.used, task.draws)
            ]
            return Drawn(value, np.concatenate(drawn)[:, None])

        every = tuple(columns[0])
        values, draws = [], []
        for column in columns:
            photos = tuple(photo for photo in every if photo in column)
            if photos:
                base, one = score(columns[0], photos), score(column, photos)
                values.append(base.value - one.value)
                draws.append(base.draws - one.draws)
            else:
                values.append(np.full(1, np.nan))
                draws.append(np.full((task.draws, 1), np.nan))
        return score(columns[0], every), Drawn(
            np.concatenate(values), np.concatenate(draws, axis=1)
        )

    def types(self, choices: Sequence[_Choice]) -> tuple[SysnoiseType, ...]:
        """Options by type, the types with the largest effect first."""
        by_type: dict[str, list[_Choice]] = {}
        for choice in choices:
            column = self._columns[choice.trial]
            if np.isnan(self._relative[:, column]).all():
                continue  # no photograph could be processed: a gap says so
            by_type.setdefault(choice.type, []).append(choice)
        found = []
        for type, members in by_type.items():
            made = sorted(
                (self.option(c.trial, c.name, c.tool) for c in members),
                key=lambda option: _size(option.effect),
                reverse=True,
            )
            if type == options.ORIENTATION and made[0].same == made[0].photos:
                continue  # no photograph is turned
            columns = [self._columns[c.trial] for c in members]
            mean = self._effect(partial(Drawn.mean, columns=columns))
            most = self._effect(partial(Drawn.max, columns=columns))
            titles = options.TITLES | options.AFTER | networks.TITLES
            title = titles.get(type, type)
            found.append(SysnoiseType(type, title, tuple(made), mean, most, made[0].name))
        return tuple(sorted(found, key=lambda type: _size(type.max), reverse=True))

    def option(self, trial: str, name: str, tool: str) -> SysnoiseOption:
        """One column."""
        column = self._columns[trial]
        values = self._relative[:, column]
        return SysnoiseOption(
            name=name,
            tool=tool,
            photos=int(np.count_nonzero(~np.isnan(values))),
            refused=int(np.count_nonzero(np.isnan(values))),
            same=int(np.count_nonzero(values == 0)),
            effect=self._effect(partial(Drawn.interval, column=column)),
        )

    def step(self, choices: Sequence[_Choice]) -> SysnoiseStep:
        """Several types at once."""
        column = self._columns[_name(choices)]
        parts = [self._columns[c.trial] for c in choices]
        return SysnoiseStep(
            types=tuple(c.type for c in choices),
            options=tuple(c.name for c in choices),
            effect=self._effect(partial(Drawn.interval, column=column)),
            surplus=self._effect(partial(Drawn.surplus, whole=column, parts=parts))
            if len(choices) > 1
            else None,
        )

    def flips(self, choices: Sequence[_Choice]) -> tuple[SysnoiseFlip, ...]:
        """Every photograph whose top-1, or whose text, an option changes."""
        found = []
        for row, photo in enumerate(self._valid):
            name = self._photos.names[photo]
            before = int(self._top1[row, 0])
            for choice in choices:
                after = int(self._top1[row, self._columns[choice.trial]])
                if before >= 0 and after >= 0 and after != before:
                    label = self._photos.labels.get(name)
                    found.append(SysnoiseFlip(name, choice.trial, before, after, label))
        alone = {self._columns[choice.trial]: choice.trial for choice in choices}
        for (photo, column), text in sorted(self._table.texts.items()):
            if column in alone:
                name = self._photos.names[photo]
                original = self._table.texts[photo, 0]
                label = self._photos.labels.get(name)
                found.append(SysnoiseFlip(name, alone[column], original, text, label))
        return tuple(found)

    def refusals(self) -> list[Gap]:
        """What options could not process."""
        return [
            Gap(name, "run", f"{count} photograph{'s' * (count > 1)}: {first}")
            for name, (count, first) in self._table.refusals.items()
        ]

    def doubts(self, read: Read) -> list[str]:
        """Reasons to distrust the labels."""
        if self._photos.labels and not self.labelled:
            return ["No label could be held against a result: the labels are not used."]
        if read.kind != "scores" or self.accuracy is None or self.labelled < _ENOUGH:
            return []
        classes = 1 + max(*self._photos.labels.values(), int(self._top1[:, 0].max()))
        if self.accuracy.value * classes > _CHANCE:
            return []
        return [
            f"Top-1 of the training pipeline is {self.accuracy.value:.1%} on {classes} classes: "
            "the labels may not be those of the model, or the pipeline not that of its training."
        ]

    def _effect(self, take: Callable[[Drawn], Interval]) -> SysnoiseEffect:
        return SysnoiseEffect(
            drop=take(self._drop) if self._drop is not None else None,
            changed=take(self._moved) if self._moved is not None else None,
            relative_l2=take(self._l2),
        )


def _size(effect: SysnoiseEffect) -> tuple[float, float, float]:
    """By what options and types are ordered: accuracy, then readings, then numbers.

    A drop that may be chance counts as none, or it would decide between options at random.
    """
    drop = effect.drop.value if effect.drop and effect.drop.low > 0 else 0.0
    changed = effect.changed.value if effect.changed else 0.0
    return drop, changed, effect.relative_l2.value


def _worst(choices: Sequence[_Choice], types: Sequence[SysnoiseType]) -> list[_Choice]:
    """The worst option of every group that changes anything, in the order of execution."""
    sizes = {
        (type.id, option.name): _size(option.effect) for type in types for option in type.options
    }
    best: dict[str, _Choice] = {}
    for choice in choices:
        size = sizes.get((choice.type, choice.name))
        if size is None or size[2] == 0:
            continue
        other = best.get(choice.group)
        if other is None or size > sizes[other.type, other.name]:
            best[choice.group] = choice
    before = [best[t] for t in options.TITLES if t in best]
    inside = {c.change: c for c in best.values() if isinstance(c.change, Form)}
    after = [best[t] for t in options.AFTER if t in best]
    return [*before, *(inside[form] for form in networks.in_order(inside)), *after]


def _together(worst: Sequence[_Choice], nets: Networks) -> list[tuple[_Choice, ...]]:
    """Every pair, and what an accumulation adds up to, of those that can be put together."""
    wanted = [*combinations(worst, 2), *(tuple(worst[:n]) for n in range(3, len(worst) + 1))]
    return [c for c in wanted if nets.combine(_forms(c))]


def _trial(choices: Sequence[_Choice], base: Trial) -> Trial:
    pipeline, post = base.pipeline, base.post
    for choice in choices:
        if isinstance(choice.change, Switch):
            pipeline = choice.change.apply(pipeline)
        elif isinstance(choice.change, PostSwitch) and post is not None:
            post = choice.change.apply(post)
    return Trial(_name(choices), pipeline, _forms(choices), post)


def _forms(choices: Sequence[_Choice]) -> networks.Forms:
    return networks.in_order(c.change for c in choices if isinstance(c.change, Form))


def _name(choices: Sequence[_Choice]) -> str:
    return " + ".join(choice.trial for choice in choices)


def _first(photos: Photos, training: Pipeline) -> Preparation:
    """The first photograph that the training side can use."""
    reason = ""
    for name in photos.names:
        try:
            prepared = Preparation(photos.read(name))
            prepared.tensor(training)
            return prepared
        except PhotoError as error:
            reason = reason or f"{name}: {error.message}"
    raise UsageError(
        f"no photograph can be used of {len(photos.names)}: {reason}",
        "The training side's decoder must be able to read them.",
    )


def _read(values: Arrays, post: Post | None, wanted: str | None, *, labelled: bool) -> Read:
    """What people read, and as what: the described result, or the first output with a meaning.

    Raises:
        UsageError: the result is not what the task needs.
    """
    kind: OutputKind
    if post is not None:
        name, kind = NAME, post.kind
    else:
        kinds: dict[str, OutputKind] = {n: assume(n, v) for n, v in values.items()}
        task = scoring.load(wanted) if wanted else None
        fitting = [n for n, k in kinds.items() if (k == task.kind if task else k != "none")]
        name = fitting[0] if fitting else next(iter(values))
        kind = kinds[name]
    value = values[name]
    classes = post is not None and post.kind == "mask" and post.mask == "argmax"
    wanted = wanted or scoring.reading(kind)
    if wanted is None:
        if labelled:
            raise UsageError(
                f"output `{name}` is read as nothing that labels could judge",
                "Say --task, and describe `post` in the pipeline (docs/pipeline.md).",
            )
        return Read(name, kind, classes=classes)
    task = scoring.load(wanted)
    if kind != task.kind:
        raise UsageError(
            f"--task {wanted} needs a result that is read as {task.kind}, but `{name}` is read as "
            f"{kind}",
            f'Describe it: post = {{ kind = "{task.kind}", … }} (docs/pipeline.md).',
        )
    rows = value.size // max(value.shape[-1:] or (1,))
    if labelled and kind == "scores" and rows != 1:
        raise UsageError(
            f"--labels has one class for each photograph, but `{name}` has {rows} rows of scores",
            "Leave --labels out, or describe another output as `post` of the pipeline.",
        )
    if labelled:
        scoring.require(task)
    if labelled and kind == "text" and post is not None and not post.charset:
        raise UsageError(
            "--labels are texts, but the pipeline does not say which class is which character",
            'Name a file with `charset` in `post`, or charset = "model".',
        )
    return Read(name, kind, task if labelled else None, classes=classes)


def _remarks(nets: Networks, checkpoint: Checkpoint) -> Iterator[str]:
    """What there is to know of the sweep itself."""
    if nets.silent:
        yield f"Nothing to simulate in this model: {', '.join(nets.silent)}."
    if checkpoint.reused:
        yield (
            "Photographs measured before an interruption, and not measured again: "
            f"{checkpoint.reused}."
        )


def _strangers(photos: Photos, values: Arrays, read: Read) -> list[str]:
    """What labels name classes that the network does not have."""
    if read.task is None or read.kind != "scores":
        return []
    classes = values[read.output].shape[-1]
    beyond = [name for name, label in photos.labels.items() if int(label) >= classes]
    said = f"photographs are labelled with a class that is none of the {classes} of the network"
    return [scoring.said(said, beyond)] if beyond else []


def _oddities(photos: Photos, table: Table) -> dict[str, int]:
    found: Counter[str] = Counter()
    for index, name in enumerate(photos.names):
        if index not in table.failed:
            found.update(oddities(photos.read(name), name))
    return dict(sorted(found.items()))


def _key(
    model: Model, description: Description, choices: Sequence[_Choice], read: Read
) -> dict[str, object]:
    """What a checkpoint must have been made for."""
    import onnxruntime as ort

    tools = sorted({choice.tool for choice in choices})
    told = repr(
        (
            *(description.training, description.deployment),
            *(description.training_post, description.deployment_post),
            *(tools, read.output, read.kind, read.task and read.task.metric, read.characters),
        )
    )
    return {
        "version": __version__,
        "engine": ort.__version__,
        "model": model.info.sha256,
        "pipeline": hashlib.sha256(told.encode()).hexdigest(),
    }
