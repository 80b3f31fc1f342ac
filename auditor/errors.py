"""The errors a user can meet, each with a hint saying what to do.

Findings are never exceptions: these mean that something could not be audited.
"""

from __future__ import annotations

from collections.abc import Iterable


class AuditError(Exception):
    """Something the auditor cannot do, with a hint for the person who asked.

    Attributes:
        message: what is wrong, in one sentence.
        hint: what to do about it, in one sentence; empty when there is nothing to do.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AuditError):
    """Bad arguments, configuration, model or data: exit code 2.

    Names in it come from files and may hold anything: what cannot be printed is shown as such.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(_printable(message), _printable(hint))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


class BackendError(AuditError):
    """A backend could not do its part: becomes a gap, never ends the audit.

    Attributes:
        stage: where it stopped: ``start``, ``build``, ``run``, ``instrument`` or ``capture``.
        log: the last lines the backend printed, oldest first.
    """

    def __init__(
        self, message: str, hint: str = "", *, stage: str = "build", log: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint)
        self.stage = stage
        self.log = log


class NoiseError(AuditError):
    """A noise could not be replayed on a segment: becomes a gap."""


def reason(error: Exception) -> str:
    """What an exception says, of the system's own without the number and the file's name."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """``Did you mean `x`? `` when something known resembles ``wrong``, else nothing."""
    import difflib

    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f"Did you mean `{close[0]}`? " if close else ""
