"""From the ONNX model to a Relax module, with the names that TVM forgets."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auditor.errors import BackendError
from auditor.records.backend import BuildRequest

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

# Operators that the importer handles outside its table of converters.
_BUILT_IN = frozenset({"If", "Constant"})
# What ONNX Runtime puts before a tensor's name, for a cast of it that it adds and for what is cast.
_INSERTED = "InsertedPrecisionFreeCast_"
# The importer looks operators up by name alone; in other domains a name may mean anything.
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})


@dataclass(frozen=True, slots=True)
class Imported:
    """A Relax module with what the importer knows about its names.

    Attributes:
        inputs: ONNX names of ``main``'s parameters, in their order.
        outputs: ONNX names of its results, in their order.
        tensors: ONNX name → the Relax expression the importer made for it.
        graph: the ONNX graph imported, which may be a folded one.
    """

    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, Any]
    graph: onnx.GraphProto


def convert(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> Imported:
    """What ``relax.frontend.onnx.from_onnx`` does, keeping the importer's table of tensors."""
    from tvm import relax
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter

    _require_converters(model.graph)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    importer = ONNXGraphImporter({name: list(shape) for name, shape in shapes.items()}, "float32")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            module = importer.from_onnx(model.graph, opset)
    except Exception as error:  # the importer raises whatever its converters raise
        # The failing operator is only ever printed.
        operator = re.search(r"Error converting operator (\w+)", printed.getvalue())
        where = f" {operator[1]}" if operator else " the model"
        raise BackendError(
            f"TVM could not import{where}: {last_line(error)}",
            "Export with fixed shapes and constant parameters, or leave TVM out of --backends.",
        ) from error
    return Imported(
        module=module,
        inputs=tuple(n for n, e in importer._inputs.items() if isinstance(e, relax.Var)),
        outputs=tuple(o.name for o in model.graph.output),
        tensors=dict(importer._nodes),
        graph=model.graph,
    )


def _require_converters(graph: onnx.GraphProto) -> None:
    """Refuse a graph if the importer cannot convert some operator, naming all of them.

    Raises:
        BackendError: with the operators of the graph and its subgraphs that have no converter, or
            the constants whose values share bytes, which it copies as if they did not.
    """
    from onnx import TensorProto
    from tvm.relax.frontend.onnx import onnx_frontend

    known = onnx_frontend._get_convert_map().keys() | _BUILT_IN
    found = set()
    for node in _all_nodes(graph):
        if node.domain not in _DOMAINS:
            found.add(f"{node.domain}::{node.op_type}")
        elif node.op_type not in known:
            found.add(node.op_type)
    if found:
        raise BackendError(
            f"TVM has no converter for {', '.join(sorted(found))}.",
            "Export the model without these operators, or leave TVM out of --backends.",
        )
    packed = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}
    if names := [t.name for t in graph.initializer if t.data_type in packed]:
        raise BackendError(
            f"TVM cannot read constants of 4 bits: {names[0]}"
            f"{f' and {len(names) - 1} others' if len(names) > 1 else ''}.",
            "Store the weights in 8 bits, or leave TVM out of --backends.",
        )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(subgraph)


def _fold(request: BuildRequest) -> onnx.ModelProto:
    """The model with fixed input shapes, after ONNX Runtime's basic graph optimisation.

    Raises:
        BackendError: ONNX Runtime does not load the model.
    """
    import onnx
    import onnxruntime as ort

    model = onnx.load(str(request.model_path), load_external_data=False)
    for value in model.graph.input:
        if value.name in request.shapes:
            dims = value.type.tensor_type.shape.dim
            del dims[:]
            for size in request.shapes[value.name]:
                dims.add().dim_value = size
    folded: Path = request.workdir / "folded.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for key, text in {
        "session.model_external_initializers_file_folder_path": str(request.model_path.parent),
        # Or a model above protobuf's 2 GB could not be saved.
        "session.optimized_model_external_initializers_file_name": "folded.bin",
        # They put other tensors in place of the model's, which TVM's importer does not.
        "optimization.disable_specified_optimizers": "TransposeOptimizer;MatMulAddFusion",
    }.items():
        options.add_session_config_entry(key, text)
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise BackendError(
            f"ONNX Runtime could not fold the model for TVM: {last_line(error)}"
        ) from error
    return onnx.load(str(folded))


