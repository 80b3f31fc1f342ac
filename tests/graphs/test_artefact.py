"""Compiled files whose constants differ: what is recognised, and what the audit makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.graphs import artefact, model
from auditor.graphs.storage import storage_of
from auditor.ports import Array, SegmentGraph, Silent
from auditor.records.report import AuditReport
from auditor.replays import qdq, recurrent, sessions
from tests.helpers import onnx_model


def original() -> Array:
    return np.random.default_rng(3).standard_normal((16, 8, 3, 3)).astype(np.float32)


def save(
    path: Path, w: Array, *, name: str = "w", quantised: tuple[Array, Array] | None = None
) -> Path:
    bias = np.linspace(-1, 1, 16, dtype=np.float32)
    constants = {name: w, "b": bias}
    nodes = []
    if quantised is not None:
        constants = {"q": quantised[0], "s": quantised[1], "b": bias}
        nodes = [helper.make_node("DequantizeLinear", ["q", "s"], [name], axis=0)]
    nodes += [
        helper.make_node("Conv", ["x", name, "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 1, 1])],
        [numpy_helper.from_array(v, n) for n, v in constants.items()],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def changed(tmp_path: Path, w: Array, **how: Any) -> dict[str, Any]:
    ours = model.load(save(tmp_path / "ours.onnx", original()))
    theirs = model.load(save(tmp_path / "theirs.onnx", w, **how))
    return artefact.changed(ours, theirs, {n: n for n in ("x", "c", "r", "y")})


def rounded_to_8_bits(w: Array, percentile: float, axis: int | None) -> tuple[Array, Array]:
    """Integers and scales of a calibration that clips: a percentile of |w| is the largest value."""
    axes = None if axis is None else tuple(i for i in range(w.ndim) if i != axis)
    largest = np.percentile(abs(w), percentile, axis=axes, keepdims=axes is not None)
    scale = np.asarray(largest / 127, np.float32)
    return np.clip(np.round(w / scale), -127, 127).astype(np.int8), scale


def test_equal_constants_are_not_listed(tmp_path: Path) -> None:
    assert changed(tmp_path, original()) == {}


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("percentile", [100, 99])
def test_eight_bits(tmp_path: Path, axis: int | None, percentile: float) -> None:
    integers, scale = rounded_to_8_bits(original(), percentile, axis)
    (found,) = changed(tmp_path, (integers * scale).astype(np.float32)).values()
    assert found.storage == "8 bits" and found.factor is None
    assert 1e-3 < found.relative_l2 < 0.1
    coarse = 18 * scale  # 15 levels
    (found,) = changed(
        tmp_path, (np.clip(np.round(original() / coarse), -7, 7) * coarse).astype("f4")
    ).values()
    assert found.storage == "4 bits"
    # What steps times a scale are rounded to in a file of half precision.
    trained = original().astype("f2").astype("f4")
    integers, scale = rounded_to_8_bits(trained, percentile, axis)
    assert storage_of(trained, (integers * scale).astype("f2").astype("f4")) == "8 bits"


@pytest.mark.parametrize("rounding", [np.floor, np.trunc])
def test_other_roundings(tmp_path: Path, rounding: np.ufunc) -> None:
    """bfloat16 as the upper half of the bits; 8 bits by a cast to integers; no grid that moved.

    Half precision without subnormals.
    """
    w = original()
    small = np.where(np.arange(w.size).reshape(w.shape) % 3, w, w * np.float32(1e-4))
    half = small.astype("f2").astype("f4")
    assert storage_of(small, np.where(abs(half) < 2**-14, 0, half)) == "float16"
    assert storage_of(small, np.where(abs(half) < 2**-10, 0, half)) is None
    upper = (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert storage_of(w, upper) == "bfloat16"
    assert storage_of(upper, upper + np.spacing(upper) * 2**16) is None
    scale = (abs(w).max(axis=(1, 2, 3), keepdims=True) / 127).astype(np.float32)
    integers = np.clip(rounding(w / scale), -127, 127).astype(np.int8)
    assert storage_of(w, (integers * scale).astype("f4")) == "8 bits"
    for moved, chosen in ((0, True), (1, False)):
        stored = (integers + np.int8(moved), scale.reshape(-1))
        (constant,) = changed(tmp_path, w, name="v", quantised=stored).values()
        assert constant.quantised is chosen


def test_eight_bits_of_a_depthwise_filter() -> None:
    """Nine values to a grid, hardly two of which fall together."""
    w = np.random.default_rng(2).standard_normal((32, 1, 3, 3)).astype(np.float32)
    integers, scale = rounded_to_8_bits(w, 100, 0)
    assert storage_of(w, (integers * scale).astype(np.float32)) == "8 bits"


def test_bits_of_a_convolution_in_blocks() -> None:
    w = np.random.default_rng(2).standard_normal((8, 16, 3, 3)).astype(np.float32)
    blocks = w.reshape(-1, 16)
    for bits, expected in ((8, "8 bits"), (6, None), (4, "4 bits")):
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
        assert storage_of(w, (np.round(blocks / scale) * scale).reshape(w.shape)) == expected


@pytest.mark.parametrize("dropped", [np.s_[:, 3], np.s_[3], np.s_[:32, 3]])
def test_a_dropped_channel_is_no_storage(dropped: Any) -> None:
    """Blocks of zeros say nothing, and all others are as they were."""
    w = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    value = w.copy()
    value[dropped] = 0
    assert storage_of(w, value) is None


def test_eight_bits_as_integers_under_another_name(tmp_path: Path) -> None:
    integers, scale = rounded_to_8_bits(original(), 100, 0)
    found = changed(tmp_path, original(), name="w_dq", quantised=(integers, scale.reshape(-1)))
    assert found.keys() == {"w"} and found["w"].storage == "8 bits"
    assert np.allclose(found["w"].values, integers * scale, rtol=1e-6)


def test_what_a_quantiser_chose(tmp_path: Path) -> None:
    """Values on the nearest steps; not those of other steps, nor a scale that was changed."""
    w = original()
    integers, scale = rounded_to_8_bits(w, 100, 0)
    for factor, chosen in ((1, True), (np.float32(1.02), False)):
        (constant,) = changed(tmp_path, w, name="v", quantised=(integers, scale * factor)).values()
        assert constant.quantised is chosen
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    stored = {"s": np.float32(0.1), "z": np.uint8(3)}
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()]
    graph = helper.make_graph([node], "g", [], [], tensors)
    assert qdq.grids(graph).keys() == {"x"} and not qdq.grids(graph, before=graph)
    values = np.random.default_rng(1).uniform(-0.3, 25, 100).astype(np.float32)
    (awaited,) = qdq.awaited(graph).values()
    steps = np.round(values / np.float32(0.1)) * np.float32(0.1)
    assert qdq.lies_on(steps, awaited) and not qdq.lies_on(values, awaited)
    assert not qdq.lies_on(steps - 1, awaited)  # beyond the smallest
    fine = {"s": np.float32(25 / 65000), "z": np.uint16(500)}
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in fine.items()]
    (sixteen,) = qdq.awaited(helper.make_graph([node], "g", [], [], tensors)).values()
    steps = np.round(values / fine["s"]) * fine["s"]
    assert qdq.lies_on(steps, sixteen) and not qdq.lies_on(values, sixteen)
    graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    assert not qdq.awaited(graph)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision(tmp_path: Path, kind: int) -> None:
    narrow = helper.tensor_dtype_to_np_dtype(kind)
    (found,) = changed(tmp_path, original().astype(narrow).astype(np.float32)).values()
    assert found.storage == narrow.name


def test_many_values_are_all_looked_at() -> None:
    """Large tensors are read piece by piece; one value at the end is enough."""
    w = np.random.default_rng(0).standard_normal((3, 20_000)).astype(np.float32)
    rounded = w.astype("f2").astype("f4")
    assert storage_of(w, rounded) == "float16"
    rounded[-1, -1] = w[-1, -1] + 1
    assert storage_of(w, rounded) is None


@pytest.mark.parametrize("what", ["scaled", "swapped", "noisy", "dropped", "few values"])
def test_defects_are_no_storage(tmp_path: Path, what: str) -> None:
    w = original()
    if what == "scaled":
        w *= np.float32(1.01)
    elif what == "swapped":
        w = w[[1, 0, *range(2, 16)]]
    elif what == "noisy":
        w += np.random.default_rng(0).standard_normal(w.shape).astype(np.float32) * np.float32(0.01)
    elif what == "dropped":
        w[3] = 0
    else:  # on a grid, but not the one nearest to the original
        w = np.sign(w)
    (found,) = changed(tmp_path, w).values()
    assert found.storage is None
    assert (found.factor == pytest.approx(1.01)) if what == "scaled" else found.factor is None
    assert "`w`" in artefact.sentence("w", found)


def test_channels_without_weight_need_no_grid() -> None:
    w = original()
    w[5] *= np.float32(1e-9)
    integers, scale = rounded_to_8_bits(w, 100, None)
    assert storage_of(w, (integers * scale).astype(np.float32)) == "8 bits"
    integers, scale = rounded_to_8_bits(w, 100, 0)
    value = (integers * scale).astype(np.float32)
    value[5] = 0
    assert storage_of(w, value) == "8 bits"
    value[6] = 0
    assert storage_of(w, value) is None


def test_few_values_are_no_grid() -> None:
    """Gains of one, scalars, columns of single weights: any few numbers lie on some grid."""
    r = np.random.default_rng(0)
    for shape in ((), (1,), (64,), (64, 1), (1, 64, 1)):
        w = np.ones(shape, np.float32)
        assert storage_of(w, w * np.float32(1.01)) is None
        spread = np.asarray(w + 0.01 * r.standard_normal(shape), np.float32)
        assert storage_of(w, spread) is None
        assert storage_of(spread, w) != "8 bits"


def test_a_grid_that_moved_is_no_rounding() -> None:
    """The model was quantised before: its values are on a grid already."""
    integers, scale = rounded_to_8_bits(original(), 100, 0)
    w = (integers * scale).astype(np.float32)
    assert storage_of(w, w * np.float32(1.001)) is None
    stretched = (integers * scale * np.linspace(1, 1.002, 16)[:, None, None, None]).astype("f4")
    assert storage_of(w, stretched) is None


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(2, 300))
def test_random_values_are_on_no_grid(seed: int, size: int) -> None:
    """Of three values and more; any two lie on a grid of their difference."""
    r = np.random.default_rng(seed)
    w = r.standard_normal((size, 9)).astype(np.float32)
    moved = (w * (1 + r.standard_normal(w.shape) * 1e-3)).astype(np.float32)
    assert storage_of(w, moved) is None


# --- the audit ---------------------------------------------------------------------------------


def audited(tmp_path: Path, w: Array) -> AuditReport:
    reference = save(tmp_path / "ours.onnx", original())
    options = AuditOptions(
        backends=(BackendSpec("ort"),),
        candidate=save(tmp_path / "theirs.onnx", w),
        threads=1,
    )
    return audit(reference, options, noises=discovery.noises(), progress=Silent())


def test_a_calibrated_weight_is_named_by_the_compiled_file(tmp_path: Path) -> None:
    """Its scales come from a percentile, which no replay that looks at the model alone can know."""
    integers, scale = rounded_to_8_bits(original(), 99, 0)
    report = audited(tmp_path, (integers * scale).astype(np.float32))
    finding = report.findings[0]
    assert finding.noise == "precision.int8" and (finding.explained or 0) > 0.999
    assert any("stored in 8 bits" in line for line in finding.evidence)


def test_a_scaled_weight_is_evidence_and_no_name(tmp_path: Path) -> None:
    report = audited(tmp_path, original() * np.float32(1.01))
    finding = report.findings[0]
    assert finding.noise is None
    (said,) = (line for line in finding.evidence if "`w`" in line)
    assert "1.0e-02 relative L2: 1.01 times the model's" in said
    (measured,) = (line for line in finding.evidence if "compiled file's constants" in line)
    assert float(measured.split(" explains ")[1].split()[0]) > 0.999
    segment = next(s for s in report.backends[0].segments if s.id == finding.segment)
    assert said in segment.constants and measured in segment.constants
    (headline,) = (w for w in report.backends[0].warnings if "compiled file holds" in w)
    assert "1 constant of the model (relative L2 of `w` 1.0e-02)" in headline
    assert "the error of 1 of 1 segments" in headline
    assert not any("fitted" in tried.variant for tried in segment.hypotheses)  # no search for it


def test_tables_and_recurrent_layers_quantised_dynamically(tmp_path: Path) -> None:
    """ONNX Runtime's tool dequantises what it gathers, and an LSTM rounds what it reads."""
    rng = np.random.default_rng(7)
    sizes = {"t": (50, 8), "W": (2, 24, 8), "R": (2, 24, 6), "B": (2, 48)}
    values = {n: rng.standard_normal(size, np.float32) / 2 for n, size in sizes.items()}
    proto = onnx_model(
        "(int64[5, 1] i) => (float[5, 2, 1, 6] y) { [table] e = Gather(t, i) "
        '[layer] y = LSTM <direction = "bidirectional", hidden_size = 6> (e, W, R, B) }',
        values,
        ir_version=9,
    )
    onnx.save(proto, tmp_path / "m.onnx")
    quantize_dynamic(tmp_path / "m.onnx", tmp_path / "q.onnx")
    ours, theirs = model.load(tmp_path / "m.onnx"), model.load(tmp_path / "q.onnx")
    found = artefact.changed(ours, theirs, {n: n for n in ("i", "e", "y")})
    assert {name: constant.storage for name, constant in found.items()} == dict.fromkeys(
        "tWR", "8 bits"
    )
    rounded = artefact.replaced(ours.proto, {n: c.values for n, c in found.items()})
    assert rounded is not None
    made = recurrent.quantising(SegmentGraph(rounded, ()))
    assert made is not None
    feeds = {"i": np.arange(5)[:, None]}
    results = [sessions.session(m, 1).run(None, feeds)[0] for m in (made, theirs.proto)]
    np.testing.assert_array_equal(*results)
