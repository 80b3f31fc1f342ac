"""Derived names of tensors are believed only where the values bear them out."""

import numpy as np
import onnx
import pytest

from auditor.capture.alignment import merged
from auditor.capture.naming import unconfirmed
from auditor.graphs.segments import Graph
from auditor.replays.replay import Replayer

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
net (float[3,4] x, float[4] w, float[4] b) => (float[3,4] y) {
    h = Mul(x, w)
    s = Add(h, b)
    t = Transpose<perm = [0, 1]>(s)
    y = Relu(t)
}"""


def test_a_transposed_tensor_is_not_one_with_other_axes() -> None:
    whole = np.zeros((2, 8, 16))
    assert merged(np.zeros((16, 16)), whole) and merged(np.zeros((2, 2, 4, 16)), whole)
    assert not merged(np.zeros((2, 16, 8)), whole) and not merged(np.zeros((8, 2, 16)), whole)
    assert not merged(np.zeros((32, 8)), whole)


@pytest.mark.parametrize("fault", ["none", "scaled", "named before the bias", "other values"])
def test_an_error_that_nothing_behind_reads_is_a_wrong_name(fault: str) -> None:
    graph = Graph(onnx.parser.parse_model(MODEL))
    replayer = Replayer(graph, 1)
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.uniform(0.5, 1, (3, 4)[i > 0 :]).astype(np.float32)
        for i, name in enumerate("xwb")
    }
    feeds["b"] *= np.float32(0.1)
    cuts = graph.cut(["h", "s", "y"])
    base = replayer.walk(cuts, feeds)
    captured = dict(base)
    if fault == "scaled":  # all behind it is computed from the wrong values
        captured = replayer.walk(cuts, feeds | {"w": feeds["w"] * np.float32(1.2)})
    elif fault == "named before the bias":  # near enough for a cosine
        captured["h"] = base["s"]
    elif fault == "other values":
        captured["h"] = rng.standard_normal((3, 4)).astype(np.float32)
    wrong = {"named before the bias", "other values"}
    found = unconfirmed(replayer, cuts, {"h", "s"}, captured, base)
    assert found == ({"h"} if fault in wrong else set())
    assert unconfirmed(replayer, cuts, {"s"}, captured, base) == set()
    # A fault before a wrong name makes it no fault, and is no wrong name itself.
    captured = replayer.walk(cuts, feeds | {"w": feeds["w"] * np.float32(1.2)})
    captured["s"] = captured["s"] + np.float32(0.3)
    assert unconfirmed(replayer, cuts, (), captured, base, {"h", "s"}) == {"s"}
    # Names in a row that mean something else are found together, and a real error among them not.
    captured = base | {"h": base["s"] - np.float32(3), "s": base["h"] * np.float32(2)}
    assert unconfirmed(replayer, cuts, (), captured, base, {"h", "s"}) == {"h", "s"}
    captured = replayer.walk(cuts, feeds | {"w": -feeds["w"]})
    assert unconfirmed(replayer, cuts, (), captured, base, {"h", "s"}) == set()


def test_what_only_the_compiled_constants_make_is_confirmed_by_them() -> None:
    """Weights so far off that nothing of the reference's result is left."""
    model = onnx.parser.parse_model(MODEL.replace(", float[4] w", "", 1))
    w, other = np.float32([[1, -1, 1, -1], [1, 1, -1, -1]])
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    feeds = {"x": np.ones((3, 4), np.float32), "b": np.zeros(4, np.float32)}
    cuts = graph.cut(["h", "y"])
    base = replayer.walk(cuts, feeds)
    captured = base | {"h": other * feeds["x"], "y": np.maximum(other * feeds["x"], 0)}
    assert unconfirmed(replayer, cuts, {"h"}, captured, base) == {"h"}
    assert not unconfirmed(replayer, cuts, {"h"}, captured, base, constants={"w": other})
