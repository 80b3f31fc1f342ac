"""Whole audits on real backends: clean models stay silent, planted faults are found."""

import copy
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import BackendError, UsageError
from auditor.ports import Silent
from auditor.processes.worker import Worker
from auditor.verdict import summary
from tests.helpers import nodes_of, onnx_model

CHANNELS = 8


def _cnn():
    """A residual CNN with He-initialised weights, pooling and a classifier."""
    rng = np.random.default_rng(7)
    nodes, weights = [], []

    def conv(name, read, into, size=3):
        scale = np.sqrt(2 / (into * size * size))
        kernel = (rng.standard_normal((CHANNELS, into, size, size)) * scale).astype(np.float32)
        bias = rng.standard_normal(CHANNELS).astype(np.float32) / 10
        weights.extend([(f"{name}.w", kernel), (f"{name}.b", bias)])
        nodes.append(
            helper.make_node(
                "Conv",
                [read, f"{name}.w", f"{name}.b"],
                [f"{name}.out"],
                name,
                pads=[size // 2] * 4,
            )
        )
        return f"{name}.out"

    def op(kind, read, name, **attributes):
        nodes.append(helper.make_node(kind, read, [name], f"{kind}_{name}", **attributes))
        return name

    stem = op("Relu", [conv("stem", "x", 3)], "r0")
    pooled = op("MaxPool", [stem], "p0", kernel_shape=[2, 2], strides=[2, 2])
    body = op("Relu", [conv("body1", pooled, CHANNELS)], "r1")
    body = conv("body2", body, CHANNELS)
    joined = op("Relu", [op("Add", [body, pooled], "a0")], "r2")
    mean = op("GlobalAveragePool", [joined], "g0")
    flat = op("Flatten", [mean], "f0")
    weights.append(("fc.w", rng.standard_normal((CHANNELS, 10)).astype(np.float32)))
    weights.append(("fc.b", rng.standard_normal(10).astype(np.float32)))
    nodes.append(helper.make_node("Gemm", [flat, "fc.w", "fc.b"], ["y"], "fc"))
    graph = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(v, n) for n, v in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


def _changed(model, weight, change):
    other = copy.deepcopy(model)
    tensor = next(t for t in other.graph.initializer if t.name == weight)
    tensor.CopyFrom(
        numpy_helper.from_array(change(numpy_helper.to_array(tensor)).astype(np.float32), weight)
    )
    return other


@pytest.fixture
def run(tmp_path):
    def run(model, *backends, candidate=None, data=None, **more):
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        if isinstance(data, dict):
            np.savez(tmp_path / "data.npz", **data)
            data = tmp_path / "data.npz"
        other = None
        if candidate is not None:
            other = tmp_path / "candidate.onnx"
            onnx.save(candidate, other)
        options = AuditOptions(
            backends=tuple(BackendSpec(*b.split(":")) for b in backends),
            candidate=other,
            data=data,
            **more,
        )
        return audit(path, options, noises=discovery.noises(), progress=Silent())

    return run


OV_F32 = {"ov": {"INFERENCE_PRECISION_HINT": "f32"}}


def test_a_clean_model_is_silent(run):
    report = run(_cnn(), "ort", "ov", "tvm", options=OV_F32)
    assert (report.verdict, report.exit_code) == ("pass", 0)
    assert report.findings == ()
    assert report.gaps == ()
    for backend in report.backends:
        assert backend.status == "audited"
        assert backend.fidelity.outputs_bitwise_equal
        assert backend.fidelity.program_unchanged
        assert all(s.introduced <= s.floor for s in backend.segments)
        assert {s.noise for s in backend.segments} == {"implementation.fp32_rounding"}


def test_a_saturated_sigmoid_has_no_more_digits_than_it_has(run):
    """Of −14 it is 8.3e-7, and each runtime's polynomial has another error there."""
    weight = np.full((8, 1), -14 / 8, np.float32)
    model = onnx_model(
        "(float[1, 8] x) => (float[1, 1] y) { logit = MatMul(x, w) y = Sigmoid(logit) }",
        {"w": weight},
        ir_version=9,
    )
    data = {"x": np.linspace(0.9, 1.1, 8, dtype=np.float32)[None, None]}
    report = run(model, "ort", "ov", "tvm", data=data, options=OV_F32)
    assert max(o.distance.relative_l2 for b in report.backends for o in b.outputs) > 1e-3
    assert report.findings == ()
    assert (report.verdict, report.exit_code) == ("pass", 0)


def test_a_saturated_sigmoid_is_no_fault_of_what_rounds_before_it(run):
    """Its own segment does nothing here: it is handed a last bit, and has no digits for it."""
    weight = np.random.default_rng(1).random((8, 8), np.float32)
    x = np.linspace(0.9, 1.1, 8, dtype=np.float32)[None]
    logits = np.linspace(-15, -14, 64, dtype=np.float32)
    last = np.tile(logits / (x @ weight).sum(), (8, 1))
    model = onnx_model(
        "(float[1, 8] x) => (float[1, 64] y) { hidden = MatMul(x, w) positive = Relu(hidden) "
        "logit = MatMul(positive, v) y = Sigmoid(logit) }",
        {"w": weight, "v": last},
        ir_version=9,
    )
    rounded = _changed(model, "w", lambda w: w * (1 + 2**-20))
    report = run(model, "ort", data={"x": x[None]}, candidate=rounded)
    assert report.backends[0].outputs[0].distance.relative_l2 > 1e-2
    assert report.findings == ()
    assert (report.verdict, report.exit_code) == ("pass", 0)


def test_a_transpose_that_the_optimiser_moved_past_others_is_no_fault(run):
    """ONNX Runtime multiplies before it transposes, under names that the results no longer fit."""
    model = onnx_model(
        "(float[1, 6, 10, 2] x) => (float[1, 6, 10] y) { "
        "t = Transpose <perm = [0, 2, 1, 3]> (x) m = Mul(t, k) square = Mul(m, m) "
        "sum = ReduceSum <keepdims = 0> (square, axes) root = Sqrt(sum) "
        "y = Transpose <perm = [0, 2, 1]> (root) }",
        {"k": np.float32(0.3), "axes": np.array([3], np.int64)},
        opset=15,
        ir_version=9,
    )
    report = run(model, "ort")
    (backend,) = report.backends
    assert "square" not in {p for s in backend.segments for p in s.outputs}
    assert report.findings == ()
    assert report.exit_code == 0


DEFECTS = {
    "stem.w": lambda w: w * 1.01,
    "body1.w": lambda w: w[::-1],
    "body2.b": lambda b: b + 0.05,
    "fc.w": lambda w: w * 1.01,
}


@pytest.mark.parametrize(
    ("backend", "weight", "change"),
    [
        (backend, weight, change)
        for backend in ("ort", "ov", "tvm")
        for weight, change in DEFECTS.items()
        if backend != "tvm" or weight in ("stem.w", "fc.w")  # which compiles for seconds
    ],
)
def test_a_defect_is_ranked_first_and_given_no_false_cause(run, backend, weight, change):
    model = _cnn()
    report = run(model, backend, candidate=_changed(model, weight, change), options=OV_F32)
    first = report.findings[0]
    assert weight.split(".")[0] in first.nodes
    assert first.noise is None
    assert first.remedy is not None and "audit it against the model that" in first.remedy
    assert all(f.segment == first.segment for f in report.findings[1:])
    assert report.backends[0].unexplained_share > 0.99
    assert report.exit_code == 1
    pictured = [s for s in report.backends[0].segments if s.picture is not None]
    assert [s.id for s in pictured] == [first.segment]
    assert pictured[0].picture.tensor in pictured[0].outputs


def test_what_the_file_itself_makes_is_not_to_be_mended_at_the_runtime(run):
    model = _cnn()
    report = run(model, "ort", candidate=_changed(model, "body2.b", np.zeros_like))
    (first,) = report.findings
    assert first.noise == "implementation.attribute_ignored"  # the bias has no effect
    assert first.remedy is not None and "audit it against the model that" in first.remedy


@pytest.mark.parametrize("pooled_output", [False, True])
def test_a_wrong_shape_is_found_where_it_starts(run, pooled_output):
    """The candidate's pooling rounds up: one row and column more from there on."""
    model = _cnn()
    if pooled_output:  # a final output of the wrong shape, too
        model.graph.output.append(helper.make_tensor_value_info("p0", TensorProto.FLOAT, None))
        model.graph.output[1].type.tensor_type.shape.Clear()
    for node in model.graph.node:
        if node.op_type == "MaxPool":
            node.attribute.append(helper.make_attribute("pads", [0, 0, 0, 0]))
            node.attribute[0].ints[:] = [3, 3]
    rounding = copy.deepcopy(model)
    pool = next(n for n in rounding.graph.node if n.op_type == "MaxPool")
    pool.attribute.append(helper.make_attribute("ceil_mode", 1))
    report = run(model, "ort", candidate=rounding)
    first = report.findings[0]
    assert "MaxPool" in first.op_types
    # By its effect where the reference can go on from it, which depends on the layouts around it.
    assert first.severity in ("high", "critical")
    assert report.exit_code == 1


def test_shares_are_exact_and_pictures_left_out_on_request(run):
    model = _cnn()
    other = _changed(model, "body1.w", lambda w: w * 1.05)
    report = run(model, "ort", candidate=other, pictures=False)
    (backend,) = report.backends
    assert not any(s.picture for s in backend.segments)
    assert sum(share for _, share in backend.booked) == pytest.approx(1, abs=1e-4)
    categories = sum(c.share for c in backend.categories)
    assert categories + backend.unexplained_share == pytest.approx(1, abs=1e-6)
    assert report.findings[0].leave_one_in == pytest.approx(1, abs=0.05)


def test_half_precision_arithmetic_is_named(run):
    """The candidate computes one layer in float16: the cause is measured, not stated."""
    model = _cnn()
    other = copy.deepcopy(model)
    index, node = next((i, n) for i, n in enumerate(other.graph.node) if n.name == "body1")
    casts = []
    for i, name in enumerate(node.input):
        casts.append(helper.make_node("Cast", [name], [f"{name}.h"], to=TensorProto.FLOAT16))
        node.input[i] = f"{name}.h"
    back = helper.make_node("Cast", ["body1.h"], [node.output[0]], to=TensorProto.FLOAT)
    node.output[0] = "body1.h"
    nodes = list(other.graph.node)
    nodes[index : index + 1] = [*casts, node, back]
    del other.graph.node[:]
    other.graph.node.extend(nodes)
    report = run(model, "ort", candidate=other)
    first = report.findings[0]
    assert "body1" in first.nodes
    assert first.noise == "precision.fp16"
    assert first.explained > 0.99


def test_what_a_backend_hands_over_in_float16_is_no_rounding_of_a_float32_model(run):
    """TVM computes and hands over in float16 what a candidate has in it: sums as well."""
    model = _cnn()
    other = copy.deepcopy(model)
    for tensor in other.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for node in other.graph.node:
        node.input[:] = ["x.h" if name == "x" else name for name in node.input]
        node.output[:] = ["y.h" if name == "y" else name for name in node.output]
    first = helper.make_node("Cast", ["x"], ["x.h"], to=TensorProto.FLOAT16)
    last = helper.make_node("Cast", ["y.h"], ["y"], to=TensorProto.FLOAT)
    other.graph.node.insert(0, first)
    other.graph.node.append(last)
    report = run(model, "tvm", candidate=other, confirm=False)
    (backend,) = report.backends
    shares = {c.noise: c.share for c in backend.categories}
    assert shares["precision.fp16"] + shares["implementation.accumulation"] > 0.95
    convolution = next(s for s in backend.segments if "body1" in s.nodes)
    assert (convolution.noise, convolution.bit_identical) == ("precision.fp16", 1.0)
    assert convolution.floor < 1e-5 < convolution.introduced


def test_a_candidate_with_narrower_inputs_is_fed_as_it_takes_them(run):
    model = _cnn()
    other = copy.deepcopy(model)
    for node in other.graph.node:
        node.input[:] = ["wide" if name == "x" else name for name in node.input]
    other.graph.node.insert(0, helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT))
    other.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    whole = np.arange(3 * 32 * 32, dtype=np.float32).reshape(1, 1, 3, 32, 32) % 7
    report = run(model, "ort", candidate=other, data={"x": whole}, confirm=False)
    assert report.backends[0].status == "audited" and not report.findings
    assert "`x` is handed over as float16" in report.stimulus.notes[-1]
    other.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    with pytest.raises(UsageError, match="uint8"):
        run(model, "ort", candidate=other)


