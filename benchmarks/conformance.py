"""ONNX's own operator tests as a population of bugs that nobody picked: what audits say of them.

    python -m benchmarks.conformance [--most N] [--sample N] [--only TEXT] [-o docs/conformance.md]

The package ``onnx`` carries some 2,000 small models with inputs and the outputs that the
specification demands. Each runs plainly on every build, without the auditor, in processes that may
crash or hang. Where the outputs are not those demanded, an audit must say so, at that backend; of
those that agree, a sample must come out silent. Models whose tensors NumPy has no type for, which
are sequences or which draw random numbers are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

# Engine, options, and the name in the table.
BUILDS = {
    "ort": ("ort", {}),
    "ov, f32": ("ov", {"INFERENCE_PRECISION_HINT": "f32"}),
    "ov, default": ("ov", {}),
    "tvm": ("tvm", {}),
}
REFERENCE = "reference"  # ONNX Runtime without optimisation
TIMEOUT = 30.0  # seconds that one plain run may take
RTOL, ATOL = 1e-3, 1e-5
KINDS = ("simple", "pytorch-operator", "pytorch-converted")
RANDOM = ("Bernoulli", "Random", "Multinomial")


@dataclass
class Build:
    """What came of one build."""

    ran: dict[str, str] = field(default_factory=dict)  # by model: "", or how the outputs differ
    failed: Counter[str] = field(default_factory=Counter)
    causes: dict[str, str | None] = field(default_factory=dict)  # by model that disagrees
    missed: list[str] = field(default_factory=list)
    disagree: int = 0
    silent: int = 0
    reported: list[str] = field(default_factory=list)


# --- the population ---------------------------------------------------------------------------


def collected() -> Iterator[tuple[str, onnx.ModelProto, list[Any], list[Any]]]:
    """Name, model, inputs and demanded outputs of every test."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in collect_testcases(None):
            if case.model is not None and case.data_sets:
                inputs, outputs = case.data_sets[0]
                yield case.name, case.model, list(inputs), list(outputs)
    root = Path(onnx.__file__).parent / "backend/test/data"
    for folder in sorted(f for kind in KINDS for f in (root / kind).iterdir()):
        model = onnx.load(folder / "model.onnx")
        data = folder / "test_data_set_0"
        inputs, outputs = (
            [_tensor(data / f"{side}_{i}.pb", v) for i, v in enumerate(values)]
            for side, values in (("input", model.graph.input), ("output", model.graph.output))
        )
        yield folder.name, model, inputs, outputs


def _tensor(path: Path, value: onnx.ValueInfoProto) -> Any:
    if not path.exists() or not value.type.HasField("tensor_type"):
        return None
    return numpy_helper.to_array(onnx.load_tensor(path))


def written(folder: Path, only: str) -> tuple[list[str], Counter[str]]:
    """Write the models to ``folder``; their names, and how many were left out for what reason."""
    names: list[str] = []
    out: Counter[str] = Counter()
    for name, model, inputs, outputs in collected():
        if only not in name:
            continue
        arrays = [np.asarray(v) if np.isscalar(v) else v for v in (*inputs, *outputs)]
        if any(node.op_type.startswith(RANDOM) for node in model.graph.node):
            out["random numbers"] += 1
        elif not all(isinstance(v, np.ndarray) for v in arrays):
            out["sequences and optional values"] += 1
        elif any(v.dtype.kind not in "biufc" for v in arrays):
            out["texts, and types that NumPy does not have"] += 1
        else:
            target = folder / name
            target.mkdir()
            onnx.save(model, target / "model.onnx")
            fed = [v.name for v in model.graph.input][: len(inputs)]
            np.savez(target / "inputs.npz", **dict(zip(fed, arrays, strict=False)))
            np.savez(target / "outputs.npz", *arrays[len(inputs) :])
            names.append(name)
    return names, out


# --- plain runs, without the auditor ----------------------------------------------------------


