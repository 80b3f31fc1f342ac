"""What of this machine decides which kernels a runtime chooses."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from auditor.records.model import Machine

# Instruction sets by which the audited runtimes choose kernels or a default precision.
_FLAGS = frozenset(
    {
        *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
        *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
        *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
    }
)


def here() -> Machine:
    """This machine."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    first = {key.strip(): value.strip() for key, _, value in lines}
    named = first.get("flags") or first.get("Features") or ""
    return Machine(
        cpu=first.get("model name") or platform.processor() or platform.machine(),
        flags=tuple(sorted(_FLAGS & set(named.split()))),
        cores=os.cpu_count() or 1,
        system=platform.platform(),
        python=platform.python_version(),
    )
