"""The same segment with the positions between which it interpolates moved in their last bit.

A position is the output's index divided by a scale, or multiplied by the inverse of that: ONNX
Runtime does the one, TVM the other. Beside pixel 200 the two are 2⁻¹⁷ apart, and so far apart is
what is interpolated there.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery

_MODES = ("linear", "cubic")  # the others decide
PLACING = ("Resize", "RoiAlign", "Upsample")  # operators that read at positions
_CUT = 0.01  # how near to an integer a value may be cut off to either
_INTEGERS = frozenset((onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32))
_SCALES = 2  # their place among the inputs; sizes are behind
OPSET = 11


def moved(
    model: onnx.ModelProto, units: float = 1, modes: Container[str] = _MODES
) -> onnx.ModelProto | None:
    """A copy of a segment whose scales are last bits larger; None where it has none.

    Args:
        model: the segment.
        units: how many last bits.
        modes: of the Resize nodes that are moved.
    """
    values, shapes = surgery.constants(model), surgery.shapes(model)
    result = surgery.copied(model)
    changed = False
    for _, node in surgery.find(result, ("Resize",)):
        shape = shapes.get(node.input[0])
        given = surgery.attributes(node)
        if given.get("mode", "nearest") not in modes or not shape or "axes" in given:
            continue
        scales, sizes = (values.get(n) for n in (*node.input[_SCALES:], "", "")[:2])
        if sizes is not None and sizes.size:
            scales = sizes / np.array(shape)
        if scales is None or not scales.size:
            continue
        larger = np.where(scales == 1, 1, scales * (1 + units * np.finfo(np.float32).eps))
        name = f"{node.output[0]}/scales"
        tensor = numpy_helper.from_array(larger.astype(np.float32), name)
        result.graph.initializer.append(tensor)
        del node.input[_SCALES:]
        node.input.append(name)
        changed = True
    return result if changed else None


def nudged(model: onnx.ModelProto, up: float) -> onnx.ModelProto | None:
    """A copy of a segment in which what is interpolated between integers is moved before it is cut.

    Args:
        model: the segment.
        up: 1 or −1.
    """
    types, bodies = surgery.types(model), dict[int, str]()
    for index, node in surgery.find(model, ("Resize",)):
        between = surgery.attributes(node).get("mode") in _MODES
        if not between or types.get(node.input[0]) not in _INTEGERS:
            continue
        names = ("x", "roi", "scales", "sizes")[: len(node.input)]
        names = tuple(n for n, given in zip(names, node.input, strict=True) if given)
        read = ", ".join("wide" if n == "x" else n for n in _padded(names))
        bodies[index] = (
            f"({', '.join(names)}) => (y) {{ wide = Cast <to = 1> (x) "
            f"v = Resize {surgery.options(node)} ({read}) "
            f"by = Constant <value = float {{{up * _CUT}}}> () w = Add(v, by) "
            "y = Cast <to = $T> (w) }"
        )
    return surgery.substituted(model, bodies) if bodies else None


def _padded(names: Sequence[str]) -> list[str]:
    """The inputs of a Resize, empty where not given."""
    every = [n if n in names else "" for n in ("x", "roi", "scales", "sizes")]
    return every[: max(i for i, n in enumerate(every) if n) + 1]
