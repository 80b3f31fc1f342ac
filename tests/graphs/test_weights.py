"""Weights stay in their files: what is mapped from there is what ONNX's own parser reads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from auditor.graphs import model as models
from auditor.graphs import weights
from auditor.noises import bf16, int8
from auditor.ports import SegmentGraph
from auditor.replays import sessions

TYPES = ["float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bool"]
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 32)


def graph_of(
    initializers: list[TensorProto], nodes: list[onnx.NodeProto] | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes or [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def two_layers() -> onnx.ModelProto:
    """A weight of 2 KiB in each of the ways in which exporters write one."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 32, 32)).astype(np.float32)
    return graph_of(
        [
            numpy_helper.from_array(first, "raw"),
            helper.make_tensor("typed", TensorProto.FLOAT, (32, 32), second.ravel().tolist()),
        ],
        [
            helper.make_node("MatMul", ["x", "raw"], ["a"]),
            helper.make_node("MatMul", ["a", "typed"], ["b"]),
            helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(first, "value")),
            helper.make_node("MatMul", ["b", "c"], ["y"]),
        ],
    )


@settings(max_examples=40)
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(TYPES), st.integers(0, 2000), st.booleans()), max_size=5
    ),
    comment=st.text(max_size=20),
)
def test_every_value_is_what_the_parser_reads(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, int, bool]], comment: str
) -> None:
    rng = np.random.default_rng(len(tensors))
    written = []
    for index, (dtype, size, raw) in enumerate(tensors):
        values = rng.integers(0, 2, size).astype(dtype)
        if raw:
            written.append(numpy_helper.from_array(values, f"t{index}"))
        else:
            kind = helper.np_dtype_to_tensor_dtype(values.dtype)
            written.append(helper.make_tensor(f"t{index}", kind, values.shape, values.tolist()))
        written[-1].doc_string = comment
    proto = graph_of(written)
    path = tmp_path_factory.mktemp("weights") / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    light = weights.read(path)
    mapped = weights.detach(light, path.parent)
    for tensor, (_, size, raw) in zip(proto.graph.initializer, tensors, strict=True):
        again = next(t for t in light.graph.initializer if t.name == tensor.name)
        expected = numpy_helper.to_array(tensor)
        large = expected.nbytes >= 1024 and expected.dtype != bool
        if raw:
            assert (tensor.name in mapped) == large, size
        attached = weights.attach(again, mapped)
        assert np.array_equal(numpy_helper.to_array(attached), expected)
        assert again.doc_string == comment


def test_the_file_holds_the_only_copy(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(two_layers().SerializeToString())
    model = models.load(path)
    assert sorted(model.weights) == ["c", "raw", "typed"]
    assert model.info.nodes == 4
    assert len(model.proto.SerializeToString()) < 1500
    plain = sessions.session(two_layers(), 1).run(None, {"x": X})[0]
    mapped = sessions.session(model.proto, 1, model.folder).run(None, {"x": X})[0]
    assert plain.tobytes() == mapped.tobytes()


def test_causes_are_replayed_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(two_layers().SerializeToString())
    model = models.load(path)
    within = SegmentGraph(weights.inside(model.proto, model.weights), ())
    mapped = SegmentGraph(model.proto, (), weights=model.weights, folder=model.folder)
    for noise in (bf16.NOISE, int8.NOISE):
        for whole, light in zip(noise.variants(within), noise.variants(mapped), strict=True):
            assert light.model.ByteSize() < whole.model.ByteSize()
            plain = sessions.session(whole.model, 1).run(None, {"x": X})[0]
            found = sessions.session(light.model, 1, model.folder).run(None, {"x": X})[0]
            assert plain.tobytes() == found.tobytes()


def linked(folder: Path, name: bytes | str) -> Path:
    path = folder / os.fsdecode(name)
    (folder / "blobs").mkdir()
    blob = folder / "blobs" / "0123"
    blob.write_bytes(two_layers().SerializeToString())
    path.symlink_to(blob)
    return path


def plainly(folder: Path, name: bytes | str) -> Path:
    path = folder / os.fsdecode(name)
    path.write_bytes(two_layers().SerializeToString())
    return path


def apart(folder: Path, name: bytes | str) -> Path:
    """A link into another folder, with the data file beside the link."""
    (folder / "blobs").mkdir()
    blob = folder / "blobs" / "0123"
    light = two_layers()
    raw = light.graph.initializer[0]
    (folder / "m.data").write_bytes(raw.raw_data)
    raw.ClearField("raw_data")
    raw.data_location = TensorProto.EXTERNAL
    raw.external_data.add(key="location", value="m.data")
    blob.write_bytes(light.SerializeToString())
    path = folder / os.fsdecode(name)
    path.symlink_to(blob)
    return path


@pytest.mark.parametrize("where", [plainly, linked, apart])
@pytest.mark.parametrize("name", ["a model.onnx", "模型.onnx", b"caf\xe9.onnx"])
def test_wherever_the_file_is(tmp_path: Path, where: object, name: bytes | str) -> None:
    path = where(tmp_path, name)  # type: ignore[operator]
    model = models.load(path)
    plain = sessions.session(two_layers(), 1).run(None, {"x": X})[0]
    mapped = sessions.session(model.proto, 1, model.folder).run(None, {"x": X})[0]
    assert plain.tobytes() == mapped.tobytes()


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_the_parsers_to_judge(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    encoded = bytearray(two_layers().SerializeToString())
    cut = data.draw(st.integers(1, len(encoded)))
    del encoded[cut:]
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.onnx"
    path.write_bytes(bytes(encoded))
    try:
        whole = onnx.ModelProto.FromString(bytes(encoded))
    except DecodeError:
        with pytest.raises(DecodeError):
            weights.read(path)
        return
    light = weights.read(path)
    assert [n.op_type for n in light.graph.node] == [n.op_type for n in whole.graph.node]
    assert [t.name for t in light.graph.initializer] == [t.name for t in whole.graph.initializer]
