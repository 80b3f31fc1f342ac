"""Where a report goes: the terminal, a file, or both."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from auditor.commands._stop import stop
from auditor.errors import UsageError

if TYPE_CHECKING:
    from auditor.ports import Renderer
    from auditor.records.report import AuditReport

UNENCODABLE = "backslashreplace"  # file names need not be UTF-8, nor the terminal


class Destination:
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
        stop.check()
        if self.written and self.path:
            write(self.path, self.written.render(report, width=None, color=False))
        if self.shown:
            width, color = screen()
            emit(self.shown.render(report, width=width, color=color))


def destination_for(
    format: str | None, output: Path | None, read: Sequence[Path | None]
) -> Destination:
    """Choose formats; refuse, before any work is done, a file that could not be written.

    Args:
        format: name given by the user.
        output: file given by the user.
        read: files given as input, which must not be overwritten.
    """
    from auditor import discovery

    if format is None and output is None:
        return Destination(discovery.terminal(), None, None)
    renderers = discovery.renderers()
    if format is not None:
        discovery.require(format, renderers, "report format", "Formats")
        if output is None:
            return Destination(renderers[format], None, None)
    assert output is not None
    output = output.resolve()
    if any(path and path.resolve() == output for path in read):
        raise UsageError(f"-o {output} would overwrite an input", "Choose another file.")
    check_writable(output)
    if format is not None:
        return Destination(None, renderers[format], output)
    endings = {suffix: renderer for renderer in renderers.values() for suffix in renderer.suffixes}
    # The longest one counts: `report.sarif.json` is SARIF.
    ending = max(filter(output.name.lower().endswith, endings), key=len, default=".txt")
    return Destination(renderers["terminal"], endings[ending], output)


def exit_code(turned: bool, measured: Sequence[bool], named: bool) -> int:
    """What a verb that compares decisions ends with.

    Args:
        turned: whether any decision differs from the reference's.
        measured: of each backend, whether it made decisions, computing as it was asked to.
        named: whether the user named the backends.

    Returns:
        1 where one turned; 3 where a named backend made none, or no backend at all; else 0.
    """
    if turned:
        return 1
    return 3 if (named and not all(measured)) or not any(measured) else 0


def check_writable(output: Path) -> None:
    """Refuse, before any work is done, a file that could not be written."""
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


def make_folder(folder: Path, file: str, hint: str) -> None:
    """Make the folder of an option, and refuse one that ``file`` could not be written to.

    Raises:
        UsageError: with ``hint``, what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}", hint) from error
    check_writable(folder.resolve() / file)


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, which is gone in the end unless it was renamed to it.

    Raises:
        UsageError: something cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            yield draft
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", "Free some space, or choose another folder."
        ) from error


def write(path: Path, text: str) -> None:
    """Write all of it or nothing."""
    with drafted(path) as draft:
        draft.write_text(text, encoding="utf-8", errors=UNENCODABLE)
        draft.replace(path)


def emit(text: str) -> None:
    """Write a report to standard output; a reader that has left (``| head``) is no error.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UsageError(
                f"cannot write to standard output: {error.strerror}",
                "Free some space where it goes, or write the report with -o FILE.",
            ) from error


def screen() -> tuple[int | None, bool]:
    """Width of the terminal on standard output, None when it is not one, and whether to colour."""
    terminal = sys.stdout.isatty()
    if "COLUMNS" in os.environ or terminal:
        import shutil

        width: int | None = shutil.get_terminal_size().columns
    else:
        width = None
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return width, terminal and not plain
