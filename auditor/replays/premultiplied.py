"""Constant factors that a fused kernel multiplies in before anything is rounded.

An engine folds per-channel factors and shifts behind a product into its weights and bias, and
attention's scale into one of its operands.
"""

from __future__ import annotations

import onnx
from onnx import helper

from auditor.graphs import surgery
from auditor.replays.kernel_layout import Group
from auditor.replays.rounder import CONVOLUTIONS, Rounder


def parts(rounder: Rounder, index: int, node: onnx.NodeProto, group: Group) -> list[onnx.NodeProto]:
    """A node with the factors of its kernel multiplied in; what adds the bias may come behind it.

    Args:
        rounder: where constants are folded.
        index: the node's position in the segment.
        node: a copy of it, which is changed.
        group: its kernel.
    """
    if rounder.sites.scope != "kernel" or not rounder.reads_narrow(group):
        return [node]
    if node.op_type in CONVOLUTIONS:
        _fold_scale(rounder, node, group)
    elif index in rounder.unscaled:
        _skip(rounder, node, rounder.unscaled[index])
    elif node.op_type == "Gemm":
        _fold_gemm(rounder, node, group)
    elif node.op_type == "MatMul" and rounder.has_weights(index):
        shift = _fold_factors(rounder, node, group)
        return [node] if shift is None else [node, shift]
    elif node.op_type == "MatMul" and rounder.sites.scales != "product":
        _move_scale(rounder, node, group)
    return [node]


def _skip(rounder: Rounder, product: onnx.NodeProto, index: int) -> None:
    """Let the product write what the node that scaled it wrote."""
    product.output[0] = rounder.at.nodes[index].output[0]
    rounder.replaced.add(index)


def _fold_scale(rounder: Rounder, conv: onnx.NodeProto, group: Group) -> None:
    """Fold factors and shifts behind a convolution into its weights and bias."""
    chain = _affine_chain(rounder, conv, group)
    weights = rounder.constants.get(conv.input[1])
    if not chain or weights is None or conv.input[1] not in rounder.floats:
        return
    axis = 0
    if conv.op_type == "ConvTranspose":
        if any(a.name == "group" and a.i != 1 for a in conv.attribute):
            return
        axis = 1
    bias = conv.input[2] if len(conv.input) > 2 else ""
    scale, bias = _compose(rounder, chain, "", bias)
    conv.output[0] = rounder.at.nodes[chain[-1]].output[0]
    if scale:
        shape = [1] * len(weights)
        shape[axis] = -1
        factor = rounder.new("Reshape", scale, rounder.integers(shape))
        conv.input[1] = rounder.new("Mul", conv.input[1], factor)
    if bias:
        bias = rounder.new("Expand", bias, rounder.integers([weights[axis]]))
        del conv.input[2:]
        conv.input.append(bias)


def _fold_factors(rounder: Rounder, product: onnx.NodeProto, group: Group) -> onnx.NodeProto | None:
    """Fold factors behind a product with weights into these, and into the bias.

    Returns:
        The addition of the bias; None where there is no factor, and nothing was changed.
    """
    weights = rounder.constants.get(product.input[1])
    if not weights or len(weights) != 2 or product.input[1] not in rounder.floats:
        return None
    chain = _affine_chain(rounder, product, group, last=True)
    if _only_shifts(rounder, chain):
        return None
    scale, shift = _compose(rounder, chain, "", "")
    product.input[1] = rounder.new("Mul", product.input[1], scale)
    output = rounder.at.nodes[chain[-1]].output[0]
    return helper.make_node("Add", [product.output[0], shift or rounder.scalar(0.0)], [output])


