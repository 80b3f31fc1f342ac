"""Operators written out as others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.plants.faults.site import Site, UnsuitableError
from benchmarks.plants.network import Array, Rewrite, attributes


def pad_apart(site: Site, begin: Sequence[int], end: Sequence[int]) -> None:
    """A convolution padded by zeros glued to its input."""
    rewrite = site.rewrite()
    x = rewrite.inputs[0]
    like = site.values[x]
    shape = list(like.shape)
    for axis in (2, 3):
        parts = []
        for amount in (begin[axis - 2], None, end[axis - 2]):
            if amount is None:
                parts.append(x)
            elif amount:
                edge = [*shape[:axis], amount, *shape[axis + 1 :]]
                parts.append(site.network.constant(np.zeros(edge, like.dtype)))
        shape[axis] += begin[axis - 2] + end[axis - 2]
        x = rewrite.add("Concat", *parts, axis=axis) if len(parts) > 1 else x
    rewrite.done(rewrite.again(x, *rewrite.inputs[1:], pads=None, auto_pad=None))


def layer_norm(rewrite: Rewrite, epsilon: float, *, unbiased: bool = False, width: int = 0) -> str:
    """LayerNormalization over the last axis, written out."""
    x, scale, *bias = rewrite.inputs
    centred = rewrite.add("Sub", x, rewrite.add("ReduceMean", x, axes=[-1], keepdims=1))
    square = rewrite.add("Mul", centred, centred)
    variance = rewrite.add("ReduceMean", square, axes=[-1], keepdims=1)
    if unbiased:
        variance = rewrite.add("Mul", variance, width / (width - 1))
    root = rewrite.add("Sqrt", rewrite.add("Add", variance, float(epsilon)))
    result = rewrite.add("Mul", rewrite.add("Div", centred, root), scale)
    return rewrite.add("Add", result, *bias) if bias else result


def last_axis(site: Site) -> int:
    """Length of the last axis, which alone a layer normalisation must be over."""
    if attributes(site.node).get("axis", -1) not in (-1, site.values[site.key].ndim - 1):
        raise UnsuitableError("several axes")
    if len(site.node.output) > 1:
        raise UnsuitableError("several outputs")
    return int(site.values[site.key].shape[-1])


def softmax(rewrite: Rewrite, x: str, axis: int, exponential: Callable[[str], str]) -> str:
    """A softmax along one axis, written out."""
    network = rewrite.network
    top = rewrite.add("ReduceMax", x, axes=[axis], keepdims=1)
    power = exponential(rewrite.add("Sub", x, top))
    total = (
        rewrite.add("ReduceSum", power, np.array([axis]), keepdims=1)
        if network.opset >= 13
        else rewrite.add("ReduceSum", power, axes=[axis], keepdims=1)
    )
    return rewrite.add("Div", power, total)


def softmax_axis(site: Site) -> int:
    """The axis of a softmax; before opset 13 only where that reading changes nothing."""
    node, x = site.node, site.values[site.node.input[0]]
    old = site.network.opset < 13
    axis = int(attributes(node).get("axis", 1 if old else -1)) % x.ndim
    if old and np.prod(x.shape[axis + 1 :]) > 1:
        raise UnsuitableError("over several axes")
    return axis


def folded(site: Site, variance: Array) -> None:
    """A batch normalisation as one factor and one summand for each channel."""
    scale, shift, mean = (site.constant(i).astype(np.float64) for i in (1, 2, 3))
    rewrite = site.rewrite()
    factor = scale / np.sqrt(variance)
    across = (-1, *(1,) * (site.values[rewrite.inputs[0]].ndim - 2))
    dtype = site.values[rewrite.inputs[0]].dtype
    product = rewrite.add("Mul", rewrite.inputs[0], factor.reshape(across).astype(dtype))
    summand = (shift - mean * factor).reshape(across).astype(dtype)
    rewrite.done(rewrite.add("Add", product, summand))
