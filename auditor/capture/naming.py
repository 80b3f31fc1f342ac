"""Whether the tensors that a backend names by inference are the ones it says.

An engine renames what it re-lays and fuses, so its adapter derives names. A wrong one would put an
error where there is none; what is doubtful is not observed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from auditor.comparison import metrics
from auditor.graphs import artefact
from auditor.replays.replay import ReplayError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set

    from auditor.graphs.segments import Cut
    from auditor.ports import Array, Arrays
    from auditor.records.measured import Distance
    from auditor.replays.replay import Replayer

    _Replayed = Callable[[Cut], Arrays]  # a segment on the captured tensors

# A derived name is believed when the values have at least this cosine similarity.
CONFIRMED: Final = 0.9
# Where less of a tensor is off, relative L2, asking whether the engine read it is not worth a run.
_SMALL: Final = 1e-3
# So many times less is off in a replay without the tensor, where that was not read.
_MUCH: Final = 10.0
# Replays that are held: a segment's makers are mostly a few segments before it.
_NEIGHBOURS: Final = 4


def unconfirmed(
    replayer: Replayer,
    cuts: Sequence[Cut],
    inferred: Collection[str],
    captured: Arrays,
    base: Arrays,
    held: Collection[str] = (),
    constants: Arrays | None = None,
) -> set[str]:
    """Tensors under a derived name that their values do not bear out.

    Either they are neither the reference's nor what a replay makes of the captured inputs, or what
    is behind was computed from the reference's instead.

    Args:
        replayer: runs the segments.
        cuts: the segments between the observed tensors, in execution order.
        inferred: the tensors with a derived name.
        captured: the backend's tensors.
        base: the reference's.
        held: those that another file has under these names. Its optimiser may have kept the name of
            one tensor for another, but one that is off is first of all a fault: only what was not
            read is doubtful.
        constants: those that the compiled file has otherwise.
    """

    @functools.cache
    def apart(name: str) -> Distance:
        return metrics.distance(captured[name], base[name])

    @functools.lru_cache(_NEIGHBOURS)
    def replayed(cut: Cut) -> Arrays:
        return replayer.run(cut, captured)

    makers = {name: cut for cut in cuts for name in cut.outputs}
    doubtful = set[str]()
    for cut in cuts:
        named = {n for n in cut.inputs if n in inferred or n in held}
        off = {n for n in named - doubtful if n in makers and apart(n).relative_l2 > _SMALL}
        doubtful |= _bypassed(replayer, replayed, cut, {n: makers[n] for n in off}, captured)
        wrong = {n for n in cut.outputs if n in inferred and apart(n).cosine < CONFIRMED}
        # A replay on what is doubtful itself confirms nothing: where an optimiser moves a transpose
        # past several operators, each of their results fits the other's and none fits its name.
        if wrong and doubtful.isdisjoint(cut.inputs):
            try:
                for made in _replays(replayer, replayed, cut, captured, constants or {}):
                    wrong = {
                        n
                        for n in wrong
                        if metrics.distance(captured[n], made[n]).cosine < CONFIRMED
                    }
            except ReplayError:
                pass
        doubtful |= wrong
    off = {n for n in held if n in makers and apart(n).relative_l2 > _SMALL}
    return doubtful or _detour(replayer, cuts, off, captured)


def _replays(
    replayer: Replayer, replayed: _Replayed, cut: Cut, captured: Arrays, constants: Arrays
) -> Iterator[Arrays]:
    """What a segment makes of the captured inputs, as it is and with the compiled file's constants.

    These may be so far off that nothing of the former is left.
    """
    yield (made := replayed(cut))
    if constants:
        model = replayer.model(cut, captured)
        yield replayer.run_changed(
            cut, model, captured, made, lambda m: artefact.replaced(m, constants), 0, "replayed"
        )


def _bypassed(
    replayer: Replayer,
    replayed: _Replayed,
    cut: Cut,
    makers: Mapping[str, Cut],
    captured: Arrays,
) -> set[str]:
    """Inputs of ``cut``, with the segments that make them, that it did not read.

    A real error goes into what reads it: the segment on the captured inputs makes the captured
    outputs. Where it makes them on what a replay gives instead, the engine read something else.
    """
    try:
        made = {n: replayed(maker)[n] for n, maker in makers.items()}
        made = {n: v for n, v in made.items() if _apart(captured[n], v) > _SMALL}
        if not made:
            return set()
        read, instead = replayed(cut), replayer.run(cut, captured | made)
    except ReplayError:
        return set()

    return set(made) if _nearer(cut, captured, instead, read) else set()


def _detour(replayer: Replayer, cuts: Sequence[Cut], off: Set[str], captured: Arrays) -> set[str]:
    """Tensors in a row, of those that are ``off``, that what comes behind them did not read.

    Exporters number their tensors, so an operator that another one writes otherwise (a GELU) gives
    the names of its parts to others.
    """
    instead: Arrays = {}  # what replays make of replays
    row: dict[str, set[str]] = {}
    doubtful = set[str]()
    for cut in cuts:
        through = {n: instead[n] for n in cut.inputs if n in instead}
        if not through and off.isdisjoint(cut.outputs):
            continue
        try:
            made = replayer.run(cut, captured | through)
            read = replayer.run(cut, captured) if through else made
        except ReplayError:
            continue
        before = set[str]().union(*(row[n] for n in through))
        if through and _nearer(cut, captured, made, read):
            doubtful |= before
            continue
        for name in off & {*cut.outputs}:
            instead[name], row[name] = made[name], {name, *before}
    return doubtful


def _nearer(cut: Cut, captured: Arrays, instead: Arrays, read: Arrays) -> bool:
    """Whether one replay of a segment is much nearer to what was captured than another."""

    def error(found: Arrays) -> float:
        return max(_apart(found[n], captured[n]) for n in cut.outputs)

    return error(instead) * _MUCH < error(read)


def _apart(observed: Array, reference: Array) -> float:
    return metrics.distance(observed, reference).relative_l2
