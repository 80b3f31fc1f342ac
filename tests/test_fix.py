"""``audit fix``: rewrites against the reference, and real differences brought within a limit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.fixes._view import View
from auditor.replays import sessions
from tests.helpers import ROOT, audit_in

F, H, U = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8


audit = partial(audit_in, ROOT)


def model_of(node: onnx.NodeProto, inputs: dict[str, Any], **constants: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    kind = {np.dtype(np.float32): F, np.dtype(np.float16): H, np.dtype(np.uint8): U}
    graph = helper.make_graph(
        [node],
        "g",
        [value(n, kind.get(v.dtype, TensorProto.INT8), v.shape) for n, v in inputs.items()],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 19)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


def rewritten(id: str, model: onnx.ModelProto, feeds: dict[str, Any]) -> onnx.ModelProto | None:
    (fix,) = (f for f in discovery.fixes() if f.id == id)
    (y,) = sessions.session(model, 1).run(None, feeds)
    view = View(model, feeds | {"y": y})
    nodes = fix.rewrite(model.graph.node[0], view)
    if nodes is None:
        return None
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    changed.graph.initializer.extend(view.initializers)
    return changed


def compare(model: onnx.ModelProto, changed: onnx.ModelProto, feeds: dict[str, Any]) -> float:
    one, other = (sessions.session(m, 1).run(None, feeds)[0] for m in (model, changed))
    assert one.shape == other.shape and one.dtype == other.dtype
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0))


# --- the rewrites --------------------------------------------------------------------------------


@given(
    st.sampled_from(["MaxPool", "AveragePool"]),
    st.integers(5, 12),
    st.integers(5, 12),
    st.integers(2, 3),
    st.integers(1, 3),
    st.integers(0, 1),
    st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER"]),
    st.booleans(),
)
@settings(max_examples=80)
def test_pooling_with_explicit_padding_is_the_same(
    op: str, height: int, width: int, kernel: int, stride: int, pad: int, auto: str, counted: bool
) -> None:
    assume(stride <= kernel)  # ONNX Runtime refuses the negative padding of SAME otherwise
    given: dict[str, Any] = {"kernel_shape": [kernel, kernel], "strides": [stride, stride]}
    if auto == "NOTSET":
        given |= {"ceil_mode": 1, "pads": [pad] * 4}
    else:
        given |= {"auto_pad": auto}
    if op == "AveragePool":
        given |= {"count_include_pad": int(counted)}
    x = np.random.default_rng(0).standard_normal((1, 2, height, width)).astype(np.float32)
    model = model_of(helper.make_node(op, ["x"], ["y"], **given), {"x": x})
    changed = rewritten("explicit-padding", model, {"x": x})
    assume(changed is not None)
    assert changed is not None
    used = {a.name for a in changed.graph.node[-1].attribute}
    assert not used & {"ceil_mode", "auto_pad"}
    assert compare(model, changed, {"x": x}) <= 1e-6


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("how", ["half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("size", [None, (1, 2, 7, 13)])
def test_a_resize_is_two_products(mode: str, how: str, size: tuple[int, ...] | None) -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 5, 9)).astype(np.float32)
    constants: dict[str, Any] = {"s": np.array([1, 1, 1.3, 1.7], np.float32)}
    inputs = ["x", "", "s"]
    if size is not None:
        constants, inputs = {"s": np.array(size)}, ["x", "", "", "s"]
    node = helper.make_node("Resize", inputs, ["y"], mode=mode, coordinate_transformation_mode=how)
    model = model_of(node, {"x": x}, **constants)
    changed = rewritten("resize-matrix", model, {"x": x})
    assert changed is not None and {n.op_type for n in changed.graph.node} == {"MatMul"}
    assert compare(model, changed, {"x": x}) <= 1e-5


def test_a_mask_of_the_lowest_float_is_finite_in_bfloat16() -> None:
    lowest = np.finfo(np.float32).min
    x = np.array([[0, 1, 1]], np.float32)
    model = model_of(helper.make_node("Mul", ["x", "k"], ["y"]), {"x": x}, k=np.float32([lowest]))
    changed = rewritten("finite-masks", model, {"x": x})
    assert changed is not None
    (mask,) = sessions.session(changed, 1).run(None, {"x": x})
    narrow = (mask.view(np.uint32) >> 16 << 16).view(np.float32)
    assert np.isfinite(mask).all() and np.array_equal(narrow, mask)
    kept = model_of(helper.make_node("Mul", ["x", "k"], ["y"]), {"x": x}, k=np.float32([-1e9]))
    assert rewritten("finite-masks", kept, {"x": x}) is None


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_narrow_integers_wrap(op: str, kind: Any) -> None:
    info = np.iinfo(kind)
    every = np.arange(info.min, info.max + 1)
    a, b = (v.astype(kind).reshape(-1) for v in np.meshgrid(every, every))
    model = model_of(helper.make_node(op, ["a", "b"], ["y"]), {"a": a, "b": b})
    changed = rewritten("wide-integers", model, {"a": a, "b": b})
    assert changed is not None
    with np.errstate(over="ignore"):
        wanted = {"Add": a + b, "Sub": a - b, "Mul": a * b}[op]
    np.testing.assert_array_equal(
        sessions.session(changed, 1).run(None, {"a": a, "b": b})[0], wanted
    )


def test_weights_of_half_precision_go_to_single_as_well() -> None:
    rng = np.random.default_rng(2)
    x, w = (rng.standard_normal(s).astype(np.float16) for s in ((1, 64, 8, 8), (8, 64, 3, 3)))
    model = model_of(helper.make_node("Conv", ["x", "w"], ["y"]), {"x": x}, w=w)
    changed = rewritten("single-precision", model, {"x": x})
    assert changed is not None
    assert [n.op_type for n in changed.graph.node] == ["Cast", "Cast", "Conv", "Cast"]
    assert compare(model, changed, {"x": x}) <= 0.1  # a few steps of float16 near 50


def test_half_precision_is_computed_in_single() -> None:
    x = np.full((1, 64), 0.1, np.float16)
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)
    model = model_of(node, {"x": x}, axes=np.array([1]))
    changed = rewritten("single-precision", model, {"x": x})
    assert changed is not None
    assert [n.op_type for n in changed.graph.node] == ["Cast", "ReduceSum", "Cast"]
    assert compare(model, changed, {"x": x}) <= 4e-3  # one step of float16 at 6.4


@pytest.mark.parametrize(
    ("op", "given"),
    [("HardSwish", {}), ("Softplus", {}), ("Celu", {"alpha": 2.0}), ("Mish", {}), ("Elu", {})],
)
def test_an_operator_is_written_out_as_specified(op: str, given: dict[str, Any]) -> None:
    x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(1, 64)
    model = model_of(helper.make_node(op, ["x"], ["y"], **given), {"x": x})
    changed = rewritten("written-out", model, {"x": x})
    assert changed is not None and op not in {n.op_type for n in changed.graph.node}
    assert compare(model, changed, {"x": x}) <= 1e-5


def test_an_operator_with_parameters_is_written_out() -> None:
    x = np.random.default_rng(8).standard_normal((2, 3, 16)).astype(np.float32)
    scale = np.linspace(0.5, 2, 16, dtype=np.float32)
    node = helper.make_node("LayerNormalization", ["x", "scale"], ["y"], epsilon=1e-3)
    model = model_of(node, {"x": x}, scale=scale)
    changed = rewritten("written-out", model, {"x": x})
    assert changed is not None and len(changed.graph.node) > 3
    assert compare(model, changed, {"x": x}) <= 1e-5


def test_what_is_not_theirs_is_left_alone() -> None:
    x = np.ones((1, 1, 4, 4), np.float32)
    for op, options in (("Relu", {}), ("MaxPool", {"kernel_shape": [2, 2]})):
        model = model_of(helper.make_node(op, ["x"], ["y"], **options), {"x": x})
        for fix in discovery.fixes():
            if fix.id != "written-out":
                assert rewritten(fix.id, model, {"x": x}) is None


# --- by command, on the real runtimes -------------------------------------------------------------


def report_of(model: onnx.ModelProto, path: Path, backend: str, *more: object) -> Path:
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    report = path.with_suffix(".json")
    done = audit(path, "--backends", backend, "-o", report, *more)
    assert done.returncode == 1, done.stdout + done.stderr
    return report


def averaging() -> onnx.ModelProto:
    node = helper.make_node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1],
        ceil_mode=1, count_include_pad=1,
    )  # fmt: skip
    return model_of(node, {"x": np.ones((1, 3, 7, 7), np.float32)})


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on ``averaging``, beside its model."""
    return report_of(averaging(), tmp_path_factory.mktemp("pooled") / "pool.onnx", "ov")