def test_rounding_that_the_model_makes_large_is_shown_where_it_grows(run):
    """Each step is right; one in a hundred of the numbers falls on another integer."""
    rng = np.random.default_rng(0)
    factor = rng.uniform(0.5, 1.5, 16).astype(np.float32)
    model = onnx_model(
        "(float[1, 16, 24, 24] x) => (float[1, 16, 24, 24] y) { "
        "c = Conv <pads = [1, 1, 1, 1]> (x, w) b = BatchNormalization(c, g, z, z, g) "
        "large = Mul(b, scale) i = Cast <to = 6> (large) m = Mod(i, seven) "
        "y = Cast <to = 1> (m) }",
        {
            "w": rng.standard_normal((16, 16, 3, 3)).astype(np.float32),
            "g": factor,
            "z": np.zeros(16, np.float32),
            "scale": np.float32(1e3),
            "seven": np.int32(7),
        },
        ir_version=9,
    )
    report = run(model, "ort")
    (backend,) = report.backends
    assert report.exit_code == 1 and not report.findings
    (said,) = [w for w in backend.warnings if w.startswith("No segment is above its floor")]
    assert "(Cast)" in said and "(Mod)" in said
    # What a segment rounds itself, to half precision say, is not what it was handed, grown.
    own = [replace(s, introduced=s.accumulated, inherited=0.0) for s in backend.segments]
    assert not list(summary._grown(own))


