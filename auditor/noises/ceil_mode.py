"""Pooling output size: rounded down or up, and what a window past the edge counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import SegmentGraph, Variant

# Poolings, with the opset that gave each of them ``ceil_mode``.
_POOLS = {"MaxPool": 10, "AveragePool": 10, "LpPool": 18}
_HIGHEST = float(np.finfo(np.float32).max)
# Pad and Slice take their amounts as inputs from this opset on.
_AMOUNTS = 11


def _other_way(node: onnx.NodeProto) -> str:
    """The number of windows rounded down instead of up, or up instead of down."""
    outputs = ", ".join(f"y{i}" for i, name in enumerate(node.output) if name)
    flipped = surgery.options(node, ceil_mode=0 if _rounds_up(node) else 1)
    return f"(x) => ({outputs}) {{ {outputs} = {node.op_type} {flipped} (x) }}"


def _full_kernel(node: onnx.NodeProto) -> str | None:
    """The same windows, but an average divides by the cells past the padded edge too."""
    if not (_counts_padding(node) and _rounds_up(node)):
        return None
    # Twice the channels: else ONNX Runtime, whose inference keeps windows that it drops when it
    # runs, would put both averages into one buffer. Slice ends where there are no more.
    return (
        f"(x) => (y) {{ {_padded(node, more=True)} all = {_bare(node)} (padded) "
        "twice = Concat <axis = 1> (x, x) "
        f"plain = AveragePool {surgery.options(node)} (twice) size = Shape (plain) "
        "start = Sub (size, size) y = Slice (all, start, size) }"
    )


def _kept(node: onnx.NodeProto) -> str | None:
    """Rounded up, and a last window that starts in the padding, or past it, is kept.

    With the padding inside the tensor it starts in no padding. With ``stride − 1`` cells more,
    rounding down gives as many windows of a maximum as rounding up, the last one past the edge too.
    """
    if _maximum(node) and (any(_pads(node)) or _skips(node)):
        return f"(x) => (y) {{ {_padded(node, more=True)} y = {_bare(node)} (padded) }}"
    if any(_pads(node)) and _counts_padding(node):
        return f"(x) => (y) {{ {_padded(node)} y = {_bare(node, ceil_mode=1)} (padded) }}"
    return None


def _kept_full_kernel(node: onnx.NodeProto) -> str | None:
    """The same, but an average divides by the cells past the padded edge too.

    ``stride − 1`` cells more at the end make rounding down what rounding up was.
    """
    if not _counts_padding(node) or (_rounds_up(node) and not any(_pads(node))):
        return None
    return f"(x) => (y) {{ {_padded(node, more=True)} y = {_bare(node)} (padded) }}"


def _as_average(node: onnx.NodeProto) -> str | None:
    """Lp pooling as an average of powers times the whole kernel.

    At the end the average divides by fewer cells, so that a last window weighs too much there.
    """
    given = surgery.attributes(node)
    if node.op_type != "LpPool" or not _rounds_up(node) or "dilations" in given:
        return None
    cells, p = math.prod(given["kernel_shape"]), given.get("p", 2)
    average = f"AveragePool {surgery.options(node, p=None, count_include_pad=1)}"
    return (
        f"(x) => (y) {{ p = Constant <value = float {{{p}}}> () "
        f"inverse = Constant <value = float {{{1 / p}}}> () "
        f"cells = Constant <value = float {{{cells}}}> () wide = Cast <to = 1> (x) "
        f"size = Abs (wide) powers = Pow (size, p) mean = {average} (powers) "
        "sum = Mul (mean, cells) root = Pow (sum, inverse) y = Cast <to = $T> (root) }"
    )


# Forms, most likely first; each gives a function body, or None where it changes nothing.
_FORMS: tuple[tuple[str, Callable[[onnx.NodeProto], str | None]], ...] = (
    ("the number of windows is rounded the other way", _other_way),
    ("cells past the padded edge count in an average", _full_kernel),
    ("rounded up, and a last window that starts in the padding is kept", _kept),
    ("rounded up, kept, and cells past the padded edge count in an average", _kept_full_kernel),
    ("Lp pooling as an average times the kernel: the last window weighs too much", _as_average),
)


def _maximum(node: onnx.NodeProto) -> bool:
    return node.op_type == "MaxPool" and len(node.output) == 1


def _skips(node: onnx.NodeProto) -> bool:
    """Whether cells lie between the windows, so that one may start past the edge."""
    given = surgery.attributes(node)
    kernel, strides = given["kernel_shape"], given["strides"]
    dilations = given.get("dilations", [1] * len(kernel))
    return any((k - 1) * d + 1 < s for k, s, d in zip(kernel, strides, dilations, strict=True))


def _counts_padding(node: onnx.NodeProto) -> bool:
    """Whether it is an average with no padding, or one that counts it."""
    counted = surgery.attributes(node).get("count_include_pad", 0)
    return node.op_type == "AveragePool" and bool(counted or not any(_pads(node)))


def _rounds_up(node: onnx.NodeProto) -> bool:
    return bool(surgery.attributes(node).get("ceil_mode", 0))


def _pads(node: onnx.NodeProto) -> list[int]:
    """Begin of every spatial axis, then end of every spatial axis."""
    given = surgery.attributes(node)
    return list(given.get("pads", [0] * (2 * len(given["kernel_shape"]))))


def _applies(node: onnx.NodeProto) -> bool:
    """Whether rounding can matter: strides above 1 and no automatic padding, which rounds up."""
    given = surgery.attributes(node)
    explicit = given.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return explicit and any(stride > 1 for stride in given.get("strides", ()))


def _padded(node: onnx.NodeProto, *, more: bool = False) -> str:
    """``padded``: ``x`` with the node's padding, and ``stride − 1`` cells more at the end."""
    pads, strides = _pads(node), surgery.attributes(node)["strides"]
    begin, end = pads[: len(strides)], pads[len(strides) :]
    if more:
        end = [e + s - 1 for e, s in zip(end, strides, strict=True)]
    amounts = ", ".join(map(str, (0, 0, *begin, 0, 0, *end)))
    value = -_HIGHEST if node.op_type == "MaxPool" else 0.0
    return (
        f"amounts = Constant <value = int64[{len(pads) + 4}] {{{amounts}}}> () "
        f"{surgery.number('value', value)} padded = Pad (x, amounts, value)"
    )


