"""Resize with the weights of every position in numbers."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from auditor.graphs import surgery
from auditor.ports import Array, Surroundings
from auditor.replays import sessions


class _ResizeMatrix:
    """A product with one matrix for each axis that changes.

    Every mode of Resize is linear in its input and separable, and a matrix leaves nothing to
    convention. The matrices are what the reference makes of unit vectors, so they follow all
    attributes. Source: ONNX operator specification, Resize.
    """

    id = "resize-matrix"
    title = "Resize as products with constant matrices"
    noises = frozenset({"inference.upsample"})

    def rewrite(self, node: onnx.NodeProto, view: Surroundings) -> list[onnx.NodeProto] | None:
        """A MatMul for each of the last two axes that changes; None where other axes do."""
        shape, size = view.shape(node.input[0]), view.shape(node.output[0])
        kind = view.dtype(node.input[0])
        crops = (
            surgery.attributes(node).get("coordinate_transformation_mode") == "tf_crop_and_resize"
        )
        if node.op_type != "Resize" or crops or kind not in (np.float32, np.float16):
            return None
        if shape is None or size is None or len(shape) < 3 or shape[:-2] != size[:-2]:
            return None
        scales = view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        nodes: list[onnx.NodeProto] = []
        reached = node.input[0]
        changing = [axis for axis in (-1, -2) if shape[axis] != size[axis] or _moves(scales, axis)]
        for number, axis in enumerate(changing, 1):
            scale = None if scales is None else float(scales[axis])
            matrix = _matrix(node, view.opset, shape[axis], size[axis], scale)
            if matrix is None:
                return None
            last = number == len(changing)
            made = node.output[0] if last else view.fresh(node.output[0])
            weights = matrix if axis == -1 else matrix.T
            name = view.add(node.output[0], weights.astype(kind))
            inputs = [reached, name] if axis == -1 else [name, reached]
            nodes.append(helper.make_node("MatMul", inputs, [made]))
            reached = made
        return nodes or None


def _moves(scales: Array | None, axis: int) -> bool:
    return scales is not None and scales.size > 0 and float(scales[axis]) != 1.0


def _matrix(
    node: onnx.NodeProto, opset: int, size: int, target: int, scale: float | None
) -> Array | None:
    """[size, target]: row i is what the reference makes of the i-th unit vector."""
    made = surgery.copied(node)
    surgery.set_attributes(made, axes=None, keep_aspect_ratio_policy=None)
    if scale is None:
        how = helper.make_tensor("how", TensorProto.INT64, [4], [1, 1, size, target])
        made.input[:] = ["x", "", "", "how"]
    else:
        how = helper.make_tensor("how", TensorProto.FLOAT, [4], [1.0, 1.0, 1.0, scale])
        made.input[:] = ["x", "", "how"]
    made.output[:] = ["y"]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [made],
        "axis",
        [value("x", TensorProto.FLOAT, [1, 1, size, size])],
        [value("y", TensorProto.FLOAT, None)],
        [how],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    try:
        units = np.eye(size, dtype=np.float32)[None, None]
        found: Array = sessions.session(model, 1).run(None, {"x": units})[0][0, 0]
    except Exception:  # ORT's exceptions have no common base: then there is no such rewrite
        return None
    return found if found.shape == (size, target) else None


FIX = _ResizeMatrix()
