"""The catalogue as a whole: what every cause states, and that its statements are kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from auditor import discovery
from auditor.graphs import model
from auditor.graphs.segments import Graph
from auditor.noises import __main__ as generator
from auditor.ports import Noise, SegmentGraph
from auditor.records.backend import BuildRequest

ROOT = Path(__file__).parents[2]
NOISES = tuple(discovery.noises())


def named(noise: Noise, variant: str) -> bool:
    """Whether a variant's name is one of the noise's forms; words in capitals stand for any."""
    patterns = (re.sub(r"\b[A-Z]{4,}\b", ".+", re.escape(f)) for f in noise.forms)
    return any(re.fullmatch(pattern, variant) for pattern in patterns) or variant in noise.forms


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.id)
def test_a_cause_states_everything(noise: Noise) -> None:
    sentences = (noise.title, noise.cause, noise.applies, noise.source, noise.advice)
    assert all(sentences) and re.fullmatch(r"[a-z]+\.[a-z0-9_]+", noise.id)
    for text in (noise.title, noise.applies, noise.advice, *noise.remedies.values()):
        assert not text.endswith("."), "the report and the documentation end the sentence"
    assert noise.cause.endswith(".")
    assert set(noise.remedies) <= set(discovery.backend_ids())
    assert noise.remedy("none of ours") == noise.advice
    assert all(noise.remedy(id) == text for id, text in noise.remedies.items())
    assert len(set(noise.forms)) == len(noise.forms)
    assert set(noise.ablations) <= set(discovery.backend_ids())
    assert set(noise.otherwise) <= set(noise.ablations)
    assert noise.convention or not noise.cancelling
    assert all(any(f.startswith(start) for f in noise.forms) for start in noise.cancelling)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.id)
def test_an_option_that_is_set_already_is_no_remedy(noise: Noise) -> None:
    for id, options in noise.ablations.items():
        said = noise.remedy(id, {"more": "options"} | options)
        assert said and not [key for key in options if key in said]


@pytest.mark.parametrize(
    "id", sorted({*discovery.backend_ids()} - {"torch"})
)  # it has no such option
def test_backends_take_the_options_that_switch_causes_off(id: str, tmp_path: Path) -> None:
    backend = discovery.backend(id)
    if not backend.availability().available:
        pytest.skip(f"{id} is not installed")
    path = tmp_path / "relu.onnx"
    value = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y"))
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "g", [next(value)], [next(value)])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    options = {k: v for n in NOISES for k, v in n.ablations.get(id, {}).items()}
    request = BuildRequest(path, {"x": (1, 4)}, False, None, 1, options, tmp_path)
    stated = {k.lower(): v for k, v in backend.build(request).provenance.options.items()}
    assert {k.lower() for k in options} <= stated.keys()


@pytest.mark.parametrize("id", discovery.backend_ids())
def test_backends_and_causes_speak_of_the_same_switches(id: str) -> None:
    """A backend lists what a build can leave out, and which causes that can bring."""
    files = (ROOT / "backends").glob(f"*{id}*.py")  # its own, and those that it is made of
    source = "".join(file.read_text(encoding="utf-8") for file in files).lower()
    named = re.findall(r'"((?:precision|implementation|inference)\.[a-z0-9_]+)"', source)
    assert set(named) <= {noise.id for noise in NOISES}
    keys = {key for noise in NOISES for key in noise.ablations.get(id, {})}
    assert all(key.lower() in source for key in keys)


def test_the_documentation_is_up_to_date() -> None:
    text = (ROOT / "docs" / "noises.md").read_text(encoding="utf-8")
    assert text == generator.markdown(), "run: python -m auditor.noises > docs/noises.md"


def test_the_documentation_is_printed_by_one_command() -> None:
    command = [sys.executable, "-m", "auditor.noises"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == generator.markdown()


def everything() -> onnx.ModelProto:
    """One node of nearly every kind that the catalogue has something to say about."""
    r = np.random.default_rng(0)
    weights_ = {
        "w": r.standard_normal((4, 4, 3, 3)),
        "m": r.standard_normal((8, 8)),
        "s": np.ones(4),
        "z": np.zeros(4),
        "slope": np.full(8, 0.1),
        "scales": np.array([1, 1, 1.3, 1.3]),
    }
    initializers = [
        onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights_.items()
    ]
    initializers += [
        onnx.numpy_helper.from_array(np.array([0, 0, 1, 0, 0, 0, 0, 1]), "amounts"),
        onnx.numpy_helper.from_array(np.array([1]), "one"),
        onnx.numpy_helper.from_array(np.float32(0.1), "qs"),
        onnx.numpy_helper.from_array(np.uint8(3), "qz"),
    ]
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 0]),
        node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 0]),
        node(
            "AveragePool", ["c"], ["a"], kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER"
        ),
        node(
            "MaxPool", ["c"], ["same"], kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_LOWER"
        ),
        node("Pad", ["c", "amounts"], ["padded"], mode="reflect"),
        node("InstanceNormalization", ["c", "s", "z"], ["n"]),
        node("BatchNormalization", ["c", "s", "z", "z", "s"], ["b"]),
        *(node("Resize", ["c", "", "scales"], [f"r{m}"], mode=m) for m in ("linear", "nearest")),
        node("Resize", ["c", "", "scales"], ["rcubic"], mode="cubic", exclude_outside=1),
        *(node(op, ["c"], [op]) for op in ("Sigmoid", "Tanh", "Erf", "Exp", "HardSwish", "Relu")),
        node("HardSigmoid", ["c"], ["HardSigmoid"]),
        node("Softmax", ["c"], ["soft"], axis=1),
        node("PRelu", ["c", "slope"], ["prelu"]),
        node("ReduceMean", ["c"], ["mean"], axes=[2, 3], keepdims=0),
        node("ReduceMax", ["c"], ["max"], axes=[1]),
        node("ArgMax", ["c"], ["arg"], axis=1),
        node("Round", ["c"], ["round"]),
        node("Cast", ["c"], ["long"], to=TensorProto.INT64),
        node("Div", ["long", "long"], ["divided"]),
        node("Cast", ["c"], ["byte"], to=TensorProto.UINT8),
        node("Add", ["byte", "byte"], ["sum"]),
        node("Cast", ["c"], ["wide"], to=TensorProto.DOUBLE),
        node("Sqrt", ["wide"], ["root"]),
        node("Cast", ["c"], ["half"], to=TensorProto.FLOAT16),
        node("ReduceSum", ["half", "one"], ["halfsum"]),
        node("QuantizeLinear", ["c", "qs", "qz"], ["q"]),
        node("DequantizeLinear", ["q", "qs", "qz"], ["dq"]),
        node("MatMul", ["c", "m"], ["product"]),
    ]
    read = {name for n in nodes for name in n.input}
    outputs = [onnx.ValueInfoProto(name=n.output[0]) for n in nodes if n.output[0] not in read]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 9])
    graph = helper.make_graph(nodes, "everything", [x], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("noise", NOISES, ids=lambda n: n.id)
def test_every_variant_is_a_documented_form(noise: Noise) -> None:
    for variant in noise.variants(SegmentGraph(everything(), ())):
        assert named(noise, variant.name), variant.name


def test_variants_of_a_real_model_are_documented(minilm: Path) -> None:
    loaded = model.load(minilm)
    graph = Graph(loaded.proto)
    ends = [graph.nodes[60].output[0]]  # the first layers say what the others would
    cut = graph.cut([*loaded.outputs, *ends])[0]
    types = {spec.name: TensorProto.INT64 for spec in loaded.inputs}
    proto = graph.extract(cut, types, None, loaded.weights)
    for noise in NOISES:
        for _, variant in zip(range(3), noise.variants(SegmentGraph(proto, ())), strict=False):
            assert named(noise, variant.name), (noise.id, variant.name)


def test_a_file_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cause that is missing could leave something unexplained, so the audit does not go on."""
    monkeypatch.setitem(sys.modules, "auditor.noises.bf16", None)
    with pytest.raises(RuntimeError, match=r"auditor/noises/bf16\.py cannot be used"):
        list(discovery.noises())


def test_a_file_without_a_noise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_modules", lambda package: ("_cause",))
    with pytest.raises(RuntimeError, match=r"_cause\.py cannot be used.*NOISE"):
        list(discovery.noises())