def load(request: BuildRequest, original: onnx.GraphProto) -> tuple[Imported, tuple[str, ...]]:
    """Import the model directly where TVM can, folded otherwise; with notes for the user."""
    import onnx

    reason = "its input shapes are symbolic"
    # A size of 0 often stands for an unknown one; where that is the size, nothing is left open.
    if not request.dynamic or _declares(original, request.shapes):
        try:
            return convert(onnx.load(str(request.model_path)), request.shapes), ()
        except BackendError as error:
            reason = f"the model cannot be imported as it stands ({error.message.rstrip('.')})"
    try:
        folded = _fold(request)
    except BackendError:
        _require_converters(original)  # says more than ONNX Runtime's refusal, where it applies
        raise
    widened = ""
    if any(map(_is_inserted, folded.graph.node)) and not _narrowed(folded, original):
        widened = (
            " It computes in float32 there what ONNX Runtime has no kernel for in float16, which "
            "TVM's own import would not do."
        )
    imported = convert(folded, request.shapes)
    shapes = ", ".join(
        f"{name}:{'x'.join(map(str, shape))}" for name, shape in request.shapes.items()
    )
    note = (
        "Before TVM compiled the model, ONNX Runtime's basic optimisation folded it for the "
        f"fixed input shapes {shapes}, because {reason}.{widened}"
    )
    return imported, (note,)


def _declares(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are the very shapes that a graph gives its inputs."""
    of = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    return all(
        all(d.HasField("dim_value") for d in of[name])
        and tuple(d.dim_value for d in of[name]) == tuple(shape)
        for name, shape in shapes.items()
    )


def _is_inserted(node: onnx.NodeProto) -> bool:
    """Whether ONNX Runtime put a cast there, around what it has no kernel for in float16."""
    return node.op_type == "Cast" and node.name.startswith(_INSERTED)


def _narrowed(model: onnx.ModelProto, original: onnx.GraphProto) -> bool:
    """Take these casts out, in place; False if that leaves types that do not fit."""
    import onnx
    import onnxruntime as ort

    narrowed = onnx.ModelProto()
    narrowed.CopyFrom(model)
    graph = narrowed.graph
    nodes = [node for node in graph.node if not _is_inserted(node)]
    for node in nodes:
        node.input[:] = [name.removeprefix(_INSERTED) for name in node.input]
        node.output[:] = [name.removeprefix(_INSERTED) for name in node.output]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(_with_own_casts(nodes, original))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        ort.InferenceSession(
            narrowed.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # onnxruntime's exceptions have no public base class
        return False
    model.CopyFrom(narrowed)
    return True


def _with_own_casts(
    nodes: list[onnx.NodeProto], original: onnx.GraphProto
) -> Iterator[onnx.NodeProto]:
    """Nodes with the model's casts to float16 that ONNX Runtime joined with one of its own."""
    from onnx import TensorProto

    made = {name for node in nodes for name in node.output}
    reads = {name: set(node.input) for node in original.node for name in node.output}
    lost = {
        node.input[0]: node
        for node in original.node
        if node.op_type == "Cast"
        and any(a.name == "to" and a.i == TensorProto.FLOAT16 for a in node.attribute)
        and node.output[0] not in made
    }
    for node in nodes:
        own = reads.get(node.output[0], set())
        for position, name in enumerate(node.input):
            if name in lost and name not in own:
                cast = lost[name]
                node.input[position] = cast.output[0]
                if cast.output[0] not in made:
                    made.add(cast.output[0])
                    yield cast
        yield node


def last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
