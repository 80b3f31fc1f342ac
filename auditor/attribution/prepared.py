"""A segment as causes see it: new enough for them, written out, and without branches not taken.

Each of these is another way to write it, so each is kept only where it gives the segment's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import onnx

from auditor.attribution.hypotheses import Bench
from auditor.comparison import metrics
from auditor.graphs import surgery
from auditor.ports import Arrays, SegmentGraph
from auditor.replays import blockwise, branches, fused, sessions

# Relative L2 that two ways to run one segment in float32 may differ by.
_SAME = 1e-6
# The part of the error by which operators that are written out may differ from the reference.
_PART = 0.1
# bfloat16 exists in ONNX graphs from this opset on.
OPSET = 13


def segment(bench: Bench) -> SegmentGraph:
    """The segment at an opset that knows bfloat16, with fused operators written out."""
    return _written_out(bench, _modern(bench))


def _modern(bench: Bench) -> SegmentGraph:
    """The segment at an opset that knows bfloat16, if that leaves its outputs' bits alone."""
    segment = bench.segment
    if surgery.opset(segment.model) >= OPSET:
        return segment
    replayed = bench.local.replayed
    for model in surgery.upgraded(segment.model, OPSET):
        try:
            if metrics.bitwise_equal(_run(bench, segment, model, tuple(replayed)), replayed):
                return replace(segment, model=model)
        except Exception:  # what ORT refuses is no conversion; its errors share no base
            continue
    return segment


def _written_out(bench: Bench, segment: SegmentGraph) -> SegmentGraph:
    """The segment with operators that stand for many in simpler ones, if it then gives its outputs.

    An operator may have an attribute, of a later operator set, that is not written out. Every form
    would then explain a backend that ignores it.
    """
    written = fused.written_out(blockwise.written_out(segment))
    if written is segment:
        return segment
    tolerance = max(_SAME, _PART * math.sqrt(bench.error.total))
    try:
        replayed = _run(bench, written, written.model, tuple(bench.local.replayed))
    except Exception:  # what ORT refuses is looked at as it is; its errors share no base
        return segment
    if metrics.relative_l2(replayed, bench.local.replayed, tuple(replayed)) > tolerance:
        return segment
    return replace(written, original=segment.model)


def unbranched(bench: Bench, segment: SegmentGraph) -> SegmentGraph:
    """The segment with the branches that it takes, if it then gives its outputs.

    Up to rounding: ONNX Runtime packs weights that are constants, and adds up in another order.
    """
    run = partial(_run, bench, segment)
    replayed, names = bench.local.replayed, tuple(bench.local.replayed)
    try:
        model = branches.taken(segment.model, bench.local.inputs, run)
        if model is None or metrics.relative_l2(run(model, names), replayed, names) > _SAME:
            return segment
    except Exception:  # as above
        return segment
    return replace(segment, model=model)


def _run(
    bench: Bench, segment: SegmentGraph, model: onnx.ModelProto, names: Sequence[str]
) -> Arrays:
    """What a model in a segment's place computes."""
    session = sessions.session(model, bench.threads, segment.folder)
    return dict(zip(names, session.run(list(names), bench.local.inputs), strict=True))
