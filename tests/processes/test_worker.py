"""Workers: whatever happens to the process becomes a named gap, and nothing stays behind."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from auditor.commands._early import named
from auditor.errors import BackendError
from auditor.processes import limits, wire, worker
from auditor.records.backend import Availability, BuildRequest, Kernel, Probe, Provenance


@pytest.fixture
def ort(tmp_path):
    started = worker.Worker("ort", tmp_path, limits.Limits(0))
    yield started
    started.kill()


@pytest.mark.parametrize("kind", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_names_stage_and_signal(ort, kind):
    ort.call("availability", Availability, timeout=60)
    os.kill(ort._process.pid, kind)
    with pytest.raises(BackendError) as caught:
        ort.call("build", dict, timeout=60, request={})
    assert kind.name in caught.value.message
    assert caught.value.stage == "build"
    if kind is signal.SIGSEGV:
        assert any("Segmentation" in line for line in caught.value.log)


@pytest.mark.parametrize(
    "said", ["Fatal Python error: Segmentation fault", "!!!!!!! Segfault encountered !!!!!!!"]
)
def test_a_long_stack_leaves_the_last_words(ort, said):
    """As faulthandler and TVM print it: its first lines are what matters."""
    ort.kill()
    stack = [f'  File "Python/ceval.c", line {n}, in frame{n}' for n in range(40)]
    ort._log.write_text("\n".join(["fusing conv2d", said, *stack]))
    log = ort._log_tail()
    assert log[:3] == ("fusing conv2d", said, stack[0])
    assert len(log) < 10


def test_a_hang_is_stopped_and_named(ort):
    ort.call("availability", Availability, timeout=60)
    os.kill(ort._process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(BackendError, match="did not answer within 1 s"):
        ort.call("availability", Availability, timeout=1)
    assert time.monotonic() - begun < 20
    assert ort._process.returncode == -signal.SIGKILL


def test_an_exception_in_the_adapter_is_a_gap_with_its_log(ort):
    with pytest.raises(BackendError) as caught:
        ort.call("build", dict, timeout=60, request={"nonsense": 1})
    assert "KeyError" in caught.value.message
    assert any("Traceback" in line for line in caught.value.log) or caught.value.log


def test_a_worker_started_early_serves_and_leaving_the_block_ends_and_removes_all():
    worker.start_early(["ort", "ov"])
    early = tuple(worker._early)
    with pytest.raises(KeyboardInterrupt), worker.workers(["ort", "ort"]) as started:
        assert started[0] is early[0] and started[1] not in early
        assert not early[1].alive
        assert early[0].call("availability", Availability, timeout=60).version
        raise KeyboardInterrupt
    assert not any(w.workdir.exists() for w in (*started, *early))
    assert all(w._process.returncode is not None for w in (*started, *early))


def test_backends_are_named_before_the_arguments_are_understood():
    assert named(["m.onnx", "--backends", "ov:GPU, ort,nope", "--seed", "1"]) == ["ov", "ort"]
    assert named(["sysnoise", "--backends=ort", "m.onnx"]) == ["ort"]
    assert named(["m.onnx", "--seed", "ort"]) == named(["--help", "--backends", "ort"]) == []
    for limited in ("--sandbox", "--worker-memory=2"):
        assert named(["m.onnx", "--backends", "ort", limited]) == []


def test_arrays_travel_without_changing_a_bit(tmp_path):
    tensors = {
        "__metadata__": np.asarray([np.nan, -0.0, np.inf], np.float32),
        "a/b\n": np.arange(6).reshape(2, 3)[:, ::-1],
        "scalar": np.asarray(3.5, np.float64),
        "empty": np.zeros((0, 4), np.float16),
        "flag": np.asarray([True, False]),
        "texts": np.asarray([["a", "caf\u00e9"], ["", "\U0001f408"]]),
        "no letter": np.asarray(""),
    }
    path = tmp_path / "t.safetensors"
    back = wire.load(path, wire.save(path, tensors))
    assert not path.exists()
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert back[name].tobytes() == np.ascontiguousarray(value).tobytes()


def test_records_travel_unchanged():
    request = BuildRequest(Path("m.onnx"), {"x": (1, 2)}, False, None, 2, {"k": "v"}, Path("w"))
    assert wire.decode(BuildRequest, wire.encode(request)) == request
    provenance = Provenance("E", "1", "cpu", {}, (Kernel("k", "Conv", ("n",)),), ("note",))
    assert wire.decode(Provenance, wire.encode(provenance)) == provenance
    probes = (Probe("t"), Probe("u", "cone-proved", True))
    assert wire.decode(tuple[Probe, ...], wire.encode(probes)) == probes
