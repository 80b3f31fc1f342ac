"""How far each cause would move a model's outputs if its deployment had it.

The question of the SysNoise paper (Wang et al., MLSys 2023, sec. 4), asked of one model and without
any backend: a noise's forms, which an audit replays on single segments, are put into the whole
reference at once, and its outputs on the stimulus are compared with the reference's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from threading import Timer
from typing import TYPE_CHECKING, Any

import onnx

from auditor.attribution import prepared
from auditor.comparison import metrics
from auditor.comparison.outputs import OutputMeter
from auditor.errors import NoiseError, UsageError
from auditor.graphs import surgery, weights
from auditor.records.measured import Sensitivity
from auditor.records.model import StimulusInfo
from auditor.replays import sessions
from auditor.replays.reference import Reference

if TYPE_CHECKING:
    from auditor.graphs.model import Model
    from auditor.ports import Arrays, Noise, Progress, Variant
    from auditor.stimulus import Stimulus


_REASON = 200  # characters of an engine's message
# Where ONNX Runtime's own check stands, and what it says in C++ (ORT_ENFORCE).
_PLACE = re.compile(r"^\S+\.(?:cc|cpp|cu|h|hpp):\d+ (?:.* was false\. )?")


def simulated(
    model: Model,
    stimulus: Stimulus,
    noises: Sequence[Noise],
    *,
    threads: int,
    seconds: float,
    progress: Progress,
) -> Iterator[Sensitivity]:
    """Run the whole reference under every form of every noise.

    Args:
        model: the reference.
        stimulus: its inputs; the reference's outputs on all samples are kept in memory.
        noises: what to simulate.
        threads: intra-op threads of every run.
        seconds: how long one run may take; loops that stand for narrow sums can take minutes.
        progress: told which noise is at work.

    Raises:
        UsageError: the reference does not run.
    """
    base = [Reference(model, threads).run(f) for f in _samples(stimulus)]
    changeable = whole(model, stimulus.sample(0), base[0], threads)
    for noise in noises:
        progress.update("reference", f"simulate {noise.id}")
        try:
            for variant in noise.simulations(changeable):
                yield _measured(noise.id, variant, stimulus, base, threads, seconds)
        except NoiseError as error:
            yield Sensitivity(noise.id, "", None, (), error.message)


def notes(
    model: Model, stimulus: StimulusInfo, noises: Sequence[Noise], rows: Sequence[Sensitivity]
) -> tuple[str, ...]:
    """What a reader of the simulation must know, as sentences."""
    said = []
    if stimulus.kind == "synthetic":
        said.append("The inputs are random: believe a ranking made on your own data (--data).")
    inner = sum(len(graph.node) for node in model.proto.graph.node for graph in _bodies(node))
    if inner:
        said.append(f"{inner} nodes in the bodies of If, Loop or Scan are left as they are.")
    found = {row.noise for row in rows}
    if silent := [noise.id for noise in noises if noise.id not in found]:
        said.append(f"Nothing to simulate in this model: {', '.join(silent)}.")
    return tuple(said)


def _measured(
    noise: str,
    variant: Variant,
    stimulus: Stimulus,
    base: Sequence[Arrays],
    threads: int,
    seconds: float,
) -> Sensitivity:
    """One form on every sample."""
    try:
        session = sessions.session(variant.model, threads)
        meters: dict[str, OutputMeter] = {}
        total = metrics.Running()
        for index, expected in enumerate(base):
            values = _run(session, list(expected), stimulus.sample(index), seconds)
            for name, value in values.items():
                if index == 0:
                    meters[name] = OutputMeter(name, None, expected[name])
                meters[name].add(value, expected[name], index)
            total.add(metrics.relative_l2(values, expected, tuple(expected)), index)
    except Exception as error:  # ORT raises a family of classes that share no base
        return Sensitivity(noise, variant.name, None, (), reason(error))
    outputs = tuple(meter.report() for meter in meters.values())
    return Sensitivity(noise, variant.name, total.mean, outputs, None)


def _run(session: Any, names: list[str], feeds: Arrays, seconds: float) -> Arrays:
    """One run, ended when it takes too long.

    Raises:
        TimeoutError: it did.
    """
    import onnxruntime as ort

    options = ort.RunOptions()
    timer = Timer(seconds, setattr, (options, "terminate", True))
    timer.start()
    try:
        return dict(zip(names, session.run(names, feeds, options), strict=True))
    except Exception as error:  # as above
        if options.terminate:
            raise TimeoutError(f"one run takes more than {seconds:g} s") from error
        raise
    finally:
        timer.cancel()


def reason(error: Exception) -> str:
    """The first line of an engine's message, without where in the engine it comes from."""
    lines = str(error).strip().rpartition("Status Message: ")[2].splitlines()
    return _PLACE.sub("", lines[0])[:_REASON] if lines else repr(error)


def _samples(stimulus: Stimulus) -> Iterator[Arrays]:
    return (stimulus.sample(index) for index in range(len(stimulus)))


def whole(model: Model, feeds: Arrays, expected: Arrays, threads: int) -> onnx.ModelProto:
    """The model with its weights inside, at an operator set that knows bfloat16 if it can be.

    Raises:
        UsageError: it is too large for one message.
    """
    proto = surgery.copied(model.proto)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(weights.attach(tensor, model.weights))
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise UsageError(
            f"{model.path} holds more than 2 GB of weights, and simulating needs them inside it",
            "Simulate a smaller model of the same family: sensitivities carry over.",
        )
    if surgery.opset(proto) >= prepared.OPSET:
        return proto
    for candidate in surgery.upgraded(proto, prepared.OPSET):
        try:
            values = sessions.session(candidate, threads).run(list(expected), feeds)
        except Exception:  # what ORT refuses is no conversion; its errors share no base
            continue
        if metrics.bitwise_equal(dict(zip(expected, values, strict=True)), expected):
            return candidate
    return proto


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield graph
            for inner in graph.node:
                yield from _bodies(inner)
