"""What is to be said of a session: its kernels, notes, and which of its factors can be left out."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from auditor.records.backend import Kernel, Switch
from backends._ort_graph import Graph, attribute_of
from backends._ort_names import NCHWC, TOKEN, Names
from backends._ort_session import Options, outputs_of
from backends._shared import node_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    import onnx


_DISABLED: Final = "optimization.disable_specified_optimizers"  # names, by semicolons
_SATURATING: Final = "session.x64quantprecision"
_KEEP_PAIRS: Final = "session.disable_double_qdq_remover"
# What MatMulNBits reads where the optimiser makes it: 4, the default, allows 8 bits, 1 does not.
_ACCURACY: Final = "session.qdq_matmulnbits_accuracy_level"
_FEW_BITS: Final = "com.microsoft.MatMulNBits"
_SATURATES: Final = "precision.int8_saturation"
_QUANTISED: Final = re.compile(r"(.*\.)?(QLinear\w+|QGemm|MatMulIntegerToFloat)")
# What has int8 weights that the option makes uint8 (Avx2WeightS8ToU8Transformer).
_SIGNED: Final = re.compile(
    r"(.*\.)?(QLinear(Conv|MatMul)|QGemm|QAttention|MatMulInteger(ToFloat)?"
    r"|DynamicQuantize(MatMul|LSTM))"
)
_GELU: Final = ("implementation.approximation",)
_NORMALISATION: Final = ("implementation.normalisation",)
# Kernels that an optimiser makes: what it does, its names, the causes that it can bring.
# Source: the names under which onnxruntime/core/optimizer registers its optimisers.
_FUSIONS: Final[dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
    "com.microsoft.Gelu": ("fusion of Gelu", ("GeluFusionL1", "GeluFusionL2"), _GELU),
    "com.microsoft.BiasGelu": ("fusion of bias and Gelu", ("BiasGeluFusion",), _GELU),
    "com.microsoft.FastGelu": ("fusion of fast Gelu", ("FastGeluFusion",), _GELU),
    "com.microsoft.QuickGelu": ("fusion of quick Gelu", ("QuickGeluFusion",), _GELU),
    "LayerNormalization": (
        "fusion of layer normalisation",
        ("LayerNormFusionL1", "LayerNormFusionL2"),
        _NORMALISATION,
    ),
    "SimplifiedLayerNormalization": (
        "fusion of RMS normalisation",
        ("SimplifiedLayerNormFusion",),
        _NORMALISATION,
    ),
    "com.microsoft.SkipLayerNormalization": (
        "fusion of addition and layer normalisation",
        ("SkipLayerNormFusion",),
        _NORMALISATION,
    ),
    "com.microsoft.FusedMatMul": (
        "fusion of scale or transposition into MatMul",
        ("MatMulScaleFusion", "MatmulTransposeFusion"),
        (),
    ),
    "com.microsoft.FusedGemm": ("fusion of Gemm and activation", ("GemmActivationFusion",), ()),
    "com.microsoft.FusedConv": (
        "fusion of Conv and activation",
        ("ConvActivationFusion", "ConvAddActivationFusion"),
        (),
    ),
    "com.microsoft.nchwc.Conv": ("blocked layout (NCHWc)", ("NchwcTransformer",), ()),
}
# Session entries that change numbers where the user turned them on. Not
# ``session.set_denormal_as_zero``: the first session of a process decides it for all on its thread.
_ENTRIES: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("optimization.enable_gelu_approximation", "approximation of Gelu by tanh", _GELU),
    (
        "mlas.enable_gemm_fastmath_arm64_bfloat16",
        "bfloat16 matrix products (MLAS)",
        ("precision.bf16",),
    ),
)
_PRECISIONS: Final = {
    1: "f32",
    2: "i8",
    3: "i8",
    6: "i32",
    7: "i64",
    9: "bool",
    10: "f16",
    11: "f64",
    16: "bf16",
}  # onnx.TensorProto.DataType
_FLOATS: Final = frozenset({"f32", "f16", "bf16", "f64"})
_NAMED_TYPES: Final = {"tensor(int64)": 7, "tensor(bool)": 9, "tensor(float)": 1}


def switches(
    options: Options, kernels: Collection[str], original: Graph, own: Collection[str]
) -> Iterator[Switch]:
    """What of this session can be left out.

    Args:
        options: the session's.
        kernels: the primitives that it runs.
        original: the file's graph.
        own: its primitives; the optimiser made the others.
    """
    made = set(kernels) - set(own)
    for key, factor, noises in _ENTRIES:
        if options.config.get(key) == "1":
            yield Switch(factor, {key: "0"}, noises)
    if options.level == "disable":
        return
    if _doubly_quantised(original) and options.config.get(_KEEP_PAIRS) != "1":
        yield Switch(
            "removal of double QDQ pairs", {_KEEP_PAIRS: "1"}, ("precision.int8_requantisation",)
        )
    if _FEW_BITS in made and options.config.get(_ACCURACY, "4") == "4":
        yield Switch(
            "8-bit activations beside weights of few bits",
            {_ACCURACY: "1"},
            ("precision.int8_dynamic",),
            (_FEW_BITS,),
        )
    off = [name for name in options.config.get(_DISABLED, "").split(";") if name]

    def without(factor: str, optimisers: Iterable[str], *about: tuple[str, ...]) -> Switch:
        return Switch(factor, {_DISABLED: ";".join([*off, *optimisers])}, *about)

    signed = tuple(sorted(filter(_SIGNED.fullmatch, kernels)))
    if signed and options.config.get(_SATURATING) != "1":
        # It makes signed 8-bit weights unsigned: those kernels do not add pairs in 16 bits.
        factor = "signed 8-bit weights (U8S8 kernels)"
        yield Switch(factor, {_SATURATING: "1"}, (_SATURATES,), signed)
    if quantised := tuple(sorted(filter(_QUANTISED.fullmatch, made))):
        yield without(
            "fusion of quantised operators",
            ("QDQSelectorActionTransformer",),
            (_SATURATES, "precision.int8_requantisation", "precision.int8"),
            quantised,
        )
    for primitive in (p for p in _FUSIONS if p in made):
        factor, optimisers, noises = _FUSIONS[primitive]
        yield without(factor, optimisers, noises, (primitive,))
    if options.level in ("all", "extended"):
        yield Switch("optimisation beyond the basic level", {"level": "basic"})
    else:
        yield Switch("graph optimisation", {"level": "disable"})


def _doubly_quantised(graph: Graph) -> bool:
    """Whether something is quantised again right after it was dequantised."""
    read = (graph.producer.get(n.input[0]) for n in graph.nodes if n.op_type == "QuantizeLinear")
    return any(node is not None and node.op_type == "DequantizeLinear" for node in read)


def stored(graph: onnx.GraphProto, artifact: Path) -> Iterator[str]:
    """How the loaded file stores its weights, and what ties it to a machine."""
    counted = Counter(
        _PRECISIONS[int(i.data_type)]
        for i in graph.initializer
        if int(i.data_type) in _PRECISIONS and _PRECISIONS[int(i.data_type)] not in ("i64", "bool")
    )
    said = ", ".join(f"{count} in {kind}" for kind, count in sorted(counted.items()))
    yield (
        f"{artifact.name} was loaded instead of compiling the ONNX file; its constants: "
        f"{said or 'none'}."
    )
    blocked = sum(node.domain == NCHWC for node in graph.node)
    if blocked:
        yield (
            f"{blocked} operators are in a blocked layout, whose block depends on the processor: "
            f"{artifact.name} suits processors like the one that it was made on only."
        )


def kernels(model: onnx.ModelProto, compiled: Graph, names: Names) -> Iterator[Kernel]:
    """Every top-level node of the compiled graph as the primitive that runs it."""
    types = _types(model)
    original = names.original
    surviving = {seat.name for seat in names.seats.values()}
    produced: set[str] = set(compiled.inputs)
    for node in compiled.nodes:
        if compiled.constants.issuperset(filter(None, node.output)):
            continue
        outputs = [names.seats[name].name for name in node.output if name in names.seats]
        first = [name for name in outputs if name not in produced]
        produced.update(first)
        yield Kernel(
            # The numbers that keep ONNX Runtime's own names apart differ from run to run.
            name=TOKEN.sub("", node.name) or node_key(node),
            type=node.op_type,
            nodes=tuple(original.cone(first, surviving)),
            outputs=tuple(dict.fromkeys(outputs)),
            primitive=primitive(node),
            precision=_precision(node, types),
            output_precision=_PRECISIONS.get(types.get(node_key(node), 0), ""),
        )


def primitive(node: onnx.NodeProto) -> str:
    own = node.domain in ("", "ai.onnx")
    return node.op_type if own else f"{node.domain}.{node.op_type}"


def _precision(node: onnx.NodeProto, types: Mapping[str, int]) -> str:
    """What a kernel computes in: 8-bit when its first input is, else its first float input."""
    given = [_PRECISIONS.get(types.get(name, 0), "") for name in node.input if name]
    if given[:1] == ["i8"]:
        return "i8"
    return next((p for p in given if p in _FLOATS), next(iter(given), ""))


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of each tensor of the compiled graph, as far as schemas determine it."""
    import onnx

    versions = {o.domain: o.version for o in model.opset_import}
    graph = model.graph
    types = {i.name: int(i.data_type) for i in graph.initializer}
    for info in itertools.chain(graph.input, graph.output, graph.value_info):
        types.setdefault(info.name, int(info.type.tensor_type.elem_type))
    for node in graph.node:
        bound: dict[str, int] = {}
        declared = ["T"] * len(node.output)
        if node.domain == "" and onnx.defs.has(node.op_type):
            try:
                schema = onnx.defs.get_schema(node.op_type, versions.get("", 1), "")
            except onnx.defs.SchemaError:  # the optimiser uses operators newer than the opset
                schema = onnx.defs.get_schema(node.op_type)
            for formal, name in zip(schema.inputs, node.input, strict=False):
                bound.setdefault(formal.type_str, types.get(name, 0))
            last = len(schema.outputs) - 1
            declared = [schema.outputs[min(i, last)].type_str for i in range(len(node.output))]
        elif node.input:
            bound["T"] = _contrib_type(node, types)
        chosen = attribute_of(node, "to") or attribute_of(node, "dtype")
        for name, type_str in zip(node.output, declared, strict=True):
            if chosen is not None:
                bound[type_str] = int(chosen.i)
            types.setdefault(name, bound.get(type_str, _NAMED_TYPES.get(type_str, 0)))
    return types


def _contrib_type(node: onnx.NodeProto, types: Mapping[str, int]) -> int:
    """Output type of an operator of ONNX Runtime's own: its first input's, or its scale's."""
    to_float = node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
    index = {"DequantizeLinear": 1, "MatMulIntegerToFloat": 2}.get(node.op_type, 0)
    if node.op_type == "QuantizeLinear" and len(node.input) > 2:
        index = 2
    if node.op_type == "QGemm" and (len(node.input) < 9 or not node.input[8]):
        return types.get(node.input[1], 0)
    return types.get(node.input[index], 1 if to_float else 0)


def notes(graph: onnx.GraphProto, session: Any) -> Iterator[str]:
    casts = Counter(n.name.startswith("Inserted") for n in graph.node if n.op_type == "Cast")[True]
    if casts:
        yield (
            f"ONNX Runtime inserted {casts} casts: the CPU has no kernel for some operators in "
            "the model's type, so they compute in float32."
        )
    compared = outputs_of(session)
    for output in session.get_outputs():
        if output.name not in compared:
            yield f"Output {output.name!r} is a {output.type}, which cannot be compared."
