"""Freed memory goes back to the system, and workers keep no program that nothing needs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import save

from auditor.capture.trace import Tracer
from auditor.ports import Silent
from auditor.processes import memory
from auditor.processes.worker import workers
from auditor.records.backend import BuildRequest
from tests.helpers import onnx_model


def _resident() -> int:
    """Bytes of this process in memory (proc(5), statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's freed memory, on Linux")
def test_what_was_freed_goes_back():
    kept = [np.ones(8192, np.float32) for _ in range(6000)]  # 192 MB in small pieces
    pin = kept[-1]  # the heap's top stays in use, so that nothing goes back by itself
    del kept
    before = _resident()
    memory.give_back()
    assert pin.all()
    assert before - _resident() > 100 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) of glibc")
def test_what_replays_free_is_kept_for_the_next():
    """Mapped anew, each page of a large layer's tensors would be zeroed by the system each time.

    In a process of its own, for the setting stays.
    """
    code = """
import resource
from auditor.processes import memory
memory.one_heap()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def replay():
    return b"x" * (48 << 20)  # more than glibc keeps by itself
replay()
before = faults()
for _ in range(4):
    replay()
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < (48 << 20) // os.sysconf("SC_PAGE_SIZE")  # those of a single one


def test_a_worker_keeps_no_program_after_the_last_capture(tmp_path):
    """So a sample after the one that was called the last is a gap, not a wrong answer."""
    weight = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)
    path = tmp_path / "large.onnx"
    save(
        onnx_model(
            "(float[1, 2048] x) => (float[1, 2048] y) { h = MatMul(x, w) y = Erf(h) }",
            {"w": weight},
            ir_version=9,
        ),
        path,
    )
    feeds = {"x": np.ones((1, 2048), np.float32)}
    with workers(["ort"]) as (worker,):
        tracer = Tracer("ort", worker, 60.0, Silent())
        assert tracer.start()
        request = BuildRequest(path, {"x": (1, 2048)}, False, None, 1, {}, worker.workdir)
        tracer.build(request)
        trace = tracer.sample(feeds, last=True)
        assert trace is not None
        assert trace.bitwise_equal
        assert "h" in trace.tensors
        assert tracer.sample(feeds, last=True) is None  # nothing is left to capture with
        assert tracer.gap is not None
