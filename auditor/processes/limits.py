"""What a worker may use: a model from a stranger runs in it, inside native code.

A worker puts itself under these limits before it imports its engine. They bound accidents (a model
that asks for a terabyte, an engine that fills the disk) and keep a model that has taken over an
engine off the network; they are no sandbox (docs/security.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from dataclasses import dataclass

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # sched.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4  # prctl.h
_DESCRIPTORS = 4096
_CPU = 24 * 3600  # seconds
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one worker.

    Attributes:
        memory: bytes of private writable memory (setrlimit(2), RLIMIT_DATA); 0 for no limit.
        file_size: bytes of one file that it writes (RLIMIT_FSIZE); 0 for no limit.
        network: whether it may use the network.
    """

    memory: int
    file_size: int = 64 * GIB
    network: bool = False


def physical_memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def apply(limits: Limits) -> tuple[str, ...]:
    """Put the calling process under limits; it must have one thread only.

    It also ends when its parent does.

    Returns:
        What could not be limited here, in words.
    """
    if sys.platform != "linux":
        return ("memory, file sizes and the network are limited on Linux only",)
    import resource

    missing = []
    wanted = {
        resource.RLIMIT_CORE: 0,  # a crash becomes a gap in the report, not a file
        resource.RLIMIT_NOFILE: _DESCRIPTORS,
        resource.RLIMIT_CPU: _CPU,
        resource.RLIMIT_DATA: limits.memory or resource.RLIM_INFINITY,
        resource.RLIMIT_FSIZE: limits.file_size or resource.RLIM_INFINITY,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        # The user's own limit may be lower; "no limit" is -1, so the comparison is unsigned.
        bound = min(value, hard, key=lambda limit: limit % (1 << 64))
        resource.setrlimit(kind, (bound, bound))
    libc = ctypes.CDLL(None, use_errno=True)
    if not limits.network and not leave_network(libc):
        missing.append(f"the network could not be closed to it ({os.strerror(ctypes.get_errno())})")
    # After the namespaces: entering one resets both.
    libc.prctl(_PR_SET_DUMPABLE, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return tuple(missing)


def leave_network(libc: ctypes.CDLL) -> bool:
    """Enter a network namespace of its own, without any interface (network_namespaces(7)).

    Without privileges that needs a user namespace as well, in which the process keeps its user.
    """
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    with contextlib.suppress(OSError):  # without the maps, files belong to "nobody" by name
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w", encoding="ascii") as target:
                target.write(text)
    return True
