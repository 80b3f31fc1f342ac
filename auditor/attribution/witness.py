"""A second opinion on the reference, where a backend differs from it by more than rounding.

The reference is ONNX Runtime, whose kernels have bugs as well. ONNX's own implementation of its
operators (``onnx.reference``) shares no code with any runtime. It is not always right either: like
runtimes it ignores attributes and follows other operator sets. So it is asked only where no cause
is found, and overrules nothing. But where it computes what the *backend* did, the reader must know
that the reference stands alone.
"""

from __future__ import annotations

import numpy as np

from auditor.comparison import metrics
from auditor.graphs import weights
from auditor.ports import Arrays, SegmentGraph

# It runs in Python: segments with more elements than this at their ends are left alone.
LARGEST = 30_000
# Relative L2 from which on a difference is worth asking about.
LEAST = 1e-3
# The backend must be so many times nearer to the witness than the reference is.
NEARER = 10.0


def sides_with(
    segment: SegmentGraph, inputs: Arrays, observed: Arrays, replayed: Arrays
) -> str | None:
    """A sentence where ONNX's implementation gives what a backend computed, not the reference.

    Args:
        segment: the segment.
        inputs: in_b, the backend's tensors at its inputs.
        observed: out_b, the backend's tensors at its outputs.
        replayed: h(in_b), the reference on the same inputs.

    Returns:
        None where it does not, where the segment is large, or where ONNX cannot run it.
    """
    if sum(v.size for of in (inputs, replayed) for v in of.values()) > LARGEST:
        return None
    names = tuple(replayed)
    if _apart(observed, replayed, names) < LEAST:
        return None
    from onnx.reference import ReferenceEvaluator

    try:
        with np.errstate(all="ignore"):
            evaluator = ReferenceEvaluator(weights.inside(segment.model, segment.weights))
            made = evaluator.run(list(names), dict(inputs))
    except Exception:  # its operators raise whatever NumPy and Python do
        return None
    if not all(isinstance(value, np.ndarray) for value in made):
        return None
    witness = dict(zip(names, made, strict=True))
    backend, reference = _apart(observed, witness, names), _apart(replayed, witness, names)
    if reference < max(LEAST, NEARER * backend):
        return None
    return (
        "ONNX's own implementation of these operators gives what the backend computed (relative "
        f"L2 {backend:.1e}), not what ONNX Runtime does ({reference:.1e}): the reference itself "
        "may be wrong here"
    )


def _apart(a: Arrays, b: Arrays, names: tuple[str, ...]) -> float:
    """Relative L2; infinite where shapes differ."""
    if any(a[n].shape != b[n].shape for n in names):
        return float("inf")
    return metrics.relative_l2(a, b, names)
