"""Loading and checking models, and fixing the shapes of their inputs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.graphs.shapes import resolve_shapes
from auditor.ports import Silent
from auditor.replays.reference import Reference
from tests.helpers import onnx_model


def linear(
    shape: list[int | str | None] | None = None, *, name: str = "x", dtype: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """``y = relu(x @ w)`` with a 4x3 weight."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [name, "w"], ["h"], name="product"),
            helper.make_node("Relu", ["h"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info(name, dtype, shape or ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def save(proto: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def external(folder: Path, location: str) -> Path:
    """``linear()`` with its weight in an external file that is not written."""
    proto = linear()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return save(proto, folder)


def identity_of(*inputs: onnx.ValueInfoProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", [v.name], [f"{v.name}_out"]) for v in inputs]
    outputs = [
        helper.make_tensor_value_info(f"{v.name}_out", v.type.tensor_type.elem_type, None)
        for v in inputs
    ]
    for output in outputs:
        output.type.tensor_type.shape.SetInParent()
    graph = helper.make_graph(nodes, "g", list(inputs), outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def declared(name: str, *shape: int | str | None, dtype: int = TensorProto.FLOAT) -> object:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def test_describes_the_model(tmp_path: Path) -> None:
    path = save(linear(), tmp_path)
    model = models.load(path)
    assert model.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (model.info.opset, model.info.nodes, model.info.parameters) == (17, 2, 12)
    assert model.outputs == ("y",)
    assert [(s.name, s.dtype, s.shape) for s in model.inputs] == [
        ("x", np.dtype(np.float32), ("batch", 4))
    ]
    assert model.dynamic
    assert not models.load(save(linear([2, 4]), tmp_path)).dynamic


def test_outputs_may_have_no_shape(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = models.load(save(proto, tmp_path))
    assert not model.proto.graph.output[0].type.tensor_type.HasField("shape")


def test_initialisers_are_not_inputs(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    assert [s.name for s in models.load(save(proto, tmp_path)).inputs] == ["x"]


def test_initialisers_need_not_be_inputs_in_old_files(tmp_path: Path) -> None:
    """Tools that take them from the inputs leave the version, 3, in which they had to be there."""
    proto = linear()
    proto.ir_version, proto.opset_import[0].version = 3, 8
    model = models.load(save(proto, tmp_path))
    assert [s.name for s in model.inputs] == ["x"]
    assert Reference(model, 1).run({"x": np.ones((1, 4), np.float32)})["y"].tolist() == [
        [18, 22, 26]
    ]


@pytest.mark.parametrize("imported", ["", "ai.onnx"])
def test_the_other_spelling_of_the_domain(tmp_path: Path, imported: str) -> None:
    """ONNX Runtime takes both, and a graph without a name."""
    proto = linear([1, 4])
    proto.opset_import[0].domain = imported
    proto.graph.node[0].domain = "ai.onnx"
    proto.graph.name = ""
    options = AuditOptions(backends=(BackendSpec("ort"),), threads=1)
    report = audit(save(proto, tmp_path), options, noises=(), progress=Silent())
    (ort,) = report.backends
    assert report.model.opset == 17 and report.gaps == () and report.findings == ()
    assert ort.fidelity is not None and ort.fidelity.output_proved == ort.fidelity.candidates == 2


def test_labels_fall_back_to_the_key_where_names_are_empty_or_repeated(tmp_path: Path) -> None:
    model = models.load(save(linear(), tmp_path))
    assert model.labels == {"h": "product", "y": "Relu → y"}
    proto = linear()
    proto.graph.node[1].name = "product"
    repeated = models.load(save(proto, tmp_path))
    assert repeated.labels == {"h": "MatMul → h", "y": "Relu → y"}
    assert [models.key(n) for n in repeated.proto.graph.node] == ["h", "y"]


def test_key_skips_omitted_outputs() -> None:
    assert models.key(helper.make_node("LSTM", ["x"], ["", "", "c"])) == "c"


def test_external_data_is_loaded_and_hashed(tmp_path: Path) -> None:
    path = external(tmp_path, "weights.bin")
    weight = np.arange(12, dtype=np.float32)
    (tmp_path / "weights.bin").write_bytes(weight.tobytes())
    model = models.load(path)
    loaded = numpy_helper.to_array(model.proto.graph.initializer[0])
    assert np.array_equal(loaded.ravel(), weight)
    (tmp_path / "weights.bin").write_bytes((weight + 1).tobytes())
    assert models.load(path).info.sha256 != model.info.sha256


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(UsageError, match="outside the model's folder") as caught:
        models.load(external(folder, location))
    assert "Refused" in caught.value.hint


@pytest.mark.parametrize("through", ["file", "folder"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, through: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "w.bin").write_bytes(bytes(48))
    folder = tmp_path / "model"
    folder.mkdir()
    if through == "file":
        os.symlink(tmp_path / "secret" / "w.bin", folder / "w.bin")
        path = external(folder, "w.bin")
    else:
        os.symlink(tmp_path / "secret", folder / "sub")
        path = external(folder, "sub/w.bin")
    with pytest.raises(UsageError, match="outside the model's folder"):
        models.load(path)


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path = external(tmp_path, "weights.bin")
    with pytest.raises(UsageError, match=r"`weights\.bin`.*missing"):
        models.load(path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data.add(key="length", value="48")
    save(proto, tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    with pytest.raises(UsageError, match="`w`"):
        models.load(path)


def test_external_data_in_a_constant_is_checked_too(tmp_path: Path) -> None:
    proto = linear()
    value = numpy_helper.from_array(np.zeros(4, np.float32), "k")
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    value.external_data.add(key="location", value="../k.bin")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="outside the model's folder"):
        models.load(save(proto, tmp_path / "model"))


def test_model_local_functions_are_known_and_inlined(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[1].op_type = "Gate"
    proto.graph.node[1].domain = "acme"
    opset = helper.make_opsetid("", 17)
    relu = helper.make_node("Relu", ["a"], ["b"])
    proto.functions.append(helper.make_function("acme", "Gate", ["a"], ["b"], [relu], [opset]))
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    model = models.load(save(proto, tmp_path))
    assert {n.op_type for n in model.proto.graph.node} == {"MatMul", "Relu"}
    assert model.proto.graph.node[-1].output[0] == "y"


def test_unknown_domain_is_named_even_inside_a_branch(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Warp", ["h"], ["out"], domain="acme")],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, 3])],
    )
    proto = linear()
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    del proto.graph.node[1]
    proto.graph.node.append(
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    )
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    with pytest.raises(UsageError, match="`Warp` of the unknown domain `acme`"):
        models.load(save(proto, tmp_path))


def test_checker_failure_names_the_node(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[1].op_type = "Frobnicate"
    with pytest.raises(UsageError, match="Frobnicate"):
        models.load(save(proto, tmp_path))


@pytest.mark.parametrize("field", ["input", "output", "initializer"])
def test_duplicate_names(tmp_path: Path, field: str) -> None:
    proto = linear()
    entries = getattr(proto.graph, field)
    entries.append(entries[0])
    with pytest.raises(UsageError, match=f"more than one {field}"):
        models.load(save(proto, tmp_path))


def test_nodes_of_one_name(tmp_path: Path) -> None:
    """ONNX lets them; ONNX Runtime, which computes the reference, does not."""
    proto = linear()
    for node in proto.graph.node:
        node.name = "node"
    model = models.load(save(proto, tmp_path))
    assert model.labels == {"h": "MatMul → h", "y": "Relu → y"}
    x = np.ones((1, 4), np.float32)
    assert Reference(model, 1).run({"x": x})["y"].tolist() == [[18, 22, 26]]


def test_a_locale_that_is_not_installed(tmp_path: Path) -> None:
    proto = onnx_model(
        "(string[2] x) => (int64[2] y) { "
        'low = StringNormalizer <case_change_action = "LOWER", locale = "xx_XX.UTF-8"> (x) '
        'y = ai.onnx.ml.LabelEncoder <keys_strings = ["a"], values_int64s = [1]> (low) }'
    )
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    with pytest.raises(UsageError, match="locale") as caught:
        Reference(models.load(save(proto, tmp_path)), 1)
    assert "locale-gen" in caught.value.hint


def test_two_nodes_computing_one_tensor(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node.append(helper.make_node("Relu", ["h"], ["y"]))
    with pytest.raises(UsageError, match="more than one node output named `y`"):
        models.load(save(proto, tmp_path))


def test_inputs_that_cannot_be_fed(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("s", TensorProto.STRING, [1])
    with pytest.raises(UsageError, match="output `s_out` is a string"):
        models.load(save(identity_of(text), tmp_path))
    proto = linear()
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    sequence = helper.make_value_info("q", helper.make_sequence_type_proto(element))
    proto.graph.input.append(sequence)
    with pytest.raises(UsageError, match="input `q` is a sequence"):
        models.load(save(proto, tmp_path))
    proto = linear()
    del proto.graph.input[:]
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((1, 4), np.float32), "x"))
    with pytest.raises(UsageError, match="no input"):
        models.load(save(proto, tmp_path))


def test_outputs_that_are_no_numbers_are_named_and_left_out(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node.append(helper.make_node("SplitToSequence", ["y"], ["q"], axis=0))
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    sequence = helper.make_value_info("q", helper.make_sequence_type_proto(element))
    proto.graph.output.append(sequence)
    model = models.load(save(proto, tmp_path))
    assert model.outputs == ("y",) and [o.name for o in model.proto.graph.output] == ["y"]
    assert model.unread == ("output `q` is a sequence, which is not compared",)
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    proto.graph.node.append(helper.make_node("Optional", ["y"], ["o"]))
    proto.graph.output.append(helper.make_value_info("o", optional))
    model = models.load(save(proto, tmp_path))
    assert model.unread[1] == "output `o` is an optional, which is not compared"
    del proto.graph.output[0]
    with pytest.raises(UsageError, match="output `q` is a sequence"):
        models.load(save(proto, tmp_path))


def test_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UsageError) as caught:
        models.load(path)
    assert "git lfs pull" in caught.value.hint


class TestShapes:
    """resolve_shapes: declared, then given, then recorded, then defaults."""

    @staticmethod
    def load(folder: Path, *inputs: object) -> models.Model:
        return models.load(save(identity_of(*inputs), folder))  # type: ignore[arg-type]

    def test_defaults_are_noted(self, tmp_path: Path) -> None:
        model = self.load(
            tmp_path,
            declared("nchw", "N", 3, "H", "W"),
            declared("nhwc", None, None, None, 3),
            declared("ids", "batch", "seq", dtype=TensorProto.INT64),
            declared("mask", "batch", "seq", dtype=TensorProto.INT64),
        )
        shapes, notes = resolve_shapes(model, {}, {})
        assert shapes == {
            "nchw": (1, 3, 224, 224),
            "nhwc": (1, 224, 224, 3),
            "ids": (1, 16),
            "mask": (1, 16),
        }
        assert "input `ids`: dimension `seq` set to 16" in notes
        assert "input `nhwc`: dimension 1 (unnamed) set to 224" in notes
        assert not any("mask" in note for note in notes), "one note per symbol"

    def test_a_symbol_has_one_value(self, tmp_path: Path) -> None:
        model = self.load(tmp_path, declared("a", "n", "t"), declared("b", "t", 5))
        shapes, notes = resolve_shapes(model, {"b": (7, 5)}, {})
        assert shapes == {"a": (1, 7), "b": (7, 5)}
        assert notes == ("input `a`: dimension `n` set to 1",)
        shapes, notes = resolve_shapes(model, {"a": (1, 3), "b": (7, 5)}, {})
        assert shapes == {"a": (1, 3), "b": (7, 5)}
        assert notes == (
            "input `b`: dimension `t` is 7 here and 3 elsewhere, though one name should mean "
            "one size",
        )

    def test_placeholders_are_no_names(self, tmp_path: Path) -> None:
        model = self.load(tmp_path, declared("x", "?", 3, "?", -1), declared("y", 0, "None"))
        assert [spec.shape for spec in model.inputs] == [(None, 3, None, None), (0, None)]
        recorded = {"x": (1, 3, 48, 192), "y": (0, 5)}
        assert resolve_shapes(model, {}, recorded) == (recorded, ())

    def test_recorded_shapes_win_over_defaults_but_not_over_given_ones(
        self, tmp_path: Path
    ) -> None:
        model = self.load(tmp_path, declared("x", "n", 3, "h", "w"))
        recorded = {"x": (2, 3, 8, 9)}
        assert resolve_shapes(model, {}, recorded) == (recorded, ())
        with pytest.raises(UsageError, match="x"):
            resolve_shapes(model, {"x": (1, 3, 8, 9)}, recorded)

    def test_sums_of_symbols(self, tmp_path: Path) -> None:
        model = self.load(
            tmp_path,
            declared("past", "batch", "past_len"),
            declared("all", "batch", "past_len + 1"),
        )
        shapes, _ = resolve_shapes(model, {"past": (2, 9)}, {})
        assert shapes["all"] == (2, 10)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((1, 4, 8, 8), "dimension 1 is fixed at 3"),
            ((1, 3, 8), "4 dimensions needed"),
        ],
    )
    def test_contradictions(self, tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
        model = self.load(tmp_path, declared("x", "n", 3, "h", "w"))
        with pytest.raises(UsageError, match=message):
            resolve_shapes(model, {"x": shape}, {})

    def test_unknown_input_gets_a_suggestion(self, tmp_path: Path) -> None:
        model = self.load(tmp_path, declared("images", "n", 3))
        with pytest.raises(UsageError, match="`image`") as caught:
            resolve_shapes(model, {"image": (1, 3)}, {})
        assert "Did you mean `images`?" in caught.value.hint


def test_nodes_in_another_order_are_sorted(tmp_path: Path) -> None:
    proto = linear()
    last = proto.graph.node.pop()
    proto.graph.node.insert(0, last)
    model = models.load(save(proto, tmp_path))
    assert [node.op_type for node in model.proto.graph.node] == ["MatMul", "Relu"]


def test_operators_of_a_domain_that_is_not_imported(tmp_path: Path) -> None:
    """NNCF writes MatMulNBits so; ONNX Runtime imports what it has itself, and nothing else."""
    proto = onnx_model("(float[2, 2] x) => (float[2, 2] y) { y = com.microsoft.Gelu(x) }")
    assert [o.domain for o in proto.opset_import] == [""]
    options = AuditOptions(backends=(BackendSpec("ort"),), threads=1)
    report = audit(save(proto, tmp_path), options, noises=(), progress=Silent())
    assert report.gaps == () and report.findings == () and report.backends[0].segments
    proto.graph.node[0].domain = "nobody.knows"
    with pytest.raises(UsageError, match="nobody"):
        models.load(save(proto, tmp_path))


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[0].input[0] = "y"
    with pytest.raises(UsageError, match="topologically sorted"):
        models.load(save(proto, tmp_path))
