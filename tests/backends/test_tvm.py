"""The TVM backend: one build, every kernel's tensors by their ONNX names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import backends.tvm as tvm_backend
from auditor.errors import BackendError, UsageError
from auditor.records.backend import BuildRequest
from backends import _tvm_import
from backends.tvm import BACKEND

if TYPE_CHECKING:
    from collections.abc import Sequence

    from auditor.ports import Arrays, Build, Capture

tvm = pytest.importorskip("tvm")
ort = pytest.importorskip("onnxruntime")

node = helper.make_node
IMAGE = {"x": np.random.default_rng(1).standard_normal((1, 3, 12, 12)).astype(np.float32)}
ROWS = {"x": np.random.default_rng(2).standard_normal((4, 8)).astype(np.float32)}


def build(path: Path, feeds: Arrays, *, dynamic: bool = False, **options: str) -> Build:
    shapes = {name: value.shape for name, value in feeds.items()}
    given = {name.replace("_", "-"): value for name, value in options.items()}
    return BACKEND.build(BuildRequest(path, shapes, dynamic, None, 2, given, path.parent))


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int | str, ...]],
    outputs: Sequence[str],
    weights: dict[str, np.ndarray] | None = None,
    *,
    external: bool = False,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(w, n) for n, w in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if not any(n.op_type == "Unknown" for n in nodes):
        model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    return path


def weights(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal(s) / np.sqrt(max(1, np.prod(s[1:])))).astype(np.float32)
        for s in shapes
    ]


def cnn(path: Path, *, batch: int | str = 1, external: bool = False) -> Path:
    """Convolutions with BatchNormalization, a depthwise one, a residual Add and a head."""
    w1, b1, w2, w3, w4, b4 = weights((8, 3, 3, 3), (8,), (8, 1, 3, 3), (8, 8, 1, 1), (8, 5), (5,))
    scale, bias, mean = weights((8,), (8,), (8,))
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1] * 4),
        node("BatchNormalization", ["c1", "scale", "bias", "mean", "var"], ["n1"]),
        node("Relu", ["n1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4, group=8),
        node("Clip", ["c2", "low", "high"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"]),
        node("Add", ["c3", "r1"], ["a3"]),
        node("MaxPool", ["a3"], ["p3"], kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p3"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["y"]),
    ]
    constants = {
        "w1": w1, "b1": b1, "w2": w2, "w3": w3, "w4": w4, "b4": b4,
        "scale": scale + 1, "bias": bias, "mean": mean, "var": np.ones(8, np.float32),
        "low": np.float32(0), "high": np.float32(6),
    }  # fmt: skip
    return save(path, nodes, {"x": (batch, 3, 12, 12)}, ["y"], constants, external=external)


def mlp(path: Path) -> Path:
    """Two layers with LayerNormalization and GELU written out; two outputs."""
    w1, b1, w2, gamma, beta = weights((8, 16), (16,), (16, 8), (8,), (8,))
    nodes = [
        node("MatMul", ["x", "w1"], ["m1"]),
        node("Add", ["m1", "b1"], ["h"]),
        node("Div", ["h", "root2"], ["d"]),
        node("Erf", ["d"], ["e"]),
        node("Add", ["e", "one"], ["e1"]),
        node("Mul", ["h", "e1"], ["g"]),
        node("MatMul", ["g", "w2"], ["m2"]),
        node("Add", ["m2", "x"], ["s"]),
        node("LayerNormalization", ["s", "gamma", "beta"], ["n"]),
        node("Softmax", ["n"], ["p"]),
    ]
    constants = {
        "w1": w1, "b1": b1, "w2": w2, "gamma": gamma + 1, "beta": beta,
        "root2": np.float32(np.sqrt(2)), "one": np.float32(1),
    }  # fmt: skip
    return save(path, nodes, {"x": (4, 8)}, ["p", "n"], constants)


def reference(path: Path, feeds: Arrays, tensors: Sequence[str]) -> Arrays:
    """Any tensors of a model as ONNX Runtime computes them without optimisation."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(tensors, session.run(list(tensors), dict(feeds)), strict=True))


