"""Both sides of a pipeline in one audit: what each step before the network does to its outputs.

The network is audited on what the deployment feeds it. Before that the same chain goes on: from
the training side to the deployment side one step at a time, on the reference, so that the steps'
shares and those of the network add up to the whole difference between the two systems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from auditor import metrics
from auditor.errors import UsageError
from auditor.metrics import Moments, Running
from auditor.model import shown
from auditor.outputs import OutputMeter
from auditor.pipeline.libraries import PhotoError
from auditor.pipeline.networks import network_input
from auditor.pipeline.steps import Preparation
from auditor.records import Gap, OutputKind, PipelineReport, PipelineStep, StimulusInfo
from auditor.replay import difference
from auditor.stimulus import Stimulus
from auditor.tasks import TaskMeter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from auditor.model import Model
    from auditor.pipeline.description import Description, Pipeline
    from auditor.pipeline.photos import Photos
    from auditor.ports import Array, Arrays
    from auditor.replay import Reference

SAMPLES = 4  # photographs where the user names no number, as of recorded samples

# What a pipeline makes of one photograph: the tensor, and the reference's outputs on it.
_Made = tuple["Array", "Arrays"]


@dataclass(frozen=True, slots=True)
class Step:
    """One step before the network.

    Attributes:
        name: as in a description; ``preprocessing.NAME`` is the cause's id.
        words: keys of ``Pipeline.steps`` that describe it.
        take: the first pipeline with this step of the second.
    """

    name: str
    words: tuple[str, ...]
    take: Callable[[Pipeline, Pipeline], Pipeline]

    @property
    def noise(self) -> str:
        """Id of the cause."""
        return f"preprocessing.{self.name}"

    def described(self, pipeline: Pipeline) -> str:
        """What a side does in this step."""
        said = pipeline.steps()
        return "; ".join(said[key] for key in self.words)


def _decoder(p: Pipeline, d: Pipeline) -> Pipeline:
    other = replace(p.decode, library=d.decode.library, variant=d.decode.variant)
    return replace(p, decode=other)


def _orientation(p: Pipeline, d: Pipeline) -> Pipeline:
    return replace(p, decode=replace(p.decode, orientation=d.decode.orientation))


def _framing(p: Pipeline, d: Pipeline) -> Pipeline:
    resize = d.resize
    if p.resize is not None and resize is not None:
        own = (p.resize.library, p.resize.interpolation, p.resize.antialias)
        resize = replace(resize, library=own[0], interpolation=own[1], antialias=own[2])
    return replace(p, precrop=d.precrop, resize=resize, crop=d.crop)


def _resize(p: Pipeline, d: Pipeline) -> Pipeline:
    if p.resize is None or d.resize is None:
        return p  # a resize on one side only is one of framing
    r = d.resize
    other = replace(
        p.resize, library=r.library, interpolation=r.interpolation, antialias=r.antialias
    )
    return replace(p, resize=other)


# In the order of execution.
STEPS = (
    Step("decoder", ("decoder",), _decoder),
    Step("orientation", ("decoder",), _orientation),
    Step("colour", ("colour",), lambda p, d: replace(p, colour=d.colour)),
    Step("framing", ("precrop", "resize", "crop"), _framing),
    Step("resize", ("resize",), _resize),
    Step("channels", ("channels",), lambda p, d: replace(p, channels=d.channels)),
    Step(
        "normalise",
        ("normalise",),
        lambda p, d: replace(p, scale=d.scale, mean=d.mean, std=d.std),
    ),
    Step("layout", ("layout",), lambda p, d: replace(p, layout=d.layout, dtype=d.dtype)),
)


def differing(description: Description) -> tuple[Step, ...]:
    """The steps in which the two sides differ, in the order of execution."""
    before, end = description.training, description.deployment
    return tuple(step for step in STEPS if step.take(before, end) != before)


@dataclass(frozen=True, slots=True)
class Upstream:
    """One photograph's outputs of the reference, from the training side to the deployment's.

    Attributes:
        names: ids of the causes, in the order of execution.
        outputs: the final outputs after the training pipeline, and after each further step is as
            deployed but the last: after that they are those that the audit starts from.
    """

    names: tuple[str, ...]
    outputs: tuple[Arrays, ...]

    @property
    def origin(self) -> Arrays:
        """The outputs of the training system."""
        return self.outputs[0]

    def parts(self, last: Arrays) -> Iterator[tuple[str, Arrays]]:
        """Each step's cause and what it adds to the outputs; ``last`` are those after all."""
        following = (*self.outputs[1:], last)
        for name, before, after in zip(self.names, self.outputs, following, strict=True):
            yield name, difference(after, {n: before[n] for n in after})


