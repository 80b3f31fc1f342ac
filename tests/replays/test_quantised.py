"""Values in the middle between two steps of 8 bits."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.replays.quantised import either_side
from auditor.replays.sessions import session
from tests.helpers import nodes_of

TERMS = 2304


def quantised(scale):
    """Sums of ``TERMS`` products that are alike, rounded to 8 bits of this scale."""
    constants = {
        **{"xs": np.float32(0.013), "ws": np.float32(0.0217), "ys": np.float32(scale)},
        **{"xz": np.uint8(0), "wz": np.int8(0), "yz": np.uint8(0)},
        "w": np.full((TERMS, 1), 3, np.int8),
    }
    nodes = nodes_of(
        "xd = DequantizeLinear(x, xs, xz) wd = DequantizeLinear(w, ws, wz) s = MatMul(xd, wd) "
        "r = Relu(s) q = QuantizeLinear(r, ys, yz) y = DequantizeLinear(q, ys, yz)"
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, TERMS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("factor", "rounding"), [(1.0, True), (1 + 1e-4, False)])
def test_how_near_to_the_middle_rounding_decides_grows_with_the_sums(factor, rounding):
    """Equal terms added one after another: their roundings add up, they do not cancel."""
    levels = np.arange(1, 256, dtype=np.uint8)
    terms = np.float32(0.013) * levels.astype(np.float32) * (np.float32(0.0217) * np.float32(3))
    exact = terms.astype(np.float64) * TERMS
    in_order = np.cumsum(np.tile(terms[:, None], TERMS), axis=1, dtype=np.float32)[:, -1]
    row = np.abs(np.abs(in_order / exact - 1) - 8e-6).argmin()
    scale = (in_order[row] + exact[row]) / 2 / 150.5  # one each side of the middle
    model = quantised(scale)
    feeds = {"x": np.tile(levels[:, None], TERMS)}
    steps = np.float32(scale)
    integers = np.clip(np.rint(in_order.astype(np.float64) * factor / steps), 0, 255)
    observed = {"y": (integers * steps).astype(np.float32)[:, None]}
    (plain,) = session(model, 1).run(None, feeds)
    assert (plain != observed["y"]).any()
    for known, all_of_it in ((TERMS, rounding), (1, False)):
        sided = either_side(model, observed, known)
        assert sided is not None
        (moved,) = session(sided, 1).run(None, feeds)
        assert np.array_equal(moved, observed["y"]) is all_of_it


@pytest.mark.parametrize(("scale", "undecided"), [(2.0, False), (0.3, True)])
def test_no_rounding_turns_the_middle_behind_a_round(scale: float, undecided: bool) -> None:
    """Halves of even steps are exactly in the middle; a runtime that rounds them up has a rule."""
    constants = {"s": np.float32(scale), "z": np.uint8(3)}
    nodes = nodes_of("r = Round(x) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    sided = either_side(model, {"y": np.array([2, 4, 6, 8], np.float32)})
    assert (sided is not None) is undecided