def test_several_samples_are_averaged(run, tmp_path):
    data = tmp_path / "x.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((3, 1, 3, 32, 32)).astype("f"))
    model = _cnn()
    report = run(model, "ort", candidate=_changed(model, "fc.w", lambda w: w * 1.01), data=data)
    assert report.stimulus.samples == 3
    assert report.findings[0].nodes[-1] == "fc"


def test_what_differs_from_run_to_run_is_blamed_on_nothing(run):
    """A random number, one of 100,000, decides how many there are, in what is made of them too."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        n (float[1] x) => (float[k] y, float[k] z) {
            r = RandomUniform <shape = [1], high = 100000.0> () many = Cast <to = 7> (r)
            e = Exp(x) y = Expand(e, many) s = Sigmoid(y) z = Mul(s, y) }""")
    (backend,) = (report := run(model, "ort")).backends
    assert backend.outputs[0].distance.mismatch and report.verdict == "fail"
    assert not report.findings
    assert {"r", "many", "y", "s"} & {o for s in backend.segments for o in s.outputs}


def test_nan_handling_is_audited_on_request(run, tmp_path):
    """A backend that turns NaN into a number is found; the reference passes NaN on."""
    graph = helper.make_graph(
        [helper.make_node("Exp", ["x"], ["a"], "exp"), helper.make_node("Neg", ["a"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    data = tmp_path / "x.npz"
    np.savez(data, x=np.asarray([0, 1, np.nan, np.inf], np.float32))
    clean = run(model, "ort", data=data, nonfinite=True)
    assert (clean.verdict, clean.findings) == ("pass", ())
    laundered = copy.deepcopy(model)
    laundered.graph.node[1].op_type = "Sign"
    found = run(model, "ort", candidate=laundered, data=data, nonfinite=True)
    assert found.findings[0].severity == "critical"
    assert found.exit_code == 1
    infinite = copy.deepcopy(model)
    infinite.graph.node[0].op_type = "Log"
    (backend,) = run(model, "ort", candidate=infinite, data=data, nonfinite=True).backends
    assert any("1 segment, from s1 on, was handed NaN" in said for said in backend.warnings)


def test_a_segment_that_was_handed_another_shape_was_handed_no_nan(run):
    """Its error cannot be measured against the reference, and the warning says why."""
    text = """(float[6, 2] x) => (float[N, 2] y) <int64[1] s = {{0}}, int64[1] e = {{{end}}}> {{
        a = Slice(x, s, e) y = Neg(a) }}"""
    model, candidate = (onnx_model(text.format(end=end), ir_version=9) for end in (5, 4))
    (backend,) = run(model, "ort", candidate=candidate).backends
    (said,) = [w for w in backend.warnings if "from s1 on" in w]
    assert "handed a tensor of another shape than the reference's, and passed it on" in said


def test_a_program_is_instrumented_once_even_with_nothing_to_observe(run, tmp_path, monkeypatch):
    model = onnx_model("(float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }", ir_version=9)
    data = tmp_path / "x.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((3, 1, 4)).astype("f"))
    asked = []
    original = Worker.call

    def counting(worker, do, *answer, **arguments):
        asked.append(do)
        return original(worker, do, *answer, **arguments)

    monkeypatch.setattr(Worker, "call", counting)
    assert run(model, "ov", data=data, options=OV_F32).exit_code == 0
    assert asked.count("capture") == 3
    assert asked.count("instrument") == 1


def test_a_body_whose_shapes_follow_from_its_inputs(run):
    """ONNX Runtime infers them before it runs: a segment must say what the whole model said."""
    body = helper.make_graph(
        nodes_of("sum = Add(state, item) copy = Identity(sum)"),
        "body",
        [onnx.ValueInfoProto(name="state"), onnx.ValueInfoProto(name="item")],
        [onnx.ValueInfoProto(name="sum"), onnx.ValueInfoProto(name="copy")],
    )
    for value in (*body.input, *body.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["items"]),
            helper.make_node("Relu", ["s"], ["start"]),
            helper.make_node(
                "Scan", ["start", "items"], ["end", "y"], body=body, num_scan_inputs=1
            ),
        ],
        "scan",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 2]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [2]),
        ],
        [
            helper.make_tensor_value_info("end", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 2]),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    report = run(helper.make_model(graph, opset_imports=opset, ir_version=9), "ort")
    (backend,) = report.backends
    assert not report.gaps
    assert {"items", "start"} <= {n for s in backend.segments for n in s.outputs}


