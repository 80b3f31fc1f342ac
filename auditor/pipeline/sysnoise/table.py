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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from auditor import __version__
from auditor.comparison.tasks import assume
from auditor.errors import UsageError
from auditor.pipeline import scoring
from auditor.pipeline.photos import oddities
from auditor.pipeline.postprocessing.results import NAME, characters, result
from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.pipeline.preprocessing.steps import Preparation
from auditor.pipeline.sysnoise import networks, options
from auditor.pipeline.sysnoise.checkpoint import Checkpoint
from auditor.pipeline.sysnoise.combinations import Choice, together, trial_of, worst_of
from auditor.pipeline.sysnoise.figures import Figures
from auditor.pipeline.sysnoise.networks import Networks
from auditor.pipeline.sysnoise.sweep import BASE, Read, Sweep, Table, Trial
from auditor.records.backend import Gap
from auditor.records.sysnoise import SysnoiseReport, SysnoiseType

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.pipeline.description import Description
    from auditor.pipeline.photos import Photos
    from auditor.pipeline.postprocessing.post import Post
    from auditor.pipeline.preprocessing.stages import Pipeline
    from auditor.pipeline.scoring import Task
    from auditor.ports import Array, Arrays, Noise, Progress
    from auditor.records.terms import OutputKind

_DEPLOYMENT = "deployment"


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured, as the first photograph shows it.

    Attributes:
        model, description, photos: as of ``sysnoise``.
        nets: the network and its forms.
        read: which output is read, as what, and how labels judge it.
        base: the training side, which everything is compared with.
        deployed: the deployment side as a whole; None where it is the training side.
        choices: the options to switch, before, inside and behind the network.
        values: what the network makes of the first photograph, by name.
        gaps: options that cannot be switched here.
    """

    model: Model
    description: Description
    photos: Photos
    nets: Networks
    read: Read
    base: Trial
    deployed: Trial | None
    choices: tuple[Choice, ...]
    values: Arrays
    gaps: tuple[Gap, ...]

    @property
    def alone(self) -> list[Trial]:
        """The training side, each option switched alone, and the deployment side."""
        switched = (trial_of([choice], self.base) for choice in self.choices)
        return [self.base, *switched, *((self.deployed,) if self.deployed else ())]


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured.

    Attributes:
        table: what every option alone did, by photograph.
        alone: the figures of that.
        types: the effects by type, the largest first.
        worst: the worst option of each type, in the order of execution.
        joined: which of these were put together.
        together: the figures of that.
    """

    table: Table
    alone: Figures
    types: tuple[SysnoiseType, ...]
    worst: list[Choice]
    joined: list[tuple[Choice, ...]]
    together: Figures


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
    clock, processor = [time.perf_counter()], time.process_time()
    plan = _plan(model, description, photos, noises, task, progress)
    clock.append(time.perf_counter())
    checkpoint = Checkpoint(keep, _key(plan))
    finished = False
    try:
        sweep = Sweep(
            photos, plan.nets, plan.read, checkpoint, threads or os.cpu_count() or 1, progress
        )
        table = _switched_alone(sweep, plan)
        clock.append(time.perf_counter())
        measured = _put_together(sweep, plan, table)
        clock.append(time.perf_counter())
        finished = True
    finally:
        checkpoint.close(finished=finished)
    seconds = dict(zip(("prepare", "alone", "together"), np.diff(clock).tolist(), strict=True))
    seconds["network, all threads"] = sweep.network_seconds
    seconds["processor, all threads"] = time.process_time() - processor
    return _report(plan, measured, sweep, checkpoint.reused, seconds)


