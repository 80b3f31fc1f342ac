"""An audit tells nobody."""

import os
import subprocess
import sys


def test_onnx_runtimes_telemetry_is_off(tmp_path):
    """Left on, it keeps a device id and a queue of events in the user's cache."""
    environment = os.environ | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment.pop("XDG_CACHE_HOME", None)
    code = "import auditor, onnxruntime"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
