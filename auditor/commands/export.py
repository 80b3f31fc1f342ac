"""``audit export``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import (
    Backends,
    EngineOptions,
    Seed,
    Threads,
    Timeout,
    TrustSource,
    backend_specs,
    engine_options,
    parse_shape,
    with_training,
)
from auditor.commands._output import check_writable, drafted, emit, screen, write
from auditor.commands._stop import displayed_progress
from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.training.export import Exports


@app.command(
    "export",
    short_help="Export a PyTorch module in the most faithful way.",
    epilog=examples("export net.py:build --example x:1x3x224x224 --backends ort,ov -o net.onnx"),
)
def _export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="package.module:factory or file.py:factory, a callable without arguments that "
            "returns the module with its trained weights. Runs that code.",
        ),
    ],
    example: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|NAME:1x3x224x224",
            help="The arguments of forward: a .npz or .safetensors keyed by their names, samples "
            "stacked on the first axis; or a name and a shape, for seeded random numbers, with "
            "=N behind it for whole numbers below N (ids:1x16=30000); repeatable.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.onnx", help="Write the chosen file here."),
    ] = None,
    backends: Backends = None,
    exporter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,…", help="dynamo, torchscript; both when not given."),
    ] = None,
    opset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,…",
            help="Operator sets to try with each exporter; 18 and 21 with dynamo, 13 and 17 with "
            "torchscript when not given.",
        ),
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:AXIS=SYMBOL",
            help="A dimension to leave open, such as input:0=batch; tried at another size, which "
            "shows what an exporter froze; repeatable.",
        ),
    ] = None,
    reports: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the report of each audit to DIR, as JSON."),
    ] = None,
    trust_source: TrustSource = False,
    option: EngineOptions = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many samples to audit; 4 when not given."),
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    timeout: Timeout = 600.0,
) -> int:
    """Export a PyTorch module with each exporter, audit each file, and keep the most faithful.

    Both of PyTorch's exporters at a few operator sets; each file is checked and audited with
    PyTorch eager at the head of the chain. Counted is how far the backends' outputs are from the
    module's own. Exit code as of the chosen file's audit; 3 when no export can be used.
    """
    from tempfile import TemporaryDirectory

    if output is not None:
        check_writable(output.resolve())
        if output.suffix.lower() != ".onnx":
            raise UsageError(f"-o {output} does not end in .onnx", "It is an ONNX file.")
    if reports is not None and not reports.is_dir():
        raise UsageError(f"the folder {reports} does not exist", "Create it first.")
    specs = with_training(backend_specs(backends), source)
    ways = _ways(exporter, opset)
    open_axes = _open_axes(dynamic)

    from auditor import discovery
    from auditor.options import AuditOptions
    from auditor.training.export import compare
    from reports import _export as table

    with TemporaryDirectory(prefix="audit-export-") as scratch:
        folder = Path(scratch)
        options = AuditOptions(
            backends=specs,
            requested=bool(backends),
            data=_examples(example, folder, seed),
            samples=samples,
            timeout=timeout,
            threads=threads,
            options=engine_options(option, specs),
            confirm=False,
            source=source,
            trust_source=trust_source,
        )
        with displayed_progress() as progress:
            made = compare(
                ways,
                options,
                open_axes,
                folder,
                output.name if output else "model.onnx",
                noises=discovery.noises(),
                progress=progress,
            )
        emit(table.render(made.report, *screen()))
        if reports is not None:
            _keep_reports(made, reports)
        if made.report.chosen is None:
            return 3
        audit, file = made.audits[made.report.chosen], made.files[made.report.chosen]
        assert audit is not None and file is not None
        if output is not None:
            _keep(file, output)
            emit(f"{output}: {made.report.trials[made.report.chosen].label}")
        return audit.exit_code


def _ways(exporter: Sequence[str] | None, opset: Sequence[str] | None) -> list[tuple[str, int]]:
    """Exporters and operator sets, in the order to prefer."""
    from auditor import discovery
    from auditor.training import export

    usual = export.USUAL
    known = list(dict.fromkeys(name for name, _ in usual))
    names = [n.strip() for text in exporter or () for n in text.split(",")] or known
    for name in names:
        discovery.require(name, known, "exporter", "Exporters")
    sets = [n.strip() for text in opset or () for n in text.split(",")]
    for number in sets:
        if not number.isdecimal() or not int(number):
            raise UsageError(f"--opset `{number}` is no operator set", "Write --opset 17,18.")
    if not sets:
        return [way for way in usual if way[0] in names]
    return [(name, int(number)) for name in names for number in sets]


def _open_axes(texts: Sequence[str] | None) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for text in texts or ():
        place, _, symbol = text.partition("=")
        name, _, axis = place.rpartition(":")
        if not (name and axis.isdecimal() and symbol.isidentifier()):
            raise UsageError(
                f"--dynamic `{text}` is not of the form NAME:AXIS=SYMBOL",
                "Write it as in --dynamic input:0=batch.",
            )
        found.setdefault(name, {})[axis] = symbol
    return found


def _examples(texts: Sequence[str], folder: Path, seed: int) -> Path:
    """The file of arguments: the user's own, or one of random numbers."""
    if len(texts) == 1 and not _is_shape(texts[0]):
        return Path(texts[0])
    import numpy as np

    arrays: dict[str, np.ndarray] = {}
    for position, text in enumerate(texts):
        place, _, below = text.partition("=")
        name, shape = parse_shape(place)
        generator = np.random.default_rng([seed, position])
        if below:
            arrays[name] = generator.integers(0, int(below), (1, *shape), np.int64)
        else:
            arrays[name] = generator.standard_normal((1, *shape), np.float32)
    path = folder / "example.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def _is_shape(text: str) -> bool:
    return re.search(r":\d+(x\d+)*(=[1-9]\d*)?$", text.lower()) is not None


def _keep_reports(made: Exports, folder: Path) -> None:
    from reports import json_v1

    for trial, audit in zip(made.report.trials, made.audits, strict=True):
        if audit is not None:
            text = json_v1.RENDERER.render(audit, width=None, color=False)
            write(folder / f"{trial.label.replace('@', '-')}.json", text)


def _keep(file: Path, output: Path) -> None:
    """The chosen file, after its weights where these are beside it."""
    for path in sorted(file.parent.iterdir(), key=lambda p: p == file):
        with drafted(output.with_name(path.name)) as draft:
            shutil.copyfile(path, draft)
            draft.replace(output.with_name(path.name))
