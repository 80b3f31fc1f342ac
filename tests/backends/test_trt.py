from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.errors import BackendError, UsageError
from auditor.records.backend import BuildRequest
from backends import _trt_compile, _trt_cuda, _trt_layers, _trt_run
from backends.trt import BACKEND
from tests.helpers import nodes_of

AVAILABLE = BACKEND.availability()
GPU = bool(AVAILABLE.devices)
needs_engine = pytest.mark.skipif(
    not AVAILABLE.available, reason=f"TensorRT does not import: {AVAILABLE.reason}"
)
needs_gpu = pytest.mark.skipif(not GPU, reason=f"nothing to run on: {AVAILABLE.reason}")
without_gpu = pytest.mark.skipif(GPU, reason="there is a GPU here")


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs, outputs, **weights):
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cnn(dtype=np.float32):
    """Two convolutions, a residual and a classifier; every node is named alike."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def draw(*shape):
        return rng.normal(0, 0.3, shape).astype(dtype)

    nodes = nodes_of(
        "[n] c1 = Conv <pads = [1, 1, 1, 1]> (x, w1) [n] r1 = Relu(c1) "
        "[n] c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2) [n] sum = Add(c2, r1) "
        "[n] r2 = Relu(sum) [n] pool = GlobalAveragePool(r2) [n] flat = Flatten(pool) "
        "[n] logits = Gemm(flat, w3) [n] y = Softmax(logits)"
    )
    weights = {"w1": draw(8, 3, 3, 3), "w2": draw(8, 8, 3, 3), "w3": draw(8, 5)}
    return model(nodes, [value("x", [1, 3, 16, 16], kind)], [value("y", [1, 5], kind)], **weights)


def request(folder: Path, made, device=None, shapes=None, **options):
    path = folder / "model.onnx"
    if not path.exists():
        onnx.save(made, path)
    declared = {
        i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in made.graph.input
    }
    given = {name.replace("_", "-"): option for name, option in options.items()}
    return BuildRequest(path, shapes or declared, bool(shapes), device, 2, given, folder)


# --- what needs no engine ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def squeezenet():
    """The head of what TensorRT for RTX 1.7.1 logged for onnx's light_squeezenet."""
    return _trt_layers.parse_layers((Path(__file__).parent / "trt_layers.txt").read_text())


def squeezenet_graph():
    chain = [("Conv", "x", "r0"), ("Relu", "r0", "r1"), ("MaxPool", "r1", "r2")]
    chain += [("Conv", "r2", "r3"), ("Relu", "r3", "r4"), ("Conv", "r4", "r5")]
    chain += [("Relu", "r5", "r6"), ("Conv", "r4", "r7"), ("Relu", "r7", "r8")]
    nodes = [helper.make_node(op, [source], [out]) for op, source, out in chain]
    nodes.append(helper.make_node("Concat", ["r6", "r8"], ["r9"], axis=1))
    nodes += [helper.make_node("Conv", ["r9"], ["r10"]), helper.make_node("Relu", ["r10"], ["r11"])]
    return _trt_layers.Graph(helper.make_graph(nodes, "g", [value("x", [1])], [value("r11", [1])]))


def test_layers_are_read_from_the_builders_text(squeezenet):
    assert [layer.type for layer in squeezenet] == ["kgen", "correlation", "maxpool"] + [
        "correlation"
    ] * 4
    first = squeezenet[1]
    assert first.name == "r0_U49_myl0_1"
    assert first.origins == ("r0", "r1")
    assert first.tactic == "__myelin_CASK_STUB"
    assert first.inputs == (_trt_layers.EngineTensor("r1.1_2_myl0", (1, 3, 224, 224), "f32"),)
    assert first.constants[0].shape == (64, 3, 3, 3)
    assert first.outputs == (_trt_layers.EngineTensor("r2.1_3_myl0", (1, 64, 111, 111), "f32"),)


