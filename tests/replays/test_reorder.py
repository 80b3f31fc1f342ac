"""Reversing sums changes bits and nothing else."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.decomposition import divergence
from auditor.decomposition import floor as floors
from auditor.graphs.segments import Graph
from auditor.replays import decisions, functions, positions, quantised, rounding
from auditor.replays.reorder import OPSET, longest_sum, reordered
from auditor.replays.replay import Replayer
from auditor.replays.sessions import session
from auditor.replays.widening import own_types
from auditor.replays.writer import FP16

RNG = np.random.default_rng(0)
CASES = {
    "Conv": ([2, 32, 9, 9], {"w": (16, 32, 3, 3), "b": (16,)}, {}),
    "ConvTranspose": ([2, 32, 5, 5], {"w": (32, 8, 3, 3)}, {}),
    "MatMul": ([4, 300], {"w": (300, 20)}, {}),
    "Gemm": ([300, 4], {"w": (20, 300), "b": (20,)}, {"transA": 1, "transB": 1}),
    "GlobalAveragePool": ([1, 4, 60, 70], {}, {}),
    "ReduceMean": ([4, 7, 500], {}, {"axes": [-1]}),
    "ReduceMean over space": ([4, 7, 30, 40], {}, {"axes": [2, 3]}),
    "Softmax": ([4, 300], {}, {"axis": -1}),
    "LayerNormalization": ([4, 300], {"s": (300,), "b": (300,)}, {}),
    "InstanceNormalization": ([2, 3, 20, 30], {"s": (3,), "b": (3,)}, {}),
}


def _model(op, shape, weights, attributes):
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *weights], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(RNG.standard_normal(s).astype(np.float32), n)
            for n, s in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


@pytest.mark.parametrize("op", CASES)
def test_the_meaning_stays(op):
    shape, weights, attributes = CASES[op]
    model = _model(op.partition(" ")[0], shape, weights, attributes)
    other = reordered(model)
    assert other is not None
    x = RNG.standard_normal(shape).astype(np.float32)
    plain = session(model, 1).run(None, {"x": x})[0]
    moved = session(other, 1).run(None, {"x": x})[0]
    assert moved.shape == plain.shape
    np.testing.assert_allclose(moved, plain, rtol=1e-3, atol=1e-5)


def test_a_long_sum_moves_more_than_its_inputs_last_bits():
    model = _model("GlobalAveragePool", [1, 1, 512, 512], {}, {})
    x = (1000 + RNG.standard_normal((1, 1, 512, 512))).astype(np.float32)
    other = reordered(model)
    exact = x.astype(np.float64).mean()
    plain = session(model, 1).run(None, {"x": x})[0].item()
    moved = session(other, 1).run(None, {"x": x})[0].item()
    assert abs(plain - exact) <= 20 * abs(moved - plain) + 1e-6 * exact


def test_a_softmax_over_many_classes_loses_the_small_ones():
    """Added one after another to the largest, they are rounded away: TVM adds them so."""
    model = _model("Softmax", [1, 20_000], {}, {"axis": -1})
    x = np.full((1, 20_000), -16, np.float32) + RNG.random((1, 20_000), np.float32)
    x[0, 0] = 0
    other = reordered(model)
    plain = session(model, 1).run(None, {"x": x})[0]
    moved = session(other, 1).run(None, {"x": x})[0]
    powers = np.exp(x - x.max())
    (one_after_another,) = powers / np.cumsum(powers, axis=1, dtype=np.float32)[:, -1:]
    exact = np.exp(x.astype(np.float64))
    (exact,) = exact / exact.sum()
    np.testing.assert_allclose(moved[0], one_after_another, rtol=1e-5)
    # How much better the engine's own order is depends on how many sums its processor keeps.
    assert abs(moved[0, 0] - exact[0]) > 1e-4 > 2 * abs(plain[0, 0] - exact[0])


def test_an_operator_whose_attributes_became_inputs_is_no_obstacle():
    """Squeeze takes its axes as an input from opset 13 on: a new label alone is refused."""
    model = _model("Softmax", [1, 1, 500], {}, {"axis": -1})
    model.opset_import[0].version = 11
    model.graph.node[0].input[0] = "squeezed"
    model.graph.node[0].attribute[0].i = 1
    model.graph.node.insert(0, helper.make_node("Squeeze", ["x"], ["squeezed"], axes=[0]))
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": 5 * RNG.standard_normal((1, 1, 500)).astype(np.float32)}
    replayed = replayer.run(cut, feeds)
    alone = replayer.model(cut, feeds)
    before = alone.SerializeToString()
    moved = replayer.run_changed(cut, alone, feeds, replayed, reordered, OPSET, "reordered")
    assert alone.SerializeToString() == before  # other replays of this segment begin with it
    assert moved["y"].tobytes() != replayed["y"].tobytes()
    np.testing.assert_allclose(moved["y"], replayed["y"], rtol=1e-4)


def test_nothing_to_reverse():
    assert reordered(_model("Relu", [3], {}, {})) is None
    depthwise = _model("Conv", [1, 8, 5, 5], {"w": (8, 1, 3, 3)}, {"group": 8})
    assert reordered(depthwise) is None


@pytest.mark.parametrize(
    ("op", "shape", "attributes", "terms"),
    [
        ("Conv", (16, 32, 3, 3), {}, 288),
        ("Conv", (16, 1, 3, 3), {"group": 16}, 9),
        ("ConvTranspose", (32, 8, 3, 3), {}, 288),
        ("MatMul", (2, 300, 20), {}, 300),
        ("Gemm", (20, 300), {"transB": 1}, 300),
        ("Gemm", (300, 20), {}, 300),
        ("Relu", (5, 5), {}, 1),
    ],
)
def test_the_length_of_a_sum(op, shape, attributes, terms):
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    assert longest_sum([node], {"w": shape}) == terms


def _floor_and_error(observe, constants_from_shapes=False):
    """The floor of a convolution whose products are all alike, and how far a kernel is off."""
    model = _model("Conv", [1, 256, 6, 6], {"w": (32, 256, 3, 3), "b": (32,)}, {})
    weight, bias = np.full((32, 256, 3, 3), 0.1, np.float32), np.full(32, 0.3, np.float32)
    arrays = (numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b"))
    for tensor, array in zip(model.graph.initializer, arrays, strict=True):
        tensor.CopyFrom(array)
    if constants_from_shapes:  # as the oldest files have them, which list no initialiser twice
        del model.graph.initializer[0]
        shape = numpy_helper.from_array(np.int64(weight.shape), "shape")
        value = numpy_helper.from_array(weight.ravel()[:1], "value")
        made = helper.make_node("ConstantOfShape", ["shape"], ["w"], value=value)
        model.graph.node.insert(0, made)
        model.graph.initializer.append(shape)
        model.ir_version = 3
        for t in model.graph.initializer:
            kind = helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            model.graph.input.append(kind)
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": np.ones((1, 256, 6, 6), np.float32)}
    return _floor(replayer, cut, feeds, observe(feeds["x"], weight, bias))


def _floor(replayer, cut, feeds, observed):
    """The floor of a segment, and the error of a backend's ``y``."""
    captured = feeds | {"y": observed}
    local = divergence.replay(replayer, cut, captured)
    meter = divergence.Meter(cut)
    meter.add(local, captured, replayer.walk((cut,), feeds))
    floor = floors.floor(replayer, cut, local, meter.accumulated).total
    return floor, meter.relative(meter.introduced)


