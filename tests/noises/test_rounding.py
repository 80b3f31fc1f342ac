from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import surgery
from auditor.noises import bf16, fp16, tf32
from auditor.ports import Array, SegmentGraph
from auditor.replays import rounding, sessions
from auditor.replays.rounder import Sites
from auditor.replays.writer import Format
from tests.helpers import nodes_of

EVERYTHING = Sites("every operator", "operator", inputs=True, outputs=True)
BITS = arrays(np.uint32, st.integers(1, 40), elements=st.integers(0, 2**32 - 1))


def through(to: Format, values: Array, opset: int) -> Array:
    """``values`` after the rounding that surgery inserts, run by ONNX Runtime."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "s0",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    (variant,) = rounding.variants(SegmentGraph(model, ()), to, (EVERYTHING,))
    result: Array = sessions.session(variant.model, 1).run(["y"], {"x": values})[0]
    return result


def nearest_even(values: Array, bits: int) -> Array:
    """Finite normal float32 rounded to ``bits`` significant bits with integer arithmetic."""
    raw = values.view(np.uint32).astype(np.uint64)
    drop = np.uint64(24 - bits)
    odd = (raw >> drop) & np.uint64(1)
    kept = (raw + ((np.uint64(1) << (drop - np.uint64(1))) - np.uint64(1)) + odd) >> drop
    return (kept << drop).astype(np.uint32).view(np.float32)


def same_bits(a: Array, b: Array) -> bool:
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


@settings(max_examples=60)
@given(BITS)
def test_bf16_has_the_bits_of_ml_dtypes(bits: Array) -> None:
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert same_bits(through(bf16.FORMAT, values, opset=13), expected)


@settings(max_examples=60)
@given(BITS)
@pytest.mark.parametrize("opset", [7, 17])
def test_fp16_has_the_bits_of_numpy(opset: int, bits: Array) -> None:
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    assert same_bits(through(fp16.FORMAT, values, opset), expected)


@settings(max_examples=60)
@given(
    arrays(
        np.float32, 16, elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
    )
)
@pytest.mark.parametrize(("to", "opset"), [(tf32.FORMAT, 17), (bf16.FORMAT, 11)])
def test_splitting_rounds_to_nearest(to: Format, opset: int, values: Array) -> None:
    values = np.where(np.abs(values) < 2.0**-100, np.float32(0), values)
    rounded = through(to, values, opset)
    expected = nearest_even(values, to.bits)
    tie = np.abs(rounded - values) == np.abs(expected - values)
    assert np.all((rounded == expected) | tie)
    assert same_bits(through(to, rounded, opset), rounded)


def test_largest_mask_becomes_infinite_in_bf16_and_fp16_overflows() -> None:
    values = np.array([-3.4028235e38, 65504, 65520, 1e-8], np.float32)
    assert through(bf16.FORMAT, values, 17)[0] == -np.inf
    assert through(fp16.FORMAT, values, 17).tolist() == [-np.inf, 65504, np.inf, 0]


def test_integers_and_tensors_of_other_types_are_left_alone() -> None:
    graph = helper.make_graph(
        nodes_of("rows = Gather <axis = 0> (table, ids) wide = Cast <to = 11> (ids)"),
        "s0",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, None)],
        [
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("wide", TensorProto.DOUBLE, None),
        ],
        [numpy_helper.from_array(np.full((3, 2), 1 / 3, np.float32), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ids = np.array([2**40 + 1, 2][1:], np.int64)
    for variant in rounding.variants(SegmentGraph(model, ()), bf16.FORMAT, bf16.SITES):
        rows, wide = sessions.session(variant.model, 1).run(["rows", "wide"], {"ids": ids})
        assert wide.dtype == np.float64 and wide.tolist() == [2.0]
        assert rows.dtype == np.float32 and rows[0, 0] == np.float32(ml_dtypes.bfloat16(1 / 3))


def test_surgery_can_be_repeated_on_its_own_result() -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "s0",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.full((1, 4), 1 + 2**-9, np.float32)
    seen = set[float]()
    for first in rounding.variants(SegmentGraph(model, ()), fp16.FORMAT, fp16.SITES):
        for second in rounding.variants(SegmentGraph(first.model, ()), bf16.FORMAT, bf16.SITES):
            (y,) = sessions.session(second.model, 1).run(["y"], {"x": x})
            seen.update(y.ravel().tolist())
    assert seen == {1.0, 1 + 2**-9}  # rounded to bfloat16, or only its weights were


@pytest.mark.parametrize("old", [7, 9, 11, 12])
def test_upgrading_offers_a_model_with_the_same_bits(old: int) -> None:
    graph = helper.make_graph(
        nodes_of("wide = Unsqueeze <axes = [0]> (x) y = Softmax(wide)"),
        "s0",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", old)], ir_version=8)
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    expected = sessions.session(model, 1).run(["y"], {"x": x})[0]
    matching = 0
    for upgraded in surgery.upgraded(model, 13):
        assert surgery.opset(upgraded) == 13
        try:
            result = sessions.session(upgraded, 1).run(["y"], {"x": x})[0]
        except Exception:  # the relabelled model keeps an attribute that opset 13 dropped
            continue
        matching += bool(np.array_equal(result, expected))
    assert matching == 1