def _fold_gemm(rounder: Rounder, gemm: onnx.NodeProto, group: Group) -> None:
    """Fold factors and shifts behind a Gemm, and its own alpha, into its weights and bias."""
    options = surgery.attributes(gemm)
    alpha, beta = options.get("alpha", 1.0), options.get("beta", 1.0)
    bias = gemm.input[2] if len(gemm.input) > 2 else ""
    if not rounder.constants.get(gemm.input[1]) or gemm.input[1] not in rounder.floats:
        return
    if bias and not _per_channel(rounder, bias, 2, "Add", last=False):
        return
    chain = _affine_chain(rounder, gemm, group)
    if alpha == 1 and _only_shifts(rounder, chain):
        return
    scale = rounder.scalar(alpha) if alpha != 1 else ""
    if bias and beta != 1:
        bias = rounder.new("Mul", bias, rounder.scalar(beta))
    scale, bias = _compose(rounder, chain, scale, bias)
    if chain:
        gemm.output[0] = rounder.at.nodes[chain[-1]].output[0]
    shape = rounder.integers([-1, 1] if options.get("transB") else [1, -1])
    gemm.input[1] = rounder.new("Mul", gemm.input[1], rounder.new("Reshape", scale, shape))
    gemm.input[2:] = [bias] if bias else []
    surgery.set_attributes(gemm, alpha=None, beta=None)


def _only_shifts(rounder: Rounder, chain: list[int]) -> bool:
    return all(rounder.at.nodes[index].op_type in ("Add", "Sub") for index in chain)


def _compose(rounder: Rounder, chain: list[int], scale: str, shift: str) -> tuple[str, str]:
    """Factor and shift of per-channel affine nodes behind x · scale + shift; "" for neither."""
    for index in chain:
        factor, more = _affine(rounder, rounder.at.nodes[index])
        if factor:
            scale = rounder.new("Mul", scale, factor) if scale else factor
            shift = rounder.new("Mul", shift, factor) if shift else ""
        if more:
            shift = rounder.new("Add", shift, more) if shift else more
    rounder.replaced.update(chain)
    return scale, shift


def _affine_chain(
    rounder: Rounder, product: onnx.NodeProto, group: Group, *, last: bool = False
) -> list[int]:
    """Indices of the per-channel affine nodes fused behind a product.

    ``last`` says that its channels are the last axis; else they are the second.
    """
    rank = len(rounder.constants.get(product.input[1]) or ())
    chain: list[int] = []
    tensor = product.output[0]
    while (index := rounder.at.reader(tensor)) is not None and rounder.groups[index] is group:
        node = rounder.at.nodes[index]
        others = [n for n in node.input if n != tensor]
        if node.op_type not in ("BatchNormalization", "Mul", "Div", "Add", "Sub") or any(
            not _per_channel(rounder, n, rank, node.op_type, last) for n in others
        ):
            break
        if node.input[0] != tensor and node.op_type in ("Div", "Sub"):
            break
        chain.append(index)
        tensor = node.output[0]
    return chain


def _per_channel(rounder: Rounder, name: str, rank: int, op_type: str, last: bool) -> bool:
    shape = rounder.constants.get(name)
    if shape is None or name not in rounder.floats:
        return False
    if op_type == "BatchNormalization":
        return not last
    if last:
        return all(d == 1 for d in shape[:-1])
    aligned = (1,) * (rank - len(shape)) + shape
    return len(aligned) == rank and all(d == 1 for i, d in enumerate(aligned) if i != 1)


def _affine(rounder: Rounder, node: onnx.NodeProto) -> tuple[str, str]:
    """Factor and shift of a per-channel affine node, as 1-d tensors; "" for neither."""
    if node.op_type == "BatchNormalization":
        gamma, beta, mean, variance = node.input[1:5]
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        width = rounder.new("Sqrt", rounder.new("Add", variance, rounder.scalar(epsilon)))
        factor = rounder.new("Div", gamma, width)
        return factor, rounder.new("Sub", beta, rounder.new("Mul", mean, factor))
    constant = next(n for n in node.input if n in rounder.constants)
    flat = rounder.new("Reshape", constant, rounder.integers([-1]))
    if node.op_type == "Mul":
        return flat, ""
    if node.op_type == "Div":
        return rounder.new("Reciprocal", flat), ""
    return "", flat if node.op_type == "Add" else rounder.new("Neg", flat)


