"""``audit generate``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from auditor.commands._app import app, examples
from auditor.commands._options import (
    Backends,
    EngineOptions,
    JsonOutput,
    Model,
    Threads,
    Timeout,
    backend_specs,
    engine_options,
    parse_pair,
)
from auditor.commands._output import check_writable, emit, exit_code, screen, write
from auditor.commands._stop import displayed_progress
from auditor.errors import UsageError, reason

if TYPE_CHECKING:
    from collections.abc import Callable


@app.command(
    "generate",
    short_help="Compare the text that a decoder writes on each backend.",
    epilog=examples("generate decoder.onnx --prompt-ids 1,15,27 --tokens 16 --backends ov"),
)
def _generate(
    model: Model,
    prompt_ids: Annotated[
        str | None,
        typer.Option(metavar="ID,…", help="The prompt, as token ids."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The prompt, with --tokenizer."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="tokenizer.json", help="Turns --prompt into ids, and shows tokens as text."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How many to write.")] = 32,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PAST=PRESENT", help="Input and output of one cache, where names do not tell."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Inputs that are the same in every run, such as what an encoder made.",
        ),
    ] = None,
    backends: Backends = None,
    option: EngineOptions = None,
    output: JsonOutput = None,
    threads: Threads = None,
    timeout: Timeout = 600.0,
) -> int:
    """Write greedy text with a decoder on the reference and on each backend, and compare.

    Says which token is the first to diverge, how far the distributions are apart at every step,
    which layers made it, and which of them to compute in full precision. MODEL takes token ids (and
    a mask and positions, if any) and returns logits. One that keeps caches (past_key_values) is run
    as it is deployed: the prompt at once, then token by token, each backend with its own caches.
    Exit code 0 when all texts are the same, 1 when not, 3 when a named backend gave none.
    """
    if output is not None:
        check_writable(output.resolve())
    encode, decode = _tokenizer(tokenizer)
    ids = _prompt(prompt_ids, prompt, encode)
    specs = backend_specs(backends)
    options = engine_options(option, specs)
    such = "--cache past.0.key=present.0.key"
    pairs = dict(parse_pair("--cache", text, such) for text in cache or ())

    from auditor import datafiles, discovery
    from auditor.options import AuditOptions
    from auditor.sequences.generate import generate
    from auditor.sequences.runs import Harness
    from reports import _generate as table

    given = datafiles.read(data, "--data") if data is not None else {}
    asked = AuditOptions(backends=specs, options=options, threads=threads, timeout=timeout)
    with (
        TemporaryDirectory(prefix="audit-generate-") as scratch,
        displayed_progress() as progress,
    ):
        report = generate(
            model,
            ids,
            tokens,
            Harness(asked, discovery.noises(), progress, Path(scratch)),
            caches=pairs,
            given={name: stored.read(None) for name, stored in given.items()},
        )
    if output is not None:
        write(output, table.render_json(report))
    emit(table.render(report, *screen(), decode))
    turned = any(part.first is not None for part in report.backends)
    return exit_code(turned, [part.complete for part in report.backends], bool(backends))


def _tokenizer(path: Path | None) -> tuple[Any, Callable[[int], str] | None]:
    if path is None:
        return None, None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            "--tokenizer needs the package tokenizers", "pip install tokenizers"
        ) from error
    try:
        made = Tokenizer.from_file(str(path))
    except Exception as error:  # it raises Exception itself
        raise UsageError(
            f"--tokenizer {path} cannot be read: {reason(error)}", "Give a tokenizer.json."
        ) from error
    return made.encode, lambda token: str(made.decode([token], skip_special_tokens=False))


def _prompt(ids: str | None, text: str | None, encode: Any) -> list[int]:
    if (ids is None) == (text is None):
        raise UsageError("give one of --prompt-ids and --prompt", "Such as --prompt-ids 1,15,27.")
    if text is not None:
        if encode is None:
            raise UsageError("--prompt needs a --tokenizer", "Or give --prompt-ids.")
        found = list(encode(text).ids)
    else:
        parts = [part.strip() for part in (ids or "").split(",")]
        if not all(part.isdecimal() for part in parts):
            raise UsageError(f"--prompt-ids `{ids}` are no token ids", "Such as 1,15,27.")
        found = [int(part) for part in parts]
    if not found:
        raise UsageError("the prompt is empty", "Give one token at least.")
    return found