def _summed_by_tap(x, w, b):
    """One addition after another, kernel positions outside: not the order that is replayed."""
    total = np.zeros((1, len(b), 4, 4), np.float32)
    for row in range(3):
        for column in range(3):
            patch = x[:, :, row : row + 4, column : column + 4]
            for channel in range(x.shape[1]):
                product = w[:, channel, row, column][:, None, None] * patch[:, channel][:, None]
                total = total + product.astype(np.float32)
    return total + b[:, None, None]


@pytest.mark.parametrize("constants_from_shapes", [False, True])
def test_equal_terms_added_up_one_after_another_are_rounding(constants_from_shapes):
    floor, error = _floor_and_error(_summed_by_tap, constants_from_shapes)
    assert 3e-6 < error <= floor < 1e-3


def test_a_small_fault_is_no_order_of_a_sum():
    floor, error = _floor_and_error(lambda *given: _summed_by_tap(*given) * np.float32(1.001))
    assert error > floor


def test_positions_are_multiplied_by_the_inverse_of_a_scale():
    """Where noise is interpolated linearly; a position that is another one is no rounding."""
    sizes = numpy_helper.from_array(np.array([1, 1, 1, 224]), "sizes")
    model = _model("Resize", [1, 1, 1, 240], {}, {"mode": "linear"})
    model.graph.node[0].input.extend(["", "", "sizes"])
    model.graph.initializer.append(sizes)
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    x = RNG.standard_normal((1, 1, 1, 240)).astype(np.float32)
    for wrong, rounds in ((0.0, True), (1e-3, False)):
        at = (np.arange(224, dtype=np.float32) + 0.5) * np.float32(240 / 224) - np.float32(0.5)
        left, part = np.floor(at).astype(int), (at - np.floor(at) + wrong).astype(np.float32)
        y = x[..., left] * (1 - part) + x[..., left + 1] * part
        floor, error = _floor(replayer, cut, {"x": x}, y)
        assert error > 3e-6 and (error < floor) is rounds, (floor, error)


