"""``--sandbox``: the audit, its reference and its engines see only what they need.

From the moment that it is entered, the process and all it starts may read the installed software
and the folders of the files named on the command line, write to the report's folder and a
temporary folder, and nothing else; there is no network, and no signal reaches a process outside.
It is Linux's Landlock (landlock(7), since 5.13), which needs no privileges and no other program.
Linux 6.12 and later also keep abstract sockets and signals in.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from auditor.errors import UsageError
from auditor.processes.limits import leave_network

# landlock.h
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many access rights a version knows
_TCP = 0b11  # bind and connect, from version 4 on
_SCOPED = 0b11  # abstract sockets and signals, from version 6 on
_PR_SET_NO_NEW_PRIVS = 38  # prctl.h

# What libraries read of a system. Not /etc as a whole: root could read all of it.
_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/sys"),
    # Not what other processes show of themselves, their environment above all.
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/sys/kernel"),
    *("/proc/sys/vm", "/proc/filesystems", "/proc/self", "/proc/driver"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/OpenCL", "/etc/alternatives"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm")
_HINT = (
    "It needs Linux 5.13 or later with Landlock (`lsm=landlock` at boot). Without it, run the "
    "audit in a container that holds nothing but the model."
)


def version() -> int:
    """Landlock's version here; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    found: int = ctypes.CDLL(None).syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION)
    return max(0, found)


def enter(read: Iterable[Path], write: Iterable[Path]) -> None:
    """Restrict this process and everything that it starts; there is no way back.

    Call it while the process has one thread.

    Args:
        read: files and folders that may be read besides the installed software.
        write: folders that may be read and written besides a temporary one.

    Raises:
        UsageError: the system cannot.
    """
    known = version()
    if not known:
        raise UsageError("--sandbox is not available on this system: it has no Landlock", _HINT)
    libc = ctypes.CDLL(None, use_errno=True)
    # Before the file system is closed: the new namespace's tables are files.
    if not leave_network(libc) and _interfaces() - {"lo"}:
        raise UsageError(
            "--sandbox cannot close the network on this system",
            "Allow user namespaces, or run it in a container with `--network none`.",
        )
    rights = (1 << _RIGHTS.get(known, 16)) - 1
    scratch = Path(tempfile.gettempdir())
    home = scratch / "home"
    home.mkdir(exist_ok=True)
    os.environ["HOME"] = str(home)  # libraries make folders there
    ruleset = _ruleset(libc, known, rights)
    try:
        for path in (*_software(), *read):
            _allow(libc, ruleset, path, rights & _READ)
        devices = (*map(Path, _DEVICES), *Path("/dev").glob("nvidia*"), Path("/dev/dri"))
        for path in (scratch, *devices, *write):
            _allow(libc, ruleset, path, rights & ~_EXECUTE)
        _allow(libc, ruleset, scratch, rights)  # TVM loads the code that it has compiled
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.syscall(_RESTRICT, ruleset, 0) != 0:
            raise _failed()
    finally:
        os.close(ruleset)


def _interfaces() -> set[str]:
    """The network interfaces that this process sees."""
    import socket

    return {name for _, name in socket.if_nameindex()}


def _ruleset(libc: ctypes.CDLL, known: int, rights: int) -> int:
    words = [rights]
    if known >= 4:
        words.append(_TCP)
    if known >= 6:
        words.append(_SCOPED)
    attributes = struct.pack(f"={len(words)}Q", *words)
    ruleset: int = libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise _failed()
    return ruleset


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    """Allow something beneath a path, if there is one."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _ON_FILES
        rule = struct.pack("=Qi", rights, place)
        if libc.syscall(_ADD, ruleset, _PATH_BENEATH, rule, 0) != 0:
            raise _failed()
    finally:
        os.close(place)


def _software() -> set[Path]:
    """Where Python, the auditor, the engines and their libraries are."""
    places = {*_SYSTEM, sys.prefix, sys.base_prefix, sys.executable}
    places |= {place for place in sys.path if place}
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_PATH", "CUDA_HOME"):
        places |= set(filter(None, os.environ.get(name, "").split(os.pathsep)))
    root = Path(__file__).resolve().parents[2]
    own = {root / package for package in ("auditor", "backends", "reports")}
    # A folder on the path may hold more than software; links lead to where the software is.
    found = {Path(place) for place in places} | own
    return found | {path.resolve() for path in found}


def _failed() -> UsageError:
    return UsageError(f"--sandbox failed: {os.strerror(ctypes.get_errno())}", _HINT)
