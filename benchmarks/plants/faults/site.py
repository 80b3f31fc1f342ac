"""A node to change, and what can be planted there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import torch

from benchmarks.plants.network import Array, Network, Rewrite, attributes

Kind = Literal["noise", "defect", "null"]

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class UnsuitableError(Exception):
    """This node cannot carry this plant."""


@dataclass(frozen=True)
class Site:
    """A node to change.

    Attributes:
        network: the model under change.
        key: the node's first output.
        values: tensors of the unchanged model on the audited sample.
        others: the same on another sample, to calibrate with.
        random: decides whatever is free.
    """

    network: Network
    key: str
    values: Mapping[str, Array]
    others: Mapping[str, Array]
    random: np.random.Generator

    @property
    def node(self) -> onnx.NodeProto:
        """The node as it is now."""
        return self.network.node(self.key)

    def rewrite(self) -> Rewrite:
        """Start to replace the node."""
        half = self.values[self.key].dtype == np.float16
        return Rewrite(self.network, self.key, np.float16 if half else np.float32)

    def weights(self) -> Array:
        """The constant second operand of a product."""
        value = self.network.constants.get(self.node.input[1])
        if value is None or value.ndim < 2:
            raise UnsuitableError("no constant weights")
        return value

    def constant(self, position: int) -> Array:
        """A constant input."""
        node = self.node
        if len(node.input) <= position or node.input[position] not in self.network.constants:
            raise UnsuitableError("no such constant")
        return self.network.constants[node.input[position]]

    def output_axis(self) -> int:
        """Which axis of the weights counts output channels."""
        node = self.node
        if node.op_type == "Conv":
            return 0
        if node.op_type == "ConvTranspose":
            if attributes(node).get("group", 1) != 1:
                raise UnsuitableError("grouped")
            return 1
        if node.op_type == "Gemm":
            return 0 if attributes(node).get("transB", 0) else 1
        return self.weights().ndim - 1


@dataclass(frozen=True)
class Plant:
    """One thing that can be wrong, or only look different.

    Attributes:
        id: ``family/form``.
        kind: a cause of the catalogue, a defect that is none, or a rewrite that changes nothing.
        expected: ids of the causes that describe it truly; empty where none does. Several where
            two causes are the same arithmetic there (float16 and TF32 differ below 2⁻¹⁴ only).
        operators: operator types that can carry it.
        plant: makes the change.
    """

    id: str
    kind: Kind
    expected: frozenset[str]
    operators: tuple[str, ...]
    plant: Callable[[Site], None]

    @property
    def family(self) -> str:
        """What the table counts together."""
        return self.id.partition("/")[0]


PLANTS: dict[str, Plant] = {}

_Planter = Callable[[Site], None]


def plant(
    id_: str, *operators: str, expected: Sequence[str] = (), kind: Kind = "noise"
) -> Callable[[_Planter], _Planter]:
    """Registers what makes a plant; the parameters are its attributes."""

    def register(function: _Planter) -> _Planter:
        PLANTS[id_] = Plant(id_, kind, frozenset(expected), operators, function)
        return function

    return register


def as_type(values: Array, dtype: torch.dtype) -> Array:
    """Values rounded by PyTorch to a type and back to their own."""
    wide = torch.tensor(values)
    return np.asarray(wide.to(dtype).to(wide.dtype).numpy()).reshape(values.shape)


def in_bfloat16(values: Array) -> Array:
    """float32 values rounded to bfloat16 by PyTorch."""
    return as_type(values, torch.bfloat16)


def with_weights(site: Site, weights: Array) -> None:
    """A product with other weights."""
    rewrite = site.rewrite()
    name = hidden(site, rewrite, weights)
    rewrite.done(rewrite.again(rewrite.inputs[0], name, *rewrite.inputs[2:]))


def hidden(site: Site, rewrite: Rewrite, weights: Array) -> str:
    """Other weights as the old ones plus a constant, which engines fold.

    So they stand nowhere in the changed file, from which the auditor reads constants.
    """
    old = site.weights()
    if old.dtype != np.float32:
        return site.network.constant(weights.astype(old.dtype))
    rest = (weights.astype(np.float64) - old).astype(np.float32)
    return rewrite.add("Add", rewrite.inputs[1], rest)


def rounded(rewrite: Rewrite, name: str, bits: int) -> str:
    """A float32 tensor rounded to ``bits`` significant bits by splitting (Dekker 1971)."""
    multiple = rewrite.add("Mul", name, float(2 ** (24 - bits) + 1))
    rest = rewrite.add("Sub", multiple, name)
    return rewrite.add("Sub", multiple, rest)


def deviation(site: Site) -> float:
    """Standard deviation of what the node writes; float16 cannot add the squares up."""
    return float(site.values[site.key].std(dtype=np.float64))