@dataclass(slots=True)
class _StepMeter:
    """What one step alone does, over photographs."""

    step: Step
    inputs: Moments = field(default_factory=Moments)
    same: Running = field(default_factory=Running)
    effect: Running = field(default_factory=Running)
    impact: Running = field(default_factory=Running)
    share: Running = field(default_factory=Running)
    tasks: dict[str, TaskMeter] = field(default_factory=dict)


class Chain:
    """The stimulus made of photographs, and what the steps before the network do to them.

    Attributes:
        stimulus: the photographs through the deployment side.
        gaps: what could not be used or measured.
    """

    def __init__(
        self,
        model: Model,
        description: Description,
        photos: Photos,
        kinds: Mapping[str, OutputKind],
    ) -> None:
        """Prepare every photograph once on both sides, and leave out what cannot be.

        Args:
            model: the network; it has one input.
            description: both sides.
            photos: what to feed.
            kinds: as what the user says that outputs are read, by name.

        Raises:
            UsageError: no photograph can be used, or the network takes no such tensor.
        """
        self.gaps: list[Gap] = []
        self._description = description
        self._photos = photos
        self._kinds = kinds
        self._steps = differing(description)
        self._meters = [_StepMeter(step) for step in self._steps]
        self._outputs: dict[str, OutputMeter] = {}
        self._input = ""
        self._used: list[str] = []
        shape: tuple[int, ...] = ()
        for name in photos.names:
            try:
                self._input, tensor = self._both(model, name)
            except (PhotoError, UsageError) as error:
                self._gap(name, "decode", error.message)
                continue
            shape = shape or tensor.shape
            if tensor.shape == shape:
                self._used.append(name)
            else:
                why = f"its tensor is {shown(tensor.shape)}, the first one's {shown(shape)}"
                self._gap(name, "compare", f"{why}: an audit compiles for one shape")
        if not self._used:
            raise UsageError(
                f"none of the {len(photos.names)} photographs can be used: "
                f"{self.gaps[0].subject}: {self.gaps[0].reason}",
                "Both sides of the pipeline must read them and make what the model takes.",
            )
        side = "the deployment side of " if self._steps else ""
        alike = ("Both sides of the pipeline are alike: nothing before the network differs.",)
        notes = (*description.notes, *photos.notes, *(() if self._steps else alike))
        source = f"{photos.folder} through {side}{description.source}"
        shapes = {self._input: shape}
        info = StimulusInfo("recorded", len(self._used), None, source, shapes, notes)
        self.stimulus = Stimulus(info, self._sample)

    def _both(self, model: Model, name: str) -> tuple[str, Array]:
        """The network's input and the deployment's tensor; the training side makes one as well.

        Raises:
            PhotoError: a step refuses the photograph.
            UsageError: the network has several inputs, or does not take the tensor.
        """
        prepared = Preparation(self._photos.read(name))
        if self._steps:
            network_input(model, prepared.tensor(self._description.training))
        tensor = prepared.tensor(self._description.deployment)
        return network_input(model, tensor), tensor

    def _sample(self, index: int) -> Arrays:
        data = self._photos.read(self._used[index])
        return {self._input: Preparation(data).tensor(self._description.deployment)}

    def measure(self, index: int, reference: Reference, expected: Arrays) -> Upstream | None:
        """What the steps do on one photograph; None where there is nothing to measure.

        Args:
            index: the sample.
            reference: the reference model.
            expected: its outputs after the deployment's pipeline.
        """
        if not self._steps:
            return None
        training, deployment = self._description.training, self._description.deployment
        name = self._used[index]
        prepared = Preparation(self._photos.read(name))
        made: dict[Pipeline, _Made] = {deployment: (prepared.tensor(deployment), expected)}

        def run(pipeline: Pipeline) -> _Made:
            if pipeline not in made:
                tensor = prepared.tensor(pipeline)
                values = reference.run(reference.wide({self._input: tensor}))
                made[pipeline] = tensor, values
            return made[pipeline]

        try:
            reached = [training]
            for step in self._steps[:-1]:
                reached.append(step.take(reached[-1], deployment))
            outputs = tuple(run(pipeline)[1] for pipeline in reached)
        except (
            Exception
        ) as error:  # between the sides a step may fit no library, or not the network
            self._gap(name, "run", f"its steps cannot be switched one after another: {error}")
            return None
        upstream = Upstream(tuple(step.noise for step in self._steps), outputs)
        self._add(index, upstream, expected)
        for meter in self._meters:
            try:
                alone = run(meter.step.take(training, deployment))
                self._alone(meter, index, alone, run(training), expected)
            except Exception as error:  # as above
                self._gap(name, "run", f"{meter.step.name} alone: {error}")
        return upstream

    def _add(self, index: int, upstream: Upstream, expected: Arrays) -> None:
        """What all steps together do, and the share of each."""
        origin = upstream.origin
        for name, value in origin.items():
            if name not in self._outputs:
                self._outputs[name] = OutputMeter(name, self._kinds.get(name), value)
            self._outputs[name].add(expected[name], value, index)
        whole = difference(expected, origin)
        names = tuple(origin)
        parts = [part for _, part in upstream.parts(expected)]
        shares = [metrics.projection(part, whole, origin, names) for part in parts]
        if all(map(math.isfinite, shares)):
            for meter, share in zip(self._meters, shares, strict=True):
                meter.share.add(share, index)

    def _alone(
        self, meter: _StepMeter, index: int, made: _Made, training: _Made, expected: Arrays
    ) -> None:
        """What a step without the others does."""
        (tensor, values), (plain, origin) = made, training
        meter.inputs.add(tensor, plain)
        meter.same.add(metrics.bit_identical(tensor, plain), index)
        effect = metrics.relative_l2(values, origin, tuple(origin))
        meter.effect.add(effect, index)
        whole = metrics.relative_l2(expected, origin, tuple(origin))
        if 0 < whole < math.inf:
            meter.impact.add(effect / whole, index)
        for name, value in values.items():
            task = meter.tasks.setdefault(name, TaskMeter(name, self._outputs[name].kind))
            task.add(value, origin[name], index)

    def report(self) -> PipelineReport | None:
        """Everything measured; None where the two sides are alike."""
        if not self._steps:
            return None
        description = self._description
        return PipelineReport(
            source=description.source,
            photos=len(self._used),
            training=description.training.steps(),
            deployment=description.deployment.steps(),
            steps=tuple(self._step(meter) for meter in self._meters),
            outputs=tuple(meter.report() for meter in self._outputs.values()),
        )

    def _step(self, meter: _StepMeter) -> PipelineStep:
        made = (task.result() for task in meter.tasks.values())
        return PipelineStep(
            noise=meter.step.noise,
            name=meter.step.name,
            training=meter.step.described(self._description.training),
            deployment=meter.step.described(self._description.deployment),
            input_l2=meter.inputs.distance().relative_l2,
            bit_identical=meter.same.mean,
            effect=meter.effect.mean if meter.effect.count else None,
            leave_one_in=meter.impact.mean if meter.impact.count else None,
            share=meter.share.mean if meter.share.count else None,
            leave_one_in_spread=meter.impact.spread(),
            share_spread=meter.share.spread(),
            consequences=tuple(c for c in made if c is not None),
        )

    def _gap(self, photo: str, stage: str, reason: str) -> None:
        self.gaps.append(Gap(photo, stage, reason))
