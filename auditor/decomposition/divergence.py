"""Accumulated, introduced and inherited error of every segment, summed over samples.

With a backend's captured inputs in_b and outputs out_b of a segment, the reference's out_r, and
h(in_b), the reference segment run on the backend's own inputs::

    accumulated = ‖out_b − out_r‖ / ‖out_r‖      what the tensor is off by
    introduced  = ‖out_b − h(in_b)‖ / ‖out_r‖    what this segment itself did
    inherited   = ‖h(in_b) − out_r‖ / ‖out_r‖    what it was handed and passed on
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx

from auditor.comparison import metrics
from auditor.comparison.metrics import Moments, Steps
from auditor.graphs import surgery
from auditor.graphs.segments import Cut
from auditor.noises import fp32_rounding
from auditor.ports import Array, Arrays
from auditor.replays.reorder import longest_sum
from auditor.replays.replay import Replayer, ReplayError, difference, session
from auditor.replays.widening import own_types
from auditor.replays.writer import Format

# Operators that draw numbers.
_RANDOM = ("Random", "Multinomial", "Bernoulli", "Dropout")
# A runtime may round to the model's narrow types at other places than every operator's result.
OWN_TYPES_FACTOR = 2.0
OWN_TYPES_LIMIT = 8.0  # half units in the last place
# So that a floor that is the error itself is not below it where that is added up otherwise.
_ABOVE = 1 + 1e-6
# Additions up to which sums are added up one after another: a second's work, and 2 GB at worst.
STEPS = 5e8


@dataclass(frozen=True, slots=True)
class Local:
    """One segment on one sample: the reference on the backend's inputs, and what is left."""

    inputs: Arrays  # in_b
    observed: Arrays  # out_b
    replayed: Arrays  # h(in_b)

    @property
    def error(self) -> Arrays:
        """What the segment introduced: out_b − h(in_b)."""
        return difference(self.observed, self.replayed)


@dataclass(slots=True)
class Meter:
    """Running sums of one segment over samples."""

    cut: Cut
    accumulated: dict[str, Moments] = field(default_factory=dict)
    introduced: dict[str, Moments] = field(default_factory=dict)
    inherited: dict[str, Moments] = field(default_factory=dict)
    entering: dict[str, Moments] = field(default_factory=dict)
    floor: float = 0.0
    identical: float = 0.0
    samples: int = 0
    unmeasured: str | None = None
    steps: Steps = field(default_factory=Steps)  # of integer outputs, against the replay

    def add(
        self,
        local: Local | None,
        captured: Arrays,
        reference: Arrays,
        known: dict[str, Moments] | None = None,
    ) -> None:
        """Add one sample; ``local`` is None where the segment could not be replayed.

        ``known`` keeps this sample's distance between backend and reference by tensor: what leaves
        one segment enters others.
        """
        known = {} if known is None else known

        def apart(name: str) -> Moments:
            if name not in known:
                known[name] = Moments()
                known[name].add(captured[name], reference[name])
            return known[name]

        for name in self.cut.inputs:
            _moments(self.entering, name).merge(apart(name))
        self.samples += 1
        same = 0.0
        for name in self.cut.outputs:
            off = apart(name)
            _moments(self.accumulated, name).merge(off)
            if local is None:
                continue
            introduced, inherited = (_moments(m, name) for m in (self.introduced, self.inherited))
            identical = metrics.bit_identical(captured[name], local.replayed[name])
            if identical == 1:  # it passed on what it was handed: both are known
                introduced.merge(Moments(reference=off.observed))
                inherited.merge(off)
            else:
                introduced.add(captured[name], local.replayed[name])
                inherited.add(local.replayed[name], reference[name])
            self.steps.add(captured[name], local.replayed[name])
            same += identical
        self.identical += same / len(self.cut.outputs)

    def relative(self, of: dict[str, Moments]) -> float:
        """Error against the *reference's* norm, as root mean square over the outputs."""
        total = 0.0
        for name, moments in of.items():
            if not math.isfinite(moments.error):
                return math.inf
            total += moments.relative_to(self.accumulated[name])
        return math.sqrt(total / len(of)) if of else 0.0

    @property
    def flagged(self) -> bool:
        """Whether the introduced error is above everything rounding and repetition can do."""
        return self.relative(self.introduced) > self.floor

    @property
    def exact(self) -> bool:
        """Whether the segment did just what the reference does on what it was handed."""
        return self.unmeasured is None and all(m.error == 0 for m in self.introduced.values())

    @property
    def amplification(self) -> float | None:
        """Accumulated error out over accumulated error in; None when the inputs carry none."""
        entering = [m.distance().relative_l2 for m in self.entering.values()]
        into = math.sqrt(sum(e * e for e in entering) / len(entering)) if entering else 0.0
        out = self.relative(self.accumulated)
        return out / into if 0 < into < math.inf and math.isfinite(out) else None


def replay(replayer: Replayer, cut: Cut, captured: Arrays) -> Local:
    """Run one reference segment on the backend's captured tensors.

    Raises:
        ReplayError: the reference cannot take them (a wrong shape, mostly).
    """
    return Local(
        inputs={name: captured[name] for name in cut.inputs},
        observed={name: captured[name] for name in cut.outputs},
        replayed=replayer.run(cut, captured),
    )


