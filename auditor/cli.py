"""The command line: parses it, wires the parts together, and turns the result into an exit code.

Standard output carries the report only; progress, errors and hints go to standard error.
Nothing heavy is imported before it is needed, so that ``audit --help`` answers at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from auditor import __version__
from auditor.errors import AuditError, UsageError

if TYPE_CHECKING:
    from types import FrameType

    from auditor.audit import BackendSpec
    from auditor.ports import Progress, Renderer
    from auditor.records import AuditReport, OutputKind

_MAIN = "audit"  # the verb meant when none is given
_INTERNAL_ERROR = 4
_UNENCODABLE = "backslashreplace"  # file names need not be UTF-8, nor the terminal
_EXIT_CODES = """\
\b
Exit codes:
  0  audited; nothing at or above --fail-on
  1  findings at or above --fail-on
  2  wrong usage, or a bad model or data file
  3  incomplete: a backend named in --backends gave no comparison
  4  a bug in the auditor itself
"""


class _Verbs(TyperGroup):
    """A group with a default verb: ``audit model.onnx`` is ``audit audit model.onnx``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default verb unless the first word is one (options may come first)."""
        if not args or args[0] not in self.commands:
            args = [_MAIN, *args]
        return super().parse_args(ctx, args)


class _MainVerb(TyperCommand):
    """The default verb, whose help page is that of the whole program."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Show the usage without the implied verb, and the other verbs' after it."""
        program = ctx.parent.command_path
        formatter.write_usage(program, "MODEL [OPTIONS]")
        for verbs in ("backends | noises | explain ID", "sensitivity MODEL | show REPORT.json"):
            formatter.write_usage(program, verbs, "      ")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """List the options, then the other verbs."""
        super().format_options(ctx, formatter)
        ctx.parent.command.format_commands(ctx.parent, formatter)


class _Stop:
    """Ends the program on a signal by unwinding it, so that nothing is left behind.

    The exception is not enough: an extension module that is being imported may swallow it or
    replace it by its own. So the signal is remembered and looked for again at later steps.
    """

    def __init__(self) -> None:
        self.code: int | None = None  # exit code, once a signal has come

    def handle(self, number: int, frame: FrameType | None) -> NoReturn:
        """Signal handler; Python runs it in the main thread."""
        self.code = 128 + number
        raise SystemExit(self.code)

    def check(self) -> None:
        """Unwind if a signal has come before."""
        if self.code is not None and threading.current_thread() is threading.main_thread():
            raise SystemExit(self.code)


class _StoppableProgress:
    """A progress display, each update of which is also a chance to stop."""

    def __init__(self, display: Progress) -> None:
        self._display = display

    def update(self, who: str, stage: str) -> None:
        """Show it, unless the program was asked to stop."""
        _stop.check()
        self._display.update(who, stage)

    def close(self) -> None:
        """Remove the display and restore the terminal."""
        self._display.close()