def test_nothing_rounds_between_integers():
    """A sum that wraps around is another one in another order: that is no rounding."""
    model = _model("ReduceSum", [1, 64], {}, {"keepdims": 0})
    del model.graph.initializer[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.INT32
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": np.full((1, 64), 2**30 - 1, np.int32)}
    reference = replayer.walk((cut,), feeds)
    assert _floor(replayer, cut, feeds, reference["y"] + 1)[0] < 1e-5


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_decided_on_an_observed_tensor_is_no_rounding(scaled):
    """Whole numbers stay whole where they are read, and may not where they are computed."""
    nodes = [
        *([helper.make_node("Mul", ["x", "k"], ["m"])] if scaled else []),
        helper.make_node("Relu", ["m" if scaled else "x"], ["r"]),
        helper.make_node("Cast", ["r"], ["i"], to=TensorProto.INT32),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "r"], ["y"]),
    ]
    model = _model("Relu", [4, 64], {}, {})
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(3), "k"))
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": RNG.integers(1, 9, (4, 64)).astype(np.float32)}
    reference = replayer.walk((cut,), feeds)
    floor, _ = _floor(replayer, cut, feeds, reference["y"] + 1)
    assert floor > 0.1 if scaled else floor < 1e-5


@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_ties_of_an_observed_tensor_are_no_rounding(scale):
    """A division by a power of two is exact, so that a tie is one in every runtime."""
    model = _model("QuantizeLinear", [1, 64], {}, {})
    model.graph.node[0].input.extend(["s", "z"])
    model.graph.initializer.append(numpy_helper.from_array(np.float32(scale), "s"))
    model.graph.initializer.append(numpy_helper.from_array(np.uint8(3), "z"))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": ((np.arange(64, dtype=np.float32)[None] + 0.5) * np.float32(scale))}
    floor, error = _floor(replayer, cut, feeds, np.rint(feeds["x"] / scale + 3).astype(np.uint8))
    assert (error > floor) is (scale == 0.5), (floor, error)


def test_the_rest_of_a_division_is_exact():
    """1e10 modulo 3 is 1, not what subtracting the whole part leaves."""
    model = _model("Mod", [1, 4], {}, {"fmod": 1})
    model.graph.node[0].input.append("b")
    model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 4]))
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": np.float32([[1e10, 5.5, -7, 9]]), "b": np.float32([[3, 2, 4, 2.5]])}
    whole = feeds["x"] - feeds["b"] * np.trunc(feeds["x"] / feeds["b"])
    floor, error = _floor(replayer, cut, feeds, whole)
    assert error > 0.1 > 1e-5 > floor


def test_as_many_samples_are_taken_as_a_region_is_long():
    """Regions of whole bins, of which the last bit would decide on one sample more."""
    model = _model("RoiAlign", [1, 2, 12, 12], {}, {"output_height": 2, "output_width": 2})
    model.graph.node[0].input.extend(["rois", "of"])
    for name, kind, shape in (("rois", TensorProto.FLOAT, [3, 4]), ("of", TensorProto.INT64, [3])):
        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    rois = np.float32([[0, 0, 4, 4], [1, 2, 9, 6], [3, 3, 7, 11]])
    x = RNG.standard_normal((1, 2, 12, 12)).astype(np.float32)
    feeds = {"x": x, "rois": rois, "of": np.zeros(3, np.int64)}
    right = replayer.walk((cut,), feeds)["y"]
    floor, error = _floor(replayer, cut, feeds, right + np.float32(0.05))
    assert error > 0.01 > floor
    floor, error = _floor(replayer, cut, feeds, right * np.float32(1 + 1e-6))
    assert error < floor