def assert_bitwise(plain: Arrays, observed: Arrays) -> None:
    assert plain.keys() == observed.keys()
    for name, value in plain.items():
        assert value.dtype == observed[name].dtype
        assert value.tobytes() == observed[name].tobytes(), name


def assert_true_captures(path: Path, build: Build, feeds: Arrays) -> Capture:
    """Observe a build: outputs keep their bits, and each tensor is what its name says."""
    plain = build.run(feeds)
    instrumented = build.instrument(feeds)
    capture = instrumented.run(feeds)
    assert instrumented.program_unchanged
    assert not instrumented.rebuilt
    assert_bitwise(plain, capture.outputs)
    assert_bitwise(plain, build.run(feeds))
    names = [probe.tensor for probe in instrumented.probes]
    assert list(capture.tensors) == names
    for name, expected in reference(path, feeds, names).items():
        value = capture.tensors[name]
        assert value.shape == expected.shape
        assert value.dtype == expected.dtype
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    return capture


def test_every_kernel_of_a_cnn_is_mapped(tmp_path: Path) -> None:
    path = cnn(tmp_path / "cnn.onnx")
    built = build(path, IMAGE)
    capture = assert_true_captures(path, built, IMAGE)
    kernels = built.provenance.kernels
    assert all(kernel.outputs for kernel in kernels)
    assert set(capture.tensors) == {name for kernel in kernels for name in kernel.outputs}
    # Every ONNX node is in exactly one kernel: fusion made fewer kernels than nodes.
    nodes = [key for kernel in kernels for key in kernel.nodes]
    assert sorted(nodes) == sorted(n.output[0] for n in onnx.load(path).graph.node)
    assert len(kernels) < len(nodes)
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    assert {kernel.precision for kernel in kernels} == {"f32"}
    assert built.provenance.notes == ()


def test_every_kernel_of_an_mlp_is_mapped(tmp_path: Path) -> None:
    path = mlp(tmp_path / "mlp.onnx")
    built = build(path, ROWS)
    capture = assert_true_captures(path, built, ROWS)
    assert all(kernel.outputs for kernel in built.provenance.kernels)
    assert {"n", "p"} <= capture.tensors.keys()
    assert not built.instrument(ROWS).skipped


def test_the_program_is_the_default_pipelines(tmp_path: Path) -> None:
    """Building equal functions once while constants are folded leaves the program as it was."""
    from tvm import relax

    model = onnx.load(cnn(tmp_path / "cnn.onnx"))
    module = relax.frontend.onnx.from_onnx(model)
    pipeline = relax.get_default_pipeline(tvm_backend._Options.parse({}).target())
    shipped = pipeline(module)
    with tvm_backend._each_function_built_once():
        ours = pipeline(_tvm_import.convert(model, {"x": (1, 3, 12, 12)}).module)
    tvm.ir.assert_structural_equal(ours, shipped, map_free_vars=True)


def test_an_axis_of_size_0_is_no_symbolic_one(tmp_path: Path) -> None:
    """Folding would leave a constant of a reduction over no values, which is TVM's to compute."""
    nodes = [node("ReduceProd", ["x"], ["y"], axes=[1])]
    path = save(tmp_path / "m.onnx", nodes, {"x": (2, 0, 3)}, ["y"])
    built = build(path, {"x": np.zeros((2, 0, 3), np.float32)}, dynamic=True)
    assert not built.provenance.notes


@pytest.mark.parametrize("external", [False, True])
def test_a_dynamic_model_is_folded_and_says_so(tmp_path: Path, external: bool) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = cnn(folder / "cnn.onnx", batch="batch", external=external)
    request = BuildRequest(path, {"x": (1, 3, 12, 12)}, True, None, 2, {}, tmp_path)
    built = BACKEND.build(request)
    (note,) = built.provenance.notes
    assert "folded" in note
    assert "x:1x3x12x12" in note
    assert "symbolic" in note
    assert_true_captures(path, built, IMAGE)
    # Folding puts BatchNormalization into the convolution: the kernel names both.
    first = built.provenance.kernels[0]
    assert {"c1", "n1"} <= set(first.nodes)
    assert "c1" not in {name for kernel in built.provenance.kernels for name in kernel.outputs}


