"""The ONNX Runtime backend: what it builds, runs and refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.errors import BackendError, UsageError
from backends import _ort_providers
from backends.ort import BACKEND
from tests.backends.ort_models import (
    LIGHT,
    X,
    build,
    info,
    ort,
    reference,
    relative,
    save,
    small_net,
)


@pytest.mark.skipif(os.name != "posix", reason="names of files are not bytes here")
def test_a_file_whose_name_is_not_utf8_is_compiled(tmp_path: Path) -> None:
    plain = small_net(tmp_path / "net.onnx")
    odd = plain.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/net\xff.onnx")))
    built = build(odd, tmp_path)
    assert built.instrument(X).probes
    assert built.run(X).keys() == {"y"}


def test_is_available_with_version_and_processor() -> None:
    available = BACKEND.availability()
    assert available.available
    assert available.version == ort.__version__
    assert available.devices[0].name


def test_dynamic_batch_and_size(tmp_path: Path) -> None:
    path = small_net(tmp_path / "net.onnx", height="H")
    built = build(path, tmp_path)
    observed = built.instrument(X)
    for batch, size in ((1, 16), (3, 24)):
        feeds = {"x": np.random.default_rng(2).random((batch, 3, size, size), np.float32)}
        capture = observed.run(feeds)
        truth = reference(path, feeds)
        assert capture.outputs["y"].tobytes() == built.run(feeds)["y"].tobytes()
        assert max(relative(v, truth[n]) for n, v in capture.tensors.items()) < 1e-5


def test_weights_in_external_data_and_raw_configuration(tmp_path: Path) -> None:
    path = small_net(
        tmp_path / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=0
    )
    built = build(path, tmp_path, **{"Level": "Extended", "session.disable_prepacking": "1"})
    observed = built.instrument(X)
    capture = observed.run(X)
    assert observed.program_unchanged
    assert not any(p.inferred for p in observed.probes)
    assert capture.outputs["y"].tobytes() == built.run(X)["y"].tobytes()
    assert not list(tmp_path.rglob("weights.bin"))  # they stay where they are
    assert built.provenance.options == {
        "level": "extended",
        "intra_op_num_threads": "2",
        "session.disable_prepacking": "1",
    }


def test_half_precision_says_that_it_computes_in_float(tmp_path: Path) -> None:
    path = small_net(tmp_path / "net.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path)
    feeds = {"x": X["x"].astype(np.float16)}
    built = build(path, tmp_path)
    observed = built.instrument(feeds)
    capture = observed.run(feeds)
    assert observed.program_unchanged
    assert capture.outputs["y"].tobytes() == built.run(feeds)["y"].tobytes()
    assert {"r1", "a3", "y"} <= set(capture.tensors)
    if any(k.precision == "f32" for k in built.provenance.kernels):
        assert any("float32" in note for note in built.provenance.notes)
    truth = reference(path, feeds)
    assert max(relative(v, truth[n]) for n, v in capture.tensors.items()) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"INFERENCE_PRECISION_HINT": "f32"}, "INFERENCE_PRECISION_HINT"),
        ({"level": "maximum"}, "maximum"),
        ({"session.optimized_model_external_initializers_file_name": "x"}, "file_name"),
    ],
)
def test_unknown_options_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        build(LIGHT / "light_squeezenet.onnx", tmp_path, **options)
    assert "extended" in error.value.hint


def test_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NPU") as error:
        build(LIGHT / "light_squeezenet.onnx", tmp_path, device="NPU")
    assert "xnnpack" in error.value.hint


def test_every_provider_is_listed_and_an_absent_one_is_a_gap_with_its_remedy(
    tmp_path: Path,
) -> None:
    listed = {d.id: d for d in BACKEND.availability().devices}
    assert {"cuda", "tensorrt", "openvino", "xnnpack", "dml", "coreml"} < set(listed)
    absent = [d for d in listed.values() if d.name not in ort.get_available_providers() and d.id]
    for device in absent:
        assert device.reason and device.remedy
        with pytest.raises(BackendError, match=device.name) as error:
            build(LIGHT / "light_squeezenet.onnx", tmp_path, device=device.id)
        assert device.remedy in error.value.hint


def test_a_session_that_went_on_without_its_provider_is_refused() -> None:
    session = ort.InferenceSession(
        LIGHT / "light_squeezenet.onnx", providers=["CPUExecutionProvider"]
    )
    with pytest.raises(BackendError, match="went on with the CPU"):
        _ort_providers.require(session, "CUDAExecutionProvider")


@pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in ort.get_available_providers(),
    reason="needs onnxruntime-openvino, in place of onnxruntime",
)
def test_a_provider_that_compiles_is_compared_at_its_outputs(tmp_path: Path) -> None:
    path = small_net(tmp_path / "m.onnx")
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)
    made = build(path, tmp_path, device="openvino")
    seen = made.instrument({"x": x})
    assert not seen.probes and all("compiles" in s.reason for s in seen.skipped)
    assert "OpenVINOExecutionProvider" in made.provenance.notes[0]


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Warp", ["x"], ["y"], domain="com.example")]
    graph = helper.make_graph(nodes, "bad", [info("x", 1)], [info("y", 1)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "bad.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    with pytest.raises(BackendError, match=r"operator com\.example[:.]Warp") as error:
        build(path, tmp_path)
    assert error.value.stage == "build"
    assert error.value.hint


def test_a_failing_run_is_a_backend_error(tmp_path: Path) -> None:
    built = build(small_net(tmp_path / "net.onnx"), tmp_path)
    with pytest.raises(BackendError) as error:
        built.run({"x": np.zeros((1, 4, 16, 16), np.float32)})
    assert error.value.stage == "run"


def test_integer_products_are_built_again_with_unsigned_weights(tmp_path: Path) -> None:
    """Where int8 weights saturate, the file's own operators are as much at fault as fused ones."""
    rng = np.random.default_rng(1)
    w = rng.integers(60, 128, (16, 8)).astype(np.int8)
    feeds = {"x": rng.integers(128, 256, (4, 16)).astype(np.uint8)}
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "integers",
        [info("x", 4, 16, dtype=TensorProto.UINT8)],
        [info("y", 4, 8, dtype=TensorProto.INT32)],
        [numpy_helper.from_array(w, "w")],
    )
    path = save(tmp_path / "integers.onnx", graph)
    noise = "precision.int8_saturation"
    (switch,) = (s for s in build(path, tmp_path).switches if noise in s.noises)
    assert switch.kernels == ("MatMulInteger",)
    without = build(path, tmp_path, **switch.options)
    exact = feeds["x"].astype(np.int32) @ w.astype(np.int32)
    assert np.array_equal(without.instrument(feeds).run(feeds).outputs["y"], exact)
    assert not any(noise in s.noises for s in without.switches)


