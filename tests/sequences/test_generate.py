"""`audit generate`: the greedy text of a decoder, and what turns one of its decisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from auditor import discovery, pieces
from auditor.audit import AuditOptions, BackendSpec
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.graphs.segments import Graph
from auditor.ports import Silent
from auditor.records.generation import GenerationReport
from auditor.replays.replay import Replayer
from auditor.sequences import generate, rerun
from auditor.sequences.caches import caches_of, checked, decoder_of
from benchmarks import decoder as writer
from reports import _generate as table

PROMPT = [1553, 1912, 528, 415]  # bfloat16 turns the eleventh token of this decoder
SHAPE = writer.Shape(layers=2, hidden=64, inner=128, heads=4, groups=2, vocabulary=2000, tokens=24)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    writer.write(made, SHAPE, seed=2)
    return made


def written(path: Path, folder: Path, *backends: str, **options: str) -> GenerationReport:
    asked = AuditOptions(
        backends=tuple(BackendSpec(id) for id in backends),
        threads=1,
        options={"ov": options} if options else {},
    )
    return generate.generate(
        path,
        PROMPT,
        11,
        asked,
        noises=discovery.noises(),
        progress=Silent(),
        scratch=folder,
    )


def test_a_turned_decision_is_traced_to_layers_and_mended(path: Path, tmp_path: Path) -> None:
    report = written(path, tmp_path, "ov", INFERENCE_PRECISION_HINT="bf16")
    (turned,) = report.backends
    assert turned.first is not None and turned.text[: turned.first] == report.text[: turned.first]
    step = turned.steps[turned.first]
    assert turned.text[turned.first] == step.other != step.token and step.margin_after < 0
    assert turned.categories[0].noise == "precision.bf16" and turned.categories[0].share > 0.9
    assert {effect.layer for effect in turned.effects} >= {"layer0", "layer1"}
    kept = turned.kept
    assert kept is not None and kept.failure is None and 0 < len(kept.layers) <= kept.among
    assert kept.options == {"INFERENCE_PRECISION_HINT": "f32"} and kept.turned == 0
    assert f"token {step.number}: {step.other}" in table.render(report, 100, False)


def test_caches_are_fed_back_to_each_backend(tmp_path: Path) -> None:
    path = tmp_path / "cached.onnx"
    writer.write(path, replace(SHAPE, caches=True), seed=2)
    report = written(path, tmp_path, "ort", "ov", INFERENCE_PRECISION_HINT="bf16")
    ort, ov = report.backends
    assert report.caches == 4 and len(report.text) == 11
    # A decoder that is two in one is told whether it has caches yet.
    merged = tmp_path / "merged.onnx"
    onnx.save(two_in_one(onnx.load(path)), merged)
    assert written(merged, tmp_path).text == report.text
    # In steps with caches and in one run with padding, the reference writes the same.
    plain = tmp_path / "decoder.onnx"
    writer.write(plain, SHAPE, seed=2)
    assert written(plain, tmp_path).text == report.text
    assert ort.first is None and ort.text == report.text
    assert all((step.caches or 0) < 1e-5 for step in ort.steps)
    assert ov.first is not None and ov.carried is not None and ov.carried.number == ov.first > 0
    step, carried = ov.steps[ov.first], ov.carried
    assert ov.text[: ov.first] == report.text[: ov.first] and ov.text[ov.first] == step.other
    assert all(1e-4 < (s.caches or 0) < 1e-1 for s in ov.steps)
    assert carried.inherited > 1e-4 and carried.introduced > 1e-4
    assert carried.lead + carried.by_caches + carried.by_step < 0 < carried.lead
    for causes in (ov.categories, carried.categories):
        assert causes[0].noise == "precision.bf16" and causes[0].share > 0.9
    assert {"layer0", "past_key_values.1 (caches)"} <= {effect.layer for effect in ov.effects}
    kept = ov.kept
    assert kept is not None and kept.failure is None and 0 < len(kept.layers) < kept.among
    assert kept.turned == 0 and kept.pieces > 1
    assert f"token {ov.first}" in table.render(report, 100, False)


def two_in_one(cached: onnx.ModelProto) -> onnx.ModelProto:
    """A decoder as optimum merges it: one branch with caches, one without."""
    graph = cached.graph
    made = {name for node in graph.node for name in node.output}
    branches = {}
    for branch in ("then_branch", "else_branch"):
        body = branches[branch] = onnx.GraphProto(name=branch)
        for node in graph.node:
            new = body.node.add()
            new.CopyFrom(node)
            new.input[:] = [f"{branch}/{n}" if n in made else n for n in node.input]
            new.output[:] = [f"{branch}/{n}" for n in node.output]
        body.output.extend(onnx.ValueInfoProto(name=f"{branch}/{o.name}") for o in graph.output)
    outputs = [output.name for output in graph.output]
    del graph.node[:]
    graph.node.append(onnx.helper.make_node("If", ["use_cache_branch"], outputs, **branches))
    kind = onnx.TensorProto.BOOL
    graph.input.append(onnx.helper.make_tensor_value_info("use_cache_branch", kind, [1]))
    return cached


def test_wrongly_paired_caches_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cached.onnx"
    writer.write(path, replace(SHAPE, caches=True), seed=2)
    model = models.load(path)
    past = [f"past_key_values.{i}.key" for i in range(2)]
    crossed = {past[0]: "present.1.key", past[1]: "present.0.key"}
    options = AuditOptions(backends=(), threads=1)
    with pytest.raises(UsageError, match="not fed back") as error:
        generate.generate(
            path, PROMPT, 4, options, noises=(), progress=Silent(), scratch=tmp_path, caches=crossed
        )
    assert "--cache" in error.value.hint
    with pytest.raises(UsageError, match="no output of the model"):
        caches_of(model, {past[0]: "presents.0.key"})
    # Without telling names, the order pairs them.
    outputs = ("logits", *(f"out{i}" for i in range(4)))
    pairs = caches_of(replace(model, outputs=outputs), {past[1]: "out0"})
    assert [c.present for c in pairs] == ["out1", "out2", "out0", "out3"]
    with pytest.raises(UsageError, match="is fed back"):
        caches_of(replace(model, outputs=outputs[:-1]), {})


def test_what_an_encoder_made_stays_the_same(tmp_path: Path) -> None:
    """Its result is given, the caches of what it read are written by the first run and stay."""
    path = tmp_path / "cached.onnx"
    writer.write(path, replace(SHAPE, caches=True), seed=2)
    model = models.load(path)
    first = next(spec for spec in model.inputs if spec.name.startswith("past"))
    dims = tuple("read" if axis == 2 else size for axis, size in enumerate(first.shape))
    states = models.TensorSpec("states", np.dtype(np.float32), ("batch", "read", 4))
    others = (spec for spec in model.inputs if spec != first)
    model = replace(model, inputs=(replace(first, shape=dims), *others, states))
    given = checked(model, {"states": np.ones((1, 5, 4))})
    caches = caches_of(model, {}, given)
    assert [cache.length for cache in caches] == [5, None, None, None]
    decoder = decoder_of(model, caches, given)
    feeds = decoder.feeds([1, 2], 0, None)
    assert feeds["states"].dtype == np.float32 and feeds[first.name].shape[2] == 5
    before, now = ({n: np.full(1, v) for n in model.outputs} for v in (1, 2))
    kept = decoder.after(now, before)
    assert {n: int(v[0]) for n, v in kept.items()} == {
        n: 1 if n == caches[0].present else 2 for n in model.outputs
    }
    with pytest.raises(UsageError, match="which is no input"):
        checked(model, {"stats": np.ones((1, 5, 4))})


def test_pieces_compute_what_the_whole_does(path: Path) -> None:
    model = models.load(path)
    graph = Graph(model.proto)
    replayer = Replayer(graph, 1, model.weights, model.folder)
    feeds = {"input_ids": np.arange(24)[None]}
    whole = replayer.stream(feeds)
    chosen = {i for i, node in enumerate(graph.nodes) if node.name.startswith("layer1")}
    made = pieces.split(graph, chosen)
    assert [piece.chosen for piece in made] == [False, True, False]
    assert sorted(i for piece in made for i in piece.cut.nodes if piece.chosen) == sorted(chosen)
    values = replayer.walk([piece.cut for piece in made], feeds)
    assert np.array_equal(values["logits"], whole["logits"])


def test_what_is_no_decoder_is_refused(path: Path, tmp_path: Path) -> None:
    model = models.load(path)
    with pytest.raises(UsageError, match="takes 24 tokens") as error:
        rerun.decoder_of(model, 10, 32)
    assert "--tokens 14" in error.value.hint
    with pytest.raises(UsageError, match="vocabulary, which ends at 1999"):
        generate._check_prompt(model, [3, 2000])
    cached = replace(model, inputs=(*model.inputs, replace(model.inputs[0], name="past.0.key")))
    with pytest.raises(UsageError, match="no sequence of tokens"):
        rerun.decoder_of(cached, 4, 16)
    proto = onnx.load(path)
    mask = next(t for t in proto.graph.initializer if t.name == "mask")
    mask.CopyFrom(onnx.numpy_helper.from_array(np.zeros((24, 24), np.float32), "mask"))
    onnx.save(proto, tmp_path / "encoder.onnx")
    with pytest.raises(UsageError, match="not causal"):
        written(tmp_path / "encoder.onnx", tmp_path, "ort")