def test_folding_keeps_the_tensors_of_the_model(tmp_path: Path) -> None:
    """As Keras exports: channels last, with transpositions around each convolution; and Dense."""
    w1, w2, w3, b3 = weights((8, 3, 3, 3), (4, 8, 1, 1), (4, 5), (5,))
    nodes = [
        node("Transpose", ["x"], ["t1"], perm=[0, 3, 1, 2]),
        node("Conv", ["t1", "w1"], ["c1"]),
        node("Transpose", ["c1"], ["u1"], perm=[0, 2, 3, 1]),
        node("Relu", ["u1"], ["r1"]),
        node("Transpose", ["r1"], ["t2"], perm=[0, 3, 1, 2]),
        node("Conv", ["t2", "w2"], ["c2"]),
        node("Transpose", ["c2"], ["u2"], perm=[0, 2, 3, 1]),
        node("MatMul", ["u2", "w3"], ["m3"]),
        node("Add", ["m3", "b3"], ["y"]),
    ]
    constants = {"w1": w1, "w2": w2, "w3": w3, "b3": b3}
    path = save(tmp_path / "m.onnx", nodes, {"x": ("batch", 6, 6, 3)}, ["y"], constants)
    image = {"x": np.moveaxis(IMAGE["x"][:, :, :6, :6], 1, -1)}
    built = build(path, image, dynamic=True)
    assert_true_captures(path, built, image)
    assert not built.instrument(image).skipped


@pytest.mark.parametrize("casts", [False, True])
def test_a_dynamic_model_in_half_precision_is_compiled_in_it(tmp_path: Path, casts: bool) -> None:
    """ONNX Runtime, which folds others, would compile it in float32, between casts.

    Converters keep the inputs in float32, with a cast of their own behind, which ONNX Runtime joins
    with its cast back.
    """
    path = cnn(tmp_path / "cnn.onnx", batch="batch")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    image = {"x": IMAGE["x"].astype(np.float32 if casts else np.float16)}
    if casts:
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
        for read in model.graph.node:
            read.input[:] = ["narrow" if name == "x" else name for name in read.input]
        model.graph.node.insert(0, node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16))
    onnx.save(model, path)
    built = build(path, image, dynamic=True)
    assert {kernel.precision for kernel in built.provenance.kernels} == {"f16"}
    assert not built.instrument(image).skipped
    (y,) = built.run(image).values()
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, reference(path, image, ["y"])["y"], rtol=1e-2, atol=1e-2)


def test_a_model_that_tvm_cannot_import_directly_is_folded(tmp_path: Path) -> None:
    """TVM wants Pad's pads as a constant; the torch exporter writes a little graph instead."""
    nodes = [
        node("ConstantOfShape", ["two"], ["none"], value=numpy_helper.from_array(np.array([0]))),
        node("Concat", ["ones", "none"], ["row"], axis=0),
        node("Reshape", ["row", "square"], ["table"]),
        node("Slice", ["table", "last", "first", "axis", "last"], ["reversed"]),
        node("Transpose", ["reversed"], ["turned"]),
        node("Reshape", ["turned", "last"], ["flat"]),
        node("Cast", ["flat"], ["pads"], to=TensorProto.INT64),
        node("Pad", ["x", "pads"], ["padded"]),
        node("Relu", ["padded"], ["y"]),
    ]
    constants = {
        "two": np.array([2]), "ones": np.array([1, 1]), "square": np.array([2, 2]),
        "last": np.array([-1]), "first": np.array([-9]), "axis": np.array([0]),
    }  # fmt: skip
    path = save(tmp_path / "pad.onnx", nodes, {"x": (4, 8)}, ["y"], constants)
    built = build(path, ROWS)
    assert "could not import Pad" in built.provenance.notes[0]
    assert_true_captures(path, built, ROWS)