def test_a_layer_hands_on_what_is_read_outside_it(squeezenet):
    boundaries = squeezenet_graph().boundaries(squeezenet)
    assert boundaries == [(), ("r1",), ("r2",), ("r4",), ("r8",), ("r6",), ("r11",)]


def test_engine_tensors_get_onnx_names_only_where_that_is_certain(squeezenet):
    boundaries = squeezenet_graph().boundaries(squeezenet)
    shapes = {"r1": (1, 64, 111, 111), "r2": (1, 64, 55, 55), "r4": (1, 99, 55, 55)}
    names, skipped = _trt_layers.attribute(squeezenet, boundaries, shapes)
    assert {names[engine] for engine in ("r2.1_3_myl0", "r4.1_4_myl0")} == {"r1", "r2"}
    reasons = {skip.tensor: skip.reason for skip in skipped}
    assert "no tensor of its own" in reasons["r4"]  # not as many elements
    assert "shared" in reasons["r6"]  # two layers write the two halves of one concatenation
    assert "shared" in reasons["r8"]


def test_nodes_of_subgraphs_and_functions_belong_to_the_node_around_them():
    graph = _trt_layers.Graph(
        helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    )
    assert graph.resolve("node_of_t1 | th (then_branch) | y (If)") == "y"
    assert graph.resolve("elsewhere") is None


@pytest.mark.parametrize(
    ("kind", "bits", "expected"),
    [
        ("BF16", np.array([0x3F80, 0xC049], np.uint16), [1.0, -3.140625]),
        ("FP8", np.array([0x38, 0xC0], np.uint8), [1.0, -2.0]),
    ],
)
def test_types_that_numpy_lacks_become_float32_exactly(kind, bits, expected):
    decoded = _trt_cuda.widened(bits.view(_trt_cuda.storage_dtype(kind)))
    assert decoded.dtype == np.float32
    assert decoded.tolist() == expected


def test_other_types_stay_as_they_are():
    assert _trt_cuda.widened(np.zeros(2, _trt_cuda.storage_dtype("HALF"))).dtype == np.float16
    assert _trt_cuda.widened(np.zeros(2, _trt_cuda.storage_dtype("INT64"))).dtype == np.int64
    assert _trt_cuda.storage_dtype("INT4") is None


def test_the_address_in_a_capsule_is_read():
    make = ctypes.pythonapi.PyCapsule_New
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    make.restype = ctypes.py_object
    array = np.arange(3.0)
    assert _trt_run._address(make(array.ctypes.data, None, None)) == array.ctypes.data


# --- building ----------------------------------------------------------------------------------


@needs_engine
def test_every_node_is_found_in_a_kernel(tmp_path):
    made = cnn()
    provenance = BACKEND.build(request(tmp_path, made)).provenance
    placed = {key for kernel in provenance.kernels for key in kernel.nodes}
    folded = {"flat"}  # the layout already is the flattened one
    assert {node.output[0] for node in made.graph.node} - placed <= folded
    unmapped = [kernel.name for kernel in provenance.kernels if not kernel.nodes]
    assert all(name.startswith("__myl_") for name in unmapped)  # the engine's own data movement
    assert [t for kernel in provenance.kernels for t in kernel.outputs][-1] == "y"
    assert provenance.version == AVAILABLE.version


@needs_engine
def test_tf32_is_never_passed_off_as_fp32(tmp_path):
    def of_convolution(provenance):
        return next(k.precision for k in provenance.kernels if "c2" in k.nodes)

    default = BACKEND.build(request(tmp_path, cnn())).provenance
    assert default.options["tf32"] == "on"
    assert of_convolution(default) in ("", "tf32")
    assert any("TF32 is allowed" in note for note in default.notes)
    exact = BACKEND.build(request(tmp_path, cnn(), tf32="off")).provenance
    assert of_convolution(exact) == "f32"
    assert not any("TF32" in note for note in exact.notes)