def test_a_fix_is_found_verified_and_written(pooled: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.onnx"
    done = audit("fix", pooled, "-o", fixed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "explicit padding" in done.stdout
    again = audit(fixed, "--backends", "ov")
    assert again.returncode == 0, again.stdout
    beside = audit(pooled.with_suffix(".onnx"), "--candidate", fixed, "--backends", "ort,ov")
    assert beside.returncode == 0, beside.stdout


def test_layers_stay_in_single_precision_in_a_file_that_ships(tmp_path: Path) -> None:
    """On top of a pooling written anew, which alone is not enough."""
    pytest.importorskip("openvino")
    rng = np.random.default_rng(3)
    weights = [(rng.standard_normal((64, 64)) / 8).astype(np.float32) for _ in range(3)]
    pool, shape = averaging().graph.node[0], np.array([3, 64])
    pool.input[0], pool.output[0] = "x", "pooled"
    nodes, name = [pool, helper.make_node("Reshape", ["pooled", "shape"], ["t"])], "t"
    for number in range(3):
        nodes += [
            helper.make_node("MatMul", [name, f"w{number}"], [f"m{number}"]),
            helper.make_node("Tanh", [f"m{number}"], [f"t{number}"]),
        ]
        name = f"t{number}"
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", F, [1, 3, 15, 15])],
        [value("t2", F, [3, 64])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
        + [numpy_helper.from_array(shape, "shape")],
    )
    opset = [helper.make_opsetid("", 19)]
    path, report = tmp_path / "net.onnx", tmp_path / "net.json"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    first = audit(path, "--backends", "ov", "-o", report, "--no-confirm")
    (backend,) = json.loads(report.read_text())["backends"]
    if first.returncode == 0 or "bf16" not in str(backend["categories"]):
        pytest.skip("OpenVINO computes in float32 on this processor")
    fixed = tmp_path / "net.xml"
    done = audit("fix", report, "--to", 2e-3, "-o", fixed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ceil mode or auto_pad; " in done.stdout and "layers in float32" in done.stdout
    assert fixed.exists() and fixed.with_suffix(".bin").exists()
    more = ("--no-confirm", "--format", "json")
    again = audit(path, "--backends", "ov", "--artifact", f"ov={fixed}", *more)
    assert json.loads(again.stdout)["backends"][0]["outputs"][0]["relative_l2"] <= 2e-3


def test_the_limit_is_that_of_the_policy(pooled: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[tolerance.ov]\nrelative_l2 = 0.9\n")
    within = audit("fix", pooled, "--policy", policy)
    assert within.returncode == 0 and "within the limit as it is" in within.stdout, within.stderr
    policy.write_text("[tolerance.ov]\nrelative_l2 = 1e-5\n")
    assert "to 1.0e-5" in audit("fix", pooled, "--policy", policy).stdout


def test_findings_on_another_backend_are_not_forgotten(pooled: Path, tmp_path: Path) -> None:
    report = json.loads(pooled.read_text())
    (backend,), (finding, *_) = report["backends"], report["findings"]
    report["backends"].append({**backend, "id": "ov:GPU"})
    report["findings"].append({**finding, "backend": "ov:GPU", "rank": 2})
    both = tmp_path / "both.json"
    both.write_text(json.dumps(report))
    said = "Findings on ov:GPU are left"
    assert said in " ".join(audit("fix", both, "--to", 0.9).stdout.split())
    assert said not in " ".join(audit("fix", both, "--to", 0.9, "--backend", "ov").stdout.split())


def test_a_report_of_another_program_is_told_from_what_is_built_here(
    pooled: Path, tmp_path: Path
) -> None:
    """One from a processor on which OpenVINO has another default."""
    report = json.loads(pooled.read_text())
    made = report["backends"][0]["provenance"]
    own = audit("fix", pooled, "--to", 0.9)
    assert "not the program of the report" not in own.stdout, own.stdout
    made["options"]["INFERENCE_PRECISION_HINT"], made["device"] = "f64", "a processor"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report))
    said = " ".join(audit("fix", other, "--to", 0.9).stdout.split())
    assert " instead of f64: this is not the program of the report on a processor" in said


def test_layers_of_a_half_precision_model_go_to_single(tmp_path: Path) -> None:
    """TVM sums float16 in float16; 512 tenths stall there."""
    x = np.full((1, 4096), 0.1, np.float16)
    data = tmp_path / "x.npz"
    np.savez(data, x=x)
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)
    model = model_of(node, {"x": x}, axes=np.array([1]))
    report = report_of(model, tmp_path / "sum.onnx", "tvm", "--data", data)
    done = audit("fix", report)
    assert done.returncode == 0 and "float32 inside these layers" in done.stdout, done.stdout


def test_neighbours_in_single_precision_hand_it_over(tmp_path: Path) -> None:
    """A product that overflows float16 before it is divided again."""
    x = np.full((1, 8), 300, np.float16)
    data = tmp_path / "x.npz"
    np.savez(data, x=x)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["a"]), helper.make_node("Div", ["a", "k"], ["y"])],
        "g",
        [value("x", H, [1, 8])],
        [value("y", H, [1, 8])],
        [numpy_helper.from_array(np.float16(300), "k")],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    report = report_of(model, tmp_path / "mul.onnx", "tvm", "--data", data)
    fixed = tmp_path / "fixed.onnx"
    done = audit("fix", report, "-o", fixed)
    assert done.returncode == 0, done.stdout
    kinds = [node.op_type for node in onnx.load(fixed).graph.node]
    assert kinds[kinds.index("Mul") + 1 :].count("Cast") <= 2 and "Div" in kinds


