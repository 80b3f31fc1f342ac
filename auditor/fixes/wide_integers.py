"""Sums of narrow integers that wrap by themselves."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from auditor.ports import Surroundings

_OPERATORS = ("Add", "Sub", "Mul")


class _WideIntegers:
    """8 and 16 bits computed in 32 bits and brought back by an explicit remainder.

    Source: ONNX operator specification, Add ("wrap around"), Mod.
    """

    id = "wide-integers"
    title = "integers of 8 and 16 bits computed in 32 bits, with an explicit remainder"
    noises = frozenset({"precision.integer_overflow"})

    def rewrite(self, node: onnx.NodeProto, view: Surroundings) -> list[onnx.NodeProto] | None:
        """Cast, compute, wrap, cast back; None for other operators and types."""
        kind = view.dtype(node.input[0])
        if node.op_type not in _OPERATORS or kind is None:
            return None
        if kind.kind not in "iu" or kind.itemsize > 2:
            return None
        name = node.output[0]
        wide, nodes = [], []
        for read in node.input:
            wide.append(view.fresh(read))
            nodes.append(helper.make_node("Cast", [read], [wide[-1]], to=onnx.TensorProto.INT32))
        span = 1 << (8 * kind.itemsize)
        low = int(np.iinfo(kind).min)
        total, moved, rest, back = (view.fresh(name) for _ in range(4))
        offset = view.add(name, np.array(-low, np.int32))
        nodes += [
            helper.make_node(node.op_type, wide, [total]),
            helper.make_node("Add", [total, offset], [moved]),
            helper.make_node("Mod", [moved, view.add(name, np.array(span, np.int32))], [rest]),
            helper.make_node("Sub", [rest, offset], [back]),
            helper.make_node("Cast", [back], [name], to=helper.np_dtype_to_tensor_dtype(kind)),
        ]
        return nodes


FIX = _WideIntegers()
