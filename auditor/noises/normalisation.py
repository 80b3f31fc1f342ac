"""Normalisation with another epsilon, another variance, or a variance computed another way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import onnx

from auditor.graphs import surgery
from auditor.graphs.surgery import number
from auditor.noises._cause import Cause
from auditor.ports import Arrays, SegmentGraph, Variant

_LAYERS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")
_PLAIN = "MeanVarianceNormalization"  # no scale, no bias, and an epsilon of its own
_ALL = (*_LAYERS, _PLAIN, "RMSNormalization", "BatchNormalization")
_PER_CHANNEL = 21  # GroupNormalization scales channels from here on, groups before
_NEGATIVE = 11  # CumSum, and Gather with negative indices, from here on
_RUNNING = "one pass, one value after another"
# Epsilons in use: PyTorch and ONNX, vision transformers, BERT, TensorFlow's batch normalisation,
# DeBERTa, style transfer; and the powers of ten beside them.
_EPSILONS = (1e-5, 1e-6, 1e-12, 1e-3, 1e-7, 1e-8, 1e-4, 1e-2)
# Of a vector's length: OpenVINO adds the last bit of 1 to the sum that it divides by, or its root.
_LENGTHS = (2.0**-23, *_EPSILONS)
# A constant added in front of a square root counts as an epsilon up to here.
_LARGEST = 1e-2
_ROOTS = ("Sqrt", "Pow")
_FEW = 4  # so many normalisations of a segment are tried one by one


def _variants(segment: SegmentGraph) -> Iterable[Variant]:
    """The segment with all its normalisations computed the other ways."""
    yield from _ways(segment.model, *_normalisations(segment.model))
    lengths = dict(surgery.find(segment.model, ("LpNormalization",)))
    for epsilon in _LENGTHS if lengths else ():
        version = surgery.opset(segment.model)
        bodies = {i: _by_length(n, version, epsilon) for i, n in lengths.items()}
        yield Variant(
            f"epsilon {epsilon:g} in the length", surgery.substituted(segment.model, bodies)
        )


def _each(segment: SegmentGraph, _inputs: Arrays, _observed: Arrays) -> Iterable[Variant]:
    """The segment with one of a few normalisations computed the other ways: faults are in one."""
    model = segment.model
    found, written = _normalisations(model)
    if not 1 < len(found) + len(written) <= _FEW:
        return
    nodes = model.graph.node
    alone = [(nodes[i], _ways(model, {i: n}, {})) for i, n in found.items()]
    alone += [(nodes[at[0]], _ways(model, {}, {at: value})) for at, value in written.items()]
    for node, ways in alone:
        for way in ways:
            yield Variant(f"{way.name}, at {node.output[0]} alone", way.model)


def _normalisations(
    model: onnx.ModelProto,
) -> tuple[dict[int, onnx.NodeProto], dict[tuple[int, int], float]]:
    """Those that are one node, by index, and the epsilons of those written out, by their place."""
    found = {i: n for i, n in surgery.find(model, _ALL) if len(n.output) == 1}
    return found, dict(_written_out(model))


def _ways(
    model: onnx.ModelProto,
    found: Mapping[int, onnx.NodeProto],
    written: Mapping[tuple[int, int], float],
) -> Iterator[Variant]:
    """A segment with these normalisations, and those written out, computed the other ways."""
    version = surgery.opset(model)
    layers = {i: n for i, n in found.items() if n.op_type in _LAYERS}
    plain = {i: n for i, n in found.items() if n.op_type == _PLAIN}
    batches = {i: n for i, n in found.items() if n.op_type == "BatchNormalization"}
    ranks = {n: len(shape) for n, shape in surgery.shapes(model).items()} if plain else {}
    plain = {i: n for i, n in plain.items() if n.input[0] in ranks}
    if layers or plain:
        for name, how in _VARIANCES.items():
            if how == _RUNNING and version < _NEGATIVE:
                continue
            bodies = {i: _layer(n, version, variance=how) for i, n in layers.items()}
            bodies |= {i: _plain(n, version, ranks[n.input[0]], how) for i, n in plain.items()}
            yield Variant(name, surgery.substituted(model, bodies))
    unbiased = {i: _layer(n, version, unbiased=True) for i, n in layers.items()}
    unbiased |= _unbiased(model, written)
    if unbiased:
        yield Variant(_BY_LESS, surgery.substituted(model, unbiased))
    if behind := _scaled_variances(model, written):
        yield Variant(_BEHIND, surgery.passing(model, behind))
    for epsilon in _EPSILONS:
        if (changed := _with_epsilon(model, found, written, epsilon)) is not None:
            yield Variant(f"epsilon {epsilon:g}", changed)
    outside = {i: _layer(n, version, outside=True) for i, n in layers.items()}
    if outside or batches:
        changed = surgery.substituted(model, outside)
        for i in batches:
            surgery.set_attributes(changed.graph.node[i], epsilon=0.0)
        reads = {(i, 4): _batch_outside(n) for i, n in batches.items()}
        yield Variant(
            "epsilon added to the deviation, not to the variance", surgery.passing(changed, reads)
        )
    if batches:
        bodies = {i: _batch_statistics(n, version) for i, n in batches.items()}
        yield Variant(
            "mean and variance of the batch instead of the stored ones",
            surgery.substituted(model, bodies),
        )


def _epsilon(node: onnx.NodeProto) -> float:
    return float(surgery.attributes(node).get("epsilon", 1e-5))


def _layer(
    node: onnx.NodeProto,
    version: int,
    *,
    variance: str = "two passes",
    unbiased: bool = False,
    outside: bool = False,
) -> str:
    """A layer, instance or group normalisation in float32, written out."""
    given = surgery.attributes(node)
    pairs = "lead = Constant <value = int64[3] {0, 0, -1}> () planes = Reshape(wide, lead)"
    column = "column = Constant <value = int64[2] {-1, 1}> ()"
    if node.op_type == "LayerNormalization":
        rows = f"rows = Flatten <axis = {given.get('axis', -1)}> (wide) inner = Identity(shape)"
        affine = "s = Identity(scale) b = Identity(bias)"
    elif node.op_type == "InstanceNormalization":
        rows = f"{pairs} rows = Flatten <axis = 2> (planes) inner = Shape(planes)"
        affine = f"{column} s = Reshape(scale, column) b = Reshape(bias, column)"
    else:
        inner = "planes" if version >= _PER_CHANNEL else "grouped"
        rows = f"""{pairs}
            split = Constant <value = int64[3] {{0, {given["num_groups"]}, -1}}> ()
            grouped = Reshape(wide, split) rows = Flatten <axis = 2> (grouped)
            inner = Shape({inner})"""
        affine = f"{column} s = Reshape(scale, column) b = Reshape(bias, column)"
    bias = len(node.input) > 2 and node.input[2]
    shift = "moved = Add(scaled, b)" if bias else "moved = Identity(scaled)"
    if not bias:
        affine = "s = Identity(scale)"
    root = (
        "deviation = Sqrt(variance) root = Add(deviation, e)"
        if outside
        else "safe = Add(variance, e) root = Sqrt(safe)"
    )
    return f"""({", ".join(["x", "scale", "bias"][: len(node.input)])}) => (y) {{
        wide = Cast <to = 1> (x) shape = Shape(x) {rows}
        e = Constant <value = float {{{_epsilon(node)!r}}}> ()
        {_mean("mean", "rows", variance, version)}
        d = Sub(rows, mean)
        {_variance(variance, version)} {_BESSEL if unbiased else "variance = Identity(biased)"}
        {root} q = Div(d, root) n = Reshape(q, inner)
        typed = Cast <to = $T> (n) {affine} scaled = Mul(typed, s) {shift}
        y = Reshape(moved, shape) }}"""


def _plain(node: onnx.NodeProto, version: int, rank: int, how: str) -> str:
    """MeanVarianceNormalization in float32, written out as ONNX defines it."""
    axes = {int(a) % rank for a in surgery.attributes(node).get("axes", (0, 2, 3))}
    order = sorted(range(rank), key=lambda axis: (axis in axes, axis))
    back = [order.index(axis) for axis in range(rank)]
    return f"""(x) => (y) {{
        wide = Cast <to = 1> (x) turned = Transpose <perm = {order}> (wide)
        rows = Flatten <axis = {rank - len(axes)}> (turned) inner = Shape(turned)
        {_mean("mean", "rows", how, version)} d = Sub(rows, mean) {_variance(how, version)}
        root = Sqrt(biased) e = Constant <value = float {{1e-9}}> () safe = Add(root, e)
        q = Div(d, safe) n = Reshape(q, inner) wider = Transpose <perm = {back}> (n)
        y = Cast <to = $T> (wider) }}"""


def _mean(target: str, of: str, how: str, version: int) -> str:
    """Means of rows."""
    if how != _RUNNING:
        return surgery.reduction(target, "ReduceMean", of, [1], version)
    return f"""{target}_at = Constant <value = int64 {{1}}> ()
        {target}_end = Constant <value = int64[1] {{-1}}> ()
        {target}_sums = CumSum({of}, {target}_at)
        {target}_sum = Gather <axis = 1> ({target}_sums, {target}_end) {target}_shape = Shape({of})
        {target}_count = Gather({target}_shape, {target}_at)
        {target}_n = Cast <to = 1> ({target}_count) {target} = Div({target}_sum, {target}_n)"""


def _variance(how: str, version: int) -> str:
    if how == "two passes":
        return f"squares = Mul(d, d) {_mean('biased', 'squares', how, version)}"
    return f"""squares = Mul(rows, rows) {_mean("second", "squares", how, version)}
        first = Mul(mean, mean) biased = Sub(second, first)"""


def _batch_outside(node: onnx.NodeProto) -> str:
    """The variance to which no epsilon is added any more; a constant, as engines fold it."""
    return f"""(var) => (v) {{
        {number("k", _epsilon(node))} r = Sqrt(var) q = Add(r, k) v = Mul(q, q) }}"""


def _by_length(node: onnx.NodeProto, version: int, epsilon: float) -> str:
    """LpNormalization with an epsilon, of which ONNX has none."""
    given = surgery.attributes(node)
    squares = given.get("p", 2) == 2
    total = surgery.reduction("s", "ReduceSum", "part", [given.get("axis", -1)], version)
    return f"""(x) => (y) {{
        part = {"Mul(x, x)" if squares else "Abs(x)"} {total}
        c = Constant <value = float {{{epsilon!r}}}> () e = Cast <to = $T> (c) more = Add(s, e)
        length = {"Sqrt" if squares else "Identity"}(more) y = Div(x, length) }}"""


def _batch_statistics(node: onnx.NodeProto, version: int) -> str:
    flat = surgery.reduction("m", "ReduceMean", "planes", [0, 2], version, keepdims=0)
    return f"""(x, s, b, mean, var) => (y) {{
        lead = Constant <value = int64[3] {{0, 0, -1}}> () planes = Reshape(x, lead) {flat}
        {surgery.reduction("kept", "ReduceMean", "planes", [0, 2], version)}
        d = Sub(planes, kept) squares = Mul(d, d)
        {surgery.reduction("v", "ReduceMean", "squares", [0, 2], version, keepdims=0)}
        y = BatchNormalization {surgery.options(node)} (x, s, b, m, v) }}"""


def _written_out(model: onnx.ModelProto) -> Iterator[tuple[tuple[int, int], float]]:
    """Epsilons of normalisations written out in smaller operators, by node and input position."""
    sums = dict(surgery.find(model, ("Add",)))
    rooted = {n.input[0] for _, n in surgery.find(model, _ROOTS)}
    if not sums or not rooted:
        return
    constants = surgery.constants(model)
    for index, node in sums.items():
        for position, name in enumerate(node.input):
            value = constants.get(name)
            if node.output[0] not in rooted or value is None or value.size != 1:
                continue
            if 0 < float(value.reshape(())) <= _LARGEST:
                yield (index, position), float(value.reshape(()))


def _unbiased(model: onnx.ModelProto, written: Mapping[tuple[int, int], float]) -> dict[int, str]:
    """Means of squares that become variances, divided by n − 1."""
    variances = {model.graph.node[i].input[1 - position] for i, position in written}
    bodies = {}
    for index, node in surgery.find(model, ("ReduceMean",)):
        if node.output[0] in variances:
            axes = ", axes" if len(node.input) > 1 else ""
            bodies[index] = f"""(x{axes}) => (y) {{
                m = ReduceMean {surgery.options(node)} (x{axes})
                all = Size(x) means = Size(m) count = Div(all, means) n = Cast <to = $T> (count)
                {number("one", 1)} rest = Sub(n, one) ratio = Div(n, rest) y = Mul(m, ratio) }}"""
    return bodies


def _scaled_variances(
    model: onnx.ModelProto, written: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], str]:
    """Means of squares multiplied by n / (n − 1) as they are read: they may be rounded before."""
    means = {node.output[0]: node.input[0] for _, node in surgery.find(model, ("ReduceMean",))}
    shapes = surgery.shapes(model) if means else {}
    reads = {}
    for index, position in written:
        mean = model.graph.node[index].input[1 - position]
        if not {mean, means.get(mean)} <= shapes.keys():
            continue
        n = math.prod(shapes[means[mean]]) // max(1, math.prod(shapes[mean]))
        if n > 1:
            ratio = number("ratio", n / (n - 1))
            reads[index, 1 - position] = f"(m) => (y) {{ {ratio} y = Mul(m, ratio) }}"
    return reads


def _with_epsilon(
    model: onnx.ModelProto,
    found: Mapping[int, onnx.NodeProto],
    written: Mapping[tuple[int, int], float],
    epsilon: float,
) -> onnx.ModelProto | None:
    """The segment with one epsilon everywhere; None where that is its own already."""
    replaced = f"(x) => (y) {{ {number('y', epsilon)} }}"
    reads = {
        at: replaced
        for at, value in written.items()
        if not math.isclose(value, epsilon, rel_tol=1e-3)
    }
    others = [
        i
        for i, n in found.items()
        if n.op_type != _PLAIN and not math.isclose(_epsilon(n), epsilon, rel_tol=1e-3)
    ]
    if not reads and not others:
        return None
    changed = surgery.copied(model)
    for index in others:
        surgery.set_attributes(changed.graph.node[index], epsilon=epsilon)
    return surgery.passing(changed, reads) if reads else changed


_VARIANCES = {
    "variance in two passes": "two passes",
    "variance as E[x²] − E[x]²": "one pass",
    # Where the digits that cancel are most of them, the order of the sums is most of the error.
    "variance as E[x²] − E[x]², added up one value after another": _RUNNING,
}
_BY_LESS = "variance divided by n − 1"
_BEHIND = f"{_BY_LESS}, by the kernel that reads it"
_BESSEL = """whole = Shape(rows) at = Constant <value = int64 {1}> () count = Gather(whole, at)
        size = Cast <to = 1> (count) one = Constant <value = float {1}> () rest = Sub(size, one)
        ratio = Div(size, rest) variance = Mul(biased, ratio)"""

NOISE = Cause(
    id="implementation.normalisation",
    type="operator implementation",
    title="Normalisation with another epsilon or another variance",
    cause=(
        "Frameworks disagree on epsilon and where it goes, on dividing by n or n − 1, and on "
        "E[x²] − E[x]², which loses its digits where the mean is large, against two passes."
    ),
    applies=(
        "LayerNormalization, InstanceNormalization, GroupNormalization, MeanVarianceNormalization, "
        "RMSNormalization, LpNormalization and BatchNormalization, and those written out around a "
        "square root"
    ),
    source=(
        "ONNX operators LayerNormalization, InstanceNormalization, BatchNormalization (epsilon); "
        "Chan, Golub, LeVeque, Algorithms for computing the sample variance (1983); SysNoise "
        "(Wang et al., MLSys 2023), sec. 3.2, operator implementation"
    ),
    advice=(
        "export the normalisation with its own operator and the epsilon it was trained with; "
        "where the mean is large against the deviation, subtract a constant before it"
    ),
    convention=True,
    cancelling=tuple(_VARIANCES),
    forms=(
        *_VARIANCES,
        _BY_LESS,
        _BEHIND,
        *(f"epsilon {e:g}" for e in _EPSILONS),
        *(f"epsilon {e:g} in the length" for e in _LENGTHS),
        "epsilon added to the deviation, not to the variance",
        "mean and variance of the batch instead of the stored ones",
        "one of these, at NODE alone",
    ),
    variants=_variants,
    fitted=_each,
)
