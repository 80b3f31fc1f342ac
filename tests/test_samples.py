"""Several samples: what only some of them show, and what is kept of them."""

import gc
from types import FunctionType, ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import analysis, discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import UsageError
from auditor.ports import Silent
from tests.helpers import nodes_of

WIDTH = 8
RNG = np.random.default_rng(3)
WEIGHTS = [RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 2 for _ in range(3)]


def _model(*, limit=None, bias=0.0, root=False, outputs=("logits",)):
    """Three products with activations between; ``limit`` clips the second activation."""
    weights = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(WEIGHTS)]
    weights += [
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.float32(limit or 3e38), "limit"),
        numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32)[0] * np.float32(bias), "bias"),
    ]
    nodes = nodes_of(
        "a = MatMul(x, w0) b = Clip(a, zero) c = MatMul(b, w1) "
        "[limited] d = Clip(c, zero, limit) e = MatMul(d, w2) [biased] f = Add(e, bias) "
        "logits = Identity(f)"
    )
    if root:  # the square root of a square, or of the value itself: NaN below zero
        nodes[-1] = helper.make_node("Sqrt", ["g"], ["logits"], "root")
        second = "f" if root == "square" else "ones"
        weights.append(numpy_helper.from_array(np.ones(WIDTH, np.float32), "ones"))
        nodes.insert(-1, helper.make_node("Mul", ["f", second], ["g"], "times"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, WIDTH]) for n in outputs],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


def _inputs(count, *, large=()):
    """Inputs that leave the second activation below 50, except those at ``large``."""
    made = RNG.standard_normal((count, 1, WIDTH)).astype(np.float32)
    for index in large:
        made[index] *= 1000
    return made


def _activation(sample):
    return np.maximum(np.maximum(sample @ WEIGHTS[0], 0) @ WEIGHTS[1], 0)


@pytest.fixture
def run(tmp_path):
    def run(reference, candidate, inputs, **more):
        onnx.save(reference, tmp_path / "model.onnx")
        onnx.save(candidate, tmp_path / "candidate.onnx")
        np.savez(tmp_path / "x.npz", x=inputs)
        options = AuditOptions(
            backends=(BackendSpec("ort"),),
            candidate=tmp_path / "candidate.onnx",
            data=tmp_path / "x.npz",
            samples=len(inputs),
            **more,
        )
        report = audit(
            tmp_path / "model.onnx", options, noises=discovery.noises(), progress=Silent()
        )
        return report, report.backends[0]

    return run


def test_a_fault_that_only_a_later_sample_shows_is_looked_into_there(run):
    inputs = _inputs(8, large=(2,))
    assert _activation(inputs[2]).max() > 50
    assert max(_activation(x).max() for i, x in enumerate(inputs) if i != 2) < 50
    report, backend = run(_model(), _model(limit=50), inputs)
    (finding,) = report.findings
    (guilty,) = [s for s in backend.segments if s.id == finding.segment]
    assert "limited" in finding.nodes
    assert guilty.explained_on == 2
    assert guilty.leave_one_in == pytest.approx(1, abs=1e-3)
    assert guilty.leave_one_in_spread.samples == 1  # nothing diverges on the later ones
    assert guilty.impact_share is None  # booked with its neighbours, as on the first samples
    (output,) = backend.outputs
    assert output.spread.high_at == 2
    assert (output.spread.low, output.spread.samples) == (pytest.approx(0, abs=1e-6), 8)
    assert any("sample 2" in line for line in finding.evidence)


def test_the_samples_on_which_the_answer_changes_are_counted(run):
    inputs = _inputs(6)
    bias = np.float32(1.5)
    plain = np.stack([_activation(x) @ WEIGHTS[2] for x in inputs])[:, 0]
    moved = plain + np.eye(WIDTH, dtype=np.float32)[0] * bias
    flips = np.flatnonzero(plain.argmax(1) != moved.argmax(1))
    assert 0 < len(flips) < len(inputs)
    report, backend = run(_model(), _model(bias=bias), inputs)
    (output,) = backend.outputs
    assert (output.kind, output.kind_stated) == ("scores", False)
    assert (output.consequence.changed, output.consequence.items) == (len(flips), 6)
    assert output.consequence.first_changed == flips[0]
    assert output.top1_agreement == pytest.approx(1 - len(flips) / 6)
    (finding,) = report.findings
    (alone,) = finding.consequences  # the first four samples, as the impact
    early = flips[flips < 4]
    assert (alone.samples, alone.items, alone.changed) == (4, 4, len(early))
    assert any(line.startswith("its error alone: logits: top-1 flips") for line in finding.evidence)


def test_the_kind_can_be_stated(run):
    _, backend = run(_model(), _model(bias=1), _inputs(2), output_kinds={"logits": "embedding"})
    (output,) = backend.outputs
    assert (output.kind, output.kind_stated) == ("embedding", True)
    assert output.top1_agreement is None
    assert output.consequence.cosine < 1