def _plan(
    model: Model,
    description: Description,
    photos: Photos,
    noises: Sequence[Noise],
    task: str | None,
    progress: Progress,
) -> _Plan:
    """Decide what to measure; the arguments are those of ``sysnoise``.

    Raises:
        UsageError: no photograph can be used, or the description does not fit the network.
    """
    training, post = description.training, description.training_post
    first = _first(photos, training)
    tensor = first.tensor(training)
    nets = Networks(model, noises, tensor, progress)
    switches, gaps = options.switches(training)  # loads the libraries
    values = nets.run((), tensor)
    if post is not None:
        values = result(values, post, first.place(training))
    base = Trial(BASE, training, post=post)
    deployed = Trial(_DEPLOYMENT, description.deployment, post=description.deployment_post)
    return _Plan(
        model,
        description,
        photos,
        nets,
        _read(values, post, task, model, labelled=bool(photos.labels)),
        base,
        deployed if replace(deployed, name=BASE) != base else None,
        (
            *(Choice(s.type, s.type, s.name, s.tool, s) for s in switches),
            *(Choice(f.noise, f.group, f.variant, "simulated", f) for f in nets.forms),
            *(Choice(s.type, s.type, s.name, s.tool, s) for s in options.post_switches(post)),
        ),
        values,
        tuple(gaps),
    )


def _switched_alone(sweep: Sweep, plan: _Plan) -> Table:
    """Measure every option alone.

    Raises:
        UsageError: no photograph can be used.
    """
    if plan.read.task is not None and plan.read.task.gallery:
        sweep.collect(plan.base)
    table = sweep.run(plan.alone)
    photos = plan.photos.names
    if len(table.failed) == len(photos):
        raise UsageError(
            f"no photograph can be used of {len(photos)}: {table.failed[0]}",
            "The training side's decoder must be able to read them.",
        )
    return table


def _put_together(sweep: Sweep, plan: _Plan, table: Table) -> _Measured:
    """Measure the worst options in pairs and all together."""
    alone = Figures(table, plan.photos, plan.read)
    types = alone.types(plan.choices)
    worst = worst_of(plan.choices, types)
    joined = together(worst, plan.nets)
    both = sweep.run([plan.base, *(trial_of(c, plan.base) for c in joined)])
    return _Measured(
        table, alone, types, worst, joined, Figures(both, plan.photos, plan.read, alone)
    )


