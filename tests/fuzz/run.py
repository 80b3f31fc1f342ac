"""Feed damaged files to everything that reads them in the auditor's own process.

``python -m tests.fuzz.run --count 2000 --seed 0`` tries so many inputs of each target and prints
what became of them. Each must load, or be refused with one message and a hint: anything else is a
bug, and the exit code is 1. The inputs are tried in a child process, so that a crash is pinned to
its seed; ``--target T --seed S --count 1`` repeats a single one.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import numpy as np
import onnx

from auditor.ports import Silent
from tests.fuzz import mutations

_ROOT = Path(__file__).parents[2]
_SECONDS = 20  # after which an input hangs
_MEMORY = 6 * 2**30
_POLICY = """\
fail_on = "medium"
backends = ["ort"]
[tolerance]
relative_l2 = 0.1
[tolerance.ort]
cosine = 0.9
[tolerance.ort.outputs.y]
relative_l2 = 0.08
top1_flips = 0
[categories]
"precision.bf16" = "allow"
[[accept]]
fingerprint = "abc"
reason = "known"
expires = 2027-01-01
"""


class _HangError(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


# --- what reads them -----------------------------------------------------------------------------


def _use_model(path: Path) -> None:
    """Load a model as an audit does, run it, cut it at every tensor, and run the pieces."""
    from auditor import stimulus
    from auditor.graphs import model as models
    from auditor.replays.replay import ReplayError
    from auditor.subject import reference_of

    model = models.load(path)
    samples = stimulus.load(model, None, 0, 1, {})
    try:
        values = onnx.shape_inference.infer_shapes(model.proto).graph.value_info
    except onnx.shape_inference.InferenceError:
        values = []  # the reference says it better
    inferred = [tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values]
    if sum(np.prod(s, dtype=float) for s in (*samples.info.shapes.values(), *inferred)) > 1e7:
        return  # as slow as it asks to be
    reference, _ = reference_of(model, 1, path.parent)
    feeds = reference.wide(samples.sample(0))
    reference.run(feeds)
    names = {name for node in reference.graph.nodes for name in node.output if name}
    try:
        reference.replayer.walk(reference.graph.cut(names), feeds)
    except ReplayError:  # a piece that cannot run alone, which the analysis joins to another
        return


def _model(draw: random.Random, folder: Path, _: Path) -> None:
    path = folder / "model.onnx"
    (folder / "weights.bin").write_bytes(draw.randbytes(432))
    (folder / "link.bin").symlink_to("/etc/passwd")
    path.write_bytes(mutations.damaged_model(draw).SerializeToString())
    _use_model(path)


def _model_bytes(draw: random.Random, folder: Path, _: Path) -> None:
    path = folder / "model.onnx"
    whole = mutations.network().SerializeToString()
    path.write_bytes(mutations.damaged_bytes(whole, draw))
    _use_model(path)


def _data(draw: random.Random, folder: Path, made: Path) -> None:
    from safetensors.numpy import save_file

    from auditor import stimulus
    from auditor.graphs import model as models

    path = folder / f"data{draw.choice(['.npz', '.npy', '.safetensors'])}"
    x = np.zeros((1, 3, 8, 8), np.float32)
    match path.suffix:
        case ".npz":
            draw.choice([np.savez, np.savez_compressed])(path, x=x)
        case ".npy":
            np.save(path, x)
        case _:
            save_file({"x": x}, path)
    path.write_bytes(mutations.damaged_bytes(path.read_bytes(), draw))
    samples = stimulus.load(models.load(made / "model.onnx"), path, 0, None, {})
    for index in range(len(samples)):
        samples.sample(index)


def _trace(draw: random.Random, folder: Path, made: Path) -> None:
    from auditor import discovery
    from auditor.audit import AuditOptions, audit

    path = folder / "trace.npz"
    with np.load(made / "trace.npz") as stored:
        arrays = {name: stored[name] for name in stored}
    if draw.random() < 0.7:
        header = mutations.damaged_json(json.loads(arrays["audit-trace"].tobytes()), draw)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        arrays["audit-trace"] = np.frombuffer(text, np.uint8)
    elif draw.random() < 0.5:
        del arrays[draw.choice(list(arrays))]
    np.savez(path, **arrays)
    if draw.random() < 0.2:
        path.write_bytes(mutations.damaged_bytes(path.read_bytes(), draw))
    options = AuditOptions(backends=(), traces=(("t", path),))
    report = audit(made / "model.onnx", options, noises=discovery.noises(), progress=Silent())
    for renderer in discovery.renderers().values():
        renderer.render(report, width=80, color=False)


def _audit(draw: random.Random, folder: Path, _: Path) -> None:
    """A whole audit of what still loads, on the real runtimes, in every format."""
    _whole_audit(mutations.damaged_model(draw), folder)


def _graph(draw: random.Random, folder: Path, _: Path) -> None:
    """The same of networks that are valid, but odd."""
    _whole_audit(mutations.odd_network(draw), folder)


def _whole_audit(proto: onnx.ModelProto, folder: Path) -> None:
    from auditor import discovery
    from auditor.audit import AuditOptions, BackendSpec, audit
    from auditor.graphs import model as models

    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    models.load(path)  # most are refused here, before a runtime starts
    options = AuditOptions(backends=(BackendSpec("ort"), BackendSpec("ov")), timeout=_SECONDS / 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing of numpy's belongs on a screen
        report = audit(path, options, noises=discovery.noises(), progress=Silent())
    for renderer in discovery.renderers().values():
        renderer.render(report, width=80, color=False)


def _image(draw: random.Random, folder: Path, _: Path) -> None:
    """A photograph through one decoder, its header's oddities, and its orientation."""
    from auditor.pipeline import photos
    from auditor.pipeline.preprocessing import libraries, steps
    from auditor.pipeline.preprocessing.stages import Decode

    data, ending = mutations.picture(draw)
    photos.oddities(data, f"photo.{ending}")
    name = draw.choice(["ffmpeg", "jpeglib", "opencv", "pillow", "simplejpeg"])
    variant = draw.choice(libraries.decoder(name).variants)
    pixels = steps.decoded(data, Decode(name, variant, draw.choice(["apply", "ignore"])))
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def _report(draw: random.Random, folder: Path, made: Path) -> None:
    from auditor import diff, discovery
    from reports import json_v1

    path, whole = folder / "report.json", (made / "report.json").read_bytes()
    if draw.random() < 0.7:
        path.write_text(json.dumps(mutations.damaged_json(json.loads(whole), draw)))
    else:
        path.write_bytes(mutations.damaged_bytes(whole, draw))
    report = json_v1.load(path)
    for renderer in discovery.renderers().values():
        renderer.render(report, width=80, color=False)
    diff.compare(report, json_v1.load(made / "report.json"), "new", "old")