def test_an_unknown_output_is_a_usage_error(run):
    with pytest.raises(UsageError, match="`nonsense`, which is no output"):
        run(_model(), _model(), _inputs(1), output_kinds={"nonsense": "mask"})


def test_nan_on_one_side_is_counted_with_its_first_sample(run):
    inputs = _inputs(5)
    values = np.stack([_activation(x) @ WEIGHTS[2] for x in inputs])[:, 0]
    bad = np.flatnonzero((values < -1e-3).any(axis=1))
    assert len(bad)
    _, backend = run(_model(root="square"), _model(root="itself"), inputs)
    (output,) = backend.outputs
    assert (output.nonfinite, output.first_nonfinite) == (len(bad), bad[0])


def test_shares_are_means_over_the_first_samples_and_still_sum_to_one(run):
    report, backend = run(_model(), _model(limit=0.5, bias=0.1), _inputs(6))
    assert backend.booked_samples == 4
    assert sum(share for _, share in backend.booked) == pytest.approx(1, abs=1e-4)
    categories = sum(c.share for c in backend.categories)
    assert categories + backend.unexplained_share == pytest.approx(1, abs=1e-6)
    assert backend.unexplained_spread.samples == 4
    assert len(report.findings) == 2
    for finding in report.findings:
        spread = finding.leave_one_in_spread
        assert spread.samples == 4
        assert spread.low <= finding.leave_one_in <= spread.high


def test_an_integer_output_counts_single_steps(run):
    def quantised(rounded):
        model = _model(outputs=("y",))
        scale = numpy_helper.from_array(np.float32(0.05), "scale")
        zero = numpy_helper.from_array(np.int8(0), "zero_point")
        model.graph.initializer.extend([scale, zero])
        read = "logits"
        if not rounded:  # half a step up: about half of the elements move by one
            half = numpy_helper.from_array(np.float32(0.025), "half")
            model.graph.initializer.append(half)
            model.graph.node.append(helper.make_node("Add", ["logits", "half"], ["up"]))
            read = "up"
        model.graph.node.append(
            helper.make_node("QuantizeLinear", [read, "scale", "zero_point"], ["y"], "quantise")
        )
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8
        return model

    inputs = _inputs(6)
    plain = np.stack([_activation(x) @ WEIGHTS[2] for x in inputs]) / np.float32(0.05)
    inside = abs(plain) < 120
    expected = (np.rint(plain + 0.5) - np.rint(plain) == 1) & inside
    _, backend = run(quantised(True), quantised(False), inputs)
    (output,) = backend.outputs
    assert output.one_step == pytest.approx(expected.mean(), abs=0.1)
    assert 0.3 < output.one_step < 0.7
    assert output.kind == "none"


def _held(root):
    """Bytes of the arrays reachable from an object, and how many containers lead to them."""
    seen, waiting, held, objects = set[int](), [root], 0, 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        seen.add(id(item))
        objects += 1
        held += item.nbytes if isinstance(item, np.ndarray) else 0
        waiting.extend(gc.get_referents(item))
    return held, objects


def test_what_is_kept_does_not_grow_with_the_samples(run, monkeypatch):
    kept = {}
    original = analysis.Analysis.add

    def add(self, index, *arguments):
        original(self, index, *arguments)
        apart = {"tracer", "reference", "noises", "_rename", "_kinds"}
        kept[index] = _held({k: v for k, v in vars(self).items() if k not in apart})

    monkeypatch.setattr(analysis.Analysis, "add", add)
    run(_model(), _model(limit=0.5, bias=0.1), _inputs(60))
    assert kept[59][0] <= kept[5][0]
    assert kept[59][1] <= kept[5][1] + 20  # numbers that were one object become two


def _reader(*, bias):
    """Words to numbers by a table, and from there to one score."""
    table = np.float32([[0.0, 1.0], [2.0, -1.0], [0.5, 3.0]])
    tensors = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.float32([1.5, -0.5]) + np.float32(bias), "w"),
    ]
    words = {"keys_strings": ["cat", "sat"], "values_int64s": [1, 2], "default_int64": 0}
    nodes = [
        helper.make_node("LabelEncoder", ["x"], ["ids"], domain="ai.onnx.ml", **words),
        helper.make_node("Gather", ["table", "ids"], ["found"]),
        helper.make_node("MatMul", ["found", "w"], ["scores"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.STRING, [3])
    made = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [3])
    graph = helper.make_graph(nodes, "g", [given], [made], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def test_texts_are_fed_where_a_backend_takes_them(run):
    words = np.array([["a", "cat", "sat"], ["sat", "caf\u00e9", ""]])
    report, backend = run(_reader(bias=0.0), _reader(bias=0.25), words)
    assert report.stimulus.samples == 2 and not report.gaps
    # "sat" is [0.5, 3] in the table, and each number counts for 0.25 more.
    assert backend.outputs[0].distance.max_abs == pytest.approx(3.5 * 0.25)
    assert [s.op_types for s in backend.segments if s.introduced] == [("MatMul",)]