def _report(
    plan: _Plan, measured: _Measured, sweep: Sweep, reused: int, seconds: dict[str, float]
) -> SysnoiseReport:
    """The table; ``reused``: photographs that were measured before an interruption."""
    read, photos, description = plan.read, plan.photos, plan.description
    alone, worst = measured.alone, measured.worst
    combinations = (*((choice,) for choice in worst), *measured.joined)
    steps = {group: measured.together.step(group) for group in combinations}
    order = (tuple(worst[:n]) for n in range(1, len(worst) + 1))
    deployment = None
    if plan.deployed is not None:
        deployment = alone.option(_DEPLOYMENT, "as described", description.source)
    return SysnoiseReport(
        tool_version=__version__,
        model=str(plan.model.path),
        pipeline=description.source,
        steps=plan.base.pipeline.steps() | (plan.base.post.steps() if plan.base.post else {}),
        photos=alone.used,
        labelled=alone.labelled,
        output=read.output,
        kind=read.kind,
        metric=read.task.metric if read.task is not None else None,
        accuracy=alone.accuracy,
        deployment=deployment,
        types=measured.types,
        accumulation=tuple(steps[key] for key in order if key in steps),
        pairs=tuple(step for key, step in steps.items() if len(key) == 2),
        flips=alone.flips(plan.choices),
        left_out=tuple(
            Gap(photos.names[i], "decode", why) for i, why in sorted(measured.table.failed.items())
        ),
        oddities=_oddities(photos, measured.table),
        gaps=(*plan.gaps, *plan.nets.gaps, *alone.refusals()),
        notes=(
            *description.notes,
            *photos.notes,
            *_remarks(plan.nets, reused),
            *_strangers(photos, plan.values, read),
            *alone.doubts(read),
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


def _read(
    values: Arrays, post: Post | None, wanted: str | None, model: Model, *, labelled: bool
) -> Read:
    """What people read, and as what: the described result, or the first output with a meaning.

    Raises:
        UsageError: the result is not what the task needs.
    """
    name, kind = _meant(values, post, wanted)
    classes = post is not None and post.kind == "mask" and post.mask == "argmax"
    read = Read(name, kind, _judge(name, kind, wanted, labelled=labelled), classes=classes)
    if labelled and kind == "scores":
        rows = values[name].size // max(values[name].shape[-1:] or (1,))
        if rows != 1:
            raise UsageError(
                f"--labels has one class for each photograph, but `{name}` has {rows} rows of "
                "scores",
                "Leave --labels out, or describe another output as `post` of the pipeline.",
            )
    if read.task is not None:
        scoring.require(read.task)
    if kind != "text" or post is None:
        return read
    if labelled and not post.charset:
        raise UsageError(
            "--labels are texts, but the pipeline does not say which class is which character",
            'Name a file with `charset` in `post`, or charset = "model".',
        )
    metadata = {entry.key: entry.value for entry in model.proto.metadata_props}
    return replace(read, characters=characters(post, metadata, values[NAME].shape[-1]))


def _meant(values: Arrays, post: Post | None, wanted: str | None) -> tuple[str, OutputKind]:
    """The output that is read, and as what."""
    if post is not None:
        return NAME, post.kind
    kinds: dict[str, OutputKind] = {n: assume(n, v) for n, v in values.items()}
    task = scoring.load(wanted) if wanted else None
    fitting = [n for n, k in kinds.items() if (k == task.kind if task else k != "none")]
    name = fitting[0] if fitting else next(iter(values))
    return name, kinds[name]


def _judge(name: str, kind: OutputKind, wanted: str | None, *, labelled: bool) -> Task | None:
    """The task by which labels judge an output; None without labels.

    Raises:
        UsageError: there is none, or it needs another output.
    """
    wanted = wanted or scoring.reading(kind)
    if wanted is None:
        if labelled:
            raise UsageError(
                f"output `{name}` is read as nothing that labels could judge",
                "Say --task, and describe `post` in the pipeline (docs/pipeline.md).",
            )
        return None
    task = scoring.load(wanted)
    if kind != task.kind:
        raise UsageError(
            f"--task {wanted} needs a result that is read as {task.kind}, but `{name}` is read as "
            f"{kind}",
            f'Describe it: post = {{ kind = "{task.kind}", … }} (docs/pipeline.md).',
        )
    return task if labelled else None


def _remarks(nets: Networks, reused: int) -> Iterator[str]:
    """What there is to know of the sweep itself."""
    if nets.silent:
        yield f"Nothing to simulate in this model: {', '.join(nets.silent)}."
    if reused:
        yield f"Photographs measured before an interruption, and not measured again: {reused}."


def _strangers(photos: Photos, values: Arrays, read: Read) -> list[str]:
    """A sentence on photographs whose labels are classes that the network does not have."""
    if read.task is None or read.kind != "scores":
        return []
    classes = values[read.output].shape[-1]
    beyond = [name for name, label in photos.labels.items() if int(label) >= classes]
    what = f"Photographs labelled with a class that is none of the {classes} of the network"
    return [scoring.listed(what, beyond)] if beyond else []


def _oddities(photos: Photos, table: Table) -> dict[str, int]:
    found: Counter[str] = Counter()
    for index, name in enumerate(photos.names):
        if index not in table.failed:
            found.update(oddities(photos.read(name), name))
    return dict(sorted(found.items()))


def _key(plan: _Plan) -> dict[str, object]:
    """What a checkpoint must have been made for."""
    import onnxruntime as ort

    description, read = plan.description, plan.read
    tools = sorted({choice.tool for choice in plan.choices})
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
        "model": plan.model.info.sha256,
        "pipeline": hashlib.sha256(told.encode()).hexdigest(),
    }