_POSTS = (
    "",
    'post = { kind = "scores", activation = "softmax" }\n',
    'post = { kind = "mask", output = "scores", threshold = 0.3 }\n',
    'post = { kind = "boxes", output = "deltas", scores = "scores", channels_first = true, '
    'background = 0, coding = "corner-deltas", stride = 2, cell = 12, nms = "onnxruntime" }\n',
    'post = { kind = "boxes", coding = "centre", channels_first = true, nms = "opencv", '
    'rounding = "floor", clip = [32, 32], offset = 1, threshold = 0.0 }\n',
)


def _damaged_text(text: str, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return mutations.damaged_bytes(text.encode(), draw)
    return mutations.damaged_toml(text, draw).encode()


def _policy(draw: random.Random, folder: Path, _: Path) -> None:
    from auditor.verdict import policy

    path = folder / "audit.toml"
    path.write_bytes(_damaged_text(_POLICY, draw))
    policy.load(path)


def _pipeline(draw: random.Random, folder: Path, _: Path) -> None:
    from auditor.pipeline import description
    from auditor.pipeline.postprocessing import results

    presets = sorted((Path(description.__file__).parent / "presets").glob("*.toml"))
    path = folder / "pipeline.toml"
    text = draw.choice(presets).read_text("utf-8") + draw.choice(_POSTS)
    whole = draw.random() < 0.3  # then only what it is applied to is odd
    path.write_bytes(text.encode() if whole else _damaged_text(text, draw))
    found = description.load(str(path))
    if found.training_post is not None:
        shapes = [(1, 4, 5, 5), (1, 2, 5, 5), (1, 10), (1, 84, 20), (3, 4), (1, 0, 4), ()]
        numbers = np.random.default_rng(draw.getrandbits(32))
        outputs = {
            name: numbers.standard_normal(draw.choice(shapes)).astype(np.float32)
            for name in ("deltas", "scores")
        }
        if draw.random() < 0.3:
            outputs["deltas"] = outputs["deltas"] / np.float32(0)
        results.result(outputs, found.training_post)


TARGETS: dict[str, Callable[[random.Random, Path, Path], None]] = {
    "model": _model,
    "model-bytes": _model_bytes,
    "data": _data,
    "audit": _audit,
    "graph": _graph,
    "image": _image,
    "trace": _trace,
    "report": _report,
    "policy": _policy,
    "pipeline": _pipeline,
}


def prepare(made: Path) -> None:
    """Write the sound files that are damaged: a model, its trace, a report."""
    from auditor import discovery
    from auditor.audit import AuditOptions, BackendSpec, audit, record
    from reports import json_v1

    made.mkdir(exist_ok=True)
    path = made / "model.onnx"
    onnx.save(mutations.network(), path)
    options = AuditOptions(backends=(BackendSpec("ort"),))
    assert record(path, options, made / "trace.npz", Silent()) is None
    report = audit(path, options, noises=discovery.noises(), progress=Silent())
    text = json_v1.RENDERER.render(report, width=None, color=False)
    (made / "report.json").write_text(text)


# --- trying them ---------------------------------------------------------------------------------


def outcome(target: str, seed: int, made: Path) -> str:
    """``loaded``, ``refused``, or what went wrong."""
    from auditor.errors import AuditError
    from auditor.pipeline.preprocessing.libraries import PhotoError

    def ring(signal: int, frame: FrameType | None) -> None:
        raise _HangError

    signal.signal(signal.SIGALRM, ring)
    with TemporaryDirectory(prefix="fuzz-") as folder:
        signal.alarm(_SECONDS)
        try:
            TARGETS[target](random.Random(f"{target} {seed}"), Path(folder), made)
        except PhotoError as error:  # the report names the photograph beside it
            text = str(error)
            bad = "\n" in text or not text or " at 0x" in text
            return f"message: {text!r}" if bad else "refused"
        except AuditError as error:
            if error.message.strip() and error.hint.strip() and "\n" not in error.message:
                return "refused"
            return f"message: {error.message[:300]!r}, hint: {error.hint[:100]!r}"
        except _HangError:
            return "hang"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            places = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "fuzz" not in f.name]
            return f"traceback: {type(error).__name__} {places[-3:]} {str(error)[:200]!r}"
        finally:
            signal.alarm(0)
    return "loaded"


