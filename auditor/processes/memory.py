"""Memory that was freed, given back to the system.

The C library keeps what a program frees for its next allocations. An engine takes several times a
model's size while it compiles and never again, and the auditor holds a whole session only once:
kept, that memory is missing to the processes beside.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
# Bytes freed at the heap's end that are kept, and from which on an allocation is mapped.
_KEPT, _MAPPED = 64 << 20, 1 << 30


def one_heap() -> None:
    """Let all threads of this process allocate from one heap, where the C library can (glibc).

    With a heap of its own each thread keeps what it freed: walks on two threads made the auditor
    a third larger. What replays of a large layer free is kept for the next: mapped anew each time,
    half of the time went into the system's zeroing it. To be called before there are threads.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_ARENA_MAX, 1)
            libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Return freed memory to the system, where the C library can (malloc_trim(3), glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)
