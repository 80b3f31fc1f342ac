"""Half-precision operators computed in float32."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.graphs.segments import bodies_of
from auditor.ports import Surroundings

_SAME = ("Cast", "Identity", "Reshape", "Transpose", "Constant", "Shape", "Gather", "Slice")


class _SinglePrecision:
    """Casts around an operator of a float16 model, so that it and its sums are in float32."""

    id = "single-precision"
    title = "float32 inside these layers, with casts around them"
    noises = frozenset({"precision.fp16", "implementation.accumulation"})

    def rewrite(self, node: onnx.NodeProto, view: Surroundings) -> list[onnx.NodeProto] | None:
        """Cast, compute, cast back; None where nothing is in float16."""
        kinds = [view.dtype(name) if name else None for name in node.input]
        if node.op_type in _SAME or bodies_of(node) or np.float16 not in kinds:
            return None
        made = surgery.copied(node)
        before, after = [], []
        for position, kind in enumerate(kinds):
            if kind == np.float16:
                made.input[position] = view.fresh(node.input[position])
                read = [node.input[position]], [made.input[position]]
                before.append(helper.make_node("Cast", *read, to=TensorProto.FLOAT))
        for position, name in enumerate(node.output):
            if name and view.dtype(name) == np.float16:
                made.output[position] = view.fresh(name)
                back = helper.make_node(
                    "Cast", [made.output[position]], [name], to=TensorProto.FLOAT16
                )
                after.append(back)
        return [*before, made, *after]


FIX = _SinglePrecision()
