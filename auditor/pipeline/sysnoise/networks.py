"""The network as written, and under the forms of causes that deployments choose.

One session with one thread for each form; photographs run beside each other, which keeps all cores
busy without batches, whose results need not have the bits of single runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auditor import sensitivity
from auditor.errors import NoiseError, UsageError
from auditor.graphs.model import shown
from auditor.records.backend import Gap
from auditor.replays import sessions
from auditor.replays.reference import Reference

if TYPE_CHECKING:
    import onnx

    from auditor.graphs.model import Model, TensorSpec
    from auditor.ports import Array, Arrays, Noise, Progress

# The types of the paper's Table 1 that lie in the network.
PAPER = (
    "inference.ceil_mode",
    "inference.upsample",
    "precision.fp16",
    "precision.bf16",
    "precision.int8",
)
TITLES = {
    "inference.ceil_mode": "ceil mode",
    "inference.upsample": "upsample",
    "precision.fp16": "FP16",
    "precision.bf16": "BF16",
    "precision.int8": "INT8",
}
_GROUPS = ("ceil mode", "upsample", "data precision")  # in which order several are put together
# A form that stands for narrow sums by a loop takes minutes for what others do in seconds.
_SLOWEST = 10.0  # times the network as written


@dataclass(frozen=True, slots=True)
class Form:
    """One form of a cause in the whole network."""

    noise: str
    variant: str
    group: str  # SysNoise type: of one type a deployment has one option


Forms = tuple[Form, ...]


class Networks:
    """The network under every combination of forms that was asked for.

    Attributes:
        forms: the single forms that can be run.
        gaps: those that cannot, with the reason.
        silent: causes with nothing to change in this network.
    """

    def __init__(
        self, model: Model, noises: Sequence[Noise], tensor: Array, progress: Progress
    ) -> None:
        """Compile the network and every form of ``noises``.

        Args:
            model: the network; it has one input.
            noises: what to simulate.
            tensor: an input, to see what each form costs.
            progress: told which cause is at work.

        Raises:
            UsageError: the network has several inputs, or does not take the tensor.
        """
        self.input = network_input(model, tensor)
        self.outputs = list(model.outputs)
        self.forms: list[Form] = []
        self.gaps: list[Gap] = []
        self._noises = {noise.id: noise for noise in noises}
        feeds = {self.input: tensor}
        expected = Reference(model, 1).run(feeds)
        self._whole = sensitivity.whole(model, feeds, expected, 1)
        self._sessions: dict[Forms, Any] = {
            (): sessions.session(model.proto, 1, model.folder),
        }
        self.seconds = min(self._timed((), feeds) for _ in range(3))
        for noise in noises:
            progress.update("reference", f"simulate {noise.id}")
            self._add(noise, feeds)
        found = {form.noise for form in self.forms} | {gap.subject for gap in self.gaps}
        self.silent = [noise.id for noise in noises if noise.id not in found]

    def run(self, forms: Forms, tensor: Array) -> Arrays:
        """All outputs, by name.

        Raises:
            Exception: the engine's own, when it refuses the tensor.
        """
        values = self._sessions[forms].run(self.outputs, {self.input: tensor})
        return dict(zip(self.outputs, values, strict=True))

    def combine(self, forms: Forms) -> bool:
        """Compile several forms in one network; False, and a gap, where that is impossible."""
        if forms in self._sessions:
            return True
        name = " + ".join(form.noise for form in forms)
        model = self._whole
        try:
            for form in forms:
                variants = self._noises[form.noise].simulations(model)
                made = next((v.model for v in variants if v.name == form.variant), None)
                if made is None:
                    reason = f"{form.noise} ({form.variant}) does not apply on top of the others"
                    self.gaps.append(Gap(name, "simulate", reason))
                    return False
                model = made
            self._sessions[forms] = sessions.session(model, 1)
        except NoiseError as error:
            self.gaps.append(Gap(name, "simulate", error.message))
            return False
        except Exception as error:  # ORT raises a family of classes that share no base
            self.gaps.append(Gap(name, "simulate", sensitivity.reason(error)))
            return False
        return True

    def _add(self, noise: Noise, feeds: Arrays) -> None:
        try:
            for variant in noise.simulations(self._whole):
                self._try(Form(noise.id, variant.name, noise.type), variant.model, feeds)
        except NoiseError as error:
            self.gaps.append(Gap(noise.id, "simulate", error.message))

    def _try(self, form: Form, model: onnx.ModelProto, feeds: Arrays) -> None:
        try:
            self._sessions[(form,)] = sessions.session(model, 1)
            seconds = min(self._timed((form,), feeds) for _ in range(2))
        except Exception as error:  # as above
            why = f"{form.variant}: {sensitivity.reason(error)}"
        else:
            if seconds <= _SLOWEST * self.seconds:
                self.forms.append(form)
                return
            times = seconds / self.seconds
            why = f"{form.variant}: takes {times:.0f} times as long as the network as written"
        self._sessions.pop((form,), None)
        self.gaps.append(Gap(form.noise, "simulate", why))

    def _timed(self, forms: Forms, feeds: Arrays) -> float:
        begun = time.thread_time()  # each runs on this thread; others may keep it waiting
        self._sessions[forms].run(self.outputs, feeds)
        return time.thread_time() - begun


def name(forms: Forms) -> str:
    """Several forms in words."""
    return " + ".join(f"{form.noise}: {form.variant}" for form in forms)


def in_order(forms: Iterable[Form]) -> Forms:
    """Forms in the order in which they are put into one network: precision last."""
    ranks = {group: rank for rank, group in enumerate(_GROUPS)}
    return tuple(sorted(forms, key=lambda form: (ranks.get(form.group, len(ranks)), form.noise)))


def network_input(model: Model, tensor: Array) -> str:
    """The network's only input.

    Raises:
        UsageError: there are several, or it does not take the tensor.
    """
    if len(model.inputs) != 1:
        names = ", ".join(str(spec) for spec in model.inputs)
        raise UsageError(
            f"a pipeline makes one tensor, but the model takes {len(model.inputs)}: {names}",
            "Export the model with the image as its only input.",
        )
    spec = model.inputs[0]
    if not _fits(spec, tensor):
        raise UsageError(
            f"the pipeline makes {tensor.dtype} {shown(tensor.shape)}, but the model takes {spec}",
            "Change `resize`, `crop`, `layout` or `dtype` of the pipeline.",
        )
    return spec.name


def _fits(spec: TensorSpec, tensor: Array) -> bool:
    return (
        spec.dtype == tensor.dtype
        and len(spec.shape) == tensor.ndim
        and all(
            not isinstance(want, int) or want == have
            for want, have in zip(spec.shape, tensor.shape, strict=True)
        )
    )
