"""`audit generate`: the greedy text of a decoder, and what turns one of its decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import pytest

from auditor import discovery, pieces
from auditor.audit import AuditOptions, BackendSpec
from auditor.errors import UsageError
from auditor.graphs import model as models
from auditor.graphs.segments import Graph
from auditor.ports import Arrays, Silent
from auditor.records.backend import Skipped
from auditor.records.generation import GenerationReport
from auditor.replays.replay import Replayer
from auditor.sequences import generate, rerun
from auditor.sequences.caches import caches_of, checked, decoder_of
from auditor.sequences.runs import Harness
from benchmarks import decoder as writer
from reports import _generate as table
from tests import helpers

SHAPE = writer.Shape(layers=2, hidden=64, inner=128, heads=4, groups=2, vocabulary=2000, tokens=24)
PROMPT = [1553, 1912, 528, 415]


@dataclass(frozen=True)
class Narrow:
    """A backend that computes this decoder in few bits, and a prompt of whose text that turns one.

    Attributes:
        bits: of the weights of the decoder's products, in the file.
        cure: the option that avoids ``noise``.
    """

    backend: str
    options: dict[str, str]
    noise: str
    cure: dict[str, str]
    prompt: list[int]
    bits: int = 32

    def write(self, path: Path, shape: writer.Shape) -> None:
        """Write the decoder."""
        writer.write(path, shape, seed=2)
        if self.bits == 4:
            model = onnx.version_converter.convert_version(onnx.load(path), 21)
            onnx.save(helpers.in_4_bits(model), path)


ONES = {
    "4 bits": Narrow(
        "ort",
        {},
        "precision.int8_dynamic",
        {"session.qdq_matmulnbits_accuracy_level": "1"},
        [399, 277, 782, 1407],
        bits=4,
    ),
    "bfloat16": Narrow(
        "ov",
        {"INFERENCE_PRECISION_HINT": "bf16"},
        "precision.bf16",
        {"INFERENCE_PRECISION_HINT": "f32"},
        PROMPT,
    ),
}


@pytest.fixture(params=ONES)
def narrow(request: pytest.FixtureRequest) -> Narrow:
    """What turns a decision: on every processor, and on those with bfloat16."""
    if request.param == "bfloat16":
        helpers.needs_bf16()
    return ONES[request.param]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    writer.write(made, SHAPE, seed=2)
    return made


def written(
    path: Path,
    folder: Path,
    *backends: str,
    narrow: Narrow | None = None,
    given: Arrays | None = None,
) -> GenerationReport:
    ids = (narrow.backend,) if narrow else backends
    asked = AuditOptions(
        backends=tuple(BackendSpec(id) for id in ids),
        threads=1,
        options={narrow.backend: narrow.options} if narrow else {},
    )
    return generate.generate(
        path,
        narrow.prompt if narrow else PROMPT,
        11,
        Harness(asked, discovery.noises(), Silent(), folder),
        given=given,
    )


def test_a_turned_decision_is_traced_to_layers_and_mended(narrow: Narrow, tmp_path: Path) -> None:
    path = tmp_path / "narrow.onnx"
    narrow.write(path, SHAPE)
    report = written(path, tmp_path, narrow=narrow)
    (turned,) = report.backends
    assert turned.first is not None and turned.text[: turned.first] == report.text[: turned.first]
    step = turned.steps[turned.first]
    assert turned.text[turned.first] == step.other != step.token and step.margin_after < 0
    assert turned.categories[0].noise == narrow.noise and turned.categories[0].share > 0.9
    assert {effect.layer for effect in turned.effects} >= {"layer0", "layer1"}
    kept = turned.kept
    assert kept is not None and kept.failure is None and 0 < len(kept.layers) <= kept.among
    assert kept.options == narrow.cure and kept.turned == 0
    assert f"token {step.number}: {step.other}" in table.render(report, 100, False)


def test_caches_are_fed_back_to_each_backend(path: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cached.onnx"
    writer.write(cached, replace(SHAPE, caches=True), seed=2)
    report = written(cached, tmp_path, "ort")
    (ort,) = report.backends
    assert report.caches == 4 and len(report.text) == 11
    # A decoder that is two in one is told whether it has caches yet.
    merged = tmp_path / "merged.onnx"
    onnx.save(two_in_one(onnx.load(cached)), merged)
    assert written(merged, tmp_path).text == report.text
    # In steps with caches and in one run with padding, the reference writes the same.
    assert written(path, tmp_path).text == report.text
    assert ort.first is None and ort.text == report.text
    # What was not observed is said, with the reason.
    assert ort.fidelity is not None
    proof = replace(ort.fidelity, candidates=9, skipped=(Skipped("t", "out of sight"),))
    hidden = replace(report, backends=(replace(ort, fidelity=proof),))
    assert "1 of 9 tensors not observed (t): out of sight" in table.render(hidden, 100, False)
    assert all((step.caches or 0) < 1e-5 for step in ort.steps)


def test_an_error_that_caches_carry_is_told_from_the_steps_own(
    narrow: Narrow, tmp_path: Path
) -> None:
    path = tmp_path / "narrow.onnx"
    narrow.write(path, replace(SHAPE, caches=True))
    report = written(path, tmp_path, narrow=narrow)
    (turned,) = report.backends
    first, carried = turned.first, turned.carried
    assert first is not None and carried is not None and carried.number == first > 0
    step = turned.steps[first]
    assert turned.text[:first] == report.text[:first] and turned.text[first] == step.other
    assert all(1e-4 < (s.caches or 0) < 1e-1 for s in turned.steps)
    assert carried.inherited > 1e-4 and carried.introduced > 1e-4
    assert carried.lead + carried.by_caches + carried.by_step < 0 < carried.lead
    for causes in (turned.categories, carried.categories):
        assert causes[0].noise == narrow.noise and causes[0].share > 0.9
    assert {"layer0", "past_key_values.1 (caches)"} <= {e.layer for e in turned.effects}
    kept = turned.kept
    assert kept is not None and kept.failure is None and 0 < len(kept.layers) < kept.among
    assert kept.turned == 0 and kept.pieces > 1
    assert f"token {first}" in table.render(report, 100, False)


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
    harness = Harness(AuditOptions(backends=(), threads=1), (), Silent(), tmp_path)
    with pytest.raises(UsageError, match="not fed back") as error:
        generate.generate(path, PROMPT, 4, harness, caches=crossed)
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


def test_an_encoders_result_is_given_to_a_decoder_without_caches(
    path: Path, tmp_path: Path
) -> None:
    proto = onnx.load(path)
    graph = proto.graph
    graph.input.append(
        onnx.helper.make_tensor_value_info("states", onnx.TensorProto.FLOAT, [1, "read", 64])
    )
    (index,) = (i for i, node in enumerate(graph.node) if "embedded" in node.output)
    graph.node[index].output[0] = "own"
    graph.node.insert(
        index + 1, onnx.helper.make_node("ReduceMean", ["states"], ["seen"], axes=[1])
    )
    graph.node.insert(index + 2, onnx.helper.make_node("Add", ["own", "seen"], ["embedded"]))
    both = tmp_path / "both.onnx"
    onnx.save(proto, both)
    drawn = np.random.default_rng(0)
    made = [drawn.normal(0, 1, (1, size, 64)) for size in (5, 7)]
    reports = [written(both, tmp_path, "ort", given={"states": states}) for states in made]
    for report in reports:
        (part,) = report.backends
        assert part.gap is None and part.text == report.text
    assert reports[0].text != reports[1].text
    with pytest.raises(UsageError, match="is fed back") as error:
        written(both, tmp_path, "ort")
    assert "--data" in error.value.hint


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