def _bare(node: onnx.NodeProto, ceil_mode: int = 0) -> str:
    """The pooling without padding of its own."""
    changed = {"ceil_mode": ceil_mode, "pads": None, "auto_pad": None, "count_include_pad": None}
    return f"{node.op_type} {surgery.options(node, **changed)}"


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with its poolings rounded or counted in each of the other ways."""
    model, version = segment.model, surgery.opset(segment.model)
    pools = [
        (i, node)
        for i, node in surgery.find(model, _POOLS)
        if version >= max(_AMOUNTS, _POOLS[node.op_type]) and _applies(node)
    ]
    for name, form in _FORMS:
        yield from rewritten(model, name, pools, form)


_EXPLICIT = (
    "export the listed poolings with ceil_mode=0, and with a Pad in front of them that "
    "makes the stride divide the input"
)
NOISE = Cause(
    id="inference.ceil_mode",
    type="ceil mode",
    title="A pooling's number of windows is rounded, or its last window counted, another way",
    cause=(
        "Where the stride does not divide the input, engines round the number of windows down or "
        "up, keep or drop a last window that starts in the padding, and divide an average by the "
        "whole kernel or by the cells inside."
    ),
    applies=(
        "MaxPool and AveragePool from operator set 11 on, LpPool from 18 on, with a stride "
        "above 1 and explicit padding"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), Table 1, ceil mode, and eq. 8; ONNX operators "
        "MaxPool-22 and AveragePool-19 (ceil_mode, count_include_pad); OpenVINO operation "
        "MaxPool-14 (rounding_type ceil and ceil_torch); onnxruntime issue 16203"
    ),
    advice=_EXPLICIT,
    remedies={
        "ov": (
            f"{_EXPLICIT}: OpenVINO's rounding type ceil keeps windows that ONNX drops, and "
            "divides by the whole kernel"
        ),
        "trt": f"{_EXPLICIT}, or set PaddingMode on the pooling layer to the model's rounding",
    },
    convention=True,
    forms=tuple(name for name, _ in _FORMS),
    variants=_variants,
)
