"""Decomposition and impact on models where the right answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from auditor.comparison import metrics
from auditor.comparison.tasks import TaskMeter
from auditor.decomposition import divergence, impact
from auditor.decomposition import floor as floors
from auditor.decomposition.divergence import Local, Meter
from auditor.decomposition.impact import Chain
from auditor.decomposition.leave_one_in import LeaveOneIn
from auditor.graphs.segments import Graph
from auditor.replays import replay
from auditor.replays.replay import Replayer, ReplayError, difference
from tests.helpers import nodes_of, onnx_model

WIDTH = 16
LAYERS = 4


def _network(scaled=None, factor=1.01):
    """An MLP; ``scaled`` names a layer whose weight is multiplied by ``factor``."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    read = "x"
    for i in range(LAYERS):
        weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4
        if i == scaled:
            weight = weight * np.float32(factor)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        out = "y" if i == LAYERS - 1 else f"h{i}"
        nodes += [
            helper.make_node("MatMul", [read, f"w{i}"], [f"m{i}"]),
            helper.make_node("Sigmoid", [f"m{i}"], [out]),
        ]
        read = out
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, WIDTH])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def _model(text, kind):
    """A model of one node, from x0 to x."""
    kind = TensorProto.DataType.Value(kind)
    read, written = (helper.make_tensor_value_info(n, kind, [1, None]) for n in ("x0", "x"))
    graph = helper.make_graph([parser.parse_node(text)], "one", [read], [written])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.fixture
def chain():
    def make(faulty, captured_names=("h0", "h1", "h2", "y"), size=1):
        graph = Graph(_network())
        replayer = Replayer(graph, 1)
        cuts = graph.cut(captured_names)
        x = np.random.default_rng(1).standard_normal((3, WIDTH)) * size
        feeds = {"x": x.astype(np.float32)}
        base = replayer.walk(cuts, feeds)
        other = Graph(faulty)
        captured = Replayer(other, 1).walk(other.cut(captured_names), feeds)
        return Chain(replayer, cuts, feeds, base, captured, ("y",))

    return make


def _replay(made) -> dict[str, Local]:
    return {c.id: divergence.replay(made.replayer, c, made.captured) for c in made.cuts}


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_scaled_weight_is_introduced_where_it_is(chain, layer):
    made = chain(_network(scaled=layer))
    locals_ = _replay(made)
    introduced = []
    for cut in made.cuts:
        meter = Meter(cut)
        meter.add(locals_[cut.id], made.captured, made.base)
        introduced.append(meter.relative(meter.introduced))
    assert int(np.argmax(introduced)) == layer
    assert introduced[layer] > 1e-3
    assert max(e for i, e in enumerate(introduced) if i != layer) < 1e-6


@pytest.mark.parametrize("mask", [np.finfo(np.float32).min, -1e9, -1e4])
def test_an_error_is_seen_beside_what_is_masked(mask):
    """Attention scores, of which a third is kept out of the softmax: a bfloat16 engine's error."""
    nodes = nodes_of("m = Mul(x, s) a = Add(m, k) y = Softmax(a)")
    scores, kept = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [9, 9]) for n in "xy")
    tensors = {"s": np.float32(0.25), "k": np.repeat(np.float32([0, 0, mask]), 3)}
    constants = [numpy_helper.from_array(v, n) for n, v in tensors.items()]
    proto = helper.make_graph(nodes, "attention", [scores], [kept], constants)
    graph = Graph(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)]))
    cuts, replayer = graph.cut(("a", "y")), Replayer(graph, 1)
    x = np.random.default_rng(3).normal(0, 4, (9, 9)).astype(np.float32)
    base = replayer.walk(cuts, {"x": x})
    for off, flagged in ((2e-3, True), (0.0, False)):
        seen = base["a"] + np.float32(off) * np.where(base["a"] > -100, base["a"], 0)
        captured = {"x": x, "a": seen, "y": base["y"]}
        local = divergence.replay(replayer, cuts[0], captured)
        meter = Meter(cuts[0], floor=0.0)
        meter.add(local, captured, base)
        meter.floor = floors.floor(replayer, cuts[0], local, meter.accumulated).total
        assert meter.relative(meter.introduced) == pytest.approx(off, rel=0.01)
        assert meter.flagged is flagged


def test_errors_decompose(chain):
    """accumulated ≤ introduced + inherited, with equality of the vectors themselves."""
    made = chain(_network(scaled=1))
    locals_ = _replay(made)
    for cut in made.cuts:
        for name in cut.outputs:
            whole = made.captured[name] - made.base[name]
            inherited = locals_[cut.id].replayed[name] - made.base[name]
            np.testing.assert_allclose(whole, locals_[cut.id].error[name] + inherited, atol=1e-6)


