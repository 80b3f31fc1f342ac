"""The cause of each segment's error over samples: looked for once, tested again later.

The whole search runs on the first sample on which a segment is above its floor. On later samples
only its winner (in several forms where few elements differ) and the closest rival are replayed,
and the squared errors are summed::

    explained = 1 − Σ_samples ‖out_b − h_n(in_b)‖² / Σ_samples ‖out_b − h(in_b)‖²

A cause stays named when that share is enough, with the samples that contradict it counted; where
it is not and the rival's is, the rival is named; else the error is unexplained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from auditor.attribution import hypotheses
from auditor.attribution.explainer import Beside, Explainer, Explanation, Retest
from auditor.attribution.hypotheses import ENOUGH
from auditor.comparison.metrics import Running
from auditor.decomposition.divergence import Local
from auditor.ports import Arrays, Noise, SegmentGraph
from auditor.records.measured import Hypothesis, Spread
from auditor.replays.replay import difference


@dataclass(frozen=True, slots=True)
class Attribution:
    """What is known of one segment's cause after all samples.

    Attributes:
        noise: id of the cause named, None when the error is unexplained.
        explained, bit_identical: of the named cause over samples; those of ``Explanation`` when
            none is named.
        sample: index of the sample on which the cause was looked for.
        hypotheses: all that was tested there, best first.
        spread: share explained by sample, of the cause found there even if it is no longer named.
        contradicted: samples on which that cause does not fit.
        refuted: id of that cause, where the later samples took its name away.
    """

    noise: str | None
    explained: float
    bit_identical: float
    sample: int
    hypotheses: tuple[Hypothesis, ...]
    spread: Spread | None
    contradicted: int
    refuted: str | None

    @property
    def residual(self) -> float:
        """‖out_b − h_n‖ / ‖out_b − h‖ over samples; 1 when none is named."""
        return math.sqrt(max(0.0, 1 - self.explained))


@dataclass(slots=True)
class _Tally:
    """One contender over samples."""

    noise: str
    left: float = 0.0
    error: float = 0.0
    needed: float = 0.0
    exact: bool = False
    contradicted: int = 0
    explained: Running = field(default_factory=Running)
    identical: Running = field(default_factory=Running)

    def add(self, found: Retest, sample: int) -> bool:
        """Add one sample; whether the contender fits it."""
        share = 1 - found.left / found.error
        fits = hypotheses.holds(share, found.bit_identical, found.needed, found.exact)
        self.left += found.left
        self.error += found.error
        self.needed = max(self.needed, found.needed)
        self.exact |= found.exact
        self.contradicted += not fits
        self.explained.add(share, sample)
        self.identical.add(found.bit_identical, sample)
        return fits

    @property
    def share(self) -> float:
        """Share explained over all samples."""
        return 1 - self.left / self.error if self.error else 0.0

    @property
    def holds(self) -> bool:
        """Whether the cause can be named over all samples."""
        return hypotheses.holds(self.share, self.identical.mean, self.needed, self.exact)


@dataclass(slots=True)
class _Case:
    """One segment: what the search found, and its contenders since."""

    sample: int
    found: Explanation
    tallies: list[_Tally]


class Causes:
    """The causes of one backend's segments."""

    def __init__(
        self,
        noises: Sequence[Noise],
        threads: int,
        *,
        later: bool,
        beside: Beside = map,
    ) -> None:
        """Nothing is explained yet.

        Args:
            noises: the catalogue of hypotheses.
            threads: intra-op threads of each replay.
            later: whether more than one sample will come, so that contenders are worth keeping.
            beside: maps a function over rival causes, perhaps on several threads.
        """
        self._explainer = Explainer(tuple(noises), threads, later, beside)
        self._cases: dict[str, _Case] = {}

    def __contains__(self, id: str) -> bool:
        """Whether a segment's cause was looked for already."""
        return id in self._cases

    def look(
        self,
        id: str,
        segment: SegmentGraph,
        local: Local,
        sample: int,
        *,
        thorough: bool,
        floor: float = math.inf,
    ) -> tuple[Arrays | None, tuple[str, ...]]:
        """Search for the cause of a segment's error.

        Args:
            id: the segment's.
            segment: the reference segment, and the kernels the engine says it ran there.
            local: its divergence on this sample.
            sample: the sample's index.
            thorough: also test rivals after a cause was found.
            floor: the introduced error that rounding explains.

        Returns:
            The part of the error that the cause named reproduces, None when none is named; and
            the hypotheses that could not be replayed, as sentences.
        """
        found = self._explainer.explain(segment, local, thorough=thorough, floor=floor)
        tallies = [_Tally(contender.noise) for contender in found.contenders]
        for tally, contender in zip(tallies, found.contenders, strict=True):
            tally.add(contender.first, sample)
        part = difference(found.outputs, local.replayed) if found.noise is not None else None
        kept = found.contenders if self._explainer.later else ()
        self._cases[id] = _Case(sample, replace(found, outputs={}, contenders=kept), tallies)
        return part, found.failures

    def again(self, id: str, local: Local, sample: int) -> Arrays | None:
        """Test the cause found earlier on another sample, in each form that fitted before.

        Returns:
            The part of the error that it reproduces; None where it does not fit this sample.
        """
        case = self._cases[id]
        results = self._explainer.retest(case.found.contenders, local)
        part: Arrays | None = None
        for tally, result in zip(case.tallies, results, strict=False):
            fits = tally.add(result, sample)
            if fits and part is None and tally.noise == case.found.noise:
                part = difference(result.outputs, local.replayed)
        return part

    def noise(self, id: str) -> str | None:
        """Id of the cause that the search named, None when it named none."""
        return self._cases[id].found.noise

    def of_the_file(self) -> tuple[frozenset[str], int]:
        """Segments whose error the compiled file's constants make; how many were looked at."""
        shares = {id: case.found.own for id, case in self._cases.items()}
        made = frozenset(id for id, s in shares.items() if s is not None and s >= ENOUGH)
        return made, len(shares)

    def verdict(self, id: str) -> Attribution:
        """What all samples together say."""
        case = self._cases[id]
        first = case.tallies[0] if case.tallies else None
        named = next((t for t in case.tallies if t.holds), None)
        if named is not None and first is not None and named.noise == first.noise:
            first = named  # in another form
        return Attribution(
            noise=named.noise if named else None,
            explained=named.share if named else 0.0,
            bit_identical=named.identical.mean if named else case.found.bit_identical,
            sample=case.sample,
            hypotheses=case.found.hypotheses,
            spread=first.explained.spread() if first else None,
            contradicted=first.contradicted if first else 0,
            refuted=first.noise if first is not None and first is not named else None,
        )
