"""The OpenVINO backend: what it compiles, what it refuses, and what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import backends.ov as ov_backend
from auditor.errors import BackendError, UsageError
from auditor.records.backend import BuildRequest
from backends.ov import BACKEND
from tests.backends.openvino_models import (
    F32,
    X,
    build,
    info,
    precision_of,
    reference,
    residual_net,
    save,
)
from tests.helpers import nodes_of

if TYPE_CHECKING:
    from auditor.ports import Arrays

openvino = pytest.importorskip("openvino")


def test_outputs_that_are_inputs_or_share_a_tensor(tmp_path: Path) -> None:
    nodes = nodes_of("same = Identity(x) r = Relu(x) alias = Identity(r) n = Neg(alias)")
    names = ("same", "n", "alias", "r")
    path = save(tmp_path / "m.onnx", nodes, [info("x", 1, 4)], [info(n, 1, 4) for n in names])
    x = np.array([[-1, 2, -3, 4]], np.float32)
    built = build(path)
    relu = np.maximum(x, 0)
    expected = {"same": x, "n": -relu, "alias": relu, "r": relu}
    for outputs in (built.run({"x": x}), built.instrument({"x": x}).run({"x": x}).outputs):
        assert outputs.keys() == expected.keys()
        assert all(np.array_equal(outputs[n], expected[n]) for n in expected)


def test_texts_beside_numbers_are_left_out(tmp_path: Path) -> None:
    nodes = nodes_of(
        "i = ArgMax <axis = -1, keepdims = 0> (x) label = Gather(names, i) y = Relu(x)"
    )
    outputs = [info("label", 2, dtype=TensorProto.STRING), info("y", 2, 2)]
    weights = (helper.make_tensor("names", TensorProto.STRING, [2], [b"cat", b"dog"]),)
    path = save(tmp_path / "m.onnx", nodes, [info("x", 2, 2)], outputs, weights)
    feeds: Arrays = {"x": np.array([[1, -2], [-3, 4]], np.float32)}
    built = build(path)
    for made in (built.run(feeds), built.instrument(feeds).run(feeds).outputs):
        assert made.keys() == {"y"} and np.array_equal(made["y"], [[1, 0], [0, 4]])


@pytest.mark.parametrize("op_type", ["Sum", "Dropout"])
def test_an_input_that_a_dropped_operator_renames(tmp_path: Path, op_type: str) -> None:
    nodes = [helper.make_node(op_type, ["x"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [info("x", 2)], [info("y", 2)])
    feeds: Arrays = {"x": np.array([1, 2], np.float32)}
    assert np.array_equal(build(path).run(feeds)["y"], feeds["x"])


def test_a_single_node_has_nothing_to_observe(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    path = save(tmp_path / "m.onnx", [node], [info("x", 1, 4)], [info("y", 1, 4)])
    made = build(path).instrument({"x": np.ones((1, 4), np.float32)})
    assert made.probes == made.skipped == () and made.program_unchanged and not made.rebuilt


def test_integers_keep_their_type_and_their_narrowing_is_said(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["i", "i"], ["d"]), helper.make_node("Mul", ["d", "i"], ["y"])]
    ints = TensorProto.INT64
    path = save(tmp_path / "m.onnx", nodes, [info("i", 3, dtype=ints)], [info("y", 3, dtype=ints)])
    i = np.array([1, -2, 3], np.int64)
    built = build(path)
    capture = built.instrument({"i": i}).run({"i": i})
    assert capture.outputs["y"].dtype == np.int64
    assert capture.outputs["y"].tolist() == [2, 8, 18]
    assert any("64-bit integers are computed in 32 bits" in n for n in built.provenance.notes)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.UINT16])
def test_types_that_a_probe_would_not_show_are_left_out(tmp_path: Path, kind: int) -> None:
    """NumPy has no 8-bit floats, and 16 bits that the program holds in 32 would be wrapped."""
    nodes = nodes_of(f"r = Relu(x) narrow = Cast <to = {kind}> (r) y = Cast <to = 1> (narrow)")
    path = save(tmp_path / "m.onnx", nodes, [info("x", 1, 4)], [info("y", 1, 4)])
    made = build(path, options=F32).instrument({"x": np.ones((1, 4), np.float32)})
    assert [s.tensor for s in made.skipped] == ["narrow"]
    assert "narrow" not in {p.tensor for p in made.probes}


def test_dynamic_shapes_are_fixed_and_said(tmp_path: Path) -> None:
    path = residual_net(tmp_path / "m.onnx", height="h")
    built = build(path, shapes={"x": (1, 3, 32, 32)})
    assert "The model was compiled at these static shapes: x: 1x3x32x32." in built.provenance.notes
    assert built.instrument(X).program_unchanged


# --- what goes wrong -------------------------------------------------------------------------


def test_unknown_property_names_the_closest(residual: Path) -> None:
    with pytest.raises(UsageError, match="INFERENCE_PRECISION") as caught:
        build(residual, options={"INFERENCE_PRECISION": "f32"})
    assert "INFERENCE_PRECISION_HINT" in caught.value.hint


def test_impossible_value_of_a_property(residual: Path) -> None:
    with pytest.raises(UsageError, match="INFERENCE_PRECISION_HINT"):
        build(residual, options={"INFERENCE_PRECISION_HINT": "f99"})


def test_a_precision_the_device_lacks_is_said(residual: Path) -> None:
    built = build(residual, options={"INFERENCE_PRECISION_HINT": "bf16"})
    if precision_of(built) == "bf16":
        pytest.skip("this CPU computes in bf16")
    said = "bf16 was asked for; this device computes in f32 instead."
    assert built.provenance.denied == (said,)


def test_that_other_processors_compute_otherwise_by_default_is_said(residual: Path) -> None:
    capable = set(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    said = any("has neither bf16 nor f16" in n for n in build(residual).provenance.notes)
    assert said == capable.isdisjoint(("BF16", "FP16"))
    chosen = build(residual, options={"INFERENCE_PRECISION_HINT": "f32"}).provenance.notes
    assert not any("by default" in note for note in chosen)


def test_unknown_device_lists_those_there_are(residual: Path) -> None:
    with pytest.raises(UsageError, match="NPU9") as caught:
        build(residual, device="NPU9")
    assert "CPU" in caught.value.hint


def test_unsupported_operator_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Foo", ["x"], ["y"], domain="my.dom")
    path = save(
        tmp_path / "m.onnx", [node], [info("x", 1, 4)], [info("y", 1, 4)], domains=("my.dom",)
    )
    with pytest.raises(BackendError, match=r"my\.dom\.Foo") as caught:
        build(path)
    assert caught.value.stage == "build" and caught.value.hint


def test_a_model_that_cannot_be_compiled_is_no_fault_of_an_option(tmp_path: Path) -> None:
    node = helper.make_node(
        "LSTM",
        ["x", "w", "r"],
        ["y"],
        hidden_size=4,
        activations=["Sigmoid", "Relu", "Softsign"],
    )
    weights = tuple(
        numpy_helper.from_array(np.ones((1, 16, 4), np.float32), name) for name in ("w", "r")
    )
    ends = [info("x", 3, 1, 4)], [info("y", 3, 1, 1, 4)]
    path = save(tmp_path / "m.onnx", [node], *ends, weights)
    with pytest.raises(BackendError, match="softsign"):
        build(path, options=F32)


def test_failure_while_running_is_told(residual: Path) -> None:
    with pytest.raises(BackendError) as caught:
        build(residual).run({"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert caught.value.stage == "run"


def test_available_without_telemetry() -> None:
    code = (
        "import sys; from backends.ov import BACKEND; a = BACKEND.availability();"
        "assert a.available and a.devices[0].id == '', a;"
        "assert {'f32', 'int8'} <= set(a.devices[0].precisions), a;"
        "assert 'openvino_telemetry' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(ov_backend.__file__).parents[1]
    )


def test_efficientnet(efficientnet: Path) -> None:
    with np.load(efficientnet.with_suffix(".npz")) as data:
        feeds = {name: data[name][0] for name in data.files}
    built = build(efficientnet)
    made = built.instrument(feeds)
    assert made.program_unchanged
    assert len(made.probes) + 1 >= 50, made.skipped


def test_what_the_device_replaces_can_be_kept_too(tmp_path: Path) -> None:
    """A resize, and a PReLU behind a product, whose marks the device would lose."""
    rng = np.random.default_rng(5)
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "s": (8, 1, 1), "d": (8, 8), "e": (8,), "t": (8,)}
    values = {name: rng.standard_normal(shape) / 3 for name, shape in shapes.items()}
    values |= {"z": np.array([1, 1, 2, 2])}
    nodes = nodes_of(
        "c = Conv(x, w, b) p = PRelu(c, s) "
        'r = Resize <mode = "nearest", nearest_mode = "floor"> (p, , z) '
        "m = ReduceMax <axes = [2, 3], keepdims = 0> (r) g = Gemm <transB = 1> (m, d, e) "
        "q = PRelu(g, t) y = Gemm <transB = 1> (q, d, e)"
    )
    weights = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    ins, outs = [info("x", "batch", 3, 32, 32)], [info("y", "batch", 8)]
    path = save(tmp_path / "net.onnx", nodes, ins, outs, tuple(weights))
    options = {"INFERENCE_PRECISION_HINT": "bf16"}
    if precision_of(build(path, shapes={"x": (1, 3, 32, 32)}, options=options)) != "bf16":
        pytest.skip("this CPU does not compute in bf16")
    everything = tuple(node.output[0] for node in nodes)
    made = BACKEND.build(
        BuildRequest(
            *(path, {"x": (1, 3, 32, 32)}, True, None, 2, options, tmp_path),
            artifact=tmp_path / "net.xml",
            kept=everything,
        )
    )
    ran = {k.precision for k in made.provenance.kernels if "bf16" in (k.precision, k.primitive)}
    assert ran == set()
    assert {n for k in made.provenance.kernels for n in k.nodes} >= {"q", "r"}
    expected = reference(path, ("y",), X)["y"]
    assert np.linalg.norm(made.run(X)["y"] - expected) < 2e-6 * np.linalg.norm(expected)
    halves = {"INFERENCE_PRECISION_HINT": "f16"}
    shipped = BACKEND.build(
        BuildRequest(
            *(path, {"x": (1, 3, 32, 32)}, True, None, 2, halves, tmp_path),
            artifact=tmp_path / "net.xml",
        )
    )
    seen = shipped.instrument(X)
    why = {skipped.tensor: skipped.reason for skipped in seen.skipped}
    assert not seen.probes, "a copy rounded to float16 for the probe is not the tensor"
    assert "for the probe alone" in why["p"], why


def test_a_refusal_says_what_the_translator_said(tmp_path: Path) -> None:
    """A tensor of another size than a Reshape is for, as a Resize that went wrong leaves it."""
    shape = numpy_helper.from_array(np.array([1, 40]), "shape")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [info("x", 1, 56)], [info("y", 1, 40)], (shape,))
    with pytest.raises(BackendError, match=r"Reshape-17 .* here: .*output shape \[1,40\]"):
        build(path)
