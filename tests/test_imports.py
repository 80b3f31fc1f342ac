"""Every module imports with no engine installed, and starting up imports nothing heavy."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("cuda", "openvino", "tensorrt", "tensorrt_rtx", "torch", "tvm")

# Runs before anything else: an import of a blocked package fails as if it were not installed.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def modules() -> list[str]:
    found = []
    for package in ("auditor", "backends", "reports"):
        found.append(package)
        found += [
            m.name for m in pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")
        ]
    return [name for name in found if not name.endswith("__main__")]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_module_imports_without_engines() -> None:
    names = modules()
    assert {"auditor.records", "auditor.cli", "backends.ort", "reports.terminal"} <= set(names)
    code = BLOCKER.format(blocked=ENGINES) + (
        "import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    )
    done = run(code, *names)
    assert done.returncode == 0, done.stderr


def test_backends_explain_a_missing_engine() -> None:
    code = BLOCKER.format(blocked=ENGINES) + (
        "import importlib, json\n"
        "answers = {}\n"
        "for name in sys.argv[1:]:\n"
        "    answer = importlib.import_module(f'backends.{name}').BACKEND.availability()\n"
        "    answers[name] = [answer.available, answer.reason, answer.remedy]\n"
        "print(json.dumps(answers))\n"
    )
    done = run(code, "ov", "torch", "tvm", "trt")
    assert done.returncode == 0, done.stderr
    for name, (available, reason, remedy) in json.loads(done.stdout).items():
        assert not available, name
        assert reason and remedy, f"{name} does not say why it is missing and how to get it"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["show", "--help"]])
def test_start_up_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import json, sys\n"
        "sys.argv[0] = 'audit'\n"
        "from auditor.cli import main\n"
        "from auditor.processes.guard import guard\n"
        "guard.run = lambda work, tell: sys.exit(work())\n"  # here, to see what it loads
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "print(json.dumps([code, sorted({m.partition('.')[0] for m in sys.modules})]), "
        "file=sys.stderr)\n"
    )
    done = run(code, *arguments)
    assert done.returncode == 0, done.stderr
    status, loaded = json.loads(done.stderr.splitlines()[-1])
    assert status == 0
    assert "typer" in loaded
    heavy = {"numpy", "onnx", "onnxruntime", "rich", "safetensors", *ENGINES}
    assert not heavy & set(loaded)


def test_a_worker_and_a_printed_report_load_only_what_they_need() -> None:
    """Each start of a worker, and each audit, would otherwise take longer by a tenth of itself."""
    code = (
        "import json, sys\n"
        "from auditor.processes import worker\n"
        "worker._Session('ort', ()).availability()\n"
        "from auditor.comparison import metrics\n"  # what a run needs beside the engine
        "first = sorted(sys.modules)\n"
        "from auditor.commands._output import destination_for\n"
        "shown = destination_for(None, None, []).shown.name\n"
        "print(json.dumps([first, shown, sorted(sys.modules)]))\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    served, shown, printed = json.loads(done.stdout)
    assert {"auditor.comparison.metrics", "auditor.records.backend"} <= set(served)
    assert "auditor.records.measured" not in served
    assert shown == "terminal"
    assert not {"reports.html", "reports.json_v1", "reports.sarif", "reports.junit"} & set(printed)