def test_an_input_that_takes_no_noise(run):
    """Cubic Resize refuses scales other than 1 outside the plane: noise cannot be added to them."""

    def resize(coefficient):
        node = helper.make_node(
            "Resize", ["x", "", "scales"], ["y"], mode="cubic", cubic_coeff_a=coefficient
        )
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4]),
            helper.make_tensor_value_info("scales", TensorProto.FLOAT, [4]),
        ]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 8, 8])]
        graph = helper.make_graph([node], "g", inputs, outputs)
        opset = [helper.make_opsetid("", 19)]
        return helper.make_model(graph, opset_imports=opset, ir_version=9)

    rng = np.random.default_rng(0)
    data = {"x": rng.random((1, 1, 1, 4, 4), np.float32)}
    data["scales"] = np.array([[1, 1, 2, 2]], np.float32)
    report = run(resize(-0.5), "ort", candidate=resize(-0.75), data=data)
    assert report.findings[0].noise == "inference.upsample"
    assert report.backends[0].input_control is None
    assert not report.gaps


def test_names_that_an_optimiser_kept_for_other_tensors_are_no_divergence(run):
    """As onnxsim and ONNX Runtime write a linear layer: flat, with the bias under the old name."""

    def linear(product, rows, *rest):
        rng = np.random.default_rng(4)
        w, b = rng.standard_normal((8, 8)).astype("f4"), rng.standard_normal(8).astype("f4") * 9
        sizes = [("flat", np.array([4, 8])), ("full", np.array([1, 4, 8]))]
        weights = [numpy_helper.from_array(v, n) for n, v in (("w", w), ("b", b), *sizes)]
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8]) for n in "xy")
        relu = helper.make_node("Relu", ["s"], ["r"])
        last = helper.make_node("MatMul", ["r", "w"], ["t"])
        flat = [helper.make_node("Reshape", [last.output[0], "full"], ["y"])]
        graph = helper.make_graph(
            [*rows, product, *rest, relu, last, *flat], "g", [x], [y], weights
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    add = helper.make_node("Add", ["p", "b"], ["s"])
    written = linear(helper.make_node("MatMul", ["x", "w"], ["p"]), [], add)
    rows = helper.make_node("Reshape", ["x", "flat"], ["rows"])
    optimised = linear(
        helper.make_node("Gemm", ["rows", "w", "b"], ["p"]),
        [rows],
        helper.make_node("Identity", ["p"], ["s"]),
    )
    report = run(written, "ort", candidate=optimised, options={"ort": {"level": "disable"}})
    assert report.findings == () and report.exit_code == 0
    (skipped,) = [s for s in report.backends[0].fidelity.skipped if s.tensor == "p"]
    assert "not what its name says" in skipped.reason or "not confirmed" in skipped.reason
    off = _changed(optimised, "b", lambda b: b * np.float32(1.01))
    report = run(written, "ort", candidate=off, options={"ort": {"level": "disable"}})
    assert report.findings[0].noise is None and "Add" in report.findings[0].op_types


def test_integers_under_a_floats_name_are_no_divergence(run):
    """ONNX Runtime moves a QuantizeLinear over an Identity, and with it the names."""

    def quantised(identity):
        rng = np.random.default_rng(5)
        nodes, weights = (
            [],
            [("s", np.float32(0.05)), ("z", np.int8(-128)), ("t", np.float32(0.01))],
        )
        weights.append(("o", np.int8(0)))

        def fake(read, name):
            nodes.append(helper.make_node("QuantizeLinear", [read, "s", "z"], [f"{name}_q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [name]))
            return name

        read = fake("x", "x_d")
        for layer in range(3):
            w = rng.integers(-8, 8, (8, 8, 3, 3)).astype(np.int8)
            weights.append((f"w{layer}", w))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"w{layer}", "t", "o"], [f"w{layer}_d"])
            )
            made = f"c{layer}"
            raw = f"{made}_raw" if identity and layer == 1 else made
            nodes.append(helper.make_node("Conv", [read, f"w{layer}_d"], [raw], pads=[1] * 4))
            if raw != made:
                nodes.append(helper.make_node("Identity", [raw], [made]))
            read = fake(made, f"{made}_d")
        nodes.append(helper.make_node("Relu", [read], ["y"]))
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8, 8])],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in weights],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    report = run(quantised(False), "ort", candidate=quantised(True))
    assert report.findings == ()
    (backend,) = report.backends
    assert not backend.fidelity.skipped
    observed = {name for segment in backend.segments for name in segment.outputs}
    assert {"c0_d_q", "c1_d_q", "c2_d_q"} <= observed  # integers, by their own names


