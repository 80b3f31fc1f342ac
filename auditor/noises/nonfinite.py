"""NaN and infinity treated as numbers: a comparison drops a NaN, a clamp turns it into a limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from auditor import surgery
from auditor.ports import SegmentGraph, Variant
from auditor.records import Kernel, Stage

# Operators made of comparisons, with what a NaN must be to lose each of them.
_LOSES = {
    **dict.fromkeys(("Relu", "Clip", "Max", "ReduceMax", "ArgMax", "TopK", "Hardmax"), "-inf"),
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "Tanh", "Erf", "Exp", "Softplus"), "-inf"),
    **dict.fromkeys(("Elu", "Selu", "Celu", "PRelu", "LeakyRelu"), "-inf"),
    **dict.fromkeys(("Min", "ReduceMin", "ArgMin"), "inf"),
}
_OPPOSITE = {"-inf": "inf", "inf": "-inf"}
_ZEROED = ("Sign", "Round", "Floor", "Ceil", "Abs", "Neg", "ThresholdedRelu", "Sum", "ReduceSum")
# Operators of which the reference itself drops a NaN, as its kernels happen to compare.
_DROPPING = ("ReduceMax", "ReduceMin", "ThresholdedRelu")
_RANKED = ("ArgMax", "ArgMin")
# Results that are infinite or undefined for infinite or extreme operands.
_EXTREME = (
    *("Cast", "Exp", "Div", "Reciprocal", "Log", "Pow", "Sqrt", "Softmax", "LogSoftmax"),
    *("Gelu", "HardSwish", "Softsign", "Mish", "Swish", "ReduceMax", "ReduceMin", "ReduceSum"),
    *("ReduceLogSumExp", "Erf", "Tanh", "Sigmoid", "Mul", "Sub"),
)
_LARGEST = {1: "3.4028234663852886e+38", 10: "65504", 11: "1.7976931348623157e+308"}


class NonFinite:
    """``implementation.nonfinite``."""

    id = "implementation.nonfinite"
    stage: Stage = "inference"
    type = "operator implementation"
    title = "NaN or infinity is treated as a number"
    cause = (
        "Kernels that compare, clamp or select by machine instructions drop a NaN or turn it into "
        "a limit, and a product with a mask turns infinity into NaN; IEEE 754 lets both happen."
    )
    source = (
        "IEEE 754-2019, sec. 6.2 and 9.6; Intel SDM vol. 2, MAXPS and MINPS (the second operand "
        "is returned for a NaN); ONNX operators Relu, Clip, Max, ThresholdedRelu"
    )

    def remedy(self, backend: str) -> str:
        """How to keep a NaN visible, or away."""
        switches = {
            "ov": "guard the inputs of the listed layers (IsNaN, IsInf, Where): OpenVINO's CPU "
            "kernels clamp",
            "tvm": "guard the inputs of the listed layers (IsNaN, IsInf, Where): TVM lowers them "
            "to compare-and-select",
            "trt": "build with BuilderFlag.STRICT_NANS, and guard the listed layers' inputs",
        }
        return switches.get(backend, "guard the inputs of the listed layers (IsNaN, IsInf, Where)")

    def stated_by(self, kernels: tuple[Kernel, ...]) -> bool:
        """No engine says what its kernels do with a NaN."""
        return False

    def variants(self, segment: SegmentGraph) -> Iterable[Variant]:
        """The segment with NaN or infinity replaced where kernels are known to do so."""
        model = segment.model
        losing = {i: _LOSES[n.op_type] for i, n in surgery.find(model, _LOSES)}
        if losing:
            yield Variant("NaN loses every comparison", _replaced(model, losing))
            winning = {i: _OPPOSITE[value] for i, value in losing.items()}
            yield Variant("NaN wins every comparison", _replaced(model, winning))
        if zeroed := {i: "0" for i, _ in surgery.find(model, _ZEROED)}:
            yield Variant("NaN is read as zero", _replaced(model, zeroed))
        if propagating := dict(_propagating(model)):
            yield Variant("NaN is passed on", surgery.substituted(model, propagating))
        if masked := dict(_masked(model)):
            yield Variant(
                "a choice is computed as a product with a mask", surgery.substituted(model, masked)
            )
        if surgery.opset(model) >= _CUMSUM and (later := dict(_later(model))):
            yield Variant("the value after a NaN is taken", surgery.substituted(model, later))
        extreme = [i for i, _ in surgery.find(model, _EXTREME)]
        if extreme and surgery.opset(model) >= _ISINF:
            reads = [(i, p) for i in extreme for p in _operands(model, i)]
            yield Variant(
                "infinite operands become the largest finite number",
                surgery.read_through(model, _FINITE, reads),
            )
            yield Variant(
                "infinite results become the largest finite number",
                surgery.written_through(model, _FINITE, extreme),
            )


NOISE = NonFinite()