@needs_engine
def test_precision_follows_the_models_types(tmp_path):
    provenance = BACKEND.build(request(tmp_path, cnn(np.float16))).provenance
    products = [k for k in provenance.kernels if {"c1", "c2", "logits"} & set(k.nodes)]
    assert products
    assert {kernel.precision for kernel in products} == {"f16"}


@needs_engine
def test_observing_leaves_the_program_as_it_was(tmp_path):
    compiler = _trt_compile.Compiler(request(tmp_path, cnn()))
    plain = compiler.compile(observed=False)
    assert plain.program.startswith("Layers:")
    assert compiler.compile(observed=True).program == plain.program


@needs_engine
def test_a_release_that_cannot_observe_says_so():
    with pytest.raises(BackendError, match="without changing fusions") as raised:
        _trt_compile._observe(object())  # a network as older releases have it
    assert raised.value.stage == "instrument"
    assert "Install a later one" in raised.value.hint


@needs_engine
@without_gpu
def test_without_a_gpu_it_says_that_it_did_not_run(tmp_path):
    feeds = {"x": np.zeros((1, 3, 16, 16), np.float32)}
    assert AVAILABLE.devices == ()
    assert AVAILABLE.reason is not None
    assert "built, not run" in AVAILABLE.reason
    build = BACKEND.build(request(tmp_path, cnn()))
    assert build.blocked is not None
    assert "no CUDA device" in build.blocked
    with pytest.raises(BackendError, match="built, not run: no CUDA device") as raised:
        build.run(feeds)
    assert raised.value.stage == "run"
    with pytest.raises(BackendError, match="no CUDA device"):
        build.instrument(feeds)


@needs_gpu
def test_on_a_gpu_observed_outputs_are_the_plain_ones(tmp_path):
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 3, 16, 16)).astype(np.float32)}
    build = BACKEND.build(request(tmp_path, cnn(), tf32="off"))
    assert build.blocked is None
    plain = build.run(feeds)
    assert plain["y"].sum() == pytest.approx(1, abs=1e-5)
    instrumented = build.instrument(feeds)
    assert instrumented.program_unchanged
    capture = instrumented.run(feeds)
    assert capture.outputs["y"].tobytes() == plain["y"].tobytes()
    assert set(capture.tensors) == {probe.tensor for probe in instrumented.probes}


@needs_engine
def test_external_weights_are_found_beside_the_model(tmp_path, monkeypatch):
    made = cnn()
    path = tmp_path / "model.onnx"
    onnx.save(made, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > 0
    monkeypatch.chdir("/")
    assert BACKEND.build(request(tmp_path, cnn())).provenance.kernels


# --- what a deployment engineer must be told ---------------------------------------------------


@needs_engine
def test_narrowed_and_wide_types_are_noted(tmp_path):
    kinds = (TensorProto.DOUBLE, TensorProto.INT64)
    made = model(
        [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Add", ["i", "i"], ["j"])],
        [value(name, [1, 4], kind) for name, kind in zip("xi", kinds, strict=True)],
        [value(name, [1, 4], kind) for name, kind in zip("yj", kinds, strict=True)],
    )
    notes = BACKEND.build(request(tmp_path, made)).provenance.notes
    for name in "xy":
        assert any(f"`{name}` is DOUBLE" in note and "FLOAT" in note for note in notes)
    assert any("INT64 at i, j" in note for note in notes)


@needs_engine
def test_dynamic_dimensions_are_specialised_and_that_is_noted(tmp_path):
    made = model(
        [helper.make_node("Relu", ["x"], ["y"])],
        [value("x", ["?", 3, "?"])],  # as Paddle exports it: one symbol for different sizes
        [value("y", ["?", 3, "?"])],
    )
    build = BACKEND.build(request(tmp_path, made, shapes={"x": (1, 3, 8)}))
    assert any("x:1x3x8" in note for note in build.provenance.notes)
    assert any("symbol `?`" in note for note in build.provenance.notes)


@needs_engine
def test_operators_without_an_implementation_are_named(tmp_path):
    made = model(
        [helper.make_node("NonMaxSuppression", ["b", "s", "max", "iou", "score"], ["picked"])],
        [value("b", [1, 6, 4]), value("s", [1, 1, 6])],
        [value("picked", [None, 3], TensorProto.INT64)],
        max=np.array([3]),
        iou=np.array([0.5], np.float32),
        score=np.array([0.1], np.float32),
    )
    with pytest.raises(BackendError, match="NonMaxSuppression `picked`") as raised:
        BACKEND.build(request(tmp_path, made))
    assert raised.value.stage == "build"
    assert raised.value.hint
    assert raised.value.log


@needs_engine
def test_every_node_that_does_not_parse_is_named_with_its_reason(tmp_path):
    made = model(
        [
            helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2], dilations=[2, 2]),
            helper.make_node("Det", ["p"], ["d"]),
            helper.make_node("Unique", ["d"], ["u"]),
        ],
        [value("x", [1, 1, 6, 6])],
        [value("u", [None])],
    )
    with pytest.raises(BackendError) as raised:
        BACKEND.build(request(tmp_path, made))
    for named in ("MaxPool `p`: ", "dilations", "Det `d`", "Unique `u`"):
        assert named in raised.value.message


