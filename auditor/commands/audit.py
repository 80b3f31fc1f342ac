"""``audit MODEL``, the verb meant when none is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from auditor import __version__
from auditor.commands._app import MAIN, UNRULED, MainVerb, app, examples
from auditor.commands._asked import asked_for
from auditor.commands._options import (
    Backends,
    Data,
    EngineOptions,
    Format,
    Model,
    Samples,
    Seed,
    Shapes,
    Threads,
    Timeout,
    TrustSource,
    parse_traces,
)
from auditor.commands._output import destination_for, emit
from auditor.commands._stop import displayed_progress

if TYPE_CHECKING:
    from auditor.options import AuditOptions
    from auditor.records.report import AuditReport
    from auditor.verdict.policy import Policy

_MORE = (
    examples(
        "model.onnx --data inputs.npz --backends ort,ov -o report.json",
        "model.onnx --images photos --pipeline imagenet-torchvision",
        "model.onnx --artifact ov=model.xml --baseline release.json",
    )
    + """

\b
Exit codes:
  0  audited; nothing at or above --fail-on, or beyond policy or baseline
  1  something is
  2  wrong usage, or a bad model or data file
  3  incomplete: a backend named in --backends gave no comparison
  4  a bug in the auditor itself

\b
Limits of each backend's process:
  memory --worker-memory, time --timeout for each step and 24 h of CPU in all,
  64 GiB for one file, 4096 open files, no core files, no network, temporary
  files in a folder of its own
