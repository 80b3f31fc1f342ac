"""Which segments are above their floor, sample by sample."""

from __future__ import annotations

import contextlib
import math
from functools import partial

from auditor.comparison.metrics import Moments
from auditor.decomposition import divergence, impact
from auditor.decomposition import floor as floors
from auditor.decomposition.divergence import Local, Meter
from auditor.decomposition.impact import Chain
from auditor.graphs.segments import Cut
from auditor.noises import fp32_rounding
from auditor.ports import Arrays
from auditor.replays.reference import Reference
from auditor.replays.replay import ReplayError


class Flagging:
    """The segments of one backend.

    Attributes:
        meters: their running sums, by id.
        narrow: of the sample added last, the segments that only a narrow type's rounding moved.
    """

    def __init__(self, reference: Reference) -> None:
        """No sample was added yet."""
        self.meters: dict[str, Meter] = {}
        self.narrow: dict[str, Local] = {}
        self._reference = reference
        self._floored = set[str]()  # segments whose floor was measured
        self._shown = set[str]()  # … and those whose error moved more than rounding does

    def add(self, chain: Chain, again: Arrays | None, *, first: bool) -> dict[str, Local]:
        """Add one sample.

        Args:
            chain: the backend's chain.
            again: the backend's tensors of another run, where it does not repeat its own bits.
            first: whether it is the first sample.

        Returns:
            By id, the divergence of the segments above their floor.
        """
        beside = chain.replayer.beside
        # What leaves one segment enters others, so tensors are compared first, each once.
        names = dict.fromkeys(n for cut in chain.cuts for n in (*cut.inputs, *cut.outputs))
        known = dict(zip(names, beside(chain.apart, names), strict=True))
        for cut in chain.cuts:
            ends = [chain.base[n].dtype for n in (*cut.inputs, *cut.outputs)]
            real = any(kind.kind == "f" for kind in ends)
            smallest = fp32_rounding.floor(0.0, double=floors.double(ends)) if real else 0.0
            self.meters.setdefault(cut.id, Meter(cut, floor=smallest))
        measure = partial(self._measure, chain=chain, known=known, again=again, first=first)
        found = {
            cut.id: local
            for cut, local in zip(chain.cuts, beside(measure, chain.cuts), strict=True)
            if local is not None
        }
        self.narrow = {id: found.pop(id) for id in list(found) if not self.meters[id].flagged}
        self._drop_unseen(chain, found)
        if all(math.isfinite(self.meters[id].relative(self.meters[id].introduced)) for id in found):
            with contextlib.suppress(ReplayError):  # a shape, which is infinitely far off itself
                self._add_deciding(chain, found)
        return found

    def _measure(
        self,
        cut: Cut,
        chain: Chain,
        known: dict[str, Moments],
        again: Arrays | None,
        *,
        first: bool,
    ) -> Local | None:
        """Measure one segment; its divergence if that is above its floor, or above float32's."""
        meter, local = self.meters[cut.id], None
        try:
            local = divergence.replay(chain.replayer, cut, chain.captured)
        except ReplayError as error:
            meter.unmeasured = meter.unmeasured or error.message
        meter.add(local, chain.captured, chain.base, known)
        # Its floor says as well how far an output may be off.
        last = not set(cut.outputs).isdisjoint(chain.outputs)
        off = last and meter.relative(meter.accumulated) > meter.floor
        noisy = first and again is not None
        if local is None or not (noisy or meter.flagged or off):
            return None
        if cut.id not in self._floored:  # on the first sample above the smallest floor there is
            self._floored.add(cut.id)
            own = self._reference.own_type(cut)
            floor = floors.floor(chain.replayer, cut, local, known, again, own)
            meter.floor, meter.single, meter.own = floor.total, floor.single, floor.own
        return local if meter.flagged or meter.narrow else None

    def _drop_unseen(self, chain: Chain, found: dict[str, Local]) -> None:
        """Drop what no output shows and no rounding in float32 would either.

        Between integers nothing is rounding, and in float64 hardly anything; what no output shows
        is no finding for all that.
        """
        least = fp32_rounding.floor(0.0)
        for cut in [c for c in chain.cuts if c.id in found.keys() - self._shown]:
            meter = self.meters[cut.id]
            if meter.relative(meter.introduced) > least or impact.shows(chain, cut, found[cut.id]):
                self._shown.add(cut.id)
            else:
                meter.floor = least
                del found[cut.id]

    def _add_deciding(self, chain: Chain, found: dict[str, Local]) -> None:
        """Add the segment from which on NaN or infinity differ in the outputs, if there is one.

        Raises:
            ReplayError: the reference cannot go on from the backend's tensors.
        """
        decisive = impact.deciding(chain)
        if decisive is not None:
            self.meters[decisive.id].floor = 0.0  # as little as this matters here
            self._shown.add(decisive.id)
            self.narrow.pop(decisive.id, None)
            found[decisive.id] = divergence.replay(chain.replayer, decisive, chain.captured)