_stop = _Stop()
app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    add_help_option=False,  # the default verb answers; and parsing one here costs 0.1 s
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """Entry point of the ``audit`` command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop.handle)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_UNENCODABLE)
    sys.exit(_run())


def _run() -> int:
    try:
        return int(app(prog_name="audit", standalone_mode=False) or 0)
    except TyperException as error:
        message = error.format_message().replace("Value error, ", "")  # pydantic's own words
        return _fail(message, "`audit --help` explains every option.", 2)
    except AuditError as error:
        return _fail(error.message, error.hint, 2)
    except MemoryError:
        return _fail("not enough memory", "Give smaller inputs with --shape or --data.", 2)
    except Exception as error:
        return _internal_error(error)


def _fail(message: str, hint: str, code: int) -> int:
    _stop.check()  # the error may be what an extension module made of the signal
    try:
        from reports.terminal import print_error

        print_error(message, hint)
    except Exception:  # the reports may be what is broken, or shadowed by another package
        print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return code


def _internal_error(error: Exception) -> int:
    import tempfile
    import traceback

    _stop.check()
    with tempfile.NamedTemporaryFile(
        "w", prefix="audit-error-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"audit {__version__}, arguments: {sys.argv[1:]}\n")
        traceback.print_exception(error, file=file)
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    hint = f"This is a bug in the auditor. Please report it with {file.name}."
    return _fail(f"internal error: {what}", hint, _INTERNAL_ERROR)


# --- verbs -------------------------------------------------------------------------------------


def _show_version(value: bool) -> None:
    if value:
        _print(f"audit {__version__}\n")
        raise typer.Exit


@app.command(_MAIN, cls=_MainVerb, hidden=True, epilog=_EXIT_CODES)
def _audit(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The exported ONNX model.")],
    backends: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID[:DEVICE],…",
            help="Backends to compare with the reference, such as ort,ov:GPU,tvm; "
            "all that are available here when not given.",
        ),
    ] = None,
    candidate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Another export, which the backends compile while MODEL stays the reference.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recorded inputs (.npz or .safetensors keyed by input name, or .npy), samples "
            "stacked on the first axis; seeded random inputs when not given.",
        ),
    ] = None,
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Accept NaN and infinities in --data, to audit how backends handle them.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the random inputs.")] = 0,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many samples to use; the first 4 recorded or 1 random when not given.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT:1x3x224x224",
            help="Shape of an input whose dimensions the model leaves open; repeatable.",
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Report format: terminal, json, sarif, junit or markdown; from the suffix of -o "
            "(.json, .sarif, .xml, .md) when not given.",
        ),
    ] = None,
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
    timeout: Annotated[
        float,
        typer.Option(min=1, metavar="S", help="Seconds that one step of a backend may take."),
    ] = 600.0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Threads of each engine and of the reference; the engines' own default when "
            "not given.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID.KEY=VALUE",
            help="Engine option, such as ov.INFERENCE_PRECISION_HINT=f32; repeatable.",
        ),
    ] = None,
    fail_on: Annotated[
        Literal["info", "low", "medium", "high", "critical"],
        typer.Option(help="Lowest severity of a finding that makes the audit fail."),
    ] = "medium",
    output_kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KIND",
            help="As what an output is read: scores, boxes, mask, embedding or none; assumed from "
            "its name and values when not given; repeatable.",
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

    destination = _destination(format, output, [model, candidate, data])
    specs = _specs(backends)
    options = _engine_options(option, specs)
    shapes = dict(_parse_shape(text) for text in shape or ())
    kinds = dict(_parse_kind(text) for text in output_kind or ())

    from auditor.audit import AuditOptions, audit
    from reports.terminal import LiveProgress

    asked = AuditOptions(
        backends=specs,
        requested=bool(backends),
        candidate=candidate,
        data=data,
        seed=seed,
        samples=samples,
        shapes=shapes,
        nonfinite=allow_nonfinite,
        timeout=timeout,
        threads=threads,
        options=options,
        fail_on=fail_on,
        output_kinds=kinds,
        confirm=confirm,
    )
    progress = _StoppableProgress(LiveProgress())
    try:
        report = audit(model, asked, noises=discovery.noises(), progress=progress)
    finally:
        progress.close()
    destination.deliver(report)
    return report.exit_code


@app.command("backends", short_help="List what is available here, or how to get it.")
def _backends() -> int:
    """List the backends and their devices here, or why one is missing and how to get it."""
    from auditor import discovery, worker
    from reports.terminal import render_backends

    rows = worker.probe(discovery.backend_ids())
    width, color = _screen()
    _print(render_backends(rows, width, color))
    return 0


@app.command("noises")
def _noises() -> int:
    """List the causes of divergence that can be replayed."""
    from auditor import discovery
    from reports.terminal import render_noises

    width, color = _screen()
    _print(render_noises(discovery.noises(), width, color))
    return 0


@app.command("explain", short_help="Explain one cause of divergence in full.")
def _explain(
    id: Annotated[str, typer.Argument(metavar="ID", help="A cause that `audit noises` lists.")],
) -> int:
    """Explain one cause: what it is, where it applies, the forms tested, and what to do."""
    from auditor import discovery
    from reports.terminal import render_noise

    _print(render_noise(discovery.noise(id), *_screen()))
    return 0


@app.command("sensitivity", short_help="Rank what each cause would do to a model's outputs.")
def _sensitivity(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The exported ONNX model.")],
    noise: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID,…",
            help="Simulate these causes only, and show each of their forms; all causes when not "
            "given.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Recorded inputs (.npz or .safetensors keyed by input name, or .npy), samples "
            "stacked on the first axis; seeded random inputs when not given.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the random inputs.")] = 0,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many samples to use; the first 4 recorded or 1 random when not given.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT:1x3x224x224",
            help="Shape of an input whose dimensions the model leaves open; repeatable.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads; all cores when not given.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds that one run may take.")
    ] = 60.0,
) -> int:
    """Rank what each cause would do to a model's outputs if its deployment had it.

    Puts every form of every cause into the whole reference model, one after another, and compares
    its outputs with the reference's. Needs no backend and says nothing about any.
    """
    from auditor import discovery

    catalogue = discovery.noises()
    shapes = dict(_parse_shape(text) for text in shape or ())
    ids = [id.strip() for text in noise or () for id in text.split(",")]
    chosen = [discovery.noise(id) for id in ids] if ids else catalogue

    from auditor import model as models
    from auditor import sensitivity
    from auditor import stimulus as stimuli
    from reports.terminal import LiveProgress, render_sensitivities

    progress = _StoppableProgress(LiveProgress())
    try:
        progress.update("reference", "load")
        loaded = models.load(model)
        stimulus = stimuli.load(loaded, data, seed, samples, shapes)
        rows = list(
            sensitivity.simulated(
                loaded,
                stimulus,
                chosen,
                threads=threads or os.cpu_count() or 1,
                seconds=timeout,
                progress=progress,
            )
        )
    finally:
        progress.close()
    notes = sensitivity.notes(loaded, stimulus.info, chosen, rows)
    _print(render_sensitivities(rows, notes, *_screen(), every=bool(ids)))
    return 0


@app.command("show", short_help="Show a saved report again, or one layer in full.")
def _show(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT.json", help="A report written by audit -o.")
    ],
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Show one segment in full, by its id or a node or tensor name."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Report format: terminal, json, sarif, junit or markdown; from the suffix of -o "
            "(.json, .sarif, .xml, .md) when not given.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it to FILE."),
    ] = None,
) -> int:
    """Show a saved report again, or one of its layers in full; needs no engine."""
    from reports import json_v1
    from reports.terminal import render_segment

    destination = _destination(format, output, [report])
    loaded = json_v1.load(report)
    if layer is None:
        destination.deliver(loaded)
    elif format or output:
        raise UsageError("--layer cannot be used with --format or -o", "Drop the other option.")
    else:
        _print(render_segment(loaded, layer, *_screen()))
    return 0


# --- arguments ---------------------------------------------------------------------------------


def _specs(names: Sequence[str] | None) -> tuple[BackendSpec, ...]:
    from auditor import discovery
    from auditor.audit import BackendSpec

    known = discovery.backend_ids()
    if not names:
        return tuple(BackendSpec(id) for id in known)
    specs: list[BackendSpec] = []
    for name in (part.strip() for text in names for part in text.split(",")):
        id, _, device = name.partition(":")
        discovery.require(id, known, "backend", "Backends")
        spec = BackendSpec(id, device or None)
        if spec in specs:
            raise UsageError(f"--backends names `{name}` twice", "Name each backend once.")
        specs.append(spec)
    return tuple(specs)


def _engine_options(
    texts: Sequence[str] | None, specs: Sequence[BackendSpec]
) -> dict[str, dict[str, str]]:
    from auditor import discovery

    options: dict[str, dict[str, str]] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        id, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise UsageError(
                f"--option `{text}` is not of the form ID.KEY=VALUE",
                "Write it as in --option ov.INFERENCE_PRECISION_HINT=f32.",
            )
        discovery.require(id, {spec.id for spec in specs}, "backend in this audit", "Audited")
        options.setdefault(id, {})[key] = value
    return options


def _parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    # Tensor names may contain colons (TensorFlow's `input:0`): the last one counts.
    name, _, dimensions = text.rpartition(":")
    sizes = dimensions.lower().split("x")
    if not name or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError(
            f"--shape `{text}` is not of the form INPUT:1x3x224x224",
            "Give the input's name and its positive sizes.",
        )
    return name, tuple(int(size) for size in sizes)


def _parse_kind(text: str) -> tuple[str, OutputKind]:
    from typing import cast, get_args

    from auditor.records import OutputKind

    name, _, kind = text.rpartition(":")  # names may contain colons
    if not name or kind not in get_args(OutputKind):
        raise UsageError(
            f"--output-kind `{text}` is not of the form NAME:KIND",
            f"Give the output's name and one of {', '.join(get_args(OutputKind))}.",
        )
    return name, cast(OutputKind, kind)


# --- output ------------------------------------------------------------------------------------


class _Destination:
    """Where a report goes: standard output, a file, or both."""

    def __init__(self, shown: Renderer | None, written: Renderer | None, path: Path | None) -> None:
        """``shown`` is printed, ``written`` goes to ``path``."""
        self.shown = shown
        self.written = written
        self.path = path

    def deliver(self, report: AuditReport) -> None:
        """Write and print the report.

        Raises:
            UsageError: the file cannot be written after all.
        """
        _stop.check()
        if self.written and self.path:
            _write(self.path, self.written.render(report, width=None, color=False))
        if self.shown:
            width, color = _screen()
            _print(self.shown.render(report, width=width, color=color))


def _destination(
    format: str | None, output: Path | None, read: Sequence[Path | None]
) -> _Destination:
    """Choose formats; refuse, before any work is done, a file that could not be written.

    Args:
        format: name given by the user.
        output: file given by the user.
        read: files given as input, which must not be overwritten.
    """
    from auditor import discovery

    renderers = discovery.renderers()
    if format is not None:
        discovery.require(format, renderers, "report format", "Formats")
    if output is None:
        return _Destination(renderers[format or "terminal"], None, None)
    output = output.resolve()
    if any(path and path.resolve() == output for path in read):
        raise UsageError(f"-o {output} would overwrite an input", "Choose another file.")
    _check_writable(output)
    if format is not None:
        return _Destination(None, renderers[format], output)
    endings = {suffix: renderer for renderer in renderers.values() for suffix in renderer.suffixes}
    # The longest one counts: `report.sarif.json` is SARIF.
    ending = max(filter(output.name.lower().endswith, endings), key=len, default=".txt")
    return _Destination(renderers["terminal"], endings[ending], output)


def _check_writable(output: Path) -> None:
    import tempfile

    hint = "Give -o a file in a folder that you may write to."
    if output.exists() and not output.is_file():
        raise UsageError(f"-o {output} is not a regular file", hint)
    if not output.parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist", "Create it first.")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to {output.parent}: {error.strerror}", hint) from error


def _write(path: Path, text: str) -> None:
    """Write all of it or nothing: a temporary file beside it, then renamed over it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            draft.write_text(text, encoding="utf-8", errors=_UNENCODABLE)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", "Free some space, or choose another folder."
        ) from error


def _print(text: str) -> None:
    """Write a report to standard output; a reader that has left (``| head``) is no error."""
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _screen() -> tuple[int | None, bool]:
    """Width of the terminal on standard output, None when it is not one, and whether to colour."""
    terminal = sys.stdout.isatty()
    if "COLUMNS" in os.environ or terminal:
        import shutil

        width: int | None = shutil.get_terminal_size().columns
    else:
        width = None
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return width, terminal and not plain
