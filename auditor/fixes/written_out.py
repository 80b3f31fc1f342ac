"""Operators written out as the specification defines them."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from auditor.ports import Surroundings


class _WrittenOut:
    """The function that the operator specification gives for an operator, in its place.

    Source: ONNX operator schemas, function bodies.
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
        if node.domain not in ("", "ai.onnx"):
            return None
        try:
            schema = onnx.defs.get_schema(node.op_type, view.opset, "")
            function = _body(schema, node, view)
        except Exception:  # onnx raises a family of its own where there is no such body
            return None
        if function is None:
            return None
        if any(n.op_type == node.op_type for n in function.node):
            return None
        given = {a.name: a for a in node.attribute} | {
            a.name: a for a in function.attribute_proto if a.name not in _names(node)
        }
        defaults = {name: a.default_value for name, a in schema.attributes.items()}
        renamed: dict[str, str] = {"": ""}
        renamed.update(zip(function.input, node.input, strict=False))
        for missing in function.input[len(node.input) :]:
            renamed[missing] = ""
        renamed.update(zip(function.output, node.output, strict=False))
        made = []
        for inner in function.node:
            new = onnx.NodeProto()
            new.CopyFrom(inner)
            for names in (new.input, new.output):
                for position, name in enumerate(names):
                    if name not in renamed:
                        renamed[name] = view.fresh(node.output[0])
                    names[position] = renamed[name]
            kept = []
            for attribute in inner.attribute:
                source = attribute.ref_attr_name
                found = given.get(source) or defaults.get(source) if source else attribute
                if found is not None and found.type:
                    copy = onnx.AttributeProto()
                    copy.CopyFrom(found)
                    copy.name = attribute.name
                    kept.append(copy)
            del new.attribute[:]
            new.attribute.extend(kept)
            made.append(new)
        return made


def _names(node: onnx.NodeProto) -> set[str]:
    return {a.name for a in node.attribute}


def _body(schema: Any, node: onnx.NodeProto, view: Surroundings) -> onnx.FunctionProto | None:
    if schema.has_function:
        function: onnx.FunctionProto = schema.function_body
        return function
    if not schema.has_context_dependent_function:
        return None
    kinds = []
    for name in node.input:
        kind = view.dtype(name) if name else None
        element = 0 if kind is None else helper.np_dtype_to_tensor_dtype(kind)
        kinds.append(helper.make_tensor_type_proto(element, None).SerializeToString())
    text = schema.get_context_dependent_function(node.SerializeToString(), kinds)
    found = onnx.FunctionProto()
    found.ParseFromString(text)
    return found


FIX = _WrittenOut()