def test_a_piece_that_cannot_run_alone_is_joined_to_what_feeds_it(run, monkeypatch):
    from auditor.replays.replay import Replayer, ReplayError

    plain = Replayer.run

    def refuse(self, cut, values):
        if cut.inputs == ("p0",):
            raise ReplayError(cut, "replayed", RuntimeError("not on its own"))
        return plain(self, cut, values)

    monkeypatch.setattr(Replayer, "run", refuse)
    report = run(_cnn(), "ort")
    (backend,) = report.backends
    assert backend.status == "audited"
    assert not any("p0" in s.inputs for s in backend.segments)
    assert any("not on its own" in one.reason for one in backend.fidelity.skipped)


def test_a_reference_that_runs_only_whole_is_compared_at_the_outputs(run, monkeypatch):
    from auditor.replays.replay import Replayer, ReplayError

    def refuse(self, cut, values):
        raise ReplayError(cut, "replayed", RuntimeError("not on its own"))

    monkeypatch.setattr(Replayer, "run", refuse)
    report = run(_cnn(), "ort")
    (backend,) = report.backends
    assert backend.status == "audited"
    assert backend.outputs[0].distance.relative_l2 < 1e-5
    assert any("not on its own" in gap.reason for gap in report.gaps)


def test_a_missing_operator_is_a_gap_and_the_others_go_on(run):
    """TVM has no converter for LSTM."""
    rng = np.random.default_rng(0)
    weights = [("w", (1, 16, 4)), ("r", (1, 16, 4))]
    graph = helper.make_graph(
        nodes_of("a = Relu(x) [lstm] y = LSTM <hidden_size = 4> (a, w, r)"),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 1, 1, 4])],
        [numpy_helper.from_array(rng.standard_normal(s).astype("f"), n) for n, s in weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    report = run(model, "ort", "tvm")
    ort, tvm = report.backends
    assert ort.status == "audited"
    assert tvm.status == "gap"
    assert "LSTM" in tvm.gap.reason
    assert (report.verdict, report.exit_code) == ("incomplete", 3)


def test_tensorrt_is_built_and_says_that_it_did_not_run(run):
    report = run(_cnn(), "trt")
    (backend,) = report.backends
    if backend.status == "audited":
        assert backend.fidelity.program_unchanged
        return
    assert backend.status == "built", backend.gap
    assert "no CUDA device" in backend.gap.reason
    assert backend.provenance.kernels
    assert report.exit_code == 3


@pytest.mark.parametrize("stage", ["start", "build", "run", "instrument", "capture"])
def test_a_backend_that_dies_is_a_gap_with_its_stage(run, monkeypatch, stage):
    original = Worker.call

    def dying(worker, do, *answer, **arguments):
        if worker.backend == "ov" and do == ("availability" if stage == "start" else stage):
            os.kill(worker._process.pid, signal.SIGSEGV)
        return original(worker, do, *answer, **arguments)

    monkeypatch.setattr(Worker, "call", dying)
    report = run(_cnn(), "ort", "ov")
    ort, ov = report.backends
    assert ort.status == "audited"
    assert ov.status == "gap"
    assert ov.gap.stage == stage
    assert "SIGSEGV" in ov.gap.reason
    assert ov.gap in report.gaps
    assert report.exit_code == 3


def test_a_backend_that_refuses_probes_is_compared_at_its_outputs(run, monkeypatch):
    original = Worker.call

    def refusing(worker, do, *answer, **arguments):
        if worker.backend == "ov" and do == "instrument":
            raise BackendError("no probes today", stage="instrument")
        return original(worker, do, *answer, **arguments)

    monkeypatch.setattr(Worker, "call", refusing)
    report = run(_cnn(), "ort", "ov")
    ov = report.backends[1]
    assert ov.status == "audited" and ov.outputs and len(ov.segments) == 1
    assert ov.fidelity is None  # nothing was captured, so that nothing is said to be proved
    assert ov.gap in report.gaps and "outputs only: no probes today" in ov.gap.reason
    assert report.exit_code == 3 or report.findings


@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_a_real_crash_is_a_gap(run, op):
    """The quotient of int8's lowest number and -1 fits no int8: x86 traps, and TVM dies of it."""
    ports = [helper.make_tensor_value_info(name, TensorProto.INT8, [2]) for name in "aby"]
    graph = helper.make_graph([helper.make_node(op, ["a", "b"], ["y"])], "g", ports[:2], ports[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = {"a": np.array([[-128, 7]], np.int8), "b": np.array([[-1, 2]], np.int8)}
    tvm, ort = run(model, "tvm", "ort", data=data).backends
    assert (tvm.gap.stage, ort.status) == ("run", "audited")
    assert "SIGFPE" in tvm.gap.reason


def test_a_backend_that_hangs_is_a_gap(run, monkeypatch):
    original = Worker.call

    def hanging(worker, do, *answer, **arguments):
        if worker.backend == "ov" and do == "build":
            os.kill(worker._process.pid, signal.SIGSTOP)
            arguments["timeout"] = 1
        return original(worker, do, *answer, **arguments)

    monkeypatch.setattr(Worker, "call", hanging)
    report = run(_cnn(), "ort", "ov")
    assert "did not answer within 1 s" in report.backends[1].gap.reason
    assert report.backends[0].status == "audited"


def test_the_model_is_not_touched(run, tmp_path):
    run(_cnn(), "ort")
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["model.onnx"]


def test_a_branch_whose_garbage_differs_between_runs(tmp_path: Path) -> None:
    """OpenVINO leaves the output of a branch unwritten where its shape is another one."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 13]>
        g (float[1,8,8,8] x, bool yes) => (float[1,1,8,8] y) <float[1,1,1,1] w = {2}> {
            r = If (yes) <
                then_branch = t () => (a) { a = ReduceL1 <axes = [1]> (x) },
                else_branch = e () => (b) { b = ReduceMax <axes = [1]> (x) }>
            y = Conv (r, w) }""")
    onnx.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "m.npz", x=x, yes=np.array(True))
    options = AuditOptions(
        backends=(BackendSpec("ov"),),
        data=tmp_path / "m.npz",
        options={"ov": {"INFERENCE_PRECISION_HINT": "f32"}},
        confirm=False,
    )
    report = audit(tmp_path / "m.onnx", options, noises=discovery.noises(), progress=Silent())
    (finding,) = report.findings
    assert finding.op_types == ("If",) and finding.noise == "implementation.opset_semantics"


@pytest.mark.parametrize("shown", [True, False])
def test_a_slight_error_of_integers_counts_where_an_output_shows_it(
    tmp_path: Path, shown: bool
) -> None:
    """OpenVINO takes the largest of integers in float32."""
    last = "m = Sub(r, k)" if shown else "m = Identity(r)"
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 13]>
        g (int32[1,8] x) => (float[1,1] y, int32[1,1] r) <int32 k = {{1999999984}}> {{
            r = ReduceMax <axes = [1]> (x) {last} y = Cast <to = 1> (m) }}""")
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "m.npz", x=np.arange(1999999984, 1999999992, dtype=np.int32)[None])
    options = AuditOptions(backends=(BackendSpec("ov"),), data=tmp_path / "m.npz", confirm=False)
    report = audit(tmp_path / "m.onnx", options, noises=discovery.noises(), progress=Silent())
    nodes = [finding.op_types for finding in report.findings]
    assert nodes == ([("ReduceMax",)] if shown else [])
    assert report.backends[0].segments[0].introduced > 0
