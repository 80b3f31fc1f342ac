"""The files of a reproducer: a model, its inputs, what is expected, a script and an issue."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from auditor.ports import Script
from auditor.processes.limits import Limits, physical_memory
from auditor.processes.worker import module_path
from auditor.records.backend import Provenance

if TYPE_CHECKING:
    from auditor.ports import Arrays
    from auditor.records.report import AuditReport, Finding

MODEL, INPUTS, EXPECTED = "model.onnx", "inputs.safetensors", "expected.safetensors"
SCRIPT, ISSUE = "repro.py", "ISSUE.md"
_SECONDS = 600.0  # for the script that is written, on this machine


@dataclass(frozen=True, slots=True)
class Reproducer:
    """What was written.

    Attributes:
        place: of what the model was cut out, in words.
        nodes, of: how many nodes it has, and how many the finding's segment has.
        relative_l2: how far the backend's outputs are from the reference's in the cut.
        shown: whether the script, run here, showed the difference; ``said`` is what it printed.
        trials: how many models were built to get there.
    """

    place: str
    nodes: int
    of: int
    relative_l2: float
    shown: bool
    said: str
    trials: int


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its inputs, and what the two sides make of them."""

    model: onnx.ModelProto
    feeds: Arrays
    expected: Arrays
    relative_l2: float
    reference: str  # what computed ``expected``


_SCRIPT = '''\
"""Shows where {engine} differs from ONNX: exit code 1 while it does, 0 once it does not.

Needs {packages}.
Inputs are those that {engine} had inside the whole model; the expected values are those of
ONNX Runtime without optimisation.
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
LIMIT = {limit!r}  # relative L2 from which on the two count as different

{source}

def relative_l2(observed, expected):
    if observed.shape != expected.shape:
        print(f"  shape {{observed.shape}} instead of {{expected.shape}}")
        return np.inf
    o, e = (np.asarray(v, np.float64) for v in (observed, expected))
    finite = np.isfinite(e)
    alike = np.array_equal(o[~finite], e[~finite], equal_nan=True)
    if not alike or not np.isfinite(o[finite]).all():
        print(f"  NaN or infinity: {{o.ravel()[:8]}} instead of {{e.ravel()[:8]}}")
        return np.inf
    return np.linalg.norm((o - e)[finite]) / (np.linalg.norm(e[finite]) or 1.0)


def main():
    expected = load_file(HERE / "{expected}")
    feeds = load_file(HERE / "{inputs}")
    observed = run(str(HERE / "{model}"), {{name: feeds[name] for name in {order!r}}})
    print(version())
    worst = 0.0
    for name, value in expected.items():
        print(repr(name))
        distance = relative_l2(np.asarray(observed[name]), value)
        if np.isfinite(distance):
            apart = np.abs(np.asarray(observed[name], np.float64) - np.asarray(value, np.float64))
            at = np.unravel_index(int(np.nanargmax(apart)), apart.shape) if apart.size else ()
            got = np.asarray(observed[name])[at] if apart.size else None
            print(f"  relative L2 {{distance:.3e}}, farthest at {{tuple(map(int, at))}}:", end=" ")
            print(f"{{got!r}} instead of {{value[at] if apart.size else None!r}}")
        worst = max(worst, distance)
    print(f"{{'DIFFERENT' if worst >= LIMIT else 'alike'}}: {{worst:.3e}}, limit {{LIMIT:.3e}}")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
'''


def write(folder: Path, case: Case, script: Script, limit: float) -> None:
    """Write a case and the script that shows it: exit code 1 from ``limit``, relative L2, on."""
    from safetensors.numpy import save_file

    onnx.save(case.model, folder / MODEL)
    # safetensors refuses strided arrays; ascontiguousarray would turn a scalar into a vector.
    for name, values in ((INPUTS, case.feeds), (EXPECTED, case.expected)):
        save_file({n: np.asarray(v, order="C") for n, v in values.items()}, folder / name)
    text = _SCRIPT.format(
        engine=script.engine,
        packages=f"numpy, safetensors, {script.packages}",
        limit=float(f"{limit:.3g}"),
        source=script.source,
        expected=EXPECTED,
        inputs=INPUTS,
        model=MODEL,
        order=list(case.feeds),
    )
    (folder / SCRIPT).write_text(text, encoding="utf-8")


# The limits of a backend's process, then the script as if it had been called.
_BOOTSTRAP = """
import json, runpy, sys
from auditor.processes.limits import Limits, apply
apply(Limits(**json.loads(sys.argv[1])))
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def run(folder: Path, limits: Limits | None) -> tuple[bool, str]:
    """Whether the script shows the difference, and what it printed.

    It runs a part of a model from a stranger, so it gets the limits that a backend's process has.
    """
    allowed = json.dumps(asdict(limits or Limits(physical_memory())))
    line = [sys.executable, "-c", _BOOTSTRAP, allowed, SCRIPT]
    try:
        done = subprocess.run(
            line,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": module_path()},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"the script took longer than {_SECONDS:g} s"
    said = done.stdout if "DIFFERENT" in done.stdout else done.stdout + done.stderr[-2000:]
    return done.returncode == 1 and "DIFFERENT" in done.stdout, said.strip()


def _quoted(text: str) -> str:
    """A name as Markdown shows it whatever it holds."""
    shown = "".join(c if c.isprintable() and c != "`" else ascii(c)[1:-1] for c in text)
    return f"`{shown[:300]}`"


def _nodes(number: int) -> str:
    return f"{number} node" if number == 1 else f"{number} nodes"


def issue(
    made: Reproducer, case: Case, finding: Finding, report: AuditReport, provenance: Provenance
) -> str:
    """The text of an issue for the engine's developers, in Markdown."""
    operators = [node.op_type for node in case.model.graph.node if node.op_type != "Constant"]
    kinds = ", ".join(dict.fromkeys(operators))
    opset = next((o.version for o in case.model.opset_import if o.domain in ("", "ai.onnx")), 1)
    inputs = ", ".join(f"{v.dtype} {list(v.shape)}" for v in case.feeds.values())
    options = ", ".join(_quoted(f"{k}={v}") for k, v in provenance.options.items()) or "none"
    model_hash = report.model.sha256[:12]
    cause = "not known: no replayed cause explains it"
    if finding.noise is not None:
        title = _quoted(finding.noise)
        share = "" if finding.explained is None else f" (explains {finding.explained:.2%} of it)"
        cause = f"{title}{share}"
    return f"""\
# {provenance.engine}: {kinds} differs from ONNX by {case.relative_l2:.1e} relative L2

`python {SCRIPT}` in this folder runs `{MODEL}` ({_nodes(made.nodes)}: {kinds}; opset {opset}) on
`{INPUTS}` ({inputs}) and compares it with `{EXPECTED}`, the values of
{case.reference}.

## Expected

Values as the ONNX operator specification defines them, up to rounding.

## What happens

```
{made.said}
```

## Environment

- {provenance.engine} {provenance.version} on {provenance.device}
- options: {options}
- Python {platform.python_version()}, {platform.platform()}

## Where it comes from

- Cut out of {_quoted(os.path.basename(report.model.path))} (sha256 {model_hash}):
  {made.place}.
- Kernel, as the engine states it: {_quoted(finding.kernel) if finding.kernel else "not stated"}
- Cause, measured by replaying it: {cause}
"""