"""
)


def _show_version(value: bool) -> None:
    if value:
        emit(f"audit {__version__}\n")
        raise typer.Exit


@app.command(MAIN, cls=MainVerb, hidden=True, epilog=_MORE)
def _audit(
    context: typer.Context,
    model: Model,
    backends: Backends = None,
    candidate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Another export, which the backends compile while MODEL stays the reference.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="What MODEL was exported from: package.module:factory or file.py:factory, "
            "without arguments, or model.pt2. PyTorch eager becomes the head of the chain, and "
            "what the export changed is ranked too. Runs that code.",
        ),
    ] = None,
    trust_source: TrustSource = False,
    data: Data = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Photographs instead of --data, through --pipeline: decoder, resize, colour … "
            "are ranked among the layers.",
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|PRESET",
            help="With --images: both sides of what turns a photograph into the input.",
        ),
    ] = None,
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Accept NaN and infinities in --data, to audit how backends handle them.",
        ),
    ] = False,
    seed: Seed = 0,
    samples: Samples = None,
    shape: Shapes = None,
    format: Format = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the report to FILE. Without --format the terminal report is "
            "printed as well.",
        ),
    ] = None,
    timeout: Timeout = 600.0,
    memory: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="GIB",
            help="Memory for the reference's weights; a model with more is run in pieces.",
        ),
    ] = 2.0,
    worker_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="GIB",
            help="Memory that each backend's process may use; as much as the machine has when "
            "not given, 0 for no limit.",
        ),
    ] = None,
    threads: Threads = None,
    option: EngineOptions = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Inputs, as for --data, that --option ort.quantize=int8 or ov.quantize=int8 is "
            "calibrated on; the audit's own inputs when not given.",
        ),
    ] = None,
    fail_on: Annotated[
        Literal["info", "low", "medium", "high", "critical"] | None,
        typer.Option(
            help="Lowest severity of a finding that makes the audit fail: the policy's, or medium.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tolerances, allowed causes and accepted findings; ./audit.toml or [tool.auditor] "
            "in ./pyproject.toml when not given.",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD.json", help="An earlier report: fail only on what is new or worse."
        ),
    ] = None,
    output_kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KIND",
            help="As what an output is read: scores, boxes, mask, embedding, text (CTC: speech, "
            "print) or none; assumed from its name and values when not given; repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What the classes of a text stand for: one on each line, or vocab.json.",
        ),
    ] = None,
    artifact: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=FILE",
            help="What ships: the engine's own file instead of one compiled from MODEL, such as "
            "ov=model.xml; repeatable.",
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Tensors captured elsewhere (audit record, or any runtime's dump as .npz or "
            ".safetensors by ONNX name), audited like a backend; repeatable.",
        ),
    ] = None,
    trace_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="JSON object: names in a dump to ONNX tensor names."
        ),
    ] = None,
    confirm: Annotated[
        bool,
        typer.Option(
            "--confirm/--no-confirm",
            help="Build what diverged again without single factors (precision, fusion, fast "
            "mathematics) and measure what that does to the outputs and to the latency.",
        ),
    ] = True,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Take builds and traces of the same things from the cache (see audit cache).",
        ),
    ] = True,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="Time what is deployed beside ONNX Runtime with its default options, in turn; "
            "done without asking where the policy limits latency_ratio.",
        ),
    ] = False,
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures/--no-pictures",
            help="Keep pictures of at most 40x40 cells of the tensors that diverge, for the HTML "
            "report; in a network's first layers they resemble the inputs.",
        ),
    ] = True,
    custom_ops: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="LIBRARY",
            help="Library of custom operators that the reference and ort load; its code runs with "
            "your rights; repeatable.",
        ),
    ] = None,
    sandbox: Annotated[
        bool,
        typer.Option(
            "--sandbox",
            help="For models from strangers: close the network, and let the audit and its engines "
            "read only the installed software and the folders of the files named here, and write "
            "only to the folder of -o and a temporary folder; the cache is not used (Linux, "
            "Landlock).",
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> int:
    """Audit what deployment runtimes change in an exported ONNX model.

    Compiles MODEL on each backend, captures intermediate tensors without changing the compiled
    program, decomposes the divergence of the outputs layer by layer, and names measured causes.
    """
    from auditor import discovery

    destination = destination_for(format, output, [model, candidate, data, policy, baseline])
    traces = [name for name, _ in parse_traces(trace)]
    rules, earlier = _rules(policy, baseline, traces, look=not context.meta.get(UNRULED))
    asked = asked_for(context.params, rules)
    if sandbox:
        asked = _closed_in(asked, context.params, output)

    from auditor.audit import audit

    with displayed_progress() as progress:
        report = audit(model, asked, noises=discovery.noises(), progress=progress)
    report = replace(report, command=context.meta.get(MAIN, ()))
    report = _judged(report, rules, baseline, earlier)
    destination.deliver(report)
    return report.exit_code


def _closed_in(asked: AuditOptions, given: Mapping[str, Any], output: Path | None) -> AuditOptions:
    """Enter the sandbox; the options of an audit in it."""
    from auditor.processes import sandbox
    from auditor.processes.limits import Limits, physical_memory

    sandbox.enter(_folders(given), [output.resolve().parent] if output else [])
    limits = asked.limits or Limits(physical_memory())
    # The network is closed to all by now. No cache: what an engine that was taken over wrote there
    # would speak for other models.
    return replace(asked, cache=None, limits=replace(limits, network=True))


def _folders(given: Mapping[str, Any]) -> set[Path]:
    """The folders of all files that the command line names: a model's weights lie beside it."""
    words = [w for value in given.values() for w in (value if isinstance(value, list) else [value])]
    paths = [Path(str(word).rpartition("=")[2]) for word in words if isinstance(word, str | Path)]
    paths += [word for word in words if isinstance(word, Path)]
    found = {path.resolve() for path in paths if path.exists()}
    return {path if path.is_dir() else path.parent for path in found}


def _rules(
    policy: Path | None, baseline: Path | None, traces: Sequence[str], *, look: bool
) -> tuple[Policy | None, AuditReport | None]:
    """The policy, the folder's own too if ``look``, and the baseline, before any work is done."""
    from auditor import discovery
    from auditor.records.terms import PIPELINE
    from auditor.verdict import policy as rulebook

    earlier = None
    if baseline:
        from reports import json_v1

        earlier = json_v1.load(baseline)
    found = rulebook.find(Path()) if look and not policy else None
    rules = rulebook.load(policy) if policy else found
    if rules is not None:
        known = [*discovery.backend_ids(), *traces, PIPELINE]
        rulebook.check(rules, known, [n.id for n in discovery.noises()])
    return rules, earlier


def _judged(
    report: AuditReport, rules: Policy | None, baseline: Path | None, earlier: AuditReport | None
) -> AuditReport:
    """The verdict: by the baseline if there is one, else by the policy, else by --fail-on."""
    if earlier is None and rules is None:
        return report  # what follows takes a while to import
    from datetime import date

    from auditor import diff
    from auditor.verdict import judgement

    if earlier is not None:
        comparison = diff.compare(earlier, report, str(baseline), "this audit")
        return judgement.held_against(report, comparison)
    return report if rules is None else judgement.judged(report, rules, date.today())
