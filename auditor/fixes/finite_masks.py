"""Constants near the end of float32's range, which are infinite in bfloat16."""

from __future__ import annotations

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.ports import Surroundings

_LARGEST = np.float32(3.3895313892515355e38)  # of bfloat16; float32 goes to 3.4028e38


class _FiniteMasks:
    """Masks of the lowest float32 as the lowest bfloat16.

    Rounded to bfloat16 the lowest float32 is minus infinity, and where a mask multiplies it with
    zero, NaN.
    """

    id = "finite-masks"
    title = "masks that stay finite in bfloat16"
    noises = frozenset({"precision.bf16", "implementation.nonfinite"})

    def rewrite(self, node: onnx.NodeProto, view: Surroundings) -> list[onnx.NodeProto] | None:
        """The node on constants within bfloat16; None where they are within it already."""
        made = surgery.copied(node)
        for position, name in enumerate(node.input):
            value = view.constant(name) if name else None
            if value is None or value.dtype != np.float32:
                continue
            near = np.clip(value, -_LARGEST, _LARGEST)
            if not np.array_equal(near, value) and np.isfinite(value).all():
                made.input[position] = view.add(name, near)
        return [made] if made != node else None


FIX = _FiniteMasks()