def test_nothing_is_built_where_the_report_has_nothing_against_it(tmp_path: Path) -> None:
    """A tenth of what rounding does is no aim; nothing reaches it, which is no failure."""
    x = np.ones((1, 3, 8, 8), np.float32)
    path, report = tmp_path / "tanh.onnx", tmp_path / "tanh.json"
    model = model_of(helper.make_node("Tanh", ["x"], ["y"]), {"x": x})
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    assert audit(path, "--backends", "ort", "-o", report).returncode == 0
    done = audit("fix", report)
    assert done.returncode == 0 and "nothing against it" in done.stdout, done.stdout
    assert "nothing: it is within the limit as it is" in done.stdout


def test_a_limit_that_nothing_reaches_is_said(tmp_path: Path) -> None:
    """OpenVINO's exponential of NaN is infinite in whatever operator set it is written."""
    x = np.array([np.nan, 1], np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    model = model_of(helper.make_node("Exp", ["x"], ["y"]), {"x": x})
    more = ("--data", tmp_path / "x.npz", "--allow-nonfinite")
    report = report_of(model, tmp_path / "exp.onnx", "ov", *more)
    done = audit("fix", report)
    assert done.returncode == 1 and "nothing" in done.stdout, done.stdout


def test_bad_requests_are_named(pooled: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.onnx"
    taken.write_bytes(b"mine")
    for arguments, said in (
        (["--backend", "tvm"], "compares no backend `tvm`"),
        (["-o", taken], "is no new .onnx or .xml file"),
        (["-o", tmp_path / "x.txt"], "is no new .onnx or .xml file"),
    ):
        done = audit("fix", pooled, *arguments)
        assert done.returncode == 2 and said in done.stderr
    assert taken.read_bytes() == b"mine"
    assert audit("fix", pooled, "--to", 9).stdout.count("within the limit as it is") == 1
    changed = tmp_path / "changed.onnx"
    other = onnx.load(pooled.with_suffix(".onnx"))
    other.producer_name = "another"
    onnx.save(other, changed)
    moved = tmp_path / "moved.json"
    moved.write_text(pooled.read_text().replace(str(pooled.with_suffix(".onnx")), str(changed)))
    assert "has changed since" in audit("fix", moved).stderr
