"""Both sides of a pipeline in one audit: what each step before and after the network does.

The network is audited on what the deployment feeds it. Around it the same chain goes on: from the
training side to the deployment side one step at a time, so that the shares of the steps and those
of the network add up to the whole difference between the two systems.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from auditor.comparison import metrics
from auditor.comparison.metrics import Moments, Running
from auditor.comparison.outputs import OutputMeter
from auditor.comparison.tasks import TaskMeter
from auditor.decomposition import impact
from auditor.decomposition.impact import Parts, Pool
from auditor.errors import UsageError
from auditor.graphs.model import shown
from auditor.pipeline.postprocessing import post as posts
from auditor.pipeline.postprocessing import results
from auditor.pipeline.preprocessing.libraries import PhotoError
from auditor.pipeline.preprocessing.stages import Pipeline, Placement, S, Step, differing, taking
from auditor.pipeline.preprocessing.steps import Preparation
from auditor.pipeline.sysnoise.networks import network_input
from auditor.records.backend import Gap
from auditor.records.model import StimulusInfo
from auditor.records.report import PipelineReport, PipelineStep
from auditor.records.terms import OutputKind
from auditor.replays.replay import difference
from auditor.stimulus import Stimulus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from auditor.graphs.model import Model
    from auditor.pipeline.description import Description
    from auditor.pipeline.photos import Photos
    from auditor.pipeline.postprocessing.post import Post
    from auditor.ports import Array, Arrays
    from auditor.replays.reference import Reference

SAMPLES = 4  # photographs where the user names no number, as of recorded samples

# What a pipeline makes of one photograph: the tensor, and the reference's outputs on it.
_Made = tuple["Array", "Arrays"]


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
STEPS: tuple[Step[Pipeline], ...] = (
    Step("preprocessing.decoder", _decoder),
    Step("preprocessing.orientation", _orientation, ("decoder",)),
    Step("preprocessing.colour", taking("colour")),
    Step("preprocessing.framing", _framing, ("precrop", "resize", "crop")),
    Step("preprocessing.resize", _resize),
    Step("preprocessing.channels", taking("channels")),
    Step("preprocessing.normalise", taking("scale", "mean", "std")),
    Step("preprocessing.layout", taking("layout", "dtype")),
)


@dataclass(frozen=True, slots=True)
class Upstream:
    """One photograph in both systems: what is before the network, and what is after it.

    Where a post-processing is described, everything is measured on its result, else on the final
    outputs.

    Attributes:
        names: ids of the causes before the network, in the order of execution.
        outputs: the reference's final outputs after the training pipeline, and after each further
            step is as deployed but the last: after that they are those that the audit starts from.
        places: where in the photograph the network's input is, for each of ``outputs`` and, last,
            after the whole deployment pipeline.
        after: the post-processings from the training side to the deployment side, each with the
            id of the cause that leads to it ("" for the first); empty without any.
        characters: of the classes of a text; empty where they are not described.
    """

    names: tuple[str, ...]
    outputs: tuple[Arrays, ...]
    places: tuple[Placement, ...]
    after: tuple[tuple[str, Post], ...] = ()
    characters: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, OutputKind]:
        """The kind that the result is read as; empty without a post-processing."""
        if not self.after:
            return {}
        return {results.NAME: self.after[0][1].kind}

    def read(self, outputs: Arrays, place: Placement | None = None) -> Arrays:
        """What the training side makes of the network's outputs.

        Args:
            outputs: by name.
            place: where the input is in the photograph; None: where the deployment has it.
        """
        if not self.after:
            return outputs
        return results.result(outputs, self.after[0][1], place or self.places[-1])

    def deployed(self, outputs: Arrays) -> Arrays:
        """What the deployment side makes of them."""
        if not self.after:
            return outputs
        return results.result(outputs, self.after[-1][1], self.places[-1])

    def origin(self, names: Iterable[str]) -> Arrays:
        """What the training system gives; ``names`` are outputs that the backend has too."""
        return self.read({name: self.outputs[0][name] for name in names}, self.places[0])

    def parts(self, network: Parts, base: Arrays, captured: Arrays) -> Parts:
        """The whole difference taken apart.

        Args:
            network: what the network's causes add to the final outputs.
            base: the reference's final outputs after the deployment's pipeline.
            captured: the backend's.
        """
        named: dict[str, Arrays] = {}
        states = [
            self.read({n: values[n] for n in base}, place)
            for values, place in zip(self.outputs, self.places, strict=False)
        ]
        states.append(self.read(base))
        for name, before, reached in zip(self.names, states, states[1:], strict=False):
            named[name] = difference(reached, before)
        outputs = base
        for name, part in network.named.items():
            outputs, named[name] = self._moved(outputs, part)
        rest = None
        if network.rest is not None:
            outputs, rest = self._moved(outputs, network.rest)
        made = [results.result(captured, each, self.places[-1]) for _, each in self.after]
        for (name, _), before, reached in zip(self.after[1:], made, made[1:], strict=False):
            named[name] = difference(reached, before)
        return Parts(named, rest)

    def _moved(self, outputs: Arrays, part: Arrays) -> tuple[Arrays, Arrays]:
        """The outputs with a part added, and what that adds to the result."""
        if not self.after:
            return outputs, part
        moved = {
            # Of another shape a part is the tensor itself (``difference``).
            name: (v + part[name]).astype(v.dtype) if part[name].shape == v.shape else part[name]
            for name, v in outputs.items()
        }
        return moved, difference(self.read(moved), self.read(outputs))


@dataclass(slots=True)
class _StepMeter:
    """What one step alone does, over photographs."""

    name: str
    noise: str
    training: str
    deployment: str
    handed: Moments = field(default_factory=Moments)
    same: Running = field(default_factory=Running)
    effect: Running = field(default_factory=Running)
    impact: Running = field(default_factory=Running)
    tasks: dict[str, TaskMeter] = field(default_factory=dict)

    def add(self, index: int, handed: tuple[Array, Array]) -> None:
        """Add what the step hands on, in deployment and in training."""
        self.handed.add(*handed)
        self.same.add(metrics.bit_identical(*handed), index)

    def report(self, share: float | None) -> PipelineStep:
        """Everything added so far; ``share`` is its share of what all steps do."""
        made = (task.result() for task in self.tasks.values())
        return PipelineStep(
            noise=self.noise,
            name=self.name,
            training=self.training,
            deployment=self.deployment,
            introduced=self.handed.distance().relative_l2,
            bit_identical=self.same.mean,
            effect=self.effect.mean if self.effect.count else None,
            leave_one_in=self.impact.mean if self.impact.count else None,
            share=share,
            leave_one_in_spread=self.impact.spread(),
            consequences=tuple(c for c in made if c is not None),
        )


def _meters(steps: Sequence[Step[S]], training: S, deployment: S) -> list[_StepMeter]:
    return [
        _StepMeter(s.name, s.noise, s.described(training), s.described(deployment)) for s in steps
    ]


class Photographs:
    """The stimulus made of photographs, and what the steps around the network do to them.

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
        self._steps = differing(STEPS, description.training, description.deployment)
        self._meters = _meters(self._steps, description.training, description.deployment)
        self._after: tuple[tuple[str, Post], ...] = ()
        self._post_steps: tuple[Step[Post], ...] = ()
        first, last = description.training_post, description.deployment_post
        if first is not None and last is not None:
            self._post_steps = differing(posts.STEPS, first, last)
            self._after = posts.between(first, last)
            self._meters += _meters(self._post_steps, first, last)
        self._shares = Pool()
        self._measured = 0
        self._outputs: dict[str, OutputMeter] = {}
        self._input = ""
        self._metadata = {entry.key: entry.value for entry in model.proto.metadata_props}
        self._known: tuple[str, ...] | None = None  # the characters, once they were read
        self._used, shape = self._usable(model)
        side = "the deployment side of " if self._meters else ""
        alike = ("Both sides of the pipeline are alike: nothing but the network can differ.",)
        notes = (*description.notes, *photos.notes, *(() if self._meters else alike))
        source = f"{photos.folder} through {side}{description.source}"
        shapes = {self._input: shape}
        info = StimulusInfo("recorded", len(self._used), None, source, shapes, notes)
        self.stimulus = Stimulus(info, self._sample)

    def _usable(self, model: Model) -> tuple[list[str], tuple[int, ...]]:
        """The photographs that both sides can prepare, and the shape that they become.

        Raises:
            UsageError: there is none.
        """
        used: list[str] = []
        shape: tuple[int, ...] = ()
        for name in self._photos.names:
            try:
                self._input, tensor = self._both(model, name)
            except (PhotoError, UsageError) as error:
                self._gap(name, "decode", error.message)
                continue
            shape = shape or tensor.shape
            if tensor.shape == shape:
                used.append(name)
            else:
                why = f"its tensor is {shown(tensor.shape)}, the first one's {shown(shape)}"
                self._gap(name, "compare", f"{why}: an audit compiles for one shape")
        if not used:
            raise UsageError(
                f"no photograph can be used of {len(self._photos.names)}: "
                f"{self.gaps[0].subject}: {self.gaps[0].reason}",
                "Both sides of the pipeline must read them and make what the model takes.",
            )
        return used, shape

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

        Raises:
            UsageError: the outputs, or their characters, are not as described.
        """
        if not self._meters and not self._after:
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
            outputs = tuple(run(pipeline)[1] for pipeline in reached) if self._steps else ()
        except Exception as error:  # halfway a step may fit no library, or not the network
            self._gap(name, "run", f"its steps cannot be switched one after another: {error}")
            return None
        names = tuple(step.noise for step in self._steps)
        places = [prepared.place(pipeline) for pipeline in (*reached[: len(outputs)], deployment)]
        if not outputs:
            outputs, places = (expected,), [places[-1]] * 2
        upstream = Upstream(names, outputs, tuple(places), self._after)
        upstream = replace(upstream, characters=self._characters(upstream))
        if not self._meters:
            return upstream
        self._measured += 1
        plain, first = run(training)
        origin = upstream.read(first, upstream.places[0])
        whole = self._add(index, upstream, origin, expected)
        for step, meter in zip(self._steps, self._meters, strict=False):
            try:
                other = step.take(training, deployment)
                tensor, values = run(other)
            except Exception as error:  # as above
                self._gap(name, "run", f"{step.name} alone: {error}")
                continue
            meter.add(index, (tensor, plain))
            self._alone(meter, index, upstream.read(values, prepared.place(other)), origin, whole)
        for post_step, meter in zip(
            self._post_steps, self._meters[len(self._steps) :], strict=True
        ):
            alone = post_step.take(self._after[0][1], self._after[-1][1])
            result = results.result(first, alone, upstream.places[0])
            meter.add(index, (result[results.NAME], origin[results.NAME]))
            self._alone(meter, index, result, origin, whole)
        return upstream

    def _characters(self, upstream: Upstream) -> tuple[str, ...]:
        if not self._after or (post := self._after[0][1]).kind != "text":
            return ()
        if self._known is None:
            made = upstream.origin(upstream.outputs[0])[results.NAME]
            self._known = results.characters(post, self._metadata, made.shape[-1])
        return self._known

    def _add(self, index: int, upstream: Upstream, origin: Arrays, expected: Arrays) -> float:
        """What all steps do together, and the share of each; the relative L2 of the former."""
        last = upstream.deployed(expected)
        for name, value in origin.items():
            if name not in self._outputs:
                kind = upstream.kinds.get(name) or self._kinds.get(name)
                self._outputs[name] = OutputMeter(name, kind, value, upstream.characters)
            self._outputs[name].add(last[name], value, index)
        whole = difference(last, origin)
        names = tuple(origin)
        parts = upstream.parts(Parts({}, None), expected, expected)
        relative = metrics.relative_l2(last, origin, names)
        self._shares.add(impact.booked(parts, whole, origin, names), relative)
        return relative

    def _alone(
        self, meter: _StepMeter, index: int, values: Arrays, origin: Arrays, whole: float
    ) -> None:
        """What a step without the others does."""
        effect = metrics.relative_l2(values, origin, tuple(origin))
        meter.effect.add(effect, index)
        if 0 < whole < math.inf:
            meter.impact.add(effect / whole, index)
        for name, value in values.items():
            task = meter.tasks.setdefault(name, self._outputs[name].alone())
            task.add(value, origin[name], index)

    def report(self) -> PipelineReport | None:
        """Everything measured; None where the two sides are alike."""
        if not self._meters:
            return None
        made = self._description
        first, last = made.training_post, made.deployment_post
        return PipelineReport(
            source=made.source,
            photos=self._measured,
            training=made.training.steps() | (first.steps() if first else {}),
            deployment=made.deployment.steps() | (last.steps() if last else {}),
            # A step that was measured on no photograph is a gap for each of them, and no figure.
            steps=tuple(m.report(self._share(m.noise)) for m in self._meters if m.same.count),
            outputs=tuple(meter.report() for meter in self._outputs.values()),
        )

    def _share(self, noise: str) -> float | None:
        return self._shares.share(self._shares.named[noise]) if self._shares.samples else None

    def _gap(self, photo: str, stage: str, reason: str) -> None:
        self.gaps.append(Gap(photo, stage, reason))
