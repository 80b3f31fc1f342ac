"""Faults in single operators: none that no cause makes may be named, and ignored attributes must.

    python -m benchmarks.operators [--seed N] [--most N]

The package ``onnx`` carries small models of one operator each, with inputs. The reference's result
of each is changed as no runtime's convention changes it (scaled, shifted, noisy, one element off,
signs turned, rolled, reversed, transposed), and the whole catalogue is asked for the cause: none
may be named. Then single attributes are left out: what changes by that must be named.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx.backend.test.case.node import collect_testcases

from auditor import discovery
from auditor.attribution.explainer import Explainer
from auditor.decomposition.divergence import Local
from auditor.ports import Array, Arrays, SegmentGraph
from auditor.replays import sessions


def defects(values: Array, rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    """A tensor with faults that are nobody's convention, each with its name."""
    if values.dtype.kind == "f":
        kind = values.dtype.type
        largest = np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(
            initial=0
        )
        yield "scaled", values * kind(1.01)
        yield "shifted", values + kind(0.01) * max(largest, kind(1))
        one = values.copy()
        if one.size:
            one.reshape(-1)[rng.integers(one.size)] += 1
        yield "one element", one
        yield "noisy", (values * (1 + rng.normal(0, 1e-3, values.shape))).astype(kind)
        yield "signs", np.where(rng.random(values.shape) < 0.5, values, -values).astype(kind)
    else:
        yield "plus one", (values + 1).astype(values.dtype)
    if values.ndim:
        yield "rolled", np.roll(values, 1, -1)
    if values.ndim > 1:
        yield "reversed", values[::-1].copy()
    if values.ndim > 1 and values.shape[-1] == values.shape[-2]:
        yield "transposed", np.swapaxes(values, -1, -2).copy()


def without_one(node: onnx.NodeProto, opset: int) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The node without each of the attributes that need not be given."""
    known = onnx.defs.get_schema(node.op_type, opset).attributes
    for attribute in node.attribute:
        if attribute.name in known and not known[attribute.name].required:
            less = onnx.NodeProto()
            less.CopyFrom(node)
            del less.attribute[:]
            less.attribute.extend(a for a in node.attribute if a.name != attribute.name)
            yield attribute.name, less


def run(model: onnx.ModelProto, feeds: Arrays) -> Arrays:
    """Outputs by name, of whatever shape.

    Raises:
        ValueError: an output is no tensor of numbers.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    for output in opened.graph.output:
        output.type.tensor_type.ClearField("shape")
    names = [output.name for output in model.graph.output]
    values = sessions.session(opened, 1).run(names, feeds)
    if not all(isinstance(v, np.ndarray) and v.dtype.kind in "fiu" for v in values):
        raise ValueError(f"{names} are not all tensors of numbers")
    return dict(zip(names, values, strict=True))


def cases(rng: random.Random, most: int) -> Iterator[tuple[Any, Arrays, Arrays]]:
    """Tests of one operator that the reference runs: at most so many of each operator.

    Yields:
        The test, its inputs and the reference's outputs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = collect_testcases(None)
    rng.shuffle(tests)
    seen: Counter[str] = Counter()
    for test in tests:
        node, *others = test.model.graph.node
        if others or node.domain or not test.data_sets or seen[node.op_type] >= most:
            continue
        names = [value.name for value in test.model.graph.input]
        feeds = dict(zip(names, test.data_sets[0][0], strict=False))
        try:
            expected = run(test.model, feeds)
        except Exception:  # the reference has no kernel for it; its errors share no base
            continue
        seen[node.op_type] += 1
        yield test, feeds, expected


def main() -> None:
    """Ask for the cause of every planted fault, and print what was named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=1, help="tests of each operator")
    asked = parser.parse_args()
    noises = tuple(discovery.noises())
    planted: Counter[str] = Counter()
    named: Counter[str] = Counter()

    def ask(test: Any, what: str, feeds: Arrays, expected: Arrays, seen: Arrays) -> None:
        if all(
            np.array_equal(seen[n], v, equal_nan=v.dtype.kind == "f") for n, v in expected.items()
        ):
            return
        kind = what.partition(":")[0]
        planted[kind] += 1
        local = Local(feeds, seen, expected)
        found = Explainer(noises).explain(SegmentGraph(test.model, ()), local, thorough=True)
        named[kind] += found.noise is not None
        if (found.noise is None) is (kind == "attribute"):
            print(f"{test.name}, {what}: {found.noise} ({found.variant})", flush=True)

    for test, feeds, expected in cases(random.Random(asked.seed), asked.most):
        first, value = next(iter(expected.items()))
        for what, changed in defects(value, np.random.default_rng(asked.seed)):
            ask(test, f"defect: {what}", feeds, expected, {**expected, first: changed})
        (node,) = test.model.graph.node
        for name, less in without_one(node, test.model.opset_import[0].version):
            model = onnx.ModelProto()
            model.CopyFrom(test.model)
            model.graph.node[0].CopyFrom(less)
            try:
                seen = run(model, feeds)
            except Exception:  # the attribute is needed for these inputs
                continue
            ask(test, f"attribute: {name}", feeds, expected, seen)
    for kind, count in planted.items():
        print(f"{kind}: {named[kind]} of {count} named")


if __name__ == "__main__":
    main()