def floor(
    replayer: Replayer,
    cut: Cut,
    local: Local,
    reference: Mapping[str, Array],
    again: Arrays | None = None,
    own: Format | None = None,
) -> float:
    """The introduced error below which nothing is blamed on this segment.

    The largest of what rounding can do there (replays with the inputs perturbed in their last bit,
    but for what is decided on them as they were observed, with every sum added up in reverse order,
    and with exponentials evaluated exactly), of what rounding to the model's own narrow types does
    (unless that is far more than a few roundings: then it is worth a word), and, for a program that
    does not repeat its own bits, how far two of its runs are apart. Between integers, booleans and
    texts nothing moves: a sum that overflows is another one in another order, which no rounding is.
    Where only values in the middle between two steps of 8 bits went to the other side, all of it is
    rounding.

    Args:
        replayer: runs the reference's segments.
        cut: the segment.
        local: its divergence on one sample.
        reference: the reference's tensors, whose norms the error is relative to.
        again: a second capture, where the program does not repeat its own bits.
        own: the narrow format that the model gives the segment's outputs, if any.
    """
    scale = {name: Moments() for name in cut.outputs}
    for name, moments in scale.items():
        moments.add(reference[name], reference[name])
    repeat = _distance({n: again[n] for n in cut.outputs}, local.observed, scale) if again else 0.0
    if draws(replayer.graph.nodes[i] for i in cut.nodes) and not metrics.bitwise_equal(
        replayer.run(cut, local.inputs), local.replayed
    ):  # its own movement says nothing about rounding, and a program that draws too moves as well
        return max(fp32_rounding.floor(0.0), 2 * repeat)
    model = replayer.model(cut, local.inputs)
    if surgery.is_exact(model):
        return max(fp32_rounding.floor(0.0), 2 * repeat)
    generator = np.random.default_rng(0)
    jittered = {n: fp32_rounding.jitter(v, generator) for n, v in local.inputs.items()}
    scaled = {n: fp32_rounding.scaled(v) for n, v in local.inputs.items()}

    def moved_by(inputs: Arrays) -> float:
        run = partial(replayer.run_decided, cut, local.inputs, inputs)
        return _movement(run, local.replayed, scale)

    jitter = moved_by(jittered)
    if all(value.dtype.kind == "f" for value in local.replayed.values()):
        # Not where values are counted in steps: moving all of them alike moves many over the edge.
        jitter = max(jitter, moved_by(scaled))
    reorder = _movement(
        lambda: replayer.run_reordered(cut, local.inputs, local.replayed), local.replayed, scale
    )
    exact = _movement(
        lambda: replayer.run_exact(cut, local.inputs, local.replayed), local.replayed, scale
    )
    half = any(local.observed[name].dtype == np.float16 for name in cut.outputs)
    terms = longest_sum(model.graph.node, surgery.shapes(model))
    typed = 0.0
    if own is not None:
        half_unit = 2.0**-own.bits  # what one rounding does at most
        moved = _movement(lambda: _in_own_types(replayer, cut, local, own), local.replayed, scale)
        typed = max(half_unit, min(OWN_TYPES_FACTOR * moved, OWN_TYPES_LIMIT * half_unit))
    found = fp32_rounding.floor(jitter, reorder, terms, half=half, exact=exact)
    found = max(found, typed, 2 * repeat)
    introduced = _distance(local.observed, local.replayed, scale)
    if found < introduced <= fp32_rounding.furthest(jitter, terms) and _quick(local, terms):
        in_order = _movement(
            lambda: replayer.run_in_order(cut, local.inputs, local.replayed), local.replayed, scale
        )
        found = max(found, fp32_rounding.floor(jitter, in_order, terms, half=half))
    if found < introduced and (sided := _sided(replayer, cut, local)) is not None:
        return introduced * _ABOVE if _distance(local.observed, sided, scale) <= found else found
    return found


def _sided(replayer: Replayer, cut: Cut, local: Local) -> Arrays | None:
    """The segment with what lies between two steps of 8 bits on the backend's side."""
    try:
        return replayer.run_sided(cut, local.inputs, local.replayed, local.observed)
    except ReplayError:
        return None


def _quick(local: Local, terms: int) -> bool:
    """Whether a segment's sums can be added up term by term in a second or so."""
    return terms * max(value.size for value in local.replayed.values()) <= STEPS


def draws(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether any of the nodes may draw random numbers."""
    return any(node.op_type.startswith(_RANDOM) for node in nodes)


def _in_own_types(replayer: Replayer, cut: Cut, local: Local, own: Format) -> Arrays:
    """The segment with its inputs and the result of every operator rounded as the types say.

    Inputs move by as much as rounding to the type could move them: a runtime may hold more bits
    than it shows.
    """
    plain = replayer.model(cut, local.inputs)
    generator = np.random.default_rng(0)
    half_unit = 2.0**-own.bits
    inputs = {n: fp32_rounding.jitter(v, generator, half_unit) for n, v in local.inputs.items()}
    try:
        rounded = own_types(plain, own) or plain
        values = session(rounded, replayer.threads, replayer.folder).run(None, inputs)
    except Exception as error:  # ORT raises a family of classes that share no base
        raise ReplayError(cut, "rounded", error) from error
    return dict(zip(cut.outputs, values, strict=True))


def _movement(run: Callable[[], Arrays], replayed: Arrays, scale: dict[str, Moments]) -> float:
    try:
        return _distance(run(), replayed, scale)
    except ReplayError:
        return 0.0


def _distance(a: Arrays, b: Arrays, scale: dict[str, Moments]) -> float:
    total = 0.0
    for name, value in b.items():
        moments = Moments()
        moments.add(a[name], value)
        if 0 < moments.error < math.inf and scale[name].reference > 0:
            total += moments.relative_to(scale[name])
    return math.sqrt(total / len(b))


def _moments(of: dict[str, Moments], name: str) -> Moments:
    return of.setdefault(name, Moments())
