"""A function replaced by a cheaper one: GELU by tanh, sigmoid by straight lines, a fast exp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import onnx

from auditor.graphs import surgery
from auditor.graphs.surgery import number
from auditor.noises._cause import Cause
from auditor.noises._rewritten import rewritten
from auditor.ports import Array, SegmentGraph, Variant

# GELU's Φ(x) = (1 + erf(x/√2)) / 2 is approximated as (1 + tanh(√(2/π)(x + 0.044715 x³))) / 2 or
# as σ(1.702 x); both follow from what takes the place of erf.
_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715
_BY_ERF = "GELU by erf instead of tanh"
_SOFTMAX = 13  # along a single axis from here on


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with functions replaced by what is known to stand in for them."""
    model = segment.model
    version = surgery.opset(model)
    for name, op_types, body in _FORMS:
        found = surgery.find(model, op_types)
        yield from rewritten(model, name, found, partial(body, version=version))
    if (exact := _exact_gelu(model)) is not None:
        yield Variant(_BY_ERF, exact)


def _gelu(node: onnx.NodeProto, version: int) -> str:
    """GELU, or the erf inside a written-out one, with the tanh form; Gelu's tanh with erf."""
    if node.op_type == "Erf":  # of x/√2
        return f"""(z) => (y) {{
            {number("a", _ROOT * math.sqrt(2))} {number("b", _ROOT * _CUBIC * 2 * math.sqrt(2))}
            s = Mul(z, z) q = Mul(s, b) r = Add(q, a) u = Mul(z, r) y = Tanh(u) }}"""
    other = "none" if surgery.attributes(node).get("approximate", "none") == "tanh" else "tanh"
    return f'(x) => (y) {{ y = Gelu <approximate = "{other}"> (x) }}'


def _quick_gelu(node: onnx.NodeProto, version: int) -> str:
    """GELU as x·σ(1.702 x)."""
    if node.op_type == "Erf":
        return f"""(z) => (y) {{
            {number("a", 1.702 * math.sqrt(2))} {number("one", 1)} {number("two", 2)}
            u = Mul(z, a) s = Sigmoid(u) t = Mul(s, two) y = Sub(t, one) }}"""
    return f"(x) => (y) {{ {number('a', 1.702)} u = Mul(x, a) s = Sigmoid(u) y = Mul(x, s) }}"


def _lines(node: onnx.NodeProto, version: int) -> str:
    """Straight lines: σ(x) ≈ clip(x/6 + ½), tanh(x) ≈ clip(x, −1, 1)."""
    if node.op_type == "Sigmoid":
        return f"(x) => (y) {{ y = HardSigmoid <alpha = {1 / 6}, beta = 0.5> (x) }}"
    return f"""(x) => (y) {{ {number("one", 1)}
        h = HardSigmoid <alpha = 0.5, beta = 0.5> (x) d = Add(h, h) y = Sub(d, one) }}"""


def _other_slope(node: onnx.NodeProto, version: int) -> str | None:
    """The other slope of the hard sigmoid: 1/5 (ONNX, Keras) and 1/6 (PyTorch, MobileNetV3)."""
    if node.op_type == "HardSwish":
        return "(x) => (y) { h = HardSigmoid <alpha = 0.2, beta = 0.5> (x) y = Mul(x, h) }"
    if node.op_type == "Sigmoid":
        return "(x) => (y) { y = HardSigmoid <alpha = 0.2, beta = 0.5> (x) }"
    if not math.isclose(surgery.attributes(node).get("alpha", 0.2), 0.2, rel_tol=1e-6):
        return None  # the default in its place is an attribute ignored
    return f"(x) => (y) {{ y = HardSigmoid {surgery.options(node, alpha=1 / 6)} (x) }}"


def _smooth(node: onnx.NodeProto, version: int) -> str:
    """The function that straight lines stand for."""
    if node.op_type == "HardSwish":
        return "(x) => (y) { s = Sigmoid(x) y = Mul(x, s) }"
    return "(x) => (y) { y = Sigmoid(x) }"


