"""Traces: what another machine or another runtime computed, audited like a backend."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from ml_dtypes import bfloat16
from onnx import helper
from safetensors import numpy as numpy_format

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit, record
from auditor.capture import recording
from auditor.errors import UsageError
from auditor.noises import int8_saturation
from auditor.ports import Silent
from auditor.verdict import ranking
from tests.helpers import onnx_model

RNG = np.random.default_rng(11)
WEIGHTS = [RNG.standard_normal((16, 16)).astype(np.float32) / 4 for _ in range(3)]


def _network(folder, *, scale=1.0, name="model.onnx"):
    """Three products with activations between; ``scale`` is a defect of the second."""
    weights = [w * np.float32(scale if i == 1 else 1) for i, w in enumerate(WEIGHTS)]
    model = onnx_model(
        "(float[1, 16] x) => (float[1, 16] y) { a = MatMul(x, w0) b = Relu(a) c = MatMul(b, w1) "
        "d = Relu(c) y = MatMul(d, w2) }",
        {f"w{i}": w for i, w in enumerate(weights)},
        ir_version=9,
    )
    path = folder / name
    onnx.save(model, path)
    return path


def _dump(folder, *, samples=1, names=None, inputs=True, suffix=".npz", **defect):
    """What some other runtime would dump: every tensor, the samples one after another."""
    model = onnx.load(_network(folder, name="other.onnx", **defect))
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in "abcd")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = np.random.default_rng(1).standard_normal((samples, 1, 16)).astype(np.float32)
    runs = [session.run(list("yabcd"), {"x": row}) for row in rows]
    arrays = {
        (names or {}).get(n, n): np.concatenate(v) for n, *v in zip("yabcd", *runs, strict=True)
    }
    if inputs:
        arrays["x"] = np.concatenate(rows)
    path = folder / f"dump{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        numpy_format.save_file(arrays, path)
    return path, rows


def _audit(model, *, traces=(), backends=(), **options):
    asked = AuditOptions(
        backends=tuple(BackendSpec(b) for b in backends), traces=tuple(traces), **options
    )
    return audit(model, asked, noises=discovery.noises(), progress=Silent())


def _recorded(model, folder, backend="ort", **options):
    path = folder / "trace.npz"
    asked = AuditOptions(backends=(BackendSpec(backend),), **options)
    assert record(model, asked, path, Silent()) is None
    return path


@pytest.mark.parametrize("backend", ["ort", "ov"])
def test_a_recorded_backend_reads_like_the_live_one(tmp_path, backend):
    model = _network(tmp_path)
    trace = _recorded(model, tmp_path, backend, samples=3)
    report = _audit(model, traces=[("there", trace)], backends=[backend], samples=3)
    live, there = report.backends
    assert there.id == "there"
    assert there.status == "audited"
    assert there.outputs == live.outputs
    assert there.fidelity == live.fidelity
    assert [s.id for s in there.segments] == [s.id for s in live.segments]
    assert [s.introduced for s in there.segments] == [s.introduced for s in live.segments]
    assert there.provenance == live.provenance
    assert report.stimulus.samples == 3
    # In the order asked for, whoever is ready first.
    assert [(p.a, p.b) for p in report.agreement] == [
        ("reference", backend),
        ("reference", "there"),
        (backend, "there"),
    ]


def test_a_recorded_fault_is_located_in_another_export(tmp_path):
    model = _network(tmp_path)
    broken = _network(tmp_path, scale=1.01, name="broken.onnx")
    trace = _recorded(broken, tmp_path)
    report = _audit(model, traces=[("there", trace)], candidate=broken)
    assert report.exit_code == 1
    assert report.findings[0].backend == "there"
    assert "c" in {key for s in report.backends[0].segments for key in s.node_keys}
    lead = next(s for s in report.backends[0].segments if s.id == report.findings[0].segment)
    assert "c" in lead.node_keys
    assert report.findings[0].noise is None


@pytest.mark.parametrize("recorded", [True, False])
def test_a_trace_has_the_remedies_of_the_backend_that_recorded_it(tmp_path, recorded):
    model = _network(tmp_path)
    trace = _recorded(model, tmp_path) if recorded else _dump(tmp_path)[0]
    (there,) = _audit(model, traces=[("there", trace)]).backends
    assert there.provenance.backend == ("ort" if recorded else "")
    rule = int8_saturation.NOISE
    said = ranking._remedy(there, [rule], other_file=False)
    assert said == (rule.remedies["ort"] if recorded else rule.advice)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_dump_of_any_runtime_is_located_but_proves_nothing(tmp_path, suffix, samples):
    model = _network(tmp_path)
    path, _ = _dump(tmp_path, scale=1.01, samples=samples, suffix=suffix)
    report = _audit(model, traces=[("phone", path)])
    (phone,) = report.backends
    assert phone.status == "audited"
    assert report.stimulus.samples == samples
    lead = next(s for s in phone.segments if s.id == report.findings[0].segment)
    assert lead.node_keys == ("c",)
    assert not phone.fidelity.outputs_bitwise_equal
    assert phone.fidelity.output_proved <= 1  # the final output, which nobody had to add
    assert any("nothing proves" in warning for warning in phone.warnings)


def test_a_clean_dump_is_silent(tmp_path):
    path, _ = _dump(tmp_path, samples=2)
    report = _audit(_network(tmp_path), traces=[("phone", path)])
    assert report.findings == ()
    assert report.exit_code == 0


def test_integers_under_a_floats_name_are_no_divergence(tmp_path):
    """A runtime that holds a tensor in 8 bits may dump these by the name of what they stand for."""
    model = _network(tmp_path)
    path, _ = _dump(tmp_path)
    with np.load(path) as stored:
        arrays = {k: stored[k] for k in stored}
    np.savez(path, **arrays | {"c": np.clip(arrays["c"], 0, 255).astype(np.uint8)})
    report = _audit(model, traces=[("phone", path)])
    assert report.findings == ()
    (skipped,) = report.backends[0].fidelity.skipped
    assert (skipped.tensor, skipped.reason) == ("c", "the program holds uint8 under its name")


def test_an_output_of_another_type_is_said(tmp_path):
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 4] x) => (bool[1, 4] y) { y = IsNaN(x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    zeros = np.zeros((1, 4), np.float32)
    np.savez(tmp_path / "dump.npz", x=zeros, y=zeros)
    report = _audit(tmp_path / "m.onnx", traces=[("phone", tmp_path / "dump.npz")])
    assert "Output `y` is float32, where the model says bool." in report.backends[0].warnings
    assert report.findings == ()


@pytest.mark.parametrize("narrow", ["float32", "bfloat16", "float16"])
def test_a_cause_is_named_from_a_dump(tmp_path, narrow):
    """Also where the runtime hands over what it holds, in its own narrow type."""
    torch = pytest.importorskip("torch")
    rows = torch.from_numpy(np.random.default_rng(4).standard_normal((1, 16)).astype(np.float32))
    kind = torch.float16 if narrow == "float16" else torch.bfloat16

    def product(x, w):  # as hardware with narrow products and float32 sums does it
        total = x.to(kind).float() @ torch.from_numpy(w).to(kind).float()
        return total if narrow == "float32" else total.to(kind).float()

    a = product(rows, WEIGHTS[0])
    c = product(a.relu(), WEIGHTS[1])
    made = {"a": a, "c": c, "y": product(c.relu(), WEIGHTS[2])}
    if narrow != "float32":
        made = {name: value.to(kind) for name, value in made.items()}
    path = tmp_path / "npu.safetensors"
    pytest.importorskip("safetensors.torch").save_file({"x": rows, **made}, path)
    report = _audit(_network(tmp_path), traces=[("npu", path)])
    noise = "precision.fp16" if narrow == "float16" else "precision.bf16"
    assert {f.noise for f in report.findings} == {noise}
    assert report.backends[0].unexplained_share < 0.01


@pytest.mark.parametrize(("kind", "noise"), [(np.float16, "fp16"), (bfloat16, "bf16")])
def test_infinities_in_a_type_that_is_handed_over_are_that_types(tmp_path, kind, noise):
    """Minus the lowest float, as masks have it, is infinite in either 16 bits; times 0, NaN."""
    constants = {"one": np.float32(1), "low": np.float32(np.finfo(np.float32).min)}
    text = "(float[2, 40] x, float[2, 40] m) => (float[2, 40] y)"
    text += "{ d = Sub(one, m) s = Mul(d, low) y = Add(x, s) }"
    path = tmp_path / "mask.onnx"
    onnx.save(onnx_model(text, constants), path)
    mask = np.ones((2, 40), np.float32)
    mask[:, 25:] = 0
    x = np.random.default_rng(2).standard_normal((2, 40)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        s = (kind(1) - mask.astype(kind)) * kind(constants["low"])
        made = {"s": s, "y": x.astype(kind) + s}
    dump = tmp_path / "npu.safetensors"
    numpy_format.save_file({"x": x, "m": mask, **made}, dump)
    report = _audit(path, traces=[("npu", dump)])
    first = report.findings[0]
    assert (first.noise, first.nodes[-1]) == (f"precision.{noise}", "Mul → s")


def test_names_are_mapped_and_believed_only_if_the_values_agree(tmp_path):
    model = _network(tmp_path)
    path, _ = _dump(tmp_path, scale=1.01, names={"b": "act_1", "c": "fc_2", "a": "fc_1"})
    # `fc_1` is said to be what it is not.
    names = {"act_1": "b", "fc_2": "c", "fc_1": "d2"}
    with pytest.raises(UsageError, match="not in"):
        _audit(model, traces=[("phone", path)], trace_names={"fc_9": "c"})
    report = _audit(model, traces=[("phone", path)], trace_names=names)
    lead = next(s for s in report.backends[0].segments if s.id == report.findings[0].segment)
    assert lead.node_keys == ("c",)
    skipped = {s.tensor for s in report.backends[0].fidelity.skipped}
    assert "d2" in skipped
    wrong = {"act_1": "c", "fc_2": "b"}
    report = _audit(model, traces=[("phone", path)], trace_names=wrong)
    reasons = {s.tensor: s.reason for s in report.backends[0].fidelity.skipped}
    assert "not confirmed" in reasons["b"]
    assert list(reasons) == ["fc_1", "c", "b"]  # as the dump has them, whatever hashes are


def test_data_given_beside_a_dump_must_be_what_it_was_made_with(tmp_path):
    model = _network(tmp_path)
    path, rows = _dump(tmp_path, inputs=False)
    with pytest.raises(UsageError, match="does not hold the inputs"):
        _audit(model, traces=[("phone", path)])
    data = tmp_path / "x.npy"
    np.save(data, rows[0])
    assert _audit(model, traces=[("phone", path)], data=data).exit_code == 0
    path, rows = _dump(tmp_path)
    np.save(data, rows[0] + 1)
    with pytest.raises(UsageError, match="other values of input `x`"):
        _audit(model, traces=[("phone", path)], data=data)


def test_a_trace_of_another_file_is_refused(tmp_path):
    trace = _recorded(_network(tmp_path, scale=1.5, name="old.onnx"), tmp_path)
    with pytest.raises(UsageError, match="recorded from another file"):
        _audit(_network(tmp_path), traces=[("there", trace)])


def test_a_trace_with_fewer_samples_than_asked_for_is_refused_or_a_gap(tmp_path):
    model = _network(tmp_path)
    trace = _recorded(model, tmp_path, samples=2)
    with pytest.raises(UsageError, match="holds 2"):
        _audit(model, traces=[("there", trace)], samples=3)
    data = tmp_path / "x.npy"
    with np.load(trace) as stored:
        first = [stored["input/0/x"], stored["input/1/x"]]
    np.save(data, np.concatenate([*first, first[0]]))
    report = _audit(model, traces=[("there", trace)], data=data)
    assert report.exit_code == 3
    assert "2 samples only" in report.backends[0].gap.reason


def test_a_dump_that_lacks_the_outputs_says_so(tmp_path):
    model = _network(tmp_path)
    path, _ = _dump(tmp_path)
    with np.load(path) as stored:
        arrays = {k: stored[k] for k in stored if k != "y"}
    np.savez(path, **arrays)
    report = _audit(model, traces=[("phone", path)])
    assert any("`y` is missing" in gap.reason for gap in report.gaps)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda h: h.pop("runs"),
        lambda h: h.update(format="audit-trace/9"),
        lambda h: h.update(probes=[{"tensor": 5}]),
        lambda h: h.update(probes=[{"tensor": "c", "fidelity": "sworn"}]),
        lambda h: h.update(program_unchanged="yes"),
        lambda h: h.update(surprise=1),
        lambda h: h.update(provenance=None),
        lambda h: h["runs"][0].update(outputs=["nowhere"]),
        lambda h: h["runs"][0].update(difference="inf"),
    ],
)
def test_a_damaged_trace_is_refused(tmp_path, spoil):
    model = _network(tmp_path)
    trace = _recorded(model, tmp_path)
    with np.load(trace) as stored:
        arrays = {k: stored[k] for k in stored}
    header = json.loads(arrays["audit-trace"].tobytes())
    spoil(header)
    arrays["audit-trace"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(trace, **arrays)
    with pytest.raises(UsageError) as refused:
        _audit(model, traces=[("there", trace)])
    assert refused.value.hint


def test_a_failed_recording_is_a_gap(tmp_path):
    model = onnx.load(_network(tmp_path))
    del model.graph.node[3:]
    model.graph.node.append(helper.make_node("NoSuchOperator", ["c"], ["y"], domain="nowhere"))
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    path = tmp_path / "odd.onnx"
    onnx.save(model, path)
    out = tmp_path / "t.npz"
    done = _cli("record", path, "--backend", "ort", "-o", out)
    assert done.returncode in (2, 3)
    assert "nowhere" in done.stderr
    assert not list(tmp_path.glob("*.npz"))
    assert not list(tmp_path.glob(".*"))


def test_recording_and_auditing_on_the_command_line(tmp_path):
    model, trace = _network(tmp_path), tmp_path / "t.npz"
    done = _cli("record", model, "--backend", "ort", "--samples", "2", "-o", trace)
    assert (done.returncode, done.stderr) == (0, "")
    report = tmp_path / "r.json"
    done = _cli("audit", model, "--trace", f"gpu host={trace}", "-o", report)
    assert done.returncode == 0, done.stderr
    assert [b["id"] for b in json.loads(report.read_text())["backends"]] == ["gpu host"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "nowhere.npz"], "does not exist"),
        (["--trace", "ort={dump}", "--backends", "ort"], "has the name of a backend"),
        (["--trace", "a={dump}", "--trace", "a={dump}"], "two traces are called"),
        (["--trace", "{dump}", "--trace-names", "{dump}"], "--trace-names"),
        (["--trace", "{model}"], "is not a .npz"),
    ],
)
def test_bad_traces_get_one_clear_message(tmp_path, arguments, said):
    model = _network(tmp_path)
    dump, _ = _dump(tmp_path)
    done = _cli("audit", model, *(a.format(dump=dump, model=model) for a in arguments))
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_trace_with_the_name_of_a_backend_in_the_policy(tmp_path):
    model = _network(tmp_path)
    dump, _ = _dump(tmp_path)
    policy = tmp_path / "audit.toml"
    policy.write_text('backends = ["ort"]')
    done = _cli("audit", model, "--trace", f"ort={dump}", "--policy", policy)
    assert done.returncode == 2
    assert "has the name of a backend that the policy asks for" in " ".join(done.stderr.split())


def test_a_trace_is_read_one_sample_at_a_time(tmp_path):
    trace = _recorded(_network(tmp_path), tmp_path, samples=3)
    opened = recording.load("there", trace, {}, Silent())
    arrays = [stored.read(None) for stored in opened._stored.values()]
    assert all(a.size <= 16 for a in arrays)  # an array is one tensor of one sample


def _cli(verb, *arguments):
    verbs = [] if verb == "audit" else [verb]
    return subprocess.run(
        [Path(sys.executable).with_name("audit"), *verbs, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
