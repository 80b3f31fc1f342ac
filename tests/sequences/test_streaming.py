"""`audit stream`: states fed back on each side, and what causes a step's error."""

from __future__ import annotations

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.ports import Silent
from auditor.records.backend import Skipped
from auditor.sequences import streaming
from auditor.sequences.runs import Harness
from auditor.sequences.streaming import Asked
from reports import _stream as table
from tests import helpers

HIDDEN = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRU over frames of 16 samples, and a probability."""
    rng = np.random.default_rng(4)
    shapes = {"w": (1, 3 * HIDDEN, 16), "r": (1, 3 * HIDDEN, HIDDEN), "v": (HIDDEN, 1)}
    tensors = [
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    tensors.append(numpy_helper.from_array(np.array([0]), "first"))
    nodes = [
        helper.make_node("Unsqueeze", ["sound", "first"], ["frames"]),
        helper.make_node("GRU", ["frames", "w", "r", "", "", "h"], ["", "hn"], hidden_size=HIDDEN),
        helper.make_node("Squeeze", ["hn", "first"], ["last"]),
        helper.make_node("MatMul", ["last", "v"], ["score"]),
        helper.make_node("Sigmoid", ["score"], ["speech"]),
    ]
    graph = helper.make_graph(
        nodes,
        "vad",
        [
            helper.make_tensor_value_info("sound", TensorProto.FLOAT, ["batch", "samples"]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "batch", HIDDEN]),
        ],
        [
            helper.make_tensor_value_info("speech", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("hn", TensorProto.FLOAT, [1, "batch", HIDDEN]),
        ],
        tensors,
    )
    made = tmp_path_factory.mktemp("vad") / "vad.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(proto, made)
    return made


def filtered(path: Path) -> onnx.ModelProto:
    """The same behind a product of weights in 4 bits."""
    model = onnx.load(path)
    model.opset_import[0].version = 21
    weights = np.random.default_rng(6).standard_normal((16, 16)).astype(np.float32) / 4
    model.graph.initializer.append(numpy_helper.from_array(weights, "bank"))
    model.graph.node[0].input[0] = "filtered"
    model.graph.node.insert(0, helper.make_node("MatMul", ["sound", "bank"], ["filtered"]))
    return helpers.in_4_bits(model, 16)


@pytest.mark.parametrize(
    ("backend", "options", "noise"),
    [
        ("ort", {}, "precision.int8_dynamic"),
        ("ov", {"INFERENCE_PRECISION_HINT": "bf16"}, "precision.bf16"),
    ],
)
def test_each_side_keeps_its_own_states(
    path: Path, tmp_path: Path, backend: str, options: dict[str, str], noise: str
) -> None:
    if backend == "ov":
        helpers.needs_bf16()
    else:
        onnx.save(filtered(path), tmp_path / "filtered.onnx")
        path = tmp_path / "filtered.onnx"
    sound = np.random.default_rng(7).standard_normal(20 * 12 + 4) * 3000
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(sound.astype(np.int16).tobytes())
    asked = Asked(wave=tmp_path / "sound.wav", frame=12, context=4)
    engine = AuditOptions((BackendSpec(backend),), threads=1, options={backend: options})
    harness = Harness(engine, discovery.noises(), Silent(), tmp_path)
    report = streaming.stream(path, asked, {}, harness, save=tmp_path / "step.npz")
    (narrow,) = report.backends
    assert report.states == (("h", "hn"),) and report.output == "speech"
    assert narrow.gap is None and len(narrow.steps) == 20
    first, *later = narrow.steps
    # Both begin with the same state; from then on each has its own.
    assert first.inherited == 0 and first.introduced == pytest.approx(first.relative_l2)
    assert all(step.inherited > 0 and step.states > 0 for step in later)
    assert all(len(step.decision) == 1 and step.margin is not None for step in narrow.steps)
    assert narrow.categories[0].noise == noise and narrow.categories[0].share > 0.9
    # What is written is the step as the backend had it: its frame begins with the last samples.
    with np.load(tmp_path / "step.npz") as step:
        assert step["sound"].shape == (1, 16) and step["h"].shape == (1, 1, HIDDEN)
        heard = np.trunc(np.concatenate([np.zeros(4), sound])) / 2**15
        at = narrow.looked * 12
        assert np.allclose(step["sound"][0], heard[at : at + 16], atol=1e-7)
    assert narrow.fidelity is not None
    proof = replace(narrow.fidelity, candidates=9, skipped=(Skipped("t", "out of sight"),))
    hidden = replace(report, backends=(replace(narrow, fidelity=proof),))
    said = table.render(hidden, 100, False)
    assert f"step {narrow.looked}" in said
    assert "1 of 9 tensors not observed (t): out of sight" in said
    assert '"introduced"' in table.render_json(report)


def test_states_are_paired_by_their_names(path: Path, tmp_path: Path) -> None:
    model = models.load(path)

    def pairs(inputs: str, outputs: str, **named: str) -> dict[str, str]:
        specs = tuple(replace(model.inputs[0], name=name) for name in inputs.split())
        other = replace(model, inputs=specs, outputs=tuple(outputs.split()))
        return streaming.states_of(other, named)

    assert pairs("x h c", "y hn cn") == {"h": "hn", "c": "cn"}
    assert pairs("x state sr", "y stateN") == {"state": "stateN"}
    assert pairs("x cache_in", "y cache_out") == {"cache_in": "cache_out"}
    keys = "past.0.key past.1.key", "logits present.0.key present.1.key"
    assert set(pairs(*keys).values()) == {"present.0.key", "present.1.key"}
    assert pairs("x s", "y t", s="t") == {"s": "t"}
    with pytest.raises(UsageError, match="looks like a state") as error:
        pairs("x", "y")
    assert "--state" in error.value.hint
    with pytest.raises(UsageError, match="no output of the model"):
        pairs("x s", "y t", s="u")
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    for asked, said in (
        (Asked(wave=tmp_path / "no.wav"), "cannot be read"),
        (Asked(values={"rate": 1.0}), "no input beside"),
    ):
        with pytest.raises(UsageError, match=said):
            streaming.stream_of(model, {"h": "hn"}, asked)