def engine(build: str, folder: Path) -> None:
    """Run the models whose names come in on standard input; how each differs, as a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print
    run = _engine(build)
    for line in sys.stdin:
        case = folder / line.strip()
        feeds = dict(np.load(case / "inputs.npz"))
        demanded = list(np.load(case / "outputs.npz").values())
        try:
            said = {"differs": difference(run(case / "model.onnx", feeds), demanded)}
        except Exception as error:  # whatever engines raise
            said = {"failed": type(error).__name__}
        print(json.dumps(said), file=answers, flush=True)


def _engine(build: str) -> Callable[[Path, dict[str, Any]], Sequence[Any]]:
    if build in (REFERENCE, "ort"):
        import onnxruntime as ort

        ort.set_default_logger_severity(4)
        settings = ort.SessionOptions()
        if build == REFERENCE:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

        def run_ort(path: Path, feeds: dict[str, Any]) -> Sequence[Any]:
            session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
            known = {value.name for value in session.get_inputs()}
            return list(session.run(None, {n: v for n, v in feeds.items() if n in known}))

        return run_ort
    if build.startswith("ov"):
        import openvino

        core, properties = openvino.Core(), BUILDS[build][1]

        def run_ov(path: Path, feeds: dict[str, Any]) -> Sequence[Any]:
            compiled = core.compile_model(core.read_model(path), "CPU", properties)
            request = compiled.create_infer_request()
            values = [openvino.Tensor(np.ascontiguousarray(v)) for v in feeds.values()]
            for index, value in enumerate(values):
                request.set_input_tensor(index, value)
            request.infer()
            count = len(compiled.outputs)
            return [np.array(request.get_output_tensor(i).data) for i in range(count)]

        return run_ov
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx
    from tvm.target import codegen

    target = tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})

    def run_tvm(path: Path, feeds: dict[str, Any]) -> Sequence[Any]:
        module = from_onnx(onnx.load(path), {n: list(v.shape) for n, v in feeds.items()})
        lowered = relax.get_default_pipeline(target)(module)
        program = relax.build(lowered, target=target, relax_pipeline=None)
        machine = relax.VirtualMachine(program, tvm.cpu())
        result = machine["main"](*(tvm.runtime.tensor(v) for v in feeds.values()))
        return [r.numpy() for r in ([result] if hasattr(result, "numpy") else result)]

    return run_tvm


def difference(found: Sequence[Any], demanded: Sequence[Any]) -> str:
    """How outputs differ from what is demanded, beyond rounding; nothing if they do not."""
    for got, want in zip(found, demanded, strict=True):
        if got.shape != want.shape:
            return f"shape {got.shape}, not {want.shape}"
        if want.dtype.kind in "biu":
            if not np.array_equal(got, want):
                return "other integers"
        elif not np.allclose(got, want, RTOL, ATOL, equal_nan=True):
            return "other numbers"
    return ""


def screened(build: str, folder: Path, names: Sequence[str]) -> Build:
    """Run all models on one build."""
    result = Build()
    process: subprocess.Popen[bytes] | None = None
    for name in names:
        if process is None:
            command = [sys.executable, "-m", "benchmarks.conformance", "--engine", build]
            process = subprocess.Popen(
                [*command, "--folder", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        line = _answer(process, name)
        if not line:
            process.kill()
            process.wait()
            process = None
            result.failed["crashed or hung"] += 1
            continue
        said = json.loads(line)
        if "failed" in said:
            result.failed["refused"] += 1
        else:
            result.ran[name] = said["differs"]
    if process is not None:
        process.kill()
        process.wait()
    return result


def _answer(process: subprocess.Popen[bytes], name: str) -> bytes:
    """The line that answers ``name``; nothing if the process ended or took too long."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{name}\n".encode())
    line, end = b"", time.monotonic() + TIMEOUT
    while not line.endswith(b"\n"):
        if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            return b""
        part = os.read(process.stdout.fileno(), 65536)
        if not part:
            return b""
        line += part
    return line


# --- audits -----------------------------------------------------------------------------------


