"""Operators written out as the specification defines them."""

from __future__ import annotations

import onnx
from onnx import defs, helper, inliner

from auditor.graphs import surgery
from auditor.ports import Surroundings


class _WrittenOut:
    """The function that the operator specification gives for an operator, in its place.

    Source: ONNX operator schemas, function bodies, by ONNX's own inliner.
    """

    id = "written-out"
    title = "the operator's own definition in simpler operators"
    noises = frozenset(
        {
            *("implementation.approximation", "implementation.normalisation"),
            *("implementation.nonfinite", "implementation.opset_semantics"),
            "implementation.attribute_ignored",
        }
    )

    def rewrite(self, node: onnx.NodeProto, view: Surroundings) -> list[onnx.NodeProto] | None:
        """The nodes of its function body; None where the specification has none."""
        try:
            schema = defs.get_schema(node.op_type, view.opset, node.domain)
        except defs.SchemaError:
            return None
        kinds = {name: view.dtype(name) for name in node.input if name}
        if None in kinds.values():
            return None
        whole = surgery.copied(node)
        given = {attribute.name for attribute in node.attribute}
        # The inliner leaves out what a node leaves to its default.
        whole.attribute.extend(
            attribute.default_value
            for name, attribute in schema.attributes.items()
            if name not in given and attribute.default_value.name
        )
        graph = helper.make_graph(
            [whole],
            "alone",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(kind), view.shape(name)
                )
                for name, kind in kinds.items()
                if kind is not None
            ],
            [onnx.ValueInfoProto(name=name) for name in node.output if name],
        )
        opset = [helper.make_opsetid(node.domain, view.opset)]
        model = helper.make_model(graph, opset_imports=opset)
        chosen = [(node.domain, node.op_type)]
        try:
            made = inliner.inline_selected_functions(model, chosen, inline_schema_functions=True)
        except Exception:  # onnx raises a family of its own where a body cannot be written
            return None
        nodes = list(made.graph.node)
        if any(inner.op_type == node.op_type for inner in nodes):
            return None
        kept = {*node.input, *node.output, ""}
        renamed = {n: view.fresh(n) for inner in nodes for n in inner.output if n not in kept}
        for inner in nodes:
            for names in (inner.input, inner.output):
                names[:] = [renamed.get(name, name) for name in names]
        return nodes


FIX = _WrittenOut()
