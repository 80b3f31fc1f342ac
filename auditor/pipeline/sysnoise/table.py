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
from dataclasses import replace
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
from auditor.records.sysnoise import (
    SysnoiseReport,
)

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
    values = nets.run((), tensor)
    if description.training_post is not None:  # or the description does not fit the network
        values = result(values, description.training_post, first.place(training))
    read = _read(values, description.training_post, task, model, labelled=bool(photos.labels))
    after = options.post_switches(description.training_post)
    choices = [
        *(Choice(s.type, s.type, s.name, s.tool, s) for s in switches),
        *(Choice(f.noise, f.group, f.variant, "simulated", f) for f in nets.forms),
        *(Choice(s.type, s.type, s.name, s.tool, s) for s in after),
    ]
    base = Trial(BASE, training, post=description.training_post)
    trials = [base, *(trial_of([choice], base) for choice in choices)]
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
        measured = Figures(alone, photos, read)
        types = measured.types(choices)
        worst = worst_of(choices, types)
        joined = together(worst, nets)
        both = sweep.run([base, *(trial_of(c, base) for c in joined)])
        clock.append(time.perf_counter())
        joint = Figures(both, photos, read, measured)
        finished = True
    finally:
        checkpoint.close(finished=finished)
    steps = {group: joint.step(group) for group in (*((c,) for c in worst), *joined)}
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
    what = f"Photographs labelled with a class that is none of the {classes} of the network"
    return [scoring.listed(what, beyond)] if beyond else []


def _oddities(photos: Photos, table: Table) -> dict[str, int]:
    found: Counter[str] = Counter()
    for index, name in enumerate(photos.names):
        if index not in table.failed:
            found.update(oddities(photos.read(name), name))
    return dict(sorted(found.items()))


def _key(
    model: Model, description: Description, choices: Sequence[Choice], read: Read
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
