"""What every noise states about itself, and how that answers the questions of the audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx

from auditor.ports import Arrays, SegmentGraph, Variant
from auditor.records.backend import Kernel
from auditor.records.terms import Stage
from auditor.replays import kernel_layout


def _none(segment: SegmentGraph) -> Iterable[Variant]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A noise (``auditor.ports.Noise``) as data, and the one function that replays it.

    Attributes:
        id: ``family.name``, for instance ``precision.bf16``.
        stage: SysNoise stage (paper, Table 1).
        type: SysNoise type (paper, Table 1).
        title: what it is, in one sentence without a full stop.
        cause: why deployments differ here, in one or two sentences.
        applies: the operators, types and operator sets on which it can be replayed.
        source: where it is documented.
        advice: what to do about it on any backend.
        remedies: what to do about it on the backends that need or offer something else, by id.
        ablations: by backend id, the options (``--option ID.KEY=VALUE``) that switch it off there.
        otherwise: by backend id, what to do where they are set already and it is there all the
            same; ``advice`` where not given.
        forms: the names of the variants, most likely first; what is in capitals differs from
            segment to segment.
        stated: how engines write the precision that this noise is; empty where none says so.
        significand: bits (see the Protocol).
        convention: whether it is another definition of an operator (see the Protocol).
        cancelling: beginnings of the names of forms that may explain a part all the same.
        variants: the forms to replay on a segment (see the Protocol); none unless given.
        fitted: forms whose numbers, such as scales, are read off a segment's inputs and what the
            backend made of them (see the Protocol ``Fitting``).
        simulated: whether to simulate those forms on whole models: deployments choose it, while
            what is False is a defect that a backend has or has not.
        simulation: the forms to simulate, where they are others than those to replay.
    """

    id: str
    stage: Stage = "inference"
    type: str
    title: str
    cause: str
    applies: str
    source: str
    advice: str
    remedies: Mapping[str, str] = field(default_factory=dict)
    ablations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    otherwise: Mapping[str, str] = field(default_factory=dict)
    stated: frozenset[str] = frozenset()
    significand: int | None = None
    convention: bool = False
    cancelling: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    variants: Callable[[SegmentGraph], Iterable[Variant]] = _none
    fitted: Callable[[SegmentGraph, Arrays, Arrays], Iterable[Variant]] | None = None
    simulated: bool = True
    simulation: Callable[[SegmentGraph], Iterable[Variant]] | None = None

    def fits(self, segment: SegmentGraph, inputs: Arrays, observed: Arrays) -> Iterable[Variant]:
        """The forms whose numbers fit the backend's tensors."""
        return () if self.fitted is None else self.fitted(segment, inputs, observed)

    def simulations(self, model: onnx.ModelProto) -> Iterable[Variant]:
        """The forms in a whole model, which is one segment without kernels."""
        return (self.simulation or self.variants)(SegmentGraph(model, ())) if self.simulated else ()

    def remedy(self, backend: str, options: Mapping[str, str] = MappingProxyType({})) -> str:
        """What to do about it on this backend, concretely (see the Protocol)."""
        found, off = self.remedies.get(backend, self.advice), self.ablations.get(backend, {})
        if off.items() <= options.items() and any(key in found for key in off):
            return self.otherwise.get(backend, self.advice)
        return found

    def stated_by(self, kernels: tuple[Kernel, ...]) -> bool:
        """Whether the engine itself reports this noise's precision for one of these kernels."""
        return kernel_layout.stated(kernels, self.stated)