def trial(target: str, first: int, count: int, made: Path) -> dict[int, str]:
    """What became of each seed, tried in child processes; a crash ends one, and the next goes on.

    Returns:
        Seed → outcome; ``crash: …`` where the process died.
    """
    results: dict[int, str] = {}
    seed = first
    while seed < first + count:
        arguments = ["--child", "--target", target, "--seed", str(seed), "--made", str(made)]
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.fuzz.run",
                *arguments,
                "--count",
                str(first + count - seed),
            ],
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        lines = child.stdout.splitlines()
        results |= {seed + i: json.loads(line) for i, line in enumerate(lines)}
        seed += len(lines)
        if seed < first + count:
            results[seed] = f"crash: exit code {child.returncode}"
            seed += 1
    return results


def _child(target: str, first: int, count: int, made: Path) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    for seed in range(first, first + count):
        print(json.dumps(outcome(target, seed, made)), flush=True)


def _add(path: Path, result: dict[str, object]) -> None:
    earlier = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*earlier, result], indent=1))


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=500, help="inputs of each target")
    parser.add_argument("--json", type=Path, help="add the tallies to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--made", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        _child(asked.target[0], asked.seed, asked.count, asked.made)
        return 0
    bad = 0
    print(f"{'target':<12}{'inputs':>8}{'loaded':>8}{'refused':>8}{'bugs':>6}")
    with TemporaryDirectory(prefix="fuzz-made-") as made:
        prepare(Path(made))
        for target in asked.target or TARGETS:
            results = trial(target, asked.seed, asked.count, Path(made))
            tally = Counter(results.values())
            wrong = {s: r for s, r in results.items() if r not in ("loaded", "refused")}
            bad += len(wrong)
            kinds = Counter(what.partition(":")[0] for what in wrong.values())
            if asked.json:
                made_of = {"target": target, "seed": asked.seed, "inputs": len(results)}
                _add(
                    asked.json,
                    {
                        **made_of,
                        "loaded": tally["loaded"],
                        "refused": tally["refused"],
                        "wrong": dict(kinds),
                    },
                )
            print(
                f"{target:<12}{len(results):>8}{tally['loaded']:>8}{tally['refused']:>8}"
                f"{len(wrong):>6}"
            )
            seen: dict[str, int] = {}
            for seed, what in wrong.items():
                seen.setdefault(what, seed)
            for what, seed in seen.items():
                print(f"  seed {seed}: {what}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
