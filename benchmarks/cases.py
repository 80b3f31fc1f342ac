"""Real bugs of backends, as single small models: what an audit says of each.

    python -m benchmarks.cases FOLDER [--backends ort,ov,tvm] [--option ov.KEY=VALUE] [NAME ...]

FOLDER holds ``NAME.onnx`` with its inputs in ``NAME.npz``, and in ``index.json`` a list of
``[NAME, {BUILD: figure}, …]``: on which builds each diverges (``ov_f32``, ``tvm`` …; the backend's
id stands before the underscore). ``FOLDER/controls`` holds models that must stay silent. One line
is printed for each backend on which a case diverges, or on which a control is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from auditor import discovery
from auditor.audit import AuditOptions, BackendSpec, audit
from auditor.errors import AuditError
from auditor.ports import Silent
from auditor.records.report import AuditReport, Finding


def examined(
    path: Path, backends: Sequence[str], options: dict[str, dict[str, str]]
) -> AuditReport:
    """Audit one model on its own inputs."""
    asked = AuditOptions(
        backends=tuple(BackendSpec(backend) for backend in backends),
        data=path.with_suffix(".npz"),
        nonfinite=True,
        options=options,
        confirm=False,
        threads=1,
    )
    return audit(path, asked, noises=discovery.noises(), progress=Silent())


def described(finding: Finding) -> str:
    """Nodes, cause and size of a finding on one line."""
    nodes = " + ".join(finding.nodes[:3]) + (" …" if len(finding.nodes) > 3 else "")
    share = f" {finding.explained:.4f}" if finding.noise else ""
    return f"{nodes}: {finding.noise or 'unexplained'}{share}, introduced {finding.introduced:.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--backends", default="ort,ov,tvm")
    parser.add_argument("--option", action="append", default=[], help="BACKEND.KEY=VALUE")
    arguments = parser.parse_intermixed_args(argv)
    backends = arguments.backends.split(",")
    options: dict[str, dict[str, str]] = {}
    for option in arguments.option:
        where, value = option.split("=", 1)
        backend, key = where.split(".", 1)
        options.setdefault(backend, {})[key] = value
    index = json.loads((arguments.folder / "index.json").read_text())
    diverging = {name: {build.split("_")[0] for build in builds} for name, builds, *_ in index}
    controls = sorted((arguments.folder / "controls").glob("*.onnx"))
    totals: Counter[str] = Counter()
    for path in [arguments.folder / f"{name}.onnx" for name in diverging] + controls:
        if arguments.names and path.stem not in arguments.names:
            continue
        kind = "control" if path in controls else "case"
        totals[f"{kind}s"] += 1
        try:
            report = examined(path, backends, options)
        except AuditError as error:
            totals[f"{kind}s refused"] += 1
            print(f"{kind} {path.stem}: refused: {error.message}", flush=True)
            continue
        expected = set() if kind == "control" else diverging[path.stem]
        first = {f.backend: f for f in reversed(report.findings)}
        for backend in backends:
            finding = first.get(backend)
            if finding is not None:
                totals[f"{kind}s found on a backend"] += 1
                totals[f"{kind}s found on a backend, cause named"] += finding.noise is not None
                mark = "found" if backend in expected else "reported, not listed"
                print(f"{kind} {path.stem}, {backend}: {mark}: {described(finding)}", flush=True)
            elif backend in expected:
                totals[f"{kind}s missed on a backend"] += 1
                gaps = "; ".join(g.reason for g in report.gaps if g.subject == backend)
                print(f"{kind} {path.stem}, {backend}: MISSED {gaps}", flush=True)
    for what, count in totals.items():
        print(f"{count:5d} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
