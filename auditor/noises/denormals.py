"""Subnormal numbers flushed to zero: what is smaller than the smallest normal number vanishes."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import TensorProto

from auditor.graphs import surgery
from auditor.noises._cause import Cause
from auditor.ports import SegmentGraph, Variant
from auditor.replays.kernel_layout import MOVES

# Operators that move values and so leave subnormal ones alone.
_MOVES = MOVES | {"Constant", "ConstantOfShape", "Shape"}
_SMALLEST = {TensorProto.FLOAT: 2.0**-126, TensorProto.FLOAT16: 2.0**-14}


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with subnormal operands and results of its arithmetic flushed."""
    model = segment.model
    types = surgery.types(model)
    kinds = {types.get(name) for node in model.graph.node for name in node.output}
    for kind in (TensorProto.FLOAT16, TensorProto.FLOAT):
        if kind not in kinds:
            continue
        body = (  # without Where, which operator sets before 9 do not have
            f"(x) => (y) {{ {surgery.number('k', _SMALLEST[kind])} a = Abs(x) tiny = Less(a, k) "
            "kept = Not(tiny) m = Cast <to = $T> (kept) y = Mul(x, m) }"
        )
        nodes = [(i, n) for i, n in enumerate(model.graph.node) if n.op_type not in _MOVES]
        writes = {i: body for i, n in nodes if types.get(n.output[0]) == kind}
        reads = {
            (i, position): body
            for i, n in nodes
            for position, name in enumerate(n.input)
            if types.get(name) == kind
        }
        if writes:
            name = "float16" if kind == TensorProto.FLOAT16 else "float32"
            yield Variant(
                f"subnormal {name} operands and results become zero",
                surgery.passing(model, reads, writes),
            )
            yield Variant(
                f"subnormal {name} results become zero", surgery.passing(model, {}, writes)
            )


_RESCALE = "scale the listed tensors up so that they stay normal"
NOISE = Cause(
    id="implementation.denormals",
    type="operator implementation",
    title="Subnormal numbers are flushed to zero",
    cause=(
        "Processors handle numbers below the smallest normal one (1.2e-38 in float32, 6.1e-5 in "
        "float16) slowly, so runtimes set flush-to-zero, and accelerators have nothing else."
    ),
    applies=(
        "float32 and float16 operands and results of everything but moves of data; it shows "
        "only where values are that small"
    ),
    source=(
        "Intel SDM vol. 1, sec. 10.2.3 (MXCSR, FTZ and DAZ); ONNX Runtime, "
        "session.set_denormal_as_zero; IEEE 754-2019, sec. 3.3"
    ),
    advice=_RESCALE,
    remedies={
        "ort": f"set session.set_denormal_as_zero to 0, or {_RESCALE}",
        "ov": f"set CPU_DENORMALS_OPTIMIZATION to False, or {_RESCALE}",
    },
    ablations={
        "ort": {"session.set_denormal_as_zero": "0"},
        "ov": {"CPU_DENORMALS_OPTIMIZATION": "NO"},
        "tvm": {"fast-math": "false"},
    },
    forms=("subnormal TYPE operands and results become zero", "subnormal TYPE results become zero"),
    variants=_variants,
)
