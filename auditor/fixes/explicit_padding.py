"""Padding in numbers, instead of rounding up and SAME."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from auditor.graphs import surgery
from auditor.ports import Surroundings

_POOLS = ("AveragePool", "MaxPool", "LpPool")


class _ExplicitPadding:
    """Rounding up and SAME written as the padding that they stand for.

    Source: ONNX operator specification, AveragePool and MaxPool ("output_spatial_shape").
    """

    id = "explicit-padding"
    title = "explicit padding instead of ceil mode or auto_pad"
    noises = frozenset({"inference.ceil_mode", "inference.padding"})

    def rewrite(self, node: onnx.NodeProto, view: Surroundings) -> list[onnx.NodeProto] | None:
        """The node with its padding in numbers; None where nothing is left to the runtime."""
        given = surgery.attributes(node)
        auto = given.get("auto_pad", "NOTSET")
        up = bool(given.get("ceil_mode", 0))
        shape = view.shape(node.input[0])
        if node.op_type not in (*_POOLS, "Conv") or shape is None:
            return None
        if not up and auto in ("NOTSET", "VALID"):
            return None
        sizes = shape[2:]
        kernel = given.get("kernel_shape") or (view.shape(node.input[1]) or ())[2:]
        if len(kernel) != len(sizes):
            return None
        rank = len(sizes)
        strides = given.get("strides", [1] * rank)
        dilations = given.get("dilations", [1] * rank)
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = list(given.get("pads", [0] * 2 * rank))
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            pads = _same(sizes, strides, reach, lower=auto == "SAME_LOWER")
            up = False
        extra = _overhang(sizes, strides, reach, pads) if up else [0] * rank
        made = surgery.copied(node)
        surgery.set_attributes(made, auto_pad=None, ceil_mode=None, pads=None)
        before: list[onnx.NodeProto] = []
        if given.get("count_include_pad") and any(extra):
            # Zeros put in front count in the mean, those beyond the rounded size do not.
            before, made.input[0] = _padded(node.input[0], pads, view)
            surgery.set_attributes(made, count_include_pad=None)
            pads = [0] * 2 * rank
        ends = [end + more for end, more in zip(pads[rank:], extra, strict=True)]
        if any(end >= r for end, r in zip(ends, reach, strict=True)):
            return None  # runtimes refuse a padding as large as the window
        surgery.set_attributes(made, pads=[*pads[:rank], *ends])
        return [*before, made]


def _same(
    sizes: Sequence[int], strides: Sequence[int], reach: Sequence[int], *, lower: bool
) -> list[int]:
    totals = [
        max((math.ceil(n / s) - 1) * s + r - n, 0)
        for n, s, r in zip(sizes, strides, reach, strict=True)
    ]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return [*large, *small] if lower else [*small, *large]


def _overhang(
    sizes: Sequence[int], strides: Sequence[int], reach: Sequence[int], pads: Sequence[int]
) -> list[int]:
    """How far the last window of a rounded-up size reaches beyond the padded input."""
    found = []
    for axis, (n, s, r) in enumerate(zip(sizes, strides, reach, strict=True)):
        start, whole = pads[axis], n + pads[axis] + pads[axis + len(sizes)]
        count = math.ceil((whole - r) / s) + 1
        if (count - 1) * s >= n + start:  # a window that begins in the padding is dropped
            count -= 1
        found.append(max(0, (count - 1) * s + r - whole))
    return found


def _padded(name: str, pads: Sequence[int], view: Surroundings) -> tuple[list[onnx.NodeProto], str]:
    rank = len(pads) // 2
    amounts = np.array([0, 0, *pads[:rank], 0, 0, *pads[rank:]], np.int64)
    made = view.fresh(name)
    return [helper.make_node("Pad", [name, view.add(name, amounts)], [made])], made


FIX = _ExplicitPadding()