def test_leave_one_in_of_the_only_fault_is_the_whole_divergence(chain):
    made = chain(_network(scaled=1, factor=1.2))
    locals_ = _replay(made)
    whole = metrics.relative_l2(made.captured, made.base, ("y",))
    effects = [impact.leave_one_in(made, cut, locals_[cut.id])[0] for cut in made.cuts]
    # Not exactly equal: the frozen error is that of the backend's inputs, here the very same.
    assert effects[1] == pytest.approx(whole, rel=1e-3)
    assert max(effects[0], effects[2], effects[3]) < 1e-3 * whole


def test_effects_over_samples_rank_as_impacts_do(chain):
    """Of two faults the later one is flagged on the sample only on which both do most."""
    faulty = _network(scaled=0, factor=1.02)
    faulty.graph.initializer[2].CopyFrom(_network(scaled=2, factor=1.02).graph.initializer[2])
    measured = LeaveOneIn(lambda _: None)
    means = {}
    for index, size in enumerate((0.01, 1)):
        made = chain(faulty, size=size)
        locals_ = _replay(made)
        early, late = (made.cuts[i].id for i in (0, 2))
        flagged = {early: locals_[early]} if index == 0 else {i: locals_[i] for i in (early, late)}
        measured.add(index, made, flagged, lambda name: TaskMeter(name, "none"))
        for id in flagged:
            means[id] = measured.effects[id].mean
    impacts = {id: measured.impact(id) for id in means}
    effects = {id: measured.effect(id) for id in means}
    assert sorted(effects, key=effects.get) == sorted(impacts, key=impacts.get)
    assert effects[early] == pytest.approx(means[early])  # measured on every sample
    assert effects[late] < means[late]  # where more diverges than on both together
    assert measured.top(1) == {max(impacts, key=impacts.get)}


def test_telescoping_shares_sum_to_one_and_name_the_fault(chain):
    made = chain(_network(scaled=2, factor=1.1))
    shares = impact.telescope(made, [(cut,) for cut in made.cuts])
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert shares[2] == pytest.approx(1.0, abs=1e-3)


def test_groups_of_segments_are_booked_together(chain):
    made = chain(_network(scaled=2, factor=1.1))
    first, second = impact.telescope(made, [made.cuts[:2], made.cuts[2:]])
    assert first == pytest.approx(0.0, abs=1e-4)
    assert second == pytest.approx(1.0, abs=1e-4)


def test_threads_change_no_bit_of_what_is_measured(chain):
    """Segments run beside each other on any number of threads, each alone on one."""
    made = chain(_network(scaled=1, factor=1.2))
    locals_ = _replay(made)
    many = replace(made, replayer=Replayer(made.replayer.graph, 3))
    many.replayer.walk(many.cuts, many.feeds)
    groups = [(cut,) for cut in made.cuts]
    assert impact.telescope(many, groups) == impact.telescope(made, groups)
    for one, other in zip(_alone(made, locals_), _alone(many, locals_), strict=True):
        assert metrics.bitwise_equal(one, other)


@pytest.mark.parametrize("length", [2, 3])
def test_segments_run_as_one_change_no_bit_of_what_is_measured(chain, monkeypatch, length):
    monkeypatch.setattr(replay, "_MANY", 1)
    monkeypatch.setattr(replay, "_IN_ONE", length)
    made = chain(_network(scaled=1, factor=1.2))
    locals_ = _replay(made)
    blocks = made.replayer.blocks(made.cuts, made.base, made.outputs)
    assert [len(block.cuts) for block in blocks.values()] == [length, 4 - length]
    joined = replace(made, blocks=blocks)
    groups = [(cut,) for cut in made.cuts]
    assert impact.telescope(joined, groups) == impact.telescope(made, groups)
    for one, other in zip(_alone(made, locals_), _alone(joined, locals_), strict=True):
        assert metrics.bitwise_equal(one, other)
    other = made.base | {"y": made.base["y"] + 1}  # the last ones do not give this
    assert list(made.replayer.blocks(made.cuts, other, made.outputs)) == [made.cuts[0].id]


def _alone(made, locals_):
    work = made.replayer.beside(
        lambda cut: impact.leave_one_in(made, cut, locals_[cut.id])[1], made.cuts
    )
    return list(work)


def booked(made, flagged, explained, **options):
    base = made.pick(made.base)
    whole = difference(made.pick(made.captured), base)
    parts = impact.parts_by_category(made, flagged, explained)
    return impact.booked(parts, whole, base, made.outputs, **options)


