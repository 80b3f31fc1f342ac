"""Rewrites that change nothing."""

from __future__ import annotations

import numpy as np

from benchmarks.plants.faults.forms import (
    folded,
    last_axis,
    layer_norm,
    pad_apart,
    softmax,
    softmax_axis,
)
from benchmarks.plants.faults.site import (
    PRODUCTS,
    Site,
    UnsuitableError,
    deviation,
    plant,
)
from benchmarks.plants.network import attributes


@plant("null/identity", *PRODUCTS, "Relu", "Clip", "Add", "Mul", "PRelu", kind="null")
def _identity(site: Site) -> None:
    rewrite = site.rewrite()
    rewrite.done(rewrite.add("Identity", rewrite.again(*rewrite.inputs)))


@plant("null/transposed twice", *PRODUCTS, "Relu", "Clip", "Add", kind="null")
def _twice(site: Site) -> None:
    rank = site.values[site.key].ndim
    if rank < 2:
        raise UnsuitableError("a vector")
    turn = site.random.permutation(rank)
    rewrite = site.rewrite()
    turned = rewrite.add("Transpose", rewrite.again(*rewrite.inputs), perm=turn.tolist())
    rewrite.done(rewrite.add("Transpose", turned, perm=np.argsort(turn).tolist()))


def _scaled_back(site: Site, factor: float) -> None:
    dtype = site.weights().dtype.type
    rewrite = site.rewrite()
    names = [site.network.constant(site.weights() * dtype(factor))]
    if len(rewrite.inputs) > 2 and rewrite.inputs[2]:
        names.append(site.network.constant(site.constant(2) * dtype(factor)))
    large = rewrite.again(rewrite.inputs[0], *names)
    rewrite.done(rewrite.add("Mul", large, np.asarray(dtype(1 / factor))))


@plant("null/weights by 2, result by 1/2", *PRODUCTS, kind="null")
def _by_two(site: Site) -> None:
    _scaled_back(site, 2.0)


@plant("null/weights by 3, result by 1/3", *PRODUCTS, kind="null")
def _by_three(site: Site) -> None:
    _scaled_back(site, 3.0)


@plant("null/split by outputs", "Conv", kind="null")
def _split_outputs(site: Site) -> None:
    weights = site.weights()
    if attributes(site.node).get("group", 1) != 1 or weights.shape[0] < 2:
        raise UnsuitableError("grouped")
    rewrite, half, parts = site.rewrite(), len(weights) // 2, []
    for part in (slice(None, half), slice(half, None)):
        names = [site.network.constant(weights[part])]
        if len(rewrite.inputs) > 2:
            names.append(site.network.constant(site.constant(2)[part]))
        parts.append(rewrite.again(rewrite.inputs[0], *names))
    rewrite.done(rewrite.add("Concat", *parts, axis=1))


@plant("null/split by inputs", "Conv", kind="null")
def _split_inputs(site: Site) -> None:
    weights = site.weights()
    if attributes(site.node).get("group", 1) != 1 or weights.shape[1] < 2:
        raise UnsuitableError("grouped")
    rewrite, half = site.rewrite(), weights.shape[1] // 2
    x = rewrite.inputs[0]
    parts = []
    for begin, end in ((0, half), (half, weights.shape[1])):
        piece = rewrite.add("Slice", x, np.array([begin]), np.array([end]), np.array([1]))
        name = site.network.constant(np.ascontiguousarray(weights[:, begin:end]))
        bias = rewrite.inputs[2:] if begin == 0 else ()
        parts.append(rewrite.again(piece, name, *bias))
    rewrite.done(rewrite.add("Add", *parts))


@plant("null/Gemm as MatMul and Add", "Gemm", kind="null")
def _matmul_add(site: Site) -> None:
    given = attributes(site.node)
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1 or given.get("beta", 1.0) != 1:
        raise UnsuitableError("scaled")
    weights = site.weights()
    rewrite = site.rewrite()
    turned = np.ascontiguousarray(weights.T) if given.get("transB", 0) else weights
    product = rewrite.add("MatMul", rewrite.inputs[0], turned)
    rewrite.done(rewrite.add("Add", product, rewrite.inputs[2]))


@plant("null/batch normalisation folded", "BatchNormalization", kind="null")
def _fold(site: Site) -> None:
    epsilon = attributes(site.node).get("epsilon", 1e-5)
    folded(site, site.constant(4).astype(np.float64) + epsilon)


@plant("null/batch normalisation unfolded", "Conv", kind="null")
def _unfold(site: Site) -> None:
    weights = site.weights()
    channels = weights.shape[0]
    spread = np.asarray(site.random.uniform(0.5, 2.0, channels))
    across = (-1, *(1,) * (weights.ndim - 1))
    rewrite = site.rewrite()
    bias = site.constant(2) if len(rewrite.inputs) > 2 else np.zeros(channels)
    shift = bias.astype(np.float64)
    mean = site.random.normal(size=channels) * deviation(site)
    dtype = weights.dtype
    plain = rewrite.again(
        rewrite.inputs[0],
        site.network.constant((weights.astype(np.float64) / spread.reshape(across)).astype(dtype)),
    )
    numbers = (spread, shift + mean * spread, mean, np.full(channels, 1 - 1e-5))
    names = [site.network.constant(np.asarray(n, dtype)) for n in numbers]
    rewrite.done(rewrite.add("BatchNormalization", plain, *names, epsilon=1e-5))


@plant("null/layer normalisation written out", "LayerNormalization", kind="null")
def _layer_written(site: Site) -> None:
    last_axis(site)
    rewrite = site.rewrite()
    rewrite.done(layer_norm(rewrite, attributes(site.node).get("epsilon", 1e-5)))


@plant("null/softmax written out", "Softmax", kind="null")
def _softmax_written(site: Site) -> None:
    axis, rewrite = softmax_axis(site), site.rewrite()
    rewrite.done(softmax(rewrite, rewrite.inputs[0], axis, lambda x: rewrite.add("Exp", x)))


@plant("null/padded apart", "Conv", kind="null")
def _padded_apart(site: Site) -> None:
    pads = attributes(site.node).get("pads", [0] * 4)
    if len(pads) != 4 or not any(pads):
        raise UnsuitableError("not padded")
    pad_apart(site, pads[:2], pads[2:])


@plant("null/divided by multiplying", "Div", kind="null")
def _reciprocal(site: Site) -> None:
    divisor = site.constant(1)
    if divisor.dtype.kind != "f":
        raise UnsuitableError("integers")
    rewrite = site.rewrite()
    inverse = (1 / divisor.astype(np.float64)).astype(divisor.dtype)
    rewrite.done(rewrite.add("Mul", rewrite.inputs[0], np.asarray(inverse)))
