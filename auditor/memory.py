"""Memory that was freed, given back to the system.

The C library keeps what a program frees for its next allocations. An engine takes several times a
model's size while it compiles and never again, and the auditor holds a whole session only once:
kept, that memory is missing to the processes beside.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library can (malloc_trim(3), glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)
