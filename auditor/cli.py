"""The entry point: runs a verb and turns its result, or its failure, into an exit code.

Standard output carries the report only; progress, errors and hints go to standard error.
Nothing heavy is imported before it is needed, so that ``audit --help`` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import pkgutil
import signal
import sys
from typing import NoReturn

from typer.exceptions import TyperException

from auditor import __version__, commands
from auditor.commands._app import MAIN, app
from auditor.commands._early import named
from auditor.commands._output import UNENCODABLE
from auditor.commands._stop import stop
from auditor.errors import AuditError
from auditor.processes.guard import guard

_INTERNAL_ERROR = 4
# The disk's faults, not ours.
_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO)
_ROOM = "Make room in the folder for temporary files, or set TMPDIR to another one."

for _verb in pkgutil.iter_modules(commands.__path__):
    if not _verb.name.startswith("_"):  # those are what the verbs share
        importlib.import_module(f"{commands.__name__}.{_verb.name}")


def main() -> NoReturn:
    """Entry point of the ``audit`` command."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=UNENCODABLE)
    guard.run(_run, _fail)


def _open_streams() -> None:
    """Put the null device where a standard stream is closed: no other file may get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


def _run() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop.handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        if early := named(sys.argv[1:]):
            from auditor.processes.worker import start_early

            start_early(early)
        return int(app(prog_name="audit", standalone_mode=False) or 0)
    except TyperException as error:
        message = error.format_message().replace("Value error, ", "")  # pydantic's own words
        verb = getattr(getattr(error, "ctx", None), "info_name", MAIN)
        page = "audit --help" if verb == MAIN else f"audit {verb} --help"
        return _fail(message, f"`{page}` explains every option.", 2)
    except AuditError as error:
        return _fail(error.message, error.hint, 2)
    except OSError as error:
        if "No usable temporary directory" in str(error):
            return _fail("there is no folder for temporary files that can be written", _ROOM, 2)
        if error.errno not in _SYSTEM:
            return _internal_error(error)
        where = f" in {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror}{where}", _ROOM, 2)
    except MemoryError:
        return _fail("not enough memory", "Give smaller inputs with --shape or --data.", 2)
    except Exception as error:
        return _internal_error(error)


def _fail(message: str, hint: str, code: int) -> int:
    stop.check()  # the error may be what an extension module made of the signal
    try:
        from reports._progress import print_error

        print_error(message, hint)
    except Exception:  # the reports may be what is broken, or shadowed by another package
        print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return code


def _internal_error(error: Exception) -> int:
    import tempfile
    import traceback

    stop.check()
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    hint = "This is a bug in the auditor. Please report it"
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="audit-error-",
            suffix=".txt",
            delete=False,
            encoding="utf-8",
            dir=guard.outside() or None,
        ) as file:
            file.write(f"audit {__version__}, arguments: {sys.argv[1:]}\n")
            traceback.print_exception(error, file=file)
        hint += f" with {file.name}."
    except OSError:  # a sandbox, or a full disk
        hint += ", with what it prints without --sandbox."
    return _fail(f"internal error: {what}", hint, _INTERNAL_ERROR)