def _fraction(node: onnx.NodeProto, version: int) -> str:
    """tanh(u) ≈ u(27 + u²)/(27 + 9u²), its continued fraction, up to where that is 1."""
    tanh = f"""{number("n", 27)} {number("nine", 9)} {number("three", 3)} {number("less", -3)}
        v = Max(u, less) w = Min(v, three) s = Mul(w, w) top = Add(s, n) m = Mul(s, nine)
        low = Add(m, n) f = Div(top, low) t = Mul(w, f)"""
    if node.op_type == "Tanh":
        return f"(u) => (t) {{ {tanh} }}"
    return f"""(x) => (y) {{ {number("half", 0.5)} u = Mul(x, half) {tanh}
        h = Mul(t, half) y = Add(h, half) }}"""


def _fast_exp(node: onnx.NodeProto, version: int) -> str | None:
    """2ᵗ as 2^⌊t⌋(1 + t − ⌊t⌋), which is what writing t into a float's exponent bits gives."""
    axis = surgery.attributes(node).get("axis", -1)
    # Exponents end at −126: what a mask makes minus infinity would otherwise become NaN.
    power = f"""{number("e", math.log2(math.e))} {number("one", 1)} {number("two", 2)}
        {number("least", -126)} raw = Mul(d, e) t = Max(raw, least) whole = Floor(t)
        part = Sub(t, whole) line = Add(part, one) scale = Pow(two, whole) p = Mul(line, scale)"""
    if node.op_type == "Exp":
        return f"(d) => (p) {{ {power} }}"
    if node.op_type == "Sigmoid":
        return f"(x) => (y) {{ d = Neg(x) {power} q = Add(p, one) y = Div(one, q) }}"
    if version < _SOFTMAX:
        return None  # along several axes
    return f"""(x) => (y) {{
        {surgery.reduction("top", "ReduceMax", "x", [axis], version)} d = Sub(x, top) {power}
        {surgery.reduction("sum", "ReduceSum", "p", [axis], version)} y = Div(p, sum) }}"""


def _defined(node: onnx.NodeProto, version: int) -> str:
    """1 / (1 + e⁻ˣ), which is 0 where e⁻ˣ overflows; ONNX Runtime's fraction never is."""
    return f"""(x) => (y) {{ {number("one", 1)}
        d = Neg(x) p = Exp(d) q = Add(p, one) y = Div(one, q) }}"""


def _cancelling(node: onnx.NodeProto, version: int) -> str:
    """(1 − e⁻²ˣ) / (1 + e⁻²ˣ) for positive x: near 0 little is left of the difference.

    Small steps of the exponential are all that it is there, so it must be right to the last bit.
    """
    return f"""(x) => (y) {{ {number("one", 1)} {number("minus", -2)}
        a = Abs(x) m = Mul(a, minus) wide = Cast <to = {onnx.TensorProto.DOUBLE}> (m)
        e = Exp(wide) p = Cast <to = $T> (e) top = Sub(one, p) low = Add(one, p)
        t = Div(top, low) s = Sign(x) y = Mul(t, s) }}"""


def _unshifted(node: onnx.NodeProto, version: int) -> str | None:
    """e^x / Σ e^x, which overflows in float32 from x = 88.7 on; the largest x is not taken off."""
    axis = surgery.attributes(node).get("axis", -1)
    if version < _SOFTMAX:
        return None  # along several axes
    return f"""(x) => (y) {{ e = Exp(x)
        {surgery.reduction("sum", "ReduceSum", "e", [axis], version)} y = Div(e, sum) }}"""


