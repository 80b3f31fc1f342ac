"""The same segment with the positions between which it interpolates moved in their last bit.

A position is the output's index divided by a scale, or multiplied by the inverse of that: ONNX
Runtime does the one, TVM the other. Beside pixel 200 the two are 2⁻¹⁷ apart, and so far apart is
what is interpolated there.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from auditor.graphs import surgery

_MODES = ("linear", "cubic")  # the others decide
_SCALES = 2  # their place among the inputs; sizes are behind
OPSET = 11


def moved(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy of a segment whose scales are one last bit larger; None where it has none."""
    values, shapes = surgery.constants(model), surgery.shapes(model)
    result = surgery.copied(model)
    changed = False
    for _, node in surgery.find(result, ("Resize",)):
        shape = shapes.get(node.input[0])
        given = surgery.attributes(node)
        if given.get("mode") not in _MODES or not shape or "axes" in given:
            continue
        scales, sizes = (values.get(n) for n in (*node.input[_SCALES:], "", "")[:2])
        if sizes is not None and sizes.size:
            scales = sizes / np.array(shape)
        if scales is None or not scales.size:
            continue
        larger = np.where(scales == 1, 1, scales * (1 + np.finfo(np.float32).eps))
        name = f"{node.output[0]}/scales"
        tensor = numpy_helper.from_array(larger.astype(np.float32), name)
        result.graph.initializer.append(tensor)
        del node.input[_SCALES:]
        node.input.append(name)
        changed = True
    return result if changed else None