def test_all_operators_without_converter_are_named(tmp_path: Path) -> None:
    w, r = weights((1, 12, 8), (1, 12, 3))
    nodes = [
        node("Unsqueeze", ["x", "axis"], ["u"]),
        node("LSTM", ["u", "w", "r"], ["l"], hidden_size=3),
        node("Unknown", ["l"], ["y"], domain="some.vendor"),
    ]
    path = save(
        tmp_path / "lstm.onnx",
        nodes,
        {"x": (4, 8)},
        ["y"],
        {"w": w, "r": r, "axis": np.array([0])},
    )
    for dynamic in (False, True):
        with pytest.raises(BackendError) as caught:
            build(path, ROWS, dynamic=dynamic)
        assert "LSTM, some.vendor::Unknown" in caught.value.message
        assert caught.value.stage == "build"
        assert caught.value.hint


def test_constants_of_4_bits_are_named(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2,4] x) => (float[2,4] y) <float s = {0.5}> {
            w = DequantizeLinear(packed, s) y = MatMul(x, w) }""")
    packed = helper.make_tensor("packed", TensorProto.INT4, [4, 4], [*range(-8, 8)])
    model.graph.initializer.append(packed)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BackendError, match="4 bits: packed") as refused:
        build(tmp_path / "m.onnx", {"x": np.zeros((2, 4), np.float32)})
    assert "8 bits" in refused.value.hint


def test_the_inside_of_a_node_is_skipped_with_its_name(tmp_path: Path) -> None:
    """ReduceL2 becomes several kernels; only the last computes an ONNX tensor."""
    nodes = [node("ReduceL2", ["x"], ["norm"], axes=[1]), node("Div", ["x", "norm"], ["y"])]
    path = save(tmp_path / "l2.onnx", nodes, {"x": (4, 8)}, ["y"])
    built = build(path, ROWS, opt_level="0")
    capture = assert_true_captures(path, built, ROWS)
    assert capture.tensors.keys() == {"norm", "y"}
    skipped = built.instrument(ROWS).skipped
    assert skipped
    assert {item.reason for item in skipped} == {"inside what is one node in ONNX"}
    unnamed = [kernel for kernel in built.provenance.kernels if not kernel.outputs]
    assert [item.tensor for item in skipped] == [f"{kernel.name} in norm" for kernel in unnamed]
    assert all(kernel.nodes == ("norm",) for kernel in unnamed)


def test_repeated_computations_keep_their_own_names(tmp_path: Path) -> None:
    (w,) = weights((8, 8))
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "w"], ["b"]),
        node("Identity", ["b"], ["copy"]),
        node("Concat", ["a", "copy"], ["y"], axis=1),
    ]
    path = save(tmp_path / "twice.onnx", nodes, {"x": (4, 8)}, ["y"], {"w": w})
    capture = assert_true_captures(path, build(path, ROWS), ROWS)
    assert {"a", "b", "y"} <= capture.tensors.keys()


def test_computations_that_fusion_reorders_keep_their_names(tmp_path: Path) -> None:
    """Of masks that a decoder's layers compute alike, the last layer's may come first in the file.

    Fusion moves each to where it is used: the first layer's kernel then computes it first, and all
    behind it was lost.
    """
    first, second = weights((8, 8), (8, 8))
    nodes = [
        node("Exp", ["x"], ["e2"]),
        node("Neg", ["e2"], ["mask2"]),
        node("Exp", ["x"], ["e1"]),
        node("Neg", ["e1"], ["mask1"]),
        node("MatMul", ["x", "w1"], ["p1"]),
        node("Add", ["p1", "mask1"], ["a1"]),
        node("MatMul", ["a1", "w2"], ["p2"]),
        node("Add", ["p2", "mask2"], ["y"]),
    ]
    constants = {"w1": first, "w2": second}
    path = save(tmp_path / "masks.onnx", nodes, {"x": (4, 8)}, ["y"], constants)
    built = build(path, ROWS)
    capture = assert_true_captures(path, built, ROWS)
    assert {"a1", "y"} <= capture.tensors.keys()
    assert not built.instrument(ROWS).skipped
    assert [kernel.nodes for kernel in built.provenance.kernels if kernel.outputs == ("a1",)] == [
        ("e1", "mask1", "p1", "a1")
    ]


def test_a_sequence_is_no_tensor_and_a_size_may_be_unknown(tmp_path: Path) -> None:
    nodes = [
        node("NonZero", ["x"], ["places"]),
        node("Gather", ["places", "one"], ["columns"]),
        node("Relu", ["x"], ["r"]),
        node("SplitToSequence", ["r", "size"], ["sequence"], axis=1),
        node("SequenceAt", ["sequence", "one"], ["part"]),
        node("Sigmoid", ["part"], ["y"]),
    ]
    constants = {"size": np.array(4), "one": np.array(1)}
    path = save(tmp_path / "sequence.onnx", nodes, {"x": (4, 8)}, ["y", "columns"], constants)
    built = build(path, ROWS)
    capture = assert_true_captures(path, built, ROWS)
    assert {"y", "columns"} <= capture.tensors.keys()
    assert "sequence" not in capture.tensors


def test_kernels_after_a_branch_are_a_named_gap(tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(op, TensorProto.FLOAT, (4, 8))
        return helper.make_graph([node(op, ["r"], [op])], op, [], [out])

    nodes = [
        node("Relu", ["x"], ["r"]),
        node("ReduceMax", ["r"], ["m"], keepdims=0),
        node("Greater", ["m", "limit"], ["c"]),
        node("If", ["c"], ["i"], then_branch=branch("Exp"), else_branch=branch("Neg")),
        node("Sigmoid", ["i"], ["y"]),
    ]
    path = save(tmp_path / "if.onnx", nodes, {"x": (4, 8)}, ["y"], {"limit": np.float32(1)})
    built = build(path, ROWS)
    capture = assert_true_captures(path, built, ROWS)
    assert capture.tensors.keys() == {"r", "m", "c"}
    (skipped,) = built.instrument(ROWS).skipped
    assert "If" in skipped.tensor


def test_precision_is_the_narrowest_float_computed(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        node("Mul", ["half", "half"], ["square"]),
        node("Cast", ["square"], ["y"], to=TensorProto.FLOAT),
    ]
    path = save(tmp_path / "half.onnx", nodes, {"x": (4, 8)}, ["y"])
    (kernel,) = build(path, ROWS).provenance.kernels
    assert (kernel.precision, kernel.output_precision) == ("f16", "f32")
    assert kernel.nodes == ("half", "square", "y")


def test_outputs_that_no_kernel_computes(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Identity", ["x"], ["same"]),
        node("Relu", ["x"], ["y"]),
    ]
    path = save(tmp_path / "outputs.onnx", nodes, {"x": (4, 8)}, ["shape", "same", "y"])
    outputs = build(path, ROWS).run(ROWS)
    assert outputs["shape"].dtype == np.int64
    np.testing.assert_array_equal(outputs["shape"], [4, 8])
    assert_bitwise({"same": ROWS["x"]}, {"same": outputs["same"]})


def test_options_reach_the_compiler(tmp_path: Path) -> None:
    path = mlp(tmp_path / "mlp.onnx")
    fused = build(path, ROWS)
    plain = build(path, ROWS, opt_level="0", fast_math="true", mcpu="generic")
    assert len(plain.provenance.kernels) > len(fused.provenance.kernels)
    assert plain.provenance.options == {
        "mcpu": "generic",
        "fast-math": "true",
        "opt-level": "0",
    }
    assert plain.provenance.device == "CPU (generic)"
    assert fused.provenance.options["fast-math"] == "false"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("INFERENCE_PRECISION_HINT", "f32", "no option"),
        ("fast_math", "maybe", "fast-math"),
        ("opt_level", "-1", "opt-level"),
        ("opt_level", "9", "opt-level"),
        ("mcpu", "abacus", "abacus"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, option: str, value: str, said: str) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": (4, 8)}, ["y"])
    with pytest.raises(UsageError, match=said) as caught:
        build(path, ROWS, **{option: value})
    assert caught.value.hint


def test_devices(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": (4, 8)}, ["y"])
    request = BuildRequest(path, {"x": (4, 8)}, False, "cuda", None, {}, tmp_path)
    with pytest.raises(UsageError, match="cuda"):
        BACKEND.build(request)
    here = BACKEND.availability()
    assert here.available
    assert here.version == tvm.__version__
    assert [device.id for device in here.devices] == [""]
