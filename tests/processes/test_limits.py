"""What a worker's process may use."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.ports import Silent
from auditor.processes.limits import GIB, Limits, physical_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")


def under(limits: Limits, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has put itself under limits."""
    start = (
        "import json, sys\n"
        "from auditor.processes.limits import Limits, apply\n"
        "missing = apply(Limits(**json.loads(sys.argv[1])))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code, json.dumps(asdict(limits)), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_memory() -> None:
    done = under(Limits(GIB // 2), "bytes(2**30)")
    assert "MemoryError" in done.stderr
    assert under(Limits(0), "bytes(2**30)").returncode == 0


def test_a_file(tmp_path: Path) -> None:
    code = "open(sys.argv[2], 'wb').write(bytes(2**20))"
    done = under(Limits(0, file_size=1 << 16), code, str(tmp_path / "large"))
    assert done.returncode != 0
    assert (tmp_path / "large").stat().st_size <= 1 << 16


def test_the_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import socket\n"
            "try:\n"
            f"    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)\n"
            "    print('connected')\n"
            "except OSError:\n"
            "    print('closed')\n"
            "print(*missing)\n"
        )
        said, why = under(Limits(0), code).stdout.splitlines()
        # Where the system does not allow it, that is said.
        assert (said == "closed") == (why == ""), (said, why)
        opened = under(Limits(0, network=True), code).stdout.splitlines()
        assert opened == ["connected", ""]


def test_no_core_file_and_the_users_own_lower_limits() -> None:
    code = (
        "import resource as r\n"
        "print(r.getrlimit(r.RLIMIT_CORE), r.getrlimit(r.RLIMIT_DATA)[0])\n"
        "print(apply(Limits(2**40)), r.getrlimit(r.RLIMIT_DATA)[0])\n"
    )
    first, second = under(Limits(2**30), code).stdout.splitlines()
    assert first == f"(0, 0) {2**30}"
    assert second.endswith(f" {2**30}")


def test_an_engine_that_needs_more_memory_is_a_gap(efficientnet: Path) -> None:
    options = AuditOptions(backends=(BackendSpec("ort"),), limits=Limits(135 << 20))
    report = audit(efficientnet, options, noises=discovery.noises(), progress=Silent())
    (gap,) = report.gaps
    assert (gap.stage, report.exit_code) == ("build", 3)
    assert "out of memory" in gap.reason
    assert "--worker-memory" in (gap.remedy or "")


def test_the_machine_says_how_much_it_has() -> None:
    assert physical_memory() > 1 << 28
