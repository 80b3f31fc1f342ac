"""Segments rewritten by rules of algebra that compilers use: equal in exact arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

import numpy as np
import onnx
from onnx import helper, numpy_helper

from auditor.replays import surgery


def distributed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]] | None:
    """The segment with ``c·(k ± x)`` computed as ``c·k ± c·x``; None where it has no such product.

    Compilers turn chains of constant factors and shifts into one multiply-add (OpenVINO's
    PowerStatic, for instance). It shows where c·x is rounded and c·k is not: an attention mask,
    ``(1 − mask) · lowest float``, no longer cancels where nothing is masked.

    Args:
        model: a segment; ``c`` and ``k`` are float32 constants of one element.

    Returns:
        The rewritten segment, and which of its tensors are the ``c·x``.
    """
    constants = surgery.constants(model)
    scalars = {n: v for n, v in constants.items() if v.size == 1 and v.dtype == np.float32}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(o.name for o in model.graph.output)
    result = surgery.copied(model)
    sums = {
        node.output[0]: node
        for _, node in surgery.find(result, ("Add", "Sub"))
        if uses[node.output[0]] == 1 and _operands(node, scalars)
    }
    products = set[str]()
    for _, product in surgery.find(result, ("Mul",)):
        factor, total = _operands(product, scalars) or ("", "")
        if total not in sums:
            continue
        inner = sums[total]
        shift, x = _operands(inner, scalars) or ("", "")
        scaled, moved = scalars[factor], scalars[factor] * scalars[shift]
        if inner.op_type == "Sub" and inner.input[0] == shift:
            scaled = -scaled
        elif inner.op_type == "Sub":
            moved = -moved
        names = (f"{total}/factor", f"{total}/shift")
        for name, value in zip(names, (scaled, moved), strict=True):
            result.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        inner.CopyFrom(helper.make_node("Mul", [x, names[0]], [total], inner.name))
        product.CopyFrom(
            helper.make_node("Add", [total, names[1]], list(product.output), product.name)
        )
        products.add(total)
    return (result, frozenset(products)) if products else None


def _operands(node: onnx.NodeProto, scalars: Container[str]) -> tuple[str, str] | None:
    """A binary node's one constant operand, and the other."""
    a, b = node.input
    if (a in scalars) == (b in scalars):
        return None
    return (a, b) if a in scalars else (b, a)
