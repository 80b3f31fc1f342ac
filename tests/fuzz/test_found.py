"""What the fuzzer found, made small: each ended the auditor with a traceback once."""

import warnings
import zipfile

import numpy as np
import onnx
import pytest

from auditor import datafiles, stimulus
from auditor.comparison import tasks
from auditor.errors import UsageError
from auditor.graphs import model
from auditor.pipeline import description
from auditor.pipeline.postprocessing import post, results
from auditor.pipeline.preprocessing import libraries
from auditor.verdict import policy
from tests.fuzz import mutations


def _refused(load, *arguments):
    with pytest.raises(UsageError) as refused:
        load(*arguments)
    assert refused.value.hint
    assert "\n" not in refused.value.message
    return refused.value.message


@pytest.mark.parametrize("elem_type", [0, 99])
def test_an_input_of_no_type_there_is(tmp_path, elem_type):
    proto = mutations.network()
    del proto.graph.node[:]
    proto.graph.node.append(onnx.helper.make_node("Identity", ["w"], ["y"]))
    proto.graph.input[0].type.tensor_type.elem_type = elem_type
    onnx.save(proto, tmp_path / "m.onnx")
    assert "`x`" in _refused(model.load, tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16", "INT4"])
def test_a_constant_with_fewer_bytes_than_its_shape(tmp_path, kind):
    proto = mutations.network()
    weights = proto.graph.initializer[0]
    weights.data_type = onnx.TensorProto.DataType.Value(kind)
    weights.raw_data = weights.raw_data[:10]
    onnx.save(proto, tmp_path / "m.onnx")
    assert "`w`" in _refused(model.load, tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["sizes", "scale", "conv", "fuzzed", "kernel_shape"])
def test_a_name_that_is_no_utf8(tmp_path, name):
    whole = mutations.network().SerializeToString()
    assert name.encode() in whole
    (tmp_path / "m.onnx").write_bytes(whole.replace(name.encode(), b"\xff" * len(name)))
    assert "not UTF-8" in _refused(model.load, tmp_path / "m.onnx")


@pytest.mark.parametrize("as_node", [False, True])
def test_a_constant_of_no_type_there_is(tmp_path, as_node):
    proto = mutations.network()
    odd = onnx.TensorProto(data_type=99, name="odd", int64_data=[1])
    if as_node:
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["odd"], value=odd))
    else:
        proto.graph.initializer.append(odd)
    onnx.save(proto, tmp_path / "m.onnx")
    assert "unknown type 99" in _refused(model.load, tmp_path / "m.onnx")


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_a_text_of_an_output_without_classes(shape):
    described = post.Post("text", text="ctc")
    assert "shape" in _refused(results.result, {"y": np.zeros(shape, np.float32)}, described)


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_an_input_larger_than_memory(tmp_path, size):
    proto = mutations.network()
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size
    onnx.save(proto, tmp_path / "m.onnx")
    loaded = model.load(tmp_path / "m.onnx")
    assert "GiB" in _refused(stimulus.load, loaded, None, 0, 1, {})


@pytest.mark.parametrize("location", ["\x00", "a" * 100_000])
def test_external_data_at_a_place_that_cannot_be(tmp_path, location):
    proto = mutations.network()
    weights = proto.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", location
    onnx.save(proto, tmp_path / "m.onnx")
    _refused(model.load, tmp_path / "m.onnx")


def test_an_npz_that_points_before_its_start(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, x=np.zeros(64, np.float32))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    path.write_bytes(whole[100:start] + whole[start:])
    _refused(datafiles.read, path, "--data")


def test_an_npy_whose_header_does_not_end(tmp_path):
    path = tmp_path / "d.npy"
    np.save(path, np.zeros((1, 2), np.float32))
    path.write_bytes(path.read_bytes().replace(b"), }", b"(, }"))
    _refused(datafiles.read, path, "--data")


@pytest.mark.parametrize("load", [policy.load, description.load])
def test_toml_nested_deeper_than_the_parser_can(tmp_path, load):
    path = tmp_path / "deep.toml"
    path.write_text("fail_on = " + "[" * 5000)
    _refused(load, path)


def test_a_name_with_line_breaks_stays_on_one_line(tmp_path):
    proto = mutations.network()
    proto.graph.input[0].name = "x\n\x1b[2J"
    proto.graph.node[0].input[0] = "x\n\x1b[2J"
    proto.graph.input[0].type.Clear()
    onnx.save(proto, tmp_path / "m.onnx")
    assert "\x1b" not in _refused(model.load, tmp_path / "m.onnx")


def test_an_output_of_the_largest_numbers():
    """Its length is no float any more; nothing of numpy's belongs on a screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert tasks.assume("y", np.full((1, 4, 3, 4), 3e38, np.float32)) == "none"


def test_what_a_decoder_says_is_the_same_from_run_to_run():
    with pytest.raises(libraries.PhotoError) as refused:
        libraries.decoder("pillow").decode(b"no picture", "default")
    assert " at 0x" not in str(refused.value)


def test_what_libjpeg_says_names_no_temporary_file():
    with pytest.raises(libraries.PhotoError) as refused:
        libraries.decoder("jpeglib").decode(b"\xff\xd8" + bytes(99) + b"\xff\xd9", "6b")
    assert "/tmp" not in str(refused.value)
