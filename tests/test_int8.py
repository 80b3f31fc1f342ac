"""`--option ID.quantize=int8`: quantised by the engine's own tool, audited against the floats."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import UsageError
from auditor.ports import Silent
from auditor.records.report import AuditReport
from tests.helpers import nodes_of, onnx_model

# Without quantisation nothing narrow is left, on a processor with bfloat16 either.
MORE = {"ov": {"INFERENCE_PRECISION_HINT": "f32"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("int8")
    draw = np.random.default_rng(7)
    weights = {
        "w1": draw.standard_normal((8, 3, 3, 3)).astype(np.float32) / 5,
        "w2": draw.standard_normal((8, 8, 3, 3)).astype(np.float32) / 8,
        "w3": draw.standard_normal((8, 5)).astype(np.float32) / 3,
    }
    nodes = nodes_of(
        "c1 = Conv <pads = [1, 1, 1, 1]> (x, w1) r1 = Relu(c1) "
        "c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2) r2 = Relu(c2) "
        "pooled = GlobalAveragePool(r2) flat = Flatten(pooled) y = MatMul(flat, w3)"
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), made / "m.onnx")
    np.savez(made / "calibration.npz", x=draw.standard_normal((6, 3, 16, 16)).astype(np.float32))
    return made


def audited(folder: Path, *ids: str, quantised: bool = True, confirm: bool = True) -> AuditReport:
    options = AuditOptions(
        confirm=confirm,
        backends=tuple(BackendSpec(id) for id in ids),
        calibration=folder / "calibration.npz",
        options={id: {"quantize": "int8"} | MORE.get(id, {}) for id in ids} if quantised else {},
        threads=1,
        pictures=False,
    )
    return audit(folder / "m.onnx", options, noises=discovery.noises(), progress=Silent())


@pytest.mark.parametrize("backend", ["ort", "ov"])
def test_the_error_is_that_of_the_quantised_weights_and_activations(
    folder: Path, backend: str
) -> None:
    if backend == "ov" and importlib.util.find_spec("nncf") is None:
        pytest.skip("needs the [nncf] extra")
    report = audited(folder, backend, confirm=backend == "ort")  # where it costs less
    assert any("all samples of" in note for note in report.stimulus.notes)
    (part,) = report.backends
    assert part.provenance is not None and "6 calibration samples" in str(part.provenance.notes)
    assert part.outputs[0].distance.relative_l2 > 1e-3
    share = {category.noise: category.share for category in part.categories}
    assert share["precision.int8"] > 0.9
    if backend == "ov":  # r1 and r2 exist as 8 bits only
        shown = {name for segment in part.segments for name in segment.outputs}
        assert {"r1", "r2"} <= shown
        assert part.fidelity is not None and part.fidelity.outputs_bitwise_equal
    said = [s for segment in part.segments for s in segment.constants if "quantiser" in s]
    assert any("weights" in s for s in said) and any("activations" in s for s in said)
    # Built again without, the error is gone: the claim is confirmed on the engine itself.
    cases = [c for c in part.counterfactuals if c.factor == "quantisation to 8 bits"]
    assert len(cases) == (backend == "ort")
    assert all(case.removed is not None and case.removed > 0.9 for case in cases)


def test_a_model_that_was_quantised_before_is_explained_as_well(
    folder: Path, tmp_path: Path
) -> None:
    nncf = pytest.importorskip("nncf", reason="needs the [nncf] extra")
    import openvino

    data = nncf.Dataset([{"x": x} for x in np.load(folder / "calibration.npz")["x"][:, None]])
    made = nncf.quantize(openvino.Core().read_model(folder / "m.onnx"), data, subset_size=1)
    openvino.save_model(made, tmp_path / "m.xml", compress_to_fp16=False)
    options = AuditOptions(
        backends=(BackendSpec("ov"),),
        artifacts={"ov": tmp_path / "m.xml"},
        options={"ov": MORE["ov"]},
        data=folder / "calibration.npz",
        samples=1,
        threads=1,
        confirm=False,
        pictures=False,
    )
    report = audit(folder / "m.onnx", options, noises=discovery.noises(), progress=Silent())
    (part,) = report.backends
    assert {"r1", "r2"} <= {name for segment in part.segments for name in segment.outputs}
    assert {category.noise for category in part.categories if category.share > 0.9} == {
        "precision.int8"
    }


def test_compressed_weights_of_a_file_are_read_as_the_engine_reads_them(tmp_path: Path) -> None:
    """Zero points, scales in half precision, and activations rounded while the model runs."""
    nncf = pytest.importorskip("nncf", reason="needs the [nncf] extra")
    import openvino

    weights = np.random.default_rng(3).standard_normal((64, 48)).astype(np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[4, 64] x) => (float[4, 48] y)'
        "{ y = MatMul(x, w) }"
    )
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    read = openvino.Core().read_model(tmp_path / "m.onnx")
    made = nncf.compress_weights(read, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(made, tmp_path / "m.xml", compress_to_fp16=False)
    options = AuditOptions(
        backends=(BackendSpec("ov"),),
        artifacts={"ov": tmp_path / "m.xml"},
        options={"ov": MORE["ov"]},
        threads=1,
        confirm=False,
        pictures=False,
    )
    report = audit(tmp_path / "m.onnx", options, noises=discovery.noises(), progress=Silent())
    (part,) = report.backends
    assert next(c.share for c in part.categories if c.noise == "precision.int8") > 0.99


def test_what_cannot_be_quantised_is_said(folder: Path) -> None:
    with pytest.raises(UsageError, match="no backend quantises"):
        audited(folder, "ort", quantised=False)
    options = AuditOptions(
        backends=(BackendSpec("ort"),), options={"ort": {"quantize": "int4"}}, threads=1
    )
    with pytest.raises(UsageError, match="quantize=int4"):
        audit(folder / "m.onnx", options, noises=(), progress=Silent())


class Calibration(quantization.CalibrationDataReader):
    def __init__(self, samples: np.ndarray) -> None:
        self._left = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample = next(self._left, None)
        return None if sample is None else {"x": sample}


def test_a_quantised_export_is_no_model_without_activations(folder: Path) -> None:
    """The tool leaves out what quantising limits anyway, and moves the name of the result."""
    samples = np.load(folder / "calibration.npz")["x"][:, None]
    path = folder / "export.onnx"
    quantization.quantize_static(str(folder / "m.onnx"), str(path), Calibration(samples))
    assert "Relu" not in {node.op_type for node in onnx.load(path).graph.node}
    options = AuditOptions(
        backends=(BackendSpec("ort"),),
        data=folder / "calibration.npz",
        samples=1,
        candidate=path,
        threads=1,
        pictures=False,
    )
    report = audit(folder / "m.onnx", options, noises=discovery.noises(), progress=Silent())
    (part,) = report.backends
    assert part.fidelity is not None and part.fidelity.outputs_bitwise_equal
    assert {s.noise for s in part.segments if s.introduced > s.floor} == {"precision.int8"}
    shares = {category.noise: category.share for category in part.categories}
    assert shares["precision.int8"] > 0.9


def test_a_name_before_the_limit_is_not_compared_with_what_is_behind(tmp_path: Path) -> None:
    """Conv → Relu → Conv, exported as a float Conv that writes `r` → unsigned 8 bits → Conv."""
    draw = np.random.default_rng(3)
    kernels = [draw.standard_normal((8, 8, 1, 1)).astype(np.float32) / 3 for _ in range(2)]
    weights = {"w": kernels[0], "v": kernels[1], "s": np.float32(0.02), "z": np.uint8(0)}
    plain = nodes_of("c = Conv(x, w) r = Relu(c) y = Conv(r, v)")
    export = nodes_of(
        "r = Conv(x, w) r_QuantizeLinear_Output = QuantizeLinear(r, s, z) "
        "r_DequantizeLinear_Output = DequantizeLinear(r_QuantizeLinear_Output, s, z) "
        "y = Conv(r_DequantizeLinear_Output, v)"
    )
    for name, nodes in (("plain", plain), ("export", export)):
        read = {n for node in nodes for n in node.input}
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 6, 6])],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items() if k in read],
        )
        opset = [helper.make_opsetid("", 17)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=9)
        onnx.save(made, tmp_path / f"{name}.onnx")
    options = AuditOptions(
        backends=(BackendSpec("ort"),), candidate=tmp_path / "export.onnx", threads=1
    )
    report = audit(tmp_path / "plain.onnx", options, noises=discovery.noises(), progress=Silent())
    (part,) = report.backends
    assert {name for s in part.segments for name in s.outputs} == {"c", "r", "y"}
    (finding,) = report.findings
    assert (finding.nodes, finding.noise) == (("Relu → r",), "precision.int8")
    assert finding.explained == pytest.approx(1.0)


def test_activations_with_a_scale_for_each_of_many_channels(tmp_path: Path) -> None:
    """As NNCF quantises what a depthwise convolution reads; so many scales lie in the file."""
    scales = np.linspace(0.01, 0.02, 300, dtype=np.float32)
    model = onnx_model(
        """(float[1, 300, 4] x) => (float[1, 300, 4] y) { r = Relu(x) q = QuantizeLinear<axis = 1>
        (r, s, z) d = DequantizeLinear<axis = 1>(q, s, z) y = Neg(d) }""",
        {"s": scales, "z": np.zeros(300, np.uint8)},
    )
    onnx.save(model, tmp_path / "m.onnx")
    options = AuditOptions(backends=(BackendSpec("ort"),), threads=1, confirm=False)
    report = audit(tmp_path / "m.onnx", options, noises=discovery.noises(), progress=Silent())
    assert report.gaps == () and report.findings == ()
    assert report.backends[0].segments


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_float_weights_that_openvino_quantises_by_their_range(tmp_path: Path) -> None:
    """As NNCF leaves them; in the middle between two steps, another sum of roundings decides."""
    scale = np.float32(0.00594925)
    weights = (np.arange(-127, 127, dtype=np.float32) + np.float32(0.5)) * scale
    model = onnx_model(
        """(float[2, 254] x) => (float[2, 254] y)
        { q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = Mul(x, d) }""",
        {"w": weights, "s": scale, "z": np.int8(0)},
    )
    onnx.save(model, tmp_path / "m.onnx")
    options = AuditOptions(
        backends=(BackendSpec("ov"),), options={"ov": MORE["ov"]}, threads=1, confirm=False
    )
    report = audit(tmp_path / "m.onnx", options, noises=discovery.noises(), progress=Silent())
    (finding,) = report.findings
    assert finding.noise == "precision.int8_requantisation" and finding.explained > 0.9999
    assert any("quantised by their range" in line for line in finding.evidence)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_quantised_layers_of_a_transformer_are_observed_in_8_bits(tmp_path: Path) -> None:
    """Between kernels that hand over integers, and with GELU between grids that meet half-way."""
    draw = np.random.default_rng(3)
    weights = {
        "one": np.ones(24, np.float32),
        "none": np.zeros(24, np.float32),
        "w1": draw.standard_normal((24, 48)).astype(np.float32) / 4,
        "w2": draw.standard_normal((48, 24)).astype(np.float32) / 4,
        "root": np.float32(np.sqrt(2)),
        "plus": np.float32(1),
        "half": np.float32(0.5),
    }
    nodes = []
    for layer, source, target in (("a", "x", "r"), ("b", "r", "y")):
        norm, up, small, erf, more, gate, act = (f"{layer}{i}" for i in range(7))
        nodes += [
            helper.make_node("LayerNormalization", [source, "one", "none"], [norm]),
            helper.make_node("MatMul", [norm, "w1"], [up]),
            helper.make_node("Div", [up, "root"], [small]),
            helper.make_node("Erf", [small], [erf]),
            helper.make_node("Add", [erf, "plus"], [more]),
            helper.make_node("Mul", [up, more], [gate]),
            helper.make_node("Mul", [gate, "half"], [act]),
            helper.make_node("MatMul", [act, "w2"], [target]),
        ]
    shape = [1, 16, 24]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    samples = draw.standard_normal((4, *shape)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=samples)
    path = tmp_path / "q.onnx"
    quantization.quantize_static(model, str(path), Calibration(samples))
    options = AuditOptions(
        backends=(BackendSpec("ov"),),
        options={"ov": MORE["ov"]},
        data=tmp_path / "data.npz",
        samples=1,
        threads=1,
        pictures=False,
        confirm=False,
    )
    (part,) = audit(path, options, noises=discovery.noises(), progress=Silent()).backends
    proof = part.fidelity
    assert proof is not None and proof.outputs_bitwise_equal and proof.program_unchanged
    assert proof.output_proved + proof.cone_proved >= 0.9 * proof.candidates
    blamed = {segment.noise for segment in part.segments if segment.introduced > segment.floor}
    # Only a processor without VNNI adds pairs of products in 16 bits.
    assert blamed <= {"precision.int8_requantisation", "precision.int8_saturation"}