@pytest.mark.parametrize("kind", ["FLOAT", "DOUBLE"])
def test_single_precision_is_no_rounding_of_double_precision(kind):
    model = _model("Sigmoid", [1, 64], {}, {})
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DataType.Value(kind)
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": RNG.standard_normal((1, 64)).astype(kind.lower() if kind == "DOUBLE" else "f4")}
    right = replayer.walk((cut,), feeds)["y"]
    floor, error = _floor(replayer, cut, feeds, right * (1 + right.dtype.type(1e-7)))
    assert (error > floor) is (kind == "DOUBLE")
    floor, error = _floor(replayer, cut, feeds, right.astype(np.float32))  # as OpenVINO shows it
    assert (error > floor) is (kind == "DOUBLE")
    floor, error = _floor(replayer, cut, feeds, np.nextafter(right, 0))
    assert error < floor


def test_casts_to_4_bits_are_decided():
    """A value in the middle falls on the same side in every runtime: they read the same one."""
    model = _model("Cast", [1, 4], {}, {"to": TensorProto.INT4})
    model.opset_import[0].version, model.ir_version = 21, 10
    model.graph.node[0].output[0] = "i"
    model.graph.node.append(helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT))
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    feeds = {"x": np.float32([[3.2, 2.5, -1.5, 6.5]])}
    right = replayer.walk((cut,), feeds)["y"]
    floor, error = _floor(replayer, cut, feeds, right + np.float32([[0, 8, 0, 0]]))
    assert error > 0.1 > 1e-5 > floor


def _integers_resized(mode):
    """A Resize of integers to twice the size: between whole pixels its positions are exact."""
    model = _model("Cast", [1, 1, 12, 12], {}, {"to": TensorProto.INT32})
    model.graph.node[0].output[0] = "i"
    resize = helper.make_node(
        "Resize", ["i", "", "s"], ["y"], mode=mode, coordinate_transformation_mode="asymmetric"
    )
    model.graph.node.append(resize)
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 1, 2, 2]), "s"))
    model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    graph = Graph(model)
    replayer = Replayer(graph, 1)
    (cut,) = graph.cut({"y"})
    x = np.random.default_rng(5).integers(-99, 99, (1, 1, 12, 12)).astype(np.float32)
    return replayer, cut, {"x": x}


def test_integers_that_are_rounded_where_they_are_cut_off_are_no_rounding():
    """The last bit of a position cuts off a quarter of them elsewhere, but not those between."""
    replayer, cut, feeds = _integers_resized("linear")
    right = replayer.walk((cut,), feeds)["y"]
    wide = np.repeat(np.repeat(feeds["x"], 2, 2), 2, 3)  # x[0, 0] at even rows and columns
    wide[..., 1:-1:2] = (wide[..., :-2:2] + wide[..., 2::2]) / 2
    wide[..., 1:-1:2, :] = (wide[..., :-2:2, :] + wide[..., 2::2, :]) / 2
    assert np.array_equal(np.trunc(wide), right)
    floor, error = _floor(replayer, cut, feeds, np.rint(wide).astype(np.int32))
    assert error > floor
    # Positions that are a last bit larger or smaller decide what lies on whole pixels only.
    whole = np.zeros(right.shape, bool)
    whole[..., ::2, ::2] = True
    for by in (-1, 1):
        below = np.where(whole & (wide * by > 0), right - by, right)
        floor, error = _floor(replayer, cut, feeds, below.astype(np.int32))
        assert error < floor


def test_what_floors_are_measured_with_leaves_the_segment_as_it_is():
    """One copy of a segment serves all of its replays."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 4, 8, 8] x) => (float[1, 4, 16, 16] y)
        <float[4] scales = {1.0, 1.0, 2.0, 2.0}, float s = {0.1},
         uint8 z = {128}> {
            c = Conv(x, w) e = Sigmoid(c)
            q = QuantizeLinear(e, s, z) d = DequantizeLinear(q, s, z)
            y = Resize <mode = "linear"> (d, , scales) }""")
    weight = RNG.standard_normal((4, 4, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    before = model.SerializeToString()
    observed = {"y": np.zeros((1, 4, 16, 16), np.float32)}
    made = {
        "reordered": reordered(model),
        "moved": positions.moved(model),
        "nudged": positions.nudged(model, up=1),
        "exact": functions.exact(model),
        "in order": rounding.in_order(model),
        "decided": decisions.decided(model),
        "own types": own_types(model, FP16),
        "either side": quantised.either_side(model, observed),
    }
    assert model.SerializeToString() == before
    assert {"reordered", "moved", "exact"} <= {k for k, changed in made.items() if changed}
