"""Copies of a segment whose nodes are written anew, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from auditor.graphs import surgery


class Editor:
    """Builds ``model``, a copy of a segment whose nodes differ: add them in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = surgery.copied(model)
        del self.model.graph.node[:]
        self._mark = unused_mark(model)
        self._count = 0
        self._changed = False

    @property
    def changed(self) -> onnx.ModelProto | None:
        """The copy; None where all its nodes are the segment's."""
        return self.model if self._changed else None

    def copy(self, node: onnx.NodeProto) -> None:
        """Add a node of the segment as it is."""
        self.model.graph.node.append(node)

    def put(self, node: onnx.NodeProto) -> None:
        """Add a node that the segment has not."""
        self._changed = True
        self.model.graph.node.append(node)

    def add(self, op_type: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name, ``to`` where given."""
        name = to or self.fresh()
        self.put(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def split(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        names = [self.fresh() for _ in range(outputs)]
        self.put(helper.make_node(op_type, inputs, names, **attributes))
        return names

    def cast(self, value: str, kind: int, to: str = "") -> str:
        """Add a Cast to an ONNX element type and return its output, ``to`` where given."""
        name = to or self.fresh()
        self.put(helper.make_node("Cast", [value], [name], to=kind))
        return name

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        """Add an initialiser of a numpy type and return its name."""
        name = self.fresh()
        array = np.ascontiguousarray(value, kind).reshape(np.shape(value))
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def scan(
        self, body: onnx.GraphProto, state: str, *inputs: str, axes: Sequence[int] = ()
    ) -> str:
        """Add a Scan that folds ``inputs`` along their first axis, or ``axes``, into one state."""
        axes = list(axes) or [0] * len(inputs)
        count = len(inputs)
        return self.add(
            "Scan", state, *inputs, body=body, num_scan_inputs=count, scan_input_axes=axes
        )

    def fresh(self) -> str:
        """A name that no tensor has."""
        self._count += 1
        return f"{self._mark}{self._count}"


def unused_mark(model: onnx.ModelProto) -> str:
    """A prefix that no tensor of the model has, so that surgery can be repeated on its result."""
    names = {n for node in model.graph.node for n in node.output}
    names.update(t.name for t in model.graph.initializer)
    mark = "~"
    while any(name.startswith(mark) for name in names):
        mark += "~"
    return mark