def audited(
    build: str, result: Build, folder: Path, names: Sequence[str], most: int, sample: int
) -> None:
    """Audit what disagrees on a build, ``most`` models at most, and a sample of what agrees."""
    from auditor import discovery
    from auditor.audit import AuditOptions, BackendSpec, audit
    from auditor.errors import AuditError
    from benchmarks.plants.suite import Silent

    backend, options = BUILDS[build]
    wrong = [n for n in names if result.ran.get(n)]
    right = [n for n in names if result.ran.get(n) == ""]
    result.disagree = len(wrong)
    wrong, right = (
        sorted(random.Random(0).sample(of, min(count, len(of))))
        for of, count in ((wrong, most), (right, sample))
    )
    for name in wrong + right:
        asked = AuditOptions(
            backends=(BackendSpec(backend),),
            data=folder / name / "inputs.npz",
            nonfinite=True,
            options={backend: dict(options)},
            confirm=False,
            threads=1,
        )
        try:
            report = audit(
                folder / name / "model.onnx", asked, noises=discovery.noises(), progress=Silent()
            )
        except AuditError as error:
            result.failed["audit refused"] += 1
            print(f"{build}, {name}: refused: {error.message}", file=sys.stderr, flush=True)
            continue
        first = report.findings[0] if report.findings else None
        if name in wrong and first is None:
            result.missed.append(name)
        elif name in wrong:
            result.causes[name] = first.noise if first else None
        elif first is None:
            result.silent += 1
        else:
            result.reported.append(f"{name} ({first.noise or 'unexplained'}, {first.severity})")


# --- the page ---------------------------------------------------------------------------------


def page(builds: dict[str, Build], names: Sequence[str], out: Counter[str], most: int) -> str:
    """The results as Markdown."""
    engines = ("onnx", "onnxruntime", "openvino", "apache-tvm")
    odd = sorted(n for n, differs in builds[REFERENCE].ran.items() if differs)
    left = ", ".join(f"{count} with {why}" for why, count in sorted(out.items()))
    lines = [
        "# ONNX's operator tests",
        "",
        f"Written by `python -m benchmarks.conformance` on {time.strftime('%Y-%m-%d')}: "
        f"{platform.machine()}, {', '.join(f'{e} {version(e)}' for e in engines)}.",
        "",
        f"{len(names)} small models with inputs and demanded outputs, from the package `onnx`; "
        f"left out: {left or 'none'}. Each ran plainly first, without the auditor. *Disagree*: its "
        f"outputs are not those demanded (shape, integers, or numbers beyond {RTOL:g} relative and "
        f"{ATOL:g}), where the reference's are. *Located*: the audit reports it on that backend; "
        f"nearly all models are one operator ({most} at most were audited, chosen at random). "
        "*Silent*: of a random sample of those that agree, no finding at all.",
        "",
        "| build | run | refused | crashed or hung | disagree | located | with a cause | silent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, build in builds.items():
        if name == REFERENCE:
            continue
        located = len(build.causes)
        named = sum(cause is not None for cause in build.causes.values())
        sample = build.silent + len(build.reported)
        lines.append(
            f"| {name} | {len(build.ran)} | {build.failed['refused']} | "
            f"{build.failed['crashed or hung']} | {build.disagree} | "
            f"{located} of {located + len(build.missed)} | "
            f"{named} | {build.silent} of {sample} |"
        )
    for title, pick in (("Missed", "missed"), ("Reported though the outputs agree", "reported")):
        found = {n: getattr(b, pick) for n, b in builds.items() if getattr(b, pick)}
        lines += ["", f"{title}:{'' if found else ' none.'}", ""]
        lines += [f"- {n}: {', '.join(models)}" for n, models in found.items()]
    lines += ["", f"The reference itself does not give what is demanded: {', '.join(odd)}.", ""]
    lines += ["## Causes", "", "| build | cause | models |", "|---|---|---|"]
    for name, build in builds.items():
        causes: dict[str, list[str]] = defaultdict(list)
        for model, cause in build.causes.items():
            causes[cause or "unexplained"].append(model.removeprefix("test_"))
        for cause, models in sorted(causes.items()):
            shown = ", ".join(models[:12]) + (f" and {len(models) - 12} more" * (len(models) > 12))
            lines.append(f"| {name} | `{cause}` | {len(models)}: {shown} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Screen, audit, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__)
    parser.add_argument(
        "--most", type=int, default=1000, help="disagreeing models audited per build"
    )
    parser.add_argument("--sample", type=int, default=40, help="agreeing models audited per build")
    parser.add_argument("--only", default="", help="models whose names contain this")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.engine:
        engine(arguments.engine, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
        folder = Path(scratch)
        names, out = written(folder, arguments.only)
        builds = {build: screened(build, folder, names) for build in (REFERENCE, *BUILDS)}
        usable = [n for n in names if builds[REFERENCE].ran.get(n) == ""]
        for build in BUILDS:
            audited(build, builds[build], folder, usable, arguments.most, arguments.sample)
    text = page(builds, names, out, arguments.most)
    if arguments.output:
        arguments.output.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
