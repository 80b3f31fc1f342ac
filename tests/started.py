"""``audit`` in a process that has imported others' packages already, as most of a start is that.

Run as a script, this is a server: Python with those packages and nothing of ours. For each line on
its standard input it forks, and the child does what ``python -m auditor`` does: it imports every
module of ours anew, in the given folder and environment. What a variable changes before that, or
the interpreter's own start, needs ``subprocess``.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, cast

_PACKAGES = ("ml_dtypes", "numpy", "onnx", "pydantic", "rich.console", "typer", "typer._adapters")
_ONE_AT_A_TIME = threading.Lock()


@functools.cache
def _server(environment: frozenset[tuple[str, str]]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def audit(
    folder: Path, arguments: list[str], common: dict[str, str], more: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run ``audit`` with the arguments in a folder.

    Args:
        folder: the working directory.
        arguments: those of the command line.
        common: the environment, the same in most calls: each has a server.
        more: variables that Python and the packages above do not read as they start.
    """
    with _ONE_AT_A_TIME, tempfile.TemporaryDirectory() as scratch:
        server = _server(frozenset(common.items()))
        said = [Path(scratch, name) for name in ("out", "err")]
        asked = (str(folder), arguments, more, *map(str, said))
        try:
            print(json.dumps(asked), file=server.stdin, flush=True)
            code = int(cast("IO[str]", server.stdout).readline())
        except BaseException:  # pytest's time is up, or Ctrl-C
            _server.cache_clear()
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            raise
        out, err = (path.read_text("utf-8") for path in said)
    return subprocess.CompletedProcess(["audit", *arguments], code, out, err)


def _become(folder: str, arguments: list[str], more: dict[str, str], out: str, err: str) -> None:
    for number, name in enumerate((os.devnull, out, err)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.update(more)
    tempfile.tempdir = None
    sys.argv[1:] = arguments
    sys.path[0] = os.getcwd()
    runpy.run_module("auditor", run_name="__main__", alter_sys=True)


def _serve() -> None:
    for name in _PACKAGES:
        importlib.import_module(name)
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            _become(*json.loads(line))
            return  # or raise: the interpreter ends as it does elsewhere, with a traceback
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
