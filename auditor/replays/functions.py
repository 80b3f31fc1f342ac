"""The same segment with its transcendental functions evaluated in double precision.

A float32 kernel may be right to the last digit of 1 and no further: ONNX Runtime's Sigmoid of −14
is 5 % off. What the segment moves by when such a function is evaluated exactly is the reference's
own error, and no runtime that is nearer to the truth is to blame for it.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery

# Those that ONNX Runtime has in double precision.
_FUNCTIONS = frozenset({"Exp", "Log", "LogSoftmax", "Sigmoid", "Softmax", "Tanh"})
OPSET = 9


def exact(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy of a float32 segment with its functions in double; None where it has none."""
    result = surgery.copied(model)
    del result.graph.node[:]
    changed = False
    for node in model.graph.node:
        if node.op_type not in _FUNCTIONS or node.domain:
            result.graph.node.append(node)
            continue
        changed = True
        made = f"{node.output[0]}/double"
        inner = surgery.copied(node)
        inner.input[0], inner.output[0] = f"{made}/of", made
        result.graph.node.extend(
            [
                helper.make_node("Cast", node.input, inner.input, to=TensorProto.DOUBLE),
                inner,
                helper.make_node("Cast", [made], node.output, to=TensorProto.FLOAT),
            ]
        )
    return result if changed else None