def _exact_gelu(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The segment with tanh(√(2/π)(x + 0.044715 x³)) turned into erf(x/√2), where written out."""
    found = dict(surgery.find(model, ("Tanh",)))
    constants = surgery.constants(model) if found else {}
    producers = {o: n for n in model.graph.node for o in n.output}
    result, bodies = surgery.copied(model), dict[int, str]()
    for index, node in found.items():
        source = _gelu_argument(node.input[0], producers, constants)
        if source is not None:
            result.graph.node[index].input[0] = source
            bodies[index] = _ERF
    return surgery.substituted(result, bodies) if bodies else None


def _gelu_argument(
    name: str, producers: dict[str, onnx.NodeProto], constants: dict[str, Array]
) -> str | None:
    """x, where ``name`` is √(2/π)(x + 0.044715 x³)."""
    sum_ = _other_factor(name, _ROOT, producers, constants)
    node = producers.get(sum_ or "")
    if node is None or node.op_type != "Add":
        return None
    for x, rest in (tuple(node.input), tuple(reversed(node.input))):
        if _other_factor(rest, _CUBIC, producers, constants) is not None:
            return str(x)
    return None


def _other_factor(
    name: str, value: float, producers: dict[str, onnx.NodeProto], constants: dict[str, Array]
) -> str | None:
    """The other factor of a product with a constant."""
    node = producers.get(name)
    if node is None or node.op_type != "Mul":
        return None
    for position, factor in enumerate(node.input):
        number = constants.get(factor)
        if number is not None and number.size == 1 and np.isclose(float(number), value, 1e-3):
            return str(node.input[1 - position])
    return None


_ERF = f"(x) => (y) {{ {number('r', math.sqrt(0.5))} z = Mul(x, r) y = Erf(z) }}"
_FORMS: tuple[tuple[str, tuple[str, ...], Callable[..., str | None]], ...] = (
    ("GELU by tanh instead of erf, or the reverse", ("Gelu", "Erf"), _gelu),
    ("GELU by a sigmoid", ("Gelu", "Erf"), _quick_gelu),
    ("sigmoid by its definition, which ends at 0", ("Sigmoid",), _defined),
    ("sigmoid and tanh as straight lines", ("Sigmoid", "Tanh"), _lines),
    ("hard sigmoid with the other slope", ("HardSigmoid", "HardSwish", "Sigmoid"), _other_slope),
    ("a smooth sigmoid instead of a hard one", ("HardSigmoid", "HardSwish"), _smooth),
    ("tanh as a fraction", ("Sigmoid", "Tanh"), _fraction),
    ("tanh by exponentials, which cancel near 0", ("Tanh",), _cancelling),
    ("exponential by the bits of its exponent", ("Exp", "Sigmoid", "Softmax"), _fast_exp),
    ("softmax of values that are not shifted by the largest", ("Softmax",), _unshifted),
)

_TANH = (
    "tanh of values near 0 is always of exponentials: scale them up before it, or apply it outside"
)

NOISE = Cause(
    id="implementation.approximation",
    type="operator implementation",
    title="A function is replaced by a cheaper approximation of it",
    cause=(
        "Exponentials and error functions are expensive, so kernels and converters put the tanh "
        "form of GELU, piecewise linear sigmoids or a fast exponential in their place."
    ),
    applies=(
        "Gelu and GELU written out with Erf or Tanh, Sigmoid, Tanh, HardSigmoid, HardSwish, "
        "Exp, and Softmax from operator set 13 on"
    ),
    source=(
        "SysNoise (Wang et al., MLSys 2023), sec. 3.3 (precision of the exponential); Hendrycks "
        "and Gimpel, GELU (2016); Howard et al., MobileNetV3 (2019), sec. 5.2; Schraudolph, "
        "Neural Computation 11(4) (1999); ONNX operators Gelu, HardSwish"
    ),
    advice="switch fast-math off, or export the model with the function that is run",
    remedies={
        "ov": (
            "train or export with the form that OpenVINO runs (Gelu with approximate set), or "
            "keep the subgraph from being matched as GELU"
        ),
        "tvm": f"leave the FastMathTransform pass and the fast-math target option out; {_TANH}",
        "ort": "disable GeluApproximation: session option optimization.enable_gelu_approximation=0",
    },
    ablations={
        "ort": {"optimization.enable_gelu_approximation": "0"},
        "tvm": {"fast-math": "false"},
    },
    otherwise={
        "ort": "export the model with the function that is run",
        "tvm": f"leave the FastMathTransform pass out; {_TANH}",
    },
    forms=(*(name for name, _, _ in _FORMS), _BY_ERF),
    variants=_variants,
)