def _move_scale(rounder: Rounder, product: onnx.NodeProto, group: Group) -> None:
    """Multiply attention's scale into the keys before they are rounded.

    Fused attention reads them rounded, unless ``Sites.scales`` says otherwise; else a kernel of
    its own multiplies what is there.
    """
    index = _scale_of(rounder, product, group)
    if index is None:
        return
    keys = product.input[1]
    entered = rounder.raw.get(keys, keys)
    if _reads_rounded_keys(rounder, group) and not rounder.inside(keys, group):
        entered = rounder.round(keys)
    operator, factor = _scaling(rounder, index, product.output[0])
    product.input[1] = rounder.new(operator, entered, factor)
    _skip(rounder, product, index)


def move_scales(rounder: Rounder) -> None:
    """Let the kernel that projects the keys, if there is one, apply attention's scale.

    OpenVINO multiplies it in there before the keys are written out, rounded, and the kernel
    of the product no longer has it: where attention is not fused, and with AMX where it is.
    So does, with AMX, any kernel that writes the keys; the scale may be one for each head.
    """
    for index, product in enumerate(rounder.at.nodes):
        if product.op_type != "MatMul" or index in rounder.at.derived:
            continue
        group = rounder.groups[index]
        scale = _scale_of(rounder, product, group)
        if scale is None or _reads_rounded_keys(rounder, group):
            continue
        keys = product.input[1]
        scaling = _scaling(rounder, scale, product.output[0])
        single = rounder.constants.get(scaling[1]) in ((), (1,))
        for move in rounder.at.moves(keys):
            if not single and not _swaps_last(rounder.at.nodes[move]):
                break
            keys = rounder.at.nodes[move].input[0]
        source = rounder.at.producer.get(keys)
        if source is None or rounder.at.reader(keys) is None:
            continue
        projection = rounder.groups[source]
        if projection is group or not rounder.writes(projection):
            continue
        if rounder.sites.scales == "keys" or any(
            rounder.at.nodes[i].op_type == "MatMul" and rounder.has_weights(i)
            for i in projection.nodes
        ):
            rounder.scaled[keys] = scaling
            rounder.unscaled[index] = scale


def _scale_of(rounder: Rounder, product: onnx.NodeProto, group: Group) -> int | None:
    """The node that scales a product of two activations, whole or by head, if fused."""
    index = rounder.at.reader(product.output[0])
    if (
        index is None
        or rounder.groups[index] is not group
        or any(n in rounder.constants for n in product.input)
    ):
        return None
    node = rounder.at.nodes[index]
    other = [n for n in node.input if n != product.output[0]]
    shape = rounder.constants.get(other[0]) if len(other) == 1 else None
    heads = shape is not None and all(size == 1 for size in shape[-2:])
    return index if heads and node.op_type in ("Mul", "Div") else None


def _scaling(rounder: Rounder, index: int, product: str) -> tuple[str, str]:
    node = rounder.at.nodes[index]
    return node.op_type, next(n for n in node.input if n != product)


def _reads_rounded_keys(rounder: Rounder, group: Group) -> bool:
    """Whether a kernel is fused attention that multiplies the scale into keys as they were written.

    With AMX (``Sites.scales``), what writes the keys has multiplied it in.
    """
    return rounder.sites.scales != "keys" and any(
        rounder.at.nodes[i].op_type == "Softmax" for i in group.nodes
    )


def _swaps_last(node: onnx.NodeProto) -> bool:
    """Whether a node leaves all axes but the last two where they are."""
    order = surgery.attributes(node).get("perm", ())
    return node.op_type == "Transpose" and list(order[:-2]) == list(range(len(order) - 2))
