"""Tries the module and the file that was exported from it at other sizes of open dimensions.

What the file declares open it should compute. At the audited shape it may agree only because it was
traced there, so every open dimension is given another size, one at a time, and both are run. Where
they part, the constants of the file that hold the traced size are changed to the other one, and
those that it takes to agree again are the ones that were frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from auditor.comparison import metrics
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.noises import export_frozen_shape
from auditor.noises.export_frozen_shape import Frozen
from auditor.ports import Array, Arrays
from auditor.records.backend import Gap, Origin
from auditor.records.measured import Segment
from auditor.records.report import BackendReport, Finding
from auditor.records.terms import severity
from auditor.replays import sessions
from auditor.verdict.fingerprint import fingerprint

if TYPE_CHECKING:
    from auditor.capture.trace import Tracer
    from auditor.graphs.model import Model
    from auditor.replays.reference import Reference

# Divergence at another shape that counts: this much, and this many times that at the audited one.
_LEAST, _TIMES = 1e-3, 10.0
_NAMED = 0.9  # as in ``attribution``
_MOST = 24  # constants that are tried
_NODE = re.compile(r"Name:'([^']*)'")


@dataclass(frozen=True, slots=True)
class _Size:
    """An open dimension: where it is, and both sizes; ``places`` are (input, axis)."""

    name: str
    places: tuple[tuple[str, int], ...]
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class _Truth:
    """One run of the module at another size."""

    size: _Size
    feeds: Arrays
    outputs: Arrays


def tried(
    tracer: Tracer,
    report: BackendReport,
    reference: Reference,
    model: Model,
    feeds: Arrays,
    origins: Mapping[str, Origin],
) -> tuple[list[Finding], list[Gap]]:
    """What other shapes show.

    Args:
        tracer: the training side, built.
        report: what was measured there at the audited shape.
        reference: what it was compared with.
        model: the model that the reference runs.
        feeds: a sample, by input, in the model's own types.
        origins: of the model's nodes.

    Returns:
        A finding for each open dimension at which the file does not compute what the module does,
        and a gap for each at which that could not be told.
    """
    found, gaps = [], []
    at_home = max((o.distance.relative_l2 for o in report.outputs), default=0.0)
    for size in _sizes(model, feeds):
        moved = {n: _resized(v, n, size) for n, v in feeds.items()}
        tracer.progress.update("reference", f"try {size.name} = {size.new}")
        outputs = tracer.plain(moved)
        if outputs is None:
            reason, tracer.gap = tracer.gap.reason if tracer.gap else "", None
            gaps.append(
                Gap(
                    tracer.id,
                    "shape",
                    f"dimension `{size.name}` was not tried at {size.new}: {reason}",
                    "Declare it fixed where the module takes one size only.",
                )
            )
            if not tracer.worker.alive:
                break
            continue
        truth = _Truth(size, reference.wide(moved), outputs)
        apart, said = _apart(reference, model, truth, ())
        if apart > max(_LEAST, _TIMES * at_home):
            found.append(_finding(report, reference, model, truth, apart, said, origins))
    return found, gaps


def _sizes(model: Model, feeds: Arrays) -> list[_Size]:
    """Every open dimension, those of one name together."""
    places: dict[str, list[tuple[str, int]]] = {}
    for spec in model.inputs:
        for axis, size in enumerate(spec.shape):
            if not isinstance(size, int) and spec.name in feeds:
                places.setdefault(size or f"{spec.name}[{axis}]", []).append((spec.name, axis))
    found = []
    for name, where in places.items():
        old = {feeds[tensor].shape[axis] for tensor, axis in where}
        if len(old) == 1:
            (size,) = old
            # Strides of networks divide 32; short sequences and batches grow by half.
            found.append(
                _Size(name, tuple(where), size, size + (32 if size >= 32 else size // 2 or 1))
            )
    return found


def _resized(value: Array, name: str, size: _Size) -> Array:
    """A sample at the other size: its own values, repeated from the start."""
    for tensor, axis in size.places:
        if tensor == name:
            value = np.take(value, np.arange(size.new) % size.old, axis)
    return value


def _apart(
    reference: Reference, model: Model, truth: _Truth, changed: Sequence[Frozen]
) -> tuple[float, str]:
    """How far the file is from the module, with other constants; infinite, and why, if it fails."""
    try:
        if changed:
            thawed = export_frozen_shape.thawed(reference.graph.proto, changed)
            session = sessions.session(thawed, reference.replayer.threads, model.folder)
            names = list(reference.graph.outputs)
            computed = dict(zip(names, session.run(names, truth.feeds), strict=True))
        else:
            computed = reference.run(truth.feeds)
    except UsageError as error:
        return math.inf, error.message
    except Exception as error:  # ORT raises a family of classes that share no base
        return math.inf, str(error)
    names = [n for n in computed if n in truth.outputs]
    for name in names:
        given, wanted = computed[name].shape, truth.outputs[name].shape
        if given != wanted:
            sizes = f"{models.shown(given)} instead of {models.shown(wanted)}"
            return math.inf, f"output `{name}` has the shape {sizes}"
    apart = metrics.relative_l2(computed, truth.outputs, tuple(names))
    return apart, f"the outputs differ by {apart:.1e} relative L2"


def _culprits(
    reference: Reference, model: Model, truth: _Truth, apart: float
) -> tuple[list[Frozen], float]:
    """The constants that it takes to agree, and how far apart both are with these changed."""
    size = truth.size
    axis = size.places[0][1]
    proto = reference.graph.proto
    chosen = list(export_frozen_shape.frozen(proto, axis, size.old, size.new))[:_MOST]
    left, _ = _apart(reference, model, truth, chosen) if chosen else (math.inf, "")
    if left == math.inf:  # too many were changed: those that help by themselves
        single = [(_apart(reference, model, truth, [one])[0], one) for one in chosen]
        chosen = [one for distance, one in single if distance < apart]
        left = _apart(reference, model, truth, chosen)[0] if chosen else math.inf
    for one in list(chosen):
        rest = [other for other in chosen if other is not one]
        without = _apart(reference, model, truth, rest)[0]
        if without <= left:
            chosen, left = rest, without
    return chosen, left


def _finding(
    report: BackendReport,
    reference: Reference,
    model: Model,
    truth: _Truth,
    apart: float,
    said: str,
    origins: Mapping[str, Origin],
) -> Finding:
    size = truth.size
    culprits, left = _culprits(reference, model, truth, apart)
    explained = 0.0
    if culprits and math.isfinite(left):
        explained = 1 - (left / apart) ** 2 if math.isfinite(apart) else 1 - min(left, 1) ** 2
    named = explained >= _NAMED
    names = {one.name for one in culprits} if named else set[str]()
    nodes = [n for n in reference.graph.nodes if names & set(n.input)]
    if not nodes and (match := _NODE.search(said)):
        nodes = [n for n in reference.graph.nodes if n.name == match[1]]
    keys = [models.key(n) for n in nodes]
    home = _home(report, keys)
    if home is not None:  # what the constant is for, such as the Reshape that takes it
        keys = list(dict.fromkeys((*keys, *home.node_keys)))
        nodes = [reference.graph.nodes[reference.graph.producer[k]] for k in keys]
    evidence = [
        f"at {size.name} = {size.old} the file computes what the module does, at {size.new} not: "
        f"{said[:300]}"
    ]
    if named:
        evidence.append(
            f"with {', '.join(f'`{n}`' for n in sorted(names))} changed from {size.old} to "
            f"{size.new} it does again: that explains {explained:.4f} of the difference"
        )
    else:
        evidence.append(f"no constant of the file that holds {size.old} explains it")
    noise = export_frozen_shape.NOISE
    return Finding(
        rank=0,
        backend=report.id,
        segment=home.id if home else "",
        segments=(home.id,) if home else (),
        nodes=tuple(reference.labels[k] for k in keys) or tuple(p[0] for p in size.places),
        op_types=tuple(dict.fromkeys(n.op_type for n in nodes)),
        kernel="",
        noise=noise.id,
        stage=noise.stage,
        leave_one_in=None,
        impact_share=None,
        introduced=apart,
        effect=apart,
        explained=explained if named else None,
        bit_identical=0.0,
        severity=severity(apart),
        confidence="high" if named else "medium",
        evidence=tuple(evidence),
        remedy=noise.remedy(report.id),
        fingerprint=fingerprint(report.id, keys or [size.name], noise.id),
        modules=tuple(dict.fromkeys(m for k in keys if k in origins and (m := str(origins[k])))),
    )


def _home(report: BackendReport, keys: Sequence[str]) -> Segment | None:
    """The segment that holds one of these nodes."""
    return next((s for s in report.segments if set(keys) & set(s.node_keys)), None)