@pytest.mark.parametrize("stage", ["build", "run"])
def test_an_optimiser_that_breaks_a_model_is_named_as_the_remedy(
    tmp_path: Path, stage: str
) -> None:
    """A Clip in float64 behind a Relu is not built, a Pad of some axes is turned to others."""
    if stage == "build":
        shape, dtype = (4,), TensorProto.DOUBLE
        nodes = [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Clip", ["r", "low"], ["y"]),
        ]
        constants = {"low": np.array(-1.0)}
    else:
        shape, dtype = (2, 3, 4, 5), TensorProto.FLOAT
        nodes = [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
            helper.make_node("Pad", ["t", "pads", "", "axes"], ["p"]),
            helper.make_node("Transpose", ["p"], ["y"], perm=[0, 3, 1, 2]),
        ]
        constants = {"pads": np.array([1, 0, 2, 1]), "axes": np.array([3, 1])}
    initialisers = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    inputs = [info("x", *shape, dtype=dtype)]
    outputs = [onnx.helper.make_tensor_value_info("y", dtype, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initialisers)
    path = tmp_path / "m.onnx"
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    feeds = {"x": np.ones(shape, helper.tensor_dtype_to_np_dtype(dtype))}
    build(path, tmp_path, level="disable").run(feeds)
    with pytest.raises(BackendError) as raised:
        build(path, tmp_path).run(feeds)
    assert raised.value.stage == stage and "ort.level=disable" in raised.value.hint
