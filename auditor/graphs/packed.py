"""Weights of few bits in blocks, as ``com.microsoft.MatMulNBits`` stores them.

Source: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.ports import Array

OPERATOR, DOMAIN = "MatMulNBits", "com.microsoft"


@dataclass(frozen=True, slots=True)
class Blocks:
    """Integers of one product, ``[outputs · blocks, block]``, and a scale and zero for each row."""

    integers: Array  # uint8
    scales: Array
    zeros: Array  # uint8
    outputs: int
    inputs: int
    bits: int

    def values(self) -> Array:
        """The matrix that they stand for, ``[inputs, outputs]``."""
        steps = self.integers.astype(np.float32) - self.zeros[:, None]
        rows = (steps * self.scales[:, None]).reshape(self.outputs, -1)
        return np.ascontiguousarray(rows[:, : self.inputs].T)


def is_packed(node: onnx.NodeProto) -> bool:
    """Whether a node is such a product."""
    return node.op_type == OPERATOR and node.domain == DOMAIN


def unpacked(node: onnx.NodeProto, constant: Callable[[str], Array | None]) -> Blocks | None:
    """A product's weights; None if they are no constants, or more than one scale for each block.

    Args:
        node: the product.
        constant: a constant's values by its name, None for what is computed.
    """
    given = surgery.attributes(node)
    inputs, outputs, block = given["K"], given["N"], given["block_size"]
    bits = given.get("bits", 4)
    names = [*node.input, *[""] * 4]
    stored, scales = constant(names[1]), constant(names[2])
    if stored is None or scales is None or scales.dtype != np.float32 or names[4] or 8 % bits:
        return None
    rows = outputs * -(-inputs // block)
    if names[3]:
        written = constant(names[3])
        if written is None or written.dtype != np.uint8:
            return None
        zeros = _apart(written.reshape(outputs, -1), bits)[:, : rows // outputs]
    else:
        zeros = np.full(rows, 1 << (bits - 1), np.uint8)
    integers = _apart(stored.reshape(rows, -1), bits)[:, :block]
    return Blocks(integers, scales.reshape(rows), zeros.reshape(rows), outputs, inputs, bits)


def _apart(stored: Array, bits: int) -> Array:
    """Integers of ``bits`` bits, those in the low bits of a byte first."""
    parts = [(stored >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.asarray(np.stack(parts, -1).reshape(len(stored), -1), np.uint8)