def test_categories_and_the_unexplained_rest_and_rounding_sum_to_one(chain):
    made = chain(_network(scaled=2, factor=1.1))
    guilty = made.cuts[2].id
    flagged = {guilty: _replay(made)[guilty]}
    half = {n: e * np.float32(0.5) for n, e in flagged[guilty].error.items()}
    books = booked(made, flagged, {"half.of-it": {guilty: half}})
    assert books.named["half.of-it"] == pytest.approx(0.5, abs=0.02)
    assert books.unexplained == pytest.approx(0.5, abs=0.02)
    assert books.rounding == pytest.approx(0.0, abs=1e-3)


def test_without_a_flagged_segment_everything_is_rounding(chain):
    books = booked(chain(_network(scaled=2)), {}, {})
    assert (books.named, books.unexplained, books.rounding) == ({}, 0.0, 1.0)
    books = booked(chain(_network(scaled=2)), {}, {}, rounding=False)  # not all was measured
    assert (books.named, books.unexplained, books.rounding) == ({}, 1.0, 0.0)


def test_a_clean_backend_has_nothing_to_book(chain):
    made = chain(_network())
    shares = impact.telescope(made, [(cut,) for cut in made.cuts])
    assert np.isnan(shares).all()


def test_the_input_control_measures_the_models_own_amplification(chain):
    made = chain(_network())
    gain = impact.input_control(made, made.base)
    assert gain is not None
    assert 0 < gain < 10


@pytest.mark.filterwarnings("error")
def test_the_input_control_makes_no_infinity_of_the_largest_numbers():
    graph = Graph(_model("x = Identity(x0)", "FLOAT"))
    replayer, value = Replayer(graph, 1), np.full((1, 8), np.finfo(np.float32).max)
    cuts = graph.cut(("x",))
    base = replayer.walk(cuts, {"x0": value})
    made = Chain(replayer, cuts, {"x0": value}, base, base, ("x",))
    gain = impact.input_control(made, base)
    assert gain is not None
    assert 0 < gain < 2


def test_an_integer_that_float32_tells_from_another_shows_beside_larger_ones():
    graph = Graph(_model("x = Add(x0, x0)", "INT64"))
    replayer, value = Replayer(graph, 1), np.array([[2**40, 7]])
    cuts = graph.cut(("x",))
    base = replayer.walk(cuts, {"x0": value})
    for off, shown in (([1, 0], False), ([0, 1], True)):  # either is a relative L2 of 5e-13
        made = Chain(replayer, cuts, {"x0": value}, base, base | {"x": base["x"] + off}, ("x",))
        local = divergence.replay(replayer, cuts[0], made.captured)
        assert impact.shows(made, cuts[0], local) == shown


def test_a_wrong_shape_is_a_failure_not_a_crash(chain):
    made = chain(_network())
    broken = made.captured | {"h1": made.captured["h1"][:, :-1]}
    before, after = made.cuts[1], made.cuts[2]
    with pytest.raises(ReplayError, match="s2"):
        divergence.replay(made.replayer, after, broken)
    local = divergence.replay(made.replayer, before, broken)
    assert local.error["h1"].shape == broken["h1"].shape
    chain_of = Chain(made.replayer, made.cuts, made.feeds, made.base, broken, ("y",))
    assert impact.leave_one_in(chain_of, before, local) == (np.inf, {})


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ({"e": [[0.0, 1.0]], "y": [[-np.inf, 0.0]]}, "e"),  # 1e-39 became zero
        ({"y": [[-np.inf, 0.0]]}, "y"),
        ({"e": [[2e-39, 1.0]], "y": [[-88.41, 0.0]]}, None),
    ],
)
def test_what_decides_whether_outputs_are_finite_is_found(lost, found):
    text = "(float[1, 2] x) => (float[1, 2] y) { e = Exp(x) y = Log(e) }"
    graph = Graph(onnx_model(text))
    replayer, cuts = Replayer(graph, 1), graph.cut(("e", "y"))
    feeds = {"x": np.array([[-89.0, 0.0]], np.float32)}
    base = replayer.walk(cuts, feeds)
    assert 0 < base["e"][0, 0] < np.finfo(np.float32).tiny
    captured = base | {n: np.array(v, np.float32) for n, v in lost.items()}
    cut = impact.deciding(Chain(replayer, cuts, feeds, base, captured, ("y",)))
    assert (cut and cut.outputs) == (found and (found,))


def test_an_error_as_large_as_the_tensor_loses_nothing_small():
    reference, observed = ({"m": np.array(v, np.float32)} for v in ([-3e38, 1], [-1e4, 1.25]))
    error = difference(observed, reference)
    assert metrics.bitwise_equal(replay.add(reference, error, observed), observed)
    other = {"m": np.array([0, 2], np.float32)}
    assert replay.add(other, error, observed)["m"].tolist() == pytest.approx([3e38, 2.25])


def test_difference_of_equal_tensors_is_zero():
    values = {"a": np.asarray([1, 2], np.int64), "b": np.ones(2, np.float16)}
    assert all(not v.any() for v in difference(values, values).values())