@needs_engine
def test_a_node_that_the_parsers_error_leaves_out_is_named_too(tmp_path):
    made = model(
        nodes_of('r = Relu(x) s = ScatterElements <reduction = "max"> (r, at, u) t = Tanh(s)'),
        [value("x", [4]), value("u", [2])],
        [value("t", [4])],
        at=np.array([0, 1]),
    )
    made.opset_import[0].version = 18
    with pytest.raises(BackendError, match="ScatterElements `s`: Unsupported reduction"):
        BACKEND.build(request(tmp_path, made))


# --- options -----------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"fp17": "on"}, "no option `fp17`", "tf32"),
        ({"tf32": "maybe"}, "`on` or `off`", ""),
    ],
)
def test_a_wrong_option_is_a_usage_error(tmp_path, options, message, hint):
    with pytest.raises(UsageError, match=message) as raised:
        BACKEND.build(request(tmp_path, cnn(), **options))
    assert hint in raised.value.hint


@needs_engine
@pytest.mark.skipif(AVAILABLE.engine != "TensorRT for RTX", reason="only RTX has this option")
def test_the_compute_capability_is_checked(tmp_path):
    with pytest.raises(UsageError, match="`SM1`") as raised:
        BACKEND.build(request(tmp_path, cnn(), compute_capability="SM1"))
    assert "SM86" in raised.value.hint
    assert BACKEND.build(request(tmp_path, cnn(), compute_capability="sm86")).provenance.kernels


@needs_engine
def test_a_wrong_device_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no CUDA device `99`"):
        BACKEND.build(request(tmp_path, cnn(), device="99"))


@needs_engine
def test_the_script_of_a_reproducer_builds(tmp_path):
    shape = ["batch", 8]
    relu = helper.make_node("Relu", ["x"], ["y"])
    onnx.save(model([relu], [value("x", shape)], [value("y", shape)]), tmp_path / "m.onnx")
    script = BACKEND.script(None, 1, {"tf32": "off"})
    source = f"""
import numpy as np
{script.source}
x = np.arange(-8, 8, dtype=np.float32).reshape(2, 8)
log, plan = plan_of("m.onnx", {{"x": x}})
print(version(), FLAGS, memoryview(plan).nbytes > 0, flush=True)
np.testing.assert_array_equal(run("m.onnx", {{"x": x}})["y"], np.maximum(x, 0))
"""
    (tmp_path / "run.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "'TF32': False} True" in done.stdout, done.stderr
    if GPU:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and "no CUDA device" in done.stderr
