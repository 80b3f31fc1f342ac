"""The final divergence of one model output over samples, and the samples that stand out."""

from __future__ import annotations

from collections.abc import Sequence

from auditor.comparison.metrics import Moments, Running, Steps, steps_apart
from auditor.comparison.tasks import TaskMeter, assume
from auditor.errors import UsageError
from auditor.ports import Array
from auditor.records.measured import OutputDistance
from auditor.records.terms import OutputKind


class OutputMeter:
    """One final output; memory does not grow with the number of samples.

    Attributes:
        empty: whether neither side had an element in it on any sample.
    """

    def __init__(
        self,
        name: str,
        stated: OutputKind | None,
        reference: Array,
        tokens: Sequence[str] = (),
    ) -> None:
        """Prepare for samples.

        Args:
            name: the output's ONNX name.
            stated: as what the user says it is read; None to assume it from the values.
            reference: the reference's output on the first sample.
            tokens: what the classes of a text stand for.

        Raises:
            UsageError: it is to be read as text, but has no steps of classes.
        """
        self.name = name
        self.kind = stated or assume(name, reference)
        if self.kind == "text" and (reference.ndim < 2 or reference.dtype.kind != "f"):
            raise UsageError(
                f"output `{name}` cannot be read as text: it is {reference.dtype} "
                f"{list(reference.shape)}, where scores [..., steps, classes] were expected",
                "Name another output with --output-kind.",
            )
        self.empty = True
        self._tokens = tokens
        self._stated = stated is not None
        self._moments = Moments()
        self._errors = Running()
        self._steps = Steps()
        self._max_ulp: float | None = None
        self._task = self.alone()
        self._nonfinite = 0
        self._first_nonfinite: int | None = None

    def alone(self) -> TaskMeter:
        """A meter for something else that changes this output, which is read in the same way."""
        return TaskMeter(self.name, self.kind, self._tokens)

    def add(self, observed: Array, reference: Array, sample: int) -> float:
        """Add one sample; returns its relative L2."""
        self.empty &= observed.size == reference.size == 0
        one = Moments()
        one.add(observed, reference)
        self._moments.merge(one)
        relative = one.distance().relative_l2
        self._errors.add(relative, sample)
        self._steps.add(observed, reference)
        if (apart := steps_apart(observed, reference)) is not None:
            self._max_ulp = max(self._max_ulp or 0.0, apart)
        self._task.add(observed, reference, sample)
        # Shapes alike and yet no finite distance: NaN or infinity on one side only.
        if observed.shape == reference.shape and one.mismatch is not None:
            self._nonfinite += 1
            if self._first_nonfinite is None:
                self._first_nonfinite = sample
        return relative

    @property
    def diverges(self) -> bool:
        """Whether it differed on any sample."""
        return self._moments.error > 0

    def report(self) -> OutputDistance:
        """Everything added so far."""
        consequence = self._task.result()
        agreement = None
        if consequence is not None and self.kind in ("scores", "text") and consequence.items:
            agreement = 1 - (consequence.changed or 0) / consequence.items
        return OutputDistance(
            name=self.name,
            distance=self._moments.distance(),
            top1_agreement=agreement,
            kind=self.kind,
            kind_stated=self._stated,
            consequence=consequence,
            spread=self._errors.spread(),
            nonfinite=self._nonfinite,
            first_nonfinite=self._first_nonfinite,
            one_step=self._steps.fraction,
            max_ulp=self._max_ulp,
        )
